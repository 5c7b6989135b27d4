"""What a setting will hold on its fullest device: according to vLLM if it says so, otherwise by formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.values import AUTO_LENGTH
from batch_inference.plan.devices import GIB, Devices
from batch_inference.plan.memory import asked_gib, memory_plan
from batch_inference.plan.model import ModelFacts
from batch_inference.plan.said import Said


@dataclass(frozen=True)
class Needs:
    """None means unknown. Activations, which vLLM takes from the same share, are not counted."""

    weights_gib: float | None = None
    kv_cache_tokens: int | None = None  # of a replica, as vLLM counts them
    requests_in_one_wave: dict[int, int] | None = None  # by prompt length
    source: str | None = None  # who says so
    unknown: tuple[str, ...] = ()  # why a None is unknown, and why vLLM gave no answer if it was asked
    max_model_len: int | None = None  # tokens that the model takes, if vLLM says so
    kv_gib: float | None = None  # on a device, for the largest point in one wave
    pool_gib: float | None = None  # left for the KV cache
    activations_counted: bool | None = None  # None if what is left for the KV cache is unknown

    @property
    def is_refused(self) -> bool:
        """Whether vLLM refuses the setting, so that nothing will be held."""
        return self.source is not None and self.weights_gib is None and self.kv_gib is None


def needs_of(
    config: ExperimentConfig, facts: ModelFacts | None, devices: Devices, memory_gib: float | None, said: Said | None
) -> Needs:
    """`memory_gib`: of one device, if known."""
    if said and said.weights_gib is not None:
        return _by_vllm(config, said)
    if said and said.unknown is None:  # it refuses the setting, so nothing is held
        return Needs(source=said.by, max_model_len=said.longest)
    return _by_formula(config, facts, devices, memory_gib, said)


def memory_against(needs: Needs) -> str | None:
    """Why a setting cannot run because its weights alone fill vLLM's share of a device; None if that is unknown."""
    weights_gib, pool_gib = needs.weights_gib, needs.pool_gib
    if weights_gib is None or pool_gib is None or pool_gib > 0:
        return None
    return (
        f"{weights_gib:.3g} GiB of weights do not fit into {weights_gib + pool_gib:.3g} GiB of a device (its memory x "
        "--gpu-memory-utilization); raise --tensor-parallel-size or --pipeline-parallel-size"
    )


def _by_vllm(config: ExperimentConfig, said: Said) -> Needs:
    largest = config.lengths.index(max(config.lengths))
    return Needs(
        weights_gib=said.weights_gib,
        kv_cache_tokens=None if _longest(config) == AUTO_LENGTH else said.kv_cache_tokens,
        requests_in_one_wave=_by_length(config, said.waves or ()),
        source=said.by,
        unknown=(f"KV cache unknown: {said.unknown}",) if said.unknown else (),
        max_model_len=said.longest,
        kv_gib=said.kv_gib[largest] * config.least_batch if said.kv_gib else None,
        pool_gib=said.pool_gib,
        activations_counted=None if asked_gib(config) is not None or (said.pool_gib or 0) <= 0 else False,
    )


def _by_formula(
    config: ExperimentConfig, facts: ModelFacts | None, devices: Devices, memory_gib: float | None, said: Said | None
) -> Needs:
    memory = memory_plan(config, facts, devices, memory_gib)
    per_token, longest = memory.kv_bytes_per_token, _longest(config)
    return Needs(
        weights_gib=memory.weights_gib,
        kv_cache_tokens=None if longest == AUTO_LENGTH else memory.kv_cache_tokens(longest),
        requests_in_one_wave=_by_length(
            config, [memory.requests_in_one_wave(tokens) for tokens in config.request_tokens]
        ),
        source=memory.source,
        unknown=((f"not by {said.by}: {said.unknown}",) if said else ()) + memory.unknown,
        kv_gib=per_token and per_token * config.least_batch * config.longest_request / GIB,
        pool_gib=memory.pool_gib,
        activations_counted=False if memory.lacks_activations else None,
    )


def _longest(config: ExperimentConfig) -> int:
    return config.max_model_len or config.longest_request


def _by_length(config: ExperimentConfig, waves: Sequence[int | None]) -> dict[int, int] | None:
    known = {length: wave for length, wave in zip(config.lengths, waves, strict=False) if wave is not None}
    return known or None
