"""Asserts on what is drawn, never on images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from batch_inference.plots import PLOTS, draw_all, latency, memory, scaling_efficiency, setting_colours, throughput
from batch_inference.results import Result
from batch_inference.tables import points_table
from builders import make_result


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def draw(plot: object, *results: Result) -> Figure:
    table = points_table(results)
    figure = plot(table, setting_colours(table))  # type: ignore[operator]
    assert isinstance(figure, Figure), figure
    return figure


def test_each_setting_is_a_line_through_its_own_numbers() -> None:
    figure = draw(throughput, make_result(), make_result(tp=2, speed=200))
    lines = figure.axes[0].get_lines()
    drawn = {tuple(line.get_xdata()): line.get_ydata() for line in lines if len(line.get_xdata()) == 3}
    assert list(drawn) == [(1, 4, 16)]
    heights = sorted(float(line.get_ydata()[-1]) for line in lines if line.get_linewidth() == 1.6)
    assert heights == pytest.approx([1600, 3200], rel=1e-3)


def test_each_length_has_a_panel_and_the_ticks_are_the_batches() -> None:
    figure = draw(latency, make_result(seq_lens=(512, 1024)))
    assert [axes.get_title() for axes in figure.axes] == ["512 prompt tokens", "1024 prompt tokens"]
    assert list(figure.axes[0].get_xticks()) == [1, 4, 16]


def test_axes_carry_units_and_the_title_says_what_it_was_measured_on() -> None:
    figure = draw(throughput, make_result())
    assert figure.axes[0].get_ylabel() == "Output throughput (tok/s)"
    assert figure.get_suptitle().splitlines() == [
        "Output throughput",
        "Llama-2-7b-chat-hf, float16, 128 output tokens · NVIDIA H100 80GB HBM3 · vLLM 0.26.0",
    ]


def test_the_legend_names_every_setting_outside_the_data() -> None:
    figure = draw(throughput, make_result(), make_result(tp=2))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["tp_1", "tp_2"]
    assert all(axes.get_legend() is None for axes in figure.axes)


def test_suspect_points_are_hollow_and_the_legend_says_so() -> None:
    result = make_result()
    result.points[1].verdict = "suspect"
    figure = draw(throughput, result)
    faces = figure.axes[0].collections[-1].get_facecolors()  # type: ignore[attr-defined]
    assert [tuple(face[:3]) == (1.0, 1.0, 1.0) for face in faces] == [False, True, False]
    assert "suspect or invalid" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_setting_keeps_its_colour_when_others_come_and_go() -> None:
    table = points_table([make_result(), make_result(tp=2), make_result(tp=4)])
    colours = setting_colours(table)
    assert len(set(colours.values())) == 3
    figure = throughput(table[table["name"] != "tp_2"], colours)
    assert isinstance(figure, Figure)
    assert {line.get_color() for line in figure.axes[0].get_lines() if line.get_linewidth() == 1.6} == {
        colours["tp_1"],
        colours["tp_4"],
    }


def test_scaling_needs_settings_of_different_size() -> None:
    table = points_table([make_result()])
    assert "no two settings" in str(scaling_efficiency(table, setting_colours(table)))
    figure = draw(scaling_efficiency, make_result(), make_result(tp=2, speed=150))
    lows = [min(line.get_ydata()) for line in figure.axes[0].get_lines() if line.get_linewidth() == 1.6]
    assert sorted(lows) == pytest.approx([0.75, 1.0])


def test_memory_bars_are_the_measured_gibibytes() -> None:
    figure = draw(memory, make_result(), make_result(tp=2))
    widths = [[round(bar.get_width(), 2) for bar in bars] for bars in figure.axes[0].containers]  # type: ignore[attr-defined]
    assert widths == [[12.6, 6.3], [50.0, 50.0], [64.0, 64.0]]


def test_unlike_groups_get_plots_of_their_own(tmp_path: Path) -> None:
    paths, left_out = draw_all(points_table([make_result(), make_result(gpu="NVIDIA H200")]), tmp_path)
    names = {path.name for path in paths}
    assert {"throughput_group_1.png", "throughput_group_2.png"} <= names
    assert all(path.stat().st_size > 5000 for path in paths)
    assert len(left_out) == 2
    assert plt.get_fignums() == []


def test_a_result_without_any_measured_point_draws_nothing(tmp_path: Path) -> None:
    result = make_result()
    for point in result.points:
        point.status, point.runs = "oom", []
    paths, left_out = draw_all(points_table([result]), tmp_path)
    assert paths == []
    assert len(left_out) == len(PLOTS)
