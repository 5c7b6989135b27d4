"""The ranks of a torchrun job: rank 0 leads, the others do what it says. The only file that imports torch.

Words travel through the key-value store that torchrun itself keeps (MASTER_ADDR:MASTER_PORT): it is there before any
engine, works across nodes, and a rank that is missing shows as a time-out and not as a hang in a collective.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from batch_inference.core.config import ConfigError

# Everyone must be there by then; the nodes of a job are started by hand, one after the other.
JOIN_TIMEOUT_S = 60.0
_POLL = timedelta(seconds=10)


@dataclass(frozen=True)
class Place:
    """This process in a torchrun job, by the variables that torchrun sets."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def leads(self) -> bool:
        return self.rank == 0


def find_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """None outside torchrun."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if any(name not in environment for name in names):
        return None
    return Place(*(int(environment[name]) for name in names))


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

    def join(self, facts: dict[str, Any]) -> None:
        """Every rank says what it is about to do; rank 0 compares. Raises ConfigError in every rank where one is
        missing after JOIN_TIMEOUT_S, or says something else than rank 0."""
        self._set(f"facts/{self._place.rank}", {"host": socket.gethostname(), **facts})
        if self._place.leads:
            self._set("verdict", {"problem": self._problem(facts)})
        # The leader waits for the others first.
        problem = self._get("verdict", timeout_s=2 * JOIN_TIMEOUT_S)["problem"]
        if problem:
            raise ConfigError(problem)

    def _problem(self, facts: dict[str, Any]) -> str | None:
        deadline_s = time.monotonic() + JOIN_TIMEOUT_S
        for rank in range(self._place.world_size):
            try:
                theirs = self._get(f"facts/{rank}", timeout_s=max(0.1, deadline_s - time.monotonic()))
            except TimeoutError:
                return f"rank {rank} of {self._place.world_size} did not join within {JOIN_TIMEOUT_S:.0f} s"
            for name, value in facts.items():
                if theirs[name] != value:
                    return f"rank {rank} on {theirs['host']} has {name} {theirs[name]}, rank 0 has {value}"
        return None

    def tell(self, command: dict[str, Any]) -> None:
        """Rank 0: the next command to every other rank."""
        self._number += 1
        self._set(f"command/{self._number}", command)

    def hear(self, timeout_s: float | None = None) -> dict[str, Any]:
        """The other ranks: the next command of rank 0; TimeoutError after `timeout_s`."""
        self._number += 1
        return self._get(f"command/{self._number}", timeout_s)

    def answer(self, reply: dict[str, Any]) -> list[dict[str, Any]]:
        """Every rank's reply to the command, for rank 0; nothing for the others."""
        self._set(f"reply/{self._number}/{self._place.rank}", reply)
        if not self._place.leads:
            return []
        keys = [f"reply/{self._number}/{rank}" for rank in range(self._place.world_size)]
        replies = [self._get(key) for key in keys]
        # A sweep makes thousands of them, and torchrun keeps them in memory.
        for key in [*keys, f"command/{self._number}"]:
            self._store.delete_key(f"batch_inference/{key}")
        return replies

    def start_together(self) -> None:
        """Returns in every rank at the same moment, but for the way from the store to the rank."""
        ready, go = f"ready/{self._number}", f"go/{self._number}"
        count = self._store.add(f"batch_inference/{ready}", 1)
        if self._place.leads:
            while count < self._place.world_size:
                count = self._store.add(f"batch_inference/{ready}", 0)
            self._set(go, {})
        self._get(go)

    def _set(self, key: str, value: dict[str, Any]) -> None:
        self._store.set(f"batch_inference/{key}", json.dumps(value))

    def _get(self, key: str, timeout_s: float | None = None) -> dict[str, Any]:
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
            value: dict[str, Any] = json.loads(self._store.get(name))
            return value
