"""A node that follows node 0 through a preset: no process is started, and no time passes."""

from __future__ import annotations

from subprocess import TimeoutExpired
from types import SimpleNamespace
from typing import Any

import pytest

from batch_inference.core.config import ExperimentConfig
from batch_inference.launch import together
from batch_inference.launch.jobs import Job
from batch_inference.launch.meeting import Met
from batch_inference.launch.presets import Setting
from batch_inference.launch.together import Ended, Follower, Next, Over, SettingOver
from batch_inference.measure.nodes import NodesError

BY_MP = Setting(4, 1, 1, nodes=3)
BY_TORCHRUN = Setting(2, 1, 2, torchrun=True, nodes=2)
GONE = ConnectionResetError()


class World:
    """Node 0 as it is heard, and a part that ends by itself after so many looks (None: never), with one clock."""

    def __init__(self, says: list[Any], looks: int | None = None, code: int = 0) -> None:
        self.log: list[Any] = []
        self.now_s = 0.0
        self.is_deaf = False  # node 0
        self.stops = False
        self.returncode: int | None = None
        self._says, self._looks, self._code = says, looks, code

    # Node 0.
    def receive(self, _decoder: object, timeout_s: float | None = None) -> Any:
        # Between settings node 0 may be silent for as long as the line allows.
        if timeout_s is None:
            self.log.append("waiting for node 0")
        else:
            self.now_s += timeout_s
        said = self._says.pop(0) if self._says else None
        if isinstance(said, Exception):
            raise said
        return said

    def send(self, message: Any) -> None:
        if self.is_deaf:
            raise BrokenPipeError
        self.log.append(message)

    def close(self) -> None:
        self.log.append("closed")

    # The process.
    def poll(self) -> int | None:
        if self._looks is not None and self.returncode is None:
            self._looks -= 1
            self.returncode = self._code if self._looks < 0 else None
        return self.returncode

    def wait(self, timeout_s: float) -> int:
        if self.returncode is None:
            self.log.append(f"waits {timeout_s:g} s for the part")
            raise TimeoutExpired("part", timeout_s)
        return self.returncode

    # The processes.
    def start(self, words: tuple[str, ...], variables: dict[str, str], *, ends_with_us: bool = False) -> World:
        self.log.append((words, variables, ends_with_us))
        return self

    def end(self, _process: object, patience_s: float) -> None:
        if self.returncode is None:
            self.log.append(f"ended at {self.now_s:.0f} s, with {patience_s:g} s of patience")
            self.returncode = 143

    def ended(self, _process: object) -> int:
        assert self.returncode is not None
        return self.returncode

    def end_if_stopped(self) -> None:
        if self.stops:
            raise SystemExit(130)


def serve(world: World, monkeypatch: pytest.MonkeyPatch) -> int:
    anything: Any = world

    def job_of(setting: Setting, port: int, rank: int) -> Job:
        return Job("x", ("part", setting.name, str(port), str(rank)), ExperimentConfig(), setting)

    monkeypatch.setattr(together, "time", SimpleNamespace(monotonic=lambda: world.now_s))
    monkeypatch.setattr(together, "network_of", lambda lines: {"NETWORK": str(lines == [world])})
    met = Met(2, ["node 0 (a)", "node 1 (b)", "node 2 (c)"], node_0=anything)
    return Follower(met, job_of, anything).serve()


def test_it_does_its_part_of_each_setting_and_tells_how_that_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(
        [
            Next("[1/3] tp_1", Setting(1, 1, 1), 29501, None),
            None,  # nothing was said for a while
            Next("[2/3] tp_4", BY_MP, 29503, 2),
            None,
            None,
            SettingOver(),  # that of a part which had ended already
            Over(0, None),
        ],
        looks=2,
        code=3,
    )
    assert serve(world, monkeypatch) == 0
    assert world.log == [
        "waiting for node 0", "waiting for node 0", "waiting for node 0",
        (("part", "tp_4_nodes_3", "29503", "2"), {}, True), Ended(3),
        "waiting for node 0", "waiting for node 0", "closed",
    ]  # fmt: skip
    assert capsys.readouterr().err.splitlines() == [
        "[1/3] tp_1: this node is not needed and waits",
        "[2/3] tp_4: this is node 2 of 3",
        "the results are on node 0",
    ]


def test_a_part_under_torchrun_knows_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World([Next("[1/1] x", BY_TORCHRUN, 29501, 1), Over(0, None)], looks=0)
    assert serve(world, monkeypatch) == 0
    assert world.log[1] == (("part", BY_TORCHRUN.name, "29501", "1"), {"NETWORK": "True"}, True)


@pytest.mark.parametrize("code", [1, 2])
def test_why_the_preset_ended_too_early_is_said_and_its_code_is_that_of_node_0(
    code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve(World([Over(code, "it was interrupted")]), monkeypatch) == code
    assert capsys.readouterr().err == "error: node 0 (a): it was interrupted\nthe results are on node 0\n"


def test_a_part_that_goes_on_after_the_setting_is_over_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World([Next("[1/1] x", BY_MP, 29501, 1), SettingOver()])
    # The end of the preset is said when node 0 knows of the end of the part.
    monkeypatch.setattr(world, "send", lambda message: world.log.append(message) or world._says.append(Over(1, None)))
    assert serve(world, monkeypatch) == 1
    assert world.log[2:] == [
        "ended at 15 s, with 20 s of patience", Ended(143), "waiting for node 0", "closed",
    ]  # fmt: skip


def test_after_the_last_word_of_node_0_its_part_has_a_moment_and_nobody_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World([Next("[1/1] x", BY_MP, 29501, 1), None, Over(1, "it was interrupted")])
    assert serve(world, monkeypatch) == 1
    assert world.log[2:] == ["waits 3 s for the part", "ended at 0 s, with 20 s of patience", "closed"]
    assert capsys.readouterr().err.splitlines()[1:] == [
        "error: node 0 (a): it was interrupted", "the results are on node 0",
    ]  # fmt: skip


@pytest.mark.parametrize("error", [GONE, ValueError("not ours")])
def test_where_node_0_is_gone_the_part_is_ended_and_it_is_named(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World([Next("[1/1] x", BY_MP, 29501, 1), error])
    with pytest.raises(NodesError, match=r"^node 0 \(a\) "):
        serve(world, monkeypatch)
    assert world.log[2:] == ["waits 3 s for the part", "ended at 0 s, with 20 s of patience", "closed"]
    world = World([error])
    with pytest.raises(NodesError, match=r"^node 0 \(a\) "):
        serve(world, monkeypatch)
    assert world.log == ["waiting for node 0", "closed"]


def test_node_0_may_be_gone_when_the_part_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World([Next("[1/1] x", BY_MP, 29501, 1), Over(0, None)], looks=0)
    world.is_deaf = True
    assert serve(world, monkeypatch) == 0


def test_after_a_signal_nothing_more_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World([Next("[1/1] x", BY_MP, 29501, 1), Over(0, None)], looks=0)
    world.stops = True
    with pytest.raises(SystemExit):
        serve(world, monkeypatch)
    assert world.log[2:] == ["closed"]
