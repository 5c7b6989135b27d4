"""Connections between nodes: whole messages of bounded size, with one reader each."""

from __future__ import annotations

import math
import select
import socket
import time
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct
from msgspec.json import Decoder

M = TypeVar("M")
# Input from elsewhere is bounded; when shown, it cannot move the cursor or reverse text.
_SHOWN = r"\A[^\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]*\Z"
Word = Annotated[str, Meta(max_length=300, pattern=_SHOWN)]
Text = Annotated[str, Meta(max_length=4000, pattern=_SHOWN)]
Words = Annotated[dict[Word, Word], Meta(max_length=200)]
# Before and after the other end has proved that it is one of us.
_LONGEST_GREETING, _LONGEST_MESSAGE = 1 << 10, 1 << 17
_SEND_TIMEOUT_S = 5.0
# A node that is switched off is noticed after about 30 s.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}
_MAPPED = "::ffff:"  # before an IPv4 address on a socket that takes both kinds


class Connection:
    """A connection to one other node. Its methods raise OSError if that is gone."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        # Already read, and kept for the next message: several may arrive at once.
        self._unread = b""
        self._longest = _LONGEST_GREETING
        line.settimeout(_SEND_TIMEOUT_S)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):  # not on every system
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.own_address: str = line.getsockname()[0].removeprefix(_MAPPED)
        self.other_address: str = line.getpeername()[0].removeprefix(_MAPPED)

    def fileno(self) -> int:
        return self._line.fileno()

    def close(self) -> None:
        self._line.close()

    def send(self, message: Struct) -> None:
        self._line.sendall(msgspec.json.encode(message) + b"\n")

    def trust(self) -> None:
        """The other end is one of us, so it may send long messages."""
        self._longest = _LONGEST_MESSAGE

    def receive(self, decoder: Decoder[M], timeout_s: float = math.inf) -> M | None:
        """The next message; None if none is complete within `timeout_s`. Raises ValueError for anything else."""
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            left_s = deadline_s - time.monotonic()
            if self._is_readable(min(60.0, max(0.0, left_s))):
                self._read()
            # After the time-out, nothing that trickles in is waited for.
            if left_s <= 0 and b"\n" not in self._unread:
                return None
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            return decoder.decode(line)
        except RecursionError as error:
            raise ValueError("too deeply nested for a message") from error

    @property
    def has_spoken(self) -> bool:
        """Something has arrived, or the other node is gone: the latter, if the node has nothing to say."""
        return bool(self._unread or self._is_readable(0))

    def _is_readable(self, timeout_s: float) -> bool:
        poll = select.poll()  # select itself handles only 1024 files
        poll.register(self._line, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def _read(self) -> None:
        chunk = self._line.recv(1 << 16)
        if not chunk:
            raise ConnectionResetError("the other end is closed")
        self._unread += chunk
        if len(self._unread) > self._longest:
            raise ValueError("too long for a message")
