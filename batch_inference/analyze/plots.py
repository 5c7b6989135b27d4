"""Each plot a function from the table of one group of points to a figure; PLOTS names them all."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from batch_inference.analyze.answers import Group, mixed_mark
from batch_inference.analyze.compare import baseline_of, halves
from batch_inference.analyze.files import dark_variant, mark_of
from batch_inference.analyze.plot_colors import STYLES
from batch_inference.analyze.plot_heatmap import heatmap
from batch_inference.analyze.plot_jobs import JOB_PLOTS
from batch_inference.analyze.plot_lines import Curve, line_facets, measured_points
from batch_inference.analyze.plot_looks import prepared
from batch_inference.analyze.plot_marks import has_larger_marks
from batch_inference.analyze.plot_memory import memory
from batch_inference.analyze.plot_style import (
    DPI,
    NO_QUEUE_POINT,
    NOTHING_MEASURED,
    NothingToShowError,
    reference,
    subtitle_of,
)
from batch_inference.analyze.plot_tradeoffs import ROOFLINE, pareto, roofline
from batch_inference.core.files import check_regular
from batch_inference.core.metrics import METRIC_BY_NAME
from batch_inference.core.text import short_name

# Titles that a figure has too, or begins with.
_THROUGHPUT, _LATENCY = "Output throughput against batch size", "Batch latency against batch size"
_TTFT, _TPOT = "Time to first token", "Time per output token"
_ENERGY = METRIC_BY_NAME["energy_j_per_output_token"].label
# Of fewer requests percentile 99 is no more than nearly their maximum.
_LEAST_FOR_P99 = 100


def throughput(points: pd.DataFrame) -> Figure:
    return _with_interval(points, "output_tok_per_s", _THROUGHPUT)


def latency(points: pd.DataFrame) -> Figure:
    """The mean of the runs: too few for a percentile."""
    return _with_interval(points, "latency_mean_s", _LATENCY)


def _with_interval(points: pd.DataFrame, name: str, title: str) -> Figure:
    measured = measured_points(points, name)
    return line_facets(measured.assign(_half=halves(measured, name)), Curve(name), title)


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
    """The median as a line, and percentile 99 as a thin one where there are requests enough for it."""
    median, p99 = f"{prefix}_p50_s", f"{prefix}_p99_s"
    measured = measured_points(points, median)
    requests = measured["timed_runs"] * measured["global_batch_size"]
    told = measured.assign(**{p99: measured[p99].where(requests >= _LEAST_FOR_P99)})
    if told[p99].isna().all():
        return line_facets(measured, Curve(median), title)
    few = "" if told[p99].notna().all() else f", where {_LEAST_FOR_P99} requests or more were timed"
    label = f"99th percentile{few}; thick line: median"
    return line_facets(told, Curve(median, thin=p99, thin_label=label), title)


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
    if baseline is None:
        raise NothingToShowError("the setting of --baseline has no points here")
    shown = measured[measured[efficiency].notna() & (measured["setting"].astype(object) != baseline)]
    if shown.empty:
        raise NothingToShowError(f"no point has the same length and {equal} as one of the baseline, {baseline}")
    title = f"Scaling efficiency against {short_name(str(baseline), 30)}, at equal {equal}"
    x = "batch_size" if efficiency.startswith("weak") else "global_batch_size"
    shown = shown.assign(_half=shown[f"{efficiency}_ci95"])
    curve = Curve(efficiency, x, limits=_efficiency_limits(shown[efficiency], shown["_half"]))
    figure = line_facets(shown, curve, title, [Line2D([], [], label="ideal", **reference())])
    for axes in figure.axes:
        axes.axhline(1, **reference())
    return figure


def _efficiency_limits(values: pd.Series[float], half: pd.Series[float]) -> tuple[float, float]:
    """From the tenth below the lowest end of an interval to the ideal, or above the highest point."""
    lowest = float((values - half.fillna(0)).min())
    return max(0.0, math.floor(10 * lowest) / 10), max(1.05, 1.05 * float(values.max()))


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
    ("roofline", ROOFLINE, roofline),
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
    """A PNG and an SVG per plot and group of like things, and an SVG for a dark page, those of `jobs` (job_tables)
    first: (title, path of the PNG) of each, and why each of the others was not drawn. `names` picks plots; None is all
    of them."""
    written, missing = [], []
    of_jobs, of_groups = _sheets(groups, jobs)
    with warnings.catch_warnings():
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
                        _draw_and_save(draw, sheet.points, path)
                        written.append((title + sheet.mark, path))
                    except NothingToShowError as reason:
                        missing.append(f"{title}{sheet.of_which}: {reason}")
    return written, missing


def _draw_and_save(draw: Callable[[pd.DataFrame], Figure], points: pd.DataFrame, path: Path) -> None:
    vector = path.with_suffix(".svg")
    for theme, files in (("light", (path, vector)), ("dark", (dark_variant(vector),))):
        with mpl.rc_context(STYLES[theme]):
            figure = with_its_keys(draw, points)
            for file in files:
                _save(figure, file)


def with_its_keys(draw: Callable[[pd.DataFrame], Figure], points: pd.DataFrame) -> Figure:
    """Whether marks lie on one another is known when they are drawn, and the room for the legend before."""
    figure = draw(points)
    return draw(points.assign(_has_larger=True)) if has_larger_marks(figure) else figure


def _sheets(groups: Sequence[Group], jobs: Sequence[tuple[str, pd.DataFrame]]) -> tuple[list[Sheet], list[Sheet]]:
    tables = prepared([*(points for _, points in jobs), *(group.points for group in groups)])
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
    check_regular(path)
    if path.suffix == ".png":
        figure.savefig(path, dpi=DPI, metadata={"Software": mark_of(path)})
    else:
        figure.savefig(path, metadata={"Date": None, "Creator": mark_of(path)})
