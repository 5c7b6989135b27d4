"""Student's t of our own against scipy, which is here for that alone, and against numbers that need no scipy."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest

from batch_inference.analyze.student import p_values, quantiles_95

DEGREES = (1.0, 1.3, 2.0, 4.7, 17.5, 30.0, 1e3, 1e6)


@pytest.mark.parametrize("degrees", DEGREES)
def test_p_values_are_those_of_scipy(special: ModuleType, degrees: float) -> None:
    t = np.concatenate([[0.0, -3.0, 1e-5, 1e3, 1e8, 1e200, np.inf], np.linspace(0, 60, 3001)])
    assert p_values(t, np.full_like(t, degrees)) == pytest.approx(2 * special.stdtr(degrees, -np.abs(t)), abs=1e-10)


def test_p_values_of_many_points_are_those_of_scipy(special: ModuleType) -> None:
    random = np.random.default_rng(0)
    t, degrees = random.normal(0, 5, 20_000), 1 + 30 * random.random(20_000)
    assert p_values(t, degrees) == pytest.approx(2 * special.stdtr(degrees, -np.abs(t)), abs=1e-10)


@pytest.mark.parametrize(
    ("t", "degrees", "expected"),
    [
        # In closed form: 1 - 2/pi * atan(t) for one degree of freedom, 1 - t / sqrt(2 + t**2) for two.
        (1e-9, 1, 1 - 2 / math.pi * 1e-9),
        (3.0, 1, 1 - 2 / math.pi * math.atan(3)),
        (-3.0, 2, 1 - 3 / math.sqrt(11)),
        # 1 - 2/pi * (atan(u) + u / (1 + u**2)) for three, with u = t / sqrt(3).
        (3.0, 3, 1 - 2 / math.pi * (math.atan(math.sqrt(3)) + math.sqrt(3) / 4)),
    ],
)
def test_p_values_in_closed_form(t: float, degrees: float, expected: float) -> None:
    assert p_values(np.array([t]), np.array([degrees]))[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("t", "degrees", "expected"), [(2.228, 10, 0.05), (2.750, 30, 0.01), (63.657, 1, 0.01)])
def test_p_values_of_the_tables(t: float, degrees: float, expected: float) -> None:
    """NIST/SEMATECH e-Handbook, 1.3.6.7.2, which has t to three decimals."""
    assert p_values(np.array([t]), np.array([degrees]))[0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("degrees", DEGREES)
def test_the_quantile_is_that_of_scipy(special: ModuleType, degrees: float) -> None:
    assert quantiles_95(np.array([degrees]))[0] == pytest.approx(special.stdtrit(degrees, 0.975), rel=1e-9)


def test_the_quantile_is_right_everywhere(special: ModuleType) -> None:
    degrees = 1 / np.linspace(1e-6, 1, 20_001)
    assert quantiles_95(degrees) == pytest.approx(special.stdtrit(degrees, 0.975), rel=1e-9)


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.706204736), (2, 4.302652730), (9, 2.262157163), (np.inf, 1.959963985)]
)
def test_the_quantile_of_known_cases(degrees: float, expected: float) -> None:
    assert quantiles_95(np.array([degrees]))[0] == pytest.approx(expected, rel=1e-9)


def test_the_unknown_stays_unknown() -> None:
    nan = math.nan
    found = p_values(np.array([nan, 1.0, 2.0]), np.array([3.0, nan, 4.0]))
    assert np.isnan(found).tolist() == [True, True, False]
    # There is no interval of fewer than two runs.
    assert np.isnan(quantiles_95(np.array([nan, 0.0, 0.5, -1.0]))).all()
    assert p_values(np.array([]), np.array([])).shape == quantiles_95(np.array([])).shape == (0,)
