"""What the sections of a report share: a number with its interval, marks, and lines that several sections say."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from batch_inference.analyze.tables import half_width
from batch_inference.core.text import plain, short, short_name, significant

HEADING = "Batch inference: results"
FRONT_TITLE = "Pareto front: throughput per device against latency"
SUSPECT_LINE = "* suspect: see below, and do not rely on it alone."


# What columns of results.csv are called where a reader meets them; of others the underscores go.
_WORDS = {
    "device_kind": "kind of device", "device_name": "device", "device_cores": "cores per device",
    "vllm_version": "vLLM",
    "kv_cache_dtype": "KV cache dtype", "executor_class": "executor",
    "multiprocess_engine": "an engine process of its own", "enforce_eager": "eager mode",
    "num_speculative_tokens": "speculative tokens", "max_tokens": "output tokens", "top_p": "top-p",
    "nnodes": "nodes", "cpu_name": "CPU", "power_limit_w": "power limit in W", "driver_version": "driver",
    "torch_version": "torch", "num_runs": "--num-runs", "target_ci": "--target-ci", "max_runs": "--max-runs",
    "max_num_seqs": "--max-num-seqs", "max_num_batched_tokens": "--max-num-batched-tokens",
    "max_model_len": "--max-model-len", "gpu_memory_utilization": "--gpu-memory-utilization",
    "cudagraph_mode": "CUDA graph mode", "enable_expert_parallel": "experts in parallel",
    "kv_connector": "KV connector", "async_scheduling": "asynchronous scheduling", "engine_args": "vLLM's flags",
}  # fmt: skip


def column_words(name: str) -> str:
    return _WORDS.get(name, name.replace("_", " "))


def value_words(name: str, value: object) -> str:
    """device NVIDIA H100; quantization unknown; without eager mode."""
    words = column_words(name)
    if pd.isna(value):  # type: ignore[call-overload]
        return f"{words} unknown"
    if isinstance(value, (bool, np.bool_)):
        return f"{'with' if value else 'without'} {words}"
    return f"{words} {plain(value)}"


# Below this a number has as many digits as a large one.
_TOLD_BY_PLACES = 0.01
# Of an interval whose sides differ by less the wider one stands for both.
_NEARLY_ALIKE = 1.1


# How a line that explains the marks of a table names that of the best.
BOLD = "Bold"


class Best(str):
    """A cell that holds the best of its row: bold, or marked where nothing is bold."""


def suspect_mark(row: Mapping[Hashable, Any]) -> str:
    return "*" if row["verdict"] == "suspect" else ""


def suspect_words(row: Mapping[Hashable, Any], more: str = "") -> str:
    """In brackets in a sentence, which has no key to a mark; `more` stands in the same ones."""
    said = [*(["suspect"] if row["verdict"] == "suspect" else []), *([more] if more else [])]
    return f" ({'; '.join(said)})" if said else ""


def spoken(number: str) -> str:
    """As a sentence has it: 25490 ±190 is 25,490 ± 190."""
    return re.sub(r"(?<![.\d])\d{4,}", lambda found: f"{int(found[0]):,}", number).replace("±", "± ")


# What belongs to a number stays on its line.
_WITH_NUMBER = re.compile(r"(?<=\d) (?=[±×+%]|tok/s|s\b|min\b|h\b)|(?<=[±×+]) ")
NO_BREAK = "\N{NO-BREAK SPACE}"


def kept_together(sentence: str) -> str:
    return _WITH_NUMBER.sub(NO_BREAK, sentence)


def few(words: Sequence[str], most: int, rest: str = " and {} more", between: str = ", ") -> str:
    """A list of words; of more than `most` the first, and how many others there are."""
    more = len(words) - most
    return between.join(words[:most]) + (rest.format(more) if more > 0 else "")


def tied(others: Sequence[str]) -> list[str]:
    return [f"tied within the intervals with {few(others, 1)}"] if others else []


def not_drawn(reasons: Sequence[str]) -> list[str]:
    return [f"Not drawn: {reason}" for reason in reasons]


def known(value: float) -> float | None:
    """A number of the table, which has NaN for unknown."""
    return None if pd.isna(value) else float(value)


def metric_text(row: Mapping[Hashable, Any], metric: str, unit: str = "") -> str:
    """A metric of a point with its interval, its unit, and the mark of a suspect one."""
    number = with_interval(row[metric], half_width(row, metric))
    return f"{number} {unit}".rstrip() + suspect_mark(row)


def number_text(row: Mapping[Hashable, Any], metric: str) -> str:
    """The same without the interval, which is told of all numbers of a table together."""
    number = with_interval(row[metric], half_width(row, metric))
    return number.partition(" ±")[0] + suspect_mark(row)


def widths_line(points: pd.DataFrame) -> str:
    """How wide the intervals of the points are; empty where none is known."""
    relative = points["latency_ci95_s"] / points["latency_mean_s"]
    is_suspect = points["verdict"] == "suspect"
    sure, unsure = relative[~is_suspect].dropna(), relative[is_suspect].dropna()
    if sure.empty and unsure.empty:
        return ""
    # Rounded up, as single intervals are.
    said = [f"within ±{math.ceil(1000 * sure.max() - 1e-9) / 10:.1f} %"] if not sure.empty else []
    said += [f"those of suspect points within ±{math.ceil(100 * unsure.max() - 1e-9)} %"] if not unsure.empty else []
    return f"95 % intervals: {', '.join(said)}."


def with_interval(value: float, half: float | None, decimals: int = 9) -> str:
    """Digits as far as the interval allows, at most so many decimals: two of it, and the value as far as those, but of
    the value two at least. The interval is rounded up."""
    if not half or value == 0:
        return short(value) if value == 0 or abs(value) >= _TOLD_BY_PLACES else significant(value)
    decimals = min(decimals, _decimals(value, half))
    rounded_up = math.ceil(half * 10**decimals - 1e-9) / 10**decimals
    shown = max(0, decimals)
    return f"{round(value, decimals):.{shown}f} ±{rounded_up:.{shown}f}"


def _decimals(value: float, half: float) -> int:
    """Below 0 for places before the point."""
    first_digit = -math.floor(math.log10(abs(value)))
    return min(max(1 - math.floor(math.log10(half)), first_digit + 1), first_digit + 4)


def with_ends(value: float, low: float, high: float, unit: str = "") -> str:
    """The same of an interval that may be wider on one side: then 49 (39 to 62) and not ±."""
    above, below = high - value, value - low
    between = f" {unit}" if unit else ""
    if max(above, below) <= _NEARLY_ALIKE * min(above, below):
        return with_interval(value, max(above, below)) + between
    decimals = _decimals(value, max(above, below))
    middle, low, high = (f"{round(one, decimals):.{max(0, decimals)}f}" for one in (value, low, high))  # type: ignore[assignment]
    return f"{middle}{between} ({low} to {high})"


def short_names(names: Iterable[str], room: int, more_room: int = 0) -> dict[str, str]:
    """Each in so many characters, but never as what could be two of them: where the beginning and the end do not tell
    names apart, in more of them, then with what is around the place where they differ, and else as they are."""
    found = {name: short_name(name, room) for name in names}
    room = max(room, more_room)
    for alike in _alike(found):
        found |= {name: short_name(name, room) for name in alike}
    for alike in _alike(found):
        start = next((place for place, letters in enumerate(zip(*alike, strict=False)) if len(set(letters)) > 1), 0)
        found |= {name: _around(name, start, room) for name in alike}
    for alike in _alike(found):
        found |= {name: name for name in alike}
    return found


def _around(name: str, place: int, room: int) -> str:
    """All from that place on, where that has room; else its beginning, and what follows from just before the place."""
    if len(name) - place < room:
        return f"…{name[place:]}"
    head = name[: room // 3]
    return f"{head}…{short_name(name[max(len(head), place - 3) :], room - len(head) - 1)}"


def _alike(short: Mapping[str, str]) -> list[list[str]]:
    """The names that are shown as one."""
    names = defaultdict(list)
    for name, shown in short.items():
        names[shown].append(name)
    return [several for several in names.values() if len(several) > 1]
