#!/usr/bin/env python3
"""Whole jobs compared with what samples of them forecast.

    python benchmarks/forecast.py --model models/tiny-llama --settings TP=1,TP=2,DP=2,PP=2 -- --load-format dummy
    python benchmarks/forecast.py --again results/forecast/forecast.json
    python benchmarks/forecast.py --recorded FOLDER

The first makes jobs with several mixes of lengths, runs a sample of each and then all of it on the same engine,
forecasts the job from the sample, and says how each ranks the settings; it writes the table, and every request's times
in milliseconds, to --output-dir. The second forecasts from these times again.

FOLDER holds recordings of one job as JSON: job*.json of all of it, sample*.json of samples. Each has `wall`, the
seconds that it took, and `rows`, one per request: prompt tokens, output tokens, and the moments at which it was
scheduled and had its first and last token, in seconds by one clock; for several replicas, `replicas` has a list of such
rows for each. From only a sample, and the lengths of the job's requests in the order in which they ran, the job's
seconds are forecast and compared with what it took.

Exit code 1 if the median error is above 5 %, or less than 90 % of the intervals hold the truth.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ways import save
from whole_jobs import add_flags, measured, sizes_of, stamps

from batch_inference.core.forecast import JobLengths, forecast, too_small
from batch_inference.core.queue_runs import Interval, QueueRun, usual_scatter
from batch_inference.plan.devices import find_devices

MOST_ERROR, LEAST_HELD = 0.05, 0.9


@dataclass(frozen=True)
class Recording:
    """One run of a queue: a sample or a whole job."""

    name: str
    runs: Sequence[QueueRun]  # one for each replica
    seconds: float

    @property
    def lengths(self) -> JobLengths:
        """The lengths of all its requests, in the order in which they were scheduled."""
        scheduled_s = np.concatenate([run.scheduled_s for run in self.runs])
        order = np.argsort(scheduled_s, kind="stable")
        prompts = np.concatenate([run.prompt_tokens for run in self.runs])
        outputs = np.concatenate([run.output_tokens for run in self.runs])
        return JobLengths(prompts[order], outputs[order])


@dataclass(frozen=True)
class Row:
    """A sample's forecast of a job."""

    sample: str
    job: str
    requests: int  # of the sample
    forecast_s: Interval
    true_s: float
    method: str
    job_requests: int = 0
    setting: str = ""
    mix: str = ""

    @property
    def rate(self) -> float:
        """Forecast requests per second."""
        return self.job_requests / self.forecast_s.value

    @property
    def true_rate(self) -> float:
        return self.job_requests / self.true_s

    @property
    def error(self) -> float:
        return self.forecast_s.value / self.true_s - 1

    @property
    def is_held(self) -> bool | None:
        """None if the forecast has no interval."""
        low, high = self.forecast_s.low, self.forecast_s.high
        return None if low is None or high is None else low <= self.true_s <= high


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", type=Path, metavar="FOLDER")
    parser.add_argument("--again", type=Path, metavar="FILE")
    parser.add_argument("--batch-size", type=int, default=256, help="for recordings without `batch_size` (256)")
    parser.add_argument(
        "--max-num-batched-tokens",
        type=int,
        default=8192,
        help="for recordings without `max_num_batched_tokens` (8192)",
    )
    add_flags(parser)
    flags = parser.parse_args()
    if sum(one is not None for one in (flags.recorded, flags.model, flags.again)) != 1:
        parser.error("one of --model MODEL, --recorded FOLDER and --again FILE is needed")
    if flags.again:
        return again(flags.again, parser)
    if flags.model:
        return whole_jobs(flags)
    rows = list(recorded_rows(flags.recorded, flags.batch_size, flags.max_num_batched_tokens))
    if not rows:
        parser.error(f"--recorded {flags.recorded}: no job*.json with a sample*.json beside it that is large enough")
    print("\n".join(table(rows)))
    return 0 if is_good(rows) else 1


def whole_jobs(flags: argparse.Namespace) -> int:
    rows, times = [], {}
    for one in measured(flags):
        row = compare(
            Recording(one.name, one.replicas(one.sample), one.sample.latency_s),
            Recording(one.name, one.replicas(one.whole), one.whole.latency_s),
        )
        # Not in the order in which it ran, but in that of the file.
        lengths = JobLengths(np.array(one.job.lengths.prompt_tokens), np.array(one.job.lengths.output_tokens))
        found = forecast(one.replicas(one.sample), lengths, len(one.sample.replicas))
        row = replace(row, job=f"{len(one.job)} requests", forecast_s=found.seconds, setting=one.setting, mix=one.mix)
        rows.append(row)
        times[one.name] = {"sample": stamps(one.sample), "job": stamps(one.whole)}
        print(table([row])[2], file=sys.stderr, flush=True)
    return told(rows, flags, {"argv": sys.argv, "times": times})


def again(path: Path, parser: argparse.ArgumentParser) -> int:
    """From the times that an earlier run wrote."""
    document = json.loads(path.read_text())
    flags = parser.parse_args(document["argv"][1:])
    flags.output_dir = path.parent
    rows = []
    for before in document["jobs"]:
        name = before["sample"]
        seconds = {"sample": 0.0, "job": before["true_s"]}  # how long a sample took is in its times
        sample, job = (
            Recording(name, stamped(document["times"][name][part], flags.requests_at_once, before["setting"]), took_s)
            for part, took_s in seconds.items()
        )
        row = compare(sample, job)
        rows.append(replace(row, job=before["job"], setting=before["setting"], mix=before["mix"]))
    return told(rows, flags, document)


def stamped(lines: Sequence[Sequence[float]], at_once: int, setting: str) -> list[QueueRun]:
    """Reads what `stamps` wrote on a machine like this one."""
    scatter = usual_scatter(find_devices().kind, int(sizes_of(setting).get("PP", "1")))
    columns = np.array(lines)
    replicas = (columns[columns[:, 0] == replica] for replica in np.unique(columns[:, 0]))
    return [
        QueueRun(*one[:, 1:3].astype(np.int64).T, *(one[:, 3:] / 1000).T, at_once, None, scatter) for one in replicas
    ]


def told(rows: Sequence[Row], flags: argparse.Namespace, document: dict[str, Any]) -> int:
    jobs = [asdict(row) | {"error": row.error, "is_held": row.is_held} for row in rows]
    text = "\n".join([f"{flags.model}, {flags.requests_at_once} requests at once on each replica.", "",
                      *table(rows), "", *ranking(rows)])  # fmt: skip
    save(flags.output_dir, "forecast", {**document, "jobs": jobs}, text)
    return 0 if is_good(rows) else 1


def ranking(rows: Sequence[Row]) -> list[str]:
    """For each mix, the settings ranked by forecast and by whole job, where intervals do not overlap."""
    lines = []
    for mix in dict.fromkeys(row.mix for row in rows):
        pairs = list(itertools.combinations([row for row in rows if row.mix == mix], 2))
        apart = [(one, two) for one, two in pairs if are_apart(one, two)]
        alike = [1 for one, two in apart if (one.rate > two.rate) == (one.true_rate > two.true_rate)]
        if apart:
            lines.append(f"- {mix}: of {len(apart)} pairs of settings whose intervals do not overlap, {len(alike)} "
                         "rank as their whole jobs do.")  # fmt: skip
    return lines


def are_apart(one: Row, two: Row) -> bool:
    """By requests per second, because with replicas a job has more of them."""
    ends = []
    for row in (one, two):
        low, high = row.forecast_s.low, row.forecast_s.high
        if low is None or high is None:
            return False
        ends.append((row.job_requests / high, row.job_requests / low))
    return ends[0][0] > ends[1][1] or ends[1][0] > ends[0][1]


def recorded_rows(folder: Path, batch_size: int, budget: int) -> Iterable[Row]:
    samples = [recorded(path, batch_size, budget) for path in sorted(folder.glob("sample*.json"))]
    for path in sorted(folder.glob("job*.json")):
        job = recorded(path, batch_size, budget)
        for sample in samples:
            if why := too_small(sample.runs):
                print(f"{sample.name}: left out, {why}", file=sys.stderr)
            else:
                yield compare(sample, job)


def recorded(path: Path, batch_size: int, budget: int) -> Recording:
    document = json.loads(path.read_text())
    replicas = document.get("replicas") or [document["rows"]]
    start_s = min(row[2] for rows in replicas for row in rows)
    batch_size = document.get("batch_size", batch_size)
    budget = document.get("max_num_batched_tokens", budget)
    runs = [_queue_run(rows, start_s, batch_size, budget) for rows in replicas]
    return Recording(path.stem, runs, float(document["wall"]))


def _queue_run(rows: Any, start_s: float, batch_size: int, budget: int) -> QueueRun:
    lengths = np.array([row[:2] for row in rows], dtype=np.int64)
    moments_s = np.array([row[2:5] for row in rows], dtype=float) - start_s
    return QueueRun(*lengths.T, *moments_s.T, batch_size, budget)


def compare(sample: Recording, job: Recording) -> Row:
    """The job's seconds from the sample's run and the job's lengths."""
    found = forecast(sample.runs, job.lengths, len(job.runs))
    requests = sum(len(run.prompt_tokens) for run in sample.runs)
    asked = sum(len(run.prompt_tokens) for run in job.runs)
    return Row(sample.name, job.name, requests, found.seconds, job.seconds, found.method, asked)


def median_error(rows: Sequence[Row]) -> float:
    return statistics.median(abs(row.error) for row in rows)


def share_held(rows: Sequence[Row]) -> float:
    """A forecast without an interval holds nothing."""
    return sum(row.is_held is True for row in rows) / len(rows)


def is_good(rows: Sequence[Row]) -> bool:
    return median_error(rows) <= MOST_ERROR and share_held(rows) >= LEAST_HELD


def table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| sample | requests | job | forecast s | 95 % interval | took s | error | held | method |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row.forecast_s.low, row.forecast_s.high
        interval = "none" if low is None or high is None else f"{low:.1f} to {high:.1f}"
        held = {True: "yes", False: "no", None: "none"}[row.is_held]
        lines.append(
            f"| {row.sample} | {row.requests:,} | {row.job} | {row.forecast_s.value:.1f} | {interval} |"
            f" {row.true_s:.1f} | {row.error:+.1%} | {held} | {row.method} |"
        )
    held = f"{share_held(rows):.0%} of {len(rows)} intervals hold the truth"
    return [*lines, "", f"Median error {median_error(rows):.1%}; {held}."]


if __name__ == "__main__":
    sys.exit(main())
