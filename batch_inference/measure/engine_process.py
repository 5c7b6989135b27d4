"""The process that holds an engine, as the supervising script sees it: its pipes, its log, its life and its end.

Every engine process leads its own process group and has its own devices.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from batch_inference.core.child import python_path
from batch_inference.core.config import ConfigError, ExperimentConfig, flag_of
from batch_inference.core.files import open_regular
from batch_inference.core.secrets import redact_text
from batch_inference.core.text import plain
from batch_inference.measure.leftovers import processes_of, remove, shared_memory_of
from batch_inference.measure.logs import open_log
from batch_inference.measure.messages import (
    AnyReply,
    Close,
    Command,
    Failed,
    Lines,
    encode,
    replies_from,
)  # fmt: skip
from batch_inference.measure.nodes import Nodes

# The flags that limit how long an engine may take to start, and for one run.
STARTUP, POINT = "startup_timeout", "point_timeout"
LOG_TAIL_LINES = 40
# How vLLM names its own processes: VLLM::EngineCore, VLLM::Worker_TP0.
_VLLM_TITLE = "VLLM::"
DEATH_IS_SAID_WITHIN_S = 3.0

# Errors that only report that another one happened.
_HANDED_ON = re.compile(
    r"Engine core initialization failed|WorkerProc initialization failed|cancelled|EngineDeadError|"
    r"EngineCore encountered an issue|Chat template"
)
_DIED = re.compile(r"Worker proc \S+ died unexpectedly \(exit code: -?\d+\)")
# vLLM's message about a kernel that its own warm-up did not cover.
_COMPILED = re.compile(r" during inference: |Triton autotuning for function")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_ERROR = re.compile(r"(?:^|[\s\].])([A-Z]\w*(?:Error|Exception)): (.+)")


class ReplicaError(Exception):
    """An engine that did not start, or did not finish its work: the reason in one line, the log's end, and a class of
    failures.py if the supervisor itself knows it."""

    def __init__(self, reason: str, log_tail: list[str], kind: str | None = None) -> None:
        super().__init__(reason)
        # Both go into the file and to the terminal.
        self.reason = redact_text(reason)
        self.log_tail = list(map(redact_text, log_tail))
        self.kind = kind


def replica_log(log_path: Path, replica: int) -> Path:
    """The first replica's log is the setting's; those of the others are beside it."""
    return log_path if replica == 0 else log_path.with_suffix(f".replica_{replica}.log")


def rank_log(log_path: Path, rank: int) -> Path:
    return log_path.with_suffix(f".rank_{rank}.log")


def log_paths(config: ExperimentConfig) -> list[Path]:
    """The logs that a measuring process will write; ranks other than 0 write their own."""
    if config.nnodes > 1 and config.node_rank > 0:
        return [node_log(config.log_path, config.node_rank)]
    replicas = 1 if config.distributed_executor_backend == "external_launcher" else config.data_parallel_size
    return [replica_log(config.log_path, replica) for replica in range(replicas)]


def node_log(log_path: Path, node: int) -> Path:
    return log_path.with_suffix(f".node_{node}.log")


class Patience:
    """How long an answer may take by a clock outside the engine: --startup-timeout or --point-timeout."""

    def __init__(self, config: ExperimentConfig, waiting_for: str) -> None:
        self.waiting_for = waiting_for
        self.limit_s: float = getattr(config, waiting_for)
        self._end_s: float = time.monotonic() + self.limit_s

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self._end_s


def receive(processes: Sequence[EngineProcess], patience: Patience) -> list[list[AnyReply]]:
    """The next replies of each process, one per rank. Raises ConfigError for wrong flags, ReplicaError for a failure,
    at the first that fails, because coupled replicas wait for each other forever."""
    answers: dict[EngineProcess, list[AnyReply]] = {}
    while waiting := [process for process in processes if process not in answers]:
        select.select(waiting, [], [], min(1.0, patience.limit_s))
        answers |= {process: replies for process in waiting if (replies := process.replies())}
        if patience.is_over and (late := [process for process in waiting if process not in answers]):
            raise late[0].late(patience)
    return [answers[process] for process in processes]


class EngineProcess:
    """`python -m batch_inference.measure.worker`, the leader of its own process group."""

    def __init__(self, environment: dict[str, str], log_path: Path, nodes: Nodes | None = None) -> None:
        self.log_path = log_path
        self._nodes = nodes
        commands_read, commands_write = os.pipe()
        replies_read, replies_write = os.pipe()
        with open_log(log_path) as log:
            self._process = subprocess.Popen(
                # -P: ignore a batch_inference or a queue.py in the user's folder.
                [sys.executable, "-P", "-m", "batch_inference.measure.worker", str(commands_read), str(replies_write)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[commands_read, replies_write],
                env={**os.environ, **quiet_environment(), **environment},
                start_new_session=True,
            )
        os.close(commands_read)
        os.close(replies_write)
        self._commands = os.fdopen(commands_write, "wb", buffering=0)
        self._replies = os.fdopen(replies_read, "rb", buffering=0)
        self._pieces = Lines()
        self._lines: list[bytes] = []  # complete ones
        self.log_since = LogMark(log_path)
        self._parts: dict[int, str] = {}
        self._shared_memory: set[Path] = set()
        self._dead_since_s: float | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, command: Command) -> None:
        # Everything in the log so far belongs to work that went well.
        self.log_since = LogMark(self.log_path)
        # If the process is gone, `_receive` notices, and has its log.
        with contextlib.suppress(BrokenPipeError):
            self._commands.write(encode(command) + b"\n")

    def fileno(self) -> int:
        """The pipe that its replies come through."""
        return self._replies.fileno()

    def late(self, patience: Patience) -> ReplicaError:
        kind = "timeout_startup" if patience.waiting_for == STARTUP else "timeout_point"
        flag = flag_of(patience.waiting_for)
        return ReplicaError(f"no answer within {flag} {patience.limit_s:g} s", self._log_end(), kind)

    def replies(self) -> list[AnyReply]:
        """The next replies, one per rank; empty if there are none. Raises as `_receive` does."""
        if not self._lines:
            readable, _, _ = select.select([self._replies], [], [], 0)
            chunk = os.read(self._replies.fileno(), 1 << 16) if readable else b""
            self._lines = self._pieces.ended_by(chunk)
            if not chunk:
                self._check_alive()
        if not self._lines:
            return []
        try:
            replies = replies_from(self._lines.pop(0))
        except msgspec.ValidationError as error:
            raise self._failure(f"the engine gave an invalid answer: {error}") from error
        for reply in replies:
            if isinstance(reply, Failed):
                raise ConfigError(reply.reason) if reply.usage else self._failure(reply.reason)
        return replies

    def _check_alive(self) -> None:
        """Raises ReplicaError if there is nothing left to wait for."""
        # End of file is not enough: a child of the engine may hold the pipe open after the engine's death.
        if self._process.poll() is not None:
            raise self._failure(f"the engine process ended with {_exit_words(self._process.returncode)}")
        if dead := self._dead_part():
            raise self._failure(f"vLLM's process {dead} ended without a word")
        if self._nodes and (lost := self._nodes.lost()):
            raise ReplicaError(lost, self._log_end())

    def remember_parts(self) -> None:
        """Once it is loaded: note vLLM's own processes, which live as long as the engine, and how they talk. vLLM does
        not always notice that one was killed; `generate` then never returns."""
        self._shared_memory = shared_memory_of(self.pid)
        for process in processes_of(self.pid):
            with contextlib.suppress(OSError):
                title = (process / "cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace").strip()
                if title.startswith(_VLLM_TITLE):
                    self._parts[int(process.name)] = title

    def _dead_part(self) -> str | None:
        """The title of a vLLM process that has been gone for longer than vLLM needs to report it."""
        dead = [title for pid, title in self._parts.items() if not _is_alive(pid)]
        if not dead:
            return None
        self._dead_since_s = self._dead_since_s or time.monotonic()
        return dead[0] if time.monotonic() - self._dead_since_s > DEATH_IS_SAID_WITHIN_S else None

    def _failure(self, reason: str) -> ReplicaError:
        # vLLM passes on a bare "Engine core initialization failed": only the log has the cause.
        return ReplicaError(root_cause(self.log_since.lines()) or plain(reason.partition("\n")[0]), self._log_end())

    def _log_end(self) -> list[str]:
        return read_log_tail(self.log_path)[-LOG_TAIL_LINES:]

    def ask_to_close(self) -> None:
        self.send(Close())

    def end(self, deadline_s: float) -> None:
        """Wait for an orderly end until `deadline_s`, then end whatever is left of the group."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline_s - time.monotonic()))
        for signal_number, patience_s in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0)):
            if self._group_is_empty(0.0):
                break
            self._shared_memory |= shared_memory_of(self.pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal_number)
            self._group_is_empty(patience_s)
        # After an orderly end, nothing is left.
        remove(self._shared_memory)
        self._replies.close()
        self._commands.close()

    def _group_is_empty(self, patience_s: float) -> bool:
        deadline_s = time.monotonic() + patience_s
        while True:
            self._process.poll()  # reaps the leader
            # An orphan may stay a zombie for long if the first process of a container reaps late or never.
            if not any(_is_alive(int(process.name)) for process in processes_of(self.pid)):
                return True
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(0.05)


def quiet_environment() -> dict[str, str]:
    return {
        "PYTHONPATH": python_path(),
        "PYTHONUNBUFFERED": "1",
        # Container images disable bytecode to stay small. Every import of vLLM then compiles its Python again, and an
        # engine start has up to three imports: with bytecode, those after the first find it.
        "PYTHONDONTWRITEBYTECODE": "",
        # Triton's own default. Unset, torch moves it into the folder of the graph being compiled, and each new graph,
        # and the first start that loads one, compiles the same sampling kernels again.
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR") or f"{_triton_home()}/.triton/cache",
        # Measuring machines are often offline, where usage statistics would only wait for a time-out.
        "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
    }


def _triton_home() -> str:
    # As Triton finds it: Path.home() raises if a user without a name has no HOME, as in some containers.
    return os.environ.get("TRITON_HOME") or os.path.expanduser("~")  # noqa: PTH111


class LogMark:
    """The current end of a log, and what is written after it."""

    def __init__(self, log_path: Path) -> None:
        self._log_path = log_path
        self._start = log_path.stat().st_size if log_path.exists() else 0

    def lines(self) -> list[str]:
        return read_log_tail(self._log_path, start=self._start)

    def compilations(self) -> int:
        """How many kernels vLLM says it compiled."""
        with contextlib.suppress(OSError), open_regular(self._log_path, "rb") as log:
            log.seek(self._start)
            return len(_COMPILED.findall(log.read().decode(errors="replace")))
        return 0


def _is_alive(pid: int) -> bool:
    """A zombie, whose parent has not yet reaped it, is not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _exit_words(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def read_log_tail(path: Path, max_bytes: int = 200_000, start: int = 0) -> list[str]:
    """The last lines of a log, among those after byte `start`, without colour codes."""
    with contextlib.suppress(OSError), open_regular(path, "rb") as log:
        log.seek(max(start, path.stat().st_size - max_bytes))
        text = log.read().decode(errors="replace")
        return [plain(line) for line in _COLOUR.sub("", text).splitlines()]
    return []


def root_cause(log_lines: list[str]) -> str | None:
    """The last error in a log that does not merely report another one; None if there is none."""
    for line in reversed(log_lines):
        found = _ERROR.search(line)
        if found and not _HANDED_ON.search(line):
            return f"{found[1]}: {found[2].strip()}"
    # A killed worker says nothing itself.
    killed = next((found for line in log_lines if (found := _DIED.search(line))), None)
    return killed and f"{killed[0]}; -9 usually means that the kernel ran out of main memory"
