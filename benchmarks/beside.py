#!/usr/bin/env python3
"""How much a sweep slows down if something else runs on the machine: an import of vLLM, or another setting (--pack).

    python benchmarks/beside.py --model models/tiny-llama --points 4x128,16x128 --max-tokens 32 --num-runs 10 -- \\
        --load-format dummy --kv-cache-memory-bytes 268435456

The same TP=1 setting runs alone, with imports of vLLM beside it one after another, and as one of two settings side by
side; the three take turns for --rounds, every engine new. Prints a Markdown table of the medians, and writes it
with every latency to --output-dir.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ways import Result, add_flags, markdown_row, measure_ours, ours_command, points, save, turns

from batch_inference.core.flags import parse_flags
from batch_inference.core.result_file import load_result
from batch_inference.launch.jobs import Job
from batch_inference.launch.packing import Packing
from batch_inference.launch.processes import Processes
from batch_inference.plan.devices import find_devices

ALONE, IMPORTS, PACKED = "alone", "imports of vLLM beside it", "another setting beside it"
Measured = tuple[Result, float]  # and the wall time in seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, output_dir="results/beside", max_tokens=128, num_runs=10)
    parser.add_argument("--points", type=points, required=True, metavar="BxN,..", help="batch x prompt length")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    ways: dict[str, Callable[[argparse.Namespace], Measured]] = {
        ALONE: measure_ours,
        IMPORTS: with_imports,
        PACKED: packed,
    }
    latencies_s: dict[str, dict[str, list[float]]] = {way: {} for way in ways}
    wall_s: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(args.rounds):
        for way, measure in turns(list(ways.items()), number):
            print(f"round {number + 1}: {way} ...", file=sys.stderr, flush=True)
            result, taken_s = measure(args)
            wall_s[way].append(taken_s)
            for point in result.points:
                runs_s = latencies_s[way].setdefault(f"{point.batch_size}x{point.seq_len}", [])
                runs_s += [run.latency_s for run in point.runs]
    document = {"latencies_s": latencies_s, "wall_s": wall_s, "argv": sys.argv}
    save(args.output_dir, "beside", document, "\n".join(table(latencies_s, wall_s)))
    return 0


def with_imports(args: argparse.Namespace) -> Measured:
    importing = subprocess.Popen(
        ["sh", "-c", 'while :; do "$1" -c "from vllm import LLM"; done', "sh", sys.executable],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return measure_ours(args)
    finally:
        os.killpg(importing.pid, signal.SIGKILL)
        importing.wait()


def packed(args: argparse.Namespace) -> Measured:
    files = [args.output_dir / f"packed_{number}_results.json" for number in (1, 2)]
    # Not the same setting twice: two programs never measure the same point at the same time.
    jobs = [job(args, file, "--seed", str(number)) for number, file in enumerate(files)]
    started_s = time.monotonic()
    with Processes() as processes:
        failed = [one for one, code in Packing(jobs, find_devices(), processes).run() if code]
        processes.end_if_stopped()
    if failed:
        raise SystemExit(f"error: {failed[0].name} failed; see {failed[0].console_path}")
    return load_result(files[0]), time.monotonic() - started_s


def job(args: argparse.Namespace, file: Path, *flags: str) -> Job:
    words = (*ours_command(args, file), "--packed", *flags)
    return Job(file.stem.removesuffix("_results"), words, parse_flags(words[2:])[0])


def table(latencies_s: dict[str, dict[str, list[float]]], wall_s: dict[str, list[float]]) -> list[str]:
    shapes = list(latencies_s[ALONE])
    heads = [f"{shape} {what}" for shape in shapes for what in ("s", "/ alone")]
    lines = [
        f"Medians of {len(next(iter(latencies_s[ALONE].values())))} runs of "
        f"{len(wall_s[ALONE])} engines each; wall time of a whole sweep, of both settings where there are two.",
        "",
        markdown_row(["", *heads, "wall s"]),
        "|---|" + "---:|" * (len(heads) + 1),
    ]
    for way, by_shape in latencies_s.items():
        cells = [way]
        for shape in shapes:
            middle_s = median(by_shape[shape])
            cells += [f"{middle_s:.4f}", f"{middle_s / median(latencies_s[ALONE][shape]):.3f}"]
        lines.append(markdown_row([*cells, f"{median(wall_s[way]):.0f}"]))
    return lines


if __name__ == "__main__":
    sys.exit(main())
