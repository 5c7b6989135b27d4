"""Who is let in where node 0 listens: our nodes, whatever else calls, and nobody who does not know the secret."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from msgspec import Struct
from msgspec.json import Decoder
from strangers import GREETING, SENTENCES, STRANGERS, encoded

from batch_inference.core.config import MEETING_SECRET, ConfigError
from batch_inference.measure import door as door_module
from batch_inference.measure import nodes
from batch_inference.measure.connection import Connection, Text, Word
from batch_inference.measure.door import Door
from batch_inference.measure.greeting import Challenge, Greeting, Proof, Refusal, Welcome, secret_of_nodes
from batch_inference.measure.nodes import NodesError, call

SECRET = b"tell nobody"
# For what must happen; a test that is well ends long before.
PATIENCE_S = 30.0


class Hello(Struct, tag=True):
    host: Word
    text: Text = ""


HELLO = Decoder(Hello)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("", 0), backlog=1024) as server:
        yield server


def port_of(server: socket.socket) -> int:
    return int(server.getsockname()[1])


def hear(door: Door, until: Callable[[list[Hello]], bool] = bool) -> list[Hello]:
    """Whoever says who it is, until that is enough."""
    deadline_s, found = time.monotonic() + PATIENCE_S, list[Hello]()
    while not until(found):
        assert time.monotonic() < deadline_s, found
        for hello, connection in door.heard(HELLO, 0.05):
            found.append(hello)
            connection.close()
    return found


def call_node_0(server: socket.socket, hello: Hello, monkeypatch: pytest.MonkeyPatch, secret: bytes = b"") -> None:
    """As another node does, which may know a secret."""
    monkeypatch.setenv(MEETING_SECRET, secret.decode()) if secret else monkeypatch.delenv(MEETING_SECRET, raising=False)
    call(("127.0.0.1", port_of(server)), hello, time.monotonic() + PATIENCE_S).close()


def is_turned_away(stranger: socket.socket) -> bool:
    """Whether the other end has closed the line; waits for that."""
    stranger.settimeout(PATIENCE_S)
    try:
        while stranger.recv(1 << 16):
            continue
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


@pytest.mark.parametrize("secret", [b"", SECRET])
def test_a_node_of_ours_is_heard(server: socket.socket, monkeypatch: pytest.MonkeyPatch, secret: bytes) -> None:
    with contextlib.closing(Door(server, secret)) as door, ThreadPoolExecutor() as pool:
        node = pool.submit(call_node_0, server, Hello("b", "x" * 4000), monkeypatch, secret)
        assert hear(door) == [Hello("b", "x" * 4000)]
        node.result(PATIENCE_S)


@pytest.mark.parametrize(("theirs", "ours"), [(b"another", SECRET), (b"", SECRET), (SECRET, b"")])
def test_who_knows_another_secret_or_none_is_refused_and_told_so(
    server: socket.socket, monkeypatch: pytest.MonkeyPatch, theirs: bytes, ours: bytes
) -> None:
    said: list[str] = []
    about = (
        f"another secret (--meeting-secret, {MEETING_SECRET}), or one of the two has none; give the same on every node"
    )
    with contextlib.closing(Door(server, ours, said.append)) as door, ThreadPoolExecutor() as pool:
        for _ in range(3):
            node = pool.submit(call_node_0, server, Hello("b"), monkeypatch, theirs)
            assert hear(door, lambda _, node=node: node.done()) == []  # type: ignore[misc]
            with pytest.raises(NodesError) as raised:
                node.result()
            assert str(raised.value) == f"--master-addr 127.0.0.1: node 0 has {about}"
    # Once for an address, however often it calls.
    assert said == [f"note: 127.0.0.1 called and was refused: it has {about}"]


def test_many_that_are_refused_are_not_all_named(server: socket.socket) -> None:
    said: list[str] = []
    with contextlib.closing(Door(server, SECRET, said.append)) as door, contextlib.ExitStack() as lines:
        for last in range(2, 42):
            address = ("127.0.0.1", port_of(server))
            line = lines.enter_context(socket.create_connection(address, source_address=(f"127.0.0.{last}", 0)))
            line.sendall(encoded(Greeting("0" * 32)) + encoded(Proof("0" * 64)))
        hear(door, lambda _: len(said) >= 8 and not door._callers)
    assert len(said) == len(set(said)) == 8


def test_another_version_of_these_scripts_is_told_so(server: socket.socket) -> None:
    said: list[str] = []
    address = ("127.0.0.1", port_of(server))
    with contextlib.closing(Door(server, b"", said.append)) as door, socket.create_connection(address) as line:
        line.sendall(encoded(Greeting("0" * 32, protocol=2)))
        hear(door, lambda _: bool(said))
        (answer,) = line.makefile("rb").readlines()
    about = "another version of these scripts; use the same checkout on every node"
    assert said == [f"note: 127.0.0.1 called and was refused: it has {about}"]
    # By this the other sees it too.
    assert msgspec.json.decode(answer, type=Challenge).protocol == 1
    with socket.create_server(("127.0.0.1", 0)) as newer, ThreadPoolExecutor() as pool:
        node = pool.submit(call, ("127.0.0.1", port_of(newer)), Hello("b"), time.monotonic() + PATIENCE_S)
        newer.accept()[0].sendall(encoded(Challenge("0" * 32, protocol=2)))
        with pytest.raises(NodesError, match=f"node 0 has {about}"):
            node.result(PATIENCE_S)


# --- strangers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_is_ignored(name: str, server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    address = ("127.0.0.1", port_of(server))
    with contextlib.closing(Door(server, SECRET, said.append)) as door, contextlib.ExitStack() as lines:
        for _ in range(3):
            STRANGERS[name](lines.enter_context(socket.create_connection(address)))
        with ThreadPoolExecutor() as pool:
            node = pool.submit(call_node_0, server, Hello("b"), monkeypatch, SECRET)
            assert hear(door) == [Hello("b")]
            node.result(PATIENCE_S)
    # One of them knows the program's word, and not the secret.
    assert len(said) == (name == "wrong proof")


@pytest.mark.parametrize("words", [b"", GREETING])
def test_hundreds_that_keep_the_line_do_not_keep_a_node_out(
    words: bytes, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = ("127.0.0.1", port_of(server))
    with (
        contextlib.closing(Door(server, SECRET)) as door,
        contextlib.ExitStack() as lines,
        ThreadPoolExecutor() as pool,
    ):
        for number in range(300):
            lines.enter_context(socket.create_connection(address)).sendall(words)
            if number == 250:
                node = pool.submit(call_node_0, server, Hello("b"), monkeypatch, SECRET)
        assert hear(door) == [Hello("b")]
        node.result(PATIENCE_S)


def test_a_flood_does_not_keep_a_node_out(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    is_over, address, calls = threading.Event(), ("127.0.0.1", port_of(server)), 0

    def flood() -> None:
        nonlocal calls
        lines: list[socket.socket] = []
        while not is_over.is_set():
            with contextlib.suppress(OSError):
                lines.append(socket.create_connection(address, timeout=1))  # waits where none is let in now
                calls += 1
            if len(lines) > 200:
                lines.pop(0).close()
        for line in lines:
            line.close()

    with contextlib.closing(Door(server, SECRET)) as door, ThreadPoolExecutor() as pool:
        pool.submit(flood)
        try:
            hear(door, lambda _: calls > 500)
            node = pool.submit(call_node_0, server, Hello("b"), monkeypatch, SECRET)
            assert hear(door) == [Hello("b")]
            node.result(PATIENCE_S)
        finally:
            is_over.set()


def test_those_of_one_address_do_not_turn_away_one_of_another(server: socket.socket) -> None:
    address = ("127.0.0.1", port_of(server))
    with contextlib.closing(Door(server)) as door, contextlib.ExitStack() as lines:
        first = lines.enter_context(socket.create_connection(address, source_address=("127.0.0.2", 0)))
        for _ in range(200):
            lines.enter_context(socket.create_connection(address))
        hear(door, lambda _: not select.select([server], [], [], 0)[0])
        assert len(door._callers) == 128
        assert first.getsockname()[0] in {caller.connection.other_address for caller in door._callers.values()}


@pytest.mark.parametrize("words", [b"", GREETING])
def test_whoever_sends_without_an_end_is_turned_away(words: bytes, server: socket.socket) -> None:
    sent = 0
    with contextlib.closing(Door(server)) as door, ThreadPoolExecutor() as pool:

        def send() -> None:
            nonlocal sent
            with socket.create_connection(("127.0.0.1", port_of(server))) as line, contextlib.suppress(OSError):
                line.sendall(words)
                while sent < 1 << 30:
                    sent += line.send(b"x" * (1 << 16))

        sending = pool.submit(send)
        hear(door, lambda _: sending.done())
    assert sent < 1 << 26


def test_bytes_that_trickle_in_hold_nobody_for_longer_than_silence_does(
    server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte of a greeting that never ends comes in time: the time is for all of it."""
    bytes_heard = 0
    with contextlib.closing(Door(server)) as door, socket.create_connection(("127.0.0.1", port_of(server))) as line:
        monkeypatch.setattr(door_module.time, "monotonic", lambda: float(bytes_heard))
        while not door._callers:
            door.heard(HELLO, 1)
        while door._callers:
            line.sendall(b"x")
            bytes_heard += 1
            door.heard(HELLO, 1)
        assert is_turned_away(line)
    assert bytes_heard == 11  # a second each


def test_what_would_move_a_cursor_or_turn_a_line_is_no_name(
    server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(Door(server)) as door, ThreadPoolExecutor() as pool:
        for host in ("\x1b[2J", "a\nb", "a\rb", "\x9b2J", "\u202eb", "\u2028", "\u200b", "x" * 301):
            node = pool.submit(call_node_0, server, Hello(host), monkeypatch)
            assert hear(door, lambda _, node=node: node.done() and not door._callers) == []  # type: ignore[misc]
        pool.submit(call_node_0, server, Hello("b"), monkeypatch)
        assert hear(door) == [Hello("b")]


# --- proofs ---------------------------------------------------------------------------------------------------------


def test_a_recorded_greeting_is_of_no_use_later(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[bytes] = []
    send = Connection.send

    def record(line: Connection, message: Struct) -> None:
        if line._line.getpeername()[1] == port_of(server):
            recorded.append(encoded(message))
        send(line, message)

    said: list[str] = []
    with contextlib.closing(Door(server, SECRET, said.append)) as door, ThreadPoolExecutor() as pool:
        with monkeypatch.context() as patch:
            patch.setattr(Connection, "send", record)
            node = pool.submit(call_node_0, server, Hello("b"), monkeypatch, SECRET)
            assert hear(door) == [Hello("b")]
            node.result(PATIENCE_S)
        assert len(recorded) == 3
        with socket.create_connection(("127.0.0.1", port_of(server))) as line:
            line.sendall(b"".join(recorded))
            assert hear(door, lambda _: bool(said)) == []
            assert is_turned_away(line)
    assert "was refused" in said[0]


@pytest.mark.parametrize("welcome", ["0" * 64, "the caller's own proof"])
def test_who_does_not_know_the_secret_is_no_node_0(
    server: socket.socket, monkeypatch: pytest.MonkeyPatch, welcome: str
) -> None:
    """It takes whatever proof it gets, and welcomes with what it can make of it."""
    introductions: list[bytes] = []

    def pretend() -> None:
        with contextlib.suppress(OSError):
            while True:
                with server.accept()[0] as line, line.makefile("rb") as words:
                    words.readline()
                    line.sendall(encoded(Challenge("1" * 32)))
                    proof = msgspec.json.decode(words.readline())["proof"]
                    line.sendall(encoded(Welcome(welcome if len(welcome) == 64 else proof)))
                    introductions.append(words.readline())

    monkeypatch.setenv(MEETING_SECRET, SECRET.decode())
    monkeypatch.setattr(nodes, "_CALL_AGAIN_S", 0.01)
    said: list[str] = []
    with ThreadPoolExecutor() as pool:
        pool.submit(pretend)
        try:
            with pytest.raises(NodesError, match=r"another program listens there on 127\.0\.0\.1"):
                call(("127.0.0.1", port_of(server)), Hello("b"), time.monotonic() + 0.5, say=said.append)
        finally:
            server.shutdown(socket.SHUT_RDWR)
    # It is said while there is time to change something, once, and nothing was told.
    assert len(said) == 1
    assert said[0].endswith("; trying again")
    assert set(introductions) == {b""}


@pytest.mark.parametrize("how", ["silence", "http", "closes"])
def test_a_node_that_reaches_something_else_calls_until_node_0_is_there(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "_ANSWER_WITHIN_S", 0.1)
    monkeypatch.setattr(nodes, "_CALL_AGAIN_S", 0.01)
    monkeypatch.delenv(MEETING_SECRET, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as other, ThreadPoolExecutor() as pool:
        port = port_of(other)
        node = pool.submit(call, ("127.0.0.1", port), Hello("b"), time.monotonic() + PATIENCE_S)
        for _ in range(4):
            line = other.accept()[0]
            if how == "http":
                line.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            elif how == "closes":
                line.close()
        other.close()
        with socket.create_server(("127.0.0.1", port)) as server, contextlib.closing(Door(server)) as door:
            assert hear(door) == [Hello("b")]
            node.result(PATIENCE_S).close()


def test_where_nobody_is_the_calls_end_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, calls = 0.0, 0

    def refuse(*_: object, timeout: float) -> None:
        nonlocal now_s, calls
        now_s, calls = now_s + timeout, calls + 1
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(door_module.time, "monotonic", lambda: now_s)
    monkeypatch.setattr(door_module.time, "sleep", lambda _: None)
    with pytest.raises(NodesError, match="nothing answers on port 1 "):
        call(("192.0.2.1", 1), Hello("b"), 12.0)
    # The last call has what is left of the time.
    assert (now_s, calls) == (12.0, 3)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_a_secret_that_is_empty_is_none_and_said(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MEETING_SECRET, text)
    with pytest.raises(ConfigError, match=f"{MEETING_SECRET}: it is empty; give it a value, or unset it"):
        secret_of_nodes()


def test_a_secret_is_the_same_with_the_end_of_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MEETING_SECRET, "tell nobody\n")
    assert secret_of_nodes() == SECRET
    monkeypatch.delenv(MEETING_SECRET)
    assert secret_of_nodes() == b""


def test_a_refusal_says_nothing_that_a_stranger_could_try_secrets_on(server: socket.socket) -> None:
    said: list[str] = []
    address = ("127.0.0.1", port_of(server))
    with contextlib.closing(Door(server, SECRET, said.append)) as door, socket.create_connection(address) as line:
        line.sendall(SENTENCES["wrong proof"])
        hear(door, lambda _: bool(said))
        challenge, refusal = line.makefile("rb").readlines()
    assert set(msgspec.json.decode(challenge)) == {"type", "nonce", "protocol"}
    assert refusal == encoded(Refusal())
