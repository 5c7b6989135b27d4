"""Result files to tables: columns, groups of like things, CSV."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from batch_inference.analyze import sources
from batch_inference.analyze.exports import write_results_csv
from batch_inference.analyze.sources import load_settings
from batch_inference.analyze.tables import (
    GROUP_BY,
    TO_MENTION,
    differing,
    groups,
    load_setting,
    point_table,
    setting_labels,
)
from batch_inference.core.metrics import METRICS
from batch_inference.core.result_file import ResultFileError
from batch_inference.core.results import EngineInfo, Environment, Failure, Point, Result
from builders import make_point, make_result, make_sweep, save_all


@pytest.fixture
def table(tmp_path: Path) -> Any:
    def build(results: Sequence[Result]) -> pd.DataFrame:
        return point_table([load_setting(path) for path in save_all(results, tmp_path)])

    return build


# --- rows ---------------------------------------------------------------------------------------------------------


def test_there_is_one_row_per_point_with_settings_environment_and_metrics(table: Any) -> None:
    points = table(make_sweep([(1, 1, 1), (2, 1, 2)], batch_sizes=(1, 4), seq_lens=(8, 16)))
    assert len(points) == 8
    assert {metric.name for metric in METRICS} <= set(points.columns)
    assert set(points["timed_runs"]) == {3}
    assert {*GROUP_BY, *TO_MENTION, "tensor_parallel_size", "data_parallel_size", "python_version"} <= set(points)
    row = points[points["setting"] == "tp_2_dp_2"].iloc[1]
    assert (row["batch_size"], row["global_batch_size"], row["num_devices"]) == (4, 8, 4)
    assert (row["vllm_version"], row["device_name"], row["torch_version"]) == (
        "0.32.0",
        "NVIDIA H100 80GB HBM3",
        "2.13.0",
    )


def test_what_vllm_really_used_stands_in_place_of_what_was_asked(table: Any) -> None:
    row = table([make_result(points=[make_point()])]).iloc[0]
    assert (row["dtype"], row["max_model_len"]) == ("bfloat16", 4096)
    assert row["temperature"] == 0.8


def test_metrics_are_computed_again_and_not_believed(table: Any) -> None:
    result = make_result(points=[make_point(2, latencies_s=[1.0, 1.0])])
    result.points[0].summary = {"output_tok_per_s": 1e9}
    assert table([result])["output_tok_per_s"].tolist() == [64.0]


def test_smaller_settings_come_first_whatever_their_files_are_called(table: Any) -> None:
    points = table(make_sweep([(8, 1, 1), (1, 1, 1), (1, 2, 1)], batch_sizes=(1,)))
    assert points["setting"].tolist() == ["tp_1", "pp_2", "tp_8"]


def test_a_name_in_two_files_is_told_apart_by_the_file(tmp_path: Path) -> None:
    one, two = make_result(points=[make_point()]), make_result(points=[make_point()])
    paths = save_all([one], tmp_path) + save_all([two], tmp_path / "other")
    paths[1] = paths[1].rename(tmp_path / "again.json")
    settings = [load_setting(path) for path in paths]
    assert list(setting_labels(settings).values()) == ["tp_1 [tp_1_results]", "tp_1 [again]"]
    assert point_table(settings)["setting"].nunique() == 2


def test_points_asked_for_and_never_reached_are_counted(tmp_path: Path) -> None:
    config = {"batch_sizes": [1, 2, 4], "seq_lens": [8, 16]}
    result = make_result(points=[make_point(1, 8), make_point(2, 8, status="oom", runs=[])], config=config)
    setting = load_setting(save_all([result], tmp_path)[0])
    assert (setting.points_ok, setting.points_asked) == (1, 6)


def test_points_of_an_earlier_sweep_with_another_grid_count_as_asked_for(tmp_path: Path) -> None:
    points = [make_point(batch_size) for batch_size in (1, 2, 4)]
    (path,) = save_all([make_result(points=points, config={"batch_sizes": [4]})], tmp_path)
    setting = load_setting(path)
    assert (setting.asked, setting.points_ok, setting.points_asked) == ({(4, 64, 32, None, None)}, 3, 3)


def test_points_of_an_earlier_sweep_do_not_hide_what_a_later_one_never_reached(tmp_path: Path) -> None:
    points = [make_point(batch_size) for batch_size in (1, 2, 4, 8)]
    result = make_result(points=points, config={"batch_sizes": [8, 16, 32]}, status="partial")
    setting = load_setting(save_all([result], tmp_path)[0])
    assert (setting.points_ok, setting.points_asked, setting.is_interrupted) == (4, 6, True)


def test_whatever_is_missing_is_an_empty_cell(table: Any) -> None:
    result = make_result(points=[make_point()])
    result.engine, result.environment = EngineInfo(vllm_version="0.32.0"), Environment()
    row = table([result]).iloc[0]
    assert row[["device_name", "device_memory_gib", "host", "load_s", "weights_gib"]].isna().all()
    assert row["dtype"] == "auto"


def test_devices_of_two_kinds_in_one_setting_are_both_named(table: Any) -> None:
    devices = [{"name": "B", "memory_gib": 80}, {"name": "A", "memory_gib": 40}, {"name": "B"}, {"name": ""}]
    row = table([make_result(points=[make_point()], environment={"devices": devices})]).iloc[0]
    assert (row["device_name"], row["device_memory_gib"]) == ("A + B", 40)


def test_no_point_at_all_is_a_table_with_columns(table: Any) -> None:
    points = table([make_result(status="failed")])
    assert points.empty
    assert {"setting", "group", "output_tok_per_s", "reason"} <= set(points.columns)
    assert list(groups(points)) == []


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("engine", "weights_gib"), "much"),
        (("engine", "kv_cache_tokens"), "many"),
        (("points", 0, "batch_size"), 0),
        (("points", 0, "seq_len"), -8),
        (("points", 0, "verdict_reasons"), None),
        (("points", 0, "runs", 0, "memory"), 5),
        (("points", 0, "runs", 0, "counters"), {}),
        (("points", 0, "runs", 0, "output_tokens"), "32"),
        (("config", "data_parallel_size"), 10**400),
    ],
)
def test_a_value_that_cannot_be_used_names_the_file(tmp_path: Path, where: tuple[Any, ...], value: Any) -> None:
    (path,) = save_all([make_result(points=[make_point()])], tmp_path)
    document = json.loads(path.read_text())
    inner = document
    for step in where[:-1]:
        inner = inner[step]
    inner[where[-1]] = value
    path.write_text(json.dumps(document))
    with pytest.raises(ResultFileError, match=f"^{path}: "):
        load_setting(path)


# --- groups -------------------------------------------------------------------------------------------------------


UNLIKE: list[dict[str, Any]] = [
    {"environment": {"devices": [{"name": "NVIDIA A100"}]}},
    {"environment": {"device_kind": "cpu"}},
    {"environment": {"versions": {"vllm": "0.26.0"}}},
    {"engine": {"dtype": "float16"}},
    {"engine": {"quantization": "fp8"}},
    {"engine": {"load_format": "dummy"}},
    {"engine": {"runner": "GPUModelRunnerV2"}},
    {"engine": {"enforce_eager": True}},
    {"config": {"model": "other"}},
    {"config": {"temperature": 0.0}},
    {"config": {"distributed_executor_backend": "external_launcher"}},
]


@pytest.mark.parametrize("change", UNLIKE, ids=str)
def test_unlike_things_are_in_different_groups(table: Any, change: dict[str, Any]) -> None:
    faster = make_result("other", [make_point(latencies_s=[0.1, 0.1])], **change)
    points = table([make_result(points=[make_point()]), faster])
    assert [part["setting"].tolist() for _, part in groups(points)] == [["other"], ["tp_1"]]
    assert len(differing(points, GROUP_BY)) == 1


def test_points_of_unequal_output_length_are_unlike_even_in_one_file(table: Any) -> None:
    points = table([make_result(points=[make_point(), make_point(max_tokens=64)])])
    assert points["group"].tolist() == [1, 2]
    assert differing(points, GROUP_BY) == ["max_tokens"]


def test_one_process_and_many_belong_together_and_so_do_tp_pp_and_dp(table: Any) -> None:
    points = table(make_sweep([(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)]))
    assert set(points["executor"]) == {"uni", "mp"}
    assert set(points["group"]) == {1}


def test_a_difference_within_a_group_is_found(table: Any) -> None:
    other = make_result("b", [make_point()], config={"gpu_memory_utilization": 0.5, "engine_args": ["--x", "a b"]})
    points = table([make_result(points=[make_point()]), other])
    assert set(points["group"]) == {1}
    assert differing(points, TO_MENTION) == ["gpu_memory_utilization", "engine_args"]
    assert points["engine_args"].dropna().tolist() == ["--x 'a b'"]


def test_several_nodes_and_ray_are_ranked_with_one_and_said(table: Any) -> None:
    nodes = make_result("b", [make_point()], config={"nnodes": 2, "distributed_executor_backend": "mp"})
    ray = make_result("c", [make_point()], config={"distributed_executor_backend": "ray"})
    points = table([make_result(points=[make_point()]), nodes, ray])
    assert set(points["group"]) == {1}
    assert differing(points, TO_MENTION) == ["nnodes", "cluster"]


def test_the_share_that_each_device_of_a_cpu_got_is_no_difference(table: Any) -> None:
    other = make_result("b", [make_point()], engine={"gpu_memory_utilization": 0.4})
    points = table([make_result(points=[make_point()], engine={"gpu_memory_utilization": 0.8}), other])
    assert differing(points, TO_MENTION) == []


# --- CSV ----------------------------------------------------------------------------------------------------------


def test_the_csv_reads_back_as_the_same_table(table: Any, tmp_path: Path) -> None:
    points = table([*make_sweep([(1, 1, 1), (2, 1, 1)]), make_result("f", [Point(1, 9, 32, "oom", reason='a,"b"\nc')])])
    write_results_csv(points, tmp_path / "results.csv")
    back = pd.read_csv(tmp_path / "results.csv")
    assert list(back.columns) == list(points.columns)
    assert len(back) == len(points)
    for metric in METRICS:
        assert back[metric.name].tolist() == pytest.approx(points[metric.name].tolist(), nan_ok=True)
    assert back["reason"].dropna().tolist() == ['a,"b" c']
    assert back["batch_size"].dtype == "int64"
    assert back["quantization"].isna().all()


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", " =", "\r="])
def test_a_spreadsheet_finds_no_formula(tmp_path: Path, start: str) -> None:
    evil = f"{start}HYPERLINK(1)"
    point = Point(1, 8, 4, "error", reason=evil)
    result = make_result(evil, [point], config={"engine_args": [evil], evil: evil}, environment={"host": evil})
    path = tmp_path / "evil.json"
    save_all([result], tmp_path)[0].rename(path)
    write_results_csv(point_table([load_setting(path)]), tmp_path / "results.csv")
    back = pd.read_csv(tmp_path / "results.csv", dtype=str)
    for text in [*back.columns, *back.iloc[0].dropna()]:
        assert text.lstrip()[0] not in "=+-@\t"
    assert back["name"][0].startswith("'")


def test_negative_numbers_are_left_alone(table: Any, tmp_path: Path) -> None:
    points = table([make_result(points=[make_point()], config={"seed": -1})])
    write_results_csv(points, tmp_path / "results.csv")
    assert pd.read_csv(tmp_path / "results.csv")["seed"].tolist() == [-1]


def test_a_table_without_points_is_a_csv_with_a_header(table: Any, tmp_path: Path) -> None:
    write_results_csv(table([make_result(status="failed")]), tmp_path / "results.csv")
    assert "output_tok_per_s" in pd.read_csv(tmp_path / "results.csv").columns


def test_any_percentile_becomes_a_column(tmp_path: Path) -> None:
    (path,) = save_all([make_result(points=[make_point(latencies_s=[1.0, 2.0, 3.0])])], tmp_path)
    columns = load_setting(path, percent=75).columns
    assert [columns["latency_p75_s"], columns["ttft_p75_s"]] == [[pytest.approx(2.5)], [pytest.approx(0.25)]]
    assert "latency_p75_s" not in load_setting(path).columns


def test_groups_follow_the_columns_that_the_user_names(tmp_path: Path) -> None:
    results = [make_result(name, [make_point()], engine={"dtype": kind}) for name, kind in (("a", "x"), ("b", "y"))]
    settings = [load_setting(path) for path in save_all(results, tmp_path)]
    assert point_table(settings, ["model"])["group"].tolist() == [1, 1]
    assert point_table(settings, ["model", "dtype"])["group"].tolist() == [1, 2]
    assert point_table(settings, [])["group"].tolist() == [1, 1]
    with pytest.raises(KeyError, match="colour"):
        point_table(settings, ["colour"])


# --- what a setting says of itself ---------------------------------------------------------------------------------


def test_a_setting_counts_what_was_measured_and_names_what_was_not(tmp_path: Path) -> None:
    points = [make_point(1), make_point(2, verdict="invalid"), Point(4, 64, 32, "oom", reason="x")]
    setting = load_setting(save_all([make_result("tp_2", points, (2, 1, 1))], tmp_path)[0])
    assert (setting.points_ok, setting.num_points, setting.points_asked) == (2, 3, 3)
    assert (setting.name, setting.num_devices, setting.load_s, setting.failure) == ("tp_2", 2, 40.0, None)
    assert setting.columns["timed_runs"] == [3, 3, 0]
    assert setting.columns["memory_scope"] == ["device", "device", None]
    assert setting.columns["reason"] == [None, None, "x"]
    failed = make_result("tp_8", status="failed", failure=Failure("oom_load", "no room"))
    failed.engine = None
    setting = load_setting(save_all([failed], tmp_path)[0])
    assert (setting.failure, setting.load_s, setting.points_ok) == ("no room", None, 0)


def test_a_failed_point_has_no_percentile_though_it_has_runs(tmp_path: Path) -> None:
    points = [make_point(1, latencies_s=[1.0, 2.0]), make_point(2, status="error", verdict=None)]
    columns = load_setting(save_all([make_result(points=points)], tmp_path)[0], percent=75).columns
    assert columns["latency_p75_s"] == [1.75, None]
    assert columns["latency_p99_s"] == [pytest.approx(1.99), None]


def test_each_point_has_the_columns_of_the_engine_that_measured_it(table: Any) -> None:
    result = make_result(points=[make_point(1), make_point(2), make_point(4)], engine={"max_num_seqs": 64})
    result.earlier_engines = [
        EngineInfo("0.32.0", max_num_seqs=16, block_size=32), EngineInfo("0.32.0", max_num_seqs=32),
    ]  # fmt: skip
    result.points[0].engine, result.points[1].engine = 0, 1
    points = table([result])
    assert points["max_num_seqs"].tolist() == [16, 32, 64]
    assert points["block_size"].dropna().tolist() == [32]
    # What all have alike is that of the file.
    assert set(points["model"]) == {"meta-llama/Llama-2-7b-chat-hf"}


def test_a_setting_is_limited_by_its_smallest_device(table: Any) -> None:
    devices = [{"name": "A", "memory_gib": 80, "power_limit_w": 350}, {"name": "A", "memory_gib": 40}]
    row = table([make_result(points=[make_point()], environment={"devices": devices})]).iloc[0]
    assert (row["device_memory_gib"], row["power_limit_w"]) == (40, 350)


def test_the_global_batch_is_that_of_all_replicas_and_devices_are_tp_times_pp_times_dp(table: Any) -> None:
    points = table([make_result("x", [make_point(3, replicas=4)], (2, 3, 4))])
    row = points.iloc[0]
    assert (row["batch_size"], row["global_batch_size"], row["num_devices"]) == (3, 12, 24)


@pytest.mark.slow
def test_many_files_are_read_on_several_cores_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = save_all([make_result(f"s{number}", [make_point()]) for number in range(6)], tmp_path)
    paths[3].write_text("{")
    alone = load_settings(paths)
    monkeypatch.setattr(sources, "_FILES_OF_A_CORE", 2)
    together = load_settings(paths)
    assert [type(found) for found in together] == [type(found) for found in alone]
    assert str(together[3]) == str(alone[3])
    assert together[4] == alone[4]


@pytest.mark.parametrize(
    ("cores", "count"),
    [(["0"], "1"), (["0-3", "4-7"], "4"), (["0-1,8", "2"], "3"), (["what"], None), ([None], None)],
)
def test_devices_of_a_cpu_are_alike_only_with_as_many_cores(
    table: Any, cores: list[str | None], count: str | None
) -> None:
    """One engine on all cores is another device than one on a single core."""

    def on(name: str, listed: Sequence[str | None]) -> Result:
        devices = [{"name": "AMD EPYC", "cores": one} for one in listed]
        return make_result(name, [make_point(1)], environment={"device_kind": "cpu", "devices": devices})

    points = table([on("tp_1", cores), on("tp_2", ["0-63"])])
    assert [None if pd.isna(value) else value for value in points["device_cores"]] == [count, "64"]
    assert differing(points, GROUP_BY) == ["device_cores"]
