#!/usr/bin/env python3
"""Whole jobs against their forecasts from samples: run first the sample, then all of the job, on the same engine.

    python benchmarks/whole_jobs.py --model models/tiny-llama --settings TP=1,TP=2,DP=2,PP=2 --batch-size 4 -- \\
        --load-format dummy --kv-cache-memory-bytes 268435456

A job has --times as many requests as its sample. Each mix of lengths is made anew from --seed and the setting's number.
Prints a Markdown table (forecast, interval, truth) and how each mix ranks the settings by sample and by whole job, and
writes both with every request's times to --output-dir. Exit code 1 where the median error is over --most-error or fewer
than --least-held of the intervals hold the truth.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from ways import markdown_row, save

from batch_inference.core.flags import parse_flags
from batch_inference.core.forecast import Forecast, JobLengths, forecast
from batch_inference.core.queue_points import replicas_of
from batch_inference.core.results import Run
from batch_inference.measure.combine import combine
from batch_inference.measure.hardware import Seen, monitor
from batch_inference.measure.job import JobFile
from batch_inference.measure.job_lengths import read_job
from batch_inference.measure.messages import Queue
from batch_inference.measure.replicas import LocalReplicas
from batch_inference.plan.devices import find_devices

Draw = Callable[[random.Random], tuple[int, int]]


def lognormal(mean_prompt: float, mean_output: float, wide: float) -> Draw:
    def draw(source: random.Random) -> tuple[int, int]:
        # The mean of a lognormal is that of its logarithm plus half its variance.
        factor = [source.lognormvariate(-wide * wide / 2, wide) for _ in range(2)]
        return max(2, round(mean_prompt * factor[0])), max(2, round(mean_output * factor[1]))

    return draw


def two_humps(prompt: float, output: float) -> Draw:
    chats, papers = lognormal(prompt / 2, output * 1.6, 0.3), lognormal(prompt * 4, output * 0.4, 0.3)
    return lambda source: (chats if source.random() < 0.8 else papers)(source)


def with_giant(prompt: float, output: float) -> Draw:
    """One request in a thousand takes forty times as long as the mean one."""
    usual = lognormal(prompt, output, 0.4)
    return lambda source: (round(prompt), round(40 * output)) if source.random() < 0.001 else usual(source)


def mixes(prompt: float, output: float) -> dict[str, Draw]:
    return {
        "narrow": lognormal(prompt, output, 0.1),
        "lognormal": lognormal(prompt, output, 0.8),
        "two humps": two_humps(prompt, output),
        "one giant": with_giant(prompt, output),
        "long outputs": lognormal(prompt / 2, output * 2.5, 0.6),
    }


@dataclass(frozen=True)
class Compared:
    setting: str
    mix: str
    sample: int
    requests: int
    sample_s: float
    found: Forecast
    truth_s: float

    @property
    def error(self) -> float:
        return self.found.seconds.value / self.truth_s - 1

    @property
    def holds(self) -> bool:
        low, high = self.found.seconds.low, self.found.seconds.high
        return low is not None and high is not None and low <= self.truth_s <= high

    def told(self) -> dict[str, Any]:
        return {
            "setting": self.setting,
            "mix": self.mix,
            "sample_requests": self.sample,
            "job_requests": self.requests,
            "sample_s": self.sample_s,
            "forecast_s": self.found.seconds.value,
            "low_s": self.found.seconds.low,
            "high_s": self.found.seconds.high,
            "truth_s": self.truth_s,
            "error": self.error,
            "holds": self.holds,
            "method": self.found.method,
        }


def main() -> int:
    args = parse()
    folder: Path = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    compared: list[Compared] = []
    times: dict[str, Any] = {}
    for number, setting in enumerate(args.settings.split(",")):
        for one, runs in measured(args, setting, number):
            compared.append(one)
            times[f"{setting} {one.mix}"] = runs
            print(json.dumps(one.told()), file=sys.stderr, flush=True)
    errors = median(abs(one.error) for one in compared)
    held = sum(one.holds for one in compared) / len(compared)
    table = "\n".join([*head(args), *map(row, compared), "", *summary(errors, held, len(compared)), *ranking(compared)])
    document = {"jobs": [one.told() for one in compared], "argv": sys.argv, "times": times}
    save(folder, "whole_jobs", document, table)
    return 0 if errors <= args.most_error and held >= args.least_held else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--settings", default="TP=1", help="TP=2+DP=2,TP=4: separated by commas, sizes by +")
    parser.add_argument("--batch-size", type=int, default=8, help="requests at once on each replica")
    parser.add_argument("--sample", type=int, default=12, help="requests of a sample for each that runs at once")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--mean-prompt", type=float, default=40)
    parser.add_argument("--mean-output", type=float, default=12)
    parser.add_argument("--mixes", default="narrow,lognormal,two humps,one giant,long outputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("results/whole_jobs"))
    parser.add_argument("--most-error", type=float, default=0.05)
    parser.add_argument("--least-held", type=float, default=0.9)
    parser.add_argument("engine_flags", nargs="*", help="vLLM's engine flags, after --")
    return parser.parse_args()


# --- measuring ------------------------------------------------------------------------------------------------------


def measured(args: argparse.Namespace, setting: str, number: int) -> Iterator[tuple[Compared, dict[str, Any]]]:
    """Of each mix: a sample, then the whole job, all on one load."""
    jobs = [made(args, setting, mix, number) for mix in args.mixes.split(",")]
    longest = max(job.config.longest_request for job in jobs)
    config = replace(jobs[0].config, workload_longest=longest)
    devices = find_devices().slice_for(0, config.num_devices)
    replicas = LocalReplicas(config, devices)
    try:
        replicas.start()
        for mix, job in zip(args.mixes.split(","), jobs, strict=True):
            run_queue(replicas, job, args, job.sample_size(args.batch_size), "warmup")
            sample = run_queue(replicas, job, args, job.sample_size(args.batch_size), "sample")
            whole = run_queue(replicas, job, args, len(job), "job")
            found = forecast(replicas_of(sample, args.batch_size, None), lengths_of(job))
            ran = len(sample.requests.output_tokens)
            one = Compared(setting, mix, ran, len(job), sample.latency_s, found, whole.latency_s)
            yield one, {"sample": rows(sample), "job": rows(whole)}
    finally:
        replicas.close()


def made(args: argparse.Namespace, setting: str, mix: str, number: int) -> JobFile:
    sizes = dict(part.split("=") for part in setting.split("+"))
    flags = {"TP": "--tensor-parallel-size", "PP": "--pipeline-parallel-size", "DP": "--data-parallel-size"}
    count = args.sample * args.batch_size * int(sizes.get("DP", "1"))
    path = args.output_dir / f"{setting}_{mix.replace(' ', '_')}.jsonl"
    draw, source = mixes(args.mean_prompt, args.mean_output)[mix], random.Random(f"{args.seed}/{number}/{mix}")
    with path.open("w") as file:
        for _ in range(count * args.times):
            prompt, output = draw(source)
            file.write(json.dumps({"prompt_tokens": prompt, "output_tokens": output}) + "\n")
    words = ["--model", args.model, "--prompts-file", str(path), "--batch-sizes", str(args.batch_size)]
    words += ["--output-file", str(args.output_dir / f"{setting}_results.json"), "--sample", str(count)]
    words += [word for key, size in sizes.items() for word in (flags[key], size)]
    config, lengths = read_job(parse_flags([*words, *args.engine_flags])[0], print)
    return JobFile(config, lengths)


def run_queue(replicas: LocalReplicas, job: JobFile, args: argparse.Namespace, requests: int, phase: str) -> Run:
    whole = job if requests < len(job) else JobFile(replace(job.config, sample=None), job.lengths)
    shares = whole.shares_of(requests)
    replicas.prepare(Queue(shares, args.batch_size, [args.seed, phase]))
    nobody = monitor(find_devices()).read()
    return combine(replicas.run(), nobody, nobody, Seen())


def lengths_of(job: JobFile) -> JobLengths:
    return JobLengths(np.array(job.lengths.prompt_tokens), np.array(job.lengths.output_tokens))


def rows(run: Run) -> list[list[float]]:
    """Replica, prompt tokens, output tokens; scheduled, first token, last token in ms from the start."""
    requests = run.requests
    replica_of = [part.replica for part in run.replicas for _ in range(part.requests or 0)]
    stamps = zip(requests.arrival_s, requests.queue_s, requests.ttft_s, requests.latency_s, strict=True)
    return [
        [replica, prompt, output, *(round(1000 * (arrival_s + since_s), 1) for since_s in since)]
        for replica, prompt, output, (arrival_s, *since) in zip(
            replica_of, requests.prompt_tokens, requests.output_tokens, stamps, strict=True
        )
    ]


# --- the table ------------------------------------------------------------------------------------------------------


def head(args: argparse.Namespace) -> list[str]:
    return [
        f"{args.model}, {args.batch_size} requests at once on each replica; each job has {args.times} times the "
        "requests of its sample.",
        "",
        "| setting | mix | sample | job | sample s | forecast s | 95 % interval | truth s | error | held |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]


def row(one: Compared) -> str:
    low, high = one.found.seconds.low, one.found.seconds.high
    interval = "none" if low is None or high is None else f"{low:.2f} to {high:.2f}"
    return markdown_row([
        one.setting, one.mix, one.sample, one.requests, f"{one.sample_s:.2f}", f"{one.found.seconds.value:.2f}",
        interval, f"{one.truth_s:.2f}", f"{one.error:+.1%}", "yes" if one.holds else "no",
    ])  # fmt: skip


def summary(errors: float, held: float, count: int) -> list[str]:
    return [f"Median error {errors:.1%}; {held:.0%} of {count} intervals hold the truth.", ""]


def ranking(compared: Sequence[Compared]) -> list[str]:
    """Of each mix the settings by sample and by whole job, as far as intervals do not overlap. Jobs of other numbers of
    requests are told apart by requests per second."""
    lines = []
    for mix in dict.fromkeys(one.mix for one in compared):
        of_mix = [one for one in compared if one.mix == mix]
        if len(of_mix) < 2:
            continue
        pairs = [(one, two) for place, one in enumerate(of_mix) for two in of_mix[place + 1 :]]
        apart = [(one, two) for one, two in pairs if not overlap(one, two)]
        alike = [(one, two) for one, two in apart if (rate(one) > rate(two)) == (truth(one) > truth(two))]
        order = ", ".join(one.setting for one in sorted(of_mix, key=truth, reverse=True))
        lines.append(
            f"- {mix}: {len(alike)} of {len(apart)} pairs whose intervals do not overlap rank as the whole jobs do "
            f"({order})"
        )
    return lines


def rate(one: Compared) -> float:
    return one.requests / one.found.seconds.value


def truth(one: Compared) -> float:
    return one.requests / one.truth_s


def overlap(one: Compared, two: Compared) -> bool:
    ends = []
    for each in (one, two):
        low, high = each.found.seconds.low, each.found.seconds.high
        if low is None or high is None:
            return True
        ends.append((each.requests / high, each.requests / low))
    return ends[0][0] <= ends[1][1] and ends[1][0] <= ends[0][1]


if __name__ == "__main__":
    sys.exit(main())
