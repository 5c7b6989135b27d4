"""Whether settings answer the same prompts alike, where they were asked by --compare-answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from batch_inference.analyze.answers import Analysis
from batch_inference.analyze.sections import Section
from batch_inference.analyze.tables import MeasuredSetting, setting_labels
from batch_inference.core.answers import Differences, between_replicas, differences, of_itself, question_of

# What else may change an answer than how the model is split.
_ALIKE = (
    "model", "device_kind", "device_name", "vllm_version", "dtype", "quantization", "kv_cache_dtype", "load_format",
    "enforce_eager", "engine_args",
)  # fmt: skip
# The last two: of those that differ, the number of their first token that does.
_HEADER = ("setting", "compared with", "requests", "differ", "from token", "median")


def same_answers(analysis: Analysis) -> Iterator[Section]:
    """One for each model and machine."""
    names = setting_labels(analysis.settings)
    asked: dict[tuple[object, ...], list[MeasuredSetting]] = {}
    for setting in analysis.settings:
        if setting.answers:
            key = (*question_of(setting.answers), *(str(setting.shared[name]) for name in _ALIKE))
            asked.setdefault(key, []).append(setting)
    for alike in asked.values():
        yield _section(sorted(alike, key=lambda one: one.num_devices), names)


def _section(settings: Sequence[MeasuredSetting], names: Mapping[Path, str]) -> Section:
    """The first of the settings is the smallest, which the others are compared with."""
    first, *others = settings
    assert first.answers
    name = names[first.path]
    own = of_itself(first.answers)
    rows, lines = [_row(name, "itself in two halves", own)], list[str]()
    for setting in others:
        assert setting.answers
        found = differences(first.answers.first, setting.answers.first)
        rows.append(_row(names[setting.path], name, found))
        lines += _said(names[setting.path], name, found, own)
    for setting in settings:
        assert setting.answers
        for number, found in enumerate(between_replicas(setting.answers), 1):
            replica = f"its replica {number}"
            rows.append(_row(names[setting.path], replica, found))
            lines += _said(f"{names[setting.path]}, {replica},", "replica 0", found, own)
    return Section("Same answers?", header=_HEADER, rows=rows, numbers=frozenset(_HEADER[2:]), lines=lines)


def _row(name: str, against: str, found: Differences) -> list[str]:
    where = [f"{min(found.firsts)}", f"{median(found.firsts):g}"] if found.firsts else ["", ""]
    return [name, against, str(found.requests), str(found.count), *where]


def _said(name: str, against: str, found: Differences, own: Differences) -> Iterator[str]:
    if found.is_another_model:
        yield (
            f"{name} is not the model that {against} is: {found.count} of {found.requests} answers differ, most from "
            "the first tokens on. Look for a fault in its weights or kernels before you use it."
        )
    elif found.count > own.count:
        yield (
            f"{name} answers {found.count} of {found.requests} requests otherwise than {against}, which answers "
            f"{own.count} otherwise itself in a batch of half the size. The usual reason is rounding, which differs "
            "with the layout."
        )
