"""The answers for other programs: results.csv, every point with all its numbers; summary.json, what the report says."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from batch_inference.analyze.answers import Analysis, Group
from batch_inference.analyze.compare import PLACE, SetComparison, baseline_of
from batch_inference.analyze.decide import Choice, Goal
from batch_inference.analyze.jobs import JobAnswer, JobRow
from batch_inference.analyze.tables import GROUP_BY, half_width, setting_labels
from batch_inference.analyze.to_use import ToUse
from batch_inference.core.files import open_regular, write_whole
from batch_inference.core.queue_runs import Interval
from batch_inference.core.text import plain

# --- results.csv --------------------------------------------------------------------------------------------------

_CHUNK = 10_000
_FORMULA = re.compile(r"\s*[=+\-@]")


def write_results_csv(table: pd.DataFrame, path: Path) -> None:
    """One header row, an empty cell for unknown, no cell that a spreadsheet would run as a formula."""
    cells = _typed(table)
    with open_regular(path, "w", encoding="utf-8", newline="") as file:
        file.write(",".join(map(_csv_text, cells.columns)) + "\n")
        for start in range(0, len(cells), _CHUNK):
            columns = [_csv_cells(cells[name].iloc[start : start + _CHUNK]) for name in cells.columns]
            file.writelines(",".join(row) + "\n" for row in zip(*columns, strict=True))


def _csv_cells(column: pd.Series[Any]) -> list[str]:
    """The cells of a column as text: each text once, where pandas would do it for every row, which took most of the
    time of a large analysis."""
    known = column.notna()
    values = column.tolist() if known.all() else column.astype(object).where(known, None).tolist()
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        # As a list of JSON, which is several times as fast as each number by itself.
        cells = msgspec.json.encode(values).decode()[1:-1].split(",")
        return cells if known.all() else ["" if cell == "null" else cell for cell in cells]
    texts = {value: "" if value is None else _csv_text(value) for value in set(values)}
    return [texts[value] for value in values]


def _csv_text(value: Any) -> str:
    text = f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else str(value)
    return '"' + text.replace('"', '""') + '"' if re.search('[,"\n\r]', text) else text


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """Whole numbers stay whole where others of their column are unknown."""
    return table.astype({"setting": object}).convert_dtypes()


# --- summary.json -------------------------------------------------------------------------------------------------

# History
#   1  first version
SUMMARY_VERSION = 1

_SCALING = [
    f"{prefix}{name}{end}"
    for prefix in ("", "weak_")
    for name in ("speedup", "scaling_efficiency")
    for end in ("", "_ci95")
]


def write_summary_json(analysis: Analysis, unreadable: Sequence[str], path: Path, to_use: ToUse | None = None) -> None:
    """Raises OSError where it cannot be written."""
    summary = {**_summary(analysis, unreadable), "to_use": _to_use(to_use)}
    write_whole(path, [msgspec.json.encode(summary).decode() + "\n"])


def _summary(analysis: Analysis, unreadable: Sequence[str]) -> dict[str, Any]:
    """Plain dicts, lists, text, numbers and None."""
    limits = analysis.question.limits
    return {
        "summary_version": SUMMARY_VERSION,
        "limits": {name: _json_value(most) for name, most in limits.columns().items()},
        "device_hour_price": analysis.question.price,
        "unreadable": list(unreadable),
        "notes": list(analysis.notes),
        "settings": _settings(analysis),
        "jobs": [_job(answer) for answer in analysis.jobs],
        "groups": [_group(group) for group in analysis.groups],
        "comparison": _comparison(analysis.comparison),
    }


def _to_use(found: ToUse | None) -> dict[str, Any] | None:
    if found is None:
        return None
    setting = found.setting
    return {
        "setting": found.chosen.name,
        "because": found.chosen.why,
        "max_num_seqs": setting.values["max_num_seqs"],
        "replicas": setting.replicas,
        "devices_per_replica": setting.devices_per_replica,
        "replicas_in_time": found.chosen.replicas,
        "files": [plain(file) for file in found.files],
    }


def _settings(analysis: Analysis) -> list[dict[str, Any]]:
    labels = setting_labels(analysis.settings)
    names = ("num_devices", "status", "points_ok", "points_asked", "load_s", "failure")
    return [
        {"setting": labels[setting.path], "file": setting.file, **{name: getattr(setting, name) for name in names}}
        for setting in analysis.settings
    ]


def _group(group: Group) -> dict[str, Any]:
    points = group.points
    first = points.iloc[0]
    front = points[points["pareto"].astype(bool)]
    scaled = points.dropna(subset=["speedup", "weak_speedup"], how="all")
    layouts = ("layout", "is_best", "output_tok_per_s", "ratio", "ratio_ci95", "p_value")
    return {
        "group": group.number,
        "is": {name: _json_value(first[name]) for name in GROUP_BY if name not in group.mixed},
        "mixed": group.mixed,
        "best": [_choice(choice) for choice in group.choices],
        "tp_pp_or_dp": _records(group.layouts[~group.layouts["is_alone"]], (*PLACE, *layouts)),
        "scaling_baseline": baseline_of(points),
        "scaling": _records(scaled, (*PLACE, *_SCALING)),
        "pareto": _records(front, (*PLACE, "latency_mean_s", "output_tok_per_s_per_device")),
    }


def _job(answer: JobAnswer) -> dict[str, Any]:
    deadline = answer.deadline
    return {
        "requests": answer.requests,
        "prompt_tokens": answer.prompt_tokens,
        "output_tokens": answer.output_tokens,
        "output_lengths": answer.output_lengths,
        "prefixes_are_cached": answer.is_cached,
        "fastest": [_job_row(row) for row in answer.rows],
        "ties": [row.setting for row in answer.ties],
        "not_forecast": answer.not_forecast,
        "deadline": deadline
        and {
            "setting": deadline.row.setting,
            "batch_size": deadline.row.point.batch_size,
            "replicas": deadline.replicas,
            "devices": deadline.devices,
            "hours": _interval(deadline.hours),
            "margin": deadline.margin,
        },
    }


def _job_row(row: JobRow) -> dict[str, Any]:
    point, found = row.point, row.forecast
    return {
        "setting": row.setting,
        "num_devices": row.num_devices,
        "batch_size": point.batch_size,
        "max_num_batched_tokens": point.tokens_per_step,
        "order": point.workload.order,
        "verdict": point.verdict,
        "sample_requests": point.requests,
        "hours": _interval(row.hours),
        "device_hours": _interval(row.device_hours),
        "cost": _interval(row.cost),
        "kwh": row.kwh,
        "output_tok_per_s": row.output_tok_per_s,
        "plateau_output_tok_per_s": _interval(found.output_tokens_per_s),
        "drain_s": _interval(found.drain_s),
        "imbalance": found.imbalance,
        "method": found.method,
        "batch_of_mean_lengths_over_plateau": row.grid_ratio,
    }


def _interval(interval: Interval | None) -> dict[str, float | None] | None:
    return None if interval is None else {"value": interval.value, "low": interval.low, "high": interval.high}


def _choice(choice: Choice) -> dict[str, Any]:
    goal = choice.goal
    return {
        "seq_len": choice.seq_len,
        "goal": goal.name,
        "metric": goal.column,
        "unit": goal.unit,
        "best": None if choice.best is None else _chosen(choice.best, goal),
        "ties": [_chosen(row, goal) for row in choice.ties],
    }


def _chosen(row: Mapping[Hashable, Any], goal: Goal) -> dict[str, Any]:
    return {**_record(row, PLACE), "value": _json_value(row[goal.column]), "ci95": half_width(row, goal.column)}


def _comparison(found: SetComparison | None) -> dict[str, Any] | None:
    if found is None:
        return None
    numbers = ("old_output_tok_per_s", "output_tok_per_s", "ratio", "ratio_ci95", "p_value", "p_holm", "change")
    return {
        "unlike": {name: {"old": old, "new": new} for name, (old, new) in found.unlike.items()},
        "only_new": found.only_new,
        "only_old": found.only_old,
        "repeated": found.repeated,
        "points": _records(found.points, (*PLACE, *numbers)),
    }


def _records(points: pd.DataFrame, names: Iterable[str]) -> list[dict[str, Any]]:
    names = list(names)
    columns = [points[name].astype(object).where(points[name].notna(), None).tolist() for name in names]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _record(row: Mapping[Hashable, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: _json_value(row[name]) for name in names}


def _json_value(value: Any) -> Any:
    """What json can write: no numpy type, and None for unknown."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if value is None or value is pd.NA or (isinstance(value, float) and not np.isfinite(value)) else value
