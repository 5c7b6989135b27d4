"""The example of a job: the file is what the script makes, and the tiny model can run it."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from batch_inference.core.workload import Workload
from conftest import REPOSITORY

SCRIPT, FILE = REPOSITORY / "examples" / "make_workload.py", REPOSITORY / "examples" / "workload.jsonl"


def make(*words: str) -> subprocess.CompletedProcess[str]:
    # Python's own library alone: no site-packages.
    return subprocess.run([sys.executable, "-I", "-S", str(SCRIPT), *words], capture_output=True, text=True)


def lengths_of(path: Path) -> list[tuple[int, int]]:
    found = [(entry.prompt_tokens, entry.output_tokens) for entry in Workload(path).entries()]
    return [(prompt, output) for prompt, output in found if prompt is not None and output is not None]


def test_the_file_is_what_the_script_makes(tmp_path: Path) -> None:
    assert make().stdout == FILE.read_text()
    assert make("--output", str(tmp_path / "made.jsonl")).stdout == ""
    assert (tmp_path / "made.jsonl").read_bytes() == FILE.read_bytes()


def test_the_tiny_model_can_run_it() -> None:
    lengths = lengths_of(FILE)
    assert len(lengths) == 400
    most = json.loads((REPOSITORY / "models" / "tiny-llama" / "config.json").read_text())["max_position_embeddings"]
    assert max(prompt + output for prompt, output in lengths) <= 512 < most


def test_it_is_a_job_of_all_sizes() -> None:
    """Right-skewed in both, which are long together a little."""
    prompts, outputs = zip(*lengths_of(FILE), strict=True)
    for tokens, mean in ((prompts, 60), (outputs, 24)):
        assert statistics.mean(tokens) == pytest.approx(mean, rel=0.05)
        assert statistics.median(tokens) < 0.85 * mean
        assert max(tokens) > 5 * mean
    assert 0.2 < statistics.correlation(prompts, outputs) < 0.6


def test_the_flags_are_obeyed(tmp_path: Path) -> None:
    path = tmp_path / "job.jsonl"
    words = ["--requests", "5000", "--mean-prompt", "900", "--mean-output", "300", "--longest", "20000", "--output"]
    make(*words, str(path), "--seed", "1")
    lengths = lengths_of(path)
    assert len(lengths) == 5000
    prompts, outputs = zip(*lengths, strict=True)
    assert statistics.mean(prompts) == pytest.approx(900, rel=0.05)
    assert statistics.mean(outputs) == pytest.approx(300, rel=0.05)
    make(*words, str(path), "--seed", "2")
    assert lengths_of(path) != lengths
    make(*words, str(path), "--longest", "1200")
    cut = [prompt + output for prompt, output in lengths_of(path)]
    assert max(cut) == 1200
    assert min(cut) >= 2


@pytest.mark.parametrize(
    ("words", "rc", "line"),
    [
        ("--requests 0", 2, "argument --requests: '0' was given; a whole number of at least 1 is needed"),
        ("--seed x", 2, "argument --seed: 'x' was given; a whole number of at least 0 is needed"),
        ("--longest 80", 2, "--longest 80: the mean lengths are longer; raise it"),
        ("--output /no/such/folder/f", 1, "error: /no/such/folder/f: it cannot be written (No such file or directory)"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words: str, rc: int, line: str) -> None:
    done = make(*words.split())
    assert done.returncode == rc
    assert done.stderr.splitlines()[-1].endswith(line)
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_seen_enough_is_no_failure() -> None:
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), "--requests", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as writer:
        assert writer.stdout
        assert writer.stderr
        assert writer.stdout.readline()
        writer.stdout.close()
        assert writer.stderr.read() == b""
    assert writer.returncode == 0
