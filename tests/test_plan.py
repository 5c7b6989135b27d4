from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.plan.devices import GIB, Devices
from batch_inference.plan.memory import MemoryPlan, memory_plan
from batch_inference.plan.model import ModelFacts, read_model_facts
from batch_inference.plan.needs import Needs
from batch_inference.plan.obstacles import infeasible, is_coupled
from batch_inference.plan.printed import _memory_words, setting_plan

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


# --- sizes and rules, at their bounds -----------------------------------------------------------------------------

TWO_CPUS = Devices("cpu", ("0", "1"))


@pytest.mark.parametrize(
    ("written", "asked", "used"),
    [
        ("float32", "auto", "bfloat16"),  # vLLM runs a float32 checkpoint in 16 bits
        ("float", "auto", "bfloat16"),
        ("float16", "auto", "float16"),
        ("bfloat16", "auto", "bfloat16"),
        ("float16", "float32", "float32"),
        ("bfloat16", "half", "float16"),
        ("bfloat16", "float", "float32"),
    ],
)
def test_the_type_is_what_vllm_makes_of_the_flag_and_the_checkpoint(
    tmp_path: Path, written: str, asked: str, used: str
) -> None:
    read = facts(tmp_path, torch_dtype=written)
    assert read.dtype_used(asked) == used
    size = {"float32": 4, "float16": 2, "bfloat16": 2}[used]
    assert read.weights_gib(1, 1, asked) == pytest.approx(6_738_415_616 * size / GIB)
    assert read.kv_bytes_per_token(1, 1, asked) == 2 * 32 * 32 * 128 * size


@pytest.mark.parametrize(("kv_dtype", "size"), [("fp8", 1), ("fp8_e4m3", 1), ("int8", 1), ("float32", 4)])
def test_the_cache_may_have_a_type_of_its_own(tmp_path: Path, kv_dtype: str, size: int) -> None:
    assert facts(tmp_path).kv_bytes_per_token(1, 1, kv_dtype) == 2 * 32 * 32 * 128 * size


def test_the_fullest_stage_counts_where_layers_do_not_divide(tmp_path: Path) -> None:
    read = facts(tmp_path, num_hidden_layers=33)
    assert read.kv_bytes_per_token(1, 2, "auto") == 2 * 17 * 32 * 128 * 2
    assert read.weights_gib(1, 2, "auto") == facts(tmp_path, num_hidden_layers=34).weights_gib(1, 2, "auto")


def test_an_embedding_that_is_the_output_head_too_is_held_once(tmp_path: Path) -> None:
    apart = facts(tmp_path).weights_gib(1, 1, "auto")
    one = facts(tmp_path, tie_word_embeddings=True).weights_gib(1, 1, "auto")
    assert apart is not None
    assert one == pytest.approx(apart - 32000 * 4096 * 2 / GIB)


@pytest.mark.parametrize(
    "missing", ["num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size"]
)
def test_without_one_of_its_sizes_the_weights_are_unknown(tmp_path: Path, missing: str) -> None:
    assert facts(tmp_path, **{missing: None, "num_key_value_heads": 32}).weights_gib(1, 1, "auto") is None


def test_the_cache_needs_heads_layers_and_a_size_of_a_head(tmp_path: Path) -> None:
    assert facts(tmp_path, num_hidden_layers=None).kv_bytes_per_token(1, 1, "auto") is None
    assert facts(tmp_path, hidden_size=None).kv_bytes_per_token(1, 1, "auto") is None
    no_heads = facts(tmp_path, num_attention_heads=None, num_key_value_heads=None, head_dim=128)
    assert no_heads.kv_bytes_per_token(1, 1, "auto") is None
    # A head may be larger than its share, and all heads have keys and values of their own where nothing is said.
    assert facts(tmp_path, head_dim=256).kv_bytes_per_token(1, 1, "auto") == 2 * 32 * 32 * 256 * 2
    assert facts(tmp_path, num_key_value_heads=None).kv_bytes_per_token(1, 1, "auto") == 2 * 32 * 32 * 128 * 2


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, "float16"),
        ({"dtype": "bfloat16"}, "bfloat16"),  # the newer name of the same
        ({"torch_dtype": None, "dtype": "float16"}, "float16"),
        ({"torch_dtype": None}, "bfloat16"),
    ],
)
def test_the_type_of_a_checkpoint_has_two_names(tmp_path: Path, changes: dict[str, object], dtype: str) -> None:
    assert facts(tmp_path, **changes).dtype == dtype


@pytest.mark.parametrize(
    ("sizes", "eager", "devices", "refused"),
    [
        ((1, 2, 1), True, TWO_CPUS, True),
        ((1, 2, 1), False, TWO_CPUS, False),
        ((2, 1, 1), True, TWO_CPUS, False),
        ((1, 1, 1), True, TWO_CPUS, False),
        ((1, 2, 1), True, EIGHT_GPUS, False),
    ],
)
def test_stages_without_compilation_are_refused_on_the_cpu_alone(
    tmp_path: Path, sizes: tuple[int, int, int], eager: bool, devices: Devices, refused: bool
) -> None:
    tp, pp, dp = sizes
    config = ExperimentConfig(
        tensor_parallel_size=tp, pipeline_parallel_size=pp, data_parallel_size=dp, enforce_eager=eager
    )
    reason = infeasible(config, facts(tmp_path), devices)
    assert (
        reason == "--enforce-eager with --pipeline-parallel-size on the CPU fails in vLLM; drop --enforce-eager"
    ) is (refused)
    assert refused or reason is None


def test_of_several_nodes_each_needs_its_share_of_the_devices(tmp_path: Path) -> None:
    read, four = facts(tmp_path), Devices("gpu", tuple("0123"))
    config = ExperimentConfig(tensor_parallel_size=8, nnodes=2)
    assert infeasible(config, read, four) is None
    assert infeasible(config, read, Devices("gpu", tuple("012"))) == (
        "TP x PP x DP is 8 devices, 4 on each node, this machine has 3 GPUs; "
        "lower --tensor-parallel-size, --pipeline-parallel-size or --data-parallel-size"
    )
    assert "TP x PP x DP is 8 devices, this machine has 4 GPUs" in (
        infeasible(dataclasses.replace(config, nnodes=1), read, four) or ""
    )
    replicas = ExperimentConfig(data_parallel_size=4)
    assert infeasible(replicas, read, four) is None
    assert "has 2 CPU devices (slices of the cores)" in (infeasible(replicas, read, TWO_CPUS) or "")


def test_torchrun_and_ray_have_devices_of_their_own_to_count(tmp_path: Path) -> None:
    read, four = facts(tmp_path), Devices("gpu", tuple("0123"))
    torchrun = ExperimentConfig(tensor_parallel_size=8, distributed_executor_backend="external_launcher")
    assert infeasible(torchrun, read, four, devices_here=4) is None
    assert infeasible(torchrun, read, four, devices_here=5) == (
        "torchrun started 5 processes on a node with 4 gpu devices"
    )
    ray = ExperimentConfig(tensor_parallel_size=8, distributed_executor_backend="ray")
    assert infeasible(ray, read, four, ray_gpus=8) is None
    assert "the Ray cluster has 7 GPUs" in (infeasible(ray, read, four, ray_gpus=7) or "")
    assert "ray is refused by vLLM on the CPU" in (infeasible(ray, read, TWO_CPUS) or "")


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({"max_model_len": 4096}, True),
        ({"max_model_len": 4097}, False),
        ({"seq_lens": (8, 3968)}, True),
        ({"seq_lens": (8, 3969)}, False),
        ({"pipeline_parallel_size": 4}, True),
        ({"pipeline_parallel_size": 5}, False),
    ],
)
def test_what_is_exactly_the_models_own_fits(tmp_path: Path, changes: dict[str, object], fits: bool) -> None:
    reason = infeasible(
        dataclasses.replace(ExperimentConfig(), **changes), facts(tmp_path, num_hidden_layers=4), EIGHT_GPUS
    )
    assert (reason is None) is fits


def test_sizes_that_a_model_does_not_say_are_no_obstacle(tmp_path: Path) -> None:
    silent = dict.fromkeys(LLAMA_2_7B)
    config = ExperimentConfig(tensor_parallel_size=2, pipeline_parallel_size=2, max_model_len=10**6)
    assert infeasible(config, facts(tmp_path, **silent), EIGHT_GPUS) is None


def test_replicas_of_a_model_that_cannot_be_read_are_coupled_where_that_is_asked(tmp_path: Path) -> None:
    config = ExperimentConfig(engine_args=("--enable_expert_parallel",), data_parallel_size=2)
    assert is_coupled(config, None)
    assert not is_coupled(ExperimentConfig(data_parallel_size=2), None)
    assert infeasible(ExperimentConfig(data_parallel_size=2), facts(tmp_path), TWO_CPUS) is None


@pytest.mark.parametrize(("tp", "reason"), [(2, None), (6, None), (12, None), (4, "KV heads"), (5, "attention heads")])
def test_heads_are_shared_out_or_copied_whole(tmp_path: Path, tp: int, reason: str | None) -> None:
    read = facts(tmp_path, num_attention_heads=24, num_key_value_heads=6)
    devices = Devices("gpu", tuple(map(str, range(16))))
    found = infeasible(ExperimentConfig(tensor_parallel_size=tp), read, devices)
    assert found is None if reason is None else reason in (found or "")


# --- the memory plan ----------------------------------------------------------------------------------------------


def memory(folder: Path, memory_gib: float | None = 80.0, devices: Devices = EIGHT_GPUS, **changes: Any) -> MemoryPlan:
    found = memory_plan(ExperimentConfig(**changes), facts(folder), devices, memory_gib)
    assert found is not None
    return found


def test_what_is_left_of_vllms_share_is_the_cache(tmp_path: Path) -> None:
    found = memory(tmp_path, gpu_memory_utilization=0.5)
    weights_gib = 6_738_415_616 * 2 / GIB
    assert found.weights_gib == pytest.approx(weights_gib)
    assert found.pool_gib == pytest.approx(40.0 - weights_gib)
    assert found.kv_bytes_per_token == 2 * 32 * 32 * 128 * 2
    # Blocks of 16 tokens of 512 KiB, one of which is held back.
    blocks = int((40.0 - weights_gib) * GIB / (16 * 524288))
    assert found.requests_in_one_wave(2048) == (blocks - 1) // 128
    assert found.kv_cache_tokens(4096) == int(blocks / 256 * 4096)


def test_memory_that_is_not_known_leaves_the_cache_unknown_and_too_little_of_it_none(tmp_path: Path) -> None:
    unknown = memory(tmp_path, None)
    assert (unknown.pool_gib, unknown.requests_in_one_wave(100), unknown.kv_cache_tokens(100)) == (None, None, None)
    small = memory(tmp_path, 8.0)
    assert small.pool_gib is not None
    assert small.pool_gib < 0
    assert (small.requests_in_one_wave(1), small.kv_cache_tokens(100)) == (0, 0)


@pytest.mark.parametrize(
    ("devices", "changes", "block_size"),
    [
        (EIGHT_GPUS, {}, 16),
        (TWO_CPUS, {}, 128),
        (TWO_CPUS, {"device_memory_gib": 80.0}, 16),  # planned for another machine's GPUs
        (EIGHT_GPUS, {"engine_args": ("--block-size", "32")}, 32),
        (TWO_CPUS, {"engine_args": ("--block_size=64",)}, 64),
    ],
)
def test_blocks_are_as_large_as_vllm_makes_them(
    tmp_path: Path, devices: Devices, changes: dict[str, Any], block_size: int
) -> None:
    assert memory(tmp_path, devices=devices, **changes).block_size == block_size


@pytest.mark.parametrize(
    ("engine_args", "kv_bytes"),
    [
        (("--kv-cache-dtype", "fp8"), 262144),
        (("--kv-cache-dtype", "auto"), 524288),
        (("--kv-cache-dtype", "bfloat16"), 524288),
    ],
)
def test_the_users_type_of_the_cache_counts(tmp_path: Path, engine_args: tuple[str, ...], kv_bytes: int) -> None:
    assert memory(tmp_path, engine_args=engine_args).kv_bytes_per_token == kv_bytes


def test_a_cache_of_so_many_bytes_is_taken_at_its_word(tmp_path: Path) -> None:
    found = memory(tmp_path, engine_args=("--kv-cache-memory-bytes", str(3 * GIB)))
    assert found.pool_gib == 3


@pytest.mark.parametrize(
    ("engine_args", "changes"),
    [
        (("--quantization", "fp8"), {}),
        (("-q", "fp8"), {}),
        (("--kv-cache-dtype", "turbo4"), {}),
        ((), {"quantization_config": {"bits": 4}}),
        ((), {"num_local_experts": 8}),
    ],
)
def test_what_the_formulas_do_not_know_has_no_plan(
    tmp_path: Path, engine_args: tuple[str, ...], changes: dict[str, object]
) -> None:
    config = ExperimentConfig(engine_args=engine_args)
    assert memory_plan(config, facts(tmp_path, **changes), EIGHT_GPUS, 80.0) is None


# --- the printed plan ---------------------------------------------------------------------------------------------


def test_the_cache_of_the_largest_point_is_that_of_its_batch_and_its_longest_request(tmp_path: Path) -> None:
    config = ExperimentConfig(batch_sizes=(4, 16, 1), seq_lens=(2048, 512), max_tokens=128)
    # 16 requests of 2176 tokens, at 512 KiB each
    assert "17 GiB KV cache per device for the largest point in one wave" in plan(config, facts(tmp_path))


def test_weights_that_fill_the_share_exactly_leave_nothing() -> None:
    found = Needs(weights_gib=8.0, source="formula", kv_gib=1.0, pool_gib=0.0)
    assert "the weights do not fit: 8 GiB are there for vLLM" in _memory_words(ExperimentConfig(), found)


def test_flags_of_vllms_own_have_a_line_of_the_plan(tmp_path: Path) -> None:
    read = facts(tmp_path)
    line = "vLLM --quantization fp8 (vLLM checks these when it starts)"
    assert line in plan(ExperimentConfig(engine_args=("--quantization", "fp8")), read)
    assert "vLLM checks these" not in plan(ExperimentConfig(), read)


def test_the_plan_counts_devices_and_points(tmp_path: Path) -> None:
    config = ExperimentConfig(
        tensor_parallel_size=2, data_parallel_size=3, batch_sizes=(1, 4), seq_lens=(8, 16, 32), num_runs=5
    )
    words = plan(config, facts(tmp_path))
    assert "tp_2_dp_3: TP 2 x PP 1 x DP 3 = 6 of 8 gpu devices" in words
    assert "batch sizes 1, 4 x lengths 8, 16, 32, 128 output tokens: 6 points, 5 timed runs each" in words
