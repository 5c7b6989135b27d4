"""The settings of a preset in turn, beside other programs that measure the same ones."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.results import Failure, StoredConfig
from batch_inference.launch import packing, running
from batch_inference.launch.__main__ import to_be_fetched
from batch_inference.launch.console import Outcomes, say_outcomes
from batch_inference.launch.jobs import Job
from batch_inference.launch.options import Options
from batch_inference.launch.overview import PlannedJob
from batch_inference.launch.presets import Setting
from batch_inference.launch.processes import Processes
from batch_inference.launch.running import run_jobs
from batch_inference.launch.together import Leader
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
    assert "[1/2] tp_1: another process is measuring it; it will be tried again at the end" in capsys.readouterr().err


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


# --- several settings, whole outputs at a time ------------------------------------------------------------------------


class Told(Leader):
    """Of nodes: says what each setting comes to; `ends_with`: the problem after the first."""

    def __init__(self, *codes: int, ends_with: str | None = None) -> None:
        self.problem = None
        self.headings: list[str] = []
        self._codes_to_come, self._ends_with = list(codes), ends_with

    def run(self, job: Job, heading: str) -> int:  # noqa: ARG002
        self.headings.append(heading)
        self.problem = self._ends_with
        return self._codes_to_come.pop(0)


def names(jobs: Sequence[Job]) -> str:
    return " ".join(job.name for job in jobs)


def ends(outcomes: Outcomes) -> tuple[str, str, str]:
    return names(outcomes.done), names(outcomes.skipped), names(outcomes.failed)


def five(folder: Path, *reasons: int) -> list[PlannedJob]:
    jobs = [planned(folder, tp) for tp in range(1, 6)]
    return [replace(one, reason="no devices" if place in reasons else None) for place, one in enumerate(jobs)]


@pytest.fixture
def same_for_all(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the settings whose failure would be that of all."""
    names: list[str] = []
    kind_of = {True: "network_offline", False: "oom_load"}
    monkeypatch.setattr(running, "failure_since", lambda config, _since_s: kind_of[config.setting_name in names])
    return names


def test_each_setting_has_its_place_its_file_and_the_time_that_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = lambda configs, kind: f"{[one.tensor_parallel_size for one in configs]} on {kind} left"  # noqa: E731
    monkeypatch.setattr(running, "time_left", left)
    outcomes = run_jobs(five(tmp_path, 0, 3), Options(), DEVICES, Planned(lambda: 0, lambda: 1, lambda: 2))
    assert ends(outcomes) == ("tp_2", "tp_1 tp_4", "tp_3 tp_5")
    assert capsys.readouterr().err.splitlines() == [
        "[1/5] tp_1 skipped: no devices",
        f"[2/5] tp_2 -> {tmp_path}/tp_2_results.json", "  [2, 3, 5] on gpu left",
        f"[3/5] tp_3 -> {tmp_path}/tp_3_results.json", "  [3, 5] on gpu left",
        "[4/5] tp_4 skipped: no devices",
        f"[5/5] tp_5 -> {tmp_path}/tp_5_results.json", "  [5] on gpu left",
    ]  # fmt: skip


def test_those_after_a_failure_that_is_the_same_for_all_are_skipped_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], same_for_all: list[str]
) -> None:
    same_for_all.append("tp_2")
    outcomes = run_jobs(five(tmp_path, 3), Options(), DEVICES, Planned(lambda: 0, lambda: 1))
    assert ends(outcomes) == ("tp_1", "tp_4 tp_3 tp_5", "tp_2")
    said = "tp_3, tp_5 skipped: network_offline would be the same for every setting"
    assert capsys.readouterr().err.splitlines()[-1] == said
    # The last one keeps nobody from anything; one that was measured all the same counts.
    same_for_all[:] = ["tp_1", "tp_5"]
    outcomes = run_jobs(five(tmp_path), Options(), DEVICES, Planned(*[lambda: 0] * 4, lambda: 1))
    assert ends(outcomes) == ("tp_1 tp_2 tp_3 tp_4", "", "tp_5")
    assert "skipped" not in capsys.readouterr().err


def test_wrong_use_ends_the_preset_only_at_its_first(tmp_path: Path) -> None:
    outcomes = run_jobs(five(tmp_path), Options(), DEVICES, Planned(lambda: 1, *[lambda: 2] * 3, lambda: 0))
    assert ends(outcomes) == ("tp_5", "", "tp_1 tp_2 tp_3 tp_4")
    with pytest.raises(SystemExit) as ended:
        run_jobs(five(tmp_path), Options(), DEVICES, Planned(lambda: 0, lambda: 143))
    assert ended.value.code == 143


def test_over_nodes_the_leader_runs_each_and_a_problem_ends_the_preset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leader = Told(0, 1, 0)
    outcomes = run_jobs(five(tmp_path, 1, 3), Options(), DEVICES, Planned(), leader)
    assert leader.headings == ["[1/5] tp_1", "[3/5] tp_3", "[5/5] tp_5"]
    assert ends(outcomes) == ("tp_1 tp_5", "tp_2 tp_4", "tp_3")
    capsys.readouterr()
    leader = Told(1, ends_with="node 1 (b) is gone")
    outcomes = run_jobs(five(tmp_path, 3), Options(), DEVICES, Planned(), leader)
    assert ends(outcomes) == ("", "tp_4", "tp_1")
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: node 1 (b) is gone; the preset ends; not started: tp_2, tp_3, tp_5"
    )
    run_jobs(five(tmp_path, 1, 2, 3, 4), Options(), DEVICES, Planned(), Told(1, ends_with="x"))
    assert "error: x; the preset ends; not started: none\n" in capsys.readouterr().err


def test_those_of_others_come_last_in_their_order_and_are_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = five(tmp_path, 3)
    looks = {"tp_1": 3, "tp_3": 1}  # how often another program is still at it
    waited: list[float] = []

    def measured_by(config: ExperimentConfig) -> str | None:
        looks[config.setting_name] = looks.get(config.setting_name, 0) - 1
        return "process 7" if looks[config.setting_name] >= 0 else None

    monkeypatch.setattr(running, "measured_by", measured_by)
    monkeypatch.setattr(running.time, "sleep", waited.append)
    processes = Planned(*[lambda: 0] * 4)
    assert ends(run_jobs(jobs, Options(), DEVICES, processes)) == ("tp_2 tp_5 tp_1 tp_3", "tp_4", "")
    assert waited == [1.0, 1.0]
    assert [line for line in capsys.readouterr().err.splitlines() if "process 7" in line] == [
        "[1/5] tp_1: process 7 is measuring it; it will be tried again at the end",
        "[3/5] tp_3: process 7 is measuring it; it will be tried again at the end",
        "[1/5] tp_1 waits: process 7 is measuring it",
    ]
    # A signal ends the wait.
    looks.update({"tp_1": 10**9})
    monkeypatch.setattr(processes, "end_if_stopped", lambda: (_ for _ in ()).throw(SystemExit(130)))
    with pytest.raises(SystemExit):
        run_jobs(jobs[:1], Options(), DEVICES, processes)


class FakePacking:
    """The settings side by side end as planned, the first of them first."""

    codes: Sequence[int] = ()

    def __init__(self, jobs: Sequence[Job], devices: Devices, _processes: Processes) -> None:
        assert devices is DEVICES
        self.waiting = list(jobs)

    def run(self) -> Iterator[tuple[Job, int]]:
        for code in self.codes:
            if self.waiting:
                yield self.waiting.pop(0), code

    def give_up(self) -> list[Job]:
        given_up, self.waiting[:] = list(self.waiting), []
        return given_up


@pytest.mark.parametrize(
    ("codes", "for_all", "taken", "end"),
    [
        ((0, 1, 0), "", "", ("tp_1 tp_5", "tp_2 tp_4", "tp_3")),
        ((1, 2, 2), "", "", ("", "tp_2 tp_4", "tp_1 tp_3 tp_5")),
        ((2, 2, 2), "", "", 2),
        ((0, 143, 0), "", "", 143),
        ((1, 0, 0), "tp_1", "", ("", "tp_2 tp_4 tp_3 tp_5", "tp_1")),
        ((0, 0, 0), "tp_1", "", ("tp_1 tp_3 tp_5", "tp_2 tp_4", "")),
        # What another program took is no wrong use, and is tried at the end: all of it with 0 then.
        ((2, 2, 2), "", "tp_1 tp_5", ("tp_1 tp_5", "tp_2 tp_4", "tp_3")),
        ((2, 2, 2), "", "tp_1 tp_3 tp_5", ("tp_1 tp_3 tp_5", "tp_2 tp_4", "")),
        ((0, 1, 0), "", "tp_3", ("tp_1 tp_5", "tp_2 tp_4", "tp_3")),
    ],
)
def test_packed_settings_end_as_those_in_turn(  # noqa: PLR0913
    codes: Sequence[int], for_all: str, taken: str, end: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], same_for_all: list[str],
) -> None:  # fmt: skip
    same_for_all += for_all.split()
    monkeypatch.setattr(packing, "Packing", FakePacking)
    monkeypatch.setattr(FakePacking, "codes", codes)
    others = taken.split()
    monkeypatch.setattr(running, "taken_since", lambda config, _: "x" if config.setting_name in others else None)
    processes = Planned(*[lambda: 0] * 3)
    jobs = five(tmp_path, 1, 3)
    if isinstance(end, int):
        with pytest.raises(SystemExit) as ended:
            run_jobs(jobs, Options(pack=True), DEVICES, processes)
        assert ended.value.code == end
        return
    assert ends(run_jobs(jobs, Options(pack=True), DEVICES, processes)) == end
    assert processes.names == (others if 2 in codes else [])
    assert capsys.readouterr().err.splitlines()[:2] == [
        "[2/5] tp_2 skipped: no devices", "[4/5] tp_4 skipped: no devices",
    ]  # fmt: skip


def test_after_a_signal_packed_settings_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "Packing", FakePacking)
    monkeypatch.setattr(FakePacking, "codes", (0, 0, 0, 0, 0))
    processes = Planned()
    processes._stopped_by = signal.SIGTERM
    with pytest.raises(SystemExit) as ended:
        run_jobs(five(tmp_path), Options(pack=True), DEVICES, processes)
    assert ended.value.code == 143


def test_a_setting_that_is_refused_after_it_has_written_its_file_is_tried_no_third_time(tmp_path: Path) -> None:
    """As one whose workload holds a token id that the model does not have."""
    jobs = [planned(tmp_path, 1), planned(tmp_path, 2)]

    def refused() -> int:
        measured(jobs[0].config)
        return 2

    processes = Planned(refused, lambda: 0, refused)
    outcomes = run_jobs(jobs, Options(), DEVICES, processes)
    assert processes.names == ["tp_1", "tp_2", "tp_1"]
    assert ends(outcomes) == ("tp_2", "", "tp_1")


def test_a_packed_setting_that_is_refused_is_tried_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "Packing", FakePacking)
    monkeypatch.setattr(FakePacking, "codes", (2, 0))
    monkeypatch.setattr(running, "taken_since", lambda config, _: "x" if config.setting_name == "tp_1" else None)
    processes = Planned(lambda: 2)
    outcomes = run_jobs(five(tmp_path)[:2], Options(pack=True), DEVICES, processes)
    assert (processes.names, ends(outcomes)) == (["tp_1"], ("tp_2", "", "tp_1"))


def test_a_setting_that_is_tried_again_at_the_end_skips_none_that_has_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_for_all: list[str]
) -> None:
    holders = {"tp_1": ["process 7"], "tp_3": ["process 7"]}
    monkeypatch.setattr(
        running,
        "measured_by",
        lambda config: (holders.get(config.setting_name) or [None]).pop(),  # type: ignore[list-item]
    )
    same_for_all += ["tp_1"]
    outcomes = run_jobs(five(tmp_path), Options(), DEVICES, Planned(*[lambda: 0] * 3, lambda: 1))
    assert ends(outcomes) == ("tp_2 tp_4 tp_5", "tp_3", "tp_1")


def test_only_wrong_use_makes_one_look_who_took_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "taken_since", lambda *_: "another process")
    assert ends(run_jobs(five(tmp_path)[:2], Options(), DEVICES, Planned(lambda: 1, lambda: 0))) == ("tp_2", "", "tp_1")


def test_packed_settings_none_of_which_can_run_are_no_wrong_use(tmp_path: Path) -> None:
    outcomes = run_jobs(five(tmp_path, 0, 1, 2, 3, 4), Options(pack=True), DEVICES, Planned())
    assert ends(outcomes) == ("", "tp_1 tp_2 tp_3 tp_4 tp_5", "")
