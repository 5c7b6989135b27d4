"""Results -> one tidy table, one row per point; unlike things get different groups and are never ranked together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from batch_inference.metrics import summarise
from batch_inference.results import Point, Result, ResultFileError, load_result

CONFIG_COLUMNS = (
    "model", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "max_tokens", "dtype",
    "gpu_memory_utilization", "temperature", "top_p", "seed",
)  # fmt: skip
ENGINE_COLUMNS = (
    "executor", "runner", "enforce_eager", "quantization", "kv_cache_dtype", "max_model_len", "max_num_seqs",
    "max_num_batched_tokens", "async_scheduling", "load_format", "cudagraph_mode",
)  # fmt: skip
ENVIRONMENT_COLUMNS = ("device_kind", "driver_version", "python_version", "host", "git_commit", "started_at")
# Points are ranked against each other only where all of these agree.
GROUP_COLUMNS = (
    "model", "device", "vllm_version", "dtype", "quantization", "kv_cache_dtype", "load_format", "enforce_eager",
    "runner", "under_torchrun", "max_tokens", "temperature", "top_p",
)  # fmt: skip
# A cell that begins like this is a formula to a spreadsheet.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def find_results(path: Path) -> tuple[list[Result], list[str]]:
    """The results of a file or of the JSON files of a folder, and one line for each file that is none."""
    files = sorted(file for file in path.glob("*.json") if file.is_file()) if path.is_dir() else [path]
    results, errors = [], []
    for file in files:
        try:
            results.append(load_result(file))
        except ResultFileError as error:
            errors.append(str(error))
    results.sort(key=lambda result: (result.num_devices, result.name))
    return results, errors


def points_table(results: Sequence[Result]) -> pd.DataFrame:
    """One row per point of every result: setting, environment, metrics (computed again), and its group."""
    rows = [_row(result, point) for result in results for point in result.points]
    table = pd.DataFrame(rows, columns=None if rows else ["name", "status"])
    if rows:
        table["group"] = _group_numbers(table)
    return table


def _row(result: Result, point: Point) -> dict[str, Any]:
    engine, environment = result.engine, result.environment
    return {
        "name": result.name,
        "batch_size": point.batch_size,
        "global_batch_size": point.batch_size * result.data_parallel_size,
        "seq_len": point.seq_len,
        "num_devices": result.num_devices,
        **{name: result.config.get(name) for name in CONFIG_COLUMNS},
        # What vLLM made of it, where it is known.
        "dtype": engine.get("dtype") or result.config.get("dtype"),
        **{name: engine.get(name) for name in ENGINE_COLUMNS},
        "under_torchrun": result.config.get("distributed_executor_backend") == "external_launcher",
        "vllm_version": engine.get("vllm_version") or environment.get("versions", {}).get("vllm"),
        "device": _device_name(result),
        **{name: environment.get(name) for name in ENVIRONMENT_COLUMNS},
        "engine_args": " ".join(result.config.get("engine_args") or []),
        "status": point.status,
        "reason": point.reason,
        "verdict": point.verdict,
        "verdict_reasons": "; ".join(point.verdict_reasons) or None,
        "num_runs": len(point.runs),
        **summarise(result, point),
    }


def _device_name(result: Result) -> str | None:
    names = {device["name"] for device in result.environment.get("devices") or []}
    return " + ".join(sorted(names)) or None


def measured_on(point: pd.Series) -> str:
    """What a point was measured on, in a line: model, output tokens, device, vLLM."""
    model = Path(str(point["model"])).name
    what = f"{model}, {point['dtype']}, {point['max_tokens']} output tokens"
    return f"{what} · {point['device']} · vLLM {point['vllm_version']}"


def _group_numbers(table: pd.DataFrame) -> pd.Series:
    """1, 2, ... in the order of appearance. An unknown is a value of its own, like to nothing else."""
    keys = table[list(GROUP_COLUMNS)].astype(object).map(repr).apply(tuple, axis=1)
    return pd.Series(pd.factorize(keys)[0] + 1, index=table.index)


def group_differences(table: pd.DataFrame) -> dict[str, list[str]]:
    """The columns in which the groups differ, with the value of each group in turn."""
    first = table.drop_duplicates("group").sort_values("group")
    return {
        name: [str(value) for value in first[name]] for name in GROUP_COLUMNS if first[name].map(repr).nunique() > 1
    }


def measured(table: pd.DataFrame) -> pd.DataFrame:
    """The points that have numbers."""
    return table[table["status"] == "ok"]


def rankable(table: pd.DataFrame) -> pd.DataFrame:
    """The points that may win: measured, and not invalid."""
    return table[(table["status"] == "ok") & (table["verdict"] != "invalid")]


def best_points(table: pd.DataFrame, metric: str, better: str) -> pd.DataFrame:
    """The best point of each group and length by one metric."""
    known = rankable(table).dropna(subset=[metric])
    if known.empty:
        return known
    by = known.groupby(["group", "seq_len"])[metric]
    return known.loc[by.idxmax() if better == "higher" else by.idxmin()]


def scaling_table(table: pd.DataFrame) -> pd.DataFrame:
    """Speed-up and scaling efficiency of every point against its group's baseline at the same length and total batch.

    The baseline of a group is its setting with the fewest devices. speedup = throughput / baseline throughput;
    efficiency = speedup x baseline devices / devices. Points that the baseline has no partner for are left out.
    """
    points = rankable(table)
    fewest_first = points.sort_values("num_devices", kind="stable")
    baseline_names = fewest_first.groupby("group")["name"].first()
    baseline = points[points["name"] == points["group"].map(baseline_names)]
    where = ["group", "seq_len", "global_batch_size"]
    baseline = baseline[[*where, "name", "num_devices", "output_tok_per_s"]].rename(
        columns={"name": "baseline", "num_devices": "baseline_devices", "output_tok_per_s": "baseline_tok_per_s"}
    )
    merged = points.merge(baseline, on=where)
    speedup = merged["output_tok_per_s"] / merged["baseline_tok_per_s"]
    efficiency = speedup * merged["baseline_devices"] / merged["num_devices"]
    return merged.assign(speedup=speedup, scaling_efficiency=efficiency)


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """One header row, empty cells for unknown numbers, no cell that a spreadsheet would take for a formula."""
    safe = table.copy()
    for name in safe.columns[[not pd.api.types.is_numeric_dtype(kind) for kind in safe.dtypes]]:
        safe[name] = safe[name].map(_without_formula)
    safe.to_csv(path, index=False)


def _without_formula(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA_STARTS) else value
