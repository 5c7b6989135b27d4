"""Everything that one analysis writes, to the letter: what stands where, in which order, with which number.

The expected files lie in tests/expected. What is found instead of one is left in artifacts/expected (git ignores
it): after a wanted change read the difference, and copy the file.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from batch_inference.analyze import plots
from batch_inference.analyze.answers import Analysis, Question, analyse
from batch_inference.analyze.decide import Limits
from batch_inference.analyze.plot_colors import STYLES
from batch_inference.analyze.plot_looks import prepared
from batch_inference.analyze.plot_style import subtitle_of
from batch_inference.analyze.plots import PLOTS
from batch_inference.analyze.report import write_report
from batch_inference.analyze.tables import MeasuredSetting, load_setting
from batch_inference.core.result_file import save_result
from batch_inference.core.results import Failure, Point, Result
from builders import make_point, make_result, make_run
from conftest import REPOSITORY

pytestmark = pytest.mark.slow

EXPECTED = REPOSITORY / "tests" / "expected"
FOUND = REPOSITORY / "artifacts" / "expected"
# Latencies of the runs, over their middle.
SPREAD = (0.98, 1.0, 1.03)


def measured(length: int, batch: int, middle_s: float, replicas: int = 1, **changes: Any) -> Point:
    """A point that knows everything: energy, memory, clocks."""
    runs = [
        make_run(
            middle_s * factor, requests=batch * replicas, seq_len=length, energy_j=100 * middle_s * factor,
            memory={"used_gib": [50 + batch + length / 64], "peak_gib": [60 + batch + length / 64]},
            clocks={"sm_mhz": [1980.0]},
        )
        for factor in SPREAD
    ]  # fmt: skip
    return make_point(batch, length, runs=changes.pop("runs", runs), replicas=replicas, **changes)


def new_results() -> list[Result]:
    tp_1 = [measured(64, 1, 1.0), measured(64, 4, 1.6), measured(128, 1, 1.5), measured(128, 4, 2.7)]
    tp_2 = [measured(64, 1, 0.7), measured(64, 4, 1.1), measured(128, 1, 1.0), measured(128, 4, 1.7)]
    tp_2[1].verdict, tp_2[1].verdict_reasons = "suspect", ["2 requests were preempted", "the clock fell"]
    pp_2 = [measured(64, 1, 1.1), measured(64, 4, 1.12), measured(128, 4, 1.71)]
    pp_2 += [Point(8, n, 32, "oom", reason="CUDA out of memory") for n in (64, 128)]
    pp_2 += [Point(16, 64, 32, "skipped", reason="implied by batch 8"), Point(16, 256, 32, "skipped")]
    dp_2 = [measured(64, 2, 1.3, 2), measured(64, 1, 1.05, 2), measured(128, 4, 2.9, 2)]
    dp_2.append(measured(128, 2, 0.1, 2, verdict="invalid", verdict_reasons=["the outputs are too short"]))
    once = measured(64, 4, 1.4)
    once.runs = once.runs[1:2]
    other = {"device_kind": "gpu", "devices": [{"name": "NVIDIA A100", "memory_gib": 39.4}], "host": "node-2"}
    a100 = [measured(64, 1, 2.0), measured(64, 4, 2.6)]
    failed = make_result("tp_8", sizes=(8, 1, 1), status="failed", failure=Failure("oom_load", "No memory is left"))
    failed.engine = None
    seeded = {"config": {"seed": 7}, "environment": {"host": "node-3"}}
    return [
        make_result("tp_1", tp_1), make_result("tp_2", tp_2, (2, 1, 1), **seeded),
        make_result("pp_2", pp_2, (1, 2, 1), status="partial"), make_result("dp_2", dp_2, (1, 1, 2)),
        make_result("once", [once], (1, 2, 1)), make_result("a100", a100, environment=other), failed,
        make_result("tp_1", [measured(64, 2, 3.0)], environment=other, engine={"dtype": "float16"}),
    ]  # fmt: skip


def old_results() -> list[Result]:
    older = {"environment": {"versions": {"vllm": "0.31.0"}}}
    tp_1 = [measured(64, 1, 1.2), measured(64, 4, 1.605), measured(128, 1, 1.2)]
    tp_2 = [measured(64, 1, 0.5), measured(64, 2, 0.9), measured(256, 4, 5.0)]
    pp_2 = [measured(64, 8, 1.9), measured(64, 4, 1.15)]
    dp_2 = [measured(128, 2, 2.2, 2)]
    return [
        make_result("tp_1", tp_1, **older), make_result("tp_2", tp_2, (2, 1, 1), **older),
        make_result("pp_2", pp_2, (1, 2, 1), **older), make_result("dp_2", dp_2, (1, 1, 2), **older),
        make_result("once", [measured(64, 4, 1.5)], (1, 2, 1), **older),
    ]  # fmt: skip


def read(results: Sequence[Result], top: Path) -> list[MeasuredSetting]:
    """The last two lie in a folder of their own."""
    found = []
    for number, result in enumerate(results):
        folder = top / "more" if number >= len(results) - 2 else top
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{number}_{result.name}_results.json"
        save_result(result, path)
        found.append(load_setting(path, 90, top))
    return found


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    top = tmp_path_factory.mktemp("whole")
    question = Question(Limits(latency_s=2.75, ttft_s=0.25, tpot_s=0.5, percent=90), price=2.5)
    notes = ["--setting tp_1: 2 other files left out."]
    return analyse(read(new_results(), top / "new"), question, read(old_results(), top / "old"), notes)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    """Ranked together, against a baseline that is named, and nothing keeps the limit at one length."""
    results = [one for one in new_results() if one.name in ("tp_1", "tp_2", "a100", "dp_2")]
    question = Question(Limits(latency_s=1.02), baseline="tp_2", allow_mixed=True)
    return analyse(read(results, tmp_path_factory.mktemp("mixed")), question)


def written(analysis: Analysis, folder: Path, unreadable: Sequence[str] = ()) -> dict[str, str]:
    text = write_report(analysis, unreadable, folder, ())
    found = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    return found | {"terminal.txt": text.replace(str(folder), "FOLDER") + "\n"}


def assert_expected(**texts: str) -> None:
    """By the name of the file; a _ before the suffix is its dot."""
    unlike = []
    for key, text in texts.items():
        path = EXPECTED / ".".join(key.rsplit("_", 1))
        expected = path.read_text(encoding="utf-8") if path.exists() else ""
        if text.splitlines() != expected.splitlines():
            FOUND.mkdir(parents=True, exist_ok=True)
            (FOUND / path.name).write_text(text, encoding="utf-8")
            unlike.append((text, expected))
    for text, expected in unlike:
        assert text.splitlines() == expected.splitlines()


def rounded(value: Any) -> Any:
    """Numbers to ten digits: the last ones are the machine's."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.10g}") if isinstance(value, float) else value


def indented(document: str) -> str:
    return json.dumps(rounded(json.loads(document)), indent=1, ensure_ascii=False) + "\n"


def columns_of_csv(text: str) -> str:
    """A line per column, so that a change of one is one line; the hash changes with every new flag."""
    header, *rows = csv.reader(io.StringIO(text))
    cells = {name: [row[index] for row in rows] for index, name in enumerate(header)}
    assert all(cells.pop("config_hash"))
    return "".join(f"{name}: {' | '.join(map(_rounded_text, column))}\n" for name, column in cells.items())


def _rounded_text(cell: str) -> str:
    try:
        return f"{float(cell):.10g}" if "." in cell else cell
    except ValueError:
        return cell


def test_every_file_says_what_it_should(analysis: Analysis, tmp_path: Path) -> None:
    found = written(analysis, tmp_path, ["b.json: is no result file", "c.json: cannot be read"])
    assert sorted(found) == ["report.html", "report.md", "results.csv", "summary.json", "terminal.txt"]
    assert_expected(
        report_md=found["report.md"],
        terminal_txt=found["terminal.txt"],
        report_html=found["report.html"],
        results_txt=columns_of_csv(found["results.csv"]),
        summary_json=indented(found["summary.json"]),
    )


def test_unlike_things_ranked_together_say_so_everywhere(mixed: Analysis, tmp_path: Path) -> None:
    found = written(mixed, tmp_path)
    assert_expected(mixed_report_md=found["report.md"], mixed_summary_json=indented(found["summary.json"]))


# --- plots --------------------------------------------------------------------------------------------------------


def numbers(values: Any) -> str:
    """To four digits, and nothing for unknown."""
    return " ".join("-" if value is None or math.isnan(value) else f"{value:.4g}" for value in map(float, values))


def described(figure: Figure) -> Iterator[str]:
    """What a reader sees of a figure, in words."""
    yield f"figure {numbers(figure.get_size_inches())} in"
    spaces = figure.subplotpars
    yield f"edges {numbers([spaces.left, spaces.right, spaces.top, spaces.bottom, spaces.hspace, spaces.wspace])}"
    for text in figure.texts:
        style = (text.get_fontsize(), text.get_fontweight(), text.get_color(), text.get_va())
        yield f"text at {numbers(text.get_position())} {style}: {text.get_text()!r}"
    for legend in figure.legends:
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
            yield f"legend: {text.get_text()!r} {_look(handle)}"
        yield f"legend of {legend._ncols} columns at {legend._loc}, frame {legend.get_frame_on()}"
    for axes in figure.axes:
        yield from _axes(axes)


def _axes(axes: Axes) -> Iterator[str]:
    yield f"axes {axes.get_title()!r}: {axes.get_xlabel()!r}, {axes.get_ylabel()!r}"
    yield f"  x {axes.get_xscale()} {numbers(axes.get_xlim())}, y {axes.get_yscale()} {numbers(axes.get_ylim())}"
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        shown = axis.get_tick_params().get("labelleft", True)
        labels = [label.get_text() for label in axis.get_ticklabels()]
        yield f"  {name} ticks {numbers(axis.get_majorticklocs())}: {labels} shown {shown}, grid {_grid(axis)}"
        yield f"  {name} ticks between: {type(axis.get_minor_locator()).__name__}"
    for line in axes.lines:
        yield f"  line {numbers(line.get_xdata())}, {numbers(line.get_ydata())} {_look(line)}"
    # The cells of a colour bar are the map's colours again.
    for bars in (item for item in axes.collections if not isinstance(item, QuadMesh)):
        for path in bars.get_paths():
            yield f"  {type(bars).__name__} {[numbers(point) for point in path.vertices]} {_colors(bars)}"
    for patch in axes.patches:
        yield f"  bar {numbers([patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height()])} {_look(patch)}"
    for image in axes.images:
        low_high = numbers([image.norm.vmin, image.norm.vmax])
        yield f"  map {[numbers(row.filled(math.nan)) for row in image.get_array()]}"
        yield f"  colours {image.get_cmap().name}, {type(image.norm).__name__} {low_high}"
    for text in axes.texts:
        place = text.xy if hasattr(text, "xy") else text.get_position()
        yield f"  text at {numbers(place)} {text.get_color()} {text.get_ha()}: {text.get_text()!r}"


def _grid(axis: Any) -> bool:
    return any(tick.gridline.get_visible() for tick in axis.get_major_ticks())


def _colors(bars: Any) -> list[str]:
    return [to_hex(color, keep_alpha=True) for color in (*bars.get_facecolor(), *bars.get_edgecolor())]


def _look(artist: Any) -> str:
    if hasattr(artist, "get_hatch"):
        colors = [to_hex(color, keep_alpha=True) for color in (artist.get_facecolor(), artist.get_edgecolor())]
        return f"{colors} {artist.get_hatch()}"
    width, z = artist.get_linewidth(), artist.get_zorder()
    dash, step = artist.get_linestyle(), artist.get_drawstyle()
    colors = [str(to_hex(color)) for color in (artist.get_markerfacecolor(), artist.get_markeredgecolor())]
    mark = (artist.get_marker(), artist.get_markersize(), *colors)
    return f"{to_hex(artist.get_color())} {dash} {width:g} {step} {mark} z {z:g}"


def many() -> list[Result]:
    """More settings and lengths than are named or shown."""
    lengths = range(8, 8 * 15, 8)
    return [
        make_result(f"s{number:02}", [make_point(1, length, [1 + number + length / 64] * 2) for length in lengths])
        for number in range(14)
    ]


@pytest.fixture(scope="module")
def tables(analysis: Analysis, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    """The points of the first group with everything known, and of many settings and lengths, as plots get them."""
    known = analysis.groups[1].points
    known = known.assign(mfu=known["output_tok_per_s"] / 1000, mbu=known["latency_mean_s"] / 9, activations_gib=2.5)
    crowd = analyse(read(many(), tmp_path_factory.mktemp("many")), Question()).groups[0].points
    (points,) = prepared([known])
    (crowd,) = prepared([crowd.assign(mfu=0.2, mbu=0.01 * crowd["latency_mean_s"])])
    return {"few": points.assign(_mark=" (group 2)", _about=subtitle_of(points)), "many": crowd}


@pytest.mark.parametrize("name", [name for name, _, _ in PLOTS])
def test_every_plot_is_drawn_as_it_should_be(tables: dict[str, pd.DataFrame], name: str) -> None:
    (draw,) = [draw for one, _, draw in PLOTS if one == name]
    with plots.mpl.rc_context(STYLES["light"]):
        assert_expected(**{f"plot_{name}_txt": "\n".join(described(draw(tables["few"]))) + "\n"})


@pytest.mark.parametrize("name", ["latency", "pareto", "heatmap", "roofline"])
def test_plots_of_many_settings_and_lengths(tables: dict[str, pd.DataFrame], name: str) -> None:
    (draw,) = [draw for one, _, draw in PLOTS if one == name]
    lengths = sorted(tables["many"]["seq_len"].unique())
    # Four facets take time enough, but where the number of them is what is told.
    part = tables["many"] if name == "heatmap" else tables["many"][tables["many"]["seq_len"].isin(lengths[:4])]
    with plots.mpl.rc_context(STYLES["light"]):
        assert_expected(**{f"many_{name}_txt": "\n".join(described(draw(part))) + "\n"})
