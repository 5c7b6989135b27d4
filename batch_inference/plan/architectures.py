"""The architectures that the formulas know: what such a model holds in vLLM, in numbers of parameters.

Each was compared with vLLM's own sizes (docs/plan_truth.md). A name that is not in `ARCHITECTURES`,
or a config.json without what a formula needs, is unknown: nothing is borrowed from another architecture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from batch_inference.plan.model import ModelFacts, is_size
from batch_inference.plan.parts import Parts, UnknownError

# vLLM pads a vocabulary to a multiple of this before it is shared out.
_VOCABULARY_STEP = 64
# If one of these is set, layers differ in what they keep, or do not keep the keys and values of all heads.
_NO_PLAIN_CACHE = (
    "sliding_window_pattern", "interleaved_sliding_window", "attention_chunk_size", "kv_lora_rank", "block_configs",
    "attn_layer_indices", "full_attention_interval", "full_attn_idxs", "hybrid_override_pattern", "layers_block_type",
    "num_kv_shared_layers", "mamba_d_state", "ssm_state_size", "linear_num_key_heads", "per_layer_config",
)  # fmt: skip


@dataclass(frozen=True)
class Said:
    """What config.json says under this name; `default`: the architecture's own value if it says nothing."""

    key: str
    default: bool


@dataclass(frozen=True)
class Architecture:
    """How an architecture differs from a Llama."""

    mlp_matrices: int = 3  # gate, up and down; 2 without a gate
    norms: int = 2  # vectors as long as a hidden state, per layer, and their biases
    final_norms: int = 1
    head_norms: bool = False  # of queries and of keys, as long as a head
    qkv_bias: bool | Said = False
    out_bias: bool | Said = False
    mlp_bias: bool | Said = False
    vocabulary_bias: bool = False
    tied: bool = False  # if tie_word_embeddings is missing
    # vLLM puts embedding and output head on the first and last stage, or on every stage; "unknown": versions differ
    vocabulary_on: Literal["ends", "every stage", "unknown"] = "ends"
    kv_heads: Literal["said", "said-or-all", "all", "one"] = "said"
    head_dim: Literal["said", "said-or-split", "split"] = "split"
    intermediate: tuple[str, ...] = ("intermediate_size",)
    intermediate_factor: int | None = None  # times the hidden size, if config.json does not say it
    experts: str | None = None  # the key that holds their number
    expert_size: str = "intermediate_size"
    spare_positions: int | None = None  # learned positions are held, plus this many
    plain_cache: bool = True  # False if the class has sliding windows that config.json need not mention
    window_default: bool = False  # a missing sliding_window means there is one
    only: Mapping[str, Any] = field(default_factory=dict)  # what must have this value, or be missing


_LLAMA = Architecture(
    qkv_bias=Said("attention_bias", False),
    out_bias=Said("attention_bias", False),
    mlp_bias=Said("mlp_bias", False),
    kv_heads="said-or-all",
    head_dim="said-or-split",
)
# Its classes have no separate output head, whatever config.json says.
_GEMMA = Architecture(tied=True, vocabulary_on="every stage", head_dim="said", only={"tie_word_embeddings": True})
_GEMMA_2 = dataclasses.replace(
    _GEMMA,
    norms=4,
    qkv_bias=Said("attention_bias", False),
    out_bias=Said("attention_bias", False),
    plain_cache=False,
)
_COHERE = Architecture(
    norms=1,
    tied=True,
    vocabulary_on="every stage",
    kv_heads="said-or-all",
    head_dim="said-or-split",
    only={"use_qk_norm": False, "tie_word_embeddings": True},
)
# LayerNorms with biases, an MLP without a gate, biases everywhere.
_GPT = Architecture(
    mlp_matrices=2,
    norms=4,
    final_norms=2,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    tied=True,
    vocabulary_on="every stage",
    kv_heads="all",
    intermediate=("intermediate_size", "n_inner"),
    intermediate_factor=4,
)

ARCHITECTURES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": Architecture(head_dim="said-or-split", window_default=True),
    "Phi3ForCausalLM": Architecture(kv_heads="said-or-all", head_dim="said-or-split"),
    "Qwen2ForCausalLM": Architecture(qkv_bias=True, only={"qk_norm": False}),
    "Qwen3ForCausalLM": Architecture(head_norms=True, qkv_bias=Said("attention_bias", False), head_dim="said"),
    "Glm4ForCausalLM": Architecture(norms=4, qkv_bias=Said("attention_bias", True), head_dim="said"),
    "ChatGLMModel": Architecture(
        qkv_bias=Said("add_qkv_bias", False),
        vocabulary_on="every stage",
        intermediate=("ffn_hidden_size",),
        only={"multi_query_attention": True, "add_bias_linear": False},
    ),
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": _GEMMA_2,
    "Gemma3ForCausalLM": dataclasses.replace(_GEMMA_2, head_norms=True),
    "CohereForCausalLM": _COHERE,
    "Cohere2ForCausalLM": dataclasses.replace(_COHERE, plain_cache=False),
    "GPT2LMHeadModel": dataclasses.replace(_GPT, spare_positions=0),
    "OPTForCausalLM": dataclasses.replace(
        _GPT,
        intermediate=("ffn_dim",),
        intermediate_factor=None,
        spare_positions=2,
        only={"enable_bias": True, "do_layer_norm_before": True, "layer_norm_elementwise_affine": True},
    ),
    "BloomForCausalLM": dataclasses.replace(_GPT, final_norms=4),
    "GPTNeoXForCausalLM": dataclasses.replace(
        _GPT,
        tied=False,
        vocabulary_on="unknown",
        intermediate_factor=None,
        qkv_bias=Said("attention_bias", True),
        out_bias=Said("attention_bias", True),
    ),
    "PhiForCausalLM": dataclasses.replace(
        _GPT,
        norms=2,
        tied=False,
        vocabulary_bias=True,
        vocabulary_on="unknown",
        kv_heads="said-or-all",
        intermediate_factor=None,
        only={"qk_layernorm": False},
    ),
    "Starcoder2ForCausalLM": dataclasses.replace(
        _GPT,
        qkv_bias=Said("use_bias", True),
        out_bias=Said("use_bias", True),
        mlp_bias=Said("use_bias", True),
        kv_heads="said",
        intermediate_factor=None,
        only={"tie_word_embeddings": True},
    ),
    # Only the first kind of Falcon: one KV head, and one norm for attention and MLP.
    "FalconForCausalLM": dataclasses.replace(
        _GPT,
        norms=2,
        qkv_bias=Said("bias", False),
        out_bias=Said("bias", False),
        mlp_bias=Said("bias", False),
        kv_heads="one",
        intermediate=("ffn_hidden_size",),
        only={"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    ),
    "MixtralForCausalLM": Architecture(
        vocabulary_on="every stage", head_dim="said-or-split", experts="num_local_experts"
    ),
    "Qwen3MoeForCausalLM": Architecture(
        head_norms=True,
        qkv_bias=Said("attention_bias", False),
        vocabulary_on="every stage",
        head_dim="said",
        experts="num_experts",
        expert_size="moe_intermediate_size",
        only={"decoder_sparse_step": 1, "mlp_only_layers": [], "shared_expert_intermediate_size": 0},
    ),
}


def parts_of(facts: ModelFacts) -> Parts:
    """The model in parameters. Raises UnknownError."""
    name = facts.architecture
    known = ARCHITECTURES.get(name or "")
    if known is None:
        raise UnknownError(f"the formulas do not know the architecture {name or 'of a model that names none'}")
    for key, needed in known.only.items():
        if facts.words.get(key) not in (None, needed):
            raise UnknownError(f"the formulas know {name} only with {key} {needed}")
    if facts.has_more:
        raise UnknownError(f"the formulas know {name} only as a model for text alone")
    if facts.is_moe and known.experts is None:
        raise UnknownError(f"the formulas know {name} only without experts")
    return _parts(known, facts.words)


def split_size(facts: ModelFacts, *, whole_experts: bool) -> int | None:
    """The size in an MLP that is divided equally among the ranks of TP; None if unknown, and if experts are not
    split."""
    known = ARCHITECTURES.get(facts.architecture or "")
    if known is None or (known.experts and whole_experts):
        return None
    keys = (known.expert_size,) if known.experts else known.intermediate
    return next((facts.words[key] for key in keys if is_size(facts.words.get(key))), None)


def padded_vocabulary(facts: ModelFacts) -> int | None:
    """The size that vLLM divides among the ranks of TP; None for an unknown architecture."""
    is_known = facts.architecture in ARCHITECTURES
    return _padded(facts.vocab_size) if is_known and facts.vocab_size else None


def check_cache(facts: ModelFacts) -> None:
    """Raises UnknownError unless every layer keeps keys and values of all tokens. The architecture must be known."""
    known, words = ARCHITECTURES[facts.architecture or ""], facts.words
    said = [key for key in _NO_PLAIN_CACHE if words.get(key)]
    # Qwen's windows have their own switch.
    if words.get("use_sliding_window", True) and words.get("sliding_window", known.window_default):
        said.append("sliding_window")
    kinds = words.get("layer_types")
    if kinds and (not isinstance(kinds, list) or set(map(str, kinds)) != {"full_attention"}):
        said.append("layer_types")
    if not known.plain_cache:
        said.append("sliding windows")
    if said:
        raise UnknownError(f"not every layer of {facts.architecture} keeps all tokens ({said[0]})")


def _parts(known: Architecture, words: Mapping[str, Any]) -> Parts:
    layers = _size(words, "num_hidden_layers", "n_layer", "num_layers")
    hidden = _size(words, "hidden_size", "n_embd", "n_embed")
    heads = _size(words, "num_attention_heads", "n_head")
    kv_heads = _kv_heads(known, words, heads)
    head_dim = _head_dim(known, words, hidden // heads)
    vocabulary = _padded(_size(words, "padded_vocab_size", "vocab_size")) * hidden
    is_tied = words.get("tie_word_embeddings")
    queries, keys = heads * head_dim, kv_heads * head_dim
    mlp_split, mlp_whole, experts = _mlp(known, words, hidden)
    qkv_bias, out_bias = _has(known.qkv_bias, words), _has(known.out_bias, words)
    return Parts(
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        split=(2 * hidden + qkv_bias) * queries + mlp_split,
        kv=2 * (hidden + qkv_bias) * keys,
        experts=experts,
        whole=(known.norms + out_bias) * hidden + 2 * head_dim * known.head_norms + mlp_whole,
        embedding=vocabulary,
        head=0
        if (known.tied if is_tied is None else is_tied)
        else vocabulary + known.vocabulary_bias * vocabulary // hidden,
        beside=known.final_norms * hidden + _positions(known, words) * hidden,
        num_experts=_size(words, known.experts) if known.experts else 0,
        vocabulary_on=known.vocabulary_on,
    )


def _mlp(known: Architecture, words: Mapping[str, Any], hidden: int) -> tuple[int, int, int]:
    """Parameters that are split, that are on each rank, and of all experts."""
    if known.experts:
        number = _size(words, known.experts)
        return 0, hidden * number, number * known.mlp_matrices * hidden * _size(words, known.expert_size)
    own = known.intermediate_factor and known.intermediate_factor * hidden
    intermediate = _size(words, *known.intermediate, otherwise=own)
    has_bias = _has(known.mlp_bias, words)
    return (known.mlp_matrices * hidden + (known.mlp_matrices - 1) * has_bias) * intermediate, has_bias * hidden, 0


def _kv_heads(known: Architecture, words: Mapping[str, Any], heads: int) -> int:
    if known.kv_heads == "one":
        return 1
    if known.kv_heads == "all":
        return heads
    otherwise = heads if known.kv_heads == "said-or-all" else None
    return _size(words, "num_key_value_heads", "multi_query_group_num", otherwise=otherwise)


def _head_dim(known: Architecture, words: Mapping[str, Any], split: int) -> int:
    keys = () if known.head_dim == "split" else ("head_dim",)
    return _size(words, *keys, otherwise=None if known.head_dim == "said" else split)


def _positions(known: Architecture, words: Mapping[str, Any]) -> int:
    if known.spare_positions is None:
        return 0
    return _size(words, "max_position_embeddings", "n_positions") + known.spare_positions


def _padded(vocabulary: int) -> int:
    return -(-vocabulary // _VOCABULARY_STEP) * _VOCABULARY_STEP


def _has(said: bool | Said, words: Mapping[str, Any]) -> bool:
    if isinstance(said, bool):
        return said
    value = words.get(said.key)
    return said.default if value is None else bool(value)


def _size(words: Mapping[str, Any], *keys: str, otherwise: int | None = None) -> int:
    """Raises UnknownError if config.json does not say it."""
    found = next((words[key] for key in keys if is_size(words.get(key))), otherwise)
    if not found:
        raise UnknownError(f"config.json does not say {keys[0] if keys else 'how large a head is'}")
    return found
