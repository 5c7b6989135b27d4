"""The settings of a preset in turn, beside other programs that measure the same ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.results import Failure, StoredConfig
from batch_inference.launch import running
from batch_inference.launch.__main__ import to_be_fetched
from batch_inference.launch.console import Outcomes, say_outcomes
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


@pytest.mark.parametrize(
    ("kind", "tried"),
    [("network_offline", 1), ("model_gated", 1), ("model_not_found", 1), ("oom_load", 2)],
)
def test_what_keeps_every_setting_from_an_engine_ends_the_preset(tmp_path: Path, kind: str, tried: int) -> None:
    jobs = [planned(tmp_path, 1), planned(tmp_path, 2)]

    def fails() -> int:
        result = make_result("tp_1", status="failed")
        result.failure = Failure(kind, "vLLM's own words")
        save_all([result], tmp_path)
        return 1

    processes = Planned(fails, lambda: 0)
    outcomes = run_jobs(jobs, Options(), DEVICES, processes)
    assert len(processes.names) == tried
    assert [job.name for job in outcomes.failed] == ["tp_1"]
    assert [job.name for job in outcomes.skipped] == ["tp_2"][: 2 - tried]


def test_a_model_is_fetched_for_what_is_still_to_be_measured(tmp_path: Path) -> None:
    grid = {"batch_sizes": (1,), "seq_lens": (64,), "max_tokens": 32}
    jobs = [
        replace(one, job=replace(one.job, config=replace(one.config, **grid)))
        for one in (planned(tmp_path, 1), planned(tmp_path, 2))
    ]
    assert to_be_fetched(jobs) == [one.config for one in jobs]
    measured(jobs[0].config)
    # One engine fetches for itself.
    assert to_be_fetched(jobs) == []
    measured(jobs[1].config)
    assert to_be_fetched(jobs) == []


def test_of_a_setting_that_failed_the_log_is_named_where_it_has_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = [planned(tmp_path, tp).job for tp in (1, 2)]
    failed[1].config.log_path.write_text("")
    say_outcomes(Outcomes(failed=failed))
    assert capsys.readouterr().err.splitlines() == [
        "", "done: none   skipped: none   failed: tp_1 tp_2", f"  tp_2: see {failed[1].config.log_path}",
    ]  # fmt: skip
