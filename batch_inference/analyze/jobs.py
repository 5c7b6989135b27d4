"""For a job: which setting, how many hours, at what cost, how sure. From queue points, through forecasts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from batch_inference.analyze.compare import LAYOUT, layout
from batch_inference.analyze.queues import QueuePoint
from batch_inference.analyze.tables import GROUP_BY, MeasuredSetting
from batch_inference.core.forecast import (
    Forecast,
    JobLengths,
    forecast,
    mix_outside,
    replicas_for_deadline,
    too_small,
)
from batch_inference.core.job_times import as_it_was_run, in_order, lengths_of_job, made_tokens, total
from batch_inference.core.queue_runs import Interval

# A batch point whose lengths are this near to the job's mean ones shows what a grid of fixed lengths would have said.
_NEAR = 0.1
# Points alike in this are ranked together. The output length of a batch is none of theirs.
ALIKE = tuple(name for name in GROUP_BY if name != "max_tokens")
HOUR_S = 3600.0
_J_PER_KWH = 3.6e6


@dataclass(frozen=True)
class JobQuestion:
    """What is asked about a job."""

    lengths: JobLengths | None = None  # of another file (--job), in its order
    name: str | None = None  # of that file
    requests: float | None = None  # so many of the kind (--job-requests)
    deadline_h: float | None = None
    price: float | None = None  # of a device for an hour


@dataclass(frozen=True)
class JobRow:
    """What one queue point says of the job."""

    setting: str
    num_devices: int
    devices_per_replica: int
    point: QueuePoint
    forecast: Forecast
    hours: Interval
    output_tok_per_s: float  # over all of the job
    price: float | None
    grid_ratio: float | None  # throughput of a batch of the mean lengths over that of the plateau
    is_as_run: bool = False  # the whole job was run, and nothing is forecast
    layout: str = ""  # DP=4
    load_s: float | None = None  # that the engine took to start, which is not in the hours
    is_coupled: bool = False  # its replicas share experts
    is_largest: bool = False  # no larger batch size was tried with this setting, or asked for

    @property
    def device_hours(self) -> Interval:
        return scaled(self.hours, self.num_devices)

    @property
    def cost(self) -> Interval | None:
        return None if self.price is None else scaled(self.device_hours, self.price)

    @property
    def kwh(self) -> float | None:
        power_w = self.point.power_w
        return None if power_w is None else power_w * self.forecast.seconds.value / _J_PER_KWH


@dataclass(frozen=True)
class Deadline:
    """So many replicas of a setting finish the job in time."""

    row: JobRow
    replicas: int
    devices: int
    hours: Interval
    margin: float  # of the time there is, at the upper end of the interval

    @property
    def cost(self) -> float | None:
        return None if self.row.price is None else self.hours.value * self.devices * self.row.price


@dataclass(frozen=True)
class JobAnswer:
    """Points that ran samples of one job, on one kind of device with one model: the best, then the others by time."""

    group: tuple[Any, ...]
    requests: float
    prompt_tokens: float
    output_tokens: float | None  # None where the model itself ends
    is_cached: bool
    output_lengths: str | int
    limit: int | None  # of output tokens, where the model itself ends
    rows: list[JobRow]
    ties: list[JobRow]  # other settings whose interval overlaps that of the fastest
    left_out: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)  # points that say nothing about the job of the question, and why
    deadline: Deadline | None = None
    is_late: bool = False  # no number of replicas is in time

    @property
    def best(self) -> JobRow | None:
        return self.rows[0] if self.rows else None

    @property
    def not_forecast(self) -> list[str]:
        """Points that are left out, and why."""
        return [*self.left_out, *(f"no forecast from {said}" for said in self.unlike)]

    @property
    def cheapest(self) -> JobRow | None:
        return min(self.rows, key=lambda row: row.device_hours.value, default=None)

    @property
    def as_cheap(self) -> list[JobRow]:
        """Of every other setting the one with the fewest device-hours, where they may be as few as the fewest."""
        by_cost = sorted(self.rows, key=lambda row: row.device_hours.value)
        return _ties(by_cost, [row.device_hours for row in by_cost])


class JobError(Exception):
    """The points cannot answer what is asked of the job: one line that says why."""


def job_answers(
    settings: Sequence[MeasuredSetting], labels: Callable[[MeasuredSetting], str], question: JobQuestion
) -> list[JobAnswer]:
    """Raises JobError for a job that is unlike everything that was measured."""
    asked = sorted(
        ((_group_of(setting, point), setting, point) for setting in settings for point in setting.queues),
        key=lambda one: repr(one[0]),
    )
    answers = []
    for group, members in groupby(asked, key=lambda one: one[0]):
        answers.append(_answer(group, [(setting, point) for _, setting, point in members], labels, question))
    unlike = [said for answer in answers for said in answer.unlike]
    if unlike and not any(answer.rows for answer in answers):
        raise JobError(
            f"--job {question.name}: cannot be forecast from {unlike[0]} Measure a sample of this file, with "
            f"--prompts-file {question.name}"
        )
    return answers


def _group_of(setting: MeasuredSetting, point: QueuePoint) -> tuple[Any, ...]:
    """The values of ALIKE, and what the points ran."""
    alike, ran = tuple(map(setting.shared.get, ALIKE)), point.workload
    return (*alike, ran.content_hash, str(ran.output_lengths), point.max_tokens, ran.is_cached)


def _answer(
    group: tuple[Any, ...],
    members: Sequence[tuple[MeasuredSetting, QueuePoint]],
    labels: Callable[[MeasuredSetting], str],
    question: JobQuestion,
) -> JobAnswer:
    first = members[0][1]
    job = _asked_job(first, question)
    rows, left_out, unlike = [], [], []
    for setting, point in members:
        # Of the job itself, run as a whole, nothing is to be forecast.
        if not _is_as_run(point, question) and (why := too_small(point.runs)):
            advice = "lower --batch-sizes" if point.is_whole_job else "raise --sample"
            left_out.append(f"{labels(setting)}, {point.batch_size} at once: no forecast, {why}; {advice}")
        elif outside := question.lengths and mix_outside(point.runs, job):
            unlike.append(f"{labels(setting)}, {point.batch_size} at once: {outside}")
        else:
            rows.append(_row(setting, point, labels(setting), job, question))
    rows = _best_first(rows)
    answer = JobAnswer(
        group,
        job.requests,
        total(job, job.prompt_tokens),
        None if job.output_tokens is None else total(job, job.output_tokens),
        first.workload.is_cached,
        first.workload.output_lengths,
        first.max_tokens,
        rows,
        _ties(rows, [row.hours for row in rows]),
        left_out,
        unlike,
    )
    if question.deadline_h is None or not rows:
        return answer
    deadline = _deadline(rows, job, question.deadline_h)
    return replace(answer, deadline=deadline, is_late=deadline is None)


def _asked_job(point: QueuePoint, question: JobQuestion) -> JobLengths:
    job = question.lengths or lengths_of_job(point.job)
    return replace(job, repeats=question.requests / job.requests) if question.requests else job


def _is_as_run(point: QueuePoint, question: JobQuestion) -> bool:
    return point.is_whole_job and question.lengths is None and question.requests is None


def _row(setting: MeasuredSetting, point: QueuePoint, label: str, job: JobLengths, question: JobQuestion) -> JobRow:
    found = forecast(point.runs, in_order(job, point.workload.order), point.replicas, point.workload.order)
    is_as_run = _is_as_run(point, question)
    if is_as_run:
        found = as_it_was_run(found, point.latencies_s, point.runs[0].scatter)
    return JobRow(
        setting=label,
        num_devices=setting.num_devices,
        devices_per_replica=setting.num_devices // point.replicas,
        point=point,
        forecast=found,
        hours=scaled(found.seconds, 1 / HOUR_S),
        output_tok_per_s=made_tokens(job, point.runs) / found.seconds.value,
        price=question.price,
        grid_ratio=_grid_ratio(setting, point),
        is_as_run=is_as_run,
        layout=layout(*(int(setting.shared.get(name) or 0) for name in LAYOUT)),
        load_s=setting.load_s,
        is_coupled=point.replicas > 1 and bool(setting.shared.get("enable_expert_parallel")),
        is_largest=point.batch_size >= setting.largest_size(point.shape),
    )


def _grid_ratio(setting: MeasuredSetting, point: QueuePoint) -> float | None:
    """Of the batch point of the same file whose lengths are nearest to the job's mean ones, as far as one is near."""
    plateau = point.summary.get("plateau_output_tok_per_s")
    outputs = point.job.outputs
    if plateau is None or outputs is None:
        return None
    near = [
        (abs(math.log(length / point.job.prompts.mean)), throughput)
        for batch, length, made, throughput in setting.batch_points()
        if batch == point.batch_size
        and abs(length / point.job.prompts.mean - 1) <= _NEAR
        and abs(made / outputs.mean - 1) <= _NEAR
    ]
    return min(near)[1] / plateau if near else None


def _best_first(rows: Sequence[JobRow]) -> list[JobRow]:
    """The fastest first; or, where that one is suspect and a valid one may be as fast, the fastest valid one."""
    ordered = sorted(rows, key=lambda row: row.hours.value)
    if not ordered or ordered[0].point.verdict != "suspect" or ordered[0].hours.high is None:
        return ordered
    sure = next((row for row in ordered if row.point.verdict == "valid"), ordered[0])
    if sure.hours.value > ordered[0].hours.high:
        return ordered
    return [sure, *(row for row in ordered if row is not sure)]


def _overlap(one: Interval, other: Interval) -> bool:
    """Also where an end is unknown."""
    ends = (one.low, one.high, other.low, other.high)
    return None in ends or (one.low <= other.high and other.low <= one.high)  # type: ignore[operator]


def _ties(rows: Sequence[JobRow], intervals: Sequence[Interval]) -> list[JobRow]:
    """Of every other setting the best, where it may be as good as the first: less is better."""
    if not rows or intervals[0].high is None:
        return []
    seen, ties = {rows[0].setting}, []
    for row, interval in zip(rows[1:], intervals[1:], strict=True):
        if row.setting not in seen and interval.low is not None and interval.low <= intervals[0].high:
            ties.append(row)
        seen.add(row.setting)
    return ties


def _deadline(rows: Sequence[JobRow], job: JobLengths, hours: float) -> Deadline | None:
    """Of the best point of each setting, the one that needs the fewest devices."""
    best = {row.setting: row for row in sorted(rows, key=lambda row: -row.device_hours.value)}
    found = [_as_run_in_time(row, hours) for row in rows if row.is_as_run and (row.hours.high or math.inf) <= hours]
    # One that needs as many devices is less sure than what was seen.
    fewest = min((one.devices for one in found), default=math.inf)
    forecasts = [one for row in best.values() if (one := _forecast_in_time(row, job, hours))]
    found += [one for one in forecasts if one.devices < fewest]
    return min(found, key=lambda one: (one.devices, one.hours.value), default=None)


def _as_run_in_time(row: JobRow, hours: float) -> Deadline:
    """What ran the whole job in time needs no forecast."""
    return Deadline(row, row.point.replicas, row.num_devices, row.hours, 1 - (row.hours.high or 0.0) / hours)


def _forecast_in_time(row: JobRow, job: JobLengths, hours: float) -> Deadline | None:
    """Replicas that share experts come in multiples of the number that was measured."""
    order, together = row.point.workload.order, row.point.replicas if row.is_coupled else 1
    answer = replicas_for_deadline(row.point.runs, in_order(job, order), hours * HOUR_S, order, together=together)
    if answer is None:
        return None
    replicas = answer.forecast.replicas
    in_hours = scaled(answer.forecast.seconds, 1 / HOUR_S)
    return Deadline(row, replicas, replicas * row.devices_per_replica, in_hours, answer.margin)


def scaled(interval: Interval, factor: float) -> Interval:
    low, high = (None if end is None else end * factor for end in (interval.low, interval.high))
    return Interval(interval.value * factor, low, high)


def gains_of_orders(answer: JobAnswer) -> Iterator[tuple[str, str, float, bool]]:
    """(setting, order, share of the time that it saves against the order of the file, whether the intervals are apart)
    where both were measured."""
    best: dict[tuple[str, int, str], JobRow] = {}
    for row in answer.rows:
        best.setdefault((row.setting, row.point.batch_size, row.point.workload.order), row)
    for (setting, batch_size, order), row in best.items():
        given = best.get((setting, batch_size, "given"))
        if order != "given" and given:
            saved, apart = 1 - row.hours.value / given.hours.value, not _overlap(row.hours, given.hours)
            yield f"{setting}, {batch_size} at once", order, saved, apart
