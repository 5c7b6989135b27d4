"""Every recorded result file against batch_inference/core/result.schema.json; what the script writes is held against it
where the script is tested."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from batch_inference.core.metrics import summarise
from batch_inference.core.result_file import ResultFileError, json_schema, load_result, save_result
from batch_inference.core.results import SCHEMA_VERSION, PointKey, WorkloadKey
from batch_inference.core.statistics import STOPPED_BY_ITSELF
from builders import make_point, make_queue_point, make_result, make_run
from conftest import REPOSITORY, RESULT_SCHEMA, assert_as_the_schema_says

GOLDEN = sorted((REPOSITORY / "tests" / "golden").glob("*.json"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_recorded_files_still_load_with_the_same_numbers(path: Path, tmp_path: Path) -> None:
    result = load_result(path)
    assert result.status == "complete"
    for point in result.points:
        numbers, stored = summarise(result, point), dict(point.summary)
        # Those of runs that stopped by themselves were stored without their allowance for it.
        stored["latency_ci95_s"] *= STOPPED_BY_ITSELF if result.is_adaptive(point) else 1
        # A metric may have been added since.
        assert {name: numbers[name] for name in stored} == pytest.approx(stored, nan_ok=False)
    # What is saved of an older file is a file of this version, with everything in it.
    save_result(result, tmp_path / path.name)
    assert_as_the_schema_says(tmp_path / path.name)
    assert load_result(tmp_path / path.name) == result


def test_points_of_version_1_keep_the_engine_that_measured_them(tmp_path: Path) -> None:
    document = json.loads((REPOSITORY / "tests" / "golden" / "v1_cpu_tp_2.json").read_text())
    point = document["points"][0]
    sizes = (2, 4, 2)
    document["points"] = [
        {**point, "batch_size": batch, "engine": {"max_num_seqs": size}} for batch, size in enumerate(sizes, start=1)
    ]
    path = tmp_path / "tp_1_results.json"
    path.write_text(json.dumps(document))
    result = load_result(path)
    engines = [result.engine_of(one) for one in result.points]
    assert [engine and engine.max_num_seqs for engine in engines] == list(sizes)
    assert len(result.earlier_engines) == 2


def test_everything_that_a_run_may_hold_is_in_the_schema(tmp_path: Path) -> None:
    clocks = {"sm_mhz": [1980.0, None], "throttle_reasons": ["sw_power_cap"], "other_processes": 0}
    counters = {"jit_compilations": 1, "peak_running": 1}
    memory = {"scope": "device", "used_gib": [1.0], "peak_kv_use": 0.5}
    run = make_run(1.0, memory=memory, counters=counters, clocks=clocks, passed_s=1.1)
    point = make_point(runs=[run], warmups=[{"latency_s": 3.0, "jit_compilations": 1, "reason": "compiled"}])
    path = tmp_path / "tp_1_results.json"
    save_result(make_result(points=[point]), path)
    assert_as_the_schema_says(path)
    assert load_result(path).points[0].runs == [run]


def test_a_queue_point_is_told_apart_by_its_workload_and_its_budget(tmp_path: Path) -> None:
    workload = WorkloadKey("sha256:1", output_lengths="file", order="longest-first")
    points = [make_queue_point(64, (640,), workload=workload, max_num_batched_tokens=budget) for budget in (2048, 8192)]
    path = tmp_path / "tp_1_results.json"
    save_result(make_result(points=points), path)
    assert_as_the_schema_says(path)
    assert load_result(path).points == points
    first, second = load_result(path).points
    assert first.key == PointKey(64, None, None, workload, 2048) != second.key
    assert first.tokens_per_request is None


def test_there_is_a_recorded_file_of_every_schema_version() -> None:
    assert {json.loads(path.read_text())["schema_version"] for path in GOLDEN} == set(range(1, SCHEMA_VERSION + 1))


def test_the_schema_is_the_one_that_the_types_make() -> None:
    """After a change: python -m batch_inference.core.result_file >batch_inference/core/result.schema.json"""
    assert json.loads(json.dumps(json_schema())) == RESULT_SCHEMA


def test_a_measured_point_without_runs_is_none(
    experiment: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    experiment()
    path = tmp_path / "tp_1_results.json"
    document = json.loads(path.read_text())
    document["points"][0]["runs"] = []
    path.write_text(json.dumps(document))
    with pytest.raises(ResultFileError, match=r"points\[0\] is ok, but has no runs"):
        load_result(path)
