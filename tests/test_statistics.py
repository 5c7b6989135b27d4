from __future__ import annotations

import math

import pytest

from batch_inference.statistics import ci95_half_width, is_steady, mean, percentile, t_quantile_95


@pytest.mark.parametrize(
    ("degrees_of_freedom", "quantile"),
    # NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2
    [(1, 12.706), (2, 4.303), (9, 2.262), (30, 2.042), (40, 2.021), (60, 2.000), (120, 1.980)],
)
def test_quantiles_of_students_t(degrees_of_freedom: int, quantile: float) -> None:
    assert t_quantile_95(degrees_of_freedom) == pytest.approx(quantile, abs=6e-4)


def test_no_degree_of_freedom_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        t_quantile_95(0)


def test_interval_of_three_values_by_hand() -> None:
    # mean 2, standard deviation 1
    assert ci95_half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))


def test_one_value_has_no_interval_and_none_has_no_mean() -> None:
    assert ci95_half_width([1.0]) is None
    assert mean([]) is None
    assert percentile([], 50) is None


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (50, 2.5), (90, 3.7), (99, 3.97), (100, 4)])
def test_percentiles_lie_between_the_closest_ranks(percent: float, value: float) -> None:
    assert percentile([4, 1, 3, 2], percent) == pytest.approx(value)


@pytest.mark.parametrize(
    ("latencies_s", "steady"),
    [
        ([], False),
        ([1.0], False),
        ([1.0, 1.05], True),
        ([1.0, 1.06], False),
        ([1.06, 1.0], False),
        ([9.0, 1.0, 1.0], True),
    ],
)
def test_steady_means_that_the_last_two_agree(latencies_s: list[float], steady: bool) -> None:
    assert is_steady(latencies_s, 0.05) == steady
