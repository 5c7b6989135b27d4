"""Shapes that models of today have, on a real vLLM engine: small copies of published ones, measured to the end. What a
plan says of each is held against what the engine has."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from test_real_vllm import measure

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.installed_vllm import release_of, vllm_version
from batch_inference.plan.by_vllm import LIMIT_VARIABLE, ask_vllm
from batch_inference.plan.devices import GIB, find_devices
from batch_inference.plan.model import facts_of
from benchmarks.plan_truth import FOLDER
from conftest import REPOSITORY

pytestmark = pytest.mark.vllm

RELEASE = release_of(vllm_version()) or (0, 0)
ATTENTION = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
SMALL = {**ATTENTION, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512, "eos_token_id": 2}
EXPERTS = {"moe_intermediate_size": 128, "num_experts_per_tok": 2}
WINDOW = 64  # tokens: shorter than a prompt
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {**SMALL, **EXPERTS, "num_experts": 8},
    # MLA: what is kept of a token has no heads.
    "deepseek-v2-lite": {**SMALL, **EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 8},
    # Every other layer sees a window.
    "gemma-2-9b": {**SMALL, "num_hidden_layers": 4, "query_pre_attn_scalar": 64, "sliding_window": WINDOW},
    # Layers that keep a state, beside layers of attention.
    "falcon-h1-7b": {**SMALL, "mamba_d_ssm": 256, "mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 64},
    "gemma-3-27b": {
        "image_token_index": 510, "boi_token_index": 508, "eoi_token_index": 509, "eos_token_id": [2],
        "mm_tokens_per_image": 16,
        "text_config": {**SMALL, "query_pre_attn_scalar": 64, "sliding_window": WINDOW},
        "vision_config": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2,
                          "num_hidden_layers": 1, "image_size": 112},
    },
}  # fmt: skip
SEQ_LENS = (16, 200)


def small_copy(name: str, folder: Path) -> None:
    document = json.loads((FOLDER / name / "config.json").read_text())
    for key, value in SHAPES[name].items():
        document[key] = {**document[key], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(document))


def path_to_torchvision() -> dict[str, str]:
    """vLLM wants it for whatever sees, and takes a stand-in on text."""
    there = importlib.util.find_spec("torchvision") is not None
    return {} if there else {"PYTHONPATH": str(REPOSITORY / "tests" / "stand_ins")}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_of_today_is_planned_and_measured(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "sliding_window" in str(SHAPES[name]) and RELEASE < (0, 29) and find_devices().kind == "cpu":
        pytest.skip("before 0.29 vLLM's kernel for the CPU ends at sliding windows (cpu_attn.cpp, block_size)")
    if name == "deepseek-v2-lite" and RELEASE < (0, 29) and find_devices().kind == "cpu":
        pytest.skip("before 0.29 vLLM's engine with MLA does not start on a CPU (an import from its fa_utils fails)")
    monkeypatch.delenv(LIMIT_VARIABLE)
    small_copy(name, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    lengths = ("--seq-lens", ",".join(map(str, SEQ_LENS)))
    document = measure(tmp_path, "--model", str(tmp_path), "--enforce-eager", *lengths, **path_to_torchvision())
    assert document["status"] == "complete"
    assert [point["status"] for point in document["points"]] == ["ok"] * 4
    engine = document["engine"]
    sees = name == "gemma-3-27b"
    # Before 0.31 its ModelConfig does not say that the tokenizer is not needed.
    skips = not sees or RELEASE >= (0, 31)
    assert (engine["language_model_only"], engine["skip_tokenizer_init"]) == (True if sees else None, skips)

    words = ("--load-format", "dummy", "--kv-cache-memory-bytes", "67108864")
    config = ExperimentConfig(
        model=str(tmp_path), batch_sizes=(1, 3), seq_lens=SEQ_LENS, max_tokens=9, enforce_eager=True, engine_args=words
    )
    asked: list[str] = []
    (said,) = ask_vllm([(config, facts_of(config), None)], find_devices(), asked.append)
    # Where no formula tells that the model fits, the script has asked the same, and the answer is kept.
    assert bool(asked) == (name == "qwen3-30b-a3b")
    assert said is not None
    assert (said.refusal, said.unknown) == (None, None)
    copies_gib = 2 * 2 * 512 * 4 * (128 + 128) / GIB if name == "deepseek-v2-lite" else 0  # of MLA's, in 16 bits
    assert engine["weights_gib"] == pytest.approx((said.weights_gib or 0) + copies_gib, rel=1e-3)
    assert engine["kv_cache_tokens"] == pytest.approx(said.kv_cache_tokens, rel=1e-3)
