"""The search replayed on recorded studies: what it would have measured of them."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from batch_inference.core.race import Goal, Layout, Load
from batch_inference.launch.replay import Recorded, measured, steps_of
from builders import make_point, make_result

HIGH = Goal()


def recorded(times_s: dict[int, float]) -> Recorded:
    """Batch size -> the time of each of its runs."""
    warmups = [{"latency_s": 0.5}]
    points = [make_point(size, latencies_s=[time_s] * 3, warmups=warmups) for size, time_s in times_s.items()]
    return Recorded(Layout(), make_result(points=points))


@pytest.mark.parametrize(
    ("sizes", "steps"),
    [
        ([16, 32, 64, 128, 256], [16, 32, 64, 128, 256]),
        ([1, 4, 8, 16], [1, 4, 8, 16]),
        ([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64], [1, 2, 4, 8, 16, 32, 64]),
        ([10, 20, 40], [10, 20, 40]),
        ([32, 64, 96], [32, 64, 96]),
        ([16], [16]),
    ],
)
def test_a_replay_climbs_as_a_search_does(sizes: list[int], steps: list[int]) -> None:
    """It never tries all sizes of a fine grid."""
    assert steps_of(reversed(sizes)) == steps


def test_sizes_between_are_tried_only_beside_the_best() -> None:
    one = recorded({16: 1.0, 24: 1.25, 32: 1.5, 48: 2.1, 64: 3.1, 96: 4.8, 128: 6.6})
    found, _ = measured(one, Load(Layout()), HIGH, 64, 0, None)
    assert [one.batch_size for one in found.tried] == [16, 32, 64, 48]
    assert found.is_exhausted


def test_sizes_that_are_given_are_all_measured_in_full() -> None:
    one = recorded({16: 1.0, 32: 2.0, 64: 4.0})
    found, seconds = measured(one, Load(Layout(), (16, 64)), HIGH, 64, 0, None)
    assert [(tried.batch_size, tried.runs) for tried in found.tried] == [(16, 3), (64, 3)]
    # Whether a larger batch would be better was not asked.
    assert not found.is_exhausted
    assert seconds == pytest.approx(0.5 + 3 * 1.0 + 0.5 + 3 * 4.0)


@pytest.mark.parametrize(("ended_at", "in_all_s"), [("03:04:05", 4.0), ("03:04:07", 4.0), ("03:04:11", 6.0)])
def test_a_setting_takes_at_least_its_start_and_its_runs(ended_at: str, in_all_s: float) -> None:
    """Begin and end are recorded in whole seconds: a study of short runs would otherwise take no time at all."""
    one = recorded({16: 0.5})  # a warm-up and three runs
    result = one.result
    assert result.engine is not None
    engine = replace(result.engine, load_s=replace(result.engine.load_s, total_s=2.0))
    environment = replace(result.environment, ended_at=f"2026-01-02T{ended_at}+00:00")
    timed = Recorded(Layout(), replace(result, engine=engine, environment=environment))
    assert timed.wall_s == pytest.approx(in_all_s)
    assert timed.beside_s == pytest.approx(in_all_s - 4.0)
