"""The result file: round trip, atomic save, and what is refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from batch_inference.core.files import check_writable
from batch_inference.core.result_file import ResultFileError, load_result, save_result
from batch_inference.core.results import SCHEMA_VERSION, Point
from builders import make_point, make_result, make_run


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tp_1_results.json"


def write(path: Path, **changes: Any) -> None:
    """A good result file with some entries changed; None takes an entry out."""
    save_result(make_result(points=[make_point()]), path)
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def test_what_is_saved_is_what_is_loaded(path: Path) -> None:
    failed = Point(16, 64, 32, "oom", reason="out of memory", log_tail=["a", "ä"])
    result = make_result("tp_2_dp_2", [make_point(replicas=2), failed], (2, 1, 2), status="partial")
    save_result(result, path)
    assert load_result(path) == result


def test_a_setting_has_tp_times_pp_times_dp_devices() -> None:
    assert make_result(sizes=(2, 3, 4)).num_devices == 24


def test_saving_again_replaces_the_file_and_leaves_nothing_beside_it(path: Path) -> None:
    save_result(make_result("old"), path)
    save_result(make_result("new"), path)
    assert load_result(path).name == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_cut_short_leaves_the_old_file_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_result(make_result("old"), path)

    def cut_short(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", cut_short)
    with pytest.raises(ResultFileError, match=r"tp_1_results\.json: cannot be written: No space left"):
        save_result(make_result("new"), path)
    assert load_result(path).name == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResultFileError, match=r"missing/x\.json: cannot be written"):
        save_result(make_result(), tmp_path / "missing" / "x.json")
    with pytest.raises(OSError, match="No such file"):
        check_writable(tmp_path / "missing" / "x.json")


def test_checking_does_not_touch_the_file(path: Path) -> None:
    save_result(make_result("old"), path)
    check_writable(path)
    assert load_result(path).name == "old"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_no_number_is_never_written(path: Path, number: float) -> None:
    save_result(make_result("old"), path)
    result = make_result("new", points=[make_point()])
    assert result.engine is not None
    result.engine.weights_gib = number
    with pytest.raises(ValueError, match=r"^new\.engine\.weights_gib is not a finite number"):
        save_result(result, path)
    assert load_result(path).name == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_value_that_json_does_not_know_is_never_written(path: Path) -> None:
    result = make_result()
    result.name = path  # type: ignore[assignment]
    path.with_suffix(".txt").touch()
    with pytest.raises(TypeError, match="PosixPath"):
        save_result(result, path)
    assert not path.exists()


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_no_number_is_never_read(path: Path, word: str) -> None:
    write(path, engine={"weights_gib": "HERE"})
    path.write_text(path.read_text().replace('"HERE"', word))
    with pytest.raises(ResultFileError, match="not valid JSON"):
        load_result(path)


def test_a_newer_file_asks_for_a_newer_program(path: Path) -> None:
    write(path, schema_version=SCHEMA_VERSION + 1)
    with pytest.raises(ResultFileError, match=f"schema_version is {SCHEMA_VERSION + 1}.*update this program"):
        load_result(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not valid JSON"),
        ('{"schema_version": 1, "name"', "not valid JSON"),
        ("\x80", "not valid JSON"),
        ("[" * 100000, "not a result of this program"),
        ("[1, 2]", "not a result of this program: expected `object`"),
        ('{"results": []}', "not a result of this program: .*`schema_version`"),
        ('{"schema_version": "one"}', "schema_version is 'one', expected `int`"),
        ('{"schema_version": 1}', "not a result of this program: config: expected `object`"),
    ],
)
def test_a_foreign_or_broken_file_is_named_with_the_reason(path: Path, text: str, reason: str) -> None:
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ResultFileError, match=f"^{path}: .*{reason}"):
        load_result(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": None},
        {"points": [{"batch_size": 1}]},
        {"points": [1]},
        {"points": 5},
        {"config": {}},
        {"config": []},
        {"engine": "none"},
        {"config": {"tensor_parallel_size": 0, "pipeline_parallel_size": 1, "data_parallel_size": 1}},
        {"config": {"tensor_parallel_size": "two", "pipeline_parallel_size": 1, "data_parallel_size": 1}},
    ],
)
def test_a_file_with_the_wrong_shape_is_not_ours(path: Path, changes: dict[str, Any]) -> None:
    write(path, **changes)
    with pytest.raises(ResultFileError, match="not a result of this program"):
        load_result(path)


@pytest.mark.parametrize("latency_s", [0, -1.5, "fast", True])
def test_a_run_needs_a_latency_above_zero(path: Path, latency_s: Any) -> None:
    save_result(make_result(points=[make_point()]), path)
    document = json.loads(path.read_text())
    document["points"][0]["runs"][1]["latency_s"] = latency_s
    path.write_text(json.dumps(document))
    with pytest.raises(ResultFileError, match=r"points\[0\]\.runs\[1\]\.latency_s is"):
        load_result(path)


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(ResultFileError, match="cannot be read: No such file"):
        load_result(path)


def test_unknown_sections_of_the_same_version_are_left_alone(path: Path) -> None:
    write(path, remark="kept by hand")
    assert load_result(path).name == "tp_1"


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("points", 0, "seq_len"), "x", r"points\[0\]\.seq_len is 'x', expected `int \| null`"),
        (
            ("points", 0, "runs", 0, "latency_s"),
            -1.5,
            r"points\[0\]\.runs\[0\]\.latency_s is -1\.5, expected `float` > 1e-09",
        ),
        (("status",), "done", r"status is 'done', which is none of the words that it may be"),
        (("config", "tensor_parallel_size"), "2", r"config: tensor_parallel_size is '2', expected `int`"),
        (("config", "batch_sizes"), [0], r"batch_sizes holds 0, which is no size"),
        (("config", "seq_lens"), [8, 0], r"seq_lens holds 0, which is no size"),
        (("schema_version",), 0, r"schema_version is below 1"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_place(
    path: Path, place: tuple[str | int, ...], value: Any, said: str
) -> None:
    save_result(make_result(points=[make_point()]), path)
    document = inner = json.loads(path.read_text())
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    path.write_text(json.dumps(document))
    with pytest.raises(ResultFileError, match=said) as error:
        load_result(path)
    assert len(str(error.value).splitlines()) == 1


def test_a_configuration_with_a_number_that_is_none_is_never_written(path: Path) -> None:
    result = make_result()
    result.config = dataclasses.replace(result.config, temperature=float("nan"))
    with pytest.raises(ValueError, match=r"config\.temperature is not a finite number"):
        save_result(result, path)


def test_work_of_days_fits(path: Path) -> None:
    run = make_run(1e6, counters={"flops_per_device": 1e21})
    save_result(make_result(points=[make_point(runs=[run])]), path)
    assert load_result(path).points[0].runs == [run]


def test_text_that_is_no_utf_8_is_still_written(path: Path) -> None:
    save_result(make_result(points=[Point(1, 8, 4, "error", reason="a \udcff path")]), path)
    assert load_result(path).points[0].reason == "a ? path"
