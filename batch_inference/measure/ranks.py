"""The ranks of a torchrun job: rank 0 leads, and the others do what it says.

Messages travel through torchrun's own key-value store (MASTER_ADDR:MASTER_PORT): it exists before any
engine, works across nodes, and a missing rank shows as a time-out instead of a hang in a collective.
"""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import timedelta

from batch_inference.core.config import ConfigError
from batch_inference.measure.messages import AnyCommand, AnyReply, Command, Reply, command_from, encode, reply_from
from batch_inference.plan.place import Place

# Everyone must have joined by then; the nodes of a job are started by hand, one after another.
JOIN_TIMEOUT_S = 60.0
_POLL = timedelta(seconds=10)


class Ranks:
    """Commands from rank 0 to all, and a reply from each."""

    def __init__(self, place: Place) -> None:
        from torch.distributed import TCPStore

        self._place = place
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            self._store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=JOIN_TIMEOUT_S))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"--master-addr {address}: port {port} cannot be reached within 60 s") from error
        self._number = 0

    def join(self, about: dict[str, str | None]) -> None:
        """Every rank says what it is about to do, and rank 0 compares. Raises ConfigError in every rank if one is
        missing after JOIN_TIMEOUT_S, or says something different from rank 0."""
        self._set(f"about/{self._place.rank}", json.dumps({"host": socket.gethostname(), **about}))
        if self._place.leads:
            self._set("problem", json.dumps(self._problem(about)))
        # The leader waits for the others first.
        problem: str | None = json.loads(self._get("problem", timeout_s=2 * JOIN_TIMEOUT_S))
        if problem:
            raise ConfigError(problem)

    def _problem(self, about: dict[str, str | None]) -> str | None:
        deadline_s = time.monotonic() + JOIN_TIMEOUT_S
        for rank in range(self._place.world_size):
            try:
                said = self._get(f"about/{rank}", timeout_s=max(0.1, deadline_s - time.monotonic()))
            except TimeoutError:
                return f"rank {rank} of {self._place.world_size} did not join within {JOIN_TIMEOUT_S:.0f} s"
            theirs: dict[str, str | None] = json.loads(said)
            for name, value in about.items():
                if theirs[name] != value:
                    return f"rank {rank} on {theirs['host']} has {name} {theirs[name]}, but rank 0 has {value}"
        return None

    def tell(self, command: Command) -> None:
        """Rank 0: the next command to every other rank."""
        self._number += 1
        self._set(f"command/{self._number}", encode(command))

    def hear(self, timeout_s: float | None = None) -> AnyCommand:
        """Other ranks: the next command of rank 0; TimeoutError after `timeout_s`."""
        self._number += 1
        return command_from(self._get(f"command/{self._number}", timeout_s))

    def answer(self, reply: Reply) -> list[AnyReply]:
        """Every rank's reply to the command, for rank 0; nothing for the others."""
        self._set(f"reply/{self._number}/{self._place.rank}", encode(reply))
        if not self._place.leads:
            return []
        keys = [f"reply/{self._number}/{rank}" for rank in range(self._place.world_size)]
        replies = [reply_from(self._get(key)) for key in keys]
        # A sweep writes thousands of them, and torchrun would keep them in memory.
        for key in [*keys, f"command/{self._number}"]:
            self._store.delete_key(f"batch_inference/{key}")
        return replies

    def start_together(self) -> None:
        """Returns in every rank at the same moment, apart from the delay between the store and the rank."""
        ready, go = f"ready/{self._number}", f"go/{self._number}"
        count = self._store.add(f"batch_inference/{ready}", 1)
        if self._place.leads:
            while count < self._place.world_size:
                count = self._store.add(f"batch_inference/{ready}", 0)
            self._set(go, "")
        self._get(go)

    def _set(self, key: str, value: str | bytes) -> None:
        self._store.set(f"batch_inference/{key}", value if isinstance(value, str) else value.decode())

    def _get(self, key: str, timeout_s: float | None = None) -> bytes:
        """Waits; raises TimeoutError after `timeout_s`."""
        from torch.distributed import DistStoreError

        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        name = f"batch_inference/{key}"
        while True:
            left = _POLL if deadline_s is None else timedelta(seconds=max(0.1, deadline_s - time.monotonic()))
            try:
                self._store.wait([name], min(_POLL, left))
            except DistStoreError:
                if deadline_s is not None and time.monotonic() >= deadline_s:
                    raise TimeoutError(key) from None
                continue
            value: bytes = self._store.get(name)
            return value
