"""The plan of one setting, as --dry-run prints it."""

from __future__ import annotations

from collections.abc import Iterator

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.secrets import redact
from batch_inference.core.text import listed, wrapped
from batch_inference.plan.devices import GIB, Devices
from batch_inference.plan.memory import FILES, NOT_COUNTED, MemoryPlan, memory_plan
from batch_inference.plan.model import ModelFacts
from batch_inference.plan.obstacles import infeasible


def setting_plan(
    config: ExperimentConfig, facts: ModelFacts | None, devices: Devices, memory_gib: float | None = None
) -> list[str]:
    """The plan of --dry-run, line by line. `memory_gib`: of one device, where it is known."""
    tp, pp, dp = config.tensor_parallel_size, config.pipeline_parallel_size, config.data_parallel_size
    points = list(config.points())
    reason = infeasible(config, facts, devices)
    memory = memory_plan(config, facts, devices, memory_gib)
    words = {
        "setting": f"{config.setting_name}: TP {tp} x PP {pp} x DP {dp} = {config.num_devices} of {len(devices)} "
        f"{devices.kind} devices",
        "model": config.model_shown,
        "grid": f"batch sizes {listed(config.batch_sizes)} x lengths {listed(config.seq_lens)}, "
        f"{config.max_tokens} output tokens: {len(points)} points, {config.runs_in_words} timed runs each",
        "file": str(config.output_path),
        "memory": _memory_words(config, memory),
        "margin": NOT_COUNTED if memory.lacks_activations else "",
        "vLLM": f"{' '.join(redact(config.engine_args))} (vLLM checks these when it starts)"
        if config.engine_args
        else "",
        "verdict": f"cannot run: {reason}" if reason else "can run",
    }
    return [line for name, text in words.items() if text for line in wrapped(f"{name:<10}{text}", indent=10)]


def _memory_words(config: ExperimentConfig, memory: MemoryPlan) -> str:
    # The line is called memory.
    return "; ".join([*_known_words(config, memory), *memory.unknown]).removeprefix("memory ")


def _known_words(config: ExperimentConfig, memory: MemoryPlan) -> Iterator[str]:
    if memory.weights_gib is not None:
        by = " (the sizes in its files)" if memory.weights_by == FILES else ""
        yield f"about {memory.weights_gib:.3g} GiB weights per device{by}"
    if memory.weights_gib is not None and memory.pool_gib is not None and memory.pool_gib <= 0:
        yield f"the weights do not fit: {memory.weights_gib + memory.pool_gib:.3g} GiB are there for vLLM"
        return
    if memory.kv_bytes_per_token is None:
        return
    kv_gib = memory.kv_bytes_per_token * max(config.batch_sizes) * config.longest_request / GIB
    yield f"{kv_gib:.3g} GiB KV cache per device for the largest point in one wave"
    if memory.pool_gib is not None:
        waves = ", ".join(
            f"{memory.requests_in_one_wave(seq_len + config.max_tokens)} of length {seq_len}"
            for seq_len in config.seq_lens
        )
        yield f"{memory.pool_gib:.3g} GiB are there for it; requests that fit in one wave: {waves}"
