"""The summary and report.md: what they say, how wide, and that no file can break them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from batch_inference.report import LIST_LIMIT, Section, as_markdown, as_text, escaped, sections, with_interval
from batch_inference.results import Point, Result, save_result
from batch_inference.tables import load_setting, point_table
from builders import make_point, make_result, make_sweep, save_all


@pytest.fixture
def report(tmp_path: Path) -> Any:
    def build(results: Sequence[Result]) -> list[Section]:
        settings = [load_setting(path) for path in save_all(results, tmp_path)]
        return sections(settings, point_table(settings))

    return build


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
    assert ["tp_1", "1", "4/4", "complete", "40.0"] in table
    assert ["tp_2", "2", "1/1", "complete", "40.0"] in table
    assert ["64", "throughput", "tp_2", "2", "4", "42.67", "tok/s"] in table
    assert ["64", "per", "device", "tp_1", "1", "1", "32.00", "tok/s/device"] in table
    assert ["128", "latency", "tp_1", "1", "1", "2.000", "s"] in table


def test_the_summary_fits_eighty_columns_whatever_the_names(report: Any) -> None:
    long = make_sweep([(1, 1, 1), (2, 1, 1)], batch_sizes=(1, 1024), seq_lens=(131072,))
    for result in long:
        result.name = result.name + "_with_a_very_long_name_" * 4
        result.config["model"] = "/a/folder/" * 20
        result.points[0].verdict, result.points[0].verdict_reasons = "suspect", ["ran in waves " * 30]
    long[1].environment["devices"] = [{"name": "Device " * 20}]
    failed = make_result("failed", status="failed", engine={"failure": {"reason": "x" * 5000}})
    text = as_text(report([*long, failed]))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" in text


def test_failed_settings_and_lost_points_are_named_with_the_reason(report: Any) -> None:
    lost = [Point(16, n, 32, "oom", reason="CUDA out of memory") for n in (64, 128)]
    skipped = Point(32, 64, 32, "skipped", reason="implied by batch 16")
    failed = make_result("tp_8", sizes=(8, 1, 1), status="failed")
    failed.engine = {"failure": {"reason": "Free memory is less than desired", "log_tail": ["secret line"]}}
    text = flat(as_text(report([make_result(points=[make_point(), *lost, skipped]), failed])))
    assert "tp_8 failed: Free memory is less than desired" in text
    assert "tp_1: oom, batch 16 x length 64, 128: CUDA out of memory" in text
    assert "tp_1: skipped, batch 32 x length 64: implied by batch 16" in text


def test_points_that_make_no_grid_are_named_one_by_one(report: Any) -> None:
    lost = [Point(b, n, 32, "error", reason="x") for b, n in ((1, 8), (2, 16))]
    assert "tp_1: error, batch x length 1x8, 2x16: x" in as_text(report([make_result(points=lost)]))


def test_a_failure_without_words_is_still_a_failure(report: Any) -> None:
    result = make_result("tp_8", [Point(1, 8, 4, "error")], status="failed")
    result.engine, result.environment = {}, {}
    text = as_text(report([result]))
    assert "tp_8 failed: no reason is given" in text
    assert "tp_8: error, batch 1 x length 8: no reason is given" in text


def test_doubtful_points_are_listed_and_a_suspect_winner_is_marked(report: Any) -> None:
    points = [make_point(1), make_point(4, verdict="suspect", verdict_reasons=["2 requests were preempted"])]
    text = as_text(report([make_result(points=points)]))
    assert "tp_1: suspect, batch 4 x length 64: 2 requests were preempted" in text
    (winner,) = [line for line in text.splitlines() if " throughput " in line]
    assert winner.endswith("tok/s*")
    assert "* suspect" in text


def test_a_long_list_is_cut_in_the_terminal_and_whole_in_the_report(report: Any) -> None:
    points = [make_point(b, verdict="suspect", verdict_reasons=[f"reason {b}"]) for b in range(1, LIST_LIMIT + 4)]
    parts = report([make_result(points=points)])
    assert "… and 3 more in report.md" in as_text(parts)
    assert f"reason {LIST_LIMIT + 3}" not in as_text(parts)
    assert f"reason {LIST_LIMIT + 3}" in as_markdown(parts, [], [])


def test_unlike_things_are_grouped_and_the_difference_is_said(report: Any) -> None:
    fast = make_result("a100", [make_point(latencies_s=[0.1])], environment={"devices": [{"name": "NVIDIA A100"}]})
    text = flat(as_text(report([make_result("h100", [make_point(latencies_s=[1.0])]), fast])))
    assert "2 groups of unlike points, never ranked together; they differ in device_name:" in text
    assert "group 1: device_name NVIDIA A100 (a100)" in text
    assert "Best of group 1: device_name NVIDIA A100" in text
    assert "Best of group 2: device_name NVIDIA H100 80GB HBM3" in text
    assert "throughput h100 1 1 32.00 tok/s" in text
    assert "throughput a100 1 1 320.0 tok/s" in text


def test_a_value_that_only_one_group_knows_is_called_unknown_in_the_other(report: Any) -> None:
    other = make_result("b", [make_point()], engine={"quantization": "fp8"})
    text = flat(as_text(report([make_result("a", [make_point()]), other])))
    assert "quantization unknown (a)" in text
    assert "quantization fp8 (b)" in text


def test_a_difference_within_a_group_is_mentioned(report: Any) -> None:
    other = make_result("b", [make_point()], config={"gpu_memory_utilization": 0.5})
    text = flat(as_text(report([make_result("a", [make_point()]), other])))
    assert "Settings also differ in gpu_memory_utilization; see results.csv." in text


def test_replicas_say_that_the_batch_is_each_ones_own(report: Any) -> None:
    assert "requests handed to each replica" in as_text(report(make_sweep([(1, 1, 2)])))
    assert "requests handed to each replica" not in as_text(report(make_sweep([(2, 1, 1)])))


def test_a_terminal_gets_no_control_characters(report: Any) -> None:
    point = Point(1, 8, 4, "error", reason="\x1b[2Jgone\x07\nnext\ud800")
    result = make_result("tp_1", [point, make_point()], environment={"devices": [{"name": "\x1b[31mred"}]})
    text = as_text(report([result]))
    assert not any(character in text for character in "\x1b\x07\ud800")
    assert "gone" in text


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
    settings = [load_setting(path)]
    text = as_markdown(sections(settings, point_table(settings)), [], [])
    lines = [line.replace("\\\\", "").replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in lines] == [6] * 3 + [7] * 5
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
