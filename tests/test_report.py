"""The summary and report.md: what they say, how wide, and that no file can break them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from batch_inference.analyze import layouts, sections
from batch_inference.analyze.answers import Analysis, Question, QuestionError, analyse
from batch_inference.analyze.decide import Limits
from batch_inference.analyze.markdown import as_markdown, escaped
from batch_inference.analyze.report import sections_of
from batch_inference.analyze.sections import Section
from batch_inference.analyze.tables import load_setting
from batch_inference.analyze.terminal import LIST_LIMIT, TEXT_ROWS, as_text, terminal_width
from batch_inference.analyze.wording import Best, short_names, with_interval
from batch_inference.core.result_file import save_result
from batch_inference.core.results import DeviceInfo, Environment, Failure, Point, Result
from builders import make_point, make_result, make_sweep, save_all


@pytest.fixture
def report(tmp_path: Path) -> Any:
    def build(results: Sequence[Result], question: Question | None = None, old: Sequence[Result] = ()) -> list[Section]:
        earlier = read(old, tmp_path / "old") if old else None
        return sections_of(analyse(read(results, tmp_path / "new"), question or Question(), earlier))

    return build


def read(results: Sequence[Result], folder: Path) -> Any:
    return [load_setting(path) for path in save_all(results, folder)]


def read_analysis(paths: Sequence[Path]) -> Analysis:
    return analyse([load_setting(path) for path in paths], Question())


def flat(text: str) -> str:
    """Without line breaks, so that a sentence is found wherever it is wrapped."""
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("value", "half", "expected"),
    [
        (1234.5678, 12.3, "1235 ±13"),  # rounded up: an interval is never made narrower
        (98765.4, 812.0, "98770 ±820"),
        (0.153012, 0.005075, "0.1530 ±0.0051"),
        (0.15, 0.41, "0.15 ±0.41"),
        (12.0, 30.0, "12 ±30"),
        (27324.0, 150000.0, "27000 ±150000"),  # of the value two digits stay
        (1234.5678, 1e-9, "1234.6 ±0.1"),  # no more digits than a reader can use
        (1234.5678, None, "1235"),
        (1234.5678, 0.0, "1235"),
        (0.0, None, "0.0000"),
        (2.0, 1.0, "2.0 ±1.0"),
    ],
)
def test_a_number_has_as_many_digits_as_its_interval_allows(value: float, half: float | None, expected: str) -> None:
    assert with_interval(value, half) == expected


def test_the_summary_names_machine_settings_and_the_best_of_each_length(report: Any) -> None:
    one = make_result("tp_1", [make_point(b, n, [b * n / 64] * 2) for n in (64, 128) for b in (1, 4)])
    text = as_text(report([one, make_result("tp_2", [make_point(4, 64, [3.0])], (2, 1, 1))]))
    for words in ("meta-llama/Llama-2-7b-chat-hf", "NVIDIA H100 80GB HBM3", "0.32.0", "bfloat16"):
        assert words in text
    table = [line.split() for line in text.splitlines()]
    assert ["64", "throughput", "42.67", "tok/s", "tp_2", "4", "2"] in table
    assert ["64", "per", "device", "32.00", "tok/s/device", "tp_1", "1", "1"] in table
    assert ["128", "latency", "2.000", "s", "tp_1", "1", "1"] in table


def test_the_summary_fits_eighty_columns_whatever_the_names(report: Any) -> None:
    long = make_sweep([(1, 1, 1), (2, 1, 1)], batch_sizes=(1, 1024), seq_lens=(131072,))
    for result in long:
        result.name = result.name + "_with_a_very_long_name_" * 4
        result.config = dataclasses.replace(result.config, model="/a/folder/" * 20)
        result.points[0].verdict, result.points[0].verdict_reasons = "suspect", ["ran in waves " * 30]
    long[1].environment.devices = [DeviceInfo(0, "Device " * 20)]
    failed = make_result("failed", status="failed", failure=Failure("unknown", "x" * 5000))
    text = as_text(report([*long, failed]))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" in text


def test_failed_settings_and_lost_points_are_named_with_the_reason(report: Any) -> None:
    lost = [Point(16, n, 32, "oom", reason="CUDA out of memory") for n in (64, 128)]
    skipped = Point(32, 64, 32, "skipped", reason="implied by batch 16")
    failed = make_result("tp_8", sizes=(8, 1, 1), status="failed")
    failed.failure = Failure("oom_load", "Free memory is less than desired", ["secret line"])
    text = flat(as_text(report([make_result(points=[make_point(), *lost, skipped]), failed])))
    assert "tp_8 failed: Free memory is less than desired" in text
    assert "oom (tp_1, batch 16 x length 64, 128): CUDA out of memory" in text
    assert "skipped (tp_1, batch 32 x length 64): implied by batch 16" in text


def test_points_that_make_no_grid_are_named_one_by_one(report: Any) -> None:
    lost = [Point(b, n, 32, "error", reason="x") for b, n in ((1, 8), (2, 16))]
    assert "error (tp_1, batch x length 1x8, 2x16): x" in as_text(report([make_result(points=lost)]))


def test_a_failure_without_words_is_still_a_failure(report: Any) -> None:
    result = make_result("tp_8", [Point(1, 8, 4, "error")], status="failed")
    result.engine, result.environment = None, Environment()
    text = as_text(report([result]))
    assert "tp_8 failed: no reason is given" in text
    assert "error (tp_8, batch 1 x length 8): no reason is given" in text


def test_a_setting_that_did_not_have_its_devices_for_itself_is_doubtful(report: Any) -> None:
    used = ["GPU 1: used by process 7 on a (tp_2)", "GPU 2: used by process 7 on a (tp_2)"]
    text = flat(as_text(report([make_result("tp_1", [make_point(1)], environment={"used_by_others": used})])))
    assert f"tp_1 began on devices that another sweep used: {used[0]}; {used[1]}" in text
    assert "another sweep" not in flat(as_text(report([make_result("tp_1", [make_point(1)])])))


def test_an_interrupted_setting_is_among_what_is_missing(report: Any) -> None:
    grid = {"batch_sizes": [1, 2, 4], "seq_lens": [64]}
    stopped = make_result("tp_1", [make_point(1)], config=grid, status="partial")
    text = flat(as_text(report([stopped])))
    assert (
        "tp_1 was interrupted: 2 of 3 points are missing. Run the same command again to measure what is left." in text
    )
    nearly = make_result("tp_1", [make_point(1), make_point(2)], config=grid, status="partial")
    assert "tp_1 was interrupted: 1 of 3 points is missing. " in flat(as_text(report([nearly])))
    # Points that failed are there, and have a reason each.
    failed = make_result("tp_1", [make_point(1), *(Point(b, 64, 32, "oom", reason="x") for b in (2, 4))], config=grid)
    failed.status = "partial"
    assert "interrupted" not in as_text(report([failed]))


def test_a_reason_is_said_once_with_all_settings_that_have_it(report: Any) -> None:
    points = [make_point(b, verdict="suspect", verdict_reasons=["runs differ"]) for b in (1, 2)]
    text = as_text(report([make_result(f"s{number}", points) for number in range(7)]))
    assert text.count("runs differ") == 1
    assert "suspect (s0, batch 1, 2 x length 64; s1, batch 1, 2 x length 64;" in flat(text)
    assert "s4, batch 1, 2 x length 64; and 2 more settings): runs differ" in flat(text)


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["tp_2_pp_2", "tp_4"], ["tp_2_pp_2", "tp_4"]),
        (["a" * 30, "b" * 30], ["aaaaaaa…aaaaaa", "bbbbbbb…bbbbbb"]),
        # Alike at both ends: in more room, from where they differ, or whole.
        (["tp_1_aaaa1aaaa_on", "tp_1_aaaa2aaaa_on"], ["tp_1_aaaa1aaaa_on", "tp_1_aaaa2aaaa_on"]),
        ([f"{'x' * 20}{end}{'y' * 20}" for end in "12"], ["xxxxxx…xxx1yy…yyyyyy", "xxxxxx…xxx2yy…yyyyyy"]),
        (
            [f"{'x' * 20}{middle}{'y' * 20}{end}{'z' * 20}" for middle, end in ("a1", "a2", "b1")],
            [*(f"{'x' * 20}a{'y' * 20}{end}{'z' * 20}" for end in "12"), "xxxxxx…xxxbyy…zzzzzz"],
        ),
    ],
)
def test_a_name_is_never_shortened_to_what_could_be_two(names: list[str], shown: list[str]) -> None:
    found = short_names(names, 14, 20)
    assert [found[name] for name in names] == shown


def test_a_column_of_names_alone_cannot_tell_two_settings_apart_and_the_table_does(report: Any) -> None:
    """Also where the other one is in another table."""
    names = [f"tp_1_{'x' * 30}{end}{'y' * 30}" for end in "12"]
    fast = make_result(names[0], [make_point(latencies_s=[1.0] * 2)])
    text = as_text(report([fast, make_result(names[1], [make_point(latencies_s=[2.0] * 2)])]))
    best = next(line for line in text.splitlines() if " throughput " in line)
    assert "…1" in best


def test_doubtful_points_are_listed_and_a_suspect_winner_is_marked(report: Any) -> None:
    points = [
        make_point(1),
        make_point(4, verdict="suspect", verdict_reasons=["2 requests were preempted"]),
        make_point(8, verdict="invalid", verdict_reasons=["9 prompt tokens came from the prefix cache"]),
    ]
    text = as_text(report([make_result(points=points)]))
    assert "suspect (tp_1, batch 4 x length 64): 2 requests were preempted" in text
    assert "invalid (tp_1, batch 8 x length 64): 9 prompt tokens came from the prefix cache" in flat(text)
    (winner,) = [line for line in text.splitlines() if line.startswith("      64  throughput")]
    assert "tok/s*  " in winner
    assert "* suspect" in text


def test_a_long_list_is_cut_in_the_terminal_and_whole_in_the_report(report: Any) -> None:
    points = [make_point(b, verdict="suspect", verdict_reasons=[f"reason {b}"]) for b in range(1, LIST_LIMIT + 4)]
    parts = report([make_result(points=points)])
    assert "… and 3 more lines in report.md" in as_text(parts)
    assert f"reason {LIST_LIMIT + 3}" not in as_text(parts)
    assert f"reason {LIST_LIMIT + 3}" in as_markdown(parts, [], [])


def test_unlike_things_are_grouped_and_the_difference_is_said(report: Any) -> None:
    fast = make_result("a100", [make_point(latencies_s=[0.1])], environment={"devices": [{"name": "NVIDIA A100"}]})
    text = flat(as_text(report([make_result("h100", [make_point(latencies_s=[1.0])]), fast])))
    assert (
        "2 groups of points that cannot be compared with each other: they differ in device. Each is ranked on" in text
    )
    assert "group 1: device NVIDIA A100 (a100)" in text
    assert "Best of group 1: device NVIDIA A100" in text
    assert "Best of group 2: device NVIDIA H100 80GB HBM3" in text
    assert "throughput 32.00 tok/s h100 1 1" in text
    assert "throughput 320.0 tok/s a100 1 1" in text


def test_a_value_that_only_one_group_knows_is_called_unknown_in_the_other(report: Any) -> None:
    other = make_result("b", [make_point()], engine={"quantization": "fp8"})
    text = flat(as_text(report([make_result("a", [make_point()]), other])))
    assert "quantization unknown (a)" in text
    assert "quantization fp8 (b)" in text


def test_a_difference_within_a_group_is_mentioned(report: Any) -> None:
    other = make_result("b", [make_point()], config={"gpu_memory_utilization": 0.5})
    text = flat(as_text(report([make_result("a", [make_point()]), other])))
    assert "The settings also differ in --gpu-memory-utilization; results.csv has the values." in text


def test_replicas_say_that_the_batch_is_each_ones_own(report: Any) -> None:
    assert "requests handed to each replica" in as_text(report(make_sweep([(1, 1, 2)])))
    assert "requests handed to each replica" not in as_text(report(make_sweep([(2, 1, 1)])))


def test_a_terminal_gets_no_control_characters(report: Any) -> None:
    point = Point(1, 8, 4, "error", reason="\x1b[2Jgone\x07\nnext\ud800")
    result = make_result("tp_1", [point, make_point()], environment={"devices": [{"name": "\x1b[31mred"}]})
    text = as_text(report([result]))
    assert not any(character in text for character in "\x1b\x07\ud800")
    assert "gone" in text


def test_the_text_leaves_the_tables_of_markdown_as_they_are(report: Any) -> None:
    parts = report(make_sweep([(1, 1, 1), (2, 1, 1)]))
    before = as_markdown(parts, [], [])
    as_text(parts)
    assert as_markdown(parts, [], []) == before


@pytest.mark.parametrize(("columns", "width"), [("80", 80), ("100", 100), ("200", 120), ("40", 80)])
def test_a_wide_terminal_is_used_up_to_what_can_be_read(
    report: Any, monkeypatch: pytest.MonkeyPatch, columns: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert terminal_width() == width
    lines = as_text(report([make_result(points=[make_point(verdict="suspect", verdict_reasons=["word " * 60])])]),
                    width=width).splitlines()  # fmt: skip
    assert width - 8 < max(map(len, lines)) <= width


# --- Markdown -----------------------------------------------------------------------------------------------------


def test_the_report_links_the_plots_and_says_what_is_missing(report: Any) -> None:
    text = as_markdown(report(make_sweep([(1, 1, 1)])), [("Memory", Path("/a/b/memory.png"))], ["Scaling: a|b"])
    assert "![Memory](memory.png)" in text
    assert "- Not drawn: Scaling: a\\|b" in text
    assert "[results.csv](results.csv)" in text


def test_every_line_of_a_table_has_the_same_number_of_cells(tmp_path: Path) -> None:
    path = tmp_path / "a|b.json"
    name = "x|y\\|z `c` <img src=x onerror=alert(1)>\n| new | row |"
    save_result(make_result(name, [make_point()], environment={"host": "<b>"}), path)
    text = as_markdown(sections_of(read_analysis([path])), [], [])
    lines = [line.replace("\\\\", "").replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
    # The best of three goals, the front of one point, and the setting; each with two lines of heading.
    assert [line.count("|") for line in lines] == [7] * 5 + [6] * 3 + [6] * 3
    assert "<" not in text


def test_names_cannot_inject_html_links_or_cells() -> None:
    hostile = "<script>x</script> [a](javascript:b) a|b `c` *d* \\| ~~e~~ & _f_ tp_2"
    text = escaped(hostile)
    assert "<" not in text
    assert "\\[a\\](javascript:b)" in text
    assert "a\\|b" in text
    assert "\\\\\\|" in text
    assert "\\_f\\_" in text
    assert text.endswith("tp_2")


def test_markdown_shows_what_was_written() -> None:
    assert escaped("a < b & c > d | e_f _g_") == "a &lt; b &amp; c &gt; d \\| e_f \\_g\\_"


# --- the decision -------------------------------------------------------------------------------------------------

NEAR = {"tp_2": [1.0, 1.02, 0.98], "pp_2": [1.03, 1.05, 1.01], "dp_2": [3.0, 3.02, 2.98]}
SIZES = {"tp_2": (2, 1, 1), "pp_2": (1, 2, 1), "dp_2": (1, 1, 2)}


def near() -> list[Result]:
    """On two devices, at an equal global batch of 4: TP and PP overlap, DP takes three times as long."""
    return [
        make_result(name, [make_point(4 // SIZES[name][2], latencies_s=seconds, replicas=SIZES[name][2])], SIZES[name])
        for name, seconds in NEAR.items()
    ]


def test_the_decision_comes_first_and_names_the_ties(report: Any) -> None:
    text = flat(as_text(report(near())))
    assert text.startswith("Best length best value setting")
    assert "tie, length 64, throughput, as good within the intervals: pp_2 (batch 4: 124.3 ±" in text
    assert "dp_2 (batch" not in text


def test_limits_are_named_and_what_misses_them_least(report: Any) -> None:
    parts = report(near(), Question(Limits(latency_s=0.5, ttft_s=5, percent=90)))
    text = flat(as_text(parts))
    assert "limits latency p90 ≤ 0.5 s, TTFT p90 ≤ 5 s" in text
    assert "length 64: no point meets the limits; nearest: tp_2 at batch 4, latency p90 1.016 s" in text


def test_a_price_adds_a_ranking_by_cost(report: Any) -> None:
    text = flat(as_text(report(near(), Question(price=3.6))))
    # Two devices at 0.001 a second each, 128 tok/s: 15.625 for a million.
    assert "64 cost 15.6 ±1.1 per M tokens tp_2 4 2" in text


def test_one_run_says_that_it_shows_no_tie(report: Any) -> None:
    assert "a single run has no interval and cannot show a tie" in flat(
        as_text(report([make_result(points=[make_point(1, 64, [1.0])])]))
    )


def test_of_many_ties_three_are_named_and_the_others_counted(report: Any) -> None:
    results = [make_result(f"s{number}", [make_point(latencies_s=[1.0, 1.1, 0.9])]) for number in range(6)]
    text = flat(as_text(report(results)))
    assert "as good within the intervals: s1 (batch 1: 32 ±12 tok/s), s2" in text
    assert "and 2 more settings: summary.json" in text


# --- TP, PP or DP, scaling, Pareto --------------------------------------------------------------------------------


def section(parts: Sequence[Section], start: str) -> Section:
    (found,) = [part for part in parts if part.title.startswith(start)]
    return found


def test_tp_pp_and_dp_stand_side_by_side(report: Any) -> None:
    part = section(report(near()), "TP, PP or DP?")
    assert part.title == "TP, PP or DP? 2 devices, length 64, output tok/s"
    assert part.header == ("requests", "TP=2", "PP=2", "DP=2")
    (row,) = part.rows
    assert row == ["4", "128.0", "124.3", "42.67"]
    assert [isinstance(cell, Best) for cell in row] == [False, True, True, False]
    assert part.pairs == [("fastest", "TP=2 at 4 requests, PP=2 at 4; where two are named, their intervals overlap")]
    assert part.lines[1] == "95 % intervals: within ±7.0 %."


def test_a_layout_that_is_the_fastest_everywhere_is_told_in_a_word(report: Any) -> None:
    batches = (1, 2, 4)
    results = [
        make_result("tp_2", [make_point(batch, latencies_s=[1.0] * 2) for batch in batches], (2, 1, 1)),
        make_result("pp_2", [make_point(batch, latencies_s=[2.0] * 2) for batch in batches], (1, 2, 1)),
    ]
    assert section(report(results), "TP, PP or DP?").pairs == [("fastest", "TP=2, at all 3 batch sizes")]


def test_many_layouts_are_one_table_but_in_a_terminal_as_many_as_fit(report: Any) -> None:
    sizes = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 2, 1), (2, 4, 1), (4, 1, 2), (2, 1, 4)]
    results = [
        make_result(f"{tp}{pp}{dp}", [make_point(16 // dp, latencies_s=[1.0, 1.1], replicas=dp)], (tp, pp, dp))
        for tp, pp, dp in sizes
    ]
    part = section(report(results), "TP, PP or DP?")
    names = ("TP=8", "PP=8", "DP=8", "TP=4 PP=2", "TP=4 DP=2", "TP=2 PP=4", "TP=2 DP=4")
    assert part.header == ("requests", *names)
    heads = {
        width: [line.split("  ") for line in as_text([part], width=width).splitlines() if "  requests  " in line]
        for width in (120, 80, 60)
    }
    assert [[len([name for name in line if name]) for line in found] for found in heads.values()] == [[8], [8], [6, 3]]
    shown = [name.strip() for line in heads[60] for name in line if name]
    assert shown == ["requests", *names[:5], "requests", *names[5:]]
    assert max(map(len, as_text([part], width=60).splitlines())) <= 60


def test_a_layout_without_a_common_batch_is_named(report: Any) -> None:
    results = [
        make_result("tp_2", [make_point(1)], (2, 1, 1)),
        make_result("dp_2", [make_point(4, replicas=2)], (1, 1, 2)),
    ]
    text = flat(as_text(report(results)))
    assert "TP=2, DP=2: not compared, because no two of them were measured at the same number of requests." in text


def test_scaling_is_told_strong_and_weak(report: Any) -> None:
    one = make_result("tp_1", [make_point(b, latencies_s=[1.0, 1.0]) for b in (2, 4)])
    two = make_result("dp_2", [make_point(2, latencies_s=[0.8, 0.8], replicas=2)], (1, 1, 2))
    part = section(report([one, two]), "Scaling against tp_1")
    assert part.rows == [
        ["dp_2", "2", "64", "strong", "4", "1.250", "0.6250"],
        ["dp_2", "2", "64", "weak", "2", "2.500", "1.250"],
    ]


def test_weak_scaling_against_replicas_is_told_of_more_replicas_alone(report: Any) -> None:
    """With as many, an equal batch per replica is an equal global batch."""
    two = make_result("dp_2", [make_point(2, latencies_s=[1.0, 1.0], replicas=2)], (1, 1, 2))
    wide = make_result("tp_2_dp_2", [make_point(2, latencies_s=[0.8, 0.8], replicas=2)], (2, 1, 2))
    four = make_result("dp_4", [make_point(2, latencies_s=[1.0, 1.0], replicas=4)], (1, 1, 4))
    part = section(report([two, wide, four]), "Scaling against dp_2")
    assert [row[:4] for row in part.rows] == [["dp_4", "4", "64", "weak"], ["tp_2_dp_2", "4", "64", "strong"]]


def test_the_front_is_listed(report: Any) -> None:
    part = section(report(near()), "Pareto front")
    # Nothing tells the two apart.
    assert [row[:3] for row in part.rows] == [["64", "tp_2", "4"], ["64", "pp_2", "4"]]


# --- unlike things ------------------------------------------------------------------------------------------------


def unlike() -> list[Result]:
    gpu = {"devices": [{"name": "NVIDIA A100"}]}
    return [
        make_result("h100", [make_point()]),
        make_result("a100", [make_point(latencies_s=[0.1, 0.1])], environment=gpu),
    ]


def test_mixed_things_are_marked_in_every_title_that_ranks(report: Any) -> None:
    parts = report(unlike(), Question(allow_mixed=True))
    titles = [part.title for part in parts]
    assert "Best [MIXED: device]" in titles
    assert "Pareto front: throughput per device against latency [MIXED: device]" in titles
    assert all("[MIXED" in title for title in titles if title not in ("Measured", "Settings"))
    assert "--allow-mixed ranks points together that differ in device" in flat(as_text(parts))
    assert [row[3] for row in section(parts, "Best").rows] == ["a100"] * 3


def test_columns_of_ones_own_make_the_groups(report: Any) -> None:
    results = [make_result(name, [make_point()], config={"engine_args": [f"--{name}"]}) for name in ("x", "y")]
    parts = report(results, Question(group_by=("engine_args", "model")))
    assert [part.title for part in parts if part.title.startswith("Best")] == [
        "Best of group 1: vLLM's flags --x", "Best of group 2: vLLM's flags --y",
    ]  # fmt: skip
    # Also where they do not tell everything apart.
    mixed = report(unlike(), Question(group_by=("name",), allow_mixed=True))
    assert len([part for part in mixed if part.title.startswith("Best of group")]) == 2


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (Question(group_by=("model",)), "--group-by model: points that differ in device_name would be ranked together"),
        (Question(group_by=("colour",)), "--group-by colour: no such column"),
        (Question(baseline="tp_9"), "--baseline tp_9: no such setting; choose one of a100, h100"),
    ],
)
def test_a_question_that_the_files_cannot_answer_is_refused(report: Any, question: Question, words: str) -> None:
    with pytest.raises(QuestionError, match=words):
        report(unlike(), question)


# --- two sets -----------------------------------------------------------------------------------------------------


def test_a_comparison_is_told_first_with_the_changes_on_top(report: Any) -> None:
    def points(factor: float) -> list[Point]:
        steady = (1.0, 1.001, 0.999, 1.0005)
        return [make_point(b, latencies_s=[f * s for s in steady]) for b, f in ((1, 1.0), (2, factor), (4, 1.0))]

    newer = {"versions": {"vllm": "0.33.0"}}
    parts = report([make_result(points=points(1.05), environment=newer)], old=[make_result(points=points(1.0))])
    part = parts[0]
    assert part.title == "Compared with the earlier results"
    assert part.pairs[0] == ("points compared", "3: 1 worse, 2 no difference")
    assert part.pairs[2] == ("vLLM", "0.32.0 before, 0.33.0 now")
    assert part.rows[0][:4] == ["tp_1", "64", "2", "worse"]
    assert part.rows[0][4].startswith("0.952")
    assert part.rows[0][5:] == ["63.99", "60.94"]


@pytest.mark.slow
def test_runs_as_many_as_their_interval_needs_are_called_adaptive(report: Any) -> None:
    old, new = (make_result(points=[make_point()], config={"num_runs": runs}) for runs in (3, None))
    assert ("--num-runs", "3 before, adaptive now") in report([new], old=[old])[0].pairs
    assert ("--num-runs", "adaptive before, 3 now") in report([old], old=[new])[0].pairs
    assert not [name for name, _ in report([new], old=[new])[0].pairs if name == "--num-runs"]


def test_sets_of_unlike_things_are_marked(report: Any) -> None:
    parts = report(unlike()[1:], old=[make_result("a100", [make_point()])])
    assert parts[0].title == "Compared with the earlier results [MIXED: device]"


# --- much ---------------------------------------------------------------------------------------------------------


def test_a_long_table_is_cut_in_the_terminal_and_in_the_report() -> None:
    part = Section("Long", header=("number",), rows=[[str(number)] for number in range(TEXT_ROWS + 5)], more=7)
    text = as_text([part])
    assert "… and 12 more rows in report.md" in text
    assert len(text.splitlines()) == TEXT_ROWS + 4
    assert "… and 7 more rows: results.csv and summary.json have all." in as_markdown([part], [], [])


@pytest.mark.slow
def test_more_points_than_a_report_can_hold_are_counted(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 20
    for module in (sections, layouts):
        monkeypatch.setattr(module, "ROW_LIMIT", limit)
    batches = range(1, limit + 4)
    results = [make_result(name, [make_point(b, latencies_s=[1.0]) for b in batches], size) for name, size in
               (("tp_2", (2, 1, 1)), ("pp_2", (1, 2, 1)))]  # fmt: skip
    part = section(report(results, old=results), "TP, PP or DP?")
    assert (len(part.rows), part.more) == (limit, 3)
    part = section(report(results, old=results), "Compared")
    assert (len(part.rows), part.more) == (limit, limit + 6)


# --- which number stands where ------------------------------------------------------------------------------------


def test_ratios_are_averaged_as_ratios_are(report: Any) -> None:
    """Twice as fast and half as fast is as fast; their plain mean would be 1.25."""

    def points(first_s: float, second_s: float) -> list[Point]:
        return [make_point(b, latencies_s=[s, s]) for b, s in ((1, first_s), (2, second_s))]

    part = report([make_result(points=points(0.5, 2.0))], old=[make_result(points=points(1.0, 1.0))])[0]
    assert part.pairs[1] == ("throughput, new / old", "1.0000 (geometric mean), from 0.5000 to 2.0000")
    assert [row[2:] for row in part.rows] == [
        ["2", "worse", "0.5000", "64.00", "32.00"], ["1", "better", "2.000", "32.00", "64.00"],
    ]  # fmt: skip


def test_a_comparison_of_sets_without_a_common_point_says_so(report: Any) -> None:
    part = report([make_result("tp_1", points=[make_point(1)])], old=[make_result("tp_2", points=[make_point(1)])])[0]
    assert part.title.startswith("Compared with the earlier results")
    assert part.pairs[0] == ("points compared", "none")
    assert not part.rows
    assert any("1 point is only in the new results." in line for line in part.lines)


def test_changes_are_counted_and_ordered_by_how_bad_they_are(report: Any) -> None:
    now_s = {1: [1.0, 1.0], 2: [0.5, 0.5], 4: [1.0], 8: [2.0, 2.0], 32: [4.0, 4.0], 64: [1.0]}
    new = [make_point(b, latencies_s=runs_s) for b, runs_s in now_s.items()]
    new.insert(4, make_point(16, verdict="invalid"))
    old = [make_point(b, latencies_s=[1.0, 1.0]) for b in (1, 2, 4, 8, 16, 32, 128)]
    part = report([make_result(points=new)], old=[make_result(points=old)])[0]
    assert part.pairs[0] == ("points compared", "6: 1 better, 2 worse, 1 lost, 1 no difference, 1 unknown")
    assert [(row[2], row[3]) for row in part.rows] == [
        ("16", "lost"), ("32", "worse"), ("8", "worse"), ("2", "better"), ("4", "unknown"), ("1", "no difference"),
    ]  # fmt: skip
    # 64 is new, and nobody asks for 128 any more.
    assert [line.split(" (")[0] for line in part.lines if " only in the " in line] == [
        "1 point is only in the new results.", "1 point is only in the earlier results.",
    ]  # fmt: skip


def test_the_largest_batch_that_both_have_stands_for_the_scaling(report: Any) -> None:
    seconds = {1: 1.0, 2: 1.0, 4: 1.0}
    one = make_result("tp_1", [make_point(b, latencies_s=[s, s]) for b, s in seconds.items()])
    # Strong: 1 of 2 replicas is 2, 2 is 4, and 4 is 8, which the baseline has not; weak: 1, 2 and 4.
    faster = {1: 0.8, 2: 0.625, 4: 0.5}
    two = make_result("dp_2", [make_point(b, latencies_s=[s, s], replicas=2) for b, s in faster.items()], (1, 1, 2))
    part = section(report([one, two]), "Scaling against tp_1")
    assert part.rows == [
        ["dp_2", "2", "64", "strong", "4", "1.600", "0.8000"],
        ["dp_2", "2", "64", "weak", "4", "4.000", "2.000"],
    ]


def test_the_front_and_the_best_are_told_with_their_own_numbers(report: Any) -> None:
    parts = report([make_result("tp_2", [make_point(4, latencies_s=[2.0, 2.0])], (2, 1, 1))])
    assert section(parts, "Pareto front").rows == [["64", "tp_2", "4", "2.000", "32.00"]]
    assert [row[1:] for row in section(parts, "Best").rows] == [
        ["throughput", "64.00 tok/s", "tp_2", "4", "2"],
        ["per device", "32.00 tok/s/device", "tp_2", "4", "2"],
        ["latency", "2.000 s", "tp_2", "4", "2"],
    ]
