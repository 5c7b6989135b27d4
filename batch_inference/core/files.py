"""Files as they may be found: what is written is a regular file or not there yet, what is read is a regular file.

A device or a pipe of that name would be waited for, or replaced. A link is followed: what it leads to is the file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

NOT_REGULAR = "it is no regular file"


def open_regular(path: Path, mode: str, **how: Any) -> IO[Any]:
    """As Path.open. Raises OSError for what is there and is no regular file."""
    check_regular(path)
    return path.open(mode, **how)


def read_regular(path: Path) -> bytes:
    """Raises OSError as `open_regular` does."""
    with open_regular(path, "rb") as file:
        content: bytes = file.read()
        return content


def check_regular(path: Path) -> None:
    """Raises OSError for what is there and is no regular file."""
    with contextlib.suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, NOT_REGULAR, str(path))


def check_no_link(path: Path) -> None:
    """Likewise for what is ours alone: nobody has it lead elsewhere."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link", str(path))
    check_regular(path)


def real(path: Path) -> Path:
    """Where links lead to: two names of one file are one file."""
    return Path(os.path.realpath(path))


def write_whole(path: Path, parts: Iterable[str]) -> None:
    """Write beside and rename, so that a reader sees the old file or the new one, never half of one.

    Raises OSError where it cannot be written; what was there is intact then.
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
        # Gone where it was renamed; left where the disk is full, or somebody interrupted.
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raises OSError unless `write_whole` would write it; the file at `path` is not touched."""
    check_regular(path)
    beside = _beside(real(path))
    try:
        beside.write_text("{}")
    finally:
        beside.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    # Per-process name: two writers of one file must not share a temporary one.
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
