"""Which setting is loaded next, and by which bounds others are left: checked against recorded studies."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from batch_inference.core.climb import Tried, pooled_halves
from batch_inference.core.race import TIE, Found, Goal, Layout, Load, Race, Search, layouts
from batch_inference.core.result_file import load_result
from batch_inference.core.results import Point, Result
from batch_inference.core.tried import tried_of
from batch_inference.core.values import LATENCY_GOAL, THROUGHPUT
from conftest import REPOSITORY

STUDIES = sorted({path.parent for path in [
    *(REPOSITORY / "tests" / "h100x4").glob("*_results.json"),
    *(REPOSITORY / "docs").glob("**/study/*_results.json"),
    *(REPOSITORY / "docs" / "cpu" / "grids").glob("*/*_results.json"),
]})  # fmt: skip
TP1, TP2, TP4, PP2, DP4 = Layout(), Layout(tp=2), Layout(tp=4), Layout(pp=2), Layout(dp=4)
HIGH, SHORT, EACH = Goal(), Goal(is_latency=True), Goal(is_per_device=True)


def found(layout: Layout, *values: float, half: float = 0.01, is_exhausted: bool = True) -> Found:
    """Measured at 16, 32, 64 and so on."""
    tried = [Tried(16 * 2**power, value, half * value) for power, value in enumerate(values)]
    return Found(layout, tried, is_exhausted)


def race(goal: Goal, *candidates: Layout, known: list[Found] | None = None) -> Race:
    feasible = frozenset([*candidates, *(one.replica for one in candidates)])
    return Race(goal, candidates, feasible, {one.layout: one for one in known or []})


def test_what_is_as_good_as_the_best_is_measured_alone_too() -> None:
    each = race(EACH, TP1, TP2, known=[found(TP1, 100.0), found(TP2, 199.0)])
    beside = {layout: replace(each.found[layout], is_alone=False) for layout in (TP1, TP2)}
    each.found |= beside
    assert each.next_load() == Load(TP1, (16,))
    each.found[TP1] = replace(beside[TP1], is_alone=True)
    assert each.next_load() == Load(TP2, (16,))
    each.found[TP2] = replace(beside[TP2], is_alone=True)
    assert each.next_load() is None
    # What cannot be as good is left as it is.
    each.found[TP2] = replace(found(TP2, 150.0), is_alone=False)
    assert each.next_load() is None


def test_a_best_that_is_unsure_hides_nothing() -> None:
    """If its runs differ by more than a tie, others may still be better by more than a tie."""
    one = race(HIGH, TP2, PP2, known=[found(TP2, 800.0, half=0.12), found(TP1, 440.0, half=0.0)])
    assert one.bound(PP2).most == 880
    assert one.open() == [PP2]


# --- the bounds hold where it was measured --------------------------------------------------------------------------


def settings_of(study: Path) -> dict[Layout, Result]:
    results = map(load_result, sorted(study.glob("*_results.json")))
    return {
        Layout(
            one.config.tensor_parallel_size, one.config.pipeline_parallel_size, one.config.data_parallel_size
        ): one
        for one in results
    }  # fmt: skip


def pairs_of(study: Path, goal: str) -> Iterator[tuple[Found, Found]]:
    """Settings of a study two by two, at each prompt length."""
    results = settings_of(study)
    for one, two in itertools.permutations(results, 2):
        for length in {point.seq_len for point in results[one].points}:
            yield tuple(  # type: ignore[misc]
                Found(
                    layout,
                    tried_of(results[layout], points(results[layout], length), goal, {}),
                    is_exhausted=results[layout].status == "complete",
                )
                for layout in (one, two)
            )


def points(result: Result, length: int | None) -> list[Point]:
    return [point for point in result.points if point.seq_len == length and point.status == "ok"]


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_no_recorded_setting_is_better_than_its_bounds(study: Path) -> None:
    checked = 0
    for base, other in pairs_of(study, THROUGHPUT):
        bound = race(HIGH, other.layout, known=[base]).bound(other.layout)
        for point in other.tried:
            assert point.value - point.half <= bound.most * (1 + TIE), (
                study.name,
                base.layout,
                other.layout,
                point,
                str(bound),
            )
            checked += bound.most < math.inf
    assert checked


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_no_recorded_batch_is_shorter_than_its_bounds(study: Path) -> None:
    """At every size, as if it were the smallest; the stages of a pipeline have their part of it."""
    checked = 0
    for base, other in pairs_of(study, LATENCY_GOAL):
        for point in other.tried:
            at = base.at(point.batch_size)
            if at is None:
                continue
            part = base.at(max(1, point.batch_size // other.layout.pp))
            known = replace(base, tried=[at, part] if part and part is not at else [at])
            bound = _bound_at(other.layout, known, point.batch_size)
            # Starts of an engine differ by a percent, which no interval of runs on one of them holds.
            assert point.value - point.half <= bound * (1 + TIE), (study.name, base.layout, other.layout, point)
            checked += bound < math.inf
    assert checked


def _bound_at(layout: Layout, base: Found, size: int) -> float:
    """Of batches of one size: that of the best, which is made to be this one."""
    # The best of a search for the shortest time is the smallest size; here the part of a batch is smaller.
    kept = [one if one.batch_size == size else replace(one, excess=2.0) for one in base.tried]
    return race(SHORT, layout, known=[replace(base, tried=kept)]).bound(layout).most


# --- the order ----------------------------------------------------------------------------------------------------


def loads_until_the_end(one: Race, truth: dict[Layout, float]) -> list[Layout]:
    order = []
    while load := one.next_load():
        one.found[load.layout] = found(load.layout, truth[load.layout] / 2, truth[load.layout], half=0.005)
        order.append(load.layout)
    return order


def test_one_replica_is_loaded_then_all_of_them_and_nothing_else_can_win() -> None:
    one = race(HIGH, *layouts(4))
    assert loads_until_the_end(one, {TP1: 6400, DP4: 25500}) == [TP1, DP4]
    best = one.best()
    assert best is not None
    assert best.layout == DP4
    bound = one.bound(TP4)
    assert bound.most == 25500
    assert str(bound) == "the same devices as DP=4, with the same work divided further"
    bound = race(HIGH, TP4, known=[one.found[TP1]]).bound(TP4)
    assert bound.most == pytest.approx(4 * 6400 * 1.01)
    assert str(bound) == "4 times the devices of TP=1, so at most 4 times its work, at any batch size"


def test_a_bound_holds_however_often_one_looks() -> None:
    """Six settings of the same throughput, three points of two or three runs each: is any bound too low?"""
    draw, missed, spread, trials = random.Random(0), 0, 0.03, 2000
    for _ in range(trials):
        for _look in range(6):
            runs = {size: [draw.gauss(1, spread) for _ in range(2 + (size == 16))] for size in (16, 32, 64)}
            half, value = pooled_halves(runs)[64], 1 / fmean(runs[64])
            if Found(TP1, [Tried(64, value, half * value)], is_exhausted=True).most < 1:
                missed += 1
                break
    assert missed / trials < 0.05


def test_what_ran_beside_others_bounds_less() -> None:
    alone, beside = (replace(found(TP1, 3000.0, 6400.0), is_alone=is_alone) for is_alone in (True, False))
    bounds = [race(HIGH, TP4, known=[one]).bound(TP4).most for one in (alone, beside)]
    assert bounds[1] == pytest.approx(1.25 * bounds[0])


def test_where_replicas_disappoint_the_others_are_loaded() -> None:
    one = race(HIGH, TP4, DP4)
    assert loads_until_the_end(one, {TP1: 6400, DP4: 20000, TP4: 22000}) == [TP1, DP4, TP4]
    best = one.best()
    assert best is not None
    assert best.layout == TP4


def test_what_slows_all_devices_at_once_slows_every_setting() -> None:
    """Four H200s at work do 3.87 times what one does: no hope for TP=4. Where they do 3.7 times, something else may
    hold the replicas up."""
    for share, is_open in ((0.968, False), (0.93, True)):
        one = race(HIGH, TP4, DP4, known=[found(TP1, 3000.0, 6900.0), found(DP4, 12000.0, 4 * 6900.0 * share)])
        assert (one.next_load() == Load(TP4)) is is_open


def test_a_setting_that_was_left_on_the_way_up_bounds_others_by_what_it_can_do_at_most() -> None:
    left = Found(TP2, [Tried(256, 11070.0, 50.0), Tried(512, 11420.0, 50.0)], is_exhausted=False)
    assert 11420 < left.most < 12400
    assert race(HIGH, TP4, known=[left]).bound(TP4).most == pytest.approx(2 * left.most)


def test_a_setting_that_only_tells_of_others_needs_no_interval_of_its_own() -> None:
    (load,) = Search({512: race(HIGH, *layouts(4))}).next_loads(4)
    assert (load.layout, load.is_answer) == (TP1, False)
    (load,) = Search({512: race(EACH, *layouts(4, exactly=False))}).next_loads(4)
    assert (load.layout, load.is_answer) == (TP1, True)


def test_where_memory_ends_the_climb_nothing_bounds_the_others() -> None:
    """They have more memory together, and so larger batches."""
    one = race(HIGH, TP4, known=[found(TP1, 1000.0, is_exhausted=False)])
    assert one.bound(TP4).most == math.inf
    assert one.next_load() == Load(TP4)


def test_what_cannot_be_loaded_is_never_asked_for() -> None:
    one = Race(HIGH, [TP4, DP4, Layout(tp=2, dp=2)], frozenset([TP4, DP4, Layout(tp=2, dp=2)]))
    # Of replicas that cannot be loaded alone the setting itself is.
    assert {load.layout for load in [one.next_load()] if load} <= {TP4, DP4, Layout(tp=2, dp=2)}
    one.lost[TP4] = "out of memory"
    one.lost[DP4] = "out of memory"
    assert one.next_load() == Load(Layout(tp=2, dp=2))


def test_a_replica_that_was_lost_takes_the_others_with_it() -> None:
    one = race(HIGH, TP4, DP4)
    one.lost[TP1] = "out of memory"
    assert one.open() == [TP4]


def test_for_one_device_fewer_of_them_are_tried_first() -> None:
    one = race(EACH, *layouts(4, exactly=False))
    assert loads_until_the_end(one, {TP1: 6400}) == [TP1]


def test_for_the_shortest_time_stages_and_replicas_are_left() -> None:
    one = race(SHORT, *layouts(4))
    truth = {TP1: 1 / 1.12, TP2: 1 / 0.74, TP4: 1 / 0.40}
    order = []
    while load := one.next_load():
        one.found[load.layout] = Found(load.layout, [Tried(1, truth[load.layout], 0.001)], is_exhausted=True)
        order.append(load.layout)
    # TP=4 is faster than two devices can be.
    assert order == [TP1, TP4]
    assert "passes through all stages" in str(one.bound(Layout(pp=4)))
    assert "passes through all stages" in str(one.bound(Layout(tp=2, pp=2)))
    assert "replicas" in str(one.bound(DP4))
    assert one.bound(Layout(tp=2, dp=2)).most == pytest.approx(2 / 1.12, rel=0.01)


def test_what_is_needed_anyway_is_loaded_side_by_side() -> None:
    """Where one device cannot hold the model, and no setting tells what another can do."""
    wide, mixed = Layout(tp=4), Layout(tp=2, pp=2)
    one = Race(HIGH, [replace(wide, dp=2), replace(mixed, dp=2)], frozenset(layouts(8)) | {wide, mixed})
    first = one.next_load()
    assert first == Load(wide)
    assert one.loads_beside(first, 8) == [Load(wide), Load(mixed)]
    assert one.loads_beside(first, 7) == [Load(wide)]
    # TP=1 tells of all others.
    assert race(HIGH, *layouts(4)).loads_beside(Load(TP1), 4) == [Load(TP1)]


def test_replicas_that_wait_for_each_other_are_neither_predicted_nor_bounded() -> None:
    shared = Layout(dp=4, experts=True)
    one = race(HIGH, TP4, shared, known=[found(TP1, 6400.0), found(TP4, 15000.0)])
    assert one.bound(shared).most == math.inf
    assert one.estimate(shared) is None
    assert one.next_load() == Load(shared)


def test_a_tie_is_not_worth_a_load() -> None:
    one = race(HIGH, TP2, Layout(dp=2), known=[found(TP1, 100.0, half=0.0), found(Layout(dp=2), 200 / (1 + TIE / 2))])
    assert one.next_load() is None
    one = race(HIGH, TP2, Layout(dp=2), known=[found(TP1, 100.0, half=0.0), found(Layout(dp=2), 180.0)])
    assert one.next_load() == Load(TP2)


def test_who_is_as_good_by_its_interval_is_named() -> None:
    one = race(HIGH, TP2, PP2, Layout(dp=2), known=[found(TP2, 100.0), found(PP2, 98.5), found(Layout(dp=2), 97.0)])
    assert [tie.layout for tie in one.ties()] == [PP2]


def test_what_must_be_reached_is_told_to_a_load() -> None:
    one = race(HIGH, TP4, DP4, Layout(tp=2, dp=2), known=[found(DP4, 20000.0, half=0.05)])
    assert one.to_beat(TP2) == pytest.approx(19000 / 2)
    assert one.to_beat(TP4) == pytest.approx(19000)
    assert race(HIGH, TP4).to_beat(TP4) == 0
    each = race(EACH, TP1, TP2, known=[found(TP1, 100.0, half=0.05)])
    assert each.to_beat(TP2) == pytest.approx(190)


def test_lengths_share_their_loads() -> None:
    races = {length: race(HIGH, TP4, DP4) for length in (512, 2048)}
    search = Search(dict(races))
    (load,) = search.next_loads(4)
    assert (load.layout, load.sizes, load.lengths) == (TP1, None, (512, 2048))
    races[512].found[TP1] = found(TP1, 3000.0, 6400.0)
    races[2048].found[TP1] = found(TP1, 3000.0, 2000.0)
    (load,) = search.next_loads(4)
    assert (load.layout, load.sizes, load.lengths) == (DP4, (16, 32), (512, 2048))
    assert load.to_beat == (0.0, 0.0)


def test_all_ways_to_use_so_many_devices() -> None:
    assert {str(one) for one in layouts(4)} == {"TP=4", "PP=4", "DP=4", "TP=2 PP=2", "TP=2 DP=2", "PP=2 DP=2"}
    assert {str(one) for one in layouts(4, exactly=False)} == {
        "TP=1", "TP=2", "TP=3", "TP=4", "PP=2", "PP=3", "PP=4", "TP=2 PP=2"
    }  # fmt: skip


def test_an_unknown_interval_ends_no_search_and_makes_no_tie() -> None:
    """As of one run alone."""
    one = race(HIGH, TP4, PP2, known=[found(TP4, 100, half=math.inf), found(TP1, 60)])
    assert one.open() == [PP2]
    one.found[PP2] = found(PP2, 99, half=math.inf)
    assert one.ties() == []
    assert one.to_beat(PP2) == 0


def test_replicas_are_tried_below_a_size_that_a_limit_has_decided_on() -> None:
    """Their slowest may miss what one alone just keeps."""
    one = found(TP1, 10, 20, 30, 40, 50)
    assert race(HIGH, DP4, known=[one]).load_of(DP4) == Load(DP4, (256,))
    limited = [replace(tried, excess=tried.batch_size / 130) for tried in one.tried]
    assert race(HIGH, DP4, known=[replace(one, tried=limited)]).load_of(DP4) == Load(DP4, (32, 64, 128))
