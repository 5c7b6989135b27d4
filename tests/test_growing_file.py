"""A file that grows point by point, with its journal: what is read of both is what was measured last."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from batch_inference.core import growing_file
from batch_inference.core.growing_file import GrowingFile
from batch_inference.core.result_file import ResultFileError, journal_of, load_result, point_line, to_json
from batch_inference.core.results import Point
from builders import make_point, make_result


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tp_1_results.json"


def begun(path: Path, *points: Point) -> GrowingFile:
    growing = GrowingFile(path, make_result(points=points))
    growing.begin()
    return growing


def found(path: Path) -> list[tuple[int, float]]:
    """Batch size and latency of every point, as a reader finds them now."""
    return [(point.batch_size, point.runs[0].latency_s) for point in load_result(path).points]


def test_a_point_is_there_as_soon_as_it_is_added(path: Path) -> None:
    growing = begun(path, make_point(1), make_point(2), make_point(4))
    growing.add(make_point(8, latencies_s=[8.0]))
    assert found(path) == [(1, 1.0), (2, 1.0), (4, 1.0), (8, 8.0)]
    assert journal_of(path).exists()
    assert len(json.loads(path.read_text())["points"]) == 3
    growing.close()


def test_of_a_point_that_was_measured_twice_the_last_counts(path: Path) -> None:
    growing = begun(path, make_point(1), make_point(2), make_point(4), make_point(8))
    for latency_s in (5.0, 6.0):
        growing.add(make_point(2, latencies_s=[latency_s]))
        assert found(path) == [(1, 1.0), (4, 1.0), (8, 1.0), (2, latency_s)]
    assert [json.loads(growing.told() or "")["points"][-1]["runs"][0]["latency_s"]] == [6.0]
    growing.fold()
    assert not journal_of(path).exists()
    points = json.loads(path.read_text())["points"]
    assert [(point["batch_size"], point["runs"][0]["latency_s"]) for point in points] == [
        (1, 1.0), (4, 1.0), (8, 1.0), (2, 6.0),
    ]  # fmt: skip
    growing.add(make_point(4, latencies_s=[7.0]))
    growing.fold()
    assert found(path) == [(1, 1.0), (8, 1.0), (2, 6.0), (4, 7.0)]
    growing.close()


def test_a_point_whose_saving_was_interrupted_is_once_in_the_file(path: Path) -> None:
    """Its line is there, but nothing knows of it."""
    growing = begun(path, make_point(1), make_point(2))
    growing._append(point_line(make_point(2, latencies_s=[5.0])))
    growing.fold()
    points = json.loads(path.read_text())["points"]
    assert [(point["batch_size"], point["runs"][0]["latency_s"]) for point in points] == [(1, 1.0), (2, 5.0)]
    growing.close()


@pytest.mark.parametrize("place", ["open_regular", "_write_or_undo", "write_document", "GrowingFile.close"])
def test_a_signal_ends_a_save_when_it_is_whole(path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    growing = begun(path, make_point(1))
    owner, name = (GrowingFile, "close") if place == "GrowingFile.close" else (growing_file, place)
    work = getattr(owner, name)

    def interrupted(*arguments: Any, **named: Any) -> Any:
        done = work(*arguments, **named)
        signal.raise_signal(signal.SIGINT)
        return done

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            growing.add(make_point(2))
    assert found(path) == [(1, 1.0), (2, 1.0)]
    growing.add(make_point(4))
    growing.fold()
    assert found(path) == [(1, 1.0), (2, 1.0), (4, 1.0)]
    growing.close()


def test_of_a_point_that_an_older_version_wrote_twice_the_last_counts(path: Path) -> None:
    result = make_result(points=[make_point(1), make_point(2), make_point(2, latencies_s=[5.0])])
    path.write_text(to_json(result))
    assert found(path) == [(1, 1.0), (2, 5.0)]


def test_the_journal_is_folded_in_when_it_has_as_many_points_as_the_file(path: Path) -> None:
    growing, folds = begun(path), []
    for number in range(1, 17):
        growing.add(make_point(number, latencies_s=[1.0]))
        if not journal_of(path).exists():
            folds.append(number)
    assert folds == [1, 2, 4, 8, 16]
    assert [batch for batch, _ in found(path)] == list(range(1, 17))
    growing.close()


def test_a_journal_of_another_file_is_not_read(path: Path) -> None:
    begun(path, make_point(1), make_point(2), make_point(4)).add(make_point(8))
    journal = journal_of(path).read_bytes()
    begun(path, make_point(1), make_point(2)).close()
    for there in (journal, journal.replace(b'"points":3', b'"points":2').replace(b"2026-01-02", b"2026-01-03")):
        assert there != b""
        journal_of(path).write_bytes(there)
        assert [batch for batch, _ in found(path)] == [1, 2]
    journal_of(path).write_bytes(journal.replace(b'"points":3', b'"points":2'))
    assert [batch for batch, _ in found(path)] == [1, 2, 8]


def test_a_line_that_was_cut_short_is_no_point(path: Path) -> None:
    growing = begun(path, make_point(1), make_point(2), make_point(4))
    growing.add(make_point(8))
    growing.add(make_point(16))
    growing.close()
    journal_of(path).write_bytes(journal_of(path).read_bytes()[:-20])
    assert [batch for batch, _ in found(path)] == [1, 2, 4, 8]


def test_what_was_measured_is_told_whole_where_it_cannot_be_saved(path: Path) -> None:
    growing = GrowingFile(path, make_result())
    assert growing.told() is None
    assert not growing.has_begun
    growing.begin()
    assert growing.told() is None
    growing.add(make_point(1))
    assert growing.told() is not None  # though nothing is left in the journal
    growing.add(make_point(2))
    growing.add(make_point(4))
    told = json.loads(growing.told() or "")
    assert [point["batch_size"] for point in told["points"]] == [1, 2, 4]
    growing.close()


def test_the_file_itself_is_what_a_save_in_one_go_writes(path: Path) -> None:
    points = [make_point(number) for number in (1, 2, 4)]
    empty, whole = make_result(config={"batch_sizes": [1, 2, 4]}), to_json(make_result(points=points))
    growing = GrowingFile(path, empty)
    growing.begin()
    assert (growing.has_begun, path.read_text()) == (True, to_json(empty))
    for point in points:
        growing.add(point)
    growing.fold()
    assert path.read_text() == whole == growing.told()
    growing.close()


def test_the_journal_is_its_head_and_a_line_for_each_point(path: Path) -> None:
    growing = begun(path, *(make_point(number) for number in (1, 2, 4)))
    growing.add(make_point(8))
    growing.add(make_point(16))
    head, *lines = journal_of(path).read_text().splitlines()
    started_at = make_result().environment.started_at
    assert json.loads(head) == {"started_at": started_at, "points": 3}
    assert lines == [point_line(make_point(8)), point_line(make_point(16))]
    told = growing.told()
    assert [point["batch_size"] for point in json.loads(told or "")["points"]] == [1, 2, 4, 8, 16]
    growing.close()
    growing.close()


def test_a_point_that_could_not_be_written_is_told_all_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    growing = begun(path, make_point(1), make_point(2))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ResultFileError) as caught:
            growing.add(make_point(4))
        assert str(caught.value) == (
            f"{path}: cannot be written: No space left on device; free disk space or choose another path"
        )
    assert [point["batch_size"] for point in json.loads(growing.told() or "")["points"]] == [1, 2, 4]
    growing.add(make_point(4))
    assert found(path) == [(1, 1.0), (2, 1.0), (4, 1.0)]
    growing.close()


@pytest.mark.parametrize(("room_bytes", "batch_size"), [(0, 1), (100, 1), (100, 1000)])
def test_a_point_that_a_full_disk_took_a_part_of_is_told_whole(path: Path, room_bytes: int, batch_size: int) -> None:
    whole = make_result(points=[make_point(number) for number in (2, 3, 4, 8, 16, batch_size)])
    growing = GrowingFile(path, replace(whole, points=whole.points[:4]))
    growing.begin()
    growing.add(whole.points[4])
    journal, (_, hard) = journal_of(path).read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(journal) + room_bytes, hard))
    try:
        with pytest.raises(ResultFileError, match="cannot be written: File too large"):
            growing.add(whole.points[5])
        told = growing.told()
        growing.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert told == to_json(whole)
    assert journal_of(path).read_bytes() == journal
