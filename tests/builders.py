"""Synthetic results with known numbers, for the tests of the analysis."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.metrics import summarise
from batch_inference.core.result_file import save_result
from batch_inference.core.results import (
    Clocks,
    Counters,
    EngineInfo,
    Environment,
    Memory,
    Point,
    ReplicaRun,
    Requests,
    Result,
    Run,
    StoredConfig,
    Timeline,
    Warmup,
    WorkloadKey,
)
from batch_inference.plan.devices import Devices
from batch_inference.plan.model import ModelFacts
from batch_inference.plan.obstacles import devices_against, rules_against

DEVICE = "NVIDIA H100 80GB HBM3"


def infeasible(
    config: ExperimentConfig,
    facts: ModelFacts | None,
    devices: Devices,
    devices_here: int | None = None,
    ray_gpus: int | None = None,
) -> str | None:
    """Why a setting cannot run, where vLLM is not asked."""
    return devices_against(config, devices, devices_here, ray_gpus) or rules_against(config, facts, devices)


def make_run(latency_s: float, *, requests: int = 1, seq_len: int = 64, max_tokens: int = 32, **changes: Any) -> Run:
    """All requests arrive at 0, see their first token after a tenth of the run, and end with it. The requests' own
    times are replaced by times=."""
    latency_s = float(latency_s)  # numpy's own type is none of JSON's
    times = Requests(
        ttft_s=[latency_s / 10] * requests,
        latency_s=[latency_s] * requests,
        queue_s=[latency_s / 100] * requests,
        output_tokens=[max_tokens] * requests,
    )
    tokens = {"prompt_tokens": requests * seq_len, "output_tokens": requests * max_tokens}
    counters = {"preemptions": 0, "prefix_cache_hit_tokens": 0}
    values: dict[str, Any] = {
        "latency_s": latency_s,
        **tokens,
        "replicas": [ReplicaRun(0, 0.0, latency_s, **tokens)],
        "requests": changes.pop("times", times),
        "energy_j": changes.pop("energy_j", None),
        "memory": msgspec.convert({"scope": "device", "used_gib": [60.0], **changes.pop("memory", {})}, Memory),
        "counters": msgspec.convert(counters | changes.pop("counters", {}), Counters),
        "clocks": msgspec.convert(changes.pop("clocks", {}), Clocks),
    }
    return Run(**(values | changes))


def make_point(
    batch_size: int = 1,
    seq_len: int = 64,
    latencies_s: Sequence[float] = (1.0, 1.01, 0.99),
    *,
    replicas: int = 1,
    max_tokens: int = 32,
    **changes: Any,
) -> Point:
    shape = {"requests": batch_size * replicas, "seq_len": seq_len, "max_tokens": max_tokens}
    runs = [make_run(latency_s, **shape) for latency_s in latencies_s]
    changes["warmups"] = msgspec.convert(changes.pop("warmups", []), list[Warmup])
    return Point(batch_size, seq_len, max_tokens, **{"status": "ok", "verdict": "valid", "runs": runs, **changes})


def make_queue_run(
    batch_size: int, shares: Sequence[int], *, life_s: float = 1.0, prompt: int = 100, output: int = 10, **changes: Any
) -> Run:
    """Replicas with so many requests each, all alike: `batch_size` start together, have their first token at once, and
    hand their places on to the next after `life_s`."""
    rounds = [[number // batch_size for number in range(share)] for share in shares]
    scheduled_s = [round_ * life_s for of_replica in rounds for round_ in of_replica]
    requests = Requests(
        ttft_s=scheduled_s,
        latency_s=[start_s + life_s for start_s in scheduled_s],
        queue_s=scheduled_s,
        output_tokens=[output] * len(scheduled_s),
        arrival_s=[0.0] * len(scheduled_s),
        prompt_tokens=[prompt] * len(scheduled_s),
    )
    replicas = [
        ReplicaRun(
            number, 0.0, (of_replica[-1] + 1) * life_s, len(of_replica) * prompt, len(of_replica) * output,
            len(of_replica), make_timeline(batch_size, of_replica[-1] + 1, life_s, prompt, output),
        )
        for number, of_replica in enumerate(rounds)
    ]  # fmt: skip
    return make_run(
        max(replica.end_s for replica in replicas),
        prompt_tokens=sum(requests.prompt_tokens),
        output_tokens=sum(requests.output_tokens),
        times=requests,
        replicas=replicas,
        counters={"peak_running": batch_size, "miscounted": 0, **changes.pop("counters", {})},
        **changes,
    )


def make_timeline(batch_size: int, rounds: int, life_s: float, prompt: int, output: int) -> Timeline:
    """Ten intervals for each round, of which all are as fast."""
    count = 10 * rounds
    return Timeline(
        end_s=[life_s * (number + 1) / 10 for number in range(count)],
        steps=[1] * count,
        prompt_tokens=[batch_size * prompt // 10] * count,
        output_tokens=[batch_size * output // 10] * count,
        running=[float(batch_size)] * count,
        waiting=[0] * count,
    )


def make_queue_point(
    batch_size: int = 2, shares: Sequence[int] = (24,), *, order: Any = "given", **changes: Any
) -> Point:
    """A point of one run; what is no part of it are `changes` of the point."""
    of_run = {
        name: changes.pop(name) for name in ("life_s", "prompt", "output", "counters", "memory") if name in changes
    }
    changes = {"runs": [make_queue_run(batch_size, shares, **of_run)], "warmups": [Warmup(1.0)], **changes}
    workload = WorkloadKey("abc", "file", order)
    return Point(batch_size, None, None, **{"status": "ok", "verdict": "valid", "workload": workload, **changes})


def make_result(
    name: str = "tp_1",
    points: Sequence[Point] = (),
    sizes: tuple[int, int, int] = (1, 1, 1),
    status: Any = "complete",
    **sections: Any,
) -> Result:
    """A setting on H100s of (TP, PP, DP) `sizes`; config=, environment= and engine= change single entries."""
    devices_per_replica = sizes[0] * sizes[1]
    config = make_config(sizes, points) | sections.pop("config", {})
    environment = make_environment(devices_per_replica * sizes[2]) | sections.pop("environment", {})
    devices = [{"index": index, **device} for index, device in enumerate(environment["devices"])]
    engine = make_engine(devices_per_replica) | sections.pop("engine", {})
    result = Result(
        name=name,
        status=status,
        config=msgspec.convert(config, StoredConfig),
        environment=msgspec.convert(environment | {"devices": devices}, Environment),
        engine=msgspec.convert(engine, EngineInfo),
        points=list(points),
        **sections,
    )
    for point in result.points:
        point.summary = summarise(result, point)
    return result


def make_config(sizes: tuple[int, int, int], points: Sequence[Point]) -> dict[str, Any]:
    return {
        "model": "meta-llama/Llama-2-7b-chat-hf",
        "tensor_parallel_size": sizes[0],
        "pipeline_parallel_size": sizes[1],
        "data_parallel_size": sizes[2],
        "distributed_executor_backend": None,
        "batch_sizes": sorted({point.batch_size for point in points}) or [1],
        "seq_lens": sorted({point.seq_len for point in points if point.seq_len}) or [64],
        "max_tokens": 32,
        "max_model_len": None,
        "dtype": "auto",
        "temperature": 0.8,
        "top_p": 0.95,
        "num_runs": None,
        "target_ci": 0.02,
        "max_runs": 10,
        "seed": 0,
        "enforce_eager": False,
        "engine_args": [],
        "config_hash": "0123456789abcdef",
    }


def make_environment(num_devices: int) -> dict[str, Any]:
    device = {"name": DEVICE, "memory_gib": 79.6, "power_limit_w": 700.0}
    return {
        "started_at": "2026-01-02T03:04:05+00:00",
        "ended_at": "2026-01-02T03:14:05+00:00",
        "argv": ["batch_inference_experiment.py"],
        "host": "node-1",
        "platform": "Linux",
        "python_version": "3.11.7",
        "cpu_name": "a CPU",
        "versions": {"vllm": "0.32.0", "torch": "2.13.0"},
        "device_kind": "gpu",
        "devices": [device] * num_devices,
        "driver_version": "570.86",
        "git_commit": "f" * 40,
        "git_dirty": False,
        "variables": {},
    }


def make_engine(devices_per_replica: int) -> dict[str, Any]:
    return {
        "vllm_version": "0.32.0",
        "executor": "uni" if devices_per_replica == 1 else "mp",
        "runner": "GPUModelRunner",
        "dtype": "bfloat16",
        "quantization": None,
        "max_model_len": 4096,
        "enforce_eager": False,
        "kv_cache_dtype": "auto",
        "load_format": "auto",
        "load_s": {"import_s": 8.0, "engine_s": 32.0, "compile_s": 11.0, "total_s": 40.0},
        "weights_gib": 12.6 / devices_per_replica,
        "kv_pool_gib": 40.0,
        "kv_cache_tokens": 80000 * devices_per_replica,
    }


def make_sweep(
    settings: Sequence[tuple[int, int, int]],
    batch_sizes: Sequence[int] = (1, 4, 16),
    seq_lens: Sequence[int] = (512,),
    **sections: dict[str, Any],
) -> list[Result]:
    """One result per (TP, PP, DP), with latencies that look real: TP and DP speed up, PP a little, length costs."""
    results = []
    for tp, pp, dp in settings:
        scale = 0.2 + 0.8 / (tp * (1 + 0.4 * (pp - 1)))
        points = []
        for seq_len, batch_size in itertools.product(seq_lens, batch_sizes):
            middle_s = scale * (0.8 + 0.01 * batch_size * (1 + seq_len / 1024))
            latencies_s = [middle_s * factor for factor in (0.99, 1.0, 1.012)]
            points.append(make_point(batch_size, seq_len, latencies_s, replicas=dp))
        results.append(make_result(setting_name(tp, pp, dp), points, (tp, pp, dp), **sections))
    return results


def setting_name(tp: int, pp: int, dp: int) -> str:
    return "_".join(f"{key}_{size}" for key, size in (("tp", tp), ("pp", pp), ("dp", dp)) if size > 1) or "tp_1"


def save_all(results: Sequence[Result], folder: Path) -> list[Path]:
    """Files named as the launcher names them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{result.name}_results.json" for result in results]
    for result, path in zip(results, paths, strict=True):
        save_result(result, path)
    return paths
