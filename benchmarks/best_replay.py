#!/usr/bin/env python3
"""The search of `best` on recorded studies instead of engines: device time, and distance from the true best.

    python benchmarks/best_replay.py docs/h200/study tests/h100x4 --output-dir docs/best

Each FOLDER holds the result files of one study: settings measured over a grid of batch sizes. The search
loads, climbs and drops settings as it does on a machine, but a run takes as long as one of the recorded runs of that
point, drawn again for each of --seeds seeds. Batch sizes are those of the grid. An engine start takes as long as it
took, and the devices of the largest setting count as held all the time.

For each study and goal: how many of the answers, one per prompt length, are points whose recorded mean is within
2 % of the best of the whole grid, the worst distance, and the device time compared with the study's. Exit code 1
if fewer than 95 of 100 are within 2 %.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ways import save

from batch_inference.core.race import Goal
from batch_inference.core.result_file import load_result
from batch_inference.launch.replay import Study, replayed, study_of

GOALS = {
    "throughput": Goal(), "per-device": Goal(is_per_device=True), "latency": Goal(is_latency=True),
}  # fmt: skip
NEAR, OFTEN = 0.02, 0.95


@dataclass(frozen=True)
class Row:
    """The replays of one study and goal."""

    study: str
    settings: int
    points: int  # per setting
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
    rows = [row for folder in args.folders for row in rows_of(*recorded(folder), args.seeds)]
    text = "\n".join(table(rows))
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        save(args.output_dir, "best_replay", {"argv": sys.argv, "rows": [asdict(row) for row in rows]}, text)
    else:
        print(text)
    return 0 if all(row.near >= OFTEN for row in rows) else 1


def recorded(folder: Path) -> tuple[str, Study]:
    """A study with its name."""
    name = folder.name if folder.name != "study" else folder.parent.name
    return name, study_of(map(load_result, sorted(folder.glob("*_results.json"))))


def rows_of(study_name: str, study: Study, seeds: int) -> Iterator[Row]:
    for name, goal in GOALS.items():
        replays = [replayed(study, goal, random.Random(seed)) for seed in range(seeds)]
        distances = [distance for one in replays for distance in one.distances.values()]
        yield Row(
            study_name, len(study.settings), len(next(iter(study.settings.values())).result.points), study.devices,
            name, fmean(one <= NEAR for one in distances), max(distances), median(one.loads for one in replays),
            median(one.wall_s for one in replays) * study.devices / 60, study.wall_s * study.devices / 60,
        )  # fmt: skip


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
