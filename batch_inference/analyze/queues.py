"""The queue points of a result file, as far as answers for a job need them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from batch_inference.core.metrics import Summary
from batch_inference.core.queue_points import runs_of
from batch_inference.core.queue_runs import Phases, QueueRun, phases_of
from batch_inference.core.results import Job, Point, Result, Timeline, WorkloadKey


@dataclass(frozen=True)
class QueuePoint:
    """One that was measured."""

    batch_size: int
    tokens_per_step: int | None  # where it is an axis of the sweep
    workload: WorkloadKey
    job: Job
    verdict: str
    replicas: int
    runs: list[QueueRun]  # of all replicas and runs
    requests: int  # of the sample
    latency_s: float
    summary: dict[str, float | None]
    power_w: float | None  # of all devices, on the mean of the runs
    timelines: list[Timeline]  # of the last run, by replica
    phases: list[Phases]

    @property
    def is_whole_job(self) -> bool:
        return self.requests >= self.job.requests


def queue_points(result: Result, summaries: Sequence[Summary]) -> Iterator[QueuePoint]:
    """Those that are no reason for doubt but invalid ones, and whose job the file holds."""
    for point, summary in zip(result.points, summaries, strict=True):
        if point.workload is None or point.status != "ok" or point.verdict == "invalid":
            continue
        job = result.job_of(point.workload)
        if job and all(run.requests.arrival_s for run in point.runs):
            yield _queue_point(result, point, job, summary)


def _queue_point(result: Result, point: Point, job: Job, summary: Summary) -> QueuePoint:
    assert point.workload is not None
    runs = runs_of(result, point)
    energies = [run.energy_j for run in point.runs if run.energy_j is not None]
    latency_s = fmean(run.latency_s for run in point.runs)
    timelines = [part.timeline for part in point.runs[-1].replicas if part.timeline]
    return QueuePoint(
        batch_size=point.batch_size,
        tokens_per_step=point.max_num_batched_tokens,
        workload=point.workload,
        job=job,
        verdict=str(point.verdict),
        replicas=result.data_parallel_size,
        runs=[replica for run in runs for replica in run],
        requests=len(point.runs[-1].requests.output_tokens),
        latency_s=latency_s,
        summary=summary,
        power_w=fmean(energies) / latency_s if len(energies) == len(point.runs) else None,
        timelines=timelines,
        phases=[phases_of(replica) for replica in runs[-1]],
    )
