"""The plan of one setting, as --dry-run prints it."""

from __future__ import annotations

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.secrets import redact
from batch_inference.core.text import listed, wrapped
from batch_inference.plan.devices import Devices
from batch_inference.plan.memory import SIZES_UNKNOWN
from batch_inference.plan.model import ModelFacts
from batch_inference.plan.needs import Needs, needs_of
from batch_inference.plan.obstacles import devices_against, rules_against
from batch_inference.plan.said import Said


def setting_plan(
    config: ExperimentConfig,
    facts: ModelFacts | None,
    devices: Devices,
    memory_gib: float | None = None,
    said: Said | None = None,
) -> list[str]:
    """The plan of --dry-run, line by line. `memory_gib`: of one device, where it is known. `said`: by vLLM."""
    tp, pp, dp = config.tensor_parallel_size, config.pipeline_parallel_size, config.data_parallel_size
    points = list(config.points())
    reason = devices_against(config, devices) or rules_against(config, facts, devices, said)
    words = {
        "setting": f"{config.setting_name}: TP {tp} x PP {pp} x DP {dp} = {config.num_devices} of {len(devices)} "
        f"{devices.kind} devices",
        "model": config.model_shown,
        "grid": f"batch sizes {listed(config.batch_sizes)} x lengths {listed(config.seq_lens)}, "
        f"{config.max_tokens} output tokens: {len(points)} points, {config.runs_in_words} timed runs each",
        "file": str(config.output_path),
        "memory": _memory_words(config, needs_of(config, facts, devices, memory_gib, said)),
        "vLLM": f"{' '.join(redact(config.engine_args))} (vLLM checks these when it starts)",
        "verdict": f"cannot run: {reason}" if reason else "can run",
    }
    if not config.engine_args:
        del words["vLLM"]
    return [line for name, text in words.items() for line in wrapped(f"{name:<10}{text}", indent=10)]


def _memory_words(config: ExperimentConfig, needs: Needs) -> str:
    why = f"; {needs.unknown}" if needs.unknown else ""
    if needs.weights_gib is None:
        return f"{'nothing, it is refused' if needs.source else SIZES_UNKNOWN}{why}"
    told = [f"about {needs.weights_gib:.3g} GiB weights per device"]
    if needs.kv_gib is not None:
        told.append(f"{needs.kv_gib:.3g} GiB KV cache per device for the largest point in one wave")
    return f"{', '.join(told)}{_pool_words(config, needs)} (by {needs.source}{why})"


def _pool_words(config: ExperimentConfig, needs: Needs) -> str:
    if needs.pool_gib is None or needs.weights_gib is None:
        return ""
    if needs.pool_gib <= 0:
        return f"; the weights do not fit: {needs.weights_gib + needs.pool_gib:.3g} GiB are there for vLLM"
    waves = needs.requests_in_one_wave or {}
    told = ", ".join(f"{waves[length]} of length {length}" for length in config.seq_lens if length in waves)
    return f"; {needs.pool_gib:.3g} GiB are there for it; requests that fit in one wave: {told}"
