"""The plot of a queue over time: tokens per second and requests running, through ramp, plateau and drain."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from batch_inference.analyze.plot_colors import color
from batch_inference.analyze.plot_looks import looks, named, of_settings
from batch_inference.analyze.plot_marks import Floats
from batch_inference.analyze.plot_style import (
    WIDTH_IN,
    NothingToShowError,
    columns_of,
    in_short,
    label_outside,
    new_figure,
    reference,
)
from batch_inference.analyze.queues import QueuePoint, phases
from batch_inference.core.text import short_name, with_budget

# Facets have three panels each: more cannot be read.
_FACETS = 6
# So many stretches of time; shorter ones show single steps.
_STRETCHES = 80
# Share of a facet's height, from its top, and what is between two panels.
_PANELS, _BETWEEN = (0.55, 0.18, 0.18), 0.045
_PHASES = (
    ("ramp: the places are filling", "ramp"),
    ("plateau: every place is taken", "plateau"),
    ("drain: fewer requests than places", "drain"),
)
# Of runs that differ by more each has an axis of its own: the short ones could not be read.
_MOST_OF_TIME = 4.0
# A unit of time, and from how many seconds on it is used.
_TIMES = (("h", 3600.0, 3 * 3600.0), ("min", 60.0, 10 * 60.0), ("s", 1.0, 0.0))


@dataclass(frozen=True)
class Course:
    """Of all replicas together; entries are of stretches of time between two edges."""

    edges_s: Floats
    output_tok_per_s: Floats
    prompt_tok_per_s: Floats
    running: Floats

    def mean_output(self, start_s: float, end_s: float) -> float:
        """Of what is drawn between two moments."""
        done = np.concatenate([[0.0], np.cumsum(self.output_tok_per_s * np.diff(self.edges_s))])
        first, last = np.interp([start_s, end_s], self.edges_s, done)
        return float((last - first) / (end_s - start_s))


def course(point: QueuePoint) -> Course:
    """The replicas' steps on common stretches of time, summed."""
    end_s = max(timeline.end_s[-1] for timeline in point.timelines)
    entries = max(len(timeline.end_s) for timeline in point.timelines)
    edges_s = np.linspace(0.0, end_s, min(_STRETCHES, entries) + 1)
    sums = np.zeros((3, len(edges_s) - 1))
    for timeline in point.timelines:
        ends_s = np.array(timeline.end_s)
        request_s = np.array(timeline.running) * np.diff(ends_s, prepend=0.0)
        amounts = np.array([timeline.output_tokens, timeline.prompt_tokens, request_s])
        for sum_of_all, of_replica in zip(sums, amounts, strict=True):
            done = np.concatenate([[0.0], np.cumsum(of_replica)])
            sum_of_all += np.diff(np.interp(edges_s, np.concatenate([[0.0], ends_s]), done))
    return Course(edges_s, *(sums / np.diff(edges_s)))


def timeline(points: pd.DataFrame, title: str) -> Figure:
    """A facet for the fastest point of each setting."""
    told = points[[any(one.end_s for one in point.timelines) for point in points["point"]]]
    if told.empty:
        raise NothingToShowError("no point recorded its steps")
    best = told[told["setting"].isin(named(points))].drop_duplicates("setting").head(_FACETS)
    settings, columns = points["setting"].nunique(), columns_of(len(best))
    of_many = f" ({of_settings(len(best), settings)})" if len(best) < settings else ""
    rows = list(zip(best["setting"], best["order"], best["point"], strict=True))
    titles = [_words(*row, width=100 // columns) for row in rows]
    # What a title has beyond one line is taken from the facets.
    titles_in = 0.15 * (max(map(len, titles)) - 1)
    height_in = (2.7 if len(best) > 1 else 3.2) + titles_in
    lasts_s = [phases(point)[-1][1] for point in best["point"]]
    is_shared = max(lasts_s) <= _MOST_OF_TIME * min(lasts_s)
    note = (
        ""
        if is_shared
        else "\nThe axes of time are not alike: the longest run takes many times as long as the shortest."
    )
    figure, grid = new_figure(best, title + of_many + note, len(best), height_in, _handles(best["point"]))
    label_outside(grid, "", "")
    unit, unit_s = _time_unit(best["point"])
    first: list[Axes] = []
    for index, (axes, words, (setting, _, point)) in enumerate(zip(grid, titles, rows, strict=True)):
        panels = _panels(axes, first, 1 - titles_in / height_in)
        first = first or panels
        axes.set_title("\n".join(words), fontsize=8.5, pad=3, linespacing=1.15)
        _draw(panels, point, unit_s, looks(points)[setting]["color"])
        _label(panels, unit, is_left=index % columns == 0, is_last=index + columns >= len(grid))
    for axes, last_s in zip(grid, lasts_s, strict=True):
        _set_time(axes, (max(lasts_s) if is_shared else last_s) / unit_s)
    for axes in first:
        axes.set_ylim(0, None)
    return figure


def _set_time(axes: Axes, last: float) -> None:
    # A number at the right edge would meet the first one of the next facet.
    axes.set(xlim=(0, last), xticks=[tick for tick in MaxNLocator(5).tick_values(0, last) if tick <= 0.92 * last])


def _words(setting: str, order: str, point: QueuePoint, width: int) -> list[str]:
    """The title of a facet, in lines."""
    at_once = f"{point.batch_size} at once"
    if point.replicas > 1:
        at_once = f"{point.replicas} replicas × {at_once}, summed"
    words = [with_budget(at_once, point.tokens_per_step) if point.tokens_per_step else at_once]
    words += [order] if order != "given" else []
    words += ["suspect"] if point.verdict != "valid" else []
    words += [_of_job(point)]
    return [short_name(setting, width - 4), *textwrap.wrap("; ".join(words), width, break_on_hyphens=False)]


def _of_job(point: QueuePoint) -> str:
    if point.is_whole_job:
        return "the whole job"
    return f"a sample of {point.requests:,} requests"


def _handles(points: Iterable[QueuePoint]) -> list[Any]:
    """Of the phases that are there."""
    lengths_s = np.array([[end_s - start_s for start_s, end_s in phases(point)] for point in points])
    handles: list[Any] = [
        Patch(facecolor=color(shade), edgecolor=color("soft"), linewidth=0.5, label=label)
        for (label, shade), length_s in zip(_PHASES, lengths_s.max(axis=0), strict=True)
        if length_s > 0
    ]
    if lengths_s[:, 1].max() > 0:
        handles.append(Line2D([], [], label="mean of the plateau", **reference()))
    return handles


def _time_unit(points: Iterable[QueuePoint]) -> tuple[str, float]:
    longest_s = max(phases(point)[-1][1] for point in points)
    return next((unit, unit_s) for unit, unit_s, from_s in _TIMES if longest_s >= from_s)


def _panels(axes: Axes, shared: Sequence[Axes], share_of_height: float) -> list[Axes]:
    """The facet becomes the upper one of three panels, which share their scales with those `shared`."""
    place, figure = axes.get_position(), axes.get_figure(root=True)
    assert figure is not None
    height = place.height * share_of_height
    bottoms = (1 - _PANELS[0], 1 - sum(_PANELS[:2]) - _BETWEEN, 0.0)
    boxes = [
        (place.x0, place.y0 + bottom * height, place.width, share * height)
        for bottom, share in zip(bottoms, _PANELS, strict=True)
    ]
    axes.set_position(boxes[0])
    strips = [
        figure.add_axes(box, sharex=axes, sharey=shared[number] if shared else None)
        for number, box in enumerate(boxes[1:], 1)
    ]
    return [axes, *strips]


def _draw(panels: Sequence[Axes], point: QueuePoint, unit_s: float, line_color: Any) -> None:
    found, times = course(point), phases(point)
    for axes, values in zip(panels, (found.output_tok_per_s, found.prompt_tok_per_s, found.running), strict=True):
        for (start_s, end_s), (_, shade) in zip(times, _PHASES, strict=True):
            if end_s > start_s:
                axes.axvspan(start_s / unit_s, end_s / unit_s, color=color(shade), linewidth=0, zorder=0)
        is_first = axes is panels[0]
        axes.stairs(values, found.edges_s / unit_s, color=line_color, linewidth=1.3 if is_first else 0.9, baseline=None)
        axes.grid(visible=False, axis="x")
        axes.yaxis.set_major_locator(MaxNLocator(5 if is_first else 2))
        axes.yaxis.set_major_formatter(FuncFormatter(in_short))
    start_s, end_s = times[1]
    if end_s > start_s:
        mean = found.mean_output(start_s, end_s)
        panels[0].plot([start_s / unit_s, end_s / unit_s], [mean, mean], **reference())


def _label(panels: Sequence[Axes], unit: str, *, is_left: bool, is_last: bool) -> None:
    for axes, label in zip(panels, ("Output tok/s", "Prompt\ntok/s", "Requests\nrunning"), strict=True):
        axes.set_ylabel(label if is_left else "", fontsize=8)
        # Of all panels alike, however long their numbers are.
        axes.yaxis.set_label_coords(-0.44 / (axes.get_position().width * WIDTH_IN), 0.5)
        axes.tick_params(labelleft=is_left, labelbottom=axes is panels[-1], labelsize=8)
    panels[-1].set_xlabel(f"Time [{unit}]" if is_last else "")
