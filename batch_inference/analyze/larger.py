"""Whether larger batches should be tried: the best point has the largest size, and throughput was still growing."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from batch_inference.analyze.answers import Analysis, Group
from batch_inference.analyze.decide import GOALS
from batch_inference.analyze.jobs import JobAnswer, JobRow
from batch_inference.analyze.tables import believable, half_width
from batch_inference.core.climb import TIE
from batch_inference.core.queue_runs import Interval
from batch_inference.core.verdict import FULL_KV_CACHE

_THROUGHPUT = GOALS[0].column
# What of a point says that a larger batch would wait for memory.
_KV_USES = ("kv_use", "kv_peak_use")


@dataclass(frozen=True)
class Growth:
    """Of throughput, from the next smaller batch size that was measured."""

    smaller: int
    batch_size: int
    share: float

    def __str__(self) -> str:
        by = f"{100 * self.share:.0f} %" if self.share < 1 else f"a factor of {1 + self.share:.2g}"
        return f"{by} from {self.smaller}"


def growth_of_batch(row: Mapping[Hashable, Any], group: Group, analysis: Analysis) -> Growth | None:
    """Up to this point; None where larger sizes were asked for, the batch did not
    run at once, or it is no more than chance or a tie. Of a setting the cost and the throughput per device grow in the
    same way."""
    points = group.points
    for name in ("setting", "seq_len", "max_tokens"):
        points = points[points[name] == row[name]]
    points = believable(points).sort_values("batch_size", kind="stable")
    here, smaller = (points[places] for places in _split(points, int(row["batch_size"])))
    if here.empty or smaller.empty:
        return None
    best, before = here.iloc[0].to_dict(), smaller.iloc[-1].to_dict()
    setting = next(one for one in analysis.settings if one.file == best["file"])
    shape = (int(row["batch_size"]), int(row["seq_len"]), int(row["max_tokens"]), None, None)
    if setting.largest_size(shape) > int(row["batch_size"]) or not _has_room(best):
        return None
    halves = [half_width(one, _THROUGHPUT) for one in (best, before)]
    if None in halves:
        return None
    now, then = (_interval(one[_THROUGHPUT], half) for one, half in zip((best, before), halves, strict=True))
    return _growth((int(before["batch_size"]), then), (int(best["batch_size"]), now))


def _split(points: Any, batch_size: int) -> tuple[Any, Any]:
    return points["batch_size"] == batch_size, points["batch_size"] < batch_size


def growth_of_job(row: JobRow, answer: JobAnswer) -> Growth | None:
    """The same over the whole job, which has more requests than run at once."""
    point = row.point
    alike = [
        one
        for one in answer.rows
        if one.setting == row.setting
        and (one.point.tokens_per_step, one.point.workload) == (point.tokens_per_step, point.workload)
        and one.point.batch_size < point.batch_size
    ]
    is_waiting = answer.requests > point.batch_size * point.replicas
    running = point.summary.get("running_requests")
    is_full = running is not None and running < point.batch_size
    if not (alike and row.is_largest and is_waiting) or is_full or not _has_room(point.summary):
        return None
    before = max(alike, key=lambda one: one.point.batch_size)
    return _growth((before.point.batch_size, _speed(before.hours)), (point.batch_size, _speed(row.hours)))


def _speed(hours: Interval) -> Interval:
    ends = (None if end is None else 1 / end for end in (hours.high, hours.low))
    return Interval(1 / hours.value, *ends)


def _interval(value: float, half: float | None) -> Interval:
    return Interval(value, value - (half or 0.0), value + (half or 0.0))


def _growth(before: tuple[int, Interval], now: tuple[int, Interval]) -> Growth | None:
    """None where it is not known to be more than a search over batch sizes would call a tie."""
    (smaller, then), (batch_size, value) = before, now
    if value.low is None or then.high is None:
        return None
    gain, chance = value.value - then.value, math.hypot(value.value - value.low, then.high - then.value)
    if gain <= max(chance, TIE * then.value):
        return None
    return Growth(smaller, batch_size, gain / then.value)


def _has_room(numbers: Mapping[Any, Any]) -> bool:
    """Whether the batch ran at once, and left room in the KV cache; what is unknown is no reason against it."""
    most = {"waves": 1.0, "preemptions": 0.0, **dict.fromkeys(_KV_USES, FULL_KV_CACHE)}
    known = ((numbers.get(name), limit) for name, limit in most.items())
    return not any(value is not None and value > limit for value, limit in known)


def try_larger(found: Sequence[tuple[str, Growth]]) -> Iterator[str]:
    """In a sentence, of what each setting is called; of several prompt lengths that with the largest growth counts."""
    growths: dict[str, Growth] = {}
    for name, growth in found:
        if name not in growths or growth.share > growths[name].share:
            growths[name] = growth
    advice = "try larger ones with --batch-sizes."
    if len(growths) == 1:
        ((name, growth),) = growths.items()
        largest = f"{growth.batch_size} is the largest size measured with {name}"
        yield f"{largest}, and throughput still grew by {growth}: {advice}"
    elif growths:
        each = ", ".join(f"{name} by {growth} to {growth.batch_size}" for name, growth in growths.items())
        yield f"Throughput still grew at the largest sizes measured ({each}): {advice}"
