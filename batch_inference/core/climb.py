"""Which batch size to try next, to find the best without trying all: `--batch-sizes auto`.

Throughput rises with the batch size until the device is full, requests wait for memory, or a limit is broken. So the
size doubles while each step gains more than chance would, or a tenth; then neighbours of the best are tried if they
can be better. Large sizes cost most: on a device that is nearly full, each further request takes at least as long as
the last ones did, so a size that cannot gain more than a tie, or reach `to_beat`, is not tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from batch_inference.core.statistics import t_quantile_95

# As a share of the best: too small a difference to load an engine for, or to run a batch twice as large.
TIE = 0.02
# A bound is this many half widths of a 95 % interval above what was measured: it is checked again after each load
# and must hold over all checks together.
SURE = 2.0
# The first size when the goal is throughput: smaller ones are quick, but hardly ever the best.
FIRST_SIZE = 16
# A gain large enough to follow even if runs differ by more than that.
_MUCH = 0.1
# A device is nearly full if doubling the requests gains less than this.
_NEARLY_FULL = 0.3
# How many neighbours of the best are tried.
_MOST_BETWEEN = 2
# Sizes closer together than this make no difference to a device.
_LEAST_STEP = 1.1


@dataclass(frozen=True, slots=True)
class Tried:
    """A batch size that was measured."""

    batch_size: int
    value: float  # throughput, or anything else where higher is better
    half: float  # of its 95 % interval
    fits: bool = True  # in memory at once
    excess: float = 0.0  # the worst ratio of a limited value to its limit
    runs: int = 1
    own_half: float | None = None  # of the interval that its result says, once it has enough runs for one
    is_suspect: bool = False

    @property
    def shown_half(self) -> float:
        """Of the interval that people are told."""
        return self.half if self.own_half is None else self.own_half

    @property
    def keeps_limits(self) -> bool:
        return self.excess <= 1

    @property
    def taken_s(self) -> float:
        """The time of a batch, up to a constant factor: the tokens of a request."""
        return self.batch_size / self.value


def pooled_halves(runs_s: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """Batch size -> the half width of the 95 % interval of its mean latency, as a share of it.

    Two runs alone tell little, so the spread is pooled over a size and its neighbours, from half to twice the size.
    Larger batches vary less. Infinite if nothing was run twice.
    """
    spreads = {size: _squares(runs) for size, runs in runs_s.items()}
    halves = {}
    for size, runs in runs_s.items():
        near = [spreads[other] for other in runs_s if size <= 2 * other <= 4 * size]
        degrees = sum(count for _, count in near)
        squares = math.fsum(one for one, _ in near)
        halves[size] = t_quantile_95(degrees) * math.sqrt(squares / degrees / len(runs)) if degrees else math.inf
    return halves


def _squares(runs: Sequence[float]) -> tuple[float, int]:
    """The sum of squared distances from the mean, as shares of it, and its degrees of freedom."""
    middle = math.fsum(runs) / len(runs)
    return math.fsum((run / middle - 1) ** 2 for run in runs), len(runs) - 1


@dataclass(frozen=True)
class Climb:
    """The search over batch sizes at one setting, prompt length and engine load."""

    sizes: Sequence[int]  # in rising order
    rises: bool = True  # False if the smallest batch is the best, as for the shortest batch time
    between: Callable[[int], bool] = lambda _: True  # whether a size outside `sizes` may be tried
    to_beat: float = 0.0  # the search ends if this cannot be reached

    def next_size(self, tried: Sequence[Tried]) -> int | None:
        """None once everything that can matter has been tried. `tried`: in any order."""
        if not tried:
            first = next((size for size in self.sizes if size >= FIRST_SIZE), self.sizes[-1])
            return first if self.rises else self.sizes[0]
        if not self.rises:
            return None
        if self._is_hopeless(tried):
            return None
        known = sorted(tried, key=lambda one: one.batch_size)
        larger = self._further_up(known)
        if larger is not None and _is_tie(known, larger):
            larger = self._before_last(known)
        return larger or self._further_down(known) or self._beside_best(known)

    def is_exhausted(self, tried: Sequence[Tried]) -> bool:
        """Whether no larger batch could be better: throughput has stopped rising, or there is no larger size. False if
        memory, a limit or `to_beat` ended the search."""
        return bool(tried) and all(map(_is_good, tried)) and not self._is_hopeless(tried)

    def _is_hopeless(self, tried: Sequence[Tried]) -> bool:
        """Whether no size can reach `to_beat`. While throughput rises, no smaller size can either."""
        if not self.rises or min(tried, key=lambda one: one.batch_size) is max(tried, key=lambda one: one.value):
            return False
        return max(ceiling(tried), *(one.value + SURE * one.half for one in tried)) < self.to_beat

    def _further_up(self, known: Sequence[Tried]) -> int | None:
        last = known[-1]
        if not _is_good(last) or (len(known) > 1 and not _gains(known[-2], last)):
            return None
        return next((size for size in self.sizes if size > last.batch_size), None)

    def _further_down(self, known: Sequence[Tried]) -> int | None:
        """A smaller size, if even the smallest tried breaks a limit, does not fit, or is the best so far."""
        first = known[0]
        if _is_good(first) and best_of(known) is not first:
            return None
        return next((size for size in reversed(self.sizes) if size < first.batch_size), None)

    def _before_last(self, known: Sequence[Tried]) -> int | None:
        """A size between the two largest, if it may be better than both."""
        before, last = known[-2:]
        middle = (before.batch_size + last.batch_size) // 2
        is_other = middle >= _LEAST_STEP * before.batch_size and self._may_be_between(known, middle)
        return middle if is_other and _most_at(middle, known[:-1]) > last.value * (1 + TIE) else None

    def _may_be_between(self, known: Sequence[Tried], size: int) -> bool:
        return self.between(size) and sum(one.batch_size not in self.sizes for one in known) < _MOST_BETWEEN

    def _beside_best(self, known: Sequence[Tried]) -> int | None:
        best = best_of(known)
        if best is None:
            return None
        place = known.index(best)
        summit = _summit(known, place)
        below, above = known[max(0, place - 1) : place], known[place + 1 : place + 2]
        for other in [*above, *below] if summit is None or summit.is_above else [*below, *above]:
            middle = (best.batch_size + other.batch_size) // 2
            small, large = sorted((best.batch_size, other.batch_size))
            if min(middle / small, large / middle) < _LEAST_STEP or not self._may_be_between(known, middle):
                continue
            if not _is_good(other) or (summit is not None and summit.gain > best.half):
                return middle
        return None


@dataclass(frozen=True, slots=True)
class _Summit:
    """The top of the parabola through the best point and its neighbours, over the logarithm of the size."""

    gain: float  # over the best point
    is_above: bool  # at a larger size


def _summit(known: Sequence[Tried], place: int) -> _Summit | None:
    if not 0 < place < len(known) - 1:
        return None
    # A size that was lost has no value to fit.
    if any(one.value <= 0 for one in known[place - 1 : place + 2]):
        return None
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(one.batch_size), one.value) for one in known[place - 1 : place + 2])
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    bend = (right - left) / (x2 - x0)
    if bend >= 0:
        return None
    slope = left + bend * (x1 - x0)
    return _Summit(-(slope**2) / (4 * bend), slope >= 0)


def _full(tried: Sequence[Tried]) -> tuple[Tried, Tried] | None:
    """The two largest sizes that fit, if they show a device that is nearly full."""
    known = sorted((one for one in tried if one.fits and one.value > 0), key=lambda one: one.batch_size)
    if len(known) < 2:
        return None
    before, last = known[-2:]
    doublings = math.log2(last.batch_size / before.batch_size)
    is_full = last.value < before.value * (1 + _NEARLY_FULL) ** doublings
    return (before, last) if is_full and before.batch_size >= FIRST_SIZE else None


def _is_tie(known: Sequence[Tried], larger: int) -> bool:
    """Whether the means say that this size cannot beat the largest one by more than a tie."""
    last = known[-1]
    is_sure = all(one.half <= TIE * one.value for one in known[-2:])
    return is_sure and _most_at(larger, known) <= last.value * (1 + TIE)


def _most_at(size: int, known: Sequence[Tried]) -> float:
    """The value at a size above the last one, if each further request takes as long as the last ones did."""
    pair = _full(known)
    if pair is None:
        return math.inf
    before, last = pair
    each_s = (last.taken_s - before.taken_s) / (last.batch_size - before.batch_size)
    return size / (last.taken_s + (size - last.batch_size) * each_s)


def ceiling(tried: Sequence[Tried]) -> float:
    """What no larger batch exceeds, since each further request takes at least as long as the last ones did. Infinite if
    the device is not nearly full, or if the batch times are not known well enough."""
    pair = _full(tried)
    if pair is None:
        return math.inf
    before, last = pair
    unsure_s = math.hypot(*(one.taken_s * one.half / one.value for one in pair))
    least_s = last.taken_s - before.taken_s - SURE * unsure_s
    return (last.batch_size - before.batch_size) / least_s if least_s > 0 else math.inf


def best_of(tried: Sequence[Tried]) -> Tried | None:
    """The best of those that keep the limits; of equal ones the smaller batch."""
    kept = sorted((one for one in tried if one.keeps_limits), key=lambda one: one.batch_size)
    return max(kept, key=lambda one: one.value, default=None)


def _is_good(one: Tried) -> bool:
    return one.fits and one.keeps_limits


def _gains(before: Tried, after: Tried) -> bool:
    """Whether it gains more than chance would; or so much that one more size is cheaper than missing it, if chance
    is large or unknown."""
    gain = after.value - before.value
    return gain > math.hypot(before.half, after.half) or gain > _MUCH * before.value
