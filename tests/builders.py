"""Results with known numbers, built by hand."""

from __future__ import annotations

from typing import Any

from batch_inference.config import ExperimentConfig
from batch_inference.metrics import summarise
from batch_inference.results import Point, Requests, Result, Run

GPU = "NVIDIA H100 80GB HBM3"


def make_run(batch_size: int, latency_s: float, *, seq_len: int = 512, max_tokens: int = 128, dp: int = 1) -> Run:
    """Every request gets its first token after a tenth of the run, and its last at the end."""
    requests = batch_size * dp
    return Run(
        latency_s=latency_s,
        prompt_tokens=requests * seq_len,
        output_tokens=requests * max_tokens,
        replicas=[
            {"replica": index, "start_s": 0.0, "end_s": latency_s, "prompt_tokens": 0, "output_tokens": 0}
            for index in range(dp)
        ],
        requests=Requests(
            ttft_s=[latency_s / 10] * requests,
            latency_s=[latency_s] * requests,
            queue_s=[latency_s / 20] * requests,
            output_tokens=[max_tokens] * requests,
        ),
        energy_j=600.0,
        memory={"scope": "device", "used_gib": [64.0]},
        counters={"preemptions": 0, "prefix_cache_hit_tokens": 0},
    )


def make_result(tp: int = 1, pp: int = 1, dp: int = 1, *, speed: float = 100.0, **changes: Any) -> Result:
    """A setting that makes `speed` output tokens per second for each request of a replica.

    `changes`: batch_sizes, seq_lens and gpu; `config` and `engine`, which are laid over those of the result.
    """
    batch_sizes, seq_lens = changes.pop("batch_sizes", (1, 4, 16)), changes.pop("seq_lens", (512,))
    config = ExperimentConfig(
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        data_parallel_size=dp,
        batch_sizes=batch_sizes,
        seq_lens=seq_lens,
    )
    gpu = {"index": 0, "name": changes.pop("gpu", GPU), "memory_gib": 80.0, "power_limit_w": 700.0}
    result = Result(
        name=config.setting_name,
        status="complete",
        config={**config.to_json(), **changes.pop("config", {})},
        environment={
            "started_at": "2026-01-01T00:00:00+00:00",
            "ended_at": "2026-01-01T01:00:00+00:00",
            "versions": {"vllm": "0.26.0"},
            "device_kind": "gpu",
            "devices": [gpu],
        },
        engine={
            "vllm_version": "0.26.0",
            "dtype": "float16",
            "weights_gib": 12.6 / tp / pp,
            "kv_pool_gib": 50.0,
            "kv_cache_tokens": 100_000,
            "load_s": {"total_s": 42.0},
            **changes.pop("engine", {}),
        },
    )
    assert not changes
    result.points = [
        make_point(result, batch_size, seq_len, 128 / speed) for seq_len in seq_lens for batch_size in batch_sizes
    ]
    return result


def make_point(result: Result, batch_size: int, seq_len: int, latency_s: float) -> Point:
    """Three runs of `latency_s`, give or take a per cent."""
    point = Point(batch_size, seq_len, 128, "ok", verdict="valid")
    latencies_s = [latency_s * share for share in (0.99, 1.0, 1.01)]
    point.runs = [
        make_run(batch_size, taken_s, seq_len=seq_len, dp=result.data_parallel_size) for taken_s in latencies_s
    ]
    point.summary = summarise(result, point)
    return point
