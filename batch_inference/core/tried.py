"""What points say to a search: measured ones as climb.py and race.py take them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from batch_inference.core.climb import Tried, pooled_halves
from batch_inference.core.metrics import run_latencies_s
from batch_inference.core.results import Point
from batch_inference.core.values import LATENCY_GOAL


class Limits(Protocol):
    """The flags of a search that are limits, in seconds; None for none."""

    @property
    def max_latency_s(self) -> float | None: ...
    @property
    def max_ttft_s(self) -> float | None: ...
    @property
    def max_tpot_s(self) -> float | None: ...


def limits_of(asked: Limits) -> dict[str, float]:
    """Metric -> the most that it may be."""
    most = {"latency": asked.max_latency_s, "ttft": asked.max_ttft_s, "tpot": asked.max_tpot_s}
    return {f"{name}_p99_s": value for name, value in most.items() if value is not None}


def tried_of(points: Sequence[Point], goal: str, limits: Mapping[str, float]) -> list[Tried]:
    """Of points of one setting that differ in the batch size alone, and have their runs and their summary. `limits`:
    metric -> the most that it may be; an unknown number keeps none."""
    halves = pooled_halves({point.batch_size: run_latencies_s(point) for point in points})
    found = []
    for point in points:
        value, half = _value(point, goal, halves[point.batch_size])
        excess = max((_over(point.summary.get(name), most) for name, most in limits.items()), default=0.0)
        fits = (point.summary.get("waves") or 1) <= 1
        found.append(Tried(point.batch_size, value, half, fits, excess, len(point.runs)))
    return found


def _over(value: float | None, most: float) -> float:
    return math.inf if value is None else value / most


def _value(point: Point, goal: str, relative: float) -> tuple[float, float]:
    """The higher the better, with the half width of its interval. A run of a queue has that in itself."""
    summary = point.summary
    if goal == LATENCY_GOAL:
        value = 1 / (summary["latency_mean_s"] or math.inf)
        return value, value * relative
    plateau, half = summary.get("plateau_output_tok_per_s"), summary.get("plateau_ci95_tok_per_s")
    if plateau is not None:
        return plateau, half or 0.0
    value = summary["output_tok_per_s"] or 0.0
    return value, value * relative
