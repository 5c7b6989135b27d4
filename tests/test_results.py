from __future__ import annotations

import json
from pathlib import Path

import pytest

from batch_inference.results import ResultFileError, check_writable, load_result, save_result
from builders import make_result


def saved(folder: Path) -> Path:
    path = folder / "tp_1_results.json"
    save_result(make_result(), path)
    return path


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    result = make_result(tp=2, seq_lens=(8, 16))
    path = tmp_path / "x.json"
    save_result(result, path)
    assert load_result(path) == result
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_cut_short_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()

    def disk_full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(ResultFileError, match=r"tp_1_results\.json: cannot be written: No space left"):
        save_result(make_result(speed=1.0), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_no_number_that_is_not_json_is_written(tmp_path: Path, number: float) -> None:
    result = make_result()
    result.engine["weights_gib"] = number
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_result(result, tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_found_without_touching_the_file(tmp_path: Path) -> None:
    with pytest.raises(ResultFileError, match="cannot be written"):
        check_writable(tmp_path / "absent" / "x.json")
    path = saved(tmp_path)
    before = path.stat().st_mtime_ns
    check_writable(path)
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ('{"schema_version": 1, "x": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "no schema_version"),
        ('{"some": "thing"}', "no schema_version"),
        ('{"schema_version": 99}', "schema_version is 99, this program reads up to 1; update this program"),
        ('{"schema_version": "1"}', "schema_version is '1'"),
        ('{"schema_version": 1}', "'points' is missing"),
        ('{"schema_version": 1, "points": 7}', "not iterable"),
    ],
)
def test_a_foreign_or_broken_file_is_named_with_the_reason(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ResultFileError) as caught:
        load_result(path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("points", 0, "batch_size"), "four"),
        (("points", 0, "runs", 0, "latency_s"), "fast"),
        (("points", 0, "runs", 0, "latency_s"), 0),
        (("points", 0, "runs", 0, "requests"), None),
        (("config",), []),
        (("config", "tensor_parallel_size"), None),
        (("points", 0, "surprise"), 1),
    ],
)
def test_values_of_the_wrong_kind_are_refused(tmp_path: Path, place: tuple[str | int, ...], value: object) -> None:
    path = saved(tmp_path)
    document = json.loads(path.read_text())
    *outer, last = place
    target = document
    for step in outer:
        target = target[step]
    target[last] = value
    path.write_text(json.dumps(document))
    with pytest.raises(ResultFileError, match="not a result of this program"):
        load_result(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResultFileError, match="cannot be read"):
        load_result(tmp_path / "absent.json")
