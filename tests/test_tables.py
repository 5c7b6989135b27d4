from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from batch_inference.metrics import METRICS
from batch_inference.results import Point
from batch_inference.tables import best_points, group_differences, points_table, scaling_table, write_csv
from builders import make_result


def test_one_row_per_point_with_settings_and_every_metric() -> None:
    table = points_table([make_result(), make_result(tp=2, dp=2)])
    assert len(table) == 6
    assert {metric.name for metric in METRICS} <= set(table.columns)
    last = table.iloc[-1]
    assert (last["name"], last["batch_size"], last["global_batch_size"], last["num_devices"]) == (
        "tp_2_dp_2",
        16,
        32,
        4,
    )


def test_numbers_come_from_the_runs_and_not_from_the_stored_summary() -> None:
    result = make_result()
    true = result.points[0].summary["output_tok_per_s"]
    result.points[0].summary["output_tok_per_s"] = 1e9
    assert points_table([result]).iloc[0]["output_tok_per_s"] == true


def test_the_best_point_is_the_planted_one() -> None:
    table = points_table([make_result(), make_result(tp=2, speed=150), make_result(tp=4, speed=140)])
    (best,) = best_points(table, "output_tok_per_s", "higher").to_dict("records")
    assert (best["name"], best["batch_size"]) == ("tp_2", 16)
    (best,) = best_points(table, "output_tok_per_s_per_device", "higher").to_dict("records")
    assert best["name"] == "tp_1"
    (best,) = best_points(table, "latency_mean_s", "lower").to_dict("records")
    assert best["name"] == "tp_2"


def test_an_invalid_point_never_wins() -> None:
    fast = make_result(tp=2, speed=1000)
    for point in fast.points:
        point.verdict = "invalid"
    (best,) = best_points(points_table([make_result(), fast]), "output_tok_per_s", "higher").to_dict("records")
    assert best["name"] == "tp_1"


@pytest.mark.parametrize(
    ("changes", "column"),
    [
        ({"gpu": "NVIDIA H200"}, "device"),
        ({"engine": {"vllm_version": "0.27.0"}}, "vllm_version"),
        ({"engine": {"dtype": "bfloat16"}}, "dtype"),
        ({"engine": {"quantization": "fp8"}}, "quantization"),
        ({"config": {"model": "another/model"}}, "model"),
        ({"config": {"max_tokens": 64}}, "max_tokens"),
        ({"config": {"distributed_executor_backend": "external_launcher"}}, "under_torchrun"),
        ({"engine": {"enforce_eager": True}}, "enforce_eager"),
    ],
)
def test_unlike_things_are_never_ranked_together(changes: dict[str, object], column: str) -> None:
    table = points_table([make_result(), make_result(tp=2, speed=500, **changes)])
    assert len(best_points(table, "output_tok_per_s", "higher")) == 2
    assert column in group_differences(table)
    assert scaling_table(table)["num_devices"].tolist() == scaling_table(table)["baseline_devices"].tolist()


def test_like_things_are_one_group() -> None:
    table = points_table([make_result(), make_result(tp=2, engine={"executor": "mp"})])
    assert set(table["group"]) == {1}
    assert group_differences(table) == {}


def test_scaling_is_judged_at_equal_global_batch_size() -> None:
    one = make_result(batch_sizes=(4, 8))
    two = make_result(dp=2, batch_sizes=(4, 8))
    table = scaling_table(points_table([one, two]))
    scaled = table[table["name"] == "dp_2"]
    # DP=2 at batch 4 is 8 requests; its batch of 8 is 16, which the baseline did not measure.
    assert scaled["global_batch_size"].tolist() == [8]
    assert scaled["speedup"].tolist() == pytest.approx([1.0])
    assert scaled["scaling_efficiency"].tolist() == pytest.approx([0.5])
    assert set(table["baseline"]) == {"tp_1"}


def test_the_csv_has_one_header_row_and_empty_cells_for_the_unknown(tmp_path: Path) -> None:
    result = make_result()
    result.points.append(Point(64, 512, 128, "oom", "out of memory"))
    path = tmp_path / "results.csv"
    write_csv(points_table([result]), path)
    table = pd.read_csv(path)
    assert len(table) == 4
    assert table["status"].tolist() == ["ok", "ok", "ok", "oom"]
    assert table["output_tok_per_s"].isna().tolist() == [False, False, False, True]
    assert table["output_tok_per_s"].dtype == float


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx"])
def test_no_cell_is_a_formula_to_a_spreadsheet(tmp_path: Path, text: str) -> None:
    result = make_result(config={"model": text})
    path = tmp_path / "results.csv"
    write_csv(points_table([result]), path)
    assert set(pd.read_csv(path)["model"]) == {"'" + text}
