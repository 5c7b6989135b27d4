"""analyze_results.py: as a process where that matters, and within this one, which is faster, where it does not."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pandas as pd
import pytest

import analyze_results
from batch_inference.analyze import files, report
from batch_inference.analyze.answers import Question, analyse
from batch_inference.analyze.tables import load_setting
from batch_inference.core.results import Failure, Point
from batch_inference.core.text import has_control
from builders import make_point, make_result, make_sweep, save_all
from conftest import REPOSITORY, assert_answers_at_once
from in_process import called

Run = Callable[..., CompletedProcess[str]]
SCRIPT = str(REPOSITORY / "analyze_results.py")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("coarse_plots")]


def run_script(*flags: object) -> CompletedProcess[str]:
    return called(analyze_results.main, [SCRIPT, *map(str, flags)], Path.cwd(), os.environ)


@pytest.fixture
def analyze(capsys: pytest.CaptureFixture[str]) -> Run:
    """The script's main(), without the second that a new process takes to import pandas."""

    def run(*flags: object) -> CompletedProcess[str]:
        capsys.readouterr()
        status = analyze_results.main([str(flag) for flag in flags])
        return CompletedProcess(flags, status, *capsys.readouterr())

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good settings."""
    save_all(make_sweep([(1, 1, 1), (2, 1, 1)], batch_sizes=(1, 4)), tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompletedProcess[str]]:
    """Two good settings, and what the script says of them; every plot is drawn."""
    folder = tmp_path_factory.mktemp("results")
    save_all(make_sweep([(1, 1, 1), (2, 1, 1)], batch_sizes=(1, 4)), folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("batch_inference.analyze.plots.DPI", 40)
        return folder, run_script("--input", folder)


def test_a_folder_becomes_summary_tables_reports_and_plots(analysed: tuple[Path, CompletedProcess[str]]) -> None:
    folder, done = analysed
    assert (done.returncode, done.stderr) == (0, "")
    names = ["report.html", "report.md", "results.csv", "summary.json"]
    plots = [
        f"{name}.png" for name in ("throughput", "latency", "ttft", "tpot", "scaling", "pareto", "heatmap", "memory")
    ]
    vectors = [name.replace(".png", end) for name in plots for end in (".svg", "_dark.svg")]
    assert sorted(path.name for path in (folder / "analysis").iterdir()) == sorted(names + plots + vectors)
    *files, _, _ = lines = done.stdout.splitlines()
    assert files[-len(names) :] == [str(folder / "analysis" / name) for name in names]
    drawn = ", ".join(name.removesuffix(".png") for name in plots)
    assert " ".join(" ".join(lines[-2:]).split()) == f"and 8 plots there: {drawn}"
    assert "tp_2" in done.stdout
    assert len(pd.read_csv(folder / "analysis" / "results.csv")) == 4
    report = (folder / "analysis" / "report.md").read_text()
    assert all(f"]({name})" in report for name in plots)


def test_each_plot_is_a_png_for_the_report_and_an_svg_that_the_page_holds(
    analysed: tuple[Path, CompletedProcess[str]],
) -> None:
    folder, _ = analysed
    written = folder / "analysis"
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', (written / "report.html").read_text())
    names = re.findall(r"!\[.*?\]\((.*?)\.png\)", (written / "report.md").read_text())
    assert len(names) == 8
    files = [written / f"{name}{dark}.svg" for name in names for dark in ("", "_dark")]
    assert [base64.b64decode(data) for data in pictures] == [file.read_bytes() for file in files]
    assert all((written / f"{name}.svg").read_text().startswith("<?xml") for name in names)
    assert all((written / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)


def test_a_table_that_an_earlier_version_wrote_as_parquet_does_not_stay(analyze: Run, folder: Path) -> None:
    (folder / "analysis").mkdir()
    old = folder / "analysis" / "results.parquet"
    old.write_bytes(b"PAR1")
    assert analyze("--input", folder, "--no-plots").returncode == 0
    assert not old.exists()
    old.mkdir()  # is none of ours
    report._remove_parquet(old.parent)
    assert old.is_dir()


def test_a_single_file_is_analysed_beside_it(analyze: Run, folder: Path) -> None:
    done = analyze("--input", folder / "tp_1_results.json", "--no-plots")
    assert done.returncode == 0
    names = {path.name for path in (folder / "analysis_tp_1").iterdir()}
    assert names == {"report.html", "report.md", "results.csv", "summary.json"}
    assert "tp_2" not in done.stdout


def test_output_dir_is_made_and_used(analyze: Run, folder: Path, tmp_path: Path) -> None:
    done = analyze("--input", folder, "--output-dir", tmp_path / "a" / "b", "--no-plots")
    assert done.returncode == 0
    assert (tmp_path / "a" / "b" / "results.csv").exists()
    assert not (folder / "analysis").exists()


def test_a_plot_with_nothing_to_show_is_explained(analyze: Run, folder: Path) -> None:
    done = analyze("--input", folder / "tp_1_results.json", "--plots", "scaling,scaling_weak,energy,throughput")
    text = " ".join(done.stdout.split())
    assert "not drawn: Scaling efficiency, strong: every measured setting has the same number of devices" in text
    assert max(len(line) for line in done.stdout.splitlines() if str(folder) not in line) <= 80
    assert not (folder / "analysis_tp_1" / "scaling.png").exists()


def test_broken_files_are_named_and_the_others_analysed(folder: Path) -> None:
    (folder / "broken.json").write_text('{"schema_version": 1, ')
    (folder / "foreign.json").write_text('{"results": []}')
    (folder / "notes.txt").write_text("no result")
    (folder / "._tp_1_results.json").write_bytes(b"\0\5")
    done = run_script("--input", folder, "--no-plots")
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first.startswith(f"error: {folder}/broken.json: not valid JSON")
    assert second.startswith(f"error: {folder}/foreign.json: not a result of this program")
    assert "tp_1" in done.stdout
    assert len(pd.read_csv(folder / "analysis" / "results.csv")) == 4


def test_a_folder_of_failed_settings_is_still_a_report(analyze: Run, tmp_path: Path) -> None:
    failed = make_result(status="failed")
    failed.failure = Failure("oom_load", "no memory left")
    lost = make_result("tp_2", [Point(1, 8, 4, "oom", reason="out of memory")], (2, 1, 1))
    save_all([failed, lost], tmp_path / "results")
    done = analyze("--input", tmp_path / "results")
    assert done.returncode == 1
    assert done.stderr == f"error: --input {tmp_path}/results: no point was measured; the report says why\n"
    assert "tp_1 failed: no memory left" in done.stdout
    assert "not drawn: Output throughput against batch size: no point was measured" in done.stdout


def test_a_folder_of_two_gpu_models_is_not_ranked_together(analyze: Run, tmp_path: Path) -> None:
    fast = make_result("fast", [make_point(latencies_s=[0.1])], environment={"devices": [{"name": "NVIDIA A100"}]})
    save_all([make_result("slow", [make_point(latencies_s=[1.0])]), fast], tmp_path)
    done = analyze("--input", tmp_path, "--no-plots")
    best = [line.split()[4] for line in done.stdout.splitlines() if line.split()[1:2] == ["throughput"]]
    assert best == ["fast", "slow"]
    assert "they differ in device" in " ".join(done.stdout.split())
    table = pd.read_csv(tmp_path / "analysis" / "results.csv")
    assert table["group"].tolist() == [1, 2]


# --- what is asked ------------------------------------------------------------------------------------------------


def test_the_flags_reach_the_question(analyze: Run, folder: Path) -> None:
    flags = (
        "--max-latency-s",
        99,
        "--max-ttft-s",
        9,
        "--max-tpot-s",
        8,
        "--slo-percentile",
        95,
        "--device-hour-price",
        2,
    )
    done = analyze("--input", folder, "--no-plots", "--baseline", "tp_2", *flags)
    assert done.returncode == 0
    assert "limits  latency p95 ≤ 99 s, TTFT p95 ≤ 9 s, TPOT p95 ≤ 8 s" in done.stdout
    assert "per M tokens" in done.stdout
    assert "Scaling against tp_2" in (folder / "analysis" / "report.md").read_text()
    assert "ttft_p95_s" in pd.read_csv(folder / "analysis" / "results.csv")


def test_plots_are_picked(analyze: Run, folder: Path) -> None:
    done = analyze("--input", folder, "--plots", "pareto,energy")
    assert [path.name for path in (folder / "analysis").glob("*.png")] == ["pareto.png"]
    assert "not drawn: Energy per output token" in done.stdout


def steady(factor: float) -> list[Point]:
    return [make_point(latencies_s=[factor * s for s in (1.0, 1.001, 0.999, 1.0005)])]


def test_points_of_a_workload_are_not_compared_and_that_is_said(analyze: Run, tmp_path: Path) -> None:
    job = REPOSITORY / "docs" / "h200" / "job"
    done = analyze("--input", job, "--compare", job, "--no-plots", "--output-dir", tmp_path)
    assert done.returncode == 0
    told = " ".join(done.stdout.split())
    assert "--compare: points of a workload are not compared with earlier ones, only batches" in told


def test_a_regression_fails_only_where_that_is_asked_for(
    analyze: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is that of the gate, and the percent that of the flag: test_known_truth.py."""
    paths = (
        *save_all([make_result(points=steady(1.0))], tmp_path / "old"),
        *save_all([make_result(points=steady(1.05))], tmp_path / "new"),
    )
    done = analyze("--input", tmp_path / "new", "--compare", tmp_path / "old", "--no-plots")
    assert done.returncode == 0
    assert "points compared        1: 1 worse" in done.stdout
    old, new = ([load_setting(path)] for path in paths)
    slower = analyse(new, Question(), old)
    assert analyze_results.gate(slower, 3) == 3
    assert capsys.readouterr().err == "error: --fail-on-regression 3: 1 of 1 points are lost or worse by more\n"
    assert analyze_results.gate(slower, 6) == 0
    assert analyze_results.gate(analyse(old, Question(), new), 0) == 0


def test_a_gate_with_nothing_to_judge_does_not_pass(analyze: Run, tmp_path: Path) -> None:
    """Another name, or a single run: nothing can be said of any point."""
    save_all([make_result(points=steady(1.0))], tmp_path / "old")
    save_all([make_result("renamed", steady(1.5))], tmp_path / "renamed")
    save_all([make_result(points=[make_point(latencies_s=[1.5])])], tmp_path / "single")
    for new in ("renamed", "single"):
        flags = ("--input", tmp_path / new, "--compare", tmp_path / "old", "--no-plots")
        assert analyze(*flags).returncode == 0
        done = analyze(*flags, "--fail-on-regression", 3)
        assert done.returncode == 2
        assert done.stderr.startswith("error: --fail-on-regression 3: no point is in both sets with two runs or more")


def test_the_results_may_lie_beside_what_is_written(analyze: Run, folder: Path) -> None:
    for _ in range(2):
        done = analyze("--input", folder, "--output-dir", folder, "--no-plots")
        assert (done.returncode, done.stderr) == (0, "")


def test_an_unreadable_file_of_the_earlier_results_is_named(analyze: Run, folder: Path, tmp_path: Path) -> None:
    save_all([make_result(points=steady(1.0))], tmp_path / "old")
    (tmp_path / "old" / "broken\nname.json").write_text("{")
    done = analyze("--input", folder, "--compare", tmp_path / "old", "--no-plots")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "broken name.json: not valid JSON" in line


def test_a_loop_of_links_and_foreign_files_do_no_harm(analyze: Run, folder: Path) -> None:
    (folder / "loop.json").symlink_to(folder / "loop.json")
    (folder / "dangling.json").symlink_to(folder / "nothing")
    (folder / "inner").symlink_to(folder)
    done = analyze("--input", folder, "--no-plots")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 2
    assert "tp_2" in done.stdout


@pytest.mark.parametrize("base", ["v1_cpu_tp_2", "v1_early_cpu_tp_2", "v2_cpu_tp_2"])
def test_foreign_keys_named_like_columns_of_ours_do_no_harm(analyze: Run, folder: Path, base: str) -> None:
    document = json.loads((REPOSITORY / "tests" / "golden" / f"{base}.json").read_text())
    environment = document["environment"]
    for part in (document, document["config"], document["engine"], environment, environment["versions"]):
        part.update(dict.fromkeys(("group", "setting", "file", "pareto", "index", "batch_size"), "foreign"))
    (folder / "foreign_results.json").write_text(json.dumps(document))
    done = analyze("--input", folder, "--no-plots")
    assert (done.returncode, done.stderr) == (0, "")
    rows = (folder / "analysis" / "results.csv").read_text().splitlines()
    assert len(rows[0].split(",")) == len(set(rows[0].split(",")))
    assert rows[0].startswith("setting,group,")
    assert not [row for row in rows if row.startswith("foreign")]


def test_a_text_of_any_length_leaves_a_table_that_can_be_read(analyze: Run, folder: Path) -> None:
    document = json.loads((folder / "tp_2_results.json").read_text())
    document["name"] = document["environment"]["host"] = "x" * 1_000_000
    document["environment"]["versions"]["y" * 1_000_000] = "z" * 1_000_000
    (folder / "long_results.json").write_text(json.dumps(document))
    done = analyze("--input", folder, "--no-plots")
    assert (done.returncode, done.stderr) == (0, "")
    with (folder / "analysis" / "results.csv").open(newline="") as file:
        assert {len(row["name"]) for row in csv.DictReader(file)} == {4, 32_000}
    check_refused(analyze("--input", folder, "--no-plots", "--baseline", "tp_9"), "choose one of tp_1, tp_2, xxx")


@pytest.mark.parametrize(("part", "name"), [("config", "pipeline_parallel_size"), ("engine", "tensor_parallel_size")])
def test_a_size_that_is_text_costs_its_own_file_alone(analyze: Run, folder: Path, part: str, name: str) -> None:
    document = json.loads((folder / "tp_2_results.json").read_text())
    document[part][name] = "2"
    (folder / "bad_results.json").write_text(json.dumps(document))
    done = analyze("--input", folder, "--no-plots")
    (line,) = done.stderr.splitlines()
    assert f"bad_results.json: not a result of this program: {part}" in line
    assert f"{name} is '2', expected `int" in line
    assert done.returncode == 1
    assert "tp_2" in done.stdout


def test_names_of_files_reach_no_terminal_raw(analyze: Run, folder: Path) -> None:
    strange = folder / "a\x1b[31m\nb"
    strange.mkdir()
    for name in ("tp_1_results.json", "tp_2_results.json"):
        (folder / name).rename(strange / name)
    (strange / os.fsdecode(b"bad\xff\x9b.json")).write_text("{")
    done = analyze("--input", strange, "--no-plots")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert r"a\x1b[31m b/bad??.json" in line
    assert not has_control(line)
    assert not has_control(done.stdout, allowed="\n")
    assert r"a\x1b[31m\nb/analysis/results.csv" in done.stdout
    json.loads((strange / "analysis" / "summary.json").read_text())


def test_somebodys_whole_disk_is_not_read(analyze: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_FOLDERS", 3)
    for number in range(2):
        (folder / str(number)).mkdir()
    assert analyze("--input", folder, "--no-plots").returncode == 0
    for number in range(2, 4):
        (folder / str(number)).mkdir()
    check_refused(analyze("--input", folder, "--no-plots"), f"--input {folder}: more than 3 folders lie below it")


# --- wrong use ----------------------------------------------------------------------------------------------------


def check_refused(done: CompletedProcess[str], *words: str) -> None:
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_a_missing_input_is_refused() -> None:
    check_refused(run_script("--input", "nowhere"), "--input nowhere", "does not exist")


def test_no_input_at_all_is_refused() -> None:
    check_refused(run_script(), "--input")


def test_a_folder_without_result_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    check_refused(run_script("--input", tmp_path), f"--input {tmp_path}", "no result files")


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[1]")
    check_refused(run_script("--input", path), f"--input {path}", "not a result of this program")


def test_what_cannot_be_read_is_refused_and_nothing_is_written(analyze: Run, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, reason in (("", "not valid JSON"), ('{"a": 1}', "not a result of this program")):
        path.write_text(text)
        check_refused(analyze("--input", path), f"--input {path}", reason)
        check_refused(analyze("--input", tmp_path), f"--input {path}", reason)
    assert list(tmp_path.iterdir()) == [path]


def test_an_output_folder_that_cannot_be_made_is_refused(analyze: Run, folder: Path) -> None:
    taken = folder / "tp_1_results.json"
    for path in (taken, taken / "below"):
        check_refused(analyze("--input", folder, "--output-dir", path, "--no-plots"), f"--output-dir {path}")


def test_an_output_file_that_cannot_be_written_is_refused(analyze: Run, folder: Path) -> None:
    (folder / "analysis" / "results.csv").mkdir(parents=True)
    check_refused(analyze("--input", folder, "--no-plots"), "--output-dir", "cannot be written")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--plots", "throughput,speed"), "--plots speed: no such plot; choose of job_timeline,"),
        (("--plots", ","), "--plots"),
        (("--plots", "memory", "--no-plots"), "not allowed with"),
        (("--max-ttft-s", "0"), "--max-ttft-s: 0 is not above 0"),
        (("--max-ttft-s", "fast"), "--max-ttft-s: 'fast' is not a number"),
        (("--device-hour-price", "nan"), "--device-hour-price: 'nan' is not a number"),
        (("--slo-percentile", "101"), "--slo-percentile: 101 is not above 0 and at most 100"),
        (("--baseline", "tp_9"), "--baseline tp_9: no such setting; choose one of tp_1, tp_2"),
        (("--group-by", "colour"), "--group-by colour: no such column"),
        (("--compare", "nowhere"), "--compare nowhere: does not exist"),
        (("--fail-on-regression", "5"), "--fail-on-regression 5: there is nothing to compare with; add --compare DIR"),
        (("--fail-on-regression", "-1"), "--fail-on-regression: -1 is below 0"),
        (("--device-hour-price", "1e308"), "--device-hour-price: '1e308' is over 1000000000"),
        (("--max-latency-s", "1" * 300), "…"),
        (("--max-latency-s=--",), "--max-latency-s --: the dashes are no value; give one"),
        (("--compare", ""), "--compare: '' was given; a value is needed"),
        (("--compare", "no\nwhere"), "--compare no\\nwhere: does not exist"),
        (("--compare", "x" * 300), "cannot be read: File name too long"),
        (("--group-by", "a\x1b[31m"), "--group-by: 'a\\x1b[31m' was given; it contains control characters"),
        (("--group-by", "x" * 300), "--group-by " + "x" * 40 + "…"),
        (("--baseline", "a\nb"), "--baseline: 'a\\nb' was given; it contains control characters"),
        (("--baseline", "x" * 300), "--baseline " + "x" * 40 + "…"),
        (("--model", "x" * 300), "--model " + "x" * 40 + "…"),
        (("--setting", "x" * 300), "--setting " + "x" * 40 + "…"),
        (("--plots", "x" * 300), "--plots " + "x" * 40 + "…"),
        (("--output-dir", "a\nb"), "--output-dir: 'a\\nb' was given; it contains control characters"),
        (("--output-dir", "x" * 300), "shorten it"),
        (("--stray\x1b",), "unrecognized arguments: --stray\\x1b"),
    ],
)
def test_each_mistake_is_named_and_nothing_is_written(analyze: Run, folder: Path, flags: Any, words: str) -> None:
    check_refused(analyze("--input", folder, *flags), words)
    assert not (folder / "analysis").exists()


@pytest.mark.parametrize("flag", ["--no-plot", "--output", "--imput"])
def test_abbreviated_and_misspelt_flags_are_refused(analyze: Run, folder: Path, flag: str) -> None:
    check_refused(analyze("--input", folder, flag), flag)


# --- manners ------------------------------------------------------------------------------------------------------


def modules_after(*flags: str) -> tuple[set[str], set[str]]:
    """The words that the program prints, and every module that is imported in the end."""
    program = (
        f"import runpy, sys, contextlib; sys.argv = {[SCRIPT, *flags]!r}\n"
        f"with contextlib.suppress(SystemExit): runpy.run_path({SCRIPT!r}, run_name='__main__')\n"
        "print(*sys.modules)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True, timeout=60)
    *printed, modules = done.stdout.splitlines()
    return set(" ".join(printed).split()), set(modules.split())


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    assert_answers_at_once([sys.executable, SCRIPT, "--help"], REPOSITORY, dict(os.environ))
    assert "--output-dir" in modules_after("--help")[0]


def test_analysing_imports_neither_vllm_nor_torch(folder: Path) -> None:
    words, modules = modules_after("--input", str(folder))
    assert str(folder / "analysis" / "report.html") in words
    assert "throughput," in words
    assert {"pandas", "seaborn"} <= modules
    assert not {"vllm", "torch"} & modules


def test_a_terminal_that_knows_only_ascii_gets_the_summary_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert analyze_results.main(["--input", str(folder), "--no-plots"]) == 0
    assert b"tp_2" in written.getvalue()
