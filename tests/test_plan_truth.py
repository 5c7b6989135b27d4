"""Plans of models that people run, against the sizes that vLLM's own code gives (tests/plan_truth)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from batch_inference.core.config import ExperimentConfig
from batch_inference.plan.architectures import ARCHITECTURES
from batch_inference.plan.devices import devices_elsewhere
from batch_inference.plan.memory import memory_plan
from batch_inference.plan.model import read_model_facts
from benchmarks.plan_truth import (
    FOLDER,
    IN_PART,
    RIGHT,
    UNKNOWN,
    VERDICTS,
    WAYS,
    WRONG,
    Planned,
    by_formula,
    settings,
    table,
    verdict,
)
from builders import infeasible
from conftest import REPOSITORY

SETTINGS = list(settings())
# What vLLM refuses for what a setting is, and not for the machine that it was asked on.
REFUSED = ("1 validation error for VllmConfig", "AssertionError")
# Where the formulas fall behind this, an architecture was lost.
LEAST_RIGHT, LEAST_IN_PART = 146, 24
# In the list without a model in the truth: the class of another one that is there.
WITHOUT_TRUTH = {"GemmaForCausalLM", "Gemma3ForCausalLM", "Cohere2ForCausalLM"}


@pytest.mark.parametrize(
    ("model", "tp", "pp", "truth"), SETTINGS, ids=[f"{model}-tp{tp}-pp{pp}" for model, tp, pp, _ in SETTINGS]
)
def test_a_plan_by_formula_is_right_or_unknown(model: str, tp: int, pp: int, truth: dict[str, Any]) -> None:
    assert verdict(by_formula, model, tp, pp, truth) != WRONG


def test_the_formulas_know_as_many_as_before_and_the_table_in_docs_is_theirs() -> None:
    found = Counter(verdict(by_formula, *setting) for setting in SETTINGS)
    assert (found[RIGHT], found[IN_PART]) >= (LEAST_RIGHT, LEAST_IN_PART)
    assert (REPOSITORY / "docs" / "plan_truth.md").read_text() == "\n".join([*table(WAYS), ""])


def test_each_architecture_of_the_list_was_compared() -> None:
    configs = [json.loads(path.read_text()) for path in FOLDER.glob("*/config.json")]
    compared = {config["architectures"][0] for config in configs}
    assert set(ARCHITECTURES) - compared == WITHOUT_TRUTH


def _truths() -> dict[str, dict[str, Any]]:
    truths: dict[str, dict[str, Any]] = json.loads((FOLDER / "truth.json").read_text())
    return truths


@pytest.mark.parametrize("model", _truths())
def test_what_vllm_refuses_cannot_run_and_nothing_else(model: str) -> None:
    for name, truth in _truths()[model].items():
        tp, pp = (int(size[2:]) for size in name.split("_"))
        config = ExperimentConfig(
            model=str(FOLDER / model), tensor_parallel_size=tp, pipeline_parallel_size=pp, seq_lens=(512,)
        )
        reason = infeasible(config, read_model_facts(config.model), devices_elsewhere(tp * pp))
        refused = any(word in truth.get("refused", "") for word in REFUSED)
        assert (reason is not None) is refused, (name, reason, truth)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("deepseek-v3.2", "memory unknown: the formulas do not know the architecture DeepseekV32ForCausalLM"),
        ("nemotron-super-49b", "memory unknown: the formulas do not know the architecture DeciLMForCausalLM"),
        ("llama-3.1-8b-awq", "weights unknown: quantized (awq), and its folder holds no weights"),
        ("gpt-oss-120b", "weights unknown: quantized (mxfp4): its sizes in vLLM differ from those in its files"),
        (
            "mistral-7b-v0.1",
            "KV cache unknown: not every layer of MistralForCausalLM keeps all tokens (sliding_window)",
        ),
        ("gemma-2-9b", "KV cache unknown: not every layer of Gemma2ForCausalLM keeps all tokens (sliding_window)"),
    ],
)
def test_a_plan_says_why_it_does_not_know(model: str, said: str) -> None:
    config = ExperimentConfig(model=str(FOLDER / model))
    found = memory_plan(config, read_model_facts(config.model), devices_elsewhere(1), 80.0)
    assert found.unknown[0].startswith(said)


def test_stages_of_an_architecture_that_vllm_has_changed_are_unknown() -> None:
    config = ExperimentConfig(model=str(FOLDER / "gpt-neox-20b"), pipeline_parallel_size=2)
    found = memory_plan(config, read_model_facts(config.model), devices_elsewhere(2), 80.0)
    assert found.unknown == (
        "weights unknown: which stages hold the embedding of this architecture differs between versions of vLLM",
    )


# --- the check itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights_gib", "requests", "expected"),
    [
        (10.0, 100, RIGHT),
        (10.09, 104, RIGHT),
        (None, None, UNKNOWN),
        (10.0, None, IN_PART),
        (None, 100, IN_PART),
        (10.11, 100, WRONG),
        (9.89, 100, WRONG),
        (10.0, 106, WRONG),
        (10.0, 94, WRONG),
        (None, 94, WRONG),
    ],
)
def test_a_verdict_is_the_worst_of_its_parts(weights_gib: float | None, requests: int | None, expected: str) -> None:
    def planner(folder: Path, tp: int, pp: int, tokens: list[int]) -> Planned:
        assert (folder, tp, pp, tokens) == (FOLDER / "a", 2, 4, [640])
        return Planned(weights_gib, {640: requests})

    truth = {"weights_gib": 10.0, "requests_in_one_wave": {"640": 100.5}}
    assert verdict(planner, "a", 2, 4, truth) == expected


def test_another_way_to_plan_is_another_column() -> None:
    def nothing(_folder: Path, _tp: int, _pp: int, tokens: list[int]) -> Planned:
        return Planned(None, dict.fromkeys(tokens))

    head, line, *rows = table({"by formula": by_formula, "by nobody": nothing})
    assert head.endswith(f"| by nobody: {' | '.join(VERDICTS)} |")
    assert head.count("|") == line.count("|") == rows[-1].count("|")
    assert rows[-1].endswith(f"|  |  | {len(SETTINGS)} |  |")
