"""The decision: winners, ties, limits, cost and the Pareto front, with the truth planted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from batch_inference.analyze.compare import overlapping
from batch_inference.analyze.decide import (
    COST,
    GOALS,
    Choice,
    Limits,
    choices,
    keeps,
    why_before_better,
    with_cost,
    with_pareto,
)
from batch_inference.analyze.tables import believable, load_setting, point_table
from batch_inference.core.results import Point, Requests, Result
from batch_inference.core.tried import limits_of
from builders import make_point, make_result, make_run, save_all


@pytest.fixture
def table(tmp_path: Path) -> Any:
    def build(results: Sequence[Result]) -> pd.DataFrame:
        return point_table([load_setting(path) for path in save_all(results, tmp_path)])

    return build


def winners(part: pd.DataFrame, limits: Limits | None = None) -> dict[str, tuple[str, int]]:
    found = choices(part, limits or Limits())
    return {choice.goal.name: (choice.best["setting"], choice.best["batch_size"]) for choice in found if choice.best}


def ties(part: pd.DataFrame, goal: str) -> list[tuple[str, int]]:
    (choice,) = [choice for choice in choices(part) if choice.goal.name == goal]
    return [(row["setting"], row["batch_size"]) for row in choice.ties]


def two_settings() -> list[Result]:
    """32 output tokens per request: 32, 128 / 2 = 64 tok/s; 40, 80 tok/s on two devices, 40 each."""
    return [
        make_result("tp_1", [make_point(1, latencies_s=[1.0]), make_point(4, latencies_s=[2.0])]),
        make_result("tp_2", [make_point(1, latencies_s=[0.8]), make_point(4, latencies_s=[1.6])], (2, 1, 1)),
    ]


def test_the_best_of_each_goal_is_found_per_length(table: Any) -> None:
    assert winners(table(two_settings())) == {
        "throughput": ("tp_2", 4),
        "per device": ("tp_1", 4),
        "latency": ("tp_2", 1),
    }


def test_an_invalid_or_failed_point_never_wins_or_ties(table: Any) -> None:
    invalid = make_point(4, latencies_s=[0.001, 0.001], verdict="invalid")
    failed = Point(8, 64, 32, "error", reason="x")
    points = table([make_result(points=[make_point(), invalid, failed]), make_result("b", [invalid])])
    assert set(winners(points).values()) == {("tp_1", 1)}
    assert believable(points)["batch_size"].tolist() == [1]
    assert ties(points, "throughput") == []


def test_no_measured_point_has_no_best(table: Any) -> None:
    assert list(choices(table([make_result(points=[Point(1, 64, 32, "oom", reason="x")])]))) == []


# --- ties ---------------------------------------------------------------------------------------------------------


def test_every_setting_whose_interval_overlaps_the_winner_is_a_tie(table: Any) -> None:
    runs = {"best": [1.0, 1.02, 0.98], "near": [1.03, 1.05, 1.01], "far": [1.5, 1.52, 1.48]}
    points = table([make_result(name, [make_point(latencies_s=seconds)]) for name, seconds in runs.items()])
    assert winners(points)["throughput"] == ("best", 1)
    assert ties(points, "throughput") == ties(points, "latency") == [("near", 1)]


def test_the_best_is_the_simplest_within_the_interval_of_the_highest(table: Any) -> None:
    """One that is lower than that may be a tie, by its own interval, and is not taken."""

    def point(middle_s: float, half: float) -> Point:
        return make_point(4, latencies_s=[middle_s * (1 + step * half) for step in (-1, 0, 1)])

    high = make_result("tp_4", [point(1.0, 0.01)], (4, 1, 1))
    near, far = make_result("tp_2", [point(1.02, 0.01)], (2, 1, 1)), make_result("tp_1", [point(1.2, 0.05)])
    points = table([high, near, far])
    assert winners(points)["throughput"] == ("tp_2", 4)
    assert ties(points, "throughput") == [("tp_1", 4), ("tp_4", 4)]


@pytest.mark.parametrize(
    ("better", "taken", "why"),
    [
        ({"verdict": "suspect"}, {}, "is not suspect"),
        ({"sizes": (2, 1, 1)}, {}, "has fewer devices"),
        ({"sizes": (2, 2, 1)}, {"sizes": (4, 1, 1)}, "has fewer kinds of parallelism"),
        ({"engine_args": ["--block-size", "8"]}, {}, "has fewer flags of vLLM's"),
    ],
)
def test_why_a_better_number_is_not_the_winner_is_known(
    table: Any, better: dict[str, Any], taken: dict[str, Any], why: str
) -> None:
    def near(name: str, factor: float, **of: Any) -> Result:
        point = make_point(4, latencies_s=[factor * s for s in (0.98, 1.0, 1.02)], verdict=of.get("verdict", "valid"))
        return make_result(name, [point], of.get("sizes", (1, 1, 1)), config={"engine_args": of.get("engine_args", [])})

    points = table([near("better", 1.0, **better), near("taken", 1.01, **taken)])
    for choice in choices(points):
        if choice.goal.name in ("throughput", "latency"):
            assert choice.best is not None
            assert choice.best["setting"] == "taken"
            found = why_before_better(choice)
            assert found is not None
            assert (found[0]["setting"], found[1]) == ("better", why)
    first, *_ = choices(table([near("better", 1.0), near("taken", 1.01)]))
    assert first.best is not None
    assert (first.best["setting"], why_before_better(first)) == ("better", None)


def test_a_tie_is_named_once_at_its_best_point_and_the_winner_is_none(table: Any) -> None:
    near = [make_point(b, latencies_s=[b * s for s in (1.01, 1.03, 0.99)]) for b in (1, 2)]
    best = [make_point(b, latencies_s=[b * s for s in (1.0, 1.02, 0.98)]) for b in (1, 2)]
    assert ties(table([make_result("a", best), make_result("b", near)]), "throughput") == [("b", 1)]


def test_an_unknown_interval_shows_no_tie(table: Any) -> None:
    points = table([make_result(name, [make_point(latencies_s=[s])]) for name, s in (("a", 1.0), ("b", 1.001))])
    assert ties(points, "latency") == []


# --- limits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "throughput"),
    [
        (Limits(), ("tp_2", 4)),
        (Limits(latency_s=1.6), ("tp_2", 4)),  # at most, not below
        (Limits(latency_s=1.5), ("tp_2", 1)),
        (Limits(ttft_s=0.09), ("tp_2", 1)),  # a tenth of the latency
        (Limits(tpot_s=0.024), ("tp_2", 1)),  # 0.9 x 0.8 / 31 = 0.0232
        (Limits(latency_s=1.7, ttft_s=0.09), ("tp_2", 1)),
    ],
    ids=str,
)
def test_limits_restrict_the_choice(table: Any, limits: Limits, throughput: tuple[str, int]) -> None:
    assert winners(table(two_settings()), limits)["throughput"] == throughput


def test_the_percentile_of_the_limits_is_the_users(tmp_path: Path) -> None:
    result = make_result(points=[make_point(latencies_s=[1.0, 1.0, 1.0, 1.0, 9.0])])
    (path,) = save_all([result], tmp_path)
    for percent, is_kept in ((50, True), (75, True), (99, False)):
        found = winners(point_table([load_setting(path, percent)]), Limits(latency_s=2, percent=percent))
        assert bool(found) == is_kept


def test_where_nothing_keeps_the_limits_the_nearest_is_named(table: Any) -> None:
    (choice,) = choices(table(two_settings()), Limits(latency_s=0.5, ttft_s=10))
    assert choice.best is None
    assert choice.nearest is not None
    assert (choice.nearest["setting"], choice.nearest["batch_size"]) == ("tp_2", 1)


def test_an_unknown_number_keeps_no_limit(table: Any) -> None:
    points = table([make_result(points=[make_point(max_tokens=1)])])
    (choice,) = choices(points, Limits(tpot_s=100))
    assert isinstance(choice, Choice)
    assert (choice.best, choice.nearest) == (None, None)


# --- cost and Pareto ----------------------------------------------------------------------------------------------


def test_cost_is_price_over_throughput(table: Any) -> None:
    points = with_cost(table(two_settings()), 3.6)
    # 3.6 an hour is 0.001 a second: at 32 tok/s a million tokens take 31250 s.
    assert points[COST].tolist() == pytest.approx([31.25, 15.625, 50.0, 25.0])
    assert winners(points)["cost"] == ("tp_1", 4)
    assert COST not in with_cost(points.drop(columns=COST), None)


def test_the_cost_has_the_best_and_the_ties_of_the_throughput_per_device(table: Any) -> None:
    """Also where one interval holds the other number, and not the other way round."""
    wide, narrow = ([1.0, 0.96, 1.04], [1.1034, 1.1035, 1.1036])
    results = [
        make_result(
            "tp_2", [make_point(8, latencies_s=[each / 2 for each in wide])], (2, 1, 1), config={"num_runs": 3}
        ),
        make_result("tp_1", [make_point(8, latencies_s=narrow)], config={"num_runs": 3}),
    ]
    points = with_cost(table(results), 1.0)
    by_goal = winners(points)
    assert by_goal["cost"] == by_goal["per device"] == ("tp_1", 8)
    assert ties(points, "cost") == ties(points, "per device") == [("tp_2", 8)]


def test_the_front_holds_the_points_that_nothing_beats_in_both(table: Any) -> None:
    points = with_pareto(table(two_settings()))
    # Latency 0.8, 1.0, 1.6, 2.0; per device 20, 32, 40, 64: each slower one is better per device.
    assert points["pareto"].all()
    worse = make_result("pp_2", [make_point(1, latencies_s=[1.0]), make_point(4, latencies_s=[9.0])], (1, 2, 1))
    points = with_pareto(table([*two_settings(), worse]))
    assert set(points.loc[~points["pareto"], "setting"]) == {"pp_2"}


def test_invalid_points_are_on_no_front_and_lengths_have_their_own(table: Any) -> None:
    points = [make_point(1, 8, [1.0]), make_point(1, 16, [5.0]), make_point(1, 32, [0.1], verdict="invalid")]
    assert with_pareto(table([make_result(points=points)]))["pareto"].tolist() == [True, True, False]


# --- at the bounds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        (Limits(latency_s=2.0), [True, True, True]),
        (Limits(latency_s=1.0), [True, False, True]),
        (Limits(latency_s=0.5), [False, False, True]),
        (Limits(latency_s=0.499), [False, False, False]),
        (Limits(), [True, True, True]),
    ],
    ids=str,
)
def test_a_limit_is_the_most_that_is_allowed(table: Any, limits: Limits, kept: list[bool]) -> None:
    points = table(
        [make_result(points=[make_point(b, latencies_s=[s] * 2) for b, s in ((1, 1.0), (2, 2.0), (4, 0.5))])]
    )
    assert keeps(points, limits).tolist() == kept


def test_all_limits_must_be_kept_and_an_unknown_number_keeps_none(table: Any) -> None:
    points = table([make_result(points=[make_point(1), make_point(2, max_tokens=1)])])
    assert keeps(points, Limits(latency_s=2.0, tpot_s=1.0)).tolist() == [True, False]
    assert keeps(points, Limits(latency_s=0.5, tpot_s=1.0)).tolist() == [False, False]


def test_the_nearest_is_the_one_whose_worst_excess_is_the_least(table: Any) -> None:
    """Of latency and of time to first token, as shares of their limits."""
    # 2 x and 10 x; 4 x and 5 x; and one of which a number is not known.
    points = [times(1, 1.0, 0.1), times(2, 2.0, 0.05), make_point(4, latencies_s=[0.4], max_tokens=1)]
    limits = Limits(latency_s=0.5, ttft_s=0.01, tpot_s=1.0)
    (choice,) = choices(table([make_result(points=points)]), limits)
    assert choice.nearest is not None
    assert choice.nearest["batch_size"] == 2


def times(batch_size: int, latency_s: float, ttft_s: float) -> Point:
    requests = Requests([ttft_s] * batch_size, [latency_s] * batch_size, [0.0] * batch_size, [32] * batch_size)
    return make_point(batch_size, runs=[make_run(latency_s, requests=batch_size, times=requests)])


def test_a_length_that_keeps_no_limit_takes_nothing_from_the_next(table: Any) -> None:
    points = [make_point(1, 8, [5.0, 5.0]), make_point(1, 16, [1.0, 1.0])]
    found = list(choices(table([make_result(points=points)]), Limits(latency_s=2.0)))
    assert [(choice.seq_len, choice.best is not None) for choice in found] == [(8, False)] + [(16, True)] * 3


def test_the_interval_of_the_winner_itself_makes_ties_too(table: Any) -> None:
    """Runs without any spread have none, and lie within that of the winner."""
    wide = make_result("wide", [make_point(latencies_s=[1.0, 1.1, 0.9])])
    points = table([wide, make_result("exact", [make_point(latencies_s=[1.02, 1.02, 1.02])])])
    assert winners(points)["throughput"] == ("wide", 1)
    assert ties(points, "throughput") == ties(points, "latency") == [("exact", 1)]


def test_intervals_that_just_touch_overlap() -> None:
    values, halves = pd.Series([10.0, 8.0, 7.5, 12.0]), pd.Series([1.0, 1.0, 1.0, float("nan")])
    assert overlapping(values, halves, 10.0, 1.0).tolist() == [True, True, False, False]
    assert overlapping(values, halves, 10.0, 2.0).tolist() == [True, True, True, True]


def test_a_goal_has_the_direction_of_its_metric() -> None:
    assert {goal.name: (goal.column, goal.unit, goal.better) for goal in GOALS} == {
        "throughput": ("output_tok_per_s", "tok/s", "higher"),
        "per device": ("output_tok_per_s_per_device", "tok/s/device", "higher"),
        "latency": ("latency_mean_s", "s", "lower"),
        "cost": (COST, "per M tokens", "lower"),
    }


@pytest.mark.parametrize(
    ("latencies_s", "batches", "front"),
    [
        # Throughput per device goes with batch / latency: 1, 2 and 1.5; the third is slower and worse than the second.
        ((1.0, 2.0, 4.0), (1, 4, 6), [True, True, False]),
        # As good per device and slower; as fast and worse per device.
        ((1.0, 2.0, 2.0), (1, 2, 4), [True, False, True]),
        ((1.0, 2.0), (1, 2), [True, False]),
        ((1.0, 1.0), (1, 2), [False, True]),
    ],
)
def test_the_front_needs_more_per_device_for_more_latency(
    table: Any, latencies_s: tuple[float, ...], batches: tuple[int, ...], front: list[bool]
) -> None:
    points = [make_point(b, latencies_s=[s, s]) for b, s in zip(batches, latencies_s, strict=True)]
    assert with_pareto(table([make_result(points=points)]))["pareto"].tolist() == front


def test_a_search_and_the_analysis_limit_the_same_numbers() -> None:
    asked = SimpleNamespace(max_latency_s=1.0, max_ttft_s=2.0, max_tpot_s=3.0)
    assert limits_of(asked) == Limits(1.0, 2.0, 3.0).columns()


def test_a_percentile_of_a_limit_has_a_column_of_its_name(table: Any) -> None:
    assert Limits(1.0, 2.0, 3.0, percent=75).columns() == {"latency_p75_s": 1.0, "ttft_p75_s": 2.0, "tpot_p75_s": 3.0}
    assert str(Limits(1.5, None, 0.25)) == "latency p99 ≤ 1.5 s, TPOT p99 ≤ 0.25 s"
    row = table([make_result(points=[make_point(latencies_s=[1.0, 2.0, 3.0, 4.0, 5.0])])]).iloc[0]
    assert (row["latency_p50_s"], row["latency_p90_s"], row["latency_p99_s"]) == (3.0, 4.6, pytest.approx(4.96))
