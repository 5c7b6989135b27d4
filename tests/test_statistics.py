"""Quantiles, intervals, percentiles and steadiness against known numbers."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from batch_inference.core.statistics import (
    ci95_half_width,
    is_narrow,
    is_steady,
    mean,
    percentile,
    relative_ci95,
    t_quantile_95,
    trend,
)


@pytest.mark.parametrize(
    ("degrees_of_freedom", "expected"),
    # NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2, upper-tail probability 0.025.
    [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042), (40, 2.021), (60, 2.000), (100, 1.984)],
)
def test_t_quantiles_are_those_of_the_printed_table(degrees_of_freedom: int, expected: float) -> None:
    assert t_quantile_95(degrees_of_freedom) == pytest.approx(expected, abs=1e-3)


def test_t_quantiles_fall_towards_that_of_the_normal_distribution() -> None:
    quantiles = [t_quantile_95(degrees) for degrees in (*range(1, 300), 10**9)]
    assert quantiles == sorted(quantiles, reverse=True)
    assert quantiles[-1] == pytest.approx(1.959964, abs=1e-6)


def test_a_t_quantile_without_a_degree_of_freedom_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        t_quantile_95(0)


def test_the_interval_of_three_values_by_hand() -> None:
    # mean 2, standard deviation 1, t(2) = 4.303: 4.303 x 1 / sqrt(3)
    assert ci95_half_width([1.0, 2.0, 3.0]) == pytest.approx(2.484338, abs=1e-5)
    # The same runs, if they stopped by themselves.
    assert ci95_half_width([1.0, 2.0, 3.0], adaptive=True) == pytest.approx(1.4 * 2.484338, abs=1e-5)


def test_equal_values_have_an_interval_of_zero() -> None:
    assert ci95_half_width([0.25, 0.25, 0.25]) == 0


@pytest.mark.parametrize("values", [[], [1.0]])
def test_fewer_than_two_values_have_no_interval(values: list[float]) -> None:
    assert ci95_half_width(values) is None


def test_the_interval_is_that_of_exact_arithmetic() -> None:
    values = [1e6 + offset for offset in (0.1, 0.25, 0.3, 0.45)]
    assert ci95_half_width(values) == pytest.approx(3.182 * statistics.stdev(values) / 2, rel=1e-6)


def test_the_relative_interval_is_a_fraction_of_the_mean() -> None:
    assert relative_ci95([1.0, 2.0, 3.0]) == pytest.approx(1.242169, abs=1e-5)
    assert relative_ci95([1.0]) is None


@pytest.mark.parametrize(
    ("spread", "narrow"),
    # Three values that stopped by themselves have 1.4 x 2.484 times the spread as their interval.
    [(0.0057, True), (0.0058, False), (0.0, True)],
)
def test_narrow_means_that_the_interval_is_within_the_target(spread: float, narrow: bool) -> None:
    assert is_narrow([1.0, 1.0 + spread, 1.0 - spread], 0.0199) is narrow


def test_a_single_value_is_never_narrow() -> None:
    assert not is_narrow([1.0], 1.0)


def test_the_trend_of_four_values_by_hand() -> None:
    # slope 0.8, left over 0.3 + 0.9 - 1.1 - 0.1 around the line: squares 1.8, error sqrt(1.8 / 2 / 5), t(2) = 4.303
    change, half_width = trend([1.0, 3.0, 2.0, 4.0]) or (0.0, 0.0)
    assert change == pytest.approx(2.4)
    assert half_width == pytest.approx(3 * 4.303 * 0.424264, abs=1e-4)


def test_a_straight_line_is_all_trend() -> None:
    assert trend([1.0, 1.5, 2.0]) == (1.0, 0.0)
    assert trend([2.0, 2.0, 2.0]) == (0.0, 0.0)
    assert trend([1.0, 2.0]) is None


def test_no_values_have_neither_mean_nor_percentile() -> None:
    assert mean([]) is None
    assert percentile([], 50) is None


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 10.0), (25, 17.5), (50, 25.0), (90, 37.0), (99, 39.7), (100, 40.0)]
)
def test_percentiles_lie_between_the_closest_ranks(percent: float, expected: float) -> None:
    assert percentile([40.0, 10.0, 30.0, 20.0], percent) == pytest.approx(expected)


def test_every_percentile_of_one_value_is_that_value() -> None:
    assert [percentile([7.0], percent) for percent in (0, 50, 99, 100)] == [7.0] * 4


@pytest.mark.parametrize(
    ("latencies_s", "steady"),
    [
        ([], False),
        ([1.0], False),
        ([7.0, 1.0, 1.04], True),
        ([1.0, 1.04, 7.0], False),
        ([100.0, 95.0], True),  # exactly 5 % of the longer one
        ([95.0, 100.0], True),
        ([1.0, 0.94], False),
    ],
)
def test_steady_means_that_the_last_two_agree(latencies_s: list[float], steady: bool) -> None:
    assert is_steady(latencies_s, 0.05) is steady


def test_every_quantile_is_students_t() -> None:
    """Against the distribution itself, integrated by Simpson's rule: two-sided, 2.5 % at each end."""
    for degrees in range(1, 61):
        edge = t_quantile_95(degrees)
        grid = np.linspace(0, edge, 2001)
        density = (1 + grid**2 / degrees) ** (-(degrees + 1) / 2)
        weights = np.ones(2001)
        weights[1:-1:2], weights[2:-1:2] = 4, 2
        scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
        within = scale * float(weights @ density) * (edge / 2000) / 3
        assert within == pytest.approx(0.475, abs=3e-5 if degrees <= 30 else 1e-9), degrees


def test_few_values_have_what_few_values_have() -> None:
    assert (mean([]), ci95_half_width([]), ci95_half_width([1.0]), relative_ci95([1.0])) == (None,) * 4
    assert (trend([1.0, 2.0]), percentile([], 50), is_narrow([1.0], 9.0)) == (None, None, False)
    assert (mean([1.0, 2.0]), percentile([3.0], 99)) == (1.5, 3.0)
    assert ci95_half_width([1.0, 3.0]) == pytest.approx(12.706)
    assert relative_ci95([1.0, 3.0]) == pytest.approx(12.706 / 2)
    # A line through 1, 2, 3: what is between its ends, without doubt.
    assert trend([1.0, 2.0, 3.0]) == pytest.approx((2.0, 0.0))
    assert trend([1.0, 3.0, 2.0]) == pytest.approx((1.0, 2 * 12.706 * math.sqrt(1.5 / 2)))
    assert [percentile([4.0, 1.0, 2.0], percent) for percent in (0, 25, 50, 75, 100)] == [1.0, 1.5, 2.0, 3.0, 4.0]
    # Of the longer one, and of the last two.
    assert [is_steady(values, 0.5) for values in ([9.0, 1.0, 2.0], [9.0, 2.0, 1.0], [1.0, 2.01], [1.0])] == [
        True, True, False, False,
    ]  # fmt: skip
    width = relative_ci95([1.0, 1.01], adaptive=True) or 0.0
    assert [is_narrow([1.0, 1.01], target) for target in (width, width * 0.999)] == [True, False]
