#!/usr/bin/env python3
"""A grid measured by this program, and by one `vllm bench latency` after another, as people do it today.

    python benchmarks/against_vllm_bench.py --model models/tiny-llama --batch-sizes 1,4,16 --seq-lens 64,128 \\
        --max-tokens 16 -- --load-format dummy --kv-cache-memory-bytes 268435456

Both use one device and the same engine flags (after --), warm-ups, runs and sampling. Prints two Markdown tables, and
writes them with all numbers to --output-dir after each point: where the wall time went, and the medians at each
point. Before both, a sweep of ours that is not counted warms vLLM's compile cache, unless it is already --warm;
with --cold each of the two gets its own empty one instead. --resume keeps what the same commands measured before
into the same folder.

If `vllm bench latency` is too slow for the whole grid, --bench-points selects some points. The time of the other
processes is then estimated: the time around the runs of the measured ones, plus as many runs at our medians. Exit code
1 if ours is less than --least-ratio times faster.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ways import (
    Point,
    Result,
    add_flags,
    bench_log,
    keep,
    markdown_row,
    measure_bench,
    measure_ours,
    points,
)

from batch_inference.core.statistics import ci95_half_width
from batch_inference.core.text import counted
from batch_inference.core.values import batch_sizes, prompt_lengths

# Parts of the engine's start in vLLM's own words (0.26 to 0.33), with the seconds in the last group.
ENGINE_PARTS = {
    "weights_s": r"Model loading took .* ([\d.]+) seconds",
    "compile_s": r"torch\.compile .*?took ([\d.]+) s",
    "capture_s": r"Graph capturing finished in (\d+) secs",
}
# Phase -> its row in the table. The parts of the engine's start are in the start.
PHASES = {
    "import_s": "import of vLLM",
    "engine_s": "engine start",
    "weights_s": "of it, weights",
    "compile_s": "of it, torch.compile",
    "capture_s": "of it, graph capture",
    "warmup_s": "warm-ups",
    "timed_s": "timed runs",
    "rest_s": "rest: interpreter, prompts, saving, closing",
    "wall_s": "**wall time**",
}
Phases = dict[str, float | None]
NAME = "against_vllm_bench"


def main() -> int:
    args = parse()
    folder: Path = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    if not args.cold and not args.warm:
        say("ours, to warm the compile cache")
        measure_ours(args)
    say("ours")
    with compile_cache(args.cold):
        result, wall_s = measure_ours(args, resume=args.resume)
    ours = phases_of_ours(result, wall_s, (folder / "ours_results.log").read_text(errors="replace"))
    bench: dict[Point, dict[str, Any]] = {}
    every: list[Phases] = []
    with compile_cache(args.cold):
        for point in args.bench_points:
            say(f"vllm bench latency, {point[0]} x {point[1]}")
            bench[point], wall_s = measure_bench(args, point, resume=args.resume)
            log = bench_log(args, point).read_text(errors="replace")
            every.append(phases_of_bench(bench[point], args.warmup_runs, wall_s, log))
            document = compared(args, result, ours, bench, every)
            keep(folder, NAME, document, "\n".join(table(args, document)))
    print("\n".join(table(args, document)))
    return 0 if document["wall_ratio"] >= args.least_ratio else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, output_dir="results/against_vllm_bench", max_tokens=128, num_runs=5)
    parser.add_argument("--batch-sizes", type=batch_sizes, required=True)
    parser.add_argument("--seq-lens", type=prompt_lengths, required=True)
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument("--cold", action="store_true", help="an empty compile cache for each of the two")
    cache.add_argument("--warm", action="store_true", help="an earlier sweep warmed the compile cache: start at once")
    parser.add_argument("--resume", action="store_true", help="keep what the same commands measured before")
    parser.add_argument("--bench-points", type=points, metavar="BxN,..", help="vllm bench latency only at these")
    parser.add_argument("--least-ratio", type=float, default=1.0)
    args = parser.parse_args()
    args.points = list(itertools.product(args.batch_sizes, args.seq_lens))
    args.bench_points = args.bench_points or args.points
    for batch, length in set(args.bench_points) - set(args.points):
        parser.error(f"--bench-points: {batch}x{length} is not a point of the grid")
    return args


@contextlib.contextmanager
def compile_cache(cold: bool) -> Iterator[None]:
    """If `cold`, the compile caches of vLLM and Triton are in an empty folder for a while; otherwise where they are."""
    if not cold:
        yield
        return
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update({"VLLM_CACHE_ROOT": folder, "TRITON_CACHE_DIR": f"{folder}/triton"})
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def say(what: str) -> None:
    print(f"{what} ...", file=sys.stderr, flush=True)


def compared(
    args: argparse.Namespace, result: Result, ours: Phases, bench: dict[Point, dict[str, Any]], every: Sequence[Phases]
) -> dict[str, Any]:
    """The document: ours, and what `vllm bench latency` has measured so far."""
    theirs = added(every)
    rows = [row_of(result, point, bench[point]["latencies_s"] if point in bench else None) for point in args.points]
    missing_s = [row["ours_s"] * (args.warmup_runs + args.num_runs) for row in rows if row["bench_s"] is None]
    around_s = mean(around_runs_s(phases) for phases in every)
    wall_s = known(theirs["wall_s"]) + sum(missing_s) + len(missing_s) * around_s
    return {
        "argv": sys.argv,
        "machine": machine(result),
        "cold_compile_cache": args.cold,
        "compile_cache_of_ours": known(result.engine).compile_cache,
        "wall_ratio": wall_s / known(ours["wall_s"]),
        "wall_s_of_bench": wall_s,
        "estimated_points": len(missing_s),
        "processes_of_bench": list(every),
        "phases": {"ours": ours, "vllm bench latency": theirs},
        "points": rows,
    }


# --- where the time went --------------------------------------------------------------------------------------------


def phases_of_ours(result: Result, wall_s: float, log: str) -> Phases:
    load_s = known(result.engine).load_s
    taken_s = {
        "import_s": load_s.import_s,
        "engine_s": load_s.engine_s,
        "warmup_s": sum(warmup.latency_s for point in result.points for warmup in point.warmups),
        "timed_s": sum(run.latency_s for point in result.points for run in point.runs),
    }
    return phases(taken_s, wall_s, log)


def phases_of_bench(seconds: dict[str, Any], warmup_runs: int, wall_s: float, log: str) -> Phases:
    calls_s = seconds["calls_s"]
    taken_s = {
        "import_s": seconds["import_s"],
        "engine_s": seconds["engine_s"],
        "warmup_s": sum(calls_s[:warmup_runs]),
        "timed_s": sum(calls_s[warmup_runs:]),
    }
    return phases(taken_s, wall_s, log)


def phases(taken_s: dict[str, float], wall_s: float, log: str) -> Phases:
    found = {name: re.findall(words, log) for name, words in ENGINE_PARTS.items()}
    parts = {name: sum(map(float, seconds)) if seconds else None for name, seconds in found.items()}
    return {**taken_s, **parts, "rest_s": wall_s - sum(taken_s.values()), "wall_s": wall_s}


def around_runs_s(phases: Phases) -> float:
    """What a process takes besides its warm-ups and timed runs."""
    return known(phases["wall_s"]) - known(phases["warmup_s"]) - known(phases["timed_s"])


def known(seconds: float | None) -> float:
    """A phase that every process has."""
    assert seconds is not None
    return seconds


def added(every: Sequence[Phases]) -> Phases:
    """The phases of all processes together."""
    return {name: total(phases[name] for phases in every) for name in PHASES}


def total(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) if found else None


# --- the tables -----------------------------------------------------------------------------------------------------


def row_of(result: Result, point: Point, bench_s: list[float] | None) -> dict[str, Any]:
    (measured,) = (found for found in result.points if (found.batch_size, found.seq_len) == point)
    ours_s = [run.latency_s for run in measured.runs]
    return {
        "batch_size": point[0],
        "seq_len": point[1],
        "verdict": measured.verdict,
        "ours_s": median(ours_s),
        "ours_ci95_s": ci95_half_width(ours_s),
        "bench_s": median(bench_s) if bench_s else None,
        "bench_ci95_s": ci95_half_width(bench_s) if bench_s else None,
        "ratio": median(ours_s) / median(bench_s) if bench_s else None,
        "mfu": measured.summary["mfu"],
        "mbu": measured.summary["mbu"],
    }


def machine(result: Result) -> dict[str, Any]:
    versions = result.environment.versions
    return {
        "device": next((device.name for device in result.environment.devices), platform.processor()),
        "cpu": result.environment.cpu_name,
        "cores": result.environment.cpu_count,
        "vllm": versions["vllm"],
        "torch": versions["torch"],
    }


def table(args: argparse.Namespace, document: dict[str, Any]) -> list[str]:
    on, count, missing = document["machine"], len(args.points), document["estimated_points"]
    ours, theirs = document["phases"].values()
    devices = "" if on["device"] == on["cpu"] else f"{on['device']}, "
    cache = "an empty compile cache for each" if args.cold else "a warm compile cache"
    if args.warm and document["compile_cache_of_ours"] == "cold":
        cache = "a compile cache that was cold for ours and warm for vllm bench latency"
    processes = f"{count - missing} of {counted(count, 'process')}" if missing else counted(count, "process")
    lines = [
        f"{args.model}, {len(args.batch_sizes)} x {len(args.seq_lens)} points, {args.max_tokens} output tokens, "
        f"{counted(args.warmup_runs, 'warm-up')} and {counted(args.num_runs, 'timed run')} a point; {cache}; "
        f"engine flags `{' '.join(args.engine_flags)}`.",
        f"{devices}{on['cores']} cores of {on['cpu']}, vLLM {on['vllm']}, torch {on['torch']}.",
        "",
        f"| seconds | ours, 1 process | vllm bench latency, {processes} | vllm bench / ours |",
        "|---|---:|---:|---:|",
    ]
    for name, label in PHASES.items():
        if (ours[name], theirs[name]) != (None, None):
            # Some of the processes compared with all of ours gives no ratio.
            lines.append(markdown_row([label, *seconds(ours[name], theirs[name], with_ratio=not missing)]))
    if missing:
        label = f"**wall time of all {count}, {missing} estimated**"
        lines.append(markdown_row([label, *seconds(ours["wall_s"], document["wall_s_of_bench"])]))
    lines += [
        markdown_row(["timed runs / wall time", *(f"{way['timed_s'] / way['wall_s']:.0%}" for way in (ours, theirs)),
                      ""]),
        "",
        "| batch | length | ours s | ± | vllm bench s | ± | ours / vllm bench | MFU | MBU | verdict |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]  # fmt: skip
    for row in document["points"]:
        times = [written(row[name], ".4f") for name in ("ours_s", "ours_ci95_s", "bench_s", "bench_ci95_s")]
        shares = [written(row[name], ".0%") for name in ("mfu", "mbu")]
        cells = [row["batch_size"], row["seq_len"], *times, written(row["ratio"], ".3f"), *shares, row["verdict"]]
        lines.append(markdown_row(cells))
    return lines


def seconds(ours_s: float | None, theirs_s: float | None, *, with_ratio: bool = True) -> list[str]:
    ratio = theirs_s / ours_s if with_ratio and ours_s and theirs_s is not None else None
    return [written(ours_s, ".1f"), written(theirs_s, ".1f"), written(ratio, ".1f")]


def written(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
