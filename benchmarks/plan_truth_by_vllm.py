#!/usr/bin/env python3
"""How many plans by vLLM are right: the table of plan_truth.py for the plan that vLLM itself makes.

    python benchmarks/plan_truth_by_vllm.py >docs/plan_truth_by_vllm.md      with a Python that has vLLM

Asks it in one process for all settings of the truth, including those that vLLM refused. Some of the truth is in doubt
and listed. Prints Markdown.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.text import counted, table_in_markdown
from batch_inference.plan.by_vllm import LIMIT_VARIABLE, ask_vllm
from batch_inference.plan.devices import devices_elsewhere
from batch_inference.plan.said import Said
from benchmarks.plan_truth import FOLDER, IN_PART, MEMORY_GIB, RIGHT, SHARE, UNKNOWN, WRONG, Planned, verdict

TOKENS, MAX_TOKENS = (640, 2176, 8320), 128
IN_DOUBT = "truth in doubt"
COLUMNS = (RIGHT, IN_PART, UNKNOWN, WRONG, IN_DOUBT)
# How the truth was made explains it. Asked again with blocks that vLLM fits to layers with a state, the same
# program gives our numbers for the first (nemotron-h-8b at TP=2: 368.79 for 122.78). For the second it laid out the
# KV cache of the fullest stage only, while an engine does it for all stages together.
_BLOCKS = "its layers that keep a state were given blocks of 16 tokens"
_STAGES = "the cache was laid out for one stage alone"
DOUBTS = {
    "falcon-h1-7b": (_BLOCKS, ("tp1_pp2", "tp1_pp4", "tp2_pp1")),
    "gemma-3-27b": (_STAGES, ("tp1_pp4",)),
    "gemma-4-26b-a4b": (_STAGES, ("tp1_pp2", "tp1_pp4")),
    "nemotron-h-8b": (_BLOCKS, ("tp1_pp2", "tp1_pp4", "tp2_pp1", "tp4_pp1", "tp8_pp1")),
    "qwen3-next-80b-a3b": (_BLOCKS, ("tp1_pp4", "tp8_pp1")),
    "qwen3.5-27b": (_BLOCKS, ("tp1_pp2", "tp1_pp4")),
}
# Errors of the machine that the truth was made on, or of the program that made it.
_NO_REFUSALS = ("NotImplementedError", "1 validation error for ModelConfig")


@dataclass(frozen=True)
class Compared:
    """A setting: what the truth says, and what a plan does."""

    model: str
    name: str
    truth: dict[str, Any]
    said: Said

    @property
    def is_refused(self) -> bool:
        return "refused" in self.truth

    def verdict(self) -> str:
        if self.is_refused:
            return RIGHT if self.said.refusal else UNKNOWN if self.said.unknown else WRONG
        waves = dict(zip(TOKENS, self.said.waves or (None,) * len(TOKENS), strict=True))
        planned = Planned(self.said.weights_gib, waves)
        tp, pp = _sizes(self.name)
        found = verdict(lambda *_: planned, self.model, tp, pp, self.truth)
        return IN_DOUBT if found == WRONG and self.name in DOUBTS.get(self.model, ("", ()))[1] else found


def compared(models: Sequence[str] = ()) -> list[Compared]:
    """All settings, or those of some models, without the refusals that say nothing about a model."""
    settings = [
        (model, name, truth)
        for model, truths in json.loads((FOLDER / "truth.json").read_text()).items()
        for name, truth in truths.items()
        if (not models or model in models) and not any(words in truth.get("refused", "") for words in _NO_REFUSALS)
    ]
    configs = [(_config(model, name), None, MEMORY_GIB) for model, name, _ in settings]
    answers = ask_vllm(configs, devices_elsewhere(16), lambda line: print(line, file=sys.stderr))
    return [
        Compared(*setting, said or Said("", unknown="vLLM is not installed"))
        for setting, said in zip(settings, answers, strict=True)
    ]


def _config(model: str, name: str) -> ExperimentConfig:
    """As the truth was made: with cached prefixes and the parts for images; our engines have neither."""
    tp, pp = _sizes(name)
    return ExperimentConfig(
        model=str(FOLDER / model), tensor_parallel_size=tp, pipeline_parallel_size=pp, gpu_memory_utilization=SHARE,
        seq_lens=tuple(tokens - MAX_TOKENS for tokens in TOKENS), max_tokens=MAX_TOKENS,
        engine_args=("--enable-prefix-caching", "--no-language-model-only"),
    )  # fmt: skip


def _sizes(name: str) -> tuple[int, int]:
    tp, pp = (int(size[2:]) for size in name.split("_"))
    return tp, pp


def report(settings: list[Compared]) -> Iterator[str]:
    numbers = [one for one in settings if not one.is_refused]
    models = {one.model: [two.verdict() for two in numbers if two.model == one.model] for one in numbers}
    right = sum(set(verdicts) <= {RIGHT, IN_DOUBT} for verdicts in models.values())
    strictly = sum(set(verdicts) == {RIGHT} for verdicts in models.values())
    yield f"Plans by vLLM {settings[0].said.version} against the truth in `tests/plan_truth`: {right} of"
    yield f"{counted(len(models), 'model')} right in all their settings, {strictly} where the truth in doubt counts"
    yield "as true.\n"
    refused = [one for one in settings if one.is_refused]
    rows = [(model, Counter(verdicts)) for model, verdicts in models.items()]
    rows.append(("**all settings**", sum((count for _, count in rows), Counter())))
    rows.append(("refused by vLLM", Counter(one.verdict() for one in refused)))
    header: tuple[str, ...] = ("model", "settings", *COLUMNS)
    cells = [[name, str(count.total()), *(str(count[one] or "") for one in COLUMNS)] for name, count in rows]
    yield table_in_markdown(header, cells, ["left", *["right"] * (len(header) - 1)])
    yield "\nWhere the truth is in doubt (requests of 640, 2,176 and 8,320 tokens at once):\n"
    header = ("model", "setting", "truth", "plan", "of the truth")
    doubted = [one for one in numbers if one.verdict() in (IN_DOUBT, WRONG)]
    yield table_in_markdown(header, [_doubt(one) for one in doubted], ["left"] * len(header))


def _doubt(one: Compared) -> list[str]:
    true = " / ".join(
        str(fit) for _, fit in sorted(one.truth["requests_in_one_wave"].items(), key=lambda of: int(of[0]))
    )
    planned = " / ".join(map(str, one.said.waves or ()))
    return [one.model, one.name, true, planned, DOUBTS.get(one.model, ("",))[0]]


def main() -> int:
    os.environ.setdefault(LIMIT_VARIABLE, "1800")
    started_s = time.monotonic()
    settings = compared()
    print("\n".join(report(settings)))
    print(f"{counted(len(settings), 'setting')} in {time.monotonic() - started_s:.0f} s", file=sys.stderr)
    return 1 if any(one.verdict() == WRONG for one in settings) else 0


if __name__ == "__main__":
    sys.exit(main())
