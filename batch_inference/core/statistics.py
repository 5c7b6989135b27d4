"""Steadiness, confidence intervals and percentiles of a handful of timed runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist, fmean

# What a normal variable of mean 0 and deviation 1 exceeds in size in 5 % of all cases.
Z_95 = NormalDist().inv_cdf(0.975)
# Above this, the expansion of a quantile is as good as the sum.
_MANY_DEGREES = 200
# Runs that continue until they agree stop too early if they agree by luck. This many times Student's
# interval still covers 95 %, or close to it (benchmarks/interval_coverage.py).
STOPPED_BY_ITSELF = 1.4


def t_quantile_95(degrees_of_freedom: int) -> float:
    """What the absolute value of Student's t exceeds in 5 % of all cases. Up to 30 degrees of freedom it has the three
    decimals of printed tables, so that numbers of earlier files stay the same."""
    exact = t_quantile(degrees_of_freedom, 0.05)
    return round(exact, 3) if degrees_of_freedom <= 30 else exact


@lru_cache(maxsize=1024)
def t_quantile(degrees_of_freedom: int, error: float) -> float:
    """What the absolute value of Student's t exceeds with probability `error`: by bisection, and for many degrees of
    freedom by the Cornish-Fisher expansion."""
    if degrees_of_freedom < 1:
        raise ValueError(f"degrees_of_freedom must be at least 1, got {degrees_of_freedom}")
    if degrees_of_freedom > _MANY_DEGREES:
        z = NormalDist().inv_cdf(1 - error / 2)
        return z + (z**3 + z) / 4 / degrees_of_freedom + (5 * z**5 + 16 * z**3 + 3 * z) / 96 / degrees_of_freedom**2
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _share_within(middle, degrees_of_freedom) < 1 - error:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees_of_freedom) * math.tan(low)


def _share_within(angle: float, degrees_of_freedom: int) -> float:
    """Probability of |t| < sqrt(degrees) x tan(angle): the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = degrees_of_freedom % 2
    term = cosine if is_odd else 1.0
    total = term if degrees_of_freedom > 1 else 0.0
    for step in range(2 + is_odd, degrees_of_freedom, 2):
        term *= cosine**2 * (step - 1) / step
        total += term
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total


def mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def ci95_half_width(values: Sequence[float], adaptive: bool = False) -> float | None:
    """Half width of the 95 % interval of the mean; None for fewer than two values. Student's t, and wider if the
    number of values was not fixed: `adaptive` ones went on until the interval was narrow."""
    if len(values) < 2:
        return None
    half_width = t_quantile_95(len(values) - 1) * standard_error(values)
    return STOPPED_BY_ITSELF * half_width if adaptive else half_width


def relative_ci95(values: Sequence[float], adaptive: bool = False) -> float | None:
    """The same as a fraction of the mean: 0.02 if the mean is known to ±2 %. The values are above 0."""
    half_width = ci95_half_width(values, adaptive)
    return None if half_width is None else half_width / fmean(values)


def is_narrow(values: Sequence[float], target: float) -> bool:
    """Whether adaptive values are enough: the 95 % interval of the mean is within ± `target` (0.02 = 2 %) of it."""
    width = relative_ci95(values, adaptive=True)
    return width is not None and width <= target


def trend(values: Sequence[float]) -> tuple[float, float] | None:
    """Change from the first value to the last along a least-squares line, and the half width of its 95 %
    interval; None for fewer than three values."""
    count = len(values)
    if count < 3:
        return None
    center = fmean(values)
    steps = [index - (count - 1) / 2 for index in range(count)]
    squares = math.fsum(step**2 for step in steps)
    slope = math.fsum(step * value for step, value in zip(steps, values, strict=True)) / squares
    left_over = math.fsum((value - center - slope * step) ** 2 for step, value in zip(steps, values, strict=True))
    half_width = t_quantile_95(count - 2) * math.sqrt(left_over / (count - 2) / squares)
    return slope * (count - 1), half_width * (count - 1)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of two or more values. In floating point, which is 20 times as fast as the exact fractions of
    statistics.stdev."""
    center, count = fmean(values), len(values)
    return math.sqrt(math.fsum((value - center) ** 2 for value in values) / (count - 1) / count)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear interpolation between the closest ranks (numpy's default); None without values."""
    return percentile_of_sorted(sorted(values), percent)


def percentile_of_sorted(ordered: Sequence[float], percent: float) -> float | None:
    """The same for values in rising order."""
    if not ordered:
        return None
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = math.ceil(rank)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def is_steady(latencies_s: Sequence[float], tolerance: float) -> bool:
    """True when the last two runs differ by at most `tolerance` (0.05 = 5 %) of the longer one."""
    if len(latencies_s) < 2:
        return False
    last, previous = latencies_s[-1], latencies_s[-2]
    return abs(last - previous) <= tolerance * max(last, previous)
