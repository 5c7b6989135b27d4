"""Settings as YAML with a comment here and there. JSON is YAML, so that Python's own library is enough."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from batch_inference.core.text import escaped, has_control, plain, wrapped

# What YAML takes for a text without quotes, and for nothing else: a name, a path, a hub name.
_BARE = re.compile(r"(?:\.{0,2}/)?[A-Za-z_][\w/.+-]*", re.ASCII)
_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}
_WIDTH = 100


def yaml_text(head: Sequence[str], values: Mapping[str, Any], why: Mapping[str, str]) -> str:
    top = [line for text in head for line in comments(text)]
    return "\n".join([*top, *_lines(values, why)]) + "\n"


def comments(text: str) -> list[str]:
    """A text from a file too, as lines that are nothing but comments."""
    return [f"# {line}" for line in wrapped(plain(escaped(text)), width=_WIDTH)]


def _lines(values: Mapping[str, Any], why: Mapping[str, str]) -> Iterator[str]:
    for name, value in values.items():
        if name in why:
            yield from comments(why[name])
        yield f"{name.replace('_', '-')}: {scalar(value)}"


def scalar(value: Any) -> str:
    """A value in one line: of text, what is read back as the same text."""
    if isinstance(value, str) and _BARE.fullmatch(value) and value.lower() not in _WORDS:
        return value
    return "".join(map(_readable, json.dumps(value, ensure_ascii=False)))


def _readable(character: str) -> str:
    """As YAML may hold it, and a terminal show it: bytes that are no text, and what steers, as \\u."""
    if "\ud800" <= character <= "\udfff" or has_control(character) or character in "\ufeff\ufffe\uffff":
        return f"\\u{ord(character):04x}"
    return character
