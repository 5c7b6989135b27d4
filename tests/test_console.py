"""What is shown while a setting is measured."""

from __future__ import annotations

import io
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.results import Point
from batch_inference.measure.console import Console, point_words
from builders import make_point, make_result, make_run


def shown(point: Point) -> str:
    make_result(points=[point])
    return point_words(point)


def measure(console: Console, points: list[Point], runs: int = 3) -> None:
    """Tell the console of a sweep, as the experiment does."""
    console.start(ExperimentConfig(num_runs=runs), len(points), [])
    for point in points:
        measured = Point(point.batch_size, point.seq_len, point.max_tokens, "ok")
        for index in range(2):
            console.running(measured, "warmup", index)
            measured.warmups.append({"latency_s": 1.0})
        for index, run in enumerate(point.runs):
            console.running(measured, "run", index)
            measured.runs.append(run)
        console.point_done(point)
    console.close()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_point_is_one_line_of_all_that_matters() -> None:
    point = make_point(64, 2048, latencies_s=[1.0, 1.01, 0.99], max_tokens=128)
    assert shown(point) == "8192 tok/s ±2.5%, 1.00 s, TTFT 0.100 s, 60.0 GiB, valid"


def test_what_is_unknown_is_left_out() -> None:
    run = make_run(1.0, memory={"scope": "replica", "used_gib": None})
    assert shown(make_point(runs=[run], verdict="suspect")) == "32.00 tok/s, 1.00 s, TTFT 0.100 s, suspect"


def test_every_line_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    reasons = ["another process was on the devices; end it, or choose others by CUDA_VISIBLE_DEVICES"]
    large = make_point(4096, 131072, latencies_s=[7000.0, 9999.0], verdict="suspect", verdict_reasons=reasons)
    failed = Point(8192, 131072, 32, "oom", reason="torch.OutOfMemoryError: " + "CUDA out of memory. " * 9)
    make_result(points=[large, failed])
    console = Console()
    measure(console, [large] * 99)
    console.repeating(large)
    console.point_done(failed)
    printed = capsys.readouterr().err
    assert max(map(len, printed.splitlines())) <= 80
    assert "[99/99] 4096 x 131072: " in printed
    assert reasons[0] in " ".join(printed.split())


def test_without_a_terminal_there_is_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    measure(Console(), [make_point(), make_point(2)])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "\r" not in "".join(lines)


def test_a_terminal_shows_points_and_runs_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    measure(Console(), [make_point(), make_point(2, latencies_s=[1.0] * 8)])
    bars = re.findall(r"(\d+ x 64, [\w-]+ \d).*?(\d+)% after \d+:\d+, (.*?) left", terminal.getvalue())
    percents = [int(percent) for _, percent, _ in bars]
    assert percents == sorted(percents)
    # Two warm-ups and three runs make a point, and the second takes longer than expected.
    assert {("1 x 64, warm-up 2", "10"), ("1 x 64, run 3", "40"), ("2 x 64, warm-up 1", "50")} <= {
        (what, percent) for what, percent, _ in bars
    }
    assert max(percents[:-1]) < 100
    assert re.fullmatch(r"\d+:\d+", bars[-1][2])


def test_verbose_shows_what_is_added_to_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ExperimentConfig(output_file=str(tmp_path / "tp_1_results.json"), verbose=True)
    config.log_path.write_text("of an earlier sweep\n")
    console = Console()
    console.loading(config)
    with config.log_path.open("a") as log:
        log.write("loading weights\nunfini")
    console.close()
    printed = capsys.readouterr().err.splitlines()
    assert printed[-1] == "loading weights"
    assert "of an earlier sweep" not in printed


def test_the_log_is_shown_while_it_grows_and_may_appear_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown_lines: list[str] = []
    arrived = threading.Event()
    console = Console()

    def note(text: Any) -> None:
        shown_lines.append(text)
        if "line" in text:
            arrived.set()

    monkeypatch.setattr(console, "note", note)
    config = ExperimentConfig(output_file=str(tmp_path / "tp_1_results.json"), verbose=True)
    console.loading(config)
    for text in ("line one\nli", "ne two\n"):
        arrived.clear()
        with config.log_path.open("a") as log:
            log.write(text)
        assert arrived.wait(5)
    console.close()
    assert shown_lines[2:] == ["line one", "line two"]
