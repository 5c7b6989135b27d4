#!/usr/bin/env python3
"""How often intervals and bounds hold the true mean, found by simulation.

    python benchmarks/interval_coverage.py > docs/interval_coverage.md

First the 95 % interval of points whose runs (3 to 10) go on until it is within ±2 %, compared with plain
Student's t under the same rule; then the bounds by which `best` drops settings (`core/race.py`). Runs are normal, or
skewed to the slow side (lognormal, sigma 0.5, whose longest of a hundred is 4 of its standard deviations away). Takes
seconds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from batch_inference.core.config import MIN_RUNS, ExperimentConfig  # noqa: E402
from batch_inference.core.race import SURE  # noqa: E402
from batch_inference.core.statistics import STOPPED_BY_ITSELF, t_quantile_95  # noqa: E402

Floats = NDArray[np.float64]

SPREADS = (0.001, 0.003, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.05, 0.07, 0.1, 0.2, 0.5)
SHAPES = ("normal", "lognormal")
BOUND_SPREADS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)
SETTINGS = 10  # of a search
POINTS = 50_000
ON_THE_WAY = 2  # runs of the size before the best
TARGET, MAX_RUNS = ExperimentConfig.target_ci, ExperimentConfig.max_runs  # the defaults
SIGMA = 0.5


def main() -> None:
    print(markdown())


def markdown() -> str:
    """Both tables."""
    return "\n".join([*_table_of_intervals(), "", *_table_of_bounds()])


def _table_of_intervals() -> list[str]:
    lines = [
        f"{POINTS:,} points for each number; ±{TARGET:.0%}, {MIN_RUNS} to {MAX_RUNS} runs. By the rule that is used, "
        "and by Student's t as it is for a fixed number of runs.",
        "",
        "| runs vary by | normal: runs | covers | Student's t: runs | covers | lognormal: runs | covers "
        "| Student's t: runs | covers |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    noises = {shape: draws(shape, POINTS) for shape in SHAPES}
    for spread in SPREADS:
        found = [adaptive(noises[shape], spread, wider) for shape in SHAPES for wider in (STOPPED_BY_ITSELF, 1.0)]
        cells = [f"{one.runs.mean():.1f} | {one.coverage:.1%}" for one in found]
        lines.append(f"| {spread * 100:g}% | {' | '.join(cells)} |")
    return lines


def _table_of_bounds() -> list[str]:
    lines = [
        f"Searches of {SETTINGS} settings in which any is bounded too low, of {POINTS:,} settings simulated: the best "
        f"size has {MIN_RUNS} to {MAX_RUNS} runs, the one before it {ON_THE_WAY}. With bounds {SURE:g} half widths of "
        "the interval away, and with the interval itself.",
        "",
        f"| runs vary by | {' | '.join(f'{shape} | the interval itself' for shape in SHAPES)} |",
        "|---:|---:|---:|---:|---:|",
    ]
    for spread in BOUND_SPREADS:
        of_one = [bounds_wrong(shape, spread, sure) for shape in SHAPES for sure in (SURE, 1.0)]
        lines.append(f"| {spread * 100:g}% | {' | '.join(f'{1 - (1 - one) ** SETTINGS:.1%}' for one in of_one)} |")
    return lines


@dataclass
class Adaptive:
    """Simulated points, one entry each: how many runs were made, their mean, and the half width of its interval."""

    runs: NDArray[np.int64]
    mean: Floats
    half_width: Floats

    @property
    def coverage(self) -> float:
        """How often the interval holds the true mean, which is 1."""
        return float((np.abs(self.mean - 1) <= self.half_width).mean())


def draws(shape: str, points: int, runs: int = MAX_RUNS) -> Floats:
    """Noise with mean 0 and standard deviation 1, one row per point."""
    normal = np.random.default_rng(0).normal(size=(points, runs))
    if shape == "normal":
        return normal
    center = np.exp(SIGMA**2 / 2)
    lopsided: Floats = (np.exp(SIGMA * normal) / center - 1) / np.sqrt(np.exp(SIGMA**2) - 1)
    return lopsided


def adaptive(noise: Floats, spread: float, wider: float = STOPPED_BY_ITSELF) -> Adaptive:
    """Points around a true mean of 1 that stop once an interval of `wider` times Student's t is narrow."""
    mean, half_width = _of_first_runs(1 + spread * noise)
    half_width = wider * half_width
    stops = (half_width <= TARGET * mean) & (mean > 0)
    stops[:, : MIN_RUNS - 1] = False
    stops[:, -1] = True
    last = stops.argmax(axis=1)
    rows = np.arange(len(noise))
    return Adaptive(last + 1, mean[rows, last], half_width[rows, last])


def _of_first_runs(values: Floats) -> tuple[Floats, Floats]:
    """Mean of the first 1, 2, 3, ... runs of each row, and the half width of its interval by Student's t."""
    count = np.arange(1, values.shape[1] + 1)
    mean = np.cumsum(values, axis=1) / count
    # Around 1, which is near the mean, so that sums of squares lose no digits.
    squares = np.cumsum((values - 1) ** 2, axis=1) - count * (mean - 1) ** 2
    quantiles = np.array([np.inf, *(t_quantile_95(int(degrees)) for degrees in count[:-1])])
    with np.errstate(invalid="ignore", divide="ignore"):
        half_width = quantiles * np.sqrt(np.maximum(squares, 0) / (count - 1) / count)
    return mean, half_width


def bounds_wrong(shape: str, spread: float, sure: float) -> float:
    """Share of settings whose throughput is bounded too low."""
    noise = draws(shape, POINTS, MAX_RUNS + ON_THE_WAY)
    best, before = noise[:, :MAX_RUNS], 1 + spread * noise[:, MAX_RUNS:]
    points = adaptive(best, spread)
    made = np.arange(MAX_RUNS) < points.runs[:, None]
    # The size before is a different batch: its spread is a share of its own mean.
    squares = (np.where(made, (1 + spread * best) / points.mean[:, None] - 1, 0) ** 2).sum(axis=1)
    squares = squares + ((before / before.mean(axis=1, keepdims=True) - 1) ** 2).sum(axis=1)
    degrees = points.runs - 1 + ON_THE_WAY - 1
    quantiles = np.array([t_quantile_95(int(one)) for one in range(1, MAX_RUNS + ON_THE_WAY)])[degrees - 1]
    halves = quantiles * np.sqrt(squares / degrees / points.runs)
    return float(((1 + sure * halves) / points.mean < 1).mean())


if __name__ == "__main__":
    main()
