"""How numbers, names and lists read, wherever they are printed. Python's own library alone."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Sequence

# The usual width of a terminal.
WIDTH = 80
NO_REASON = "no reason is given"
# Characters that move the cursor, end a line, or reverse the direction of text.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# Longest value shown in a message.
_LONGEST_VALUE = 80


def short(value: float | None, digits: int = 4) -> str:
    """Four significant digits, never with an exponent; empty if unknown."""
    if value is None:
        return ""
    whole_digits = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    # Below 1 the zeros after the point count too: nothing here is worth more than a tenth of a millisecond.
    return f"{value:.{max(0, digits - whole_digits)}f}"


def significant(value: float | None, digits: int = 3) -> str:
    """Of a small number as many digits as of a large one: 0.00336; never an exponent; empty if unknown."""
    if not value:
        return "" if value is None else "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{min(12, max(0, places))}f}"


def short_name(text: str, width: int) -> str:
    """The beginning and the end of a long name: names often differ only at the end."""
    return text if len(text) <= width else f"{text[: width // 2]}…{text[len(text) - (width - width // 2 - 1) :]}"


def listed(values: Iterable[object]) -> str:
    """1, 4, 8"""
    return ", ".join(map(str, values))


def with_budget(name: str, tokens_per_step: object) -> str:
    """tp_2, 2048 tokens per step"""
    return f"{name}, {tokens_per_step} tokens per step"


def on_each(replicas: int) -> str:
    """What follows a batch size, which is per replica."""
    return " on each replica" if replicas > 1 else ""


def counted(number: int, noun: str) -> str:
    """1 point, 2 points, 2 processes"""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def about_time(seconds: float) -> str:
    """about 40 s, about 12 min, about 2.5 h"""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {round(seconds / 60)} min" if seconds < 90 * 60 else f"about {seconds / 3600:.1f} h"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], sides: Sequence[str]) -> str:
    """Columns under a header and a rule, for a terminal. `sides`: left or right, for each column."""
    head, *body = _columns(header, rows, sides)
    rule = ["-" * len(cell) for cell in head]
    return "\n".join("  ".join(line).rstrip() for line in (head, rule, *body))


def table_in_markdown(header: Sequence[str], rows: Sequence[Sequence[str]], sides: Sequence[str]) -> str:
    """The same for GitHub; the cells are Markdown already."""
    lines = _columns(header, rows, sides, spare=2)
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    rule = "|".join("-" * (len(cell) + 2) for cell in lines[0])
    return "\n".join([head, f"|{rule}|", *body])


def _columns(
    header: Sequence[str], rows: Sequence[Sequence[str]], sides: Sequence[str], spare: int = 0
) -> list[list[str]]:
    """The lines of a table, with cells as wide as their column, which is at least `spare` wider than its name."""
    lines = [[cell.strip() for cell in line] for line in (header, *rows)]
    widths = [max([len(name) + spare, *map(len, cells)]) for name, *cells in zip(*lines, strict=True)]
    marks = [">" if side == "right" else "<" for side in sides]
    return [[f"{cell:{mark}{width}}" for cell, mark, width in zip(line, marks, widths, strict=True)] for line in lines]


def plain(value: object) -> str:
    """Text from a file, without what would move the cursor or cannot be encoded."""
    return _CONTROL.sub(" ", str(value)).encode("utf-8", "replace").decode()


def has_control(text: str, allowed: str = "") -> bool:
    """Whether it has a character that `plain` would replace, apart from those `allowed`."""
    return any(found not in allowed for found in _CONTROL.findall(text))


def escaped(text: str) -> str:
    """One line that any terminal can show, and that tells what was there: a line break is \\n."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def in_short(text: str) -> str:
    """A user's value, shortened for a message."""
    return escaped(short_name(text, _LONGEST_VALUE))


def quoted(text: str) -> str:
    return f"'{in_short(text)}'"


def wrapped(text: str, indent: int = 0, *, width: int = WIDTH, break_long_words: bool = False) -> list[str]:
    """Lines of at most `width` characters; those after the first are indented. Words longer than a line
    stay whole, so that a path or a flag can be copied, unless told otherwise."""
    return textwrap.wrap(
        text,
        width,
        subsequent_indent=" " * indent,
        break_long_words=break_long_words,
        break_on_hyphens=False,
    )
