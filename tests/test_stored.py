"""What the launcher learns from result files: failures that are the same for all settings, and the time left."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from test_jobs import job
from test_launcher import Launcher

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.failures import FAILURES, SAME_FOR_ALL
from batch_inference.core.results import Failure, Point, Result, StoredConfig, WorkloadKey
from batch_inference.core.text import about_time
from batch_inference.launch import stored as launch_stored
from batch_inference.launch.stored import (
    Stored,
    failure_since,
    is_anything_measured,
    measured_by,
    open_points,
    stored_in,
    taken_since,
    time_left,
)
from batch_inference.measure import locks
from builders import make_point, make_queue_point, make_result, save_all

CONFIG = ExperimentConfig(batch_sizes=(1, 4), seq_lens=(64,), max_tokens=32)


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    (tmp_path / "experiment_results").mkdir()
    return Launcher(tmp_path)


def failed(kind: str, name: str = "tp_1") -> Result:
    return make_result(name, status="failed", failure=Failure(kind, "the planted reason"))


def measured(config: ExperimentConfig, *batch_sizes: int, minutes: int = 10, **changes: object) -> Result:
    """A setting that took so long for these points."""
    points = [make_point(batch, 64) for batch in batch_sizes]
    ended = {"environment": {"ended_at": f"2026-01-02T03:{4 + minutes:02}:05+00:00"}}
    result = make_result(config.setting_name, points, **{**ended, **changes})  # type: ignore[arg-type]
    result.config = StoredConfig.of(config)
    return result


def in_folder(folder: Path, **changes: object) -> ExperimentConfig:
    return dataclasses.replace(CONFIG, output_dir=str(folder), **changes)  # type: ignore[arg-type]


def test_the_classes_that_are_the_same_for_all_settings_are_classes() -> None:
    assert {failure.name for failure in FAILURES} > SAME_FOR_ALL


@pytest.mark.parametrize("kind", sorted(SAME_FOR_ALL))
@pytest.mark.parametrize("flags", [(), ("--pack",)], ids=["in_turn", "packed"])
def test_what_is_wrong_for_every_setting_ends_the_preset_at_the_first(
    launcher: Launcher, kind: str, flags: tuple[str, ...]
) -> None:
    save_all([failed(kind)], launcher.folder / "there")
    environment = {"RESULTS": str(launcher.folder / "there"), "FAIL": "tp_1", "DEVICES": "2"}
    done = launcher("tensor-parallel", *flags, **environment)
    assert done.returncode == 1
    assert launcher.names() == ["tp_1"]
    assert f"tp_2 skipped: {kind} would be the same for every setting" in done.stderr.splitlines()
    assert "failed: tp_1" in done.stderr
    assert "analyse with" not in done.stderr


def test_another_failure_does_not_end_the_preset(launcher: Launcher) -> None:
    save_all([failed("oom_load")], launcher.folder / "there")
    done = launcher("tensor-parallel", RESULTS=str(launcher.folder / "there"), FAIL="tp_1")
    assert launcher.names() == ["tp_1", "tp_2", "tp_4", "tp_8"]
    assert "analyse with" in done.stderr  # the others are done


def test_a_folder_without_a_measured_point_is_not_to_be_analysed(launcher: Launcher) -> None:
    folder = launcher.folder / "experiment_results"
    assert "analyse with" not in launcher("custom", "TP=1", FAIL="tp_1").stderr
    save_all([failed("oom_load")], folder)
    assert "analyse with" not in launcher("custom", "TP=1", "--resume", FAIL="tp_1").stderr
    save_all([make_result("tp_2", [make_point()])], folder)
    assert "analyse with" in launcher("custom", "TP=1", "--resume", FAIL="tp_1").stderr
    assert is_anything_measured(folder)


def test_a_failure_of_before_is_none_of_this_run(tmp_path: Path) -> None:
    (path,) = save_all([failed("model_gated")], tmp_path)
    config = in_folder(tmp_path)
    written_s = path.stat().st_mtime
    assert failure_since(config, written_s - 5) == "model_gated"
    assert failure_since(config, written_s + 60) is None
    assert failure_since(dataclasses.replace(config, tensor_parallel_size=2), written_s - 5) is None


def test_what_is_no_result_is_passed_over_and_a_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / ".half.json").write_text("{")
    assert stored_in(tmp_path) == stored_in(tmp_path / "absent") == []
    (path,) = save_all([failed("unknown")], tmp_path)
    assert [one.failure for one in stored_in(tmp_path)] == ["unknown"]
    save_all([failed("model_gated")], tmp_path)
    os.utime(path, ns=(1, 1))
    assert [one.failure for one in stored_in(tmp_path)] == ["model_gated"]


def test_points_that_are_measured_with_the_same_settings_are_not_open(tmp_path: Path) -> None:
    config = in_folder(tmp_path)
    assert open_points(config) == 2
    save_all([measured(config, 1)], tmp_path)
    assert open_points(config) == 1
    assert open_points(dataclasses.replace(config, overwrite=True)) == 2
    assert open_points(dataclasses.replace(config, dtype="float16")) == 2
    assert open_points(dataclasses.replace(config, seq_lens=(64, 128))) == 3


def test_the_time_left_is_that_of_the_points_measured_so_far(tmp_path: Path) -> None:
    first, second = in_folder(tmp_path), in_folder(tmp_path, tensor_parallel_size=2)
    assert time_left([first, second], "gpu") is None
    save_all([measured(first, 1, 4)], tmp_path)
    assert time_left([first, second], "gpu") == "about 10 min left, from 1 setting measured"
    save_all([measured(second, 1, minutes=15)], tmp_path)  # half of it is done
    assert time_left([first, second], "gpu") == "about 10 min left, from 2 settings measured"
    assert time_left([first, second], "cpu") is None
    assert time_left([dataclasses.replace(second, model="another")], "gpu") is None
    assert time_left([first], "gpu") is None  # nothing is left


def queued(config: ExperimentConfig, batch_size: int, requests: int) -> Result:
    """A point of 480 requests: each lives a second."""
    result = make_result(config.setting_name, [make_queue_point(batch_size, (requests,), life_s=1.0)])
    result.config, result.jobs = StoredConfig.of(config), [job(480)]
    assert result.engine is not None
    result.engine.load_s.total_s = 30.0
    return result


def test_the_time_left_of_a_job_is_that_of_the_requests_it_runs(tmp_path: Path) -> None:
    asks = {"prompts_file": "job.jsonl", "workload_hash": "abc", "batch_sizes": (4,)}
    first = in_folder(tmp_path, **asks)
    save_all([queued(first, 4, 48)], tmp_path)
    assert open_points(first) == 0
    # A larger sample is measured again, at four requests a second, after a start and a warm-up of eight requests.
    larger = dataclasses.replace(first, sample=120)
    assert open_points(larger) == 1
    said = "about 62 s left, from 1 setting measured"
    assert time_left([larger], "gpu") == said
    # Replicas share the requests; of a batch size that was not measured the nearest one tells.
    assert time_left([dataclasses.replace(first, sample=240, data_parallel_size=2)], "gpu") == said
    assert time_left([dataclasses.replace(larger, batch_sizes=(5,))], "gpu") == said
    # There are no more than 480.
    of_all = dataclasses.replace(first, sample=480)
    assert time_left([of_all], "gpu") == time_left([dataclasses.replace(first, sample=4800)], "gpu")
    save_all([queued(of_all, 4, 480)], tmp_path)
    assert open_points(of_all) == open_points(dataclasses.replace(first, sample=4800)) == 0


def test_a_sweep_that_went_on_counts_its_own_points_alone(tmp_path: Path) -> None:
    config = in_folder(tmp_path)
    result = measured(config, 1, 4)
    assert result.engine is not None
    result.earlier_engines, result.points[0].engine = [result.engine], 0
    save_all([result], tmp_path)
    assert [one.seconds_per_point for one in stored_in(tmp_path)] == [600]


@pytest.mark.parametrize("times", [{"ended_at": None}, {"started_at": None}, {"ended_at": "yesterday"}])
def test_a_setting_whose_time_is_not_known_tells_nothing(tmp_path: Path, times: dict[str, object]) -> None:
    save_all([measured(in_folder(tmp_path), 1, 4, environment=times)], tmp_path)
    assert [one.seconds_per_point for one in stored_in(tmp_path)] == [None]


def test_settings_that_ran_beside_others_tell_nothing(tmp_path: Path) -> None:
    save_all([measured(in_folder(tmp_path, packed=True), 1, 4)], tmp_path)
    assert [one.seconds_per_point for one in stored_in(tmp_path)] == [None]


def test_plan_and_preset_say_the_time_left_once_something_is_measured(launcher: Launcher) -> None:
    words = ("tensor-parallel", "--batch-sizes", "1,4", "--seq-lens", "64", "--resume", "--", "--max-tokens", "32")
    said = "about 10 min left, from 1 setting measured"
    assert " left, from" not in launcher(*words[:-3], "--dry-run", *words[-3:]).stdout
    tp_1 = dataclasses.replace(CONFIG, output_dir="experiment_results")
    save_all([measured(tp_1, 1, 4)], launcher.folder / "experiment_results")
    plan = launcher(*words[:-3], "--dry-run", *words[-3:], DEVICES="2")
    assert f"# {said}" in plan.stdout.splitlines()
    run = launcher(*words, DEVICES="2")
    assert run.stderr.splitlines().count(f"  {said}") == 2  # tp_1 has no open point, tp_2 is not measured by the fake
    assert " left, from" not in launcher(*words[:-3], "--pack", *words[-3:], DEVICES="2").stderr


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "about 1 s"), (42.4, "about 42 s"), (90, "about 2 min"), (725, "about 12 min"), (9000, "about 2.5 h")],
)
def test_times_are_said_in_the_unit_that_fits(seconds: float, words: str) -> None:
    assert about_time(seconds) == words


@pytest.mark.parametrize(
    ("started", "ended", "points", "seconds"),
    [
        ("2026-01-02T03:04:05+00:00", "2026-01-02T03:14:05+00:00", 4, 150.0),
        ("2026-01-02T03:04:05+00:00", "2026-01-02T05:14:05+02:00", 1, 600.0),
        ("2026-01-02T03:04:05+00:00", "2026-01-02T03:04:00+00:00", 1, 0.0),  # a clock that was set back
        ("2026-01-02T03:04:05+00:00", "2026-01-02T03:14:05+00:00", 0, None),
    ],
)
def test_a_point_takes_its_share_of_the_time_of_the_sweep(
    started: str, ended: str, points: int, seconds: float | None, tmp_path: Path
) -> None:
    times = {"started_at": started, "ended_at": ended}
    result = measured(in_folder(tmp_path), *range(1, points + 1), environment=times)
    save_all([result], tmp_path)
    assert [one.seconds_per_point for one in stored_in(tmp_path)] == [seconds]


def test_the_time_left_is_that_of_all_open_points_of_all_settings(tmp_path: Path) -> None:
    # 300 s a point here, 600 s there: 450 s on average, for two points of one setting and one of the other.
    first, second = in_folder(tmp_path), in_folder(tmp_path, tensor_parallel_size=2)
    save_all([measured(first, 8, 16), measured(second, 1)], tmp_path)
    assert time_left([first, second], "gpu") == "about 22 min left, from 2 settings measured"
    assert open_points(first) + open_points(second) == 3


def test_only_points_that_are_measured_are_not_open(tmp_path: Path) -> None:
    config = in_folder(tmp_path)
    result = measured(config, 1)
    result.points.append(Point(4, 64, 32, "oom", reason="x"))
    save_all([result], tmp_path)
    assert open_points(config) == 1
    assert open_points(dataclasses.replace(config, max_tokens=16)) == 2
    assert open_points(dataclasses.replace(config, data_parallel_size=2)) == 2


def test_a_failure_of_the_same_second_is_one_of_this_run(tmp_path: Path) -> None:
    (path,) = save_all([failed("model_gated")], tmp_path)
    config, written_s = in_folder(tmp_path), path.stat().st_mtime
    assert failure_since(config, written_s + 0.9) == "model_gated"
    assert failure_since(config, written_s + 1.1) is None


def test_what_is_hidden_is_no_result(tmp_path: Path) -> None:
    """macOS leaves such files on foreign disks, and a write that was cut short leaves one too."""
    (path,) = save_all([make_result(points=[make_point()])], tmp_path)
    path.rename(tmp_path / "._tp_1_results.json")
    assert stored_in(tmp_path) == []


# --- what decides, one thing at a time --------------------------------------------------------------------------------


@pytest.fixture
def holders(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who holds locks in the folder; those of this setting say what for."""
    found: list[str] = []
    monkeypatch.setattr(locks, "holders_in", lambda _folder: found)
    monkeypatch.setattr(locks, "purpose_of", lambda config: f"for {config.setting_name}")
    return found


def test_who_measures_this_setting_is_named_and_no_other(tmp_path: Path, holders: list[str]) -> None:
    config = in_folder(tmp_path)
    holders[:] = ["process 1 for tp_2", "process 2 for tp_1", "process 3 for tp_1"]
    assert measured_by(config) == "process 2 for tp_1"
    assert taken_since(config, 1e12) == "process 2 for tp_1"
    holders[1:] = []
    assert (measured_by(config), taken_since(config, 2.0)) == (None, None)


def test_a_setting_is_taken_where_its_own_file_was_written_since(tmp_path: Path, holders: list[str]) -> None:
    assert holders == []
    config = in_folder(tmp_path)
    others = [in_folder(tmp_path, tensor_parallel_size=2), in_folder(tmp_path, seed=7), in_folder(tmp_path, name="x")]
    for number, other in enumerate(others):
        (path,) = save_all([measured(other, 1)], tmp_path)
        path.rename(tmp_path / f"other_{number}.json")
    assert taken_since(config, 2.0) is None
    # Twice: an old file of the same setting, and a new one.
    for name, written_s in (("a", 1000), ("b", 2000), ("c", 1500)):
        (path,) = save_all([measured(config, 1)], tmp_path)
        os.utime(path, (written_s, written_s))
        path.rename(tmp_path / f"{name}.json")
    assert taken_since(config, 2000.9) == locks.ANOTHER
    assert taken_since(config, 2001.0) is None


def test_points_of_another_setting_with_the_same_flags_stay_open(tmp_path: Path) -> None:
    config = in_folder(tmp_path)
    save_all([measured(in_folder(tmp_path, name="other"), 1), measured(in_folder(tmp_path, name="third"), 4)], tmp_path)
    assert open_points(config) == 2
    (path,) = save_all([measured(config, 1)], tmp_path)
    path.rename(tmp_path / "first.json")
    assert open_points(config) == 1
    save_all([measured(config, 4)], tmp_path)  # in two files
    assert open_points(config) == 0


def test_something_is_measured_where_any_file_has_a_point(tmp_path: Path) -> None:
    save_all([failed("unknown")], tmp_path)
    assert not is_anything_measured(tmp_path)
    save_all([measured(in_folder(tmp_path, tensor_parallel_size=2), 1)], tmp_path)
    assert is_anything_measured(tmp_path)


def stored(**changes: Any) -> Stored:
    return dataclasses.replace(Stored("x", CONFIG.model, {}, "gpu", 0.0, None, frozenset(), 60.0), **changes)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([stored()], "about 2 min left, from 1 setting measured"),
        ([stored(), stored(seconds_per_point=180.0)], "about 4 min left, from 2 settings measured"),
        ([stored(seconds_per_point=0.0)], "about 1 s left, from 1 setting measured"),
        ([stored(), stored(device_kind="cpu", seconds_per_point=999.0)], "about 2 min left, from 1 setting measured"),
        ([stored(), stored(model="other", seconds_per_point=999.0)], "about 2 min left, from 1 setting measured"),
        ([stored(), stored(seconds_per_point=None)], "about 2 min left, from 1 setting measured"),
        ([stored(device_kind=None)], None),
        ([], None),
    ],
)
def test_the_time_left_is_told_by_what_is_alike(
    found: list[Stored], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_stored, "stored_in", lambda _folder: found)
    assert time_left([CONFIG], "gpu") == said


def test_the_most_settings_that_told_the_time_of_one_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings may go into folders of their own."""
    told = {"a": [stored(), stored()], "b": [stored()], "c": []}
    monkeypatch.setattr(launch_stored, "stored_in", lambda folder: told[folder.name])
    a, b, c = (dataclasses.replace(CONFIG, output_dir=name) for name in "abc")
    assert time_left([a, b], "gpu") == "about 4 min left, from 2 settings measured"
    assert time_left([a, b, c], "gpu") is None


def test_only_the_failure_of_this_setting_counts(tmp_path: Path) -> None:
    save_all([failed("model_gated", "tp_2"), measured(in_folder(tmp_path), 1)], tmp_path)
    assert failure_since(in_folder(tmp_path), 0.0) is None
    assert failure_since(in_folder(tmp_path, tensor_parallel_size=2), 0.0) == "model_gated"


def test_files_are_read_in_the_order_of_their_names_and_all_of_them(tmp_path: Path) -> None:
    for name in ("c", "a", "b"):
        (path,) = save_all([failed("unknown", name)], tmp_path)
        path.rename(tmp_path / f"{name}.json")
    (tmp_path / "a0.json").write_text("{")
    (tmp_path / "b.txt").write_text("no result")
    assert [one.name for one in stored_in(tmp_path)] == ["a", "b", "c"]


def test_queue_points_are_told_apart_by_their_workload_and_their_tokens_per_step(tmp_path: Path) -> None:
    config = in_folder(tmp_path, prompts_file="w.jsonl", workload_hash="abc", batch_sizes=(2, 4))
    assert open_points(config) == 2
    result = measured(config)
    result.points = [
        make_queue_point(2, (32,), workload=WorkloadKey("abc", "file", "given")),
        make_queue_point(4, (48,), workload=WorkloadKey("abc", "file", "given"), max_num_batched_tokens=64),
    ]
    save_all([result], tmp_path)
    assert open_points(config) == 1
    changes: list[tuple[dict[str, object], int]] = [
        ({"workload_hash": "other"}, 2),
        ({"order": "shuffled"}, 2),
        ({"output_lengths": "eos"}, 2),
        ({"output_lengths": 7}, 2),
        ({"max_num_batched_tokens": (64, 128)}, 3),
        ({"prompts_file": None, "workload_hash": None}, 2),
        ({"prompts_file": "elsewhere.jsonl", "sample": 32, "max_tokens": 7}, 1),
        ({"sample": 100}, 2),
    ]
    for change, count in changes:
        assert open_points(dataclasses.replace(config, **change)) == count, change  # type: ignore[arg-type]


def test_batches_with_tokens_per_step_of_their_own_are_other_points(tmp_path: Path) -> None:
    config = in_folder(tmp_path, batch_sizes=(1,), max_num_batched_tokens=(64, 128))
    result = measured(config)
    result.points = [make_point(1, 64, max_num_batched_tokens=64), make_point(1, 64)]
    save_all([result], tmp_path)
    assert open_points(config) == 1
    assert open_points(dataclasses.replace(config, max_num_batched_tokens=None)) == 0
