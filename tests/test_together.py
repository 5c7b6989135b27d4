"""Node 0 of a preset over nodes, and what the others hear of it: no process is started, and no time passes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

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
        (SystemExit(2), Over(2, "nothing can be measured with these arguments; what it printed says why")),
        (SystemExit(130), Over(1, "it was interrupted")),
        (ZeroDivisionError(), Over(1, "it has failed; what it printed says why")),
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
