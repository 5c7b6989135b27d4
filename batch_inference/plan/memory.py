"""What a setting will hold on its fullest device, by formulas and by the files in the model's folder.

Either part may be unknown, with a reason: no number comes from a formula that was made for something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.kv_blocks import capacity_in_tokens, requests_that_fit
from batch_inference.core.text import quoted
from batch_inference.plan.architectures import check_cache, parts_of
from batch_inference.plan.devices import GIB, Devices
from batch_inference.plan.model import BYTES, KV_BYTE, ModelFacts, Quantization, why_unread
from batch_inference.plan.obstacles import is_coupled
from batch_inference.plan.parts import Parts, UnknownError, layers_of_stages
from batch_inference.plan.stored_weights import parts_in_bytes, stored_weights, total_bytes

# From the engines in docs/plan_check.md; a test compares the numbers.
NOT_COUNTED = (
    "activations are not counted: in our runs on GPUs vLLM had 0.7 to 4.1 GiB (1 to 7 %) less per device for the KV "
    "cache (docs/plan_check.md)"
)
FORMULA, FILES = "formula", "files"
# vLLM's own block sizes, in tokens (of its attention backends on NVIDIA GPUs, and on the CPU).
_GPU_BLOCK, _CPU_BLOCK = 16, 128
# Flags that change what is held in ways that no formula here covers.
_FLAGS = (
    "--model-impl", "--speculative-config", "--enable-lora", "--enable-eplb", "--decode-context-parallel-size", "-dcp",
    "--prefill-context-parallel-size", "-pcp", "--num-gpu-blocks-override", "--runner", "--convert",
)  # fmt: skip
# Flags with these beginnings leave part of the weights in main memory.
_OFFLOADS = ("--cpu-offload-", "--offload-")
# Values of --load-format that leave weights unchanged.
LOADS_AS_STORED = (
    "auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai-streamer", "pt", "mistral", "npcache",
    "dummy",
)  # fmt: skip
# Methods whose tensors have the same size in vLLM as in the file.
_AS_STORED = ("awq", "gptq", "fp8", "compressed-tensors", "modelopt")
# With smaller groups, GPTQ's zeros, which vLLM may drop, exceed a hundredth of the weights.
_SMALLEST_GROUP = 128


@dataclass(frozen=True)
class MemoryPlan:
    """What a setting will hold on its fullest device; None if unknown, and `unknown` says why."""

    weights_gib: float | None
    kv_bytes_per_token: float | None
    pool_gib: float | None  # left for the KV cache; None also if the device's memory is unknown
    block_size: int  # tokens
    unknown: tuple[str, ...] = ()
    weights_by: str = FORMULA
    pool_is_asked: bool = False  # set with --kv-cache-memory-bytes

    @property
    def lacks_activations(self) -> bool:
        """True if vLLM will have less for the KV cache than `pool_gib`."""
        return not self.pool_is_asked and self.kv_bytes_per_token is not None and (self.pool_gib or 0) > 0

    @property
    def source(self) -> str | None:
        """Where the numbers come from."""
        weights = self.weights_by if self.weights_gib is not None else None
        cache = FORMULA if self.kv_bytes_per_token is not None else None
        return " and ".join(dict.fromkeys(part for part in (weights, cache) if part)) or None

    def requests_in_one_wave(self, tokens: int) -> int | None:
        """How many requests of `tokens` (prompt and output) the KV cache of a replica holds at once."""
        blocks = self._blocks()
        return None if blocks is None else requests_that_fit(blocks, self.block_size, tokens)

    def kv_cache_tokens(self, max_model_len: int) -> int | None:
        """What vLLM will call the size of the KV cache: how many of the longest requests fit, in tokens."""
        blocks = self._blocks()
        return None if blocks is None else capacity_in_tokens(blocks, self.block_size, max_model_len)

    def _blocks(self) -> int | None:
        if self.pool_gib is None or self.kv_bytes_per_token is None:
            return None
        # Below 0 if the weights do not fit.
        return max(0, int(self.pool_gib * GIB / (self.kv_bytes_per_token * self.block_size)))


def memory_plan(
    config: ExperimentConfig, facts: ModelFacts | None, devices: Devices, memory_gib: float | None
) -> MemoryPlan:
    """`memory_gib`: of one device, if known."""
    unknown: dict[str, str] = {}  # reason -> what is unknown
    weights, weights_by, cache = None, FORMULA, None
    pool_asked_gib, block_size = asked_gib(config), _block_size(config, devices)
    try:
        known = _facts(config, facts)
    except UnknownError as reason:
        return MemoryPlan(None, None, pool_asked_gib, block_size, (f"memory unknown: {reason}",))
    try:
        weights, weights_by = _weights_of_stages(config, known)
    except UnknownError as reason:
        unknown[str(reason)] = "weights"
    try:
        cache = _cache_of_stages(config, known)
    except UnknownError as reason:
        unknown[str(reason)] = "memory" if str(reason) in unknown else "KV cache"
    share_gib = None if memory_gib is None else memory_gib * config.gpu_memory_utilization
    pool_gib, per_token = _tightest(share_gib, pool_asked_gib, weights, cache)
    weights_gib = max(weights) if weights else None
    is_asked = pool_asked_gib is not None
    reasons = tuple(f"{what} unknown: {why}" for why, what in unknown.items())
    return MemoryPlan(weights_gib, per_token, pool_gib, block_size, reasons, weights_by, is_asked)


def _tightest(
    share_gib: float | None, asked_gib: float | None, weights: list[float] | None, cache: list[float] | None
) -> tuple[float | None, float | None]:
    """For the stage that fits the fewest tokens: what is left for the KV cache, and the bytes per token."""
    most = max(cache) if cache else None
    if asked_gib is not None:
        return asked_gib, most
    if share_gib is None or weights is None:
        return None, most
    left = share_gib - max(weights)
    if cache is None or left <= 0:
        return left, most
    return min(
        ((share_gib - held, per_token) for held, per_token in zip(weights, cache, strict=True)),
        key=lambda stage: stage[0] / stage[1],
    )


def asked_gib(config: ExperimentConfig) -> float | None:
    """What the user assigns to the KV cache of a device."""
    asked_bytes = config.engine_number("--kv-cache-memory-bytes")
    return None if asked_bytes is None else asked_bytes / GIB


def _block_size(config: ExperimentConfig, devices: Devices) -> int:
    on_cpu = devices.kind == "cpu" and config.device_memory_gib is None
    return config.engine_number("--block-size") or (_CPU_BLOCK if on_cpu else _GPU_BLOCK)


def _facts(config: ExperimentConfig, facts: ModelFacts | None) -> ModelFacts:
    """Raises UnknownError if nothing can be said."""
    if facts is None:
        raise UnknownError(why_unread(config) or "its sizes cannot be read from here")
    given = [word.partition("=")[0].partition(".")[0].replace("_", "-") for word in config.engine_args]
    changing = [flag for flag in given if flag in _FLAGS or flag.startswith(_OFFLOADS)]
    if changing:
        raise UnknownError(f"the formulas do not know what {changing[0]} changes")
    return facts


def _bytes_of_a_float(config: ExperimentConfig, facts: ModelFacts) -> int:
    """Raises UnknownError."""
    dtype = facts.dtype_used(config.dtype)
    if dtype not in BYTES:
        raise UnknownError(f"the formulas do not know the type {quoted(dtype)}")
    return BYTES[dtype]


# --- weights ------------------------------------------------------------------------------------------------------


def _weights_of_stages(config: ExperimentConfig, facts: ModelFacts) -> tuple[list[float], str]:
    """GiB on a device of each stage, and where the numbers come from. Raises UnknownError."""
    asked = config.engine_word("--quantization") or config.engine_word("-q")
    if asked:
        raise UnknownError(f"--quantization {quoted(asked)} changes the sizes of weights")
    load_format = (config.engine_word("--load-format") or "auto").replace("_", "-")
    if load_format not in LOADS_AS_STORED:
        raise UnknownError(f"--load-format {quoted(load_format)} may change the sizes of weights")
    float_bytes = _bytes_of_a_float(config, facts)
    try:
        counted = parts_of(facts)
    except UnknownError as reason:
        return _of_any_files(config, facts, float_bytes, str(reason)), FILES
    if facts.quantization is None:
        return _in_gib(config, facts, counted, float_bytes), FORMULA
    stored = stored_weights(_folder(facts, facts.quantization))
    if not stored:
        raise UnknownError(f"quantized ({facts.quantization.method}), and its folder holds no weights")
    sizes = (config.tensor_parallel_size, config.pipeline_parallel_size)
    return _in_gib(config, facts, parts_in_bytes(stored, counted, *sizes), 1), FILES


def _in_gib(config: ExperimentConfig, facts: ModelFacts, parts: Parts, unit: int) -> list[float]:
    tp, pp = config.tensor_parallel_size, config.pipeline_parallel_size
    replicas = config.data_parallel_size if is_coupled(config, facts) else 1
    ranks = tp * replicas if config.enable_expert_parallel else None
    return [held * unit / GIB for held in parts.stages(tp, pp, ranks)]


def _of_any_files(config: ExperimentConfig, facts: ModelFacts, float_bytes: int, reason: str) -> list[float]:
    """For a model of which only the files are known: correct for one device. Raises UnknownError."""
    stored = stored_weights(_folder(facts, facts.quantization))
    if not stored:
        raise UnknownError(reason)
    if facts.has_more:
        raise UnknownError(f"{reason}; only vLLM knows which parts of its files it holds")
    own_bytes = None if facts.quantization else float_bytes
    is_tied = bool(facts.words.get("tie_word_embeddings"))
    total_gib = total_bytes(stored, facts.num_layers, own_bytes, is_tied=is_tied) / GIB
    if config.num_devices > 1 and (config.devices_per_replica > 1 or is_coupled(config, facts)):
        least_gib = total_gib / config.num_devices
        raise UnknownError(f"{reason}; of {total_gib:.3g} GiB in its files a device holds at least {least_gib:.3g}")
    return [total_gib]


def _folder(facts: ModelFacts, quantization: Quantization | None) -> Path:
    """Raises UnknownError if its files say nothing about sizes in vLLM."""
    if facts.folder is None:
        raise UnknownError("no files here tell its sizes")
    if quantization is None:
        return facts.folder
    method = quantization.method
    too_fine = method == "gptq" and quantization.group_size in range(1, _SMALLEST_GROUP)
    if method not in _AS_STORED or too_fine:
        raise UnknownError(f"quantized ({method}): its sizes in vLLM differ from those in its files")
    return facts.folder


# --- KV cache -----------------------------------------------------------------------------------------------------


def _cache_of_stages(config: ExperimentConfig, facts: ModelFacts) -> list[float]:
    """Bytes per token on a device of each stage. Raises UnknownError."""
    tp, pp = config.tensor_parallel_size, config.pipeline_parallel_size
    parts = parts_of(facts)
    check_cache(facts)
    size = _bytes_of_a_key(config, facts)
    # KV heads are copied, not split further, if there are fewer of them than TP ranks.
    of_a_layer = 2 * max(1, parts.kv_heads / tp) * parts.head_dim * size
    return [count * of_a_layer for count in layers_of_stages(parts.layers, pp)]


def _bytes_of_a_key(config: ExperimentConfig, facts: ModelFacts) -> int:
    kv_dtype = config.engine_word("--kv-cache-dtype") or "auto"
    if kv_dtype.startswith(KV_BYTE):
        return 1
    if kv_dtype == "auto" and facts.quantization and facts.quantization.cache_too:
        raise UnknownError("its checkpoint sets a type for keys and values")
    size = _bytes_of_a_float(config, facts) if kv_dtype == "auto" else BYTES.get(kv_dtype)
    if size is None:
        raise UnknownError(f"the formulas do not know --kv-cache-dtype {quoted(kv_dtype)}")
    return size
