"""Result files -> one tidy table: a row per point, and groups of like things."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd

from batch_inference.analyze.queues import QueuePoint, queue_points
from batch_inference.core.config import LIMITS, Shape
from batch_inference.core.metrics import METRICS, Summary, run_latencies_s, summarise, tpots_s, ttfts_s
from batch_inference.core.result_file import load_result
from batch_inference.core.results import Answers, DeviceInfo, EngineInfo, Point, Result
from batch_inference.core.secrets import redact, redact_text, redact_value
from batch_inference.core.statistics import percentile
from batch_inference.core.text import NO_REASON, plain, short_name, with_budget

Row = dict[str, Any]

# Points that differ in one of these measure different things: they are grouped, never ranked together.
GROUP_BY = (
    "model", "device_kind", "device_name", "device_cores", "vllm_version", "dtype", "quantization", "kv_cache_dtype",
    "load_format", "executor_class", "multiprocess_engine", "runner", "enforce_eager", "speculative_method",
    "num_speculative_tokens", "max_tokens", "temperature", "top_p",
)  # fmt: skip
# Within a group these may differ, but the reader must know.
TO_MENTION = (
    "nnodes", "cluster", "host", "cpu_name", "power_limit_w", "driver_version", "torch_version", "git_commit", "seed",
    "num_runs", "target_ci", "max_runs", "max_num_seqs", "max_num_batched_tokens", "max_model_len",
    "gpu_memory_utilization", "block_size", "cudagraph_mode", "compilation_mode", "enable_expert_parallel",
    "decode_context_parallel_size", "chunked_prefill", "async_scheduling", "kv_connector", "engine_args",
)  # fmt: skip
# The durations that a limit can be set on.
DURATIONS: dict[str, Callable[[Point], list[float]]] = {"latency": run_latencies_s, "ttft": ttfts_s, "tpot": tpots_s}
_SOME_CORES = re.compile(r"\d{1,6}(-\d{1,6})?", re.ASCII)
# Characters; Excel takes 32,767.
_LONGEST_CELL = 32_000
# How a file is written is no setting, and a point has its own batch_size and seq_len.
_NOT_IN_ROWS = {
    "output_dir", "output_file", "overwrite", "resume", "verbose", "dry_run", "devices", "batch_sizes", "seq_lens",
    "goal", "to_beat", *LIMITS,
    "prompts_file", "output_lengths", "sample", "order", "skip_bad_lines", "workload_longest", "workload_hash",
    "compare_answers", "model_id",
}  # fmt: skip


_SIZES_ASKED = ("max_model_len", "max_num_seqs", "max_num_batched_tokens")


@dataclass(frozen=True)
class MeasuredSetting:
    """One result file: where it lies, what became of it, and its points as columns. Its raw runs are not kept: those of
    a large folder would not fit in memory."""

    path: Path
    file: str  # its name, below the folder that is analysed
    name: str
    num_devices: int
    status: str
    shapes: list[Shape]  # of its points: what tells them apart
    asked: frozenset[Shape]  # measured or not
    load_s: float | None
    failure: str | None  # why the setting has no engine; None for one that was measured
    shared: Row  # what is alike for all points
    columns: dict[str, list[Any]]  # what is each point's own, in the order of the points
    queues: list[QueuePoint]
    answers: Answers | None = None
    tried: frozenset[Shape] = frozenset()  # asked for or measured, in all files of the setting
    used_by_others: Sequence[str] = ()  # devices that another sweep used when this one began: which and who
    part_of: Path | None = None  # the newest file of this setting; None for that one itself
    sizes_asked: Mapping[str, int] = field(default_factory=dict)  # of the engine; `shared` has what became of them

    def largest_size(self, shape: Shape) -> int:
        """The largest batch size that was asked for or tried of this work, whatever became of it."""
        return max((one[0] for one in self.tried if one[1:4] == shape[1:4]), default=0)

    def batch_points(self) -> Iterator[tuple[int, int, int, float]]:
        """(batch size, prompt length, output tokens, output throughput) of those that were measured."""
        names = ("batch_size", "seq_len", "max_tokens", "output_tok_per_s", "verdict")
        for *sizes, throughput, verdict in zip(*map(self.columns.__getitem__, names), strict=True):
            if sizes[1] is not None and throughput is not None and verdict != "invalid":
                yield (*sizes, throughput)

    @property
    def points_ok(self) -> int:
        return self.columns.get("status", []).count("ok")

    @property
    def points_asked(self) -> int:
        """More than the sweep had where one with other points went before."""
        return len(self.asked.union(self.shapes))

    def without(self, others: Collection[Shape]) -> MeasuredSetting:
        """It without these points, as if they had not been asked of it."""
        keeps = [shape not in others for shape in self.shapes]
        columns = {name: list(itertools.compress(cells, keeps)) for name, cells in self.columns.items()}
        return replace(
            self,
            shapes=list(itertools.compress(self.shapes, keeps)),
            asked=self.asked.difference(others),
            columns=columns,
            queues=[point for point in self.queues if point.shape not in others],
        )

    @property
    def num_points(self) -> int:
        return len(self.shapes)

    @property
    def is_interrupted(self) -> bool:
        """Points are missing of which nothing is known: none has a reason."""
        return self.status == "partial" and self.num_points < self.points_asked


def load_setting(path: Path, percent: float = 99, top: Path | None = None) -> MeasuredSetting:
    """Read one result file, with percentile `percent` of the DURATIONS among its columns; named from the folder `top`.

    Raises ResultFileError naming the file and the reason.
    """
    result = load_result(path)
    load_s = result.engine.load_s.total_s if result.engine else None
    failure = result.failure.reason if result.failure else NO_REASON
    shared = _shared(result, result.engine)
    # Computed again from the raw runs: what a file says of itself is not trusted.
    summaries = [summarise(result, point) for point in result.points]
    return MeasuredSetting(
        path=path,
        file=(file := _cell(path.relative_to(top) if top else path.name)),
        name=_cell(result.name),
        num_devices=result.num_devices,
        status=result.status,
        shapes=[point.shape for point in result.points],
        asked=(asked := frozenset(result.config.points())),
        load_s=load_s,
        failure=_cell(redact_text(failure)) if result.status == "failed" else None,
        shared=shared,
        # Lists of numbers go from process to process much faster than a dict for each point.
        columns={
            **_identity(file, result),
            **_numbers(result, summaries, percent),
            **_of_earlier_engines(result, shared),
        },
        queues=list(queue_points(result, summaries)),
        answers=result.answers,
        tried=asked.union(point.shape for point in result.points),
        used_by_others=[_cell(redact_text(used)) for used in result.environment.used_by_others],
        sizes_asked={name: value for name in _SIZES_ASKED if isinstance(value := getattr(result.config, name), int)},
    )


# --- points -> columns --------------------------------------------------------------------------------------------


def _identity(file: str, result: Result) -> dict[str, list[Any]]:
    points, count = result.points, len(result.points)
    return {
        "file": [file] * count,
        "name": [_cell(result.name)] * count,
        "batch_size": [point.batch_size for point in points],
        "seq_len": [point.seq_len for point in points],
        "max_tokens": [point.max_tokens for point in points],
        "workload": [point.workload and " ".join(map(str, point.workload.as_tuple())) for point in points],
        "tokens_per_step": [point.max_num_batched_tokens for point in points],
        "global_batch_size": [point.batch_size * result.data_parallel_size for point in points],
        "num_devices": [result.num_devices] * count,
        "status": [point.status for point in points],
        "reason": [_text(point.reason and redact_text(point.reason)) for point in points],
        "verdict": [point.verdict for point in points],
        "verdict_reasons": [_text("; ".join(point.verdict_reasons) or None) for point in points],
        "timed_runs": [len(point.runs) for point in points],
        "memory_scope": [point.runs[0].memory.scope if point.runs else None for point in points],
    }


def _numbers(result: Result, summaries: Sequence[Summary], percent: float) -> dict[str, list[Any]]:
    columns = {metric.name: [summary[metric.name] for summary in summaries] for metric in METRICS}
    for prefix, durations_s in DURATIONS.items():
        name = percentile_column(prefix, percent)
        if name not in columns:
            columns[name] = [
                percentile(durations_s(point), percent) if point.status == "ok" else None for point in result.points
            ]
    return columns


def _of_earlier_engines(result: Result, shared: Row) -> dict[str, list[Any]]:
    """The columns in which points of an earlier sweep are not like the others: they had another engine."""
    earlier = [_shared(result, engine) for engine in result.earlier_engines]
    of_points = [shared if point.engine is None else earlier[point.engine] for point in result.points]
    names = dict.fromkeys(name for row in of_points for name, value in row.items() if shared.get(name) != value)
    names |= dict.fromkeys(name for row in of_points for name in shared if name not in row)
    return {name: [row.get(name) for row in of_points] for name in names}


def _shared(result: Result, engine: EngineInfo | None) -> Row:
    """What is alike for all points of an engine: settings and environment."""
    row = {**_settings(result, engine), **_environment(result)}
    return {name: _cell(value) if isinstance(value, str) else value for name, value in row.items()}


def _settings(result: Result, engine: EngineInfo | None) -> Row:
    """What was asked; where vLLM reports what it really used (dtype, max_model_len ...), that."""
    config = result.config
    asked = {
        item.name: value
        for item in dataclasses.fields(config)
        if item.name not in _NOT_IN_ROWS and _is_cell(value := getattr(config, item.name))
    }
    reported = msgspec.structs.asdict(engine) if engine else {}
    # On the CPU the engine's share of the memory is that of one device: what was asked for the setting is alike.
    used = {
        name: value
        for name, value in reported.items()
        if name != "gpu_memory_utilization" and value is not None and _is_cell(value)
    }
    phases = msgspec.structs.asdict(engine.load_s) if engine else {}
    executors = (config.distributed_executor_backend, engine.executor if engine else None)
    return {
        **dict.fromkeys(GROUP_BY),
        **dict.fromkeys(TO_MENTION),
        **asked,
        # Files of earlier versions do not have what vLLM made of these.
        "enable_expert_parallel": config.enable_expert_parallel,
        "decode_context_parallel_size": config.engine_number("--decode-context-parallel-size") or 1,
        **used,
        **{f"load_{name}": value for name, value in phases.items()},
        # Of today's kind: files of earlier versions have another hash of the same settings.
        "config_hash": config.settings_hash() if config.config_hash else None,
        # Files of earlier versions hide fewer secrets.
        "model": redact_value(config.model),
        "engine_args": shlex.join(redact(config.engine_args)) or None,
        # Under torchrun vLLM runs another model runner and pipeline stages do not overlap.
        "executor_class": "torchrun" if "external_launcher" in executors else "local",
        "cluster": "ray" if "ray" in executors else None,
    }


def _environment(result: Result) -> Row:
    environment = result.environment
    versions, devices = dict(environment.versions), environment.devices
    vllm_version = versions.pop("vllm", None) or (result.engine.vllm_version if result.engine else None)
    names = (
        "started_at", "ended_at", "host", "platform", "python_version", "cpu_name", "driver_version", "git_commit",
        "git_dirty", "device_kind",
    )  # fmt: skip
    return {
        **{name: getattr(environment, name) for name in names},
        "device_name": " + ".join(sorted({device.name for device in devices if device.name})) or None,
        # A word, so that it stays one beside GPUs, which have none.
        "device_cores": str(cores) if (cores := max(map(_count_of, devices), default=0)) else None,
        "device_memory_gib": _least(device.memory_gib for device in devices),
        "power_limit_w": _least(device.power_limit_w for device in devices),
        "vllm_version": vllm_version,
        **{_cell(f"{package}_version"): version for package, version in versions.items()},
    }


def _count_of(device: DeviceInfo) -> int:
    """Its cores, which are listed as vLLM does: 0-3,8 are five. What is no list has none: files may hold anything."""
    parts = [part for part in (device.cores or "").split(",") if _SOME_CORES.fullmatch(part)]
    ends = [list(map(int, part.split("-"))) for part in parts]
    return sum(abs(each[-1] - each[0]) + 1 for each in ends)


def percentile_column(prefix: str, percent: float) -> str:
    """ttft, 99 -> ttft_p99_s."""
    return f"{prefix}_p{percent:g}_s"


def _text(value: str | None) -> str | None:
    return None if value is None else _cell(value)


def _cell(text: object) -> str:
    """What a table can hold of it: readers of CSV give up at some length."""
    return short_name(plain(text), _LONGEST_CELL)


def _is_cell(value: object) -> bool:
    return value is None or isinstance(value, (str, int, float))


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


# --- the table of points ------------------------------------------------------------------------------------------


def point_table(settings: Sequence[MeasuredSetting], group_by: Sequence[str] = GROUP_BY) -> pd.DataFrame:
    """One row per point, smallest settings first; `setting` is unique per file, `group` numbers the like things.

    Raises KeyError with the name of a column in `group_by` that there is not.
    """
    ordered = sorted(settings, key=lambda setting: (setting.num_devices, setting.name, setting.file))
    labels = setting_labels(ordered)
    rows = any(setting.num_points for setting in ordered)
    table = pd.DataFrame(_columns(ordered, labels) if rows else {name: [] for name in _ALWAYS})
    for metric in METRICS:
        table[metric.name] = table[metric.name].astype(float) if rows else pd.Series(dtype=float)
    # A category remembers the order of all settings, so that each keeps its colour in a part of the table.
    names = dict.fromkeys([*labels.values(), *(name for name in table["setting"] if name not in labels.values())])
    table["setting"] = pd.Categorical(table["setting"], categories=list(names))
    table.insert(1, "group", _group_numbers(batch_points(table), group_by).reindex(table.index, fill_value=0))
    return table


_ALWAYS = dict.fromkeys([
    "setting", "file", "name", "status", "reason", "verdict", "verdict_reasons", *GROUP_BY, *TO_MENTION, "batch_size",
    "seq_len", "global_batch_size", "num_devices", "timed_runs", "device_memory_gib", "tensor_parallel_size",
    "pipeline_parallel_size", "data_parallel_size", "memory_scope", "workload", "tokens_per_step",
])  # fmt: skip


def _columns(settings: Sequence[MeasuredSetting], labels: Mapping[Path, str]) -> dict[str, list[Any]]:
    """Column by column, because as many dicts of a hundred entries as there are points take seconds and gigabytes."""
    own = dict.fromkeys(name for setting in settings for name in setting.columns)
    alike = dict.fromkeys(name for setting in settings if setting.num_points for name in setting.shared)
    columns: dict[str, list[Any]] = {name: [] for name in ("setting", *own, *alike)}
    for setting in settings:
        shared = {"setting": labels[setting.path], **setting.shared}
        for name, cells in columns.items():
            cells += setting.columns.get(name) or [shared.get(name)] * setting.num_points
    columns["setting"] = [
        name if budget is None else with_budget(name, budget)
        for name, budget in zip(columns["setting"], columns["tokens_per_step"], strict=True)
    ]
    return columns


def batch_points(table: pd.DataFrame) -> pd.DataFrame:
    """Without the queue points, which are ranked for their job alone, and have no lengths of their own."""
    points = table[table["workload"].isna()]
    whole = [name for name in ("seq_len", "max_tokens") if len(points) < len(table) and points[name].notna().all()]
    # In one piece again: each column is one of its own after that.
    return points.astype(dict.fromkeys(whole, int)).copy() if whole else points


def setting_labels(settings: Sequence[MeasuredSetting]) -> dict[Path, str]:
    """For each file the name of its setting; where several settings share a name, followed by that of its newest
    file."""
    whole = [setting for setting in settings if setting.part_of is None]
    counts = Counter(setting.name for setting in whole)
    labels = {
        setting.path: setting.name
        if counts[setting.name] == 1
        else f"{setting.name} [{setting.file.removesuffix('.json')}]"
        for setting in whole
    }
    return labels | {setting.path: labels[setting.part_of] for setting in settings if setting.part_of}


def _group_numbers(table: pd.DataFrame, group_by: Sequence[str]) -> pd.Series[int]:
    if not group_by or table.empty:
        return pd.Series(1, index=table.index)
    for name in group_by:
        table[name]  # KeyError names one column alone
    return table.groupby(list(group_by), dropna=False, sort=False, observed=True).ngroup() + 1


def groups(table: pd.DataFrame) -> Iterator[tuple[int, pd.DataFrame]]:
    for number in sorted(table["group"].unique()):
        yield int(number), table[table["group"] == number]


def differing(table: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    """The columns in which the rows of the table are not all alike."""
    return [name for name in columns if len(table[name].unique()) > 1 and table[name].map(str).nunique() > 1]


def believable(table: pd.DataFrame) -> pd.DataFrame:
    """The points that may win and may be a baseline: measured, and not invalid."""
    return table[(table["status"] == "ok") & (table["verdict"] != "invalid")]


def half_width(row: Mapping[Hashable, Any], metric: str) -> float | None:
    """Half width of the 95 % interval. Throughput is a fixed number of tokens over the mean latency, so that its
    relative interval is, to first order, that of the latency."""
    relative = row["latency_ci95_s"] / row["latency_mean_s"]
    return None if pd.isna(relative) else float(relative * row[metric])
