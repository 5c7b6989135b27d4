"""The plots, judged by the data on their axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from batch_inference import plots
from batch_inference.plots import PLOTS, NothingToShowError, looks, write_plots
from batch_inference.results import Point, Result, save_result
from batch_inference.tables import load_setting, point_table
from builders import make_point, make_result, make_sweep, save_all

SETTINGS = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (1, 2, 1), (1, 4, 1), (2, 2, 1), (4, 2, 1), (2, 4, 1),
            (1, 1, 2), (1, 1, 4), (2, 2, 2)]  # fmt: skip


@pytest.fixture
def table(tmp_path: Path) -> Any:
    def build(results: Sequence[Result]) -> pd.DataFrame:
        return point_table([load_setting(path) for path in save_all(results, tmp_path)])

    return build


def lines(axes: Axes) -> list[list[tuple[float, float]]]:
    """The points of every drawn line that is no lone marker and no reference."""
    return [
        [(float(x), float(y)) for x, y in line.get_xydata()]
        for line in axes.lines
        if line.get_marker() == "None" and line.get_linestyle() != "None" and len(line.get_xdata()) > 0
        and line.get_transform() == axes.transData
    ]  # fmt: skip


def hollow(axes: Axes) -> list[tuple[float, float]]:
    return [
        (float(x), float(y))
        for line in axes.lines
        if line.get_markerfacecolor() == "white"
        for x, y in line.get_xydata()
    ]


def legend_labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


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
    assert short.get_xlabel() == "Batch size [requests]"
    assert legend_labels(figure) == ["tp_1", "tp_2"]


def test_the_batch_axis_is_logarithmic_with_the_real_sizes_as_ticks(table: Any) -> None:
    figure = plots.throughput(table(make_sweep(SETTINGS[:2], batch_sizes=(1, 3, 16))))
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert list(axes.get_xticks()) == [1, 3, 16]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "3", "16"]


def test_too_many_batch_sizes_thin_the_ticks_and_not_the_points(table: Any) -> None:
    sizes = range(1, 65)
    figure = plots.throughput(table(make_sweep(SETTINGS[:1], batch_sizes=sizes, seq_lens=(8, 16, 32))))
    assert len(figure.axes[0].get_xticks()) < 12
    assert [x for x, _ in lines(figure.axes[0])[0]] == list(sizes)


def test_replicas_are_compared_at_equal_global_batch(table: Any) -> None:
    figure = plots.latency(table([make_result("dp_2", [make_point(4, 8, [1.0], replicas=2)], (1, 1, 2))]))
    assert lines(figure.axes[0]) == [[(8, 1.0)]]
    assert figure.axes[0].get_xlabel() == "Global batch size [requests]"


def test_latency_is_drawn_with_its_interval(table: Any) -> None:
    (axes,) = plots.latency(table([make_result(points=[make_point(1, 8, [1.0, 2.0, 3.0])])])).axes
    assert lines(axes) == [[(1, 2.0)]]
    (bar,) = axes.collections[0].get_segments()
    half = 4.303 / math.sqrt(3)
    assert [float(y) for _, y in bar] == pytest.approx([2 - half, 2 + half])
    assert axes.get_ylabel() == "Batch latency, mean [s]"


def test_all_points_of_all_facets_are_within_the_axes(table: Any) -> None:
    points = [make_point(b, n, [n / 10 * f for f in (1, 1.1)]) for n in (8, 32, 64) for b in (1, 4)]
    for draw in (plots.latency, plots.throughput):
        for axes in draw(table([make_result(points=points)])).axes:
            low, high = axes.get_ylim()
            assert low == 0
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
    assert legend_labels(figure) == ["tp_2"]


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
    assert legend_labels(figure)[2] == "Highest use, device"
    assert "79.6 GiB" in axes.texts[0].get_text()


def test_memory_on_a_cpu_is_that_of_the_processes(table: Any) -> None:
    points = [make_point()]
    points[0].runs[0].memory["scope"] = "replica"
    figure = plots.memory(table([make_result(points=points, environment={"device_kind": "cpu"})]))
    assert legend_labels(figure)[2] == "Highest use, replica's processes"
    assert figure.axes[0].texts[:] == []


def test_unknown_memory_is_not_drawn(table: Any) -> None:
    result = make_result(points=[make_point()])
    result.engine = {}
    for run in result.points[0].runs:
        run.memory["used_gib"] = None
    with pytest.raises(NothingToShowError, match="no memory"):
        plots.memory(table([result]))


def test_a_setting_has_the_same_colour_in_every_plot_and_part(table: Any) -> None:
    points = table(make_sweep(SETTINGS))
    look = looks(points)
    part = points[points["setting"].isin(["tp_8", "tp_4"])]
    for draw in (plots.throughput, plots.latency, plots.scaling):
        handles = draw(part).legends[0].legend_handles
        assert [(h.get_color(), h.get_marker()) for h in handles] == [
            (look[name]["color"], look[name]["marker"]) for name in ("tp_4", "tp_8")
        ]
    assert plots.memory(part).axes[0].patches[0].get_facecolor()[:3] == look["tp_4"]["color"]


def test_twelve_settings_are_told_apart(table: Any) -> None:
    seen = looks(table(make_sweep(SETTINGS, batch_sizes=(1,)))).values()
    assert len({(to_hex(look["color"]), look["linestyle"]) for look in seen}) == 12
    assert len({look["marker"] for look in seen}) == 12


def test_every_figure_says_what_it_was_measured_on(table: Any) -> None:
    points = table(make_sweep(SETTINGS[:2]))
    for _, _, draw in PLOTS:
        figure = draw(points)
        assert figure.get_figwidth() == plots.WIDTH_IN
        for fact in ("NVIDIA H100", "Llama-2-7b-chat-hf", "vLLM 0.32.0", "bfloat16"):
            assert fact in texts(figure)


def test_a_name_with_a_leading_underscore_is_in_the_legend(table: Any) -> None:
    figure = plots.throughput(table([make_result("_hidden", [make_point()])]))
    assert legend_labels(figure) == [" _hidden"]


def test_the_legend_covers_no_data(table: Any) -> None:
    for count, lengths in ((2, (8,)), (6, (8, 16, 32)), (12, (8, 16, 32))):
        figure = plots.throughput(table(make_sweep(SETTINGS[:count], seq_lens=lengths)))
        figure.canvas.draw()
        box = figure.legends[0].get_window_extent()
        assert box.y0 >= 0
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert all(box.y1 <= axes.get_tightbbox().y0 for axes in figure.axes)


# --- files --------------------------------------------------------------------------------------------------------


def test_every_plot_becomes_a_png_and_an_empty_one_a_reason(table: Any, tmp_path: Path) -> None:
    written, missing = write_plots(table(make_sweep(SETTINGS[:1], batch_sizes=(1, 2))), tmp_path)
    assert [path.name for _, path in written] == ["throughput.png", "latency.png", "memory.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for _, path in written)
    assert missing == ["Scaling efficiency: every measured setting has the same number of devices"]


def test_unlike_things_get_figures_of_their_own(table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "PLOTS", PLOTS[:1])
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: saved.append(self))
    other = make_result("b", [make_point()], engine={"dtype": "float16"})
    written, _ = write_plots(table([make_result(points=[make_point()]), other]), tmp_path)
    assert [path.name for _, path in written] == ["throughput_group_1.png", "throughput_group_2.png"]
    assert [title[-9:] for title, _ in written] == ["(group 1)", "(group 2)"]
    assert [figure.texts[0].get_text()[-9:] for figure in saved] == ["(group 1)", "(group 2)"]


def test_plots_of_an_earlier_analysis_do_not_stay(table: Any, tmp_path: Path) -> None:
    for name in ("throughput.png", "throughput_group_7.png", "mine.png"):
        (tmp_path / name).touch()
    failed = make_result(points=[Point(1, 8, 4, "oom", reason="x")])
    write_plots(table([failed]), tmp_path)
    assert not list(tmp_path.glob("throughput*.png"))
    assert (tmp_path / "mine.png").exists()


def test_nothing_measured_is_said_for_every_plot(table: Any, tmp_path: Path) -> None:
    failed = make_result(points=[Point(1, 8, 4, "oom", reason="x")])
    failed.engine = {}
    for results in ([failed], [make_result(status="failed")]):
        written, missing = write_plots(table(results), tmp_path)
        assert written == []
        assert len(missing) == len(PLOTS)


def test_names_from_files_are_text_and_no_formula(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    paths = [tmp_path / f"{number}.json" for number in range(4)]
    for path, name in zip(paths, [r"$\frac{$", "_hidden", "型号", "x" * 300], strict=True):
        save_result(make_result(name, [make_point()], config={"model": r"$\sqrt{"}), path)
    written, _ = write_plots(point_table([load_setting(path) for path in paths]), tmp_path)
    assert len(written) == 3
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message) or "legend" in str(warning.message)]
    assert mpl.rcParams["text.parse_math"] is True
