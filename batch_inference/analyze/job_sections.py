"""What the report says for a job: which setting, how many hours, at what cost, how sure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from batch_inference.analyze.answers import Analysis
from batch_inference.analyze.jobs import ALIKE, HOUR_S, Deadline, JobAnswer, JobRow, gains_of_orders
from batch_inference.analyze.queues import QueuePoint, is_told, phases
from batch_inference.analyze.sections import ROW_LIMIT, Section
from batch_inference.analyze.wording import SUSPECT_LINE, few, tied, value_words, with_ends
from batch_inference.core.queue_runs import Interval
from batch_inference.core.text import counted, on_each, short, significant
from batch_inference.core.values import OWN_END

# Below so many hours a job is told in minutes, and below so many minutes in seconds.
_FEWEST_HOURS, _FEWEST_MINUTES = 1.0, 1.0
# What a grid says is worth a line where it is off by more.
_GRID_OFF = 0.02
# Replicas that are done within this share of the time are done together.
_TOGETHER = 0.01
# Equal runs are worth a line where they make at least this share of an interval.
_MOST_OF_IT = 0.7
_UNITS = (("h", 1.0), ("min", 60.0), ("s", HOUR_S))


def job_section(answer: JobAnswer, analysis: Analysis) -> Section:
    """The fastest first; of what it stands on, and what it leaves out, lines below."""
    title = "For this job" + (f": {told_apart(answer, analysis.jobs)}" if len(analysis.jobs) > 1 else _cached(answer))
    has_orders = len({row.point.workload.order for row in answer.rows}) > 1
    has_budgets = any(row.point.tokens_per_step for row in answer.rows)
    has_price, has_energy = analysis.question.price is not None, any(row.kwh is not None for row in answer.rows)
    unit, per_hour = unit_of(answer)
    header = (
        "setting", "devices", "at once", *(["per step"] if has_budgets else []), *(["order"] if has_orders else []),
        unit, "device-h", *(["cost"] if has_price else []), "tok/s", *(["kWh"] if has_energy else []),
    )  # fmt: skip
    rows = [
        [
            row.setting, str(row.num_devices), str(row.point.batch_size),
            *([str(row.point.tokens_per_step or "")] if has_budgets else []),
            *([row.point.workload.order] if has_orders else []),
            interval_text(row.hours, per_hour) + ("*" if row.point.verdict == "suspect" else ""),
            significant(row.device_hours.value),
            *([significant(row.cost.value)] if row.cost else []),
            short(row.output_tok_per_s),
            *([significant(row.kwh)] if has_energy else []),
        ]
        for row in answer.rows[:ROW_LIMIT]
    ]  # fmt: skip
    return Section(
        title,
        list(_pairs(answer)) if rows else [],
        header,
        rows,
        frozenset(header) - {"setting", "order"},
        [*answer.not_forecast, *_lines(answer)],
        more=len(answer.rows) - len(rows),
    )


def told_apart(answer: JobAnswer, answers: Sequence[JobAnswer]) -> str:
    """What of the job, and of what it was measured on, is not as in the others."""
    unlike = [
        value_words(name, answer.group[place])
        for place, name in enumerate(ALIKE)
        if len({str(other.group[place]) for other in answers}) > 1
    ]
    return ", ".join([few_words(answer, answers), *unlike])


def few_words(answer: JobAnswer, answers: Sequence[JobAnswer] = ()) -> str:
    """Of a title, where there are several jobs; with its tokens, where another has as many requests."""
    limit = "" if answer.limit is None else f", at most {answer.limit} tokens"
    outputs = {OWN_END: f", ended by the model{limit}", "file": ""}.get(
        str(answer.output_lengths), f", {answer.output_lengths} output tokens each"
    )
    return f"{job_words(answer, answers)}{outputs}{_cached(answer)}"


def job_words(answer: JobAnswer, answers: Sequence[JobAnswer]) -> str:
    """How many requests, and of how many tokens where another job has as many requests."""
    others = {other.prompt_tokens for other in answers if other.requests == answer.requests}
    more = f" of {answer.prompt_tokens:,.0f} prompt tokens" if len(others) > 1 else ""
    return f"{requests_words(answer)}{more}"


def _cached(answer: JobAnswer) -> str:
    return ", prefixes cached" if answer.is_cached else ""


def requests_words(answer: JobAnswer) -> str:
    return f"{answer.requests:,.0f} {'request' if answer.requests == 1 else 'requests'}"


def unit_of(answer: JobAnswer) -> tuple[str, float]:
    """Of the time that the fastest takes, and how many make an hour."""
    return _unit(answer.rows[0].hours.value if answer.rows else 1.0)


def _unit(hours: float) -> tuple[str, float]:
    return next(((unit, per_hour) for unit, per_hour in _UNITS if hours * per_hour >= 1.0), _UNITS[-1])


def interval_text(interval: Interval, factor: float = 1.0, unit: str = "") -> str:
    value = interval.value * factor
    between = f" {unit}" if unit else ""
    if interval.low is None or interval.high is None:
        return short(value) + between
    return with_ends(value, interval.low * factor, interval.high * factor, unit)


def time_text(interval: Interval) -> str:
    """Of hours, in a unit that suits."""
    unit, per_hour = _unit(interval.value)
    return interval_text(interval, per_hour, unit)


def _pairs(answer: JobAnswer) -> Iterator[tuple[str, str]]:
    made = "as many output tokens as the model makes"
    if answer.output_tokens is not None:
        made = f"{answer.output_tokens:,.0f} output tokens"
    cached = "; shared prefixes are cached" if answer.is_cached else ""
    yield "job", f"{requests_words(answer)}: {answer.prompt_tokens:,.0f} prompt and {made}{cached}"
    best, cheapest = answer.best, answer.cheapest
    if best is None or cheapest is None:
        return
    yield "fastest", _row_words(best)
    if cheapest is not best:
        yield "fewest device-hours", ", ".join([_row_words(cheapest), *tied([row.setting for row in answer.as_cheap])])
    if words := _deadline_words(answer):
        yield "for the deadline", words


def _row_words(row: JobRow) -> str:
    cost = f", cost {interval_text(row.cost)}" if row.cost else ""
    return (
        f"{row.setting}, {row.point.batch_size} at once: {time_text(row.hours)}, "
        f"{interval_text(row.device_hours, unit='device-hours')}{cost}"
    )


def _lines(answer: JobAnswer) -> Iterator[str]:
    best = answer.best
    if best is None:
        return
    if answer.ties:
        others = [f"{row.setting} ({row.point.batch_size} at once: {time_text(row.hours)})" for row in answer.ties]
        yield f"tie: the interval of the fastest overlaps that of {few(others, 3, ' and {} more')}"
    yield _basis(best)
    hits = best.point.summary.get("prefix_hit_share")
    if answer.is_cached and hits is not None:
        yield f"{best.setting}: {hits:.0%} of the prompt tokens that were run came from the prefix cache."
    if answer.deadline and answer.deadline.devices > answer.deadline.row.num_devices and "cpu" in answer.group:
        yield (
            "Replicas are counted as independent. On the cores of one machine they are not, because they share its "
            "memory: measure as many as a machine has, and count whole machines."
        )
    yield from _order_lines(answer)
    yield from _grid_lines(answer.rows)
    if any(row.hours.low is None for row in answer.rows):
        yield "no ±: too little was run for an interval."
    if any(row.point.verdict == "suspect" for row in answer.rows):
        yield SUSPECT_LINE
    yield (
        f"± or (… to …): 95 % confidence interval{_least_width(best)}. Not in these times: engine starts, stragglers, "
        "failures, reading and writing of files."
    )


def _least_width(row: JobRow) -> str:
    hours, least = row.hours, row.forecast.equal_runs
    if hours.high is None or least < _MOST_OF_IT * (hours.high / hours.value - 1):
        return ""
    return f", for {row.setting} at least ±{short(100 * least, 2)} % because two equal runs differ by that"


def _basis(best: JobRow) -> str:
    """What the hours of the fastest are made of."""
    point, found = best.point, best.forecast
    rate = point.plateau if best.is_as_run else found.output_tokens_per_s
    is_known = rate is not None and is_told(rate)
    on_plateau = f" with {interval_text(rate, unit='tok/s')} on the plateau" if rate is not None and is_known else ""
    if best.is_as_run:
        start_s, end_s = phases(point)[-1]
        times = f" {len(point.latencies_s)} times" if len(point.latencies_s) > 1 else ""
        said = f"{best.setting} ran the whole job{times}{on_plateau}."
        drain = f"took {short(end_s - start_s, 3)} s{_of_last_run(best)}"
    else:
        run = f"{point.requests:,} requests that were run"
        said = f"{best.setting} is forecast from {run}{on_plateau}, by {found.method}."
        drain = f"takes the last {short(found.drain_s.value, 3)} s"
    more = [_spread_of_replicas(best), "" if is_known else _too_few(point)]
    return " ".join([f"{said} The drain, in which fewer requests run, {drain}.", *filter(None, more)])


def _spread_of_replicas(row: JobRow) -> str:
    """Where they are not done together the plateau and the drain do not add up to the hours."""
    first_s, last_s = row.forecast.first_done_s, row.forecast.seconds.value
    if row.is_as_run:
        ends_s = [one.end_s for one in row.point.phases]
        first_s, last_s = min(ends_s), max(ends_s)
    if row.point.replicas < 2 or first_s > last_s * (1 - _TOGETHER):
        return ""
    verb = "were" if row.is_as_run else "are"
    unit, per_hour = _unit(last_s / HOUR_S)
    first, last = (short(seconds / HOUR_S * per_hour, 3) for seconds in (first_s, last_s))
    ends = f"The replicas {verb} done after {first} to {last} {unit}{_of_last_run(row)}"
    return f"{ends}; the job takes as long as the last."


def _of_last_run(row: JobRow) -> str:
    """What is told of one run, where the times are the mean of several."""
    return " in the last run" if row.is_as_run and len(row.point.latencies_s) > 1 else ""


def _too_few(point: QueuePoint) -> str:
    """Advice that can be followed: a job has no more requests than it has."""
    advice = "" if point.is_whole_job else f": --sample {point.requests_of_a_plateau}"
    verb = "request is" if point.requests == 1 else "requests are"
    return (
        f"{point.requests:,} {verb} too few to tell the throughput of its plateau: with {point.batch_size} at once"
        f"{on_each(point.replicas)} that takes about {point.requests_of_a_plateau:,} in all{advice}."
    )


def _deadline_words(answer: JobAnswer) -> str | None:
    """None where none is asked for."""
    deadline = answer.deadline
    if deadline is None:
        late = "no number of replicas is in time, because the longest request alone takes longer"
        return late if answer.is_late else None
    row = deadline.row
    return (
        f"{replicas_words(deadline, row.setting)} ({counted(deadline.devices, 'device')}), "
        f"{row.point.batch_size} at once{on_each(deadline.replicas)}: {time_text(deadline.hours)}"
        f"{at_cost(deadline)}; at the upper end of "
        "that interval "
        f"{math.floor(100 * deadline.margin)}% of the time is left"
    )


def at_cost(deadline: Deadline) -> str:
    return "" if deadline.cost is None else f", at a cost of {significant(deadline.cost, 3)}"


def replicas_words(deadline: Deadline, name: str) -> str:
    """3 replicas of tp_2; 8 replicas as in dp_4, of which one is a part."""
    link = "as in" if deadline.row.point.replicas > 1 else "of"
    return f"{counted(deadline.replicas, 'replica')} {link} {name}"


def _order_lines(answer: JobAnswer) -> Iterator[str]:
    for where, order, saved, are_apart in gains_of_orders(answer):
        if round(saved, 3) == 0:
            continue
        gain = f"{'saves' if saved >= 0 else 'costs'} {abs(saved):.1%} of the time at {where}"
        doubt = "" if are_apart else "; the intervals overlap, so this may be chance"
        yield f"order: {order} {gain}, compared with the order of the file{doubt}."


def _grid_lines(rows: Sequence[JobRow]) -> Iterator[str]:
    for row in rows:
        if row.grid_ratio is not None and abs(row.grid_ratio - 1) > _GRID_OFF:
            word = "more" if row.grid_ratio > 1 else "less"
            yield (
                f"{row.setting}, {row.point.batch_size} at once: a batch of the job's mean lengths shows "
                f"{abs(row.grid_ratio - 1):.0%} {word} throughput than the job's plateau."
            )
