"""One queue run of one replica as arrays: its ramp, plateau and drain, and what the plateau does per second.

Needs numpy. Times are in seconds from the start of the run; entry i of every array belongs to request i.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batch_inference.core.statistics import ci95_half_width

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# A step or two lie between the last token of a request and the first token of the next one in its place.
_SHARE_OF_FULL = 0.95
_USUALLY = 0.9  # the usual number is not exceeded in this share of the moments before the drain
# In mean request lives: a shorter plateau is an accident.
_SHORTEST_PLATEAU = 0.25
# Means of stretches at least as long as a request lives are nearly independent; fewer of them say little.
BATCHES = 10
# Requests of a sample, for each that runs at once: so many for a plateau of BATCHES lives and its two ends.
LIVES = BATCHES + 2


@dataclass(frozen=True, slots=True)
class QueueRun:
    """The requests of one replica, all waiting from second 0; shape (requests,) each."""

    prompt_tokens: Integers
    output_tokens: Integers
    scheduled_s: Floats  # when it first got a place in a step
    first_token_s: Floats
    last_token_s: Floats
    batch_size: int  # the most that ran at once
    max_num_batched_tokens: int | None = None  # prompt and output tokens in one step; None: unknown
    scatter: float = 0.01  # standard deviation of the seconds of equal runs, as a share; from usual_scatter

    def __post_init__(self) -> None:
        arrays = (self.prompt_tokens, self.output_tokens, self.scheduled_s, self.first_token_s, self.last_token_s)
        if len({len(array) for array in arrays}) != 1 or not len(self.prompt_tokens):
            raise ValueError("a queue run needs at least one request, and arrays of equal length")

    @property
    def end_s(self) -> float:
        return float(self.last_token_s.max())

    @property
    def mean_life_s(self) -> float:
        """From being scheduled to the last token."""
        return float((self.last_token_s - self.scheduled_s).mean())


def usual_scatter(device_kind: str | None, pipeline_parallel_size: int) -> float:
    """How much equal runs differ on such a machine, which one run cannot tell: TP and DP by 1 to 2 % on GPUs,
    pipeline stages by 4 to 12 % there, and everything by about 4 % on a CPU that does other work too."""
    if device_kind == "cpu":
        return 0.04
    return 0.05 if pipeline_parallel_size > 1 else 0.01


@dataclass(frozen=True, slots=True)
class Phases:
    """Ramp: 0 to ramp_end_s. Plateau: to drain_start_s; none if both are equal. Drain: to end_s."""

    ramp_end_s: float
    drain_start_s: float
    end_s: float

    @property
    def plateau_s(self) -> float:
        return self.drain_start_s - self.ramp_end_s

    @property
    def drain_s(self) -> float:
        return self.end_s - self.drain_start_s


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95 % interval, or without one if there is too little data."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class PlateauRates:
    """What one replica does per second of the plateau."""

    output_tokens: Interval
    prompt_tokens: Interval
    requests: Interval


def phases_of(run: QueueRun) -> Phases:
    """The ramp ends when nearly as many requests make tokens as usual while others wait: batch_size, unless
    prompts or the KV cache are the limit. The drain begins when the last request has been scheduled.

    Without a plateau (the sample never fills all places, or only for a moment) the ramp ends where the drain begins.
    """
    drain_start_s = float(run.scheduled_s.max())
    ramp_end_s = _first_full_s(run, drain_start_s)
    if drain_start_s - ramp_end_s < _SHORTEST_PLATEAU * run.mean_life_s:
        ramp_end_s = drain_start_s
    return Phases(ramp_end_s, drain_start_s, run.end_s)


def _first_full_s(run: QueueRun, until_s: float) -> float:
    times_s, running = _running(run.first_token_s, run.last_token_s)
    before = running[: np.searchsorted(times_s, until_s)]
    if not len(before) or before.max() < 1:
        return until_s
    usual = _SHARE_OF_FULL * np.quantile(before, _USUALLY)
    return float(times_s[(before >= usual).argmax()])


def _running(starts_s: Floats, ends_s: Floats) -> tuple[Floats, Integers]:
    """Moments in order, and how many requests run from each to the next."""
    times_s = np.concatenate([starts_s, ends_s])
    change = np.concatenate([np.ones(len(starts_s), dtype=np.int64), -np.ones(len(ends_s), dtype=np.int64)])
    # At the same moment, ends come first.
    order = np.lexsort((change, times_s))
    return times_s[order], np.cumsum(change[order])


def places_taken(run: QueueRun) -> int:
    """How many requests run at once while others wait: batch_size, or fewer if something else is the limit, and then
    the mean over the plateau."""
    _, running = _running(run.scheduled_s, run.last_token_s)
    phases = phases_of(run)
    if running.max() >= run.batch_size or phases.plateau_s <= 0:
        return run.batch_size
    lives_s = np.clip(run.last_token_s, phases.ramp_end_s, phases.drain_start_s) - np.clip(
        run.scheduled_s, phases.ramp_end_s, phases.drain_start_s
    )
    return max(1, math.ceil(float(lives_s.sum()) / phases.plateau_s))


def plateau_rates(run: QueueRun) -> PlateauRates | None:
    """By batch means if the plateau lasts BATCHES mean lives or more, otherwise without an interval."""
    phases = phases_of(run)
    if phases.plateau_s <= 0:
        return None
    batches = BATCHES if phases.plateau_s >= BATCHES * run.mean_life_s else 1
    edges_s = np.linspace(phases.ramp_end_s, phases.drain_start_s, batches + 1)
    # Output tokens come evenly from the first to the last; prompts are read from being scheduled to the first token.
    one = np.ones(len(run.prompt_tokens))
    return PlateauRates(
        _rate(done_by(edges_s, run.first_token_s, run.last_token_s, run.output_tokens), edges_s),
        _rate(done_by(edges_s, run.scheduled_s, run.first_token_s, run.prompt_tokens), edges_s),
        _rate(done_by(edges_s, run.scheduled_s, run.last_token_s, one), edges_s),
    )


def done_by(times_s: Floats, starts_s: Floats, ends_s: Floats, amounts: Floats | Integers) -> Floats:
    """How much is done by each of `times_s`, if amount i is done evenly between its start and its end."""
    lengths_s = np.maximum(ends_s - starts_s, 1e-9)
    speeds = amounts / lengths_s
    moments_s = np.concatenate([starts_s, starts_s + lengths_s])
    order = np.argsort(moments_s, kind="stable")
    moments_s = moments_s[order]
    speed = np.cumsum(np.concatenate([speeds, -speeds])[order])
    done = np.concatenate([[0.0], np.cumsum(speed[:-1] * np.diff(moments_s))])
    found: Floats = np.interp(times_s, moments_s, done)
    return found


def _rate(done: Floats, edges_s: Floats) -> Interval:
    batches = np.diff(done) / np.diff(edges_s)
    value = float(batches.mean())
    half_width = ci95_half_width(batches.tolist())
    return Interval(value) if half_width is None else Interval(value, value - half_width, value + half_width)
