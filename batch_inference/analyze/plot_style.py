"""What every plot shares: the sheet with title, subtitle and legend, and its axes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from batch_inference.analyze.plot_colors import color
from batch_inference.analyze.plot_looks import looks, named, of_settings, seats
from batch_inference.analyze.wording import short_names
from batch_inference.core.metrics import METRIC_BY_NAME
from batch_inference.core.text import short_name

# 8 inches at 200 dpi: sharp on a large screen, and what is 9 points there is still 9 points at 800 px.
WIDTH_IN, DPI = 8.0, 200
FACETS = 12
# Characters below an axis of which three stand beside each other.
_LONGEST_OF_THREE = 34
# Rows of a legend with a column for each family of settings.
_LEGEND_ROWS = 5
BESIDE: dict[str, Any] = {"xytext": (-3, 3), "textcoords": "offset points", "ha": "right"}
FRONT = "front: nothing is better beyond the intervals"
NOTHING_MEASURED, NO_QUEUE_POINT = "no point was measured", "no queue point was measured"
# Columns of seconds that are drawn in milliseconds.
IN_MS = frozenset(name for name in METRIC_BY_NAME if name.startswith("tpot_"))
NOT_TO_RELY_ON = "suspect or invalid"


class NothingToShowError(Exception):
    """There is no point that this plot could draw; the message says why."""


def reference() -> dict[str, Any]:
    """The look of a line that is no measurement."""
    return {"color": color("soft"), "linewidth": 1, "linestyle": (0, (1, 1)), "zorder": 1.5}


def some(values: Sequence[Any], most: int) -> list[Any]:
    """Evenly spread ones of too many, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(index * (len(values) - 1) / (most - 1))] for index in range(most)]


def of_many(points: pd.DataFrame, others: str = "the range of the others") -> str:
    """What the title says of a plot that does not show all settings and lengths; empty for one that does."""
    settings, lengths, shown = points["setting"].nunique(), points["seq_len"].nunique(), len(named(points))
    words = []
    if shown < settings:
        words.append(of_settings(shown, settings, others))
    if lengths > FACETS:
        words.append(f"{FACETS} of {lengths} prompt lengths")
    return f" ({'; '.join(words)})" if words else ""


# --- the sheet ----------------------------------------------------------------------------------------------------


def new_figure(
    points: pd.DataFrame, title: str, facets: int, height_in: float, handles: Sequence[Any]
) -> tuple[Figure, list[Axes]]:
    """Title, subtitle, a grid of at most three axes in a row, the legend below; measured in inches, so that a long
    legend makes the figure higher and never covers data. Below its first line `title` has a note on how to read it."""
    columns = columns_of(facets)
    rows = -(-facets // columns)
    blocks = _blocks(handles)
    legend_in = 0.1 + sum(block.height_in for block in blocks)
    # Those of the whole group, where they are given: the points that a plot shows may be alike by chance.
    mark, about = points[["_mark", "_about"]].iloc[0] if "_mark" in points else ("", subtitle_of(points))
    title, _, note = title.partition("\n")
    heading = textwrap.wrap(title + mark, 78)
    small = [*textwrap.wrap(about, 118)[:3], *textwrap.wrap(note, 118)]
    heading_in = 0.14 + 0.22 * len(heading)
    top_in, bottom_in = heading_in + 0.26 + 0.16 * len(small), (0.7 if columns == 3 else 0.5) + legend_in
    total_in = top_in + rows * height_in + 0.55 * (rows - 1) + bottom_in
    figure = Figure(figsize=(WIDTH_IN, total_in))
    figure.subplots_adjust(
        left=0.8 / WIDTH_IN, right=1 - 0.2 / WIDTH_IN, top=1 - top_in / total_in, bottom=bottom_in / total_in,
        hspace=0.55 / height_in, wspace=0.08,
    )  # fmt: skip
    left = 0.2 / WIDTH_IN
    figure.text(left, 1 - 0.12 / total_in, "\n".join(heading), fontsize=12, fontweight="bold", va="top")
    figure.text(left, 1 - heading_in / total_in, "\n".join(small), color=color("soft"), va="top", linespacing=1.25)
    below_in = legend_in - 0.1
    for block in blocks:
        below_in -= block.height_in
        figure.legend(handles=block.entries, ncols=block.columns, loc="lower center",
                      bbox_to_anchor=(0.5, below_in / total_in), frameon=False)  # fmt: skip
    first = figure.add_subplot(rows, columns, 1)
    others = [figure.add_subplot(rows, columns, index + 1, sharey=first) for index in range(1, facets)]
    return figure, [first, *others]


def columns_of(facets: int) -> int:
    return 2 if facets == 4 else min(3, facets)


@dataclass(frozen=True)
class _Block:
    """Entries of a legend, column by column."""

    entries: list[Any]
    columns: int

    @property
    def height_in(self) -> float:
        return 0.2 * -(-len(self.entries) // self.columns)


def _blocks(handles: Sequence[Any]) -> list[_Block]:
    """A legend, or two, one below the other. A column for each family of settings and what else there is beside them,
    where that has room; else row by row, as one reads, settings first."""
    families = [list(members) for _, members in groupby(handles, key=lambda handle: handle.get_gid())]
    is_by_family = len(families) > 1 and handles[0].get_gid()
    if is_by_family and (block := _by_family(families)):
        return [block]
    settings = [handle for handle in handles if handle.get_gid()]
    others = [handle for handle in handles if not handle.get_gid()]
    if is_by_family and (block := _by_family(families[:-1] if others else families)):
        return [block, *_in_rows(others)]
    return [*_in_rows(settings), *_in_rows(others)]


def _by_family(families: Sequence[Sequence[Any]]) -> _Block | None:
    """None where there is no room."""
    rows = max(len(members) for members in families if members[0].get_gid())
    columns = [list(members[start : start + rows]) for members in families for start in range(0, len(members), rows)]
    if rows > _LEGEND_ROWS or sum(_entry_in(max(map(_length, column))) for column in columns) > WIDTH_IN - 0.4:
        return None
    return _Block(_filled(columns, rows), len(columns))


def _in_rows(handles: Sequence[Any]) -> list[_Block]:
    if not handles:
        return []
    columns = max(1, min(len(handles), int((WIDTH_IN - 0.4) / _entry_in(max(map(_length, handles))))))
    return [
        _Block(_filled([handles[start::columns] for start in range(columns)], -(-len(handles) // columns)), columns)
    ]


def _filled(columns: Sequence[Sequence[Any]], rows: int) -> list[Any]:
    """All columns as long as the first, or what follows would move up into them."""
    return [entry for column in columns for entry in [*column, *[words_only(" ")] * (rows - len(column))]]


def _entry_in(characters: int) -> float:
    return 0.065 * characters + 0.55


def _length(handle: Any) -> int:
    return len(handle.get_label())


def words_only(label: str) -> Line2D:
    """An entry of a legend that has no mark."""
    return Line2D([], [], linestyle="", label=label)


def subtitle_of(points: pd.DataFrame) -> str:
    """What the points were measured on, for the subtitle."""
    names = ("device_name", "model", "vllm_version", "dtype", "quantization", "max_tokens", "job")
    words = {"vllm_version": "vLLM {}", "max_tokens": "{} output tokens", "job": "job of {}"}
    # More than one value only where the user allows unlike things together.
    known = {name: list(map(str, points[name].dropna().unique()))[:3] for name in names if name in points}
    return " · ".join(
        words.get(name, "{}").format(" + ".join(short_name(value, 60) for value in values))
        for name, values in known.items()
        if values
    )


def axis_label(name: str) -> str:
    metric = METRIC_BY_NAME.get(name)
    if metric is None:
        return "Efficiency, 1 = ideal"
    return f"{metric.label} [{'ms' if name in IN_MS else metric.unit}]"


def handles_of(points: pd.DataFrame, names: Sequence[str]) -> list[Any]:
    """Legend entries of settings, and of hollow marks where there are any."""
    look, families = looks(points), seats(points)
    handles = [
        # A leading underscore would take an entry out of the legend.
        Line2D([], [], markersize=5, label=" " * name.startswith("_") + label, **look[name])
        for name, label in short_names(names, 40).items()
    ]
    for name, handle in zip(names, handles, strict=True):
        # One device is the first of those that TP, PP and DP begin with.
        handle.set_gid("tp" if families[name][0] == "one" else families[name][0])
    if (points["verdict"] != "valid").any():
        handles.append(hollow("o", color("ink"), f"hollow: {NOT_TO_RELY_ON}"))
    if "_has_larger" in points:
        handles.append(words_only("larger mark: another one lies on it"))
    return handles


def hollow(marker: Any, edge: str, label: str) -> Line2D:
    return Line2D(
        [], [], color=edge, marker=marker, markersize=5, markerfacecolor=color("paper"), linestyle="", label=label
    )


# --- axes ---------------------------------------------------------------------------------------------------------


def value_axis(axes: Axes, low: float, high: float, which: Literal["x", "y"] = "y") -> None:
    """From zero; logarithmic where the values span more than a linear axis can show."""
    if not (low > 0 and high > 30 * low):
        axes.set(**{f"{which}lim": (0, 1.05 * high if which == "x" else None)})
        return
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low / 1.5, high * 1.5)})
    # A narrow facet has room for fewer numbers beside each other than above each other.
    plain_log(axes, which, (1, 2, 5) if high < (2000 if which == "y" else 100) * low else (1,))


def plain_log(axes: Axes, which: Literal["x", "y"], steps: tuple[int, ...] = (1,)) -> None:
    """Ticks of a logarithmic axis as plain numbers, and none between them."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))
    axis.set_minor_locator(NullLocator())


def in_short(value: float, _: int | None = None) -> str:
    """12000 is 12k, for ticks where there is room for five characters; never in powers of ten."""
    letter, size = next(((letter, size) for letter, size in (("M", 1e6), ("k", 1e3)) if value >= 10 * size), ("", 1.0))
    # Six digits: what is beyond is the noise of computing ticks.
    return np.format_float_positional(value / size, precision=6, unique=False, fractional=False, trim="-") + letter


def batch_axis(axes: Axes, batches: pd.Series[int]) -> None:
    """Logarithmic to base 2, with the batch sizes that were run as ticks; of too many, those that fit."""
    sizes = sorted(int(size) for size in batches.unique())
    axes.set_xscale("log", base=2)
    axes.set_xlim(sizes[0] / 2**0.4, sizes[-1] * 2**0.4)
    inches = axes.get_position().width * WIDTH_IN
    span = math.log2(sizes[-1]) - math.log2(sizes[0]) + 0.8
    ticks: list[int] = []
    right_edge = -np.inf
    for size in sizes:
        middle, half = (math.log2(size) - math.log2(sizes[0])) / span * inches, 0.04 * len(str(size)) + 0.03
        if middle - half >= right_edge:
            ticks.append(size)
            right_edge = middle + half
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())


def label_outside(grid: Sequence[Axes], x_label: str, y_label: str) -> None:
    """Names and numbers of the axes left of the first column, and names below the last of each column."""
    columns = columns_of(len(grid))
    for index, axes in enumerate(grid):
        axes.set_ylabel(_said(axes, "y", y_label) if index % columns == 0 else "")
        axes.tick_params(labelleft=index % columns == 0)
        label = _said(axes, "x", x_label) if index + columns >= len(grid) else ""
        # Three long ones beside each other would meet.
        axes.set_xlabel(label.replace(", log", ",\nlog") if columns == 3 and len(label) > _LONGEST_OF_THREE else label)


def _said(axes: Axes, which: Literal["x", "y"], label: str) -> str:
    """A logarithmic axis says so."""
    return f"{label}, log scale" if label and getattr(axes, f"get_{which}scale")() == "log" else label
