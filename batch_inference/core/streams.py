"""Standard input, output and error in any state: closed, full, read by nobody, or unable to encode our text.

Printing must never cost the work that it reports.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from batch_inference.core.secrets import redact_text

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# Our own symbols, for where they cannot be shown.
_PLAIN = str.maketrans({"±": "+-", "●": "#", "×": "x", "≈": "~", "≤": "<=", "≥": ">=", "…": "..."})
_ERRORS = "batch_inference"


def secure_streams() -> None:
    """Call this first: from then on, printing to standard output and error cannot fail.

    Closed descriptors 0 to 2 are opened on /dev/null. Otherwise the next pipe would get one of these numbers, and a
    child would take it for its own standard input or output.
    """
    closed = set()
    for number in range(3):
        with contextlib.suppress(OSError):
            os.fstat(number)
            continue
        closed.add(number)
        # The lowest free number is taken, and all below are open.
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    codecs.register_error(_ERRORS, _shown_otherwise)
    sys.stdout = _secured(1, sys.stdout, 1 in closed)
    sys.stderr = _secured(2, sys.stderr, 2 in closed)


def say(text: str = "") -> None:
    """A line of progress, on standard error."""
    print(redact_text(text), file=sys.stderr, flush=True)


def say_notes(lines: Iterable[str]) -> None:
    for line in lines:
        say(f"note: {line}")


def show(text: str) -> int:
    """Print what was asked for on standard output; returns the exit code."""
    if problem := _printed(text):
        say(f"error: {problem}")
        return 1
    return 0


def print_kept(text: str, where: Path) -> None:
    """Print on standard output what is in a file or folder too: if this fails, no work is lost."""
    if problem := _printed(text):
        say(f"note: {problem}; what it would have shown is in {where}")


def _printed(text: str) -> str | None:
    """Why this text, or earlier text, is not on standard output. A reader that stops early, like `head`, is not a
    reason."""
    print(redact_text(text), flush=True)
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    problem = raw.problem if isinstance(raw, Output) else None
    return f"standard output cannot be written: {problem.strerror}" if problem else None


class Output(io.FileIO):
    """Accepts everything, and remembers what went wrong."""

    problem: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        while True:
            try:
                written = super().write(data)
            except OSError as error:
                if error.errno != errno.EPIPE:
                    self.problem = error
                return memoryview(data).nbytes
            if written is not None:
                return written
            # Another process that shares it has made it non-blocking.
            select.select([], [self], [])


def _secured(number: int, stream: TextIO | None, is_closed: bool) -> TextIO:
    if stream is not None and not _is_at(number, stream):
        # Somebody has replaced it, and knows why.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)
        return stream
    raw = Output(number, "w", closefd=False)
    if is_closed:
        raw.problem = OSError(errno.EBADF, "it is closed")
    encoding = stream.encoding if stream else "utf-8"
    # Line by line wherever it goes, so that whoever watches a pipe or a file sees it at once.
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors=_ERRORS, line_buffering=True)


def _is_at(number: int, stream: TextIO) -> bool:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return stream.fileno() == number
    return False


def _shown_otherwise(error: UnicodeError) -> tuple[str | bytes, int]:
    """For characters that a stream's encoding lacks: bytes of a file name unchanged, our own symbols in ASCII,
    others by their number."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    with contextlib.suppress(UnicodeEncodeError):
        return text.encode("ascii", "surrogateescape"), error.end
    return text.translate(_PLAIN).encode("ascii", "backslashreplace").decode(), error.end
