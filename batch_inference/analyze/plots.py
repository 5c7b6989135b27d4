"""Each plot a function from the table of one group of points to a figure; PLOTS names them all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from batch_inference.analyze.answers import Group, mixed_mark
from batch_inference.analyze.compare import baseline_of, halves
from batch_inference.analyze.files import mark_of
from batch_inference.analyze.plot_jobs import JOB_PLOTS
from batch_inference.analyze.plot_lines import (
    GLOBAL_BATCH,
    Curve,
    draw_marks,
    length_grid,
    line_facets,
    measured_points,
)
from batch_inference.analyze.plot_memory import memory
from batch_inference.analyze.plot_style import (
    DPI,
    FRONT,
    NO_QUEUE_POINT,
    NOTHING_MEASURED,
    REFERENCE,
    STYLE,
    WIDTH_IN,
    NothingToShowError,
    axis_label,
    handles_of,
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
from batch_inference.core.files import check_regular
from batch_inference.core.metrics import METRIC_BY_NAME
from batch_inference.core.text import short, short_name

# Facets of a heat map.
_MAPS = 6
# Titles that a figure has too, or begins with.
_THROUGHPUT, _LATENCY = "Output throughput against batch size", "Batch latency against batch size"
_TTFT, _TPOT = "Time to first token", "Time per output token"
_ENERGY = METRIC_BY_NAME["energy_j_per_output_token"].label
_ROOFLINE = "MFU and MBU against the roofline"


def throughput(points: pd.DataFrame) -> Figure:
    measured = measured_points(points, "output_tok_per_s")
    measured = measured.assign(_half=halves(measured, "output_tok_per_s"))
    return line_facets(measured, Curve("output_tok_per_s"), _THROUGHPUT)


def latency(points: pd.DataFrame) -> Figure:
    return _percentiles(points, "latency", _LATENCY)


def ttft(points: pd.DataFrame) -> Figure:
    return _percentiles(points, "ttft", _against_batch(_TTFT))


def tpot(points: pd.DataFrame) -> Figure:
    return _percentiles(points, "tpot", _against_batch(_TPOT))


def energy(points: pd.DataFrame) -> Figure:
    name = "energy_j_per_output_token"
    return line_facets(measured_points(points, name), Curve(name), _against_batch(_ENERGY))


def _against_batch(what: str) -> str:
    return f"{what} against batch size"


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
    front = Line2D([], [], color="0.25", linewidth=1, label=FRONT)
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
    measured = points[(points["status"] == "ok") & (points["mfu"] > 0) & (points["mbu"] > 0)]
    if measured.empty:
        raise NothingToShowError("no point tells them")
    title = _ROOFLINE + of_many(measured, "the others")
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


# Name of the file, title, function.
PLOTS: tuple[tuple[str, str, Callable[[pd.DataFrame], Figure]], ...] = (
    ("throughput", _THROUGHPUT, throughput),
    ("latency", _LATENCY, latency),
    ("ttft", _TTFT, ttft),
    ("tpot", _TPOT, tpot),
    ("scaling", "Scaling efficiency, strong", scaling),
    ("scaling_weak", "Scaling efficiency, weak", scaling_weak),
    ("pareto", "Pareto front of latency and throughput per device", pareto),
    ("heatmap", "Throughput over batch and length", heatmap),
    ("memory", "Memory", memory),
    ("energy", _ENERGY, energy),
    ("roofline", _ROOFLINE, roofline),
)


@dataclass(frozen=True)
class Sheet:
    """What a plot is drawn of: a group of like points, or a job."""

    points: pd.DataFrame
    of_which: str  # of several; of a title and of why there is no plot
    mark: str  # what the title ends with
    file_end: str


def write_plots(
    groups: Sequence[Group],
    folder: Path,
    names: Sequence[str] | None = None,
    jobs: Sequence[tuple[str, pd.DataFrame]] = (),
) -> tuple[list[tuple[str, Path]], list[str]]:
    """A PNG and an SVG per plot and group of like things, those of `jobs` (job_tables) first: (title, path of the PNG)
    of each, and why each of the others was not drawn. `names` picks plots; None is all of them."""
    written, missing = [], []
    of_jobs, of_groups = _sheets(groups, jobs)
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # A name in a script that the font lacks is no news to the user.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        for plots, sheets, nothing in ((JOB_PLOTS, of_jobs, NO_QUEUE_POINT), (PLOTS, of_groups, NOTHING_MEASURED)):
            for name, title, draw in plots:
                if names is not None and name not in names:
                    continue
                # What nobody asked for is no news: a job without a grid, or a grid without a job.
                if not sheets and (names is not None or not (jobs or plots is JOB_PLOTS)):
                    missing.append(f"{title}: {nothing}")
                for sheet in sheets:
                    path = folder / f"{name}{sheet.file_end}.png"
                    try:
                        _save(draw(sheet.points), path)
                        written.append((title + sheet.mark, path))
                    except NothingToShowError as reason:
                        missing.append(f"{title}{sheet.of_which}: {reason}")
    return written, missing


def _sheets(groups: Sequence[Group], jobs: Sequence[tuple[str, pd.DataFrame]]) -> tuple[list[Sheet], list[Sheet]]:
    tables = named_first([*(points for _, points in jobs), *(group.points for group in groups)])
    of_jobs = [
        _sheet(points, mark, mark, f"_{number}" if number > 1 else "")
        for number, ((mark, _), points) in enumerate(zip(jobs, tables, strict=False), 1)
    ]
    of_groups = []
    for group, points in zip(groups, tables[len(jobs) :], strict=True):
        of_group = f" (group {group.number})" if len(groups) > 1 else ""
        file_end = f"_group_{group.number}" if of_group else ""
        of_groups.append(_sheet(points, of_group, of_group + mixed_mark(group.mixed), file_end))
    return of_jobs, of_groups


def _sheet(points: pd.DataFrame, of_which: str, mark: str, file_end: str) -> Sheet:
    return Sheet(points.assign(_mark=mark, _about=subtitle_of(points)), of_which, mark, file_end)


def _save(figure: Figure, path: Path) -> None:
    vector = path.with_suffix(".svg")
    for file in (path, vector):
        check_regular(file)
    figure.savefig(path, dpi=DPI, metadata={"Software": mark_of(path)})
    figure.savefig(vector, metadata={"Date": None, "Creator": mark_of(vector)})
