"""The sections as text for a terminal, and as Markdown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import tabulate

from batch_inference.analyze.sections import Section
from batch_inference.core.text import WIDTH, short_name, wrapped

# A terminal shows this many rows or lines of a list, and so much of each line; report.md has them all.
LIST_LIMIT, LINE_LIMIT = 12, 400
TEXT_ROWS = 12


# --- text ---------------------------------------------------------------------------------------------------------


def as_text(parts: Sequence[Section]) -> str:
    return "\n\n".join("\n".join([*_lines(part.title, indent=2), *_text_body(part)]) for part in parts)


def _text_body(part: Section) -> Iterator[str]:
    name_width = max((len(name) for name, _ in part.facts), default=0)
    for name, value in part.facts:
        yield from _lines(f"  {name:<{name_width}}  {value}", indent=name_width + 4)
    if part.rows:
        yield _text_table(part)
    if (more := len(part.rows) - TEXT_ROWS + part.more) > 0 and part.rows:
        yield f"  … and {more} more rows in report.md"
    for line in part.lines[:LIST_LIMIT]:
        yield from _lines(f"  {short_name(line, LINE_LIMIT)}", indent=4)
    if len(part.lines) > LIST_LIMIT:
        yield f"  … and {len(part.lines) - LIST_LIMIT} more in report.md"


def _lines(text: str, indent: int) -> list[str]:
    # Names come from files, and may be of any length.
    return wrapped(text, indent, break_long_words=True)


def _text_table(part: Section) -> str:
    """The column of names, where there is one, is what gives way to fit."""
    rows = part.rows[:TEXT_ROWS]
    if "setting" in part.header:
        place = part.header.index("setting")
        others = [max(map(len, column)) + 2 for column in zip(part.header, *rows, strict=True)]
        room = max(8, WIDTH - 2 - (sum(others) - others[place]))
        rows = [[short_name(cell, room) if index == place else cell for index, cell in enumerate(row)] for row in rows]
    tabulate.MIN_PADDING = 0  # the headers are no wider than they must be
    text = tabulate.tabulate(rows, part.header, "simple", colalign=_alignment(part), disable_numparse=True)
    return textwrap.indent(text, "  ")


def _alignment(part: Section) -> list[str]:
    return ["right" if name in part.numbers else "left" for name in part.header]


# --- Markdown -----------------------------------------------------------------------------------------------------


def as_markdown(parts: Sequence[Section], plots: Sequence[tuple[str, Path]], missing: Sequence[str]) -> str:
    """The same sections, and the plots by name: they lie beside the report."""
    blocks = ["# Batch inference: results"]
    for part in parts:
        blocks.append(f"## {escaped(part.title)}")
        blocks.append("\n".join(f"- {escaped(name)}: {escaped(value)}" for name, value in part.facts))
        if part.rows:
            blocks.append(_markdown_table(part))
        if part.more:
            blocks.append(f"… and {part.more} more rows: results.csv and summary.json have all.")
        blocks.append("\n".join(f"- {escaped(line)}" for line in part.lines))
    if plots or missing:
        blocks.append("## Plots")
    blocks += [f"![{escaped(title)}]({path.name})" for title, path in plots]
    blocks.append("\n".join(f"- Not drawn: {escaped(reason)}" for reason in missing))
    blocks.append("Every point with all its numbers: [results.csv](results.csv). For scripts: summary.json.")
    return "\n\n".join(block for block in blocks if block) + "\n"


def _markdown_table(part: Section) -> str:
    rows = [[escaped(cell) for cell in row] for row in part.rows]
    header = [escaped(name) for name in part.header]
    return tabulate.tabulate(rows, header, "github", colalign=_alignment(part), disable_numparse=True)


def escaped(text: str) -> str:
    """Text from a file as Markdown that shows it as it is: no HTML, no link, no cell border, no emphasis."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$#!])", r"\\\1", text)
    # Within a word an underscore means nothing, and tp\_2 is hard to read.
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
