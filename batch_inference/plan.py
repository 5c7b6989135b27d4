"""What a setting will need, from the model's config.json alone: what cannot work, and an estimate of the memory."""

from __future__ import annotations

import json
import math
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_inference.config import ConfigError, ExperimentConfig, redact
from batch_inference.hardware import GIB, Devices

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Of vLLM's --kv-cache-dtype, beside the above, those that begin so take a byte; of others the size is not known.
_KV_BYTE = ("fp8", "int8")
SIZES_UNKNOWN = "unknown for a quantized model, and where its sizes cannot be read from here"
# vLLM's own block sizes, in tokens (of its attention backends on NVIDIA GPUs, and on the CPU).
_GPU_BLOCK, _CPU_BLOCK = 16, 128
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length")


@dataclass(frozen=True)
class ModelFacts:
    """Sizes read from a model's config.json; None where the architecture does not say it in the usual words."""

    num_layers: int | None
    num_attention_heads: int | None
    num_kv_heads: int | None
    hidden_size: int | None
    head_dim: int | None
    intermediate_size: int | None
    vocab_size: int | None
    max_model_len: int | None
    is_moe: bool
    tied_embeddings: bool
    is_quantized: bool
    dtype: str

    def weights_gib(self, tensor_parallel_size: int, pipeline_parallel_size: int, dtype: str) -> float | None:
        """Weights of the fullest device of a dense Llama-like model: its share of the layers plus one embedding."""
        sizes = (self.num_layers, self.hidden_size, self.intermediate_size, self.vocab_size, self.num_attention_heads)
        if self.is_moe or self.is_quantized or self.head_dim is None or self.num_kv_heads is None or None in sizes:
            return None
        layers, hidden, intermediate, vocab, heads = (int(size or 0) for size in sizes)
        # KV heads are copied, not split further, when there are fewer of them than TP ranks.
        kv_heads = max(self.num_kv_heads, tensor_parallel_size)
        attention = 2 * hidden * heads * self.head_dim + 2 * hidden * kv_heads * self.head_dim
        layer = (attention + 3 * hidden * intermediate) / tensor_parallel_size + 2 * hidden
        embedding = vocab * hidden / tensor_parallel_size
        # A stage holds the input embedding or the output head; a single stage holds both, unless they are one.
        embeddings = embedding * (1 if self.tied_embeddings or pipeline_parallel_size > 1 else 2)
        parameters = math.ceil(layers / pipeline_parallel_size) * layer + embeddings + hidden
        return parameters * self._bytes(dtype) / GIB

    def kv_bytes_per_token(self, tensor_parallel_size: int, pipeline_parallel_size: int, dtype: str) -> float | None:
        """KV-cache bytes of one token on one device, with keys and values of `dtype`."""
        if self.num_kv_heads is None or self.head_dim is None or self.num_layers is None:
            return None
        kv_heads = max(1, self.num_kv_heads / tensor_parallel_size)
        size = 1 if dtype.startswith(_KV_BYTE) else self._bytes(dtype)
        return 2 * math.ceil(self.num_layers / pipeline_parallel_size) * kv_heads * self.head_dim * size

    def dtype_used(self, asked: str) -> str:
        """What vLLM makes of --dtype, in torch's words."""
        if asked == "auto":
            # vLLM runs a float32 checkpoint in 16 bits.
            asked = "bfloat16" if self.dtype in ("float32", "float") else self.dtype
        return {"half": "float16", "float": "float32"}.get(asked, asked)

    def _bytes(self, dtype: str) -> int:
        return _BYTES.get(self.dtype_used(dtype), 2)


def is_local(model: str) -> bool:
    """A folder, or written like one: m/x where there is a folder m. Others are hub names: org/name, or name alone."""
    if model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
        return True
    try:
        return Path(model).exists() or (model.count("/") == 1 and Path(model).parent.exists())
    except OSError:  # too long to be a path
        return False


def read_model_facts(model: str) -> ModelFacts | None:
    """The facts of a model folder; None for a hub name. Raises ConfigError for a folder that is no model."""
    if not is_local(model):
        return None
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"--model {model}: there is no such folder; give a model folder or a hub name (org/name)")
    path = folder / "config.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        part = _text_part(document)
        is_quantized = "quantization_config" in {**document, **part}
        return _facts_from(part, is_quantized=is_quantized)
    except FileNotFoundError:
        raise ConfigError(f"--model {model}: it has no config.json; give the folder that holds one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--model {model}: config.json cannot be read ({error}); fetch the model again") from error


def _text_part(document: Any) -> dict[str, Any]:
    """The sizes of the language model; those with vision keep them apart. Raises ValueError for anything else."""
    part = (document.get("text_config") or document) if isinstance(document, dict) else document
    if not isinstance(part, dict):
        raise ValueError("it is not an object")
    return part


def _facts_from(document: dict[str, Any], *, is_quantized: bool) -> ModelFacts:
    def number(*keys: str) -> int | None:
        return next((document[key] for key in keys if isinstance(document.get(key), int)), None)

    heads, hidden = number("num_attention_heads", "n_head"), number("hidden_size", "n_embd")
    head_dim = number("head_dim") or (hidden // heads if hidden and heads else None)
    return ModelFacts(
        num_layers=number("num_hidden_layers", "n_layer"),
        num_attention_heads=heads,
        num_kv_heads=number("num_key_value_heads") or heads,
        hidden_size=hidden,
        head_dim=head_dim,
        intermediate_size=number("intermediate_size"),
        vocab_size=number("vocab_size"),
        max_model_len=None if _scales_positions(document) else number(*_LENGTH_KEYS),
        is_moe=any(number(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")),
        tied_embeddings=bool(document.get("tie_word_embeddings", False)),
        is_quantized=is_quantized,
        dtype=str(document.get("dtype") or document.get("torch_dtype") or "bfloat16"),
    )


def _scales_positions(document: dict[str, Any]) -> bool:
    """True where rope scaling stretches the length by rules that only vLLM knows."""
    scaling = document.get("rope_scaling") or document.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        return True
    return scaling.get("rope_type", scaling.get("type", "default")) not in ("default", "llama3", "mrope")


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
        return None if blocks is None else blocks // math.ceil(tokens / self.block_size)

    def kv_cache_tokens(self, max_model_len: int) -> int | None:
        """What vLLM will call the size of the KV cache: its share of requests of the longest kind, in tokens."""
        blocks = self._blocks()
        return None if blocks is None else int(blocks / math.ceil(max_model_len / self.block_size) * max_model_len)

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
    if config.engine_word("--quantization") or config.engine_word("-q"):
        return None
    if kv_dtype not in (config.dtype, *_BYTES) and not kv_dtype.startswith(_KV_BYTE):
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


def is_coupled(config: ExperimentConfig, facts: ModelFacts | None) -> bool:
    """True where the replicas share out experts, and so must be coupled by vLLM. A model that cannot be read from
    here is taken for the mixture of experts that --enable-expert-parallel is meant for."""
    asked = {"--enable-expert-parallel", "-ep"} & {word.replace("_", "-") for word in config.engine_args}
    return bool(asked) and config.data_parallel_size > 1 and (facts is None or facts.is_moe)


def infeasible(
    config: ExperimentConfig,
    facts: ModelFacts | None,
    devices: Devices,
    devices_here: int | None = None,
    ray_gpus: int | None = None,
) -> str | None:
    """Why this setting cannot run here, in one line with the remedy; None when nothing speaks against it.
    `devices_here`: how many processes torchrun has started on this node. `ray_gpus`: what the Ray cluster has that
    will give out the devices."""
    return _devices_against_setting(config, devices, devices_here, ray_gpus) or _vllm_against_setting(
        config, facts, devices
    )


def _devices_against_setting(
    config: ExperimentConfig, devices: Devices, devices_here: int | None, ray_gpus: int | None
) -> str | None:
    lower = "lower --tensor-parallel-size, --pipeline-parallel-size or --data-parallel-size"
    if devices.kind == "gpu" and not devices.ids:
        return "CUDA_VISIBLE_DEVICES hides every GPU of this machine; unset it or name GPUs that are there"
    if config.distributed_executor_backend == "ray":
        if devices.kind == "cpu":
            return "--distributed-executor-backend ray is refused by vLLM on the CPU; use mp"
        # Nobody asks a cluster for a plan.
        short = ray_gpus is not None and config.num_devices > ray_gpus
        return f"TP x PP x DP is {config.num_devices}, the Ray cluster has {ray_gpus} GPUs; {lower}" if short else None
    if devices_here is not None:
        short = devices_here > len(devices)
        words = f"torchrun started {devices_here} processes on a node with {len(devices)} {devices.kind} devices"
        return words if short else None
    if config.devices_per_node > len(devices):
        kind = "GPUs" if devices.kind == "gpu" else "CPU devices (slices of the cores)"
        share = f", {config.devices_per_node} on each node" if config.nnodes > 1 else ""
        return f"TP x PP x DP is {config.num_devices} devices{share}, this machine has {len(devices)} {kind}; {lower}"
    return None


def _vllm_against_setting(config: ExperimentConfig, facts: ModelFacts | None, devices: Devices) -> str | None:
    """What vLLM or the model does not allow."""
    if devices.kind == "cpu" and config.enforce_eager and config.pipeline_parallel_size > 1:
        return "--enforce-eager with --pipeline-parallel-size on the CPU fails in vLLM; drop --enforce-eager"
    if devices.kind == "cpu" and is_coupled(config, facts):
        return "--enable-expert-parallel with --data-parallel-size on the CPU fails in vLLM; it needs GPUs"
    return None if facts is None else _model_against_setting(config, facts)


def _model_against_setting(config: ExperimentConfig, facts: ModelFacts) -> str | None:
    tp, pp = config.tensor_parallel_size, config.pipeline_parallel_size
    heads, kv_heads = facts.num_attention_heads, facts.num_kv_heads
    if heads and heads % tp:
        return f"--tensor-parallel-size {tp} does not divide the model's {heads} attention heads"
    if kv_heads and max(kv_heads, tp) % min(kv_heads, tp):
        return f"--tensor-parallel-size {tp} does not fit the model's {kv_heads} KV heads"
    if facts.num_layers and pp > facts.num_layers:
        return f"--pipeline-parallel-size {pp} is more stages than the model's {facts.num_layers} layers"
    return _length_against_model(config, facts.max_model_len)


def _length_against_model(config: ExperimentConfig, limit: int | None) -> str | None:
    # vLLM's own way to say: I know that the model was not trained for this.
    if limit is None or os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN") == "1":
        return None
    if config.max_model_len and config.max_model_len > limit:
        return f"--max-model-len {config.max_model_len} is over the model's {limit}; lower it"
    if config.longest_request > limit:
        return (
            f"--seq-lens {max(config.seq_lens)} plus --max-tokens {config.max_tokens} is {config.longest_request}, "
            f"over the model's {limit}; shorten the requests"
        )
    return None


def describe(
    config: ExperimentConfig, facts: ModelFacts | None, devices: Devices, memory_gib: float | None = None
) -> list[str]:
    """The plan of --dry-run, line by line. `memory_gib`: of one device, where it is known."""
    tp, pp, dp = config.tensor_parallel_size, config.pipeline_parallel_size, config.data_parallel_size
    points = list(config.points())
    reason = infeasible(config, facts, devices) or config.output_conflict
    words = {
        "setting": f"{config.setting_name}: TP {tp} x PP {pp} x DP {dp} = {config.num_devices} of {len(devices)} "
        f"{devices.kind} devices",
        "model": config.model,
        "grid": f"batch sizes {_words(config.batch_sizes)} x lengths {_words(config.seq_lens)}, "
        f"{config.max_tokens} output tokens: {len(points)} points, {config.runs_in_words} timed runs each",
        "file": str(config.output_path),
        "memory": _memory_words(config, memory_plan(config, facts, devices, memory_gib)),
        "vLLM": f"{' '.join(redact(config.engine_args))} (vLLM checks these when it starts)",
        "verdict": f"cannot run: {reason}" if reason else "can run",
    }
    if not config.engine_args:
        del words["vLLM"]
    return [line for name, text in words.items() for line in _wrapped(name, text)]


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(
        f"{name:<10}{text}", 80, subsequent_indent=" " * 10, break_long_words=False, break_on_hyphens=False
    )


def _memory_words(config: ExperimentConfig, memory: MemoryPlan | None) -> str:
    if memory is None:
        return SIZES_UNKNOWN
    kv_gib = memory.kv_bytes_per_token * max(config.batch_sizes) * config.longest_request / GIB
    needs = (
        f"about {memory.weights_gib:.3g} GiB weights per device, "
        f"{kv_gib:.3g} GiB KV cache per device for the largest point in one wave"
    )
    if memory.pool_gib is None:
        return needs
    if memory.pool_gib <= 0:
        return f"{needs}; the weights do not fit: {memory.weights_gib + memory.pool_gib:.3g} GiB are there for vLLM"
    waves = ", ".join(
        f"{memory.requests_in_one_wave(seq_len + config.max_tokens)} of length {seq_len}" for seq_len in config.seq_lens
    )
    return f"{needs}; {memory.pool_gib:.3g} GiB are there for it; requests that fit in one wave: {waves}"


def _words(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
