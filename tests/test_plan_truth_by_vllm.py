"""Plans by vLLM against the truth: the table, and a few models asked of the vLLM that is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.installed_vllm import release_of, vllm_version
from batch_inference.plan.by_vllm import LIMIT_VARIABLE, ask_vllm
from batch_inference.plan.devices import devices_elsewhere
from batch_inference.plan.said import Said
from benchmarks import plan_truth_by_vllm
from benchmarks.plan_truth import FOLDER
from benchmarks.plan_truth_by_vllm import DOUBTS, Compared, compared, report
from conftest import REPOSITORY

# A truth of two lengths, and one that was refused.
KNOWN = {"weights_gib": 10.0, "requests_in_one_wave": {"640": 100.4, "2176": 30.0}}
REFUSED = {"refused": "ValidationError: 1 validation error for VllmConfig"}
# The truth is vLLM 0.32's. Before: no MLA in its build for the CPU; fp8 refused where its blocks do not fit, which are
# padded now; one block less for the state of a request of Mamba 2.
TRUE_SINCE = {"deepseek-v2-lite": (0, 29), "qwen3-30b-a3b-fp8": (0, 29), "falcon-h1-7b": (0, 32)}


def said(**changes: object) -> Said:
    return Said("9.9", **{"weights_gib": 10.0, "waves": [100, 29, 0], **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("truth", "answer", "verdict"),
    [
        (KNOWN, said(), "right"),
        (KNOWN, said(weights_gib=10.2), "wrong"),
        (KNOWN, said(waves=[94, 29, 0]), "wrong"),
        (KNOWN, said(waves=None), "in part"),
        (KNOWN, Said("9.9", unknown="why"), "unknown"),
        (REFUSED, Said("9.9", refusal="heads"), "right"),
        (REFUSED, Said("9.9", unknown="why"), "unknown"),
        (REFUSED, said(), "wrong"),
    ],
)
def test_a_plan_is_right_wrong_or_unknown(truth: dict[str, object], answer: Said, verdict: str) -> None:
    assert Compared("any", "tp1_pp1", truth, answer).verdict() == verdict


def test_a_truth_in_doubt_is_named_and_no_plan_is_wrong_by_it() -> None:
    (model, (reason, names)) = next(iter(DOUBTS.items()))
    settings = [Compared(model, name, KNOWN, said(waves=[1, 1, 1])) for name in names]
    text = "\n".join(report([*settings, Compared("other", "tp1_pp1", KNOWN, said())]))
    assert "2 of\n2 models right in all their settings, 1 where" in text
    assert text.count(reason) == len(names)


def test_the_table_in_docs_says_that_nothing_is_wrong() -> None:
    text = (REPOSITORY / "docs" / "plan_truth_by_vllm.md").read_text()
    *_, all_settings, refused = (line for line in text.splitlines() if line.startswith(("| **all", "| refused")))
    for line, least in ((all_settings, 250), (refused, 19)):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        _, count, right, in_part, unknown, wrong, in_doubt = cells
        assert int(right) >= least
        assert (in_part, unknown, wrong) == ("", "", "")
        assert int(right) + int(in_doubt or 0) == int(count)


def test_it_ends_with_1_where_a_plan_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for answer, code in ((said(), 0), (said(weights_gib=1.0), 1)):
        found = [Compared("any", "tp1_pp1", KNOWN, answer)]
        monkeypatch.setattr(plan_truth_by_vllm, "compared", lambda found=found: found)
        assert plan_truth_by_vllm.main() == code
    assert "| **all settings** |" in capsys.readouterr().out


@pytest.mark.vllm
def test_the_vllm_that_is_installed_plans_as_the_truth_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A dense model, mixtures, quantized ones, MLA, sliding windows, a hybrid and one that sees."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(LIMIT_VARIABLE)
    models = {"qwen3-0.6b", "mixtral-8x7b", "llama-3.1-8b-awq", "gemma-2-9b", "qwen2.5-vl-7b", "bloom-7b1", "phi-4"}
    models |= {model for model, since in TRUE_SINCE.items() if (release_of(vllm_version()) or ()) >= since}
    found = compared(sorted(models))
    assert {one.model for one in found} == models
    assert {one.verdict() for one in found} <= {"right", "truth in doubt"}
    assert [one.said.unknown for one in found] == [None] * len(found)


@pytest.mark.vllm
def test_what_only_this_machine_cannot_build_is_unknown_and_sizes_are_never_guessed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(LIMIT_VARIABLE)
    words = [(), ("--quantization", "fp8"), ("--cpu-offload-gb", "1"), ("--no-such-flag",),
             ("--load-format", "bitsandbytes")]  # fmt: skip
    models = ["glm-5", *["qwen3-0.6b"] * 4]
    settings = [
        (ExperimentConfig(model=str(FOLDER / model), engine_args=flags), None, 80.0)
        for model, flags in zip(models, words, strict=True)
    ]
    answers = ask_vllm(settings, devices_elsewhere(8), lambda line: print(line, file=sys.stderr))
    reasons = [answer.unknown or "" for answer in answers if answer]
    assert len(reasons) == 5
    assert all(answer and answer.refusal is None and answer.weights_gib is None for answer in answers)
    assert reasons[0]
    assert reasons[1:3] == ["weights are quantized while they load", "part of the weights goes to main memory"]
    assert "unrecognized arguments: --no-such-flag" in reasons[3]
    assert reasons[4] == "--load-format bitsandbytes may change the weights"
