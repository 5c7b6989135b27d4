"""The sections as Markdown: report.md, beside the plots."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from batch_inference.analyze.headline import NO_HEADLINE, Headline
from batch_inference.analyze.sections import Section
from batch_inference.analyze.wording import Best, not_drawn
from batch_inference.core.text import plain, table_in_markdown


def as_markdown(
    sections: Sequence[Section],
    plots: Sequence[tuple[str, Path]],
    missing: Sequence[str],
    head: Headline = NO_HEADLINE,
) -> str:
    """`plots` are (title, path), and lie beside the report."""
    blocks = [*_head(head), *(block for section in sections for block in _blocks(section))]
    if plots or missing:
        blocks.append("## Plots")
    blocks += [f"![{escaped(title)}]({path.name})" for title, path in plots]
    blocks.append(_list(not_drawn(missing)))
    blocks.append("Every point with all its numbers: [results.csv](results.csv). For scripts: summary.json.")
    return "\n\n".join(block for block in blocks if block) + "\n"


def _head(head: Headline) -> Iterator[str]:
    yield f"# {escaped(head.title)}"
    yield escaped(" · ".join(head.facts))
    for number, sentence in enumerate(head.sentences):
        yield f"**{escaped(sentence)}**" if number == 0 else escaped(sentence)
    yield escaped(head.runs)
    yield _commands([head.command]) if head.command else ""
    yield escaped(head.unmeasured)
    yield _commands([head.to_measure]) if head.to_measure else ""


def _blocks(section: Section) -> Iterator[str]:
    yield f"## {escaped(section.title)}"
    yield _list([f"{name}: {value}" for name, value in section.pairs])
    yield _table(section) if section.rows else ""
    yield section.rest
    yield _list(section.lines)
    yield _commands(section.commands) if section.commands else ""


def _commands(commands: Sequence[Sequence[str]]) -> str:
    return "\n".join(["```bash", *(plain(" ".join(words)) for words in commands), "```"])


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {escaped(line)}" for line in lines)


def _table(section: Section) -> str:
    rows = [[_cell(cell) for cell in row] for row in section.rows]
    header = [escaped(name) for name in section.header]
    return table_in_markdown(header, rows, section.alignment)


def _cell(text: str) -> str:
    return f"**{escaped(text)}**" if isinstance(text, Best) else escaped(text)


def escaped(text: str) -> str:
    """Text from a file as Markdown that shows it as it is: no HTML, no link, no cell border, no emphasis."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$#!])", r"\\\1", text)
    # Within a word an underscore means nothing, and tp\_2 is hard to read.
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
