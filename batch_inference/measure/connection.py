"""Lines between nodes: whole messages, one reader each; and the door, where nodes and strangers knock."""

from __future__ import annotations

import contextlib
import math
import select
import socket
import time
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct
from msgspec.json import Decoder

M = TypeVar("M")
# What comes from elsewhere is bounded, and moves no cursor where it is shown.
Word = Annotated[str, Meta(max_length=300, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]
Text = Annotated[str, Meta(max_length=4000, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]
Words = Annotated[dict[Word, Word], Meta(max_length=200)]
_LONGEST_MESSAGE = 1 << 17
_SEND_TIMEOUT_S = 5.0
# For a whole introduction, and how many may be at it at once: a stranger has no more than that.
_KNOCK_TIMEOUT_S = 10.0
_MOST_KNOCKING = 64
# A node that is switched off is noticed after about half a minute.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}
_MAPPED = "::ffff:"  # before an IPv4 address of a socket that takes both kinds


class Connection:
    """A line to one other node. Its methods raise OSError where that is gone."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        # Read once, kept for the next message: several may arrive at the same time.
        self._unread = b""
        line.settimeout(_SEND_TIMEOUT_S)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):  # not on every system
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.own_address: str = line.getsockname()[0].removeprefix(_MAPPED)

    def fileno(self) -> int:
        return self._line.fileno()

    def close(self) -> None:
        self._line.close()

    def send(self, message: Struct) -> None:
        self._line.sendall(msgspec.json.encode(message) + b"\n")

    def receive(self, decoder: Decoder[M], timeout_s: float = math.inf) -> M | None:
        """The next message; None where none is there within `timeout_s`. Raises ValueError for what is no message."""
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            left_s = min(60.0, max(0.0, deadline_s - time.monotonic()))
            if not select.select([self._line], [], [], left_s)[0]:
                if time.monotonic() >= deadline_s:
                    return None
                continue
            chunk = self._line.recv(1 << 16)
            if not chunk:
                raise ConnectionResetError("the other end is closed")
            self._unread += chunk
            if len(self._unread) > _LONGEST_MESSAGE:
                raise ValueError("too long for a message")
        line, _, self._unread = self._unread.partition(b"\n")
        return decoder.decode(line)

    @property
    def has_spoken(self) -> bool:
        """Something has arrived, or the other node is gone: of one that has nothing to say, the latter."""
        return bool(self._unread or select.select([self._line], [], [], 0)[0])


class Door:
    """Where node 0 listens. Who knocks has ten seconds to say who it is; nobody waits for another."""

    def __init__(self, server: socket.socket) -> None:
        self._server = server
        self._knocking: dict[Connection, float] = {}
        server.setblocking(False)

    def close(self) -> None:
        self._server.close()
        for connection in self._knocking:
            connection.close()

    def heard(self, decoder: Decoder[M], timeout_s: float) -> list[tuple[M, Connection]]:
        """Those that have said who they are; waits `timeout_s` at most for somebody to say something."""
        numbers = [self._server.fileno(), *(connection.fileno() for connection in self._knocking)]
        if self._server.fileno() in select.select(numbers, [], [], timeout_s)[0]:
            self._open()
        found = []
        for connection in list(self._knocking):
            try:
                message = connection.receive(decoder, 0)
            except (OSError, ValueError):
                self._turn_away(connection)
                continue
            if message is not None:
                del self._knocking[connection]
                found.append((message, connection))
            elif time.monotonic() > self._knocking[connection]:
                self._turn_away(connection)
        return found

    def _open(self) -> None:
        with contextlib.suppress(OSError):
            connection = Connection(self._server.accept()[0])
            self._knocking[connection] = time.monotonic() + _KNOCK_TIMEOUT_S
        if len(self._knocking) > _MOST_KNOCKING:
            self._turn_away(next(iter(self._knocking)))

    def _turn_away(self, connection: Connection) -> None:
        del self._knocking[connection]
        connection.close()
