"""report.html: one file without network, that no name from a result can break, and that a browser opens."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from batch_inference.analyze.answers import Question, analyse
from batch_inference.analyze.page import as_html
from batch_inference.analyze.plots import write_plots
from batch_inference.analyze.report import sections_of
from batch_inference.analyze.sections import ROW_LIMIT
from batch_inference.analyze.tables import load_setting
from batch_inference.core.results import Requests
from batch_inference.core.text import short
from builders import make_point, make_result, make_run, make_sweep, save_all
from conftest import REPOSITORY

# Kept for people to look at; git ignores it.
ARTIFACTS = REPOSITORY / "artifacts"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<script>alert(1)</script> \"'&<img src=x onerror=alert(2)>"
pytestmark = pytest.mark.usefixtures("coarse_plots")


@pytest.fixture
def page(tmp_path: Path) -> Any:
    def build(results: Any, plots: tuple[str, ...] = ()) -> str:
        analysis = analyse([load_setting(path) for path in save_all(results, tmp_path / "results")], Question())
        drawn, missing = write_plots(analysis.groups, tmp_path, plots)
        return as_html(sections_of(analysis), analysis.points, drawn, [*missing, f"energy: {HOSTILE}"])

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
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_holds_everything_and_fetches_nothing(page: Any) -> None:
    text = page(make_sweep([(1, 1, 1), (2, 1, 1), (1, 2, 1)]), ("throughput", "pareto"))
    found = Tags(text)
    assert found.open == []
    images = [attributes["src"] for tag, attributes in found.tags if tag == "img"]
    assert len(images) == 2
    assert all(str(source).startswith("data:image/svg+xml;base64,") for source in images)
    for tag, attributes in found.tags:
        for name in ("src", "href"):
            assert str(attributes.get(name, "#")).startswith(("data:", "#")), (tag, attributes)
    assert not re.search(r"url\(|@import|fetch\(|https?:", text.replace("http://www.w3.org", ""))
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    for words in ("Best", "TP, PP or DP? 2 devices", "Scaling against tp_1", "Pareto front", "Settings"):
        assert words in text


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
        self.is_in_cell = tag in ("th", "td", "button")

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
        "output tok/s": short(tok_per_s), "per device": short(tok_per_s / 2),
        "latency s": "502.0", "± s": "35.58",  # 1.4 x 12.706 x 2.828 / 1.414
        "TTFT p50 s": "51.00", "TTFT p99 s": "100.0", "TPOT p50 s": "5.100", "TPOT p99 s": "10.00",
        "efficiency": short(efficiency), "status": "ok", "verdict": "valid",
    }  # fmt: skip


# --- in a browser -------------------------------------------------------------------------------------------------

# Appended to a copy: sorts a table, and leaves in the page what it then sees.
PROBE = """<script>
const head = [...document.querySelectorAll("th")].filter(th => th.textContent === "output tok/s")[0];
const shown = () => [...head.closest("table").tBodies[0].rows].map(row => row.cells[head.cellIndex].textContent);
head.querySelector("button").click(); const up = shown();
head.querySelector("button").click(); const down = shown();
const wide = document.documentElement.scrollWidth - window.innerWidth;
const images = [...document.images].map(image => image.naturalWidth);
const paper = getComputedStyle(document.body).backgroundColor;
document.body.innerHTML = "<pre id=probe>" + JSON.stringify({up, down, wide, images, paper}) + "</pre>";
</script>"""


def browse(path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None, "REQUIRE_CHROMIUM is set, and there is none"
    always = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--hide-scrollbars",
              "--virtual-time-budget=3000", f"--user-data-dir={path.parent / 'profile'}")  # fmt: skip
    command = [CHROMIUM, *always, *flags, path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.skipif(
    CHROMIUM is None and "REQUIRE_CHROMIUM" not in os.environ, reason="no Chromium here: apt-get install chromium"
)
def test_a_browser_opens_the_page_and_sorts_its_tables(page: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(
        page(make_sweep([(1, 1, 1), (2, 1, 1), (1, 2, 1), (4, 1, 1)], seq_lens=(512, 2048)), ("throughput", "memory"))
    )
    ARTIFACTS.mkdir(exist_ok=True)
    for name, flags in (
        ("light", ("--window-size=1100,2400",)),
        ("dark", ("--window-size=1100,2400", "--blink-settings=preferredColorScheme=0")),
        ("phone", ("--window-size=500,2400",)),
    ):
        shot = ARTIFACTS / f"report_{name}.png"
        shot.unlink(missing_ok=True)
        done = browse(path, *flags, f"--screenshot={shot}")
        assert shot.stat().st_size > 10_000
        assert "CONSOLE" not in done.stderr
    probed = tmp_path / "probed.html"
    probed.write_text(path.read_text().replace("</body>", f"{PROBE}</body>"))
    done = browse(probed, "--dump-dom", "--window-size=500,900")
    assert "CONSOLE" not in done.stderr
    found = json.loads(re.findall(r'<pre id="probe">(.*?)</pre>', done.stdout)[0])
    numbers = [float(text) for text in found["up"]]
    assert numbers == sorted(numbers)
    assert found["down"] == found["up"][::-1]
    assert found["wide"] <= 0
    assert all(width > 100 for width in found["images"])
    assert len(found["images"]) == 2
