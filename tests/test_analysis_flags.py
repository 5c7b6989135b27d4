"""The bounds of the flags of analyze_results.py, and the exit codes of its gate, in process."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import analyze_results
from batch_inference.analyze import flags
from batch_inference.analyze.compare import SetComparison
from batch_inference.analyze.flags import build_parser, names_of, not_negative, number, percentage, positive
from conftest import REPOSITORY


def test_the_help_fits_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, build_parser().format_help().splitlines())) <= 80


@pytest.mark.parametrize(
    ("parse", "good", "bad"),
    [
        (number, ["-1", "0", "1e9"], ["nan", "inf", "x", ""]),
        (positive, ["0.001", "1e9"], ["0", "-1", "nan", "inf"]),
        (not_negative, ["0", "5"], ["-0.001", "nan"]),
        (percentage, ["0.1", "99.9", "100"], ["0", "100.1", "-1", "nan"]),
    ],
)
def test_bounds_are_allowed_or_not_as_they_say(
    parse: Callable[[str], float], good: Sequence[str], bad: Sequence[str]
) -> None:
    assert [parse(text) for text in good] == list(map(float, good))
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


def test_limits_are_at_percentile_99_unless_told_otherwise() -> None:
    assert flags.parse(["--input", "x"]).slo_percentile == 99
    assert flags.parse(["--input", "x", "--slo-percentile", "50"]).slo_percentile == 50


def test_names_are_separated_by_commas() -> None:
    assert names_of("plot")(" a, b ,,c") == ("a", "b", "c")
    with pytest.raises(argparse.ArgumentTypeError, match="names no plot"):
        names_of("plot")(" , ")


@pytest.mark.parametrize(
    ("changes", "ratios", "percent", "code"),
    [
        (["worse", "better"], [0.9, 2.0], 5.0, 3),
        (["worse", "better"], [0.9, 2.0], 15.0, 0),
        (["worse", "better"], [0.9, 2.0], None, 0),
        (["lost", "no difference"], [float("nan"), 1.0], 99.0, 3),
        (["no difference", "better"], [0.5, 2.0], 5.0, 0),
        (["unknown", "unknown"], [0.5, 0.5], 5.0, 2),
        (["unknown", "no difference"], [0.5, 1.0], 5.0, 0),
        ([], [], 5.0, 2),
    ],
)
def test_the_gate_tells_by_its_exit_code(
    changes: list[str], ratios: list[float], percent: float | None, code: int
) -> None:
    points = pd.DataFrame({"change": changes, "ratio": ratios})
    analysis: Any = SimpleNamespace(comparison=SetComparison(points))
    assert analyze_results.gate(analysis, percent) == code


def test_without_a_comparison_there_is_nothing_to_judge() -> None:
    analysis: Any = SimpleNamespace(comparison=None)
    assert analyze_results.gate(analysis, 5.0) == 0


# --- to the letter ------------------------------------------------------------------------------------------------


def test_every_flag_has_its_default() -> None:
    found = vars(flags.parse(["--input", "x"]))
    assert found.pop("input") == Path("x")
    assert found.pop("slo_percentile") == 99.0
    assert (found.pop("allow_mixed"), found.pop("no_plots")) == (False, False)
    assert found.pop("goal") == "throughput"
    assert found == dict.fromkeys([
        "output_dir", "model", "setting", "max_latency_s", "max_ttft_s", "max_tpot_s", "device_hour_price", "baseline",
        "compare", "fail_on_regression", "group_by", "plots", "job", "job_requests", "deadline_hours",
    ])  # fmt: skip


def test_every_flag_is_read_as_what_it_means() -> None:
    words = (
        "--input a --output-dir b --model m --setting s,t --max-latency-s 1 --max-ttft-s 2 --max-tpot-s 3 "
        "--slo-percentile 90 --device-hour-price 4 --baseline tp_1 --compare old --fail-on-regression 0 "
        "--group-by dtype,model --allow-mixed --plots ttft,tpot --job j --job-requests 1e6 --deadline-hours 8 "
        "--goal cost"
    )
    assert vars(flags.parse(words.split())) == {
        "input": Path("a"), "output_dir": Path("b"), "model": "m", "setting": ("s", "t"), "max_latency_s": 1.0,
        "max_ttft_s": 2.0, "max_tpot_s": 3.0, "slo_percentile": 90.0, "device_hour_price": 4.0, "baseline": "tp_1",
        "compare": Path("old"), "fail_on_regression": 0.0, "group_by": ("dtype", "model"), "allow_mixed": True,
        "no_plots": False, "plots": ("ttft", "tpot"), "job": Path("j"), "job_requests": 1e6, "deadline_hours": 8.0,
        "goal": "cost",
    }  # fmt: skip
    assert flags.parse(["--input", "x", "--no-plots"]).plots == ()


def test_the_help_is_this(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    found = build_parser().format_help()
    assert found.splitlines() == (REPOSITORY / "tests" / "expected" / "help.txt").read_text().splitlines()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--input", "x", "--fail-on-regression", "0"],
         "--fail-on-regression 0: there is nothing to compare with; add --compare DIR"),
        (["--input", "x", "--goal", "cost"],
         "--goal cost: nothing says what a device costs; add --device-hour-price PRICE"),
        (["--input=--"], "--input --: the dashes are no value; give one"),
        (["--input", "x", "--max-tpot-s", "-1"], "argument --max-tpot-s: -1 is not above 0"),
        (["--input", "x", "--max-latency-s", "x"], "argument --max-latency-s: 'x' is not a number"),
        (["--input", "x", "--slo-percentile", "0"], "argument --slo-percentile: 0 is not above 0 and at most 100"),
        (["--input", "x", "--fail-on-regression", "-0.5"], "argument --fail-on-regression: -0.5 is below 0"),
        (["--input", "x", "--device-hour-price", "1000000001"],
         "argument --device-hour-price: '1000000001' is over 1000000000"),
        (["--input", "x", "--job-requests", "1.5"], "argument --job-requests: 1.5 is not a whole number"),
        (["--input", "x", "--job-requests", "0"], "argument --job-requests: 0 is not above 0"),
        (["--input", "x", "--setting", ","], "argument --setting: ',' names no setting"),
        (["--input", "x", "--group-by", " ,"], "argument --group-by: ' ,' names no column"),
        ([], "the following arguments are required: --input"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_the_flag(words: list[str], told: str) -> None:
    with pytest.raises(flags.UsageError) as caught:
        flags.parse(words)
    assert str(caught.value) == told


def test_numbers_may_be_as_far_from_zero_below_as_above() -> None:
    assert number("-1e9") == -1e9
    with pytest.raises(argparse.ArgumentTypeError, match=r"^'-1.1e9' is over 1000000000$"):
        number("-1.1e9")


def test_what_is_read_may_be_called_as_it_likes_and_what_is_written_may_not() -> None:
    assert flags.old_path("a\nb") == Path("a\nb")
    assert flags.parse(["--input", "a\nb", "--compare", "c\nd"]).compare == Path("c\nd")
    with pytest.raises(argparse.ArgumentTypeError, match="was given; it contains"):
        flags.new_path("a\nb")
