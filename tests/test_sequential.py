"""Bounds that hold however often one looks: by hand, and what they are proportional to."""

from __future__ import annotations

import math

import pytest

from batch_inference.core.sequential import anytime_bounds
from batch_inference.core.statistics import t_quantile


def test_the_bounds_after_three_runs_by_hand() -> None:
    # One candidate has 5 %, of which the first look has half. t(2) at 2.5 % is 6.2053, the standard error 1 / sqrt(3).
    low, high = anytime_bounds([9.0, 10.0, 11.0], candidates=1)
    assert low == pytest.approx(10 - 6.2053 / math.sqrt(3), abs=1e-4)
    assert high == pytest.approx(10 + 1.4 * 6.2053 / math.sqrt(3), abs=1e-4)


@pytest.mark.parametrize(("count", "part"), [(3, 2), (4, 6), (5, 12), (10, 72)])
def test_candidates_and_looks_share_the_error(count: int, part: int) -> None:
    runs = [10.0 + step % 2 for step in range(count)]
    low, _ = anytime_bounds(runs, candidates=7, error=0.1)
    plain, _ = anytime_bounds(runs, candidates=1, error=0.1)
    center = sum(runs) / count
    expected = t_quantile(count - 1, 0.1 / 7 / part) / t_quantile(count - 1, 0.1 / part)
    assert (center - low) / (center - plain) == pytest.approx(expected)


def test_all_looks_together_have_no_more_than_the_error() -> None:
    assert sum(1 / ((count - 2) * (count - 1)) for count in range(3, 100_000)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("runs", [[], [1.0], [1.0, 1.0]])
def test_fewer_than_three_runs_have_no_bounds(runs: list[float]) -> None:
    assert anytime_bounds(runs, candidates=1) == (-math.inf, math.inf)


def test_equal_runs_are_certain() -> None:
    assert anytime_bounds([0.25] * 3, candidates=9) == (0.25, 0.25)


@pytest.mark.parametrize(("candidates", "error"), [(0, 0.05), (1, 0.0), (1, 1.0)])
def test_a_search_of_nothing_and_an_error_that_is_none_are_refused(candidates: int, error: float) -> None:
    with pytest.raises(ValueError, match="candidates, an error of"):
        anytime_bounds([1.0, 2.0, 3.0], candidates, error)


@pytest.mark.parametrize("error", [0.05, 1e-3, 1e-7])
@pytest.mark.parametrize("degrees", [1, 2, 3, 8, 9, 200, 10**6])
def test_quantiles_for_every_error_are_students_t(degrees: int, error: float) -> None:
    special = pytest.importorskip("scipy.special")
    assert special.stdtr(degrees, -t_quantile(degrees, error)) == pytest.approx(error / 2, rel=1e-6)
