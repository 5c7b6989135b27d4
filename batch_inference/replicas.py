"""The replicas of a setting: one engine process each, in a process group of its own, on its own devices."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from batch_inference.config import ConfigError, ExperimentConfig
from batch_inference.hardware import Devices

PACKAGE_PARENT = Path(__file__).resolve().parent.parent
# Long enough for every replica to be waiting when the common start comes.
START_LEAD_S = 0.02
# A closing engine hands its devices back in 2 to 6 s; afterwards its group is ended.
CLOSE_TIMEOUT_S = 15.0
LOG_TAIL_LINES = 40

# Errors that only pass on that another one happened.
_HANDED_ON = re.compile(
    r"Engine core initialization failed|WorkerProc initialization failed|cancelled|EngineDeadError|"
    r"EngineCore encountered an issue|Chat template"
)
_ERROR = re.compile(r"(?:^|[\s\].])([A-Z]\w*(?:Error|Exception)): (.+)")


class ReplicaError(Exception):
    """An engine that did not start, or did not finish its work: the reason in one line, and the log's end."""

    def __init__(self, reason: str, log_tail: list[str]) -> None:
        super().__init__(reason)
        self.reason = reason
        self.log_tail = log_tail


class Replicas(Protocol):
    """What the experiment needs of the replicas; tests put a fake with a ticking clock in its place."""

    def start(self) -> list[dict[str, Any]]:
        """Load every replica; one description of the engine each. Raises ReplicaError or ConfigError."""

    def run(self, batch_size: int, seq_len: int, max_tokens: int, stream: tuple[object, ...]) -> list[dict[str, Any]]:
        """Submit one batch to every replica at the same moment; one outcome each, times from the common start."""

    def pids(self) -> list[int]: ...

    def close(self) -> None: ...


class LocalReplicas:
    """Replicas as processes of this machine."""

    def __init__(self, config: ExperimentConfig, devices: Devices, log_path: Path) -> None:
        self._config = config
        self._devices = devices
        self._log_path = log_path
        self._processes: list[_EngineProcess] = []

    def start(self) -> list[dict[str, Any]]:
        per_replica = self._config.devices_per_replica
        for replica in range(self._config.data_parallel_size):
            devices = self._devices.slice_for(replica, per_replica)
            self._processes.append(_EngineProcess(devices, self._log_path))
        command = {"op": "load", "config": dataclasses.asdict(self._config)}
        return [reply["engine"] for reply in self._all([command] * len(self._processes))]

    def run(self, batch_size: int, seq_len: int, max_tokens: int, stream: tuple[object, ...]) -> list[dict[str, Any]]:
        prepare = {"op": "prepare", "batch_size": batch_size, "seq_len": seq_len, "max_tokens": max_tokens}
        self._all(
            [{**prepare, "seed_parts": [*stream, replica]} for replica in range(len(self._processes))],
        )
        at_s = time.monotonic() + START_LEAD_S
        outcomes = [reply["outcome"] for reply in self._all([{"op": "start", "at_s": at_s}] * len(self._processes))]
        first_s = min(outcome["start_s"] for outcome in outcomes)
        return [
            {**outcome, "start_s": outcome["start_s"] - first_s, "end_s": outcome["end_s"] - first_s}
            for outcome in outcomes
        ]

    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def close(self) -> None:
        for process in self._processes:
            process.ask_to_close()
        deadline_s = time.monotonic() + CLOSE_TIMEOUT_S
        for process in self._processes:
            process.end(deadline_s)
        self._processes.clear()

    def _all(self, commands: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Send one command to each replica, then wait for every answer."""
        for process, command in zip(self._processes, commands, strict=True):
            process.send(command)
        return [process.receive() for process in self._processes]


class _EngineProcess:
    """`python -m batch_inference.engine`, the leader of its own process group."""

    def __init__(self, devices: Devices, log_path: Path) -> None:
        self._log_path = log_path
        commands_read, commands_write = os.pipe()
        replies_read, replies_write = os.pipe()
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "batch_inference.engine", str(commands_read), str(replies_write)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[commands_read, replies_write],
                env={**os.environ, **_quiet_environment(), **devices.environment()},
                start_new_session=True,
            )
        os.close(commands_read)
        os.close(replies_write)
        self._commands = os.fdopen(commands_write, "wb", buffering=0)
        self._replies = os.fdopen(replies_read, "rb", buffering=0)
        self._buffer = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, command: dict[str, Any]) -> None:
        # A process that is gone shows in `receive`, with its log.
        with contextlib.suppress(BrokenPipeError):
            self._commands.write(json.dumps(command).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """The next reply. Raises ConfigError for the user's flags, ReplicaError for anything else that failed."""
        while b"\n" not in self._buffer:
            readable, _, _ = select.select([self._replies], [], [], 1.0)
            chunk = os.read(self._replies.fileno(), 1 << 16) if readable else b""
            self._buffer += chunk
            # End of file alone is not enough: a child of the engine may hold the pipe open after its death.
            if not chunk and self._process.poll() is not None:
                raise self._failure(f"the engine process ended with {_exit_words(self._process.returncode)}")
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        if reply["event"] != "failed":
            return reply
        if reply["usage"]:
            raise ConfigError(reply["reason"])
        raise self._failure(reply["reason"])

    def _failure(self, reason: str) -> ReplicaError:
        tail = read_log_tail(self._log_path)
        # vLLM hands on a bare "Engine core initialization failed": the cause stands only in the log.
        return ReplicaError(root_cause(tail) or reason.partition("\n")[0], tail[-LOG_TAIL_LINES:])

    def ask_to_close(self) -> None:
        self.send({"op": "close"})

    def end(self, deadline_s: float) -> None:
        """Wait for an orderly end until `deadline_s`, then end whatever is left of the group."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline_s - time.monotonic()))
        for signal_number, patience_s in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0)):
            if self._group_is_empty(0.0):
                break
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal_number)
            self._group_is_empty(patience_s)
        self._replies.close()
        self._commands.close()

    def _group_is_empty(self, patience_s: float) -> bool:
        deadline_s = time.monotonic() + patience_s
        while True:
            self._process.poll()  # reaps the leader, which otherwise stays in the group as a zombie
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return True
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(0.05)


def _quiet_environment() -> dict[str, str]:
    path = os.environ.get("PYTHONPATH")
    return {
        "PYTHONPATH": os.pathsep.join([str(PACKAGE_PARENT)] + ([path] if path else [])),
        "PYTHONUNBUFFERED": "1",
        # Measuring machines are often cut off: usage statistics would only wait for a time-out.
        "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
    }


def _exit_words(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def read_log_tail(path: Path, max_bytes: int = 200_000) -> list[str]:
    """The last lines of a log, without colour codes."""
    with contextlib.suppress(OSError), path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - max_bytes))
        text = log.read().decode(errors="replace")
        return re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    return []


def root_cause(log_lines: list[str]) -> str | None:
    """The last error of a log that is not just one being handed on; None where there is none."""
    for line in reversed(log_lines):
        found = _ERROR.search(line)
        if found and not _HANDED_ON.search(line):
            return f"{found[1]}: {found[2].strip()}"
    return None
