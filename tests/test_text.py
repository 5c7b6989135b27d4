"""Tables of text: as tabulate wrote them, which drew them before."""

from __future__ import annotations

from batch_inference.core.text import table, table_in_markdown

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
