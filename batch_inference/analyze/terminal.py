"""The sections as text for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from batch_inference.analyze.sections import Section
from batch_inference.core.text import WIDTH, escaped, short_name, table, wrapped

# A terminal shows this many rows or lines of a list, and so much of each line; report.md has them all.
LIST_LIMIT, LINE_LIMIT = 12, 400
TEXT_ROWS = 12


def as_text(sections: Sequence[Section]) -> str:
    return "\n\n".join("\n".join([*_lines(section.title, indent=2), *_body(section)]) for section in sections)


def closing(missing: Sequence[str], files: Sequence[Path]) -> list[str]:
    """The lines after the sections: why plots were not drawn, and the files that were written."""
    reasons = [line for reason in missing for line in wrapped(f"not drawn: {reason}", indent=2)]
    return [*reasons, *(escaped(str(file)) for file in files)]


def _body(section: Section) -> Iterator[str]:
    name_width = max((len(name) for name, _ in section.pairs), default=0)
    for name, value in section.pairs:
        yield from _lines(f"  {name:<{name_width}}  {value}", indent=name_width + 4)
    if section.rows:
        yield _table(section)
        yield from _rest(len(section.rows) - TEXT_ROWS + section.more, "more rows")
    for line in section.lines[:LIST_LIMIT]:
        yield from _lines(f"  {short_name(line, LINE_LIMIT)}", indent=4)
    yield from _rest(len(section.lines) - LIST_LIMIT, "more")
    for words in section.commands:
        yield from _command(words)


def _command(words: Sequence[str]) -> Iterator[str]:
    """One that can be copied, however many lines it takes."""
    line = f"  {escaped(words[0])}"
    for word in map(escaped, words[1:]):
        if len(line) + len(word) + 3 > WIDTH:
            yield f"{line} \\"
            line = f"     {word}"
        else:
            line = f"{line} {word}"
    yield line


def _rest(count: int, what: str) -> Iterator[str]:
    if count > 0:
        yield f"  … and {count} {what} in report.md"


def _lines(text: str, indent: int) -> list[str]:
    # Names come from files, and may be of any length.
    return wrapped(text, indent, break_long_words=True)


def _table(section: Section) -> str:
    """The column of names, where there is one, is what gives way to fit."""
    header, rows = section.header, section.rows[:TEXT_ROWS]
    if "setting" in header:
        place = header.index("setting")
        others = [max(map(len, column)) + 2 for column in zip(header, *rows, strict=True)]
        room = max(8, WIDTH - 2 - (sum(others) - others[place]))
        rows = [[short_name(cell, room) if index == place else cell for index, cell in enumerate(row)] for row in rows]
    return textwrap.indent(table(header, rows, section.alignment), "  ")
