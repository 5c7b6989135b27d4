"""Where a plot begins to leave something out, or to look another way: at the bound itself, and one beyond it."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from batch_inference.analyze import plot_lines, plot_looks, plot_style
from batch_inference.analyze.plot_heatmap import heatmap
from batch_inference.analyze.plot_looks import looks, named, prepared, seats
from batch_inference.analyze.plot_memory import memory
from batch_inference.analyze.plot_style import batch_axis, of_many, subtitle_of


def crowd(settings: int, lengths: int = 1, **columns: Any) -> pd.DataFrame:
    """One point per setting and length; the first setting is the fastest."""
    names = [f"s{number:02}" for number in range(settings)]
    rows = [(name, 8 * (length + 1), number + 1.0) for number, name in enumerate(names) for length in range(lengths)]
    points = pd.DataFrame(rows, columns=["setting", "seq_len", "latency_mean_s"])
    return points.assign(
        setting=pd.Categorical(points["setting"], categories=names), status="ok", verdict="valid", batch_size=1,
        global_batch_size=1, output_tok_per_s=32 / points["latency_mean_s"], device_kind="gpu", model="m",
        output_tok_per_s_per_device=32 / points["latency_mean_s"], device_memory_gib=80.0, memory_scope="device",
        memory_used_gib=60.0, weights_gib=12.0, device_name="d", vllm_version="1", dtype="t", quantization=None,
        max_tokens=32,
    ).assign(**columns)  # fmt: skip


def test_twelve_settings_are_all_named_and_of_thirteen_eight() -> None:
    assert named(crowd(12)) == [f"s{number:02}" for number in range(12)]
    assert named(crowd(13)) == [f"s{number:02}" for number in range(8)]
    assert of_many(crowd(12, 12)) == ""
    assert of_many(crowd(13)) == " (8 leading settings of 13; grey: the range of the others)"
    assert of_many(crowd(1, 13)) == " (12 of 13 prompt lengths)"
    assert of_many(crowd(13, 13), "dots") == " (8 leading settings of 13; grey: dots; 12 of 13 prompt lengths)"


def test_the_best_are_those_of_every_goal_in_turns() -> None:
    points = crowd(13)
    # The last is the best per device, and the one before it the next.
    points = points.assign(output_tok_per_s_per_device=range(13))
    assert plot_looks._best(points) == ["s00", "s12", "s01", "s11", "s02", "s10", "s03", "s09"]
    assert named(points) == ["s00", "s01", "s02", "s03", "s09", "s10", "s11", "s12"]
    invalid = points.assign(verdict=["invalid"] + ["valid"] * 12)
    assert named(invalid)[0] == "s01"


def test_named_settings_of_a_crowd_get_the_first_colours() -> None:
    few, many = crowd(13).iloc[:2], crowd(13).assign(latency_mean_s=1.0, output_tok_per_s=range(13))
    (alone,) = prepared([few])
    assert list(seats(alone)) == ["s00", "s01"]
    one, two = prepared([few, many.assign(output_tok_per_s_per_device=range(13))])
    assert (one["_named"].all(), int(two["_named"].sum())) == (True, 8)
    # The five of the middle have no name.
    assert [name for name, (_, number) in seats(two).items() if number >= 8] == ["s04", "s05", "s06", "s07", "s08"]
    assert seats(one) == {name: seats(two)[name] for name in ("s00", "s01")}


def test_after_all_colours_the_dashes_change() -> None:
    found = looks(crowd(25))
    dashes = [look["linestyle"] for look in found.values()]
    assert dashes == ["-"] * 8 + ["--"] * 8 + [":"] * 8 + ["-."]
    assert found["s00"]["color"] == found["s08"]["color"]
    assert found["s00"]["marker"] == found["s12"]["marker"] == "o"


def test_the_batch_sizes_that_fit_are_ticks() -> None:
    axes = Figure(figsize=(8, 3)).add_subplot()
    batch_axis(axes, pd.Series([4, 1, 2, 4]))
    assert axes.get_xlim() == (pytest.approx(2**-0.4), pytest.approx(4 * 2**0.4))
    assert (list(axes.get_xticks()), axes.get_xscale()) == ([1, 2, 4], "log")
    batch_axis(axes, pd.Series(range(1000, 1100)))
    assert [int(tick) for tick in axes.get_xticks()][:3] == [1000, 1041, 1084]
    assert axes.xaxis.get_major_formatter()(1040.0, 0) == "1040"


def test_what_it_was_measured_on_is_told_shortly() -> None:
    points = crowd(5, device_name=["a", "b", None, "c", "d"], model="m" * 90, quantization="fp8")
    assert subtitle_of(points).split(" · ") == [
        "a + b + c", f"{'m' * 30}…{'m' * 29}", "vLLM 1", "t", "fp8", "32 output tokens",
    ]  # fmt: skip


def test_names_in_a_legend_are_short_and_never_hidden() -> None:
    points = crowd(1)
    points["setting"] = points["setting"].cat.rename_categories(["_" + "x" * 60])
    (handle,) = plot_style.handles_of(points, list(points["setting"]))
    assert handle.get_label() == f" _{'x' * 19}…{'x' * 19}"
    labels = [one.get_label() for one in plot_style.handles_of(points.assign(verdict="suspect"), [])]
    assert labels == ["hollow: suspect or invalid"]


@pytest.mark.parametrize(("settings", "maps"), [(6, 6), (7, 1)])
def test_six_settings_have_maps_of_their_own(settings: int, maps: int) -> None:
    figure = heatmap(crowd(settings, 2))
    assert len(figure.axes) == maps + 1
    assert ("the best of 7 settings" in figure.texts[0].get_text()) == (maps == 1)


@pytest.mark.parametrize(("lowest", "norm"), [(1.0, Normalize), (0.99, LogNorm), (0.0, Normalize)])
def test_a_map_of_numbers_far_apart_is_logarithmic(lowest: float, norm: type) -> None:
    figure = heatmap(crowd(1, 2, output_tok_per_s=[lowest, 30.0]))
    found = figure.axes[0].images[0].norm
    assert type(found) is norm
    assert (found.vmin, found.vmax) == (lowest if norm is LogNorm else 0, 30.0)


@pytest.mark.parametrize(("settings", "title"), [(40, "Memory"), (41, "Memory (40 of 41 settings)")])
def test_forty_bars_are_drawn(settings: int, title: str) -> None:
    figure = memory(crowd(settings))
    assert figure.texts[0].get_text() == title
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [f"s{n:02}" for n in range(40)]


@pytest.mark.parametrize(
    ("columns", "lines"),
    [
        ({}, [80.0]), ({"device_memory_gib": [80.0, 40.0]}, []), ({"device_kind": "cpu"}, []),
        ({"device_kind": ["cpu", "gpu"], "device_memory_gib": [40.0, 80.0]}, [80.0]),
        ({"device_memory_gib": [80.0, math.nan]}, [80.0]),
    ],
)  # fmt: skip
def test_a_line_stands_at_the_memory_that_all_devices_have(columns: dict[str, Any], lines: list[float]) -> None:
    (axes,) = memory(crowd(2, **columns)).axes
    assert [float(line.get_xdata()[0]) for line in axes.lines[1:]] == lines


def test_what_is_known_of_some_settings_alone_is_drawn_for_them() -> None:
    points = crowd(3, weights_gib=[12.0, math.nan, math.nan], memory_used_gib=[60.0, 50.0, math.nan])
    (axes,) = memory(points).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["s00", "s01"]
    assert [float(bar.get_width()) for bar in axes.patches] == [12.0, 0.0]


def test_a_band_goes_straight_between_the_batch_sizes_of_a_line() -> None:
    axes = Figure().add_subplot()
    points = pd.DataFrame({"setting": ["a", "a", "b"], "global_batch_size": [1, 16, 4], "y": [10.0, 30.0, 5.0]})
    plot_lines._draw_range(axes, points, plot_lines.Curve("y"))
    # At batch 4, half way of the logarithms, a stands at 20; b is at 4 alone.
    outline = {(round(x, 6), round(y, 6)) for x, y in axes.collections[0].get_paths()[0].vertices}
    assert outline == {(1, 10), (4, 5), (4, 20), (16, 30)}
