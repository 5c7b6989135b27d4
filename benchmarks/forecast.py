#!/usr/bin/env python3
"""Whole jobs against what samples of them forecast.

    python benchmarks/forecast.py --recorded FOLDER

FOLDER holds recordings of one job, as JSON: job*.json of all of it, sample*.json of samples. Each has `wall`, the
seconds that it took, and `rows`, one for each request: prompt tokens, output tokens, and the moments at which it was
scheduled and had its first and last token, in seconds by one clock; of several replicas, `replicas` has a list of such
rows for each. From a sample alone, and the lengths of the job's requests in the order in which they ran, the job's
seconds are forecast, and compared to those that it took.

Exit code 1 where the median error is above 5 %, or less than 90 % of the intervals hold the truth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY)]

from batch_inference.core.forecast import JobLengths, forecast, too_small  # noqa: E402
from batch_inference.core.queue_runs import Interval, QueueRun  # noqa: E402

MOST_ERROR, LEAST_HELD = 0.05, 0.9


@dataclass(frozen=True)
class Recording:
    """One run of a queue, of a sample or of a whole job."""

    name: str
    runs: Sequence[QueueRun]  # one for each replica
    seconds: float

    @property
    def lengths(self) -> JobLengths:
        """Of all its requests, in the order in which they were scheduled."""
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

    @property
    def error(self) -> float:
        return self.forecast_s.value / self.true_s - 1

    @property
    def is_held(self) -> bool | None:
        """None where the forecast has no interval."""
        low, high = self.forecast_s.low, self.forecast_s.high
        return None if low is None or high is None else low <= self.true_s <= high


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--batch-size", type=int, default=256, help="where a recording has no `batch_size` (256)")
    parser.add_argument(
        "--max-num-batched-tokens", type=int, default=8192, help="where it has no `max_num_batched_tokens` (8192)"
    )
    flags = parser.parse_args()
    rows = list(recorded_rows(flags.recorded, flags.batch_size, flags.max_num_batched_tokens))
    if not rows:
        parser.error(f"--recorded {flags.recorded}: no job*.json with a sample*.json beside it that is large enough")
    print("\n".join(table(rows)))
    return 0 if is_good(rows) else 1


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
    return Row(sample.name, job.name, requests, found.seconds, job.seconds, found.method)


def median_error(rows: Sequence[Row]) -> float:
    return statistics.median(abs(row.error) for row in rows)


def share_held(rows: Sequence[Row]) -> float:
    """A forecast without interval holds nothing."""
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
