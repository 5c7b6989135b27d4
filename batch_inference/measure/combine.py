"""Combines what the replicas report about a run, and what the devices showed, into one Run of the result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from msgspec.structs import replace

from batch_inference.core.results import (
    Counters,
    Memory,
    ReplicaRun,
    Requests,
    Run,
    Warmup,
)
from batch_inference.measure.hardware import Reading, Seen, clocks_of, drawn_j
from batch_inference.measure.messages import Outcome

T = TypeVar("T")


def as_warmup(run: Run, reason: str | None = None) -> Warmup:
    return Warmup(run.latency_s, run.counters.jit_compilations or None, reason)


def combine(outcomes: list[Outcome], before: Reading, after: Reading, seen: Seen) -> Run:
    """One run from what each replica reports (the last end, the sum of tokens, every request) and from what the
    devices showed before, after and during it (`seen`)."""
    energy_j = drawn_j(before, after)
    return Run(
        latency_s=max(outcome.end_s for outcome in outcomes),
        prompt_tokens=sum(outcome.prompt_tokens for outcome in outcomes),
        output_tokens=sum(outcome.output_tokens for outcome in outcomes),
        replicas=[_replica_run(index, one) for index, one in enumerate(outcomes)],
        requests=_all_requests(outcomes),
        energy_j=energy_j,
        passed_s=max(_known(outcome.passed_s for outcome in outcomes), default=None),
        memory=Memory(
            scope=after.scope,
            used_gib=after.used_gib,
            peak_gib=seen.peak_gib,
            peak_kv_use=max(_known(outcome.peak_kv_use for outcome in outcomes), default=None),
        ),
        counters=_counters(outcomes),
        unknown={} if energy_j is not None else {"energy_j": "this machine has no energy counter for its devices"},
        clocks=clocks_of(after, seen),
    )


def _replica_run(index: int, outcome: Outcome) -> ReplicaRun:
    part = ReplicaRun(index, outcome.start_s, outcome.end_s, outcome.prompt_tokens, outcome.output_tokens)
    if outcome.timeline:
        part.requests = len(outcome.requests.output_tokens)
        part.timeline = replace(outcome.timeline, end_s=[outcome.start_s + end_s for end_s in outcome.timeline.end_s])
    return part


def _all_requests(outcomes: Sequence[Outcome]) -> Requests:
    of_replicas = [outcome.requests for outcome in outcomes]
    return Requests(
        arrival_s=[outcome.start_s + value for outcome in outcomes for value in outcome.requests.arrival_s],
        prompt_tokens=[value for requests in of_replicas for value in requests.prompt_tokens],
        ttft_s=[value for requests in of_replicas for value in requests.ttft_s],
        latency_s=[value for requests in of_replicas for value in requests.latency_s],
        queue_s=[value for requests in of_replicas for value in requests.queue_s],
        output_tokens=[value for requests in of_replicas for value in requests.output_tokens],
    )


def _counters(outcomes: Sequence[Outcome]) -> Counters:
    compilations = _known(outcome.jit_compilations for outcome in outcomes)
    miscounted = _known(outcome.miscounted for outcome in outcomes)
    return Counters(
        preemptions=sum(outcome.preemptions for outcome in outcomes),
        prefix_cache_hit_tokens=sum(outcome.prefix_cache_hit_tokens for outcome in outcomes),
        jit_compilations=sum(compilations) if compilations else None,
        miscounted=sum(miscounted) if miscounted else None,
        peak_running=min(_known(outcome.peak_running for outcome in outcomes), default=None),
        flops_per_device=max(_known(outcome.flops_per_device for outcome in outcomes), default=None),
        memory_bytes_per_device=max(_known(outcome.memory_bytes_per_device for outcome in outcomes), default=None),
    )


def _known(values: Iterable[T | None]) -> list[T]:
    return [value for value in values if value is not None]
