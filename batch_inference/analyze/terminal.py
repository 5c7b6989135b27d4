"""The answer and the sections as text, for a terminal of 80 columns or more."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from batch_inference.analyze.headline import NO_HEADLINE, Headline
from batch_inference.analyze.sections import Section
from batch_inference.analyze.wording import BOLD, NO_BREAK, Best, kept_together, short_names
from batch_inference.core.text import WIDTH, counted, escaped, listed, short_name, table, wrapped

# A terminal shows this many rows or lines of a list, and so much of each line; report.md has them all.
LIST_LIMIT, LINE_LIMIT = 12, 400
TEXT_ROWS = 12
# Wider lines than these are hard to read.
_WIDEST = 120
# Of a table that is too wide, so many parts.
_MOST_PARTS = 2
_FEWEST_CHARACTERS = 8  # of a name that gives way
_BEST = "●"


def terminal_width() -> int:
    """Of the terminal that the text goes to; where it goes elsewhere, that of one that nobody has widened."""
    return min(_WIDEST, max(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))


def as_text(sections: Sequence[Section], head: Headline = NO_HEADLINE, width: int = WIDTH) -> str:
    names = {name for section in sections for name in _settings_in(section)}
    shown = [section for section in sections if not section.is_detail]
    blocks = [list(_head(head, width)), *(list(_section(section, names, width)) for section in shown)]
    if more := dict.fromkeys(section.topic for section in sections if section.is_detail):
        blocks.append(_lines(f"Also in the report: {listed(more)}.", 2, width))
    return "\n\n".join("\n".join(block) for block in blocks if block)


def closing(missing: Sequence[str], files: Sequence[Path], plots: Sequence[Path] = (), width: int = WIDTH) -> list[str]:
    """The lines after the sections: why plots were not drawn, and the files that were written."""
    reasons = [line for reason in missing for line in wrapped(f"not drawn: {reason}", indent=2, width=width)]
    drawn = [f"and {counted(len(plots), 'plot')} there: {', '.join(path.stem for path in plots)}"] if plots else []
    return [
        *reasons,
        *(escaped(str(file)) for file in files),
        *(line for text in drawn for line in wrapped(escaped(text), indent=2, width=width)),
    ]


def _head(head: Headline, width: int) -> Iterator[str]:
    for number, sentence in enumerate(head.sentences[:LIST_LIMIT]):
        if number:
            yield ""
        yield from _lines(short_name(sentence, 2 * LINE_LIMIT), 0, width)
    yield from _rest(len(head.sentences) - LIST_LIMIT, "more answer")
    if head.unmeasured:
        yield ""
        yield from _lines(head.unmeasured, 0, width)
    if head.to_measure:
        yield from _command(head.to_measure)


def _section(section: Section, names: Iterable[str], width: int) -> Iterator[str]:
    yield from _lines(section.title, 2, width)
    name_width = max((len(name) for name, _ in section.pairs), default=0)
    for name, value in section.pairs:
        yield from _lines(f"  {name:<{name_width}}  {value}", name_width + 4, width)
    if section.rows:
        yield from _tables(section, names, width)
        yield from _rest(len(section.rows) - TEXT_ROWS + section.more, "more row")
    for line in section.lines[:LIST_LIMIT]:
        yield from _lines(f"  {short_name(line.replace(BOLD, _BEST), LINE_LIMIT)}", 4, width)
    yield from _rest(len(section.lines) - LIST_LIMIT, "more line")
    for words in section.commands:
        yield from _command(words)


def _command(words: Sequence[str]) -> Iterator[str]:
    """One that can be copied, however many lines it takes; a flag and its value are on one."""
    first, *others = _with_values(words)
    line = f"  {first}"
    for word in others:
        if len(line) + len(word) + 3 > WIDTH:
            yield f"{line} \\"
            line = f"     {word}"
        else:
            line = f"{line} {word}"
    yield line


def _with_values(words: Sequence[str]) -> list[str]:
    found: list[str] = []
    for word in map(escaped, words):
        is_value = found and found[-1].startswith("-") and " " not in found[-1] and not word.startswith("-")
        if is_value and len(found[-1]) + len(word) < WIDTH - 10:
            found[-1] += f" {word}"
        else:
            found.append(word)
    return found


def _rest(count: int, what: str) -> Iterator[str]:
    if count > 0:
        yield f"  … and {counted(count, what)} in report.md"


def _lines(text: str, indent: int, width: int) -> list[str]:
    # Names come from files, and may be of any length.
    lines = wrapped(kept_together(text), indent, width=width, break_long_words=True)
    return [line.replace(NO_BREAK, " ") for line in lines]


# --- tables -------------------------------------------------------------------------------------------------------


def _tables(section: Section, names: Iterable[str], width: int) -> Iterator[str]:
    """One, or as many as it takes to fit: each begins with the columns that tell what a row is of."""
    cells = [list(section.header), *([_marked(cell) for cell in row] for row in section.rows[:TEXT_ROWS])]
    if "setting" in section.header:
        place = section.header.index("setting")
        others = [max(map(len, column)) + 2 for column in zip(*cells, strict=True)]
        room = max(_FEWEST_CHARACTERS, width - 2 - (sum(others) - others[place]))
        shown = short_names(names, room, width // 2)
        cells[1:] = [[*row[:place], shown[row[place]], *row[place + 1 :]] for row in cells[1:]]
    parts = list(_that_fit(cells, section.keys, _best_first(section), width - 2))
    for columns in parts[:_MOST_PARTS]:
        header, *rows = [[row[column] for column in columns] for row in cells]
        yield textwrap.indent(table(header, rows, [section.alignment[column] for column in columns]), "  ")
    yield from _rest(sum(len(columns) - section.keys for columns in parts[_MOST_PARTS:]), "more column")


def _best_first(section: Section) -> list[int]:
    """The columns that tell of a row: those that hold a best one before others."""
    places = range(section.keys, len(section.header))
    return sorted(places, key=lambda place: not any(isinstance(row[place], Best) for row in section.rows))


def _marked(cell: str) -> str:
    """Nothing is bold here."""
    return f"{_BEST} {cell}" if isinstance(cell, Best) else cell


def _that_fit(cells: Sequence[Sequence[str]], keys: int, others: Sequence[int], width: int) -> Iterator[list[int]]:
    """The columns of each table, in the order of `others` where they are several; one that is too wide even so stands
    alone beside the keys."""
    widths = [max(map(len, column)) + 2 for column in zip(*cells, strict=True)]
    if sum(widths) - 2 <= width:
        yield list(range(len(widths)))
        return
    columns = first = list(range(keys))
    for place in others:
        if len(columns) > keys and sum(widths[column] for column in [*columns, place]) - 2 > width:
            yield columns
            columns = first
        columns = [*columns, place]
    yield columns


# --- names --------------------------------------------------------------------------------------------------------


def _settings_in(section: Section) -> Iterator[str]:
    if "setting" in section.header:
        place = section.header.index("setting")
        yield from (row[place] for row in section.rows)
