"""--hf-overrides as vLLM reads it: JSON, or part by part (--hf-overrides.text_config.num_hidden_layers 2)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from batch_inference.core.values import size_with_suffix

_FLAG = "--hf-overrides"
_TEXT = "text_config"
# In another class of model the same names may mean something else.
_OF_ANOTHER_CLASS = ("model_type", "auto_map")


class NotFollowedError(Exception):
    """The effect of the flag cannot be worked out here."""


def hf_overrides(words: Sequence[str]) -> dict[str, Any]:
    """The changes to a model's config.json in vLLM's own flags. Raises NotFollowedError for anything but a
    JSON object: vLLM decides what to make of that."""
    whole: str | None = None
    parts: dict[str, Any] = {}
    for name, value in _values(words):
        if name == _FLAG:
            whole = value
        else:
            _put(parts, name.removeprefix(f"{_FLAG}.").split("."), value)
    if parts:  # vLLM puts them after the flag itself, so they replace it
        return parts
    try:
        overrides = {} if whole is None else json.loads(whole)
    except (ValueError, RecursionError):
        raise NotFollowedError from None
    if not isinstance(overrides, dict):
        raise NotFollowedError
    return overrides


def _values(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        flag, dot, rest = name.partition(".")
        flag = flag.replace("_", "-")
        if flag == _FLAG:
            yield flag + dot + rest, value if equals else following


def _put(parts: dict[str, Any], keys: Sequence[str], text: str) -> None:
    last = keys[-1]
    for key in keys[:-1]:
        inner = parts.get(key)
        parts[key] = parts = inner if isinstance(inner, dict) else {}
    parts[last.removesuffix("+")] = text.split(",") if last.endswith("+") else _value(text)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        size = size_with_suffix(text)
        return text if size is None else size


def overridden(document: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The config with the changes. Raises NotFollowedError if only vLLM knows the effect of one."""
    text = document.get(_TEXT)
    if not overrides:
        return document
    changed = set(overrides)
    # In a config with a part for the language model, a top-level change of what that part also has does nothing or all.
    beside = isinstance(text, dict) and changed & set(text) - set(document)
    if beside or changed & set(_OF_ANOTHER_CLASS) or (_TEXT in changed and not _both_parts(text, overrides[_TEXT])):
        raise NotFollowedError
    new = {**document, **overrides}
    if _TEXT in changed:
        new[_TEXT] = {**document[_TEXT], **overrides[_TEXT]}
    return new


def _both_parts(*values: object) -> bool:
    return all(isinstance(value, dict) for value in values)


def touches_rope(overrides: dict[str, Any]) -> bool:
    """True if the longest length may change by rules that only vLLM knows."""
    return any(name.startswith("rope") for name in _names(overrides))


def _names(overrides: dict[str, Any]) -> Iterable[str]:
    inner = overrides.get(_TEXT)
    return (*overrides, *(inner if isinstance(inner, dict) else ()))
