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

from batch_inference.analyze.plot_colors import color
from batch_inference.analyze.plot_looks import Look, looks, named
from batch_inference.analyze.plot_marks import Series, draw_bars, draw_marks
from batch_inference.analyze.plot_style import (
    FACETS,
    IN_MS,
    NOTHING_MEASURED,
    NothingToShowError,
    axis_label,
    batch_axis,
    handles_of,
    label_outside,
    new_figure,
    of_many,
    some,
    value_axis,
)

GLOBAL_BATCH = "Global batch size [requests]"


@dataclass(frozen=True)
class Curve:
    """The columns of a line, and of the thin line that goes with it."""

    y: str
    x: str = "global_batch_size"
    thin: str | None = None
    thin_label: str = ""
    limits: tuple[float, float] | None = None  # of the values, where they are not to begin at zero


def measured_points(points: pd.DataFrame, metric: str) -> pd.DataFrame:
    measured = points[(points["status"] == "ok") & points[metric].notna()]
    if measured.empty:
        raise NothingToShowError("no point has this number" if (points["status"] == "ok").any() else NOTHING_MEASURED)
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
    points = _in_its_unit(points, curve)
    look, shown = looks(points), named(points)
    handles = [*handles_of(points, shown), *extra]
    if curve.thin is not None:
        handles.append(Line2D([], [], color=color("ink"), linewidth=0.6, label=f"thin line: {curve.thin_label}"))
    figure, grid = length_grid(points, title + of_many(points), handles)
    drawn = []
    for axes, here in grid:
        _draw_range(axes, here[~here["setting"].isin(shown)], curve)
        lines = [here[here["setting"] == name].sort_values(curve.x) for name in shown]
        drawn.append([_draw_line(axes, line, curve, look[name]) for name, line in zip(shown, lines, strict=True)])
        batch_axis(axes, points[curve.x])
    # After the last facet: a limit ends the scaling to the data, and the facets share their scale.
    highest = points[[curve.y, curve.thin or curve.y]].max().max()
    if curve.limits:
        figure.axes[0].set_ylim(curve.limits)
    else:
        value_axis(figure.axes[0], points[curve.y].min(), highest)
    for (axes, _), series in zip(grid, drawn, strict=True):
        draw_marks(axes, series, curve.x, curve.y)
    label_outside(figure.axes, batch_label(points, curve.x), axis_label(curve.y))
    return figure


def batch_label(points: pd.DataFrame, column: str = "global_batch_size") -> str:
    if (points["global_batch_size"] == points["batch_size"]).all():
        return "Batch size [requests]"
    return "Batch size per replica [requests]" if column == "batch_size" else GLOBAL_BATCH


def _in_its_unit(points: pd.DataFrame, curve: Curve) -> pd.DataFrame:
    columns = [name for name in (curve.y, curve.thin) if name in IN_MS]
    return points.assign(**{str(name): points[name] * 1000 for name in columns})


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
    axes.fill_between(batches, low, high, color=color("band"), linewidth=0, zorder=0.5)


def _draw_line(axes: Axes, points: pd.DataFrame, curve: Curve, look: Look) -> Series:
    batches, values = points[curve.x].to_numpy(dtype=float), points[curve.y].to_numpy(dtype=float)
    (line,) = axes.plot(batches, values, color=look["color"], linestyle=look["linestyle"], linewidth=1.4)
    if curve.thin is not None:
        axes.plot(batches, points[curve.thin].to_numpy(dtype=float), color=look["color"], linewidth=0.6, gid="thin")
    if "_half" in points and not points.empty:
        draw_bars(axes, batches, values, look, yerr=points["_half"].to_numpy(dtype=float))
    return Series(points, look, line)
