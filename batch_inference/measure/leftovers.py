"""A process group and what it would leave in /dev/shm if it were ended at once: shared memory and semaphores through
which the processes of vLLM talk. Python removes them only at an orderly end."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

_FOLDER = Path("/dev/shm")
# Python's SharedMemory and semaphores, and the shared memory of vLLM's workers on a CPU.
_NAMES = ("psm_", "sem.mp-", "vllm_dist_")
# Inodes, because a semaphore is mapped under the name that it had before it got its own.
_MAPPED_INODE = re.compile(rf"^\S+ \S+ \S+ \S+ (\d+) +{_FOLDER}/", re.MULTILINE)


def processes_of(group: int) -> Iterator[Path]:
    """The folders in /proc of the processes of a group; any of them may end at any moment."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(process.name)) == group:
                yield process


def shared_memory_of(group: int) -> set[Path]:
    """The files of such names that the processes of a group have mapped."""
    inodes: set[int] = set()
    for process in processes_of(group):
        # A process that ends meanwhile has nothing mapped.
        with contextlib.suppress(OSError):
            inodes.update(map(int, _MAPPED_INODE.findall((process / "maps").read_text())))
    return {file for file in all_shared_memory() if _inode(file) in inodes}


def all_shared_memory() -> set[Path]:
    """The files of such names of all processes."""
    return {file for file in _FOLDER.iterdir() if file.name.startswith(_NAMES)} if _FOLDER.is_dir() else set()


def remove(files: Iterable[Path]) -> None:
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def _inode(file: Path) -> int | None:
    with contextlib.suppress(OSError):
        return file.stat().st_ino
    return None
