"""Where node 0 listens: nodes and strangers knock side by side, and nobody waits for another."""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from msgspec import Struct
from msgspec.json import Decoder

from batch_inference.measure.connection import Connection
from batch_inference.measure.greeting import Caller, RefusedError

M = TypeVar("M")
# For everything that is said before a node is known, however slowly it comes.
_KNOCK_TIMEOUT_S = 10.0
# At each step of the greeting: a real node is not turned away because of silent callers.
_MOST_KNOCKING = 128
# Callers let in per look at the door; the rest wait for the next.
_MOST_AT_ONCE = 64
_MOST_NOTES = 8


class Door:
    """`secret`: what callers must know. `say`: prints a line about a refused caller."""

    def __init__(self, server: socket.socket, secret: bytes = b"", say: Callable[[str], None] | None = None) -> None:
        self._server = server
        self._secret = secret
        self._say = say
        self._noted: set[str] = set()  # addresses
        self._callers: dict[int, Caller] = {}  # by file number, in order of arrival
        self._selector = selectors.DefaultSelector()
        self._selector.register(server, selectors.EVENT_READ)
        server.setblocking(False)

    def close(self) -> None:
        self._selector.close()
        self._server.close()
        for caller in self._callers.values():
            caller.connection.close()

    def heard(self, decoder: Decoder[M], timeout_s: float) -> list[tuple[M, Connection]]:
        """Callers that have said who they are; waits at most `timeout_s` for somebody to say something."""
        found = []
        for key, _ in self._selector.select(max(0.0, timeout_s)):
            if key.fileobj is self._server:
                self._open()
            elif caller := self._callers.get(key.fd):
                introduction = self._listen_to(caller, decoder)
                if introduction is not None:
                    self._forget(caller)
                    found.append((introduction, caller.connection))
        now_s = time.monotonic()
        for caller in [one for one in self._callers.values() if one.deadline_s < now_s]:
            self._turn_away(caller)
        return found

    def refuse(self, connection: Connection, answer: Struct, text: str) -> None:
        """Refuse one of the callers that were heard; all others may come as before."""
        self._note(connection, text)
        with contextlib.suppress(OSError):
            connection.send(answer)
        connection.close()

    def _note(self, connection: Connection, text: str) -> None:
        """A line about a caller: one per address, and only for a few."""
        address = connection.other_address
        if self._say and address not in self._noted and len(self._noted) < _MOST_NOTES:
            self._noted.add(address)
            self._say(f"note: {text}")

    def _open(self) -> None:
        with contextlib.suppress(OSError):  # nobody is left to let in
            for _ in range(_MOST_AT_ONCE):
                connection = Connection(self._server.accept()[0])
                caller = Caller(connection, self._secret, time.monotonic() + _KNOCK_TIMEOUT_S)
                self._callers[connection.fileno()] = caller
                self._selector.register(connection, selectors.EVENT_READ)
                self._make_room(caller)

    def _make_room(self, newest: Caller) -> None:
        """Turn one away if too many are as far as `newest`: from the address that most of them come from, the one that
        came first, because a real node answers at once."""
        crowd = [one for one in self._callers.values() if one.steps == newest.steps]
        if len(crowd) > _MOST_KNOCKING:
            address = Counter(one.connection.other_address for one in crowd).most_common(1)[0][0]
            self._turn_away(next(one for one in crowd if one.connection.other_address == address))

    def _listen_to(self, caller: Caller, decoder: Decoder[M]) -> M | None:
        steps = caller.steps
        try:
            introduction = caller.introduction(decoder)
        except RefusedError as error:
            self._note(caller.connection, f"{caller.connection.other_address} called and was refused: it has {error}")
            self._turn_away(caller)
            return None
        except (OSError, ValueError):
            self._turn_away(caller)
            return None
        if caller.steps > steps and introduction is None:
            self._make_room(caller)
        return introduction

    def _turn_away(self, caller: Caller) -> None:
        self._forget(caller)
        caller.connection.close()

    def _forget(self, caller: Caller) -> None:
        del self._callers[caller.connection.fileno()]
        self._selector.unregister(caller.connection)
