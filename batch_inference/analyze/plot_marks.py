"""Marks and intervals of points. Where several settings lie at one place, the marks stand within each other."""

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

from batch_inference.analyze.plot_colors import color
from batch_inference.analyze.plot_looks import Look

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
# A mark, and what it and a line grow by for each one that would cover it; no more than so many.
_MARK_PT, _LINE_PT = 5.0, 1.4
_MARK_GROWS_PT, _LINE_GROWS_PT, _MOST_WITHIN = 3.5, 2.6, 3
# Marks nearer than that, from middle to middle, cover each other.
_COVERED_PT = 2.0
# A line is covered where so many of its marks are, by those of one other line.
_COVERED_LINE = 0.8
# More points on a facet are a cloud, in which no single one is told.
_MOST_POINTS = 1500


LARGER = "larger"


@dataclass(frozen=True)
class Series:
    """The points of one setting, and the line through them where it has one."""

    points: pd.DataFrame
    look: Look
    line: Line2D | None = None


def draw_marks(axes: Axes, series: Sequence[Series], x: str, y: str) -> list[Floats]:
    """What the later ones would cover is drawn larger (gid LARGER), so that all can be seen. To be called when the
    limits of the axes are as they stay. Returns the sizes of the marks in points."""
    at = [places(one.points, x, y) for one in series]
    sizes_pt = []
    for one, here, covered in zip(series, at, _covered(axes, at), strict=True):
        sizes_pt.append(_MARK_PT + _MARK_GROWS_PT * np.minimum(covered.sum(axis=0), _MOST_WITHIN))
        _draw_marks(axes, one, here, sizes_pt[-1])
        if one.line is not None and len(here) > 1:
            covering = int(np.sum(covered.mean(axis=1) >= _COVERED_LINE))
            one.line.set_linewidth(_LINE_PT + _LINE_GROWS_PT * min(covering, _MOST_WITHIN))
    return sizes_pt


def has_larger_marks(figure: Figure) -> bool:
    return any(line.get_gid() == LARGER for axes in figure.axes for line in axes.lines)


def places(points: pd.DataFrame, x: str, y: str) -> Floats:
    found: Floats = points[[x, y]].to_numpy(dtype=float)
    return found


def _covered(axes: Axes, at: Sequence[Floats]) -> list[Bools]:
    """Of each series a row for every later one: which places are covered by a mark of it."""
    if sum(map(len, at)) > _MOST_POINTS:
        return [np.zeros((1, len(here)), dtype=bool) for here in at]
    on_sheet = [axes.transData.transform(here) * 72 / axes.figure.dpi if len(here) else here for here in at]
    found = []
    for number, here in enumerate(on_sheet):
        later = [other for other in on_sheet[number + 1 :] if len(other)]
        rows = [(np.linalg.norm(here[:, None] - other, axis=2) < _COVERED_PT).any(axis=1) for other in later]
        found.append(np.array(rows, dtype=bool).reshape(len(rows), len(here)))
    return found


def _draw_marks(axes: Axes, series: Series, at: Floats, sizes_pt: Floats) -> None:
    """Hollow where a reader must not take it for a number to rely on."""
    valid = (series.points["verdict"] == "valid").to_numpy()
    for size_pt in np.unique(sizes_pt)[::-1]:
        style: dict[str, Any] = {**series.look, "linestyle": "", "markersize": size_pt, "zorder": 3 - 0.01 * size_pt}
        for is_valid, face in ((True, series.look["color"]), (False, color("paper"))):
            chosen = at[(valid == is_valid) & (sizes_pt == size_pt)]
            if len(chosen):
                gid = LARGER if size_pt > _MARK_PT else None
                axes.plot(chosen[:, 0], chosen[:, 1], markerfacecolor=face, gid=gid, **style)


def draw_bars(axes: Axes, x: Floats, y: Floats, look: Look, **errors: Any) -> None:
    """Intervals: `errors` are xerr and yerr, as matplotlib takes them."""
    axes.errorbar(x, y, fmt="none", ecolor=look["color"], elinewidth=1, capsize=2.5, **errors)


def draw_others(axes: Axes, points: pd.DataFrame, x: str, y: str) -> None:
    """The points of settings without a name, as dots."""
    axes.plot(points[x], points[y], ".", color=color("dots"), markersize=3, zorder=1, rasterized=True)
