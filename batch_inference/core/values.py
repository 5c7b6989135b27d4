"""What a flag may be: text -> value; a ValueError says what was expected."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from decimal import Decimal

from batch_inference.core.text import has_control

# No machine or cluster comes near this: more is a typing mistake that would be tried for hours.
MOST_DEVICES = 2**20
MOST_REQUESTS = 2**20  # of a batch
MOST_TOKENS = 2**27  # of a request
MOST_TOKENS_PER_STEP = 2**31 - 1  # vLLM counts them in 32 bits
MOST_RUNS = 10_000
MOST_SEED = 2**32 - 1  # numpy takes no larger one
MOST_SECONDS = 1e6  # more than eleven days; clocks and sockets have limits too, and complain late
MOST_GIB = 1e6
# Linux's limits for a path and for one name in it.
_LONGEST_PATH_BYTES = 4095
LONGEST_NAME_BYTES = 255
# Of --output-lengths and --order.
FROM_FILE, OWN_END = "file", "eos"
ORDERS = ("given", "shuffled", "longest-first", "shortest-first")
# Of --goal.
THROUGHPUT, PER_DEVICE, LATENCY_GOAL, COST = GOALS = ("throughput", "per-device", "latency", "cost")


_MOST_DIGITS = 40
# Of --max-model-len: what the model allows and memory holds, as vLLM finds out when it starts.
AUTO_LENGTH = -1
# No memory size in bytes has more digits.
_SIZE = re.compile(r"([0-9]{1,18})(?:\.([0-9]{1,18}))?([kKmMgGtT]?)")
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


class TooLargeError(ValueError):
    def __init__(self, most: int) -> None:
        super().__init__(f"at most {most} is allowed")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        digits = text.strip()
        # Cut, because Python refuses thousands of digits with its own message.
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


class Doublings(tuple[int, ...]):
    """`--batch-sizes auto`: the sizes among which the best is searched, in rising order."""


AUTO = "auto"
AUTO_SIZES = Doublings(2**power for power in range(11))
_batch_sizes = list_of(request_count)


def batch_sizes(text: str) -> tuple[int, ...]:
    return AUTO_SIZES if text == AUTO else _batch_sizes(text)


prompt_lengths = list_of(token_count)


def size_with_suffix(text: str) -> int | None:
    """A size as vLLM's own flags take it: 16k is 16,000, 16K is 16,384 and 16.5k is 16,500; likewise with m, g and t.
    None if it is not a size."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        return None
    whole, part, suffix = match.groups()
    if not suffix:
        return None if part else int(whole)
    base = 1000 if suffix.islower() else 1024
    # A fraction of 1,024 need not be a whole number, so vLLM refuses it.
    if part and base == 1024:
        return None
    return int(Decimal(f"{whole}.{part or 0}") * base ** _POWERS[suffix.lower()])


def _tokens(most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        size = size_with_suffix(text)
        if size is None and re.fullmatch(r"[0-9]+", text.strip()):  # more digits than are converted
            raise TooLargeError(most)
        if not size:
            raise ValueError("a number of tokens of at least 1 is needed, like 4096, 16K or 16.5k")
        if size > most:
            raise TooLargeError(most)
        return size

    return parse


def tokens_per_step(text: str) -> int | tuple[int, ...]:
    """One size, or several separated by commas; repeats stay and are dropped with a note by `parse_flags`."""
    sizes = tuple(_tokens(MOST_TOKENS_PER_STEP)(part) for part in text.split(","))
    return sizes if len(sizes) > 1 else sizes[0]


def output_lengths(text: str) -> str | int:
    """FROM_FILE, OWN_END, or a number of tokens for all requests."""
    if text in (FROM_FILE, OWN_END):
        return text
    try:
        return token_count(text)
    except TooLargeError:
        raise
    except ValueError:
        raise ValueError(f"{FROM_FILE}, {OWN_END} or a number of tokens of at least 1 is needed") from None


def token_length(text: str) -> int:
    """A number of tokens, or AUTO_LENGTH for the words that vLLM has for it."""
    return AUTO_LENGTH if text.strip().lower() in ("auto", str(AUTO_LENGTH)) else _tokens(MOST_TOKENS)(text)


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


def numbers(text: str) -> tuple[float, ...]:
    """Separated by commas; none is below 0."""
    return tuple(
        _number_in(0, 1e12, "numbers of at least 0 are needed", low_is_allowed=True)(one) for one in text.split(",")
    )


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
        raise ValueError("it contains control characters, like a line break; leave them out")
    return text


def plain_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it contains bytes that are not text; write it in UTF-8") from None
    return _no_control(text)


def host(text: str) -> str:
    """A name or an address; an IPv6 address may be in brackets, as in a URL."""
    plain_text(text)
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


def path_text(text: str) -> str:
    """The path of a file or folder, which may contain bytes that are not text; or a hub name, which looks like one."""
    _no_control(text)
    longest = max(len(os.fsencode(name)) for name in text.split("/"))
    if longest > LONGEST_NAME_BYTES or len(os.fsencode(text)) > _LONGEST_PATH_BYTES:
        raise ValueError(
            f"a path may have {_LONGEST_PATH_BYTES} bytes, and each name in it {LONGEST_NAME_BYTES}; shorten it"
        )
    return text


def name_text(text: str) -> str:
    """A name that is written into files, and that a file is named after."""
    if "/" in text or text.startswith("."):
        raise ValueError("a file is named after it, so it may not contain / or begin with .")
    return path_text(plain_text(text))


def one_of(words: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"one of {', '.join(words)} is needed")
        return text

    return parse


def without_value(words: Sequence[str]) -> str | None:
    """The flag of the first word like `--model=--`; argparse drops the two dashes and then misses a value."""
    return next((flag for one in words if (flag := one.removesuffix("=--")) != one and flag.startswith("-")), None)
