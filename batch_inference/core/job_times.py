"""How long a whole job takes, judging by one of its queue points: the analysis reports it, and a search compares it.

Needs numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, stdev

import numpy as np

from batch_inference.core.forecast import Forecast, JobLengths, forecast, too_small
from batch_inference.core.queue_points import runs_of
from batch_inference.core.queue_runs import Interval, QueueRun
from batch_inference.core.results import Job, Point, Result
from batch_inference.core.sharing import Order, ordered
from batch_inference.core.statistics import Z_95


def job_throughput(result: Result, point: Point) -> Interval | None:
    """Output tokens per second over the whole job; None if the point says nothing about it."""
    job = result.job_of(point.workload) if point.workload else None
    if job is None or point.workload is None or not all(run.requests.arrival_s for run in point.runs):
        return None
    runs = [replica for run in runs_of(result, point) for replica in run]
    is_whole = len(point.runs[-1].requests.output_tokens) >= job.requests
    if too_small(runs) and not is_whole:
        return None
    lengths, order = lengths_of_job(job), point.workload.order
    found = forecast(runs, in_order(lengths, order), result.data_parallel_size, order)
    seconds = found.seconds
    if is_whole:
        seconds = as_it_was_run(found, [run.latency_s for run in point.runs], runs[0].scatter).seconds
    tokens = made_tokens(lengths, runs)
    low, high = seconds.low, seconds.high
    if low is None or high is None:
        return Interval(tokens / seconds.value)
    return Interval(tokens / seconds.value, tokens / high, tokens / low)


def as_it_was_run(found: Forecast, took_s: Sequence[float], scatter: float) -> Forecast:
    """For a job that was run as a whole, once or several times: only how much another run may differ is a forecast.
    `scatter`: the least standard deviation of equal runs."""
    spread = stdev(map(math.log, took_s)) if len(took_s) > 1 else 0.0
    half = Z_95 * max(scatter, spread) * math.sqrt(1 + 1 / len(took_s))
    mean_s = fmean(took_s)
    return replace(found, seconds=Interval(mean_s, mean_s * math.exp(-half), mean_s * math.exp(half)), equal_runs=half)


def made_tokens(job: JobLengths, runs: Sequence[QueueRun]) -> float:
    """Output tokens of the job; if they are unknown, as many per request as the sample made."""
    if job.output_tokens is not None:
        return total(job, job.output_tokens)
    return job.requests * float(np.concatenate([run.output_tokens for run in runs]).mean())


def total(job: JobLengths, tokens: object) -> float:
    """The sum over all its requests; `tokens` has an entry for each of its lengths."""
    return float(job.weights @ np.asarray(tokens)) * job.repeats


def lengths_of_job(job: Job) -> JobLengths:
    """In the order of the file."""
    weights = np.full(len(job.prompt_lens), float(job.every))
    weights[len(weights) - job.last :] = 1.0
    bulk = job.requests - job.last
    thinned = len(weights) - job.last
    if thinned:  # the last step may be shorter
        weights[:thinned] = bulk / thinned
    outputs = None if job.output_lens is None else np.array(job.output_lens)
    return JobLengths(np.array(job.prompt_lens), outputs, None if job.every == 1 else weights)


def in_order(job: JobLengths, order: str) -> JobLengths:
    """The lengths in the order of the queue. If the outputs are unknown, the order of the file has to do."""
    if order == "given" or job.output_tokens is None:
        return job
    queue = ordered(range(len(job.prompt_tokens)), job.prompt_tokens.tolist(), job.output_tokens.tolist(),
                    _as_order(order), 0)  # fmt: skip
    every = None if job.every is None else np.asarray(job.every)[queue]
    return replace(job, prompt_tokens=job.prompt_tokens[queue], output_tokens=job.output_tokens[queue], every=every)


def _as_order(order: str) -> Order:
    orders: tuple[Order, ...] = ("given", "shuffled", "longest-first", "shortest-first")
    return next(one for one in orders if one == order)
