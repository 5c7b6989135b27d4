#!/usr/bin/env python3
"""The same points measured by this program, by a bare loop around LLM.generate, and by `vllm bench latency`, in turn.

    python benchmarks/fidelity.py --model models/tiny-llama --points 1x64,4x64 --max-tokens 32 -- --load-format dummy

A point is BATCHxLENGTH. All three use one device, the same engine flags (after --), warm-ups, runs and sampling
(temperature 1, top-p 1, as `vllm bench latency` does). Prints a Markdown table of the medians and their ratios, and
writes it with every latency to --output-dir. Exit code 1 where a ratio is further from 1 than --tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from batch_inference.environment import python_path
from batch_inference.results import load_result

REPOSITORY = Path(__file__).resolve().parent.parent
Point = tuple[int, int]
Latencies = dict[Point, list[float]]
# `vllm bench latency` itself, without the command around it, which does not start with the CPU build of vLLM 0.32.0.
BENCH_LATENCY = """
import sys
from vllm.benchmarks.latency import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
if __name__ == "__main__":
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args(sys.argv[1:]))
"""
# What our script gives to vLLM itself.
AS_OURS = ("--gpu-memory-utilization", "0.8", "--skip-tokenizer-init")
WAYS = ("ours", "bare loop", "vllm bench latency")


def main() -> int:
    args = parse()
    folder: Path = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    measured: dict[str, Latencies] = {way: {point: [] for point in args.points} for way in WAYS}
    taken_s = dict.fromkeys(WAYS, 0.0)
    for number in range(args.rounds):
        for way, measure in zip(WAYS, (ours, bare_loop, bench_latency), strict=True):
            print(f"round {number + 1}: {way} ...", file=sys.stderr, flush=True)
            started_s = time.monotonic()
            for point, latencies_s in measure(args).items():
                if point in measured[way]:
                    measured[way][point] += latencies_s
            taken_s[way] += time.monotonic() - started_s
    rows = [row_of(point, measured) for point in args.points]
    table = "\n".join([*head(args, taken_s), *(markdown(row) for row in rows)])
    print(table)
    (folder / "fidelity.md").write_text(table + "\n")
    every = {way: {f"{b}x{n}": times for (b, n), times in by_point.items()} for way, by_point in measured.items()}
    document = {"points": rows, "latencies_s": every, "wall_s": taken_s, "argv": sys.argv}
    (folder / "fidelity.json").write_text(json.dumps(document, indent=1) + "\n")
    ratios = [row[name] for row in rows for name in ("to_bare", "to_bench")]
    return 0 if all(abs(ratio - 1) <= args.tolerance for ratio in ratios) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--points", type=points, required=True, metavar="BxN,..", help="batch x prompt length")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--num-runs", type=int, default=5)
    parser.add_argument("--warmup-runs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1, help="each round starts every engine anew")
    parser.add_argument("--tolerance", type=float, default=0.02, help="largest distance of a ratio from 1")
    parser.add_argument("--output-dir", type=Path, default=Path("results/fidelity"))
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("engine_flags", nargs="*", help="vLLM's engine flags, after --")
    args = parser.parse_args()
    if args.bare:
        args.bare.write_text(json.dumps(run_bare_loop(args)))
        sys.exit(0)
    return args


def points(text: str) -> list[Point]:
    try:
        return [(int(batch), int(length)) for batch, length in (part.split("x") for part in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} was given, points like 1x64,4x64 are needed") from None


def shared_flags(args: argparse.Namespace) -> list[str]:
    """What all three give to vLLM: every size that would otherwise follow the grid or a point of it."""
    longest = max(length for _, length in args.points) + args.max_tokens
    largest = max(batch for batch, _ in args.points)
    sizes = ["--max-model-len", str(longest), "--max-num-seqs", str(largest)]
    return ["--model", args.model, *sizes, *args.engine_flags]


# --- the three ways -------------------------------------------------------------------------------------------------


def ours(args: argparse.Namespace) -> Latencies:
    file = args.output_dir / "ours_results.json"
    command = [sys.executable, "batch_inference_experiment.py", *shared_flags(args), "--overwrite"]
    command += ["--batch-sizes", listed(batch for batch, _ in args.points)]
    command += ["--seq-lens", listed(length for _, length in args.points)]
    command += ["--max-tokens", str(args.max_tokens), "--temperature", "1", "--top-p", "1"]
    command += ["--num-runs", str(args.num_runs), "--warmup-runs", str(args.warmup_runs), "--output-file", str(file)]
    call(command, args.output_dir / "ours.txt")
    return {
        (point.batch_size, point.seq_len): [run.latency_s for run in point.runs] for point in load_result(file).points
    }


def bare_loop(args: argparse.Namespace) -> Latencies:
    answer = args.output_dir / "bare_loop.json"
    flags = [f"{batch}x{length}" for batch, length in args.points]
    command = [sys.executable, __file__, "--bare", str(answer), "--model", args.model, "--points", ",".join(flags)]
    command += ["--max-tokens", str(args.max_tokens), "--num-runs", str(args.num_runs)]
    command += ["--warmup-runs", str(args.warmup_runs), "--", *args.engine_flags]
    call(command, args.output_dir / "bare_loop.txt")
    return {(batch, length): times for batch, length, times in json.loads(answer.read_text())}


def bench_latency(args: argparse.Namespace) -> Latencies:
    measured = {}
    for batch, length in args.points:
        answer = args.output_dir / f"bench_{batch}x{length}.json"
        command = [sys.executable, "-c", BENCH_LATENCY, *shared_flags(args)]
        command += [*AS_OURS, "--disable-detokenize"]
        command += ["--input-len", str(length), "--output-len", str(args.max_tokens), "--batch-size", str(batch)]
        command += ["--num-iters-warmup", str(args.warmup_runs), "--num-iters", str(args.num_runs)]
        call([*command, "--output-json", str(answer)], args.output_dir / f"bench_{batch}x{length}.txt")
        measured[batch, length] = json.loads(answer.read_text())["latencies"]
    return measured


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


def call(command: list[str], log: Path) -> None:
    """Run one of the three; what it prints goes to a file of its own."""
    environment = {**os.environ, "PYTHONPATH": python_path(), "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as output:
        done = subprocess.run(command, stdout=output, stderr=output, env=environment, cwd=REPOSITORY)
    if done.returncode:
        sys.exit(f"error: a measurement failed with exit code {done.returncode}; see {log}")


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
    return f"| {' | '.join([str(row['batch_size']), str(row['seq_len']), *times, *ratios])} |"


def listed(values: Any) -> str:
    return ",".join(map(str, dict.fromkeys(values)))


if __name__ == "__main__":
    sys.exit(main())
