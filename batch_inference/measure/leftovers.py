"""A process group, and what it would leave in /dev/shm if it were killed: shared memory and semaphores through
which vLLM's processes talk. Python removes them only after an orderly end."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

_FOLDER = Path("/dev/shm")
# Python's SharedMemory and semaphores, and the shared memory of vLLM's workers on a CPU.
_NAMES = ("psm_", "sem.mp-", "vllm_dist_")
# Inodes, because a semaphore is mapped under a temporary name from before it got its own.
_MAPPED_INODE = re.compile(rf"^\S+ \S+ \S+ \S+ (\d+) +{_FOLDER}/", re.MULTILINE)


def processes_of(group: int) -> Iterator[Path]:
    """The /proc folders of a group's processes, any of which may end at any moment."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(process.name)) == group:
                yield process


def shared_memory_of(group: int) -> set[Path]:
    """The files with such names that the processes of a group have mapped."""
    inodes: set[int] = set()
    for process in processes_of(group):
        # A process that has ended meanwhile maps nothing.
        with contextlib.suppress(OSError):
            inodes.update(map(int, _MAPPED_INODE.findall((process / "maps").read_text())))
    return {file for file in all_shared_memory() if _inode(file) in inodes}


def all_shared_memory() -> set[Path]:
    """The files with such names from all processes."""
    return {file for file in _FOLDER.iterdir() if file.name.startswith(_NAMES)} if _FOLDER.is_dir() else set()


def remove(files: Iterable[Path]) -> None:
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def _inode(file: Path) -> int | None:
    with contextlib.suppress(OSError):
        return file.stat().st_ino
    return None
