#!/usr/bin/env python3
"""What --dry-run estimates compared with what vLLM reports: weights and KV cache of every result file given.

    python benchmarks/plan_check.py docs/routes docs/h200 docs/h100 >docs/plan_check.md

Models are looked up by the path in the file, from the current folder. If the vLLM that measured also made a plan,
it is beside the files: the output of --dry-run in NAME_plan.txt, or as JSON, for all of them, in plan_json.txt.
Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from batch_inference.core.config import ConfigError
from batch_inference.core.result_file import ResultFileError, load_result
from batch_inference.core.results import Result
from batch_inference.plan.devices import Devices
from batch_inference.plan.memory import memory_plan
from batch_inference.plan.model import facts_of

HEAD = (
    "| file | plan by | device | vLLM | weights GiB: plan | vLLM | ratio | GiB for KV: plan | vLLM | not counted "
    "| KV tokens: plan | vLLM | ratio |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Planned:
    """None means that the plan does not say."""

    weights_gib: float | None = None
    pool_gib: float | None = None
    kv_cache_tokens: int | None = None


def made_there(path: Path) -> Planned | None:
    """The plan beside a result file; None if there is none."""
    name = path.name.removesuffix("_results.json")
    text, for_all = path.with_name(f"{name}_plan.txt"), path.with_name("plan_json.txt")
    if text.exists():
        said = " ".join(text.read_text().split())
        # Recorded plans have the words of the program that made them.
        words = ("(?:of )?weights per", "are (?:there|available) for it")
        weights, pool = (re.search(rf"([0-9.]+) GiB {pattern}", said) for pattern in words)
        return Planned(weights and float(weights[1]), pool and float(pool[1]))
    if not for_all.exists():
        return None
    (found,) = (one for one in json.loads(for_all.read_text()) if one["name"] == name)
    return Planned(found["weights_gib"], None, found["kv_cache_tokens"])


def by_formula(result: Result) -> Planned:
    config, environment = result.config, result.environment
    kind, device = environment.device_kind or "gpu", environment.devices[0]
    # On the CPU all devices share one memory, and the plan does not guess at it.
    memory = memory_plan(config, facts_of(config), Devices(kind, ()), device.memory_gib if kind == "gpu" else None)
    longest = result.engine and result.engine.max_model_len
    return Planned(memory.weights_gib, memory.pool_gib, memory.kv_cache_tokens(longest) if longest else None)


def row(path: Path, result: Result) -> str | None:
    """None for a file without an engine, and for a model of unknown sizes."""
    engine = result.engine
    if engine is None or not (engine.weights_gib and engine.max_model_len and engine.kv_cache_tokens):
        return None
    beside = made_there(path)
    plan = beside or by_formula(result)
    if plan.weights_gib is None:
        return None
    cells = [
        f"`{path}`",
        f"vLLM {engine.vllm_version}" if beside else "formula",
        result.environment.devices[0].name,
        engine.vllm_version,
        *_compared(plan.weights_gib, engine.weights_gib, ".4f"),
        *_left(plan.pool_gib, engine.kv_pool_gib),
        *_compared(plan.kv_cache_tokens, engine.kv_cache_tokens, ".0f"),
    ]
    return f"| {' | '.join(cells)} |"


def _compared(planned: float | None, seen: float, digits: str) -> list[str]:
    if planned is None:
        return ["unknown", f"{seen:{digits}}", ""]
    return [f"{planned:{digits}}", f"{seen:{digits}}", f"{planned / seen:.3f}"]


def _left(planned: float | None, seen: float | None) -> list[str]:
    """What is left for the KV cache, and what vLLM takes from the same share apart from weights and cache."""
    if planned is None or seen is None:
        return ["unknown", "" if seen is None else f"{seen:.2f}", ""]
    return [f"{planned:.2f}", f"{seen:.2f}", f"{planned - seen:.2f}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of result files")
    paths = [path for folder in parser.parse_args().folders for path in sorted(folder.rglob("*_results.json"))]
    lines = []
    try:
        lines = [line for path in paths if (line := row(path, load_result(path)))]
    except (ConfigError, ResultFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join([*HEAD, *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
