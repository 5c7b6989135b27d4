"""What a queue point shows: its runs as arrays, its plateau and its drain. Needs numpy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from batch_inference.core.forecast import BATCH_MEANS, FITTED_STEPS, JobLengths, forecast, too_small
from batch_inference.core.queue_runs import Interval, QueueRun, phases_of, plateau_rates, usual_scatter
from batch_inference.core.results import Point, Result, Run


@dataclass(frozen=True)
class Plateau:
    """All replicas of a point together, as the mean of its runs."""

    output_tok_per_s: Interval
    prompt_tok_per_s: float
    requests_per_s: float
    method: str  # how the interval was found


@dataclass(frozen=True)
class QueueSummary:
    """Seconds of the replica that takes longest, as the mean of the runs."""

    plateau: Plateau | None  # None if batch_size requests never ran on every replica for a while
    ramp_s: float
    drain_s: float


def runs_of(result: Result, point: Point) -> list[list[QueueRun]]:
    """The replicas of each run of a point."""
    engine = result.engine_of(point)
    budget = point.max_num_batched_tokens or (engine.max_num_batched_tokens if engine else None)
    scatter = usual_scatter(result.environment.device_kind, result.config.pipeline_parallel_size)
    return [
        [replace(replica, scatter=scatter) for replica in replicas_of(run, point.batch_size, budget)]
        for run in point.runs
    ]


def replicas_of(run: Run, batch_size: int, budget: int | None) -> list[QueueRun]:
    """`budget`: tokens per step, if known."""
    requests = run.requests
    arrival_s = np.array(requests.arrival_s)
    scheduled_s, first_s, last_s = (
        arrival_s + np.array(since) for since in (requests.queue_s, requests.ttft_s, requests.latency_s)
    )
    prompts, outputs = np.array(requests.prompt_tokens), np.array(requests.output_tokens)
    ends = np.cumsum([replica.requests or 0 for replica in run.replicas]).tolist()
    parts = (slice(start, end) for start, end in itertools.pairwise([0, *ends]) if end > start)
    return [
        QueueRun(prompts[part], outputs[part], scheduled_s[part], first_s[part], last_s[part], batch_size, budget)
        for part in parts
    ]


def summary_of(runs: Sequence[Sequence[QueueRun]]) -> QueueSummary:
    phases = [[phases_of(replica) for replica in run] for run in runs]
    plateaus = [_plateau(run) for run in runs]
    return QueueSummary(
        _mean_of([one for one in plateaus if one]) if all(plateaus) else None,
        fmean(max(one.ramp_end_s for one in run) for run in phases),
        fmean(max(one.drain_s for one in run) for run in phases),
    )


def _mean_of(plateaus: Sequence[Plateau]) -> Plateau:
    rates = [one.output_tok_per_s for one in plateaus]
    halves = [one.high - one.value for one in rates if one.high is not None]
    value = fmean(one.value for one in rates)
    # An error in one run may be in all of them, so more runs do not narrow the interval.
    half = max(halves) if len(halves) == len(rates) else None
    return Plateau(
        Interval(value) if half is None else Interval(value, value - half, value + half),
        fmean(one.prompt_tok_per_s for one in plateaus),
        fmean(one.requests_per_s for one in plateaus),
        plateaus[0].method,
    )


def _plateau(run: Sequence[QueueRun]) -> Plateau | None:
    """The plateau of replicas that run side by side."""
    rates = [plateau_rates(replica) for replica in run]
    known = [one for one in rates if one]
    if not known or len(known) < len(rates):
        return None
    value = sum(one.output_tokens.value for one in known)
    halves = [one.output_tokens.high - one.output_tokens.value for one in known if one.output_tokens.high is not None]
    if len(halves) == len(known):
        half, method = math.hypot(*halves), BATCH_MEANS
    else:
        half, method = value * _relative_by_fitted_steps(run), FITTED_STEPS
    return Plateau(
        Interval(value, value - half, value + half),
        sum(one.prompt_tokens.value for one in known),
        sum(one.requests.value for one in known),
        method,
    )


def _relative_by_fitted_steps(run: Sequence[QueueRun]) -> float:
    """Half width of the interval of the plateau's rate, as a share of it, from a forecast of the sample itself."""
    if too_small(run):
        return 1.0
    prompts, outputs, scheduled_s = (
        np.concatenate([getattr(replica, name) for replica in run])
        for name in ("prompt_tokens", "output_tokens", "scheduled_s")
    )
    order = np.argsort(scheduled_s, kind="stable")
    # For this very run: how another run would differ is not part of it.
    rate = forecast(
        [replace(replica, scatter=0.0) for replica in run], JobLengths(prompts[order], outputs[order])
    ).output_tokens_per_s
    return rate.high / rate.value - 1 if rate and rate.high is not None else 1.0
