from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.text import has_control
from batch_inference.core.values import AUTO_SIZES
from batch_inference.plan.devices import GIB, Devices
from batch_inference.plan.memory import MemoryPlan, memory_plan
from batch_inference.plan.model import ModelFacts, read_model_facts
from batch_inference.plan.needs import Needs, memory_against
from batch_inference.plan.obstacles import is_coupled
from batch_inference.plan.parts import layers_of_stages
from batch_inference.plan.printed import _memory_words, setting_plan
from builders import infeasible

EIGHT_GPUS = Devices("gpu", tuple("01234567"))
# Llama-2-7B: https://arxiv.org/abs/2307.09288, and its config.json
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
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


def planned(
    folder: Path, tp: int = 1, pp: int = 1, dtype: str = "auto", engine_args: tuple[str, ...] = (), **changes: object
) -> MemoryPlan:
    config = ExperimentConfig(tensor_parallel_size=tp, pipeline_parallel_size=pp, dtype=dtype, engine_args=engine_args)
    return memory_plan(config, facts(folder, **changes), EIGHT_GPUS, None)


def weights_gib(folder: Path, tp: int = 1, pp: int = 1, dtype: str = "auto", **changes: object) -> float:
    found = planned(folder, tp, pp, dtype, **changes).weights_gib
    assert found is not None
    return found


def kv_bytes(folder: Path, tp: int = 1, pp: int = 1, dtype: str = "auto", **changes: object) -> float | None:
    return planned(folder, tp, pp, dtype, **changes).kv_bytes_per_token


def test_weights_of_llama_2_7b_are_its_published_parameter_count(tmp_path: Path) -> None:
    assert weights_gib(tmp_path) == pytest.approx(6_738_415_616 * 2 / GIB)


# Architectures without a model in tests/plan_truth: parameters as transformers counts them.
@pytest.mark.parametrize(
    ("sizes", "parameters"),
    [
        (
            {"architectures": ["GemmaForCausalLM"], "hidden_size": 2048, "intermediate_size": 16384,
             "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
             "vocab_size": 256000},
            2_506_172_416,
        ),
        (
            {"architectures": ["Gemma3ForCausalLM"], "hidden_size": 1152, "intermediate_size": 6912,
             "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
             "vocab_size": 262144},
            999_885_952,
        ),
        (
            {"architectures": ["Cohere2ForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
             "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 256000},
            8_028_033_024,
        ),
        (
            {"architectures": ["PhiForCausalLM"], "hidden_size": 2560, "intermediate_size": 10240,
             "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 51200},
            2_779_683_840,
        ),
        (
            {"architectures": ["GPTNeoXForCausalLM"], "hidden_size": 4096, "intermediate_size": 16384,
             "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 50432},
            6_857_302_016,
        ),
    ],
)  # fmt: skip
def test_weights_of_other_architectures_are_their_parameter_counts(
    tmp_path: Path, sizes: dict[str, object], parameters: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    found = memory_plan(ExperimentConfig(), read_model_facts(str(tmp_path)), EIGHT_GPUS, None)
    assert found.weights_gib == pytest.approx(parameters * 2 / GIB, rel=1e-9)


def test_weights_are_shared_out_over_tp_and_stages(tmp_path: Path) -> None:
    whole = weights_gib(tmp_path)
    assert weights_gib(tmp_path, tp=2) == pytest.approx(whole / 2, rel=1e-3)
    assert weights_gib(tmp_path, pp=2) == pytest.approx(whole / 2, rel=1e-3)
    assert weights_gib(tmp_path, dtype="float32") == pytest.approx(whole * 2)


def test_kv_bytes_count_keys_and_values_of_this_devices_heads_and_layers(tmp_path: Path) -> None:
    heads = {"num_key_value_heads": 8}
    assert kv_bytes(tmp_path, **heads) == 2 * 32 * 8 * 128 * 2
    assert kv_bytes(tmp_path, 4, 2, **heads) == 2 * 16 * 2 * 128 * 2
    assert kv_bytes(tmp_path, 16, **heads) == 2 * 32 * 1 * 128 * 2  # copied, not split below one head


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tensor_parallel_size": 16}, "is 16 devices, but this machine has 8 GPUs"),
        ({"tensor_parallel_size": 5}, "--tensor-parallel-size 5 does not divide the model's 32 attention heads"),
        ({"max_model_len": 5000}, "--max-model-len 5000 is more than the model's 4096"),
        ({"seq_lens": (4000,)}, "--seq-lens 4000 plus --max-tokens 128 is 4128, more than the model's 4096"),
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
    # Older files have another key for the same.
    assert facts(tmp_path, rope_scaling={"type": "linear", "factor": 4}).max_model_len is None
    assert facts(tmp_path, rope_scaling={"rope_type": "llama3", "factor": 8}).max_model_len == 4096
    assert facts(tmp_path, rope_parameters={"rope_type": "default", "factor": 2}).max_model_len is None
    by_layer = {"sliding": {"rope_type": "default"}, "full": {"rope_type": "linear", "factor": 8}}
    assert facts(tmp_path, rope_parameters=by_layer).max_model_len is None


def test_the_longest_length_is_the_one_that_vllm_takes(tmp_path: Path) -> None:
    assert facts(tmp_path, seq_length=2048).max_model_len == 2048  # the smallest
    assert facts(tmp_path, model_max_length=131072).max_model_len == 131072  # Command-R
    # Of a tokenizer it counts for embeddings alone.
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    assert facts(tmp_path).max_model_len == 4096


@pytest.mark.parametrize(("word", "may"), [("1", True), ("True", True), ("0", False), ("", False)])
def test_the_user_may_insist_on_a_longer_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, may: bool
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", word)
    assert (infeasible(ExperimentConfig(max_model_len=5000), facts(tmp_path), EIGHT_GPUS) is None) is may


@pytest.mark.parametrize("size", [0, -1, True, 10**300, "32", 1.5])
def test_what_is_no_size_is_not_known(tmp_path: Path, size: object) -> None:
    assert facts(tmp_path, num_hidden_layers=size).num_layers is None
    found = planned(tmp_path, num_hidden_layers=size)
    assert (found.weights_gib, found.unknown) == (None, ("memory unknown: config.json does not say num_hidden_layers",))
    assert planned(tmp_path, num_attention_heads=2**30).unknown == (
        "memory unknown: config.json does not say head_dim",
    )


def test_a_hub_name_is_no_error_and_its_memory_is_unknown() -> None:
    assert read_model_facts("meta-llama/Llama-2-7b-chat-hf") is None
    lines = setting_plan(ExperimentConfig(), None, EIGHT_GPUS)
    assert "memory    unknown: a hub name says nothing about the model's sizes" in lines
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
    os.mkfifo(tmp_path / "models" / "pipe")
    for name in (
        str(tmp_path / "absent"), "./absent", "../absent", "~/absent", "~nobody-has-this-name/x", "a/b/c",
        "a/b/c/d.gguf", "/x.gguf", "models/pipe",
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"--model {name}: there is no such folder"):
            read_model_facts(name)


@pytest.mark.parametrize("name", ["org/name", "gpt2", "x" * 5000])
def test_what_is_no_path_is_a_hub_name(name: str) -> None:
    assert read_model_facts(name) is None


def test_the_plan_fits_80_columns_and_estimates_the_memory(tmp_path: Path) -> None:
    config = ExperimentConfig(model="m/n", batch_sizes=tuple(range(1, 40)), engine_args=("--hf-token", "hush"))
    lines = setting_plan(config, facts(tmp_path), EIGHT_GPUS)
    assert max(map(len, lines)) <= 80
    assert any("12.6 GiB of weights" in line for line in lines)
    assert "hush" not in "".join(lines)
    assert lines[-1] == "verdict   can run"


def test_the_plan_says_why_a_setting_cannot_run(tmp_path: Path) -> None:
    lines = setting_plan(ExperimentConfig(tensor_parallel_size=5), facts(tmp_path), EIGHT_GPUS)
    assert "verdict   cannot run: --tensor-parallel-size 5 does not divide" in "\n".join(lines)


def plan(config: ExperimentConfig, read: ModelFacts | None, memory_gib: float | None = None) -> str:
    return " ".join(" ".join(setting_plan(config, read, EIGHT_GPUS, memory_gib)).split())


def test_the_plan_divides_the_weights_as_vllm_does(tmp_path: Path) -> None:
    """By PP a stage has a whole embedding, by TP a part of it: of 12.55 GiB, 0.24 GiB each are embedding and head."""
    read = facts(tmp_path)
    by = [
        memory_plan(ExperimentConfig(**{size: 4}), read, EIGHT_GPUS, None).weights_gib
        for size in ("tensor_parallel_size", "pipeline_parallel_size")
    ]
    assert by == [pytest.approx(12.5513 / 4, rel=1e-3), pytest.approx(12.0630 / 4 + 0.2441, rel=1e-3)]


def test_the_plan_says_how_many_requests_fit_in_one_wave(tmp_path: Path) -> None:
    config = ExperimentConfig(seq_lens=(512, 2048))
    # 80 GiB x 0.8 - 12.55 GiB of weights, at 512 KiB per token
    assert "requests that fit in one wave: 164 of length 512, 48 of length 2048" in plan(config, facts(tmp_path), 80.0)
    assert "one wave:" not in plan(config, facts(tmp_path))


def test_the_plan_takes_vllms_own_word_for_the_size_of_the_cache(tmp_path: Path) -> None:
    # 128 blocks of 16 tokens, of which vLLM holds one back; a request takes 32
    for words in (("--kv-cache-memory-bytes", str(2**30)), (f"--kv_cache_memory_bytes={2**30}",)):
        config = ExperimentConfig(seq_lens=(384,), engine_args=words)
        assert "1 GiB are available for it; requests that fit in one wave: 3 of length 384" in plan(
            config, facts(tmp_path)
        )


def test_the_plan_counts_a_byte_for_each_key_and_value_of_an_fp8_cache(tmp_path: Path) -> None:
    for words in (("--kv-cache-dtype", "fp8"), ("--kv_cache_dtype=fp8_e4m3",)):
        config = ExperimentConfig(seq_lens=(512,), engine_args=words)
        assert "requests that fit in one wave: 329 of length 512" in plan(config, facts(tmp_path), 80.0)
    config = ExperimentConfig(seq_lens=(512,), engine_args=("--kv-cache-dtype", "bfloat16"))
    assert "requests that fit in one wave: 164 of length 512" in plan(config, facts(tmp_path), 80.0)


def test_the_memory_of_a_quantized_model_is_unknown(tmp_path: Path) -> None:
    quantized = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    read = facts(tmp_path, **quantized)
    assert "unknown: quantized (awq), and its folder holds no weights" in plan(ExperimentConfig(), read, 80.0)
    inner = facts(tmp_path, text_config={**LLAMA_2_7B, **quantized})
    assert inner.quantization is not None
    assert inner.quantization.method == "awq"
    for words in (("--quantization", "fp8"), ("-q", "fp8"), ("--quantization=fp8",)):
        said = plan(ExperimentConfig(engine_args=words), facts(tmp_path), 80.0)
        assert "weights unknown: --quantization 'fp8' changes the sizes of weights" in said
    said = plan(ExperimentConfig(engine_args=("--kv-cache-dtype", "nvfp4")), facts(tmp_path), 80.0)
    assert "about 12.6 GiB of weights per device (by formula); KV cache unknown: the formulas do not know" in said


def test_the_plan_says_that_the_weights_do_not_fit(tmp_path: Path) -> None:
    assert (
        "memory about 12.6 GiB of weights per device (by formula) verdict cannot run: 12.6 GiB of weights do not fit "
        "into 9.6 GiB of a device (its memory x --gpu-memory-utilization); raise --tensor-parallel-size or "
        "--pipeline-parallel-size"
    ) in plan(ExperimentConfig(), facts(tmp_path), 12.0)
    # With a size of its own for the KV cache vLLM looks at no share.
    asked = ExperimentConfig(engine_args=("--kv-cache-memory-bytes", "1G"))
    assert "verdict can run" in plan(asked, facts(tmp_path), 12.0)


@pytest.mark.parametrize(
    ("engine_args", "dp", "changes", "coupled"),
    [
        (("--enable-expert-parallel",), 2, {"num_local_experts": 8}, True),
        (("-ep",), 2, {"num_local_experts": 8}, True),
        ((), 2, {"num_local_experts": 8}, False),
        (("--enable-expert-parallel",), 1, {"num_local_experts": 8}, False),
        (("--enable-expert-parallel",), 2, {}, False),
        *(
            (("--enable-expert-parallel",), 2, experts, True)
            for experts in (
                {"num_experts": 8},
                {"n_routed_experts": 8},
                {"moe_num_experts": [64, 64]},
                {"num_experts_per_layer": [0, 8]},
                {"block_configs": [{"block_type": "mamba"}, {"block_type": "moe", "n_routed_experts": 8}]},
                {"ffn_config": {"moe_num_experts": 16}},
                {"text_config": {"num_experts": 128}},
            )
        ),
        (("--enable-expert-parallel",), 2, {"n_routed_experts": 0, "vision_config": {"num_experts": 8}}, False),
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
    assert facts(tmp_path, torch_dtype=written).dtype_used(asked) == used
    size = {"float32": 4, "float16": 2, "bfloat16": 2}[used]
    assert weights_gib(tmp_path, dtype=asked, torch_dtype=written) == pytest.approx(6_738_415_616 * size / GIB)
    assert kv_bytes(tmp_path, dtype=asked, torch_dtype=written) == 2 * 32 * 32 * 128 * size


@pytest.mark.parametrize(("kv_dtype", "size"), [("fp8", 1), ("fp8_e4m3", 1), ("int8", 1), ("float32", 4)])
def test_the_cache_may_have_a_type_of_its_own(tmp_path: Path, kv_dtype: str, size: int) -> None:
    found = planned(tmp_path, engine_args=("--kv-cache-dtype", kv_dtype))
    assert found.kv_bytes_per_token == 2 * 32 * 32 * 128 * size


def test_the_fullest_stage_counts_where_layers_do_not_divide(tmp_path: Path) -> None:
    assert kv_bytes(tmp_path, pp=2, num_hidden_layers=33) == 2 * 17 * 32 * 128 * 2
    assert weights_gib(tmp_path, pp=2, num_hidden_layers=33) == weights_gib(tmp_path, pp=2, num_hidden_layers=34)


def test_an_embedding_that_is_the_output_head_too_is_held_once(tmp_path: Path) -> None:
    one = weights_gib(tmp_path, tie_word_embeddings=True)
    assert one == pytest.approx(weights_gib(tmp_path) - 32000 * 4096 * 2 / GIB)


@pytest.mark.parametrize(
    "missing", ["num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size"]
)
def test_without_one_of_its_sizes_the_weights_are_unknown(tmp_path: Path, missing: str) -> None:
    assert planned(tmp_path, **{missing: None}).weights_gib is None  # type: ignore[arg-type]


def test_the_cache_needs_heads_layers_and_a_size_of_a_head(tmp_path: Path) -> None:
    assert kv_bytes(tmp_path, num_hidden_layers=None) is None
    assert kv_bytes(tmp_path, hidden_size=None) is None
    assert kv_bytes(tmp_path, num_attention_heads=None, num_key_value_heads=None, head_dim=128) is None
    # A head may be larger than its share, and all heads have keys and values of their own where nothing is said.
    assert kv_bytes(tmp_path, head_dim=256) == 2 * 32 * 32 * 256 * 2
    assert kv_bytes(tmp_path, num_key_value_heads=None) == 2 * 32 * 32 * 128 * 2


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
        "TP x PP x DP is 8 devices, 4 on each node, but this machine has 3 GPUs; "
        "lower --tensor-parallel-size, --pipeline-parallel-size or --data-parallel-size"
    )
    assert "TP x PP x DP is 8 devices, but this machine has 4 GPUs" in (
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
    sizes = {"num_attention_heads": 24, "num_key_value_heads": 6, "vocab_size": 32256, "intermediate_size": 11040}
    read = facts(tmp_path, **sizes)
    devices = Devices("gpu", tuple(map(str, range(16))))
    found = infeasible(ExperimentConfig(tensor_parallel_size=tp), read, devices)
    assert found is None if reason is None else reason in (found or "")


@pytest.mark.parametrize(
    ("tp", "vocabulary", "refused"), [(4, 32000, False), (12, 32000, True), (12, 50257, False), (3, 50304, False)]
)
def test_the_padded_vocabulary_is_shared_out_evenly(tmp_path: Path, tp: int, vocabulary: int, refused: bool) -> None:
    read = facts(tmp_path, num_attention_heads=24, num_key_value_heads=24, vocab_size=vocabulary)
    devices = Devices("gpu", tuple(map(str, range(16))))
    found = infeasible(ExperimentConfig(tensor_parallel_size=tp), read, devices)
    assert (found or "").startswith("--tensor-parallel-size 12 does not divide the model's vocabulary") is refused
    unknown = dataclasses.replace(read, architecture="MambaForCausalLM")
    assert infeasible(ExperimentConfig(tensor_parallel_size=tp), unknown, devices) is None


# --- the memory plan ----------------------------------------------------------------------------------------------


def memory(folder: Path, memory_gib: float | None = 80.0, devices: Devices = EIGHT_GPUS, **changes: Any) -> MemoryPlan:
    return memory_plan(ExperimentConfig(**changes), facts(folder), devices, memory_gib)


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
    ("engine_args", "changes", "said"),
    [
        (("--quantization", "fp8"), {}, "weights unknown: --quantization 'fp8' changes the sizes of weights"),
        (("-q", "fp8"), {}, "weights unknown: --quantization 'fp8' changes the sizes of weights"),
        (
            ("--load-format", "bitsandbytes"),
            {},
            "weights unknown: --load-format 'bitsandbytes' may change the sizes of weights",
        ),
        (("--load_format=gguf",), {}, "weights unknown: --load-format 'gguf' may change the sizes of weights"),
        (("--kv-cache-dtype", "turbo4"), {}, "KV cache unknown: the formulas do not know --kv-cache-dtype 'turbo4'"),
        (("--speculative-config", "{}"), {}, "memory unknown: the formulas do not know what --speculative-config"),
        ((), {"quantization_config": {}}, "weights unknown: quantized (in a way that it does not name)"),
        ((), {"quantization_config": {"bits": 4}}, "weights unknown: quantized (in a way that it does not name)"),
        ((), {"compression_config": {"quant_method": "compressed-tensors"}}, "weights unknown: quantized (compressed-"),
        ((), {"quantization_config": {"quant_method": "mxfp4"}}, "weights unknown: quantized (mxfp4): its sizes in"),
        ((), {"num_local_experts": 8}, "memory unknown: the formulas know LlamaForCausalLM only without experts"),
        (
            (),
            {"architectures": ["MambaForCausalLM"]},
            "memory unknown: the formulas do not know the architecture MambaForCausalLM",
        ),
        ((), {"architectures": None}, "memory unknown: the formulas do not know the architecture of a model"),
        ((), {"torch_dtype": "float64"}, "memory unknown: the formulas do not know the type 'float64'"),
        ((), {"sliding_window": 4096}, "KV cache unknown: not every layer of LlamaForCausalLM keeps all tokens"),
        ((), {"layer_types": ["full_attention", "sliding_attention"]}, "KV cache unknown: not every layer"),
        ((), {"kv_lora_rank": 512}, "KV cache unknown: not every layer"),
        (
            (),
            {"vision_config": {"depth": 32}},
            "memory unknown: the formulas know LlamaForCausalLM only as a model for text",
        ),
        (
            (),
            {"audio_config": {"depth": 32}},
            "memory unknown: the formulas know LlamaForCausalLM only as a model for text",
        ),
    ],
)
def test_what_the_formulas_do_not_know_is_unknown_and_says_why(
    tmp_path: Path, engine_args: tuple[str, ...], changes: dict[str, object], said: str
) -> None:
    found = memory_plan(ExperimentConfig(engine_args=engine_args), facts(tmp_path, **changes), EIGHT_GPUS, 80.0)
    assert len(found.unknown) == 1
    assert found.unknown[0].startswith(said)
    what = said.split()[0]
    assert (found.weights_gib is None) is (what in ("weights", "memory"))
    assert (found.kv_bytes_per_token is None) is (what in ("KV", "memory"))
    assert found.requests_in_one_wave(100) is None


def test_an_older_modelopt_checkpoint_says_beside_its_config_that_it_is_quantized(tmp_path: Path) -> None:
    beside = tmp_path / "hf_quant_config.json"
    beside.write_text(json.dumps({"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}))
    found = planned(tmp_path)
    assert found.unknown == (
        "weights unknown: quantized (modelopt), and its folder holds no weights",
        "KV cache unknown: its checkpoint sets a type for keys and values",
    )
    for broken in ("{", "[]", '"x"', "0"):
        beside.write_text(broken)
        assert planned(tmp_path).weights_gib is None


def test_a_partition_of_the_users_own_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "10,22")
    assert planned(tmp_path, pp=2).unknown == (
        "memory unknown: VLLM_PP_LAYER_PARTITION decides how layers are divided",
    )
    assert planned(tmp_path).unknown == ()


def test_stages_without_a_layer_have_no_plan(tmp_path: Path) -> None:
    assert planned(tmp_path, pp=2, num_hidden_layers=1).unknown == (
        "memory unknown: it has fewer layers than 2 stages",
    )


@pytest.mark.parametrize("key", ["architectures", "quantization_config"])
def test_names_from_a_file_are_cleaned_before_they_are_said(tmp_path: Path, key: str) -> None:
    name = "\x1b[31mred\n" + "x" * 5000
    said = planned(tmp_path, **{key: [name] if key == "architectures" else {"quant_method": name}}).unknown[0]  # type: ignore[arg-type]
    assert not has_control(said)
    assert "red" in said
    assert len(said) < 300


@pytest.mark.parametrize(
    ("layers", "pp", "counts"),
    [
        (32, 1, [32]),
        (32, 4, [8] * 4),
        (33, 2, [17, 16]),
        (30, 4, [7, 8, 8, 7]),
        (31, 4, [8, 8, 8, 7]),
        (5, 3, [2, 2, 1]),
    ],
)
def test_layers_go_to_stages_as_in_vllm(layers: int, pp: int, counts: list[int]) -> None:
    assert layers_of_stages(layers, pp) == counts


def test_the_stage_in_which_least_fits_counts(tmp_path: Path) -> None:
    # Stages of 7, 8, 8 and 7 layers; the first and the last hold a vocabulary that is larger than a layer.
    config = ExperimentConfig(pipeline_parallel_size=4, gpu_memory_utilization=0.5)
    read = facts(tmp_path, num_hidden_layers=30, vocab_size=256000)
    found = memory_plan(config, read, EIGHT_GPUS, 20.0)
    layer_gib, vocabulary_gib = (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) * 2 / GIB, 256000 * 4096 * 2 / GIB
    norm_gib = 4096 * 2 / GIB
    assert found.weights_gib == pytest.approx(7 * layer_gib + vocabulary_gib + norm_gib)
    of_stages = [(10 - 7 * layer_gib - vocabulary_gib) / 7, (10 - 8 * layer_gib) / 8]
    assert found.pool_gib is not None
    assert found.kv_bytes_per_token is not None
    of_a_layer = found.kv_bytes_per_token / (2 * 32 * 128 * 2)
    assert found.pool_gib / of_a_layer == pytest.approx(min(of_stages), rel=1e-4)


@pytest.mark.parametrize(
    ("tp", "dp", "engine_args", "experts_here"),
    [
        (1, 1, (), 8),
        (4, 1, (), 2),
        (4, 1, ("--enable-expert-parallel",), 2),
        (1, 4, ("--enable-expert-parallel",), 2),
        (2, 4, ("-ep",), 1),
        (1, 4, (), 8),  # replicas of their own
        (3, 1, ("--enable-expert-parallel",), 3),  # the fullest device
    ],
)
def test_experts_are_split_or_shared_out(
    tmp_path: Path, tp: int, dp: int, engine_args: tuple[str, ...], experts_here: int
) -> None:
    config = ExperimentConfig(tensor_parallel_size=tp, data_parallel_size=dp, engine_args=engine_args)
    sizes = {"num_attention_heads": 36, "num_key_value_heads": 36, "hidden_size": 36 * 128}
    read = facts(tmp_path, architectures=["MixtralForCausalLM"], num_local_experts=8, **sizes)
    found = memory_plan(config, read, EIGHT_GPUS, None).weights_gib
    hidden = sizes["hidden_size"]
    layer = 4 * hidden**2 / tp + 8 * hidden + experts_here * 3 * hidden * 11008 + 2 * hidden
    assert found == pytest.approx((32 * layer + 2 * 32000 * hidden / tp + hidden) * 2 / GIB)


# --- the printed plan ---------------------------------------------------------------------------------------------


def test_the_cache_of_the_largest_point_is_that_of_its_batch_and_its_longest_request(tmp_path: Path) -> None:
    config = ExperimentConfig(batch_sizes=(4, 16, 1), seq_lens=(2048, 512), max_tokens=128)
    # 16 requests of 2176 tokens, at 512 KiB each
    assert "17 GiB of KV cache per device for the largest point in one wave" in plan(config, facts(tmp_path))


def test_the_plan_of_a_search_does_not_count_its_points(tmp_path: Path) -> None:
    runs, read = "3 to 10 timed runs each", facts(tmp_path)
    assert f"128 output tokens: 12 points, {runs}" in plan(ExperimentConfig(), read)
    assert f"128 output tokens, {runs}" in plan(ExperimentConfig(batch_sizes=AUTO_SIZES), read)
    of_workload = ExperimentConfig(batch_sizes=AUTO_SIZES, prompts_file="jobs.jsonl", workload_longest=9)
    assert "jobs.jsonl, auto (up to 1024) requests at once, the longest request takes 9" in plan(of_workload, read)


def test_the_plan_says_in_a_line_that_activations_are_not_counted(tmp_path: Path) -> None:
    config, read = ExperimentConfig(), facts(tmp_path)
    margin = "margin activations are not counted: in our runs on GPUs vLLM had 0.7 to 4.1 GiB (1 to 7 %) less"
    assert margin in plan(config, read, 80.0)
    for other, memory_gib in ((config, None), (config, 12.0)):
        assert "activations" not in plan(other, read, memory_gib)
    asked = ExperimentConfig(engine_args=("--kv-cache-memory-bytes", str(2**30)))
    assert "activations" not in plan(asked, read, 80.0)


def test_weights_that_fill_the_share_exactly_leave_nothing() -> None:
    found = Needs(weights_gib=8.0, source="formula", kv_gib=1.0, pool_gib=0.0)
    assert "into 8 GiB of a device" in (memory_against(found) or "")
    assert _memory_words(ExperimentConfig(), found) == "about 8 GiB of weights per device (by formula)"
    assert memory_against(dataclasses.replace(found, pool_gib=0.001)) is None


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


def test_an_mlp_that_tp_does_not_divide_cannot_run(tmp_path: Path) -> None:
    reason = "--tensor-parallel-size 2 does not divide the model's intermediate size of 11007"
    odd = facts(tmp_path, architectures=["LlamaForCausalLM"], intermediate_size=11007)
    assert infeasible(ExperimentConfig(tensor_parallel_size=2), odd, EIGHT_GPUS) == reason
    assert infeasible(ExperimentConfig(tensor_parallel_size=1), odd, EIGHT_GPUS) is None
    # Of a class that the formulas do not know it is vLLM's to say.
    unknown = facts(tmp_path, architectures=["AnyForCausalLM"], intermediate_size=11007)
    assert infeasible(ExperimentConfig(tensor_parallel_size=2), unknown, EIGHT_GPUS) is None
    experts = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "moe_intermediate_size": 101}
    mixture = facts(tmp_path, **experts)
    assert "intermediate size of 101" in str(infeasible(ExperimentConfig(tensor_parallel_size=2), mixture, EIGHT_GPUS))
    whole = ExperimentConfig(tensor_parallel_size=2, engine_args=("--enable-expert-parallel",))
    assert infeasible(whole, mixture, EIGHT_GPUS) is None


@pytest.mark.parametrize("name", ["GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"])
def test_a_gemma_that_says_it_has_a_head_is_unknown(name: str, tmp_path: Path) -> None:
    for said, is_known in ((True, True), (None, True), (False, False)):
        read = facts(tmp_path, architectures=[name], head_dim=128, tie_word_embeddings=said)
        found = memory_plan(ExperimentConfig(), read, EIGHT_GPUS, 80.0)
        assert (found.weights_gib is not None) is is_known, found.unknown
