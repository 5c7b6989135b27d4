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

_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}
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
    dtype: str

    def weights_gib(self, tensor_parallel_size: int, pipeline_parallel_size: int, dtype: str) -> float | None:
        """Weights of the fullest device of a dense Llama-like model: its share of the layers plus one embedding."""
        sizes = (self.num_layers, self.hidden_size, self.intermediate_size, self.vocab_size, self.num_attention_heads)
        if self.is_moe or self.head_dim is None or self.num_kv_heads is None or None in sizes:
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
        """KV-cache bytes of one token on one device."""
        if self.num_kv_heads is None or self.head_dim is None or self.num_layers is None:
            return None
        kv_heads = max(1, self.num_kv_heads / tensor_parallel_size)
        return 2 * math.ceil(self.num_layers / pipeline_parallel_size) * kv_heads * self.head_dim * self._bytes(dtype)

    def _bytes(self, dtype: str) -> int:
        return _BYTES.get(self.dtype if dtype == "auto" else dtype, 2)


def is_local(model: str) -> bool:
    """A folder, or written like one; anything else is a hub name such as org/name."""
    return Path(model).exists() or model.startswith(("/", "./", "../", "~")) or model.count("/") != 1


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
    except FileNotFoundError:
        raise ConfigError(f"--model {model}: it has no config.json; give the folder that holds one") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {model}: config.json cannot be read ({error}); fetch the model again") from error
    if not isinstance(document, dict):
        raise ConfigError(f"--model {model}: config.json is not an object; fetch the model again")
    return _facts_from(document.get("text_config") or document)


def _facts_from(document: dict[str, Any]) -> ModelFacts:
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
        dtype=str(document.get("dtype") or document.get("torch_dtype") or "bfloat16"),
    )


def _scales_positions(document: dict[str, Any]) -> bool:
    """True where rope scaling stretches the length by rules that only vLLM knows."""
    scaling = document.get("rope_scaling") or {}
    return scaling.get("rope_type", scaling.get("type", "default")) not in ("default", "llama3", "mrope")


def infeasible(config: ExperimentConfig, facts: ModelFacts | None, devices: Devices) -> str | None:
    """Why this setting cannot run here, in one line with the remedy; None when nothing speaks against it."""
    if config.num_devices > len(devices):
        kind = "GPUs" if devices.kind == "gpu" else "CPU devices (slices of the cores)"
        return (
            f"TP x PP x DP is {config.num_devices} devices, this machine has {len(devices)} {kind}; "
            "lower --tensor-parallel-size, --pipeline-parallel-size or --data-parallel-size"
        )
    if devices.kind == "cpu" and config.enforce_eager and config.pipeline_parallel_size > 1:
        return "--enforce-eager with --pipeline-parallel-size on the CPU fails in vLLM; drop --enforce-eager"
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


def describe(config: ExperimentConfig, facts: ModelFacts | None, devices: Devices) -> list[str]:
    """The plan of --dry-run, line by line."""
    tp, pp, dp = config.tensor_parallel_size, config.pipeline_parallel_size, config.data_parallel_size
    points = list(config.points())
    reason = infeasible(config, facts, devices)
    words = {
        "setting": f"{config.setting_name}: TP {tp} x PP {pp} x DP {dp} = {config.num_devices} of {len(devices)} "
        f"{devices.kind} devices",
        "model": config.model,
        "grid": f"batch sizes {_words(config.batch_sizes)} x lengths {_words(config.seq_lens)}, "
        f"{config.max_tokens} output tokens: {len(points)} points, {config.num_runs} timed runs each",
        "file": str(config.output_path),
        "memory": _memory_words(config, facts),
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


def _memory_words(config: ExperimentConfig, facts: ModelFacts | None) -> str:
    sizes = (config.tensor_parallel_size, config.pipeline_parallel_size, config.dtype)
    weights = facts.weights_gib(*sizes) if facts else None
    per_token = facts.kv_bytes_per_token(*sizes) if facts else None
    if weights is None or per_token is None:
        return "unknown: the model's sizes cannot be read from here"
    kv_gib = per_token * max(config.batch_sizes) * config.longest_request / GIB
    return (
        f"about {weights:.3g} GiB weights per device, "
        f"{kv_gib:.3g} GiB KV cache per device for the largest point in one wave"
    )


def _words(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
