"""What an error of vLLM's is taken for: a refusal, which holds everywhere, or nothing known."""

from __future__ import annotations

import pytest

from batch_inference.plan.refusals import is_about_length, judged, may_pass

TOO_LONG = (
    "1 validation error for ModelConfig\n  Value error, User-specified max_model_len (8320) is greater than the "
    "derived max_model_len (max_position_embeddings=2048.0 or model_max_length=None in model's config.json). To allow "
    "overriding it, set the env var VLLM_ALLOW_LONG_MAX_MODEL_LEN=1. ... a CUDA array out-of-bounds error. "
    "[type=value_error, input_value=ArgsKwargs((), {...}), input_type=ArgsKwargs]\n    For further information visit x"
)
HEADS = "Total number of attention heads (28) must be divisible by tensor parallel size (8)"


@pytest.mark.parametrize(
    ("error", "refusal"),
    [
        (
            ValueError(f"1 validation error for VllmConfig\n  Value error, {HEADS}. [type=value_error, input_value=A]"),
            HEADS,
        ),
        (AssertionError("100352 is not divisible by 10"), "100352 is not divisible by 10"),
        (
            ValueError("Weight input_size_per_partition = 1792 is not divisible by weight quantization block_k = 128."),
            "Weight input_size_per_partition = 1792 is not divisible by weight quantization block_k = 128",
        ),
        (
            NotImplementedError("Pipeline parallelism is not supported for this model. Supported models implement x."),
            "Pipeline parallelism is not supported for this model",
        ),
        (
            AttributeError("'PPMissingLayer' object has no attribute 'tie_weights'"),
            "AttributeError: 'PPMissingLayer' object has no attribute 'tie_weights'",
        ),
    ],
)
def test_what_vllm_refuses_everywhere_is_said_in_its_words(error: Exception, refusal: str) -> None:
    found = judged(error)
    assert (found.refusal, found.unknown) == (refusal, None)


def test_a_length_is_refused_although_vllm_speaks_of_cuda_too() -> None:
    found = judged(ValueError(TOO_LONG))
    assert found.refusal is not None
    assert found.refusal.startswith("User-specified max_model_len (8320) is greater than")
    assert found.refusal.endswith("in model's config.json)")
    assert is_about_length(found.refusal)
    assert not is_about_length(HEADS)
    assert not is_about_length(None)


def test_a_bare_assertion_is_told_by_its_line() -> None:
    tp_size, total_num_kv_heads = 4, 10
    try:
        assert total_num_kv_heads % tp_size == 0
    except AssertionError as error:
        # As vLLM's are, which nobody has rewritten: without a text.
        found = judged(AssertionError().with_traceback(error.__traceback__))
    assert found.refusal == "assert total_num_kv_heads % tp_size == 0"


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError("Sparse Attention is not supported on CPU."),
        NotImplementedError("is_act_and_mul=False is supported only for CUDA, XPU and ROCm for now"),
        NotImplementedError("Cannot copy out of meta tensor; no data!"),
        NotImplementedError("No MXFP4 MoE backend supports the deployment configuration. num_experts=128"),
        ValueError("Failed to find a kernel that can implement the layer: size 10 is not divisible by 16"),
        ValueError("World size (8) is larger than the number of available GPUs (0); divisible"),
        ModuleNotFoundError("No module named 'torchvision'"),
        RuntimeError("No CUDA GPUs are available"),
        TypeError("divisible"),
        KeyError("num_experts"),
        OSError("We couldn't connect to 'https://huggingface.co' to load the files"),
    ],
)
def test_what_belongs_to_the_machine_that_plans_is_never_an_obstacle(error: Exception) -> None:
    found = judged(error)
    assert found.refusal is None
    assert found.unknown


def test_words_are_one_line_that_steers_no_terminal_and_ends() -> None:
    found = judged(RuntimeError("first\x1b[2J\n  second " + "x" * 5000))
    assert found.unknown is not None
    assert found.unknown.startswith("RuntimeError: first")
    assert "\x1b" not in found.unknown
    assert "\n" not in found.unknown
    assert len(found.unknown) <= 300


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ImportError("x"), True),
        (RuntimeError("No module named 'av'"), True),
        (OSError(5, "Input/output error"), True),
        (OSError("Can't load image processor for 'model'"), False),
        (ImportError("cannot import name 'x' from 'vllm.y'"), False),
        (MemoryError(), True),
        (ValueError(HEADS), False),
    ],
)
def test_what_may_be_gone_the_next_time_is_not_kept(error: Exception, expected: bool) -> None:
    assert may_pass(error) is expected
