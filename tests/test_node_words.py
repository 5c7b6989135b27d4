"""What the nodes of a setting say of themselves and of each other, without any network."""

from __future__ import annotations

import socket
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from batch_inference.core.config import ExperimentConfig
from batch_inference.measure import connection, nodes
from batch_inference.measure.nodes import Introduction, Nodes, NodesError, disagreement, network_of


def node(number: int = 1, **changes: Any) -> Introduction:
    same = {"arguments": {"--seed": "0"}, "vllm_version": "0.32.0", "devices": 2, "devices_needed": 2}
    return Introduction(number, f"host-{number}", **{**same, **changes})


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ((node(1), node(2)), None),
        ((node(1, devices=1),), "node 1 (host-1) has 1 device, but 2 are needed on each"),
        ((node(1), node(2, devices=0)), "node 2 (host-2) has 0 devices, but 2 are needed on each"),
        ((node(1, devices=3), node(2, vllm_version=None)), "node 2 (host-2) has no vLLM; run ./setup_env.sh there"),
        ((node(1), node(2, vllm_version="0.26.0")), "node 2 (host-2) has vLLM 0.26.0, but node 0 (host-0) has 0.32.0"),
        (
            (node(1, arguments={"--seed": "7"}), node(2, devices=0)),
            "node 1 (host-1) has different arguments: --seed 7; node 0 (host-0): --seed 0",
        ),
    ],
)
def test_the_first_node_that_does_not_fit_is_named(others: tuple[Introduction, ...], said: str | None) -> None:
    assert disagreement(node(0), others) == said


def test_node_0_is_looked_at_too() -> None:
    assert disagreement(node(0, devices=1), [node(1)]) == "node 0 (host-0) has 1 device, but 2 are needed on each"


def test_of_many_arguments_that_differ_four_are_shown() -> None:
    ours = dict.fromkeys("abcde", "1")
    assert nodes.other_arguments(ours, ours) is None
    theirs = {**dict.fromkeys("abcd", "2"), "e": "1", "f": "x" * 90}
    said = nodes.other_arguments(theirs, ours)
    shown = nodes.listed(f"{name} 2" for name in "abcd"), nodes.listed(f"{name} 1" for name in "abcd")
    assert said == (f"{shown[0]} and 1 more", f"{shown[1]} and 1 more")
    assert nodes.other_arguments({"a": "2"}, {"a": "1", "b": "1"}) == (
        nodes.listed(["a 2", "b not at all"]), nodes.listed(["a 1", "b 1"]),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("numbers", "problem"),
    [
        ((1, 2, 3), None),
        ((1, 3), "node 2 of 4 did not come within 60 s; start the same command there"),
        ((2,), f"node {nodes.listed([1, 3])} of 4 did not come within 60 s; start the same command there"),
        ((1, 2, 2, 3), "host-2 and host-2 are both node 2; give each its own --node-rank"),
    ],
)
def test_every_number_is_there_once(numbers: tuple[int, ...], problem: str | None) -> None:
    assert nodes._numbers_problem([node(number) for number in numbers], 4) == problem


def test_other_words_of_nodes_are_pinned() -> None:
    assert nodes.twice("a", "b", 3) == "a and b are both node 3; give each its own --node-rank"
    assert nodes.ended_early("head") == "--master-addr head: node 0 ended before all nodes had come"
    assert nodes.gone("node 2") == "node 2 is gone; its output says why"
    assert nodes.beyond(4, "h", 4) == ("node 4 (h) is not one of 4, numbered up to 3; see --nnodes and --node-rank")


@pytest.mark.parametrize(
    ("kind", "value", "fits"),
    [
        (nodes.Number, 0, True), (nodes.Number, -1, False), (nodes.Number, 99_999, True),
        (nodes.Number, 100_000, False),
        (nodes.Rank, 0, False), (nodes.Rank, 1, True), (nodes.Rank, 99_999, True), (nodes.Rank, 100_000, False),
        (connection.Word, "x" * 300, True), (connection.Word, "x" * 301, False), (connection.Word, "a\x1b", False),
        (connection.Text, "x" * 4000, True), (connection.Text, "x" * 4001, False), (connection.Text, "a\u202e", False),
        (connection.Words, {str(number): "" for number in range(200)}, True),
        (connection.Words, {str(number): "" for number in range(201)}, False),
    ],
)  # fmt: skip
def test_what_comes_from_elsewhere_is_bounded(kind: Any, value: Any, fits: bool) -> None:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        assert not fits
    else:
        assert fits


def line(address: str, *, spoken: bool = False, dismissal: Any = None) -> Any:
    def receive(decoder: Any, timeout_s: float) -> Any:
        assert (decoder, timeout_s) == (nodes._DISMISSAL, 2.5)
        if isinstance(dismissal, Exception):
            raise dismissal
        return dismissal

    return SimpleNamespace(own_address=address, has_spoken=spoken, receive=receive)


@pytest.mark.parametrize(
    ("addresses", "own", "interface"),
    [
        (("10.0.0.1",), "10.0.0.1", "eth0"),
        (("127.0.0.1", "10.0.0.2", "10.0.0.1"), "10.0.0.2", "eth1"),
        (("127.0.0.1", "127.0.0.2"), "127.0.0.1", "lo"),
        (("10.9.9.9",), "10.9.9.9", None),
    ],
)
def test_engines_use_the_network_that_joins_the_nodes(
    addresses: tuple[str, ...], own: str, interface: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"lo": ["127.0.0.1"], "eth0": ["fe80::1", "10.0.0.1"], "eth1": ["10.0.0.2"]}
    found = {name: [SimpleNamespace(address=one) for one in of_one] for name, of_one in known.items()}
    monkeypatch.setattr("psutil.net_if_addrs", lambda: found)
    for name in ("VLLM_HOST_IP", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    names = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}
    lines = [line(address) for address in addresses]
    assert network_of(lines) == {"VLLM_HOST_IP": own, **names}
    assert Nodes(dict(enumerate(lines))).environment() == {"VLLM_HOST_IP": own, **names}
    # The user's own words stay.
    monkeypatch.setenv("VLLM_HOST_IP", "1.2.3.4")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    assert network_of(lines) == {"VLLM_HOST_IP": "1.2.3.4", **names, **({"NCCL_SOCKET_IFNAME": "ib0"} if names else {})}


def test_the_first_node_that_is_gone_is_named() -> None:
    lines = {1: line("a"), 2: line("a", spoken=True), 3: line("a", spoken=True)}
    assert Nodes(lines).lost() == "node 2 is gone; its output says why"
    assert Nodes({1: line("a")}).lost() is None


@pytest.mark.parametrize(
    ("dismissal", "end"),
    [
        (None, False),
        (nodes.Dismissal(failed=False), True),
        (nodes.Dismissal(failed=True), "the setting failed; the output of node 0 says why"),
        (OSError(), "node 0 is gone; its output says why"),
        (ValueError(), "node 0 is gone; its output says why"),
    ],
)
def test_a_node_is_dismissed_by_node_0_or_told_why_not(dismissal: Any, end: bool | str) -> None:
    met = Nodes({0: line("a", dismissal=dismissal)})
    if isinstance(end, bool):
        assert met.dismissed(2.5) is end
        return
    with pytest.raises(NodesError) as caught:
        met.dismissed(2.5)
    assert str(caught.value) == end


@pytest.mark.parametrize("rank", [0, 2])
def test_a_node_meets_the_others_as_what_it_is(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(nodes, "time", SimpleNamespace(monotonic=lambda: 100.0))
    monkeypatch.setattr(nodes, "installed_vllm", lambda: "0.32.0")
    monkeypatch.setattr(nodes, "find_devices", lambda: [1, 2, 3, 4, 5])
    monkeypatch.setattr(socket, "gethostname", lambda: "hÖst 1~!")
    door = SimpleNamespace(close=lambda: done.append("closed"))
    monkeypatch.setattr(nodes, "open_door", lambda *words: done.append(words) or door)
    monkeypatch.setattr(nodes, "gather", lambda *words: done.append(words))
    monkeypatch.setattr(nodes, "attend", lambda *words: done.append(words))
    config = ExperimentConfig(nnodes=3, node_rank=rank, tensor_parallel_size=6, master_addr="head", master_port=1234)
    own = Introduction(rank, "h?st?1~!", config.arguments(), "0.32.0", 5, 2)
    nodes.meet(config, print)
    if rank:
        assert done == [("head", 1234, own, 160.0)]
    else:
        assert done == [(1234, print), (door, own, 3, 160.0), "closed"]


def test_a_line_between_nodes_is_kept_alive() -> None:
    set_: list[Any] = []
    fake: Any = SimpleNamespace(
        settimeout=lambda seconds: set_.append(seconds),
        setsockopt=lambda *words: set_.append(words),
        getsockname=lambda: ("::ffff:10.0.0.1", 1),
        getpeername=lambda: ("::ffff:10.0.0.2", 2),
    )
    one = connection.Connection(fake)
    assert (one.own_address, one.other_address) == ("10.0.0.1", "10.0.0.2")
    assert set_ == [
        5.0,
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
    ]


def test_nodes_that_have_read_unlike_workloads_disagree_on_the_longest_request() -> None:
    """Theirs would be engines of other lengths. One that is told the length needs no workload."""
    config = ExperimentConfig(prompts_file="/a/w.jsonl", workload_longest=90, tensor_parallel_size=2, nnodes=2)
    ours = nodes.arguments_of(config)

    def said(**changes: Any) -> tuple[str, str] | None:
        return nodes.other_arguments(nodes.arguments_of(replace(config, **changes)), ours)

    assert said(prompts_file="/b/w.jsonl", workload_longest=70) == ("--max-model-len 70", "--max-model-len 90")
    assert said(prompts_file="/b/w.jsonl") is None
    assert said(workload_longest=None, max_model_len=90) is None
