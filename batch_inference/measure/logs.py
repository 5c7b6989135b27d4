"""The log of an engine: who may read it, and what is hidden in it.

vLLM writes into the file itself, and no pipe of ours is between: an engine would wait for a reader that has no time,
and its last words would be lost where the script is killed. What Python prints in the process that holds the engine is
hidden before it is written. vLLM's other processes and its C code are not reached, so nobody else may read the file.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.files import check_regular
from batch_inference.core.secrets import redact_text, remember
from batch_inference.core.streams import Output

_OWNER_ALONE = 0o600


@contextlib.contextmanager
def open_log(path: Path, *, fresh: bool = False) -> Iterator[IO[bytes]]:
    """To go on with it, or empty; for this user alone to read, where its file system can tell people apart. One behind
    a link is gone on with: it may lead to something that is wanted. One that has another name too, as in a backup by
    hard links, is left to that, and begun anew. Raises OSError for what is no regular file."""
    check_regular(path)
    fresh = fresh and not path.is_symlink()
    with contextlib.suppress(FileNotFoundError):
        if fresh and path.stat().st_nlink > 1:
            path.unlink()
    mode = "wb" if fresh else "ab"
    with open(path, mode, opener=partial(os.open, mode=_OWNER_ALONE)) as log:
        # One that is there already may be readable by all, or be another's.
        with contextlib.suppress(OSError):
            os.fchmod(log.fileno(), _OWNER_ALONE)
        yield log


def empty_log(path: Path) -> None:
    with open_log(path, fresh=True):
        pass


class _Hiding(io.TextIOWrapper):
    """Unbuffered, as PYTHONUNBUFFERED has it."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(
            Output(descriptor, "w", closefd=False),
            encoding="utf-8",
            errors="backslashreplace",
            write_through=True,
        )

    def write(self, text: str) -> int:
        super().write(redact_text(text))
        return len(text)


def hide_secrets_in_output() -> None:
    """Of this process, from now on; a child that is forked does the same."""
    sys.stdout, sys.stderr = _Hiding(1), _Hiding(2)


def hide_secrets_of(config: ExperimentConfig) -> None:
    """What the engine is told, and what its variables hold."""
    remember([config.model, *config.engine_args], os.environ)
