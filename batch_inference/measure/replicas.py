"""The replicas of a setting: engine processes on this machine, or the ranks of a torchrun job."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from typing import Protocol, TypeVar

from msgspec.structs import replace

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.results import EngineInfo
from batch_inference.measure.cpu_engine import engine_environment
from batch_inference.measure.engine_process import (
    POINT,
    STARTUP,
    EngineProcess,
    LogMark,
    Patience,
    ReplicaError,
    node_log,
    rank_log,
    receive,
    replica_log,
)
from batch_inference.measure.hardware import Reading, joined
from batch_inference.measure.messages import (
    Answer,
    Answered,
    AnyReply,
    Command,
    Done,
    Join,
    Joined,
    Load,
    Loaded,
    Outcome,
    Prepare,
    Queue,
    Ready,
    Reply,
    Serve,
    Start,
)  # fmt: skip
from batch_inference.measure.nodes import Nodes
from batch_inference.measure.ray_cluster import OWN_CLUSTER, environment_of
from batch_inference.measure.vllm_objects import with_workers
from batch_inference.plan.devices import Devices
from batch_inference.plan.place import Place

T = TypeVar("T")
R = TypeVar("R", bound=Reply)
# Long enough for every replica to be waiting at the common start; a single one waits for nobody.
START_LEAD_S = 0.02
# The same if workers read their own devices before they wait.
LONG_START_LEAD_S = 0.3
# A closing engine releases its devices in 2 to 6 s; after this its group is killed.
CLOSE_TIMEOUT_S = 15.0
HURRY_TIMEOUT_S = 0.5


class Replicas(Protocol):
    """What the experiment needs from the replicas; tests use a fake with a ticking clock instead."""

    def start(self) -> list[EngineInfo]:
        """Load every replica; returns what each engine is. Raises ReplicaError or ConfigError."""

    def prepare(self, prompts: Prepare | Queue) -> None:
        """Make the prompts of the next run."""

    def run(self) -> list[Outcome]:
        """Submit one batch to every replica at the same moment; one outcome each, times from the common start."""

    def answer(self, asked: Answer) -> list[Answered]:
        """The answers of each replica to the same prompts."""

    @property
    def can_restart(self) -> bool:
        """Whether `start` may be called again after `close`."""
        ...

    def pids(self) -> list[int]: ...

    def close(self, *, hurry: bool = False) -> None:
        """End every process. `hurry`: somebody is waiting, so skip the orderly shutdown."""


class LocalReplicas:
    """Replicas as processes on this machine, each on its own slice of the devices.

    They are independent of each other, because vLLM refuses coupled replicas of a dense model; those of a
    mixture of experts with expert parallelism are `coupled`, because vLLM divides the experts among them.
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
        """`nodes`: the other nodes that a replica is spread over. `ray_address`: of the Ray cluster that assigns the
        devices; "local" for a separate one per replica."""
        self._config = config
        self._devices = devices
        self._coupled = coupled
        self._nodes = nodes
        self._ray_address = ray_address
        self._processes: list[EngineProcess] = []

    def start(self) -> list[EngineInfo]:
        for replica in range(self._config.data_parallel_size):
            log = replica_log(self._config.log_path, replica)
            self._processes.append(EngineProcess(self._environment(replica), log, self._nodes))
        load = [Load(self._config, replica) for replica in range(len(self._processes))]
        replies = self._all(load, Loaded, STARTUP)
        for process in self._processes:
            process.remember_parts()
        return [reply.engine for reply in replies]

    def prepare(self, prompts: Prepare | Queue) -> None:
        self._all([_for_replica(prompts, replica) for replica in range(len(self._processes))], Ready)

    def run(self) -> list[Outcome]:
        at_s = time.monotonic() + self._lead_s()
        outcomes = [reply.outcome for reply in self._all([Start(at_s)] * len(self._processes), Done)]
        passed_s = time.monotonic() - at_s
        for outcome, process in zip(outcomes, self._processes, strict=True):
            outcome.jit_compilations, outcome.passed_s = process.log_since.compilations(), passed_s
        first_s = min(outcome.start_s for outcome in outcomes)
        return [_counted_from(first_s, outcome) for outcome in outcomes]

    def answer(self, asked: Answer) -> list[Answered]:
        return self._all([asked] * len(self._processes), Answered)

    def _lead_s(self) -> float:
        """How long before the start the replicas are told."""
        if self._config.devices_elsewhere:
            return LONG_START_LEAD_S
        return START_LEAD_S if len(self._processes) > 1 else 0.0

    @property
    def can_restart(self) -> bool:
        # The other nodes ended with the engine.
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
        # In a joined cluster, Ray assigns the devices.
        if self._ray_address in (None, OWN_CLUSTER):
            own = self._devices.slice_for(replica, size)
            environment |= own.environment()
            if own.kind == "cpu" and self._is_one_engine:
                environment |= engine_environment(self._config, own)
        environment |= ports_of(replica) if count > 1 else {}
        environment |= coupling_of(replica, count) if self._coupled else {}
        environment |= self._nodes.environment() if self._nodes else {}
        return environment

    @property
    def _is_one_engine(self) -> bool:
        """Whether a replica is an engine on this machine that knows of no other."""
        return not (self._coupled or self._nodes or self._ray_address)

    def _all(self, commands: Sequence[Command], answer: type[R], waiting_for: str = POINT) -> list[R]:
        """Send one command to each replica, then wait for every answer."""
        for process, command in zip(self._processes, commands, strict=True):
            process.send(command)
        replies = receive(self._processes, Patience(self._config, waiting_for))
        return [_expected(answer, reply) for of_process in replies for reply in of_process]


class TorchrunReplicas:
    """The ranks of a torchrun job as rank 0 sees them: one engine process here, which leads the other ranks'."""

    def __init__(self, config: ExperimentConfig, environment: dict[str, str], place: Place) -> None:
        self._config = config
        # For the ranks on this node; compilations elsewhere are in logs that only those nodes see.
        ranks = range(1, place.local_world_size)
        self._logs = [config.log_path, *(rank_log(config.log_path, rank) for rank in ranks)]
        self._environment = environment
        self._process: EngineProcess | None = None
        self._closed = False

    def start(self) -> list[EngineInfo]:
        self._join()
        engines = [reply.engine for reply in self._all(Load(self._config, replica=0), Loaded, STARTUP)]
        return [
            with_workers(ranks[0], [worker for rank in ranks for worker in rank.workers])
            for ranks in self._by_replica(engines)
        ]

    def prepare(self, prompts: Prepare | Queue) -> None:
        self._all(prompts, Ready)

    def run(self) -> list[Outcome]:
        since, began_s = [LogMark(log) for log in self._logs], time.monotonic()
        outcomes = [reply.outcome for reply in self._all(Start(), Done)]
        # Clocks of different machines have different zeros, so each rank counts from its own release.
        outcomes = [_counted_from(outcome.start_s, outcome) for outcome in outcomes]
        slowest = [_slowest(ranks) for ranks in self._by_replica(outcomes)]
        slowest[0].passed_s = time.monotonic() - began_s
        slowest[0].jit_compilations = sum(mark.compilations() for mark in since)
        return slowest

    def answer(self, asked: Answer) -> list[Answered]:
        return [ranks[0] for ranks in self._by_replica(self._all(asked, Answered))]

    @property
    def can_restart(self) -> bool:
        # The other ranks are stuck in a collective.
        return False

    def pids(self) -> list[int]:
        return []

    def close(self, *, hurry: bool = False) -> None:
        if self._closed:
            return
        self._closed = True
        # The other ranks are waiting, even if nothing was left to measure.
        if self._process is None and not hurry:
            with contextlib.suppress(ReplicaError, ConfigError):
                self._join()
        if self._process:
            self._process.ask_to_close()
            self._process.end(time.monotonic() + (HURRY_TIMEOUT_S if hurry else CLOSE_TIMEOUT_S))

    def _join(self) -> None:
        self._process = EngineProcess(self._environment, self._config.log_path)
        self._all(Join(self._config), Joined, STARTUP)

    def _all(self, command: Command, answer: type[R], waiting_for: str = POINT) -> list[R]:
        assert self._process is not None
        self._process.send(command)
        replies = receive([self._process], Patience(self._config, waiting_for))[0]
        return [_expected(answer, reply) for reply in replies]

    def _by_replica(self, of_ranks: list[T]) -> list[list[T]]:
        size = self._config.devices_per_replica
        return [of_ranks[first : first + size] for first in range(0, len(of_ranks), size)]


def _for_replica(prompts: Prepare | Queue, replica: int) -> Prepare | Queue:
    """For a queue only its own share, because the others' may be large."""
    if isinstance(prompts, Prepare):
        return prompts
    return replace(prompts, shares=[share if of == replica else [] for of, share in enumerate(prompts.shares)])


def _expected(kind: type[R], reply: AnyReply) -> R:
    if not isinstance(reply, kind):
        raise TypeError(f"{type(reply).__name__} was answered instead of {kind.__name__}")
    return reply


def _counted_from(start_s: float, outcome: Outcome) -> Outcome:
    return replace(outcome, start_s=outcome.start_s - start_s, end_s=outcome.end_s - start_s)


def _slowest(ranks: list[Outcome]) -> Outcome:
    """The outcome of one replica from those of its ranks, which all have the same outputs."""
    return replace(ranks[0], end_s=max(rank.end_s for rank in ranks), readings=joined_readings(ranks))


def joined_readings(outcomes: Sequence[Outcome]) -> tuple[Reading, Reading] | None:
    """What was read before and after a run, over all outcomes; None if the supervisor itself reads the devices."""
    known = [outcome.readings for outcome in outcomes if outcome.readings is not None]
    return (joined([before for before, _ in known]), joined([after for _, after in known])) if known else None


def ports_of(replica: int) -> dict[str, str]:
    """vLLM finds a free port and takes it later, so replicas that start together must look in different places."""
    given = os.environ.get("VLLM_PORT", "")
    # Far below the ports that the kernel assigns, and different for another sweep on this machine.
    first = int(given) if given.isdecimal() else _first_port() + 100
    return {"VLLM_PORT": str(first + 100 * replica)}


def coupling_of(replica: int, replicas: int) -> dict[str, str]:
    """Variables that make vLLM run a mixture of experts as one of several coupled replicas; each sees only its slice of
    the devices, so each is the first one there."""
    return {
        "VLLM_DP_SIZE": str(replicas),
        "VLLM_DP_RANK": str(replica),
        "VLLM_DP_RANK_LOCAL": "0",
        "VLLM_DP_MASTER_IP": "127.0.0.1",
        "VLLM_DP_MASTER_PORT": str(_first_port()),
    }


def hold_workers(config: ExperimentConfig, devices: Devices, nodes: Nodes) -> None:
    """The whole life of any node but 0: hold its workers until node 0 says that the setting is over.

    Raises NodesError if the setting failed or node 0 is gone, and ReplicaError if this node's workers failed.
    """
    process = EngineProcess(devices.environment() | nodes.environment(), node_log(config.log_path, config.node_rank))
    try:
        process.send(Serve(config))
        while not nodes.dismissed(timeout_s=0.5):
            process.replies()
    finally:
        process.end(time.monotonic())


def _first_port() -> int:
    return 15_000 + os.getpid() % 15 * 1000
