"""The plot of throughput as cells: over batch size and prompt length, or, of one length, batch size and setting."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from batch_inference.analyze.plot_colors import color, text_on
from batch_inference.analyze.plot_lines import batch_label, measured_points
from batch_inference.analyze.plot_looks import in_reading_order, named, of_settings
from batch_inference.analyze.plot_style import (
    NOT_TO_RELY_ON,
    WIDTH_IN,
    label_outside,
    new_figure,
    plain_log,
    some,
    words_only,
)
from batch_inference.analyze.wording import short_names
from batch_inference.core.text import short

# Facets of settings, rows of settings, and rows that have a name.
_MAPS, _ROWS, _ROW_NAMES = 6, 40, 24
_COLORMAP = "cividis"
# Heights of a row, of one with names, and of a text; width of a cell from which on a number has room, and of a
# character.
_ROW_IN, _NAMED_ROW_IN, _TEXT_IN, _NUMBER_IN, _CHARACTER_IN = 0.28, 0.4, 0.14, 0.4, 0.062


@dataclass(frozen=True)
class Map:
    """Points of which no two have the same row and batch size."""

    points: pd.DataFrame
    rows_are: str  # the column
    rows: list[Any]
    title: str = ""
    names: dict[str, str] = field(default_factory=dict)  # of settings, where each cell tells its own

    @property
    def labels(self) -> list[str]:
        return list(short_names(map(str, self.rows), 30).values())


def heatmap(points: pd.DataFrame) -> Figure:
    """A map with a row per setting where there is one length; else a map per setting, or of many settings one of the
    best at each place."""
    measured = measured_points(points, "output_tok_per_s")
    title, maps = _maps(measured)
    batches = sorted(measured["global_batch_size"].unique())
    row_in = _NAMED_ROW_IN if maps[0].names else _ROW_IN
    height_in = min(_ROW_IN * _ROWS, max(1.2, row_in * len(maps[0].rows)))
    longest = max(len(label) for one in maps for label in one.labels)
    left_in, right_in = max(0.8, 0.5 + 0.075 * longest), 0.95
    has_numbers = (
        height_in / len(maps[0].rows) >= _TEXT_IN and (WIDTH_IN - left_in - right_in) / len(batches) > _NUMBER_IN
    )
    handles = _handles(maps, len(batches), has_numbers=has_numbers)
    figure, grid = new_figure(measured, title, len(maps), height_in, handles)
    figure.subplots_adjust(left=left_in / WIDTH_IN, right=1 - right_in / WIDTH_IN)
    low, high = measured["output_tok_per_s"].min(), measured["output_tok_per_s"].max()
    norm = LogNorm(low, high) if high > 30 * low > 0 else Normalize(0, high)
    for axes, one in zip(grid, maps, strict=True):
        image = _draw_map(axes, one, batches, norm)
    is_of_settings = maps[0].rows_are == "setting"
    label_outside(grid, batch_label(measured), "" if is_of_settings else "Prompt length [tokens]")
    _draw_scale(figure, image, norm)
    return figure


def _maps(points: pd.DataFrame) -> tuple[str, list[Map]]:
    """With the title of their plot."""
    settings, lengths = in_reading_order(points, points["setting"].unique()), sorted(points["seq_len"].unique())
    what = "Output throughput over batch and"
    if len(lengths) == 1 and len(settings) > 1:
        shown = settings if len(settings) <= _ROWS else named(points)
        of_many = f" ({of_settings(len(shown), len(settings))})" if len(shown) < len(settings) else ""
        chosen = points[points["setting"].isin(shown)]
        return f"{what} setting, {lengths[0]} prompt tokens{of_many}", [Map(chosen, "setting", shown)]
    if len(settings) <= _MAPS:
        titles = short_names(settings, 36)
        maps = [Map(points[points["setting"] == name], "seq_len", lengths, titles[name]) for name in settings]
        return f"{what} length", maps
    best = Map(_best_cells(points), "seq_len", lengths, names=short_names(settings, 16))
    return f"{what} length: the best of {len(settings)} settings", [best]


def _best_cells(points: pd.DataFrame) -> pd.DataFrame:
    ranked = points.sort_values("output_tok_per_s", ascending=False, kind="stable")
    return ranked.drop_duplicates(["global_batch_size", "seq_len"])


def _handles(maps: Sequence[Map], columns: int, *, has_numbers: bool) -> list[Any]:
    """Of what there is in the maps."""
    handles: list[Any] = []
    if any((one.points["verdict"] != "valid").any() for one in maps):
        handles.append(words_only(f"*: {NOT_TO_RELY_ON}"))
    if any(len(one.points) < columns * len(one.rows) for one in maps):
        handles.append(Patch(facecolor=color("blank"), edgecolor=color("soft"), linewidth=0.5, label="not measured"))
    if maps[0].rows_are == "setting" and has_numbers:
        handles.append(words_only("bold: the highest of its batch size"))
    return handles


def _draw_map(axes: Axes, shown: Map, batches: list[int], norm: Normalize) -> Any:
    points = shown.points
    room_in = axes.get_position().width * WIDTH_IN / len(batches)
    row_in = axes.get_position().height * axes.figure.bbox.height / axes.figure.dpi / len(shown.rows)
    cells = np.full((len(shown.rows), len(batches)), np.nan)
    rows = [shown.rows.index(row) for row in points[shown.rows_are]]
    columns = [batches.index(batch) for batch in points["global_batch_size"]]
    cells[rows, columns] = points["output_tok_per_s"]
    # One that was run alone is the highest of nothing.
    is_measured = ~np.isnan(cells)
    highest = np.where(is_measured, cells, 0).max(axis=0)
    image = axes.imshow(cells, norm=norm, cmap=_COLORMAP, aspect="auto")
    for row, column, verdict, setting in zip(rows, columns, points["verdict"], points["setting"], strict=True):
        if row_in < _TEXT_IN:
            break
        value = cells[row, column]
        is_best = shown.rows_are == "setting" and value == highest[column]
        axes.text(
            column, row, _words(value, verdict, shown.names.get(str(setting), ""), room_in),
            ha="center", va="center", fontsize=7, fontweight="bold" if is_best else "normal",
            color=text_on(colormaps[_COLORMAP](norm(value))),
        )  # fmt: skip
    _draw_frame(axes, shown, batches, room_in)
    return image


def _words(value: float, verdict: str, name: str, room_in: float) -> str:
    mark = "*" if verdict != "valid" else ""
    words = [short(value) + mark if room_in > _NUMBER_IN else mark]
    in_two = _in_lines(name, int(room_in / _CHARACTER_IN))
    words += in_two if len(in_two) <= 2 else []
    return "\n".join(words)


def _in_lines(name: str, width: int) -> list[str]:
    """Broken after underscores, and nowhere else: tp_8_ and dp_2; more than two where a part has no room."""
    lines: list[str] = []
    for part in filter(None, re.split(r"(?<=[_…])", name)):
        if lines and len(lines[-1] + part) <= width:
            lines[-1] += part
        else:
            lines += [part] if len(part) <= width else [part] * 3
    return lines


def _draw_frame(axes: Axes, shown: Map, batches: list[int], room_in: float) -> None:
    """What no cell covers was not measured."""
    axes.set_facecolor(color("blank"))
    axes.set_title(shown.title, pad=4)
    label_in = max(0.4, 0.09 * max(len(str(batch)) for batch in batches) + 0.08)
    # The largest has a label, and of the others every second, or third, and so on.
    x_ticks = range(len(batches) - 1, -1, -math.ceil(label_in / room_in))[::-1]
    y_ticks = some(range(len(shown.rows)), _ROWS if shown.rows_are == "setting" else _ROW_NAMES)
    axes.set_xticks(x_ticks, [str(batches[index]) for index in x_ticks])
    axes.set_yticks(y_ticks, [shown.labels[index] for index in y_ticks])
    axes.grid(visible=False)


def _draw_scale(figure: Figure, image: Any, norm: Normalize) -> None:
    """The colours as a bar at the right edge."""
    place = figure.subplotpars
    bar = figure.add_axes((1 - 0.8 / WIDTH_IN, place.bottom, 0.12 / WIDTH_IN, place.top - place.bottom))
    figure.colorbar(image, cax=bar)
    is_log = isinstance(norm, LogNorm)
    if is_log:
        plain_log(bar, "y", (1, 2, 5) if float(norm.vmax or 0) < 2000 * float(norm.vmin or 1) else (1,))
    bar.set_title("tok/s" + ",\nlog scale" * is_log, fontsize=8)
