"""The nodes of a job meet before torchrun starts: all there, the same vLLM, the same arguments, enough devices.

    python -m batch_inference.rendezvous NNODES NODE_RANK MASTER_ADDR PORT DEVICES_PER_NODE -- FLAGS OF THE EXPERIMENT

Every node calls it; node 0 listens on PORT, compares what the others say, and tells all the same. Exit code 0 where
they fit together, 1 and one line on every node where they do not. torchrun alone would wait for ten minutes.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from batch_inference.config import ConfigError, parse_flags
from batch_inference.environment import installed_vllm
from batch_inference.hardware import find_devices

TIMEOUT_S = 60.0
_LONGEST_MESSAGE = 1 << 16


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


def gather(server: socket.socket, first: Facts, nnodes: int, deadline_s: float) -> str | None:
    """Node 0: hear every other node and tell them the verdict, which is returned: None is good."""
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
    for _, connection in calls.values():
        with connection:
            _send(connection, {"problem": problem})
    return problem


def attend(address: str, port: int, own: Facts, deadline_s: float) -> str | None:
    """The other nodes: say who they are, and hear the verdict."""
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=5)
            break
        except OSError as error:
            if time.monotonic() >= deadline_s:
                return f"--master-addr {address}: nothing answers on port {port} ({error.strerror or error})"
            time.sleep(0.2)
    with connection:
        _send(connection, asdict(own))
        # Node 0 may wait for another node until its own time is over.
        connection.settimeout(TIMEOUT_S + 5)
        try:
            problem: str | None = _receive(connection)["problem"]
        except (OSError, ValueError, KeyError):
            return f"--master-addr {address}: node 0 ended before all nodes had come"
        return problem


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any]:
    with connection.makefile("rb") as lines:
        message = json.loads(lines.readline(_LONGEST_MESSAGE))
    if not isinstance(message, dict):
        raise ValueError("not an object")
    return message


def main(words: list[str]) -> int:
    nnodes, node, port, needed = (int(words[index]) for index in (0, 1, 3, 4))
    address = words[2]
    try:
        arguments = parse_flags(words[6:])[0].arguments_hash()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    own = Facts(node, socket.gethostname(), arguments, installed_vllm(), len(find_devices()), needed)
    deadline_s = time.monotonic() + TIMEOUT_S
    if node == 0:
        try:
            server = socket.create_server(("", port))
        except OSError as error:
            print(
                f"error: --master-port {port}: cannot listen there: {error.strerror}; choose another", file=sys.stderr
            )
            return 1
        with server:
            problem = gather(server, own, nnodes, deadline_s)
    else:
        problem = attend(address, port, own, deadline_s)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
