"""The small parts of the analysis, each by itself: words, numbers, tables, titles, axes."""

from __future__ import annotations

import base64
import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from batch_inference.analyze import (
    exports,
    files,
    flags,
    plot_heatmap,
    plot_lines,
    plot_looks,
    plot_memory,
    plot_style,
    plots,
    report,
    sections,
    tables,
    terminal,
)
from batch_inference.analyze.about import settings as settings_section
from batch_inference.analyze.answers import Group, Question, QuestionError, analyse
from batch_inference.analyze.compare import SetComparison, holm, layout, layout_order, regressions
from batch_inference.analyze.decide import Limits
from batch_inference.analyze.headline import Headline
from batch_inference.analyze.markdown import as_markdown
from batch_inference.analyze.page import as_html
from batch_inference.analyze.plot_style import NothingToShowError
from batch_inference.analyze.report import sections_of
from batch_inference.analyze.sections import Section, compared
from batch_inference.analyze.tables import load_setting, point_table, setting_labels
from batch_inference.analyze.terminal import as_text, closing
from batch_inference.analyze.wording import Best, few, known, metric_text, not_drawn, suspect_mark, with_interval
from batch_inference.core.results import Point, Result
from builders import make_point, make_queue_point, make_result, save_all


def analysed(results: Sequence[Result], folder: Path, question: Question | None = None) -> Any:
    return analyse([load_setting(path) for path in save_all(results, folder)], question or Question())


def test_how_much_is_shown() -> None:
    """What a reader was promised; beyond it everything is in results.csv, or is refused."""
    assert (sections.ROW_LIMIT, terminal.TEXT_ROWS, terminal.LIST_LIMIT, terminal.LINE_LIMIT) == (500, 12, 12, 400)
    assert (plot_looks.ALL_NAMED, plot_looks.NAMED, plot_style.FACETS, plot_heatmap._MAPS, plot_memory._BARS) == (
        12, 8, 12, 6, 40,
    )  # fmt: skip
    assert (plot_style.WIDTH_IN, plot_style.DPI) == (8.0, 200)
    assert (files.MOST_FOLDERS, flags.MOST, tables._LONGEST_CELL, exports.SUMMARY_VERSION) == (10_000, 1e9, 32_000, 1)


# --- words --------------------------------------------------------------------------------------------------------


def test_of_a_list_the_first_are_told_and_the_others_counted() -> None:
    words = ["a", "b", "c"]
    assert few(words, 3) == "a, b, c"
    assert few(words, 2) == "a, b and 1 more"
    assert few(words, 1, "; {} left", "; ") == "a; 2 left"
    assert few([], 2) == ""
    assert not_drawn(["x: y", "z"]) == ["Not drawn: x: y", "Not drawn: z"]


def test_a_metric_is_told_with_interval_unit_and_mark() -> None:
    row: dict[Any, Any] = {"latency_mean_s": 2.0, "latency_ci95_s": 0.1, "x": 100.0, "verdict": "suspect"}
    assert metric_text(row, "x", "tok/s") == "100.0 ±5.0 tok/s*"
    assert metric_text({**row, "verdict": "invalid"}, "x") == "100.0 ±5.0"
    assert metric_text({**row, "latency_ci95_s": math.nan, "verdict": "valid"}, "x", "s") == "100.0 s"
    assert [suspect_mark({"verdict": word}) for word in ("suspect", "invalid", "valid")] == ["*", "", ""]
    assert (known(math.nan), known(2)) == (None, 2.0)


@pytest.mark.parametrize(
    ("value", "half", "decimals", "text"),
    [
        (1.23456, 0.0123, 9, "1.235 ±0.013"), (1.23456, 0.0123, 2, "1.23 ±0.02"), (0.5, 0.0001, 3, "0.500 ±0.001"),
        (-1.5, 0.25, 9, "-1.50 ±0.25"), (100.0, 10.0, 9, "100 ±10"), (100.0, 9.99, 9, "100.0 ±10.0"),
        (1.0, 0.99, 9, "1.00 ±0.99"), (12345.0, 1234.0, 9, "12300 ±1300"), (0.0, 0.5, 9, "0.0000"),
    ],
)  # fmt: skip
def test_an_interval_decides_the_digits(value: float, half: float, decimals: int, text: str) -> None:
    assert with_interval(value, half, decimals) == text


# --- sections, text, Markdown, page -------------------------------------------------------------------------------

WIDE = Section(
    "A title", [("a", "1"), ("longer", "2")], ("setting", "n"), [["x" * 100, "1"], ["y", "22"]], frozenset({"n"}),
    ["a line", "z" * 500], more=3,
)  # fmt: skip


def test_a_section_as_text() -> None:
    lines = as_text([WIDE, Section("Next", lines=[f"line {n}" for n in range(14)])]).splitlines()
    assert lines[:6] == ["A title", "  a       1", "  longer  2", *lines[3:6]]
    assert [len(line) for line in lines[3:7]] == [80, 80, 80, 80]
    assert [line.split() for line in (lines[3], lines[6])] == [["setting", "n"], ["y", "22"]]
    assert lines[5] == f"  {'x' * 37}…{'x' * 36}   1"
    assert "  … and 3 more rows in report.md" not in lines
    at = lines.index("  a line")
    assert lines[at + 1].startswith("  zzz")
    assert sum(line.count("z") for line in lines) == 399
    assert lines[-15:] == ["", "Next", *(f"  line {n}" for n in range(12)), "  … and 2 more lines in report.md"]


def test_rows_that_are_left_out_are_counted_together() -> None:
    rows = [[str(n)] for n in range(13)]
    assert "  … and 1 more row in report.md" in as_text([Section("T", header=("n",), rows=rows)])
    assert "more rows" not in as_text([Section("T", header=("n",), rows=rows[:12])])
    assert "  … and 5 more rows in report.md" in as_text([Section("T", header=("n",), rows=rows, more=4)])


def test_reasons_come_before_the_files() -> None:
    found = closing(["a: b", "word " * 20], [Path("/x/y.md"), Path("/x/a\x1bb")])
    assert found[0] == "not drawn: a: b"
    assert found[1].startswith("not drawn: word word")
    assert found[2].startswith("  word")
    assert found[-2:] == ["/x/y.md", "/x/a\\x1bb"]


def test_a_section_as_markdown() -> None:
    part = Section("T|", [("a_", "<b>")], ("n", "s"), [["1", "x*"]], frozenset({"n"}), ["l"], more=1)
    assert as_markdown([part], [("P_", Path("/q/p.png")), ("Q", Path("/q/q.png"))], ["m"]) == (
        "# Batch inference: results\n\n## T\\|\n\n- a\\_: &lt;b&gt;\n\n"
        "|   n | s   |\n|-----|-----|\n|   1 | x\\* |\n\n"
        "… and 1 more row: results.csv and summary.json have all.\n\n- l\n\n## Plots\n\n"
        "![P\\_](p.png)\n\n![Q](q.png)\n\n- Not drawn: m\n\n"
        "Every point with all its numbers: [results.csv](results.csv). For scripts: summary.json.\n"
    )
    assert "## Plots" not in as_markdown([part], [], [])
    assert "## Plots" in as_markdown([part], [], ["m"])
    assert "## Plots" in as_markdown([part], [("P", Path("p.png"))], [])


def test_a_section_as_a_page(tmp_path: Path) -> None:
    (tmp_path / "p.svg").write_bytes(b"<svg/>")
    part = Section(
        "T<", [("a<", "b>")], ("n<", "s"), [[Best("1<"), "x"]], frozenset({"n<"}), ["l<"], more=1,
        is_more_better=frozenset({"n<"}),
    )  # fmt: skip
    head = Headline("Results <", ("one <", "two"), ("Take <: 1 ± 2 s.", "More."), ("vllm", "serve", "'<'"))
    text = as_html([part], pd.DataFrame({"setting": ["<"], "other": [1]}), [("P<", tmp_path / "p.png")], ["m<"], head)
    body = text.partition("<body>\n")[2].partition("<script>")[0]
    data = base64.b64encode(b"<svg/>").decode()
    hint, sorted_by = '<p class="hint" hidden></p>', '<p class="sorted" aria-live="polite"></p>'
    assert body.splitlines() == [
        "<header><h1>Results &lt;</h1>",
        '<p class="facts">one &lt; · two</p>'
        '<div class="answer"><p>Take &lt;: 1\u00a0±\u00a02\u00a0s.</p><p>More.</p></div>'
        '<div class="command"><pre><span>vllm</span> <span>serve</span> <span>&#x27;&lt;&#x27;</span></pre>'
        '<button class="copy">Copy</button></div>',
        '<nav aria-label="Contents"><a href="#part-1">T&lt;</a><a href="#plots">Plots</a>'
        '<a href="#points">All points</a></nav>',
        "</header><main>",
        f'<h2 id="part-1">T&lt;</h2><dl><dt>a&lt;</dt><dd>b&gt;</dd></dl>{hint}'
        '<div class="wide few" role="region" aria-label="T&lt;"><table><thead><tr>'
        '<th class="number" data-first="descending"><button>n&lt;</button></th><th><button>s</button></th></tr></thead>'
        "<tbody>",
        f'<tr><td class="number"><b>1&lt;</b></td><td>x</td></tr></tbody></table></div>{sorted_by}'
        "<p>… and 1 more row: results.csv and summary.json have all.</p><ul><li>l&lt;</li></ul>",
        '<h2 id="plots">Plots</h2>',
        '<figure><button class="plot" title="Open large"><img class="light" alt="P&lt;" '
        f'src="data:image/svg+xml;base64,{data}"></button></figure>',
        "<ul><li>Not drawn: m&lt;</li></ul>",
        '<section id="points"><h2>All points</h2>',
        f'{hint}<div class="wide few" role="region" aria-label="All points"><table><thead><tr>'
        "<th><button>setting</button></th></tr></thead><tbody>",
        f"<tr><td>&lt;</td></tr></tbody></table></div>{sorted_by}",
        "</section>",
        '</main><dialog aria-label="A plot, large"></dialog>',
    ]


def test_a_dark_page_shows_the_dark_plot_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "p.svg").write_bytes(b"<svg/>")
    (tmp_path / "p_dark.svg").write_bytes(b"<svg id='dark'/>")
    text = as_html([], pd.DataFrame({"setting": []}), [("P", tmp_path / "p.png")], [])
    light, dark = (base64.b64encode(data).decode() for data in (b"<svg/>", b"<svg id='dark'/>"))
    assert (
        f'<img class="day" alt="P" src="data:image/svg+xml;base64,{light}">'
        f'<img class="night" alt="P" src="data:image/svg+xml;base64,{dark}">'
    ) in text


def test_a_page_without_a_point_lists_none() -> None:
    assert "All points" not in as_html([], pd.DataFrame({"setting": []}), [], [])


def test_the_page_leaves_unknown_cells_empty_and_words_as_they_are() -> None:
    number, words = ' class="number"', ' class="words"'
    points = pd.DataFrame({
        "setting": ["a", "b"], "num_devices": [1, 2], "latency_mean_s": [1.23456, math.nan],
        "latency_ci95_s": [0.0123, math.nan], "tpot_p50_s": [math.nan, 0.0123], "verdict": ["suspect", None],
        "verdict_reasons": ["it drifts", None], "reason": [None, "no memory"],
    })  # fmt: skip
    rows = re.findall("<tr>(<td.*)</tr>", as_html([], points, [], []))
    assert [re.findall("<td(.*?)>(.*?)</td>", row) for row in rows] == [
        [("", "a"), (number, "1"), (number, "1.235 ±0.013*"), (number, ""), ("", "suspect"), (words, "it drifts")],
        [("", "b"), (number, "2"), (number, ""), (number, "12.30"), ("", ""), (words, "no memory")],
    ]


def test_two_settings_of_a_layout_and_one_that_cannot_be_compared_are_told(tmp_path: Path) -> None:
    results = [
        make_result("a", [make_point(1, latencies_s=[1.0] * 2), make_point(4, latencies_s=[3.0] * 2)], (2, 1, 1)),
        make_result("b", [make_point(1, latencies_s=[2.0] * 2), make_point(4, latencies_s=[2.0] * 2)], (2, 1, 1)),
        make_result("c", [make_point(b, latencies_s=[4.0] * 2) for b in (1, 4)], (1, 2, 1)),
        make_result("d", [make_point(8, replicas=2)], (1, 1, 2)),
    ]
    (part,) = [one for one in sections_of(analysed(results, tmp_path)) if one.title.startswith("TP, PP")]
    assert part.pairs == [
        ("fastest", "TP=2, at both batch sizes at which several layouts were measured; at 16 only DP=2 was measured")
    ]
    assert part.lines[-1] == "Where several settings have the same layout, each cell shows the fastest of them."
    assert part.header == ("requests", "TP=2", "PP=2", "DP=2")
    assert [row[:3] for row in part.rows] == [["1", "32.00", "8.000"], ["4", "64.00", "32.00"], ["16", "", ""]]
    best = [[isinstance(cell, Best) for cell in row] for row in part.rows]
    assert best == [[False, True, False, False]] * 2 + [[False] * 4]


def test_no_common_point_leaves_no_scaling_and_that_is_said(tmp_path: Path) -> None:
    results = [make_result("tp_1", [make_point(1)]), make_result("tp_2", [make_point(2)], (2, 1, 1))]
    (part,) = [one for one in sections_of(analysed(results, tmp_path)) if one.title.startswith("Scaling")]
    assert (part.rows, part.lines) == ([], ["No other point has the length and batch size of a point of tp_1."])


POINTS = pd.DataFrame({
    "setting": ["s", "s", "s"], "seq_len": 8, "batch_size": [1, 2, 4], "old_output_tok_per_s": [1.0, 2.0, 4.0],
    "output_tok_per_s": [2.0, 1.0, math.nan], "ratio": [2.0, 0.5, math.nan], "ratio_ci95": [0.1, math.nan, math.nan],
    "change": ["better", "worse", "unknown"], "verdict": ["suspect", "valid", "valid"],
})  # fmt: skip


def test_two_sets_are_told_with_what_is_in_one_of_them_alone() -> None:
    unlike = {"dtype": ("a", "b"), "vllm_version": ("1", "2"), "host": ("x", "y")}
    part = compared(SetComparison(POINTS, unlike, only_new=2, only_old=1, repeated=3))
    assert part.title == "Compared with the earlier results [MIXED: dtype]"
    assert part.pairs == [
        ("points compared", "3: 1 better, 1 worse, 1 unknown"),
        ("throughput, new / old", "1.0000 (geometric mean), from 0.5000 to 2.0000"),
        ("dtype", "a before, b now"), ("vLLM", "1 before, 2 now"), ("host", "x before, y now"),
    ]  # fmt: skip
    assert part.rows == [
        ["s", "8", "2", "worse", "0.5000", "2.000", "1.000"],
        ["s", "8", "1", "better*", "2.00 ±0.10", "1.000", "2.000"],
        ["s", "8", "4", "unknown", "", "4.000", ""],
    ]
    assert part.alignment == ["left", "right", "right", "left", *["right"] * 3]
    assert part.lines[1:] == [
        "unknown: a point with a single run; raise --num-runs.",
        "2 points are only in the new results.",
        "1 point is only in the earlier results.",
        "3 points are more than once in one of the sets, and left out.",
        "Points are matched by name, layout, batch and lengths.",
    ]


def test_a_comparison_without_counts_has_none() -> None:
    found = SetComparison(POINTS)
    assert (found.unlike, found.only_new, found.only_old, found.repeated) == ({}, 0, 0, 0)


def test_what_counts_as_a_regression() -> None:
    found = regressions(SetComparison(POINTS.assign(change=["lost", "worse", "worse"], ratio=[2, 0.5, 0.9])), 10)
    assert found["batch_size"].tolist() == [1, 2]


def test_holm_multiplies_the_smallest_most() -> None:
    found = holm(np.array([0.03, math.nan, 0.01, 0.04, 0.9]))
    assert found.tolist() == pytest.approx([0.09, math.nan, 0.04, 0.09, 0.9], nan_ok=True)


def test_layouts_have_names_and_an_order() -> None:
    sizes = [(2, 2, 2), (1, 1, 1), (1, 1, 8), (8, 1, 1), (1, 8, 1), (4, 1, 2), (4, 2, 1), (2, 4, 1)]
    assert [layout(*size) for size in sorted(sizes, key=lambda size: layout_order(*size))] == [
        "TP=1", "TP=8", "PP=8", "DP=8", "TP=4 PP=2", "TP=4 DP=2", "TP=2 PP=4", "TP=2 PP=2 DP=2",
    ]  # fmt: skip


# --- questions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "told"),
    [
        (Question(group_by=("colour",)), "--group-by colour: no such column; results.csv has their names"),
        (Question(group_by=("dtype", "runner")),
         "--group-by dtype,runner: points that differ in model would be ranked together; name these columns too, or "
         "add --allow-mixed"),
        (Question(baseline="x"), "--baseline x: no such setting; choose one of a, b"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_names_the_flag(tmp_path: Path, question: Question, told: str) -> None:
    results = [make_result("a", [make_point()]), make_result("b", [make_point()], config={"model": "other"})]
    with pytest.raises(QuestionError) as caught:
        analysed(results, tmp_path, question)
    assert str(caught.value) == told


@pytest.mark.parametrize(
    ("question", "names"),
    [
        (Question(), ["group 1: model meta-llama/Llama-2-7b-chat-hf", "group 2: model other"]),
        (Question(allow_mixed=True), [""]),
        (Question(group_by=("model", "num_devices")),
         ["group 1: model meta-llama/Llama-2-7b-chat-hf", "group 2: model other"]),
        (Question(group_by=("num_devices",), allow_mixed=True), [""]),
    ],
)  # fmt: skip
def test_groups_are_as_asked(tmp_path: Path, question: Question, names: list[str]) -> None:
    results = [make_result("a", [make_point()]), make_result("b", [make_point()], config={"model": "other"})]
    groups = analysed(results, tmp_path, question).groups
    assert [group.name for group in groups] == names
    assert [group.mixed for group in groups] == ([["model"]] if names == [""] else [[], []])


def test_limits_are_told_in_words_and_columns() -> None:
    limits = Limits(1.5, 0.25, 0.125, 99.9)
    assert str(limits) == "latency p99.9 ≤ 1.5 s, TTFT p99.9 ≤ 0.25 s, TPOT p99.9 ≤ 0.125 s"
    assert limits.columns() == {"latency_p99.9_s": 1.5, "ttft_p99.9_s": 0.25, "tpot_p99.9_s": 0.125}
    assert (str(Limits()), Limits().columns(), Limits().percent) == ("", {}, 99)
    assert str(Limits(ttft_s=2)) == "TTFT p99 ≤ 2 s"


# --- tables -------------------------------------------------------------------------------------------------------


def test_cells_of_csv_and_json() -> None:
    texts = ["a", "=1", " +1", "-x", "@a", 'say "x"', "a,b", "a\nb", "a\rb", "1-2"]
    assert list(map(exports._csv_text, texts)) == [
        "a", "'=1", "' +1", "'-x", "'@a", '"say ""x"""', '"a,b"', '"a\nb"', '"a\rb"', "1-2",
    ]  # fmt: skip
    assert list(map(exports._csv_text, [-1, True, 2.5])) == ["-1", "True", "2.5"]
    values = [np.float64(1.5), np.int64(2), np.float64("nan"), math.inf, pd.NA, None, "x", True]
    assert [exports._json_value(value) for value in values] == [1.5, 2, None, None, None, None, "x", True]


def test_a_large_table_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "_CHUNK", 2)
    table = pd.DataFrame({"setting": list("abcde"), "n": [1, None, 3, 4, 5], "b": [True, None, False, True, None]})
    exports.write_results_csv(table, tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text() == "setting,n,b\na,1,True\nb,,\nc,3,False\nd,4,True\ne,5,\n"


def test_settings_of_one_name_are_labelled_by_their_files(tmp_path: Path) -> None:
    (path,) = save_all([make_result(points=[make_point()])], tmp_path)
    one = load_setting(path)
    several = [dataclasses.replace(one, path=Path(name), file=name) for name in ("a.json", "b/c.json")]
    other = dataclasses.replace(one, path=Path("d"), name="tp_2")
    assert list(setting_labels([*several, other]).values()) == ["tp_1 [a]", "tp_1 [b/c]", "tp_2"]
    table = point_table([other, *several])
    assert table["setting"].tolist() == ["tp_1 [a]", "tp_1 [b/c]", "tp_2"]
    assert table["group"].tolist() == [1, 1, 1]
    assert table.columns[1] == "group"


def test_secrets_are_no_part_of_a_table(tmp_path: Path) -> None:
    secret = "hf_" + "a" * 34
    point = Point(1, 8, 4, "error", reason=f"token {secret} was refused")
    config = {"model": f"https://user:{secret}@host/m", "engine_args": ["--hf-token", secret]}
    table = point_table(
        [load_setting(path) for path in save_all([make_result(points=[point], config=config)], tmp_path)]
    )
    assert secret not in table.to_csv()
    assert table["engine_args"].iloc[0].startswith("--hf-token")


@pytest.mark.parametrize(
    ("backend", "executor", "expected"),
    [
        (None, "uni", ("local", None)), ("external_launcher", "mp", ("torchrun", None)),
        (None, "external_launcher", ("torchrun", None)), ("ray", "mp", ("local", "ray")),
        (None, "ray", ("local", "ray")),
    ],
)  # fmt: skip
def test_the_executor_and_the_cluster_are_as_asked_or_used(
    tmp_path: Path, backend: str | None, executor: str, expected: tuple[str, str | None]
) -> None:
    config, engine = {"distributed_executor_backend": backend}, {"executor": executor}
    (path,) = save_all([make_result(points=[make_point()], config=config, engine=engine)], tmp_path)
    shared = load_setting(path).shared
    assert (shared["executor_class"], shared["cluster"]) == expected


# --- plots --------------------------------------------------------------------------------------------------------


def test_some_of_many_are_spread_evenly() -> None:
    assert plot_style.some([1, 2, 3], 3) == [1, 2, 3]
    assert plot_style.some(range(11), 3) == [0, 5, 10]
    assert plot_style.some(range(100), 2) == [0, 99]


def test_facets_stand_in_rows_of_three_and_four_in_two() -> None:
    assert [plot_style.columns_of(count) for count in range(1, 8)] == [1, 2, 3, 2, 3, 3, 3]


def entry(label: str, family: str | None = None) -> Line2D:
    handle = Line2D([], [], label=label)
    handle.set_gid(family)
    return handle


def legend(*handles: Line2D) -> list[tuple[int, list[str]]]:
    """Of each block its columns, and its entries column by column; · where nothing is."""
    return [
        (block.columns, [one.get_label().replace(" ", "·") for one in block.entries])
        for block in plot_style._blocks(handles)
    ]


def test_a_legend_has_a_column_for_each_family_and_for_the_rest() -> None:
    settings = [entry(name, name[:2]) for name in ("tp1", "tp2", "tp4", "dp2")]
    assert legend() == []
    assert legend(*settings, entry("a")) == [(3, ["tp1", "tp2", "tp4", "dp2", "·", "·", "a", "·", "·"])]
    rest = [entry(name) for name in "abcd"]
    assert legend(*settings, *rest)[0] == (
        4, ["tp1", "tp2", "tp4", "dp2", "·", "·", "a", "b", "c", "d", "·", "·"],
    )  # fmt: skip


def test_what_has_no_room_beside_the_families_stands_below_them() -> None:
    settings = [entry(name, name[:2]) for name in ("tp1", "tp2", "dp2")]
    assert legend(*settings, entry("x" * 100)) == [(2, ["tp1", "tp2", "dp2", "·"]), (1, ["x" * 100])]


def test_a_legend_without_families_reads_row_by_row() -> None:
    assert legend(*[entry(str(number), "one") for number in range(20)]) == [
        (11, [text for column in range(11) for text in (str(column), str(column + 11) if column < 9 else "·")]),
    ]  # fmt: skip
    assert legend(entry("a" * 40), *[entry(letter) for letter in "bcd"]) == [(2, ["a" * 40, "c", "b", "d"])]
    assert legend(entry("a" * 200), entry("b")) == [(1, ["a" * 200, "b"])]
    # Families with names that are too long for columns.
    wide = [entry(f"{family}{'x' * 60}{number}", family) for family in ("tp", "dp") for number in range(2)]
    assert [columns for columns, _ in legend(*wide)] == [1]


@pytest.mark.parametrize(
    ("values", "which", "limits", "ticks"),
    [
        ((1.0, 30.0), "y", (0, None), None), ((0.0, 500.0), "y", (0, None), None), ((1.0, 10.0), "x", (0, 10.5), None),
        ((1.0, 31.0), "y", (1 / 1.5, 46.5), (1, 2, 5)), ((1.0, 1999.0), "y", (1 / 1.5, 2998.5), (1, 2, 5)),
        ((1.0, 2000.0), "y", (1 / 1.5, 3000.0), (1,)), ((2.0, 199.0), "x", (2 / 1.5, 298.5), (1, 2, 5)),
        ((2.0, 200.0), "x", (2 / 1.5, 300.0), (1,)),
    ],
)  # fmt: skip
def test_an_axis_is_as_long_as_its_values(
    values: tuple[float, float], which: Any, limits: tuple[float, float | None], ticks: Any
) -> None:
    axes = Figure().add_subplot()
    axes.plot(values, values)
    plot_style.value_axis(axes, *values, which)
    assert getattr(axes, f"get_{which}scale")() == ("log" if ticks else "linear")
    found = getattr(axes, f"get_{which}lim")()
    assert found[0] == pytest.approx(limits[0])
    assert found[1] == pytest.approx(limits[1]) if limits[1] else found[1] > values[1]
    if ticks:
        axis = axes.xaxis if which == "x" else axes.yaxis
        assert tuple(axis.get_major_locator()._subs) == ticks
        assert axis.get_major_formatter()(10.0, 0) == "10"


def test_axes_are_named_by_metric_and_unit() -> None:
    assert plot_style.axis_label("latency_p50_s") == "Batch latency, p50 [s]"
    assert plot_style.axis_label("tpot_p50_s") == "Time per output token (TPOT), p50 [ms]"
    assert plot_style.axis_label("scaling_efficiency") == "Efficiency, 1 = ideal"


@pytest.mark.parametrize(("ok", "told"), [(True, "no point has this number"), (False, "no point was measured")])
def test_why_nothing_is_drawn(ok: bool, told: str) -> None:
    points = pd.DataFrame({"status": ["ok" if ok else "oom", "oom"], "x": [math.nan, 1.0]})
    with pytest.raises(NothingToShowError) as caught:
        plot_lines.measured_points(points, "x")
    assert str(caught.value) == told


def group(number: int, mixed: list[str]) -> Group:
    about = {"device_name": "d", "model": "m", "vllm_version": "1", "dtype": "t", "quantization": None, "max_tokens": 4}
    points = pd.DataFrame([about]).assign(setting=pd.Categorical(["s"]))
    return Group(number, "", points, mixed, [], pd.DataFrame())


def test_each_plot_of_each_group_is_saved_or_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Drawn:
        axes: tuple[Any, ...] = ()

        def savefig(self, path: Path, **words: Any) -> None:
            seen.append((path.name, words))

    def draw(points: pd.DataFrame) -> Any:
        seen.append((points["_mark"].iloc[0], points["_about"].iloc[0], bool(points["_named"].iloc[0])))
        return Drawn()

    def refuse(_points: pd.DataFrame) -> Any:
        raise NothingToShowError("because")

    monkeypatch.setattr(plots, "PLOTS", (("one", "One", draw), ("two", "Two", refuse), ("three", "Three", draw)))
    assert plots.write_plots([group(4, []), group(5, ["dtype"])], tmp_path, ["one", "two"]) == (
        [("One (group 4)", tmp_path / "one_group_4.png"),
         ("One (group 5) [MIXED: dtype]", tmp_path / "one_group_5.png")],
        ["Two (group 4): because", "Two (group 5): because"],
    )  # fmt: skip
    about, mark = "d · m · vLLM 1 · t · 4 output tokens", "batch_inference analyze_results.py: "
    assert seen == [
        (" (group 4)", about, True),
        ("one_group_4.png", {"dpi": plots.DPI, "metadata": {"Software": f"{mark}one_group_4.png"}}),
        ("one_group_4.svg", {"metadata": {"Date": None, "Creator": f"{mark}one_group_4.svg"}}),
        (" (group 4)", about, True),
        ("one_group_4_dark.svg", {"metadata": {"Date": None, "Creator": f"{mark}one_group_4_dark.svg"}}),
        (" (group 5) [MIXED: dtype]", about, True),
        ("one_group_5.png", {"dpi": plots.DPI, "metadata": {"Software": f"{mark}one_group_5.png"}}),
        ("one_group_5.svg", {"metadata": {"Date": None, "Creator": f"{mark}one_group_5.svg"}}),
        (" (group 5) [MIXED: dtype]", about, True),
        ("one_group_5_dark.svg", {"metadata": {"Date": None, "Creator": f"{mark}one_group_5_dark.svg"}}),
    ]
    assert plots.write_plots([group(1, [])], tmp_path) == (
        [("One", tmp_path / "one.png"), ("Three", tmp_path / "three.png")], ["Two: because"],
    )  # fmt: skip
    none = [f"{title}: no point was measured" for title in ("One", "Two", "Three")]
    assert plots.write_plots([], tmp_path) == ([], none)


def test_the_files_are_named_in_order_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = analysed([make_result(points=[make_point()])], tmp_path / "in")
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("results.parquet", "a.png"):
        (folder / name).touch()
    for name in ("b.png", "b.svg", "b_dark.svg", "p.png", "p.svg", "p_dark.svg"):
        (folder / name).write_text(f"batch_inference analyze_results.py: {name}")
    asked: list[Any] = []

    def drawn(groups: Any, where: Path, names: Any, jobs: Any) -> Any:
        asked.append((len(groups), where, names, jobs))
        return [("P", folder / "p.png")], ["Q: why"]

    monkeypatch.setattr(plots, "write_plots", drawn)
    text = report.write_report(analysis, ["u"], folder, ["p"])
    names = ("report.html", "report.md", "results.csv", "summary.json", "p.png")
    shown = [*(str(folder / name) for name in names[:-1]), "and 1 plot there: p"]
    assert text.splitlines()[-7:] == ["", "not drawn: Q: why", *shown]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "a.png", "p.svg", "p_dark.svg"])
    report.write_report(analysis, [], folder)
    report.write_report(analysis, [], folder, ())
    assert asked == [(1, folder, ["p"], []), (1, folder, None, [])]


def of_two_budgets() -> Result:
    points = [make_point(4, max_num_batched_tokens=budget) for budget in (2048, 8192)]
    return make_result("tp_1", points, config={"max_num_batched_tokens": [2048, 8192]})


def test_a_baseline_is_what_the_report_calls_points(tmp_path: Path) -> None:
    results = [of_two_budgets(), make_result("tp_2", [make_point(4)], (2, 1, 1))]
    name = "tp_1, 8192 tokens per step"
    assert set(analysed(results, tmp_path, Question(baseline=name)).points["scaling_baseline"]) == {name}
    with pytest.raises(QuestionError, match=r"^--baseline tp_1: no such setting; choose one of tp_1, 2048 tokens per"):
        analysed(results, tmp_path, Question(baseline="tp_1"))


def test_of_jobs_alone_a_baseline_is_a_setting(tmp_path: Path) -> None:
    results = [make_result("tp_1", [make_queue_point()])]
    assert analysed(results, tmp_path, Question(baseline="tp_1")).points.empty
    with pytest.raises(QuestionError, match=r"^--baseline tp_9: no such setting; choose one of tp_1$"):
        analysed(results, tmp_path, Question(baseline="tp_9"))


def test_a_setting_of_several_tokens_per_step_has_its_group(tmp_path: Path) -> None:
    other = make_result("tp_2", [make_point(4)], (2, 1, 1), config={"model": "other"})
    section = settings_section(analysed([of_two_budgets(), other], tmp_path, Question()))
    assert [row[:2] for row in section.rows] == [["tp_1", "1"], ["tp_2", "2"]]


def test_of_many_settings_ten_are_named_as_baselines(tmp_path: Path) -> None:
    results = [make_result(f"s{number:02}", [make_point()]) for number in range(12)]
    with pytest.raises(QuestionError) as caught:
        analysed(results, tmp_path, Question(baseline="x"))
    assert str(caught.value).endswith(f"choose one of {', '.join(f's{number:02}' for number in range(10))}")


def test_a_group_of_many_settings_names_twelve(tmp_path: Path) -> None:
    results = [make_result(f"s{number:02}", [make_point()]) for number in range(14)]
    results.append(make_result("z", [make_point()], config={"model": "other"}))
    (part,) = [one for one in sections_of(analysed(results, tmp_path)) if one.title == "Measured"]
    names = ", ".join(f"s{number:02}" for number in range(12))
    assert part.lines == [
        "2 groups of points that cannot be compared with each other: they differ in model. Each is ranked on its own:",
        f"group 1: model meta-llama/Llama-2-7b-chat-hf ({names} and 2 more)",
        "group 2: model other (z)",
    ]
