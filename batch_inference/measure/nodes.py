"""The nodes of a setting meet before anything loads, to check that all are there with the same vLLM, the same arguments

and enough devices. Node 0 listens, compares what the others say, and tells all of them the same. The connections stay
open while the setting is measured, so that a lost node is noticed at once and not after a time-out.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Annotated

from msgspec import Meta, Struct
from msgspec.json import Decoder

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.failures import WorkFailedError
from batch_inference.core.text import counted, listed, short_name
from batch_inference.measure.connection import Connection, Text, Word, Words
from batch_inference.measure.door import Door
from batch_inference.measure.environment import installed_vllm
from batch_inference.measure.greeting import RefusedError, greet, secret_of_nodes
from batch_inference.plan.devices import find_devices

TIMEOUT_S = 60.0
_MOST_SHOWN = 4
# How often to check that nodes that have come are still there.
LOOK_S = 1.0
# For each answer of node 0, which comes at once: a silent other program is not waited for any longer.
_ANSWER_WITHIN_S, _CALL_AGAIN_S = 5.0, 0.2
# After so many failed calls, something else listens there; before, node 0 may just be ending, or have many callers.
_MOST_CALLS = 3
# How many callers may wait for a connection: there may be many strangers.
_BACKLOG = 1024
Number = Annotated[int, Meta(ge=0, lt=100_000)]
Rank = Annotated[int, Meta(ge=1, lt=100_000)]  # of a node that calls node 0


class NodesError(WorkFailedError):
    """The nodes do not fit together, or one is missing: one line, the same on every node."""


class Introduction(Struct, tag=True):
    """What each node says about itself; these must fit together."""

    node: Rank
    host: Word
    arguments: Words
    vllm_version: Word | None
    devices: Number
    devices_needed: Number

    @property
    def problem(self) -> str | None:
        if self.devices >= self.devices_needed:
            return no_vllm(self.node, self.host) if self.vllm_version is None else None
        there = counted(self.devices, "device")
        return f"{named(self.node, self.host)} has {there}, but {self.devices_needed} are needed on each"


class Answer(Struct, tag=True):
    """What node 0 tells all others once they have come; None: they fit together."""

    problem: Text | None


class Dismissal(Struct, tag=True):
    """Node 0's last word: the setting is over."""

    failed: bool


_INTRODUCTION, _ANSWER, _DISMISSAL = Decoder(Introduction), Decoder(Answer), Decoder(Dismissal)


def named(node: int, host: str) -> str:
    return f"node {node} ({host})"


def no_vllm(node: int, host: str) -> str:
    return f"{named(node, host)} has no vLLM; run ./setup_env.sh there"


def other_arguments(theirs: Mapping[str, str], ours: Mapping[str, str]) -> tuple[str, str] | None:
    """The arguments that differ between two nodes, in each one's words; None if there are none."""
    names = [name for name in dict.fromkeys([*ours, *theirs]) if theirs.get(name) != ours.get(name)]
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    of_each = (
        listed(f"{name} {short_name(told.get(name, 'not at all'), 80)}" for name in names[:_MOST_SHOWN])
        for told in (theirs, ours)
    )
    theirs_said, ours_said = of_each
    return (theirs_said + more, ours_said + more) if names else None


def difference(
    node: str, theirs: tuple[str | None, Mapping[str, str]], first: str, ours: tuple[str | None, Mapping[str, str]]
) -> str | None:
    """Why a node and node 0 cannot work together, by the vLLM and the arguments of both."""
    if theirs[0] is not None and theirs[0] != ours[0]:
        return f"{node} has vLLM {theirs[0]}, but {first} has {ours[0]}"
    if told := other_arguments(theirs[1], ours[1]):
        return f"{node} has different arguments: {told[0]}; {first}: {told[1]}"
    return None


def disagreement(first: Introduction, others: Iterable[Introduction]) -> str | None:
    """Why the nodes cannot work together; None if they can."""
    ours = (first.vllm_version, first.arguments)
    for one in (first, *others):
        theirs, first_named = (one.vllm_version, one.arguments), named(first.node, first.host)
        if problem := difference(named(one.node, one.host), theirs, first_named, ours) or one.problem:
            return problem
    return None


class Nodes:
    """The other nodes of a setting: all of them on node 0, and node 0 on the others."""

    def __init__(self, connections: dict[int, Connection]) -> None:
        self._connections = connections

    def __enter__(self) -> Nodes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._connections.values():
            connection.close()

    def environment(self) -> dict[str, str]:
        return network_of(self._connections.values())

    def lost(self) -> str | None:
        """Which of the nodes that node 0 waits for is gone; None while all are there."""
        lost = (node for node, connection in self._connections.items() if connection.has_spoken)
        return next((gone(f"node {node}") for node in lost), None)

    def dismiss(self, *, failed: bool) -> None:
        """Node 0: the setting is over."""
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.send(Dismissal(failed))

    def dismissed(self, timeout_s: float) -> bool:
        """Other nodes: True if node 0 says that the setting is over; waits for `timeout_s`. Raises NodesError
        if the setting failed or node 0 is gone."""
        ((node, connection),) = self._connections.items()
        try:
            dismissal = connection.receive(_DISMISSAL, timeout_s)
        except (OSError, ValueError):
            raise NodesError(gone(f"node {node}")) from None
        if dismissal is not None and dismissal.failed:
            raise NodesError(f"the setting failed; the output of node {node} says why")
        return dismissal is not None


def network_of(connections: Iterable[Connection]) -> dict[str, str]:
    """The variables that make vLLM, gloo and NCCL use the network that connects the nodes; the user's own are kept."""
    import psutil

    addresses = [connection.own_address for connection in connections]
    # A node on this machine may have come by a different route than the others.
    own = next((address for address in addresses if not address.startswith("127.")), addresses[0])
    found = {"VLLM_HOST_IP": own}
    for name, of_interface in psutil.net_if_addrs().items():
        if any(address.address == own for address in of_interface):
            found |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    return {name: os.environ.get(name, value) for name, value in found.items()}


def gone(name: str) -> str:
    return f"{name} is gone; its output says why"


def meet(config: ExperimentConfig, say: Callable[[str], None]) -> Nodes:
    """Wait for the nodes of a setting, at most a minute. Raises NodesError on every node if they do not fit."""
    deadline_s = time.monotonic() + TIMEOUT_S
    own = Introduction(
        config.node_rank, own_host(), arguments_of(config), installed_vllm(), len(find_devices()),
        config.devices_per_node,
    )  # fmt: skip
    if own.node > 0:
        return attend(config.master_addr or "", config.master_port, own, deadline_s)
    with contextlib.closing(open_door(config.master_port, say)) as door:
        return gather(door, own, config.nnodes, deadline_s)


def arguments_of(config: ExperimentConfig) -> dict[str, str]:
    """What nodes must agree on. For a workload, which a node reads unless it is told a length, also how long its
    requests are, because the engines are sized for that."""
    return replace(config, max_model_len=config.max_model_len or config.workload_longest).arguments()


def own_host() -> str:
    """This machine's name, as other nodes may show it."""
    return "".join(one if "!" <= one <= "~" else "?" for one in socket.gethostname())


def open_door(port: int, say: Callable[[str], None], address: str = "") -> Door:
    """Listens on all interfaces. Raises NodesError."""
    try:
        return Door(listen(port, address), secret_of_nodes(), say)
    except OSError as error:
        raise NodesError(
            f"--master-port {port}: cannot listen there: {os.strerror(error.errno or 0)}; choose another on every node"
        ) from error


def listen(port: int, address: str = "") -> socket.socket:
    """For both kinds of addresses if `address` is IPv6. Raises OSError."""
    if ":" in address and socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
    return socket.create_server(("", port), backlog=_BACKLOG)


def gather(door: Door, first: Introduction, nnodes: int, deadline_s: float) -> Nodes:
    """Node 0: hear every other node and tell them the verdict. Raises NodesError."""
    calls: list[tuple[Introduction, Connection]] = []
    while len({caller.node for caller, _ in calls}) < nnodes - 1 and (left_s := deadline_s - time.monotonic()) > 0:
        for caller, connection in door.heard(_INTRODUCTION, min(left_s, LOOK_S)):
            if caller.node < nnodes:
                calls.append((caller, connection))
            else:
                too_high = beyond(caller.node, caller.host, nnodes)
                door.refuse(connection, Answer(too_high), too_high)
        # A node that comes again replaces its earlier call.
        for call in [call for call in calls if call[1].has_spoken]:
            calls.remove(call)
            call[1].close()
    calls.sort(key=lambda call: call[0].node)
    problem = _numbers_problem([caller for caller, _ in calls], nnodes) or disagreement(
        first, (caller for caller, _ in calls)
    )
    for _, connection in calls:
        with contextlib.suppress(OSError):
            connection.send(Answer(problem))
    if problem:
        for _, connection in calls:
            connection.close()
        raise NodesError(problem)
    return Nodes({caller.node: connection for caller, connection in calls})


def _numbers_problem(callers: list[Introduction], nnodes: int) -> str | None:
    for earlier, later in itertools.pairwise(callers):
        if earlier.node == later.node:
            return twice(earlier.host, later.host, later.node)
    there = {caller.node for caller in callers}
    missing = [node for node in range(1, nnodes) if node not in there]
    return did_not_come(missing, nnodes, TIMEOUT_S) if missing else None


def beyond(node: int, host: str, nnodes: int) -> str:
    return f"{named(node, host)} is not one of {nnodes}, numbered up to {nnodes - 1}; see --nnodes and --node-rank"


def twice(host: str, other: str, node: int) -> str:
    return f"{host} and {other} are both node {node}; give each its own --node-rank"


def ended_early(address: str) -> str:
    return f"--master-addr {address}: node 0 ended before all nodes had come"


def did_not_come(missing: Iterable[int], nnodes: int, waited_s: float) -> str:
    nodes = short_name(listed(missing), 80)
    return f"node {nodes} of {nnodes} did not come within {waited_s:g} s; start the same command there"


def attend(address: str, port: int, own: Introduction, deadline_s: float) -> Nodes:
    """Other nodes: say who they are, and hear the verdict. Raises NodesError."""
    connection = call((address, port), own, deadline_s)
    try:
        # Node 0 may wait for another node until its own time is up.
        answer = connection.receive(_ANSWER, TIMEOUT_S + 5)
    except (OSError, ValueError):
        answer = None
    problem = answer.problem if answer else ended_early(address)
    if problem:
        connection.close()
        raise NodesError(problem)
    return Nodes({0: connection})


def call(
    at: tuple[str, int],
    introduction: Struct,
    deadline_s: float,
    advice: str = "",
    say: Callable[[str], None] | None = None,
) -> Connection:
    """The connection to node 0, which then knows who this is. Keeps calling: nobody or another program may listen.
    `say`: prints a line about that. Raises NodesError."""
    address, port = at
    secret, in_vain = secret_of_nodes(), 0
    while True:
        try:
            within_s = min(_ANSWER_WITHIN_S, max(0.1, deadline_s - time.monotonic()))
            line = socket.create_connection(at, timeout=within_s)
        except OSError as error:
            in_vain, why = 0, error.strerror or str(error)
            problem = f"--master-addr {address}: nothing answers on port {port} ({why}){advice}"
            if _is_no_host(error):
                raise NodesError(problem) from error
        else:
            if connection := _greeted(line, secret, within_s, address):
                with contextlib.suppress(OSError):  # if it is gone now, whoever waits for its verdict notices
                    connection.send(introduction)
                return connection
            in_vain += 1
            problem = (
                f"--master-port {port}: another program listens there on {address}; choose another port on every node"
            )
            if say and in_vain == _MOST_CALLS:
                say(f"note: {problem}; trying again")
        if time.monotonic() >= deadline_s:
            raise NodesError(problem)
        time.sleep(_CALL_AGAIN_S)


def _greeted(line: socket.socket, secret: bytes, within_s: float, address: str) -> Connection | None:
    """None if somebody else answered. Raises NodesError if it is this program, but not this node's node 0."""
    try:
        connection = Connection(line)
        greet(connection, secret, within_s)
    except RefusedError as error:
        line.close()
        raise NodesError(f"--master-addr {address}: node 0 has {error}") from None
    except (OSError, ValueError):
        line.close()
        return None
    return connection


def _is_no_host(error: OSError) -> bool:
    """There is no such name. A name that cannot be looked up right now may be found later."""
    return isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN
