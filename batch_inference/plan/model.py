"""The sizes of a model, from its config.json alone: no weights, no installed package."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.files import read_regular
from batch_inference.core.text import in_short
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
# Other values of vLLM's --kv-cache-dtype that begin with this take a byte; the size of the rest is unknown.
KV_BYTE = ("fp8", "int8")
_LARGEST_SIZE = 2**40
# vLLM takes the smallest of them; `model_max_length` overrides them.
_LENGTH_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions",
    "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
# vLLM's own names for the number of experts, and the names for checkpoints that give it layer by layer.
_EXPERTS = (
    "num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts", "num_experts_per_layer",
    "layers_num_experts", "num_routed_experts", "moe_num_routed_experts", "num_moe_experts",
)  # fmt: skip
# Where a multimodal model keeps the sizes of its language model.
_OTHER_PARTS = ("vision_config", "audio_config", "quantization_config", "compression_config")
_QUANTIZED = ("quantization_config", "compression_config")
# The file of ModelOpt's older checkpoints.
_QUANTIZED_FILE = "hf_quant_config.json"
_UNNAMED = "in a way that it does not name"


@dataclass(frozen=True)
class Quantization:
    """The quantization, as a checkpoint states it."""

    method: str  # in vLLM's words
    group_size: int | None
    cache_too: bool  # the KV cache has its own type


@dataclass(frozen=True)
class ModelFacts:
    """Sizes read from a model's config.json; None if it does not state them under the usual names."""

    num_layers: int | None
    num_attention_heads: int | None
    num_kv_heads: int | None
    vocab_size: int | None
    max_model_len: int | None
    is_moe: bool
    dtype: str
    architecture: str | None = None  # None unless there is exactly one
    words: Mapping[str, Any] = field(default_factory=dict)  # everything that config.json says about the language model
    has_more: bool = False  # than the language model, such as a vision part
    quantization: Quantization | None = None
    folder: Path | None = None

    def dtype_used(self, asked: str) -> str:
        """What vLLM makes of --dtype, in torch's names."""
        if asked == "auto":
            # vLLM runs a float32 checkpoint in 16 bits.
            asked = "bfloat16" if self.dtype in ("float32", "float") else self.dtype
        return {"half": "float16", "float": "float32"}.get(asked, asked)


def facts_of(config: ExperimentConfig) -> ModelFacts | None:
    """The facts of a setting's model, as vLLM's own flags change them; None if `why_unread` gives a reason.
    Raises ConfigError if it is not a model."""
    found = _facts_or_reason(config)
    return found if isinstance(found, ModelFacts) else None


def why_unread(config: ExperimentConfig) -> str | None:
    """Why a plan knows no facts about the model; None if it does. Raises ConfigError as `facts_of` does."""
    found = _facts_or_reason(config)
    return found if isinstance(found, str) else None


def _facts_or_reason(config: ExperimentConfig) -> ModelFacts | str:
    if reason := why_elsewhere(config):
        return reason
    try:
        overrides = hf_overrides(config.engine_args)
        facts = _read(config_source(config), source_flag(config), overrides)
    except NotFollowedError:
        return "only vLLM knows what --hf-overrides makes of this model"
    if kind_of(config.model) == "file":
        facts = dataclasses.replace(facts, quantization=Quantization("gguf", None, cache_too=False))
    longest_is_vllms = touches_rope(overrides) or prefers_params(config)
    # The weights in the model's folder do not match the sizes of a changed config.
    folder = None if overrides or kind_of(config.model) != "folder" else expanded(config.model)
    return dataclasses.replace(facts, folder=folder, max_model_len=None if longest_is_vllms else facts.max_model_len)


def read_model_facts(model: str) -> ModelFacts | None:
    """The facts of a model folder; None if it is not a folder. Raises ConfigError for a folder without a model."""
    return _read(model, "--model", {}) if kind_of(model) == "folder" else None


def _read(model: str, flag: str, overrides: dict[str, Any]) -> ModelFacts:
    folder = expanded(model)
    try:
        document = overridden(_object(json.loads(read_regular(folder / "config.json"))), overrides)
        # The sizes of the language model; multimodal models keep them separately.
        part = _object(document.get("text_config") or document)
        return dataclasses.replace(
            _facts_from(part),
            architecture=_architecture(document),
            has_more=part is not document or any(document.get(key) for key in _OTHER_PARTS[:2]),
            quantization=_quantization({**document, **part}, folder / _QUANTIZED_FILE),
            folder=folder,
        )
    except FileNotFoundError:
        raise ConfigError(f"{flag} {model}: it has no config.json; give the folder that holds one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{flag} {model}: config.json cannot be read ({error}); download the model again") from error


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    return value


def _architecture(document: dict[str, Any]) -> str | None:
    names = document.get("architectures")
    return in_short(str(names[0])) if isinstance(names, list) and len(names) == 1 else None


def _quantization(document: dict[str, Any], beside: Path) -> Quantization | None:
    said: Any = next((document[key] for key in _QUANTIZED if document.get(key) is not None), None)
    said = _quantization_beside(beside) if said is None else said
    if said is None:
        return None
    said = said if isinstance(said, dict) else {}
    inner = said.get("quantization")
    inner = inner if isinstance(inner, dict) else {}
    algorithm = "modelopt" if str(inner.get("quant_algo", "")).upper().startswith("FP8") else inner.get("quant_algo")
    method = in_short(str(said.get("quant_method") or algorithm or _UNNAMED)).lower().replace("_", "-")
    cache_too = any(part.get(key) for part in (said, inner) for key in ("kv_cache_scheme", "kv_cache_quant_algo"))
    group_size = said.get("group_size")
    return Quantization(method, group_size if type(group_size) is int else None, cache_too)


def _quantization_beside(path: Path) -> Any:
    """None if there is no such file. An unreadable one counts as empty."""
    try:
        return json.loads(read_regular(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}


def _counts_experts(value: object, key: str = "") -> bool:
    """True if a number of experts appears anywhere in it: vLLM looks into lists and nested blocks too."""
    if isinstance(value, dict):
        return any(_counts_experts(inner, name) for name, inner in value.items() if name not in _OTHER_PARTS)
    if isinstance(value, list):
        return any(_counts_experts(inner, key) for inner in value)
    return key in _EXPERTS and is_size(value)


def is_size(value: object) -> bool:
    """Other values, like 0 experts in a dense model or -1 for no limit, mean that there is none."""
    return type(value) is int and 1 <= value <= _LARGEST_SIZE


def _facts_from(document: dict[str, Any]) -> ModelFacts:
    def number(*keys: str) -> int | None:
        return next((document[key] for key in keys if is_size(document.get(key))), None)

    shortest = min((document[key] for key in _LENGTH_KEYS if is_size(document.get(key))), default=None)
    heads = number("num_attention_heads", "n_head")
    return ModelFacts(
        num_layers=number("num_hidden_layers", "n_layer"),
        num_attention_heads=heads,
        num_kv_heads=number("num_key_value_heads") or heads,
        vocab_size=number("vocab_size"),
        max_model_len=None if _scales_positions(document) else number("model_max_length") or shortest,
        is_moe=_counts_experts(document),
        dtype=str(document.get("dtype") or document.get("torch_dtype") or "bfloat16"),
        words=document,
    )


def _scales_positions(document: dict[str, Any]) -> bool:
    """True if rope scaling stretches the length by rules that only vLLM knows."""
    scaling = document.get("rope_scaling") or document.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        return True
    # Some models have one set of them for each kind of layer.
    return any(_stretches(one) for one in (scaling, *scaling.values()) if isinstance(one, dict))


def _stretches(scaling: dict[str, Any]) -> bool:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return kind != "llama3" and (kind not in ("default", "mrope") or "factor" in scaling)
