"""The settings of a preset in turn, beside other programs that measure the same ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.results import StoredConfig
from batch_inference.launch import running
from batch_inference.launch.jobs import Job
from batch_inference.launch.options import Options
from batch_inference.launch.overview import PlannedJob
from batch_inference.launch.presets import Setting
from batch_inference.launch.processes import Processes
from batch_inference.launch.running import run_jobs
from batch_inference.measure.locks import lock_of, locked, purpose_of
from batch_inference.plan.devices import Devices
from builders import make_point, make_result, save_all

DEVICES = Devices("gpu", ("0", "1"))


def planned(folder: Path, tp: int) -> PlannedJob:
    name = f"tp_{tp}"
    config = ExperimentConfig(tensor_parallel_size=tp, name=name, output_dir=str(folder))
    return PlannedJob(Job(name, (name,), config, Setting(tp, 1, 1)), None, None)


def measured(config: ExperimentConfig) -> None:
    result = make_result(config.setting_name, [make_point()])
    result.config = StoredConfig.of(config)
    save_all([result], Path(config.output_dir))


class Planned(Processes):
    """Starts nothing: each setting does what was planned for it."""

    def __init__(self, *codes: Callable[[], int]) -> None:
        super().__init__()
        self._codes = list(codes)
        self.names: list[str] = []

    def run(self, words: Sequence[str], variables: object = None) -> int:  # noqa: ARG002
        self.names.append(words[0])
        return self._codes.pop(0)()


def test_a_setting_that_another_program_took_at_the_same_moment_is_tried_again_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [planned(tmp_path, 1), planned(tmp_path, 2)]

    def taken_by_a_faster_one() -> int:
        measured(jobs[0].config)
        return 2

    processes = Planned(taken_by_a_faster_one, lambda: 0, lambda: 0)
    outcomes = run_jobs(jobs, Options(), DEVICES, processes)
    assert processes.names == ["tp_1", "tp_2", "tp_1"]
    assert [job.name for job in outcomes.done] == ["tp_2", "tp_1"]
    assert not outcomes.failed
    assert "[1/2] tp_1: another process is measuring it; it is tried again at the end" in capsys.readouterr().err


def test_one_that_is_being_measured_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [planned(tmp_path, 1), planned(tmp_path, 2)]
    with contextlib.ExitStack() as held:
        held.enter_context(locked(lock_of(jobs[0].config.output_path), purpose_of(jobs[0].config)))
        monkeypatch.setattr(running.time, "sleep", lambda _: held.close())
        processes = Planned(lambda: 0, lambda: 0)
        outcomes = run_jobs(jobs, Options(), DEVICES, processes)
    assert processes.names == ["tp_2", "tp_1"]
    assert [job.name for job in outcomes.done] == ["tp_2", "tp_1"]
    assert "[1/2] tp_1 waits: process" in capsys.readouterr().err


def test_wrong_use_is_not_tried_again(tmp_path: Path) -> None:
    measured(planned(tmp_path, 2).config)  # another setting
    processes = Planned(lambda: 2)
    with pytest.raises(SystemExit) as ended:
        run_jobs([planned(tmp_path, 1), planned(tmp_path, 2)], Options(), DEVICES, processes)
    assert ended.value.code == 2
    assert processes.names == ["tp_1"]
