"""The replicas of a setting: engine processes of this machine, or the ranks of a torchrun job.

Every engine process leads a process group of its own and has its own devices.
"""

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from batch_inference.core.config import ConfigError, ExperimentConfig, flag_of
from batch_inference.measure.engine import with_workers
from batch_inference.measure.environment import python_path
from batch_inference.measure.hardware import joined
from batch_inference.measure.leftovers import processes_of, remove, shared_memory_of
from batch_inference.measure.nodes import Nodes
from batch_inference.measure.ranks import Place
from batch_inference.measure.ray_cluster import OWN_CLUSTER, environment_of
from batch_inference.plan.devices import Devices

# The flags that say how long an engine may take for its start, and for one run.
STARTUP, POINT = "startup_timeout", "point_timeout"
# Long enough for every replica to be waiting when the common start comes.
START_LEAD_S = 0.02
# Where workers read their own devices before they wait.
LONG_START_LEAD_S = 0.3
# A closing engine hands its devices back in 2 to 6 s; afterwards its group is ended.
CLOSE_TIMEOUT_S = 15.0
HURRY_TIMEOUT_S = 0.5
LOG_TAIL_LINES = 40
# vLLM names its own processes so: VLLM::EngineCore, VLLM::Worker_TP0.
_VLLM_TITLE = "VLLM::"
DEATH_IS_SAID_WITHIN_S = 3.0

# Errors that only pass on that another one happened.
_HANDED_ON = re.compile(
    r"Engine core initialization failed|WorkerProc initialization failed|cancelled|EngineDeadError|"
    r"EngineCore encountered an issue|Chat template"
)
_DIED = re.compile(r"Worker proc \S+ died unexpectedly \(exit code: -?\d+\)")
# vLLM's words for a kernel that its own warm-up did not cover.
_COMPILED = re.compile(r" during inference: |Triton autotuning for function")
_ERROR = re.compile(r"(?:^|[\s\].])([A-Z]\w*(?:Error|Exception)): (.+)")


class ReplicaError(Exception):
    """An engine that did not start, or did not finish its work: the reason in one line, the log's end, and a class of
    failures.py where the supervisor knows it itself."""

    def __init__(self, reason: str, log_tail: list[str], kind: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.log_tail = log_tail
        self.kind = kind


class Replicas(Protocol):
    """What the experiment needs of the replicas; tests put a fake with a ticking clock in its place."""

    def start(self) -> list[dict[str, Any]]:
        """Load every replica; one description of the engine each. Raises ReplicaError or ConfigError."""

    def prepare(self, batch_size: int, seq_len: int, max_tokens: int, stream: tuple[object, ...]) -> None:
        """Make the prompts of the next run."""

    def run(self) -> list[dict[str, Any]]:
        """Submit one batch to every replica at the same moment; one outcome each, times from the common start.

        An outcome carries "readings", before and after the run, where only the replica itself can see its devices.
        """

    @property
    def can_restart(self) -> bool:
        """Whether `start` may be called again after `close`."""
        ...

    def pids(self) -> list[int]: ...

    def close(self, *, hurry: bool = False) -> None:
        """End every process. `hurry`: somebody waits for the end, and nothing is left to be done in order."""


class LocalReplicas:
    """Replicas as processes of this machine, each on its own slice of the devices.

    They are independent of each other, because vLLM refuses coupled replicas of a dense model; those of a
    mixture of experts with expert parallelism are `coupled`, because vLLM shares out the experts among them.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        devices: Devices,
        *,
        coupled: bool = False,
        nodes: Nodes | None = None,
        ray_address: str | None = None,
    ) -> None:
        """`nodes`: the other nodes that a replica is spread over. `ray_address`: of the Ray cluster that gives out the
        devices; "local" for one of each replica's own."""
        self._config = config
        self._devices = devices
        self._coupled = coupled
        self._nodes = nodes
        self._ray_address = ray_address
        self._processes: list[_EngineProcess] = []

    def start(self) -> list[dict[str, Any]]:
        for replica in range(self._config.data_parallel_size):
            log = replica_log(self._config.log_path, replica)
            self._processes.append(_EngineProcess(self._environment(replica), log, self._nodes))
        load = {"op": "load", "config": dataclasses.asdict(self._config)}
        replies = self._all([{**load, "replica": replica} for replica in range(len(self._processes))], STARTUP)
        for process in self._processes:
            process.remember_parts()
        return [reply["engine"] for reply in replies]

    def prepare(self, batch_size: int, seq_len: int, max_tokens: int, stream: tuple[object, ...]) -> None:
        self._all([_prepare(batch_size, seq_len, max_tokens, stream)] * len(self._processes))

    def run(self) -> list[dict[str, Any]]:
        count = len(self._processes)
        at_s = time.monotonic() + (LONG_START_LEAD_S if self._config.devices_elsewhere else START_LEAD_S)
        outcomes = [reply["outcome"] for reply in self._all([{"op": "start", "at_s": at_s}] * count)]
        for outcome, process in zip(outcomes, self._processes, strict=True):
            outcome["jit_compilations"] = process.log_since.compilations()
        first_s = min(outcome["start_s"] for outcome in outcomes)
        return [_from(first_s, outcome) for outcome in outcomes]

    @property
    def can_restart(self) -> bool:
        # The other nodes have ended with the engine.
        return self._nodes is None

    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def close(self, *, hurry: bool = False) -> None:
        for process in self._processes:
            process.ask_to_close()
        deadline_s = time.monotonic() + (HURRY_TIMEOUT_S if hurry else CLOSE_TIMEOUT_S)
        for process in self._processes:
            process.end(deadline_s)
        self._processes.clear()

    def _environment(self, replica: int) -> dict[str, str]:
        count, size = self._config.data_parallel_size, self._config.devices_per_replica
        environment = environment_of(self._ray_address) if self._ray_address else {}
        # In a cluster that is joined, Ray gives out the devices.
        if self._ray_address in (None, OWN_CLUSTER):
            environment |= self._devices.slice_for(replica, size).environment()
        environment |= ports_of(replica) if count > 1 else {}
        environment |= coupling_of(replica, count) if self._coupled else {}
        environment |= self._nodes.environment() if self._nodes else {}
        return environment

    def _all(self, commands: list[dict[str, Any]], waiting_for: str = POINT) -> list[dict[str, Any]]:
        """Send one command to each replica, then wait for every answer."""
        for process, command in zip(self._processes, commands, strict=True):
            process.send(command)
        replies = _receive(self._processes, _Patience(self._config, waiting_for))
        return [reply for of_process in replies for reply in of_process]


class TorchrunReplicas:
    """The ranks of a torchrun job, seen from rank 0: one engine process here, which leads those of the other ranks."""

    def __init__(self, config: ExperimentConfig, environment: dict[str, str], place: Place) -> None:
        self._config = config
        # Of the ranks of this node; what others compile is in logs that only they see.
        ranks = range(1, place.local_world_size)
        self._logs = [config.log_path, *(rank_log(config.log_path, rank) for rank in ranks)]
        self._environment = environment
        self._process: _EngineProcess | None = None
        self._closed = False

    def start(self) -> list[dict[str, Any]]:
        self._join()
        config = dataclasses.asdict(self._config)
        replies = self._all({"op": "load", "config": config, "replica": 0}, STARTUP)
        return [
            with_workers(ranks[0]["engine"], [worker for rank in ranks for worker in rank["engine"]["workers"]])
            for ranks in self._by_replica(replies)
        ]

    def prepare(self, batch_size: int, seq_len: int, max_tokens: int, stream: tuple[object, ...]) -> None:
        self._all(_prepare(batch_size, seq_len, max_tokens, stream))

    def run(self) -> list[dict[str, Any]]:
        since = [_LogMark(log) for log in self._logs]
        outcomes = [reply["outcome"] for reply in self._all({"op": "start"})]
        # Clocks of different machines have different zeros, so each rank counts from its own release.
        outcomes = [_from(outcome["start_s"], outcome) for outcome in outcomes]
        slowest = [_slowest(ranks) for ranks in self._by_replica(outcomes)]
        slowest[0]["jit_compilations"] = sum(mark.compilations() for mark in since)
        return slowest

    @property
    def can_restart(self) -> bool:
        # The other ranks are in a collective from which nobody calls them back.
        return False

    def pids(self) -> list[int]:
        return []

    def close(self, *, hurry: bool = False) -> None:
        if self._closed:
            return
        self._closed = True
        # The other ranks wait for a word, also where nothing was left to measure.
        if self._process is None and not hurry:
            with contextlib.suppress(ReplicaError, ConfigError):
                self._join()
        if self._process:
            self._process.ask_to_close()
            self._process.end(time.monotonic() + (HURRY_TIMEOUT_S if hurry else CLOSE_TIMEOUT_S))

    def _join(self) -> None:
        self._process = _EngineProcess(self._environment, self._config.log_path)
        self._all({"op": "join", "config": dataclasses.asdict(self._config)}, STARTUP)

    def _all(self, command: dict[str, Any], waiting_for: str = POINT) -> list[dict[str, Any]]:
        assert self._process is not None
        self._process.send(command)
        return _receive([self._process], _Patience(self._config, waiting_for))[0]

    def _by_replica(self, of_ranks: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        size = self._config.devices_per_replica
        return [of_ranks[first : first + size] for first in range(0, len(of_ranks), size)]


def _prepare(batch_size: int, seq_len: int, max_tokens: int, stream: tuple[object, ...]) -> dict[str, Any]:
    sizes = {"batch_size": batch_size, "seq_len": seq_len, "max_tokens": max_tokens}
    return {"op": "prepare", **sizes, "stream": list(stream)}


def _from(start_s: float, outcome: dict[str, Any]) -> dict[str, Any]:
    return {**outcome, "start_s": outcome["start_s"] - start_s, "end_s": outcome["end_s"] - start_s}


def _slowest(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The outcome of one replica from those of its ranks, which all hold the same outputs."""
    readings = [joined(moment) for moment in zip(*(rank["readings"] for rank in ranks), strict=True)]
    return {**ranks[0], "end_s": max(rank["end_s"] for rank in ranks), "readings": readings}


def replica_log(log_path: Path, replica: int) -> Path:
    """The log of the first replica is that of the setting; the others have theirs beside it."""
    return log_path if replica == 0 else log_path.with_suffix(f".replica_{replica}.log")


def rank_log(log_path: Path, rank: int) -> Path:
    return log_path.with_suffix(f".rank_{rank}.log")


def ports_of(replica: int) -> dict[str, str]:
    """vLLM looks for a free port and takes it later: replicas that start together must not look in the same place."""
    given = os.environ.get("VLLM_PORT", "")
    # Far below the ports that the kernel gives out, and elsewhere for another sweep on this machine.
    first = int(given) if given.isdecimal() else _first_port() + 100
    return {"VLLM_PORT": str(first + 100 * replica)}


def coupling_of(replica: int, replicas: int) -> dict[str, str]:
    """What makes vLLM run a mixture-of-experts model as one of several coupled replicas; each sees only its slice of
    the devices, so each is the first of its kind there."""
    return {
        "VLLM_DP_SIZE": str(replicas),
        "VLLM_DP_RANK": str(replica),
        "VLLM_DP_RANK_LOCAL": "0",
        "VLLM_DP_MASTER_IP": "127.0.0.1",
        "VLLM_DP_MASTER_PORT": str(_first_port()),
    }


def node_log(log_path: Path, node: int) -> Path:
    return log_path.with_suffix(f".node_{node}.log")


def serve_node_0(config: ExperimentConfig, devices: Devices, nodes: Nodes) -> None:
    """The whole life of a node other than 0: hold its workers until node 0 says that the setting is over.

    Raises NodesError where it failed, or node 0 is gone; ReplicaError where the workers of this node have failed.
    """
    process = _EngineProcess(devices.environment() | nodes.environment(), node_log(config.log_path, config.node_rank))
    try:
        process.send({"op": "serve", "config": dataclasses.asdict(config)})
        while not nodes.dismissed(timeout_s=0.5):
            process.replies()
    finally:
        process.end(time.monotonic())


def _first_port() -> int:
    return 15_000 + os.getpid() % 15 * 1000


class _Patience:
    """How long an answer may take, by a clock outside the engine: --startup-timeout or --point-timeout."""

    def __init__(self, config: ExperimentConfig, waiting_for: str) -> None:
        self.waiting_for = waiting_for
        self.limit_s: float = getattr(config, waiting_for)
        self._end_s: float = time.monotonic() + self.limit_s

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self._end_s


def _receive(processes: Sequence[_EngineProcess], patience: _Patience) -> list[list[dict[str, Any]]]:
    """The next replies of each, one per rank. Raises ConfigError for the user's flags, ReplicaError for other failures:
    at the first that fails, because coupled replicas wait for each other without end."""
    answers: dict[_EngineProcess, list[dict[str, Any]]] = {}
    while waiting := [process for process in processes if process not in answers]:
        select.select(waiting, [], [], min(1.0, patience.limit_s))
        answers |= {process: replies for process in waiting if (replies := process.replies())}
        if patience.is_over and (late := [process for process in waiting if process not in answers]):
            raise late[0].late(patience)
    return [answers[process] for process in processes]


class _EngineProcess:
    """`python -m batch_inference.measure.worker`, the leader of its own process group."""

    def __init__(self, environment: dict[str, str], log_path: Path, nodes: Nodes | None = None) -> None:
        self.log_path = log_path
        self._nodes = nodes
        commands_read, commands_write = os.pipe()
        replies_read, replies_write = os.pipe()
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                # -P: a batch_inference or a queue.py in the user's folder is not meant.
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
        self._buffer = b""
        self.log_since = _LogMark(log_path)
        self._parts: dict[int, str] = {}
        self._shared_memory: set[Path] = set()
        self._dead_since_s: float | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, command: dict[str, Any]) -> None:
        # What the log said before is of something that went well.
        self.log_since = _LogMark(self.log_path)
        # A process that is gone shows in `_receive`, with its log.
        with contextlib.suppress(BrokenPipeError):
            self._commands.write(json.dumps(command).encode() + b"\n")

    def fileno(self) -> int:
        """Of the pipe that its replies come through."""
        return self._replies.fileno()

    def late(self, patience: _Patience) -> ReplicaError:
        kind = "timeout_startup" if patience.waiting_for == STARTUP else "timeout_point"
        flag = flag_of(patience.waiting_for)
        return ReplicaError(f"no answer within {flag} {patience.limit_s:g} s", self._log_end(), kind)

    def replies(self) -> list[dict[str, Any]]:
        """The next replies, one per rank; nothing where none are there. Raises as `_receive` does."""
        if b"\n" not in self._buffer:
            readable, _, _ = select.select([self._replies], [], [], 0)
            chunk = os.read(self._replies.fileno(), 1 << 16) if readable else b""
            self._buffer += chunk
            if not chunk:
                self._check_alive()
        if b"\n" not in self._buffer:
            return []
        line, _, self._buffer = self._buffer.partition(b"\n")
        replies: list[dict[str, Any]] = json.loads(line)
        for reply in replies:
            if reply["event"] == "failed" and reply["usage"]:
                raise ConfigError(reply["reason"])
            if reply["event"] == "failed":
                raise self._failure(reply["reason"])
        return replies

    def _check_alive(self) -> None:
        """Raises ReplicaError where nothing can be waited for."""
        # End of file alone is not enough: a child of the engine may hold the pipe open after its death.
        if self._process.poll() is not None:
            raise self._failure(f"the engine process ended with {_exit_words(self._process.returncode)}")
        if dead := self._dead_part():
            raise self._failure(f"vLLM's process {dead} ended without a word")
        if self._nodes and (lost := self._nodes.lost()):
            raise ReplicaError(lost, self._log_end())

    def remember_parts(self) -> None:
        """Once it is loaded: vLLM's own processes, which live as long as the engine, and how they talk. vLLM does not
        always notice itself that one was killed; `generate` then never returns."""
        self._shared_memory = shared_memory_of(self.pid)
        for process in processes_of(self.pid):
            with contextlib.suppress(OSError):
                title = (process / "cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace").strip()
                if title.startswith(_VLLM_TITLE):
                    self._parts[int(process.name)] = title

    def _dead_part(self) -> str | None:
        """The title of a process of vLLM that is gone for longer than vLLM needs to say so."""
        dead = [title for pid, title in self._parts.items() if not _is_alive(pid)]
        if not dead:
            return None
        self._dead_since_s = self._dead_since_s or time.monotonic()
        return dead[0] if time.monotonic() - self._dead_since_s > DEATH_IS_SAID_WITHIN_S else None

    def _failure(self, reason: str) -> ReplicaError:
        # vLLM hands on a bare "Engine core initialization failed": the cause stands only in the log.
        return ReplicaError(root_cause(self.log_since.lines()) or reason.partition("\n")[0], self._log_end())

    def _log_end(self) -> list[str]:
        return read_log_tail(self.log_path)[-LOG_TAIL_LINES:]

    def ask_to_close(self) -> None:
        self.send({"op": "close"})

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
        # Nothing is there any more after an orderly end.
        remove(self._shared_memory)
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


def quiet_environment() -> dict[str, str]:
    return {
        "PYTHONPATH": python_path(),
        "PYTHONUNBUFFERED": "1",
        # Images switch bytecode off to stay small. Without it every import of vLLM compiles its Python again, and an
        # engine start has up to three: those after the first find it then.
        "PYTHONDONTWRITEBYTECODE": "",
        # Triton's own default. Unset, torch moves it into the folder of the graph that it compiles, and each new graph,
        # as well as the first start that loads one, has the same sampling kernels compiled again.
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR") or f"{_triton_home()}/.triton/cache",
        # Measuring machines are often cut off: usage statistics would only wait for a time-out.
        "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
    }


def _triton_home() -> str:
    # As Triton finds it: Path.home() raises where a user without a name has no HOME, as in some containers.
    return os.environ.get("TRITON_HOME") or os.path.expanduser("~")  # noqa: PTH111


class _LogMark:
    """The end of a log at this moment, and what is written after it."""

    def __init__(self, log_path: Path) -> None:
        self._log_path = log_path
        self._start = log_path.stat().st_size if log_path.exists() else 0

    def lines(self) -> list[str]:
        return read_log_tail(self._log_path, start=self._start)

    def compilations(self) -> int:
        """Kernels that vLLM says to have compiled."""
        with contextlib.suppress(OSError), self._log_path.open("rb") as log:
            log.seek(self._start)
            return len(_COMPILED.findall(log.read().decode(errors="replace")))
        return 0


def _is_alive(pid: int) -> bool:
    """A zombie, whose parent has not looked yet, is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _exit_words(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def read_log_tail(path: Path, max_bytes: int = 200_000, start: int = 0) -> list[str]:
    """The last lines of a log, of those after byte `start`, without colour codes."""
    with contextlib.suppress(OSError), path.open("rb") as log:
        log.seek(max(start, path.stat().st_size - max_bytes))
        text = log.read().decode(errors="replace")
        return re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    return []


def root_cause(log_lines: list[str]) -> str | None:
    """The last error of a log that is not just one being handed on; None where there is none."""
    for line in reversed(log_lines):
        found = _ERROR.search(line)
        if found and not _HANDED_ON.search(line):
            return f"{found[1]}: {found[2].strip()}"
    # A worker that is killed says nothing itself.
    killed = next((found for line in log_lines if (found := _DIED.search(line))), None)
    return killed and f"{killed[0]}; -9 is mostly the kernel's, out of main memory"
