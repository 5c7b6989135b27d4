"""The work of a job (see queue_simulation.py), computed from its lengths.

A short job is simulated. Of a long one only the beginning and the end are, with requests that represent all; what lies
between is arithmetic: all places are taken, and tokens add up. So a billion requests take no longer than a million.

Needs numpy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from batch_inference.core.queue_runs import Floats, Integers
from batch_inference.core.queue_simulation import CONTEXT, DECODE, PROMPT, READING, STEPS, WORK, simulate_work
from batch_inference.core.sharing import imbalance, shared_out

# How many replicas of a long job are simulated.
_SIMULATED_REPLICAS = 4


@dataclass(frozen=True, slots=True)
class JobLengths:
    """Lengths of a job in the order in which they run; shape (entries,) each."""

    prompt_tokens: Integers
    output_tokens: Integers | None  # None: chosen by the model, so unknown
    every: Floats | None = None  # how many requests each entry stands for; None: 1
    repeats: float = 1.0  # how often the whole list comes

    @property
    def weights(self) -> Floats:
        return np.ones(len(self.prompt_tokens)) if self.every is None else np.asarray(self.every, dtype=float)

    @property
    def requests(self) -> float:
        return float(self.weights.sum()) * self.repeats

    def thinned(self, most: int) -> JobLengths:
        """About `most` entries: of a longer job the last ones, each for itself, and some that represent all before."""
        count = len(self.prompt_tokens)
        if count <= most:
            return self
        first_last = count - most // 2
        kept = np.concatenate([np.arange(0, first_last, -(-2 * first_last // most)), np.arange(first_last, count)])
        # Each stands for the entries from itself to the next.
        every = np.add.reduceat(self.weights, kept)
        outputs = None if self.output_tokens is None else self.output_tokens[kept]
        return JobLengths(self.prompt_tokens[kept], outputs, every, self.repeats)


@dataclass(frozen=True, slots=True)
class Places:
    """How a replica runs its queue."""

    batch_size: int
    budget: int | None  # tokens in a step
    lag_steps: int


@dataclass(frozen=True, slots=True)
class JobWork:
    """Work of the simulated replicas: shape (replicas, 5) each."""

    whole: Floats
    drain: Floats  # from when no request waits
    plateau: Floats
    plateau_outputs: Floats  # (replicas,): tokens made in the plateau
    imbalance: float  # tokens of the fullest replica / mean of all replicas - 1


def job_work(job: JobLengths, places: Places, replicas: int, is_sorted: bool, most: int) -> JobWork:
    """For a job whose outputs are known or drawn; about `most` requests are simulated."""
    if job.output_tokens is None:
        raise ValueError("the work of a job needs known or drawn outputs")
    outputs = job.output_tokens
    if job.every is None and job.requests <= most:
        again = _repeated(len(outputs), job.repeats, is_sorted)
        return _all_simulated(job.prompt_tokens[again], outputs[again], places, replicas)
    simulated = min(replicas, _SIMULATED_REPLICAS)
    size = min(max(most // simulated, 4 * places.batch_size), math.ceil(job.requests / replicas))
    last = 2 * places.batch_size if is_sorted else max(2 * places.batch_size, size // 2)
    whole = _totals(job.prompt_tokens, outputs, job.weights * job.repeats / replicas)
    parts = []
    for replica in range(simulated):
        some = _stand_ins(job, replica, replicas, size, last)
        prompts, made = job.prompt_tokens[some], outputs[some]
        between = whole - _totals(prompts, made, np.ones(len(some)))
        parts.append(_with_more(_simulated(prompts, made, places), between, places))
    return _joined(parts, 0.0)


def _repeated(count: int, repeats: float, is_sorted: bool) -> Integers:
    """Entries of a job of `count` entries that is repeated, or of an evenly spread part of it."""
    places = np.arange(max(1, round(count * repeats)))
    return places % count if repeats > 1 and not is_sorted else (places / repeats).astype(np.int64).clip(max=count - 1)


def _all_simulated(prompts: Integers, outputs: Integers, places: Places, replicas: int) -> JobWork:
    if replicas == 1:
        return _joined([_simulated(prompts, outputs, places)], 0.0)
    shares = [np.array(some, dtype=np.int64) for some in shared_out(prompts.tolist(), outputs.tolist(), replicas)]
    tokens = [int((prompts[some] + outputs[some]).sum()) for some in shares]
    return _joined([_simulated(prompts[some], outputs[some], places) for some in shares], imbalance(tokens))


@dataclass(frozen=True, slots=True)
class _Part:
    """The work of one replica."""

    whole: Floats
    drain: Floats
    plateau: Floats
    plateau_outputs: float
    admitted: int  # in the plateau


def _joined(parts: list[_Part], share_imbalance: float) -> JobWork:
    return JobWork(
        np.array([part.whole for part in parts]),
        np.array([part.drain for part in parts]),
        np.array([part.plateau for part in parts]),
        np.array([part.plateau_outputs for part in parts]),
        share_imbalance,
    )


def _simulated(prompts: Integers, outputs: Integers, places: Places) -> _Part:
    """The plateau lasts from when the first batch_size requests have made a token to the last admission."""
    nothing = np.zeros(WORK)
    if not len(prompts):
        return _Part(nothing, nothing, nothing, 0.0, 0)
    queue = simulate_work(prompts, outputs, places.batch_size, places.budget, places.lag_steps)
    end = queue.drain_block
    start = int(queue.first[: places.batch_size].max()) + 1 if len(prompts) > places.batch_size else end
    plateau = queue.work[start:end].sum(axis=0)
    admitted = int(((queue.first >= start) & (queue.first < end)).sum())
    return _Part(
        queue.work.sum(axis=0), queue.work[end:].sum(axis=0), plateau, float(plateau[DECODE]) + admitted, admitted
    )


def _stand_ins(job: JobLengths, replica: int, replicas: int, size: int, last: int) -> Integers:
    """Entries, in order, to simulate one replica's queue with: its own share of the last ones, while each stands
    for itself, and before them an even spread of the rest."""
    count = len(job.prompt_tokens)
    thinned = np.flatnonzero(job.weights != 1)
    first_itself = int(thinned[-1]) + 1 if len(thinned) else 0
    own = np.arange(count - 1 - replica, first_itself - 1, -replicas)[:last][::-1]
    end = int(own[0]) if len(own) else count
    wanted = min(size - len(own), end)
    if wanted <= 0:
        return own
    spread = ((np.arange(wanted) + (replica + 0.5) / replicas) * (end / wanted)).astype(np.int64)
    return np.concatenate([np.minimum(spread, end - 1), own])


def _totals(prompts: Integers, outputs: Integers, weights: Floats) -> Floats:
    """Requests, prompt tokens, output tokens, and context tokens attended to."""
    decodes = np.maximum(outputs - 1, 0).astype(float)
    context = decodes * prompts + decodes * (decodes + 1) / 2
    return np.array([weights.sum(), weights @ prompts, weights @ outputs, weights @ context])


def _with_more(part: _Part, totals: Floats, places: Places) -> _Part:
    """The part with more requests in the middle of its plateau; `totals` are their sums."""
    requests, prompts, outputs, context = np.maximum(totals, 0.0).tolist()
    if requests <= 0:
        return part
    budget = places.budget or math.inf
    # Steps per request in which a place makes no token: its prompt is read, or the request before has just ended.
    empty, reading = 1 + places.lag_steps + prompts / requests / budget, 1.0
    if part.admitted:
        empty = float(part.plateau[STEPS] * places.batch_size - part.plateau[DECODE]) / part.admitted
        reading = float(part.plateau[READING] / part.plateau[STEPS])
    decodes = max(outputs - requests, 0.0)
    steps = max((decodes + empty * requests) / places.batch_size, (prompts + outputs) / budget)
    more = np.zeros(WORK)
    more[STEPS], more[PROMPT], more[DECODE], more[CONTEXT] = steps, prompts, decodes, context
    more[READING] = min(steps * reading, requests + prompts / budget)
    return _Part(
        part.whole + more,
        part.drain,
        part.plateau + more,
        part.plateau_outputs + outputs,
        part.admitted + int(requests),
    )
