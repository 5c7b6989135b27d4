"""Tables of text, as tabulate wrote them, which drew them before; and what may go to a terminal."""

from __future__ import annotations

import pytest

from batch_inference.analyze.flags import UsageError
from batch_inference.core.config import ConfigError
from batch_inference.core.failures import WorkFailedError
from batch_inference.core.text import (
    about_time,
    counted,
    escaped,
    has_control,
    in_short,
    listed,
    plain,
    quoted,
    short,
    short_name,
    significant,
    table,
    table_in_markdown,
    wrapped,
)

HEADER, SIDES = ("setting", "n", "note"), ("left", "right", "left")
ROWS = [["tp_1", "1", "valid"], ["a longer name", "1024", ""], ["tp_2", "", " x "]]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.003361, "0.00336"), (0.0663, "0.0663"), (23.874, "23.9"), (1234.5, "1234"), (0, "0"), (None, ""),
     (-0.5, "-0.500"), (1e-300, "0.000000000000")],
)  # fmt: skip
def test_small_numbers_have_as_many_digits_as_large_ones(value: float | None, text: str) -> None:
    assert significant(value) == text


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
    ("width", "short"), [(11, "abcdefghijk"), (10, "abcde…hijk"), (9, "abcd…hijk"), (5, "ab…jk"), (3, "a…k")]
)
def test_a_long_name_keeps_its_beginning_and_its_end(width: int, short: str) -> None:
    assert short_name("abcdefghijk", width) == short
    assert len(short) <= width


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.99994, 4, "0.9999"), (1.0, 4, "1.000"), (-1.5, 4, "-1.500"), (9999.6, 4, "10000"), (12345.6, 4, "12346"),
        (2.0, 3, "2.00"), (0.1234, 3, "0.123"), (1234.5, 3, "1234"),
    ],
)  # fmt: skip
def test_a_number_has_so_many_digits(value: float, digits: int, text: str) -> None:
    assert short(value, digits) == text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "about 1 s"), (89.4, "about 89 s"), (90, "about 2 min"), (5399, "about 90 min"), (5400, "about 1.5 h")],
)
def test_a_time_is_said_in_the_unit_that_fits(seconds: float, words: str) -> None:
    assert about_time(seconds) == words


def test_one_is_no_plural() -> None:
    assert [counted(number, "point") for number in (0, 1, 2)] == ["0 points", "1 point", "2 points"]


def test_lines_are_as_long_as_they_may_be_and_no_longer() -> None:
    assert wrapped("ab cd ef", width=5) == ["ab cd", "ef"]
    assert wrapped("ab cd ef", 2, width=5) == ["ab cd", "  ef"]
    # A path or a flag can be copied.
    assert wrapped("a /very/long/path-name b", width=6) == ["a", "/very/long/path-name", "b"]
    assert wrapped("abcdefgh", width=4, break_long_words=True) == ["abcd", "efgh"]


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


def test_what_is_not_said_has_its_default() -> None:
    assert (short(None), short(0.0), short(0.00004), short(12.345), short(-123.456)) == (
        "", "0.0000", "0.0000", "12.35", "-123.5",
    )  # fmt: skip
    assert (listed([1, 4, 8]), listed(["a"]), listed([])) == ("1, 4, 8", "a", "")
    assert wrapped("a" * 79 + " b") == ["a" * 79, "b"]
    assert wrapped("a" * 78 + " b") == ["a" * 78 + " b"]
    assert wrapped("") == []
    assert wrapped("ab-cd ef", width=5) == ["ab-cd", "ef"]


def test_a_table_is_as_wide_as_its_widest_cell_and_not_as_its_header() -> None:
    assert table_in_markdown(["a", "bb"], [["long cell", "1"]], ["left", "right"]).splitlines() == [
        "| a         |   bb |",
        "|-----------|------|",
        "| long cell |    1 |",
    ]
    for header, sides in ((["a"], ["left", "left"]), (["a", "b"], ["left"])):
        with pytest.raises(ValueError, match=r"shorter|longer"):
            table(header, [["1", "2"]], sides)


def test_every_sign_that_steers_is_known_and_its_neighbours_are_not() -> None:
    bounds = [
        (0x00, 0x1F), (0x7F, 0x9F), (0x2028, 0x2029), (0x200E, 0x200F), (0x202A, 0x202E), (0x2066, 0x2069),
    ]  # fmt: skip
    steering = {code for low, high in bounds for code in range(low, high + 1)}
    assert {code for code in range(0x3000) if has_control(chr(code))} == steering
    assert plain("a\n\x1bb\udcff") == "a  b?"
    assert plain(5) == "5"
    allowed = [has_control(text, allowed="\n") for text in ("a\n", "a\n\t", "a\t\n")]
    assert allowed == [False, True, True]
    assert in_short("x" * 80) == "x" * 80
    assert quoted("x" * 81) == f"'{'x' * 40}…{'x' * 39}'"
