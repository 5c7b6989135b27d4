#!/usr/bin/env python3
"""How time and memory of the analysis grow with the number of points: CSV, summary and reports, without plots.

    python benchmarks/analysis_scale.py [--points 1000,10000,100000] [--folder DIR] [--plots]

Each size is a folder of result files of 100 points: five batch sizes x twenty lengths, three timed runs.
"""

from __future__ import annotations

import argparse
import itertools
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from batch_inference.core.result_file import save_result  # noqa: E402
from batch_inference.core.results import Result  # noqa: E402
from builders import make_point, make_result  # noqa: E402

BATCHES = (1, 2, 4, 8, 16)
LENGTHS = tuple(range(256, 20 * 256 + 1, 256))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", default="1000,10000,100000")
    parser.add_argument("--folder", type=Path, help="where the files are made, and kept; default: a temporary folder")
    parser.add_argument("--plots", action="store_true", help="draw the plots as well")
    flags = parser.parse_args()
    print("points    files      MiB   seconds  peak MiB  ms/point")
    with tempfile.TemporaryDirectory() as temporary:
        for points in map(int, flags.points.split(",")):
            folder = (flags.folder or Path(temporary)) / str(points)
            make_files(folder, points // (len(BATCHES) * len(LENGTHS)))
            measure(folder, points, [] if flags.plots else ["--no-plots"])


def make_files(folder: Path, files: int) -> None:
    """Does nothing if they exist."""
    folder.mkdir(parents=True, exist_ok=True)
    if len(list(folder.glob("*.json"))) == files:
        return
    sizes = list(itertools.product((1, 2, 4, 8), (1, 2, 4), (1, 2, 4)))
    for number in range(files):
        save_result(setting(number, sizes[number % len(sizes)]), folder / f"setting_{number}_results.json")


def setting(number: int, sizes: tuple[int, int, int]) -> Result:
    noise = random.Random(number)
    tp, pp, dp = sizes
    points = []
    for batch, length in itertools.product(BATCHES, LENGTHS):
        middle_s = (0.2 + 0.8 / tp + 0.1 * pp) * (0.5 + 0.01 * batch * (1 + length / 1024))
        runs_s = [middle_s * noise.gauss(1, 0.01) for _ in range(3)]
        points.append(make_point(batch, length, runs_s, replicas=dp))
    return make_result(f"setting_{number}", points, sizes)


def measure(folder: Path, points: int, flags: list[str]) -> None:
    files = list(folder.glob("*.json"))
    mib = sum(path.stat().st_size for path in files) / 2**20
    command = [sys.executable, str(REPOSITORY / "analyze_results.py"), "--input", str(folder), *flags]
    started_s = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started_s
    # Of the largest child so far, in KiB, which is this one because the sizes go up.
    peak_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(
        f"{points:<9} {len(files):<6} {mib:7.1f} {seconds:9.2f} {peak_mib:9.0f} {seconds / points * 1000:9.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
