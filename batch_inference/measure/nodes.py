"""The nodes of a setting meet before anything loads: all there, the same vLLM, the same arguments, enough devices.

Every node does the same; node 0 listens, compares what the others say, and tells all the same. The connections stay
open while the setting is measured, so that a node that is gone is seen at once, and not after a time-out.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from batch_inference.core.config import ExperimentConfig
from batch_inference.measure.environment import installed_vllm
from batch_inference.plan.devices import find_devices

TIMEOUT_S = 60.0
_LONGEST_MESSAGE = 1 << 16


class NodesError(Exception):
    """The nodes do not fit together, or one is missing: one line, the same on every node."""


@dataclass(frozen=True)
class Facts:
    """What must fit together; `arguments` is a hash of settings and grid."""

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


def disagreement(first: Facts, others: Iterable[Facts]) -> str | None:
    """Why the nodes cannot work together; None where they can."""
    for facts in (first, *others):
        who, theirs = f"node {facts.node} ({facts.host})", asdict(facts)
        for name, word in (("vllm_version", "vLLM"), ("arguments", "other arguments: their hash is")):
            if theirs[name] != asdict(first)[name] and theirs[name] is not None:
                return f"{who} has {word} {theirs[name]}, node 0 ({first.host}) {asdict(first)[name]}"
        if facts.problem:
            return facts.problem
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
                return f"node {node} is gone; what it printed says why"
        return None

    def dismiss(self, *, failed: bool) -> None:
        """Node 0: the setting is over."""
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                _send(connection, {"failed": failed})

    def dismissed(self, timeout_s: float) -> bool:
        """The other nodes: True where node 0 says that the setting is over; waits for `timeout_s`. Raises NodesError
        where the setting failed, or node 0 is gone."""
        ((node, connection),) = self._connections.items()
        if not select.select([connection], [], [], timeout_s)[0]:
            return False
        try:
            failed = _receive(connection)["failed"]
        except (OSError, ValueError, KeyError):
            raise NodesError(f"node {node} is gone; what it printed says why") from None
        if failed:
            raise NodesError(f"the setting failed; what node {node} printed says why")
        return True


def meet(config: ExperimentConfig) -> Nodes:
    """Wait for the nodes of a setting, a minute at most. Raises NodesError in every node where they do not fit."""
    own = _facts_of(config, config.node_rank, config.devices_per_node)
    return _meet(config.nnodes, config.master_addr or "", config.master_port, own)


def meet_before_torchrun(
    config: ExperimentConfig, nnodes: int, node_rank: int, master_addr: str, port: int
) -> dict[str, str]:
    """For torchrun, which would wait for ten minutes, and then say it in forty lines. Returns the variables of the
    network that joins the nodes. Raises NodesError."""
    own = _facts_of(config, node_rank, config.num_devices // nnodes)
    with _meet(nnodes, master_addr, port, own) as nodes:
        return nodes.environment()


def _facts_of(config: ExperimentConfig, node: int, devices_needed: int) -> Facts:
    arguments = config.arguments_hash()
    return Facts(node, socket.gethostname(), arguments, installed_vllm(), len(find_devices()), devices_needed)


def _meet(nnodes: int, address: str, port: int, own: Facts) -> Nodes:
    deadline_s = time.monotonic() + TIMEOUT_S
    if own.node > 0:
        return attend(address, port, own, deadline_s)
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise NodesError(f"--master-port {port}: cannot listen there: {error.strerror}; choose another") from error
    with server:
        return gather(server, own, nnodes, deadline_s)


def gather(server: socket.socket, first: Facts, nnodes: int, deadline_s: float) -> Nodes:
    """Node 0: hear every other node and tell them the verdict. Raises NodesError."""
    calls: dict[int, tuple[Facts, socket.socket]] = {}
    while len(calls) < nnodes - 1 and (left_s := deadline_s - time.monotonic()) > 0:
        server.settimeout(left_s)
        try:
            connection, _ = server.accept()
            connection.settimeout(5)
            facts = Facts(**_receive(connection))
        except (OSError, ValueError, TypeError):
            continue  # a time-out, or somebody else's call
        calls[facts.node] = (facts, connection)
    missing = [str(node) for node in range(1, nnodes) if node not in calls]
    problem = (
        f"node {', '.join(missing)} of {nnodes} did not come within {TIMEOUT_S:.0f} s; start the same command there"
        if missing
        else disagreement(first, (facts for _, (facts, _) in sorted(calls.items(), key=lambda call: call[0])))
    )
    connections = {node: connection for node, (_, connection) in calls.items()}
    for connection in connections.values():
        with contextlib.suppress(OSError):
            _send(connection, {"problem": problem})
    if problem:
        for connection in connections.values():
            connection.close()
        raise NodesError(problem)
    return Nodes(connections)


def attend(address: str, port: int, own: Facts, deadline_s: float) -> Nodes:
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
        _send(connection, asdict(own))
        # Node 0 may wait for another node until its own time is over.
        connection.settimeout(TIMEOUT_S + 5)
        problem = _receive(connection)["problem"]
    except (OSError, ValueError, KeyError):
        problem = f"--master-addr {address}: node 0 ended before all nodes had come"
    if problem:
        connection.close()
        raise NodesError(problem)
    return Nodes({0: connection})


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any]:
    with connection.makefile("rb") as lines:
        message = json.loads(lines.readline(_LONGEST_MESSAGE))
    if not isinstance(message, dict):
        raise ValueError("not an object")
    return message
