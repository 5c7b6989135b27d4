from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.plan.devices import GIB, Devices
from batch_inference.plan.model import ModelFacts, read_model_facts
from batch_inference.plan.obstacles import infeasible, is_coupled
from batch_inference.plan.printed import setting_plan

EIGHT_GPUS = Devices("gpu", tuple("01234567"))
# Llama-2-7B: https://arxiv.org/abs/2307.09288, and its config.json
LLAMA_2_7B = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "torch_dtype": "float16",
}


def model(folder: Path, **changes: object) -> str:
    (folder / "config.json").write_text(json.dumps({**LLAMA_2_7B, **changes}))
    return str(folder)


def facts(folder: Path, **changes: object) -> ModelFacts:
    read = read_model_facts(model(folder, **changes))
    assert read is not None
    return read


def test_weights_of_llama_2_7b_are_its_published_parameter_count(tmp_path: Path) -> None:
    weights_gib = facts(tmp_path).weights_gib(1, 1, "auto")
    assert weights_gib == pytest.approx(6_738_415_616 * 2 / GIB)


def test_weights_are_shared_out_over_tp_and_stages(tmp_path: Path) -> None:
    read = facts(tmp_path)
    whole, half = read.weights_gib(1, 1, "auto"), read.weights_gib(2, 1, "auto")
    assert whole is not None
    assert half == pytest.approx(whole / 2, rel=1e-3)
    stage = read.weights_gib(1, 2, "auto")
    assert stage == pytest.approx(whole / 2, rel=1e-3)
    assert read.weights_gib(1, 1, "float32") == pytest.approx(whole * 2)


def test_kv_bytes_count_keys_and_values_of_this_devices_heads_and_layers(tmp_path: Path) -> None:
    read = facts(tmp_path, num_key_value_heads=8)
    assert read.kv_bytes_per_token(1, 1, "auto") == 2 * 32 * 8 * 128 * 2
    assert read.kv_bytes_per_token(4, 2, "auto") == 2 * 16 * 2 * 128 * 2
    assert read.kv_bytes_per_token(16, 1, "auto") == 2 * 32 * 1 * 128 * 2  # copied, not split below one head


def test_a_mixture_of_experts_is_not_estimated_by_the_dense_formula(tmp_path: Path) -> None:
    assert facts(tmp_path, num_local_experts=8).weights_gib(1, 1, "auto") is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tensor_parallel_size": 16}, "is 16 devices, this machine has 8 GPUs"),
        ({"tensor_parallel_size": 5}, "--tensor-parallel-size 5 does not divide the model's 32 attention heads"),
        ({"max_model_len": 5000}, "--max-model-len 5000 is over the model's 4096"),
        ({"seq_lens": (4000,)}, "--seq-lens 4000 plus --max-tokens 128 is 4128, over the model's 4096"),
    ],
)
def test_what_cannot_work_is_said_before_anything_loads(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    reason = infeasible(dataclasses.replace(ExperimentConfig(), **changes), facts(tmp_path), EIGHT_GPUS)
    assert reason is not None
    assert said in reason


def test_more_stages_than_layers_and_odd_kv_heads_are_found(tmp_path: Path) -> None:
    assert "more stages" in (
        infeasible(ExperimentConfig(pipeline_parallel_size=8), facts(tmp_path, num_hidden_layers=4), EIGHT_GPUS) or ""
    )
    assert "KV heads" in (
        infeasible(ExperimentConfig(tensor_parallel_size=4), facts(tmp_path, num_key_value_heads=6), EIGHT_GPUS) or ""
    )


def test_gpus_that_are_all_hidden_are_said_to_be(tmp_path: Path) -> None:
    reason = infeasible(ExperimentConfig(), facts(tmp_path), Devices("gpu", ()))
    assert "CUDA_VISIBLE_DEVICES hides every GPU" in (reason or "")


def test_a_setting_that_fits_has_no_reason_against_it(tmp_path: Path) -> None:
    assert infeasible(ExperimentConfig(tensor_parallel_size=8), facts(tmp_path), EIGHT_GPUS) is None


def test_stretched_positions_are_left_to_vllm(tmp_path: Path) -> None:
    assert facts(tmp_path, rope_scaling={"rope_type": "yarn", "factor": 4}).max_model_len is None
    assert facts(tmp_path, rope_parameters={"rope_type": "yarn", "factor": 4}).max_model_len is None
    assert facts(tmp_path, rope_scaling="dynamic").max_model_len is None
    assert facts(tmp_path, rope_scaling={"rope_type": "llama3", "factor": 8}).max_model_len == 4096


def test_the_user_may_insist_on_a_longer_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    assert infeasible(ExperimentConfig(max_model_len=5000), facts(tmp_path), EIGHT_GPUS) is None


@pytest.mark.parametrize("size", [0, -1, True, 10**300, "32", 1.5])
def test_what_is_no_size_is_not_known(tmp_path: Path, size: object) -> None:
    read = facts(tmp_path, num_hidden_layers=size)
    assert read.num_layers is None
    assert read.weights_gib(1, 1, "auto") is None
    assert facts(tmp_path, num_attention_heads=2**30, head_dim=None).head_dim is None


def test_a_hub_name_is_no_error_and_its_memory_is_unknown() -> None:
    assert read_model_facts("meta-llama/Llama-2-7b-chat-hf") is None
    lines = setting_plan(ExperimentConfig(), None, EIGHT_GPUS)
    assert any("unknown" in line for line in lines)
    assert lines[-1] == "verdict   can run"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no config.json"),
        ("{", "cannot be read"),
        ("[]", "is not an object"),
        ('{"text_config": "x"}', "is not an object"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_model_facts(str(tmp_path))


def test_a_missing_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in (str(tmp_path / "absent"), "./absent", "models/absent"):
        with pytest.raises(ConfigError, match="no such folder"):
            read_model_facts(name)


@pytest.mark.parametrize("name", ["org/name", "gpt2", "x" * 5000])
def test_what_is_no_path_is_a_hub_name(name: str) -> None:
    assert read_model_facts(name) is None


def test_the_plan_fits_80_columns_and_estimates_the_memory(tmp_path: Path) -> None:
    config = ExperimentConfig(model="m/n", batch_sizes=tuple(range(1, 40)), engine_args=("--hf-token", "hush"))
    lines = setting_plan(config, facts(tmp_path), EIGHT_GPUS)
    assert max(map(len, lines)) <= 80
    assert any("12.6 GiB weights" in line for line in lines)
    assert "hush" not in "".join(lines)
    assert lines[-1] == "verdict   can run"


def test_the_plan_says_why_a_setting_cannot_run(tmp_path: Path) -> None:
    lines = setting_plan(ExperimentConfig(tensor_parallel_size=5), facts(tmp_path), EIGHT_GPUS)
    assert "verdict   cannot run: --tensor-parallel-size 5 does not divide" in "\n".join(lines)


def plan(config: ExperimentConfig, read: ModelFacts | None, memory_gib: float | None = None) -> str:
    return " ".join(" ".join(setting_plan(config, read, EIGHT_GPUS, memory_gib)).split())


def test_the_plan_says_how_many_requests_fit_in_one_wave(tmp_path: Path) -> None:
    config = ExperimentConfig(seq_lens=(512, 2048))
    # 80 GiB x 0.8 - 12.55 GiB of weights, at 512 KiB per token
    assert "requests that fit in one wave: 164 of length 512, 48 of length 2048" in plan(config, facts(tmp_path), 80.0)
    assert "one wave:" not in plan(config, facts(tmp_path))


def test_the_plan_takes_vllms_own_word_for_the_size_of_the_cache(tmp_path: Path) -> None:
    # 128 blocks of 16 tokens, of which vLLM holds one back; a request takes 32
    for words in (("--kv-cache-memory-bytes", str(2**30)), (f"--kv_cache_memory_bytes={2**30}",)):
        config = ExperimentConfig(seq_lens=(384,), engine_args=words)
        assert "1 GiB are there for it; requests that fit in one wave: 3 of length 384" in plan(config, facts(tmp_path))


def test_the_plan_counts_a_byte_for_each_key_and_value_of_an_fp8_cache(tmp_path: Path) -> None:
    for words in (("--kv-cache-dtype", "fp8"), ("--kv_cache_dtype=fp8_e4m3",)):
        config = ExperimentConfig(seq_lens=(512,), engine_args=words)
        assert "requests that fit in one wave: 329 of length 512" in plan(config, facts(tmp_path), 80.0)
    config = ExperimentConfig(seq_lens=(512,), engine_args=("--kv-cache-dtype", "bfloat16"))
    assert "requests that fit in one wave: 164 of length 512" in plan(config, facts(tmp_path), 80.0)


def test_the_memory_of_a_quantized_model_is_unknown(tmp_path: Path) -> None:
    quantized = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    for read in (facts(tmp_path, **quantized), facts(tmp_path, text_config={**LLAMA_2_7B, **quantized})):
        assert "memory unknown for a quantized model" in plan(ExperimentConfig(), read, 80.0)
    for words in (("--quantization", "fp8"), ("-q", "fp8"), ("--quantization=fp8",), ("--kv-cache-dtype", "nvfp4")):
        assert "memory unknown for" in plan(ExperimentConfig(engine_args=words), facts(tmp_path), 80.0)


def test_the_plan_says_that_the_weights_do_not_fit(tmp_path: Path) -> None:
    assert "the weights do not fit: 9.6 GiB are there for vLLM" in plan(ExperimentConfig(), facts(tmp_path), 12.0)


@pytest.mark.parametrize(
    ("engine_args", "dp", "changes", "coupled"),
    [
        (("--enable-expert-parallel",), 2, {"num_local_experts": 8}, True),
        (("-ep",), 2, {"num_local_experts": 8}, True),
        ((), 2, {"num_local_experts": 8}, False),
        (("--enable-expert-parallel",), 1, {"num_local_experts": 8}, False),
        (("--enable-expert-parallel",), 2, {}, False),
    ],
)
def test_only_replicas_that_share_out_experts_are_coupled(
    tmp_path: Path, engine_args: tuple[str, ...], dp: int, changes: dict[str, object], coupled: bool
) -> None:
    config = ExperimentConfig(engine_args=engine_args, data_parallel_size=dp)
    assert is_coupled(config, facts(tmp_path, **changes)) is coupled


def test_coupled_replicas_are_refused_on_the_cpu(tmp_path: Path) -> None:
    config = ExperimentConfig(engine_args=("--enable-expert-parallel",), data_parallel_size=2)
    read = facts(tmp_path, num_local_experts=8)
    assert "on the CPU fails in vLLM" in (infeasible(config, read, Devices("cpu", ("0", "1"))) or "")
    assert infeasible(config, read, EIGHT_GPUS) is None
