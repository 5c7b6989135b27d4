"""The queue points of a result file, as far as answers for a job need them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from batch_inference.core.config import Shape
from batch_inference.core.metrics import Summary
from batch_inference.core.queue_points import runs_of
from batch_inference.core.queue_runs import LIVES, Interval, Phases, QueueRun, phases_of
from batch_inference.core.results import Job, Point, Result, Timeline, WorkloadKey

PLATEAU = "plateau_output_tok_per_s"


def is_told(rate: Interval) -> bool:
    """An interval as wide as its value says nothing."""
    return rate.high is None or rate.high < 2 * rate.value


@dataclass(frozen=True)
class QueuePoint:
    """One that was measured."""

    batch_size: int
    tokens_per_step: int | None  # where it is an axis of the sweep
    workload: WorkloadKey
    max_tokens: int | None  # where the model itself ends
    job: Job
    verdict: str
    replicas: int
    runs: list[QueueRun]  # of all replicas and runs
    requests: int  # of the sample
    latencies_s: list[float]  # of the runs
    summary: dict[str, float | None]
    power_w: float | None  # of all devices, on the mean of the runs
    timelines: list[Timeline]  # of the last run, by replica
    phases: list[Phases]

    @property
    def is_whole_job(self) -> bool:
        return self.requests >= self.job.requests

    @property
    def shape(self) -> Shape:
        return self.batch_size, None, self.max_tokens, self.workload.as_tuple(), self.tokens_per_step

    @property
    def plateau(self) -> Interval | None:
        """Output tok/s of the plateau; None where the sample is too short to tell it."""
        rate, half = (self.summary.get(name) for name in (PLATEAU, "plateau_ci95_tok_per_s"))
        if rate is None:
            return None
        found = Interval(rate) if half is None else Interval(rate, rate - half, rate + half)
        return found if is_told(found) else None

    @property
    def requests_of_a_plateau(self) -> int:
        """That a sample takes to tell it."""
        return LIVES * self.batch_size * self.replicas


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
    latencies_s = [run.latency_s for run in point.runs]
    timelines = [part.timeline for part in point.runs[-1].replicas if part.timeline]
    return QueuePoint(
        batch_size=point.batch_size,
        tokens_per_step=point.max_num_batched_tokens,
        workload=point.workload,
        max_tokens=point.max_tokens,
        job=job,
        verdict=str(point.verdict),
        replicas=result.data_parallel_size,
        runs=[replica for run in runs for replica in run],
        requests=len(point.runs[-1].requests.output_tokens),
        latencies_s=latencies_s,
        summary=summary,
        power_w=fmean(energies) / fmean(latencies_s) if len(energies) == len(point.runs) else None,
        timelines=timelines,
        phases=[phases_of(replica) for replica in runs[-1]],
    )


def phases(point: QueuePoint) -> list[tuple[float, float]]:
    """Ramp, plateau and drain of all replicas together: a plateau is where each has one."""
    end_s = max(one.end_s for one in point.phases)
    drain_s = min(one.drain_start_s for one in point.phases)
    ramp_s = min(max(one.ramp_end_s for one in point.phases), drain_s)
    return [(0.0, ramp_s), (ramp_s, drain_s), (drain_s, end_s)]
