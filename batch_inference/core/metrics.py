"""Every derived number, defined once: name with unit, label, formula, and which direction is better.

The console, the JSON summary, the CSV, the plots and the report all take their numbers from METRICS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from batch_inference.core.capacity import padded_batch_size, running_requests, waves
from batch_inference.core.results import EngineInfo, Peaks, Point, Result, Run
from batch_inference.core.sharing import imbalance
from batch_inference.core.statistics import STOPPED_BY_ITSELF, ci95_half_width, mean, percentile_of_sorted

if TYPE_CHECKING:
    from batch_inference.core.queue_points import Plateau, QueueSummary

Better = Literal["higher", "lower"]
Summary = dict[str, float | None]  # the value of every metric by name


class Measured:
    """A point that has runs, and its result. Its durations are collected and sorted once for the
    mean and all percentiles."""

    def __init__(self, result: Result, point: Point) -> None:
        self.result = result
        self.point = point
        self.engine = result.engine_of(point)
        runs = point.runs
        latencies_s = run_latencies_s(point)
        self.total_latency_s = sum(latencies_s)
        self.latencies_s = sorted(latencies_s)
        self.ttfts_s = sorted(ttfts_s(point))
        self.tpots_s = sorted(tpots_s(point))
        self.request_latencies_s = sorted(value for run in runs for value in run.requests.latency_s)
        self.queue_waits_s = sorted(value for run in runs for value in run.requests.queue_s)
        self.running_requests = running_requests(result, point)

    @cached_property
    def queue(self) -> QueueSummary | None:
        """None for a batch point, or if the times of its requests are missing."""
        if self.point.workload is None or not all(run.requests.arrival_s for run in self.point.runs):
            return None
        # Needs numpy, and is slow to import.
        from batch_inference.core.queue_points import runs_of, summary_of

        return summary_of(runs_of(self.result, self.point))

    @property
    def plateau_interval_by(self) -> str | None:
        """The method behind the interval of its plateau; None if it has none."""
        plateau = self.queue.plateau if self.queue else None
        return None if plateau is None or _plateau_ci95(plateau) is None else plateau.method


Formula = Callable[[Measured], float | None]


@dataclass(frozen=True)
class Metric:
    """One derived number of a point: `formula` returns None if it cannot be known."""

    name: str
    unit: str
    label: str
    better: Better | None  # None: neither direction is better
    formula: Formula
    definition: str  # the formula in words, for docs/metrics.md


def summarise(result: Result, point: Point) -> Summary:
    """Every metric of a point; all None for a failed point, even if some of its runs exist."""
    return summary_and_method(result, point)[0]


def summary_and_method(result: Result, point: Point) -> tuple[Summary, str | None]:
    """The summary, and the method behind the interval of the plateau."""
    if point.status != "ok" or not point.runs:
        return dict.fromkeys(metric.name for metric in METRICS), None
    measured = Measured(result, point)
    return {metric.name: metric.formula(measured) for metric in METRICS}, measured.plateau_interval_by


def run_latencies_s(point: Point) -> list[float]:
    return [run.latency_s for run in point.runs]


def ttfts_s(point: Point) -> list[float]:
    return [value for run in point.runs for value in run.requests.ttft_s]


def tpots_s(point: Point) -> list[float]:
    """Seconds per output token after the first, one per request; none for requests of a single token."""
    return [
        (latency - ttft) / (tokens - 1)
        for run in point.runs
        for latency, ttft, tokens in zip(
            run.requests.latency_s, run.requests.ttft_s, run.requests.output_tokens, strict=True
        )
        if tokens > 1
    ]


def _output_tok_per_s(measured: Measured) -> float:
    return sum(run.output_tokens for run in measured.point.runs) / measured.total_latency_s


def _prompt_tok_per_s(measured: Measured) -> float:
    return sum(run.prompt_tokens for run in measured.point.runs) / measured.total_latency_s


def _total_tok_per_s(measured: Measured) -> float:
    return _output_tok_per_s(measured) + _prompt_tok_per_s(measured)


def _requests_per_s(measured: Measured) -> float:
    return sum(len(run.requests.output_tokens) for run in measured.point.runs) / measured.total_latency_s


def _output_tok_per_s_per_device(measured: Measured) -> float:
    return _output_tok_per_s(measured) / measured.result.num_devices


def _energy_j_per_output_token(measured: Measured) -> float | None:
    runs = measured.point.runs
    joules = [run.energy_j for run in runs if run.energy_j is not None]
    if len(joules) != len(runs):
        return None
    tokens = sum(run.output_tokens for run in runs)
    return sum(joules) / tokens if tokens else None


def _highest(values: Callable[[Run], list[float] | None]) -> Formula:
    """The highest over runs, and over the devices or replicas of each."""
    return lambda measured: max((value for run in measured.point.runs for value in values(run) or []), default=None)


def _of_engine(number: Callable[[EngineInfo], float | None]) -> Formula:
    return lambda measured: None if measured.engine is None else number(measured.engine)


def _kv_use(measured: Measured) -> float | None:
    point, tokens = measured.point, measured.point.tokens_per_request
    capacity = measured.engine.kv_cache_tokens if measured.engine else None
    return point.batch_size * tokens / capacity if tokens and capacity else None


def _kv_peak_use(measured: Measured) -> float | None:
    shares = [run.memory.peak_kv_use for run in measured.point.runs]
    return max((share for share in shares if share is not None), default=None)


def _share_of_peak(work: Callable[[Run], float | None], peak: Callable[[Peaks], float]) -> Formula:
    """vLLM's estimate of what one device did in the runs, divided by the most it could have done in that time."""

    def share(measured: Measured) -> float | None:
        peaks = measured.result.environment.peaks
        # For some architectures and quantizations vLLM estimates none of the work, or only part of it.
        done = [count for run in measured.point.runs if (count := work(run))]
        if peaks is None or len(done) < len(measured.point.runs):
            return None
        return sum(done) / (measured.total_latency_s * peak(peaks))

    return share


_share_of_arithmetic = _share_of_peak(lambda run: run.counters.flops_per_device, lambda peaks: peaks.flops_per_s)
_share_of_bandwidth = _share_of_peak(lambda run: run.counters.memory_bytes_per_device, lambda peaks: peaks.bytes_per_s)


def _mfu(measured: Measured) -> float | None:
    # The peak is for 16 bits; fewer bits have a higher one.
    is_quantized = measured.engine is not None and measured.engine.quantization
    return None if is_quantized else _share_of_arithmetic(measured)


def _idle_power_w(measured: Measured) -> float | None:
    watts = [device.idle_power_w for device in measured.result.environment.devices]
    known = [value for value in watts if value is not None]
    return sum(known) if known and len(known) == len(watts) else None


def _sm_mhz(measured: Measured) -> float | None:
    values = [value for run in measured.point.runs for value in run.clocks.sm_mhz or []]
    return mean([value for value in values if value is not None])


def _preemptions(measured: Measured) -> float:
    return sum(run.counters.preemptions for run in measured.point.runs)


def _mean_of(values: Callable[[Measured], list[float]]) -> Formula:
    return lambda measured: mean(values(measured))


def _percentile_of(values: Callable[[Measured], list[float]], percent: int) -> Formula:
    return lambda measured: percentile_of_sorted(values(measured), percent)


def _distribution(
    prefix: str, label: str, values: Callable[[Measured], list[float]], definition: str
) -> tuple[Metric, ...]:
    """Mean, median, p90 and p99 of one kind of duration."""
    mean_metric = Metric(f"{prefix}_mean_s", "s", f"{label}, mean", "lower", _mean_of(values), f"mean {definition}")
    return (
        mean_metric,
        *(
            Metric(
                f"{prefix}_p{percent}_s",
                "s",
                f"{label}, p{percent}",
                "lower",
                _percentile_of(values, percent),
                f"percentile {percent} of the {definition}",
            )
            for percent in (50, 90, 99)
        ),
    )


def _of_plateau(number: Callable[[Plateau], float | None]) -> Formula:
    def value(measured: Measured) -> float | None:
        return number(measured.queue.plateau) if measured.queue and measured.queue.plateau else None

    return value


def _plateau_ci95(plateau: Plateau) -> float | None:
    rate = plateau.output_tok_per_s
    return None if rate.high is None else rate.high - rate.value


def _of_queue(number: Callable[[QueueSummary], float]) -> Formula:
    return lambda measured: number(measured.queue) if measured.queue else None


def _imbalance(measured: Measured) -> float | None:
    """Replicas of a batch point all have the same work."""
    if measured.point.workload is None:
        return None
    return max(imbalance([part.prompt_tokens + part.output_tokens for part in run.replicas])
               for run in measured.point.runs)  # fmt: skip


def _prefix_hit_share(measured: Measured) -> float | None:
    runs = measured.point.runs
    prompts = sum(run.prompt_tokens for run in runs)
    return sum(run.counters.prefix_cache_hit_tokens for run in runs) / prompts if prompts else None


METRICS: tuple[Metric, ...] = (
    Metric("output_tok_per_s", "tok/s", "Output throughput", "higher", _output_tok_per_s,
           "output tokens of all replicas and runs / sum of the runs' latencies"),
    Metric("prompt_tok_per_s", "tok/s", "Prompt throughput", "higher", _prompt_tok_per_s,
           "prompt tokens of all replicas and runs / sum of the runs' latencies"),
    Metric("total_tok_per_s", "tok/s", "Total throughput", "higher", _total_tok_per_s,
           "output_tok_per_s + prompt_tok_per_s"),
    Metric("requests_per_s", "req/s", "Requests per second", "higher", _requests_per_s,
           "requests of all replicas and runs / sum of the runs' latencies"),
    Metric("output_tok_per_s_per_device", "tok/s/device", "Output throughput per device", "higher",
           _output_tok_per_s_per_device, "output_tok_per_s / (TP x PP x DP)"),
    *_distribution("latency", "Batch latency", lambda measured: measured.latencies_s,
                   "time from the common start to the last replica's end, over the runs"),
    Metric("latency_ci95_s", "s", "Batch latency, 95 % CI (±)", None,
           lambda measured: ci95_half_width(measured.latencies_s, measured.result.is_adaptive(measured.point)),
           f"Student's t x standard deviation / sqrt(runs), {STOPPED_BY_ITSELF} times that if their number was not "
           "fixed in advance; unknown for one run"),
    Metric("runs", "count", "Timed runs", None, lambda measured: len(measured.point.runs),
           "timed runs of the point, without warm-ups"),
    *_distribution("ttft", "Time to first token (TTFT)", lambda measured: measured.ttfts_s,
                   "time from a request's arrival to its first token, queue wait included, over all requests"),
    *_distribution("tpot", "Time per output token (TPOT)", lambda measured: measured.tpots_s,
                   "time per token after the first, (request latency - TTFT) / (output tokens - 1), over all requests"),
    *_distribution("request_latency", "Request latency", lambda measured: measured.request_latencies_s,
                   "time from a request's arrival to its last token (end to end), over all requests"),
    *_distribution("queue", "Queue wait", lambda measured: measured.queue_waits_s,
                   "time from a request's arrival to its being scheduled, over all requests"),
    Metric("memory_used_gib", "GiB", "Memory used", "lower", _highest(lambda run: run.memory.used_gib),
           "highest use seen after a run: per device by NVML; on a CPU, resident memory of the replica's processes"),
    Metric("memory_peak_gib", "GiB", "Memory used, peak", "lower", _highest(lambda run: run.memory.peak_gib),
           "highest use seen during a run, per device by NVML, ten times a second"),
    Metric("weights_gib", "GiB", "Weights per device", None, _of_engine(lambda engine: engine.weights_gib),
           "bytes of the model's parameters on the fullest device"),
    Metric("kv_pool_gib", "GiB", "KV cache pool per device", None, _of_engine(lambda engine: engine.kv_pool_gib),
           "bytes that vLLM reserved for the KV cache on the fullest device"),
    Metric("activations_gib", "GiB", "Activations, peak", None, _of_engine(lambda engine: engine.activations_gib),
           "peak of activations when vLLM profiled the model, on the fullest device"),
    Metric("kv_cache_tokens", "tokens", "KV cache capacity", "higher",
           _of_engine(lambda engine: engine.kv_cache_tokens),
           "tokens that the KV cache of one replica holds"),
    Metric("kv_use", "ratio", "KV cache use", None, _kv_use,
           "batch_size x (seq_len + max_tokens) / kv_cache_tokens: what the whole batch needs; above 1 it cannot fit"),
    Metric("kv_peak_use", "ratio", "KV cache use, peak", None, _kv_peak_use,
           "share of the KV cache in use at the fullest moment, as vLLM's scheduler counts after each step"),
    Metric("running_requests", "count", "Requests at once", None,
           lambda measured: measured.running_requests,
           "most requests of a replica that ran at once: counted, or the smallest of batch_size, max_num_seqs and the "
           "whole requests that fit in the KV cache"),
    Metric("waves", "count", "Waves", "lower", lambda measured: waves(measured.point, measured.running_requests),
           "batch_size / running_requests, rounded up"),
    Metric("padded_batch_size", "count", "Padded batch", None,
           lambda measured: padded_batch_size(measured.result, measured.point, measured.running_requests),
           "smallest captured graph that holds running_requests; unknown without graphs or with PP"),
    Metric("preemptions", "count", "Preemptions", "lower", _preemptions, "requests preempted, over all runs"),
    Metric("energy_j_per_output_token", "J/token", "Energy per output token", "lower", _energy_j_per_output_token,
           "NVML energy of the setting's devices during the runs / output tokens"),
    Metric("idle_power_w", "W", "Idle power", None, _idle_power_w,
           "NVML power draw of this setting's devices before the engine loaded"),
    Metric("sm_mhz", "MHz", "SM clock", None, _sm_mhz, "mean SM clock during the runs, over the devices"),
    Metric("mfu", "ratio", "MFU", "higher", _mfu,
           "vLLM's estimate of the floating-point operations of a device / (latency x its peak, stated in the file)"),
    Metric("mbu", "ratio", "MBU", "higher", _share_of_bandwidth,
           "vLLM's estimate of the bytes that a device moved / (latency x its peak bandwidth, stated in the file)"),
    Metric("plateau_output_tok_per_s", "tok/s", "Output throughput, plateau", "higher",
           _of_plateau(lambda plateau: plateau.output_tok_per_s.value),
           "for a queue point: output tokens per second of all replicas, while batch_size requests run on each"),
    Metric("plateau_ci95_tok_per_s", "tok/s", "Output throughput, plateau, 95 % CI (±)", None,
           _of_plateau(_plateau_ci95),
           "by batch means if the plateau lasts ten mean request times, otherwise by costs per step fitted to the run"),
    Metric("plateau_prompt_tok_per_s", "tok/s", "Prompt throughput, plateau", "higher",
           _of_plateau(lambda plateau: plateau.prompt_tok_per_s), "the same for prompt tokens"),
    Metric("plateau_requests_per_s", "req/s", "Requests per second, plateau", "higher",
           _of_plateau(lambda plateau: plateau.requests_per_s), "the same for requests"),
    Metric("ramp_s", "s", "Ramp", None, _of_queue(lambda queue: queue.ramp_s),
           "for a queue point: from the start until batch_size requests run, on the replica that takes longest"),
    Metric("drain_s", "s", "Drain", "lower", _of_queue(lambda queue: queue.drain_s),
           "for a queue point: from when the last request is scheduled to the end, on the replica that takes longest"),
    Metric("imbalance", "ratio", "Imbalance of replicas", "lower", _imbalance,
           "for a queue point: tokens of the replica with the most / mean tokens of the replicas - 1"),
    Metric("prefix_hit_share", "ratio", "Prompt tokens from the prefix cache", None, _prefix_hit_share,
           "prompt tokens not computed because they were in a cached prefix / prompt tokens"),
    Metric("load_s", "s", "Engine start", "lower", _of_engine(lambda engine: engine.load_s.total_s),
           "from the worker's start to the engine being ready"),
)  # fmt: skip

METRIC_BY_NAME = {metric.name: metric for metric in METRICS}


def markdown_table() -> str:
    """The table of docs/metrics.md."""
    rows = [f"| `{metric.name}` | {metric.unit} | {metric.better or ''} | {metric.definition} |" for metric in METRICS]
    return "\n".join(["| metric | unit | better | definition |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    print(markdown_table())
