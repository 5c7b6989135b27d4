"""The sections as one HTML page, report.html: nothing is fetched, plots are inside, tables sort, light and dark."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import pandas as pd

from batch_inference.analyze.sections import ROW_LIMIT, Section
from batch_inference.analyze.wording import HEADING, not_drawn
from batch_inference.core.text import plain, short

# The page allows itself no network at all, so that no name from a file can fetch anything.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_POINTS = {
    "group": "group", "setting": "setting", "devices": "num_devices", "length": "seq_len", "batch": "batch_size",
    "global batch": "global_batch_size", "output tok/s": "output_tok_per_s",
    "per device": "output_tok_per_s_per_device", "latency s": "latency_mean_s", "± s": "latency_ci95_s",
    "TTFT p50 s": "ttft_p50_s", "TTFT p99 s": "ttft_p99_s", "TPOT p50 s": "tpot_p50_s", "TPOT p99 s": "tpot_p99_s",
    "efficiency": "scaling_efficiency", "status": "status", "verdict": "verdict",
}  # fmt: skip
_TEXT_COLUMNS = {"setting", "status", "verdict"}

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --pale: #f3f5f7; --line: #d5dae0; --soft: #57606a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e8ee; --paper: #12161c; --pale: #1c222b; --line: #353d48; --soft: #9aa6b2; }
}
body { margin: 0 auto; max-width: 64rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
th { background: var(--pale); position: sticky; top: 0; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
.number { text-align: right; }
dl { display: grid; grid-template-columns: fit-content(40%) 1fr; gap: .2rem 1rem; margin: 0 0 .6rem; }
dt { color: var(--soft); } dd { margin: 0; }
ul { padding-left: 1.2rem; color: var(--soft); font-size: .9rem; }
pre { background: var(--pale); padding: .4rem .7rem; overflow-x: auto; font-size: .9rem; }
figure { margin: 1.5rem 0; } figure img { width: 100%; background: #fff; border-radius: 6px; }
nav { font-size: .9rem; } nav a { margin-right: 1rem; color: inherit; }
"""

# A click sorts by the number that a cell begins with, else by its text; what is unknown stays last.
_SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentElement, table = head.closest("table"), body = table.tBodies[0];
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const numeric = head.classList.contains("number");
  const key = row => {
    const text = row.cells[head.cellIndex].textContent;
    return numeric ? parseFloat(text.replace(/^\\D*?(?=[-\\d.])/, "")) : text;
  };
  const unknown = value => value === "" || Number.isNaN(value);
  const order = (a, b) => numeric ? a - b : a.localeCompare(b, undefined, { numeric: true });
  const rows = [...body.rows].map(row => [key(row), row]);
  rows.sort(([a], [b]) => unknown(a) - unknown(b) || (unknown(a) ? 0 : up ? order(a, b) : order(b, a)));
  body.append(...rows.map(pair => pair[1]));
});
"""


def as_html(
    sections: Sequence[Section], points: pd.DataFrame, plots: Sequence[tuple[str, Path]], missing: Sequence[str]
) -> str:
    """The whole page. `plots` are (title, path of the PNG); the SVG beside each is what the page holds.

    Raises OSError where a plot cannot be read.
    """
    body = [
        f"<h1>{HEADING}</h1>",
        '<nav><a href="#plots">Plots</a><a href="#points">All points</a></nav>',
        *map(_section, sections),
        '<h2 id="plots">Plots</h2>',
        *(_figure(title, path) for title, path in plots),
        _list(not_drawn(missing)),
        '<h2 id="points">All points</h2>',
        _table(_points(points)),
    ]
    return "\n".join(
        [
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # An empty icon, or a browser would ask for one.
            f'<link rel="icon" href="data:,"><title>{HEADING}</title>',
            f"<style>{_STYLE}</style></head><body>",
            *filter(None, body),
            f"<script>{_SCRIPT}</script></body></html>\n",
        ]
    )


def _section(section: Section) -> str:
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in section.pairs)
    table = _table(section) if section.rows else ""
    above = f"<h2>{escape(section.title)}</h2>" + (f"<dl>{pairs}</dl>" if pairs else "") + table
    commands = "".join(f"<pre>{escape(plain(' '.join(words)))}</pre>" for words in section.commands)
    return above + _list(section.lines) + commands


def _table(section: Section) -> str:
    classes = [' class="number"' if side == "right" else "" for side in section.alignment]
    heads = "".join(
        f"<th{kind}><button>{escape(name)}</button></th>" for kind, name in zip(classes, section.header, strict=True)
    )
    lines = ("<tr>" + "".join(_cells(row, classes)) + "</tr>" for row in section.rows)
    rest = f"<p>{escape(section.rest)}</p>" if section.rest else ""
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>\n" + "\n".join(lines) + "</tbody></table>"
    return f'<div class="wide">{table}</div>' + rest


def _cells(row: Sequence[str], classes: Sequence[str]) -> Iterator[str]:
    return (f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(classes, row, strict=True))


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _figure(title: str, path: Path) -> str:
    data = base64.b64encode(path.with_suffix(".svg").read_bytes()).decode()
    # As an image an SVG runs no script and its ids meet no others.
    return f'<figure><img alt="{escape(title)}" src="data:image/svg+xml;base64,{data}"></figure>'


def _points(points: pd.DataFrame) -> Section:
    columns = {label: name for label, name in _POINTS.items() if name in points}
    shown = points[list(columns.values())]
    rows = [
        [_cell(value, label) for label, value in zip(columns, row, strict=True)]
        for row in shown.head(ROW_LIMIT).itertuples(index=False)
    ]
    numbers = frozenset(columns) - _TEXT_COLUMNS
    return Section("", header=tuple(columns), rows=rows, numbers=numbers, more=len(shown) - len(rows))


def _cell(value: object, label: str) -> str:
    if pd.isna(value):  # type: ignore[call-overload]
        return ""
    return short(value) if isinstance(value, float) and label not in _TEXT_COLUMNS else str(value)
