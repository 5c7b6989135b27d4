"""The nodes of a preset meet once: who is node 0, in which order they came, and whether they fit together."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import itertools
import socket
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta, Struct
from msgspec.json import Decoder

from batch_inference.core.config import as_compared
from batch_inference.core.flags import parse_flags
from batch_inference.core.secrets import redact
from batch_inference.core.streams import say
from batch_inference.core.text import counted, listed
from batch_inference.launch.options import Options
from batch_inference.launch.presets import Preset
from batch_inference.measure.connection import Connection, Text, Word, Words
from batch_inference.measure.door import Door
from batch_inference.measure.environment import installed_vllm
from batch_inference.measure.greeting import secret_of_nodes
from batch_inference.measure.nodes import (
    LOOK_S,
    NodesError,
    Number,
    beyond,
    call,
    did_not_come,
    difference,
    ended_early,
    listen,
    named,
    no_vllm,
    open_door,
    own_host,
    twice,
)
from batch_inference.plan.devices import Devices

_MOST_NODES = 1000
# Once found, node 0 takes at most its own waiting time to say who has come, plus this on a busy machine.
_VERDICT_GRACE_S = 10.0


class Hello(Struct, tag=True):
    """What each node says about itself. `rank`: if it was given one."""

    rank: Annotated[int, Meta(ge=1, lt=_MOST_NODES)] | None
    host: Word
    kind: Literal["gpu", "cpu"]
    devices: Number
    vllm_version: Word | None
    arguments: Words


class Agreed(Struct, tag=True):
    """Node 0 to each other node: all have come."""

    node: Number
    names: Annotated[list[Word], Meta(max_length=_MOST_NODES)]


class Refused(Struct, tag=True):
    """Node 0 to a node that does not fit or comes too late."""

    problem: Text


@dataclass
class Member:
    """A node that has come, as node 0 sees it."""

    node: int
    hello: Hello
    connection: Connection

    @property
    def name(self) -> str:
        return named(self.node, self.hello.host)


@dataclass(frozen=True)
class Met:
    """On node 0: the others, and the door where late ones still knock. On the others: the line to node 0."""

    node: int
    names: Sequence[str]
    others: Sequence[Member] = ()
    door: Door | None = None
    node_0: Connection | None = None


HELLO, _VERDICT = Decoder(Hello), Decoder(Agreed | Refused)


def introduction(preset: Preset, options: Options, devices: Devices) -> Hello:
    """Raises ConfigError for flags that are wrong."""
    told = {
        "preset": " ".join([preset.name, *options.words]),
        # Another version of the launcher may have a preset of the same name.
        "settings": "; ".join(" ".join(redact(words)) for words in preset.words_of_settings(options.words)),
    }
    arguments = parse_flags([*preset.flags, *options.passed_on, *options.flags])[0].arguments()
    arguments["--nnodes"] = str(options.nnodes or "as they come")
    return Hello(
        options.node_rank, own_host(), devices.kind, len(devices), installed_vllm(),
        {**{name: as_compared(text) for name, text in told.items()}, **arguments},
    )  # fmt: skip


def meet(options: Options, own: Hello) -> Met:
    """Raises NodesError on every node that has come."""
    address, port = options.master_addr or "", options.master_port
    owned = own.rank == 0 or (own.rank is None and owns(address, own_addresses(), own.host))
    door = _door(address, port, is_told=own.rank == 0) if owned else None
    if door is None:
        return attend(options, own, is_owned=owned)
    say(f"node 0 ({own.host}) is waiting for the others on port {port}; start the same command on each")
    try:
        return gather(door, own, options)
    except BaseException:
        door.close()
        raise


def _door(address: str, port: int, *, is_told: bool) -> Door | None:
    """None if another node on this machine, or something else, is already listening. Raises NodesError."""
    if is_told:
        return open_door(port, say, address)
    try:
        return Door(listen(port, address), secret_of_nodes(), say)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None
        return open_door(port, say, address)  # says what is wrong


def own_addresses() -> set[str]:
    import psutil

    return {address.address.partition("%")[0] for found in psutil.net_if_addrs().values() for address in found}


def owns(address: str, own: Collection[str], host: str) -> bool:
    """Whether `address`, a number or a name, is this machine's, which has `own` addresses and is called `host`."""
    # A machine's own name often resolves to 127.0.1.1; it may be given with or without its domain.
    if address.lower() in {host.lower(), host.lower().partition(".")[0], "localhost"}:
        return True
    try:
        found = {str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(address, None)}
    except (OSError, UnicodeError):
        return False
    return any(one in own or ipaddress.ip_address(one).is_loopback for one in found)


def gather(door: Door, own: Hello, options: Options) -> Met:
    """Node 0: wait until all have come, or nobody else comes. Raises NodesError."""
    calls = _callers(door, options)
    others = numbered(calls)
    problem = _misfit(own, others) or _missing(others, options)
    names = [named(0, own.host), *(other.name for other in others)]
    for other in others:
        # If one is gone now, the first setting that needs it will notice.
        with contextlib.suppress(OSError):
            other.connection.send(Refused(problem) if problem else Agreed(other.node, names))
    if problem:
        raise NodesError(problem)
    say(f"{counted(len(names), 'node')}: {listed(names)}")
    return Met(0, names, others, door)


def _callers(door: Door, options: Options) -> list[tuple[Hello, Connection]]:
    """In order of arrival, until a common deadline."""
    calls: list[tuple[Hello, Connection]] = []
    deadline_s, last_s = time.monotonic() + options.wait_for_nodes_s, 0.0
    most = _MOST_NODES - 1 if options.nnodes is None else options.nnodes - 1
    while len(calls) < most:
        settling = calls and options.nnodes is None
        left_s = (min(last_s + options.settle_s, deadline_s) if settling else deadline_s) - time.monotonic()
        if left_s <= 0:
            break
        for hello, connection in door.heard(HELLO, min(left_s, LOOK_S)):
            if options.nnodes and (hello.rank or 0) >= options.nnodes:
                problem = beyond(hello.rank or 0, hello.host, options.nnodes)
                door.refuse(connection, Refused(problem), problem)
                continue
            calls.append((hello, connection))
            last_s = time.monotonic()
            say(f"{hello.host} has come, with {counted(hello.devices, 'device')}")
        for one in [one for one in calls if one[1].has_spoken]:  # it should have nothing to say yet
            calls.remove(one)
            one[1].close()
            say(f"{one[0].host} has left again")
    return calls


def numbered(calls: Sequence[tuple[Hello, Connection]]) -> list[Member]:
    """Those that were given a number keep it; the others get the remaining ones in order of arrival."""
    told = {hello.rank for hello, _ in calls}
    free = iter([number for number in range(1, len(calls) + 1) if number not in told])
    members = [
        Member(next(free) if hello.rank is None else hello.rank, hello, connection) for hello, connection in calls
    ]
    return sorted(members, key=lambda member: member.node)


def _misfit(own: Hello, others: Sequence[Member]) -> str | None:
    """What does not fit together among node 0 and the others that have come."""
    first, ours = named(0, own.host), (own.vllm_version, own.arguments)
    if own.vllm_version is None:
        return no_vllm(0, own.host)
    for one in others:
        if problem := difference(one.name, (one.hello.vllm_version, one.hello.arguments), first, ours):
            return problem
        if one.hello.vllm_version is None:
            return no_vllm(one.node, one.hello.host)
        if one.hello.kind != own.kind:
            return f"{one.name} has {one.hello.kind} devices, but {first} has {own.kind} devices"
    return None


def _missing(others: Sequence[Member], options: Options) -> str | None:
    """Which nodes did not come, or came twice."""
    address, waited_s = options.master_addr, options.wait_for_nodes_s
    if not others and options.nnodes is None:
        return (
            f"--master-addr {address}: no other node came to port {options.master_port} within {waited_s:g} s; start "
            "the same command on the others, or drop --master-addr to use only this node"
        )
    for earlier, later in itertools.pairwise(others):
        if earlier.node == later.node:
            return twice(earlier.hello.host, later.hello.host, later.node)
    there = {0, *(other.node for other in others)}
    nnodes = options.nnodes or max(there) + 1
    missing = [node for node in range(nnodes) if node not in there]
    return did_not_come(missing, nnodes, waited_s) if missing else None


def attend(options: Options, own: Hello, *, is_owned: bool) -> Met:
    """Other nodes: say who this is, and hear the verdict. Raises NodesError."""
    address, port = options.master_addr or "", options.master_port
    is_stranger = own.rank is None and not is_owned
    about = f"{address} is not an address of this machine ({own.host}); if it leads here, give --node-rank 0 here"
    say(f"waiting for node 0 at {address}, port {port}" + (f": {about}" if is_stranger else ""))
    advice = f"; start the same command there; {about}" if is_stranger else "; start the same command there"
    connection = call((address, port), own, time.monotonic() + options.wait_for_nodes_s, advice, say)
    waits_s = options.wait_for_nodes_s + _VERDICT_GRACE_S
    try:
        verdict = connection.receive(_VERDICT, waits_s)
    except (OSError, ValueError):
        verdict = Refused(ended_early(address))
    if isinstance(verdict, Agreed):
        say(f"node {verdict.node} of {counted(len(verdict.names), 'node')}: {listed(verdict.names)}")
        return Met(verdict.node, verdict.names, node_0=connection)
    connection.close()
    raise NodesError(
        verdict.problem if verdict else f"--master-addr {address}: nothing from node 0 within {waits_s:g} s"
    )


def refuse_late(met: Met, began_s: float) -> None:
    """Tell nodes that knock now that the preset began without them."""
    assert met.door is not None
    for hello, connection in met.door.heard(HELLO, 0):
        late = f"{hello.host} came too late: {listed(met.names)} began {time.monotonic() - began_s:.0f} s earlier"
        met.door.refuse(connection, Refused(f"{late}; start the same command again when they are ready"), late)
