"""Before anything else: a fixed word tells our nodes from strangers, and a proof shows who knows the secret.

    caller -> node 0    Greeting(nonce)
    node 0 -> caller    Challenge(nonce)
    caller -> node 0    Proof(proof)
    node 0 -> caller    Welcome(proof), or Refusal()
    caller -> node 0    what it says about itself

A proof is an HMAC over both nonces, so a recorded one is useless later. The caller proves itself
first, so a stranger that calls learns nothing to test secrets on. Without a secret the key is empty, and a proof
only says that this is the same program.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from typing import Annotated, TypeVar

from msgspec import Meta, Struct
from msgspec.json import Decoder

from batch_inference.core.config import MEETING_SECRET, ConfigError
from batch_inference.measure.connection import Connection

M = TypeVar("M")
# Goes up when nodes of two versions could not understand each other.
_PROTOCOL = 1
_Protocol = Annotated[int, Meta(ge=0, lt=1_000_000)]
_Nonce = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
_Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class Greeting(Struct, tag="batch_inference node"):
    nonce: _Nonce
    protocol: _Protocol = _PROTOCOL


class Challenge(Struct, tag="batch_inference node 0"):
    nonce: _Nonce
    protocol: _Protocol = _PROTOCOL


class Proof(Struct, tag=True):
    proof: _Digest


class Welcome(Struct, tag=True):
    proof: _Digest


class Refusal(Struct, tag=True):
    """The caller has a different secret, or none."""


_GREETING, _CHALLENGE, _PROOF, _ANSWER = (
    Decoder(Greeting),
    Decoder(Challenge),
    Decoder(Proof),
    Decoder(Welcome | Refusal),
)


class RefusedError(Exception):
    """The other is this program, but not one of these nodes; the message begins with what it has."""


def secret_of_nodes() -> bytes:
    """The secret that nodes prove to each other; empty if the user gives none. Raises ConfigError."""
    text = os.environ.get(MEETING_SECRET)
    if text is not None and not text.strip():
        raise ConfigError(f"{MEETING_SECRET}: it is empty; give it a value, or unset it")
    return os.fsencode((text or "").strip())


class Caller:
    """Somebody that knocks at node 0's door, as node 0 sees it."""

    def __init__(self, connection: Connection, secret: bytes, deadline_s: float) -> None:
        self.connection = connection
        self.deadline_s = deadline_s
        self.steps = 0  # of the greeting, done so far
        self._secret = secret
        self._theirs, self._ours = "", secrets.token_hex(16)

    def introduction(self, decoder: Decoder[M]) -> M | None:
        """What it says about itself, once it has proved that it is one of us; None until then. Raises RefusedError, and
        OSError or ValueError for a stranger."""
        if self.steps == 0 and (greeting := self.connection.receive(_GREETING, 0)):
            self._challenge(greeting)
        if self.steps == 1 and (proof := self.connection.receive(_PROOF, 0)):
            self._judge(proof)
        return self.connection.receive(decoder, 0) if self.steps == 2 else None

    def _challenge(self, greeting: Greeting) -> None:
        self._theirs = greeting.nonce
        self.connection.send(Challenge(self._ours))
        _check_protocol(greeting)
        self.steps = 1

    def _judge(self, proof: Proof) -> None:
        nonces = (self._theirs, self._ours)
        if not hmac.compare_digest(proof.proof, _proof_of("caller", self._secret, nonces)):
            self.connection.send(Refusal())
            raise _another_secret()
        self.connection.send(Welcome(_proof_of("node 0", self._secret, nonces)))
        self.connection.trust()
        self.steps = 2


def greet(connection: Connection, secret: bytes, answer_within_s: float) -> None:
    """The caller's part. Raises RefusedError, and OSError or ValueError if the other is not one of our node 0s."""
    nonce = secrets.token_hex(16)
    connection.send(Greeting(nonce))
    challenge = _answer(connection, _CHALLENGE, answer_within_s)
    _check_protocol(challenge)
    nonces = (nonce, challenge.nonce)
    connection.send(Proof(_proof_of("caller", secret, nonces)))
    answer = _answer(connection, _ANSWER, answer_within_s)
    if isinstance(answer, Refusal):
        raise _another_secret()
    if not hmac.compare_digest(answer.proof, _proof_of("node 0", secret, nonces)):
        raise ValueError("a welcome from somebody who does not know the secret")
    connection.trust()


def _answer(connection: Connection, decoder: Decoder[M], within_s: float) -> M:
    answer = connection.receive(decoder, within_s)
    if answer is None:
        raise TimeoutError("no answer")
    return answer


def _check_protocol(theirs: Greeting | Challenge) -> None:
    if theirs.protocol != _PROTOCOL:
        raise RefusedError("another version of these scripts; use the same checkout on every node")


def _another_secret() -> RefusedError:
    return RefusedError(
        f"another secret (--meeting-secret, {MEETING_SECRET}), or one of the two has none; give the same on every node"
    )


def _proof_of(whose: str, secret: bytes, nonces: tuple[str, str]) -> str:
    """`whose`: so that nobody can send back the proof that they received."""
    return hmac.new(secret, " ".join((whose, *nonces)).encode(), hashlib.sha256).hexdigest()
