#!/usr/bin/env python3
"""What saving costs per point as the file grows: the journal compared with writing the whole file each time.

    python benchmarks/saving.py [--points 10,100,1000] [--requests 512] [--runs 10] [--folder DIR]

Prints a Markdown table. A point of 512 requests and ten runs takes at least ten seconds to measure on any device.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from batch_inference.core.growing_file import GrowingFile  # noqa: E402
from batch_inference.core.result_file import load_result, save_result  # noqa: E402
from batch_inference.core.results import Point  # noqa: E402
from builders import make_point, make_result  # noqa: E402

# The whole file is written at most this often, because it takes minutes.
MOST_WHOLE = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", default="10,100,1000")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="where the files are written; default: a temporary folder")
    flags = parser.parse_args()
    print("| points | file MiB | journal: s a point | peak MiB | whole file: s for the last point |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        for points in map(int, flags.points.split(",")):
            path = Path(folder) / f"{points}.json"
            seconds = grow(path, points, flags.requests, flags.runs)
            peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            whole = f"{save_whole(path):.3f}" if points <= MOST_WHOLE else "-"
            mib = path.stat().st_size / 2**20
            print(f"| {points} | {mib:.1f} | {seconds / points:.4f} | {peak_mib:.0f} | {whole} |", flush=True)


def point_of(number: int, requests: int, runs: int) -> Point:
    return make_point(requests, number + 1, [1.0 + 0.001 * run for run in range(runs)])


def grow(path: Path, points: int, requests: int, runs: int) -> float:
    """Seconds that saving took, without making the points."""
    file = GrowingFile(path, make_result(points=[]))
    file.begin()
    taken_s = 0.0
    for number in range(points):
        point = point_of(number, requests, runs)
        started_s = time.perf_counter()
        file.add(point)
        taken_s += time.perf_counter() - started_s
    started_s = time.perf_counter()
    file.fold()
    return taken_s + time.perf_counter() - started_s


def save_whole(path: Path) -> float:
    result = load_result(path)
    started_s = time.perf_counter()
    save_result(result, path.with_suffix(".whole.json"))
    return time.perf_counter() - started_s


if __name__ == "__main__":
    main()
