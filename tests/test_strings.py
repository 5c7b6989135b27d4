"""What a user reads is written in one place: no text of three words or more is built twice."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import REPOSITORY

SCRIPTS = ("batch_inference_experiment.py", "analyze_results.py")
TAG = re.compile(r"</?[a-z][^>]*>")
LETTER = re.compile(r"[^\W\d_]")


def sources() -> list[Path]:
    return [*sorted((REPOSITORY / "batch_inference").rglob("*.py")), *(REPOSITORY / name for name in SCRIPTS)]


def texts(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every string with three words or more that is no docstring; a value in an f-string is {}."""
    yield from _texts_of(ast.parse(source))


def _texts_of(node: ast.AST) -> Iterator[tuple[int, str]]:
    if isinstance(node, (ast.Constant, ast.JoinedStr)):
        text = _template(node)
        if sum(bool(LETTER.search(word)) for word in text.split()) >= 3:
            yield node.lineno, text
    for child in _inner(node):
        yield from _texts_of(child)


def _inner(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes in which a string of its own may be: no docstring, and no piece of an f-string."""
    if isinstance(node, ast.JoinedStr):
        yield from (value.value for value in node.values if isinstance(value, ast.FormattedValue))
        return
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):
            yield child


def _template(node: ast.Constant | ast.JoinedStr) -> str:
    """As a reader sees it: spaces, line breaks and HTML tags make no other text."""
    pieces = node.values if isinstance(node, ast.JoinedStr) else [node]
    text = "".join(
        piece.value if isinstance(piece.value, str) else "" if isinstance(piece, ast.Constant) else "{}"
        for piece in pieces
        if isinstance(piece, (ast.Constant, ast.FormattedValue))
    )
    return " ".join(TAG.sub("", text).split())


def built_twice(paths: list[Path]) -> dict[str, list[str]]:
    places = defaultdict(list)
    for path in paths:
        for line, text in texts(path.read_text()):
            places[text].append(f"{path.name}:{line}")
    return {text: found for text, found in places.items() if len(found) > 1}


def test_no_text_is_built_in_two_places() -> None:
    found = [f"{' and '.join(places)}: {text}" for text, places in built_twice(sources()).items()]
    assert not found, "\n".join(["one helper or constant each:", *found])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"""One two three."""\nx = "two words"', []),
        ('def f():\n    """One two three."""', []),
        ('x = "one two three"', ["one two three"]),
        ('x = "one  two" "\\n three"', ["one two three"]),
        ('x = f"one {name} two {value:.{digits}f} three"', ["one {} two {} three"]),
        ('x = f"{a}: {b}, {c}"', []),
        ("x = f\"a {'one two three' if a else b}\"", ["one two three"]),
        ('x = "<p>one two <b>three</b></p>"', ["one two three"]),
        ('x = b"one two three"', []),
    ],
)
def test_the_scan_sees_what_is_said_and_no_docstring(source: str, expected: list[str]) -> None:
    assert [text for _, text in texts(source)] == expected


def test_the_scan_names_both_places(tmp_path: Path) -> None:
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text('x = 1\ny = f"keep {x} of them all"\n')
    two.write_text('z = f"keep {1 + 1} of them all"\n')
    assert built_twice([one, two]) == {"keep {} of them all": ["one.py:2", "two.py:1"]}
