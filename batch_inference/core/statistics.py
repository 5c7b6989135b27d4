"""Steadiness, confidence intervals and percentiles of a handful of timed runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom (NIST/SEMATECH e-Handbook, 1.3.6.7.2).
_T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_Z_95 = 1.959964


def t_quantile_95(degrees_of_freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t; above 30 by the Cornish-Fisher expansion (error < 1e-4)."""
    if degrees_of_freedom < 1:
        raise ValueError(f"degrees_of_freedom must be at least 1, got {degrees_of_freedom}")
    if degrees_of_freedom <= len(_T_95):
        return _T_95[degrees_of_freedom - 1]
    first = (_Z_95**3 + _Z_95) / 4
    second = (5 * _Z_95**5 + 16 * _Z_95**3 + 3 * _Z_95) / 96
    return _Z_95 + first / degrees_of_freedom + second / degrees_of_freedom**2


def mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def ci95_half_width(values: Sequence[float]) -> float | None:
    """Half width of the 95 % confidence interval of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    return t_quantile_95(len(values) - 1) * _stdev(values) / math.sqrt(len(values))


def relative_ci95(values: Sequence[float]) -> float | None:
    """The same as a fraction of the mean: 0.02 where the mean is known to ±2 %. The values are above 0."""
    half_width = ci95_half_width(values)
    return None if half_width is None else half_width / fmean(values)


def is_narrow(values: Sequence[float], target: float) -> bool:
    """True when the 95 % interval of the mean is within ± `target` (0.02 = 2 %) of it."""
    width = relative_ci95(values)
    return width is not None and width <= target


def trend(values: Sequence[float]) -> tuple[float, float] | None:
    """Change from the first value to the last by a straight line of least squares, and the half width of its 95 %
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


def _stdev(values: Sequence[float]) -> float:
    """Of a sample. In floating point, which is 20 times as fast as the exact fractions of statistics.stdev."""
    center = fmean(values)
    return math.sqrt(math.fsum((value - center) ** 2 for value in values) / (len(values) - 1))


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear interpolation between the closest ranks (numpy's default); None without values."""
    return percentile_of_sorted(sorted(values), percent)


def percentile_of_sorted(ordered: Sequence[float], percent: float) -> float | None:
    """The same of values in rising order."""
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
