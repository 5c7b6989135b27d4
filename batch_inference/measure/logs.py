"""An engine's log: who may read it, and what is hidden in it.

vLLM writes into the file directly, without a pipe of ours in between: an engine would wait for a busy reader,
and its last words would be lost if the script is killed. In the process that holds the engine, Python's output is
cleaned of secrets before it is written. vLLM's other processes and its C code are not, so only the user may read it.
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
    """Open it to append, or emptied; readable only by this user, if the file system distinguishes users. A log behind
    a link is appended to, because the target may be wanted. A log with a second name, as in a backup made with
    hard links, is left to that name and begun anew. Raises OSError if it is not a regular file."""
    check_regular(path)
    fresh = fresh and not path.is_symlink()
    with contextlib.suppress(FileNotFoundError):
        if fresh and path.stat().st_nlink > 1:
            path.unlink()
    mode = "wb" if fresh else "ab"
    with open(path, mode, opener=partial(os.open, mode=_OWNER_ALONE)) as log:
        # An existing log may be readable by all, or belong to somebody else.
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
    """For this process from now on; forked children do the same."""
    sys.stdout, sys.stderr = _Hiding(1), _Hiding(2)


def hide_secrets_of(config: ExperimentConfig) -> None:
    """Hide the secrets in what the engine is told and in its variables."""
    remember([config.model, *config.engine_args], os.environ)
