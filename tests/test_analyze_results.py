"""analyze_results.py: as a process where that matters, and within this one, which is faster, where it does not."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pandas as pd
import pytest

import analyze_results
from batch_inference.results import Point
from builders import make_point, make_result, make_sweep, save_all
from conftest import REPOSITORY

Run = Callable[..., CompletedProcess[str]]
SCRIPT = str(REPOSITORY / "analyze_results.py")


def run_script(*flags: object) -> CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, flags)], capture_output=True, text=True, timeout=60)


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


def test_a_folder_becomes_summary_csv_report_and_plots(analyze: Run, folder: Path) -> None:
    done = analyze("--input", folder)
    assert (done.returncode, done.stderr) == (0, "")
    names = ["results.csv", "report.md", "throughput.png", "latency.png", "scaling.png", "memory.png"]
    assert sorted(path.name for path in (folder / "analysis").iterdir()) == sorted(names)
    assert done.stdout.splitlines()[-6:] == [str(folder / "analysis" / name) for name in names]
    assert "tp_2" in done.stdout
    assert len(pd.read_csv(folder / "analysis" / "results.csv")) == 4
    report = (folder / "analysis" / "report.md").read_text()
    assert all(f"]({name})" in report for name in names if name != "report.md")


def test_a_single_file_is_analysed_beside_it(analyze: Run, folder: Path) -> None:
    done = analyze("--input", folder / "tp_1_results.json", "--no-plots")
    assert done.returncode == 0
    assert sorted(path.name for path in (folder / "analysis").iterdir()) == ["report.md", "results.csv"]
    assert "tp_2" not in done.stdout


def test_output_dir_is_made_and_used(analyze: Run, folder: Path, tmp_path: Path) -> None:
    done = analyze("--input", folder, "--output-dir", tmp_path / "a" / "b", "--no-plots")
    assert done.returncode == 0
    assert (tmp_path / "a" / "b" / "results.csv").exists()
    assert not (folder / "analysis").exists()


def test_a_plot_with_nothing_to_show_is_explained(analyze: Run, folder: Path) -> None:
    done = analyze("--input", folder / "tp_1_results.json")
    assert "not drawn: Scaling efficiency: every measured setting has the same number of devices" in done.stdout
    assert not (folder / "analysis" / "scaling.png").exists()


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
    failed.engine = {"failure": {"reason": "no memory left", "log_tail": []}}
    lost = make_result("tp_2", [Point(1, 8, 4, "oom", reason="out of memory")], (2, 1, 1))
    save_all([failed, lost], tmp_path / "results")
    done = analyze("--input", tmp_path / "results")
    assert (done.returncode, done.stderr) == (0, "")
    assert "tp_1 failed: no memory left" in done.stdout
    assert "not drawn: Output throughput against batch size: no point was measured" in done.stdout


def test_a_folder_of_two_gpu_models_is_not_ranked_together(analyze: Run, tmp_path: Path) -> None:
    fast = make_result("fast", [make_point(latencies_s=[0.1])], environment={"devices": [{"name": "NVIDIA A100"}]})
    save_all([make_result("slow", [make_point(latencies_s=[1.0])]), fast], tmp_path)
    done = analyze("--input", tmp_path, "--no-plots")
    best = [line.split()[2] for line in done.stdout.splitlines() if " throughput " in line]
    assert best == ["fast", "slow"]
    assert "they differ in device_name" in " ".join(done.stdout.split())
    table = pd.read_csv(tmp_path / "analysis" / "results.csv")
    assert table["group"].tolist() == [1, 2]


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


@pytest.mark.parametrize("flag", ["--no-plot", "--output", "--imput"])
def test_abbreviated_and_misspelt_flags_are_refused(analyze: Run, folder: Path, flag: str) -> None:
    check_refused(analyze("--input", folder, flag), flag)


# --- manners ------------------------------------------------------------------------------------------------------


def modules_after(*flags: str) -> set[str]:
    """The words printed, among them every module that is imported in the end."""
    program = (
        f"import runpy, sys, contextlib; sys.argv = {[SCRIPT, *flags]!r}\n"
        f"with contextlib.suppress(SystemExit): runpy.run_path({SCRIPT!r}, run_name='__main__')\n"
        "print(*sys.modules)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True, timeout=60)
    return set(done.stdout.split())


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    started_s = time.perf_counter()
    words = modules_after("--help")
    assert time.perf_counter() - started_s < 0.3
    assert "--output-dir" in words
    assert not {"pandas", "matplotlib", "seaborn", "numpy", "vllm", "torch"} & words


@pytest.mark.slow
def test_analysing_imports_neither_vllm_nor_torch(folder: Path) -> None:
    words = modules_after("--input", str(folder))
    assert {"pandas", "seaborn", str(folder / "analysis" / "throughput.png")} <= words
    assert not {"vllm", "torch"} & words


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    program = "import analyze_results; analyze_results.show('line\\n' * 100_000)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 0


def test_a_terminal_that_knows_only_ascii_gets_the_summary_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert analyze_results.main(["--input", str(folder), "--no-plots"]) == 0
    assert b"tp_2" in written.getvalue()


def test_without_pandas_the_user_is_told_what_to_do(
    analyze: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("batch_inference.tables", "pandas"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "pandas", None)
    check_refused(analyze("--input", folder), "pandas is not installed", "setup_env.sh")
