#!/usr/bin/env python3
"""The same points measured in turn by this program, by a bare loop around LLM.generate, and by `vllm bench latency`.

    python benchmarks/fidelity.py --model models/tiny-llama --points 1x64,4x64 --max-tokens 32 -- --load-format dummy

A point is BATCHxLENGTH. All three use the same engine flags (after --, also --tensor-parallel-size), warm-ups, runs and
sampling (temperature 1, top-p 1, as `vllm bench latency` does). On a CPU, several workers need vLLM's
VLLM_CPU_OMP_THREADS_BIND, such as "0|1". Prints a Markdown table of the medians and their ratios, and
writes it with every latency to --output-dir. Exit code 1 if a ratio is further from 1 than --tolerance.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ways import (
    AS_OURS,
    Point,
    add_flags,
    call,
    markdown_row,
    measure_bench,
    measure_ours,
    points,
    save,
    shared_flags,
    turns,
)

Latencies = dict[Point, list[float]]
WAYS = ("ours", "bare loop", "vllm bench latency")


def main() -> int:
    args = parse()
    folder: Path = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    measured: dict[str, Latencies] = {way: {point: [] for point in args.points} for way in WAYS}
    taken_s = dict.fromkeys(WAYS, 0.0)
    measures = list(zip(WAYS, (ours, bare_loop, bench_latency), strict=True))
    for number in range(args.rounds):
        for way, measure in turns(measures, number):
            print(f"round {number + 1}: {way} ...", file=sys.stderr, flush=True)
            started_s = time.monotonic()
            for point, latencies_s in measure(args).items():
                if point in measured[way]:
                    measured[way][point] += latencies_s
            taken_s[way] += time.monotonic() - started_s
    rows = [row_of(point, measured) for point in args.points]
    table = "\n".join([*head(args, taken_s), *(markdown(row) for row in rows)])
    every = {way: {f"{b}x{n}": times for (b, n), times in by_point.items()} for way, by_point in measured.items()}
    document = {"points": rows, "latencies_s": every, "wall_s": taken_s, "argv": sys.argv}
    save(folder, "fidelity", document, table)
    ratios = [row[name] for row in rows for name in ("to_bare", "to_bench")]
    return 0 if all(abs(ratio - 1) <= args.tolerance for ratio in ratios) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, output_dir="results/fidelity", max_tokens=128, num_runs=5)
    parser.add_argument("--points", type=points, required=True, metavar="BxN,..", help="batch x prompt length")
    parser.add_argument("--rounds", type=int, default=1, help="each round restarts every engine")
    parser.add_argument("--tolerance", type=float, default=0.02, help="largest distance of a ratio from 1")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        args.bare.write_text(json.dumps(run_bare_loop(args)))
        sys.exit(0)
    return args


# --- the three ways -------------------------------------------------------------------------------------------------


def ours(args: argparse.Namespace) -> Latencies:
    result, _ = measure_ours(args)
    return {(point.batch_size, point.seq_len): [run.latency_s for run in point.runs] for point in result.points}


def bare_loop(args: argparse.Namespace) -> Latencies:
    answer = args.output_dir / "bare_loop.json"
    flags = [f"{batch}x{length}" for batch, length in args.points]
    command = [sys.executable, __file__, "--bare", str(answer), "--model", args.model, "--points", ",".join(flags)]
    command += ["--max-tokens", str(args.max_tokens), "--num-runs", str(args.num_runs)]
    command += ["--warmup-runs", str(args.warmup_runs), "--", *args.engine_flags]
    call(command, args.output_dir / "bare_loop.txt")
    return {(batch, length): times for batch, length, times in json.loads(answer.read_text())}


def bench_latency(args: argparse.Namespace) -> Latencies:
    return {point: measure_bench(args, point)[0]["latencies_s"] for point in args.points}


def run_bare_loop(args: argparse.Namespace) -> list[tuple[int, int, list[float]]]:
    """What a user would write: one engine, random token ids, generate in a loop."""
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    flags = [*shared_flags(args), *AS_OURS]
    parsed = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(flags)
    parsed.enable_prefix_caching = False
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(parsed))
    params = SamplingParams(temperature=1.0, top_p=1.0, ignore_eos=True, max_tokens=args.max_tokens, detokenize=False)
    measured = []
    for batch, length in args.points:
        times = []
        for _ in range(args.warmup_runs + args.num_runs):
            prompts: Any = [{"prompt_token_ids": random.choices(range(10, 10_000), k=length)} for _ in range(batch)]
            start_s = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            times.append(time.perf_counter() - start_s)
        measured.append((batch, length, times[args.warmup_runs :]))
    return measured


# --- the table ------------------------------------------------------------------------------------------------------


def row_of(point: Point, measured: dict[str, Latencies]) -> dict[str, Any]:
    own, bare, bench = (median(measured[way][point]) for way in WAYS)
    return {
        "batch_size": point[0],
        "seq_len": point[1],
        "ours_s": own,
        "bare_s": bare,
        "bench_s": bench,
        "to_bare": own / bare,
        "to_bench": own / bench,
    }


def head(args: argparse.Namespace, taken_s: dict[str, float]) -> list[str]:
    walls = ", ".join(f"{way} {seconds:.0f} s" for way, seconds in taken_s.items())
    return [
        f"{args.model}, {args.max_tokens} output tokens, medians of {args.rounds} x {args.num_runs} runs. "
        f"Wall time: {walls}.",
        "",
        "| batch | length | ours s | bare loop s | vllm bench latency s | ours / bare | ours / bench |",
        "|---|---|---|---|---|---|---|",
    ]


def markdown(row: dict[str, Any]) -> str:
    times = [f"{row[name]:.4f}" for name in ("ours_s", "bare_s", "bench_s")]
    ratios = [f"{row[name]:.3f}" for name in ("to_bare", "to_bench")]
    return markdown_row([row["batch_size"], row["seq_len"], *times, *ratios])


if __name__ == "__main__":
    sys.exit(main())
