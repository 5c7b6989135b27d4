"""The meeting of a preset without a network: who listens and who calls, what is decided, sent and said."""

from __future__ import annotations

import contextlib
import errno
import re
import socket
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from msgspec.json import decode, encode
from msgspec.structs import replace

from batch_inference.launch import meeting
from batch_inference.launch.meeting import (
    HELLO,
    Agreed,
    Hello,
    Member,
    Met,
    Refused,
    attend,
    gather,
    introduction,
    meet,
    numbered,
    own_addresses,
    owns,
    refuse_late,
)
from batch_inference.launch.options import Options, parse_options
from batch_inference.launch.presets import Preset
from batch_inference.measure.nodes import NodesError
from batch_inference.plan.devices import Devices

OWN = Hello(None, "a", "gpu", 4, "0.32.0", {"--seed": "0"})
ASKED = Options(master_addr="h", master_port=7, wait_for_nodes_s=30)


class Lines:
    """A door at which nodes come, all at once or in turns; what each hears, and which lines are closed."""

    def __init__(self, *turns: list[Hello]) -> None:
        self.turns = list(turns)
        self.log: list[Any] = []
        self.silent_after: set[str] = set()
        self.deaf: set[str] = set()
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def _line(self, host: str) -> Any:
        def send(message: Any) -> None:
            if host in self.deaf:
                raise BrokenPipeError
            self.log.append((host, message))

        return SimpleNamespace(
            host=host, send=send, has_spoken=host in self.silent_after, close=lambda: self.log.append(f"{host} closed")
        )

    def heard(self, decoder: object, timeout_s: float) -> list[tuple[Hello, Any]]:
        assert decoder is HELLO
        self.now_s += max(timeout_s, 0.01)
        return [(hello, self._line(hello.host)) for hello in (self.turns.pop(0) if self.turns else [])]

    def refuse(self, connection: Any, why: Refused, note: str) -> None:
        self.log.append((connection.host, why, note))

    def close(self) -> None:
        self.log.append("the door is closed")


def node(host: str, rank: int | None = None, **changes: Any) -> Hello:
    return replace(OWN, host=host, rank=rank, **changes)


def gathered(lines: Lines, monkeypatch: pytest.MonkeyPatch, own: Hello = OWN, **asked: Any) -> Met | str:
    door: Any = lines
    monkeypatch.setattr(meeting, "time", lines)
    given: dict[str, Any] = {"master_addr": "h", "master_port": 7, "wait_for_nodes_s": 30, "settle_s": 5, **asked}
    try:
        return gather(door, own, Options(**given))
    except NodesError as error:
        return str(error)


def test_all_that_come_are_numbered_and_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Lines([node("x", 3), node("b")], [node("c", devices=1)])
    met = gathered(lines, monkeypatch)
    assert isinstance(met, Met)
    names = ["node 0 (a)", "node 1 (b)", "node 2 (c)", "node 3 (x)"]
    assert lines.log == [("b", Agreed(1, names)), ("c", Agreed(2, names)), ("x", Agreed(3, names))]
    assert (met.node, met.names, met.door, met.node_0) == (0, names, lines, None)
    assert [(other.node, other.name, other.hello.host) for other in met.others] == [
        (1, "node 1 (b)", "b"), (2, "node 2 (c)", "c"), (3, "node 3 (x)", "x"),
    ]  # fmt: skip
    assert capsys.readouterr().err.splitlines() == [
        "x has come, with 4 devices", "b has come, with 4 devices", "c has come, with 1 device",
        "4 nodes: node 0 (a), node 1 (b), node 2 (c), node 3 (x)",
    ]  # fmt: skip


def test_one_that_is_gone_when_it_is_told_keeps_no_other_from_hearing(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Lines([node("b"), node("c")])
    lines.deaf.add("b")
    assert isinstance(gathered(lines, monkeypatch, nnodes=3), Met)
    assert [said[0] for said in lines.log] == ["c"]


def test_one_that_goes_again_gives_its_place_to_the_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Lines([node("gone")], [node("b")])
    lines.silent_after.add("gone")
    met = gathered(lines, monkeypatch, nnodes=2)
    assert isinstance(met, Met)
    assert met.names == ["node 0 (a)", "node 1 (b)"]
    assert lines.log == ["gone closed", ("b", Agreed(1, met.names))]
    assert "gone has left again\n" in capsys.readouterr().err


def test_a_number_beyond_the_last_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Lines([node("x", 2), node("b", 1)])
    assert isinstance(gathered(lines, monkeypatch, nnodes=2), Met)
    said = "node 2 (x) is not one of 2, numbered up to 1; see --nnodes and --node-rank"
    assert lines.log[0] == ("x", Refused(said), said)


@pytest.mark.parametrize(
    ("own", "come", "asked", "said"),
    [
        (OWN, [], {}, "--master-addr h: no other node came to port 7 within 30 s; start the same command on the "
         "others, or drop --master-addr to use only this node"),
        (OWN, [], {"nnodes": 3}, "node 1, 2 of 3 did not come within 30 s; start the same command there"),
        (OWN, [node("b", 1)], {"nnodes": 4}, "node 2, 3 of 4 did not come within 30 s; start the same command there"),
        (OWN, [node("b", 3), node("c")], {}, "node 2 of 4 did not come within 30 s; start the same command there"),
        (OWN, [node("b", 1), node("c", 1)], {"nnodes": 3},
         "b and c are both node 1; give each its own --node-rank"),
        (OWN, [node("b", 2), node("c", 1), node("d", 2)], {},
         "b and d are both node 2; give each its own --node-rank"),
        (replace(OWN, vllm_version=None), [node("b")], {}, "node 0 (a) has no vLLM; run ./setup_env.sh there"),
        (OWN, [node("b"), node("c", vllm_version=None)], {}, "node 2 (c) has no vLLM; run ./setup_env.sh there"),
        (OWN, [node("b"), node("c", vllm_version="1")], {}, "node 2 (c) has vLLM 1, but node 0 (a) has 0.32.0"),
        (OWN, [node("b", kind="cpu")], {}, "node 1 (b) has cpu devices, but node 0 (a) has gpu devices"),
        # What does not fit is worse than who is missing.
        (OWN, [node("b", kind="cpu")], {"nnodes": 3}, "node 1 (b) has cpu devices, but node 0 (a) has gpu devices"),
        (OWN, [node("b", arguments={"--seed": "1"})], {},
         "node 1 (b) has different arguments: --seed 1; node 0 (a): --seed 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_to_all_in_the_same_words(
    own: Hello, come: list[Hello], asked: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Lines(come)
    assert gathered(lines, monkeypatch, own, **asked) == said
    assert lines.log == [(member.hello.host, Refused(said)) for member in numbered([(one, None) for one in come])]  # type: ignore[misc]


def test_a_thousand_nodes_are_the_most() -> None:
    for rank, is_possible in ((999, True), (1000, False), (1, True), (0, False)):
        with contextlib.nullcontext() if is_possible else pytest.raises(ValueError, match="rank"):
            assert HELLO.decode(encode(replace(OWN, rank=rank))).rank == rank
    assert decode(encode(Agreed(1, ["x"] * 1000)), type=Agreed).node == 1
    with pytest.raises(ValueError, match="names"):
        decode(encode(Agreed(1, ["x"] * 1001)), type=Agreed)


def test_numbers_are_filled_in_around_those_that_were_told() -> None:
    line: Any = None
    hellos = [node("b"), node("c", 1), node("d"), node("e", 4), node("f")]
    found = [(one.node, one.hello.host) for one in numbered([(hello, line) for hello in hellos])]
    assert found == [(1, "c"), (2, "b"), (3, "d"), (4, "e"), (5, "f")]


# --- who listens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "is_ours", "listens", "door", "end"),
    [
        (0, False, None, "told", "gathers"),
        (None, True, None, "own", "gathers"),
        (None, True, errno.EADDRINUSE, None, "attends, owned"),
        (None, True, errno.EACCES, "open_door", "gathers"),
        (None, False, None, None, "attends"),
        (1, True, None, None, "attends"),
    ],
)
def test_node_0_is_who_was_told_so_or_owns_the_address_and_is_the_first(  # noqa: PLR0913
    rank: int | None, door: str | None, listens: int | None, end: str, *, is_ours: bool,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    log: list[Any] = []

    def listen(port: int, address: str) -> str:
        if listens:
            raise OSError(listens, "x")
        return f"{port} {address}"

    monkeypatch.setattr(
        meeting, "owns", lambda address, own, host: is_ours and (address, own, host) == ("h", {"1"}, "a")
    )
    monkeypatch.setattr(meeting, "own_addresses", lambda: {"1"})
    monkeypatch.setattr(meeting, "listen", listen)
    monkeypatch.setattr(meeting, "secret_of_nodes", lambda: b"s")
    monkeypatch.setattr(meeting, "Door", lambda found, secret, _say: (found, secret))
    monkeypatch.setattr(meeting, "open_door", lambda port, _say, address: ("open_door", port, address))
    monkeypatch.setattr(meeting, "gather", lambda found, *_: log.append(found) or "gathers")
    monkeypatch.setattr(meeting, "attend", lambda *_, is_owned: "attends, owned" if is_owned else "attends")
    assert meet(ASKED, replace(OWN, rank=rank)) == end
    opened = {"told": ("open_door", 7, "h"), "open_door": ("open_door", 7, "h"), "own": ("7 h", b"s")}
    assert log == ([opened[door]] if door else [])
    waits = "node 0 (a) is waiting for the others on port 7; start the same command on each\n"
    assert capsys.readouterr().err == (waits if door else "")


def test_the_door_is_closed_where_the_meeting_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Lines()
    monkeypatch.setattr(meeting, "open_door", lambda *_: lines)
    monkeypatch.setattr(meeting, "time", lines)
    with pytest.raises(NodesError):
        meet(ASKED, replace(OWN, rank=0))
    assert lines.log == ["the door is closed"]


def test_addresses_are_compared_without_their_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"eth0": [SimpleNamespace(address="fe80::1%eth0")], "lo": [SimpleNamespace(address="127.0.0.1")]}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    assert own_addresses() == {"fe80::1", "127.0.0.1"}
    # A name with two addresses, of which the second is ours.
    asked = [(socket.AF_INET6, 1, 6, "", (address, 0)) for address in ("fe80::9%eth0", "fe80::1%eth0")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: asked)
    assert owns("n", {"fe80::1"}, "a")
    assert not owns("n", {"fe80::2"}, "a")


@pytest.mark.parametrize("name", ["A.Cluster", "a.cluster", "A", "a"])
def test_a_node_has_its_name_with_and_without_the_domain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    assert owns(name, set(), "A.cluster")
    assert not owns("b", set(), "A.cluster")


def test_a_name_that_is_none_is_not_owned() -> None:
    assert not owns("x" * 70 + ".invalid", {"1"}, "a")  # longer than a part of a name may be


# --- the others -------------------------------------------------------------------------------------------------------

ABOUT = "h is not an address of this machine (a); if it leads here, give --node-rank 0 here"
WAITS = "waiting for node 0 at h, port 7"


@pytest.mark.parametrize(
    ("rank", "is_owned", "said", "advice"),
    [
        (None, False, f"{WAITS}: {ABOUT}\n", f"; start the same command there; {ABOUT}"),
        (None, True, f"{WAITS}\n", "; start the same command there"),
        (2, False, f"{WAITS}\n", "; start the same command there"),
    ],
)
def test_another_node_says_where_it_calls_and_what_it_hears(  # noqa: PLR0913
    rank: int | None, said: str, advice: str, *, is_owned: bool, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    called: list[Any] = []
    names = ["node 0 (x)", "node 1 (b)", "node 2 (a)", "node 3 (d)"]
    line = SimpleNamespace(receive=lambda *_: Agreed(2, names), close=lambda: called.append("closed"))
    monkeypatch.setattr(meeting, "time", SimpleNamespace(monotonic=lambda: 5.0))
    monkeypatch.setattr(meeting, "call", lambda *given: called.append(given[:-1]) or line)
    own = replace(OWN, rank=rank)
    met = attend(ASKED, own, is_owned=is_owned)
    assert called == [(("h", 7), own, 35.0, advice)]
    assert met == Met(2, names, node_0=line)  # type: ignore[arg-type]
    heard = "node 2 of 4 nodes: node 0 (x), node 1 (b), node 2 (a), node 3 (d)\n"
    assert capsys.readouterr().err == said + heard


@pytest.mark.parametrize(
    ("heard", "said"),
    [
        (Refused("no vLLM there"), "no vLLM there"),
        (None, "--master-addr h: nothing from node 0 within 40 s"),
        (ConnectionResetError(), "--master-addr h: node 0 ended before all nodes had come"),
        (ValueError(), "--master-addr h: node 0 ended before all nodes had come"),
    ],
)
def test_another_node_that_is_not_taken_closes_its_line(heard: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    def receive(_decoder: object, waits_s: float) -> Any:
        assert waits_s == 40
        if isinstance(heard, Exception):
            raise heard
        return heard

    line = SimpleNamespace(receive=receive, close=lambda: closed.append("closed"))
    monkeypatch.setattr(meeting, "call", lambda *_: line)
    with pytest.raises(NodesError, match=f"^{re.escape(said)}$"):
        attend(ASKED, OWN, is_owned=True)
    assert closed == ["closed"]


def test_late_ones_hear_who_began_and_when(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Lines([node("c"), node("d")])
    door: Any = lines
    monkeypatch.setattr(meeting, "time", lines)
    refuse_late(Met(0, ["node 0 (a)", "node 1 (b)"], door=door), 70.0)
    late = [f"{host} came too late: node 0 (a), node 1 (b) began 30 s earlier" for host in "cd"]
    again = "; start the same command again when they are ready"
    assert lines.log == [(host, Refused(said + again), said) for host, said in zip("cd", late, strict=True)]


# --- what a node says of itself ---------------------------------------------------------------------------------------


def test_all_that_was_asked_is_told_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "own_host", lambda: "a")
    monkeypatch.setattr(meeting, "installed_vllm", lambda: "0.32.0")
    monkeypatch.setattr(meeting, "redact", lambda words: ["hidden" if word == "word" else word for word in words])
    preset = Preset("mine", "", [["TP=1"], ["TP=2", "--token", "word"]], ["--max-tokens", "8", "--seed", "1"])
    options = parse_options(["mine", "--master-addr", "h", "--node-rank", "2", "--seq-lens", "64", "--", "--seed", "2"])
    hello = introduction(preset, options, Devices("cpu", ("0,1", "2,3")))
    assert (hello.rank, hello.host, hello.kind, hello.devices, hello.vllm_version) == (2, "a", "cpu", 2, "0.32.0")
    told = hello.arguments
    assert [told[name] for name in ("preset", "settings", "--nnodes", "--max-tokens", "--seq-lens", "--seed")] == [
        "mine", "TP=1; TP=2 --token hidden", "as they come", "8", "64", "2",
    ]  # fmt: skip
    custom = Preset("custom", "", made_by="custom")
    options = parse_options(["custom", "--master-addr", "h", "--nnodes", "3", "TP=2", "PP=4"])
    told = introduction(custom, options, Devices("gpu", ("0",))).arguments
    assert [told[name] for name in ("preset", "settings", "--nnodes")] == ["custom TP=2 PP=4", "TP=2 PP=4", "3"]


def test_a_member_is_named_by_its_number() -> None:
    line: Any = None
    assert Member(3, node("b", 1), line).name == "node 3 (b)"
