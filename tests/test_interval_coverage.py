"""How often intervals of adaptive points, and bounds that are looked at again and again, hold the true mean."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from statistics import fmean, stdev
from types import ModuleType

import numpy as np
import pytest

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.race import SURE
from batch_inference.core.statistics import STOPPED_BY_ITSELF, ci95_half_width
from batch_inference.measure.resume import has_runs_enough
from builders import make_point, make_queue_point, make_result
from conftest import REPOSITORY

LEAST_COVERED = {"normal": 0.94, "lognormal": 0.92}


@pytest.fixture(scope="module")
def simulation() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "benchmarks"))
        yield importlib.import_module("interval_coverage")


@pytest.mark.slow
@pytest.mark.parametrize("shape", LEAST_COVERED)
def test_an_adaptive_interval_covers_at_every_spread(simulation: ModuleType, shape: str) -> None:
    noise = simulation.draws(shape, simulation.POINTS)
    found = {spread: simulation.adaptive(noise, spread) for spread in simulation.SPREADS}
    assert {spread: one.coverage for spread, one in found.items() if one.coverage < LEAST_COVERED[shape]} == {}
    # For at most one more run than Student's t would have made, where runs vary by 1 % or less.
    for spread in (spread for spread in found if spread <= 0.01):
        as_before = simulation.adaptive(noise, spread, wider=1.0)
        assert found[spread].runs.mean() <= as_before.runs.mean() + 1


def test_a_tenth_less_would_not_be_enough(simulation: ModuleType) -> None:
    noise = simulation.draws("lognormal", simulation.POINTS)
    covered = [simulation.adaptive(noise, spread, STOPPED_BY_ITSELF - 0.1).coverage for spread in (0.03, 0.035)]
    assert max(covered) < LEAST_COVERED["lognormal"]
    assert simulation.adaptive(noise, 0.035, wider=1.0).coverage < 0.87


@pytest.mark.parametrize("shape", LEAST_COVERED)
def test_the_simulated_rule_is_the_one_that_stops_and_is_reported(simulation: ModuleType, shape: str) -> None:
    """Of points of all lengths, run by run."""
    noise = simulation.draws(shape, 60)
    simulated = simulation.adaptive(noise, 0.02)
    config = ExperimentConfig(model="m")
    assert len(set(simulated.runs)) == 8
    for runs_s, count, half_width_s in zip(1 + 0.02 * noise, simulated.runs, simulated.half_width, strict=True):
        points = [make_point(latencies_s=runs_s[:made]) for made in range(1, count + 1)]
        assert [has_runs_enough(point, config) for point in points] == [False] * (count - 1) + [True]
        point = make_result(points=points[-1:]).points[0]
        assert point.summary["latency_ci95_s"] == pytest.approx(half_width_s, rel=1e-9)


@pytest.mark.parametrize("runs", [2, 3, 5, 10])
def test_the_interval_of_a_fixed_number_of_runs_covers_95_percent(simulation: ModuleType, runs: int) -> None:
    noise = simulation.draws("normal", 10_000, runs)
    covered = [abs(fmean(values)) <= (ci95_half_width(values) or 0) for values in noise.tolist()]
    assert fmean(covered) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize(("num_runs", "wider"), [(4, 1.0), (None, STOPPED_BY_ITSELF)])
def test_a_fixed_number_of_runs_is_reported_by_students_t(num_runs: int | None, wider: float) -> None:
    values = [1.0, 1.02, 0.97, 1.01]
    result = make_result(points=[make_point(latencies_s=values)], config={"num_runs": num_runs})
    expected = wider * 3.182 * stdev(values) / 2
    assert result.points[0].summary["latency_ci95_s"] == pytest.approx(expected, rel=1e-6)


def test_runs_of_a_queue_do_not_stop_by_themselves() -> None:
    result = make_result(points=[make_queue_point(2, (24,)), make_point()])
    assert [result.is_adaptive(point) for point in result.points] == [False, True]


@pytest.mark.parametrize("shape", LEAST_COVERED)
@pytest.mark.parametrize("spread", [0.005, 0.02, 0.1])
def test_a_search_leaves_the_best_at_most_as_often_as_it_may(simulation: ModuleType, shape: str, spread: float) -> None:
    wrong, plain = (simulation.bounds_wrong(shape, spread, sure) for sure in (SURE, 1.0))
    assert 1 - (1 - wrong) ** simulation.SETTINGS <= 0.05
    # Looking at the interval itself again and again is what the bounds are for.
    assert 1 - (1 - plain) ** simulation.SETTINGS > 0.05


def test_lognormal_noise_is_lopsided_with_a_mean_of_0_and_a_deviation_of_1(simulation: ModuleType) -> None:
    noise = simulation.draws("lognormal", 50_000)
    assert (noise.mean(), noise.std()) == pytest.approx((0, 1), abs=0.01)
    assert float(np.mean(noise**3)) == pytest.approx(1.75, abs=0.1)


@pytest.mark.slow
def test_the_table_is_the_one_that_the_program_prints(simulation: ModuleType) -> None:
    shown = (REPOSITORY / "docs" / "interval_coverage.md").read_text(encoding="utf-8")
    assert shown == simulation.markdown() + "\n", "python benchmarks/interval_coverage.py > docs/interval_coverage.md"
