"""What every plot shares: the sheet with title, subtitle and legend, the look of each setting, axes, and which
settings are shown where there are too many."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from itertools import chain, cycle, zip_longest
from typing import Any, Literal, TypedDict

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from batch_inference.analyze.decide import GOALS
from batch_inference.analyze.tables import believable
from batch_inference.core.metrics import METRIC_BY_NAME
from batch_inference.core.text import short_name

# 8 inches at 200 dpi: sharp on a large screen, and what is 9 points there is still 9 points at 800 px.
WIDTH_IN, DPI = 8.0, 200
# More settings than ALL_NAMED cannot be told apart: then so many of the best are drawn, and the range of the others.
ALL_NAMED, NAMED = 12, 8
FACETS = 12
STYLE = {
    **sns.axes_style("whitegrid"),
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8.5,
    "axes.edgecolor": "0.4",
    "grid.color": "0.9",
    # Names come from files: a $ in one is no formula.
    "text.parse_math": False,
    # The same figure is the same file.
    "svg.hashsalt": "batch_inference",
}
# seaborn's colour-blind palette without its two palest colours, which vanish on white.
_PALETTE = [color for index, color in enumerate(sns.color_palette("colorblind")) if index not in (6, 8)]
_MARKERS: tuple[Any, ...] = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
DASHES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")

REFERENCE: dict[str, Any] = {"color": "0.25", "linewidth": 1, "linestyle": (0, (1, 1)), "zorder": 1.5}
BESIDE: dict[str, Any] = {"xytext": (-3, 3), "textcoords": "offset points", "ha": "right"}


FRONT = "front: no point is better in both"
NOTHING_MEASURED, NO_QUEUE_POINT = "no point was measured", "no queue point was measured"


class NothingToShowError(Exception):
    """There is no point that this plot could draw; the message says why."""


# --- settings -----------------------------------------------------------------------------------------------------


class Look(TypedDict):
    """What a setting looks like, as matplotlib takes it."""

    color: Any
    marker: Any
    linestyle: Any


def looks(points: pd.DataFrame) -> dict[str, Look]:
    """Colour, marker and dash of every setting of the analysis: the same for every group."""
    names = list(points["setting"].cat.categories)
    return {
        name: {"color": color, "marker": marker, "linestyle": DASHES[index // len(_PALETTE) % len(DASHES)]}
        for index, (name, color, marker) in enumerate(zip(names, cycle(_PALETTE), cycle(_MARKERS), strict=False))
    }


def named(points: pd.DataFrame) -> list[str]:
    """The settings that get a line of their own: all, or of many the best of every goal and length, in turns."""
    present = [str(name) for name in points["setting"].cat.categories if (points["setting"] == name).any()]
    if "_named" in points:
        # Chosen from all points of the group, so that every plot of it names the same.
        chosen = set(points.loc[points["_named"], "setting"])
        return [name for name in present if name in chosen]
    return present if len(present) <= ALL_NAMED else _best(points)


def _best(points: pd.DataFrame) -> list[str]:
    rankings = []
    for goal in GOALS[:3]:
        for _, here in believable(points).groupby("seq_len"):
            ranked = here.sort_values(goal.column, ascending=goal.better == "lower", kind="stable")
            rankings.append(ranked["setting"].astype(str).drop_duplicates().head(NAMED).tolist())
    in_turns = dict.fromkeys(name for name in chain.from_iterable(zip_longest(*rankings)) if name)
    return list(in_turns)[:NAMED]


def named_first(tables: Sequence[pd.DataFrame]) -> list[pd.DataFrame]:
    """The points of each group with the column `_named`; of many settings those are the first in order, and so have
    colours of their own."""
    chosen = [named(points) for points in tables]
    first = dict.fromkeys(
        name
        for points, names in zip(tables, chosen, strict=True)
        if points["setting"].nunique() > ALL_NAMED
        for name in names
    )
    return [
        points.assign(_named=points["setting"].isin(names), setting=_reordered(points["setting"], first))
        for points, names in zip(tables, chosen, strict=True)
    ]


def _reordered(settings: pd.Series[Any], first: Iterable[str]) -> pd.Series[Any]:
    order = dict.fromkeys([*first, *settings.cat.categories])
    reordered: pd.Series[Any] = settings.cat.reorder_categories(list(order))
    return reordered


def some(values: Sequence[Any], most: int) -> list[Any]:
    """Evenly spread ones of too many, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(index * (len(values) - 1) / (most - 1))] for index in range(most)]


def of_many(points: pd.DataFrame, others: str = "range of the others") -> str:
    """What the title says of a plot that does not show all settings and lengths; empty for one that does."""
    settings, lengths, shown = points["setting"].nunique(), points["seq_len"].nunique(), len(named(points))
    words = []
    if shown < settings:
        words.append(of_settings(shown, settings, others))
    if lengths > FACETS:
        words.append(f"{FACETS} of {lengths} prompt lengths")
    return f" ({'; '.join(words)})" if words else ""


def of_settings(shown: int, settings: int, others: str | None = None) -> str:
    """Of a title; `others`: what is grey."""
    return f"{shown} of the best of {settings} settings" + (f", grey: {others}" if others else "")


# --- the sheet ----------------------------------------------------------------------------------------------------


def new_figure(
    points: pd.DataFrame, title: str, facets: int, height_in: float, handles: Sequence[Any]
) -> tuple[Figure, list[Axes]]:
    """Title, subtitle, a grid of at most three axes in a row, the legend below; measured in inches, so that a long
    legend makes the figure higher and never covers data."""
    columns = columns_of(facets)
    rows = -(-facets // columns)
    legend_columns, legend_in = _legend_size(handles)
    # Those of the whole group, where they are given: the points that a plot shows may be alike by chance.
    mark, about = points[["_mark", "_about"]].iloc[0] if "_mark" in points else ("", subtitle_of(points))
    heading = textwrap.wrap(title + mark, 78)
    subtitle = textwrap.wrap(about, 118)[:3]
    heading_in = 0.14 + 0.22 * len(heading)
    top_in, bottom_in = heading_in + 0.26 + 0.16 * len(subtitle), 0.5 + legend_in
    total_in = top_in + rows * height_in + 0.55 * (rows - 1) + bottom_in
    figure = Figure(figsize=(WIDTH_IN, total_in))
    figure.subplots_adjust(
        left=0.8 / WIDTH_IN, right=1 - 0.2 / WIDTH_IN, top=1 - top_in / total_in, bottom=bottom_in / total_in,
        hspace=0.55 / height_in, wspace=0.08,
    )  # fmt: skip
    left = 0.2 / WIDTH_IN
    figure.text(left, 1 - 0.12 / total_in, "\n".join(heading), fontsize=12, fontweight="bold", va="top")
    figure.text(left, 1 - heading_in / total_in, "\n".join(subtitle), color="0.3", va="top", linespacing=1.25)
    if handles:
        figure.legend(handles=list(handles), loc="lower center", ncols=legend_columns, frameon=False)
    first = figure.add_subplot(rows, columns, 1)
    others = [figure.add_subplot(rows, columns, index + 1, sharey=first) for index in range(1, facets)]
    return figure, [first, *others]


def columns_of(facets: int) -> int:
    return 2 if facets == 4 else min(3, facets)


def _legend_size(handles: Sequence[Any]) -> tuple[int, float]:
    """Columns, and height in inches."""
    if not handles:
        return 1, 0.05
    widest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(len(handles), int((WIDTH_IN - 0.4) / (0.065 * widest + 0.55))))
    return columns, 0.2 * -(-len(handles) // columns) + 0.1


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
    return f"{metric.label} [{metric.unit}]" if metric else "Efficiency, 1 = ideal"


def handles_of(points: pd.DataFrame, names: Sequence[str]) -> list[Any]:
    """Legend entries of settings, and of hollow marks where there are any."""
    look = looks(points)
    # A leading underscore would take an entry out of the legend.
    labels = [" " * name.startswith("_") + short_name(name, 40) for name in names]
    handles = [
        Line2D([], [], markersize=5, label=label, **look[name]) for name, label in zip(names, labels, strict=True)
    ]
    if (points["verdict"] != "valid").any():
        handles.append(hollow("o", "0.35", "hollow: suspect or invalid"))
    return handles


def hollow(marker: Any, color: str, label: str) -> Line2D:
    return Line2D([], [], color=color, marker=marker, markersize=5, markerfacecolor="white", linestyle="", label=label)


# --- axes ---------------------------------------------------------------------------------------------------------


def value_axis(axes: Axes, low: float, high: float, which: Literal["x", "y"] = "y") -> None:
    """From zero; logarithmic where the values span more than a linear axis can show."""
    if not (low > 0 and high > 30 * low):
        axes.set(**{f"{which}lim": (0, 1.05 * high if which == "x" else None)})
        return
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low / 1.5, high * 1.5)})
    # A narrow facet has room for fewer numbers beside each other than above each other.
    plain_log(axes, which, (1, 2, 5) if which == "y" and high < 2000 * low else (1,))


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
        axes.set_ylabel(y_label if index % columns == 0 else "")
        axes.tick_params(labelleft=index % columns == 0)
        axes.set_xlabel(x_label if index + columns >= len(grid) else "")
