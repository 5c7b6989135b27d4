"""Ratios with intervals, scaling, TP against PP against DP, and two result sets, against numbers worked out apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from batch_inference.analyze.compare import (
    SetComparison,
    asked_points,
    baseline_of,
    compare_sets,
    halves,
    holm,
    layout,
    layout_order,
    ratios,
    regressions,
    side_by_side,
    with_scaling,
)
from batch_inference.analyze.sections import compared
from batch_inference.analyze.tables import MeasuredSetting, half_width, load_setting, point_table
from batch_inference.core.results import Point, Result
from batch_inference.core.statistics import STOPPED_BY_ITSELF
from builders import make_point, make_result, make_sweep, save_all


@pytest.fixture
def table(tmp_path: Path) -> Any:
    def build(results: Sequence[Result], folder: str = "new") -> pd.DataFrame:
        return point_table([load_setting(path) for path in save_all(results, tmp_path / folder)])

    return build


FIXED = {"num_runs": 1}  # or another number, of which all are made: intervals are Student's t


def pair(table: Any, one: Sequence[float], two: Sequence[float], config: dict[str, Any] = FIXED) -> pd.Series[float]:
    """Throughput of `one` over that of `two`, of runs with these latencies."""
    runs = {"a": one, "b": two}
    points = table([make_result(name, [make_point(latencies_s=runs[name])], config=config) for name in runs])
    return ratios(points.iloc[[0]], points.iloc[[1]]).iloc[0]


ONE, TWO = (1.0, 1.02, 0.97, 1.01), (1.1, 1.12, 1.06)


def test_the_p_value_is_welchs_of_the_runs(special: ModuleType, table: Any) -> None:
    one, two = (np.var(runs, ddof=1) / len(runs) for runs in (ONE, TWO))
    degrees = (one + two) ** 2 / (one**2 / 3 + two**2 / 2)
    t = abs(np.mean(ONE) - np.mean(TWO)) / math.sqrt(one + two)
    assert pair(table, ONE, TWO)["p_value"] == pytest.approx(2 * special.stdtr(degrees, -t), rel=1e-3)


def test_the_interval_of_a_ratio_is_propagated(special: ModuleType, table: Any) -> None:
    found = pair(table, ONE, TWO)
    assert found["ratio"] == pytest.approx(np.mean(TWO) / np.mean(ONE))
    one, two = (np.std(runs, ddof=1) / math.sqrt(len(runs)) / np.mean(runs) for runs in (ONE, TWO))
    degrees = (one**2 + two**2) ** 2 / (one**4 / 3 + two**4 / 2)
    half = special.stdtrit(degrees, 0.975) * math.hypot(one, two) * found["ratio"]
    assert found["ratio_ci95"] == pytest.approx(half, rel=1e-3)


def test_runs_that_stopped_by_themselves_tell_less(table: Any) -> None:
    fixed, adaptive = pair(table, ONE, TWO), pair(table, ONE, TWO, config={})
    assert adaptive["ratio_ci95"] == pytest.approx(STOPPED_BY_ITSELF * fixed["ratio_ci95"])
    assert 0 < fixed["p_value"] < adaptive["p_value"] < 0.05


@pytest.mark.slow
def test_the_interval_covers_the_true_ratio_as_often_as_it_says(tmp_path: Path) -> None:
    random, covered = np.random.default_rng(1), 0
    points = [make_point(batch, latencies_s=random.normal(1, 0.03, 4)) for batch in range(1, 401)]
    others = [make_point(batch, latencies_s=random.normal(2, 0.01, 3)) for batch in range(1, 401)]
    results = [make_result(name, made, config=FIXED) for name, made in (("a", points), ("b", others))]
    paths = save_all(results, tmp_path)
    one, two = (point_table([load_setting(path)]) for path in paths)
    found = ratios(one, two)
    covered = int(((found["ratio"] - 2).abs() <= found["ratio_ci95"]).sum())
    assert 0.92 <= covered / 400 <= 0.98


def test_a_single_run_has_a_ratio_and_no_interval(table: Any) -> None:
    found = pair(table, [1.0], TWO)
    assert found["ratio"] > 1
    assert math.isnan(found["ratio_ci95"])
    assert math.isnan(found["p_value"])


def test_runs_without_spread_are_equal_or_are_not(table: Any) -> None:
    assert pair(table, [1.0, 1.0], [1.0, 1.0]).tolist() == [1, 0, 1]
    assert pair(table, [1.0, 1.0], [2.0, 2.0]).tolist() == [2, 0, 0]


def test_the_interval_of_throughput_is_as_wide_as_that_of_latency(table: Any) -> None:
    points = table([make_result(points=[make_point(latencies_s=[1.0, 2.0, 3.0])], config=FIXED)])
    row = points.iloc[0]
    assert half_width(row, "latency_mean_s") == pytest.approx(4.303 / math.sqrt(3))
    assert half_width(row, "output_tok_per_s") == pytest.approx(16 * 4.303 / math.sqrt(3) / 2)
    assert halves(points, "output_tok_per_s").tolist() == [half_width(row, "output_tok_per_s")]


def test_one_run_has_no_interval(table: Any) -> None:
    row = table([make_result(points=[make_point(latencies_s=[1.0])])]).iloc[0]
    assert half_width(row, "output_tok_per_s") is None


def test_holm_corrects_step_by_step() -> None:
    # By hand: 0.01 x 4, 0.02 x 3, then 0.03 x 2 = 0.06 again, and 0.9 x 1.
    corrected = holm(np.array([0.02, math.nan, 0.01, 0.9, 0.03]))
    assert corrected == pytest.approx([0.06, math.nan, 0.04, 0.9, 0.06], nan_ok=True)
    assert holm(np.array([])).tolist() == []
    assert holm(np.array([0.6, 0.7])).tolist() == [1, 1]


# --- scaling ------------------------------------------------------------------------------------------------------


def numbers(points: pd.DataFrame, name: str, column: str = "scaling_efficiency") -> list[float]:
    return list(points.loc[points["setting"] == name, column])


def test_scaling_compares_equal_global_batch_and_equal_batch_per_replica(table: Any) -> None:
    one = make_result("tp_1", [make_point(batch, latencies_s=[1.0]) for batch in (1, 2, 4)])
    two = make_result("tp_2", [make_point(4, latencies_s=[0.625])], (2, 1, 1))
    # DP=2 at batch 2 is a global batch of 4, as fast as one device with half of it.
    replicas = make_result("dp_2", [make_point(b, latencies_s=[0.5], replicas=2) for b in (1, 2, 4)], (1, 1, 2))
    points = with_scaling(table([one, two, replicas]))
    assert set(points["scaling_baseline"]) == {"tp_1"}
    assert numbers(points, "tp_1") == [1.0, 1.0, 1.0]
    assert numbers(points, "tp_2") == pytest.approx([0.8])
    assert numbers(points, "tp_2", "speedup") == pytest.approx([1.6])
    assert numbers(points, "dp_2") == pytest.approx([1.0, 1.0, math.nan], nan_ok=True)
    assert numbers(points, "dp_2", "weak_speedup") == pytest.approx([4.0, 4.0, 4.0])
    assert numbers(points, "dp_2", "weak_scaling_efficiency") == pytest.approx([2.0, 2.0, 2.0])


def test_the_interval_of_the_efficiency_is_that_of_the_ratio(table: Any) -> None:
    results = [
        make_result("tp_1", [make_point(latencies_s=ONE)]),
        make_result("tp_2", [make_point(latencies_s=TWO)], (2, 1, 1)),
    ]
    points = with_scaling(table(results))
    found = ratios(points.iloc[[1]], points.iloc[[0]]).iloc[0]
    assert numbers(points, "tp_2", "speedup_ci95") == [found["ratio_ci95"]]
    assert numbers(points, "tp_2", "scaling_efficiency_ci95") == [found["ratio_ci95"] / 2]
    assert numbers(points, "tp_1", "speedup_ci95") == [0]


def test_each_group_has_its_own_baseline(table: Any) -> None:
    other = {"engine": {"dtype": "float16"}}
    points = with_scaling(table(make_sweep([(1, 1, 1), (2, 1, 1)]) + make_sweep([(4, 1, 1), (8, 1, 1)], **other)))
    assert points.groupby("group")["scaling_baseline"].unique().map(list).tolist() == [["tp_1"], ["tp_4"]]


def test_the_user_names_another_baseline(table: Any) -> None:
    points = with_scaling(table(make_sweep([(1, 1, 1), (2, 1, 1), (4, 1, 1)])), baseline="tp_2")
    assert set(points["scaling_baseline"]) == {"tp_2"}
    assert numbers(points, "tp_2") == [1.0, 1.0, 1.0]
    assert all(value > 1 for value in numbers(points, "tp_1"))


def test_an_invalid_baseline_point_is_no_baseline(table: Any) -> None:
    one = make_result("tp_1", [make_point(1, verdict="invalid"), make_point(2)])
    two = make_result("tp_2", [make_point(1), make_point(2)], (2, 1, 1))
    assert numbers(with_scaling(table([one, two])), "tp_2") == pytest.approx([math.nan, 0.5], nan_ok=True)


def test_nothing_measured_has_no_scaling(table: Any) -> None:
    for results in ([make_result(status="failed")], [make_result(points=[Point(1, 8, 4, "oom", reason="x")])]):
        assert with_scaling(table(results))["speedup"].isna().all()


# --- TP, PP or DP -------------------------------------------------------------------------------------------------


def test_layouts_are_compared_at_equal_devices_and_equal_global_batch(table: Any) -> None:
    tp = make_result("tp_2", [make_point(b, latencies_s=[1.0, 1.0]) for b in (2, 4)], (2, 1, 1))
    # Batch 1 and 2 of each replica are 2 and 4 in all: half as long, and equal.
    halves_s = {1: [0.5, 0.5], 2: [1.0, 1.0]}
    dp = make_result("dp_2", [make_point(b, latencies_s=s, replicas=2) for b, s in halves_s.items()], (1, 1, 2))
    rows = side_by_side(table([tp, dp, make_result("tp_1", [make_point(2)])]))
    alone = rows[rows["is_alone"]][["num_devices", "layout", "is_best"]].to_numpy().tolist()
    assert alone == [[1, "TP=1", False]]
    rows = rows[~rows["is_alone"]]
    found = rows[["global_batch_size", "layout", "ratio", "is_first", "is_best"]].to_numpy().tolist()
    assert found == [
        [2, "TP=2", 1, True, False],
        [2, "DP=2", 2, False, True],
        [4, "TP=2", 1, True, True],
        [4, "DP=2", 1, False, True],
    ]


def test_of_several_settings_of_a_layout_the_fastest_stands_for_it(table: Any) -> None:
    slow, fast = (
        make_result(name, [make_point(latencies_s=[s])], (2, 1, 1)) for name, s in (("slow", 2.0), ("fast", 1.0))
    )
    rows = side_by_side(table([slow, fast, make_result("pp_2", [make_point(latencies_s=[4.0])], (1, 2, 1))]))
    assert rows["setting"].tolist() == ["fast", "pp_2"]
    assert rows["ratio"].tolist() == [1, 0.25]


def test_overlapping_layouts_are_all_best_and_invalid_ones_are_not_there(table: Any) -> None:
    tp = make_result("tp_2", [make_point(latencies_s=[1.0, 1.1, 0.9])], (2, 1, 1))
    pp = make_result("pp_2", [make_point(latencies_s=[1.05, 1.1, 1.0])], (1, 2, 1))
    bad = make_result("dp_2", [make_point(latencies_s=[0.01], verdict="invalid")], (1, 1, 2))
    rows = side_by_side(table([tp, pp, bad]))
    assert rows[["layout", "is_best"]].to_numpy().tolist() == [["TP=2", True], ["PP=2", True]]


def test_how_experts_and_the_cache_are_shared_out_makes_a_layout_of_its_own(table: Any) -> None:
    """By what vLLM reports, and by the flags where a file is too old to tell."""
    told = {"engine": {"enable_expert_parallel": True, "decode_context_parallel_size": 2}}
    asked = {"config": {"engine_args": ["--enable-expert-parallel"]}}
    results = [
        make_result(name, [make_point(latencies_s=[float(seconds)])], (4, 1, 1), **more)
        for seconds, (name, more) in enumerate((("plain", {}), ("old", asked), ("both", told)), 1)
    ]
    assert side_by_side(table(results))[["setting", "layout"]].to_numpy().tolist() == [
        ["plain", "TP=4"], ["old", "TP=4 EP"], ["both", "TP=4 EP DCP=2"],
    ]  # fmt: skip


def test_where_nothing_is_comparable_all_are_alone_and_none_is_the_best(table: Any) -> None:
    rows = side_by_side(table(make_sweep([(1, 1, 1), (2, 1, 1)])))
    assert rows["is_alone"].all()
    assert not rows["is_best"].any()
    assert side_by_side(table([make_result(status="failed")])).empty


def test_a_layout_has_a_short_name() -> None:
    assert [layout(*sizes) for sizes in ((1, 1, 1), (4, 1, 1), (2, 1, 2))] == ["TP=1", "TP=4", "TP=2 DP=2"]
    assert [layout(4, 1, 1, True), layout(1, 1, 1, True), layout(4, 2, 1, False, 2), layout(2, 1, 2, True, 2)] == [
        "TP=4 EP", "TP=1 EP", "TP=4 PP=2 DCP=2", "TP=2 DP=2 EP DCP=2",
    ]  # fmt: skip


# --- two result sets ----------------------------------------------------------------------------------------------

STEADY = (1.0, 1.001, 0.999, 1.0005)


def points_of(factors: dict[int, float], **changes: Any) -> list[Point]:
    return [make_point(b, latencies_s=[s * factor for s in STEADY], **changes) for b, factor in factors.items()]


def test_a_planted_regression_is_found_and_nothing_else(table: Any) -> None:
    old = table([make_result(points=points_of({1: 1, 2: 1, 4: 1, 8: 1}))], "old")
    found = compare_sets(table([make_result(points=points_of({1: 1.0001, 2: 1.05, 4: 0.9, 8: 1.0}))]), old)
    assert found.points["change"].tolist() == ["no difference", "worse", "better", "no difference"]
    assert found.points["ratio"].tolist() == pytest.approx([1 / 1.0001, 1 / 1.05, 1 / 0.9, 1])
    assert (found.points["p_holm"] >= found.points["p_value"]).all()
    assert regressions(found, 3)["batch_size"].tolist() == [2]
    assert regressions(found, 6).empty


def test_noise_alone_is_no_difference(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    sets = []
    for folder in ("old", "new"):
        points = [make_point(b, latencies_s=random.normal(1, 0.02, 3)) for b in range(1, 101)]
        sets.append(
            point_table([load_setting(path) for path in save_all([make_result(points=points)], tmp_path / folder)])
        )
    changes = compare_sets(sets[1], sets[0]).points["change"].value_counts()
    # Without the correction some of a hundred seem to differ.
    assert set(changes.index) <= {"no difference", "maybe better", "maybe worse"}
    assert 1 <= 100 - changes["no difference"] <= 10


@pytest.mark.parametrize(("factor", "way"), [(1.004, "worse"), (0.996, "better")])
def test_what_only_the_test_of_its_own_point_shows_is_maybe_so(table: Any, factor: float, way: str) -> None:
    def with_one_changed(points: int) -> SetComparison:
        before = dict.fromkeys(range(1, points + 1), 1.0)
        old, new = (make_result(points=points_of(before | now)) for now in ({}, {1: factor}))
        return compare_sets(table([new]), table([old], "old"))

    assert with_one_changed(1).points["change"].tolist() == [way]
    many = with_one_changed(100)
    assert many.points["change"].tolist() == [f"maybe {way}", *["no difference"] * 99]
    # It is no reason to fail.
    assert regressions(many, 0).empty


def test_what_no_longer_works_is_lost(table: Any, tmp_path: Path) -> None:
    old = table([make_result("a", points_of({1: 1, 2: 1, 4: 1})), make_result("b", points_of({1: 1}))], "old")
    lost = [Point(2, 64, 32, "oom", reason="x"), *points_of({4: 1}, verdict="invalid")]
    new = [make_result("a", points_of({1: 1}) + lost), make_result("b", status="failed")]
    asked = asked_points([load_setting(path) for path in save_all(new, tmp_path)])
    found = compare_sets(table(new), old, asked)
    assert found.points[["setting", "batch_size", "change"]].to_numpy().tolist() == [
        ["a", 1, "no difference"],
        ["a", 2, "lost"],
        ["a", 4, "lost"],
        ["b", 1, "lost"],
    ]
    assert len(regressions(found, 50)) == 3
    assert found.only_old == 0
    # Sizes are whole numbers also where nothing at all was measured.
    none = [make_result("b", status="failed")]
    asked = asked_points([load_setting(path) for path in save_all(none, tmp_path)])
    assert compared(compare_sets(table(none), old, asked)).rows[0][:4] == ["b", "64", "1", "lost"]


def test_points_of_one_set_alone_are_counted(table: Any) -> None:
    old = table([make_result(points=points_of({1: 1, 2: 1, 4: 1}))], "old")
    found = compare_sets(table([make_result(points=points_of({4: 1, 8: 1}))]), old)
    assert (len(found.points), found.only_new, found.only_old) == (1, 1, 2)


def test_a_point_that_a_set_holds_twice_is_left_out(tmp_path: Path) -> None:
    one = save_all([make_result(points=points_of({1: 1, 2: 1}))], tmp_path)[0].rename(tmp_path / "first.json")
    two = save_all([make_result(points=points_of({1: 1}))], tmp_path)[0]
    new, old = point_table([load_setting(one), load_setting(two)]), point_table([load_setting(one)])
    found = compare_sets(new, old)
    assert found.points["batch_size"].tolist() == [2]
    # It is in both sets, and so none of them alone has it.
    assert (found.repeated, found.only_new, found.only_old) == (2, 0, 0)


def test_experts_split_and_whole_are_two_points_whatever_their_settings_are_called(tmp_path: Path) -> None:
    """As `tp_2` and the same with --enable-expert-parallel or --decode-context-parallel-size are in one folder."""

    def three(folder: str, whole: float, split: float) -> pd.DataFrame:
        flags = {"split": [], "whole": ["--enable-expert-parallel"], "dcp": ["--decode-context-parallel-size", "2"]}
        paths = []
        for kind, factor in (("split", split), ("whole", whole), ("dcp", 1.0)):
            config = {"engine_args": flags[kind]}
            (path,) = save_all([make_result("tp_2", points_of({1: factor}), (2, 1, 1), config=config)], tmp_path)
            (tmp_path / folder).mkdir(exist_ok=True)
            paths.append(path.rename(tmp_path / folder / f"{kind}.json"))
        return point_table([load_setting(path) for path in paths])

    found = compare_sets(three("new", 0.9, 1.0), three("old", 1.0, 1.0))
    kinds = found.points[["enable_expert_parallel", "decode_context_parallel_size", "change"]].to_numpy().tolist()
    assert sorted(kinds) == [[False, 1, "no difference"], [False, 2, "no difference"], [True, 1, "better"]]
    assert (found.repeated, found.unlike) == (0, {})


def test_one_run_shows_no_difference(table: Any) -> None:
    old = table([make_result(points=[make_point(latencies_s=[1.0])])], "old")
    assert compare_sets(table([make_result(points=[make_point()])]), old).points["change"].tolist() == ["unknown"]


def test_what_differs_between_the_sets_is_named(table: Any) -> None:
    newer = {"environment": {"versions": {"vllm": "0.33.0", "torch": "2.13.0"}}}
    found = compare_sets(table(make_sweep([(1, 1, 1)], **newer)), table(make_sweep([(1, 1, 1)]), "old"))
    assert found.unlike == {"vllm_version": ("0.32.0", "0.33.0")}
    assert len(found.points) == 3


def test_a_set_of_two_models_is_compared_model_by_model(table: Any) -> None:
    def both(factor: float) -> list[Result]:
        return [
            make_result(points=points_of({1: 1})),
            make_result("other", points_of({1: factor}), config={"model": "b"}),
        ]

    found = compare_sets(table(both(2)), table(both(1), "old"))
    assert found.points[["model", "change"]].iloc[0].tolist() == ["b", "worse"]
    assert found.unlike == {}


def test_points_of_other_tokens_per_step_are_compared_one_by_one(table: Any) -> None:
    def grid(factor: float, *others: Result) -> list[Result]:
        points = [point for budget in (2048, 8192) for point in points_of({1: factor}, max_num_batched_tokens=budget)]
        return [make_result("budgets", points), *others]

    # Beside points without, whole numbers are read as floats.
    old = table(grid(1, make_result("other", points_of({1: 1}))), "old")
    found = compare_sets(table(grid(2)), old)
    assert found.points["tokens_per_step"].tolist() == [2048, 8192]
    assert found.points["change"].tolist() == ["worse", "worse"]
    assert (found.repeated, found.only_new, found.only_old) == (0, 0, 1)


def test_other_tokens_per_step_than_were_asked_for_are_not_lost(tmp_path: Path) -> None:
    def measured(folder: str, *budgets: int) -> tuple[pd.DataFrame, list[MeasuredSetting]]:
        points = [point for budget in budgets for point in points_of({1: 1}, max_num_batched_tokens=budget)]
        config = {"batch_sizes": [1], "max_num_batched_tokens": list(budgets)}
        paths = save_all([make_result("budgets", points, config=config)], tmp_path / folder)
        settings = [load_setting(path) for path in paths]
        return point_table(settings), settings

    (new, asked), (old, _) = measured("new", 8192, 16384), measured("old", 2048, 8192)
    found = compare_sets(new, old, asked_points(asked))
    assert found.points["change"].tolist() == ["no difference"]
    (new, asked), (old, _) = measured("newer", 2048, 8192), measured("older", 2048, 8192)
    new = new[new["tokens_per_step"] == 8192]
    assert compare_sets(new, old, asked_points(asked)).points["change"].tolist() == ["no difference", "lost"]


def test_points_of_a_model_that_the_new_set_does_not_measure_are_not_lost(tmp_path: Path) -> None:
    def measured(folder: str, *models: str, **changes: Any) -> tuple[pd.DataFrame, list[MeasuredSetting]]:
        settings = []
        for model in models:
            config = {"model": model, "batch_sizes": [1, 2], "seq_lens": [64], "max_tokens": 32}
            result = make_result("tp_1", config=config, **(changes or {"points": points_of({1: 1, 2: 1})}))
            result.engine = None if changes else result.engine
            settings += [load_setting(path) for path in save_all([result], tmp_path / folder / model)]
        return point_table(settings), settings

    (new, asked), (old, _) = measured("new", "a"), measured("old", "a", "b")
    found = compare_sets(new, old, asked_points(asked))
    assert found.points["change"].tolist() == ["no difference", "no difference"]
    assert found.only_old == 2
    # Of the same model it is lost, also if no engine was loaded that could tell its dtype and devices.
    new, asked = measured("failed", "a", status="failed")
    found = compare_sets(new, old, asked_points(asked))
    assert found.points[["model", "change"]].to_numpy().tolist() == [["a", "lost"], ["a", "lost"]]
    assert found.only_old == 2


def test_a_point_is_told_apart_only_where_a_set_holds_it_twice(table: Any) -> None:
    """One setting of an older vLLM among the new ones does not take the others from being compared."""
    newer = {"environment": {"versions": {"vllm": "0.33.0", "torch": "2.13.0"}}}
    new = [*make_sweep([(1, 1, 1)], **newer), *make_sweep([(2, 1, 1)])]
    found = compare_sets(table(new), table(make_sweep([(1, 1, 1)]), "old"))
    assert (len(found.points), found.only_new) == (3, 3)
    assert found.unlike == {"vllm_version": ("0.32.0", "0.33.0")}


def test_same_named_points_of_two_models_are_paired_by_the_model(tmp_path: Path) -> None:
    def both(folder: str, factor: float) -> pd.DataFrame:
        (tmp_path / folder).mkdir()
        paths = [
            save_all([make_result(points=points_of({1: times}), config={"model": model})], tmp_path)[0].rename(
                tmp_path / folder / f"{model}.json"
            )
            for model, times in (("a", 1), ("b", factor))
        ]
        return point_table([load_setting(path) for path in paths])

    found = compare_sets(both("new", 2), both("old", 1))
    assert dict(zip(found.points["model"], found.points["change"], strict=True)) == {"a": "no difference", "b": "worse"}
    assert (found.repeated, found.unlike) == (0, {})


def test_a_point_asked_for_and_not_reached_is_lost(tmp_path: Path, table: Any) -> None:
    """What an interrupted run has not come to; a point of another length of output is another point."""
    grid = {"batch_sizes": [1, 2], "seq_lens": [64]}
    old = table([make_result(points=points_of({1: 1, 2: 1, 4: 1}))], "old")
    for max_tokens, lost in ((32, [2]), (16, [])):
        config = {**grid, "max_tokens": max_tokens}
        new = [make_result(points=points_of({1: 1}), config=config, status="partial")]
        asked = asked_points([load_setting(path) for path in save_all(new, tmp_path)])
        found = compare_sets(table(new, f"new_{max_tokens}"), old, asked)
        assert found.points.loc[found.points["change"] == "lost", "batch_size"].tolist() == lost
        assert len(regressions(found, 5)) == len(lost)
    assert found.only_old == 2


def test_points_of_an_engine_that_failed_are_counted_once(tmp_path: Path, table: Any) -> None:
    """--resume with an engine that does not start keeps what was measured."""
    config = {"batch_sizes": [1, 2, 4], "seq_lens": [64]}
    old = table([make_result(points=points_of({1: 1, 2: 1, 4: 1}))], "old")
    new = [make_result(points=points_of({1: 1}), status="failed", config=config)]
    found = compare_sets(table(new), old, asked_points([load_setting(path) for path in save_all(new, tmp_path)]))
    assert found.points["change"].tolist() == ["no difference", "lost", "lost"]
    assert found.only_old == 0


def test_settings_that_may_differ_are_named_too(table: Any) -> None:
    new = table(make_sweep([(1, 1, 1)], config={"seed": 7}))
    found = compare_sets(new, table(make_sweep([(1, 1, 1)]), "old"))
    assert "seed" in found.unlike


# --- at the bounds, and what is easily mistaken -------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.01, 1.0, 50.0])
def test_the_interval_of_a_ratio_does_not_depend_on_the_unit_of_time(table: Any, factor: float) -> None:
    found = pair(table, [s * factor for s in ONE], [s * factor for s in TWO])
    same = pair(table, ONE, TWO)
    assert found["ratio"] == pytest.approx(same["ratio"])
    assert found["ratio_ci95"] == pytest.approx(same["ratio_ci95"], rel=1e-6)
    assert found["p_value"] == pytest.approx(same["p_value"], rel=1e-6)


@pytest.mark.parametrize(("shift", "change"), [(0.014, "worse"), (0.0105, "no difference"), (-0.014, "better")])
def test_five_percent_and_not_ten_is_what_counts_as_a_difference(
    special: ModuleType, table: Any, shift: float, change: str
) -> None:
    before, now = [1.0, 1.008, 0.992, 1.004], [s + shift for s in (1.0, 1.008, 0.992, 1.004)]
    # As many runs, as far apart: Welch's test is Student's then, with six degrees of freedom.
    p_value = float(2 * special.stdtr(6, -abs(shift) / math.sqrt(np.var(before, ddof=1) / 2)))
    assert (p_value < 0.05) is (change != "no difference")
    assert p_value < 0.1
    old = table([make_result(points=[make_point(latencies_s=before)], config=FIXED)], "old")
    found = compare_sets(table([make_result(points=[make_point(latencies_s=now)], config=FIXED)]), old)
    assert found.points["change"].tolist() == [change]
    assert found.points["p_holm"].tolist() == pytest.approx([p_value], rel=1e-2)


def test_what_failed_or_was_invalid_before_is_no_measure_of_what_is_now(table: Any) -> None:
    before = [
        *points_of({1: 1}),
        *points_of({2: 0.01}, verdict="invalid"),
        Point(4, 64, 32, "oom", reason="x"),
        # A failed point may have some runs.
        *points_of({8: 0.01}, status="error", verdict=None),
        *points_of({16: 1}, verdict="suspect"),
    ]
    old = table([make_result(points=before)], "old")
    found = compare_sets(table([make_result(points=points_of(dict.fromkeys((1, 2, 4, 8, 16), 1)))]), old)
    assert found.points["batch_size"].tolist() == [1, 16]
    assert set(found.points["change"]) == {"no difference"}
    assert (found.only_new, found.only_old, found.invalid_old) == (0, 0, 3)
    # Nor are they lost where they are not there any more.
    assert regressions(compare_sets(table([make_result(points=points_of({1: 1, 16: 1}))]), old), 1).empty


def test_a_regression_is_more_than_the_percent_that_is_allowed(table: Any) -> None:
    old = table([make_result(points=points_of({1: 0.75, 2: 0.75, 4: 1}))], "old")
    new = table([make_result(points=points_of({1: 1, 2: 1.01, 4: 0.5}))])
    # Exactly 25 % lower, 25.7 % lower, and twice as high.
    found = compare_sets(new, old)
    points = found.points.assign(ratio=[0.75, found.points["ratio"].iloc[1], found.points["ratio"].iloc[2]])
    exact = SetComparison(points)
    assert found.points["change"].tolist() == ["worse", "worse", "better"]
    assert regressions(exact, 25)["batch_size"].tolist() == [2]
    assert regressions(exact, 24)["batch_size"].tolist() == [1, 2]
    assert regressions(exact, 26).empty


def test_a_lost_point_has_no_numbers_of_now(table: Any, tmp_path: Path) -> None:
    old = table([make_result(points=points_of({1: 1, 2: 1}))], "old")
    new = [make_result(points=points_of({1: 0.5}, verdict="invalid"), config={"batch_sizes": [1, 2]})]
    asked = asked_points([load_setting(path) for path in save_all(new, tmp_path)])
    found = compare_sets(table(new), old, asked).points
    assert found["change"].tolist() == ["lost", "lost"]
    assert found[["ratio", "ratio_ci95", "p_value", "p_holm"]].isna().all(axis=None)
    assert found["old_output_tok_per_s"].tolist() == pytest.approx([32 / np.mean(STEADY), 64 / np.mean(STEADY)])
    assert found["status"].tolist() == ["ok", "failed"]


def test_the_set_that_holds_a_point_twice_decides_what_tells_it_apart(table: Any) -> None:
    def of(model: str, name: str, factor: float) -> Result:
        return make_result(name, points_of({1: factor}), config={"model": model, "name": "x"})

    def named(results: list[Result], folder: str) -> pd.DataFrame:
        return table(results, folder).assign(name="x")

    newer = {"environment": {"versions": {"vllm": "0.33.0", "torch": "2.13.0"}}}
    both = [of("a", "one", 1), of("b", "two", 2)]
    for result in both:
        result.environment.versions = newer["environment"]["versions"]
    for new, old, alone in (
        (named(both, "new"), named([of("b", "two", 1)], "old"), (1, 0)),
        (named([of("b", "two", 2)], "new"), named([of("a", "one", 1), of("b", "two", 1)], "old"), (0, 1)),
    ):
        found = compare_sets(new, old)
        assert found.points[["model", "change"]].to_numpy().tolist() == [["b", "worse"]]
        assert ((found.only_new, found.only_old), found.repeated) == (alone, 0)
        assert "model" not in found.unlike


def test_the_baseline_is_the_smallest_setting_with_most_points(table: Any) -> None:
    few = make_result("few", [make_point(1, latencies_s=[1.0, 1.0])])
    many = make_result("many", [make_point(b, latencies_s=[2.0, 2.0]) for b in (1, 2)])
    bad = make_result("bad", [make_point(b, latencies_s=[2.0], verdict="invalid") for b in (1, 2, 4)])
    large = make_result("large", [make_point(b, latencies_s=[1.0, 1.0]) for b in (1, 2, 4)], (2, 1, 1))
    points = with_scaling(table([bad, few, large, many]))
    assert set(points["scaling_baseline"]) == {"many"}
    assert baseline_of(points) == "many"
    assert numbers(points, "few", "speedup") == pytest.approx([2.0])
    assert numbers(points, "large", "scaling_efficiency") == pytest.approx([1.0, 1.0, math.nan], nan_ok=True)


def test_a_baseline_of_another_group_is_none_here(table: Any) -> None:
    other = make_result("other", [make_point()], engine={"dtype": "float16"})
    points = with_scaling(table([make_result("tp_1", [make_point()]), other]), baseline="tp_1")
    here, there = points[points["setting"] == "tp_1"], points[points["setting"] == "other"]
    assert (baseline_of(here), baseline_of(there)) == ("tp_1", None)
    assert there["speedup"].isna().all()


def test_of_points_that_a_baseline_holds_twice_the_first_is_meant(table: Any) -> None:
    one, again = make_point(1, latencies_s=[1.0, 1.0]), make_point(1, latencies_s=[4.0, 4.0])
    two = make_result("tp_2", [make_point(1, latencies_s=[0.5, 0.5])], (2, 1, 1))
    points = with_scaling(table([make_result("tp_1", [one]), make_result("tp_1_again", [again]), two]))
    assert numbers(points, "tp_2", "speedup") == [2.0]


def test_layouts_of_one_kind_come_first_and_tp_before_pp_before_dp() -> None:
    sizes = [(1, 1, 4), (2, 2, 1), (1, 4, 1), (2, 1, 2), (4, 1, 1), (1, 2, 2), (1, 1, 1), (2, 2, 2), (8, 1, 1)]
    assert [layout(*row) for row in sorted(sizes, key=lambda row: layout_order(*row))] == [
        "TP=1", "TP=8", "TP=4", "PP=4", "DP=4", "TP=2 PP=2", "TP=2 DP=2", "PP=2 DP=2", "TP=2 PP=2 DP=2",
    ]  # fmt: skip


def test_the_best_layout_is_the_fastest_and_all_that_overlap_its_interval(table: Any) -> None:
    """Not those that overlap the first, or the slowest."""
    results = [
        make_result(name, [make_point(4 // dp, latencies_s=[s, s * 1.01], replicas=dp)], (tp, pp, dp))
        for name, (tp, pp, dp), s in (
            ("tp_4", (4, 1, 1), 2.0),
            ("pp_4", (1, 4, 1), 2.05),
            ("dp_4", (1, 1, 4), 1.0),
            ("tp_2_pp_2", (2, 2, 1), 1.05),
        )
    ]
    rows = side_by_side(table(results))
    assert rows["layout"].tolist() == ["TP=4", "PP=4", "DP=4", "TP=2 PP=2"]
    assert rows["is_best"].tolist() == [False, False, True, True]
    assert rows["is_first"].tolist() == [True, False, False, False]
    assert rows["ratio"].tolist() == pytest.approx([1.0, 2.0 / 2.05, 2.0, 2.0 / 1.05])


def test_what_is_slower_within_the_noise_is_no_regression(table: Any) -> None:
    old = table([make_result(points=[make_point(latencies_s=[1.0, 1.5, 0.6])])], "old")
    found = compare_sets(table([make_result(points=[make_point(latencies_s=[1.3, 1.8, 0.9])])]), old)
    assert found.points["ratio"].iloc[0] < 0.8
    assert found.points["change"].tolist() == ["no difference"]
    assert regressions(found, 3).empty
