"""The meeting of a preset: who is node 0, which numbers the others get, and what is said where one is wrong."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from msgspec.structs import replace

from batch_inference.core.config import ConfigError
from batch_inference.launch import meeting
from batch_inference.launch.meeting import Hello, Met, introduction, meet, owns, refuse_late
from batch_inference.launch.options import Options, parse_options
from batch_inference.launch.presets import Preset
from batch_inference.measure.nodes import NodesError, call
from batch_inference.plan.devices import Devices

PRESET = Preset("mine", "", settings=[["TP=1"], ["TP=2"]])
OWN = Hello(None, "a", "gpu", 4, "0.32.0", {"--seed": "0", "settings": "TP=1"})


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def options(port: int, address: str = "127.0.0.1", wait_s: float = 10, settle_s: float = 0.3, **given: Any) -> Options:
    return Options(master_addr=address, master_port=port, wait_for_nodes_s=wait_s, settle_s=settle_s, **given)


def end_of(asked: Options, own: Hello) -> Met | str:
    """What a node learns: the others, or what is wrong."""
    try:
        return meet(asked, own)
    except NodesError as error:
        return str(error)


def meeting_of(asked: Options, *nodes: Hello) -> list[Met | str]:
    """What each node learns, where they come one after the other."""
    calls: list[Future[Met | str]] = []
    with ThreadPoolExecutor(len(nodes)) as pool:
        for node in nodes:
            calls.append(pool.submit(end_of, asked, node))
            time.sleep(0.15)
        ends = [call.result(timeout=20) for call in calls]
    for end in ends:
        if isinstance(end, Met) and end.door:
            end.door.close()
    return ends


@pytest.mark.parametrize(
    ("address", "own", "host", "is_owned"),
    [
        ("10.0.0.1", {"127.0.0.1", "10.0.0.1"}, "a", True),
        ("10.0.0.2", {"127.0.0.1", "10.0.0.1"}, "a", False),
        ("fe80::1", {"::1", "fe80::1"}, "a", True),
        ("127.0.1.1", {"127.0.0.1"}, "a", True),
        ("node-a", set(), "node-a", True),
        ("Node-A", set(), "node-a.cluster", True),
        ("localhost", set(), "a", True),
        ("no-such-node.invalid", {"127.0.0.1"}, "a", False),
    ],
)
def test_an_address_is_owned_by_whose_interface_or_name_it_is(
    address: str, own: set[str], host: str, *, is_owned: bool
) -> None:
    assert owns(address, own, host) is is_owned


def test_a_name_of_this_machine_that_leads_to_an_interface_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, 1, 6, "", ("10.0.0.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)
    assert owns("node-a.cluster", {"10.0.0.1"}, "a")
    assert not owns("node-a.cluster", {"10.0.0.2"}, "b")


def test_the_first_to_listen_is_node_0_and_the_others_are_numbered_as_they_come(port: int) -> None:
    ends = meeting_of(options(port, nnodes=4), OWN, *(replace(OWN, host=host) for host in "bcd"))
    assert all(isinstance(end, Met) for end in ends), ends
    assert [end.node for end in ends if isinstance(end, Met)] == [0, 1, 2, 3]
    names = ["node 0 (a)", "node 1 (b)", "node 2 (c)", "node 3 (d)"]
    assert all(end.names == names for end in ends if isinstance(end, Met))


def test_numbers_that_were_given_decide_and_the_rest_are_filled_in(port: int) -> None:
    ends = meeting_of(options(port, nnodes=3), replace(OWN, rank=0), replace(OWN, host="b"), replace(OWN, rank=1))
    assert [end.node for end in ends if isinstance(end, Met)] == [0, 2, 1]


def test_all_of_nnodes_begin_at_once_and_others_when_nobody_more_comes(port: int) -> None:
    start_s = time.monotonic()
    ends = meeting_of(options(port, nnodes=2, settle_s=60), OWN, OWN)
    assert time.monotonic() - start_s < 2
    assert all(isinstance(end, Met) for end in ends)
    start_s = time.monotonic()
    ends = meeting_of(options(port, settle_s=1), OWN, OWN)
    assert 1 < time.monotonic() - start_s < 4
    assert all(isinstance(end, Met) for end in ends)


def test_a_node_that_stays_alone_says_so(port: int) -> None:
    (said,) = meeting_of(options(port, wait_s=0.3), OWN)
    assert said == (
        f"--master-addr 127.0.0.1: no other node came to port {port} within 0.3 s; start the same command on the "
        "others, or drop --master-addr for this node alone"
    )


def test_a_node_that_does_not_come_is_named_to_those_that_did(port: int) -> None:
    said = "node 2 of 3 did not come within 1 s; start the same command there"
    assert meeting_of(options(port, nnodes=3, wait_s=1), OWN, OWN) == [said, said]
    told = replace(OWN, rank=2)
    assert meeting_of(options(port, wait_s=1), OWN, told) == [said.replace("node 2", "node 1")] * 2


def test_two_nodes_of_one_number_are_named(port: int) -> None:
    said = "b and c both are node 1; give each a --node-rank of its own"
    told = replace(OWN, rank=1, host="b")
    assert meeting_of(options(port), OWN, told, replace(told, host="c")) == [said] * 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arguments": {"--seed": "1", "settings": "TP=1"}}, "has other arguments: --seed 1; node 0 (a): --seed 0"),
        ({"arguments": {"--seed": "0"}}, "has other arguments: settings not at all; node 0 (a): settings TP=1"),
        ({"vllm_version": "0.26.0"}, "has vLLM 0.26.0, node 0 (a) 0.32.0"),
        ({"vllm_version": None}, "has no vLLM; run ./setup_env.sh there"),
        ({"kind": "cpu"}, "has cpu devices, node 0 (a) gpu devices"),
    ],
)
def test_every_node_hears_what_does_not_fit(port: int, change: dict[str, Any], said: str) -> None:
    assert meeting_of(options(port), OWN, replace(OWN, host="b", **change)) == [f"node 1 (b) {said}"] * 2


def test_nodes_may_have_different_numbers_of_devices(port: int) -> None:
    ends = meeting_of(options(port), OWN, replace(OWN, devices=2))
    assert [[other.hello.devices for other in end.others] for end in ends if isinstance(end, Met)] == [[2], []]


def test_where_nobody_owns_the_address_each_is_told_of_node_rank_0(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(meeting, "own_addresses", lambda: {"10.0.0.1"})

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", refuse)
    about = "192.0.2.1 is no address of this machine (a); if it leads here, give --node-rank 0 here"
    assert meeting_of(options(port, "192.0.2.1", wait_s=0.3), OWN) == [
        f"--master-addr 192.0.2.1: nothing answers on port {port} (Connection refused); start the same command there; "
        f"{about}"
    ]
    # Not after ten minutes only.
    assert capsys.readouterr().err == f"waits for node 0 at 192.0.2.1, port {port}: {about}\n"


def test_node_rank_0_listens_though_it_does_not_own_the_address(port: int) -> None:
    with ThreadPoolExecutor() as pool:
        first = pool.submit(end_of, options(port, "192.0.2.1"), replace(OWN, rank=0))
        other = end_of(options(port), replace(OWN, rank=1))  # without a rank, the first of one machine is node 0
        assert isinstance(other, Met)
        assert other.node == 1
        met = first.result(timeout=10)
        assert isinstance(met, Met)
        assert met.door is not None
        met.door.close()


def test_an_address_of_ipv6_is_met_on_too(port: int) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    ends = meeting_of(options(port, "::1", nnodes=2), OWN, OWN)
    assert [end.node for end in ends if isinstance(end, Met)] == [0, 1], ends


def test_something_else_that_listens_is_said(port: int) -> None:
    with socket.create_server(("", port)) as server:
        (said,) = meeting_of(options(port), replace(OWN, rank=0))
        assert (
            said == f"--master-port {port}: cannot listen there: Address already in use; choose another on every node"
        )

        def greet() -> None:
            with server.accept()[0] as connection:
                connection.sendall(b"220 mail.example.org ESMTP\r\n")
                connection.recv(1 << 16)

        threading.Thread(target=greet).start()
        (said,) = meeting_of(options(port), OWN)
    assert isinstance(said, str)
    assert said.startswith(f"--master-port {port}: something else listens there on 127.0.0.1")


def test_one_that_goes_again_is_not_waited_for(port: int) -> None:
    with ThreadPoolExecutor() as pool:
        first = pool.submit(end_of, options(port, wait_s=1.5), OWN)
        time.sleep(0.2)
        gone = call(("127.0.0.1", port), OWN, time.monotonic() + 5)
        gone.close()
        said = first.result(timeout=10)
    assert isinstance(said, str)
    assert "no other node came" in said


def test_who_comes_late_is_told_so_by_name(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadPoolExecutor() as pool:
        first = pool.submit(end_of, options(port, nnodes=2), OWN)
        time.sleep(0.2)
        assert isinstance(end_of(options(port, nnodes=2), replace(OWN, host="b")), Met)
        met = first.result(timeout=10)
        assert isinstance(met, Met)
        late = pool.submit(end_of, options(port, nnodes=2), replace(OWN, host="c"))
        began_s = time.monotonic()
        while not late.done() and time.monotonic() < began_s + 10:
            refuse_late(met, began_s)
            time.sleep(0.05)
        assert met.door is not None
        met.door.close()
    said = "c came too late: node 0 (a), node 1 (b) began 0 s before"
    assert late.result() == f"{said}; start the same command again when they are ready"
    assert f"note: {said}\n" in capsys.readouterr().err


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", b'{"type": "Hello", "rank": -1}\n', b"\x00" * 1000, b""])
def test_a_stranger_neither_stops_nor_delays_the_meeting(port: int, noise: bytes) -> None:
    strangers = []
    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as open_lines:
        first = pool.submit(end_of, options(port, nnodes=2), OWN)
        time.sleep(0.2)
        for _ in range(3):
            stranger = open_lines.enter_context(socket.create_connection(("127.0.0.1", port)))
            stranger.sendall(noise)
            strangers.append(stranger)
        assert isinstance(end_of(options(port, nnodes=2), OWN), Met)
        met = first.result(timeout=5)
        assert isinstance(met, Met)
        assert met.door is not None
        met.door.close()


def test_what_is_compared_is_what_was_asked_whatever_the_words() -> None:
    def told(*words: str) -> dict[str, str]:
        return introduction(
            PRESET, parse_options([*words, "--master-addr", "a", "mine"]), Devices("gpu", ("0",))
        ).arguments

    base = told()
    assert (base["preset"], base["settings"], base["--nnodes"]) == ("mine", "TP=1; TP=2", "as they come")
    assert told("--output-dir", "x", "--node-rank", "1", "--resume", "--settle-s", "3") == base
    assert told("--batch-sizes", "1,4,8,16") == base
    for words in (("--model", "x"), ("--seq-lens", "8"), ("--nnodes", "2")):
        assert told(*words) != base


@pytest.mark.parametrize("asked", ["SLURM_NODEID", "--node-rank"])
def test_a_number_that_is_given_is_taken(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["mine", "--master-addr", "a"]
    assert parse_options(words).node_rank is None
    if asked == "SLURM_NODEID":
        monkeypatch.setenv(asked, "3")
        assert parse_options(["mine"]).node_rank is None  # one node of a larger job
    else:
        words += [asked, "3"]
    assert parse_options(words).node_rank == 3
    with pytest.raises(ConfigError, match="--nnodes 2 goes up to 1"):
        parse_options([*words, "--nnodes", "2"])
