"""The process that holds an engine: it answers the commands of the supervising script, one after the other.

The script starts `python -m batch_inference.measure.worker COMMAND_FD REPLY_FD` and talks to it in JSON lines over
these two file descriptors. Standard output and error are vLLM's, and go to the log.

    {"op": "load", "config": {...}, "replica": 0}                          -> [{"event": "loaded", "engine": {...}}]
    {"op": "prepare", "batch_size": 4, "seq_len": 512, "max_tokens": 128, "stream": [...]}  -> [{"event": "ready"}]
    {"op": "start", "at_s": 12.5}   (time.monotonic; ranks start together)  -> [{"event": "done", "outcome": {...}}]
    {"op": "serve", "config": {...}}                 (on nodes other than 0) -> [{"event": "served"}]
    {"op": "close"}                                                        -> the process ends
A command that fails is answered {"event": "failed", "reason": ..., "usage": true where the user's flags are wrong}.
End of the commands means that the supervisor is gone, and did not wait: the process ends its whole group at once.

Under torchrun the worker of rank 0 hands every command on to the other ranks, and its reply has one entry per rank.
Their scripts become workers themselves: `follow`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.measure.engine import Engine, serve_node_0
from batch_inference.measure.environment import installed_vllm
from batch_inference.measure.hardware import Reading
from batch_inference.measure.leftovers import remove, shared_memory_of
from batch_inference.measure.ranks import JOIN_TIMEOUT_S, Place, Ranks, find_place

Commands = queue.Queue[dict[str, Any]]
READ_LEAD_S = 0.05  # for the workers of other machines to read their devices


class Worker:
    """One engine, and in a torchrun job the way to the other ranks."""

    def __init__(self, started_s: float, place: Place | None = None) -> None:
        self._started_s = started_s
        self._place = place
        self._ranks: Ranks | None = None
        self._engine: Engine | None = None
        self._replica = 0
        self._reads_devices = False
        self._prompts: list[dict[str, list[int]]] = []
        self._max_tokens = 0

    def lead(self, commands: Commands, send: Callable[[list[dict[str, Any]]], None]) -> None:
        """Answer until "close"; as rank 0 of a torchrun job, for all ranks."""
        while True:
            command = commands.get()
            if command["op"] == "join":
                send([self._reply(command)])
                continue
            if self._ranks:
                self._ranks.tell(command)
            if command["op"] == "close":
                return
            reply = self._reply(command)
            send(self._ranks.answer(reply) if self._ranks else [reply])

    def follow(self, config: ExperimentConfig) -> None:
        """Do what rank 0 says until it says "close". Raises ConfigError where rank 0 will say what is wrong."""
        self._join(config)
        assert self._ranks is not None
        timeout_s: float | None = None
        while (command := self._ranks.hear(timeout_s))["op"] != "close":
            reply = self._reply(command)
            # Where this rank alone has failed, rank 0 may wait for it in a collective for ever.
            timeout_s = JOIN_TIMEOUT_S if reply["event"] == "failed" else None
            self._ranks.answer(reply)

    def close(self) -> None:
        if self._engine:
            self._engine.close()

    def _reply(self, command: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._do(command)
        except ConfigError as error:
            return {"event": "failed", "reason": str(error), "usage": True}
        except Exception as error:  # noqa: BLE001 - whatever vLLM raises is the supervisor's to judge
            traceback.print_exc()
            return {"event": "failed", "reason": f"{type(error).__name__}: {error}", "usage": False}

    def _do(self, command: dict[str, Any]) -> dict[str, Any]:
        if command["op"] == "join":
            self._join(_config_from(command["config"]))
            return {"event": "joined"}
        if command["op"] == "load":
            return self._load(_config_from(command["config"]), command["replica"])
        if command["op"] == "serve":
            serve_node_0(_config_from(command["config"]))
            return {"event": "served"}
        if self._engine is None:
            raise ConfigError(f"{command['op']} before load")
        if command["op"] == "prepare":
            self._max_tokens = command["max_tokens"]
            seed_parts = [*command["stream"], self._replica]
            self._prompts = self._engine.make_prompts(command["batch_size"], command["seq_len"], seed_parts)
            return {"event": "ready"}
        return {"event": "done", "outcome": self._run(self._engine, command)}

    def _join(self, config: ExperimentConfig) -> None:
        assert self._place is not None
        self._ranks = Ranks(self._place)
        self._ranks.join({"vLLM": installed_vllm(), "arguments": config.arguments_hash()})

    def _load(self, config: ExperimentConfig, replica: int) -> dict[str, Any]:
        # Ranks count replica by replica, as vLLM does.
        self._replica = replica if self._place is None else self._place.rank // config.devices_per_replica
        self._reads_devices = config.devices_elsewhere
        self._engine = Engine(config, self._started_s)
        return {"event": "loaded", "engine": self._engine.description}

    def _run(self, engine: Engine, command: dict[str, Any]) -> dict[str, Any]:
        if not self._reads_devices:
            return engine.run(self._prompts, self._max_tokens, lambda: _sleep_until(command["at_s"]))
        before: list[Reading] = []

        def wait() -> None:
            # As late as can be: what the devices draw until the start is no part of the run.
            if self._ranks:
                before.append(engine.read_devices())
                self._ranks.start_together()
            else:
                _sleep_until(command["at_s"] - READ_LEAD_S)
                before.append(engine.read_devices())
                _sleep_until(command["at_s"])

        outcome = engine.run(self._prompts, self._max_tokens, wait)
        return {**outcome, "readings": [*before, engine.read_devices()]}


def follow(config: ExperimentConfig, place: Place, log_path: Path) -> int:
    """The whole life of a rank other than 0; its exit code. What vLLM prints goes to the log.

    Raises ConfigError where the ranks do not fit together.
    """
    started_s = time.monotonic()
    # torchrun passes on Ctrl-C, and rank 0 is the one that has something to save.
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
    """Standard output and error of this process and its children go to the log."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    streams = {sys.stdout: os.dup(1), sys.stderr: os.dup(2)}
    with log_path.open("wb") as log:
        for stream in streams:
            os.dup2(log.fileno(), stream.fileno())
    try:
        yield
    finally:
        for stream, kept in streams.items():
            stream.flush()
            os.dup2(kept, stream.fileno())


def _sleep_until(at_s: float) -> None:
    time.sleep(max(0.0, at_s - time.monotonic()))


def _config_from(values: dict[str, Any]) -> ExperimentConfig:
    """JSON knows no tuples: its lists become tuples again."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return ExperimentConfig(**fields)


def _read_commands(command_fd: int, commands: Commands) -> None:
    """Hand on commands; when the supervisor is gone, leave no process of this group behind.

    Reads with os.read and never through a file object: on GPUs vLLM forks its EngineCore while this thread waits, and
    the child would wait for ever for the lock that a file object holds while it reads (so it was with sys.stdin).
    """
    buffer = b""
    while chunk := os.read(command_fd, 1 << 16):
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            commands.put(json.loads(line))
    _end_group()


def _end_group() -> None:
    """End this process and all that it has started."""
    group = os.getpgid(0)
    # Nobody else is left to do it. What is mapped stays usable until the end.
    remove(shared_memory_of(group))
    os.killpg(group, signal.SIGKILL)


def main() -> None:
    started_s = time.monotonic()
    # Ctrl-C reaches the supervisor, which ends this group in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    command_fd, reply_fd = map(int, sys.argv[1:])
    commands: Commands = queue.Queue()
    threading.Thread(target=_read_commands, args=(command_fd, commands), daemon=True).start()
    for descriptor in (command_fd, reply_fd):
        os.set_inheritable(descriptor, False)
    worker = Worker(started_s, find_place())
    with os.fdopen(reply_fd, "w", encoding="utf-8") as replies:

        def send(answers: list[dict[str, Any]]) -> None:
            replies.write(json.dumps(answers) + "\n")
            replies.flush()

        try:
            worker.lead(commands, send)
        except BrokenPipeError:
            # The supervisor is gone, and this thread was the first to see it: its end would leave the engine behind.
            _end_group()
    worker.close()


if __name__ == "__main__":
    main()
