"""Each plot a function from the table of one group of points to a figure; PLOTS names them all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from batch_inference.analyze.answers import Part
from batch_inference.analyze.compare import baseline_of, halves
from batch_inference.analyze.plot_lines import (
    GLOBAL_BATCH,
    Curve,
    draw_marks,
    length_grid,
    line_facets,
    measured_points,
)
from batch_inference.analyze.plot_style import (
    BESIDE,
    DPI,
    REFERENCE,
    STYLE,
    WIDTH_IN,
    NothingToShowError,
    axis_label,
    handles_of,
    hollow,
    label_outside,
    looks,
    named,
    named_first,
    new_figure,
    of_many,
    plain_log,
    some,
    subtitle_of,
    value_axis,
)
from batch_inference.core.metrics import METRIC_BY_NAME
from batch_inference.core.text import short, short_name

# Bars of memory on a sheet, and facets of a heat map.
_BARS, _MAPS = 40, 6


def throughput(points: pd.DataFrame) -> Figure:
    measured = measured_points(points, "output_tok_per_s")
    measured = measured.assign(_half=halves(measured, "output_tok_per_s"))
    return line_facets(measured, Curve("output_tok_per_s"), "Output throughput against batch size")


def latency(points: pd.DataFrame) -> Figure:
    return _percentiles(points, "latency", "Batch latency against batch size")


def ttft(points: pd.DataFrame) -> Figure:
    return _percentiles(points, "ttft", "Time to first token against batch size")


def tpot(points: pd.DataFrame) -> Figure:
    return _percentiles(points, "tpot", "Time per output token against batch size")


def energy(points: pd.DataFrame) -> Figure:
    name = "energy_j_per_output_token"
    return line_facets(measured_points(points, name), Curve(name), "Energy per output token against batch size")


def _percentiles(points: pd.DataFrame, prefix: str, title: str) -> Figure:
    """The median as a line, and percentile 99 as a thin one."""
    measured = measured_points(points, f"{prefix}_p50_s")
    return line_facets(measured, Curve(f"{prefix}_p50_s", thin=f"{prefix}_p99_s"), title)


# --- scaling ------------------------------------------------------------------------------------------------------


def scaling(points: pd.DataFrame) -> Figure:
    return _efficiency(points, "scaling_efficiency", "global batch size")


def scaling_weak(points: pd.DataFrame) -> Figure:
    replicas = points[points["global_batch_size"] != points["batch_size"]]
    if replicas.empty:
        raise NothingToShowError("no setting has replicas")
    of_baseline = points["setting"].astype(object) == points["scaling_baseline"]
    return _efficiency(points[of_baseline | points.index.isin(replicas.index)], "weak_scaling_efficiency",
                       "batch size per replica")  # fmt: skip


def _efficiency(points: pd.DataFrame, efficiency: str, equal: str) -> Figure:
    measured = measured_points(points, "output_tok_per_s")
    if measured["num_devices"].nunique() < 2:
        raise NothingToShowError("every measured setting has the same number of devices")
    baseline = baseline_of(measured)
    shown = measured[measured[efficiency].notna() & (measured["setting"].astype(object) != baseline)]
    if shown.empty:
        raise NothingToShowError(f"no point has the length and the {equal} of one of the baseline, {baseline}")
    title = f"Scaling efficiency against {short_name(str(baseline), 30)}, at equal {equal}"
    x = "batch_size" if efficiency.startswith("weak") else "global_batch_size"
    shown = shown.assign(_half=shown[f"{efficiency}_ci95"])
    figure = line_facets(shown, Curve(efficiency, x), title, [Line2D([], [], label="ideal", **REFERENCE)])
    for axes in figure.axes:
        axes.axhline(1, **REFERENCE)
    figure.axes[0].set_yscale("linear")
    figure.axes[0].set_ylim(0, max(1.1, 1.05 * shown[efficiency].max()))
    return figure


# --- trade-offs ---------------------------------------------------------------------------------------------------


def pareto(points: pd.DataFrame) -> Figure:
    """Latency against throughput per device: a mark per point, and a line through those that nothing beats."""
    x, y = "latency_mean_s", "output_tok_per_s_per_device"
    measured = measured_points(points, y)
    title = "Pareto front: throughput per device against latency" + of_many(measured, "the others")
    front = Line2D([], [], color="0.25", linewidth=1, label="front: no point is better in both")
    figure, grid = length_grid(measured, title, [*handles_of(measured, named(measured)), front])
    look, shown = looks(measured), named(measured)
    for axes, here in grid:
        others = here[~here["setting"].isin(shown)]
        axes.plot(others[x], others[y], ".", color="0.8", markersize=3, zorder=1, rasterized=True)
        for name in shown:
            draw_marks(axes, here[here["setting"] == name], x, y, look[name])
        best = here[here["pareto"].astype(bool)].sort_values(x)
        axes.step(best[x], best[y], where="post", color="0.25", linewidth=1, zorder=1.5)
        value_axis(axes, measured[x].min(), measured[x].max(), "x")
    value_axis(figure.axes[0], measured[y].min(), measured[y].max())
    label_outside(figure.axes, axis_label(x), axis_label(y))
    return figure


def roofline(points: pd.DataFrame) -> Figure:
    """Left of the ridge memory bandwidth is the roof, right of it arithmetic: a point's height is its MFU, and its
    distance below the slanted roof its MBU."""
    if not {"mfu", "mbu"} <= set(points):
        raise NothingToShowError("no point tells them")
    measured = points[(points["status"] == "ok") & (points["mfu"] > 0) & (points["mbu"] > 0)]
    if measured.empty:
        raise NothingToShowError("no point tells them")
    title = "MFU and MBU against the roofline" + of_many(measured, "the others")
    measured = measured.assign(_x=measured["mfu"] / measured["mbu"])
    roof = Line2D([], [], label="roof: peak bandwidth, peak arithmetic", **REFERENCE)
    figure, grid = length_grid(measured, title, [*handles_of(measured, named(measured)), roof])
    low, high = min(0.5, measured["_x"].min() / 1.5), max(2.0, measured["_x"].max() * 1.5)
    look, shown = looks(measured), named(measured)
    for axes, here in grid:
        others = here[~here["setting"].isin(shown)]
        axes.plot(others["_x"], others["mfu"], ".", color="0.8", markersize=3, zorder=1, rasterized=True)
        for name in shown:
            line = here[here["setting"] == name].sort_values("global_batch_size")
            axes.plot(line["_x"], line["mfu"], color=look[name]["color"], linewidth=1)
            draw_marks(axes, line, "_x", "mfu", look[name])
        axes.plot([low, 1, high], [low, 1, 1], **REFERENCE)
        axes.set(xscale="log", yscale="log", xlim=(low, high))
        plain_log(axes, "x")
    figure.axes[0].set_ylim(measured["mfu"].min() / 2, 1.5)
    plain_log(figure.axes[0], "y")
    label_outside(figure.axes, "MFU / MBU, 1 = ridge", "MFU, 1 = peak arithmetic")
    return figure


def heatmap(points: pd.DataFrame) -> Figure:
    """Throughput over batch x length: a map per setting, or of many settings one of the best at each place."""
    measured = measured_points(points, "output_tok_per_s")
    settings = [name for name in measured["setting"].cat.categories if (measured["setting"] == name).any()]
    each = len(settings) <= _MAPS
    title = "Output throughput over batch and length" + ("" if each else f": the best of {len(settings)} settings")
    maps = {name: measured[measured["setting"] == name] for name in settings} if each else {"": _best_cells(measured)}
    batches, lengths = sorted(measured["global_batch_size"].unique()), sorted(measured["seq_len"].unique())
    height_in = min(6.0, max(1.2, 0.3 * len(lengths)))
    figure, grid = new_figure(measured, title, len(maps), height_in, [])
    low, high = measured["output_tok_per_s"].min(), measured["output_tok_per_s"].max()
    norm = LogNorm(low, high) if high > 30 * low > 0 else Normalize(0, high)
    for axes, (name, here) in zip(grid, maps.items(), strict=True):
        image = _draw_map(axes, here, (batches, lengths), norm, names=not each)
        axes.set_title(short_name(name, 36), pad=4)
    label_outside(grid, GLOBAL_BATCH, "Prompt length [tokens]")
    figure.subplots_adjust(right=1 - 0.95 / WIDTH_IN)
    bar = figure.add_axes((1 - 0.8 / WIDTH_IN, figure.subplotpars.bottom, 0.12 / WIDTH_IN,
                           figure.subplotpars.top - figure.subplotpars.bottom))  # fmt: skip
    figure.colorbar(image, cax=bar)
    if isinstance(norm, LogNorm):
        plain_log(bar, "y", (1, 2, 5) if high < 2000 * low else (1,))
    bar.set_title("tok/s", fontsize=8)
    return figure


def _best_cells(points: pd.DataFrame) -> pd.DataFrame:
    ranked = points.sort_values("output_tok_per_s", ascending=False, kind="stable")
    return ranked.drop_duplicates(["global_batch_size", "seq_len"])


def _draw_map(
    axes: Axes, points: pd.DataFrame, ticks: tuple[list[int], list[int]], norm: Normalize, *, names: bool
) -> Any:
    batches, lengths = ticks
    cells = np.full((len(lengths), len(batches)), np.nan)
    room = axes.get_position().width * WIDTH_IN / len(batches)
    for batch, length, value, setting in points[
        ["global_batch_size", "seq_len", "output_tok_per_s", "setting"]
    ].itertuples(index=False):
        row, column = lengths.index(length), batches.index(batch)
        cells[row, column] = value
        words = [short(value)] if room > 0.4 else []
        words += [short_name(str(setting), 12)] if names and room > 0.85 else []
        pale = norm(value) > 0.6
        axes.text(column, row, "\n".join(words), ha="center", va="center", fontsize=6.5, color="0" if pale else "1")
    image = axes.imshow(cells, norm=norm, cmap="cividis", aspect="auto")
    x_ticks, y_ticks = some(range(len(batches)), max(2, int(room * len(batches) / 0.4))), some(range(len(lengths)), 24)
    axes.set_xticks(x_ticks, [str(batches[index]) for index in x_ticks])
    axes.set_yticks(y_ticks, [str(lengths[index]) for index in y_ticks])
    axes.grid(visible=False)
    return image


# --- memory -------------------------------------------------------------------------------------------------------


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


# Name of the file, title, function.
PLOTS: tuple[tuple[str, str, Callable[[pd.DataFrame], Figure]], ...] = (
    ("throughput", "Output throughput against batch size", throughput),
    ("latency", "Batch latency against batch size", latency),
    ("ttft", "Time to first token", ttft),
    ("tpot", "Time per output token", tpot),
    ("scaling", "Scaling efficiency, strong", scaling),
    ("scaling_weak", "Scaling efficiency, weak", scaling_weak),
    ("pareto", "Pareto front of latency and throughput per device", pareto),
    ("heatmap", "Throughput over batch and length", heatmap),
    ("memory", "Memory", memory),
    ("energy", "Energy per output token", energy),
    ("roofline", "MFU and MBU against the roofline", roofline),
)


def write_plots(
    parts: Sequence[Part], folder: Path, names: Sequence[str] | None = None
) -> tuple[list[tuple[str, Path]], list[str]]:
    """A PNG and an SVG per plot and group of like things: (title, path of the PNG) of each, and why each of the
    others was not drawn. `names` picks plots; None is all of them."""
    _remove_old(folder)
    written, missing = [], []
    tables = named_first([part.points for part in parts])
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # A name in a script that the font lacks is no news to the user.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        for name, title, draw in PLOTS:
            if names is not None and name not in names:
                continue
            if not parts:
                missing.append(f"{title}: no point was measured")
            for part, points in zip(parts, tables, strict=True):
                of_group = f" (group {part.number})" if len(parts) > 1 else ""
                mark = of_group + part.mark
                path = folder / f"{name}{f'_group_{part.number}' if of_group else ''}.png"
                try:
                    _save(draw(points.assign(_mark=mark, _about=subtitle_of(points))), path)
                    written.append((title + mark, path))
                except NothingToShowError as reason:
                    missing.append(f"{title}{of_group}: {reason}")
    return written, missing


def _remove_old(folder: Path) -> None:
    """Those of an earlier analysis, which may have had other groups."""
    for name, _, _ in PLOTS:
        for end in ("png", "svg"):
            for old in (folder / f"{name}.{end}", *folder.glob(f"{name}_group_*.{end}")):
                old.unlink(missing_ok=True)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
