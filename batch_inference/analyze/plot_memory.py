"""The plot of memory: a bar per setting, and what its processes use where that is no device's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from batch_inference.analyze.plot_colors import color, text_on
from batch_inference.analyze.plot_looks import in_reading_order, named
from batch_inference.analyze.plot_style import (
    BESIDE,
    WIDTH_IN,
    NothingToShowError,
    hollow,
    new_figure,
    reference,
)
from batch_inference.analyze.wording import short_names
from batch_inference.core.metrics import METRIC_BY_NAME
from batch_inference.core.text import short

# Bars on a sheet.
_BARS = 40
# Of a bar's part, its column and its colour.
_PARTS = {"weights_gib": "weights", "activations_gib": "activations", "kv_pool_gib": "kv_pool"}
_BAR_IN = 0.32
# Width of a part from which on its number has room.
_NUMBER_IN = 0.36


def memory(points: pd.DataFrame) -> Figure:
    """Weights, activations and KV pool per device, and a mark at the highest use seen. What all processes of a replica
    use together has an axis of its own: it is no number of a device."""
    parts = [name for name in _PARTS if name in points and points[name].notna().any()]
    peak = _peak(points)
    known = points.dropna(subset=[*parts, peak], how="all")
    if known.empty:
        raise NothingToShowError("no memory was reported")
    most = known.groupby("setting", observed=True, sort=True)[[*parts, peak]].max()
    of_settings = f" ({_BARS} of {len(most)} settings)" if len(most) > _BARS else ""
    most = most.loc[_names(known)[:_BARS]]
    of_replica = "replica" in set(known["memory_scope"]) and most[peak].notna().any()
    panels = ["device"] * bool(parts) + ["replica"] if of_replica else ["device"]
    handles: list[Any] = [Patch(facecolor=color(_PARTS[name]), label=METRIC_BY_NAME[name].label) for name in parts]
    use = f"Highest use seen, {_SCOPES[panels[-1]]}"
    handles.append(Patch(facecolor=color("used"), label=use) if of_replica else hollow("D", color("ink"), use))
    title = "Memory" + of_settings
    if parts and not of_replica and most[peak].notna().any():
        title += f"\n{_BEYOND}"
    figure, grid = new_figure(points, title, len(panels), _BAR_IN * len(most) + 0.5, handles)
    for axes, panel in zip(grid, panels, strict=True):
        if panel == "replica":
            _draw_parts(axes, most[[peak]].fillna(0))
        else:
            _draw_parts(axes, most[parts].fillna(0))
            if not of_replica:
                _draw_peaks(axes, most[peak])
            _draw_capacity(axes, known)
        axes.set(xlabel=f"Memory of a {_SCOPES[panel]} [GiB]", xlim=(0, None))
        axes.grid(visible=False, axis="y")
    _name_bars(figure, grid[0], list(most.index))
    for axes in grid[1:]:
        axes.tick_params(labelleft=False)
    return figure


_BEYOND = (
    "The bars are what vLLM plans with. The diamond is the highest use that the device reported: CUDA graphs, "
    "libraries and buffers come on top."
)
_SCOPES = {"device": "device", "replica": "replica's processes"}


def _peak(points: pd.DataFrame) -> str:
    name = "memory_peak_gib"
    return name if name in points and points[name].notna().any() else "memory_used_gib"


def _names(points: pd.DataFrame) -> list[str]:
    """Those that other plots name come first, where there are too many."""
    names = in_reading_order(points, points["setting"].unique())
    first = set(named(points)) if len(names) > _BARS else set()
    return sorted(names, key=lambda name: name not in first)


def _name_bars(figure: Figure, axes: Axes, names: list[str]) -> None:
    labels = list(short_names(names, 30).values())
    figure.subplots_adjust(left=(0.3 + 0.075 * max(map(len, labels))) / WIDTH_IN)
    axes.set(yticks=list(range(len(names))), ylim=(len(names) - 0.4, -0.6))
    axes.set_yticklabels(labels)


def _draw_peaks(axes: Axes, values: pd.Series[float]) -> None:
    style: dict[str, Any] = {"color": color("ink"), "markerfacecolor": color("paper"), "zorder": 3, "clip_on": False}
    axes.plot(values, range(len(values)), "D", **style)


def _face(part: object) -> str:
    return color(_PARTS.get(str(part), "used"))


def _draw_parts(axes: Axes, parts: pd.DataFrame) -> None:
    left = np.zeros(len(parts))
    for name in parts.columns:
        axes.barh(range(len(parts)), parts[name], left=left, color=_face(name), edgecolor=color("paper"), height=0.6)
        left = left + parts[name].to_numpy()
    _number(axes, parts, float(left.max()))


def _number(axes: Axes, parts: pd.DataFrame, longest: float) -> None:
    inches = axes.get_position().width * WIDTH_IN
    left = np.zeros(len(parts))
    for name in parts.columns:
        for row, value in enumerate(parts[name]):
            if longest and value / longest * inches * 0.8 > _NUMBER_IN:
                axes.text(left[row] + value / 2, row, _number_text(value), ha="center", va="center", fontsize=7.5,
                          color=text_on(_face(name)))  # fmt: skip
        left = left + parts[name].to_numpy()


def _number_text(gib: float) -> str:
    return f"{gib:.1f}" if gib >= 1 else short(gib, 2)


def _draw_capacity(axes: Axes, points: pd.DataFrame) -> None:
    """A line at the memory of a device; a slice of a CPU has no memory of its own."""
    sizes = points.loc[points["device_kind"] == "gpu", "device_memory_gib"].dropna().unique()
    if len(sizes) == 1:
        axes.axvline(sizes[0], **reference())
        label = f"memory of a device, {sizes[0]:.4g} GiB"
        axes.annotate(label, (sizes[0], 1), xycoords=("data", "axes fraction"), **BESIDE)
