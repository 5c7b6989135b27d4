"""Tables of text, as tabulate wrote them, which drew them before; and what may go to a terminal."""

from __future__ import annotations

import pytest

from batch_inference.analyze.flags import UsageError
from batch_inference.core.config import ConfigError
from batch_inference.core.failures import WorkFailedError
from batch_inference.core.text import escaped, has_control, in_short, plain, quoted, table, table_in_markdown

HEADER, SIDES = ("setting", "n", "note"), ("left", "right", "left")
ROWS = [["tp_1", "1", "valid"], ["a longer name", "1024", ""], ["tp_2", "", " x "]]


def test_a_table_for_a_terminal() -> None:
    assert table(HEADER, ROWS, SIDES).splitlines() == [
        "setting           n  note",
        "-------------  ----  -----",
        "tp_1              1  valid",
        "a longer name  1024",
        "tp_2                 x",
    ]


def test_a_table_without_rows_is_its_header() -> None:
    assert table(HEADER, [], SIDES) == "setting  n  note\n-------  -  ----"


def test_a_table_for_markdown() -> None:
    assert table_in_markdown(HEADER, ROWS, SIDES).splitlines() == [
        "| setting       |    n | note   |",
        "|---------------|------|--------|",
        "| tp_1          |    1 | valid  |",
        "| a longer name | 1024 |        |",
        "| tp_2          |      | x      |",
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", r"a\nb\tc"),
        ("\x1b[31m\x00\x7f\x9b", r"\x1b[31m\x00\x7f\x9b"),
        ("\u2028\u202e\u2066", r"\u2028\u202e\u2066"),
        ("é漢 字\udcff", "é漢 字\udcff"),
    ],
)
def test_what_steers_a_terminal_is_escaped_or_blotted_out(text: str, shown: str) -> None:
    assert escaped(text) == shown
    assert not has_control(plain(text))
    assert has_control(text) == (text != shown)


def test_a_value_in_a_message_is_one_short_line_and_no_escape_is_cut() -> None:
    assert quoted("x\n") == r"'x\n'"
    assert in_short("\n" * 100) == r"\n" * 40 + "…" + r"\n" * 39


def test_a_message_is_clean_whoever_made_it() -> None:
    assert str(ConfigError("--a: b\x1b\nc")) == r"--a: b\x1b\nc"
    assert str(UsageError("--a: b\x1b\nc")) == r"--a: b\x1b\nc"
    assert str(WorkFailedError("b\x1b\n  log: c\r")) == "b\\x1b\n  log: c\\r"
