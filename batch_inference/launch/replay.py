"""Replays the search of `best` over recorded measurements: how long it would have taken, and what it would have found.

A run takes as long as one of the recorded runs of its point, an engine start as long as recorded, and batch sizes are
the recorded ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from statistics import fmean

from batch_inference.core.climb import Climb, Tried, best_of, pooled_halves
from batch_inference.core.config import MIN_RUNS, ExperimentConfig
from batch_inference.core.metrics import run_latencies_s
from batch_inference.core.race import Found, Goal, Layout, Load, Race, Search
from batch_inference.core.results import Point, Result
from batch_inference.core.statistics import is_narrow
from batch_inference.measure.climbing import RUNS_ON_THE_WAY


@dataclass(frozen=True)
class Recorded:
    """A setting of a study."""

    layout: Layout
    result: Result

    @cached_property
    def start_s(self) -> float:
        load_s = self.result.engine.load_s if self.result.engine else None
        return load_s.total_s if load_s and load_s.total_s else 0.0

    @cached_property
    def wall_s(self) -> float:
        return self.start_s + sum(map(seconds_of, self.result.points)) + self.beside_s

    @cached_property
    def beside_s(self) -> float:
        """Time for neither start nor runs: closing the engine, and gaps between runs. Begin and end are recorded in
        whole seconds, so a short setting may begin and end in the same one."""
        begin, end = self.result.environment.started_at, self.result.environment.ended_at
        in_all_s = (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds() if begin and end else 0
        return max(0.0, in_all_s - self.start_s - sum(map(seconds_of, self.result.points)))

    def points(self, seq_len: int) -> dict[int, Point]:
        return {
            point.batch_size: point for point in self.result.points if point.seq_len == seq_len and point.status == "ok"
        }


@dataclass(frozen=True)
class Study:
    settings: dict[Layout, Recorded]

    @property
    def devices(self) -> int:
        return max(layout.num_devices for layout in self.settings)

    @property
    def wall_s(self) -> float:
        return sum(one.wall_s for one in self.settings.values())

    @property
    def lengths(self) -> list[int]:
        """The lengths at which every setting was measured."""
        of_each = [
            {point.seq_len for point in one.result.points if point.status == "ok"} for one in self.settings.values()
        ]
        return sorted(length for length in set.intersection(*of_each) if length)

    def candidates(self, goal: Goal) -> list[Layout]:
        """What the search would choose among: settings on all devices or, for a goal per device, on any number."""
        return [
            layout
            for layout in self.settings
            if (goal.is_per_device and layout.replica == layout) or layout.num_devices == self.devices
        ]


@dataclass(frozen=True)
class Replay:
    distances: dict[int, float]  # by prompt length: how far below the true best, as a share
    wall_s: float
    loads: int


def study_of(results: Iterable[Result]) -> Study:
    settings = {}
    for result in results:
        layout = layout_of(result)
        settings[layout] = Recorded(layout, result)
    return Study(settings)


def layout_of(result: Result) -> Layout:
    config = result.config
    return Layout(
        config.tensor_parallel_size, config.pipeline_parallel_size, config.data_parallel_size,
        config.enable_expert_parallel,
    )  # fmt: skip


def replayed(study: Study, goal: Goal, draw: random.Random | None = None) -> Replay:
    races: dict[int | None, Race] = {
        length: Race(goal, study.candidates(goal), frozenset(study.settings)) for length in study.lengths
    }
    search, wall_s, count = Search(races), 0.0, 0
    while loads := search.next_loads(study.devices):
        walls_s = []
        for load in loads:
            recorded = study.settings[load.layout]
            took_s = recorded.start_s + recorded.beside_s
            for length, to_beat in zip(load.lengths, load.to_beat, strict=True):
                assert length is not None
                found, runs_s = measured(recorded, load, goal, length, to_beat, draw)
                races[length].found[load.layout] = replace(found, is_alone=len(loads) == 1)
                took_s += runs_s
            walls_s.append(took_s)
        wall_s, count = wall_s + max(walls_s), count + len(loads)
    distances = {length: distance(study, goal, length, race) for length, race in races.items() if length}
    return Replay(distances, wall_s, count)


def distance(study: Study, goal: Goal, seq_len: int, race: Race) -> float:
    """How far the chosen point is from the best of the whole grid, by the recorded means."""
    best = race.best()
    assert best is not None
    assert best.best is not None
    truth = {
        (layout, size): goal.value(layout, true_value(point, layout, goal))
        for layout in race.candidates
        for size, point in study.settings[layout].points(seq_len).items()
    }
    return 1 - truth[best.layout, best.best.batch_size] / max(truth.values())


def measured(  # noqa: PLR0913 - a load, and what it is asked
    recorded: Recorded, load: Load, goal: Goal, seq_len: int, to_beat: float, draw: random.Random | None
) -> tuple[Found, float]:
    """What one engine load measures, and the seconds of its runs: few per size, for the best as many as its interval
    needs. Sizes that are given are all measured so."""
    points, layout = recorded.points(seq_len), recorded.layout
    most = ExperimentConfig.max_runs if load.is_answer else MIN_RUNS
    runs: dict[int, list[float]] = {}
    if given := [size for size in load.sizes or () if size in points]:
        runs |= {size: _runs_until_enough(points[size], [], most, draw) for size in given}
        return Found(layout, tried_of(points, runs, layout, goal), is_exhausted=False), _seconds_of(points, runs)
    climb = Climb(steps_of(points), rises=not goal.is_latency, between=points.__contains__, to_beat=to_beat)
    tried: list[Tried] = []
    while (size := climb.next_size(tried) or _best_that_lacks_runs(tried, runs, most, to_beat)) is not None:
        if size in runs:
            runs[size] = _runs_until_enough(points[size], runs[size], most, draw)
        else:
            runs[size] = [run_of(points[size], draw) for _ in range(RUNS_ON_THE_WAY + (not runs))]
        tried = tried_of(points, runs, layout, goal)
    return Found(layout, tried, climb.is_exhausted(tried)), _seconds_of(points, runs)


def _best_that_lacks_runs(
    tried: Sequence[Tried], runs: dict[int, list[float]], most: int, to_beat: float
) -> int | None:
    best = best_of(tried)
    if best is None or best.value + best.half < to_beat or _has_enough(runs[best.batch_size], most):
        return None
    return best.batch_size


def steps_of(sizes: Iterable[int]) -> list[int]:
    """The sizes that a search climbs, each at least twice the one before, and the largest; others lie in between."""
    rising = sorted(sizes)
    steps = rising[:1]
    for size in rising:
        if size >= 2 * steps[-1]:
            steps.append(size)
    return steps if steps[-1] == rising[-1] else [*steps, rising[-1]]


def _runs_until_enough(point: Point, runs: list[float], most: int, draw: random.Random | None) -> list[float]:
    """With the runs that there are already."""
    runs = list(runs)
    while not _has_enough(runs, most):
        runs.append(run_of(point, draw))
    return runs


def _seconds_of(points: dict[int, Point], runs: dict[int, list[float]]) -> float:
    return sum(warmup_s(points[size]) + sum(seconds) for size, seconds in runs.items())


def _has_enough(runs: list[float], most: int) -> bool:
    return len(runs) >= most or (len(runs) >= MIN_RUNS and is_narrow(runs, ExperimentConfig.target_ci))


def tried_of(points: dict[int, Point], runs: dict[int, list[float]], layout: Layout, goal: Goal) -> list[Tried]:
    found = []
    for size, half in pooled_halves(runs).items():
        seconds = runs[size]
        value = value_of(points[size], layout, goal, fmean(seconds))
        fits = (points[size].summary.get("waves") or 1) <= 1
        found.append(Tried(size, value, value * half, fits, runs=len(seconds)))
    return found


def value_of(point: Point, layout: Layout, goal: Goal, latency_s: float) -> float:
    """Output tokens per second of all replicas, or batches per second."""
    if goal.is_latency:
        return 1 / latency_s
    return point.batch_size * (point.max_tokens or 1) * layout.dp / latency_s


def true_value(point: Point, layout: Layout, goal: Goal) -> float:
    return value_of(point, layout, goal, fmean(run_latencies_s(point)))


def run_of(point: Point, draw: random.Random | None) -> float:
    """One of the recorded runs, scattered around their mean like those of a sample; without `draw`, their mean."""
    runs = run_latencies_s(point)
    middle, wider = fmean(runs), math.sqrt(len(runs) / max(1, len(runs) - 1))
    if draw is None:
        return middle
    return middle + wider * (draw.choice(runs) - middle)


def warmup_s(point: Point) -> float:
    return sum(warmup.latency_s for warmup in point.warmups)


def seconds_of(point: Point) -> float:
    return sum(run_latencies_s(point)) + warmup_s(point)
