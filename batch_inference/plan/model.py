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
# Of vLLM's --kv-cache-dtype, beside the above, those that begin so take a byte; of others the size is not known.
KV_BYTE = ("fp8", "int8")
_LARGEST_SIZE = 2**40
# vLLM takes the smallest of them; `model_max_length` stands above them.
_LENGTH_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions",
    "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
# vLLM's own names for the number of experts, and those in which checkpoints say it layer by layer.
_EXPERTS = (
    "num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts", "num_experts_per_layer",
    "layers_num_experts", "num_routed_experts", "moe_num_routed_experts", "num_moe_experts",
)  # fmt: skip
# Where a model of another kind says its own sizes.
_OTHER_PARTS = ("vision_config", "audio_config", "quantization_config", "compression_config")
_QUANTIZED = ("quantization_config", "compression_config")
# ModelOpt's, of its older checkpoints.
_QUANTIZED_FILE = "hf_quant_config.json"
_UNNAMED = "in a way that it does not name"


@dataclass(frozen=True)
class Quantization:
    """As a checkpoint says it."""

    method: str  # in vLLM's words
    group_size: int | None
    cache_too: bool  # it has a type for keys and values


@dataclass(frozen=True)
class ModelFacts:
    """Sizes read from a model's config.json; None where the architecture does not say it in the usual words."""

    num_layers: int | None
    num_attention_heads: int | None
    num_kv_heads: int | None
    vocab_size: int | None
    max_model_len: int | None
    is_moe: bool
    dtype: str
    architecture: str | None = None  # None where there is not exactly one
    words: Mapping[str, Any] = field(default_factory=dict)  # all that config.json says of the language model
    has_more: bool = False  # than the language model, such as one that sees
    quantization: Quantization | None = None
    folder: Path | None = None

    def dtype_used(self, asked: str) -> str:
        """What vLLM makes of --dtype, in torch's words."""
        if asked == "auto":
            # vLLM runs a float32 checkpoint in 16 bits.
            asked = "bfloat16" if self.dtype in ("float32", "float") else self.dtype
        return {"half": "float16", "float": "float32"}.get(asked, asked)


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
    if kind_of(config.model) == "file":
        facts = dataclasses.replace(facts, quantization=Quantization("gguf", None, cache_too=False))
    longest_is_vllms = touches_rope(overrides) or prefers_params(config)
    # Weights lie in the folder of the model, and are of other sizes than a config that is changed.
    folder = None if overrides or kind_of(config.model) != "folder" else expanded(config.model)
    return dataclasses.replace(facts, folder=folder, max_model_len=None if longest_is_vllms else facts.max_model_len)


def read_model_facts(model: str) -> ModelFacts | None:
    """The facts of a model folder; None for what is no folder. Raises ConfigError for a folder that is no model."""
    return _read(model, "--model", {}) if kind_of(model) == "folder" else None


def _read(model: str, flag: str, overrides: dict[str, Any]) -> ModelFacts:
    folder = expanded(model)
    try:
        document = overridden(_object(json.loads(read_regular(folder / "config.json"))), overrides)
        # The sizes of the language model; those with vision keep them apart.
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
        raise ConfigError(f"{flag} {model}: config.json cannot be read ({error}); fetch the model again") from error


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
    """None where there is no such file. One that cannot be read says as much as an empty one."""
    try:
        return json.loads(read_regular(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}


def _counts_experts(value: object, key: str = "") -> bool:
    """True where a number of experts is said anywhere in it: vLLM looks into lists and nested blocks too."""
    if isinstance(value, dict):
        return any(_counts_experts(inner, name) for name, inner in value.items() if name not in _OTHER_PARTS)
    if isinstance(value, list):
        return any(_counts_experts(inner, key) for inner in value)
    return key in _EXPERTS and is_size(value)


def is_size(value: object) -> bool:
    """Others, like 0 experts of a dense model or -1 for no limit, say that there is none."""
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
    """True where rope scaling stretches the length by rules that only vLLM knows."""
    scaling = document.get("rope_scaling") or document.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        return True
    # Some have a set of them for each kind of layer.
    return any(_stretches(one) for one in (scaling, *scaling.values()) if isinstance(one, dict))


def _stretches(scaling: dict[str, Any]) -> bool:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return kind != "llama3" and (kind not in ("default", "mrope") or "factor" in scaling)
