"""Student's t for fractional degrees of freedom, on whole columns: p-values, and the 95 % quantile. numpy alone."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.polynomial import Chebyshev
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Below the smallest step that a double can take, and instead of a zero that would be divided by.
_PRECISION, _TINY = 2.0**-52, 1e-300
# The fraction takes some 40 steps for a few runs, and about 2 * sqrt(degrees) for very many.
_MOST_STEPS = 100_000
# The quantile is smooth in 1 / degrees: of this degree the interpolation is exact to 1e-10 (tests/test_student.py).
_QUANTILE_DEGREE = 24


def p_values(t: Floats, degrees: Floats) -> Floats:
    """Two-sided p-values: how often |t| is as large by chance, for 1 or more `degrees` of freedom; NaN for unknown."""
    t, degrees = np.broadcast_arrays(np.asarray(t, dtype=float), np.asarray(degrees, dtype=float))
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        square = np.where(np.isinf(t), np.inf, t**2)
        # Of degrees / (degrees + t**2), and of one minus it, neither by a difference.
        x, rest = 1 / (1 + square / degrees), 1 / (1 + degrees / square)
    return _incomplete_beta(degrees / 2, x, rest)


def quantiles_95(degrees: Floats) -> Floats:
    """What |t| exceeds in 5 % of all cases, for 1 or more `degrees` of freedom; NaN for unknown."""
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = 1 / np.asarray(degrees, dtype=float)
    found: Floats = np.exp(_log_quantile()(np.where((inverse >= 0) & (inverse <= 1), inverse, np.nan)))
    return found


@cache
def _log_quantile() -> Chebyshev:
    """The logarithm of the quantile as a function of 1 / degrees, from 0 to 1."""
    return Chebyshev.interpolate(lambda inverse: np.log(_bisected(1 / inverse)), _QUANTILE_DEGREE, domain=[0, 1])


def _bisected(degrees: Floats) -> Floats:
    """The quantile by halving: 1.96 for infinitely many degrees of freedom, 12.71 for one."""
    low, high = np.full_like(degrees, 1.9), np.full_like(degrees, 12.8)
    for _ in range(42):
        middle = (low + high) / 2
        is_below = p_values(middle, degrees) > 0.05
        low, high = np.where(is_below, middle, low), np.where(is_below, high, middle)
    return (low + high) / 2


# --- the regularised incomplete beta function I_x(a, 1/2) ---------------------------------------------------------


def _incomplete_beta(a: Floats, x: Floats, rest: Floats) -> Floats:
    """`rest` is 1 - x. The fraction converges fast on one side of the mean; the other side is one minus it."""
    half = np.full_like(a, 0.5)
    is_far = x < (a + 1) / (a + 2.5)
    one, two = np.where(is_far, a, half), np.where(is_far, half, a)
    value = np.where(is_far, x, rest)
    with np.errstate(divide="ignore", invalid="ignore"):
        # x**a * (1-x)**(1/2) / B(a, 1/2); the logarithm of x from that of the smaller of the two.
        log_x = np.where(x < 0.5, np.log(x), np.log1p(-rest))
        front = np.exp(a * log_x) * np.sqrt(rest) * _gamma_ratio(a) / np.sqrt(np.pi)
        part = front / one * _fraction(one, two, value)
    found: Floats = np.where(is_far, part, 1 - part)
    return np.where(np.isnan(a) | np.isnan(x), np.nan, found)


def _gamma_ratio(z: Floats) -> Floats:
    """Gamma(z + 1/2) / Gamma(z): 16 steps up, and from there the asymptotic series, whose next term is below 1e-13."""
    steps = np.ones_like(z)
    for k in range(16):
        steps *= (z + k) / (z + k + 0.5)
    high = z + 16
    series = 1 / (8 * high) - 1 / (192 * high**3) + 1 / (640 * high**5) - 17 / (14336 * high**7)
    ratio: Floats = steps * np.sqrt(high) * np.exp(-series)
    return ratio


def _fraction(a: Floats, b: Floats, x: Floats) -> Floats:
    """The continued fraction of the incomplete beta function by Lentz's method (Numerical Recipes, 6.4). What has
    converged takes no more steps."""
    found = np.full_like(x, np.nan)
    places = np.flatnonzero(~np.isnan(x) & ~np.isnan(a))
    shape, (a, b, x) = found.shape, (column.ravel()[places] for column in (a, b, x))
    found = found.ravel()
    c, d = np.ones_like(x), 1 / _no_zero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, _MOST_STEPS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d, c = 1 / _no_zero(1 + even * d), _no_zero(1 + even / c)
        value = value * d * c
        d, c = 1 / _no_zero(1 + odd * d), _no_zero(1 + odd / c)
        step = d * c
        value = value * step
        goes_on = np.abs(step - 1) > _PRECISION * 4
        found[places] = value
        if not goes_on.any():
            break
        if goes_on.mean() < 0.5:
            places = places[goes_on]
            a, b, x, c, d, value = (column[goes_on] for column in (a, b, x, c, d, value))
    return found.reshape(shape)


def _no_zero(values: Floats) -> Floats:
    return np.where(values == 0, _TINY, values)
