#!/usr/bin/env python3
"""How many plans are right: for models that people run, compared with the sizes that vLLM's own code gives.

    python benchmarks/plan_truth.py >docs/plan_truth.md

The truth is in tests/plan_truth (`truth.json`, vLLM 0.32): weights of the fullest device, and how many requests fit
at once into 80 GiB x 0.8 minus the weights. Prints a Markdown table. A way to plan is one line in `WAYS`.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from batch_inference.core.config import ExperimentConfig
from batch_inference.plan.devices import devices_elsewhere
from batch_inference.plan.memory import memory_plan
from batch_inference.plan.model import read_model_facts

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "plan_truth"
MEMORY_GIB, SHARE = 80.0, 0.8
WEIGHTS_WITHIN, REQUESTS_WITHIN = 0.01, 0.05
RIGHT, IN_PART, UNKNOWN, WRONG = VERDICTS = ("right", "in part", "unknown", "wrong")


@dataclass(frozen=True)
class Planned:
    """What a plan says; None for what it does not know."""

    weights_gib: float | None
    requests_in_one_wave: dict[int, int | None]  # by tokens of a request


Planner = Callable[[Path, int, int, list[int]], Planned]  # for a model folder at TP and PP, and so many tokens


def by_formula(folder: Path, tp: int, pp: int, tokens: list[int]) -> Planned:
    """As --dry-run plans without vLLM, for GPUs of 80 GiB."""
    config = ExperimentConfig(
        model=str(folder), tensor_parallel_size=tp, pipeline_parallel_size=pp, gpu_memory_utilization=SHARE
    )
    plan = memory_plan(config, read_model_facts(str(folder)), devices_elsewhere(tp * pp), MEMORY_GIB)
    return Planned(plan.weights_gib, {length: plan.requests_in_one_wave(length) for length in tokens})


WAYS: dict[str, Planner] = {"by formula": by_formula}


def settings() -> Iterator[tuple[str, int, int, dict[str, Any]]]:
    """(model, TP, PP, truth) of each setting for which vLLM gave an answer."""
    for model, truths in json.loads((FOLDER / "truth.json").read_text()).items():
        for name, truth in truths.items():
            if "weights_gib" in truth:
                tp, pp = (int(size[2:]) for size in name.split("_"))
                yield model, tp, pp, truth


def verdict(planner: Planner, model: str, tp: int, pp: int, truth: dict[str, Any]) -> str:
    """`in part`: what it says is right, but it does not say everything."""
    requests = _true_requests(truth)
    planned = planner(FOLDER / model, tp, pp, list(requests))
    parts = [_weights_are(planned.weights_gib, truth["weights_gib"])]
    parts += [_requests_are(planned.requests_in_one_wave[length], fit) for length, fit in requests.items()]
    if WRONG in parts:
        return WRONG
    return parts[0] if len(set(parts)) == 1 else IN_PART


def _true_requests(truth: dict[str, Any]) -> dict[int, float]:
    found = {int(length): fit for length, fit in truth["requests_in_one_wave"].items()}
    if not found and truth["weights_gib"] > MEMORY_GIB * SHARE:  # not even the weights fit
        return {640: 0.0}
    return found


def _weights_are(planned: float | None, true: float) -> str:
    if planned is None:
        return UNKNOWN
    # The truth has three decimals.
    return RIGHT if abs(planned - true) <= max(WEIGHTS_WITHIN * true, 0.0005) else WRONG


def _requests_are(planned: int | None, true: float) -> str:
    """Whole requests; the truth also has fractions."""
    if planned is None:
        return UNKNOWN
    least, most = math.floor(true * (1 - REQUESTS_WITHIN)), math.floor(true * (1 + REQUESTS_WITHIN))
    return RIGHT if least <= planned <= most else WRONG


def table(ways: dict[str, Planner]) -> list[str]:
    """One line per model, and one for all: in how many settings a plan is right."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    for model, tp, pp, truth in settings():
        for way, planner in ways.items():
            of_model = counts.setdefault(model, {way: Counter() for way in ways})
            of_model[way][verdict(planner, model, tp, pp, truth)] += 1
    all_models = {way: sum((of_model[way] for of_model in counts.values()), Counter()) for way in ways}
    rows = [*counts.items(), ("**all settings**", all_models)]
    heads = [f"{way}: {one}" if one == RIGHT else one for way in ways for one in VERDICTS]
    return [
        f"| model | settings | {' | '.join(heads)} |",
        f"|---|---|{'---|' * len(ways) * len(VERDICTS)}",
        *(_row(name, of_model) for name, of_model in rows),
    ]


def _row(name: str, by_way: dict[str, Counter[str]]) -> str:
    number = max(count.total() for count in by_way.values())
    cells = [str(count[one] or "") for count in by_way.values() for one in VERDICTS]
    return f"| {name} | {number} | {' | '.join(cells)} |"


def main() -> int:
    print("\n".join(table(WAYS)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
