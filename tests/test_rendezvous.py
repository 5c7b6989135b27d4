from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from msgspec.json import Decoder
from msgspec.structs import replace

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.flags import parse_flags
from batch_inference.measure import nodes
from batch_inference.measure.connection import Connection
from batch_inference.measure.door import Door
from batch_inference.measure.nodes import (
    Answer,
    Dismissal,
    Introduction,
    Nodes,
    NodesError,
    attend,
    call,
    disagreement,
    gather,
    network_of,
    other_arguments,
)

ARGUMENTS = {"--seed": "0", "--dtype": "auto", "--batch-sizes": "1,2"}
FIRST = Introduction(node=0, host="a", arguments=ARGUMENTS, vllm_version="0.32.0", devices=8, devices_needed=4)
SECOND = replace(FIRST, node=1, host="b")


def meet(*others: Introduction, nnodes: int, patience_s: float = 10.0) -> list[str | None]:
    """The verdict that each node hears, node 0 first."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:
        port, deadline_s = server.getsockname()[1], time.monotonic() + patience_s
        calls = [pool.submit(verdict_of, gather, Door(server), FIRST, nnodes, deadline_s)]
        calls += [pool.submit(verdict_of, attend, "127.0.0.1", port, other, deadline_s) for other in others]
        return [call.result(timeout=20) for call in calls]


def verdict_of(meeting: Callable[..., Nodes], *words: Any) -> str | None:
    """None where the nodes fit together, else what is said."""
    try:
        with meeting(*words):
            return None
    except NodesError as error:
        return str(error)


@pytest.fixture
def joined() -> Iterator[tuple[Nodes, Nodes]]:
    """Node 0 and node 1 of a setting that is being measured."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:
        port, deadline_s = server.getsockname()[1], time.monotonic() + 10
        others = pool.submit(gather, Door(server), FIRST, 2, deadline_s)
        with attend("127.0.0.1", port, SECOND, deadline_s) as node_1, others.result(timeout=10) as node_0:
            yield node_0, node_1


def test_node_0_says_when_the_setting_is_over(joined: tuple[Nodes, Nodes]) -> None:
    node_0, node_1 = joined
    assert node_1.dismissed(0.01) is False
    assert node_0.lost() is None
    node_0.dismiss(failed=False)
    assert node_1.dismissed(5) is True


def test_a_setting_that_failed_fails_on_every_node(joined: tuple[Nodes, Nodes]) -> None:
    node_0, node_1 = joined
    node_0.dismiss(failed=True)
    with pytest.raises(NodesError, match="the setting failed; the output of node 0 says why"):
        node_1.dismissed(5)


def test_a_node_that_is_gone_is_seen_at_once(joined: tuple[Nodes, Nodes]) -> None:
    node_0, node_1 = joined
    node_1.__exit__(None, None, None)
    assert node_0.lost() == "node 1 is gone; its output says why"


def test_node_0_that_is_gone_is_seen_at_once(joined: tuple[Nodes, Nodes]) -> None:
    node_0, node_1 = joined
    node_0.__exit__(None, None, None)
    with pytest.raises(NodesError, match="node 0 is gone"):
        node_1.dismissed(5)


def test_the_network_that_joins_the_nodes_is_found(
    joined: tuple[Nodes, Nodes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("VLLM_HOST_IP", raising=False)
    found = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "ib0"}
    assert joined[1].environment() == found


def test_nodes_that_agree_all_go_on() -> None:
    third = replace(SECOND, node=2, host="c")
    assert meet(SECOND, third, nnodes=3) == [None, None, None]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vllm_version": "0.26.0"}, "node 1 (b) has vLLM 0.26.0, but node 0 (a) has 0.32.0"),
        (
            {"arguments": {**ARGUMENTS, "--seed": "1", "--dtype": "half"}},
            "node 1 (b) has different arguments: --seed 1, --dtype half; node 0 (a): --seed 0, --dtype auto",
        ),
        ({"devices": 2}, "node 1 (b) has 2 devices, but 4 are needed on each"),
        ({"vllm_version": None}, "node 1 (b) has no vLLM; run ./setup_env.sh there"),
    ],
)
def test_every_node_hears_what_does_not_fit(change: dict[str, object], said: str) -> None:
    assert meet(replace(SECOND, **change), nnodes=2) == [said, said]


def test_a_node_that_does_not_come_is_named_to_those_that_did() -> None:
    verdicts = meet(SECOND, nnodes=4, patience_s=0.3)
    assert verdicts == ["node 2, 3 of 4 did not come within 60 s; start the same command there"] * 2


def test_somebody_elses_call_is_no_node() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:
        port, deadline_s = server.getsockname()[1], time.monotonic() + 10
        verdict = pool.submit(verdict_of, gather, Door(server), FIRST, 2, deadline_s)
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"node": 1}\n', b""):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(noise)
        assert verdict_of(attend, "127.0.0.1", port, SECOND, deadline_s) is None
        assert verdict.result(timeout=40) is None


def test_a_node_that_is_started_again_takes_its_own_place_and_one_beyond_nnodes_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:
        at, deadline_s, said = server.getsockname(), time.monotonic() + 20, list[str]()
        nodes = [pool.submit(verdict_of, gather, Door(server, say=said.append), FIRST, 3, deadline_s)]
        call(at, SECOND, deadline_s).close()
        beyond = verdict_of(attend, *at, replace(SECOND, node=3, host="x"), deadline_s)
        assert beyond == "node 3 (x) is not one of 3, numbered up to 2; see --nnodes and --node-rank"
        assert said == [f"note: {beyond}"]
        nodes += [pool.submit(verdict_of, attend, *at, replace(SECOND, node=node), deadline_s) for node in (1, 2)]
        assert [node.result(timeout=20) for node in nodes] == [None, None, None]


def test_the_nodes_of_a_setting_wait_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever calls meanwhile."""
    now_s, config = 0.0, ExperimentConfig(nnodes=2, tensor_parallel_size=2, master_addr="a")

    def pass_by(_decoder: object, timeout_s: float) -> list[tuple[Introduction, Connection]]:
        nonlocal now_s
        assert timeout_s > 0
        now_s += min(timeout_s, 0.7)
        return []

    door = SimpleNamespace(heard=pass_by, close=lambda: None)
    monkeypatch.setattr(nodes, "time", SimpleNamespace(monotonic=lambda: now_s))
    monkeypatch.setattr(nodes, "open_door", lambda *_: door)
    with pytest.raises(NodesError, match=r"^node 1 of 2 did not come within 60 s; start the same command there$"):
        nodes.meet(config, lambda _: None)
    assert now_s == 60
    told = dict[str, float]()
    line = SimpleNamespace(receive=lambda _, timeout_s: told.update(waits_s=timeout_s), close=lambda: None)
    monkeypatch.setattr(nodes, "call", lambda _at, _own, deadline_s: told.update(calls_until_s=deadline_s) or line)
    with pytest.raises(NodesError, match="node 0 ended before all nodes had come"):
        nodes.meet(dataclasses.replace(config, node_rank=1), lambda _: None)
    assert told == {"calls_until_s": 120, "waits_s": 65}


def test_node_0_that_does_not_answer_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    problem = verdict_of(attend, "127.0.0.1", port, SECOND, time.monotonic() + 0.3)
    assert problem == f"--master-addr 127.0.0.1: nothing answers on port {port} (Connection refused)"


def test_node_0_itself_may_lack_devices() -> None:
    assert disagreement(replace(FIRST, devices=1), [SECOND]) == "node 0 (a) has 1 device, but 4 are needed on each"


@pytest.mark.slow
def test_two_nodes_that_were_told_the_same_number_are_named() -> None:
    verdicts = meet(SECOND, replace(SECOND, host="b"), nnodes=3, patience_s=1)
    assert verdicts == ["b and b are both node 1; give each its own --node-rank"] * 3


def test_a_stranger_that_says_nothing_delays_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:
        port, deadline_s = server.getsockname()[1], time.monotonic() + 40
        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
        strangers[-1].sendall(b'{"type": "Introduction", "node": 1')
        verdict = pool.submit(verdict_of, gather, Door(server), FIRST, 2, deadline_s)
        assert verdict_of(attend, "127.0.0.1", port, SECOND, deadline_s) is None
        assert verdict.result(timeout=40) is None
        # It did not wait for their words, which it would until the end.
        assert deadline_s - time.monotonic() > 20
        for stranger in strangers:
            stranger.close()


@pytest.mark.slow
@pytest.mark.parametrize("words", [b"SSH-2.0-OpenSSH_9.6\r\n", b""])
def test_something_else_that_listens_on_the_port_is_said(words: bytes) -> None:
    def answer(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                with server.accept()[0] as connection:
                    connection.sendall(words)

    with ThreadPoolExecutor() as pool, socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        pool.submit(answer, server)
        problem = verdict_of(attend, "127.0.0.1", port, SECOND, time.monotonic() + 0.5)
        server.shutdown(socket.SHUT_RDWR)
    assert problem == (
        f"--master-port {port}: another program listens there on 127.0.0.1; choose another port on every node"
    )


def test_a_name_that_leads_nowhere_is_said_at_once() -> None:
    def no_such_host(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "create_connection", no_such_host)
        problem = verdict_of(attend, "no-such-node", 29500, SECOND, time.monotonic() + 60)
    assert problem == "--master-addr no-such-node: nothing answers on port 29500 (Name or service not known)"


def test_a_name_that_cannot_be_looked_up_just_now_is_looked_up_again() -> None:
    errors = [socket.gaierror(socket.EAI_AGAIN, "not now"), socket.gaierror(socket.EAI_NONAME, "no such name")]

    def no_such_host(*_: object, **__: object) -> None:
        raise errors.pop(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "create_connection", no_such_host)
        patch.setattr(nodes, "_CALL_AGAIN_S", 0.0)
        problem = verdict_of(attend, "a", 29500, SECOND, time.monotonic() + 60)
    assert problem == "--master-addr a: nothing answers on port 29500 (no such name)"


@pytest.mark.parametrize(
    ("own", "found"),
    [
        (
            ("127.0.0.1", "10.0.0.1"),
            {"VLLM_HOST_IP": "10.0.0.1", "GLOO_SOCKET_IFNAME": "mine", "NCCL_SOCKET_IFNAME": "eth7"},
        ),
        (("127.0.0.1",), {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "mine", "NCCL_SOCKET_IFNAME": "lo"}),
        (("10.9.9.9",), {"VLLM_HOST_IP": "10.9.9.9"}),
    ],
)
def test_the_network_is_the_one_that_other_machines_came_by(
    own: tuple[str, ...], found: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interfaces = {"lo": ["127.0.0.1"], "eth7": ["fe80::1", "10.0.0.1"]}
    there = {name: [SimpleNamespace(address=one) for one in addresses] for name, addresses in interfaces.items()}
    monkeypatch.setattr("psutil.net_if_addrs", lambda: there)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    for name in ("VLLM_HOST_IP", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    connections: Any = [SimpleNamespace(own_address=address) for address in own]
    assert network_of(connections) == found


def test_two_messages_that_arrive_at_once_are_both_heard() -> None:
    messages = (Answer(None), Dismissal(failed=False))
    for _ in range(100):
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as near:
            near.sendall(b"".join(msgspec.json.encode(message) + b"\n" for message in messages))
            connection = Connection(server.accept()[0])
            assert connection.receive(Decoder(Answer), 1) == Answer(None)
            assert connection.has_spoken
            assert connection.receive(Decoder(Dismissal), 1) == Dismissal(failed=False)
            assert connection.receive(Decoder(Dismissal), 0) is None
            connection.close()


def test_a_dismissal_right_after_the_meeting_is_heard() -> None:
    for _ in range(100):
        with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:
            port, deadline_s = server.getsockname()[1], time.monotonic() + 10

            def node_0(door: Door, deadline_s: float) -> None:
                with gather(door, FIRST, 2, deadline_s) as nodes:
                    nodes.dismiss(failed=False)

            done = pool.submit(node_0, Door(server), deadline_s)
            with attend("127.0.0.1", port, SECOND, deadline_s) as node_1:
                assert node_1.dismissed(5) is True
            done.result(timeout=10)


@pytest.mark.parametrize(
    "noise",
    [
        b"x" * (1 << 18), b"\xff\n", b"[1, 2\n", b'{"type": "Answer", "problem": "\\u001b[2J"}\n',
        b'{"type": "Answer", "x": ' + b"[" * 50_000 + b"\n",
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_trusted", [False, True])
def test_nonsense_is_no_message(noise: bytes, *, is_trusted: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:
        near = socket.create_connection(server.getsockname())
        sending = pool.submit(near.sendall, noise)
        connection = Connection(server.accept()[0])
        if is_trusted:
            connection.trust()
        with pytest.raises(ValueError, match=r"."):
            connection.receive(Decoder(Answer), 5)
        connection.close()
        with contextlib.suppress(OSError):
            sending.result()
        near.close()


def test_who_has_not_proved_to_be_one_of_us_may_not_say_much() -> None:
    long = Answer("x" * 3000)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as near:
        connection = Connection(server.accept()[0])
        near.sendall(msgspec.json.encode(long) + b"\n")
        with pytest.raises(ValueError, match="too long"):
            connection.receive(Decoder(Answer), 5)
        connection.trust()
        assert connection.receive(Decoder(Answer), 5) == long
        connection.close()


def test_arguments_are_compared_by_the_names_of_their_flags() -> None:
    ours = parse_flags(["--seed", "0", "--batch-sizes", "1,2", "--load-format", "dummy"])[0].arguments()
    assert other_arguments(parse_flags(["--batch-sizes", "1,2", "--load-format", "dummy"])[0].arguments(), ours) is None
    theirs = parse_flags(["--batch-sizes", "4", "--hf-token", "secret", "--output-dir", "x"])[0].arguments()
    assert other_arguments(theirs, ours) == (
        "--batch-sizes 4, vLLM's flags --hf-token <hf_token>",
        "--batch-sizes 1,2, vLLM's flags --load-format dummy",
    )


def test_a_long_argument_is_compared_to_its_end() -> None:
    long = [parse_flags(["--additional-config", "x" * 5000 + end])[0].arguments() for end in "ab"]
    assert other_arguments(*long) is not None
    assert max(map(len, long[0].values())) <= 200
