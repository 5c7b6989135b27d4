#!/usr/bin/env python3
"""The same queue of requests run in turn by this program with all limits on one load, by an engine per limit, and by
`vllm bench throughput`.

    python benchmarks/queue_fidelity.py --model models/tiny-llama --tokenizer TOKENIZER --batch-sizes 2,8 \
        --tolerance 0.05 -- --load-format dummy --kv-cache-memory-bytes 268435456

together    this program, every batch size and token budget on one load
alone       this program, an engine for each of them, without its own scheduler
bench       `vllm bench throughput` with --max-num-seqs and --max-num-batched-tokens, on texts of the same lengths

Every round restarts every engine, and another way begins. All get the same engine flags (after --), sampling
(temperature 1, top-p 1), order of requests, and a warm-up of as many requests. Lengths come from --prompts-file, except
those that `vllm bench throughput` would drop. Each run is checked: the lengths of every request, in order; the most
requests at once; the tokens of the steps against the budget. Exit code 1 if a check fails, or a ratio of the medians is
further from 1 than --tolerance. One replica.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

from known_texts import KnownTexts, Lengths, is_kept, sharegpt
from ways import AS_OURS_OF_TEXTS, REPOSITORY, call, keep, listed, markdown_row, turns, with_sizes

from batch_inference.core.config import ConfigError
from batch_inference.core.result_file import load_result
from batch_inference.core.results import Run, Timeline
from batch_inference.core.text import counted
from batch_inference.core.workload import Workload
from batch_inference.measure.job import WARMUP_LIVES

WAYS = ("together", "alone", "bench")


class Limit(NamedTuple):
    """What may run at once."""

    batch_size: int
    budget: int | None  # tokens per step; None: vLLM's own

    def __str__(self) -> str:
        return f"{self.batch_size} at once" + (f", {self.budget} tokens per step" if self.budget else "")

    @property
    def stem(self) -> str:
        """For file names."""
        return "_".join(map(str, filter(None, self)))


@dataclass(frozen=True)
class Queue:
    """What all three ways run."""

    lengths: list[Lengths]
    left_out: int  # how many requests of the file
    own_file: Path
    sharegpt_file: Path | None
    ids_s: float | None  # time to turn all prompts into ids

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.lengths))


@dataclass(frozen=True)
class Ran:
    """One run, and what was wrong with it."""

    elapsed_s: float
    wrong: list[str]
    steps: int | None = None


Measured = dict[str, dict[Limit, list[Ran]]]


def main() -> int:
    args = parse()
    folder: Path = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    try:
        queue = make_queue(args)
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    ways = WAYS if args.tokenizer else WAYS[:2]
    measured: Measured = {way: {limit: [] for limit in args.limits} for way in ways}
    for number in range(args.rounds):
        for way in turns(ways, number):
            print(f"round {number + 1}: {way} ...", file=sys.stderr, flush=True)
            for limit, runs in MEASURES[way](args, queue).items():
                measured[way][limit] += runs
        # A round takes minutes: anybody who stops after a few keeps those.
        rows = [row_of(limit, measured, queue.tokens) for limit in args.limits]
        shown = "\n".join(table(args, queue, rows, rounds=number + 1))
        keep(folder, args.name, document(args, queue, measured, rows), shown)
    print(shown)
    wrong = dict.fromkeys(what_is_wrong(measured))
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    return 1 if wrong or not all(is_close(row, args.tolerance) for row in rows) else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokenizer", help="for the texts; without it, `vllm bench throughput` is left out")
    parser.add_argument(
        "--prompts-file", type=Path, default=REPOSITORY / "examples/workload.jsonl", help="source of the lengths"
    )
    parser.add_argument("--requests", type=int, default=200, help="how many of the file's first requests to run")
    parser.add_argument("--batch-sizes", type=sizes, required=True, metavar="N,N,..")
    parser.add_argument("--budgets", type=sizes, default=[None], metavar="N,N,..", help="tokens per step")
    parser.add_argument("--num-runs", type=int, default=1, help="runs of this program on each load")
    parser.add_argument("--rounds", type=int, default=3, help="each round restarts every engine")
    parser.add_argument("--tolerance", type=float, default=0.02, help="largest distance of a ratio from 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("results/queue_fidelity"))
    parser.add_argument("--name", default="queue_fidelity", help="name of the table and the numbers in --output-dir")
    parser.add_argument("engine_flags", nargs="*", help="vLLM's engine flags, after --")
    args = parser.parse_args()
    args.output_dir = args.output_dir.resolve()
    args.limits = [Limit(batch_size, budget) for budget in args.budgets for batch_size in args.batch_sizes]
    return args


def sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} was given, sizes like 2,8 are needed") from None


# --- what is run ----------------------------------------------------------------------------------------------------


def make_queue(args: argparse.Namespace) -> Queue:
    """Writes its files into the output folder."""
    said = [
        (entry.prompt_tokens, entry.output_tokens)
        for entry in Workload(args.prompts_file).entries()
        if entry.prompt_tokens and entry.output_tokens
    ]
    lengths = list(islice(filter(is_kept, said), args.requests))
    if len(lengths) < max(args.requests, *args.batch_sizes):
        raise ValueError(f"--requests {args.requests}: {args.prompts_file} has {len(lengths)} usable lengths")
    own_file = args.output_dir / "lengths.jsonl"
    lines = (json.dumps({"prompt_tokens": prompt, "output_tokens": output}) for prompt, output in lengths)
    own_file.write_text("".join(f"{line}\n" for line in lines))
    left_out = len(said) - sum(map(is_kept, said))
    if not args.tokenizer:
        return Queue(lengths, left_out, own_file, None, None)
    from transformers import AutoConfig, AutoTokenizer

    vocab_size = AutoConfig.from_pretrained(args.model).get_text_config().vocab_size
    texts = KnownTexts(AutoTokenizer.from_pretrained(args.tokenizer), vocab_size, args.seed)
    pairs = [(texts.text(prompt), texts.text(output)) for prompt, output in lengths]
    sharegpt_file = args.output_dir / "sharegpt.json"
    sharegpt_file.write_text(json.dumps(sharegpt(pairs, args.seed)))
    return Queue(lengths, left_out, own_file, sharegpt_file, texts.seconds([prompt for prompt, _ in pairs]))


# --- the three ways -------------------------------------------------------------------------------------------------


def together(args: argparse.Namespace, queue: Queue) -> dict[Limit, list[Ran]]:
    return ours(args, queue, args.limits, "together")


def alone(args: argparse.Namespace, queue: Queue) -> dict[Limit, list[Ran]]:
    every: dict[Limit, list[Ran]] = {}
    for limit in args.limits:
        every |= ours(args, queue, [limit], f"alone_{limit.stem}")
    return every


def ours(args: argparse.Namespace, queue: Queue, limits: Sequence[Limit], stem: str) -> dict[Limit, list[Ran]]:
    file = args.output_dir / f"{stem}_results.json"
    command = [sys.executable, "batch_inference_experiment.py", *shared_flags(args, queue), "--overwrite"]
    command += ["--prompts-file", str(queue.own_file), "--sample", str(len(queue.lengths)), "--order", "given"]
    command += ["--batch-sizes", listed(limit.batch_size for limit in limits)]
    if limits[0].budget:
        command += ["--max-num-batched-tokens", listed(limit.budget for limit in limits if limit.budget)]
    command += ["--temperature", "1", "--top-p", "1", "--num-runs", str(args.num_runs), "--warmup-runs", "1"]
    call([*command, "--output-file", str(file)], args.output_dir / f"{stem}.txt")
    result = load_result(file)
    found: dict[Limit, list[Ran]] = {}
    for point in result.points:
        # A single budget belongs to the engine, not to the point.
        limit = Limit(point.batch_size, point.max_num_batched_tokens or limits[0].budget)
        found[limit] = [ran_by_us(run, limit, queue) for run in point.runs]
    return found


def ran_by_us(run: Run, limit: Limit, queue: Queue) -> Ran:
    lengths = list(zip(run.requests.prompt_tokens, run.requests.output_tokens, strict=True))
    wrong = list(differences(lengths, queue.lengths))
    if run.counters.peak_running != limit.batch_size:
        wrong.append(f"{run.counters.peak_running} requests ran at once")
    line = run.replicas[0].timeline
    if limit.budget and line and (most := over_budget(line, limit.budget)) > spilled(queue.lengths):
        wrong.append(f"{most} tokens more than the budget of its steps")
    return Ran(run.latency_s, wrong, sum(line.steps) if line else None)


def bench(args: argparse.Namespace, queue: Queue) -> dict[Limit, list[Ran]]:
    return {limit: [bench_of(args, queue, limit)] for limit in args.limits}


def bench_of(args: argparse.Namespace, queue: Queue, limit: Limit) -> Ran:
    answer, ran = (args.output_dir / f"bench_{limit.stem}{end}.json" for end in ("", "_ran"))
    command = [sys.executable, "benchmarks/bench_throughput.py", *AS_OURS_OF_TEXTS]
    command += [*shared_flags(args, queue), "--max-num-seqs", str(limit.batch_size), "--tokenizer", args.tokenizer]
    command += ["--max-num-batched-tokens", str(limit.budget)] if limit.budget else []
    command += ["--backend", "vllm", "--dataset-name", "sharegpt", "--dataset-path", str(queue.sharegpt_file)]
    command += ["--num-prompts", str(len(queue.lengths)), "--disable-detokenize"]
    command += ["--num-warmups", str(WARMUP_LIVES * limit.batch_size), "--output-json", str(answer)]
    call(command, args.output_dir / f"bench_{limit.stem}.txt", RAN=str(ran))
    told, watched = json.loads(answer.read_text()), json.loads(ran.read_text())
    wrong = list(differences([(prompt, output) for prompt, output in watched["lengths"]], queue.lengths))
    if (told["num_requests"], told["total_num_tokens"]) != (len(queue.lengths), queue.tokens):
        wrong.append(f"it says {told['num_requests']} requests and {told['total_num_tokens']} tokens")
    return Ran(told["elapsed_time"], wrong, watched["steps"])


def shared_flags(args: argparse.Namespace, queue: Queue) -> list[str]:
    return [*with_sizes(args, {"--max-model-len": max(map(sum, queue.lengths))}), "--seed", str(args.seed)]


MEASURES = {"together": together, "alone": alone, "bench": bench}

# --- the checks -----------------------------------------------------------------------------------------------------


def differences(ran: Sequence[Lengths], asked: Sequence[Lengths]) -> Iterator[str]:
    """Between the requests that were run and those that should have been."""
    if len(ran) != len(asked) or sum(map(sum, ran)) != sum(map(sum, asked)):
        yield (
            f"{len(ran)} requests of {sum(map(sum, ran))} tokens were run in place of "
            f"{len(asked)} of {sum(map(sum, asked))}"
        )
    elif list(ran) != list(asked):
        yield "requests were run in a different order, or with different lengths"


def over_budget(line: Timeline, budget: int) -> int:
    """The most tokens by which any stretch of a run exceeded the budget of its steps."""
    most = now = 0
    for steps, prompt, output in zip(line.steps, line.prompt_tokens, line.output_tokens, strict=True):
        now = max(0, now + prompt + output - budget * steps)
        most = max(most, now)
    return most


def spilled(lengths: Sequence[Lengths]) -> int:
    """How far a stretch may seem to exceed its budget: a prompt counts fully in the step that ends it, and the first
    output token of a request comes out of the step that ends its prompt."""
    return max(prompt for prompt, _ in lengths) + len(lengths)


def what_is_wrong(measured: Measured) -> Iterator[str]:
    for way, by_limit in measured.items():
        for limit, runs in by_limit.items():
            if not runs:
                yield f"{way}, {limit}: it was not measured"
            yield from (f"{way}, {limit}: {text}" for run in runs for text in run.wrong)


# --- the table ------------------------------------------------------------------------------------------------------


def row_of(limit: Limit, measured: Measured, tokens: int) -> dict[str, Any]:
    row: dict[str, Any] = limit._asdict()
    for way, by_limit in measured.items():
        elapsed_s = [run.elapsed_s for run in by_limit[limit]]
        row[f"{way}_tokens_per_s"] = tokens / median(elapsed_s) if elapsed_s else None
        row[f"{way}_spread"] = (max(elapsed_s) - min(elapsed_s)) / median(elapsed_s) if elapsed_s else None
        steps = [run.steps for run in by_limit[limit] if run.steps]
        row[f"{way}_steps"] = median(steps) if steps else None
    for way in WAYS[1:]:
        both = (row["together_tokens_per_s"], row.get(f"{way}_tokens_per_s"))
        row[f"to_{way}"] = both[0] / both[1] if all(both) else None
    return row


def is_close(row: dict[str, Any], tolerance: float) -> bool:
    ratios = [row[f"to_{way}"] for way in WAYS[1:]]
    return all(abs(ratio - 1) <= tolerance for ratio in ratios if ratio is not None)


def document(args: argparse.Namespace, queue: Queue, measured: Measured, rows: list[dict[str, Any]]) -> dict[str, Any]:
    runs = [
        {"way": way, **limit._asdict(), **asdict(run)}
        for way, by_limit in measured.items()
        for limit, every in by_limit.items()
        for run in every
    ]
    result = load_result(args.output_dir / "together_results.json")
    return {
        "points": rows,
        "runs": runs,
        "requests": len(queue.lengths),
        "prompt_tokens": sum(prompt for prompt, _ in queue.lengths),
        "output_tokens": sum(output for _, output in queue.lengths),
        "left_out_of_the_file": queue.left_out,
        "ids_s": queue.ids_s,
        "tolerance": args.tolerance,
        "vllm_version": result.engine.vllm_version if result.engine else None,
        "multiprocess_engine": result.engine.multiprocess_engine if result.engine else None,
        "cpu_name": result.environment.cpu_name,
        "devices": [device.name for device in result.environment.devices],
        "argv": sys.argv,
    }


def table(args: argparse.Namespace, queue: Queue, rows: list[dict[str, Any]], rounds: int) -> list[str]:
    prompts, outputs = (sum(column) for column in zip(*queue.lengths, strict=True))
    lines = [
        f"{args.model}, {len(queue.lengths)} requests of {prompts} prompt and {outputs} output tokens, medians of "
        f"{counted(rounds, 'engine start')} each."
    ]
    if queue.ids_s is not None:
        lines[0] += (
            f" Turning the texts into ids, which only `vllm bench` does on its clock, takes {queue.ids_s:.3f} s."
        )
    heads = [
        "at once",
        "tokens per step",
        *(f"{way} tok/s" for way in WAYS),
        *(f"together / {way}" for way in WAYS[1:]),
    ]
    heads += ["largest spread of the runs", *(f"steps {way}" for way in WAYS)]
    return [*lines, "", markdown_row(heads), f"|{'---|' * len(heads)}", *map(markdown, rows)]


def markdown(row: dict[str, Any]) -> str:
    speeds = [as_text(row.get(f"{way}_tokens_per_s"), ".1f") for way in WAYS]
    ratios = [as_text(row[f"to_{way}"], ".3f") for way in WAYS[1:]]
    spreads = [row[f"{way}_spread"] for way in WAYS if row.get(f"{way}_spread") is not None]
    steps = [as_text(row.get(f"{way}_steps"), ".0f") for way in WAYS]
    budget = row["budget"] or "vLLM's own"
    return markdown_row(
        [row["batch_size"], budget, *speeds, *ratios, as_text(max(spreads, default=None), ".1%"), *steps]
    )


def as_text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
