"""analyze_results.py as a user runs it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from batch_inference.results import save_result
from builders import make_result
from conftest import REPOSITORY

SCRIPT = str(REPOSITORY / "analyze_results.py")


def analyse(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, timeout=60)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "results with a space"
    made.mkdir()
    for result in (make_result(), make_result(tp=2, speed=170)):
        save_result(result, made / f"{result.name}_results.json")
    return made


def test_a_folder_becomes_a_summary_a_csv_a_report_and_plots(folder: Path) -> None:
    done = analyse("--input", folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Best by output throughput" in done.stdout
    names = {path.name for path in (folder / "analysis").iterdir()}
    assert names == {
        "results.csv", "report.md", "throughput.png", "latency.png", "scaling_efficiency.png", "memory.png"
    }  # fmt: skip
    for name in names:
        assert str(folder / "analysis" / name) in done.stdout
    assert len(pd.read_csv(folder / "analysis" / "results.csv")) == 6
    report = (folder / "analysis" / "report.md").read_text()
    assert "![throughput](throughput.png)" in report


def test_one_file_elsewhere_and_no_plots(folder: Path, tmp_path: Path) -> None:
    done = analyse("--input", folder / "tp_1_results.json", "--output-dir", tmp_path / "a" / "b", "--no-plots")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"results.csv", "report.md"}


def test_a_second_analysis_of_the_same_folder_is_the_same(folder: Path) -> None:
    assert analyse("--input", folder, "--no-plots").stdout == analyse("--input", folder, "--no-plots").stdout


def test_broken_files_are_named_and_the_others_analysed(folder: Path) -> None:
    (folder / "broken.json").write_text("{")
    (folder / "foreign.json").write_text('{"a": 1}')
    done = analyse("--input", folder, "--no-plots")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 2
    assert "broken.json: not valid JSON" in done.stderr
    assert "foreign.json: not a result of this program" in done.stderr
    assert "Best by output throughput" in done.stdout


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "holds no *.json file"), ("{}", "no result file that can be read")],
)
def test_a_folder_without_results_is_wrong_use(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    done = analyse("--input", tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [(), ("--input", "/absent"), ("--inp", "x"), ("--input", ".", "--what")])
def test_wrong_use_is_exit_2(words: tuple[str, ...]) -> None:
    done = analyse(*words)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_an_output_folder_that_cannot_be_made_is_named(folder: Path) -> None:
    done = analyse("--input", folder, "--output-dir", folder / "tp_1_results.json" / "x")
    assert done.returncode == 2
    assert "error: --output-dir" in done.stderr


def test_a_reader_that_leaves_early_is_no_error(folder: Path) -> None:
    command = (
        f"'{sys.executable}' '{SCRIPT}' --input '{folder}' --no-plots | head -n 1 >/dev/null; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "0"
    assert done.stderr == ""


def test_help_answers_at_once_without_heavy_imports() -> None:
    def timed() -> tuple[float, str]:
        start_s = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-X", "importtime", SCRIPT, "--help"], capture_output=True, text=True, check=True
        )
        return time.perf_counter() - start_s, done.stderr

    runs = [timed() for _ in range(3)]
    assert min(taken_s for taken_s, _ in runs) < 0.3
    for module in ("vllm", "torch", "pandas", "matplotlib", "seaborn", "numpy"):
        assert f" {module}\n" not in runs[0][1]
