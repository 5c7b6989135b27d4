"""Which point of a load is next: the points of the grid in turn or, with `--batch-sizes auto`, chosen by what earlier
points have shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from batch_inference.core.climb import Climb, Tried, best_of
from batch_inference.core.config import ExperimentConfig
from batch_inference.core.results import Point, PointKey, Result
from batch_inference.core.text import short, with_budget
from batch_inference.core.tried import limits_of, tried_of
from batch_inference.core.values import LATENCY_GOAL
from batch_inference.measure.resume import has_runs_enough

# Runs on the way to the best; the first point has one more, to learn how much runs differ.
RUNS_ON_THE_WAY = 2


@dataclass(frozen=True)
class Next:
    """A point to measure. `runs`: how many are enough; None for as many as --target-ci needs."""

    key: PointKey
    runs: int | None = None
    so_far: Point | None = None  # with the runs that it has from this load


class InTurn:
    """The points of the grid that are still open."""

    def __init__(self, keys: Sequence[PointKey]) -> None:
        self.rest = list(keys)

    def next_point(self) -> Next | None:
        return Next(self.rest[0]) if self.rest else None

    def told(self, point: Point) -> None:
        """A point that was measured, with its runs, or lost."""
        self.rest.remove(point.key)

    def answers(self) -> list[str]:
        """A grid is no question."""
        return []


class Climbing:
    """`keys`: of every point that may be measured. `measured`: points of earlier loads, with their runs. `result`: to
    which all points belong."""

    def __init__(
        self, config: ExperimentConfig, result: Result, keys: Sequence[PointKey], measured: Sequence[Point]
    ) -> None:
        self._config, self._result = config, result
        # The sizes for each length or budget.
        self._ways: dict[tuple[object, ...], list[PointKey]] = {}
        for key in keys:
            self._ways.setdefault(_way_of(key), []).append(key)
        self._points = {point.key: point for point in measured if _way_of(point.key) in self._ways}
        # Kept until another point is reported: with a workload, each is a forecast of the job.
        self._tried: dict[tuple[object, ...], list[Tried]] = {}
        self._of_this_load: set[PointKey] = set()
        self._lost: set[PointKey] = set()
        self.rest: list[PointKey] = []  # it is unknown which would have been next

    def told(self, point: Point) -> None:
        """A point that was measured, with its runs, or lost."""
        self._tried.pop(_way_of(point.key), None)
        if point.status == "ok":
            self._points[point.key] = point
            self._of_this_load.add(point.key)
        else:
            self._lost.add(point.key)

    def next_point(self) -> Next | None:
        """None once the best of each length is found and has enough runs."""
        return next(filter(None, map(self._next_of, self._ways.values())), None)

    @property
    def kept(self) -> list[Point]:
        return list(self._points.values())

    def answers(self) -> list[str]:
        """What was found so far, for each length or budget: the best size, or that which misses the limits least."""
        return list(filter(None, map(self._answer_of, self._ways.values())))

    def _answer_of(self, keys: Sequence[PointKey]) -> str | None:
        key, tried = keys[0], self._tried_of(keys)
        where = "" if key.seq_len is None else f" at length {key.seq_len}"
        if key.max_num_batched_tokens is not None:
            where = with_budget(where, key.max_num_batched_tokens)
        best = best_of(tried)
        if best is not None and best.value > 0:
            return f"best for {self._config.goal}{where}: {best.batch_size} at once"
        missed = [one for one in tried if 1 < one.excess < math.inf]
        if not missed:
            return None
        nearest = min(missed, key=lambda one: one.excess)
        return (
            f"no batch size that was tried keeps the limits{where}; the nearest is {nearest.batch_size} at once, "
            f"{short(nearest.excess, 3)} times its limit"
        )

    def _tried_of(self, keys: Sequence[PointKey]) -> list[Tried]:
        way = _way_of(keys[0])
        if way not in self._tried:
            points = [point for key, point in self._points.items() if _way_of(key) == way]
            measured = tried_of(self._result, points, self._config.goal, limits_of(self._config))
            lost = (Tried(size, 0.0, 0.0, fits=False, excess=math.inf) for size in self._lost_sizes(way))
            self._tried[way] = [*measured, *lost]
        return self._tried[way]

    def _lost_sizes(self, way: tuple[object, ...]) -> list[int]:
        return [key.batch_size for key in self._lost if _way_of(key) == way]

    def _next_of(self, keys: Sequence[PointKey]) -> Next | None:
        tried, lost = self._tried_of(keys), self._lost_sizes(_way_of(keys[0]))
        to_beat = self._to_beat(keys[0].seq_len)
        climb = Climb([key.batch_size for key in keys], rises=self._config.goal != LATENCY_GOAL, to_beat=to_beat)
        size = climb.next_size(tried)
        if size is not None:
            runs = None if self._config.num_runs or keys[0].workload else RUNS_ON_THE_WAY + (len(tried) == len(lost))
            return Next(_of_size(keys[0], size), runs)
        best = best_of(tried)
        if best is None or best.batch_size in lost or best.value + best.half < to_beat:
            return None
        key = _of_size(keys[0], best.batch_size)
        if self._has_enough(self._points[key]):
            return None
        # Runs of two engines are never combined.
        return Next(key, so_far=self._points[key] if key in self._of_this_load else None)

    def _to_beat(self, seq_len: int | None) -> float:
        config = self._config
        lengths: Sequence[int | None] = (None,) if config.prompts_file else config.seq_lens
        return dict(zip(lengths, config.to_beat or (), strict=False)).get(seq_len, 0.0)

    def _has_enough(self, point: Point) -> bool:
        return point.workload is not None or has_runs_enough(point, self._config)


def _way_of(key: PointKey) -> tuple[object, ...]:
    return (key.seq_len, key.max_tokens, key.workload, key.max_num_batched_tokens)


def _of_size(key: PointKey, size: int) -> PointKey:
    return replace(key, batch_size=size)
