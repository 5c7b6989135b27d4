"""Real output and every recorded result file against batch_inference/core/result.schema.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import jsonschema
import pytest

from batch_inference.core.metrics import summarise
from batch_inference.core.result_file import load_result, save_result
from batch_inference.core.results import Point, Requests, Run
from builders import make_point, make_result, make_run
from conftest import REPOSITORY

SCHEMA = json.loads((REPOSITORY / "batch_inference" / "core" / "result.schema.json").read_text())
GOLDEN = sorted((REPOSITORY / "tests" / "golden").glob("*.json"))


def check(path: Path) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(path.read_text()))


@pytest.mark.parametrize("fail", ["", "load", "run:2", "tokens"])
def test_what_the_script_writes_is_what_the_schema_says(
    experiment: Callable[..., CompletedProcess[str]], tmp_path: Path, fail: str
) -> None:
    experiment(STUB_FAIL=fail)
    check(tmp_path / "tp_1_results.json")


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_recorded_files_still_load_with_the_same_numbers(path: Path) -> None:
    check(path)
    result = load_result(path)
    assert result.status == "complete"
    for point in result.points:
        numbers = summarise(result, point)
        # A metric may have been added since.
        assert {name: numbers[name] for name in point.summary} == pytest.approx(point.summary, nan_ok=False)


def test_everything_that_a_run_may_hold_is_in_the_schema(tmp_path: Path) -> None:
    clocks = {"sm_mhz": [1980.0, None], "throttle_reasons": ["sw_power_cap"], "other_processes": 0}
    run = make_run(1.0, memory={"scope": "device", "used_gib": [1.0], "peak_kv_use": 0.5}, clocks=clocks)
    run.counters.update({"jit_compilations": 1, "peak_running": 1})
    point = make_point(runs=[run], warmups=[{"latency_s": 3.0, "jit_compilations": 1, "reason": "compiled"}])
    path = tmp_path / "tp_1_results.json"
    save_result(make_result(points=[point]), path)
    check(path)
    assert load_result(path).points[0].runs == [run]


def test_there_is_a_recorded_file_of_every_schema_version() -> None:
    assert {json.loads(path.read_text())["schema_version"] for path in GOLDEN} == {1}


@pytest.mark.parametrize(("definition", "kind"), [("point", Point), ("run", Run)])
def test_the_schema_names_the_fields_of_the_types(definition: str, kind: type) -> None:
    assert set(SCHEMA["$defs"][definition]["properties"]) == {field.name for field in dataclasses.fields(kind)}
    requests = SCHEMA["$defs"]["run"]["properties"]["requests"]["properties"]
    assert set(requests) == {field.name for field in dataclasses.fields(Requests)}


def test_a_measured_point_without_runs_breaks_the_schema(
    experiment: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    experiment()
    path = tmp_path / "tp_1_results.json"
    document = json.loads(path.read_text())
    document["points"][0]["runs"] = []
    path.write_text(json.dumps(document))
    with pytest.raises(jsonschema.ValidationError):
        check(path)
