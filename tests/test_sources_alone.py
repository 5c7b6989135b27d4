"""Which files count, and the words of it, asked of the functions alone."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from batch_inference.analyze import files, sources
from batch_inference.analyze.files import (
    default_folder,
    find_files,
    folder_to_use,
    make_folder,
    not_this_folder,
    remove_plots,
)
from batch_inference.analyze.flags import UsageError
from batch_inference.analyze.sources import chosen, load_settings, newest
from batch_inference.analyze.tables import MeasuredSetting
from batch_inference.core.result_file import ResultFileError
from builders import make_point, make_result, save_all

SETTING = MeasuredSetting(
    path=Path("x.json"), file="x.json", name="tp_1", num_devices=1, status="complete",
    shapes=[(1, 8, 32, None, None)], asked=frozenset({(1, 8, 32, None, None)}), queues=[],
    load_s=None, failure=None, shared={}, columns={},
)  # fmt: skip


def setting(file: str, name: str = "tp_1", **shared: Any) -> MeasuredSetting:
    shared = {"model": "org/m", "config_hash": "h", **shared}
    return dataclasses.replace(SETTING, path=Path(file), file=file, name=name, shared=shared)


def files_of(settings: Sequence[MeasuredSetting]) -> list[str]:
    return [one.file for one in settings]


THREE = [setting("a"), setting("b", "tp_2"), setting("c", "tp_2", model="other/n")]


@pytest.mark.parametrize(
    ("model", "names", "kept", "notes"),
    [
        (None, None, ["a", "b", "c"], []),
        ("m", None, ["a", "b"], ["--model m: 1 other file left out."]),
        ("other/n", None, ["c"], ["--model other/n: 2 other files left out."]),
        (None, ("tp_2",), ["b", "c"], ["--setting tp_2: 1 other file left out."]),
        (None, ("tp_2", "tp_1"), ["a", "b", "c"], []),
        ("m", ("tp_1",), ["a"], ["--model m: 1 other file left out.", "--setting tp_1: 1 other file left out."]),
        (None, (), [], ["--setting : 3 other files left out."]),
    ],
)
def test_what_is_asked_for_is_kept_and_the_rest_counted(model: Any, names: Any, kept: Any, notes: Any) -> None:
    found, told = chosen(THREE, model, names, "--input x")
    assert (files_of(found), told) == (kept, notes)


def test_one_of_several_settings_of_a_name_is_chosen_by_what_the_report_calls_it() -> None:
    one, other = setting("b", "tp_2"), setting("c", "tp_2", model="other/n", config_hash="h2")
    assert files_of(chosen([one, other], None, ["tp_2 [c]"], "--input x")[0]) == ["c"]
    # With its older files.
    again = setting("d", "tp_2", model="other/n", config_hash="h2", ended_at="2026-01-02T03:00:00+00:00")
    again = dataclasses.replace(again, shapes=[(2, 8, 32, None, None)])
    assert files_of(chosen([one, other, again], None, ["tp_2 [d]"], "--input x")[0]) == ["c", "d"]


@pytest.mark.parametrize(
    ("model", "names", "told"),
    [
        ("org", None, "--model org: not found in --input x, which has org/m, other/n"),
        ("n", ("tp_1",), "--setting tp_1: not found in --input x, which has tp_2"),
        (None, ("tp_9", "tp_1", "tp_8"), "--setting tp_9,tp_8: not found in --input x, which has tp_1, tp_2"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(model: Any, names: Any, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        chosen(THREE, model, names, "--input x")
    assert str(caught.value) == told


def test_of_many_names_ten_are_told() -> None:
    there = [setting(f"{number}", f"s{number:02}") for number in range(12)]
    with pytest.raises(UsageError, match=r"which has s00, .*, s09 and 2 more$"):
        chosen(there, None, ("x",), "--input x")


@pytest.mark.parametrize(
    ("first", "second", "counting"),
    [
        ({"ended_at": "2026-01-02T03:00:00+00:00"}, {"ended_at": "2026-01-02T02:00:00+00:00"}, "a"),
        ({"ended_at": "2026-01-02T03:00:00+00:00"}, {"ended_at": "2026-01-02T03:00:01+00:00"}, "b"),
        # The end, where it is known, and not the start.
        ({"ended_at": "2026-01-02T03:00:00+00:00", "started_at": "2026-01-02T00:00:00+00:00"},
         {"ended_at": "2026-01-02T02:00:00+00:00", "started_at": "2026-01-02T01:00:00+00:00"}, "a"),
        ({"started_at": "2026-01-02T03:00:00+00:00", "ended_at": "soon"},
         {"ended_at": "2026-01-02T02:00:00+00:00"}, "a"),
        # Without a zone it is UTC.
        ({"ended_at": "2026-01-02T03:00:00"}, {"ended_at": "2026-01-02T04:30:00+02:00"}, "a"),
        ({"ended_at": "2026-01-02T03:00:00"}, {}, "a"),
        # Of two that do not say it, the later name.
        ({}, {}, "b"),
    ],
)  # fmt: skip
def test_the_newest_counts(first: dict[str, Any], second: dict[str, Any], counting: str) -> None:
    found, notes = newest([setting("a", **first), setting("b", **second)])
    assert files_of(found) == [counting]
    other = {"a": "b", "b": "a"}[counting]
    assert notes == [f"tp_1 was measured in several files: {counting} is the newest and counts, {other} does not."]


def test_of_many_older_files_three_are_named_and_the_order_stays() -> None:
    times = {"e": 5, "a": 1, "d": 4, "b": 2, "c": 3}
    many = [setting(name, ended_at=f"2026-01-0{day}T00:00:00+00:00") for name, day in times.items()]
    found, notes = newest([setting("z", "tp_2"), *many, setting("y", "tp_4")])
    assert files_of(found) == ["z", "e", "y"]
    assert notes == ["tp_1 was measured in several files: e is the newest and counts, a, b, c and 1 more do not."]


@pytest.mark.parametrize("name", ["config_hash", "max_tokens", "device_kind", "device_name", "vllm_version"])
def test_what_is_not_alike_was_not_measured_twice(name: str) -> None:
    pair = [setting("a", **{name: "one"}), setting("b", **{name: "two"})]
    assert newest(pair) == (pair, [])
    nameless = [setting("a", config_hash=None), setting("b", config_hash=None)]
    assert newest(nameless) == (nameless, [])
    assert len(newest([setting("a"), setting("b", host="other")])[0]) == 1


def test_each_file_is_read_or_told_what_is_wrong(tmp_path: Path) -> None:
    (good,) = save_all([make_result(points=[make_point()])], tmp_path)
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    one, two = load_settings([good, bad], 95, tmp_path.parent)
    assert isinstance(one, MeasuredSetting)
    assert one.file == f"{tmp_path.name}/tp_1_results.json"
    assert "ttft_p95_s" in one.columns
    assert isinstance(two, ResultFileError)
    (named,) = load_settings([good])
    assert isinstance(named, MeasuredSetting)
    assert (named.file, "latency_p99_s" in named.columns) == ("tp_1_results.json", True)


def test_a_reader_leaves_ctrl_c_to_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(sources.gc, "disable", lambda: done.append("gc"))
    monkeypatch.setattr(sources.signal, "signal", lambda *words: done.append(words))
    sources._begin_reading()
    assert done == ["gc", (sources.signal.SIGINT, sources.signal.SIG_IGN)]


# --- files and folders --------------------------------------------------------------------------------------------


def test_what_is_wrong_with_a_path_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(path: Path) -> str:
        with pytest.raises(UsageError) as caught:
            find_files("--compare", path)
        return str(caught.value)

    assert told(tmp_path / "no") == (
        f"--compare {tmp_path}/no: does not exist; give a result file, or the folder that holds some"
    )
    assert told(tmp_path) == (
        f"--compare {tmp_path}: holds no result files (*.json); run an experiment with its output there"
    )
    os.mkfifo(tmp_path / "fifo")
    assert told(tmp_path / "fifo") == (
        f"--compare {tmp_path}/fifo: is no regular file and no folder; give a result file, or a folder of them"
    )
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json").touch()
    monkeypatch.setattr(files, "MOST_FOLDERS", 4)
    assert len(find_files("--compare", tmp_path).paths) == 3
    monkeypatch.setattr(files, "MOST_FOLDERS", 3)
    assert told(tmp_path) == (
        f"--compare {tmp_path}: more than 3 folders lie below it; give the folder that the results are in"
    )


def test_a_folder_that_holds_only_the_other_set_is_told_so(tmp_path: Path) -> None:
    other = tmp_path / "tp_1_results.json"
    other.touch()
    with pytest.raises(UsageError) as caught:
        find_files("--input", tmp_path, [other])
    assert str(caught.value) == (
        f"--input {tmp_path}: holds only results of the other set, or of --output-dir; keep the two sets apart"
    )


def test_files_come_in_order_folder_by_folder_and_links_last(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", "sub/c.json", "sub/deep/d.json", "tab/e.json", ".hidden.json", "summary.json",
                 "x.txt", "analysis_old/f.json", ".dot/g.json"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    outside = tmp_path.parent / f"{tmp_path.name}_outside"
    outside.mkdir()
    (outside / "o.json").touch()
    (tmp_path / "a_link").symlink_to(outside)
    (tmp_path / "0.json").symlink_to("b.json")
    (tmp_path / "nothing.json").symlink_to("nowhere")
    found = [str(path.relative_to(tmp_path)) for path in find_files("--input", tmp_path).paths]
    assert found == [
        "a.json", "b.json", "nothing.json", "sub/c.json", "tab/e.json", "sub/deep/d.json", "a_link/o.json",
    ]  # fmt: skip
    assert find_files("--input", tmp_path / "summary.json").paths == [tmp_path / "summary.json"]


def test_where_an_analysis_goes(tmp_path: Path) -> None:
    assert default_folder(tmp_path) == tmp_path / "analysis"
    assert default_folder(tmp_path / "tp_2_results.json") == tmp_path / "analysis_tp_2"
    assert default_folder(tmp_path / "notes.json") == tmp_path / "analysis_notes"
    assert folder_to_use(tmp_path, None) == tmp_path / "best"
    assert folder_to_use(tmp_path / "tp_2_results.json", None) == tmp_path / "best_tp_2"
    assert folder_to_use(tmp_path, Path("out")) == Path("out/best")
    assert make_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert make_folder(tmp_path / "a" / "b").is_dir()
    assert str(not_this_folder(Path("x"), "why")) == "--output-dir x: why; choose another"


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError) as caught:
        make_folder(tmp_path / "file" / "below")
    assert str(caught.value) == f"--output-dir {tmp_path}/file/below: cannot be made: Not a directory; choose another"
    for missing in (os.W_OK, os.X_OK):
        monkeypatch.setattr(os, "access", lambda _path, mode, missing=missing: not mode & missing)
        with pytest.raises(UsageError) as caught:
            make_folder(tmp_path)
        assert str(caught.value) == f"--output-dir {tmp_path}: cannot be written to; choose another"


def test_only_plots_of_ours_that_are_not_kept_are_removed(tmp_path: Path) -> None:
    for name, text in {
        "a.png": "batch_inference analyze_results.py: a.png", "b.svg": "batch_inference analyze_results.py: b.svg",
        "kept.png": "batch_inference analyze_results.py: kept.png", "c.png": "of another", "d.txt": "x",
        "late.png": " " * 4096 + "batch_inference analyze_results.py: late.png",
        "copy.png": "batch_inference analyze_results.py: a.png",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    remove_plots(tmp_path, [Path("/elsewhere/kept.png")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.png", "copy.png", "d.txt", "kept.png", "late.png"]
