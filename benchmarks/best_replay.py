#!/usr/bin/env python3
"""The search of `best` against recorded studies, instead of engines: device time, and how far from the true best.

    python benchmarks/best_replay.py docs/h100/study tests/h100x4 --output-dir docs/best

Each FOLDER holds the result files of one study: settings that were measured over a grid of batch sizes. The search
loads, climbs and leaves settings as it does on a machine, but a run takes what one of the recorded runs of that point
took, drawn anew with --seeds seeds. Batch sizes are those of the grid. An engine start takes what it took, and the
devices of the largest setting count as held all the time.

Of each study and goal: how many of the answers, one for each prompt length, are points whose recorded mean is within
2 % of the best of the whole grid, the worst distance, and the device time against that of the study. Exit code 1
where fewer than 95 of 100 are within 2 %.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from statistics import fmean, median

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ways import save

from batch_inference.core.climb import Climb, Tried, pooled_halves
from batch_inference.core.metrics import run_latencies_s
from batch_inference.core.race import Found, Goal, Layout, Load, Race, Search
from batch_inference.core.result_file import load_result
from batch_inference.core.results import Point, Result
from batch_inference.core.statistics import is_narrow

GOALS = {
    "throughput": Goal(), "per-device": Goal(is_per_device=True), "latency": Goal(is_latency=True),
}  # fmt: skip
NEAR, OFTEN = 0.02, 0.95
SURVEY_RUNS, TARGET, MOST_RUNS = 2, 0.02, 10


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
        begin, end = self.result.environment.started_at, self.result.environment.ended_at
        return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds() if begin and end else 0.0

    @cached_property
    def beside_s(self) -> float:
        """Neither start nor runs: to close the engine, and what lies between runs."""
        return max(0.0, self.wall_s - self.start_s - sum(map(seconds_of, self.result.points)))

    def points(self, seq_len: int) -> dict[int, Point]:
        return {
            point.batch_size: point for point in self.result.points if point.seq_len == seq_len and point.status == "ok"
        }


@dataclass(frozen=True)
class Study:
    name: str
    settings: dict[Layout, Recorded]

    @property
    def devices(self) -> int:
        return max(layout.num_devices for layout in self.settings)

    @property
    def wall_s(self) -> float:
        return sum(one.wall_s for one in self.settings.values())

    @property
    def lengths(self) -> list[int]:
        of_each = [{point.seq_len for point in one.result.points} for one in self.settings.values()]
        return sorted(length for length in set.intersection(*of_each) if length)

    def candidates(self, goal: Goal) -> list[Layout]:
        """Those that the search would choose among: all devices, or for what one device does, any number."""
        return [
            layout
            for layout in self.settings
            if (goal.is_per_device and layout.replica == layout) or layout.num_devices == self.devices
        ]


@dataclass(frozen=True)
class Replay:
    distances: dict[int, float]  # by prompt length: below the true best, as a share
    wall_s: float
    loads: int


@dataclass(frozen=True)
class Row:
    """The replays of one study and goal."""

    study: str
    settings: int
    points: int  # of each setting
    devices: int
    goal: str
    near: float  # share of the answers that are within NEAR
    worst: float
    loads: float
    device_minutes: float
    of_study: float

    @property
    def share(self) -> float:
        return self.device_minutes / self.of_study


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--output-dir", type=Path)
    args = parser.parse_args()
    rows = [row for folder in args.folders for row in rows_of(study_of(folder), args.seeds)]
    text = "\n".join(table(rows))
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        save(args.output_dir, "best_replay", {"argv": sys.argv, "rows": [asdict(row) for row in rows]}, text)
    else:
        print(text)
    return 0 if all(row.near >= OFTEN for row in rows) else 1


def study_of(folder: Path) -> Study:
    settings = {}
    for path in sorted(folder.glob("*_results.json")):
        result = load_result(path)
        layout = layout_of(result)
        settings[layout] = Recorded(layout, result)
    return Study(folder.name if folder.name != "study" else folder.parent.name, settings)


def layout_of(result: Result) -> Layout:
    config = result.config
    return Layout(
        config.tensor_parallel_size, config.pipeline_parallel_size, config.data_parallel_size,
        "--enable-expert-parallel" in config.engine_args,
    )  # fmt: skip


def rows_of(study: Study, seeds: int) -> Iterator[Row]:
    for name, goal in GOALS.items():
        replays = [replayed(study, goal, random.Random(seed)) for seed in range(seeds)]
        distances = [distance for one in replays for distance in one.distances.values()]
        yield Row(
            study.name, len(study.settings), len(next(iter(study.settings.values())).result.points), study.devices,
            name, fmean(one <= NEAR for one in distances), max(distances), median(one.loads for one in replays),
            median(one.wall_s for one in replays) * study.devices / 60, study.wall_s * study.devices / 60,
        )  # fmt: skip


# --- one replay -----------------------------------------------------------------------------------------------------


def replayed(study: Study, goal: Goal, draw: random.Random) -> Replay:
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
    """Of the chosen point from the best of the whole grid, by the means that were recorded."""
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
    recorded: Recorded, load: Load, goal: Goal, seq_len: int, to_beat: float, draw: random.Random
) -> tuple[Found, float]:
    """As one engine load does, and the seconds of its runs: few of each size, and of the best as many as its interval
    needs."""
    points = recorded.points(seq_len)
    sizes = sorted(points)
    climb = Climb(load.sizes or sizes, rises=not goal.is_latency, between=lambda _: False)
    runs: dict[int, list[float]] = {}
    tried: list[Tried] = []
    took_s = 0.0
    while (size := climb.next_size(tried)) is not None:
        runs[size] = [run_of(points[size], draw) for _ in range(SURVEY_RUNS + (not runs))]
        took_s += sum(runs[size]) + warmup_s(points[size])
        tried = tried_of(points, runs, recorded.layout, goal)
    first = max(tried, key=lambda one: one.value)
    best, is_asked = first.batch_size, first.value + first.half >= to_beat
    while (
        is_asked
        and len(runs[best]) < MOST_RUNS
        and not (len(runs[best]) > SURVEY_RUNS and is_narrow(runs[best], TARGET))
    ):
        runs[best].append(run_of(points[best], draw))
        took_s += runs[best][-1]
    tried = tried_of(points, runs, recorded.layout, goal)
    return Found(recorded.layout, tried, climb.is_exhausted(tried)), took_s


def tried_of(points: dict[int, Point], runs: dict[int, list[float]], layout: Layout, goal: Goal) -> list[Tried]:
    found = []
    for (size, seconds), half in zip(runs.items(), pooled_halves(list(runs.values())), strict=True):
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


def run_of(point: Point, draw: random.Random) -> float:
    """One of the recorded ones, spread as far from their mean as those of a sample are."""
    runs = run_latencies_s(point)
    middle, wider = fmean(runs), math.sqrt(len(runs) / max(1, len(runs) - 1))
    return middle + wider * (draw.choice(runs) - middle)


def warmup_s(point: Point) -> float:
    return sum(warmup.latency_s for warmup in point.warmups)


def seconds_of(point: Point) -> float:
    return sum(run_latencies_s(point)) + warmup_s(point)


def table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| study | settings | points each | devices | goal | within 2 % | worst | loads | device-minutes | "
        "of the study | share |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.study} | {row.settings} | {row.points} | {row.devices} | {row.goal} | {row.near:.0%} | "
        f"{row.worst:.1%} | {row.loads:.0f} | {row.device_minutes:.1f} | {row.of_study:.1f} | {row.share:.0%} |"
        for row in rows
    ]
    return lines


if __name__ == "__main__":
    sys.exit(main())
