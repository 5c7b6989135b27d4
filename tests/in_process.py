"""A program of ours called in this process as if it had been started: without an interpreter's start and its imports,
which take longer than most of what the tests look at."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO
from unittest import mock

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def called(
    main: Callable[[], int], command: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """What a program with this command line did in that folder; `main` gives its exit code."""
    path = [*filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *sys.path]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        with (
            contextlib.chdir(folder),
            mock.patch.dict(os.environ, environment, clear=True),
            mock.patch.object(sys, "argv", list(command)),
            mock.patch.object(sys, "path", path),
            _handlers_of_a_start(),
            _goes_to("stdout", output),
            _goes_to("stderr", errors),
        ):
            code = _exit_code(main)
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(list(command), code, output.read(), errors.read())


@contextlib.contextmanager
def _goes_to(name: str, file: IO[str]) -> Iterator[None]:
    """Standard output or error of this process, and of those that it starts."""
    descriptor = {"stdout": 1, "stderr": 2}[name]
    kept = os.dup(descriptor)
    os.dup2(file.fileno(), descriptor)
    try:
        with (
            open(descriptor, "w", buffering=1, closefd=False, errors="surrogateescape") as stream,
            mock.patch.object(sys, name, stream),
        ):
            yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)


@contextlib.contextmanager
def _handlers_of_a_start() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in HANDLED}
    for number in HANDLED:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _exit_code(main: Callable[[], int]) -> int:
    """As the interpreter makes it. Any other exception would be a traceback, and fails the test."""
    try:
        return main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
