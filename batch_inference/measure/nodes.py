"""The nodes of a setting meet before anything loads: all there, the same vLLM, the same arguments, enough devices.

Every node does the same; node 0 listens, compares what the others say, and tells all the same. The connections stay
open while the setting is measured, so that a node that is gone is seen at once, and not after a time-out.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Iterable
from types import TracebackType
from typing import TypeVar

import msgspec
from msgspec import Struct

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.failures import WorkFailedError
from batch_inference.measure.environment import installed_vllm
from batch_inference.plan.devices import find_devices

M = TypeVar("M", bound=Struct)
TIMEOUT_S = 60.0
_LONGEST_MESSAGE = 1 << 16


class NodesError(WorkFailedError):
    """The nodes do not fit together, or one is missing: one line, the same on every node."""


class Introduction(Struct):
    """What each node says of itself, and must fit together; `arguments` is a hash of settings and grid."""

    node: int
    host: str
    arguments: str
    vllm_version: str | None
    devices: int
    devices_needed: int

    @property
    def problem(self) -> str | None:
        if self.devices < self.devices_needed:
            return (
                f"node {self.node} ({self.host}) has {self.devices} devices, {self.devices_needed} are needed on each"
            )
        if self.vllm_version is None:
            return f"node {self.node} ({self.host}) has no vLLM; run ./setup_env.sh there"
        return None


class Answer(Struct):
    """What node 0 tells all others once they are there; None: they fit together."""

    problem: str | None


class Dismissal(Struct):
    """Node 0's last word: the setting is over."""

    failed: bool


def disagreement(first: Introduction, others: Iterable[Introduction]) -> str | None:
    """Why the nodes cannot work together; None where they can."""
    for one in (first, *others):
        for name, word in (("vllm_version", "vLLM"), ("arguments", "other arguments: their hash is")):
            theirs, ours = getattr(one, name), getattr(first, name)
            if theirs != ours and theirs is not None:
                return f"node {one.node} ({one.host}) has {word} {theirs}, node 0 ({first.host}) {ours}"
        if one.problem:
            return one.problem
    return None


class Nodes:
    """The other nodes of a setting: for node 0 all of them, for the others node 0."""

    def __init__(self, connections: dict[int, socket.socket]) -> None:
        self._connections = connections
        self.own_address: str = next(iter(connections.values())).getsockname()[0]

    def __enter__(self) -> Nodes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._connections.values():
            connection.close()

    def environment(self) -> dict[str, str]:
        """The variables that make vLLM, gloo and NCCL use the network that joins the nodes; the user's own stay."""
        import psutil

        found = {"VLLM_HOST_IP": self.own_address}
        for name, addresses in psutil.net_if_addrs().items():
            if any(address.address == self.own_address for address in addresses):
                found |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
        return {name: os.environ.get(name, value) for name, value in found.items()}

    def lost(self) -> str | None:
        """Which node is gone, of those that node 0 waits for; None while all are there."""
        for node, connection in self._connections.items():
            if select.select([connection], [], [], 0)[0]:
                return _gone(node)
        return None

    def dismiss(self, *, failed: bool) -> None:
        """Node 0: the setting is over."""
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                _send(connection, Dismissal(failed))

    def dismissed(self, timeout_s: float) -> bool:
        """The other nodes: True where node 0 says that the setting is over; waits for `timeout_s`. Raises NodesError
        where the setting failed, or node 0 is gone."""
        ((node, connection),) = self._connections.items()
        if not select.select([connection], [], [], timeout_s)[0]:
            return False
        try:
            failed = _receive(connection, Dismissal).failed
        except (OSError, ValueError):
            raise NodesError(_gone(node)) from None
        if failed:
            raise NodesError(f"the setting failed; what node {node} printed says why")
        return True


def _gone(node: int) -> str:
    return f"node {node} is gone; what it printed says why"


def meet(config: ExperimentConfig) -> Nodes:
    """Wait for the nodes of a setting, a minute at most. Raises NodesError in every node where they do not fit."""
    own = _introduction(config, config.node_rank, config.devices_per_node)
    return _meet(config.nnodes, config.master_addr or "", config.master_port, own)


def meet_before_torchrun(
    config: ExperimentConfig, nnodes: int, node_rank: int, master_addr: str, port: int
) -> dict[str, str]:
    """For torchrun, which would wait for ten minutes, and then say it in forty lines. Returns the variables of the
    network that joins the nodes. Raises NodesError."""
    own = _introduction(config, node_rank, config.num_devices // nnodes)
    with _meet(nnodes, master_addr, port, own) as nodes:
        return nodes.environment()


def _introduction(config: ExperimentConfig, node: int, devices_needed: int) -> Introduction:
    arguments = config.arguments_hash()
    return Introduction(node, socket.gethostname(), arguments, installed_vllm(), len(find_devices()), devices_needed)


def _meet(nnodes: int, address: str, port: int, own: Introduction) -> Nodes:
    deadline_s = time.monotonic() + TIMEOUT_S
    if own.node > 0:
        return attend(address, port, own, deadline_s)
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise NodesError(f"--master-port {port}: cannot listen there: {error.strerror}; choose another") from error
    with server:
        return gather(server, own, nnodes, deadline_s)


def gather(server: socket.socket, first: Introduction, nnodes: int, deadline_s: float) -> Nodes:
    """Node 0: hear every other node and tell them the verdict. Raises NodesError."""
    calls: dict[int, tuple[Introduction, socket.socket]] = {}
    while len(calls) < nnodes - 1 and (left_s := deadline_s - time.monotonic()) > 0:
        server.settimeout(left_s)
        try:
            connection, _ = server.accept()
            connection.settimeout(5)
            caller = _receive(connection, Introduction)
        except (OSError, ValueError):
            continue  # a time-out, or somebody else's call
        calls[caller.node] = (caller, connection)
    missing = [str(node) for node in range(1, nnodes) if node not in calls]
    problem = (
        f"node {', '.join(missing)} of {nnodes} did not come within {TIMEOUT_S:.0f} s; start the same command there"
        if missing
        else disagreement(first, (calls[node][0] for node in sorted(calls)))
    )
    connections = {node: connection for node, (_, connection) in calls.items()}
    for connection in connections.values():
        with contextlib.suppress(OSError):
            _send(connection, Answer(problem))
    if problem:
        for connection in connections.values():
            connection.close()
        raise NodesError(problem)
    return Nodes(connections)


def attend(address: str, port: int, own: Introduction, deadline_s: float) -> Nodes:
    """The other nodes: say who they are, and hear the verdict. Raises NodesError."""
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=5)
            break
        except OSError as error:
            if time.monotonic() >= deadline_s:
                raise NodesError(
                    f"--master-addr {address}: nothing answers on port {port} ({error.strerror or error})"
                ) from error
            time.sleep(0.2)
    try:
        _send(connection, own)
        # Node 0 may wait for another node until its own time is over.
        connection.settimeout(TIMEOUT_S + 5)
        problem = _receive(connection, Answer).problem
    except (OSError, ValueError):
        problem = f"--master-addr {address}: node 0 ended before all nodes had come"
    if problem:
        connection.close()
        raise NodesError(problem)
    return Nodes({0: connection})


def _send(connection: socket.socket, message: Struct) -> None:
    connection.sendall(msgspec.json.encode(message) + b"\n")


def _receive(connection: socket.socket, kind: type[M]) -> M:
    """Raises OSError, or ValueError for what is no such message."""
    with connection.makefile("rb") as lines:
        return msgspec.json.decode(lines.readline(_LONGEST_MESSAGE), type=kind)
