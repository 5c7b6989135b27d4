"""Misspelt flags of vLLM are found before an engine loads, by flags that are asked for once and kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from batch_inference.core import child
from batch_inference.core.config import ConfigError
from batch_inference.measure import vllm_flags
from batch_inference.measure.vllm_flags import cache_file, check_vllm_flags
from conftest import REPOSITORY, STUB, assert_answers_at_once, experiment_command, stub_environment

LAUNCHER = str(REPOSITORY / "run_batch_experiments.sh")
KNOWN = ["--load-format", "--kv-cache-dtype", "--compilation-config", "--quantization", "--no-async-scheduling"]
FOUND = "error: --quantisation is no flag of this program or of vLLM; did you mean --quantization?"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """How often vLLM was asked; it is the stub, and answers KNOWN."""
    questions: list[str] = []

    def ask(module: str, **_: object) -> list[str]:
        questions.append(module)
        return KNOWN

    monkeypatch.setattr(child, "ask", ask)
    monkeypatch.setattr(vllm_flags, "vllm_folder", lambda: STUB / "vllm")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return questions


def said_by(*words: str) -> list[str]:
    said: list[str] = []
    check_vllm_flags(words, said.append)
    return said


def test_vllm_is_asked_once_and_the_first_time_says_what_it_waits_for(asked: list[str]) -> None:
    (line,) = said_by("--load-format", "dummy")
    assert line.startswith("note: asking vLLM ")
    assert said_by("--kv_cache_dtype=fp8", "--compilation-config.mode", "3", "--no-async-scheduling", "-q", "x") == []
    with pytest.raises(ConfigError, match="did you mean --quantization"):
        said_by("--quantisation=fp8")
    assert asked == ["measure.vllm_flags"]


def test_without_flags_for_vllm_nobody_is_asked(asked: list[str]) -> None:
    assert said_by("-q", "fp8") == said_by() == asked == []


def test_where_vllm_is_not_installed_nothing_is_said(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_flags, "vllm_folder", lambda: None)
    assert said_by("--quantisation", "fp8") == asked == []


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1}', "[]", '["quantization"]', "\udcff"])
def test_an_unusable_cache_is_ignored_and_replaced(asked: list[str], content: str) -> None:
    path = cache_file(STUB / "vllm")
    path.parent.mkdir(parents=True)
    path.write_text(content, errors="surrogateescape")
    assert len(said_by("--load-format", "dummy")) == 1
    assert json.loads(path.read_text()) == KNOWN
    assert len(asked) == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_another_installation_has_a_file_of_its_own(tmp_path: Path) -> None:
    source = tmp_path / "engine" / "arg_utils.py"
    source.parent.mkdir()
    source.touch()
    first = cache_file(tmp_path)
    os.utime(source, ns=(1, 1))
    assert len({first, cache_file(tmp_path), cache_file(STUB / "vllm")}) == 3


def test_a_cache_that_cannot_be_written_is_no_error(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert len(said_by("--load-format", "dummy")) == len(said_by("--load-format", "dummy")) == 1
    assert len(asked) == 2


def test_a_vllm_that_gives_no_answer_is_left_to_check_its_flags(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise child.ChildError("ImportError: the planted reason")

    monkeypatch.setattr(child, "ask", fail)
    _, line = said_by("--quantisation", "fp8")
    assert "the planted reason" in line
    assert asked == []


@pytest.mark.parametrize("words", [("--dry-run",), ()], ids=["plan", "run"])
def test_both_programs_name_a_misspelt_flag_before_an_engine_loads(tmp_path: Path, words: tuple[str, ...]) -> None:
    environment = stub_environment(PYTHON=sys.executable, XDG_CACHE_HOME=str(tmp_path / "cache"))
    model = ("--model", str(REPOSITORY / "models" / "tiny-llama"), "--seq-lens", "64")
    for command, notes in (
        ([LAUNCHER, "custom", "TP=1", *model, *words, "--", "--quantisation", "fp8"], 1),
        (experiment_command(tmp_path, "--seq-lens", "64", *words, "--quantisation", "fp8"), 0),
    ):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (2, "")
        *said, last = done.stderr.splitlines()
        assert (len(said), last) == (notes, FOUND)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


def test_a_plan_with_kept_flags_answers_at_once(tmp_path: Path) -> None:
    environment = stub_environment(PYTHON=sys.executable)
    commands = (
        [LAUNCHER, "quickstart", "--dry-run"],
        experiment_command(tmp_path, "--seq-lens", "64", "--dry-run", "--load-format", "dummy"),
    )
    subprocess.run(commands[0], cwd=tmp_path, env=environment, capture_output=True, timeout=60, check=True)
    for command in commands:
        assert_answers_at_once(command, tmp_path, environment)


@pytest.mark.vllm
def test_the_real_vllm_names_its_flags(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "batch_inference_experiment.py", "--dry-run", "--model", "models/tiny-llama"]
    grid = ("--seq-lens", "64", "--max-tokens", "4")
    for flags, code in ((["--quantisation", "fp8"], 2), (["--kv_cache_dtype=fp8", "--no-async-scheduling"], 0)):
        done = subprocess.run(
            [*command, *grid, *flags], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == code, done.stderr
        assert (FOUND in done.stderr.splitlines()) == (code == 2)
