"""The plan of one setting as text."""

from __future__ import annotations

from collections.abc import Iterator

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.secrets import redact
from batch_inference.core.text import counted, listed, wrapped
from batch_inference.core.values import AUTO
from batch_inference.plan.devices import Devices
from batch_inference.plan.memory import FILES, NOT_COUNTED
from batch_inference.plan.model import ModelFacts
from batch_inference.plan.needs import Needs, memory_against, needs_of
from batch_inference.plan.obstacles import devices_against, rules_against
from batch_inference.plan.said import Said


def setting_plan(
    config: ExperimentConfig,
    facts: ModelFacts | None,
    devices: Devices,
    memory_gib: float | None = None,
    said: Said | None = None,
) -> list[str]:
    """The plan of --dry-run, line by line. `memory_gib`: of one device, if known. `said`: by vLLM."""
    tp, pp, dp = config.tensor_parallel_size, config.pipeline_parallel_size, config.data_parallel_size
    needs = needs_of(config, facts, devices, memory_gib, said)
    reason = devices_against(config, devices) or rules_against(config, facts, devices, said) or memory_against(needs)
    words = {
        "setting": f"{config.setting_name}: TP {tp} x PP {pp} x DP {dp} = {config.num_devices} of {len(devices)} "
        f"{devices.kind} devices",
        "model": config.model_shown,
        **(
            {"job": job_words(config)}
            if config.prompts_file
            else {
                "grid": grid_words(config) + f"{_count_words(config, 'point')}, {config.runs_in_words} timed runs each"
            }
        ),
        "file": str(config.output_path),
        "memory": _memory_words(config, needs),
        "margin": NOT_COUNTED if needs.activations_counted is False else "",
        "vLLM": f"{' '.join(redact(config.engine_args))} (vLLM checks these when it starts)"
        if config.engine_args
        else "",
        "verdict": f"cannot run: {reason}" if reason else "can run",
    }
    return [line for name, text in words.items() if text for line in wrapped(f"{name:<10}{text}", indent=10)]


def grid_words(config: ExperimentConfig) -> str:
    return (
        f"batch sizes {batch_words(config)} x lengths {listed(config.seq_lens)}, {config.max_tokens} output "
        f"tokens{_budgets(config)}"
    )


def job_words(config: ExperimentConfig) -> str:
    longest = f", the longest request takes {config.workload_longest} tokens" if config.workload_longest else ""
    return (
        f"{config.prompts_file}, {batch_words(config)} requests at once{_budgets(config)}"
        f"{_count_words(config, 'queue point')}{longest}"
    )


def _count_words(config: ExperimentConfig, noun: str) -> str:
    """Nothing for a search, which finds out how many points it needs."""
    return "" if config.searches else f": {counted(len(list(config.points())), noun)}"


def batch_words(config: ExperimentConfig) -> str:
    return f"{AUTO} (up to {max(config.batch_sizes)})" if config.searches else listed(config.batch_sizes)


def _budgets(config: ExperimentConfig) -> str:
    return f", {listed(config.budgets)} tokens per step" if len(config.budgets) > 1 else ""


def by_whom(source: str) -> str:
    """Where these numbers come from."""
    return f"by {source.replace(FILES, 'the sizes in its files')}"


def _memory_words(config: ExperimentConfig, needs: Needs) -> str:
    known = "; ".join(_known_words(config, needs))
    told = [f"{known} ({by_whom(needs.source)})"] if needs.source else []
    # The line is already called memory.
    return "; ".join([*told, *needs.unknown]).removeprefix("memory ")


def _of_length(config: ExperimentConfig, length: int) -> str:
    return f"of {length} tokens" if config.prompts_file else f"of length {length}"


def _known_words(config: ExperimentConfig, needs: Needs) -> Iterator[str]:
    weights_gib, pool_gib = needs.weights_gib, needs.pool_gib
    if needs.is_refused:
        yield "none: it is refused"
    if weights_gib is not None:
        yield f"about {weights_gib:.3g} GiB of weights per device"
    if needs.kv_gib is None or memory_against(needs):
        return
    yield f"{needs.kv_gib:.3g} GiB of KV cache per device for the largest point in one wave"
    if pool_gib is not None:
        waves = needs.requests_in_one_wave or {}
        told = ", ".join(
            f"{waves[length]} {_of_length(config, length)}" for length in config.lengths if length in waves
        )
        yield f"{pool_gib:.3g} GiB are available for it; requests that fit in one wave: {told}"
