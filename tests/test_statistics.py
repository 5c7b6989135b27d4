"""Quantiles, intervals, percentiles and steadiness against known numbers."""

from __future__ import annotations

import pytest

from batch_inference.statistics import ci95_half_width, is_steady, mean, percentile, t_quantile_95


@pytest.mark.parametrize(
    ("degrees_of_freedom", "expected"),
    # NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2, upper-tail probability 0.025.
    [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042), (40, 2.021), (60, 2.000), (100, 1.984)],
)
def test_t_quantiles_are_those_of_the_printed_table(degrees_of_freedom: int, expected: float) -> None:
    assert t_quantile_95(degrees_of_freedom) == pytest.approx(expected, abs=1e-3)


def test_t_quantiles_fall_towards_that_of_the_normal_distribution() -> None:
    quantiles = [t_quantile_95(degrees) for degrees in (*range(1, 200), 10**9)]
    assert quantiles == sorted(quantiles, reverse=True)
    assert quantiles[-1] == pytest.approx(1.959964, abs=1e-6)


def test_a_t_quantile_without_a_degree_of_freedom_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        t_quantile_95(0)


def test_the_interval_of_three_values_by_hand() -> None:
    # mean 2, standard deviation 1, t(2) = 4.303: 4.303 x 1 / sqrt(3)
    assert ci95_half_width([1.0, 2.0, 3.0]) == pytest.approx(2.484338, abs=1e-5)


def test_equal_values_have_an_interval_of_zero() -> None:
    assert ci95_half_width([0.25, 0.25, 0.25]) == 0


@pytest.mark.parametrize("values", [[], [1.0]])
def test_fewer_than_two_values_have_no_interval(values: list[float]) -> None:
    assert ci95_half_width(values) is None


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
        ([1.0, 0.94], False),
    ],
)
def test_steady_means_that_the_last_two_agree(latencies_s: list[float], steady: bool) -> None:
    assert is_steady(latencies_s, 0.05) is steady
