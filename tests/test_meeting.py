"""The meeting of a preset: who is node 0, which numbers the others get, and what is said where one is wrong."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from batch_inference.core.config import MEETING_SECRET, ConfigError
from batch_inference.launch import meeting
from batch_inference.launch.meeting import HELLO, Hello, Met, introduction, meet, owns, refuse_late
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


@contextlib.contextmanager
def arrivals() -> Iterator[Callable[..., None]]:
    """Gives what waits until so many nodes are there, node 0 first, or one of `calls` has ended."""
    said, say = list[str](), meeting.say

    def keep(text: str = "") -> None:
        said.append(text)
        say(text)

    def wait_for(count: int, *calls: Future[Any]) -> None:
        deadline_s = time.monotonic() + 20
        while (
            sum(there in line for line in said for there in (" is waiting for the others ", " has come, with ")) < count
        ):
            if any(call.done() for call in calls):
                return
            assert time.monotonic() < deadline_s, said
            time.sleep(0.005)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meeting, "say", keep)
        yield wait_for


def meeting_of(asked: Options, *nodes: Hello) -> list[Met | str]:
    """What each node learns, where they come one after the other."""
    calls: list[Future[Met | str]] = []
    with arrivals() as wait_for, ThreadPoolExecutor(len(nodes)) as pool:
        for node in nodes:
            calls.append(pool.submit(end_of, asked, node))
            wait_for(len(calls), *calls)
        ends = [call.result(timeout=20) for call in calls]
    for end in ends:
        if isinstance(end, Met) and end.door:
            end.door.close()
    return ends


class Clock:
    """Time that passes where somebody waits, and only there; also the door at which nodes come at given seconds."""

    def __init__(self, *come_at_s: float, stay: bool = True) -> None:
        self.now_s = 0.0
        self._come_at_s = list(come_at_s)
        self._stay = stay

    def monotonic(self) -> float:
        return self.now_s

    def heard(self, _decoder: object, timeout_s: float) -> list[tuple[Hello, Any]]:
        assert timeout_s > 0
        if self._come_at_s and self._come_at_s[0] <= self.now_s + timeout_s:
            self.now_s = self._come_at_s.pop(0)
            return [(OWN, SimpleNamespace(has_spoken=not self._stay, close=lambda: None))]
        self.now_s += timeout_s
        return []


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


@pytest.mark.parametrize(
    ("come_at_s", "nnodes", "ends_at_s", "count"),
    [
        ((), None, 600, 0),
        ((10,), None, 25, 1),  # when nobody more comes
        ((10, 20), None, 35, 2),
        ((10, 20, 40), None, 35, 2),
        ((595,), None, 600, 1),  # one time for all
        (range(5, 1000, 10), None, 600, 60),
        ((10,), 3, 600, 1),
        ((10, 20), 3, 20, 2),  # at once
        ((599.9,), 2, 599.9, 1),
    ],
)
def test_node_0_waits_as_long_as_it_was_told_and_no_longer(
    come_at_s: Sequence[float], nnodes: int | None, ends_at_s: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock: Any = Clock(*come_at_s)
    monkeypatch.setattr(meeting, "time", clock)
    assert len(meeting._callers(clock, Options(nnodes=nnodes, wait_for_nodes_s=600, settle_s=15))) == count
    assert clock.now_s == pytest.approx(ends_at_s)


def test_those_that_come_and_go_do_not_delay_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Any = Clock(*range(1, 2000), stay=False)
    monkeypatch.setattr(meeting, "time", clock)
    assert meeting._callers(clock, Options(wait_for_nodes_s=600, settle_s=15)) == []
    assert clock.now_s == 600


def test_another_node_calls_for_as_long_and_then_waits_for_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = options(1, "192.0.2.1", wait_s=600)
    clock, told = Clock(), dict[str, Any]()

    def answer(_at: object, _own: Hello, deadline_s: float, *_: object) -> Any:
        told["calls until"] = deadline_s
        return SimpleNamespace(receive=lambda _, timeout_s: told.update(waits_s=timeout_s), close=lambda: None)

    monkeypatch.setattr(meeting, "time", clock)
    monkeypatch.setattr(meeting, "call", answer)
    with pytest.raises(NodesError, match=r"^--master-addr 192\.0\.2\.1: nothing from node 0 within 610 s$"):
        meeting.attend(asked, OWN, is_owned=False)
    assert told == {"calls until": 600, "waits_s": 610}


def test_a_node_that_stays_alone_says_so(port: int) -> None:
    (said,) = meeting_of(options(port, wait_s=0.3), OWN)
    assert said == (
        f"--master-addr 127.0.0.1: no other node came to port {port} within 0.3 s; start the same command on the "
        "others, or drop --master-addr to use only this node"
    )


@pytest.mark.slow
def test_a_node_that_does_not_come_is_named_to_those_that_did(port: int) -> None:
    said = "node 2 of 3 did not come within 1 s; start the same command there"
    assert meeting_of(options(port, nnodes=3, wait_s=1), OWN, OWN) == [said, said]
    told = replace(OWN, rank=2)
    assert meeting_of(options(port, wait_s=1), OWN, told) == [said.replace("node 2", "node 1")] * 2


def test_two_nodes_of_one_number_are_named(port: int) -> None:
    said = "b and c are both node 1; give each its own --node-rank"
    told = replace(OWN, rank=1, host="b")
    assert meeting_of(options(port, nnodes=3), OWN, told, replace(told, host="c")) == [said] * 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arguments": {"--seed": "1", "settings": "TP=1"}}, "has different arguments: --seed 1; node 0 (a): --seed 0"),
        ({"arguments": {"--seed": "0"}}, "has different arguments: settings not at all; node 0 (a): settings TP=1"),
        ({"vllm_version": "0.26.0"}, "has vLLM 0.26.0, but node 0 (a) has 0.32.0"),
        ({"vllm_version": None}, "has no vLLM; run ./setup_env.sh there"),
        ({"kind": "cpu"}, "has cpu devices, but node 0 (a) has gpu devices"),
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
    about = "192.0.2.1 is not an address of this machine (a); if it leads here, give --node-rank 0 here"
    assert meeting_of(options(port, "192.0.2.1", wait_s=0.3), OWN) == [
        f"--master-addr 192.0.2.1: nothing answers on port {port} (Connection refused); start the same command there; "
        f"{about}"
    ]
    # Not after ten minutes only.
    assert capsys.readouterr().err == f"waiting for node 0 at 192.0.2.1, port {port}: {about}\n"


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
        (said,) = meeting_of(options(port, wait_s=0.3), OWN)
    assert isinstance(said, str)
    assert said.startswith(f"--master-port {port}: another program listens there on 127.0.0.1")


@pytest.mark.slow
def test_one_that_goes_again_is_not_waited_for(port: int) -> None:
    with arrivals() as wait_for, ThreadPoolExecutor() as pool:
        first = pool.submit(end_of, options(port, wait_s=1.5), OWN)
        wait_for(1, first)
        gone = call(("127.0.0.1", port), OWN, time.monotonic() + 5)
        wait_for(2, first)
        gone.close()
        said = first.result(timeout=10)
    assert isinstance(said, str)
    assert "no other node came" in said


def test_one_that_is_started_again_takes_its_own_place(port: int) -> None:
    asked, told = options(port, nnodes=3), replace(OWN, rank=1, host="b")
    with arrivals() as wait_for, ThreadPoolExecutor() as pool:
        nodes = [pool.submit(end_of, asked, OWN)]
        wait_for(1, *nodes)
        killed = call(("127.0.0.1", port), told, time.monotonic() + 5)
        wait_for(2, *nodes)
        killed.close()
        for own in (told, replace(OWN, host="c")):
            nodes.append(pool.submit(end_of, asked, own))
        ends = [node.result(timeout=20) for node in nodes]
    assert [end.node for end in ends if isinstance(end, Met)] == [0, 1, 2], ends
    assert isinstance(ends[0], Met)
    assert ends[0].door is not None
    ends[0].door.close()


def test_a_number_beyond_nnodes_is_refused_and_the_others_meet(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    asked, wrong = options(port, nnodes=2), replace(OWN, rank=7, host="x")
    first, refused, other = meeting_of(asked, OWN, wrong, replace(OWN, host="b"))
    said = "node 7 (x) is not one of 2, numbered up to 1; see --nnodes and --node-rank"
    assert refused == said
    assert isinstance(first, Met)
    assert isinstance(other, Met)
    assert first.names == other.names == ["node 0 (a)", "node 1 (b)"]
    assert f"note: {said}\n" in capsys.readouterr().err


def test_who_comes_late_is_told_so_by_name(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    with arrivals() as wait_for, ThreadPoolExecutor() as pool:
        first = pool.submit(end_of, options(port, nnodes=2), OWN)
        wait_for(1, first)
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
    said = r"c came too late: node 0 \(a\), node 1 \(b\) began \d+ s earlier"
    assert re.fullmatch(f"{said}; start the same command again when they are ready", str(late.result()))
    assert re.search(f"note: {said}\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "noise",
    [b"GET / HTTP/1.1\r\n\r\n", b'{"type": "Hello", "rank": -1}\n', b"\x00" * 1000, b"", b'{"x":' * 99_999 + b"\n"],
    ids=["http", "older protocol", "zeros", "nothing", "deep"],
)
@pytest.mark.parametrize("secret", ["", "tell nobody"])
def test_strangers_neither_stop_nor_delay_the_meeting(
    port: int, noise: bytes, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MEETING_SECRET, secret) if secret else monkeypatch.delenv(MEETING_SECRET, raising=False)
    with arrivals() as wait_for, ThreadPoolExecutor() as pool, contextlib.ExitStack() as open_lines:
        first = pool.submit(end_of, options(port, nnodes=2), OWN)
        wait_for(1, first)
        for _ in range(100):
            stranger = open_lines.enter_context(socket.create_connection(("127.0.0.1", port)))
            with contextlib.suppress(OSError):
                stranger.sendall(noise)
        assert isinstance(end_of(options(port, nnodes=2), OWN), Met)
        met = first.result(timeout=20)
        assert isinstance(met, Met)
        assert met.door is not None
        met.door.close()


def test_what_a_node_says_of_itself_is_cleaned_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "a\x1b[2J\u202eb\n")
    long = "\x1b]0;x\x07" + "x" * 100_000
    hellos = [
        introduction(
            Preset("mine", "", settings=[["TP=1", "--hf-overrides", text]]),
            parse_options(["--master-addr", "a", "mine"]),
            Devices("gpu", ("0",)),
        )
        for text in (long, long + "x")
    ]
    assert hellos[0].host == "a?[2J?b?"
    # Another node takes it for one of ours; what differs at its end alone differs.
    assert HELLO.decode(msgspec.json.encode(hellos[0])) == hellos[0]
    assert hellos[0].arguments["settings"] != hellos[1].arguments["settings"]


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


def test_this_machine_needs_no_look_up_of_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_name(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "x")

    monkeypatch.setattr(socket, "getaddrinfo", no_such_name)
    assert owns("localhost", set(), "a")
    assert owns("LOCALHOST", set(), "a")


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
    with pytest.raises(ConfigError, match="--nnodes 2 allows 1 at most"):
        parse_options([*words, "--nnodes", "2"])


def test_a_number_that_is_given_is_worth_more_than_that_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NODEID", "3")
    assert parse_options(["mine", "--master-addr", "a", "--node-rank", "1"]).node_rank == 1
