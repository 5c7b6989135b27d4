from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from msgspec.structs import replace

from batch_inference.measure.nodes import Introduction, Nodes, NodesError, attend, disagreement, gather
from conftest import REPOSITORY, stub_environment

FIRST = Introduction(node=0, host="a", arguments="1234", vllm_version="0.32.0", devices=8, devices_needed=4)
SECOND = replace(FIRST, node=1, host="b")


def meet(*others: Introduction, nnodes: int, patience_s: float = 10.0) -> list[str | None]:
    """The verdict that each node hears, node 0 first."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:
        port, deadline_s = server.getsockname()[1], time.monotonic() + patience_s
        calls = [pool.submit(verdict_of, gather, server, FIRST, nnodes, deadline_s)]
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
        others = pool.submit(gather, server, FIRST, 2, deadline_s)
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
    with pytest.raises(NodesError, match="the setting failed; what node 0 printed says why"):
        node_1.dismissed(5)


def test_a_node_that_is_gone_is_seen_at_once(joined: tuple[Nodes, Nodes]) -> None:
    node_0, node_1 = joined
    node_1.__exit__(None, None, None)
    assert node_0.lost() == "node 1 is gone; what it printed says why"


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
        ({"vllm_version": "0.26.0"}, "node 1 (b) has vLLM 0.26.0, node 0 (a) 0.32.0"),
        ({"arguments": "5678"}, "node 1 (b) has other arguments: their hash is 5678, node 0 (a) 1234"),
        ({"devices": 2}, "node 1 (b) has 2 devices, 4 are needed on each"),
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
        verdict = pool.submit(verdict_of, gather, server, FIRST, 2, deadline_s)
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"node": 1}\n', b""):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(noise)
        assert verdict_of(attend, "127.0.0.1", port, SECOND, deadline_s) is None
        assert verdict.result(timeout=10) is None


def test_node_0_that_does_not_answer_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    problem = verdict_of(attend, "127.0.0.1", port, SECOND, time.monotonic() + 0.3)
    assert problem == f"--master-addr 127.0.0.1: nothing answers on port {port} (Connection refused)"


def test_node_0_itself_may_lack_devices() -> None:
    assert disagreement(replace(FIRST, devices=1), [SECOND]) == "node 0 (a) has 1 devices, 4 are needed on each"


# As the launcher does before torchrun starts.
PROGRAM = """
import sys
from batch_inference.core.flags import parse_flags
from batch_inference.measure.nodes import NodesError, meet_before_torchrun
node, port, *flags = sys.argv[1:]
try:
    print(meet_before_torchrun(parse_flags(flags)[0], 2, int(node), "127.0.0.1", int(port))["GLOO_SOCKET_IFNAME"])
except NodesError as error:
    sys.exit(str(error))
"""


def test_two_processes_meet_before_torchrun_and_learn_their_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def start(node: int, *flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, str(node), str(port), "-tp", "2", *flags]
        environment = {name: value for name, value in stub_environment().items() if name != "GLOO_SOCKET_IFNAME"}
        return subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    for flags, code in (((), 0), (("--seed", "1"), 1)):
        processes = [start(0, "--output-file", "0.json"), start(1, "--output-file", "1.json", *flags)]
        said = [process.communicate(timeout=30) for process in processes]
        assert [process.returncode for process in processes] == [code, code], said
        assert all(("other arguments" in errors) == bool(code) for _, errors in said)
        assert [output.strip() for output, _ in said] == ["" if code else "lo"] * 2
