"""Which batch size to try next, so that the best is found without trying all: `--batch-sizes auto`.

Throughput rises with the batch size until the device is full, requests wait for memory, or a limit is broken. So sizes
double while each gains more than chance would, or a tenth; then the neighbours of the best are tried where they can be
better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from batch_inference.core.statistics import t_quantile_95

# The first size where throughput is asked for: smaller ones are quick, but hardly ever the best.
FIRST_SIZE = 16
# A gain by a larger size that is followed even where runs differ more than that.
_MUCH = 0.1
# Neighbours of the best that are tried.
_MOST_BETWEEN = 2
# Sizes nearer to each other than this are the same for a device.
_LEAST_STEP = 1.1


@dataclass(frozen=True, slots=True)
class Tried:
    """A batch size that was measured."""

    batch_size: int
    value: float  # throughput, or what else is the better the higher it is
    half: float  # of its 95 % interval
    fits: bool = True  # in memory at once
    excess: float = 0.0  # the largest of what has a limit, over its limit
    runs: int = 1

    @property
    def keeps_limits(self) -> bool:
        return self.excess <= 1


def pooled_halves(runs_s: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """Batch size -> the half width of the 95 % interval of its mean latency, as a share of it.

    Two runs tell little by themselves: so the spread is that of a size and its neighbours, up to twice and half of it.
    Larger batches vary less. Infinite where nothing was run twice.
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
    """The search among batch sizes of one setting, prompt length and engine load."""

    sizes: Sequence[int]  # in rising order
    rises: bool = True  # False where the smallest batch is the best, as for the shortest batch time
    between: Callable[[int], bool] = lambda _: True  # whether a size that is none of `sizes` may be tried

    def next_size(self, tried: Sequence[Tried]) -> int | None:
        """None where all that can matter is tried. `tried`: in any order."""
        if not tried:
            first = next((size for size in self.sizes if size >= FIRST_SIZE), self.sizes[-1])
            return first if self.rises else self.sizes[0]
        if not self.rises:
            return None
        known = sorted(tried, key=lambda one: one.batch_size)
        return self._further_up(known) or self._further_down(known) or self._beside_best(known)

    def is_exhausted(self, tried: Sequence[Tried]) -> bool:
        """Whether no larger batch could be better: throughput rises no more, or there is no larger size. Not where
        memory or a limit has ended it."""
        return bool(tried) and all(one.fits and one.keeps_limits for one in tried)

    def _further_up(self, known: Sequence[Tried]) -> int | None:
        last = known[-1]
        if not _is_good(last) or (len(known) > 1 and not _gains(known[-2], last)):
            return None
        return next((size for size in self.sizes if size > last.batch_size), None)

    def _further_down(self, known: Sequence[Tried]) -> int | None:
        """Where not even the smallest keeps the limits, or fits; or where it is the best so far."""
        first = known[0]
        if _is_good(first) and best_of(known) is not first:
            return None
        return next((size for size in reversed(self.sizes) if size < first.batch_size), None)

    def _beside_best(self, known: Sequence[Tried]) -> int | None:
        best = best_of(known)
        if best is None or sum(one.batch_size not in self.sizes for one in known) >= _MOST_BETWEEN:
            return None
        place = known.index(best)
        summit = _summit(known, place)
        below, above = known[max(0, place - 1) : place], known[place + 1 : place + 2]
        for other in [*above, *below] if summit is None or summit.is_above else [*below, *above]:
            middle = (best.batch_size + other.batch_size) // 2
            small, large = sorted((best.batch_size, other.batch_size))
            if min(middle / small, large / middle) < _LEAST_STEP or not self.between(middle):
                continue
            if not _is_good(other) or (summit is not None and summit.gain > best.half):
                return middle
        return None


@dataclass(frozen=True, slots=True)
class _Summit:
    """Of the parabola through the best point and its neighbours, over the logarithm of the size."""

    gain: float  # over the best point
    is_above: bool  # at a larger size


def _summit(known: Sequence[Tried], place: int) -> _Summit | None:
    if not 0 < place < len(known) - 1:
        return None
    # A size that was lost has no value, and bends nothing.
    if any(one.value <= 0 for one in known[place - 1 : place + 2]):
        return None
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(one.batch_size), one.value) for one in known[place - 1 : place + 2])
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    bend = (right - left) / (x2 - x0)
    if bend >= 0:
        return None
    slope = left + bend * (x1 - x0)
    return _Summit(-(slope**2) / (4 * bend), slope >= 0)


def best_of(tried: Sequence[Tried]) -> Tried | None:
    """Of those that keep the limits; of equal ones the smaller batch."""
    kept = sorted((one for one in tried if one.keeps_limits), key=lambda one: one.batch_size)
    return max(kept, key=lambda one: one.value, default=None)


def _is_good(one: Tried) -> bool:
    return one.fits and one.keeps_limits


def _gains(before: Tried, after: Tried) -> bool:
    """More than chance would; or so much that one size more is cheaper than to miss it, where chance is large or not
    known."""
    gain = after.value - before.value
    return gain > math.hypot(before.half, after.half) or gain > _MUCH * before.value
