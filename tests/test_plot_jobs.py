"""The plots of a job, judged by the data on their axes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from test_plots import legend_labels

from batch_inference.analyze import plot_looks, plot_style, plots
from batch_inference.analyze.job_sections import few_words
from batch_inference.analyze.jobs import ALIKE, JobAnswer, JobRow
from batch_inference.analyze.plot_colors import STYLES, color, shade
from batch_inference.analyze.plot_jobs import JOB_PLOTS, job_cost, job_table, job_tables, job_throughput, job_timeline
from batch_inference.analyze.plot_labels import Label, label_marks
from batch_inference.analyze.plot_looks import looks, prepared
from batch_inference.analyze.plot_style import NothingToShowError, in_short
from batch_inference.analyze.plot_timeline import course
from batch_inference.analyze.plots import write_plots
from batch_inference.analyze.queues import QueuePoint, phases
from batch_inference.core.forecast import Forecast
from batch_inference.core.queue_runs import Interval, Phases
from batch_inference.core.results import Timeline, WorkloadKey

pytestmark = pytest.mark.usefixtures("coarse_plots")
PLATEAU = "plateau_output_tok_per_s"
JOB, SAMPLE = SimpleNamespace(requests=4000), "a sample of 100 requests"
ABOUT = {"device_name": "an H100", "model": "a-model", "vllm_version": "1", "dtype": "bfloat16", "quantization": None}


def steady(end_s: float = 10.0, entries: int = 10, rate: float = 100.0, running: float = 8.0) -> Timeline:
    """As many tokens in each second; twice as many of prompts as of outputs."""
    tokens = round(rate * end_s / entries)
    ends_s = [end_s * (index + 1) / entries for index in range(entries)]
    lists = ([20] * entries, [2 * tokens] * entries, [tokens] * entries, [running] * entries, [0] * entries)
    return Timeline(ends_s, *lists)


def queue_point(batch_size: int = 8, plateau: float | None = 100.0, **changes: Any) -> QueuePoint:
    half = changes.pop("half", plateau and plateau / 10)
    summary = {PLATEAU: plateau, "plateau_ci95_tok_per_s": half, "output_tok_per_s": 80.0}
    values: dict[str, Any] = {
        "tokens_per_step": None, "max_tokens": None,
        "workload": WorkloadKey("abc", "file", changes.pop("order", "given")), "job": JOB,
        "verdict": "valid", "replicas": 1, "runs": [], "requests": 100, "latencies_s": [10.0], "power_w": None,
        "summary": summary, "timelines": [steady()], "phases": [Phases(1.0, 8.0, 10.0)], **changes,
    }  # fmt: skip
    return QueuePoint(batch_size=batch_size, **values)


def row(setting: str = "tp_1", hours: float = 2.0, devices: int = 1, **changes: Any) -> JobRow:
    """With an interval of a tenth; `changes` are of the point, but price and has_interval."""
    price, has_interval = changes.pop("price", None), changes.pop("has_interval", True)
    interval = Interval(hours, 0.9 * hours, 1.1 * hours) if has_interval else Interval(hours)
    point = queue_point(**changes)
    return JobRow(setting, devices, devices, point, cast(Forecast, None), interval, 80.0, price, None)


def answer(rows: Sequence[JobRow], **changes: Any) -> JobAnswer:
    values: dict[str, Any] = {"group": tuple(map(ABOUT.get, ALIKE)), "requests": 4000.0, "prompt_tokens": 1.0}
    values |= {"output_tokens": 1.0, "is_cached": False, "output_lengths": "file", "limit": None, "ties": []} | changes
    return JobAnswer(rows=sorted(rows, key=lambda one: one.hours.value), **values)


def table(rows: Sequence[JobRow], settings: Sequence[str] | None = None, **changes: Any) -> pd.DataFrame:
    found = job_table(answer(rows, **changes), settings or list(dict.fromkeys(one.setting for one in rows)))
    return found.assign(_mark="", _about=plot_style.subtitle_of(found))


def marks(axes: Axes) -> list[tuple[float, float]]:
    """Of points, filled or hollow; grey dots are others."""
    return [
        (float(x), float(y))
        for line in axes.lines
        if line.get_linestyle() == "None" and line.get_marker() not in (".", "None", "|", "_")
        for x, y in line.get_xydata()
    ]  # fmt: skip


def lines(axes: Axes, width: float) -> list[tuple[str, list[tuple[float, float]]]]:
    return [
        (line.get_linestyle(), [(float(x), float(y)) for x, y in line.get_xydata()])
        for line in axes.lines
        if line.get_linewidth() == width and line.get_linestyle() != "None" and len(line.get_xdata())
    ]


def bars(axes: Axes) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in segment]
        for collection in axes.collections
        for segment in cast(Any, collection).get_segments()
    ]


def title(figure: Figure) -> str:
    return figure.texts[0].get_text().replace("\n", " ")


def test_a_job_may_be_of_one_request() -> None:
    assert [few_words(answer([], requests=count)) for count in (1.0, 4000.0)] == ["1 request", "4,000 requests"]


# --- over time ----------------------------------------------------------------------------------------------------


def test_replicas_are_summed_on_common_stretches_of_time() -> None:
    """The second one ends at half the time, and has entries of other lengths."""
    point = queue_point(replicas=2, timelines=[steady(10.0, 10, 100.0), steady(5.0, 4, 60.0, running=4.0)])
    found = course(point)
    assert found.edges_s.tolist() == pytest.approx([float(second) for second in range(11)])
    assert found.output_tok_per_s.tolist() == pytest.approx([160.0] * 5 + [100.0] * 5)
    assert found.prompt_tok_per_s.tolist() == pytest.approx([320.0] * 5 + [200.0] * 5)
    assert found.running.tolist() == pytest.approx([12.0] * 5 + [8.0] * 5)


def test_of_a_long_run_no_token_is_lost() -> None:
    found = course(queue_point(timelines=[steady(1000.0, 999, 100.0)]))
    assert len(found.output_tok_per_s) == 80
    assert float((found.output_tok_per_s * 12.5).sum()) == pytest.approx(999 * 100)


@pytest.mark.parametrize(
    ("replicas", "expected"),
    [
        ([(1, 8, 10)], [(0, 1), (1, 8), (8, 10)]),
        ([(1, 8, 10), (2, 7, 12)], [(0, 2), (2, 7), (7, 12)]),
        # Where one drains before the other is full, there is no plateau of both.
        ([(1, 3, 10), (4, 8, 9)], [(0, 3), (3, 3), (3, 10)]),
        ([(5, 5, 9)], [(0, 5), (5, 5), (5, 9)]),
    ],
)
def test_a_plateau_is_where_every_replica_has_one(replicas: Any, expected: Any) -> None:
    assert phases(queue_point(phases=[Phases(*one) for one in replicas])) == expected


def test_a_facet_shows_the_fastest_point_of_a_setting_in_three_panels() -> None:
    rows = [row("tp_1", 2.0), row("tp_1", 4.0, batch_size=4), row("tp_2", 1.0, 2, batch_size=16)]
    figure = job_timeline(table(rows, ["tp_1", "tp_2"]))
    first, second = figure.axes[:2]
    assert [axes.get_title() for axes in (first, second)] == [
        "tp_2\n16 at once; a sample of 100 requests",
        "tp_1\n8 at once; a sample of 100 requests",
    ]
    (rate,) = [patch for patch in first.patches if hasattr(patch, "get_data")]
    assert rate.get_data().values.tolist() == pytest.approx([100.0] * 10)
    assert to_hex(rate.get_edgecolor()) == to_hex(looks(table(rows))["tp_2"]["color"])
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == [
        "Output tok/s", "Prompt\ntok/s", "Requests\nrunning",
    ]  # fmt: skip
    assert [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()] == ["Time [s]"] * 2
    assert first.get_xlim() == (0, 10)
    assert len({axes.get_ylim() for axes in (first, second)}) == 1


def spans(axes: Axes) -> list[tuple[float, float]]:
    boxes = [patch.get_extents().transformed(axes.transData.inverted()) for patch in axes.patches[:3]]
    return [(round(float(box.x0), 6), round(float(box.x1), 6)) for box in boxes]


def test_ramp_plateau_and_drain_are_shaded_and_named() -> None:
    figure = job_timeline(table([row()]))
    assert all(spans(axes) == [(0, 1), (1, 8), (8, 10)] for axes in figure.axes)
    assert [label.split(":")[0] for label in legend_labels(figure)] == [
        "ramp", "plateau", "drain", "mean of the plateau",
    ]  # fmt: skip
    (line,) = figure.axes[0].lines
    assert line.get_xydata().tolist() == [[1, 100], [8, 100]]


def test_the_mean_of_the_plateau_is_that_of_what_is_drawn() -> None:
    """Whatever the stamps of the requests say: here 300 tok/s, while the steps made 100, and 200 from 5 s on."""
    made = steady()
    made.output_tokens[5:] = [200] * 5
    figure = job_timeline(table([row(plateau=300.0, timelines=[made])]))
    (line,) = figure.axes[0].lines
    # 4 s and 3 s of it
    assert [y for _, y in line.get_xydata().tolist()] == pytest.approx([(4 * 100 + 3 * 200) / 7] * 2)


def test_all_facets_have_one_axis_of_time() -> None:
    short = {"phases": [Phases(1.0, 3.0, 4.0)], "timelines": [steady(4.0)]}
    figure = job_timeline(table([row("tp_1", 2.0), row("tp_2", 1.0, 2, **short)]))
    assert {axes.get_xlim() for axes in figure.axes} == {(0, 10)}
    assert len({tuple(axes.get_xticks()) for axes in figure.axes}) == 1


def test_a_run_that_is_many_times_as_long_has_an_axis_of_its_own_and_that_is_said() -> None:
    short = {"phases": [Phases(0.5, 1.5, 2.0)], "timelines": [steady(2.0)]}
    figure = job_timeline(table([row("tp_1", 2.0), row("tp_2", 1.0, 2, **short)]))
    assert {axes.get_xlim() for axes in figure.axes} == {(0, 10), (0, 2)}
    assert "The axes of time are not alike" in figure.texts[1].get_text()
    assert "axes of time" not in job_timeline(table([row()])).texts[1].get_text()


def test_without_a_plateau_none_is_named() -> None:
    figure = job_timeline(table([row(phases=[Phases(6.0, 6.0, 10.0)], plateau=None)]))
    assert [label.split(":")[0] for label in legend_labels(figure)] == ["ramp", "drain"]
    assert not figure.axes[0].lines


def test_the_title_of_a_facet_tells_what_was_run() -> None:
    two = [steady(), steady()]
    rows = [row(replicas=2, timelines=two, tokens_per_step=512, order="longest-first", verdict="suspect")]
    (first, *_) = job_timeline(table(rows)).axes
    assert first.get_title().split("\n") == [
        "tp_1", "2 replicas × 8 at once, summed, 512 tokens per step; longest-first; suspect; a sample of 100",
        "requests",
    ]  # fmt: skip
    (first, *_) = job_timeline(table([row(requests=4000)])).axes
    assert first.get_title() == "tp_1\n8 at once; the whole job"


@pytest.mark.parametrize(("end_s", "unit", "shown"), [(599.0, "s", 599.0), (601.0, "min", 10.0), (10801.0, "h", 3.0)])
def test_time_is_in_a_unit_that_suits(end_s: float, unit: str, shown: float) -> None:
    times = {"phases": [Phases(1.0, end_s / 2, end_s)], "timelines": [steady(end_s)]}
    figure = job_timeline(table([row(**times)]))
    assert figure.axes[-1].get_xlabel() == f"Time [{unit}]"
    assert figure.axes[0].get_xlim()[1] == pytest.approx(shown, rel=0.01)


def test_a_point_that_tells_no_steps_has_no_facet() -> None:
    rows = [row("a", timelines=[]), row("b", 3.0)]
    assert [axes.get_title() for axes in job_timeline(table(rows)).axes] == [
        "b\n8 at once; a sample of 100 requests",
        "",
        "",
    ]
    with pytest.raises(NothingToShowError, match="no point recorded its steps"):
        job_timeline(table(rows[:1]))


# --- hours and cost -----------------------------------------------------------------------------------------------


def test_hours_are_drawn_against_device_hours_with_the_intervals_of_both() -> None:
    figure = job_cost(table([row("tp_1", 4.0), row("tp_2", 3.0, 2)]))
    (axes,) = figure.axes
    assert sorted(marks(axes)) == [(3, 6), (4, 4)]
    expected = [[(2.7, 6), (3.3, 6)], [(3, 5.4), (3, 6.6)], [(3.6, 4), (4.4, 4)], [(4, 3.6), (4, 4.4)]]
    assert sorted(bars(axes)) == [[pytest.approx(end) for end in bar] for bar in expected]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Time of the job [h]", "Device time of the job [device-h]")
    assert legend_labels(figure)[:2] == ["tp_1", "tp_2"]


def test_with_a_price_it_is_the_cost() -> None:
    (axes,) = job_cost(table([row("tp_2", 3.0, 2, price=2.5)])).axes
    assert marks(axes) == [(3, 15)]
    assert axes.get_ylabel() == "Cost of the job"


@pytest.mark.parametrize(("hours", "unit", "time"), [(0.01, "s", 36.0), (0.5, "min", 30.0), (200.0, "h", 200.0)])
def test_the_time_of_a_job_is_in_the_unit_of_its_table(hours: float, unit: str, time: float) -> None:
    (axes,) = job_cost(table([row(hours=hours, devices=2)])).axes
    assert marks(axes) == [(pytest.approx(time), pytest.approx(2 * time))]
    assert f"[{unit}]" in axes.get_xlabel()


def test_the_front_is_a_line_through_the_points_that_nothing_beats() -> None:
    rows = [row("a", 1.0, 8), row("b", 2.0, 2), row("c", 3.0, 2), row("d", 4.0)]
    figure = job_cost(table(rows))
    assert (("-", [(1, 8), (2, 4)])) in lines(figure.axes[0], 1)
    assert plot_style.FRONT in legend_labels(figure)
    # One that beats all others is no line.
    figure = job_cost(table(rows[1:3]))
    assert not any(label.startswith("front") for label in legend_labels(figure))


def test_without_an_interval_there_is_no_bar() -> None:
    (axes,) = job_cost(table([row(has_interval=False, order="longest-first")])).axes
    assert all(start == end for start, end in bars(axes))


@pytest.mark.slow
def test_an_interval_beyond_all_values_does_not_make_the_axis() -> None:
    wide = row("b", 2.0)
    wide = JobRow(**{**wide.__dict__, "hours": Interval(2.0, 0.0, 50.0)})
    (axes,) = job_cost(table([row("a", 1.0), wide])).axes
    assert axes.get_xlim()[1] < 5


def test_marks_are_labelled_by_requests_at_once() -> None:
    rows = [row(hours=8 / size, batch_size=size, tokens_per_step=budget) for size, budget in ((2, 512), (4, 2048))]
    figure = job_cost(table(rows))
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["2/512", "4/2048"]
    assert legend_labels(figure)[-1] == "number: requests at once / tokens per step"
    rows = [row(hours=4.0), row(hours=2.0, order="longest-first")]
    assert sorted(text.get_text() for text in job_cost(table(rows)).axes[0].texts) == ["8", "8 longest-first"]


def crowd(settings: int = 20) -> list[JobRow]:
    sizes = (16, 32, 64, 128, 256)
    return [
        row(f"setting_{number:02}_{'x' * 50}", (1 + 0.1 * number + 40 / size) * (1 + number % 3), 1 + number % 4,
            batch_size=size, verdict="suspect" if number % 5 == 4 else "valid", price=2.0)
        for number, size in itertools.product(range(settings), sizes)
    ]  # fmt: skip


@pytest.mark.parametrize("rows", [crowd(), crowd(4), [row(hours=1 + 0.001 * n, batch_size=n + 1) for n in range(30)]])
def test_no_label_lies_on_another_or_beyond_the_axes(rows: Sequence[JobRow]) -> None:
    with plots.mpl.rc_context(STYLES["light"]):
        figure = job_cost(table(rows))
        figure.canvas.draw()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert boxes
    assert not [1 for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]
    spots = axes.transData.transform(marks(axes))
    assert not [spot for spot, box in itertools.product(spots, boxes) if box.contains(*spot)]
    frame = axes.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 for box in boxes)


def test_a_label_without_room_is_left_out_and_of_marks_on_one_another_the_first_has_one() -> None:
    axes = Figure(figsize=(8, 4)).add_subplot()
    axes.set(xlim=(0, 10), ylim=(0, 10))
    places = [(5.0, 5.0), (5.01, 5.01), (8.0, 8.0)]
    label_marks(axes, list(map(Label, places, ("first", "second", "y" * 300))))
    assert [text.get_text() for text in axes.texts] == ["first"]


# --- requests at once ---------------------------------------------------------------------------------------------


def test_the_plateau_is_drawn_against_requests_at_once_and_the_whole_sample_as_a_thin_line() -> None:
    rows = [row(hours=3.0, batch_size=4, plateau=50.0), row(hours=2.0, batch_size=16, plateau=100.0)]
    figure = job_throughput(table(rows))
    (axes,) = figure.axes
    assert lines(axes, 1.4) == [("-", [(4, 50), (16, 100)])]
    assert lines(axes, 0.6) == [("-", [(4, 80), (16, 80)])]
    assert bars(axes) == [[(4, 45), (4, 55)], [(16, 90), (16, 110)]]
    assert list(axes.get_xticks()) == [4, 16]
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        "Requests at once, log scale", "Output throughput [tok/s]",
    )  # fmt: skip
    assert axes.get_ylim()[1] > 110
    assert legend_labels(figure) == ["tp_1", "thin line: mean of the whole sample, drain included"]


def test_replicas_have_so_many_at_once_each() -> None:
    (axes,) = job_throughput(table([row(replicas=2)])).axes
    assert axes.get_xlabel() == "Requests at once on each replica, log scale"


def test_each_budget_of_tokens_per_step_has_a_line_of_its_own() -> None:
    rows = [row(batch_size=size, tokens_per_step=budget, plateau=budget / 10) for size in (4, 8)
            for budget in (2048, 512)]  # fmt: skip
    figure = job_throughput(table([*rows, row("tp_2", tokens_per_step=512)]))
    styles = [style for style, points in lines(figure.axes[0], 1.4) if len(points) == 2]
    assert styles == ["-", "--"]
    assert legend_labels(figure)[2:4] == ["512 tokens per step", "2048 tokens per step"]
    assert [to_hex(line.get_color()) for line in figure.axes[0].lines if line.get_linewidth() == 1.4] == [
        to_hex(looks(table([*rows, row("tp_2")]))[name]["color"]) for name in ("tp_1", "tp_1", "tp_2")
    ]


def test_each_order_has_a_facet_that_of_the_file_first() -> None:
    rows = [row(hours=1.0, order="longest-first"), row(hours=2.0), row(hours=3.0, order="shuffled")]
    titles = [axes.get_title() for axes in job_throughput(table(rows)).axes]
    assert titles == ["order: given", "order: longest-first", "order: shuffled"]


@pytest.mark.parametrize("changes", [{"plateau": None}, {"half": 100.0}])
def test_without_a_plateau_the_whole_sample_is_drawn_and_the_legend_says_why(changes: dict[str, Any]) -> None:
    """An interval as wide as its value is no plateau either."""
    figure = job_throughput(table([row(**changes)]))
    assert legend_labels(figure)[-1] == "no mark: too few requests for a plateau"
    (axes,) = figure.axes
    assert [line.get_xydata().tolist() for line in axes.lines if line.get_gid() == "thin"] == [[[8, 80]]]
    assert axes.get_ylim()[1] > 80


# --- all of them --------------------------------------------------------------------------------------------------

DRAWS = [draw for _, _, draw in JOB_PLOTS]


@pytest.mark.parametrize("draw", DRAWS)
def test_each_says_of_which_job_and_what_it_was_measured_on(draw: Callable[[pd.DataFrame], Figure]) -> None:
    figure = draw(table([row()]))
    about = figure.texts[1].get_text()
    assert about == "an H100 · a-model · vLLM 1 · bfloat16 · job of 4,000 requests"


@pytest.mark.parametrize("draw", DRAWS[1:])
def test_points_not_to_rely_on_are_hollow(draw: Callable[[pd.DataFrame], Figure]) -> None:
    figure = draw(table([row("a", verdict="suspect"), row("b", 3.0)]))
    drawn = [line for line in figure.axes[0].lines if len(line.get_xdata())]
    hollow = [line for line in drawn if line.get_markerfacecolor() == color("paper")]
    assert len(hollow) == 1
    assert "hollow: suspect or invalid" in legend_labels(figure)


@pytest.mark.parametrize("draw", DRAWS)
def test_no_forecast_leaves_nothing_to_draw(draw: Callable[[pd.DataFrame], Figure]) -> None:
    with pytest.raises(NothingToShowError, match="no point has a forecast"):
        draw(table([]))


@pytest.mark.parametrize("draw", DRAWS)
def test_of_many_settings_the_best_are_drawn_and_the_title_says_so(draw: Callable[[pd.DataFrame], Figure]) -> None:
    (points,) = prepared([table(crowd())])
    figure = draw(points)
    shown = 6 if draw is job_timeline else plot_looks.NAMED
    assert f"({shown} leading settings of 20" in title(figure)
    look = looks(points)
    chosen = plot_looks.named(points)
    assert len({to_hex(look[name]["color"]) for name in chosen}) == plot_looks.NAMED
    assert points.loc[0, "setting"] in chosen
    assert points.sort_values("cost")["setting"].iloc[0] in chosen


@pytest.mark.slow
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("rows", [crowd(), crowd(4), crowd(1)[:1]])
def test_nothing_is_written_beyond_the_sheet_or_over_the_legend(
    draw: Callable[[pd.DataFrame], Figure], rows: Sequence[JobRow]
) -> None:
    with plots.mpl.rc_context(STYLES["light"]):
        figure = draw(table(rows))
        figure.canvas.draw()
    legend = figure.legends[0].get_window_extent()
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert legend.y1 <= box.y0
        assert box.y1 <= figure.texts[1].get_window_extent().y0
    # Titles and numbers of neighbours.
    for one, other in itertools.combinations([axes for axes in figure.axes if axes.get_title()], 2):
        assert not one.title.get_window_extent().overlaps(other.title.get_window_extent())
    ticks = [
        label.get_window_extent()
        for axes in figure.axes
        for label in axes.get_xticklabels()
        if label.get_visible() and label.get_text() and axes.xaxis.get_tick_params()["labelbottom"]
    ]
    assert not [1 for one, other in itertools.combinations(ticks, 2) if one.overlaps(other)]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.00002, "0.00002"), (0.1 + 0.2, "0.3"), (9999.0, "9999"), (12000.0, "12k"), (2.5e7, "25M")],
)
def test_ticks_are_short_and_never_in_powers_of_ten(value: float, text: str) -> None:
    assert in_short(value) == text


# --- files --------------------------------------------------------------------------------------------------------


def analysed(answers: Sequence[JobAnswer]) -> Any:
    names = list(dict.fromkeys(["first", *(row.setting for answer in answers for row in answer.rows)]))
    rows = pd.DataFrame({"setting": pd.Categorical(names, categories=names)})
    return SimpleNamespace(rows=rows, jobs=answers, settings=[])


def test_a_setting_looks_as_it_does_among_all_of_the_analysis() -> None:
    ((mark, job),) = job_tables(analysed([answer([row("tp_2")])]))
    assert mark == ""
    assert list(job["setting"].cat.categories) == ["first", "tp_2"]
    grid = pd.DataFrame({"setting": pd.Categorical(["tp_1", "tp_2"]), "tensor_parallel_size": [1, 2]})
    (points, _) = prepared([job.assign(tensor_parallel_size=2), grid])
    handle = job_throughput(points).legends[0].legend_handles[0]
    # By its family: alone it would have a colour of its own.
    assert (handle.get_color(), handle.get_marker()) == (shade("tp", 0), "s")
    assert looks(job)["tp_2"]["color"] != shade("tp", 0)


def test_the_sizes_of_a_setting_are_those_of_its_file() -> None:
    found = analysed([answer([row("tp_2")])])
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 1, "data_parallel_size": 4}
    one = SimpleNamespace(path=Path("a.json"), file="a.json", name="tp_2", shared=sizes, part_of=None)
    ((_, job),) = job_tables(SimpleNamespace(rows=found.rows, jobs=found.jobs, settings=[one]))
    assert job.iloc[0][list(sizes)].to_dict() == sizes


def test_the_plots_of_each_job_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: dict[Path, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: saved.update({path: self}))
    jobs = job_tables(analysed([answer([row()]), answer([row(timelines=[])], is_cached=True)]))
    written, missing = write_plots([], tmp_path, None, jobs)
    assert [(name, path.name) for name, path in written] == [
        ("Throughput over time (job 1)", "job_timeline.png"),
        ("Cost of the job against its time (job 1)", "job_cost.png"),
        ("Cost of the job against its time (job 2, prefixes cached)", "job_cost_2.png"),
        ("Throughput against requests at once (job 1)", "job_throughput.png"),
        ("Throughput against requests at once (job 2, prefixes cached)", "job_throughput_2.png"),
    ]
    # Nobody asked for a grid, so that what needs one is no news.
    assert missing == ["Throughput over time (job 2, prefixes cached): no point recorded its steps"]
    assert title(saved[tmp_path / "job_cost_2.png"]).endswith("its time (job 2, prefixes cached)")


def test_where_there_is_no_job_its_plots_are_not_mentioned_unless_asked_for(tmp_path: Path) -> None:
    jobs = {title for _, title, _ in JOB_PLOTS}
    _, missing = write_plots([], tmp_path)
    assert not [line for line in missing if line.split(":")[0] in jobs]
    assert write_plots([], tmp_path, ["job_cost"]) == (
        [], ["Cost of the job against its time: no queue point was measured"],
    )  # fmt: skip


def test_the_user_picks_plots_of_a_job(tmp_path: Path) -> None:
    written, missing = write_plots([], tmp_path, ["job_cost"], job_tables(analysed([answer([row()])])))
    assert ([path.name for _, path in written], missing) == (["job_cost.png"], [])
    assert (tmp_path / "job_cost.svg").read_text().count("<svg") == 1
