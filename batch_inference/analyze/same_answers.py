"""Whether settings answer the same prompts alike, where they were asked by --compare-answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from batch_inference.analyze.answers import Analysis
from batch_inference.analyze.sections import Section
from batch_inference.analyze.tables import setting_labels
from batch_inference.core.answers import Differences, between_replicas, differences, of_itself, question_of
from batch_inference.core.results import Answers

# What else may change an answer than how the model is split.
_ALIKE = (
    "model", "device_kind", "device_name", "vllm_version", "dtype", "quantization", "kv_cache_dtype", "load_format",
    "enforce_eager", "engine_args",
)  # fmt: skip
# The last two: of those that differ, the number of their first token that does.
_HEADER = ("setting", "compared with", "requests", "differ", "from token", "median")


@dataclass(frozen=True)
class _Pair:
    """Two that were asked the same, and how their answers differ."""

    setting: str
    other: str  # as the table names it
    in_words: tuple[str, str]  # as a sentence names both
    found: Differences


def same_answers(analysis: Analysis) -> Iterator[Section]:
    """One for each model and machine."""
    for own, pairs in _of_each(analysis):
        rows = [_row(pair) for pair in (own, *pairs)]
        lines = [line for pair in pairs for line in _said(pair, own)]
        yield Section("Same answers?", header=_HEADER, rows=rows, numbers=frozenset(_HEADER[2:]), lines=lines)


def of_another_model(analysis: Analysis) -> list[str]:
    """Settings whose answers are those of another model."""
    wrong = (pair.setting for _, pairs in _of_each(analysis) for pair in pairs if pair.found.is_another_model)
    return list(dict.fromkeys(wrong))


def _of_each(analysis: Analysis) -> Iterator[tuple[_Pair, list[_Pair]]]:
    """The smallest setting with itself, and then all others with it, and replicas with the first one of theirs."""
    names = setting_labels(analysis.settings)
    asked: dict[tuple[object, ...], list[tuple[str, Answers]]] = {}
    for setting in sorted(analysis.settings, key=lambda one: one.num_devices):
        if setting.answers:
            key = (*question_of(setting.answers), *(str(setting.shared[name]) for name in _ALIKE))
            asked.setdefault(key, []).append((names[setting.path], setting.answers))
    for (name, answers), *others in asked.values():
        own = _Pair(name, "itself, in two halves", (name, "itself"), of_itself(answers))
        pairs = [_Pair(other, name, (other, name), differences(answers.first, its.first)) for other, its in others]
        yield own, [*pairs, *(pair for one in ((name, answers), *others) for pair in _of_replicas(*one))]


def _of_replicas(name: str, answers: Answers) -> Iterator[_Pair]:
    for number, found in enumerate(between_replicas(answers), 1):
        replica = f"its replica {number}"
        yield _Pair(name, replica, (f"{name}, {replica},", "replica 0"), found)


def _row(pair: _Pair) -> list[str]:
    found = pair.found
    where = [f"{min(found.firsts)}", f"{median(found.firsts):g}"] if found.firsts else ["", ""]
    return [pair.setting, pair.other, str(found.requests), str(found.count), *where]


def _said(pair: _Pair, own: _Pair) -> Iterator[str]:
    (name, other), found = pair.in_words, pair.found
    if found.is_another_model:
        yield (
            f"{name} does not seem to run the same model as {other}: {found.count} of {found.requests} answers differ, "
            "most of them from the first tokens on. Look for a fault in its weights or kernels before you use it."
        )
    elif found.count > own.found.count:
        yield (
            f"{name} answers {found.count} of {found.requests} requests differently from {other}. Asked again in two "
            f"halves, {own.setting} answers {own.found.count or 'none'} differently from itself. The usual reason is "
            "rounding, which depends on the layout."
        )
