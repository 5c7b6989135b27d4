"""Each plot a function from the table of one group of points to a figure; PLOTS names them all."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from batch_inference.metrics import METRIC_BY_NAME
from batch_inference.tables import groups, half_width

# 8 inches at 200 dpi: sharp on a large screen, and what is 9 points there is still 9 points at 800 px.
WIDTH_IN, DPI = 8.0, 200
_STYLE = {
    **sns.axes_style("whitegrid"),
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8.5,
    "axes.edgecolor": "0.4",
    "grid.color": "0.9",
    # Names come from files: a $ in one is no formula.
    "text.parse_math": False,
}
# seaborn's colour-blind palette without its two palest colours, which vanish on white.
_PALETTE = [color for index, color in enumerate(sns.color_palette("colorblind")) if index not in (6, 8)]
_MARKERS: tuple[Any, ...] = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
_DASHES = ("-", "--", ":", "-.")

_REFERENCE: dict[str, Any] = {"color": "0.25", "linewidth": 1, "linestyle": (0, (1, 1)), "zorder": 1.5}
_BESIDE: dict[str, Any] = {"xytext": (-3, 3), "textcoords": "offset points", "ha": "right"}


class NothingToShowError(Exception):
    """There is no point that this plot could draw; the message says why."""


def looks(points: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Colour, marker and dash of every setting of the analysis: the same for every part of its table."""
    names = list(points["setting"].cat.categories)
    return {
        name: {"color": color, "marker": marker, "linestyle": _DASHES[index // len(_PALETTE) % len(_DASHES)]}
        for index, (name, color, marker) in enumerate(zip(names, cycle(_PALETTE), cycle(_MARKERS), strict=False))
    }


# --- the plots ----------------------------------------------------------------------------------------------------


def throughput(points: pd.DataFrame) -> Figure:
    return _facets(_measured(points, "output_tok_per_s"), "output_tok_per_s", "Output throughput against batch size")


def latency(points: pd.DataFrame) -> Figure:
    measured = _measured(points, "latency_mean_s")
    figure = _facets(measured, "latency_mean_s", "Batch latency against batch size")
    low, high = measured["latency_mean_s"].min(), measured["latency_mean_s"].max()
    if high > 30 * low:
        axes = figure.axes[0]  # the others share its scale
        axes.set(yscale="log", ylim=(low / 1.5, high * 1.5))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    return figure


def scaling(points: pd.DataFrame) -> Figure:
    measured = _measured(points, "output_tok_per_s")
    if measured["num_devices"].nunique() < 2:
        raise NothingToShowError("every measured setting has the same number of devices")
    baseline = measured["scaling_baseline"].iloc[0]
    shown = measured[measured["scaling_efficiency"].notna() & (measured["setting"] != baseline)]
    if shown.empty:
        raise NothingToShowError(
            f"no point has the length and the global batch size of one of the baseline, {baseline}"
        )
    title = f"Scaling efficiency against {_short(baseline, 30)}, at equal global batch size"
    figure = _facets(shown, "scaling_efficiency", title)
    for axes in figure.axes:
        axes.axhline(1, **_REFERENCE)
    figure.axes[0].set_ylim(0, max(1.1, 1.05 * shown["scaling_efficiency"].max()))
    figure.axes[0].annotate("ideal", (1, 1), xycoords=("axes fraction", "data"), **_BESIDE)
    return figure


def memory(points: pd.DataFrame) -> Figure:
    """One bar per setting: weights and KV pool per device, and a mark at the highest use seen."""
    columns = ["weights_gib", "kv_pool_gib", "memory_used_gib"]
    known = points.dropna(subset=columns, how="all")
    if known.empty:
        raise NothingToShowError("no memory was reported")
    most = known.groupby("setting", observed=True, sort=True)[columns].max()
    names, look = [str(name) for name in most.index], looks(points)
    colors = [look[name]["color"] for name in names]
    bars, places = most.fillna(0), range(len(names))
    scope = "replica's processes" if "replica" in set(known["memory_scope"]) else "device"
    handles: list[Any] = [
        Patch(facecolor="0.35", label=METRIC_BY_NAME["weights_gib"].label),
        Patch(facecolor="0.8", edgecolor="0.35", hatch="////", label=METRIC_BY_NAME["kv_pool_gib"].label),
        _hollow("D", "black", f"Highest use, {scope}"),
    ]
    figure, grid = _figure(points, "Memory", 1, 0.32 * len(names) + 0.5, handles)
    figure.subplots_adjust(left=(0.3 + 0.075 * min(30, max(map(len, names)))) / WIDTH_IN)
    axes = grid[0]
    axes.barh(places, bars["weights_gib"], color=colors, height=0.6)
    pale = [(*color, 0.3) for color in colors]
    axes.barh(places, bars["kv_pool_gib"], left=bars["weights_gib"], color=pale, edgecolor=colors, hatch="////",
              height=0.6, linewidth=0.5)  # fmt: skip
    axes.plot(most["memory_used_gib"], places, "D", color="black", markerfacecolor="white", zorder=3, clip_on=False)
    _draw_capacity(axes, known)
    axes.set(yticks=list(places), xlabel="Memory [GiB]", xlim=(0, None))
    axes.set_yticklabels([_short(name, 30) for name in names])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    return figure


def _draw_capacity(axes: Axes, points: pd.DataFrame) -> None:
    """A line at the memory of a device; a slice of a CPU has no memory of its own."""
    sizes = points.loc[points["device_kind"] == "gpu", "device_memory_gib"].dropna().unique()
    if len(sizes) == 1:
        axes.axvline(sizes[0], **_REFERENCE)
        label = f"memory of a device, {sizes[0]:.4g} GiB"
        axes.annotate(label, (sizes[0], 1), xycoords=("data", "axes fraction"), **_BESIDE)


# Name of the file, title, function.
PLOTS: tuple[tuple[str, str, Callable[[pd.DataFrame], Figure]], ...] = (
    ("throughput", "Output throughput against batch size", throughput),
    ("latency", "Batch latency against batch size", latency),
    ("scaling", "Scaling efficiency", scaling),
    ("memory", "Memory", memory),
)


def write_plots(table: pd.DataFrame, folder: Path) -> tuple[list[tuple[str, Path]], list[str]]:
    """One PNG per plot and group of like things: (title, path) of each, and why each of the others was not drawn."""
    # Those of an earlier analysis, which may have had other groups.
    for name, _, _ in PLOTS:
        for old in (folder / f"{name}.png", *folder.glob(f"{name}_group_*.png")):
            old.unlink(missing_ok=True)
    written, missing = [], []
    parts = list(groups(table))
    for name, title, draw in PLOTS:
        for number, points in parts or [(1, table)]:
            of_group = f" (group {number})" if len(parts) > 1 else ""
            path = folder / f"{name}{f'_group_{number}' if of_group else ''}.png"
            try:
                _save(draw, points, path, of_group)
                written.append((title + of_group, path))
            except NothingToShowError as reason:
                missing.append(f"{title}{of_group}: {reason}")
    return written, missing


def _save(draw: Callable[[pd.DataFrame], Figure], points: pd.DataFrame, path: Path, of_group: str) -> None:
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # A name in a script that the font lacks is no news to the user.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure = draw(points)
        figure.texts[0].set_text(figure.texts[0].get_text() + of_group)
        figure.savefig(path, dpi=DPI)


# --- what the line plots share ------------------------------------------------------------------------------------


def _measured(points: pd.DataFrame, metric: str) -> pd.DataFrame:
    measured = points[(points["status"] == "ok") & points[metric].notna()]
    if measured.empty:
        raise NothingToShowError("no point was measured")
    return measured


def _facets(points: pd.DataFrame, y: str, title: str) -> Figure:
    """A line per setting, a facet per prompt length."""
    lengths = sorted(points["seq_len"].unique())
    shown = [name for name in points["setting"].cat.categories if (points["setting"] == name).any()]
    look = looks(points)
    figure, grid = _figure(points, title, len(lengths), 2.9 if len(lengths) > 1 else 3.6, _handles(points, shown, look))
    for axes, length in zip(grid, lengths, strict=True):
        here = points[points["seq_len"] == length]
        for name in shown:
            _draw_line(axes, here[here["setting"] == name].sort_values("global_batch_size"), y, look[name])
        axes.set_title(f"{length} prompt tokens")
        _batch_axis(axes, points)
    # After the last facet: a limit ends the scaling to the data, and the facets share their scale.
    grid[0].set_ylim(bottom=0)
    columns = min(3, len(grid))
    replicas = (points["global_batch_size"] != points["batch_size"]).any()
    x_label = "Global batch size [requests]" if replicas else "Batch size [requests]"
    for index, axes in enumerate(grid):
        axes.set_ylabel(_axis_label(y) if index % columns == 0 else "")
        axes.tick_params(labelleft=index % columns == 0)
        axes.set_xlabel(x_label if index + columns >= len(grid) else "")
    return figure


def _draw_line(axes: Axes, points: pd.DataFrame, y: str, look: dict[str, Any]) -> None:
    if points.empty:
        return
    x, values = points["global_batch_size"].to_numpy(dtype=float), points[y].to_numpy(dtype=float)
    axes.plot(x, values, color=look["color"], linestyle=look["linestyle"], linewidth=1.4)
    if y != "scaling_efficiency":
        widths = [half_width(row, y) for row in points.to_dict("records")]
        errors = np.array([np.nan if width is None else width for width in widths])
        axes.errorbar(x, values, errors, fmt="none", ecolor=look["color"], elinewidth=1, capsize=2.5)
    valid = (points["verdict"] == "valid").to_numpy(dtype=bool)
    style = {**look, "linestyle": "", "markersize": 5, "zorder": 3}
    axes.plot(x[valid], values[valid], **style)
    # Hollow: a reader must not take it for a number to rely on.
    axes.plot(x[~valid], values[~valid], markerfacecolor="white", **style)


def _handles(points: pd.DataFrame, names: Sequence[str], look: dict[str, dict[str, Any]]) -> list[Any]:
    # A leading underscore would take an entry out of the legend.
    labels = [" " * name.startswith("_") + _short(name, 40) for name in names]
    handles = [
        Line2D([], [], markersize=5, label=label, **look[name]) for name, label in zip(names, labels, strict=True)
    ]
    if (points["verdict"] != "valid").any():
        handles.append(_hollow("o", "0.35", "hollow: suspect or invalid"))
    return handles


def _hollow(marker: Any, color: str, label: str) -> Line2D:
    return Line2D([], [], color=color, marker=marker, markersize=5, markerfacecolor="white", linestyle="", label=label)


def _batch_axis(axes: Axes, points: pd.DataFrame) -> None:
    """Logarithmic to base 2, with the batch sizes that were run as ticks; of too many, those that fit."""
    sizes = sorted(int(size) for size in points["global_batch_size"].unique())
    axes.set_xscale("log", base=2)
    axes.set_xlim(sizes[0] / 2**0.4, sizes[-1] * 2**0.4)
    inches = axes.get_position().width * WIDTH_IN
    span = np.log2(sizes[-1]) - np.log2(sizes[0]) + 0.8
    ticks: list[int] = []
    right_edge = -np.inf
    for size in sizes:
        middle, half = (np.log2(size) - np.log2(sizes[0])) / span * inches, 0.04 * len(str(size)) + 0.03
        if middle - half >= right_edge:
            ticks.append(size)
            right_edge = middle + half
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())


# --- the sheet ----------------------------------------------------------------------------------------------------


def _figure(
    points: pd.DataFrame, title: str, facets: int, height_in: float, handles: Sequence[Any]
) -> tuple[Figure, list[Axes]]:
    """Title, subtitle, a grid of at most three axes in a row, the legend below; measured in inches, so that a long
    legend makes the figure higher and never covers data."""
    columns = min(3, facets)
    rows = -(-facets // columns)
    widest = max(len(handle.get_label()) for handle in handles)
    legend_columns = max(1, min(len(handles), int((WIDTH_IN - 0.4) / (0.065 * widest + 0.55))))
    legend_in = 0.2 * -(-len(handles) // legend_columns) + 0.1
    subtitle = textwrap.wrap(_subtitle(points), 118)[:3]
    top_in, bottom_in = 0.62 + 0.16 * len(subtitle), 0.5 + legend_in
    total_in = top_in + rows * height_in + 0.55 * (rows - 1) + bottom_in
    figure = Figure(figsize=(WIDTH_IN, total_in))
    figure.subplots_adjust(
        left=0.8 / WIDTH_IN, right=1 - 0.2 / WIDTH_IN, top=1 - top_in / total_in, bottom=bottom_in / total_in,
        hspace=0.55 / height_in, wspace=0.08,
    )  # fmt: skip
    figure.text(0.2 / WIDTH_IN, 1 - 0.12 / total_in, title, fontsize=12, fontweight="bold", va="top")
    figure.text(0.2 / WIDTH_IN, 1 - 0.36 / total_in, "\n".join(subtitle), color="0.3", va="top", linespacing=1.25)
    figure.legend(handles=list(handles), loc="lower center", ncols=legend_columns, frameon=False)
    first = figure.add_subplot(rows, columns, 1)
    others = [figure.add_subplot(rows, columns, index + 1, sharey=first) for index in range(1, facets)]
    return figure, [first, *others]


def _subtitle(points: pd.DataFrame) -> str:
    first = points.iloc[0].dropna()
    names = ("device_name", "model", "vllm_version", "dtype", "quantization", "max_tokens")
    words = {"vllm_version": "vLLM {}", "max_tokens": "{} output tokens"}
    return " · ".join(words.get(name, "{}").format(_short(str(first[name]), 60)) for name in names if name in first)


def _short(text: str, width: int) -> str:
    """The beginning and the end of a long name: what tells two apart is often at the end."""
    return text if len(text) <= width else f"{text[: width // 2 - 1]}…{text[-(width // 2) :]}"


def _axis_label(name: str) -> str:
    metric = METRIC_BY_NAME.get(name)
    return f"{metric.label} [{metric.unit}]" if metric else "Efficiency, 1 = ideal"
