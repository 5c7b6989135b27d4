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
from builders import make_point, make_result, make_sweep, save_all
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


def test_many_points_are_cut_and_that_is_said(page: Any) -> None:
    text = page([make_result(points=[make_point(b, latencies_s=[1.0]) for b in range(1, ROW_LIMIT + 4)])])
    assert "… and 3 more rows: results.csv and summary.json have all." in text


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
