"""The bounds of the flags of analyze_results.py, and the exit codes of its gate, in process."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import analyze_results
from batch_inference.analyze import flags
from batch_inference.analyze.compare import SetComparison
from batch_inference.analyze.flags import build_parser, names_of, not_negative, number, percentage, positive


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
