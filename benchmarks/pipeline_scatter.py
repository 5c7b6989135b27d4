#!/usr/bin/env python3
"""What makes runs of one batch differ in a pipeline: the same batch handed over in several ways, on one engine.

    python benchmarks/pipeline_scatter.py --model models/llama-3.1-8b --points 64x512,16x512 \
        --ways plain held even even/short 6,6,19,0,0,31,2 -- \
        --load-format dummy --pipeline-parallel-size 4 --max-num-batched-tokens 16384

plain        as LLM.generate does it: requests come one after another, while the engine already makes steps
held         the engine makes no step before all requests are there; then each takes as many as its tokens allow
even         held, and each stage's micro-batch gets as many requests
6,6,19,0,2   held, and the first steps take 6, 6, 19, 0, 2 new requests; the next one takes those that are left
WAY/short    any of these, with Python's thread switch interval at 0.2 ms instead of 5 ms in the engine and its workers

The ways take turns, run by run, so that no drift passes for a difference. A request stays in the micro-batch in which
its prompt ended, that is, in each Nth step of a pipeline of N stages. Prints a Markdown table, and writes it with the
numbers of each run to --output-dir. Without a GPU, set VLLM_CPU_OMP_THREADS_BIND too, for example "0|1" for two stages.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ways import AS_OURS, Point, add_flags, markdown_row, points, save, shared_flags

# The folder through which this program and the scheduler, which lives in another process, tell each other of a run.
FOLDER = "PIPELINE_SCATTER"
WANTED, SEEN = "wanted.json", "seen.json"
SHORT_S, USUAL_S = 0.0002, 0.005
PARTS = 10  # of the decoding of a run
CPU_STAT = Path("/sys/fs/cgroup/cpu.stat")


@dataclass(frozen=True)
class Ran:
    """What is kept of a run."""

    batch_size: int
    seq_len: int
    way: str
    latency_s: float
    micro_batches: list[int]  # requests in each
    parts_s: list[float]  # time of equal parts of its decoding; empty if there are too few steps
    throttled_us: int | None  # how long the container's limit held its processes back; None: it does not say


def main() -> int:
    args = parse()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder
        runs, setting = measure(args, Path(folder))
    save(args.output_dir, "pipeline_scatter", document(setting, runs), table(setting, runs))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, output_dir="results/pipeline_scatter", max_tokens=128, num_runs=6)
    parser.add_argument("--points", type=points, required=True, metavar="BxN,..", help="batch x prompt length")
    parser.add_argument("--ways", nargs="+", type=way, default=["plain", "held", "even", "even/short"], metavar="WAY")
    return parser.parse_args()


def way(text: str) -> str:
    name, *interval = text.split("/")
    if interval in ([], ["short"]) and re.fullmatch(r"plain|held|even|\d+(,\d+)*", name):
        return text
    raise argparse.ArgumentTypeError(
        f"{text!r} was given; plain, held, even or 6,6,4 is needed, with /short or without"
    )


# --- in the engine's own processes ----------------------------------------------------------------------------------


class Extension:
    """Of vLLM's workers."""

    def switch_interval(self, seconds: float) -> None:
        sys.setswitchinterval(seconds)


class _Watching:
    """Comes before a vLLM scheduler among the bases of a class."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._folder = Path(os.environ[FOLDER])
        # vLLM 0.26 has only the second.
        self._limit = next(name for name in ("max_num_active_reqs", "max_num_running_reqs") if hasattr(self, name))
        self._as_loaded = getattr(self, self._limit)
        self._start_over()

    def _start_over(self) -> None:
        self._wanted: dict[str, Any] = {}
        self._steps: list[tuple[float, int, int, int]] = []  # when, number, requests, how many of them new
        self._results: list[tuple[float, int]] = []  # when, requests

    def _read(self) -> None:
        if not self._wanted:
            self._wanted = json.loads((self._folder / WANTED).read_text())
            sys.setswitchinterval(self._wanted["interval_s"])

    def has_requests(self) -> bool:
        waiting = len(self.waiting)  # type: ignore[attr-defined]
        if waiting and not self._steps:
            self._read()
            if waiting < self._wanted["held"]:
                return False
        return bool(super().has_requests())  # type: ignore[misc]

    def schedule(self, *arguments: Any, **keywords: Any) -> Any:
        if self.waiting:  # type: ignore[attr-defined]
            self._read()
        split, number = self._wanted.get("split", []), len(self._steps)
        room = len(self.running) + split[number] if number < len(split) else self._as_loaded  # type: ignore[attr-defined]
        setattr(self, self._limit, min(room, self._as_loaded))
        began_s = time.monotonic()
        output = super().schedule(*arguments, **keywords)  # type: ignore[misc]
        if self._wanted:
            new = len(output.scheduled_new_reqs)
            self._steps.append((began_s, number, len(output.num_scheduled_tokens), new))
        return output

    def update_from_output(self, scheduled: Any, *arguments: Any, **keywords: Any) -> Any:
        came_s = time.monotonic()
        result = super().update_from_output(scheduled, *arguments, **keywords)  # type: ignore[misc]
        if self._wanted:
            self._results.append((came_s, len(scheduled.num_scheduled_tokens)))
            if not self.running and not self.waiting:  # type: ignore[attr-defined]
                unfinished = self._folder / f"{SEEN}.part"
                unfinished.write_text(json.dumps({"steps": self._steps, "results": self._results}))
                unfinished.rename(self._folder / SEEN)
                self._start_over()
        return result


class Scheduler:
    """vLLM's own choice of scheduler, watched."""

    def __new__(cls, vllm_config: Any, *arguments: Any, **keywords: Any) -> Any:
        own = copy.copy(vllm_config.scheduler_config)
        own.scheduler_cls = None
        return type(cls.__name__, (_Watching, own.get_scheduler_cls()), {})(vllm_config, *arguments, **keywords)


# --- what is run ----------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, folder: Path) -> tuple[list[Ran], dict[str, Any]]:
    import vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    flags = [*shared_flags(args), *AS_OURS, "--worker-extension-cls", f"{Path(__file__).stem}.Extension"]
    parsed = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(flags)
    parsed.enable_prefix_caching, parsed.scheduler_cls = False, f"{Path(__file__).stem}.Scheduler"
    llm = vllm.LLM.from_engine_args(EngineArgs.from_cli_args(parsed))
    parallel = llm.llm_engine.vllm_config.parallel_config
    setting = {
        "model": args.model, "engine_flags": args.engine_flags, "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size, "max_tokens": args.max_tokens,
        "device": current_platform.get_device_name(), "vllm": vllm.__version__,
    }  # fmt: skip
    runs = []
    for point in args.points:
        for number in range(-args.warmup_runs, args.num_runs):
            for name in args.ways:
                ran = one_run(llm, args, folder, point, name)
                runs += [ran] if number >= 0 else []
                print(f"{point[0]} {name}, run {number}: {ran.latency_s:.3f} s, {ran.micro_batches}", file=sys.stderr)
    return runs, setting


def one_run(llm: Any, args: argparse.Namespace, folder: Path, point: Point, name: str) -> Ran:
    from vllm import SamplingParams

    config, (batch_size, seq_len) = llm.llm_engine.vllm_config, point
    stages = config.parallel_config.pipeline_parallel_size
    asked = wanted(name, batch_size, stages)
    llm.collective_rpc("switch_interval", args=(asked["interval_s"],))
    (folder / SEEN).unlink(missing_ok=True)
    (folder / WANTED).write_text(json.dumps(asked))
    vocabulary = config.model_config.get_vocab_size()
    prompts: Any = [
        {"prompt_token_ids": random.choices(range(10, vocabulary - 10), k=seq_len)} for _ in range(batch_size)
    ]
    params = SamplingParams(temperature=0.8, top_p=0.95, ignore_eos=True, max_tokens=args.max_tokens, detokenize=False)
    before_us, started_s = throttled_us(), time.monotonic()
    llm.generate(prompts, params, use_tqdm=False)
    latency_s, after_us = time.monotonic() - started_s, throttled_us()
    while not (folder / SEEN).exists():  # the engine writes it when the last request has ended
        time.sleep(0.01)
    seen = json.loads((folder / SEEN).read_text())
    held_back = None if before_us is None or after_us is None else after_us - before_us
    told = {"batch_size": batch_size, "seq_len": seq_len, "way": name, "latency_s": latency_s}
    return compact({**seen, **told, "throttled_us": held_back}, stages)


def wanted(one: str, batch_size: int, stages: int) -> dict[str, Any]:
    """What the scheduler is told: how many requests to wait for, how many new ones its first steps take, and the
    thread switch interval."""
    name, _, interval = one.partition("/")
    split = {"plain": [], "held": [], "even": [-(-batch_size // stages)] * stages}.get(name)
    return {
        "held": 0 if name == "plain" else batch_size,
        "split": [int(part) for part in name.split(",")] if split is None else split,
        "interval_s": SHORT_S if interval == "short" else USUAL_S,
    }


def throttled_us() -> int | None:
    """Of this container, so far."""
    try:
        found = dict(line.split() for line in CPU_STAT.read_text().splitlines())
    except OSError:
        return None
    return int(found["throttled_usec"]) if "throttled_usec" in found else None


# --- what is made of it ---------------------------------------------------------------------------------------------


def compact(raw: Mapping[str, Any], stages: int) -> Ran:
    """The micro-batches as they are in the middle of the run, and the time of ten equal parts of its decoding."""
    steps = raw["steps"]
    middle = len(steps) // 2
    micro_batches = [0] * stages
    for _, number, requests, *_ in steps[middle : middle + stages]:
        micro_batches[number % stages] = requests
    if sum(micro_batches) != raw["batch_size"]:
        raise ValueError(f"{raw['way']}: {raw['batch_size']} requests were handed over, {micro_batches} run")
    came_s = [came_s for came_s, *_ in raw["results"]]
    first = len(came_s) // PARTS  # prompts are read before it
    steps_each = (len(came_s) - 1 - first) // (PARTS * stages) * stages
    edges = [first + part * steps_each for part in range(PARTS + 1)] if steps_each else []
    parts_s = [round(came_s[end] - came_s[start], 5) for start, end in itertools.pairwise(edges)]
    same = {name: raw[name] for name in ("batch_size", "seq_len", "way", "throttled_us")}
    return Ran(**same, latency_s=round(raw["latency_s"], 5), micro_batches=micro_batches, parts_s=parts_s)


def rows_of(runs: Iterable[Ran]) -> list[dict[str, Any]]:
    """One for each point and way, in the order in which they come."""
    grouped: dict[tuple[int, int, str], list[Ran]] = {}
    for ran in runs:
        grouped.setdefault((ran.batch_size, ran.seq_len, ran.way), []).append(ran)
    return [row_of(same) for same in grouped.values()]


def row_of(same: list[Ran]) -> dict[str, Any]:
    """Spreads are relative to the mean. If the parts of a run were slow and fast by chance, each on its own, the sd of
    the runs would be that of the parts over the root of their number."""
    latencies_s = [ran.latency_s for ran in same]
    mean_s = fmean(latencies_s)
    enough = [ran.parts_s for ran in same if ran.parts_s]
    return {
        "batch_size": same[0].batch_size,
        "seq_len": same[0].seq_len,
        "way": same[0].way,
        "runs": len(same),
        "mean_s": mean_s,
        "sd": stdev(latencies_s) / mean_s if len(same) > 1 else None,
        "range": (max(latencies_s) - min(latencies_s)) / mean_s,
        "sd_of_parts": fmean(stdev(parts_s) / fmean(parts_s) for parts_s in enough) if enough else None,
        "occupied": sorted(sum(map(bool, ran.micro_batches)) for ran in same),
    }


def document(setting: dict[str, Any], runs: list[Ran]) -> dict[str, Any]:
    return {**setting, "rows": rows_of(runs), "runs": [asdict(ran) for ran in runs]}


def table(setting: Mapping[str, Any], runs: list[Ran]) -> str:
    held_back = {ran.throttled_us for ran in runs}
    throttled = "unknown" if None in held_back else f"{sum(filter(None, held_back)) / 1e6:.3g} s"
    return "\n".join(
        [
            f"{setting['model']}, TP={setting['tensor_parallel_size']} PP={setting['pipeline_parallel_size']}, "
            f"{setting['max_tokens']} output tokens. {setting['device']}, vLLM {setting['vllm']}. Time for which the "
            f"container's CPU limit held it back: {throttled}.",
            "",
            "| batch | length | way | runs | mean s | sd | range | sd of the parts of a run | micro-batches in use |",
            "|---:|---:|---|---:|---:|---:|---:|---:|---|",
            *map(markdown, rows_of(runs)),
        ]
    )


def markdown(row: Mapping[str, Any]) -> str:
    spreads = ["" if row[name] is None else f"{row[name]:.1%}" for name in ("sd", "range", "sd_of_parts")]
    occupied = ", ".join(map(str, row["occupied"]))
    begin = [row[name] for name in ("batch_size", "seq_len", "way", "runs")]
    return markdown_row([*begin, f"{row['mean_s']:.3f}", *spreads, occupied])


if __name__ == "__main__":
    sys.exit(main())
