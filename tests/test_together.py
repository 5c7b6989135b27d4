"""Node 0 of a preset over nodes, and what the others hear of it: no process is started, and no time passes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from batch_inference.core import streams
from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.failures import WorkFailedError
from batch_inference.launch import __main__ as launch
from batch_inference.launch import meeting, together
from batch_inference.launch.jobs import Here, Job
from batch_inference.launch.meeting import Hello, Member, Met
from batch_inference.launch.options import Options
from batch_inference.launch.presets import Setting
from batch_inference.launch.processes import Processes
from batch_inference.launch.together import FOLLOWED_GRACE_S, GRACE_S, Ended, Leader, Next, Over, SettingOver
from batch_inference.plan.devices import Devices

SETTING = Setting(2, 1, 1, nodes=2)
JOB = Job("tp_2", ("measure",), ExperimentConfig(tensor_parallel_size=2), SETTING)


class Line:
    """To another node: what it says, and what it hears. None for the line of one that is gone."""

    def __init__(self, *says: Ended | None) -> None:
        self._says = list(says)
        self.heard: list[Any] = []

    def receive(self, _decoder: object, _timeout_s: float) -> Ended | None:
        said = self._says.pop(0) if self._says else ()
        if said is None:
            raise ConnectionResetError
        return said or None

    def send(self, message: Any) -> None:
        self.heard.append(message)

    def close(self) -> None:
        pass


class Part:
    """Node 0's own: ends by itself with `code`, or when it is ended."""

    are_stopped = False

    def __init__(self, code: int | None) -> None:
        self._code = code

    def start(self, _words: object, variables: dict[str, str], *, ends_with_us: bool) -> Part:
        assert ends_with_us
        assert variables == {}
        return self

    def poll(self) -> int | None:
        return self._code

    def end(self, _process: Part, _patience_s: float) -> None:
        self._code = 143

    def ended(self, _process: Part) -> int:
        assert self._code is not None
        return self._code

    def end_if_stopped(self) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Goes on where somebody waits."""
    clock = SimpleNamespace(now_s=0.0, monotonic=lambda: clock.now_s)

    def sleep(wait_s: float) -> None:
        clock.now_s += wait_s

    clock.sleep = sleep
    monkeypatch.setattr(together, "time", clock)
    return clock


def leader(part: Part, line: Line) -> Leader:
    door: Any = SimpleNamespace(heard=lambda *_: [], close=lambda: None)
    other: Any = line
    processes: Any = part
    hello = Hello(None, "b", "gpu", 1, "0.32.0", {})
    return Leader(Met(0, ["a", "b"], [Member(1, hello, other)], door), 1, None, processes)


@pytest.mark.parametrize(
    ("own", "said", "code", "waited_s"),
    [
        (0, Ended(0), 0, 0),
        (3, Ended(0), 3, 0),
        # It had no use for the part that failed.
        (0, Ended(2), 0, 0),
        (1, Ended(1), 1, 0),
        (1, Ended(2), 2, 0),
        (1, None, 1, 0),
        (None, Ended(1), 1, FOLLOWED_GRACE_S),
        (None, Ended(2), 2, GRACE_S),
        (None, None, 1, GRACE_S),
    ],
)
def test_the_code_of_a_setting_is_that_of_its_worst_part(
    clock: Any, own: int | None, said: Ended | None, code: int, waited_s: float
) -> None:
    line = Line(said)
    node_0 = leader(Part(own), line)
    assert node_0.run(JOB, "[1/1] tp_2") == code
    assert line.heard[0] == Next("[1/1] tp_2", SETTING, 0, 1)
    assert waited_s <= clock.now_s < waited_s + 2
    assert (node_0.problem is None) is (said is not None)


def test_a_part_that_does_not_end_ends_the_preset(clock: Any) -> None:
    line = Line()
    node_0 = leader(Part(0), line)
    assert node_0.run(JOB, "[1/1] tp_2") == 0
    assert line.heard[1:] == [SettingOver()]
    assert node_0.problem == "node 1 (b) did not end a setting within 60 s"
    assert clock.now_s > together.PART_TIMEOUT_S


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (None, Over(0, None)),
        (ConfigError("wrong\nflag"), Over(2, "wrong\\nflag")),
        (WorkFailedError("no model\nmore"), Over(1, "no model")),
        (SystemExit(2), Over(2, "nothing can be measured with these arguments; its output says why")),
        (SystemExit(130), Over(1, "it was interrupted")),
        (ZeroDivisionError(), Over(1, "it failed; its output says why")),
    ],
)
def test_the_others_hear_how_node_0_ended(end: BaseException | None, said: Over) -> None:
    line = Line()
    node_0 = leader(Part(0), line)
    node_0.code = 0
    node_0.__exit__(type(end) if end else None, end, None)
    assert line.heard == [said]


@pytest.mark.parametrize("problem", [None, "node 1 (b) is gone"])
def test_a_preset_that_could_not_go_on_has_failed_on_every_node(
    problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, none = Line(), SimpleNamespace()
    node_0 = leader(Part(0), line)
    node_0.problem = problem
    monkeypatch.setattr(meeting, "introduction", lambda *_: None)
    monkeypatch.setattr(meeting, "meet", lambda *_: SimpleNamespace(node=0))
    monkeypatch.setattr(together, "Leader", lambda *_: node_0)
    monkeypatch.setattr(launch, "plan_jobs", lambda *_: ([], []))
    monkeypatch.setattr(launch, "run_jobs", lambda *_: None)
    monkeypatch.setattr(launch, "close", lambda *_: 0)
    preset: Any = none
    options, here = Options(master_addr="a"), Here("python3", "")
    code = launch.work_over_nodes(preset, options, here, Devices("gpu", ("0",)), Processes())
    assert code == (1 if problem else 0)
    assert line.heard == [Over(code, None)]


# --- node 0 and three others, of which the first has too few devices for the larger settings -------------------------


class Others:
    """Nodes 1 (b, one device), 2 (c) and 3 (d), two devices each like node 0; one log of all that is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, own_code: int | None = 0, nnodes: int | None = None) -> None:
        self.log: list[Any] = []
        self.says: dict[int, list[Any]] = {1: [], 2: [], 3: []}
        self.deaf: set[int] = set()
        self.are_stopped = self.stops = False
        self.code = own_code
        self.late: list[Any] = []
        lines: list[Any] = [self.line(node) for node in (1, 2, 3)]
        hellos = [Hello(None, host, "gpu", count, "0.32.0", {}) for host, count in (("b", 1), ("c", 2), ("d", 2))]
        members = [Member(node, hello, line) for node, hello, line in zip((1, 2, 3), hellos, lines, strict=True)]
        monkeypatch.setattr(together, "network_of", lambda found: {"NETWORK": str([line.node for line in found])})
        monkeypatch.setattr(together, "refuse_late", lambda met, began_s: self.late.append((met, began_s)))
        processes: Any = self
        door: Any = SimpleNamespace(close=lambda: self.log.append("the door is closed"))
        self.met = Met(0, ["node 0 (a)", *(member.name for member in members)], members, door)
        self.leader = Leader(self.met, 2, nnodes, processes)

    def line(self, node: int) -> Any:
        def receive(_decoder: object, timeout_s: float) -> Any:
            assert timeout_s == 0
            said = self.says[node].pop(0) if self.says[node] else None
            if isinstance(said, Exception):
                raise said
            return said

        def send(message: Any) -> None:
            if node in self.deaf:
                raise BrokenPipeError
            self.log.append((node, message))

        return SimpleNamespace(
            node=node, receive=receive, send=send, close=lambda: self.log.append(f"the line to {node} is closed")
        )

    # The processes, and node 0's own.
    def start(self, words: object, variables: dict[str, str], *, ends_with_us: bool = False) -> Others:
        self.log.append((words, variables, ends_with_us))
        return self

    def poll(self) -> int | None:
        return self.code

    def end(self, _process: object, patience_s: float) -> None:
        self.log.append(f"its own is ended, with {patience_s:g} s of patience")
        self.code = 143

    def ended(self, _process: object) -> int:
        assert self.code is not None
        return self.code

    def end_if_stopped(self) -> None:
        if self.stops:
            raise SystemExit(130)

    def run(self, setting: Setting, heading: str = "[2/3] x") -> int:
        return self.leader.run(Job("x", ("measure",), ExperimentConfig(), setting, 29503), heading)


TWO_OF_THEM, ALL_LARGE = Setting(4, 1, 1, nodes=2), Setting(6, 1, 1, nodes=3)


def test_each_node_hears_its_own_number_and_those_that_are_not_needed_none(
    clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = Others(monkeypatch)
    others.says[2] = [Ended(0)]
    others.says[1] = [Ended(7)]  # of a setting before
    assert others.run(TWO_OF_THEM) == 0
    assert others.log == [
        (1, Next("[2/3] x", TWO_OF_THEM, 29503, None)),
        (2, Next("[2/3] x", TWO_OF_THEM, 29503, 1)),
        (3, Next("[2/3] x", TWO_OF_THEM, 29503, None)),
        (("measure",), {}, True),
    ]
    assert others.leader.devices.counts == [2, 1, 2, 2]
    assert others.late == [(others.met, clock.now_s - 0.1)]
    # What was said in one setting counts for nothing in the next.
    others.log.clear()
    others.says[3] = [Ended(0)]
    assert others.run(ALL_LARGE) == 0
    assert others.log[:4] == [
        *((node, Next("[2/3] x", ALL_LARGE, 29503, rank)) for node, rank in ((1, None), (2, 1), (3, 2))),
        (("measure",), {}, True),
    ]
    # The part of node 2 goes on, and hears that the setting is over; node 3 knows.
    assert others.log[4:] == [(2, SettingOver())]
    assert others.leader.problem == "node 2 (c) did not end a setting within 60 s"


def test_all_that_do_not_end_are_named(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    others = Others(monkeypatch)
    assert others.run(ALL_LARGE) == 0
    assert others.log[4:] == [(2, SettingOver()), (3, SettingOver())]
    assert others.leader.problem == "node 2 (c), node 3 (d) did not end a setting within 60 s"
    assert 60 < clock.now_s < 61


def test_torchrun_gets_the_network_of_those_that_take_part(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(6, 1, 1, torchrun=True, nodes=3)
    others = Others(monkeypatch)
    others.says.update({2: [Ended(0)], 3: [Ended(0)]})
    assert others.run(setting) == 0
    assert (("measure",), {"NETWORK": "[2, 3]"}, True) in others.log
    others.log.clear()
    assert others.run(Setting(2, 1, 1, torchrun=True)) == 0  # on node 0 alone
    assert (("measure",), {}, True) in others.log
    assert clock.now_s < 1


@pytest.mark.parametrize(
    ("said", "deaf", "waited_s", "code", "problem", "error"),
    [
        # What the first of them said decides how long is waited, what any of them said the exit code.
        ({2: [None, Ended(1)], 3: [None, None, Ended(2)]}, (), 90, 2, None,
         "the part of node 2 (c) ended with exit code 1; its output says why"),
        ({2: [], 3: [Ended(3)]}, (), 15, 1, "node 2 (c) did not end a setting within 60 s",
         "the part of node 3 (d) ended with exit code 3; its output says why"),
        ({2: [Ended(0)], 3: [ValueError()]}, (), 15, 1, "gone 3", "gone 3"),
        # It said that it had failed, and was gone with that.
        ({2: [Ended(1), OSError()], 3: [Ended(0)]}, (), 15, 1, "gone 2", "gone 2"),
        # The first that is gone ends the preset; another's loss adds nothing.
        ({2: [Ended(0)], 3: [OSError()], 1: [None, OSError()]}, (), 15, 1, "gone 3", "gone 3"),
        ({2: [Ended(0)], 3: [Ended(0)]}, (2,), 15, 1, "gone 2", "gone 2"),
    ],
)  # fmt: skip
def test_a_part_that_fails_ends_node_0s_own_after_a_while(  # noqa: PLR0913
    clock: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: dict[int, list[Any]],
    deaf: tuple[int, ...], waited_s: float, code: int, problem: str | None, error: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(together, "gone", lambda name: f"gone {name.split()[1]}")
    others = Others(monkeypatch, own_code=None)
    others.says.update(said)
    others.deaf.update(deaf)
    assert others.run(ALL_LARGE) == code
    assert others.leader.problem == problem
    assert capsys.readouterr().err == f"error: x: {error}\n"
    assert "its own is ended, with 20 s of patience" in others.log
    ended_after_s = clock.now_s - (60 if problem and "within" in problem else 0)
    assert waited_s < ended_after_s < waited_s + 2


def test_a_node_that_is_not_needed_may_fail_or_go(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    others = Others(monkeypatch, own_code=None)
    others.says.update({1: [Ended(2)], 2: [Ended(0)], 3: [OSError()]})
    clock.sleep, sleep = (
        lambda wait_s: (sleep(wait_s), setattr(others, "code", 0 if clock.now_s > 30 else None)),
        clock.sleep,
    )
    assert others.run(TWO_OF_THEM) == 0
    assert clock.now_s > 30
    assert others.leader.problem is not None
    # It hears of no further setting.
    others.log.clear()
    assert others.run(Setting(1, 1, 1)) == 0
    assert [node for node, *_ in others.log[:-1]] == [1, 2]


def test_after_a_signal_nobody_is_waited_for(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    others = Others(monkeypatch)
    others.stops = True
    with pytest.raises(SystemExit):
        others.run(ALL_LARGE)
    assert clock.now_s < 1
    assert len(others.log) == 4


def test_after_a_signal_its_own_part_is_left_to_end_by_itself(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    others = Others(monkeypatch, own_code=None)
    others.are_stopped = True
    others.says.update({2: [Ended(3)], 3: [Ended(0)]})
    clock.sleep, sleep = (
        lambda wait_s: (sleep(wait_s), setattr(others, "code", 130 if clock.now_s > 40 else None)),
        clock.sleep,
    )
    assert others.run(ALL_LARGE) == 130
    assert clock.now_s > 40
    assert not [said for said in others.log if isinstance(said, str)]


def test_all_lines_and_the_door_are_closed_whoever_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    others = Others(monkeypatch)
    others.deaf.add(1)
    with others.leader:
        pass
    # Until its end is known, a preset has failed.
    assert others.log == [
        "the line to 1 is closed", (2, Over(1, None)), "the line to 2 is closed", (3, Over(1, None)),
        "the line to 3 is closed", "the door is closed",
    ]  # fmt: skip


def test_nnodes_is_what_each_setting_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Others(monkeypatch, nnodes=2).leader.devices.nnodes == 2
    assert Others(monkeypatch).leader.devices.nnodes is None


@pytest.mark.parametrize(
    ("said", "own", "code", "error"),
    [
        # Ended by itself, it has said why, unless it was left alone or another was used wrongly.
        ({2: [OSError()], 3: [Ended(0)]}, 1, 1, "error: x: gone 2\n"),
        ({2: [Ended(0)], 3: [Ended(2)]}, 1, 2,
         "error: x: the part of node 3 (d) ended with exit code 2; its output says why\n"),
        ({2: [Ended(1)], 3: [Ended(1)]}, 1, 1, ""),
        ({2: [Ended(0)], 3: [Ended(2)]}, 0, 0, ""),
    ],
)  # fmt: skip
def test_why_it_failed_is_said_once(  # noqa: PLR0913
    clock: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: dict[int, list[Any]],
    own: int, code: int, error: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(together, "gone", lambda name: f"gone {name.split()[1]}")
    others = Others(monkeypatch, own_code=own)
    others.says.update(said)
    assert others.run(ALL_LARGE) == code
    assert capsys.readouterr().err == error
    assert clock.now_s < 1


def test_node_0_plans_for_the_nodes_that_came_and_the_others_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    planned_for: list[Any] = []
    node_0, here, said = Others(monkeypatch).leader, Here("python3", ""), list[str]()
    preset: Any = None
    monkeypatch.setattr(meeting, "introduction", lambda *_: None)
    monkeypatch.setattr(together, "Leader", lambda *_: node_0)
    monkeypatch.setattr(together, "Follower", lambda *_: SimpleNamespace(serve=lambda: 9))
    monkeypatch.setattr(launch, "plan_jobs", lambda *given: planned_for.append(given[-1]) or ([], ["left out"]))
    monkeypatch.setattr(launch, "uncompared", lambda _jobs: ["not compared"])
    monkeypatch.setattr(launch, "run_jobs", lambda *given: given[-1])
    monkeypatch.setattr(launch, "close", lambda outcomes, *_: 0 if outcomes is node_0 else 5)
    monkeypatch.setattr(streams, "say", said.append)
    for node, code in ((0, 0), (1, 9), (2, 9)):
        monkeypatch.setattr(meeting, "meet", lambda *_, node=node: SimpleNamespace(node=node))
        options = Options(master_addr="a")
        assert launch.work_over_nodes(preset, options, here, Devices("gpu", ("0",)), Processes()) == code
    assert planned_for == [node_0.devices]
    assert said == ["note: left out", "note: not compared"]
