"""The summary on the terminal and report.md, both from the same table of points."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import tabulate

from batch_inference.console import short
from batch_inference.metrics import METRIC_BY_NAME
from batch_inference.results import Result
from batch_inference.tables import best_points, group_differences, measured, measured_on

WIDTH = 80
# What "best" means.
BEST = ("output_tok_per_s", "latency_mean_s", "output_tok_per_s_per_device")


def summary(results: Sequence[Result], table: pd.DataFrame) -> str:
    """The answer in text, within 80 columns."""
    parts = [_text_table(*settings_rows(results))]
    if not measured(table).empty:
        parts += [*_measured_on(table), *_group_notes(table)]
        parts += [f"{title}\n{_text_table(headers, rows)}" for title, headers, rows in best_tables(table)]
    parts += [_wrapped(problem) for problem in problems(results)]
    return "\n\n".join(part for part in parts if part)


def markdown(results: Sequence[Result], table: pd.DataFrame, plots: Sequence[Path], left_out: Sequence[str]) -> str:
    """report.md: the same content as the summary, with the plots."""
    parts = ["# Batch inference results", _markdown_table(*settings_rows(results))]
    if not measured(table).empty:
        parts += [escape(note) for note in (*_measured_on(table), *_group_notes(table))]
        for title, headers, rows in best_tables(table):
            parts += [f"## {escape(title)}", _markdown_table(headers, rows)]
    parts += [f"![{path.stem}]({path.name})" for path in plots]
    if left_out:
        parts += ["## Plots left out", *(f"- {escape(reason)}" for reason in left_out)]
    found = problems(results)
    if found:
        parts += ["## Problems", "\n".join(f"- {escape(problem)}" for problem in found)]
    return "\n\n".join(parts) + "\n"


def settings_rows(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """One row per setting: what it is, how far it came, how long its engine took to start."""
    headers = ["setting", "TP", "PP", "DP", "devices", "status", "points ok", "load s"]
    rows = []
    for result in results:
        sizes = [str(result.config[f"{kind}_parallel_size"]) for kind in ("tensor", "pipeline", "data")]
        ok = sum(point.status == "ok" for point in result.points)
        load_s = result.engine.get("load_s", {}).get("total_s")
        rows.append(
            [result.name, *sizes, str(result.num_devices), result.status, f"{ok}/{len(result.points)}", short(load_s)]
        )
    return headers, rows


def best_tables(table: pd.DataFrame) -> list[tuple[str, list[str], list[list[str]]]]:
    """For each kind of best: title, headers, one row per group and length."""
    several = table["group"].nunique() > 1
    tables = []
    for name in BEST:
        metric = METRIC_BY_NAME[name]
        title = f"Best by {metric.label[0].lower()}{metric.label[1:]}"
        headers = [*(["group"] if several else []), "length", "setting", "batch", metric.unit, "± 95 %", "verdict"]
        rows = [
            [
                *([str(point["group"])] if several else []),
                str(point["seq_len"]),
                str(point["name"]),
                str(point["batch_size"]),
                short(point[name]),
                _relative_interval(point),
                str(point["verdict"]),
            ]
            for _, point in best_points(table, name, str(metric.better)).iterrows()
        ]
        tables.append((title, headers, rows))
    return tables


def problems(results: Sequence[Result]) -> list[str]:
    """Everything that did not go as asked, a line each."""
    lines = []
    for result in results:
        failure = result.engine.get("failure")
        if failure:
            lines.append(f"{result.name} failed: {failure['reason']}")
        for point in result.points:
            where = f"{result.name}, batch {point.batch_size}, length {point.seq_len}"
            if point.status != "ok":
                lines.append(f"{where}: {point.status}: {point.reason}")
            elif point.verdict != "valid":
                lines.append(f"{where}: {point.verdict}: {'; '.join(point.verdict_reasons)}")
    return lines


def _relative_interval(point: pd.Series) -> str:
    """The interval of the mean latency, as a share of it: throughput is its reciprocal and has the same share."""
    half_width = point["latency_ci95_s"]
    return "" if pd.isna(half_width) else f"{half_width / point['latency_mean_s']:.1%}"


def _measured_on(table: pd.DataFrame) -> list[str]:
    """One line for each group."""
    points = measured(table).drop_duplicates("group")
    several = len(points) > 1
    return [
        _wrapped((f"group {point['group']}: " if several else "") + measured_on(point))
        for _, point in points.iterrows()
    ]


def _group_notes(table: pd.DataFrame) -> list[str]:
    differences = group_differences(table)
    if not differences:
        return []
    count = table["group"].nunique()
    lines = [f"These {count} groups were measured on unlike things and are not compared with each other:"]
    lines += [
        f"  {name}: " + ", ".join(f"group {number} {value}" for number, value in enumerate(values, 1))
        for name, values in differences.items()
    ]
    return ["\n".join(_wrapped(line) for line in lines)]


def _text_table(headers: list[str], rows: list[list[str]]) -> str:
    tabulate.MIN_PADDING = 0  # the headers are no wider than they must be
    shown = [[textwrap.shorten(cell, 28, placeholder="…") for cell in row] for row in rows]
    return tabulate.tabulate(shown, headers=headers, disable_numparse=True)


def _markdown_table(headers: list[str], rows: list[list[str]]) -> str:
    shown = [[escape(cell) for cell in row] for row in rows]
    return tabulate.tabulate(shown, headers=headers, tablefmt="github", disable_numparse=True)


def escape(text: str) -> str:
    """Text from a file, made harmless in Markdown: no HTML, no table cell of its own, no link, no emphasis."""
    safe = html.escape(" ".join(text.split()), quote=False)
    for character in "\\|`[]*":
        safe = safe.replace(character, f"\\{character}")
    return safe


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
