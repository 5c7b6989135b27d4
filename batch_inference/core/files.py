"""Careful reading and writing: what is written is a regular file or not there yet, what is read is a regular file.

With a device or a pipe of that name, a program would wait forever or replace it. Links are followed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

NOT_REGULAR = "it is not a regular file"


def open_regular(path: Path, mode: str, **how: Any) -> IO[Any]:
    """Like Path.open. Raises OSError if something is there that is not a regular file."""
    check_regular(path)
    return path.open(mode, **how)


def read_regular(path: Path) -> bytes:
    """Raises OSError as `open_regular` does."""
    with open_regular(path, "rb") as file:
        content: bytes = file.read()
        return content


def check_regular(path: Path) -> None:
    """Raises OSError if something is there that is not a regular file."""
    with contextlib.suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, NOT_REGULAR, str(path))


def check_no_link(path: Path) -> None:
    """Likewise for files that are only ours, which nobody has a reason to link elsewhere."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link", str(path))
    check_regular(path)


def real(path: Path) -> Path:
    """Where links lead, so that two names of one file are the same."""
    return Path(os.path.realpath(path))


def write_whole(path: Path, parts: Iterable[str]) -> None:
    """Write a file beside it and rename that, so that a reader sees the old file or the new one, never half of one.

    Raises OSError if it cannot be written; what was there is then intact.
    """
    check_regular(path)
    target = real(path)
    beside = _beside(target)
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    finally:
        # Already gone if it was renamed; still there after a full disk or an interruption.
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raises OSError unless `write_whole` could write it; the file at `path` is not touched."""
    check_regular(path)
    beside = _beside(real(path))
    try:
        beside.write_text("{}")
    finally:
        beside.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    # One name per process: two writers of one file must not share a temporary one.
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
