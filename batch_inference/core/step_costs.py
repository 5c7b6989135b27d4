"""What a step of the engine costs, fitted to a queue run: its seconds are the sum over the parts of its work
(queue_simulation.py) of the part times its cost.

Needs numpy.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from batch_inference.core.queue_runs import Floats, Integers, QueueRun, done_by, phases_of
from batch_inference.core.queue_simulation import (
    CONTEXT,
    DECODE,
    PROMPT,
    READING,
    STEPS,
    USUAL_LAG,
    WORK,
    simulate_work,
)

Columns = tuple[int, ...]
_ALWAYS = (STEPS, PROMPT, DECODE)
_ROUNDS, _PASSES = 3, 100
_SHORTEST_STEP_S = 1e-4
# How many steps one row of the fit spans: in fewer, it would matter in which of two steps a prompt was read.
_FEWEST_STEPS, _USUAL_STEPS = 4, 10
_ROWS_OF_A_PHASE, _MOST_ROWS = 12, 100
_FEWEST_ROWS = 12  # with fewer, no doubtful cost is tried
_LONGEST_LAG = 2
_LEAST_OF_USUAL = 0.3


@dataclass(frozen=True, slots=True)
class StepCosts:
    per_step_s: float
    per_prompt_token_s: float
    per_decode_s: float
    per_context_token_s: float
    per_reading_step_s: float  # added for a step that reads prompts, which may not be replayed as a graph
    lag_steps: int = USUAL_LAG  # steps for which a place stays empty

    @classmethod
    def of(cls, costs: Floats, lag_steps: int) -> StepCosts:
        """From costs of shape (5,), in the order of the columns of a work array."""
        return cls(costs[STEPS], costs[PROMPT], costs[DECODE], costs[CONTEXT], costs[READING], lag_steps)

    def seconds(self, work: Floats) -> Floats:
        """Seconds for work of shape (..., 5)."""
        found: Floats = work @ self.as_array()
        return found

    def as_array(self) -> Floats:
        return np.array(
            [
                self.per_step_s,
                self.per_prompt_token_s,
                self.per_decode_s,
                self.per_context_token_s,
                self.per_reading_step_s,
            ]
        )


@dataclass(frozen=True, slots=True)
class Simulated:
    """Seconds from the start; shape (requests,)."""

    scheduled_s: Floats
    first_token_s: Floats
    last_token_s: Floats
    total_s: float


def simulate(
    costs: StepCosts,
    prompt_tokens: Integers,
    output_tokens: Integers,
    batch_size: int,
    max_num_batched_tokens: int | None,
) -> Simulated:
    """All requests wait from second 0, in the order of the arrays."""
    queue = simulate_work(prompt_tokens, output_tokens, batch_size, max_num_batched_tokens, costs.lag_steps)
    ends_s = np.cumsum(costs.seconds(queue.work))
    starts_s = np.concatenate([[0.0], ends_s[:-1]])
    return Simulated(starts_s[queue.scheduled], ends_s[queue.first], ends_s[queue.last], float(ends_s[-1]))


@dataclass(frozen=True, slots=True)
class SeenWork:
    """What a run did and how long that took, in consecutive stretches of several steps each."""

    work: Floats  # (stretches, 5)
    ends_s: Floats  # (stretches,)
    # The number of the step, counted from the start, in which each request made its first and last token: (requests,)
    first_step: Floats
    last_step: Floats

    @property
    def seconds(self) -> Floats:
        return np.diff(self.ends_s, prepend=0.0)


# --- what was seen ------------------------------------------------------------------------------------------------


def seen_work(run: QueueRun) -> SeenWork:
    """Split where a request's first or last token came, then joined into stretches of several steps each."""
    pieces = _pieces(run)
    steps = _fitted_steps(pieces, np.diff(pieces.edges_s))
    for _ in range(_ROUNDS):
        # What the requests leave open is filled in from the costs so far.
        work = _work(pieces, steps)
        starts, ends = _stretches(pieces, steps)
        costs = fit_costs(np.add.reduceat(work, starts), np.diff(pieces.edges_s[ends], prepend=0.0), _ALWAYS)
        steps = _fitted_steps(pieces, _steps_at(costs, pieces))
    starts, ends = _stretches(pieces, steps)
    so_far = _so_far(steps)
    work = np.add.reduceat(_work(pieces, steps), starts)
    return SeenWork(work, pieces.edges_s[ends], so_far[pieces.first], so_far[pieces.last])


@dataclass(frozen=True, slots=True)
class _Pieces:
    """A run between the moments of first and last tokens, which are ends of steps."""

    run: QueueRun
    edges_s: Floats  # (pieces + 1,)
    first: Integers  # (requests,): the edge at which each request made its first token
    last: Integers
    decoding: Floats  # (pieces,): requests that make a token in each step
    prompts: Floats  # (pieces,): prompt tokens read


def _pieces(run: QueueRun) -> _Pieces:
    times_s, number = np.unique(np.concatenate([[0.0], run.first_token_s, run.last_token_s]), return_inverse=True)
    # Moments of one step that rounding has separated are joined.
    is_other = np.diff(times_s, prepend=-1.0) > _SHORTEST_STEP_S
    edge_of = np.cumsum(is_other) - 1
    edges_s = times_s[np.append(np.flatnonzero(is_other)[1:] - 1, len(times_s) - 1)]
    first, last = np.split(edge_of[number[1:]], 2)
    count = len(edges_s)
    change = np.bincount(first, minlength=count) - np.bincount(last, minlength=count)
    return _Pieces(run, edges_s, first, last, np.cumsum(change)[:-1].astype(float), _prompts_read(run, edges_s, first))


def _prompts_read(run: QueueRun, edges_s: Floats, first: Integers) -> Floats:
    """Prompt tokens read between the edges: in the step that makes the first token or, if one step cannot hold the
    prompt, evenly from when it was scheduled."""
    is_long = run.prompt_tokens > (run.max_num_batched_tokens or np.inf)
    read = np.bincount(first, np.where(is_long, 0.0, run.prompt_tokens), len(edges_s))[1:].astype(float)
    if is_long.any():
        long_ones = (run.scheduled_s[is_long], run.first_token_s[is_long], run.prompt_tokens[is_long])
        read = read + np.diff(done_by(edges_s, *long_ones))
    return read


def _fitted_steps(pieces: _Pieces, guess: Floats) -> Floats:
    """Steps in each piece, from a guess of any scale. A decoding request makes one token in each step, so between
    its first and its last token there are as many steps as it made; where none decodes, as many as the prompts need.

    By expectation maximisation (Richardson 1972, Lucy 1974): each piece is multiplied by the mean, over the requests
    that decode in it, of tokens made / steps so far.
    """
    decodes = pieces.last > pieces.first
    first, last = pieces.first[decodes], pieces.last[decodes]
    made = (pieces.run.output_tokens[decodes] - 1).astype(float)
    count, is_known = len(pieces.edges_s), pieces.decoding > 0
    steps = np.where(is_known, guess, np.maximum(1.0, pieces.prompts / (pieces.run.max_num_batched_tokens or np.inf)))
    for _ in range(_PASSES if len(made) else 0):
        so_far = _so_far(steps)
        ratio = made / np.maximum(so_far[last] - so_far[first], 1e-9)
        total = np.cumsum(np.bincount(first, ratio, count) - np.bincount(last, ratio, count))[:-1]
        steps = np.where(is_known, steps * np.maximum(total, 0) / np.maximum(pieces.decoding, 1), steps)
    return steps


def _so_far(steps: Floats) -> Floats:
    return np.concatenate([[0.0], np.cumsum(steps)])


def _steps_at(costs: Floats, pieces: _Pieces) -> Floats:
    """Steps in each piece if its seconds followed these costs; ignores context, and gives at least half a step."""
    left_s = np.diff(pieces.edges_s) - costs[PROMPT] * pieces.prompts
    steps: Floats = np.maximum(left_s / np.maximum(costs[STEPS] + costs[DECODE] * pieces.decoding, 1e-9), 0.5)
    return steps


def _work(pieces: _Pieces, steps: Floats) -> Floats:
    """Of each piece: shape (pieces, 5)."""
    run, so_far, count = pieces.run, _so_far(steps), len(pieces.edges_s)
    # A request that made its first token in step f attends in step t to its prompt and t - f tokens.
    offset = run.prompt_tokens - so_far[pieces.first]
    offsets = np.cumsum(np.bincount(pieces.first, offset, count) - np.bincount(pieces.last, offset, count))[:-1]
    context = (offsets + pieces.decoding * (so_far[:-1] + so_far[1:]) / 2) * steps
    chunks = np.ceil(pieces.prompts / (run.max_num_batched_tokens or np.inf))
    reading = np.minimum(steps, np.maximum(chunks, pieces.prompts > 0))
    return np.stack([steps, pieces.prompts, pieces.decoding * steps, context, reading], axis=1)


def _stretches(pieces: _Pieces, steps: Floats) -> tuple[Integers, Integers]:
    """Pieces at which stretches of enough steps start, and edges at which they end. A short phase gets shorter ones, so
    that it is seen."""
    phases = phases_of(pieces.run)
    phase_starts = np.searchsorted(pieces.edges_s, (phases.ramp_end_s, phases.drain_start_s))
    longest = max(_USUAL_STEPS, steps.sum() / _MOST_ROWS)
    starts = []
    for start, end in itertools.pairwise(np.unique([0, *phase_starts, len(steps)]).tolist()):
        so_far = np.cumsum(steps[start:end])
        length = np.clip(so_far[-1] / _ROWS_OF_A_PHASE, _FEWEST_STEPS, longest)
        number = np.floor((so_far - steps[start:end] / 2) / length).astype(int)
        starts.append(start + np.flatnonzero(np.diff(number, prepend=-1)))
    places = np.concatenate(starts)
    return places, np.append(places[1:], len(steps))


# --- the fit ------------------------------------------------------------------------------------------------------


def fit_costs(work: Floats, seconds: Floats, columns: Columns | None = None, power: float = 1.0) -> Floats:
    """Costs of shape (5,), none below 0, by least squares, for the given columns or for those that are worth it.

    The variance of a stretch is proportional to its seconds to this power: 1 for a sum of independent steps. The costs
    are scaled to reproduce the seconds of all stretches together.
    """
    costs = _non_negative(*_weighed(work, seconds, power), columns or columns_worth_it(work, seconds))[0]
    scaled: Floats = costs * (seconds.sum() / max(float(work.sum(axis=0) @ costs), 1e-12))
    return scaled


def columns_worth_it(work: Floats, seconds: Floats) -> Columns:
    """By Schwarz's criterion; few stretches support no cost beyond those that always exist."""
    rows, values = _weighed(work, seconds, 1.0)
    count = len(seconds)

    def score(columns: Columns) -> float:
        error = _non_negative(rows, values, columns)[1]
        return count * math.log(max(error, 1e-300)) + len(columns) * math.log(count)

    # At the start of a run all reading steps are full, so the cost of a step and that of its tokens look the same.
    read = int((work[:, READING] > 0).sum())
    optional = [column for column, seen in ((CONTEXT, count), (READING, read)) if seen > _FEWEST_ROWS]
    sizes = range(len(optional) + 1)
    choices = (_ALWAYS + more for size in sizes for more in itertools.combinations(optional, size))
    return min(choices, key=score)


def _weighed(work: Floats, seconds: Floats, power: float) -> tuple[Floats, Floats]:
    # A stretch with next to no seconds is not short by nature: its end was seen late or early. What steps
    # usually take is used as the minimum.
    usual_s = work[:, STEPS] * (seconds.sum() / max(float(work[:, STEPS].sum()), 1e-9))
    weights = np.maximum(seconds, _LEAST_OF_USUAL * usual_s) ** (-power / 2)
    return work * weights[:, None], seconds * weights


def _non_negative(rows: Floats, values: Floats, columns: Columns) -> tuple[Floats, float]:
    """The best choice of columns with no cost below 0, and its sum of squares: with five columns,
    trying all is simpler than any other method, and exact."""
    scale = np.sqrt((rows**2).sum(axis=0))
    scale[scale == 0] = 1
    products, right = (rows / scale).T @ (rows / scale), (rows / scale).T @ values
    best, least = np.zeros(WORK), float(values @ values)
    for size in range(1, len(columns) + 1):
        for chosen in itertools.combinations(columns, size):
            some = np.ix_(chosen, chosen)
            costs = np.linalg.lstsq(products[some], right[list(chosen)], rcond=1e-10)[0]
            error = float(values @ values - right[list(chosen)] @ costs)
            if (costs >= 0).all() and error < least:
                best, least = np.zeros(WORK), error
                best[list(chosen)] = costs
    return best / scale, max(least, 0.0)


def costs_of(run: QueueRun) -> StepCosts:
    seen = seen_work(run)
    return StepCosts.of(fit_costs(seen.work, seen.seconds), lag_of(run, seen))


def lag_of(run: QueueRun, seen: SeenWork) -> int:
    """Steps for which a place stays empty: the lag whose simulation has, between a last token and the first token of
    the next request in that place, as many steps as the run had."""
    if len(run.prompt_tokens) <= run.batch_size:
        return USUAL_LAG
    took = _steps_between_tokens(seen.last_step, seen.first_step, run.batch_size)
    off = []
    for lag in range(_LONGEST_LAG + 1):
        queue = simulate_work(
            run.prompt_tokens, run.output_tokens, run.batch_size, run.max_num_batched_tokens, lag_steps=lag
        )
        steps = np.cumsum(queue.work[:, STEPS])
        off.append(abs(_steps_between_tokens(steps[queue.last], steps[queue.first], run.batch_size) - took))
    return int(np.argmin(off))


def _steps_between_tokens(last: Floats, first: Floats, batch_size: int) -> float:
    """Median over the requests that took the place of another: there are as many as do not run at first."""
    later = np.sort(first)[batch_size:]
    return float(np.median(later - np.sort(last)[: len(later)]))
