"""Result files -> tidy tables: one row per point, groups of like things, the best of each, and the CSV."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from batch_inference.metrics import METRIC_BY_NAME, METRICS, summarise
from batch_inference.results import Point, Result, ResultFileError, load_result

Row = dict[str, Any]

# Points that differ in one of these measure different things: they are grouped, never ranked together.
GROUP_BY = (
    "model", "device_kind", "device_name", "vllm_version", "dtype", "quantization", "kv_cache_dtype", "load_format",
    "executor_class", "runner", "enforce_eager", "max_tokens", "temperature", "top_p",
)  # fmt: skip
# Within a group these may differ, but the reader must know.
TO_MENTION = (
    "host", "cpu_name", "power_limit_w", "driver_version", "torch_version", "git_commit", "seed",
    "num_runs", "target_ci", "max_runs", "max_num_seqs", "max_num_batched_tokens", "max_model_len",
    "gpu_memory_utilization", "block_size", "cudagraph_mode", "compilation_mode", "engine_args",
)  # fmt: skip
# What is asked for: the words of the summary -> the metric that decides.
GOALS = {
    "throughput": "output_tok_per_s",
    "per device": "output_tok_per_s_per_device",
    "latency": "latency_mean_s",
}
# How a file is written is no setting, and a point has its own batch_size and seq_len.
_NOT_IN_ROWS = {"output_file", "overwrite", "resume", "verbose", "dry_run", "batch_sizes", "seq_lens"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_FORMULA = re.compile(r"\s*[=+\-@]")


@dataclass(frozen=True)
class Setting:
    """One result file: where it lies, what it holds, and its points as rows."""

    path: Path
    result: Result
    rows: list[Row]

    @property
    def name(self) -> str:
        return plain(self.result.name)

    @property
    def points_asked(self) -> int:
        """Points of the grid; more may be there after a --resume with another grid."""
        config = self.result.config
        grid = [config.get(name) for name in ("batch_sizes", "seq_lens")]
        sizes = [len(values) if isinstance(values, list) else 0 for values in grid]
        return max(math.prod(sizes), len(self.result.points))

    @property
    def points_ok(self) -> int:
        return sum(point.status == "ok" for point in self.result.points)

    @property
    def load_s(self) -> float | None:
        return _least([_section(self.result.engine, "load_s").get("total_s")])

    @property
    def failure(self) -> str | None:
        """Why the setting has no engine; None for one that was measured."""
        if self.result.status != "failed":
            return None
        return plain(_section(self.result.engine, "failure").get("reason") or "no reason is given")


def load_setting(path: Path) -> Setting:
    """Read one result file. Raises ResultFileError naming the file and the reason."""
    try:
        result = load_result(path)
        return Setting(path, result, [_row(path, result, point) for point in result.points])
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ResultFileError(f"{path}: holds a value that this program cannot use ({reason})") from error


def plain(value: object) -> str:
    """Text from a file without what would move a cursor or cannot be encoded."""
    return _CONTROL.sub(" ", str(value)).encode("utf-8", "replace").decode()


# --- one point -> one row -----------------------------------------------------------------------------------------


def _row(path: Path, result: Result, point: Point) -> Row:
    identity = _identity(path, result, point)
    row = {**identity, **_settings(result, point), **_environment(result), **identity, **_numbers(result, point)}
    return {plain(name): plain(value) if isinstance(value, str) else value for name, value in row.items()}


def _identity(path: Path, result: Result, point: Point) -> Row:
    global_batch_size = point.batch_size * result.data_parallel_size
    for size in (global_batch_size, *point.key):
        if not 1 <= size < 2**53:
            raise ValueError(f"a point of size {size}")
    return {
        "file": path.name,
        "name": str(result.name),
        "batch_size": point.batch_size,
        "seq_len": point.seq_len,
        "max_tokens": point.max_tokens,
        "global_batch_size": global_batch_size,
        "num_devices": result.num_devices,
        "status": str(point.status),
        "reason": _text(point.reason),
        "verdict": _text(point.verdict),
        "verdict_reasons": "; ".join(map(str, point.verdict_reasons)) or None,
        "memory_scope": _text(point.runs[0].memory.get("scope")) if point.runs else None,
    }


def _settings(result: Result, point: Point) -> Row:
    """What was asked; where vLLM reports what it really used (dtype, max_model_len ...), that."""
    config, engine = result.config, result.engine_of(point)
    asked = {name: value for name, value in config.items() if name not in _NOT_IN_ROWS and _is_cell(value)}
    # On the CPU the engine's share of the memory is that of one device: what was asked for the setting is alike.
    reported = {name: value for name, value in engine.items() if name != "gpu_memory_utilization"}
    used = {name: value for name, value in reported.items() if _is_cell(value) and value is not None}
    phases = {f"load_{name}": value for name, value in _section(engine, "load_s").items() if _is_cell(value)}
    words = config.get("engine_args")
    executors = (config.get("distributed_executor_backend"), engine.get("executor"))
    return {
        **dict.fromkeys(GROUP_BY),
        **dict.fromkeys(TO_MENTION),
        **asked,
        **used,
        **phases,
        "engine_args": shlex.join(map(str, words)) if isinstance(words, list) and words else None,
        # Under torchrun vLLM runs another model runner and pipeline stages do not overlap.
        "executor_class": "torchrun" if "external_launcher" in executors else "local",
    }


def _environment(result: Result) -> Row:
    environment, versions = result.environment, _section(result.environment, "versions")
    devices = result.devices
    names = sorted({str(device["name"]) for device in devices if device.get("name")})
    plain_facts = (
        "started_at", "ended_at", "host", "platform", "python_version", "cpu_name", "driver_version", "git_commit",
        "git_dirty", "device_kind",
    )  # fmt: skip
    return {
        **{name: value if _is_cell(value := environment.get(name)) else None for name in plain_facts},
        "device_name": " + ".join(names) or None,
        "device_memory_gib": _least(device.get("memory_gib") for device in devices),
        "power_limit_w": _least(device.get("power_limit_w") for device in devices),
        "vllm_version": _text(versions.get("vllm") or result.engine.get("vllm_version")),
        **{f"{package}_version": _text(version) for package, version in versions.items() if package != "vllm"},
    }


def _numbers(result: Result, point: Point) -> Row:
    """The metrics, computed again from the raw runs: what a file says of itself is not trusted."""
    numbers = summarise(result, point)
    for name, value in numbers.items():
        if value is not None and not _is_number(value):
            raise ValueError(f"{name} is {value!r}, not a number")
    return dict(numbers)


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _is_cell(value: object) -> bool:
    return value is None or isinstance(value, (str, int, float))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def _least(values: Iterable[Any]) -> float | None:
    return min((value for value in values if _is_number(value)), default=None)


# --- the table of points ------------------------------------------------------------------------------------------


def point_table(settings: Sequence[Setting]) -> pd.DataFrame:
    """One row per point, smallest settings first; `setting` is unique per file, `group` numbers the like things."""
    ordered = sorted(settings, key=lambda setting: (setting.result.num_devices, setting.name, setting.path.name))
    labels = setting_labels(ordered)
    rows = [{"setting": labels[setting.path], **row} for setting in ordered for row in setting.rows]
    always = ["setting", "file", "status", "reason", "verdict", "verdict_reasons", *GROUP_BY, *TO_MENTION]
    numbers = ["batch_size", "seq_len", "global_batch_size", "num_devices", "device_memory_gib"]
    table = pd.DataFrame(rows) if rows else pd.DataFrame(columns=list(dict.fromkeys([*always, *numbers])))
    for metric in METRICS:
        table[metric.name] = table[metric.name].astype(float) if rows else pd.Series(dtype=float)
    # A category remembers the order of all settings, so that each keeps its colour in a part of the table.
    table["setting"] = pd.Categorical(table["setting"], categories=list(labels.values()))
    table.insert(1, "group", _group_numbers(table))
    return _with_scaling(table)


def setting_labels(settings: Sequence[Setting]) -> dict[Path, str]:
    """A unique name for each file: that of the setting, with the file's own where two settings share one."""
    counts = Counter(setting.name for setting in settings)
    return {
        setting.path: setting.name if counts[setting.name] == 1 else f"{setting.name} [{plain(setting.path.stem)}]"
        for setting in settings
    }


def _group_numbers(table: pd.DataFrame) -> list[int]:
    keys = list(zip(*(map(str, table[name]) for name in GROUP_BY), strict=True))
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys), start=1)}
    return [numbers[key] for key in keys]


def groups(table: pd.DataFrame) -> Iterator[tuple[int, pd.DataFrame]]:
    for number in sorted(table["group"].unique()):
        yield int(number), table[table["group"] == number]


def differing(table: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    """The columns in which the rows of the table are not all alike."""
    return [name for name in columns if table[name].map(str).nunique() > 1]


def believable(table: pd.DataFrame) -> pd.DataFrame:
    """The points that may win and may be a baseline: measured, and not invalid."""
    return table[(table["status"] == "ok") & (table["verdict"] != "invalid")]


def best_points(group: pd.DataFrame) -> list[tuple[int, str, dict[Hashable, Any]]]:
    """(seq_len, goal, row of the best point) of one group of like things."""
    found = []
    for seq_len, points in believable(group).groupby("seq_len"):
        for goal, name in GOALS.items():
            ascending = METRIC_BY_NAME[name].better == "lower"
            ranked = points.dropna(subset=name).sort_values(name, ascending=ascending, kind="stable")
            found += [(int(str(seq_len)), goal, row) for row in ranked.head(1).to_dict("records")]
    return found


def half_width(row: Mapping[Hashable, Any], metric: str) -> float | None:
    """Half width of the 95 % interval. Throughput is a fixed number of tokens over the mean latency, so that its
    relative interval is, to first order, that of the latency."""
    relative = row["latency_ci95_s"] / row["latency_mean_s"]
    return None if pd.isna(relative) else float(relative * row[metric])


def _with_scaling(table: pd.DataFrame) -> pd.DataFrame:
    """Adds `scaling_baseline` and `scaling_efficiency`: output throughput / (the baseline's x ratio of the device
    counts), at equal seq_len and global_batch_size; the baseline is the group's setting of the fewest devices."""
    baselines: dict[int, str] = {}
    reference: dict[tuple[Any, ...], tuple[float, int]] = {}
    for number, group in groups(table):
        points = believable(group)
        smallest = points[points["num_devices"] == points["num_devices"].min()]["setting"].astype(str)
        if smallest.empty:
            continue
        baselines[number] = str(smallest.value_counts(sort=False).idxmax())
        for row in points[points["setting"] == baselines[number]].to_dict("records"):
            key = (number, row["seq_len"], row["global_batch_size"])
            reference[key] = (row["output_tok_per_s"], row["num_devices"])
    keys = zip(table["group"], table["seq_len"], table["global_batch_size"], strict=True)
    found = [reference.get(key, (math.nan, 1)) for key in keys]
    expected = pd.Series([throughput / devices for throughput, devices in found], index=table.index, dtype=float)
    efficiency = table["output_tok_per_s"] / (expected * table["num_devices"].astype(float))
    return table.assign(scaling_baseline=table["group"].map(baselines), scaling_efficiency=efficiency)


# --- the CSV ------------------------------------------------------------------------------------------------------


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """One header row, an empty cell for unknown, no cell that a spreadsheet would run as a formula."""
    cells = table.astype({"setting": object}).convert_dtypes()
    for name in cells.columns:
        if not (pd.api.types.is_numeric_dtype(cells[name]) or pd.api.types.is_bool_dtype(cells[name])):
            cells[name] = cells[name].map(_guarded, na_action="ignore")
    cells.rename(columns=lambda name: _guarded(str(name))).to_csv(path, index=False)


def _guarded(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value
