"""Measured points in the form that a search takes (climb.py and race.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from batch_inference.core.climb import Tried, pooled_halves
from batch_inference.core.config import MIN_RUNS
from batch_inference.core.metrics import run_latencies_s
from batch_inference.core.results import Point, Result
from batch_inference.core.values import LATENCY_GOAL


class Limits(Protocol):
    """The flags of a search that are limits, in seconds; None if not given."""

    @property
    def max_latency_s(self) -> float | None: ...
    @property
    def max_ttft_s(self) -> float | None: ...
    @property
    def max_tpot_s(self) -> float | None: ...


def limits_of(asked: Limits) -> dict[str, float]:
    """Metric -> its upper limit."""
    most = {"latency": asked.max_latency_s, "ttft": asked.max_ttft_s, "tpot": asked.max_tpot_s}
    return {f"{name}_p99_s": value for name, value in most.items() if value is not None}


def tried_of(result: Result, points: Sequence[Point], goal: str, limits: Mapping[str, float]) -> list[Tried]:
    """For points of `result` that differ only in batch size and have their runs and their summary. `limits`:
    metric -> its upper limit; an unknown value keeps no limit."""
    halves = pooled_halves({point.batch_size: run_latencies_s(point) for point in points})
    found = []
    for point in points:
        value, half = _value(result, point, goal, halves[point.batch_size])
        excess = max((_over(point.summary.get(name), most) for name, most in limits.items()), default=0.0)
        fits = (point.summary.get("waves") or 1) <= 1
        own_half = _own_half(point, value)
        is_suspect = point.verdict == "suspect"
        found.append(Tried(point.batch_size, value, half, fits, excess, len(point.runs), own_half, is_suspect))
    return found


def _own_half(point: Point, value: float) -> float | None:
    """Of the interval in its summary, which is wider where the number of runs was not fixed. Two runs tell less than
    those of its neighbours."""
    mean_s, ci95_s = (point.summary.get(name) for name in ("latency_mean_s", "latency_ci95_s"))
    if point.workload is not None or len(point.runs) < MIN_RUNS or not mean_s or ci95_s is None:
        return None
    return value * ci95_s / mean_s


def _over(value: float | None, most: float) -> float:
    return math.inf if value is None else value / most


def _value(result: Result, point: Point, goal: str, relative: float) -> tuple[float, float]:
    """A value where higher is better, with the half width of its interval."""
    if point.workload is not None:
        return _value_of_job(result, point)
    batch_s, throughput = (point.summary[name] for name in ("latency_mean_s", "output_tok_per_s"))
    value = 1 / batch_s if batch_s and goal == LATENCY_GOAL else throughput or 0.0
    return value, value * relative


def _value_of_job(result: Result, point: Point) -> tuple[float, float]:
    """A single run of a queue already has an interval. A point that says nothing about the job is not an answer."""
    # Needs numpy, and is slow to import.
    from batch_inference.core.job_times import job_throughput

    found = job_throughput(result, point)
    if found is None:
        return 0.0, math.inf
    return found.value, math.inf if found.high is None else found.high - found.value
