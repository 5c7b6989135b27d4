"""What plots with a facet per prompt length share: the facets, a line per setting, and the range of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from batch_inference.analyze.plot_style import (
    FACETS,
    NOTHING_MEASURED,
    Look,
    NothingToShowError,
    axis_label,
    batch_axis,
    handles_of,
    label_outside,
    looks,
    named,
    new_figure,
    of_many,
    some,
    value_axis,
)

Floats = NDArray[np.float64]
GLOBAL_BATCH = "Global batch size [requests]"


@dataclass(frozen=True)
class Curve:
    """The columns of a line, and of the thin line that goes with it."""

    y: str
    x: str = "global_batch_size"
    thin: str | None = None


def measured_points(points: pd.DataFrame, metric: str) -> pd.DataFrame:
    measured = points[(points["status"] == "ok") & points[metric].notna()]
    if measured.empty:
        raise NothingToShowError("no point tells it" if (points["status"] == "ok").any() else NOTHING_MEASURED)
    return measured


def length_grid(
    points: pd.DataFrame, title: str, handles: Sequence[Any]
) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A facet per prompt length, with its points; of too many lengths, some."""
    lengths = some(sorted(points["seq_len"].unique()), FACETS)
    figure, grid = new_figure(points, title, len(lengths), 2.9 if len(lengths) > 1 else 3.6, handles)
    for axes, length in zip(grid, lengths, strict=True):
        axes.set_title(f"{length} prompt tokens")
    return figure, [(axes, points[points["seq_len"] == length]) for axes, length in zip(grid, lengths, strict=True)]


def line_facets(points: pd.DataFrame, curve: Curve, title: str, extra: Sequence[Any] = ()) -> Figure:
    """A line per setting, a facet per prompt length; intervals from the column `_half`, if there is one."""
    look, shown = looks(points), named(points)
    handles = [*handles_of(points, shown), *extra]
    if curve.thin is not None:
        handles.append(Line2D([], [], color="0.35", linewidth=0.6, label="thin line: p99"))
    figure, grid = length_grid(points, title + of_many(points), handles)
    for axes, here in grid:
        _draw_range(axes, here[~here["setting"].isin(shown)], curve)
        for name in shown:
            _draw_line(axes, here[here["setting"] == name].sort_values(curve.x), curve, look[name])
        batch_axis(axes, points[curve.x])
    # After the last facet: a limit ends the scaling to the data, and the facets share their scale.
    highest = points[[curve.y, curve.thin or curve.y]].max().max()
    value_axis(figure.axes[0], points[curve.y].min(), highest)
    replicas = (points["global_batch_size"] != points["batch_size"]).any()
    x_label = "Batch size per replica [requests]" if curve.x == "batch_size" else GLOBAL_BATCH
    label_outside(figure.axes, x_label if replicas else "Batch size [requests]", axis_label(curve.y))
    return figure


def _draw_range(axes: Axes, points: pd.DataFrame, curve: Curve) -> None:
    """The settings that have no line of their own: from the lowest to the highest of their lines."""
    if points.empty:
        return
    batches = np.sort(points[curve.x].unique()).astype(float)
    lines = []
    for _, line in points.sort_values(curve.x).groupby("setting", observed=True):
        # Settings were run at different batch sizes: between these a line goes straight.
        x, values = np.log(line[curve.x].to_numpy(dtype=float)), line[curve.y].to_numpy(dtype=float)
        lines.append(np.interp(np.log(batches), x, values, left=np.nan, right=np.nan))
    low, high = np.nanmin(lines, axis=0), np.nanmax(lines, axis=0)
    axes.fill_between(batches, low, high, color="0.88", linewidth=0, zorder=0.5)


def _draw_line(axes: Axes, points: pd.DataFrame, curve: Curve, look: Look) -> None:
    if points.empty:
        return
    batches, values = points[curve.x].to_numpy(dtype=float), points[curve.y].to_numpy(dtype=float)
    axes.plot(batches, values, color=look["color"], linestyle=look["linestyle"], linewidth=1.4)
    if curve.thin is not None:
        axes.plot(batches, points[curve.thin].to_numpy(dtype=float), color=look["color"], linewidth=0.6, gid="thin")
    if "_half" in points:
        draw_bars(axes, batches, values, look, yerr=points["_half"].to_numpy(dtype=float))
    draw_marks(axes, points, curve.x, curve.y, look)


def draw_bars(axes: Axes, x: Floats, y: Floats, look: Look, **errors: Floats) -> None:
    """Intervals: `errors` are xerr and yerr, as matplotlib takes them."""
    axes.errorbar(x, y, fmt="none", ecolor=look["color"], elinewidth=1, capsize=2.5, **errors)  # type: ignore[arg-type]


def draw_marks(axes: Axes, points: pd.DataFrame, x: str, y: str, look: Look) -> None:
    """Hollow where a reader must not take it for a number to rely on."""
    style: dict[str, Any] = {**look, "linestyle": "", "markersize": 5, "zorder": 3}
    valid = points["verdict"] == "valid"
    for chosen, face in ((points[valid], look["color"]), (points[~valid], "white")):
        axes.plot(chosen[x].to_numpy(dtype=float), chosen[y].to_numpy(dtype=float), markerfacecolor=face, **style)
