"""Each plot a function from the table of points to a figure; PLOTS names them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from batch_inference.metrics import METRIC_BY_NAME
from batch_inference.tables import measured, measured_on, scaling_table

DPI = 100
Colour = tuple[float, float, float]
Palette = dict[str, Colour]
_MARKERS = "osD^vPX*<>"


@dataclass(frozen=True)
class Plot:
    """`draw(points of one group, palette)` returns a figure, or the reason why there is nothing to show."""

    name: str
    draw: Callable[[pd.DataFrame, Palette], Figure | str]


def draw_all(table: pd.DataFrame, folder: Path) -> tuple[list[Path], list[str]]:
    """Write every plot for every group as a PNG file; the paths, and why others were left out."""
    sns.set_theme(style="whitegrid", context="notebook", rc={"axes.titlesize": 11, "axes.labelsize": 10})
    palette = setting_colours(table)
    paths, left_out = [], []
    groups = sorted(table["group"].unique())
    for plot in PLOTS:
        for group in groups:
            figure = plot.draw(table[table["group"] == group], palette)
            suffix = f"_group_{group}" if len(groups) > 1 else ""
            if isinstance(figure, str):
                left_out.append(f"{plot.name}{suffix}: {figure}")
                continue
            path = folder / f"{plot.name}{suffix}.png"
            figure.savefig(path, dpi=DPI, bbox_inches="tight")
            plt.close(figure)
            paths.append(path)
    return paths, left_out


def setting_colours(table: pd.DataFrame) -> Palette:
    """The same colour for the same setting in every plot, told apart by colour-blind readers too."""
    names = list(dict.fromkeys(table["name"]))
    # Seaborn's ten colours begin again after the tenth setting: line style and marker go on telling them apart.
    return dict(zip(names, sns.color_palette("colorblind", len(names)), strict=True))


def throughput(table: pd.DataFrame, palette: Palette) -> Figure | str:
    points = measured(table).copy()
    points["ci"] = points["output_tok_per_s"] * points["latency_ci95_s"] / points["latency_mean_s"]
    label = METRIC_BY_NAME["output_tok_per_s"]
    return _lines(points, "output_tok_per_s", "ci", f"{label.label} ({label.unit})", palette)


def latency(table: pd.DataFrame, palette: Palette) -> Figure | str:
    return _lines(measured(table), "latency_mean_s", "latency_ci95_s", "Batch latency, mean (s)", palette)


def scaling_efficiency(table: pd.DataFrame, palette: Palette) -> Figure | str:
    points = scaling_table(table)
    if points["num_devices"].nunique() < 2:
        return "no two settings with different device counts share a length and a global batch size"
    baseline = points["baseline"].iloc[0]
    figure = _lines(points, "scaling_efficiency", None, f"Scaling efficiency against {baseline}", palette)
    if isinstance(figure, Figure):
        for axes in figure.axes:
            axes.axhline(1.0, color="0.35", linestyle="--", linewidth=1, zorder=1)
            axes.annotate("ideal", (1.0, 1.0), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
            axes.set_ylim(0, max(1.15, points["scaling_efficiency"].max() * 1.1))
    return figure


def memory(table: pd.DataFrame, palette: Palette) -> Figure | str:
    """Weights and KV pool of each setting's fullest device, beside the most that was seen in use."""
    del palette  # the colours tell the kinds of memory apart here
    parts = {"weights_gib": "weights", "kv_pool_gib": "KV cache pool", "memory_used_gib": "used"}
    points = measured(table).groupby("name", sort=False)[list(parts)].max()
    points = points.dropna(how="all")
    if points.empty:
        return "no memory was measured"
    on_cpu = set(table["device_kind"]) == {"cpu"}
    parts["memory_used_gib"] = "used, all processes of a replica" if on_cpu else "used, by NVML"
    long = points.reset_index().melt("name", var_name="part", value_name="gib").replace({"part": parts})
    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.55 * len(points)), layout="constrained")
    sns.barplot(long, y="name", x="gib", hue="part", palette="colorblind", ax=axes, errorbar=None)
    for container in axes.containers:
        axes.bar_label(container, fmt=lambda value: f"{value:.2f}", padding=3, fontsize=8)  # type: ignore[arg-type]
    axes.set(xlabel="Memory per device (GiB)", ylabel="")
    if on_cpu:
        axes.set_xlabel("Memory (GiB)")
    axes.margins(x=0.12)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend().remove()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    _title(figure, "Memory", table)
    return figure


PLOTS: tuple[Plot, ...] = (
    Plot("throughput", throughput),
    Plot("latency", latency),
    Plot("scaling_efficiency", scaling_efficiency),
    Plot("memory", memory),
)


# --- shared by the line plots -------------------------------------------------------------------------------------


def _lines(points: pd.DataFrame, value: str, error: str | None, label: str, palette: Palette) -> Figure | str:
    """One panel per length, one line per setting, over the global batch size; `error` names the column of its bars."""
    points = points.dropna(subset=[value])
    points = points.assign(value=points[value], error=points[error].fillna(0) if error else 0.0)
    if points.empty:
        return "no point was measured"
    lengths = sorted(points["seq_len"].unique())
    columns = min(len(lengths), 3)
    rows = -(-len(lengths) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(max(8.0, 3.4 * columns), 3.9 * rows + 0.9),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    looks = {name: look for name, look in _looks(palette).items() if name in set(points["name"])}
    for axes, length in zip(grid.flat, lengths, strict=False):
        for name, look in looks.items():
            line = points[(points["seq_len"] == length) & (points["name"] == name)].sort_values("global_batch_size")
            _draw_line(axes, line, look)
        axes.set_title(f"{length} prompt tokens")
        _batch_axis(axes, sorted(points["global_batch_size"].unique()))
        axes.set_ylim(bottom=0)
    for axes in list(grid.flat)[len(lengths) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel(label)
    _legend(figure, looks, hollow=bool((points["verdict"] != "valid").any()))
    _title(figure, label.partition(" (")[0], points)
    return figure


def _looks(palette: Palette) -> dict[str, dict[str, Any]]:
    """Colour, marker and line style of each setting."""
    return {
        name: {"color": colour, "marker": _MARKERS[index % len(_MARKERS)], "linestyle": "-" if index < 10 else "--"}
        for index, (name, colour) in enumerate(palette.items())
    }


def _draw_line(axes: Axes, line: pd.DataFrame, look: dict[str, Any]) -> None:
    x, y, colour = line["global_batch_size"], line["value"], look["color"]
    axes.plot(x, y, color=colour, linestyle=look["linestyle"], linewidth=1.6, zorder=2)
    if line["error"].any():
        axes.errorbar(x, y, yerr=line["error"], fmt="none", ecolor=colour, elinewidth=1.2, capsize=3, zorder=2)
    faces = [colour if verdict == "valid" else "white" for verdict in line["verdict"]]
    axes.scatter(x, y, color=faces, edgecolor=colour, marker=look["marker"], s=42, zorder=3)


def _batch_axis(axes: Axes, batches: Sequence[int]) -> None:
    axes.set_xlabel("Global batch size (requests)")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(batches)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.08)


def _legend(figure: Figure, looks: dict[str, dict[str, Any]], *, hollow: bool) -> None:
    handles = [Line2D([], [], label=name, **look) for name, look in looks.items()]
    if hollow:
        handles.append(
            Line2D([], [], label="suspect or invalid", color="0.3", marker="o", markerfacecolor="white", linestyle="")
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False, fontsize=9)


def _title(figure: Figure, title: str, table: pd.DataFrame) -> None:
    """What is shown, and below it what it was measured on."""
    figure.suptitle(f"{title}\n{measured_on(table.iloc[0])}", fontsize=11)
