"""Standard streams that are closed, full, read by nobody or short of characters: what is printed never costs work."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import analyze_results
from batch_inference.core.streams import secure_streams, show
from builders import make_point, make_result, save_all
from conftest import REPOSITORY, experiment_command, stub_environment

pytestmark = pytest.mark.slow

# Says in a file what numbers its new pipe has, and what went wrong; prints more than a pipe holds.
PROGRAM = """
import os, sys
from batch_inference.core.streams import print_kept, say, secure_streams, show
secure_streams()
numbers = os.pipe()
for _ in range(3):
    say("progress\\n" * 8_000)
    {what}
open("seen", "w").write(f"{{min(numbers) > 2}} {{[os.get_inheritable(number) for number in range(3)]}}")
"""


def shell(folder: Path, redirection: str, what: str = 'print_kept("x\\n" * 20_000, "there")') -> str:
    """What it says on standard error, where that is left alone."""
    (folder / "program.py").write_text(PROGRAM.format(what=what))
    line = f"{sys.executable} program.py {redirection}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert (folder / "seen").read_text() == "True [True, True, True]"
    return done.stderr.replace("progress\n", "").strip()


@pytest.mark.parametrize(
    "redirection",
    ["<&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full", "2>&1 | true", "2>&1 | head -n 1", "2>&1 >&- | true"],
)
def test_a_program_goes_on_to_its_end(tmp_path: Path, redirection: str) -> None:
    assert shell(tmp_path, redirection) == ""


NOWHERE = pytest.mark.parametrize(
    ("redirection", "reason"), [(">/dev/full", "No space left on device"), (">&-", "it is closed")]
)


@NOWHERE
def test_what_is_not_shown_is_said_to_be_in_a_file(tmp_path: Path, redirection: str, reason: str) -> None:
    assert f"note: standard output cannot be written: {reason}; what it would have shown is in there" in (
        shell(tmp_path, redirection).splitlines()
    )


@NOWHERE
def test_what_was_asked_for_and_cannot_be_shown_is_an_error(tmp_path: Path, redirection: str, reason: str) -> None:
    said = shell(tmp_path, redirection, 'assert show("x") == 1')
    assert f"error: standard output cannot be written: {reason}" in said.splitlines()


def test_that_nobody_reads_to_the_end_is_no_error(tmp_path: Path) -> None:
    assert shell(tmp_path, "| true", 'assert show("x\\n" * 20_000) == 0') == ""


def test_a_pipe_that_does_not_block_is_waited_for() -> None:
    """Whoever shares it may have set it so: node.js does."""
    program = (
        "import os; os.set_blocking(1, False); from batch_inference.core.streams import secure_streams, show\n"
        "secure_streams(); show('x' * 1_000_000)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, timeout=60, check=True)
    assert (len(done.stdout), done.stderr) == (1_000_001, b"")


@pytest.mark.parametrize(
    ("encoding", "text", "shown"),
    [
        ("ascii", "5 ± 1 ≈ ● …", b"5 +- 1 ~ # ..."),
        ("latin-1", "± ≤", b"\xb1 <="),
        ("ascii", "é", b"\\xe9"),
        ("utf-8", "é ±", "é ±".encode()),
        ("utf-8", os.fsdecode(b"name\xff"), b"name\xff"),
        ("ascii", os.fsdecode(b"\xff\xfe ") + "±", b"\xff\xfe +-"),
        ("utf-8", "\ud800", b"\\ud800"),
    ],
)
def test_a_terminal_that_lacks_a_character_gets_another(
    monkeypatch: pytest.MonkeyPatch, encoding: str, text: str, shown: bytes
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    secure_streams()
    assert show(text) == 0
    assert written.getvalue() == shown + b"\n"


def test_whoever_has_replaced_a_stream_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = io.StringIO()
    monkeypatch.setattr(sys, "stderr", mine)
    secure_streams()
    assert sys.stderr is mine


# --- whole programs ------------------------------------------------------------------------------------------------

# How the script and the launcher measure then is in tests/faults.
REDIRECTIONS = ["<&- >&- 2>&-", ">/dev/full", "2>&1 | true"]


@pytest.fixture
def in_shell(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(command: list[str], redirection: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = stub_environment(STUB_LOAD_S="0", PYTHON=sys.executable, **variables)
        line = f'set -o pipefail; "$@" {redirection}'
        return subprocess.run(
            ["bash", "-c", line, "-", *command], cwd=tmp_path, env=environment, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("redirection", REDIRECTIONS)
def test_the_launcher_measures_and_analyses_as_if_somebody_read_it(
    in_shell: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, redirection: str
) -> None:
    words = ["quickstart", "--batch-sizes", "1", "--seq-lens", "16", "--", "--num-runs", "2", "--max-tokens", "4"]
    done = in_shell([str(REPOSITORY / "run_batch_experiments.sh"), *words], redirection)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr + done.stdout
    folder = tmp_path / "quickstart_results"
    assert json.loads((folder / "analysis" / "summary.json").read_text())["groups"]
    for path in folder.glob("*_results.json"):
        assert [point["status"] for point in json.loads(path.read_text())["points"]] == ["ok"]


@pytest.mark.parametrize("redirection", REDIRECTIONS)
def test_the_analysis_writes_its_files_as_if_somebody_read_it(
    in_shell: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, redirection: str
) -> None:
    save_all([make_result(points=[make_point()])], tmp_path / "in")
    command = [sys.executable, str(REPOSITORY / "analyze_results.py"), "--input", "in", "--no-plots"]
    done = in_shell(command, redirection)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr + done.stdout
    assert (tmp_path / "in" / "analysis" / "report.html").is_file()


@pytest.mark.parametrize("script", ["batch_inference_experiment.py", "analyze_results.py"])
def test_help_that_cannot_be_shown_is_an_error(script: str) -> None:
    line = f"{sys.executable} {REPOSITORY / script} --help >/dev/full"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: standard output cannot be written: No space left on device\n")


def test_a_closing_table_in_ascii(in_shell: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    command = experiment_command(tmp_path, "--batch-sizes", "1", "--seq-lens", "16", "--max-tokens", "4")
    done = in_shell(command, "", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "+- s" in done.stdout
    assert done.stdout.isascii()


def test_the_summary_in_ascii(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_all([make_result(points=[make_point()])], tmp_path)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert analyze_results.main(["--input", str(tmp_path), "--no-plots"]) == 0
    assert b"+-" in written.getvalue()
