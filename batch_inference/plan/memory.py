"""An estimate of what a setting will hold on its fullest device, by formulas for dense Llama-like models."""

from __future__ import annotations

from dataclasses import dataclass

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.kv_blocks import capacity_in_tokens, requests_that_fit
from batch_inference.plan.devices import GIB, Devices
from batch_inference.plan.model import BYTES, KV_BYTE, ModelFacts, why_unread

_SIZES_UNKNOWN = "unknown for a quantized model, and where its sizes cannot be read from here"
# Those of vLLM's flags begin so that leave a part of the weights in the main memory.
_OFFLOADS = ("--cpu-offload-", "--offload-")
# vLLM's own block sizes, in tokens (of its attention backends on NVIDIA GPUs, and on the CPU).
_GPU_BLOCK, _CPU_BLOCK = 16, 128


@dataclass(frozen=True)
class MemoryPlan:
    """What a setting will hold on its fullest device. Activations, which vLLM takes from the same share, are not
    counted (2 GiB of 80 for a 7B model)."""

    weights_gib: float
    kv_bytes_per_token: float
    pool_gib: float | None  # left for the KV cache; None where the device's memory is not known
    block_size: int  # tokens

    def requests_in_one_wave(self, tokens: int) -> int | None:
        """How many requests of `tokens`, prompt and output, the KV cache of a replica holds at once."""
        blocks = self._blocks()
        return None if blocks is None else requests_that_fit(blocks, self.block_size, tokens)

    def kv_cache_tokens(self, max_model_len: int) -> int | None:
        """What vLLM will call the size of the KV cache: its share of requests of the longest kind, in tokens."""
        blocks = self._blocks()
        return None if blocks is None else capacity_in_tokens(blocks, self.block_size, max_model_len)

    def _blocks(self) -> int | None:
        if self.pool_gib is None:
            return None
        # Below 0 where the weights do not fit.
        return max(0, int(self.pool_gib * GIB / (self.kv_bytes_per_token * self.block_size)))


def memory_plan(
    config: ExperimentConfig, facts: ModelFacts | None, devices: Devices, memory_gib: float | None
) -> MemoryPlan | None:
    """None for a quantized model, and where its sizes cannot be read from here. `memory_gib`: of one device, where it
    is known."""
    sizes = (config.tensor_parallel_size, config.pipeline_parallel_size)
    kv_dtype = config.engine_word("--kv-cache-dtype") or "auto"
    kv_dtype = config.dtype if kv_dtype == "auto" else kv_dtype
    if config.engine_word("--quantization") or config.engine_word("-q") or _offload_flag(config):
        return None
    if kv_dtype not in (config.dtype, *BYTES) and not kv_dtype.startswith(KV_BYTE):
        return None
    weights_gib = facts.weights_gib(*sizes, config.dtype) if facts else None
    per_token = facts.kv_bytes_per_token(*sizes, kv_dtype) if facts else None
    if weights_gib is None or per_token is None:
        return None
    pool_gib = None if memory_gib is None else memory_gib * config.gpu_memory_utilization - weights_gib
    asked_bytes = config.engine_number("--kv-cache-memory-bytes")
    pool_gib = pool_gib if asked_bytes is None else asked_bytes / GIB
    on_cpu = devices.kind == "cpu" and config.device_memory_gib is None
    block_size = config.engine_number("--block-size") or (_CPU_BLOCK if on_cpu else _GPU_BLOCK)
    return MemoryPlan(weights_gib, per_token, pool_gib, block_size)


def why_no_memory_plan(config: ExperimentConfig, facts: ModelFacts | None) -> str:
    if facts is None and (reason := why_unread(config)):
        return f"unknown: {reason}"
    if flag := _offload_flag(config):
        return f"unknown with {flag}: weights may lie outside the device's memory"
    return _SIZES_UNKNOWN


def _offload_flag(config: ExperimentConfig) -> str | None:
    flags = (word.partition("=")[0].replace("_", "-") for word in config.engine_args)
    return next((flag for flag in flags if flag.startswith(_OFFLOADS)), None)
