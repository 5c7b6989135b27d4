"""What a flag may be: text -> value; ValueError says what was expected."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable


def positive_int(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError("a whole number of at least 1 is needed")
    return int(text)


def natural_int(text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError("a whole number of at least 0 is needed")
    return int(text)


def port(text: str) -> int:
    if not text.strip().isdecimal() or not 1 <= int(text) < 65535:
        raise ValueError("a port from 1 to 65534 is needed")
    return int(text)


def positive_ints(text: str) -> tuple[int, ...]:
    """Comma-separated sizes, in the order given; repeats stay and are dropped with a note by `parse_flags`."""
    try:
        return tuple(positive_int(part) for part in text.split(","))
    except ValueError:
        raise ValueError("whole numbers of at least 1 are needed, separated by commas, like 1,4,8") from None


def token_length(text: str) -> int:
    """A number of tokens; 32k and 32K mean 32,000 and 32,768 as in vLLM's own --max-model-len."""
    match = re.fullmatch(r"(\d+)([kK]?)", text.strip())
    if not match or int(match[1]) < 1:
        raise ValueError("a number of tokens of at least 1 is needed, like 4096")
    return int(match[1]) * {"": 1, "k": 1000, "K": 1024}[match[2]]


def _number_in(low: float, high: float, wanted: str, *, low_is_allowed: bool) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(wanted) from None
        # Written so that NaN fails too.
        if not (low < value <= high or (low_is_allowed and value == low)):
            raise ValueError(wanted)
        return value

    return parse


positive = _number_in(0, sys.float_info.max, "a number above 0 is needed", low_is_allowed=False)
fraction = _number_in(0, 1, "a number above 0 and up to 1 is needed", low_is_allowed=False)
interval = _number_in(0, 1, "a fraction above 0 and up to 1 is needed, like 0.02 for ±2 %", low_is_allowed=False)
temperature = _number_in(0, 100, "a number of at least 0 is needed", low_is_allowed=True)


def non_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("a value is needed")
    return text
