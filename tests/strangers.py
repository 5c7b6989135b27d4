"""Who calls the port where nodes meet, and is none of them."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable

import msgspec
from msgspec import Struct

from batch_inference.measure.greeting import Greeting

Stranger = Callable[[socket.socket], None]


def encoded(message: Struct) -> bytes:
    return msgspec.json.encode(message) + b"\n"


GREETING = encoded(Greeting("0" * 32))
SENTENCES = {
    "http": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "ssh": b"SSH-2.0-OpenSSH_9.6\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) + b"\n",
    "nothing": b"",
    "empty lines": b"\n" * 1000,
    "no utf-8": b"\xff\xfe\n",
    "deep": b'{"x":' + b"[" * 900 + b"\n",
    "deep for the parser": b'{"x":' * 100_000 + b"\n",
    "no end": b"x" * (1 << 20),
    "ill-typed": b'{"type": {}, "nonce": [], "protocol": "x"}\n',
    "ill-typed greeting": b'{"type": "batch_inference node", "nonce": 7}\n',
    "huge number": GREETING.replace(b":1}", b":" + b"9" * 900 + b"}"),
    "an escape": GREETING.replace(b"0" * 32, b"\\u001b[2J"),
    "no proof": GREETING,
    "wrong proof": GREETING + b'{"type":"Proof","proof":"' + b"0" * 64 + b'"}\n',
    "ill-typed proof": GREETING + b'{"type":"Proof","proof":null}\n',
    "deep proof": GREETING + b'{"type":"Proof","proof":' + b"[" * 900 + b"\n",
    "introduction alone": b'{"type":"Hello","host":"b"}\n',
    "the older protocol": b'{"type": "Hello", "rank": 1, "host": "b", "arguments": {}}\n',
    "half a greeting": GREETING[:20],
}


def _says(words: bytes) -> Stranger:
    def act(line: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it is turned away before its end
            line.sendall(words)

    return act


def _hangs_up(line: socket.socket) -> None:
    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
    line.close()


def _says_and_shuts(line: socket.socket) -> None:
    line.sendall(GREETING)
    line.shutdown(socket.SHUT_WR)


STRANGERS = {name: _says(words) for name, words in SENTENCES.items()}
STRANGERS |= {"reset": _hangs_up, "half closed": _says_and_shuts}


class Strangers:
    """All of them, one after the other and again and again, at some ports of this machine. They keep their lines, send
    a byte now and then, and hang up where they have too many."""

    def __init__(self, *ports: int) -> None:
        self.calls = 0
        self._ports = ports
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._call)

    def __enter__(self) -> Strangers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _call(self) -> None:
        kinds, ports, lines = itertools.cycle(STRANGERS.values()), itertools.cycle(self._ports), deque[socket.socket]()
        while not self._is_over.wait(0.002):
            with contextlib.suppress(OSError):
                line = socket.create_connection(("127.0.0.1", next(ports)), timeout=1)
                self.calls += 1
                lines.append(line)
                next(kinds)(line)
            if lines:
                with contextlib.suppress(OSError):
                    lines[0].send(b"x")
                lines.rotate()
            if len(lines) > 300:
                lines.popleft().close()
        for line in lines:
            line.close()
