"""docs/decisions.md: its index, its links, and the modules that it names."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "decisions.md").read_text(encoding="utf-8")
INDEX, *ENTRIES = re.split(r"^## (?=\d{4}-\d\d-\d\d )", PAGE, flags=re.MULTILINE)
# [text](#anchor); the text of ours has no brackets.
LINK = re.compile(r"\[([^\[\]]+)\]\(#([^)]*)\)")
MODULE = re.compile(r"`((?:core|plan|measure|launch|analyze)/\w+\.py)`")
MARK = re.compile(r"\*\*(Superseded|In part superseded)\*\* by \[")


def title_of(entry: str) -> str:
    return entry.partition("\n")[0]


def anchors(page: str) -> dict[str, str]:
    """Anchor -> heading, by GitHub's rule: lower case, no punctuation, hyphens for spaces; -1, -2 for repeats."""
    found: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for heading in re.findall(r"^#{1,6} (.*)$", page, re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found[f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor] = heading
        seen[anchor] += 1
    return found


def test_anchors_are_those_of_github() -> None:
    page = "# Runs until ±2 %, and `a_b`\n\n## --pack: vLLM's\n\n### Again\n#### Again\n## again\nno # heading\n"
    assert list(anchors(page)) == ["runs-until-2--and-a_b", "--pack-vllms", "again", "again-1", "again-2"]


def test_every_heading_is_that_of_an_entry_or_of_the_index() -> None:
    assert re.findall(r"^## (.*)$", PAGE, re.MULTILINE) == ["By topic", *map(title_of, ENTRIES)]


def test_every_entry_stands_once_in_the_index() -> None:
    linked = [anchors(PAGE).get(anchor) for _, anchor in LINK.findall(INDEX)]
    assert Counter(linked) == Counter(map(title_of, ENTRIES))


def test_every_topic_and_the_page_are_in_the_order_of_dates() -> None:
    places = {title_of(entry): place for place, entry in enumerate(ENTRIES)}
    for topic in INDEX.split("\n### ")[1:]:
        found = [places[text] for text, _ in LINK.findall(topic)]
        assert found == sorted(found), title_of(topic)
    dates = [entry[:10] for entry in ENTRIES]
    assert dates == sorted(dates)


def test_every_link_leads_to_the_heading_that_it_names() -> None:
    known = anchors(PAGE)
    assert [link for link in LINK.findall(PAGE) if known.get(link[1]) != link[0]] == []
    # None is missed for being written in another way.
    assert PAGE.count("](#") == len(LINK.findall(PAGE))


def test_the_index_marks_what_is_superseded() -> None:
    marks = {title_of(entry): MARK.match(entry.partition("\n")[2]) for entry in ENTRIES}
    shown = dict(re.findall(r"^- \[([^\[\]]+)\]\(#[^)]*\)(.*)$", INDEX, re.MULTILINE))
    assert shown == {title: f" ({mark[1].lower()})" if mark else "" for title, mark in marks.items()}


@pytest.mark.parametrize("entry", ENTRIES, ids=title_of)
def test_an_entry_has_its_three_lines_and_names_modules_that_are_there(entry: str) -> None:
    assert re.findall(r"^\*\*(Question|Choice|Why)\*\* ", entry, re.MULTILINE) == ["Question", "Choice", "Why"]
    # What a later entry supersedes as a whole may name what is no longer there.
    if not entry.partition("\n")[2].startswith("**Superseded**"):
        missing = [name for name in MODULE.findall(entry) if not (REPOSITORY / "batch_inference" / name).exists()]
        assert missing == []
