"""What a flag may be: text -> value; ValueError says what was expected."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

from batch_inference.core.text import has_control

# No machine, and no number of nodes, comes near: more is a slip of the keyboard, and would be tried for hours.
MOST_DEVICES = 2**20
MOST_REQUESTS = 2**20  # of a batch
MOST_TOKENS = 2**27  # of a request
MOST_TOKENS_PER_STEP = 2**31 - 1  # vLLM counts them in 32 bits
MOST_RUNS = 10_000
MOST_SEED = 2**32 - 1  # numpy takes no larger one
MOST_SECONDS = 1e6  # more than eleven days; clocks and sockets stop at some number, and say so late
MOST_GIB = 1e6
# Of a path, and of one name in it, on Linux.
_LONGEST_PATH_BYTES = 4095
LONGEST_NAME_BYTES = 255


_MOST_DIGITS = 40


class TooLargeError(ValueError):
    def __init__(self, most: int) -> None:
        super().__init__(f"at most {most} is possible")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        digits = text.strip()
        # Cut, because Python refuses to convert thousands of digits, in words of its own.
        number = int(digits[:_MOST_DIGITS]) if digits.isdecimal() else None
        if number is None or number < low:
            raise ValueError(f"a whole number of at least {low} is needed")
        if number > high or len(digits) > _MOST_DIGITS:
            raise TooLargeError(high)
        return number

    return parse


device_count = whole_number(1, MOST_DEVICES)
node_number = whole_number(0, MOST_DEVICES)
request_count = whole_number(1, MOST_REQUESTS)
token_count = whole_number(1, MOST_TOKENS)
tokens_per_step = whole_number(1, MOST_TOKENS_PER_STEP)
run_count = whole_number(1, MOST_RUNS)
seed = whole_number(0, MOST_SEED)


def port(text: str) -> int:
    try:
        return whole_number(1, 65534)(text)
    except ValueError:
        raise ValueError("a port from 1 to 65534 is needed") from None


def list_of(parse_one: Callable[[str], int]) -> Callable[[str], tuple[int, ...]]:
    """Comma-separated sizes, in the order given; repeats stay and are dropped with a note by `parse_flags`."""

    def parse(text: str) -> tuple[int, ...]:
        try:
            return tuple(parse_one(part) for part in text.split(","))
        except TooLargeError:
            raise
        except ValueError:
            raise ValueError("whole numbers of at least 1 are needed, separated by commas, like 1,4,8") from None

    return parse


batch_sizes = list_of(request_count)
prompt_lengths = list_of(token_count)


def token_length(text: str) -> int:
    """A number of tokens; 32k and 32K mean 32,000 and 32,768 as in vLLM's own --max-model-len."""
    match = re.fullmatch(r"(\d+)([kK]?)", text.strip())
    if not match or not match[1].strip("0"):
        raise ValueError("a number of tokens of at least 1 is needed, like 4096")
    length = token_count(match[1]) * {"": 1, "k": 1000, "K": 1024}[match[2]]
    if length > MOST_TOKENS:
        raise TooLargeError(MOST_TOKENS)
    return length


def _number_in(low: float, high: float, wanted: str, *, low_is_allowed: bool = False) -> Callable[[str], float]:
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


def _above_0(high: float) -> Callable[[str], float]:
    return _number_in(0, high, f"a number above 0 and up to {high:.0f} is needed")


seconds = _above_0(MOST_SECONDS)
gib = _above_0(MOST_GIB)
fraction = _above_0(1)
interval = _number_in(0, 1, "a fraction above 0 and up to 1 is needed, like 0.02 for ±2 %")
temperature = _number_in(0, 100, "a number from 0 to 100 is needed", low_is_allowed=True)


def non_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("a value is needed")
    return text


def _no_control(text: str) -> str:
    non_empty(text)
    if has_control(text):
        raise ValueError("it holds characters that steer a terminal, like a line break; leave them out")
    return text


def plain_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds bytes that are no text; write it in UTF-8") from None
    return _no_control(text)


def host(text: str) -> str:
    """A name or an address; one of IPv6 may be in brackets, as in a URL."""
    plain_text(text)
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


def path_text(text: str) -> str:
    """Of a file or folder, which may hold bytes that are no text; or a hub name, which is written like one."""
    _no_control(text)
    longest = max(len(os.fsencode(name)) for name in text.split("/"))
    if longest > LONGEST_NAME_BYTES or len(os.fsencode(text)) > _LONGEST_PATH_BYTES:
        raise ValueError(
            f"a path takes {_LONGEST_PATH_BYTES} bytes, and each name in it {LONGEST_NAME_BYTES}; shorten it"
        )
    return text


def name_text(text: str) -> str:
    """Of what is written into files, and names one."""
    return path_text(plain_text(text))


def one_of(words: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"one of {', '.join(words)} is needed")
        return text

    return parse


def without_value(words: Sequence[str]) -> str | None:
    """The flag of the first word like `--model=--`; argparse drops the two dashes, and fails for want of a value."""
    return next((flag for one in words if (flag := one.removesuffix("=--")) != one and flag.startswith("-")), None)
