"""The sizes of a model, from its config.json alone: no weights, no installed package."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.files import read_regular
from batch_inference.plan.devices import GIB
from batch_inference.plan.model_place import (
    config_source,
    expanded,
    kind_of,
    prefers_params,
    source_flag,
    why_elsewhere,
)
from batch_inference.plan.overrides import NotFollowedError, hf_overrides, overridden, touches_rope

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Of vLLM's --kv-cache-dtype, beside the above, those that begin so take a byte; of others the size is not known.
KV_BYTE = ("fp8", "int8")
_LARGEST_SIZE = 2**40
# vLLM takes the smallest of them; `model_max_length` stands above them.
_LENGTH_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions",
    "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
_QUANTIZED_BY = {"quantization_config", "compression_config"}
_QUANTIZING_LOADS = ("bitsandbytes", "gguf")


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
        size = 1 if dtype.startswith(KV_BYTE) else self._bytes(dtype)
        return 2 * math.ceil(self.num_layers / pipeline_parallel_size) * kv_heads * self.head_dim * size

    def dtype_used(self, asked: str) -> str:
        """What vLLM makes of --dtype, in torch's words."""
        if asked == "auto":
            # vLLM runs a float32 checkpoint in 16 bits.
            asked = "bfloat16" if self.dtype in ("float32", "float") else self.dtype
        return {"half": "float16", "float": "float32"}.get(asked, asked)

    def _bytes(self, dtype: str) -> int:
        return BYTES.get(self.dtype_used(dtype), 2)


def facts_of(config: ExperimentConfig) -> ModelFacts | None:
    """The facts of a setting's model, with what vLLM's own flags make of them; None where `why_unread` says why.
    Raises ConfigError for a model that is none."""
    found = _facts_or_reason(config)
    return found if isinstance(found, ModelFacts) else None


def why_unread(config: ExperimentConfig) -> str | None:
    """Why a plan knows no facts of the model; None where it does. Raises ConfigError as `facts_of` does."""
    found = _facts_or_reason(config)
    return found if isinstance(found, str) else None


def _facts_or_reason(config: ExperimentConfig) -> ModelFacts | str:
    if reason := why_elsewhere(config):
        return reason
    try:
        overrides = hf_overrides(config.engine_args)
        facts = _read(config_source(config), source_flag(config), overrides)
    except NotFollowedError:
        return "vLLM alone knows what --hf-overrides makes of this model"
    if config.engine_word("--load-format") in _QUANTIZING_LOADS or kind_of(config.model) == "file":
        facts = replace(facts, is_quantized=True)
    longest_is_vllms = touches_rope(overrides) or prefers_params(config)
    return replace(facts, max_model_len=None) if longest_is_vllms else facts


def read_model_facts(model: str) -> ModelFacts | None:
    """The facts of a model folder; None for what is no folder. Raises ConfigError for a folder that is no model."""
    return _read(model, "--model", {}) if kind_of(model) == "folder" else None


def _read(model: str, flag: str, overrides: dict[str, Any]) -> ModelFacts:
    folder = expanded(model)
    try:
        document = overridden(_object(json.loads(read_regular(folder / "config.json"))), overrides)
        # The sizes of the language model; those with vision keep them apart.
        part = _object(document.get("text_config") or document)
    except FileNotFoundError:
        raise ConfigError(f"{flag} {model}: it has no config.json; give the folder that holds one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{flag} {model}: config.json cannot be read ({error}); fetch the model again") from error
    # Older checkpoints of ModelOpt say it in a file of its own.
    is_quantized = bool(_QUANTIZED_BY & {**document, **part}.keys()) or (folder / "hf_quant_config.json").exists()
    return _facts_from(part, is_quantized=is_quantized)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    return value


def _is_size(value: object) -> bool:
    """Others, like 0 experts of a dense model or -1 for no limit, say that there is none."""
    return type(value) is int and 1 <= value <= _LARGEST_SIZE


def _facts_from(document: dict[str, Any], *, is_quantized: bool) -> ModelFacts:
    def number(*keys: str) -> int | None:
        return next((document[key] for key in keys if _is_size(document.get(key))), None)

    shortest = min((document[key] for key in _LENGTH_KEYS if _is_size(document.get(key))), default=None)
    heads, hidden = number("num_attention_heads", "n_head"), number("hidden_size", "n_embd")
    head_dim = number("head_dim") or (hidden // heads or None if hidden and heads else None)
    return ModelFacts(
        num_layers=number("num_hidden_layers", "n_layer"),
        num_attention_heads=heads,
        num_kv_heads=number("num_key_value_heads") or heads,
        hidden_size=hidden,
        head_dim=head_dim,
        intermediate_size=number("intermediate_size"),
        vocab_size=number("vocab_size"),
        max_model_len=None if _scales_positions(document) else number("model_max_length") or shortest,
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
    # Some have a set of them for each kind of layer.
    return any(_stretches(one) for one in (scaling, *scaling.values()) if isinstance(one, dict))


def _stretches(scaling: dict[str, Any]) -> bool:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return kind != "llama3" and (kind not in ("default", "mrope") or "factor" in scaling)
