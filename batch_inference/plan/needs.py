"""What a setting will hold on its fullest device: by vLLM where that says it, else by formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batch_inference.core.config import ExperimentConfig
from batch_inference.plan.devices import GIB, Devices
from batch_inference.plan.memory import memory_plan
from batch_inference.plan.model import ModelFacts
from batch_inference.plan.said import Said


@dataclass(frozen=True)
class Needs:
    """None where it is not known. Activations, which vLLM takes from the same share, are not counted."""

    weights_gib: float | None = None
    kv_cache_tokens: int | None = None  # of a replica, as vLLM counts them
    requests_in_one_wave: dict[int, int] | None = None  # by prompt length
    source: str | None = None  # who says so
    max_model_len: int | None = None  # tokens that the model takes, where vLLM says it
    unknown: str | None = None  # why vLLM says nothing, where it was asked
    kv_gib: float | None = None  # on a device, for the largest point in one wave
    pool_gib: float | None = None  # left for the KV cache


def needs_of(
    config: ExperimentConfig, facts: ModelFacts | None, devices: Devices, memory_gib: float | None, said: Said | None
) -> Needs:
    """`memory_gib`: of one device, where it is known."""
    if said and said.weights_gib is not None:
        return _by_vllm(config, said)
    if said and said.unknown is None:  # it refuses the setting: there is nothing to hold
        return Needs(source=said.by, max_model_len=said.longest)
    unknown = f"{said.by}: {said.unknown}" if said else None
    return _by_formula(config, facts, devices, memory_gib, unknown)


def _by_vllm(config: ExperimentConfig, said: Said) -> Needs:
    largest = config.seq_lens.index(max(config.seq_lens))
    kv_gib = said.kv_gib[largest] * max(config.batch_sizes) if said.kv_gib else None
    return Needs(
        said.weights_gib, said.kv_cache_tokens, _by_length(config, said.waves or ()), said.by, said.longest,
        said.unknown, kv_gib, said.pool_gib,
    )  # fmt: skip


def _by_formula(
    config: ExperimentConfig, facts: ModelFacts | None, devices: Devices, memory_gib: float | None, unknown: str | None
) -> Needs:
    memory = memory_plan(config, facts, devices, memory_gib)
    if memory is None:
        return Needs(unknown=unknown)
    waves = [memory.requests_in_one_wave(length + config.max_tokens) for length in config.seq_lens]
    return Needs(
        memory.weights_gib,
        memory.kv_cache_tokens(config.max_model_len or config.longest_request),
        _by_length(config, waves),
        "formula",
        None,
        unknown,
        memory.kv_bytes_per_token * max(config.batch_sizes) * config.longest_request / GIB,
        memory.pool_gib,
    )


def _by_length(config: ExperimentConfig, waves: Sequence[int | None]) -> dict[int, int] | None:
    known = {length: wave for length, wave in zip(config.seq_lens, waves, strict=False) if wave is not None}
    return known or None
