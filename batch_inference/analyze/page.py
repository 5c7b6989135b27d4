"""The answer and the sections as one HTML page, report.html: nothing is fetched, plots are inside, tables sort, light
and dark, on a phone and on paper."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from batch_inference.analyze.files import dark_variant
from batch_inference.analyze.headline import NO_HEADLINE, Headline
from batch_inference.analyze.page_look import SCRIPT, STYLE
from batch_inference.analyze.sections import ROW_LIMIT, Section
from batch_inference.analyze.wording import Best, kept_together, metric_text, not_drawn
from batch_inference.core.text import plain, short

# The page allows itself no network at all, so that no name from a file can fetch anything.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
# A table of more rows scrolls by itself, so that its head stays.
_TALL = 15
# A name of more characters may be broken.
_LONG = 30
# In a text, one that a browser would break after its dashes.
_FLAG, _WHOLE = re.compile(r"--[a-z][a-z-]*"), r'<span class="whole">\g<0></span>'
# In the first characters of an SVG.
_SIZE, _HEAD = re.compile(r'<svg [^>]*width="([\d.]+)pt" height="([\d.]+)pt"'), 2000
# And nobody sorts one of fewer.
_FEW = 4


def as_html(
    sections: Sequence[Section],
    points: pd.DataFrame,
    plots: Sequence[tuple[str, Path]],
    missing: Sequence[str],
    head: Headline = NO_HEADLINE,
) -> str:
    """The whole page. `plots` are (title, path of the PNG); the SVG beside each is what the page holds.

    Raises OSError where a plot cannot be read.
    """
    ids = {f"part-{number}": section for number, section in enumerate(sections, 1)}
    has_points = not points.empty
    drawn = ['<h2 id="plots">Plots</h2>', *(_figure(title, path) for title, path in plots), _list(not_drawn(missing))]
    body = [
        f"<header><h1>{escape(head.title)}</h1>",
        _head(head),
        _contents({name: section.link for name, section in ids.items()}, bool(plots or missing), has_points),
        "</header><main>",
        *(_section(section, name) for name, section in ids.items()),
        *(drawn if plots or missing else []),
        *(_all_points(points) if has_points else []),
        '</main><dialog aria-label="A plot, large"></dialog>',
    ]
    return "\n".join(
        [
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # An empty icon, or a browser would ask for one.
            f'<link rel="icon" href="data:,"><title>{escape(head.title)}</title>',
            f"<style>{STYLE}</style></head><body>",
            *filter(None, body),
            f"<script>{SCRIPT}</script></body></html>\n",
        ]
    )


def _head(head: Headline) -> str:
    facts = f'<p class="facts">{escape(" · ".join(head.facts))}</p>' if head.facts else ""
    sentences = "".join(f"<p>{escape(kept_together(sentence))}</p>" for sentence in head.sentences)
    answer = f'<div class="answer">{sentences}</div>' if sentences else ""
    runs = f"<p>{escape(kept_together(head.runs))}</p>" if head.runs else ""
    better = f"<p>{escape(kept_together(head.unmeasured))}</p>" if head.unmeasured else ""
    commands = [_command(words) if words else "" for words in (head.command, head.to_measure)]
    return facts + answer + runs + commands[0] + better + commands[1]


def _contents(titles: Mapping[str, str], has_plots: bool, has_points: bool) -> str:
    links = {**titles, **({"plots": "Plots"} if has_plots else {}), **({"points": "All points"} if has_points else {})}
    anchors = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title in links.items())
    return f'<nav aria-label="Contents">{anchors}</nav>'


# --- sections -----------------------------------------------------------------------------------------------------


def _section(section: Section, name: str) -> str:
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in section.pairs)
    table = _table(section) if section.rows else ""
    above = f'<h2 id="{name}">{escape(section.title)}</h2>' + (f"<dl>{pairs}</dl>" if pairs else "") + table
    return above + _list(section.lines) + "".join(map(_command, section.commands))


def _command(words: Sequence[str]) -> str:
    # Each word in one piece, or a browser breaks a flag after its dashes.
    text = " ".join(f"<span>{escape(word)}</span>" for word in plain(" ".join(words)).split(" "))
    return f'<div class="command"><pre>{text}</pre><button class="copy">Copy</button></div>'


def _table(section: Section) -> str:
    """Below it a place for the words of how it is sorted, above it one for the hint that it goes on."""
    classes = [_class(section, name) for name in section.header]
    heads = "".join(
        f"<th{kind}{_first_order(section, name)}><button>{escape(name)}</button></th>"
        for kind, name in zip(classes, section.header, strict=True)
    )
    lines = ("<tr>" + "".join(_cells(row, classes)) + "</tr>" for row in section.rows)
    rest = f"<p>{escape(section.rest)}</p>" if section.rest else ""
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>\n" + "\n".join(lines) + "</tbody></table>"
    tall = " tall" if len(section.rows) > _TALL else " few" if len(section.rows) < _FEW else ""
    region = f'<div class="wide{tall}" role="region" aria-label="{escape(section.title)}">{table}</div>'
    return f'<p class="hint" hidden></p>{region}<p class="sorted" aria-live="polite"></p>' + rest


def _class(section: Section, name: str) -> str:
    if name == _WHY:
        return ' class="words"'
    return ' class="number"' if name in section.numbers else ""


def _first_order(section: Section, name: str) -> str:
    """A first click shows the best on top."""
    return ' data-first="descending"' if name in section.is_more_better else ""


def _cells(row: Sequence[str], classes: Sequence[str]) -> Iterator[str]:
    for of_column, cell in zip(classes, row, strict=True):
        text = f"<b>{escape(cell)}</b>" if isinstance(cell, Best) else escape(cell)
        is_long = not of_column and len(cell) > _LONG
        # Rather between the words of a name than within them.
        text = text.replace("_", "_<wbr>") if is_long else text
        kind = ' class="long"' if is_long else of_column
        yield f"<td{kind}>{text}</td>"


def _list(lines: Sequence[str]) -> str:
    shown = [f"<li>{_FLAG.sub(_WHOLE, escape(line))}</li>" for line in lines if line]
    return "<ul>" + "".join(shown) + "</ul>" if shown else ""


# --- plots --------------------------------------------------------------------------------------------------------


def _figure(title: str, path: Path) -> str:
    """With its dark variant, where there is one; without, a dark page shows it on white."""
    light = path.with_suffix(".svg")
    dark = dark_variant(light)
    # Both, and the style shows one: a browser that prints does not choose anew among the sources of a <picture>.
    plots = {"day": light, "night": dark} if dark.exists() else {"light": light}
    # As an image an SVG runs no script and its ids meet no others.
    images = (f'<img class="{name}" alt="{escape(title)}" src="{_data(plot)}">' for name, plot in plots.items())
    high = ' class="high"' if _is_high(light) else ""
    return f'<figure{high}><button class="plot" title="Open large">{"".join(images)}</button></figure>'


def _is_high(svg: Path) -> bool:
    """Higher than wide, as of many bars: on paper it takes more than a third of a page to be read."""
    with svg.open(encoding="utf-8") as file:
        size = _SIZE.search(file.read(_HEAD))
    return size is not None and float(size[2]) > float(size[1])


def _data(svg: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.read_bytes()).decode()}"


# --- all points ---------------------------------------------------------------------------------------------------

Record = Mapping[Hashable, Any]
_WHY = "why"


@dataclass(frozen=True)
class _Column:
    name: str
    of_points: str
    text: Callable[[Record, str], str]
    is_number: bool = True
    is_on: bool = False  # others are there to be switched on
    is_more_better: bool = False


def _word(row: Record, name: str) -> str:
    return "" if pd.isna(row[name]) else str(row[name])


def _whole(row: Record, name: str) -> str:
    return "" if pd.isna(row[name]) else f"{row[name]:.0f}"


def _number(row: Record, name: str) -> str:
    return "" if pd.isna(row[name]) else short(row[name])


def _milliseconds(row: Record, name: str) -> str:
    return "" if pd.isna(row[name]) else short(1000 * row[name])


def _measured(row: Record, name: str) -> str:
    """With its interval, and the mark of a suspect one."""
    return "" if pd.isna(row[name]) else metric_text(row, name)


def _why(row: Record, name: str) -> str:
    """Of a point that failed its reason, of another the verdict's."""
    return _word(row, name) or _word(row, "reason")


_POINTS = (
    _Column("setting", "setting", _word, is_number=False, is_on=True),
    _Column("group", "group", _whole),
    _Column("devices", "num_devices", _whole),
    _Column("length", "seq_len", _whole, is_on=True),
    _Column("batch", "batch_size", _whole, is_on=True),
    _Column("global batch", "global_batch_size", _whole),
    _Column("output tok/s", "output_tok_per_s", _measured, is_on=True, is_more_better=True),
    _Column("per device", "output_tok_per_s_per_device", _measured, is_more_better=True),
    _Column("latency s", "latency_mean_s", _measured, is_on=True),
    _Column("TTFT p50 s", "ttft_p50_s", _number),
    _Column("TTFT p99 s", "ttft_p99_s", _number),
    _Column("TPOT p50 ms", "tpot_p50_s", _milliseconds),
    _Column("TPOT p99 ms", "tpot_p99_s", _milliseconds),
    _Column("efficiency", "scaling_efficiency", _number, is_more_better=True),
    _Column("memory GiB", "memory_used_gib", _number, is_on=True),
    _Column("status", "status", _word, is_number=False),
    _Column("verdict", "verdict", _word, is_number=False, is_on=True),
    _Column(_WHY, "verdict_reasons", _why, is_number=False),
)  # fmt: skip


def _all_points(points: pd.DataFrame) -> Iterator[str]:
    yield '<section id="points"><h2>All points</h2>'
    columns = [column for column in _POINTS if column.of_points in points]
    yield _switches(columns)
    yield _table(_points(points, columns))
    yield "</section>"


def _switches(columns: Sequence[_Column]) -> str:
    """A box for each column but the first; what is not ticked is not shown, which takes no script."""
    rules, boxes = [], []
    for number, column in enumerate(columns[1:], 2):
        rules.append(
            f"#points:has(#column-{number}:not(:checked)) :is(th, td):nth-child({number}) {{ display: none; }}"
        )
        ticked = " checked" if column.is_on else ""
        boxes.append(f'<label><input type="checkbox" id="column-{number}"{ticked}> {escape(column.name)}</label>')
    if not boxes:
        return ""
    return (
        f'<style>{" ".join(rules)}</style><fieldset class="columns"><legend>Columns</legend>{"".join(boxes)}</fieldset>'
    )


def _points(points: pd.DataFrame, columns: Sequence[_Column]) -> Section:
    rows = [
        [column.text(row, column.of_points) for column in columns]
        for row in points.head(ROW_LIMIT).to_dict("records")
    ]  # fmt: skip
    return Section(
        "All points",
        header=tuple(column.name for column in columns),
        rows=rows,
        numbers=frozenset(column.name for column in columns if column.is_number),
        more=len(points) - len(rows),
        is_more_better=frozenset(column.name for column in columns if column.is_more_better),
    )
