"""Runs whole jobs on this machine, each after a sample on the same engine load: what forecast.py compares."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from batch_inference.core.flags import parse_flags
from batch_inference.core.queue_points import replicas_of
from batch_inference.core.queue_runs import QueueRun, usual_scatter
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
    """One request in a thousand is forty times as long as the mean."""
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
class Measured:
    """A sample and the whole job, one run each."""

    setting: str
    mix: str
    job: JobFile
    sample: Run
    whole: Run
    batch_size: int

    @property
    def name(self) -> str:
        return f"{self.setting}, {self.mix}"

    def replicas(self, run: Run) -> list[QueueRun]:
        kind, stages = find_devices().kind, self.job.config.pipeline_parallel_size
        scatter = usual_scatter(kind, stages)
        return [replace(one, scatter=scatter) for one in replicas_of(run, self.batch_size, None)]


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model")
    parser.add_argument("--settings", default="TP=1", help="TP=2+DP=2,TP=4: separated by commas, sizes by + (TP=1)")
    parser.add_argument("--requests-at-once", type=int, default=8, help="requests at once on each replica (8)")
    parser.add_argument(
        "--sample", type=int, default=12, help="requests of a sample per request that runs at once (12)"
    )
    parser.add_argument("--times", type=int, default=10, help="requests of a job per request of its sample (10)")
    parser.add_argument("--mean-prompt", type=float, default=40)
    parser.add_argument("--mean-output", type=float, default=12)
    parser.add_argument("--mixes", default="narrow,lognormal,two humps,one giant,long outputs")
    parser.add_argument("--jobs-of-each", type=int, default=1, help="jobs of each mix, with different lengths (1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("results/forecast"))
    parser.add_argument("engine_flags", nargs="*", help="vLLM's engine flags, after --")


def measured(args: argparse.Namespace) -> Iterator[Measured]:
    """Setting by setting, each with one load."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for number, setting in enumerate(args.settings.split(",")):
        yield from of_setting(args, setting, number)


# --- measuring ------------------------------------------------------------------------------------------------------


def of_setting(args: argparse.Namespace, setting: str, number: int) -> Iterator[Measured]:
    """For each mix a warm-up, a sample, then the whole job."""
    names = [(mix, again) for again in range(args.jobs_of_each) for mix in args.mixes.split(",")]
    jobs = {
        f"{mix} {again + 1}" if again else mix: made(args, setting, mix, f"{number}/{again}") for mix, again in names
    }
    longest = max(job.config.longest_request for job in jobs.values())
    config = replace(next(iter(jobs.values())).config, workload_longest=longest)
    replicas = LocalReplicas(config, find_devices().slice_for(0, config.num_devices))
    try:
        replicas.start()
        for mix, job in jobs.items():
            few = job.sample_size(args.requests_at_once)
            _, sample, whole = (
                run_queue(replicas, job, args, requests, phase)
                for phase, requests in (("warmup", few), ("sample", few), ("job", len(job)))
            )
            yield Measured(setting, mix, job, sample, whole, args.requests_at_once)
    finally:
        replicas.close()


def sizes_of(setting: str) -> dict[str, str]:
    """TP=2+DP=2 -> {"TP": "2", "DP": "2"}"""
    return dict(part.split("=") for part in setting.split("+"))


def made(args: argparse.Namespace, setting: str, mix: str, number: str) -> JobFile:
    sizes = sizes_of(setting)
    flags = {"TP": "--tensor-parallel-size", "PP": "--pipeline-parallel-size", "DP": "--data-parallel-size"}
    count = args.sample * args.requests_at_once * int(sizes.get("DP", "1"))
    path = args.output_dir / f"{setting}_{mix}_{number}.jsonl".replace(" ", "_").replace("/", "_")
    draw, source = mixes(args.mean_prompt, args.mean_output)[mix], random.Random(f"{args.seed}/{number}/{mix}")
    with path.open("w") as file:
        for _ in range(count * args.times):
            prompt, output = draw(source)
            file.write(json.dumps({"prompt_tokens": prompt, "output_tokens": output}) + "\n")
    words = ["--model", args.model, "--prompts-file", str(path), "--batch-sizes", str(args.requests_at_once)]
    words += ["--output-file", str(args.output_dir / f"{setting}_results.json"), "--sample", str(count)]
    words += [word for key, size in sizes.items() for word in (flags[key], size)]
    config, lengths = read_job(parse_flags([*words, *args.engine_flags])[0], print)
    return JobFile(config, lengths)


def run_queue(replicas: LocalReplicas, job: JobFile, args: argparse.Namespace, requests: int, phase: str) -> Run:
    replicas.prepare(Queue(job.shares_of(requests), args.requests_at_once, [args.seed, phase]))
    nobody = monitor(find_devices()).read()
    return combine(replicas.run(), nobody, nobody, Seen())


def stamps(run: Run) -> list[list[float]]:
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
