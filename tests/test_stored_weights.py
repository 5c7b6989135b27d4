"""Weights that lie in a model's folder: their sizes by the headers of safetensors files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batch_inference.core.config import ExperimentConfig
from batch_inference.plan.devices import GIB, devices_elsewhere
from batch_inference.plan.memory import MemoryPlan, memory_plan
from batch_inference.plan.model import read_model_facts
from benchmarks.plan_truth import FOLDER, RIGHT, by_formula, settings, verdict

BYTES = {"F8_E4M3": 1, "F16": 2, "BF16": 2, "F32": 4, "I32": 4}
Named = tuple[str, str, tuple[int, ...]]


def write(path: Path, tensors: Iterable[Named]) -> None:
    """A file with a true header and a hole behind it, which takes no room."""
    header, end = {}, 0
    for name, dtype, shape in tensors:
        size = BYTES[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


def model(folder: Path, **changes: object) -> str:
    (folder / "config.json").write_text(json.dumps(changes))
    return str(folder)


def planned(folder: Path, tp: int = 1, **flags: Any) -> MemoryPlan:
    config = ExperimentConfig(model=str(folder), tensor_parallel_size=tp, **flags)
    return memory_plan(config, read_model_facts(str(folder)), devices_elsewhere(tp), 80.0)


# --- quantized models whose truth is known ------------------------------------------------------------------------


def awq(name: str, rows: int, columns: int) -> Iterator[Named]:
    yield f"{name}.qweight", "I32", (rows, columns // 8)
    yield f"{name}.qzeros", "I32", (rows // 128, columns // 8)
    yield f"{name}.scales", "F16", (rows // 128, columns)


def fp8_by_channel(name: str, rows: int, columns: int) -> Iterator[Named]:
    yield f"{name}.weight", "F8_E4M3", (columns, rows)
    yield f"{name}.weight_scale", "BF16", (columns, 1)


def fp8_by_block(name: str, rows: int, columns: int) -> Iterator[Named]:
    yield f"{name}.weight", "F8_E4M3", (columns, rows)
    yield f"{name}.weight_scale_inv", "F32", (-(-columns // 128), -(-rows // 128))


def decoder(config: dict[str, Any], matrix: Any, floats: str) -> Iterator[Named]:
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim") or hidden // heads
    number, inner = config.get("num_experts", 0), config.get("moe_intermediate_size") or config["intermediate_size"]
    yield "model.embed_tokens.weight", floats, (config["vocab_size"], hidden)
    yield "lm_head.weight", floats, (config["vocab_size"], hidden)
    yield "model.norm.weight", floats, (hidden,)
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}"
        yield f"{start}.input_layernorm.weight", floats, (hidden,)
        yield f"{start}.post_attention_layernorm.weight", floats, (hidden,)
        yield from matrix(f"{start}.self_attn.q_proj", hidden, heads * head)
        yield from matrix(f"{start}.self_attn.k_proj", hidden, kv_heads * head)
        yield from matrix(f"{start}.self_attn.v_proj", hidden, kv_heads * head)
        yield from matrix(f"{start}.self_attn.o_proj", heads * head, hidden)
        if number:
            yield f"{start}.mlp.gate.weight", floats, (number, hidden)
        for expert in range(number):
            yield from mlp(f"{start}.mlp.experts.{expert}", hidden, inner, matrix)
        if not number:
            yield from mlp(f"{start}.mlp", hidden, inner, matrix)


def mlp(start: str, hidden: int, inner: int, matrix: Any) -> Iterator[Named]:
    yield from matrix(f"{start}.gate_proj", hidden, inner)
    yield from matrix(f"{start}.up_proj", hidden, inner)
    yield from matrix(f"{start}.down_proj", inner, hidden)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "matrix", "floats"),
    [
        ("llama-3.1-8b-awq", awq, "F16"),
        ("llama-3.1-8b-fp8", fp8_by_channel, "BF16"),
        ("qwen3-30b-a3b-fp8", fp8_by_block, "BF16"),
    ],
)
def test_the_files_of_a_quantized_model_give_its_plan(tmp_path: Path, name: str, matrix: Any, floats: str) -> None:
    folder = tmp_path / name
    shutil.copytree(FOLDER / name, folder)
    tensors = list(decoder(json.loads((folder / "config.json").read_text()), matrix, floats))
    half = len(tensors) // 2
    write(folder / "model-1.safetensors", tensors[:half])
    write(folder / "model-2.safetensors", tensors[half:])

    def here(_folder: Path, tp: int, pp: int, tokens: list[int]) -> Any:
        return by_formula(folder, tp, pp, tokens)

    found = {(tp, pp): verdict(here, name, tp, pp, truth) for model, tp, pp, truth in settings() if model == name}
    assert len(found) == 6
    assert set(found.values()) == {RIGHT}, found


# --- which files, and what of them --------------------------------------------------------------------------------

LINEAR: Named = ("model.layers.0.mixer.weight", "BF16", (1024, 1024))
OF_ONE = 2 * 2**20


def test_the_files_of_a_model_that_no_formula_knows_are_its_weights_on_one_device(tmp_path: Path) -> None:
    model(tmp_path, architectures=["MambaForCausalLM"], num_hidden_layers=1, torch_dtype="bfloat16")
    write(tmp_path / "model.safetensors", [LINEAR])
    found = planned(tmp_path)
    assert (found.weights_gib, found.source) == (OF_ONE / GIB, "files")
    assert found.unknown == ("KV cache unknown: the formulas do not know the architecture MambaForCausalLM",)
    assert planned(tmp_path, dtype="float32").weights_gib == 2 * OF_ONE / GIB
    assert planned(tmp_path, data_parallel_size=2).weights_gib == OF_ONE / GIB
    # What is shared out, and what each rank holds, is not known.
    said = planned(tmp_path, tp=2).unknown[0]
    assert said.endswith("of 0.00195 GiB in its files a device holds at least 0.000977")
    assert planned(tmp_path, tp=2).weights_gib is None


@pytest.mark.parametrize(
    "extra",
    [
        ("model.layers.1.mixer.weight", "BF16", (4096, 1024)),  # behind the last layer
        ("mtp.layers.0.weight", "BF16", (4096, 1024)),
        ("model.layers.0.attn.bias", "F32", (1, 1, 1024, 1024)),  # a causal mask
        ("model.layers.0.rotary_emb.inv_freq", "F32", (4096,)),
        ("lm_head.weight", "BF16", (4096, 1024)),  # the embedding, written twice
    ],
)
def test_what_vllm_does_not_load_does_not_count(tmp_path: Path, extra: Named) -> None:
    model(tmp_path, architectures=["MambaForCausalLM"], num_hidden_layers=1, tie_word_embeddings=True)
    write(tmp_path / "model.safetensors", [LINEAR, extra])
    assert planned(tmp_path).weights_gib == OF_ONE / GIB


def test_of_several_files_those_of_the_index_count(tmp_path: Path) -> None:
    model(tmp_path, architectures=["MambaForCausalLM"])
    write(tmp_path / "a.safetensors", [LINEAR])
    write(tmp_path / "b.safetensors", [("other.weight", "BF16", (1024, 1024))])
    assert planned(tmp_path).weights_gib == 2 * OF_ONE / GIB
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {LINEAR[0]: "a.safetensors"}}))
    assert planned(tmp_path).weights_gib == OF_ONE / GIB
    index.write_text(json.dumps({"weight_map": {LINEAR[0]: "a.safetensors", "x": "c.safetensors"}}))
    assert "'c.safetensors' of model.safetensors.index.json is missing" in planned(tmp_path).unknown[0]
    for broken in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": []}}', "[" * 100_000):
        index.write_text(broken)
        assert planned(tmp_path).weights_gib is None


def test_a_tensor_in_two_files_is_counted_in_neither(tmp_path: Path) -> None:
    model(tmp_path, architectures=["MambaForCausalLM"])
    for name in ("a", "b"):
        write(tmp_path / f"{name}.safetensors", [LINEAR])
    assert "tensors of 'b.safetensors' are in another file too" in planned(tmp_path).unknown[0]


def test_a_file_that_has_changed_is_read_again(tmp_path: Path) -> None:
    model(tmp_path, architectures=["MambaForCausalLM"])
    for number in (1, 2):
        tensors: list[Named] = [(f"{part}.weight", "BF16", (1024, 1024)) for part in range(number)]
        write(tmp_path / "model.safetensors", tensors)
        assert planned(tmp_path).weights_gib == number * OF_ONE / GIB


def header(entry: object) -> bytes:
    text = json.dumps(entry).encode()
    return len(text).to_bytes(8, "little") + text + bytes(64)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        (2**40).to_bytes(8, "little") + b"{}",
        (5).to_bytes(8, "little") + b"[" * 5,
        (10**5).to_bytes(8, "little") + b"[" * 10**5,
        header([]),
        header({"a": 3}),
        header({"a": {"dtype": "F16", "shape": [4], "data_offsets": [0]}}),
        header({"a": {"dtype": "F16", "shape": ["x"], "data_offsets": [0, 8]}}),
        header({"a": {"dtype": "F16", "shape": [float("inf")], "data_offsets": [0, 8]}}),
        header({"a": {"dtype": "F16", "shape": [4], "data_offsets": [0, 10**9]}}),
        header({"a": {"dtype": "F16", "shape": [4], "data_offsets": [8, 0]}}),
        header({"a": {"dtype": "F16", "shape": [10**30], "data_offsets": [0, 8]}}),
        header({"a": {"dtype": "F16", "shape": [-4], "data_offsets": [0, 8]}}),
    ],
)
def test_what_is_no_safetensors_file_is_unknown_and_named(tmp_path: Path, content: bytes) -> None:
    model(tmp_path, architectures=["MambaForCausalLM"])
    (tmp_path / "model.safetensors").write_bytes(content)
    found = planned(tmp_path)
    assert found.weights_gib is None
    assert found.unknown[0].startswith("weights unknown: 'model.safetensors' cannot be read as safetensors (")


def test_a_pipe_of_that_name_is_not_waited_for(tmp_path: Path) -> None:
    model(tmp_path, architectures=["MambaForCausalLM"])
    os.mkfifo(tmp_path / "model.safetensors")
    assert "it is not a regular file" in planned(tmp_path).unknown[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision_config": {}, "text_config": {"hidden_size": 8}}, "which parts of its files it holds"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized (bitsandbytes): its sizes in vLLM"),
        ({"quantization_config": {"quant_method": "gptq", "group_size": 32}}, "quantized (gptq): its sizes in vLLM"),
    ],
)
def test_files_that_do_not_say_what_vllm_holds_are_not_counted(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    model(tmp_path, architectures=["MambaForCausalLM"], **changes)
    write(tmp_path / "model.safetensors", [LINEAR])
    assert said in planned(tmp_path).unknown[0]
    assert planned(tmp_path).weights_gib is None


def test_weights_in_mistrals_format_beside_others_are_unknown(tmp_path: Path) -> None:
    model(tmp_path, architectures=["MambaForCausalLM"])
    write(tmp_path / "consolidated.safetensors", [LINEAR])
    assert "the folder holds weights in Mistral's format" in planned(tmp_path).unknown[0]


def test_files_with_other_tensors_than_the_formulas_know_are_unknown(tmp_path: Path) -> None:
    name = "llama-3.1-8b-awq"
    shutil.copy(FOLDER / name / "config.json", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    whole = list(decoder(config, awq, "F16"))
    for missing in ("lm_head", "embed_tokens", "layers.31."):
        write(tmp_path / "model.safetensors", [tensor for tensor in whole if missing not in tensor[0]])
        assert "other tensors than the formulas expect" in planned(tmp_path).unknown[0]
    # One layer is not quantized.
    mixed = [tensor for tensor in whole if "layers.3." not in tensor[0]]
    write(tmp_path / "model.safetensors", [*mixed, ("model.layers.3.mlp.up_proj.weight", "F16", (8192, 8192))])
    assert planned(tmp_path).weights_gib is not None
    assert "layers in the files have different sizes" in planned(tmp_path, pipeline_parallel_size=2).unknown[0]
