"""README and docs: their pages, and the parts of them that programs wrote.

`PYTHONPATH=. python tests/pages.py` writes these parts again, after a change of what the programs print. They stand
between markers:

    <!-- docs/best/best_replay.md -->                              a file that a benchmark wrote, as it is
    <!-- all of: python -m batch_inference.core.metrics -->        what a command prints
    <!-- lines 1 to 13 of: ./run_batch_experiments.sh ... -->      some of its lines
    <!-- "On 4 ×", "Best" of: python analyze_results.py ... -->    its paragraphs that begin so

and `<!-- end -->`; in a block of code where one stands there.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import analyze_results
from conftest import REPOSITORY, stub_environment
from in_process import called

README = REPOSITORY / "README_batch_inference.md"
DOCS = REPOSITORY / "docs"
PART = re.compile(
    r'^<!-- (?:(all|lines (\d+) to (\d+)|".+?") of: ([^\n]+)|(docs/\S+)) -->\n(.*?)^<!-- end -->', re.M | re.S
)
FENCE = "```\n"
# What a command in the checkout may name.
NAMES = ("docs", "tests", "models", "examples", "batch_inference")
PROGRAMS = ("run_batch_experiments.sh", "batch_inference_experiment.py", "analyze_results.py")


@dataclass(frozen=True)
class Part:
    """One that a program wrote: the file or the command, what is chosen of it, and what the page shows."""

    source: str
    chosen: str | None  # None of a file
    shown: str

    def made(self, folder: Path) -> str:
        """What the page should show. `folder`: a checkout."""
        if self.chosen is None:
            return (REPOSITORY / self.source).read_text()
        text = self._choose(output_of(self.source, folder))
        return f"{FENCE}{text}{FENCE}" if self.shown.startswith(FENCE) else text

    def _choose(self, text: str) -> str:
        assert self.chosen is not None
        if numbers := re.findall(r"\d+", self.chosen if self.chosen.startswith("lines") else ""):
            first, last = map(int, numbers)
            return "".join(text.splitlines(keepends=True)[first - 1 : last])
        beginnings = re.findall(r'"(.+?)"', self.chosen)
        if not beginnings:
            return text
        paragraphs = text.strip("\n").split("\n\n")
        chosen = [paragraph for paragraph in paragraphs if paragraph.startswith(tuple(beginnings))]
        assert len(chosen) >= len(beginnings), f"{self.chosen} of: {self.source}"
        return "\n\n".join(chosen) + "\n"


def pages() -> list[Path]:
    """What people read; not the tables that benchmarks wrote beside their numbers."""
    return [README, *(REPOSITORY / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")), *sorted(DOCS.glob("*.md"))]


def parts(page: Path) -> list[Part]:
    return [_part(found) for found in PART.finditer(page.read_text())]


def _part(found: re.Match[str]) -> Part:
    return Part(found[4] or found[5], found[1], found[6])


def checkout(folder: Path) -> Path:
    """A folder that looks like the checkout: commands run as a reader would run them, and leave nothing behind."""
    for name in (*NAMES, *PROGRAMS):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


def output_of(command: str, folder: Path) -> str:
    """As on a machine with neither vLLM nor a GPU."""
    environment = stub_environment(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    words = shlex.split(command)
    if words[:2] == ["python", "analyze_results.py"]:
        # Drawing takes seconds, and what it prints is the very end.
        done = called(analyze_results.main, [*words[1:], "--no-plots"], folder, environment)
    else:
        words = [sys.executable if word == "python" else word for word in words]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def written_anew(page: Path) -> str:
    def block(found: re.Match[str]) -> str:
        with tempfile.TemporaryDirectory() as name:
            made = _part(found).made(checkout(Path(name)))
        return found[0].replace(found[6], made) if found[6] else found[0].replace("<!-- end", f"{made}<!-- end")

    return PART.sub(block, page.read_text())


def main() -> None:
    for page in pages():
        text = written_anew(page)
        if text != page.read_text():
            page.write_text(text)
            print(f"written anew: {os.path.relpath(page)}")


if __name__ == "__main__":
    main()
