"""The plot of memory: a bar per setting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from batch_inference.analyze.plot_style import (
    BESIDE,
    REFERENCE,
    WIDTH_IN,
    NothingToShowError,
    hollow,
    looks,
    new_figure,
)
from batch_inference.core.metrics import METRIC_BY_NAME
from batch_inference.core.text import short_name

# Bars on a sheet.
_BARS = 40


def memory(points: pd.DataFrame) -> Figure:
    """One bar per setting: weights, activations and KV pool per device, and a mark at the highest use seen."""
    parts = [name for name in ("weights_gib", "activations_gib", "kv_pool_gib") if name in points]
    parts = [name for name in parts if points[name].notna().any()]
    peak = (
        "memory_peak_gib"
        if "memory_peak_gib" in points and points["memory_peak_gib"].notna().any()
        else "memory_used_gib"
    )
    known = points.dropna(subset=[*parts, peak], how="all")
    if known.empty:
        raise NothingToShowError("no memory was reported")
    most = known.groupby("setting", observed=True, sort=True)[[*parts, peak]].max()
    of_settings = f" ({_BARS} of {len(most)} settings)" if len(most) > _BARS else ""
    most = most.head(_BARS)
    names = [str(name) for name in most.index]
    scope = "replica's processes" if "replica" in set(known["memory_scope"]) else "device"
    handles = [_part_handle(name) for name in parts] + [hollow("D", "black", f"Highest use, {scope}")]
    figure, (axes,) = new_figure(points, "Memory" + of_settings, 1, 0.32 * len(names) + 0.5, handles)
    figure.subplots_adjust(left=(0.3 + 0.075 * min(30, max(map(len, names)))) / WIDTH_IN)
    _draw_bars(axes, most[parts].fillna(0), [looks(points)[name]["color"] for name in names])
    axes.plot(most[peak], range(len(names)), "D", color="black", markerfacecolor="white", zorder=3, clip_on=False)
    _draw_capacity(axes, known)
    axes.set(yticks=list(range(len(names))), xlabel="Memory [GiB]", xlim=(0, None), ylim=(-0.6, len(names) - 0.4))
    axes.set_yticklabels([short_name(name, 30) for name in names])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    return figure


# How strong the colour of the setting is, and the hatch.
_PART_LOOKS: dict[str, tuple[float, str]] = {
    "weights_gib": (1.0, ""), "activations_gib": (0.55, "...."), "kv_pool_gib": (0.3, "////"),
}  # fmt: skip


def _part_handle(name: str) -> Patch:
    alpha, hatch = _PART_LOOKS[name]
    grey = str(round(1 - 0.65 * alpha, 2))
    label = METRIC_BY_NAME[name].label if name in METRIC_BY_NAME else name
    return Patch(facecolor=grey, edgecolor="0.35", hatch=hatch, label=label)


def _draw_bars(axes: Axes, parts: pd.DataFrame, colors: Sequence[tuple[float, float, float]]) -> None:
    left = np.zeros(len(parts))
    for name in parts.columns:
        alpha, hatch = _PART_LOOKS[str(name)]
        axes.barh(range(len(parts)), parts[name], left=left, color=[(*color, alpha) for color in colors],
                  edgecolor=colors, hatch=hatch, height=0.6, linewidth=0.5)  # fmt: skip
        left = left + parts[name].to_numpy()


def _draw_capacity(axes: Axes, points: pd.DataFrame) -> None:
    """A line at the memory of a device; a slice of a CPU has no memory of its own."""
    sizes = points.loc[points["device_kind"] == "gpu", "device_memory_gib"].dropna().unique()
    if len(sizes) == 1:
        axes.axvline(sizes[0], **REFERENCE)
        label = f"memory of a device, {sizes[0]:.4g} GiB"
        axes.annotate(label, (sizes[0], 1), xycoords=("data", "axes fraction"), **BESIDE)
