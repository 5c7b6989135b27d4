"""The plots, judged by the data on their axes."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from batch_inference.analyze import plot_looks, plot_style, plots
from batch_inference.analyze.answers import Group, Question, analyse
from batch_inference.analyze.plot_colors import STYLES, color, contrast, shade, text_on
from batch_inference.analyze.plot_looks import looks, named, prepared
from batch_inference.analyze.plot_style import FRONT, NothingToShowError
from batch_inference.analyze.plots import PLOTS, write_plots
from batch_inference.analyze.tables import load_setting
from batch_inference.analyze.wording import short_names
from batch_inference.core.result_file import save_result
from batch_inference.core.results import EngineInfo, Point, Result
from builders import make_point, make_result, make_run, make_sweep, save_all

SETTINGS = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (1, 2, 1), (1, 4, 1), (2, 2, 1), (4, 2, 1), (2, 4, 1),
            (1, 1, 2), (1, 1, 4), (2, 2, 2)]  # fmt: skip
pytestmark = pytest.mark.usefixtures("coarse_plots")


@pytest.fixture
def table(tmp_path: Path) -> Any:
    def build(results: Sequence[Result]) -> pd.DataFrame:
        return analyse([load_setting(path) for path in save_all(results, tmp_path)], Question()).points

    return build


@pytest.fixture
def groups(tmp_path: Path) -> Any:
    def build(results: Sequence[Result], question: Question | None = None) -> list[Group]:
        settings = [load_setting(path) for path in save_all(results, tmp_path)]
        return analyse(settings, question or Question()).groups

    return build


def lines(axes: Axes) -> list[list[tuple[float, float]]]:
    """The points of every drawn line that is no lone marker and no reference."""
    return [
        [(float(x), float(y)) for x, y in line.get_xydata()]
        for line in axes.lines
        if line.get_marker() == "None" and line.get_linestyle() != "None" and len(line.get_xdata()) > 0
        and line.get_gid() != "thin"
        and line.get_transform() == axes.transData
    ]  # fmt: skip


def hollow(axes: Axes) -> list[tuple[float, float]]:
    return [
        (float(x), float(y))
        for line in axes.lines
        if line.get_markerfacecolor() == color("paper")
        for x, y in line.get_xydata()
    ]


def legend_labels(figure: Figure) -> list[str]:
    """Row by row, without what fills the columns."""
    found = []
    for legend in figure.legends:
        texts = [text.get_text() for text in legend.get_texts()]
        rows = len(texts) // legend._ncols
        found += [text for row in range(rows) for text in texts[row::rows] if text != " "]
    return found


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.texts)


def test_throughput_is_drawn_against_batch_size_with_a_facet_per_length(table: Any) -> None:
    one = make_result("tp_1", [make_point(b, n, [b / 2]) for n in (8, 16) for b in (4, 1)])
    two = make_result("tp_2", [make_point(b, 8, [b / 4]) for b in (1, 4)], (2, 1, 1))
    figure = plots.throughput(table([one, two]))
    short, long = figure.axes
    assert [short.get_title(), long.get_title()] == ["8 prompt tokens", "16 prompt tokens"]
    assert lines(short) == [[(1, 64), (4, 64)], [(1, 128), (4, 128)]]
    assert lines(long) == [[(1, 64), (4, 64)]]
    assert short.get_ylabel() == "Output throughput [tok/s]"
    assert short.get_xlabel() == "Batch size [requests], log scale"
    assert legend_labels(figure) == ["tp_1", "tp_2"]


def test_the_batch_axis_is_logarithmic_with_the_real_sizes_as_ticks(table: Any) -> None:
    figure = plots.throughput(table(make_sweep(SETTINGS[:2], batch_sizes=(1, 3, 16))))
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert list(axes.get_xticks()) == [1, 3, 16]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "3", "16"]


@pytest.mark.slow
def test_too_many_batch_sizes_thin_the_ticks_and_not_the_points(table: Any) -> None:
    sizes = range(1, 65)
    figure = plots.throughput(table(make_sweep(SETTINGS[:1], batch_sizes=sizes, seq_lens=(8, 16, 32))))
    assert len(figure.axes[0].get_xticks()) < 12
    assert [x for x, _ in lines(figure.axes[0])[0]] == list(sizes)


def test_replicas_are_compared_at_equal_global_batch(table: Any) -> None:
    figure = plots.latency(table([make_result("dp_2", [make_point(4, 8, [1.0], replicas=2)], (1, 1, 2))]))
    assert lines(figure.axes[0]) == [[(8, 1.0)]]
    assert figure.axes[0].get_xlabel() == "Global batch size [requests], log scale"


def test_throughput_is_drawn_with_its_interval(table: Any) -> None:
    (axes,) = plots.throughput(table([make_result(points=[make_point(1, 8, [1.0, 2.0, 3.0])])])).axes
    assert lines(axes) == [[(1, 16.0)]]
    (bar,) = axes.collections[0].get_segments()
    half = 1.4 * 16 * 4.303 / math.sqrt(3) / 2
    assert [float(y) for _, y in bar] == pytest.approx([16 - half, 16 + half])
    assert axes.get_ylabel() == "Output throughput [tok/s]"


def test_the_latency_of_a_batch_is_the_mean_of_its_runs_with_its_interval(table: Any) -> None:
    """Of a few runs percentile 99 would be their maximum."""
    figure = plots.latency(table([make_result(points=[make_point(1, 8, [1.0, 2.0, 3.0])])]))
    (axes,) = figure.axes
    assert lines(axes) == [[(1, 2.0)]]
    (bar,) = axes.collections[0].get_segments()
    half = 1.4 * 4.303 / math.sqrt(3)
    assert [float(y) for _, y in bar] == pytest.approx([2 - half, 2 + half], rel=1e-3)
    assert axes.get_ylabel() == "Batch latency, mean [s]"
    assert not [line for line in axes.lines if line.get_gid() == "thin"]
    assert legend_labels(figure) == ["tp_1"]


@pytest.mark.parametrize(
    ("draw", "factor", "label"),
    [(plots.ttft, 0.1, "Time to first token (TTFT), p50 [s]"),
     (plots.tpot, 900 / 31, "Time per output token (TPOT), p50 [ms]")],
)  # fmt: skip
def test_percentiles_are_a_line_at_the_median_and_a_thin_one_at_p99_of_a_hundred_requests(
    table: Any, draw: Any, factor: float, label: str
) -> None:
    few, enough = make_point(33, 8, [1.0, 2.0, 3.0]), make_point(34, 8, [1.0, 2.0, 3.0])
    figure = draw(table([make_result(points=[few, enough])]))
    (axes,) = figure.axes
    assert lines(axes) == [[(33, pytest.approx(2.0 * factor)), (34, pytest.approx(2.0 * factor))]]
    (thin,) = [line for line in axes.lines if line.get_gid() == "thin"]
    assert list(thin.get_ydata()) == pytest.approx([math.nan, 3.0 * factor], nan_ok=True)
    assert axes.get_ylabel() == label
    assert legend_labels(figure)[1:] == [
        "thin line: 99th percentile, where 100 requests or more were timed; thick line: median"
    ]
    assert legend_labels(draw(table([make_result(points=[enough])])))[1:] == [
        "thin line: 99th percentile; thick line: median"
    ]
    (axes,) = draw(table([make_result(points=[few])])).axes
    assert not [line for line in axes.lines if line.get_gid() == "thin"]


@pytest.mark.slow
def test_all_points_of_all_facets_are_within_the_axes(table: Any) -> None:
    points = [make_point(b, n, [n / 10 * f for f in (1, 1.1)]) for n in (8, 32, 64) for b in (1, 4)]
    for draw in (plots.latency, plots.throughput):
        for axes in draw(table([make_result(points=points)])).axes:
            low, high = axes.get_ylim()
            assert all(low <= y <= high for line in lines(axes) for _, y in line)


def test_latencies_that_span_decades_get_a_logarithmic_axis(table: Any) -> None:
    (axes,) = plots.latency(table([make_result(points=[make_point(1, 8, [0.01]), make_point(2, 8, [5.0])])])).axes
    assert axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    assert low < 0.01
    assert high > 5


def test_points_not_to_rely_on_are_hollow_and_the_legend_says_so(table: Any) -> None:
    points = [make_point(1, 8, [1.0]), make_point(2, 8, [2.0], verdict="suspect"), make_point(4, 8, [4.0])]
    figure = plots.latency(table([make_result(points=points)]))
    assert hollow(figure.axes[0]) == [(2, 2.0)]
    assert "hollow: suspect or invalid" in legend_labels(figure)


def test_efficiency_is_drawn_against_the_baseline_and_the_ideal_line(table: Any) -> None:
    one = make_result("tp_1", [make_point(4, 8, [1.0])])
    two = make_result("tp_2", [make_point(4, 8, [0.625])], (2, 1, 1))
    figure = plots.scaling(table([one, two]))
    (axes,) = figure.axes
    assert lines(axes) == [[(4, pytest.approx(0.8))]]
    assert any(list(line.get_ydata()) == [1, 1] for line in axes.lines)
    assert axes.get_ylim()[1] > 1
    assert "against tp_1" in texts(figure)
    assert legend_labels(figure) == ["tp_2", "ideal"]


def test_weak_scaling_is_drawn_at_equal_batch_per_replica(table: Any) -> None:
    one = make_result("tp_1", [make_point(4, 8, [1.0])])
    two = make_result("dp_2", [make_point(4, 8, [1.25], replicas=2)], (1, 1, 2))
    figure = plots.scaling_weak(table([one, two]))
    assert lines(figure.axes[0]) == [[(4, pytest.approx(0.8))]]
    assert figure.axes[0].get_xlabel() == "Batch size per replica [requests], log scale"
    with pytest.raises(NothingToShowError, match="no setting has replicas"):
        plots.scaling_weak(table(make_sweep(SETTINGS[:2])))


def test_strong_and_weak_scaling_are_drawn_each_with_its_own_efficiency(table: Any) -> None:
    one = make_result("tp_1", [make_point(b, 8, [1.0]) for b in (2, 4)])
    points = table([one, make_result("dp_2", [make_point(2, 8, [0.8], replicas=2)], (1, 1, 2))])
    assert lines(plots.scaling(points).axes[0]) == [[(4, pytest.approx(0.625))]]
    assert lines(plots.scaling_weak(points).axes[0]) == [[(2, pytest.approx(1.25))]]


def test_efficiency_has_the_interval_of_the_ratio(table: Any) -> None:
    points = table(make_sweep(SETTINGS[:2], batch_sizes=(4,)))
    (axes,) = plots.scaling(points).axes
    (bar,) = axes.collections[0].get_segments()
    row = points[points["setting"] == "tp_2"].iloc[0]
    assert float(bar[1][1] - bar[0][1]) == pytest.approx(2 * row["scaling_efficiency_ci95"])


def test_the_front_is_a_line_through_the_points_that_nothing_beats(table: Any) -> None:
    # Latency and throughput per device: 1 s at 32, 2 s at 64; 2 s at 16 is beaten.
    one = make_result("tp_1", [make_point(1, 8, [1.0]), make_point(4, 8, [2.0])])
    figure = plots.pareto(table([one, make_result("tp_2", [make_point(2, 8, [2.0])], (2, 1, 1))]))
    assert lines(figure.axes[0]) == [[(1.0, 32.0), (2.0, 64.0)]]
    # Up to the latency of the next point nothing more is had than at this one.
    assert "steps-post" in [line.get_drawstyle() for line in figure.axes[0].lines]
    marks = {(float(x), float(y)) for line in figure.axes[0].lines for x, y in line.get_xydata()}
    assert (2.0, 16.0) in marks


def test_a_front_of_one_point_has_no_line_and_none_in_the_legend(table: Any) -> None:
    assert FRONT not in legend_labels(plots.pareto(table([make_result(points=[make_point()])])))
    assert FRONT in legend_labels(plots.pareto(table(make_sweep(SETTINGS[:2], batch_sizes=(4, 16)))))


def test_a_map_without_numbers_explains_none(table: Any) -> None:
    words = "bold: the highest of its batch size"
    few, many = ([make_result(name, [make_point(size) for size in range(1, 1 + count)]) for name in ("a", "b")]
                 for count in (3, 60))  # fmt: skip
    assert words in legend_labels(plots.heatmap(table(few)))
    figure = plots.heatmap(table(many))
    assert words not in legend_labels(figure)


def test_batch_sizes_below_a_map_have_room(table: Any) -> None:
    sizes = [1000 * number for number in range(1, 29)]
    both = [make_result("a", [make_point(size) for size in sizes]), make_result("b", [make_point(1000)])]
    figure = plots.heatmap(table(both))
    axes = figure.axes[0]
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert len(boxes) > 3
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_the_roof_is_bandwidth_left_of_the_ridge_and_arithmetic_right_of_it(table: Any) -> None:
    points = table([make_result(points=[make_point(1, 8), make_point(2, 8)])]).assign(mfu=[0.1, 0.4], mbu=[0.5, 0.2])
    figure = plots.roofline(points)
    line, roof = lines(figure.axes[0])
    assert line == [(pytest.approx(0.2), 0.1), (pytest.approx(2.0), 0.4)]
    assert roof[1] == (1, 1)
    assert all(y <= min(x, 1) for x, y in line)


@pytest.mark.parametrize("columns", [{}, {"mfu": math.nan, "mbu": math.nan}, {"mfu": 0.2}])
def test_unknown_utilisation_is_not_drawn(table: Any, columns: dict[str, float]) -> None:
    with pytest.raises(NothingToShowError, match="no point has both numbers"):
        plots.roofline(table([make_result(points=[make_point()])]).assign(**columns))


def test_energy_is_drawn_where_it_is_known(table: Any) -> None:
    known = make_point(4)
    known.runs = [make_run(1.0, requests=4, energy_j=64.0)]
    (axes,) = plots.energy(table([make_result(points=[make_point(1), known])])).axes
    assert lines(axes) == [[(4, 0.5)]]
    with pytest.raises(NothingToShowError, match="no point has this number"):
        plots.energy(table([make_result(points=[make_point(1)])]))


def test_the_heat_map_has_a_cell_per_batch_and_length_and_none_where_nothing_is(table: Any) -> None:
    figure = plots.heatmap(table([make_result(points=[make_point(1, 8, [1.0]), make_point(4, 16, [1.0])])]))
    cells = figure.axes[0].images[0].get_array()
    assert cells[0, 0] == 32
    assert cells[1, 1] == 128
    assert cells.mask.tolist() == [[False, True], [True, False]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["32.00", "128.0"]


def test_the_heat_map_of_many_settings_shows_the_best_at_each_place(table: Any) -> None:
    figure = plots.heatmap(table(make_sweep(SETTINGS, batch_sizes=(4, 8), seq_lens=(8, 16))))
    assert "the best of 12 settings" in texts(figure)
    assert len(figure.axes) == 2  # one map and its scale
    assert "tp_8" in {text.get_text().split("\n")[-1] for text in figure.axes[0].texts}


def test_equal_device_counts_leave_no_scaling_to_show(table: Any) -> None:
    with pytest.raises(NothingToShowError, match="same number of devices"):
        plots.scaling(table(make_sweep([(2, 1, 1), (1, 2, 1)])))


def test_no_common_batch_leaves_no_scaling_to_show(table: Any) -> None:
    results = [make_result("tp_1", [make_point(1)]), make_result("tp_2", [make_point(2)], (2, 1, 1))]
    with pytest.raises(NothingToShowError, match="baseline, tp_1"):
        plots.scaling(table(results))


def test_memory_is_drawn_per_setting_with_the_highest_use(table: Any) -> None:
    figure = plots.memory(table(make_sweep(SETTINGS[:2])))
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["tp_1", "tp_2"]
    assert [float(bar.get_width()) for bar in axes.patches] == pytest.approx([12.6, 6.3, 40.0, 40.0])
    assert [float(bar.get_x()) for bar in axes.patches] == pytest.approx([0, 0, 12.6, 6.3])
    assert legend_labels(figure)[2] == "Highest use seen, device"
    assert [text.get_text() for text in axes.texts] == ["12.6", "6.3", "40.0", "40.0", "memory of a device, 79.6 GiB"]
    assert axes.get_xlabel() == "Memory of a device [GiB]"
    assert "The diamond is the highest use that the device reported" in texts(figure).replace("\n", " ")


def test_memory_on_a_cpu_is_that_of_the_processes(table: Any) -> None:
    points = [make_point()]
    points[0].runs[0].memory.scope = "replica"
    figure = plots.memory(table([make_result(points=points, environment={"device_kind": "cpu"})]))
    assert legend_labels(figure)[2] == "Highest use seen, replica's processes"
    assert "diamond" not in texts(figure)
    # What processes use together is on no axis with what a device has.
    device, processes = figure.axes
    assert [float(bar.get_width()) for bar in device.patches] == pytest.approx([12.6, 40.0])
    assert [float(bar.get_width()) for bar in processes.patches] == [60.0]
    assert (device.get_xlabel(), processes.get_xlabel()) == (
        "Memory of a device [GiB]", "Memory of a replica's processes [GiB]",
    )  # fmt: skip


def test_activations_and_the_peak_are_drawn_where_they_are_known(table: Any) -> None:
    points = table(make_sweep(SETTINGS[:1])).assign(activations_gib=2.0, memory_peak_gib=70.0)
    (axes,) = plots.memory(points).axes
    assert [float(bar.get_width()) for bar in axes.patches] == pytest.approx([12.6, 2.0, 40.0])
    assert float(axes.patches[2].get_x()) == pytest.approx(14.6)
    assert float(axes.lines[0].get_xdata()[0]) == 70.0
    (axes,) = plots.memory(points.assign(activations_gib=math.nan, memory_peak_gib=math.nan)).axes
    assert len(axes.patches) == 2
    assert float(axes.lines[0].get_xdata()[0]) == 60.0


def test_the_mark_is_at_the_highest_use_of_all_points_of_a_setting(table: Any) -> None:
    points = [make_point(b, runs=[make_run(1.0, requests=b, memory={"used_gib": [gib]})]) for b, gib in
              ((1, 50.0), (2, 70.0), (4, 60.0))]  # fmt: skip
    (axes,) = plots.memory(table([make_result(points=points)])).axes
    assert float(axes.lines[0].get_xdata()[0]) == 70.0


def test_the_map_of_many_settings_holds_the_highest_number_of_each_place(table: Any) -> None:
    results = [make_result(f"s{number}", [make_point(1, n, [1.0 + number]) for n in (8, 16)]) for number in range(8)]
    figure = plots.heatmap(table(results))
    assert figure.axes[0].images[0].get_array().tolist() == [[32.0], [32.0]]
    assert "s0" in {text.get_text().split("\n")[-1] for text in figure.axes[0].texts}


def test_unknown_memory_is_not_drawn(table: Any) -> None:
    result = make_result(points=[make_point()])
    result.engine = EngineInfo("0.32.0")
    for run in result.points[0].runs:
        run.memory.used_gib = None
    with pytest.raises(NothingToShowError, match="no memory"):
        plots.memory(table([result]))


def test_a_setting_has_the_same_colour_in_every_plot_and_part(table: Any) -> None:
    (points,) = prepared([table(make_sweep(SETTINGS))])
    look = looks(points)
    part = points[points["setting"].isin(["tp_8", "tp_4"])]
    for draw in (plots.throughput, plots.latency, plots.scaling):
        handles = draw(part).legends[0].legend_handles
        assert [(h.get_color(), h.get_marker()) for h in handles[:2]] == [
            (look[name]["color"], look[name]["marker"]) for name in ("tp_4", "tp_8")
        ]


def test_twelve_settings_are_told_apart(table: Any) -> None:
    seen = looks(table(make_sweep(SETTINGS, batch_sizes=(1,)))).values()
    assert len({(to_hex(look["color"]), look["linestyle"]) for look in seen}) == 12
    assert len({look["marker"] for look in seen}) == 12


@pytest.mark.slow
def test_every_figure_says_what_it_was_measured_on(table: Any) -> None:
    points = table(make_sweep([(1, 1, 1), (1, 1, 2)], batch_sizes=(1, 2))).assign(
        mfu=0.2, mbu=0.3, energy_j_per_output_token=1.0
    )
    for _, _, draw in PLOTS:
        figure = draw(points)
        assert figure.get_figwidth() == plot_style.WIDTH_IN
        for fact in ("NVIDIA H100", "Llama-2-7b-chat-hf", "vLLM 0.32.0", "bfloat16"):
            assert fact in texts(figure)


def test_a_name_with_a_leading_underscore_is_in_the_legend(table: Any) -> None:
    figure = plots.throughput(table([make_result("_hidden", [make_point()])]))
    assert legend_labels(figure) == [" _hidden"]


@pytest.mark.slow
def test_the_legend_covers_no_data(table: Any) -> None:
    for count, lengths in ((2, (8,)), (6, (8, 16, 32)), (12, (8, 16, 32))):
        figure = plots.throughput(table(make_sweep(SETTINGS[:count], seq_lens=lengths)))
        figure.canvas.draw()
        box = figure.legends[0].get_window_extent()
        assert box.y0 >= 0
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert all(box.y1 <= axes.get_tightbbox().y0 for axes in figure.axes)


# --- what a reader can tell apart ---------------------------------------------------------------------------------

NINE = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 4, 1), (1, 1, 2), (1, 1, 4), (2, 1, 2), (2, 2, 1)]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_settings_of_a_family_share_a_hue_and_none_looks_like_another(table: Any, theme: Any) -> None:
    with mpl.rc_context(STYLES[theme]):
        seen = looks(table(make_sweep(SETTINGS[:11], batch_sizes=(1,))))
        assert all(contrast(look["color"], color("paper")) >= 3 for look in seen.values())
        assert seen["tp_2"]["color"] == shade("tp", 0)
        assert seen["tp_8"]["color"] == shade("tp", 2)
        assert seen["dp_4"]["color"] == shade("dp", 1)
        assert seen["tp_2_pp_2"]["color"] == shade("mixed", 0)
    assert len({look["color"] for look in seen.values()}) == len({look["marker"] for look in seen.values()}) == 11


def test_the_legend_has_a_column_for_each_family_smallest_first(table: Any) -> None:
    figure = plots.throughput(table(make_sweep(NINE)))
    (legend,) = figure.legends
    assert legend._ncols == 4
    assert [text.get_text() for text in legend.get_texts()] == [
        "tp_1", "tp_2", "tp_4", "pp_2", "pp_4", " ", "dp_2", "dp_4", " ", "tp_2_dp_2", "tp_2_pp_2", " ",
    ]  # fmt: skip


def test_many_settings_of_one_family_have_colours_as_unlike_as_can_be(table: Any) -> None:
    points = table([make_result(f"s{number}", [make_point()]) for number in range(7)])
    assert len({look["color"] for look in looks(points).values()}) == 7


def test_settings_at_the_same_place_stand_within_each_other(table: Any) -> None:
    """Of replicas throughput per device and latency are those of the setting without them."""
    one = make_result("tp_1", [make_point(b, 8, [1.0 + b]) for b in (4, 8)])
    two = make_result("dp_2", [make_point(b, 8, [1.0 + b], replicas=2) for b in (4, 8)], (1, 1, 2))
    (axes,) = plots.pareto(table([one, two])).axes
    sizes = {
        (to_hex(line.get_color()), line.get_markersize()) for line in axes.lines if line.get_marker() in ("o", "^")
    }
    assert sizes == {(shade("one", 0), 8.5), (shade("dp", 0), 5.0)}
    # A number for both; the batch size of a replica.
    assert sorted(text.get_text() for text in axes.texts) == ["4", "8"]


@pytest.mark.slow
def test_larger_marks_are_explained_where_there_are_some_and_nowhere_else(table: Any) -> None:
    results = [make_result(name, [make_point(b, 8, [1.0]) for b in (1, 2)], sizes)
               for name, sizes in (("dp_2", (1, 1, 2)), ("tp_2", (2, 1, 1)))]  # fmt: skip
    key = "larger mark: another one lies on it"
    for draw in (plots.throughput, plots.pareto):
        (points,) = prepared([table(results[:1])])
        assert key not in legend_labels(plots.with_its_keys(draw, points))
    same = [make_result(name, [make_point(b, 8, [1.0]) for b in (1, 2)], (2, 1, 1)) for name in ("a", "b")]
    (points,) = prepared([table(same)])
    for draw in (plots.throughput, plots.pareto):
        figure = plots.with_its_keys(draw, points)
        assert key in legend_labels(figure)
        assert len(legend_labels(figure)) == len(legend_labels(draw(points))) + 1


def test_a_line_under_another_is_wider(table: Any) -> None:
    one, two = (make_result(name, [make_point(b, 8, [1.0 + b]) for b in (4, 8)]) for name in ("a", "b"))
    (axes,) = plots.throughput(table([one, two])).axes
    assert [line.get_linewidth() for line in axes.lines if line.get_marker() == "None"] == [4.0, 1.4]


def test_the_front_has_intervals_in_both_directions_and_numbers_at_its_points(table: Any) -> None:
    figure = plots.pareto(table(make_sweep(SETTINGS[:2], batch_sizes=(4, 16))))
    (axes,) = figure.axes
    assert sorted(text.get_text() for text in axes.texts) == ["16", "16", "4", "4"]
    assert legend_labels(figure)[-1] == "number: batch size per replica"
    # A bar along each axis for each setting.
    assert len(axes.collections) == 4


@pytest.mark.slow
def test_of_a_cloud_the_first_alone_have_numbers(table: Any) -> None:
    points = [make_point(b, 8, [1 + b / 10]) for b in range(1, 202)]
    assert len(plots.pareto(table([make_result(points=points[:200])])).axes[0].texts) > 40
    assert 0 < len(plots.pareto(table([make_result(points=points)])).axes[0].texts) <= 40


def test_an_axis_of_efficiencies_begins_where_they_do(table: Any) -> None:
    one = make_result("tp_1", [make_point(4, 8, [1.0])])
    (axes,) = plots.scaling(table([one, make_result("tp_2", [make_point(4, 8, [0.6])], (2, 1, 1))])).axes
    assert axes.get_ylim() == (pytest.approx(0.8), pytest.approx(1.05))


def test_the_roofline_says_in_words_how_to_read_it(table: Any) -> None:
    points = table([make_result(points=[make_point(1, 8), make_point(2, 8)])]).assign(mfu=[0.1, 0.4], mbu=[0.5, 0.2])
    figure = plots.roofline(points)
    assert "its height over that of the roof is its MBU" in texts(figure).replace("\n", " ")
    assert figure.axes[0].get_xlabel() == "MFU / MBU, 1 = ridge, log scale"


def test_a_map_marks_what_not_to_rely_on_and_says_what_was_not_measured(table: Any) -> None:
    one = make_result("tp_1", [make_point(1, 8, [1.0]), make_point(4, 8, [1.0], verdict="suspect")])
    figure = plots.heatmap(table([one, make_result("tp_2", [make_point(1, 8, [0.5])], (2, 1, 1))]))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["tp_1", "tp_2"]
    assert [(text.get_text(), text.get_fontweight()) for text in axes.texts] == [
        ("32.00", "normal"), ("128.0*", "bold"), ("64.00", "bold"),
    ]  # fmt: skip
    assert legend_labels(figure) == ["*: suspect or invalid", "not measured", "bold: the highest of its batch size"]
    assert to_hex(axes.get_facecolor()) == color("blank")
    assert legend_labels(plots.heatmap(table([one]))) == ["*: suspect or invalid"]


def test_numbers_in_cells_and_bars_can_be_read(table: Any) -> None:
    """As WCAG 2 asks of text: a contrast of 4.5."""
    points = [make_point(b, n, [b**0.1]) for b in (1, 2, 4, 8, 16, 32, 64) for n in (8, 16)]
    axes = plots.heatmap(table([make_result(points=points)])).axes[0]
    (image,) = axes.images
    assert len(axes.texts) == 14
    for text in axes.texts:
        column, row = (round(place) for place in text.get_position())
        cell = image.cmap(image.norm(image.get_array()[row, column]))
        assert contrast(text.get_color(), cell) >= 4.5
    for theme in STYLES:
        with mpl.rc_context(STYLES[theme]):
            for part in ("weights", "activations", "kv_pool"):
                assert contrast(text_on(color(part)), color(part)) >= 4.5
            assert contrast(color("ink"), color("paper")) >= 4.5
            assert contrast(color("soft"), color("paper")) >= 4.5


@pytest.mark.slow
def test_the_best_of_many_settings_is_named_where_that_has_room(table: Any) -> None:
    settings = [(2, 2, 2), *SETTINGS[:6]]
    (axes, _) = plots.heatmap(table(make_sweep(settings, batch_sizes=range(1, 7), seq_lens=(8, 16)))).axes
    names = {text.get_text().split("\n", 1)[-1] for text in axes.texts}
    assert names == {"tp_8", "tp_2_pp_2_\ndp_2"}
    (axes, _) = plots.heatmap(table(make_sweep(settings, batch_sizes=range(1, 40), seq_lens=(8, 16)))).axes
    assert {text.get_text() for text in axes.texts} == {""}


def test_two_names_never_become_one() -> None:
    assert list(short_names(["tp_2_" + "x" * 30, "b"], 12).values()) == ["tp_2_x…xxxxx", "b"]
    # Each shows where it is unlike the other, or the whole of itself.
    long = ["x" * 30 + f"_{number}_" + "y" * 30 for number in range(2)]
    assert list(short_names(["a", *long], 14).values()) == ["a", "xxxx…xx_0…yyyy", "xxxx…xx_1…yyyy"]
    longer = [one + f"_{number}_" + other for one in long for number in range(2) for other in ("z" * 40,)]
    assert short_names(longer, 14) == {name: name for name in longer}


# --- many ---------------------------------------------------------------------------------------------------------

MANY = [(tp, pp, dp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4) for dp in (1, 2, 4)]


@pytest.mark.slow
def test_of_many_settings_the_best_are_named_and_the_others_a_range(groups: Any) -> None:
    (points,) = prepared([group.points for group in groups(make_sweep(MANY, batch_sizes=(1, 4, 16)))])
    names = named(points)
    assert len(names) == plot_looks.NAMED
    assert "tp_8_pp_4_dp_4" in names
    look = looks(points)
    assert len({to_hex(look[name]["color"]) for name in names}) == plot_looks.NAMED
    figures = {draw: draw(points) for draw in (plots.throughput, plots.latency, plots.pareto)}
    for figure in figures.values():
        assert f"{plot_looks.NAMED} leading settings of 36; grey:" in texts(figure).replace("\n", " ")
        assert len(legend_labels(figure)) <= plot_looks.NAMED + 2
    (band,) = [
        item
        for item in figures[plots.latency].axes[0].collections
        if type(item).__name__ == "FillBetweenPolyCollection"
    ]
    low, high = band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()
    others = points[~points["setting"].isin(names)]["latency_mean_s"]
    assert (low, high) == pytest.approx((others.min(), others.max()))


def test_the_best_of_many_are_those_that_are_faster(table: Any) -> None:
    points = table([make_result(f"s{latency_s:02}", [make_point(1, 8, [latency_s])]) for latency_s in range(1, 15)])
    assert named(points) == [f"s{latency_s:02}" for latency_s in range(1, plot_looks.NAMED + 1)]


@pytest.mark.slow
def test_of_many_lengths_some_are_drawn_and_that_is_said(table: Any) -> None:
    figure = plots.throughput(table(make_sweep(SETTINGS[:1], batch_sizes=(1, 2), seq_lens=range(8, 48))))
    assert len(figure.axes) == plot_style.FACETS
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:: plot_style.FACETS - 1] == ["8 prompt tokens", "47 prompt tokens"]
    assert "(12 of 40 prompt lengths)" in texts(figure)


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_plot_becomes_a_png_and_an_svg_and_an_empty_one_a_reason(groups: Any, tmp_path: Path) -> None:
    written, missing = write_plots(groups(make_sweep(SETTINGS[:1], batch_sizes=(1, 2))), tmp_path)
    names = ["throughput", "latency", "ttft", "tpot", "pareto", "heatmap", "memory"]
    assert [path.name for _, path in written] == [f"{name}.png" for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") for _, path in written)
    assert all("<svg" in path.with_suffix(".svg").read_text() for _, path in written)
    light, dark = (tmp_path / f"throughput{end}.svg" for end in ("", "_dark"))
    papers = [re.findall(r"fill: (#[0-9a-f]{6})", file.read_text())[0] for file in (light, dark)]
    assert papers == ["#ffffff", "#12161c"]
    assert missing == [
        "Scaling efficiency, strong: every measured setting has the same number of devices",
        "Scaling efficiency, weak: no setting has replicas",
        "Energy per output token: no point has this number",
        "MFU and MBU against the roofline: no point has both numbers",
    ]


def test_the_user_picks_plots(groups: Any, tmp_path: Path) -> None:
    written, missing = write_plots(groups(make_sweep(SETTINGS[:1])), tmp_path, ["memory", "energy"])
    assert [path.name for _, path in written] == ["memory.png"]
    assert len(missing) == 1


@pytest.mark.slow
def test_the_same_results_are_the_same_svg(groups: Any, tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        write_plots(groups(make_sweep(SETTINGS[:1])), tmp_path, ["throughput"])
        found.append((tmp_path / "throughput.svg").read_bytes())
    assert found[0] == found[1]


@pytest.mark.slow
def test_unlike_things_get_figures_of_their_own(groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: dict[Path, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: saved.update({path: self}))
    other = make_result("b", [make_point()], engine={"dtype": "float16"})
    written, _ = write_plots(groups([make_result(points=[make_point()]), other]), tmp_path, ["throughput"])
    assert [path.name for _, path in written] == ["throughput_group_1.png", "throughput_group_2.png"]
    assert [title[-9:] for title, _ in written] == ["(group 1)", "(group 2)"]
    assert [saved[path].texts[0].get_text()[-9:] for _, path in written] == ["(group 1)", "(group 2)"]


@pytest.mark.slow
def test_mixed_things_are_marked_in_every_title(groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: dict[Path, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: saved.update({path: self}))
    a100 = {"devices": [{"name": "NVIDIA A100"}]}
    results = make_sweep(SETTINGS[:1], (1, 2)) + make_sweep([(1, 1, 2)], (1, 2), environment=a100)
    written, _ = write_plots(groups(results, Question(allow_mixed=True)), tmp_path)
    assert len(written) == 9
    for title, path in written:
        assert "[MIXED: device]" in title
        assert "[MIXED: device]" in saved[path].texts[0].get_text().replace("\n", " ")
        assert "NVIDIA H100 80GB HBM3 + NVIDIA A100" in texts(saved[path])


def test_nothing_measured_is_said_for_every_plot(groups: Any, tmp_path: Path) -> None:
    failed = make_result(points=[Point(1, 8, 4, "oom", reason="x")])
    failed.engine = None
    for results in ([failed], [make_result(status="failed")]):
        written, missing = write_plots(groups(results), tmp_path)
        assert written == []
        assert len(missing) == len(PLOTS)


@pytest.mark.slow
def test_names_from_files_are_text_and_no_formula(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    paths = [tmp_path / f"{number}.json" for number in range(4)]
    for path, name in zip(paths, [r"$\frac{$", "_hidden", "型号", "x" * 300], strict=True):
        save_result(make_result(name, [make_point()], config={"model": r"$\sqrt{"}), path)
    written, _ = write_plots(analyse([load_setting(path) for path in paths], Question()).groups, tmp_path)
    assert len(written) == 7
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message) or "legend" in str(warning.message)]
    assert mpl.rcParams["text.parse_math"] is True


@pytest.mark.parametrize(("highest", "scale"), [(30.0, "linear"), (31.0, "log")])
def test_values_far_apart_have_a_logarithmic_axis(highest: float, scale: str) -> None:
    axes = Figure().add_subplot()
    plot_style.value_axis(axes, 1.0, highest)
    assert axes.get_yscale() == scale
