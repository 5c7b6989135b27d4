"""What a process group that is ended at once would leave in /dev/shm: shared memory and semaphores of Python's
multiprocessing, through which vLLM's processes talk. Python removes them only at an orderly end."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

_MAPPED = re.compile(r"/dev/shm/(?:psm_|sem\.mp-)\S+")


def shared_memory_of(group: int) -> set[Path]:
    """The files of /dev/shm that the processes of a group have mapped."""
    found: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        # A process that ends meanwhile has nothing mapped.
        with contextlib.suppress(OSError):
            if os.getpgid(int(process.name)) == group:
                found.update(_MAPPED.findall((process / "maps").read_text()))
    return set(map(Path, found))


def remove(files: Iterable[Path]) -> None:
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
