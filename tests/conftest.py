"""What several test modules need: the repository's folder, and the scripts run as a user runs them."""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
STUB = REPOSITORY / "tests" / "stub"
# The user's own caches are neither read nor written.
CACHE = Path(tempfile.mkdtemp(prefix="batch_inference_cache_"))
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
SMALL_GRID = ("--batch-sizes", "1,2", "--seq-lens", "8", "--max-tokens", "4", "--num-runs", "2")


@pytest.fixture
def repository() -> Path:
    return REPOSITORY


@pytest.fixture
def experiment(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run batch_inference_experiment.py on the stub vLLM, the tiny model and a small grid."""

    def run(*flags: str, grid: tuple[str, ...] = SMALL_GRID, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            experiment_command(tmp_path, *grid, *flags),
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=stub_environment(**variables),
            timeout=60,
        )

    return run


def experiment_command(folder: Path, *flags: str) -> list[str]:
    script = str(REPOSITORY / "batch_inference_experiment.py")
    model = str(REPOSITORY / "models" / "tiny-llama")
    output = ("--output-file", str(folder / "tp_1_results.json"))
    return [sys.executable, script, "--model", model, *output, *flags]


def with_ctrl_c() -> None:
    """preexec_fn of a process that is to be interrupted: one in the background, or under nohup, may have inherited to
    ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def stub_environment(**variables: str) -> dict[str, str]:
    """The stub vLLM, as if the machine had no network."""
    ours = {"PYTHONPATH": str(STUB), "XDG_CACHE_HOME": str(CACHE), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **ours, **variables}


def loaded_with(log_path: Path) -> dict[str, str]:
    """The variables that the stub vLLM saw when it loaded."""
    line = next(line for line in log_path.read_text().splitlines() if line.startswith("stub vLLM is loading"))
    return dict(word.split("=", 1) for word in shlex.split(line)[4:])


def commands_of(plan: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """The commands of a plan of the launcher, which stand among comments."""
    return [shlex.split(line) for line in plan.stdout.splitlines() if not line.startswith("#")]


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody has, below those that the kernel gives out itself."""
    while True:
        first = random.randrange(16_000, 32_000 - count)
        with contextlib.suppress(OSError), contextlib.ExitStack() as servers:
            for port in range(first, first + count):
                servers.enter_context(socket.create_server(("", port)))
            return first
