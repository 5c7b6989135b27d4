"""The plots in which one number is bought with another: the Pareto front, and the roofline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from batch_inference.analyze.compare import halves
from batch_inference.analyze.plot_colors import color
from batch_inference.analyze.plot_labels import Label, Place, label_marks
from batch_inference.analyze.plot_lines import length_grid, measured_points
from batch_inference.analyze.plot_looks import looks, named
from batch_inference.analyze.plot_marks import Floats, Series, draw_bars, draw_marks, draw_others
from batch_inference.analyze.plot_style import (
    FRONT,
    NothingToShowError,
    axis_label,
    handles_of,
    label_outside,
    of_many,
    plain_log,
    reference,
    value_axis,
    words_only,
)
from batch_inference.analyze.wording import FRONT_TITLE

ROOFLINE = "MFU and MBU against the roofline"
_LATENCY, _PER_DEVICE = "latency_mean_s", "output_tok_per_s_per_device"
_LABELLED = [
    "setting",
    "batch_size",
    "global_batch_size",
    "pareto",
    "latency_ci95_s",
    _LATENCY,
    _PER_DEVICE,
    "_x",
    "mfu",
]
# Of more marks on a facet, the first few alone have numbers: a cloud has no room, and to look for it takes long.
_MOST_LABELLED, _FEW_LABELLED = 200, 40
_NUMBERS = "number: batch size per replica"
_HOW_TO_READ = (
    "How to read it: the dotted roof is the most that the device can do. Left of the ridge, at 1, memory bandwidth is "
    "the limit; right of it arithmetic is. The height of a point is its MFU, the share of the peak arithmetic that it "
    "uses. Left of the ridge its height over that of the roof is its MBU, the share of the peak bandwidth."
)


def pareto(points: pd.DataFrame) -> Figure:
    """Latency against throughput per device: a mark per point, and a line through those that nothing beats."""
    measured = measured_points(points, _PER_DEVICE)
    title = FRONT_TITLE + of_many(measured, "the others")
    shown = named(measured)
    # A front of one point has no line.
    has_line = any(len(_corners(here)) > 1 for _, here in measured.groupby("seq_len"))
    front = [Line2D([], [], color=color("ink"), linewidth=1, label=FRONT)] if has_line else []
    figure, grid = length_grid(measured, title, [*handles_of(measured, shown), *front, words_only(_NUMBERS)])
    for axes, here in grid:
        draw_others(axes, here[~here["setting"].isin(shown)], _LATENCY, _PER_DEVICE)
        _draw_steps(axes, here)
        value_axis(axes, measured[_LATENCY].min(), _highest_end(measured, _LATENCY), "x")
    value_axis(figure.axes[0], measured[_PER_DEVICE].min(), _highest_end(measured, _PER_DEVICE))
    if figure.axes[0].get_yscale() == "linear":
        figure.axes[0].set_ylim(0, 1.08 * measured[_PER_DEVICE].max())
    for axes, here in grid:
        _draw_points(axes, here, shown)
    label_outside(figure.axes, axis_label(_LATENCY), "Output tok/s per device")
    return figure


def _highest_end(points: pd.DataFrame, column: str) -> float:
    """Of the intervals, but for those wider than can be shown."""
    half = halves(points, column).fillna(0)
    return float((points[column] + half.clip(upper=0.3 * points[column])).max())


def _corners(here: pd.DataFrame) -> list[Place]:
    """Of the points of the front those that are higher than all faster ones: what the line goes through."""
    front = here[here["pareto"].astype(bool)].sort_values([_LATENCY, _PER_DEVICE], ascending=[True, False])
    rising = front[front[_PER_DEVICE] > front[_PER_DEVICE].cummax().shift(fill_value=-np.inf)]
    return list(zip(rising[_LATENCY].tolist(), rising[_PER_DEVICE].tolist(), strict=True))


def _draw_steps(axes: Axes, here: pd.DataFrame) -> None:
    if corners := _corners(here):
        axes.step(*zip(*corners, strict=True), where="post", color=color("ink"), linewidth=1, zorder=1.5)


def _draw_points(axes: Axes, here: pd.DataFrame, shown: Iterable[str]) -> None:
    look = looks(here)
    drawn = [Series(here[here["setting"] == name], look[name]) for name in shown if (here["setting"] == name).any()]
    if not drawn:
        return
    for one in drawn:
        x, y = (one.points[column].to_numpy(dtype=float) for column in (_LATENCY, _PER_DEVICE))
        x_half, y_half = (halves(one.points, column).to_numpy(dtype=float) for column in (_LATENCY, _PER_DEVICE))
        draw_bars(axes, x, y, one.look, xerr=x_half, yerr=y_half)
    marked = _with_sizes(drawn, draw_marks(axes, drawn, _LATENCY, _PER_DEVICE))
    corners = _corners(here)
    lines = [line for (x, y), (next_x, next_y) in pairwise(corners)
             for line in (((x, y), (next_x, y)), ((next_x, y), (next_x, next_y)))]  # fmt: skip
    for x, y, x_half, y_half in zip(
        *(marked[name] for name in (_LATENCY, _PER_DEVICE)),
        *(halves(marked, name).fillna(0) for name in (_LATENCY, _PER_DEVICE)), strict=True,
    ):  # fmt: skip
        lines += [((x - x_half, y), (x + x_half, y)), ((x, y - y_half), (x, y + y_half))]
    _label_batches(axes, marked.sort_values("pareto", ascending=False, kind="stable"), _LATENCY, _PER_DEVICE, lines)


def _with_sizes(drawn: Sequence[Series], sizes_pt: Sequence[Floats]) -> pd.DataFrame:
    """The points of all settings, each with the size of its mark."""
    parts = [one.points for one in drawn]
    # Of a hundred columns each that is added is slow.
    names = [name for name in _LABELLED if name in parts[0]]
    return pd.concat(parts)[names].assign(_size_pt=np.concatenate(sizes_pt), _is_told=True)


def _label_batches(axes: Axes, points: pd.DataFrame, x: str, y: str, lines: Iterable[tuple[Place, Place]] = ()) -> None:
    if len(points) > _MOST_LABELLED:
        points = points[points["_is_told"]].head(_FEW_LABELLED)
    labels = [
        Label((float(one), float(other)), str(batch) if is_told else "", float(size_pt))
        for one, other, batch, size_pt, is_told in points[[x, y, "batch_size", "_size_pt", "_is_told"]].itertuples(
            index=False
        )
    ]
    label_marks(axes, labels, lines)


def roofline(points: pd.DataFrame) -> Figure:
    """Left of the ridge memory bandwidth is the roof, right of it arithmetic: a point's height is its MFU, and its
    distance below the slanted roof its MBU."""
    measured = points[(points["status"] == "ok") & (points["mfu"] > 0) & (points["mbu"] > 0)]
    if measured.empty:
        raise NothingToShowError("no point has both numbers")
    measured = measured.assign(_x=measured["mfu"] / measured["mbu"])
    shown = named(measured)
    roof = Line2D([], [], label="roof: the most that the device can do", **reference())
    handles = [*handles_of(measured, shown), roof, words_only(_NUMBERS)]
    title = ROOFLINE + of_many(measured, "the others")
    figure, grid = length_grid(measured, f"{title}\n{_HOW_TO_READ}", handles)
    low, high = min(0.5, measured["_x"].min() / 1.5), max(2.0, measured["_x"].max() * 1.5)
    figure.axes[0].set_ylim(measured["mfu"].min() / 2, 1.7)
    for axes, here in grid:
        axes.set(xscale="log", yscale="log", xlim=(low, high))
        plain_log(axes, "x")
        draw_others(axes, here[~here["setting"].isin(shown)], "_x", "mfu")
        _draw_utilisation(axes, here, shown)
        axes.plot([low, 1, high], [low, 1, 1], **reference())
    plain_log(figure.axes[0], "y", (1, 2, 5))
    label_outside(figure.axes, "MFU / MBU, 1 = ridge", "MFU, 1 = peak arithmetic")
    return figure


def _draw_utilisation(axes: Axes, here: pd.DataFrame, shown: Iterable[str]) -> None:
    look, drawn = looks(here), []
    for name in shown:
        line = here[here["setting"] == name].sort_values("global_batch_size")
        if not line.empty:
            (track,) = axes.plot(line["_x"], line["mfu"], color=look[name]["color"], linewidth=1)
            drawn.append(Series(line, look[name], track))
    if drawn:
        marked = _with_sizes(drawn, draw_marks(axes, drawn, "_x", "mfu"))
        ends = marked.groupby("setting", observed=True)["global_batch_size"].agg(["idxmin", "idxmax"])
        _label_batches(axes, marked.assign(_is_told=marked.index.isin(ends.to_numpy().ravel())), "_x", "mfu")
