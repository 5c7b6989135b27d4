"""From one measured sample of a job to the hours of the whole job, with a 95 % interval.

The job's work (job_work.py) follows from its lengths alone. The seconds are that work at the costs fitted to the
sample (step_costs.py), times the ratio of what the sample took to what its own simulation takes.

The interval covers five errors. The costs' own error comes from leaving out one stretch of the sample at a time
(delete-a-group jackknife; in a long plateau a stretch is a batch as long as a request lives, which is the method of
batch means). The others are what other weights of the stretches would have found, how far the simulation is from the
sample, that two equal runs never take the same time and, if the model chooses its output lengths, that they are drawn.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from batch_inference.core.job_work import JobLengths as JobLengths
from batch_inference.core.job_work import JobWork, Places, job_work
from batch_inference.core.queue_runs import (
    BATCHES,
    Floats,
    Integers,
    Interval,
    QueueRun,
    phases_of,
    places_taken,
)
from batch_inference.core.queue_simulation import READING, STEPS, SimulatedWork, simulate_work
from batch_inference.core.statistics import Z_95, t_quantile_95
from batch_inference.core.step_costs import StepCosts, columns_worth_it, fit_costs, lag_of, seen_work
from batch_inference.core.text import counted

BATCH_MEANS, FITTED_STEPS = "batch means", "fitted steps"
SORTED = ("longest-first", "shortest-first")

_GROUPS_OF_A_PHASE, _FEWEST_GROUPS, _MOST_GROUPS = 4, 4, 30
# A stretch is weighted by its seconds to this power: 1 fits independent steps, and the others show if the costs
# depend on the power, as they do if a step does not cost the sum of its parts.
_OTHER_POWERS = (0.0, 2.0)
# How many requests are simulated, over all replicas.
_SIMULATED = 100_000
# For drawn output lengths: how often, for how many requests, and from how many of the sample each.
_DRAWS = 16
_SIMULATED_OF_A_DRAW = 5_000
_LONGEST_DRAWN = 50_000
_NEAREST = 30
# For the noise: the fewest stretches that say anything, and how many costs were fitted to them.
_FEWEST_STRETCHES, _FITTED = 7, 3
_T_95 = t_quantile_95(_FEWEST_STRETCHES - 1)
# Two steps are alike if their parts differ by at most this share of the cost. If less than that share of the sample
# is like the job's plateau, the forecast is uncertain by as much.
_ALIKE, _ENOUGH_ALIKE, _UNSEEN = 0.4, 0.2, 0.15
# Half width: few requests run in a drain, so one step more or less, or the size of a graph, matters.
_DRAIN = 0.06
# Simulated and seen steps that read prompts may differ by this factor, as a logarithm.
_OTHER_READING = 0.4
# A job's means and longest may differ from the sample's by this factor, and this share of its tokens may lie beyond.
_FACTOR = 2.0
_MOST_BEYOND = 0.02


@dataclass(frozen=True, slots=True)
class Forecast:
    """For the whole job, on all its replicas together."""

    seconds: Interval
    output_tokens_per_s: Interval | None  # while all places are taken; None if they never are
    drain_s: Interval
    method: str
    replicas: int
    imbalance: float  # tokens of the fullest replica / mean of all replicas - 1
    first_done_s: float  # the replica that is done first; the last one is done after `seconds`
    equal_runs: float  # half width, as a share, of the part of the interval of `seconds` that no measurement narrows


@dataclass(frozen=True, slots=True)
class Noise:
    """How far the seconds of a stretch are from the cost of its work: standard deviations, as a share."""

    short: float  # of any stretch, however short
    of_a_second: float  # of a long one, times the square root of its seconds

    def of(self, seconds: float) -> float:
        return min(self.short, self.of_a_second / math.sqrt(max(seconds, 1e-9)))


@dataclass(frozen=True, slots=True)
class Measured:
    """What the runs of one sample say about any job: one run per replica, or several such sets one after another."""

    runs: Sequence[QueueRun]
    costs: StepCosts
    factors: Floats  # (runs,): what each took / what its simulation takes
    left_out: Floats  # (groups, 5): costs, fitted and scaled without one group each
    reweighed: Floats  # (ways, 5): costs by other weights
    noise: Noise
    work: Floats  # (stretches, 5), of all runs
    seconds: Floats  # (stretches,)
    off: float  # how far simulations are from the runs, as a share
    drain_off: float  # the same of the drain
    method: str

    places: Places
    between_runs: float  # standard deviation of a run of a job against the mean of these, as a share


def too_small(runs: Sequence[QueueRun]) -> str | None:
    """Why these runs say nothing about longer ones, as a clause; None if they do."""
    for run in runs:
        if len(run.prompt_tokens) < run.batch_size:
            return f"the sample has {counted(len(run.prompt_tokens), 'request')} for {run.batch_size:,} places"
    return None


# --- from runs to costs -------------------------------------------------------------------------------------------


def measured(runs: Sequence[QueueRun]) -> Measured:
    """The costs of all replicas are fitted together; each replica has its own factor."""
    runs = [replace(run, batch_size=places_taken(run)) for run in runs]
    seen = [seen_work(run) for run in runs]
    work, seconds = np.concatenate([one.work for one in seen]), np.concatenate([one.seconds for one in seen])
    lag = _median([lag_of(run, one) for run, one in zip(runs, seen, strict=True)])
    queues = [
        simulate_work(run.prompt_tokens, run.output_tokens, run.batch_size, run.max_num_batched_tokens, lag)
        for run in runs
    ]
    planned = np.array([queue.work.sum(axis=0) for queue in queues])
    columns = columns_worth_it(work, seconds)
    if abs(math.log(planned[:, READING].sum() / work[:, READING].sum())) > _OTHER_READING:
        # Which steps read prompts was not seen, for example because times are blurred: their cost would be accidental.
        columns = tuple(column for column in columns if column != READING)
    costs = fit_costs(work, seconds, columns)
    took = np.array([run.end_s for run in runs])
    groups, method = _groups(runs, [one.ends_s for one in seen])
    without = groups != np.arange(groups.max() + 1)[:, None]
    return Measured(
        runs=runs,
        costs=StepCosts.of(costs, lag),
        factors=took / (planned @ costs),
        left_out=np.array([fit_costs(work[kept], seconds[kept], columns) for kept in without]),
        reweighed=np.array([fit_costs(work, seconds, columns, power) for power in _OTHER_POWERS]),
        noise=_noise([one.seconds for one in seen], [one.work @ costs for one in seen]),
        work=work,
        seconds=seconds,
        off=abs(math.log(float(seconds.sum() / (planned @ costs).sum()))),
        drain_off=_drain_off(runs, queues, costs),
        method=method,
        places=Places(_median([run.batch_size for run in runs]), runs[0].max_num_batched_tokens, lag),
        between_runs=runs[0].scatter * math.sqrt(2),
    )


def _median(values: Sequence[int]) -> int:
    return round(statistics.median(values))


def _groups(runs: Sequence[QueueRun], ends_s: Sequence[Floats]) -> tuple[Integers, str]:
    """The number of each stretch's group, and the name of the method.

    No group holds a whole phase: without any of the drain, for example, nothing tells what few requests cost.
    """
    numbers, method, count = [], BATCH_MEANS, 0
    for run, ends in zip(runs, ends_s, strict=True):
        phases = phases_of(run)
        lives = phases.plateau_s / run.mean_life_s
        if lives < BATCHES:
            method = FITTED_STEPS
        of_plateau = min(_MOST_GROUPS, max(_GROUPS_OF_A_PHASE, int(lives)))
        middles_s = (np.concatenate([[0.0], ends[:-1]]) + ends) / 2
        edges_s = np.concatenate(
            [
                np.linspace(0, phases.ramp_end_s, _GROUPS_OF_A_PHASE, endpoint=False),
                np.linspace(phases.ramp_end_s, phases.drain_start_s, of_plateau, endpoint=False),
                np.linspace(phases.drain_start_s, phases.end_s, _GROUPS_OF_A_PHASE, endpoint=False),
            ]
        )
        _, number = np.unique(np.searchsorted(edges_s, middles_s, side="right"), return_inverse=True)
        numbers.append(number + count)
        count += int(number.max()) + 1
    return np.concatenate(numbers), method


def _noise(took_s: Sequence[Floats], costs_s: Sequence[Floats]) -> Noise:
    """Stretches are joined in twos, fours and so on, since the errors of neighbours may be related: the noise of a
    second is the largest that any of these give."""
    short, of_a_second = 0.0, 0.0
    for together in (1, 2, 4, 8, 16, 32):
        pairs = [_put_together(took, costs, together) for took, costs in zip(took_s, costs_s, strict=True)]
        took, cost = (np.concatenate(values) for values in zip(*pairs, strict=True))
        if len(took) < _FEWEST_STRETCHES:
            break
        # The fit has absorbed some of the scatter.
        off = float(np.sqrt((np.log(took / np.maximum(cost, 1e-12)) ** 2).sum() / (len(took) - _FITTED)))
        short = max(short, off)
        of_a_second = max(of_a_second, off * math.sqrt(float(took.mean())))
    return Noise(short, of_a_second)


def _put_together(took_s: Floats, costs_s: Floats, together: int) -> tuple[Floats, Floats]:
    starts = np.arange(0, len(took_s) - together + 1, together)
    return tuple(np.add.reduceat(values, starts) for values in (took_s, costs_s))  # type: ignore[return-value]


def _drain_off(runs: Sequence[QueueRun], queues: Sequence[SimulatedWork], costs: Floats) -> float:
    took = np.array([phases_of(run).drain_s for run in runs])
    planned = np.array([float(queue.work[queue.drain_block :].sum(axis=0) @ costs) for queue in queues])
    return abs(math.log(max(float(took.sum()), 1e-9) / max(float(planned.sum()), 1e-9)))


# --- the forecast -------------------------------------------------------------------------------------------------


def forecast(
    runs: Sequence[QueueRun],
    job: JobLengths,
    replicas: int | None = None,
    order: str = "given",
    seed: int = 0,
) -> Forecast:
    """The job on `replicas` replicas (by default as many as were measured), each as fast as the measured ones."""
    return forecast_from(measured(runs), job, replicas, order, seed)


def forecast_from(
    found: Measured, job: JobLengths, replicas: int | None = None, order: str = "given", seed: int = 0
) -> Forecast:
    replicas = replicas or len(found.runs)
    found = replace(found, between_runs=_between_runs(found, replicas))
    works = _works(found, job, replicas, order in SORTED, seed)
    return _combined(found, works, replicas)


def _works(found: Measured, job: JobLengths, replicas: int, is_sorted: bool, seed: int) -> list[JobWork]:
    """One, or several if output lengths are drawn."""
    if job.output_tokens is not None:
        return [job_work(job, found.places, replicas, is_sorted, _SIMULATED)]
    draw, job = np.random.default_rng(seed), job.thinned(_LONGEST_DRAWN)
    drawn = (replace(job, output_tokens=_drawn_outputs(found.runs, job.prompt_tokens, draw)) for _ in range(_DRAWS))
    return [job_work(one, found.places, replicas, is_sorted, _SIMULATED_OF_A_DRAW) for one in drawn]


def _drawn_outputs(runs: Sequence[QueueRun], prompts: Integers, draw: np.random.Generator) -> Integers:
    """For each prompt the output of one of the sample's _NEAREST by prompt length. The sample itself is drawn first,
    since it is one of many possible ones."""
    of_prompt = np.concatenate([run.prompt_tokens for run in runs])
    of_output = np.concatenate([run.output_tokens for run in runs])
    again = draw.integers(len(of_prompt), size=len(of_prompt))
    again = again[np.argsort(of_prompt[again], kind="stable")]
    near = min(_NEAREST, len(again))
    place = np.searchsorted(of_prompt[again], prompts) + draw.integers(-(near // 2), near - near // 2, len(prompts))
    found: Integers = of_output[again][np.clip(place, 0, len(again) - 1)]
    return found


def _combined(found: Measured, works: Sequence[JobWork], replicas: int) -> Forecast:
    costs = found.costs.as_array()
    factors = _factors(found, replicas, len(works[0].whole))
    plateau = np.mean([work.plateau.mean(axis=0) for work in works], axis=0)
    alike = _alike(found, plateau)
    # One per draw and replica.
    each_s = np.array([(work.whole + alike.more * work.plateau) @ costs * factors for work in works])
    drains_s = np.array([work.drain @ costs * factors for work in works])
    whole, drain = (np.mean([part.mean(axis=0) for part in parts], axis=0) for parts in _parts(works))
    return Forecast(
        _interval(found, each_s.max(axis=1), whole, alike.half_width),
        _rate(found, works, replicas, alike),
        _interval(found, drains_s.max(axis=1), drain, math.hypot(found.drain_off, _DRAIN)),
        found.method,
        replicas,
        float(np.mean([work.imbalance for work in works])),
        float(each_s.min(axis=1).mean()),
        Z_95 * found.between_runs,
    )


def _parts(works: Sequence[JobWork]) -> tuple[list[Floats], list[Floats]]:
    return [work.whole for work in works], [work.drain for work in works]


def _factors(found: Measured, replicas: int, simulated: int) -> Floats:
    """For the simulated replicas. If they are not the measured ones, the slowest decides."""
    logs = np.log(found.factors)
    if simulated == replicas and len(logs) % replicas == 0:
        each: Floats = np.exp(logs.reshape(-1, replicas).mean(axis=0))
        return each
    spread = float(logs.std(ddof=1)) if len(logs) > 1 else found.runs[0].scatter
    return np.full(simulated, math.exp(float(logs.mean()) + spread * _largest_of(replicas)))


def _between_runs(found: Measured, replicas: int) -> float:
    logs = np.log(found.factors)
    if len(logs) <= replicas or len(logs) % replicas:
        return found.runs[0].scatter * math.sqrt(2)
    runs = logs.reshape(-1, replicas)
    spread = math.sqrt(float(runs.var(axis=0, ddof=1).mean()))
    return max(found.runs[0].scatter, spread) * math.sqrt(1 + 1 / len(runs))


def _largest_of(count: int) -> float:
    """Mean of the largest of `count` standard normal values (Blom 1958)."""
    return 0.0 if count == 1 else statistics.NormalDist().inv_cdf((count - 0.375) / (count + 0.25))


def _interval(found: Measured, values: Floats, work: Floats, off: float) -> Interval:
    """Of the seconds that this work takes; there is one value for each draw of output lengths."""
    value = float(values.mean())
    if value <= 0:
        return Interval(0.0)
    half = _half_width(found, work, off)
    if half is None:
        return Interval(value)
    drawn = float(np.log(np.maximum(values, 1e-9)).std(ddof=1)) if len(values) > 1 else 0.0
    half = math.hypot(half, t_quantile_95(_DRAWS - 1) * drawn)
    return Interval(value, value * math.exp(-half), value * math.exp(half))


def _half_width(found: Measured, work: Floats, off: float) -> float | None:
    """As a share of the seconds of this work; None if there are too few groups."""
    base = float(work @ found.costs.as_array())
    if base <= 0 or len(found.left_out) < _FEWEST_GROUPS:
        return None
    error = _jackknife(np.log(np.maximum(found.left_out @ work, 1e-12) / base))
    others = np.log(np.maximum(found.reweighed @ work, 1e-12) / base)
    way = float(np.sqrt((others**2).mean()))
    return math.sqrt(
        error**2
        + (_T_95 * found.noise.of(float(found.seconds.sum()))) ** 2
        + (Z_95 * found.between_runs) ** 2
        + (Z_95 * way) ** 2
        + (_T_95 * found.noise.of(base)) ** 2
        + found.off**2
        + off**2
    )


@dataclass(frozen=True, slots=True)
class _Alike:
    """What stretches with steps like those of a job's plateau say about the plateau's seconds."""

    more: float  # how much longer it takes, as a share
    half_width: float


def _alike(found: Measured, plateau: Floats) -> _Alike:
    """A step need not cost the sum of its parts. So the plateau is scaled by what similar stretches took over their
    costs, as far as that exceeds the noise. If hardly any stretch is similar, that is an error in itself: a short queue
    of equal requests, say, either reads prompts or makes tokens, while a long one does both in each step."""
    if plateau[STEPS] <= 0:
        return _Alike(0.0, 0.0)
    costs = found.costs.as_array()
    usual = plateau / plateau[STEPS] * costs
    steps = np.maximum(found.work[:, STEPS], 1e-9)
    parts = found.work / steps[:, None] * costs
    is_alike = np.abs(parts - usual).sum(axis=1) <= _ALIKE * usual.sum()
    # Even if no cost was found for it, a step that reads prompts is a different step.
    is_alike &= np.abs(found.work[:, READING] / steps - plateau[READING] / plateau[STEPS]) <= _ALIKE
    took_s, cost_s = float(found.seconds[is_alike].sum()), float((found.work[is_alike] @ costs).sum())
    share = took_s / float(found.seconds.sum())
    off = math.log(took_s / cost_s) if cost_s > 0 else 0.0
    true = off * max(0.0, 1 - (found.noise.of(took_s) / off) ** 2) if off else 0.0
    return _Alike(math.expm1(true), math.hypot(true / 2, _UNSEEN * max(0.0, 1 - share / _ENOUGH_ALIKE)))


def _jackknife(logs: Floats) -> float:
    """Half width from logarithms that each leave out one group. The errors of neighbours may be related, so it is the
    widest that single groups, pairs and threes of them give."""
    effects, widest = logs - logs.mean(), 0.0
    for together in (1, 2, 3):
        sums = np.add.reduceat(effects, np.arange(0, len(effects), together))
        count = len(sums)
        if count >= 3:
            error = math.sqrt((count - 1) / count * float(((sums - sums.mean()) ** 2).sum()))
            widest = max(widest, t_quantile_95(count - 1) * error)
    return widest


def _rate(found: Measured, works: Sequence[JobWork], replicas: int, alike: _Alike) -> Interval | None:
    """Output tokens per second over all replicas."""
    costs = found.costs.as_array() * float(np.exp(np.log(found.factors).mean())) * (1 + alike.more)
    plateaus = np.array([work.plateau.sum(axis=0) for work in works])
    seconds = plateaus @ costs
    if not (seconds > 0).all():
        return None
    rates = np.array([work.plateau_outputs.sum() for work in works]) / seconds * replicas
    return _interval(found, rates, plateaus.mean(axis=0) / len(works[0].whole), alike.half_width)


# --- other questions ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DeadlineAnswer:
    forecast: Forecast  # with the fewest replicas that are in time even at the upper end of the interval
    margin: float  # share of the deadline left over at that end


def replicas_for_deadline(
    runs: Sequence[QueueRun], job: JobLengths, deadline_s: float, order: str = "given", together: int = 1
) -> DeadlineAnswer | None:
    """None if no number of replicas is in time because the last request alone takes longer. `together`: so many
    replicas are one engine, so that there are only multiples of it."""
    found, replicas = measured(runs), together
    while replicas <= max(job.requests, together):
        answer = forecast_from(found, job, replicas, order)
        latest_s = answer.seconds.high or answer.seconds.value
        if latest_s <= deadline_s:
            return DeadlineAnswer(answer, 1 - latest_s / deadline_s)
        # The work before the drain is divided among replicas; the drain is not.
        drain_s = min(answer.drain_s.value, latest_s)
        left_s = deadline_s - drain_s
        wanted = replicas * (latest_s - drain_s) / left_s if left_s > 0 else 2 * replicas
        wanted = math.floor(min(wanted, 2 * max(job.requests, 1)))
        replicas = max(replicas + together, wanted // together * together)
    return None


def mix_outside(runs: Sequence[QueueRun], job: JobLengths) -> str | None:
    """How a job is unlike everything measured, in one sentence; None if it is not."""
    prompts = np.concatenate([run.prompt_tokens for run in runs])
    outputs = np.concatenate([run.output_tokens for run in runs])
    pairs = [("prompt", prompts, job.prompt_tokens)]
    if job.output_tokens is not None:
        pairs.append(("output", outputs, job.output_tokens))
    means = []
    for name, seen, asked in pairs:
        usual, mean = float(seen.mean()), float(np.average(asked, weights=job.weights))
        means.append(mean / usual)
        if not 1 / _FACTOR <= mean / usual <= _FACTOR:
            return f"The mean {name} of the job has {mean:,.0f} tokens, and that of the measured sample {usual:,.0f}."
        if (beyond := _beyond(name, seen, asked, job.weights)) is not None:
            return beyond
    if len(means) == 2 and not 1 / _FACTOR <= means[0] / means[1] <= _FACTOR:
        return (
            f"The job reads {means[0] / means[1]:.2g} times as many prompt tokens per output token as the measured"
            " sample."
        )
    return None


def _beyond(name: str, seen: Integers, asked: Integers, weights: Floats) -> str | None:
    most = int(seen.max())
    if asked.max() > _FACTOR * most:
        return f"The longest {name} of the job has {int(asked.max()):,} tokens, and the longest measured {most:,}."
    tokens = asked * weights
    share = float(tokens[asked > most].sum() / max(tokens.sum(), 1e-9))
    if share > _MOST_BEYOND:
        return f"{share:.0%} of the job's {name} tokens are in requests longer than the longest measured."
    return None
