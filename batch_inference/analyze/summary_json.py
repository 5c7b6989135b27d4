"""summary.json: what the report says, for scripts. An unknown number is null."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from batch_inference.analyze.answers import Analysis, Part
from batch_inference.analyze.compare import PLACE, SetComparison, baseline_of
from batch_inference.analyze.decide import Choice, Goal
from batch_inference.analyze.tables import GROUP_BY, half_width, setting_labels

# History
#   1  first version
SUMMARY_VERSION = 1

_SCALING = [
    f"{prefix}{name}{end}"
    for prefix in ("", "weak_")
    for name in ("speedup", "scaling_efficiency")
    for end in ("", "_ci95")
]


def write_summary(analysis: Analysis, problems: Sequence[str], path: Path) -> None:
    """Raises OSError where it cannot be written."""
    # Without line breaks: with them Python's encoder takes ten times as long, which many points make seconds.
    path.write_text(json.dumps(summary(analysis, problems), allow_nan=False) + "\n", encoding="utf-8")


def summary(analysis: Analysis, problems: Sequence[str] = ()) -> dict[str, Any]:
    """Plain dicts, lists, text, numbers and None."""
    limits = analysis.question.limits
    return {
        "summary_version": SUMMARY_VERSION,
        "limits": {name: _plain(most) for name, most in limits.columns().items()},
        "device_hour_price": analysis.question.price,
        "unreadable": list(problems),
        "settings": _settings(analysis),
        "groups": [_group(part) for part in analysis.parts],
        "comparison": _comparison(analysis.comparison),
    }


def _settings(analysis: Analysis) -> list[dict[str, Any]]:
    labels = setting_labels(analysis.settings)
    names = ("num_devices", "status", "points_ok", "points_asked", "load_s", "failure")
    return [
        {"setting": labels[setting.path], "file": setting.path.name, **{name: getattr(setting, name) for name in names}}
        for setting in analysis.settings
    ]


def _group(part: Part) -> dict[str, Any]:
    first = part.points.iloc[0]
    front = part.points[part.points["pareto"].astype(bool)]
    scaled = part.points.dropna(subset=["speedup", "weak_speedup"], how="all")
    layouts = ("layout", "is_best", "output_tok_per_s", "ratio", "ratio_ci95", "p_value")
    return {
        "group": part.number,
        "is": {name: _plain(first[name]) for name in GROUP_BY if name not in part.mixed},
        "mixed": part.mixed,
        "best": [_choice(choice) for choice in part.choices],
        "tp_pp_or_dp": _records(part.layouts, (*PLACE, *layouts)),
        "scaling_baseline": baseline_of(part.points),
        "scaling": _records(scaled, (*PLACE, *_SCALING)),
        "pareto": _records(front, (*PLACE, "latency_mean_s", "output_tok_per_s_per_device")),
    }


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
    return {**_record(row, PLACE), "value": _plain(row[goal.column]), "ci95": half_width(row, goal.column)}


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
    return {name: _plain(row[name]) for name in names}


def _plain(value: Any) -> Any:
    """What json can write: no numpy type, and None for unknown."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if value is None or value is pd.NA or (isinstance(value, float) and not np.isfinite(value)) else value
