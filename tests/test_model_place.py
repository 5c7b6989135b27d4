"""Where a model lies, and what vLLM's own flags make of its config: nothing is refused that vLLM takes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_launcher import Launcher

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.plan.devices import Devices
from batch_inference.plan.memory import memory_plan
from batch_inference.plan.model import ModelFacts, facts_of, why_unread
from batch_inference.plan.model_place import check_weights, is_on_hub, note_on_name
from batch_inference.plan.overrides import NotFollowedError, hf_overrides
from batch_inference.plan.printed import setting_plan
from builders import infeasible
from conftest import REPOSITORY

GPU = Devices("gpu", ("0",))
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "vocab_size": 1000,
    "max_position_embeddings": 32768,
}


def setting(folder: Path, *words: str, document: dict[str, Any] | None = None, **changes: Any) -> ExperimentConfig:
    """A setting with a request of 100,128 tokens."""
    (folder / "config.json").write_text(json.dumps(document or LLAMA))
    values: dict[str, Any] = {"model": str(folder), "seq_lens": (100_000,), **changes}
    return ExperimentConfig(engine_args=words, **values)


def known(config: ExperimentConfig) -> ModelFacts:
    facts = facts_of(config)
    assert facts is not None
    return facts


def is_quantized(config: ExperimentConfig) -> bool:
    return known(config).quantization is not None


def weights_gib(config: ExperimentConfig) -> float | None:
    return memory_plan(config, known(config), GPU, 80.0).weights_gib


def printed(config: ExperimentConfig) -> str:
    return " ".join(" ".join(setting_plan(config, facts_of(config), GPU, 80.0)).split())


# --- --hf-overrides --------------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        ((), 32768),
        (("--hf-overrides", '{"max_position_embeddings": 131072}'), 131072),
        (('--hf_overrides={"max_position_embeddings": 131072}',), 131072),
        (("--hf-overrides.max_position_embeddings", "131072"), 131072),
        (("--hf-overrides.max_position_embeddings=128K",), 131072),
        (("--hf_overrides.max_position_embeddings", "131.072k"), 131072),
        (("--hf-overrides", '{"n_positions": 99}', "--hf-overrides.max_position_embeddings", "131072"), 131072),
        (("--hf-overrides", json.dumps({"rope_parameters": YARN})), None),
        (("--hf-overrides", json.dumps({"rope_parameters": {"rope_type": "default"}})), None),
        (("--hf-overrides", json.dumps({"rope_scaling": {"type": "linear", "factor": 4}})), None),
        (("--hf-overrides.rope_scaling.factor", "4"), None),
        (("--hf-overrides", '{"hidden_act": "gelu"}'), 32768),
    ],
)  # fmt: skip
def test_overrides_say_how_long_a_request_may_be(tmp_path: Path, words: tuple[str, ...], limit: int | None) -> None:
    config = setting(tmp_path, *words)
    assert known(config).max_model_len == limit
    refused = infeasible(config, facts_of(config), GPU)
    assert (refused is None) is (limit != 32768)


def test_overrides_say_what_sizes_a_model_has(tmp_path: Path) -> None:
    whole = setting(tmp_path)
    config = setting(tmp_path, "--hf-overrides.num_hidden_layers", "2", "--hf-overrides.num_attention_heads", "6")
    assert (known(config).num_layers, known(config).num_attention_heads) == (2, 6)
    assert (weights_gib(config) or 0) < (weights_gib(whole) or 0)
    assert not is_quantized(setting(tmp_path))
    assert is_quantized(setting(tmp_path, "--hf-overrides", '{"quantization_config": {"quant_method": "fp8"}}'))


def test_the_part_for_the_language_model_is_changed_by_its_name(tmp_path: Path) -> None:
    nested = {"model_type": "gemma3", "text_config": LLAMA, "vision_config": {"num_hidden_layers": 9}}
    config = setting(tmp_path, "--hf-overrides.text_config.num_hidden_layers", "2", document=nested)
    assert (known(config).num_layers, known(config).num_attention_heads) == (2, 8)
    rope = setting(tmp_path, "--hf-overrides", json.dumps({"text_config": {"rope_parameters": YARN}}), document=nested)
    assert known(rope).max_model_len is None
    beside = setting(tmp_path, "--hf-overrides.vision_config.num_hidden_layers", "2", document=nested)
    assert known(beside).num_layers == 4


@pytest.mark.parametrize(
    "words",
    [
        ("--hf-overrides", "{"),
        ("--hf-overrides", "[]"),
        ("--hf-overrides", "[" * 100_000),
        ("--hf-overrides",),
        ("--hf-overrides.model_type", "gemma3"),
        ("--hf-overrides.text_config.num_hidden_layers", "2"),
        ("--hf-overrides.text_config", "2"),
    ],
)
def test_what_cannot_be_followed_is_unknown_and_not_refused(tmp_path: Path, words: tuple[str, ...]) -> None:
    config = setting(tmp_path, *words)
    assert facts_of(config) is None
    assert "memory unknown: only vLLM knows what --hf-overrides makes of this model" in printed(config)
    assert "verdict can run" in printed(config)


def test_at_the_top_of_a_config_with_parts_a_size_is_not_followed(tmp_path: Path) -> None:
    config = setting(tmp_path, "--hf-overrides.num_hidden_layers", "2", document={"text_config": LLAMA})
    assert facts_of(config) is None


def test_parts_are_read_as_vllm_reads_them() -> None:
    words = ("--hf-overrides.a.b", "1", "--seed=1.5", "--hf-overrides.a.c=x.y", "--hf-overrides.d+", "e,f",
             "--hf-overrides.g", '{"h": [1]}', "--hf-overrides.i", "-1", "--hf-overrides.a.j.k", "true")  # fmt: skip
    expected = {"a": {"b": 1, "c": "x.y", "j": {"k": True}}, "d": ["e", "f"], "g": {"h": [1]}, "i": -1}
    assert hf_overrides(words) == expected
    assert hf_overrides(()) == {}
    with pytest.raises(NotFollowedError):
        hf_overrides(("--hf-overrides", "null"))


# --- where a model lies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "why", "is_all_on_hub"),
    [
        ("s3://my-bucket/models/llama", "an object store", False),
        ("gs://b/m", "an object store", False),
        ("az://b/m/n/o", "an object store", False),
        ("org/repo/file-Q4.gguf", "a hub name says nothing about the model's sizes", False),
        ("org/repo:Q4_K_M", "a hub name", False),
        ("org/name", "a hub name", True),
        ("gpt2", "a hub name", True),
        ("kept/other", "a hub name says nothing about the model's sizes (the folder kept here has none", True),
        ("kept/m.gguf", "a model in a single file", False),
    ],
)
def test_what_lies_elsewhere_is_vllms_to_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, why: str, is_all_on_hub: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("kept/model").mkdir(parents=True)
    Path("kept/m.gguf").touch()
    config = ExperimentConfig(model=model)
    assert why in (why_unread(config) or "")
    assert f"memory unknown: {why_unread(config)}" in printed(config)
    assert infeasible(config, facts_of(config), GPU) is None
    assert is_on_hub(model) is is_all_on_hub


def test_a_file_is_the_same_model_however_it_is_called_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.gguf").touch()
    names = ("m.gguf", "./m.gguf", str(tmp_path / "m.gguf"))
    assert len({ExperimentConfig(model=name).settings_hash() for name in names}) == 1


def test_a_folder_in_mistrals_format_is_vllms_to_judge(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text('{"dim": 256}')
    for words in ((), ("--config-format", "mistral"), ("--config_format=mistral",)):
        assert "only vLLM reads" in (why_unread(ExperimentConfig(model=str(tmp_path), engine_args=words)) or "")
    with pytest.raises(ConfigError, match=r"it has no config\.json"):
        facts_of(ExperimentConfig(model=str(tmp_path), engine_args=("--config-format", "hf")))
    # With both, the flag decides which of them vLLM reads.
    assert known(setting(tmp_path)).num_layers == 4
    assert facts_of(setting(tmp_path, "--config-format", "mistral")) is None
    assert known(setting(tmp_path)).max_model_len == 32768
    (tmp_path / "consolidated.safetensors").touch()
    assert known(setting(tmp_path)).max_model_len is None  # by params.json now
    assert known(setting(tmp_path, "--config-format", "hf")).max_model_len == 32768


def test_the_config_may_lie_elsewhere_than_the_weights(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    elsewhere = ("--hf-config-path", str(tmp_path))
    config = setting(tmp_path, *elsewhere, model=str(tmp_path / "weights"))
    assert known(config).num_layers == 4
    assert known(setting(tmp_path, *elsewhere, model="s3://b/m")).num_layers == 4
    assert "a hub name" in (why_unread(setting(tmp_path, "--hf-config-path", "org/name")) or "")
    for path in (tmp_path / "weights", tmp_path / "absent"):
        with pytest.raises(ConfigError, match=f"--hf-config-path {path}: "):
            facts_of(setting(tmp_path, "--hf-config-path", str(path)))
    # Of one file nobody says how it is quantized.
    (tmp_path / "m.gguf").touch()
    assert is_quantized(setting(tmp_path, *elsewhere, model=str(tmp_path / "m.gguf")))


def test_weights_that_are_quantized_elsewhere_than_in_the_config_are_found(tmp_path: Path) -> None:
    assert not is_quantized(setting(tmp_path))
    assert is_quantized(setting(tmp_path, document={**LLAMA, "compression_config": {}}))
    (tmp_path / "hf_quant_config.json").write_text("{}")
    assert is_quantized(setting(tmp_path))


# --- sizes in flags --------------------------------------------------------------------------------------------------


def test_a_cache_of_gigabytes_is_planned_with(tmp_path: Path) -> None:
    for text, gib in (("8G", 8.0), ("8589934592", 8.0)):
        config = setting(tmp_path, f"--kv-cache-memory-bytes={text}")
        plan = memory_plan(config, known(config), GPU, 80.0)
        assert plan.pool_gib == gib


def test_weights_outside_the_device_are_not_counted_as_if_they_were_inside(tmp_path: Path) -> None:
    assert "unknown" not in printed(setting(tmp_path))
    for words in (("--cpu-offload-gb", "4"), ("--cpu_offload_gb=4",), ("--offload-group-size", "2")):
        assert "memory unknown: the formulas do not know what --" in printed(setting(tmp_path, *words))


def test_with_a_length_that_vllm_finds_out_nothing_is_refused(tmp_path: Path) -> None:
    config = setting(tmp_path, max_model_len=-1, seq_lens=(512,))
    assert infeasible(config, facts_of(config), GPU) is None
    assert "GiB of weights" in printed(config)


# --- weights ----------------------------------------------------------------------------------------------------------

NO_WEIGHTS = (
    "the folder holds no weights (*.safetensors, *.bin, *.pt); give one that does, or --load-format dummy for random "
    "weights"
)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--load-format", "auto"),
        ("--load_format=safetensors",),
        ("--load-format", "dummy", "--load-format", "hf"),
        ("--config-format", "mistral"),
        ("--hf-config-path", "org/name"),
    ],
)
def test_a_folder_without_weights_is_refused(tmp_path: Path, words: tuple[str, ...]) -> None:
    config = setting(tmp_path, *words)
    for name in ("tokenizer.json", "model.safetensors.index.json", "README.md"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError) as caught:
        check_weights(config)
    assert str(caught.value) == f"--model {tmp_path}: {NO_WEIGHTS}"


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.pt", "a.gguf", "consolidated.00.pth", "part/a.bin"])
def test_a_folder_with_what_may_be_weights_is_not(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    check_weights(setting(tmp_path))


@pytest.mark.parametrize(
    "words",
    [
        *(("--load-format", load_format) for load_format in (
            "dummy", "sharded_state", "runai_streamer", "tensorizer", "bitsandbytes", "gguf", "of_a_plugin",
        )),
        ("--model-weights", "s3://bucket/weights"),
    ],
)  # fmt: skip
def test_what_loads_weights_in_its_own_way_is_left_to_vllm(tmp_path: Path, words: tuple[str, ...]) -> None:
    check_weights(setting(tmp_path, *words))


@pytest.mark.parametrize(
    "changes", [{"devices": 4}, {"device_memory_gib": 80.0}, {"distributed_executor_backend": "ray"}]
)
def test_another_machine_may_have_the_weights(tmp_path: Path, changes: dict[str, Any]) -> None:
    check_weights(setting(tmp_path, **changes))


@pytest.mark.parametrize("model", ["org/name", "org/name:Q4_K_M", "s3://bucket/model", "model.gguf"])
def test_only_a_folder_is_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").touch()
    check_weights(ExperimentConfig(model=model))


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("plan", [("--dry-run",), ()], ids=["plan", "run"])
def test_both_programs_say_so_before_anything_else(tmp_path: Path, experiment: Run, plan: tuple[str, ...]) -> None:
    model = ("--model", "models/llama-2-7b")
    (tmp_path / "models").symlink_to(REPOSITORY / "models")
    for done in (experiment(*model, *plan), Launcher(tmp_path)("tensor-parallel", *model, *plan)):
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"error: --model models/llama-2-7b: {NO_WEIGHTS}\n"
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == []


def test_a_model_in_mistrals_format_is_measured(experiment: Run, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "params.json").write_text("{}")
    (tmp_path / "m" / "consolidated.safetensors").touch()
    done = experiment("--model", str(tmp_path / "m"), "--config-format", "mistral", "--max-model-len", "auto")
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path / "tp_1_results.json").read_text())
    assert stored["config"]["max_model_len"] == -1


def test_a_name_of_the_hub_that_may_be_a_misspelt_folder_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert note_on_name(ExperimentConfig(model="models/tiny-lama")) == (
        "--model models/tiny-lama is taken as a name on the hub (the folder models here has none of that name)"
    )
    assert note_on_name(ExperimentConfig(model="org/tiny-llama")) is None
    assert note_on_name(ExperimentConfig(model=str(tmp_path / "models"))) is None
