"""What a file says of the machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batch_inference.measure.environment import collect_environment
from batch_inference.plan.devices import Devices


def test_how_gpus_are_linked_is_kept_as_plain_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '\\033[4mGPU0\\tGPU1\\033[0m\\nGPU0\\tX\\tNV18\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monitor: Any = SimpleNamespace(identify=list, driver_version=str)
    environment = collect_environment(Devices("gpu", ("0", "1")), monitor)
    assert environment.topology == "GPU0\tGPU1\nGPU0\tX\tNV18"


def test_without_the_tool_how_gpus_are_linked_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monitor: Any = SimpleNamespace(identify=list, driver_version=str)
    assert collect_environment(Devices("gpu", ("0",)), monitor).topology is None
