"""report.html: one file without network, that no name from a result can break, and that a browser opens."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from batch_inference.analyze.answers import Question, analyse
from batch_inference.analyze.headline import headline
from batch_inference.analyze.page import as_html
from batch_inference.analyze.plots import write_plots
from batch_inference.analyze.report import sections_of
from batch_inference.analyze.sections import ROW_LIMIT
from batch_inference.analyze.tables import load_setting
from batch_inference.analyze.wording import NO_BREAK
from batch_inference.core.results import Requests
from batch_inference.core.text import short
from browser import CHROMIUM, Browser, browser
from builders import make_point, make_result, make_run, make_sweep, save_all
from conftest import REPOSITORY

# Kept for people to look at; git ignores it.
ARTIFACTS = REPOSITORY / "artifacts"
HOSTILE = "<script>alert(1)</script> \"'&<img src=x onerror=alert(2)>"
pytestmark = pytest.mark.usefixtures("coarse_plots")


@pytest.fixture
def page(tmp_path: Path) -> Any:
    def build(results: Any, plots: tuple[str, ...] = ()) -> str:
        analysis = analyse([load_setting(path) for path in save_all(results, tmp_path / "results")], Question())
        drawn, missing = write_plots(analysis.groups, tmp_path, plots)
        sections, head = (
            sections_of(analysis),
            replace(
                headline(analysis), command=("vllm", "serve", "--config", "best/vllm_config.yaml"), runs="This runs it:"
            ),
        )
        return as_html(sections, analysis.rows, drawn, [*missing, f"energy: {HOSTILE}"], head)

    return build


class Tags(HTMLParser):
    """Every tag with its attributes; what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "input", "source", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_holds_everything_and_fetches_nothing(page: Any) -> None:
    text = page(make_sweep([(1, 1, 1), (2, 1, 1), (1, 2, 1)]), ("throughput", "pareto"))
    found = Tags(text)
    assert found.open == []
    images = [attributes["src"] for tag, attributes in found.tags if tag == "img"]
    assert len(images) == 4  # light and dark
    assert all(str(source).startswith("data:image/svg+xml;base64,") for source in images)
    for tag, attributes in found.tags:
        for name in ("src", "href"):
            assert str(attributes.get(name, "#")).startswith(("data:", "#")), (tag, attributes)
    assert not re.search(r"url\(|@import|fetch\(|https?:", text.replace("http://www.w3.org", ""))
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    for words in (
        "Best",
        "TP, PP or DP? 2 devices",
        "Scaling against tp_1",
        "Pareto front",
        "Settings",
        f"On 2{NO_BREAK}×{NO_BREAK}H100",
    ):
        assert words in text


def test_links_are_short_and_of_several_groups_told_apart(page: Any) -> None:
    def links(results: Any) -> list[str]:
        return re.findall(r"<a href=[^>]*>([^<]*)</a>", page(results))

    one = links(make_sweep([(1, 1, 1), (2, 1, 1), (1, 2, 1), (4, 1, 1), (2, 2, 1)]))
    assert one == [
        "Best", "TP, PP or DP? 2 devices", "TP, PP or DP? 4 devices", "Scaling", "Pareto front", "Measured", "Settings",
        "Plots", "All points",
    ]  # fmt: skip
    other = make_result("other", [make_point()], environment={"devices": [{"name": "NVIDIA A100"}]})
    assert links([*make_sweep([(1, 1, 1)]), other])[:4] == [
        "Best (group 1)", "Best (group 2)", "Pareto front (group 1)", "Pareto front (group 2)",
    ]  # fmt: skip


def test_the_page_explains_no_mark_that_it_does_not_have(page: Any) -> None:
    text = page(make_sweep([(1, 1, 1), (2, 1, 1), (1, 2, 1)]))
    assert "Bold: the fastest of a row" in text
    assert "●" not in text


def test_names_break_between_words_and_flags_and_commands_not_at_all(page: Any) -> None:
    name = "tp_1_" + "word_" * 8
    text = page([make_result(name, [make_point(verdict="suspect", verdict_reasons=["raise --max-runs"])])])
    assert f'<td class="long">{name.replace("_", "_<wbr>")}</td>' in text
    assert 'raise <span class="whole">--max-runs</span>' in text
    assert (
        "<pre><span>vllm</span> <span>serve</span> <span>--config</span> <span>best/vllm_config.yaml</span></pre>"
        in text
    )


def test_what_would_be_better_stands_below_the_winner_with_its_command(page: Any) -> None:
    one = make_result("tp_1", [make_point(4, latencies_s=[1.0])])
    text = page([one, make_result("tp_2", [make_point(4, latencies_s=[0.8])], (2, 1, 1))])
    text = re.sub("</?span[^>]*>", "", text)
    parts = ('class="answer"', "This runs it:", "vllm serve", "2 replicas of TP=1", "custom DP=2", "<nav")
    places = [text.index(words) for words in parts]
    assert places == sorted(places)


@pytest.mark.slow
def test_a_plot_that_is_higher_than_wide_has_more_of_a_page(page: Any) -> None:
    assert '<figure class="high">' not in page(make_sweep([(1, 1, 1)]), ("memory",))
    sizes = [(tp, pp, dp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4) for dp in (1, 2)]
    assert '<figure class="high">' in page(make_sweep(sizes, batch_sizes=(1,)), ("memory",))


def test_no_name_from_a_file_becomes_a_tag(page: Any) -> None:
    result = make_result("x", [make_point(verdict="suspect", verdict_reasons=[HOSTILE])], config={"model": HOSTILE})
    result.points.append(make_point(2, status="oom", runs=[], reason=HOSTILE))
    text = page([result])
    assert {tag for tag, _ in Tags(text).tags if tag in ("img", "script")} == {"script"}
    assert text.count("<script>") == 1
    assert "&lt;script&gt;alert(1)" in text


@pytest.mark.slow
def test_many_points_are_cut_and_that_is_said(page: Any) -> None:
    text = page([make_result(points=[make_point(b, latencies_s=[1.0]) for b in range(1, ROW_LIMIT + 4)])])
    assert "… and 3 more rows: results.csv and summary.json have all." in text


def test_the_page_forbids_itself_every_network_and_frame(page: Any) -> None:
    found = [attributes for tag, attributes in Tags(page(make_sweep([(1, 1, 1)]))).tags if tag == "meta"]
    (policy,) = [one["content"] for one in found if one.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "script-src": "'unsafe-inline'",
    }


class Cells(HTMLParser):
    """The cells of the last table, row by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.is_in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, _attrs: Any) -> None:
        if tag == "table":
            self.rows = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
        self.is_in_cell = tag in ("th", "td") or (tag in ("button", "b") and self.is_in_cell)

    def handle_data(self, data: str) -> None:
        if self.is_in_cell:
            self.rows[-1][-1] += data
            self.is_in_cell = False


def test_every_column_of_all_points_shows_what_its_heading_says(page: Any) -> None:
    """With numbers of which no two are alike: percentiles, per device, strong and weak."""
    count = 101
    # 1 to 101 s until the first token; then 31 tokens in 31 times 0.1 to 10.1 s.
    ttft_s = [float(number + 1) for number in range(count)]
    tpot_s = [(number + 1) / 10 for number in range(count)]
    latency_s = [first + 31 * each for first, each in zip(ttft_s, tpot_s, strict=True)]
    times = Requests(ttft_s, latency_s, [0.0] * count, [32] * count)
    runs = [make_run(run_s, requests=count, times=times) for run_s in (500.0, 504.0)]
    wide = make_result("dp_2", [make_point(count, runs=runs, replicas=2)], (1, 1, 2))
    # At an equal batch of each replica, and at an equal global batch.
    base = [make_point(b, latencies_s=[s, s]) for b, s in ((count, 400.0), (2 * count, 1000.0))]
    header, *rows = Cells(page([make_result("tp_1", base), wide])).rows
    (cells,) = [dict(zip(header, row, strict=True)) for row in rows if row[header.index("setting")] == "dp_2"]
    tok_per_s = count * 32 / 502
    efficiency = tok_per_s / (2 * count * 32 / 1000) / 2
    assert cells == {
        "group": "1", "setting": "dp_2", "devices": "2", "length": "64", "batch": "101", "global batch": "202",
        # 1.4 x 12.706 x 2.828 / 1.414, of 502 s
        "output tok/s": f"{tok_per_s:.2f} ±0.46", "per device": f"{tok_per_s / 2:.2f} ±0.23", "latency s": "502 ±36",
        "TTFT p50 s": "51.00", "TTFT p99 s": "100.0", "TPOT p50 ms": "5100", "TPOT p99 ms": "10000",
        "efficiency": short(efficiency), "memory GiB": "60.00", "status": "ok", "verdict": "valid", "why": "",
    }  # fmt: skip


# --- in a browser -------------------------------------------------------------------------------------------------

SCREENS = {"desk": (1280, 800), "phone": (390, 844)}
# What of the page is not readable enough: WCAG's contrast of each text against what is behind it.
CONTRASTS = """(() => {
  const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const parts = color => {
    paint.clearRect(0, 0, 1, 1); paint.fillStyle = color; paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data];
  };
  const light = color => {
    const [r, g, b] = parts(color).map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (parts(color)[3] === 255) return color;
    }
    return matchMedia("(prefers-color-scheme: dark)").matches ? "black" : "white";
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  let texts = 0;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (!text || !element.checkVisibility() || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    texts++;
    const [low, high] = [light(getComputedStyle(element).color), light(behind(element))].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < 4.5) found.push(`${contrast.toFixed(2)}: ${text}`);
  }
  return { texts, found };
})()"""


def rows_of(count: int) -> Any:
    """Results of two, nine or forty settings, as many as there are layouts of so many devices, and more."""
    sizes = [(tp, pp, dp) for tp in (1, 2, 4, 8, 16) for pp in (1, 2, 4, 8, 16) for dp in (1, 2, 4, 8, 16)]
    return make_sweep(sizes[:count], seq_lens=(512, 2048))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None and "REQUIRE_CHROMIUM" not in os.environ:
        pytest.skip("no Chromium here: apt-get install chromium")
    with browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


def is_in_sight(chromium: Browser, selector: str) -> bool:
    """Wholly, without any scrolling."""
    return bool(
        chromium.run(f"""(() => {{
        const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();
        return box.width > 0 && box.left >= 0 && box.top >= 0 && box.right <= innerWidth && box.bottom <= innerHeight;
    }})()""")
    )


@pytest.fixture
def opened(page: Any, tmp_path: Path) -> Any:
    def opened(count: int, plots: tuple[str, ...] = ()) -> Path:
        path = tmp_path / "report.html"
        path.write_text(page(rows_of(count), plots))
        return path

    return opened


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 9, 40])
def test_a_browser_shows_the_answer_first_and_complains_of_nothing(chromium: Browser, opened: Any, count: int) -> None:
    path = opened(count, ("throughput", "memory"))
    ARTIFACTS.mkdir(exist_ok=True)
    for (name, (width, height)), dark in itertools.product(SCREENS.items(), (False, True)):
        chromium.open(path, width, height, dark=dark)
        assert chromium.run("innerWidth") == width
        assert is_in_sight(chromium, ".answer p")
        assert is_in_sight(chromium, ".command pre")
        assert chromium.run("document.documentElement.scrollWidth - innerWidth") <= 0
        contrasts = chromium.run(CONTRASTS)
        assert contrasts["texts"] > 100
        assert contrasts["found"] == []
        assert chromium.run("[...document.images].every(image => image.naturalWidth > 100)")
        shot = ARTIFACTS / f"report_{count}_{name}_{'dark' if dark else 'light'}.png"
        chromium.shoot(shot, whole=True)
        assert shot.stat().st_size > 10_000
    chromium.print(ARTIFACTS / f"report_{count}.pdf")
    assert chromium.problems == []


@pytest.mark.slow
def test_the_browser_tells_of_what_goes_wrong(chromium: Browser, tmp_path: Path) -> None:
    """Else a page without problems would say nothing."""
    path = tmp_path / "bad.html"
    for script, said in (
        ("console.warn('careful')", "careful"),
        ("nobody()", "nobody is not defined"),
        ("fetch('http://127.0.0.1:9/x')", "127.0.0.1:9"),
    ):
        path.write_text(f"<p style='color: #999; background: white'>pale</p><script>{script}</script>")
        chromium.open(path, 1280, 800)
        assert any(said in problem for problem in chromium.problems)
        chromium.problems.clear()
    assert chromium.run(CONTRASTS) == {"texts": 1, "found": ["2.85: pale"]}


@pytest.mark.slow
def test_the_value_of_the_best_is_seen_on_a_phone(chromium: Browser, opened: Any) -> None:
    chromium.open(opened(9), *SCREENS["phone"])
    edges = chromium.run("""[...document.querySelector("table").rows].map(
        row => row.cells[2].getBoundingClientRect().right)""")
    assert len(edges) > 3
    assert max(edges) <= SCREENS["phone"][0]


@pytest.mark.slow
def test_a_tall_table_says_how_many_rows_it_has_and_whether_there_are_more(chromium: Browser, opened: Any) -> None:
    chromium.open(opened(9), *SCREENS["desk"])
    before, after, faded = chromium.run("""(async () => {
        const wide = document.querySelector("#points .wide"), hint = wide.previousElementSibling;
        const first = hint.textContent, fade = () => getComputedStyle(wide, "::after").content;
        const faded = [fade()];
        wide.scrollTo(0, wide.scrollHeight);
        await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
        return [first, hint.textContent, [...faded, fade()]];
    })()""")
    # Nine settings, three batch sizes, two lengths.
    assert before == "Scroll the table: 54 rows, more rows below ↓"
    assert after == "Scroll the table: 54 rows, the last rows, more above ↑"
    assert faded == ['""', "none"]
    hidden = chromium.run("""[...document.querySelectorAll(".hint")].map(hint => hint.hidden)""")
    assert True in hidden


@pytest.mark.slow
def test_a_wide_table_scrolls_with_a_hint_and_its_first_column_and_head_stay(chromium: Browser, opened: Any) -> None:
    chromium.open(opened(40), *SCREENS["phone"])
    hint, left, top, moved = chromium.run("""(async () => {
        const wide = document.querySelector("#points .wide"), hint = wide.previousElementSibling.textContent;
        const head = wide.querySelector("th"), cell = wide.querySelector("td"), other = wide.querySelectorAll("td")[3];
        const before = [cell, head, other].map(one => one.getBoundingClientRect());
        wide.scrollTo(150, 200);
        await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
        const after = [cell, head, other].map(one => one.getBoundingClientRect());
        return [hint, after[0].left - before[0].left, after[1].top - before[1].top, after[2].left - before[2].left];
    })()""")
    assert hint == "Scroll the table: 240 rows, more rows below ↓, more columns to the right →"
    assert (left, top, moved) == (0, 0, -150)


@pytest.mark.slow
def test_a_table_is_sorted_the_best_first_and_says_so(chromium: Browser, opened: Any) -> None:
    chromium.open(opened(9), *SCREENS["desk"])
    sort = """(name => {
        const table = document.querySelector("#points table");
        const head = [...table.querySelectorAll("th")].find(th => th.textContent === name);
        head.querySelector("button").click();
        return { cells: [...table.tBodies[0].rows].map(row => row.cells[head.cellIndex].textContent),
                 said: document.querySelector("#points .sorted").textContent, sort: head.ariaSort };
    })"""
    for name, first, words in (
        ("output tok/s", "descending", ("highest first", "lowest first")),
        ("latency s", "ascending", ("lowest first", "highest first")),
        ("setting", "ascending", ("A to Z", "Z to A")),
    ):
        once, twice = (chromium.run(f"{sort}({json.dumps(name)})") for _ in range(2))
        assert once["sort"] == first
        assert [once["said"], twice["said"]] == [f"Sorted by {name}, {word}." for word in words]
        if name != "setting":
            numbers = [float(cell.split()[0]) for cell in once["cells"]]
            assert numbers == sorted(numbers, reverse=first == "descending")
            assert numbers[0] != numbers[-1]
        assert twice["cells"] != once["cells"]


@pytest.mark.slow
def test_columns_are_switched_on_and_plots_open_large(chromium: Browser, opened: Any) -> None:
    chromium.open(opened(2, ("throughput",)), *SCREENS["desk"])
    shown = (
        """[...document.querySelectorAll("#points th")].filter(th => th.checkVisibility()).map(th => th.textContent)"""
    )
    usual = ["setting", "length", "batch", "output tok/s", "latency s", "memory GiB", "verdict"]
    assert chromium.run(shown) == usual
    chromium.run("""[...document.querySelectorAll(".columns label")].find(
        label => label.textContent.trim() === "TTFT p50 s").click()""")
    assert chromium.run(shown) == [*usual[:5], "TTFT p50 s", *usual[5:]]
    chromium.run('document.querySelector(".plot").click()')
    assert chromium.run('document.querySelector("dialog").open')
    # Larger than in the page.
    widths = """[...document.querySelectorAll(".plot img, dialog img")].filter(image => image.checkVisibility()).map(
        image => [image.className, image.getBoundingClientRect().width])"""
    (shown_small, small), (shown_large, large) = chromium.run(widths)
    assert shown_small == shown_large == "day"
    assert large > small
    chromium.run('document.querySelector("dialog").click()')
    assert not chromium.run('document.querySelector("dialog").open')


@pytest.mark.slow
def test_paper_shows_all_of_a_table_and_nothing_to_click(chromium: Browser, opened: Any) -> None:
    # As wide as A4 without its margins.
    chromium.open(opened(40, ("throughput",)), 703, 1000, dark=True, paper=True)
    cut = """[...document.querySelectorAll(".wide")].filter(wide =>
        wide.scrollWidth > wide.clientWidth + 1 || getComputedStyle(wide).overflow !== "visible").length"""
    assert chromium.run(cut) == 0
    assert chromium.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    hidden = (
        """[...document.querySelectorAll("nav, .copy, .columns, .hint")].filter(one => one.checkVisibility()).length"""
    )
    assert chromium.run(hidden) == 0
    plots = """[...document.querySelectorAll(".plot img")].filter(image => image.checkVisibility()).map(
        image => image.className)"""
    assert chromium.run(plots) == ["day"]
