"""Run one of our modules in its own process to answer one question: it prints lines of JSON and ends.

For what must leave no trace in the supervising script: torch on a device, a connection to Ray, stand-ins for
parts of vLLM. Needs only Python's own library, because plans use it too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from batch_inference.core.text import NO_REASON, plain

# As Python prints it, in front of its message.
_ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)(:|$)")


class ChildError(Exception):
    """It gave no answer; the message gives the reason in one line."""


def ask(module: str, *words: str, timeout_s: float, environment: Mapping[str, str] | None = None) -> Any:
    """The last line that `python -m batch_inference.MODULE WORDS` prints, as JSON. Raises ChildError."""
    try:
        done = _run(module, words, "", timeout_s, environment)
    except subprocess.TimeoutExpired:
        raise ChildError(_no_answer(timeout_s)) from None
    if done.returncode:
        raise ChildError(_last_line(done.stderr))
    return json.loads(done.stdout.splitlines()[-1])


def ask_for_lines(
    module: str, question: str, *, timeout_s: float, environment: Mapping[str, str] | None = None
) -> tuple[list[Any], str | None]:
    """What it prints, line by line, given `question` to read; and why that is not everything if it ended early
    or ran out of time."""
    try:
        done = _run(module, (), question, timeout_s, environment)
    except subprocess.TimeoutExpired as error:
        return _whole_lines(error.stdout), _no_answer(timeout_s)
    return _whole_lines(done.stdout), _last_line(done.stderr) if done.returncode else None


def ask_for_a_stream(module: str, question: str, *, silence_s: float) -> Generator[Any]:
    """Each of its lines as soon as it comes. Raises ChildError if it fails or is silent for `silence_s`."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            _command(module), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=_environment()
        )
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(question.encode())
            for line in _lines_within(process.stdout, silence_s):
                with contextlib.suppress(ValueError):
                    yield json.loads(line)
            if process.wait(silence_s):
                raise ChildError(_last_line(_end_of(errors)))
        except subprocess.TimeoutExpired:
            raise ChildError(_no_answer(silence_s)) from None
        finally:
            process.kill()
            process.wait()


def _lines_within(pipe: IO[bytes], silence_s: float) -> Iterator[bytes]:
    """Raises TimeoutExpired."""
    rest = b""
    with selectors.DefaultSelector() as selector, pipe:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if not selector.select(silence_s):
                raise subprocess.TimeoutExpired("", silence_s)
            read = os.read(pipe.fileno(), 1 << 20)
            if not read:
                yield rest
                return
            *lines, rest = (rest + read).split(b"\n")
            yield from lines


def _end_of(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 16)))
    return file.read().decode(errors="replace")


def python_path() -> str:
    """PYTHONPATH for our own processes, so that they find this package in any folder."""
    ours = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([ours, *filter(None, [os.environ.get("PYTHONPATH")])])


def _run(
    module: str, words: tuple[str, ...], question: str, timeout_s: float, environment: Mapping[str, str] | None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*_command(module), *words],
        input=question,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout_s,
        env=_environment(environment),
        check=False,
    )


def _command(module: str) -> list[str]:
    return [sys.executable, "-P", "-m", f"batch_inference.{module}"]


def _environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, **(more or {}), "PYTHONPATH": python_path()}


def _no_answer(timeout_s: float) -> str:
    return f"no answer within {timeout_s:.0f} s"


def _last_line(text: str) -> str:
    """The error that it ended with, only its first line; otherwise the last line."""
    lines = text.strip().splitlines() or [NO_REASON]
    return plain(next((line for line in reversed(lines) if _ERROR.match(line)), lines[-1]))


def _whole_lines(output: str | bytes | None) -> list[Any]:
    """Without a line that is still unfinished; from a process that ran out of time they come as bytes."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    values = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            values.append(json.loads(line))
    return values
