"""A file that grows point by point, with its journal: what is read of both is what was measured last."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batch_inference.core.growing_file import GrowingFile
from batch_inference.core.result_file import journal_of, load_result
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
    growing.fold()
    assert not journal_of(path).exists()
    assert found(path)[:3] == [(1, 1.0), (4, 1.0), (8, 1.0)]
    assert found(path)[-1] == (2, 6.0)
    growing.close()


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
