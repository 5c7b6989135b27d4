"""What the analysis says: sections made once, written as text for a terminal and as Markdown."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import tabulate

from batch_inference.console import short
from batch_inference.metrics import METRIC_BY_NAME
from batch_inference.tables import (
    GOALS,
    GROUP_BY,
    TO_MENTION,
    Setting,
    best_points,
    differing,
    groups,
    half_width,
    plain,
    setting_labels,
)

WIDTH = 80
# A terminal shows this many lines of a list, and so much of each; report.md has them all.
LIST_LIMIT, LINE_LIMIT = 12, 400


@dataclass(frozen=True)
class Section:
    """A heading, then facts (name, value), a table, and lines; each part may be empty."""

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    header: tuple[str, ...] = ()
    rows: list[list[str]] = field(default_factory=list)
    numbers: frozenset[str] = frozenset()  # columns set to the right
    lines: list[str] = field(default_factory=list)


def sections(settings: Sequence[Setting], points: pd.DataFrame) -> list[Section]:
    """Everything that the files say, in the order in which it is read."""
    parts = list(groups(points))
    found = [_about(points, parts), _settings(settings, points), *_best(points, parts), _problems(settings, points)]
    return [section for section in found if section.facts or section.rows or section.lines]


# --- the sections -------------------------------------------------------------------------------------------------


def _about(points: pd.DataFrame, parts: list[tuple[int, pd.DataFrame]]) -> Section:
    unlike = differing(points, GROUP_BY)
    names = {"model": "model", "device": "device_name", "vLLM": "vllm_version", "dtype": "dtype",
             "output tokens": "max_tokens", "host": "host"}  # fmt: skip
    facts = [
        (label, ", ".join(map(str, points[column].dropna().unique())))
        for label, column in names.items()
        if column not in unlike
    ]
    lines = []
    if unlike:
        lines.append(
            f"{len(parts)} groups of unlike points, never ranked together; they differ in {', '.join(unlike)}:"
        )
        for number, part in parts:
            who = ", ".join(map(str, part["setting"].unique()))
            lines.append(f"group {number}: {_values(part, unlike)} ({who})")
    for number, part in parts:
        mixed = differing(part, TO_MENTION)
        if mixed:
            where = f"In group {number} settings" if unlike else "Settings"
            lines.append(f"{where} also differ in {', '.join(mixed)}; see results.csv.")
    return Section("Measured", [(label, value) for label, value in facts if value], lines=lines)


def _values(part: pd.DataFrame, columns: Sequence[str]) -> str:
    """The values of a group; a group has one for each of these columns."""
    first = part.iloc[0]
    return ", ".join(f"{name} {'unknown' if pd.isna(first[name]) else first[name]}" for name in columns)


def _settings(settings: Sequence[Setting], points: pd.DataFrame) -> Section:
    labels = setting_labels(settings)
    several = points["group"].nunique() > 1
    rows = []
    for setting in sorted(settings, key=lambda setting: (setting.result.num_devices, labels[setting.path])):
        label = labels[setting.path]
        numbers = sorted(points.loc[points["setting"] == label, "group"].unique())
        group = [",".join(map(str, numbers))] if several else []
        done = f"{setting.points_ok}/{setting.points_asked}"
        load = "" if setting.load_s is None else f"{setting.load_s:.1f}"
        rows.append([label, *group, str(setting.result.num_devices), done, plain(setting.result.status), load])
    header = ("setting", *(["group"] if several else []), "devices", "points ok", "status", "load s")
    return Section("Settings", header=header, rows=rows, numbers=frozenset({"devices", "points ok", "load s"}))


def _best(points: pd.DataFrame, parts: list[tuple[int, pd.DataFrame]]) -> Iterator[Section]:
    unlike = differing(points, GROUP_BY)
    for number, part in parts:
        rows = [
            [str(seq_len), goal, str(row["setting"]), str(row["num_devices"]), str(row["batch_size"]),
             _with_unit(row, GOALS[goal])]
            for seq_len, goal, row in best_points(part)
        ]  # fmt: skip
        lines = []
        if (part["global_batch_size"] != part["batch_size"]).any():
            lines.append("batch: requests handed to each replica.")
        if any(row[-1].endswith("*") for row in rows):
            lines.append("* suspect: see below, and do not rely on it alone.")
        if any("±" in row[-1] for row in rows):
            lines.append("±: 95 % confidence interval of the mean over the runs.")
        title = f"Best of group {number}: {_values(part, unlike)}" if unlike else "Best"
        header = ("length", "best", "setting", "devices", "batch", "value")
        yield Section(title, [], header, rows, frozenset({"length", "devices", "batch"}), lines)


def _problems(settings: Sequence[Setting], points: pd.DataFrame) -> Section:
    labels = setting_labels(settings)
    lines = [f"{labels[setting.path]} failed: {setting.failure}" for setting in settings if setting.failure]
    lost = points[points["status"] != "ok"].fillna({"reason": "no reason is given"})
    for (name, status, reason), rows in lost.groupby(["setting", "status", "reason"], observed=True, sort=False):
        lines.append(f"{name}: {status}, {_where(rows)}: {reason}")
    doubtful = points[(points["status"] == "ok") & points["verdict"].isin(["suspect", "invalid"])]
    doubtful = doubtful.fillna({"verdict_reasons": "no reason is given"})
    keys = ["setting", "verdict", "verdict_reasons"]
    for (name, verdict, reasons), rows in doubtful.groupby(keys, observed=True, sort=False):
        lines.append(f"{name}: {verdict}, {_where(rows)}: {reasons}")
    return Section("Failed, skipped and doubtful", lines=lines)


def _where(rows: pd.DataFrame) -> str:
    """batch 1, 4 x length 512; single points are not named where the shapes make no full grid."""
    batches, lengths = sorted(rows["batch_size"].unique()), sorted(rows["seq_len"].unique())
    if len(rows) < len(batches) * len(lengths):
        return "batch x length " + ", ".join(
            f"{a}x{b}" for a, b in zip(rows["batch_size"], rows["seq_len"], strict=True)
        )
    return f"batch {', '.join(map(str, batches))} x length {', '.join(map(str, lengths))}"


# --- numbers ------------------------------------------------------------------------------------------------------


def _with_unit(row: Mapping[Hashable, Any], metric: str) -> str:
    mark = "*" if row["verdict"] == "suspect" else ""
    return f"{with_interval(row[metric], half_width(row, metric))} {METRIC_BY_NAME[metric].unit}{mark}"


def with_interval(value: float, half: float | None) -> str:
    """Digits as far as the interval allows: two of it, and the value as far as those. The interval is rounded up."""
    if not half:
        return short(value)
    four_digits = 3 - math.floor(math.log10(abs(value)))
    decimals = min(1 - math.floor(math.log10(half)), four_digits + 1)
    rounded_up = math.ceil(half * 10**decimals - 1e-9) / 10**decimals
    shown = max(0, decimals)
    return f"{round(value, decimals):.{shown}f} ±{rounded_up:.{shown}f}"


# --- text ---------------------------------------------------------------------------------------------------------


def as_text(parts: Sequence[Section]) -> str:
    return "\n\n".join("\n".join([*_wrapped(part.title, indent=2), *_text_body(part)]) for part in parts)


def _text_body(part: Section) -> Iterator[str]:
    name_width = max((len(name) for name, _ in part.facts), default=0)
    for name, value in part.facts:
        yield from _wrapped(f"  {name:<{name_width}}  {value}", indent=name_width + 4)
    if part.rows:
        yield _text_table(part)
    for line in part.lines[:LIST_LIMIT]:
        yield from _wrapped(f"  {_short(line, LINE_LIMIT)}", indent=4)
    if len(part.lines) > LIST_LIMIT:
        yield f"  … and {len(part.lines) - LIST_LIMIT} more in report.md"


def _wrapped(line: str, indent: int) -> list[str]:
    return textwrap.wrap(line, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)


def _text_table(part: Section) -> str:
    place = part.header.index("setting")
    others = [max(map(len, column)) + 2 for column in zip(part.header, *part.rows, strict=True)]
    room = max(8, WIDTH - 2 - (sum(others) - others[place]))
    rows = [[_short(cell, room) if index == place else cell for index, cell in enumerate(row)] for row in part.rows]
    tabulate.MIN_PADDING = 0  # the headers are no wider than they must be
    text = tabulate.tabulate(rows, part.header, "simple", colalign=_alignment(part), disable_numparse=True)
    return textwrap.indent(text, "  ")


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width // 2]}…{text[len(text) - (width - width // 2 - 1) :]}"


def _alignment(part: Section) -> list[str]:
    return ["right" if name in part.numbers else "left" for name in part.header]


# --- Markdown -----------------------------------------------------------------------------------------------------


def as_markdown(parts: Sequence[Section], plots: Sequence[tuple[str, Path]], missing: Sequence[str]) -> str:
    """The same sections, and the plots by name: they lie beside the report."""
    blocks = ["# Batch inference: results"]
    for part in parts:
        blocks.append(f"## {escaped(part.title)}")
        blocks.append("\n".join(f"- {name}: {escaped(value)}" for name, value in part.facts))
        if part.rows:
            rows = [[escaped(cell) for cell in row] for row in part.rows]
            blocks.append(
                tabulate.tabulate(rows, part.header, "github", colalign=_alignment(part), disable_numparse=True)
            )
        blocks.append("\n".join(f"- {escaped(line)}" for line in part.lines))
    if plots or missing:
        blocks.append("## Plots")
    blocks += [f"![{title}]({path.name})" for title, path in plots]
    blocks.append("\n".join(f"- Not drawn: {escaped(reason)}" for reason in missing))
    blocks.append("Every point with all its numbers: [results.csv](results.csv).")
    return "\n\n".join(block for block in blocks if block) + "\n"


def escaped(text: str) -> str:
    """Text from a file as Markdown that shows it as it is: no HTML, no link, no cell border, no emphasis."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$#!])", r"\\\1", text)
    # Within a word an underscore means nothing, and tp\_2 is hard to read.
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
