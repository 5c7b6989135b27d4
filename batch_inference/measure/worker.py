"""The process that holds an engine: it answers the supervising script's commands one after another.

The script starts `python -m batch_inference.measure.worker COMMAND_FD REPLY_FD` and talks to it in the JSON lines of
messages.py over these two file descriptors. Standard output and error are vLLM's, and go to the log.

If the commands end, the supervisor is gone and did not wait: the process kills its whole group at once.

Under torchrun the worker of rank 0 passes every command on to the other ranks, and its reply has one entry per rank.
Their scripts become workers themselves: `follow`.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.measure.cpu_engine import leave
from batch_inference.measure.engine import Engine, serve_node_0
from batch_inference.measure.environment import installed_vllm
from batch_inference.measure.hardware import Reading
from batch_inference.measure.leftovers import remove, shared_memory_of
from batch_inference.measure.logs import hide_secrets_in_output, hide_secrets_of, open_log
from batch_inference.measure.messages import (
    Answer,
    Answered,
    AnyCommand,
    Close,
    Done,
    Failed,
    Join,
    Joined,
    Lines,
    Load,
    Loaded,
    Outcome,
    Prepare,
    Queue,
    Ready,
    Reply,
    Serve,
    Served,
    Start,
    command_from,
    encode,
)  # fmt: skip
from batch_inference.measure.ranks import JOIN_TIMEOUT_S, Ranks
from batch_inference.plan.place import Place, find_place

Commands = queue.Queue[AnyCommand]
READ_LEAD_S = 0.05  # for the workers of other machines to read their devices


class Worker:
    """One engine and, in a torchrun job, the connection to the other ranks."""

    def __init__(self, started_s: float, place: Place | None = None) -> None:
        self._started_s = started_s
        self._place = place
        self._ranks: Ranks | None = None
        self._engine: Engine | None = None
        self._replica = 0
        self._reads_devices = False
        self._prompts: list[dict[str, list[int]]] = []
        self._next: Prepare | Queue | None = None

    def lead(self, commands: Commands, send: Callable[[Sequence[Reply]], None]) -> None:
        """Answer until "close"; as rank 0 of a torchrun job, for all ranks."""
        while True:
            command = commands.get()
            if isinstance(command, Join):
                send([self._reply(command)])
                continue
            if self._ranks:
                self._ranks.tell(command)
            if isinstance(command, Close):
                return
            reply = self._reply(command)
            send(self._ranks.answer(reply) if self._ranks else [reply])

    def follow(self, config: ExperimentConfig) -> None:
        """Do what rank 0 says until it says "close". Raises ConfigError if rank 0 will say what is wrong."""
        self._join(config)
        assert self._ranks is not None
        timeout_s: float | None = None
        while not isinstance(command := self._ranks.hear(timeout_s), Close):
            reply = self._reply(command)
            # If only this rank has failed, rank 0 may wait for it in a collective forever.
            timeout_s = JOIN_TIMEOUT_S if isinstance(reply, Failed) else None
            self._ranks.answer(reply)

    def close(self) -> None:
        if self._engine:
            self._engine.close()

    @property
    def ends_at_once(self) -> bool:
        return self._engine is not None and self._engine.ends_at_once

    def _reply(self, command: AnyCommand) -> Reply:
        try:
            return self._do(command)
        except ConfigError as error:
            return Failed(str(error), usage=True)
        except Exception as error:  # noqa: BLE001 - the supervisor judges what vLLM raises
            traceback.print_exc()
            return Failed(f"{type(error).__name__}: {error}", usage=False)

    def _do(self, command: AnyCommand) -> Reply:
        if isinstance(command, (Join, Load, Serve)):
            hide_secrets_of(command.config)
        match command:
            case Join():
                self._join(command.config)
                return Joined()
            case Load():
                return self._load(command)
            case Serve():
                serve_node_0(command.config)
                return Served()
            case Prepare() | Queue():
                self._prepare(self._loaded, command)
                return Ready()
            case Answer():
                return self._answer(command)
            case Start():
                return Done(self._run(self._loaded, command.at_s))
        raise TypeError(f"{command} is not a command for an engine")

    @property
    def _loaded(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("no engine is loaded")
        return self._engine

    def _join(self, config: ExperimentConfig) -> None:
        assert self._place is not None
        self._ranks = Ranks(self._place)
        self._ranks.join({"vLLM": installed_vllm(), "arguments": config.arguments_hash()})

    def _load(self, command: Load) -> Loaded:
        config = command.config
        # Ranks are numbered replica by replica, as in vLLM.
        self._replica = command.replica if self._place is None else self._place.rank // config.devices_per_replica
        self._reads_devices = config.devices_elsewhere
        self._engine = Engine(config, self._started_s)
        return Loaded(self._engine.info)

    def _prepare(self, engine: Engine, command: Prepare | Queue) -> None:
        self._next, seed_parts = command, [*command.stream, self._replica]
        if isinstance(command, Prepare):
            self._prompts = engine.make_prompts(command.batch_size, command.seq_len, seed_parts)
            engine.limit(None, command.max_num_batched_tokens)
        else:
            self._prompts = engine.make_queue(command.shares[self._replica], seed_parts)
            engine.limit(command.batch_size, command.max_num_batched_tokens)

    def _answer(self, command: Answer) -> Answered:
        prompts = self._loaded.make_prompts(command.requests, command.seq_len, command.stream)
        self._loaded.limit(None, None)
        half = len(prompts) // 2
        at_once, *halves = (
            self._loaded.answer(some, command.max_tokens) for some in (prompts, prompts[:half], prompts[half:])
        )
        return Answered(at_once, [answer for of_half in halves for answer in of_half])

    def _run(self, engine: Engine, at_s: float | None) -> Outcome:
        if not self._reads_devices:
            return self._submit(engine, lambda: _sleep_until(at_s))
        before: list[Reading] = []

        def wait() -> None:
            # As late as possible: what the devices draw before the start is not part of the run.
            _sleep_until(at_s, lead_s=READ_LEAD_S)
            before.append(engine.read_devices())
            if self._ranks:
                self._ranks.start_together()
            _sleep_until(at_s)

        outcome = self._submit(engine, wait)
        outcome.readings = (before[0], engine.read_devices())
        return outcome

    def _submit(self, engine: Engine, wait: Callable[[], None]) -> Outcome:
        match self._next:
            case Prepare(max_tokens=max_tokens):
                return engine.run(self._prompts, max_tokens, wait)
            case Queue(shares=shares, ends_itself=ends_itself):
                return engine.run_queue(self._prompts, shares[self._replica], wait, ends_itself=ends_itself)
        raise RuntimeError("nothing is prepared")


def follow(config: ExperimentConfig, place: Place, log_path: Path) -> int:
    """The whole life of any rank but 0; returns its exit code. vLLM's output goes to the log.

    Raises ConfigError if the ranks do not fit together.
    """
    started_s = time.monotonic()
    # torchrun passes on Ctrl-C, and only rank 0 has something to save.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with _printing_to(log_path):
        worker = Worker(started_s, place)
        try:
            worker.follow(config)
        except TimeoutError:
            print("error: rank 0 did not answer after this rank failed", file=sys.stderr)
            return 1
        worker.close()
    return 0


@contextlib.contextmanager
def _printing_to(log_path: Path) -> Iterator[None]:
    """Standard output and error of this process and its children go to the log, without secrets."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    before = sys.stdout, sys.stderr
    streams = {sys.stdout: os.dup(1), sys.stderr: os.dup(2)}
    with open_log(log_path, fresh=True) as log:
        for stream in streams:
            os.dup2(log.fileno(), stream.fileno())
    hide_secrets_in_output()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream, kept in streams.items():
            stream.flush()
            os.dup2(kept, stream.fileno())


def _sleep_until(at_s: float | None, lead_s: float = 0.0) -> None:
    """None: the ranks start together, at a time that is not known beforehand."""
    if at_s is not None:
        time.sleep(max(0.0, at_s - lead_s - time.monotonic()))


def _read_commands(command_fd: int, commands: Commands) -> None:
    """Pass on commands; when the supervisor is gone, leave no process of this group behind.

    Reads with os.read and never through a file object: on GPUs vLLM forks its EngineCore while this thread waits, and
    the child would wait forever for the lock that a file object holds while it reads (as happened with sys.stdin).
    """
    lines = Lines()
    while chunk := os.read(command_fd, 1 << 16):
        for line in lines.ended_by(chunk):
            commands.put(command_from(line))
    _end_group()


def _end_group() -> None:
    """Kill this process and everything it started."""
    group = os.getpgid(0)
    # Nobody else is left to do it. Mapped memory stays usable until the end.
    remove(shared_memory_of(group))
    os.killpg(group, signal.SIGKILL)


def main() -> None:
    started_s = time.monotonic()
    # Ctrl-C reaches the supervisor, which ends this group in an orderly way.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hide_secrets_in_output()
    command_fd, reply_fd = map(int, sys.argv[1:])
    commands: Commands = queue.Queue()
    threading.Thread(target=_read_commands, args=(command_fd, commands), daemon=True).start()
    for descriptor in (command_fd, reply_fd):
        os.set_inheritable(descriptor, False)
    worker = Worker(started_s, find_place())
    with os.fdopen(reply_fd, "wb") as replies:

        def send(answers: Sequence[Reply]) -> None:
            replies.write(encode(answers) + b"\n")
            replies.flush()

        try:
            worker.lead(commands, send)
        except BrokenPipeError:
            # The supervisor is gone, and this thread noticed first: just ending it would leave the engine behind.
            _end_group()
    worker.close()
    if worker.ends_at_once:
        leave()


if __name__ == "__main__":
    main()
