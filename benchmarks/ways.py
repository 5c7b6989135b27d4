"""Two ways to measure points, for the benchmarks that compare them: this program, and `vllm bench latency`.

Both get the same model, device, engine flags, sampling (temperature 1, top-p 1), warm-ups and runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from batch_inference.core.config import SEPARATE  # noqa: E402
from batch_inference.core.result_file import load_result  # noqa: E402
from batch_inference.core.results import Result  # noqa: E402
from batch_inference.measure.engine_process import quiet_environment  # noqa: E402

Point = tuple[int, int]  # batch size, prompt length
Way = TypeVar("Way")
# What our script itself gives to vLLM.
_MEMORY = ("--gpu-memory-utilization", "0.8")
AS_OURS = (*_MEMORY, "--skip-tokenizer-init")
# The same for a tool whose prompts are texts, and which would cache their shared prefixes.
AS_OURS_OF_TEXTS = (*_MEMORY, "--no-enable-prefix-caching")


def add_flags(parser: argparse.ArgumentParser, *, output_dir: str, max_tokens: int, num_runs: int) -> None:
    """The flags that both need; the benchmark fills in `points` of the namespace."""
    parser.add_argument("--model", required=True)
    parser.add_argument("--max-tokens", type=int, default=max_tokens)
    parser.add_argument("--num-runs", type=int, default=num_runs)
    parser.add_argument("--warmup-runs", type=int, default=3)
    parser.add_argument("--output-dir", type=Path, default=Path(output_dir))
    parser.add_argument("engine_flags", nargs="*", help="vLLM's engine flags, after --")


def points(text: str) -> list[Point]:
    try:
        return [(int(batch), int(length)) for batch, length in (part.split("x") for part in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} was given, points like 1x64,4x64 are needed") from None


def shared_flags(args: argparse.Namespace) -> list[str]:
    """What both give to vLLM: every size that would otherwise depend on the grid or a point."""
    sizes = {
        "--max-model-len": max(length for _, length in args.points) + args.max_tokens,
        "--max-num-seqs": max(batch for batch, _ in args.points),
    }
    return with_sizes(args, sizes)


def with_sizes(args: argparse.Namespace, sizes: dict[str, int]) -> list[str]:
    """The model and the engine flags, with sizes that these lack from `sizes`."""
    missing = [(flag, str(size)) for flag, size in sizes.items() if flag not in args.engine_flags]
    return ["--model", args.model, *itertools.chain(*missing), *args.engine_flags]


def measure_ours(args: argparse.Namespace, *, resume: bool = False) -> tuple[Result, float]:
    """One sweep over all points: its result, and the wall time of the whole process in seconds."""
    file = args.output_dir / "ours_results.json"
    wall_s = call(ours_command(args, file), args.output_dir / "ours.txt", resume=resume)
    return load_result(file), wall_s


def ours_command(args: argparse.Namespace, file: Path) -> list[str]:
    command = [sys.executable, "batch_inference_experiment.py", *shared_flags(args), "--overwrite"]
    command += ["--batch-sizes", listed(batch for batch, _ in args.points)]
    command += ["--seq-lens", listed(length for _, length in args.points)]
    command += ["--max-tokens", str(args.max_tokens), "--temperature", "1", "--top-p", "1"]
    command += ["--num-runs", str(args.num_runs), "--warmup-runs", str(args.warmup_runs), "--output-file", str(file)]
    return command


def measure_bench(args: argparse.Namespace, point: Point, *, resume: bool = False) -> tuple[dict[str, Any], float]:
    """One process for one point: its latencies_s and the seconds of its stopwatch, and the wall time of the process."""
    batch, length = point
    log = bench_log(args, point)
    answer, stopwatch = log.with_suffix(".json"), log.with_name(f"{log.stem}_stopwatch.json")
    command = [sys.executable, "benchmarks/bench_latency.py", *shared_flags(args), *AS_OURS, "--disable-detokenize"]
    command += ["--input-len", str(length), "--output-len", str(args.max_tokens), "--batch-size", str(batch)]
    command += ["--num-iters-warmup", str(args.warmup_runs), "--num-iters", str(args.num_runs)]
    command += ["--output-json", str(answer)]
    wall_s = call(command, log, resume=resume, STOPWATCH=str(stopwatch.resolve()))
    latencies_s = json.loads(answer.read_text())["latencies"]
    return {"latencies_s": latencies_s, **json.loads(stopwatch.read_text())}, wall_s


def bench_log(args: argparse.Namespace, point: Point) -> Path:
    log: Path = args.output_dir / f"bench_{point[0]}x{point[1]}.txt"
    return log


def call(command: list[str], log: Path, *, resume: bool = False, **variables: str) -> float:
    """Run a process to its end, with its output in its own file; returns its wall time in seconds.

    With `resume`, a command that already succeeded with the same log is not run again.
    """
    record = log.with_name(f"{log.stem}_process.json")
    if resume and record.exists():
        before = json.loads(record.read_text())
        if before["command"] == command:
            return float(before["wall_s"])
    record.unlink(missing_ok=True)
    # The same as our engines get: bytecode is written and Triton's kernels are found for both or for neither. And an
    # engine has its own process for both, unless the user says otherwise.
    environment = {SEPARATE: "1", **os.environ, **quiet_environment(), **variables}
    started_s = time.monotonic()
    with log.open("w") as output:
        done = subprocess.run(command, stdout=output, stderr=output, env=environment, cwd=REPOSITORY)
    wall_s = time.monotonic() - started_s
    if done.returncode:
        sys.exit(f"error: a measurement failed with exit code {done.returncode}; see {log}")
    record.write_text(json.dumps({"command": command, "wall_s": wall_s}))
    return wall_s


def turns(ways: Sequence[Way], number: int) -> list[Way]:
    """In what order they are measured in round `number` (0, 1, …): another one begins each time, so that a machine that
    becomes slower or faster favours none."""
    first = number % len(ways)
    return [*ways[first:], *ways[:first]]


def listed(values: Iterable[int]) -> str:
    return ",".join(map(str, dict.fromkeys(values)))


def markdown_row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def save(folder: Path, name: str, document: dict[str, Any], table: str) -> None:
    """Print the table, and save it beside the numbers."""
    print(table)
    keep(folder, name, document, table)


def keep(folder: Path, name: str, document: dict[str, Any], table: str) -> None:
    (folder / f"{name}.md").write_text(table + "\n")
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
