"""What the supervising script and the engine processes say to each other: typed JSON lines.

    Load(config, replica)                         -> Loaded(engine)
    Prepare(batch_size, seq_len, max_tokens ...)  -> Ready()
    Queue(shares, batch_size ...)                 -> Ready()
    Start(at_s)                                   -> Done(outcome)
    Answer(requests, seq_len, max_tokens ...)     -> Answered(at_once, in_halves)
    Serve(config)        (on nodes other than 0)  -> Served()
    Join(config)         (the ranks of torchrun)  -> Joined()
    Close()                                       the process ends

A command that fails is answered by Failed(reason, usage). A line of replies holds one for each rank.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TypeVar

import msgspec
from msgspec import Struct

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.results import Count, EngineInfo, Requests, Timeline, Work
from batch_inference.measure.hardware import Reading

T = TypeVar("T")


class Outcome(Struct):
    """What one replica or one rank reports about a run; times are by its own machine's clock."""

    start_s: float
    end_s: float
    prompt_tokens: Count
    output_tokens: Count
    requests: Requests
    prefix_cache_hit_tokens: Count
    # For a queue; times from this replica's own start.
    timeline: Timeline | None = None
    miscounted: Count | None = None
    preemptions: Count = 0
    # None if vLLM does not say.
    peak_running: Count | None = None
    peak_kv_use: float | None = None
    flops_per_device: Work | None = None
    memory_bytes_per_device: Work | None = None
    # Set by the supervisor: read from the log; and the time from start to answer by its own clock.
    jit_compilations: Count | None = None
    passed_s: float | None = None
    # Before and after the run, if only the replica itself can see its devices.
    readings: tuple[Reading, Reading] | None = None


# --- commands -----------------------------------------------------------------------------------------------------


class Command(Struct, tag_field="op", tag=str.lower):
    pass


class Join(Command):
    config: ExperimentConfig


class Load(Command):
    config: ExperimentConfig
    replica: int


class Serve(Command):
    config: ExperimentConfig


class Prepare(Command):
    """Make the prompts of the next run; equal `stream`s make equal prompts."""

    batch_size: int
    seq_len: int
    max_tokens: int
    stream: list[int | str]
    max_num_batched_tokens: int | None = None


class Asked(Struct, array_like=True):
    """One request of a queue: token ids, or how many to make; and its output tokens, at most or exactly."""

    prompt: int | list[int]
    max_tokens: int


class Queue(Command):
    """Make the requests of the next run, which wait in a queue on each replica; at most `batch_size` run at once."""

    shares: list[list[Asked]]  # one for each replica
    batch_size: int
    stream: list[int | str]
    ends_itself: bool = False  # the model may end an output earlier
    max_num_batched_tokens: int | None = None


class Start(Command):
    at_s: float | None = None  # time.monotonic; None if the ranks start together


class Answer(Command):
    """Answer greedily; every replica answers the same prompts."""

    requests: int
    seq_len: int
    max_tokens: int
    stream: list[int | str]


class Close(Command):
    pass


AnyCommand = Join | Load | Serve | Prepare | Queue | Start | Answer | Close


# --- replies ------------------------------------------------------------------------------------------------------


class Reply(Struct, tag_field="event", tag=str.lower):
    pass


class Joined(Reply):
    pass


class Loaded(Reply):
    engine: EngineInfo


class Served(Reply):
    pass


class Ready(Reply):
    pass


class Done(Reply):
    outcome: Outcome


class Answered(Reply):
    """Token ids of each answer."""

    at_once: list[list[int]]
    in_halves: list[list[int]]


class Failed(Reply):
    reason: str
    usage: bool  # the user's flags are wrong


AnyReply = Joined | Loaded | Served | Ready | Done | Answered | Failed


# --- on the pipe --------------------------------------------------------------------------------------------------


def encode(message: Struct | Sequence[Struct]) -> bytes:
    """One line of JSON, without the line break."""
    try:
        return msgspec.json.encode(message)
    except UnicodeEncodeError:
        # A path may contain bytes that are not UTF-8: Python's own JSON can carry them.
        return json.dumps(msgspec.to_builtins(message)).encode()


class Lines:
    """Joins lines that arrive in pieces. They may be long: ids of many prompts, times of many requests."""

    def __init__(self) -> None:
        self._begun: list[bytes] = []

    def ended_by(self, piece: bytes) -> list[bytes]:
        *ends, rest = piece.split(b"\n")
        lines = []
        for end in ends:
            lines.append(b"".join([*self._begun, end]))
            self._begun = []
        self._begun.append(rest)
        return lines


def command_from(line: bytes) -> AnyCommand:
    return _decoded(line, _COMMAND)


def reply_from(line: bytes) -> AnyReply:
    return _decoded(line, _REPLY)


def replies_from(line: bytes) -> list[AnyReply]:
    return _decoded(line, _REPLIES)


_COMMAND: msgspec.json.Decoder[AnyCommand] = msgspec.json.Decoder(AnyCommand)
_REPLY: msgspec.json.Decoder[AnyReply] = msgspec.json.Decoder(AnyReply)
_REPLIES: msgspec.json.Decoder[list[AnyReply]] = msgspec.json.Decoder(list[AnyReply])


def _decoded(line: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    try:
        return decoder.decode(line)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        return msgspec.convert(json.loads(line), decoder.type)
