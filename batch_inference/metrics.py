"""Every derived number once: name with unit, label, formula, and which direction is better.

The console, the JSON summary, the CSV, the plots and the report all take their numbers from METRICS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from batch_inference.capacity import padded_batch_size, running_requests, waves
from batch_inference.results import Point, Result
from batch_inference.statistics import ci95_half_width, mean, percentile

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Metric:
    """One derived number of a point: `formula(result, point)` is None where it cannot be known."""

    name: str
    unit: str
    label: str
    better: Better | None  # None: neither direction is better
    formula: Callable[[Result, Point], float | None]
    definition: str  # the formula in words, for the README


def summarise(result: Result, point: Point) -> dict[str, float | None]:
    """Every metric of a point; all None for one that failed, though some of its runs may be there."""
    measured = point.status == "ok" and bool(point.runs)
    return {metric.name: metric.formula(result, point) if measured else None for metric in METRICS}


def run_latencies_s(point: Point) -> list[float]:
    return [run.latency_s for run in point.runs]


def ttfts_s(point: Point) -> list[float]:
    return [value for run in point.runs for value in run.requests.ttft_s]


def request_latencies_s(point: Point) -> list[float]:
    return [value for run in point.runs for value in run.requests.latency_s]


def queue_waits_s(point: Point) -> list[float]:
    return [value for run in point.runs for value in run.requests.queue_s]


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


def _total_latency_s(point: Point) -> float:
    return sum(run_latencies_s(point))


def _output_tok_per_s(_: Result, point: Point) -> float:
    return sum(run.output_tokens for run in point.runs) / _total_latency_s(point)


def _prompt_tok_per_s(_: Result, point: Point) -> float:
    return sum(run.prompt_tokens for run in point.runs) / _total_latency_s(point)


def _total_tok_per_s(result: Result, point: Point) -> float:
    return _output_tok_per_s(result, point) + _prompt_tok_per_s(result, point)


def _requests_per_s(result: Result, point: Point) -> float:
    return point.batch_size * result.data_parallel_size * len(point.runs) / _total_latency_s(point)


def _output_tok_per_s_per_device(result: Result, point: Point) -> float:
    return _output_tok_per_s(result, point) / result.num_devices


def _energy_j_per_output_token(_: Result, point: Point) -> float | None:
    joules = [run.energy_j for run in point.runs if run.energy_j is not None]
    if len(joules) != len(point.runs):
        return None
    tokens = sum(run.output_tokens for run in point.runs)
    return sum(joules) / tokens if tokens else None


def _memory_used_gib(_: Result, point: Point) -> float | None:
    return max((value for run in point.runs for value in run.memory.get("used_gib") or []), default=None)


def _engine_number(key: str) -> Callable[[Result, Point], float | None]:
    return lambda result, point: result.engine_of(point).get(key)


def _load_s(result: Result, point: Point) -> float | None:
    total: float | None = (result.engine_of(point).get("load_s") or {}).get("total_s")
    return total


def _kv_use(result: Result, point: Point) -> float | None:
    capacity = result.engine_of(point).get("kv_cache_tokens")
    return point.batch_size * (point.seq_len + point.max_tokens) / capacity if capacity else None


def _kv_peak_use(_: Result, point: Point) -> float | None:
    return max((run.memory["peak_kv_use"] for run in point.runs if "peak_kv_use" in run.memory), default=None)


def _share_of_peak(counter: str, peak: str) -> Callable[[Result, Point], float | None]:
    """What vLLM estimates that one device did in the runs, over what it could have done in that time."""

    def share(result: Result, point: Point) -> float | None:
        peaks = result.environment.get("peaks") or {}
        done = [run.counters.get(counter, 0) for run in point.runs]
        # vLLM knows no estimate for some architectures, and then counts nothing.
        if not peaks.get(peak) or 0 in done:
            return None
        return sum(done) / (_total_latency_s(point) * float(peaks[peak]))

    return share


def _memory_peak_gib(_: Result, point: Point) -> float | None:
    return max((value for run in point.runs for value in run.memory.get("peak_gib") or []), default=None)


def _idle_power_w(result: Result, _: Point) -> float | None:
    watts = [device.get("idle_power_w") for device in result.devices]
    known = [float(value) for value in watts if value is not None]
    return sum(known) if known and len(known) == len(watts) else None


def _sm_mhz(_: Result, point: Point) -> float | None:
    return mean([value for run in point.runs for value in run.clocks.get("sm_mhz") or [] if value is not None])


def _num_runs(_: Result, point: Point) -> float:
    return len(point.runs)


def _preemptions(_: Result, point: Point) -> float:
    return sum(run.counters["preemptions"] for run in point.runs)


def _mean_of(values: Callable[[Point], list[float]]) -> Callable[[Result, Point], float | None]:
    return lambda _, point: mean(values(point))


def _percentile_of(values: Callable[[Point], list[float]], percent: int) -> Callable[[Result, Point], float | None]:
    return lambda _, point: percentile(values(point), percent)


def _distribution(
    prefix: str, label: str, values: Callable[[Point], list[float]], definition: str
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


METRICS: tuple[Metric, ...] = (
    Metric("output_tok_per_s", "tok/s", "Output throughput", "higher", _output_tok_per_s,
           "output tokens of all replicas and runs / sum of the runs' latencies"),
    Metric("prompt_tok_per_s", "tok/s", "Prompt throughput", "higher", _prompt_tok_per_s,
           "prompt tokens of all replicas and runs / sum of the runs' latencies"),
    Metric("total_tok_per_s", "tok/s", "Total throughput", "higher", _total_tok_per_s,
           "output_tok_per_s + prompt_tok_per_s"),
    Metric("requests_per_s", "req/s", "Requests per second", "higher", _requests_per_s,
           "batch_size x DP x runs / sum of the runs' latencies"),
    Metric("output_tok_per_s_per_device", "tok/s/device", "Output throughput per device", "higher",
           _output_tok_per_s_per_device, "output_tok_per_s / (TP x PP x DP)"),
    *_distribution("latency", "Batch latency", run_latencies_s,
                   "time from the common start to the last replica's end, over the runs"),
    Metric("latency_ci95_s", "s", "Batch latency, 95 % CI (±)", None,
           lambda _, point: ci95_half_width(run_latencies_s(point)),
           "Student's t x standard deviation / sqrt(runs); unknown for one run"),
    Metric("runs", "count", "Timed runs", None, _num_runs, "timed runs of the point, warm-ups not counted"),
    *_distribution("ttft", "Time to first token (TTFT)", ttfts_s,
                   "time from a request's arrival to its first token, queue wait included, over all requests"),
    *_distribution("tpot", "Time per output token (TPOT)", tpots_s,
                   "(request latency - TTFT) / (output tokens - 1), over all requests"),
    *_distribution("request_latency", "Request latency", request_latencies_s,
                   "time from a request's arrival to its last token (end to end), over all requests"),
    *_distribution("queue", "Queue wait", queue_waits_s,
                   "time from a request's arrival to its being scheduled, over all requests"),
    Metric("memory_used_gib", "GiB", "Memory used", "lower", _memory_used_gib,
           "highest use seen after a run: per device by NVML, on the CPU resident memory of the replica's processes"),
    Metric("memory_peak_gib", "GiB", "Memory used, peak", "lower", _memory_peak_gib,
           "highest use seen during a run, per device by NVML, ten times a second"),
    Metric("weights_gib", "GiB", "Weights per device", None, _engine_number("weights_gib"),
           "bytes of the model's parameters on the fullest device"),
    Metric("kv_pool_gib", "GiB", "KV cache pool per device", None, _engine_number("kv_pool_gib"),
           "bytes that vLLM reserved for the KV cache on the fullest device"),
    Metric("activations_gib", "GiB", "Activations, peak", None, _engine_number("activations_gib"),
           "peak of activations that vLLM saw when it profiled the model, on the fullest device"),
    Metric("kv_cache_tokens", "tokens", "KV cache capacity", "higher", _engine_number("kv_cache_tokens"),
           "tokens that the KV cache of one replica holds"),
    Metric("kv_use", "ratio", "KV cache use", None, _kv_use,
           "batch_size x (seq_len + max_tokens) / kv_cache_tokens: what the whole batch needs; above 1 it cannot fit"),
    Metric("kv_peak_use", "ratio", "KV cache use, peak", None, _kv_peak_use,
           "share of the KV cache in use at the fullest moment, where vLLM was asked"),
    Metric("running_requests", "count", "Requests at once", None, running_requests,
           "most requests of a replica that ran at once: counted, or the least of batch_size, max_num_seqs and the "
           "whole requests that fit in the KV cache"),
    Metric("waves", "count", "Waves", "lower", waves, "batch_size / running_requests, rounded up"),
    Metric("padded_batch_size", "count", "Padded batch", None, padded_batch_size,
           "smallest captured graph that holds running_requests; unknown without graphs or with PP"),
    Metric("preemptions", "count", "Preemptions", "lower", _preemptions, "requests preempted, over all runs"),
    Metric("energy_j_per_output_token", "J/token", "Energy per output token", "lower", _energy_j_per_output_token,
           "NVML energy of the setting's devices during the runs / output tokens"),
    Metric("idle_power_w", "W", "Idle power", None, _idle_power_w,
           "NVML power draw of this setting's devices before the engine loaded"),
    Metric("sm_mhz", "MHz", "SM clock", None, _sm_mhz, "mean SM clock during the runs, over the devices"),
    Metric("mfu", "ratio", "MFU", "higher", _share_of_peak("flops_per_device", "flops_per_s"),
           "vLLM's estimate of the floating-point operations of a device / (latency x its peak, stated in the file)"),
    Metric("mbu", "ratio", "MBU", "higher", _share_of_peak("memory_bytes_per_device", "bytes_per_s"),
           "vLLM's estimate of the bytes that a device moved / (latency x its peak bandwidth, stated in the file)"),
    Metric("load_s", "s", "Engine start", "lower", _load_s, "from the worker's start to the engine being ready"),
)  # fmt: skip

METRIC_BY_NAME = {metric.name: metric for metric in METRICS}


def markdown_table() -> str:
    """The README's table of metrics."""
    rows = [f"| `{metric.name}` | {metric.unit} | {metric.better or ''} | {metric.definition} |" for metric in METRICS]
    return "\n".join(["| metric | unit | better | definition |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    print(markdown_table())
