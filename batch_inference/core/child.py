"""A module of ours in a process of its own, asked one question: it prints its answer as lines of JSON, and ends.

For what must leave nothing behind in the script that supervises: torch on a device, a connection to Ray, stand-ins for
parts of vLLM. Python's own library alone, because a plan asks too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batch_inference.core.text import NO_REASON, plain

# As Python prints it, in front of its message.
_ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)(:|$)")


class ChildError(Exception):
    """It gave no answer; the message is the reason in one line."""


def ask(module: str, *words: str, timeout_s: float, environment: Mapping[str, str] | None = None) -> Any:
    """What `python -m batch_inference.MODULE WORDS` prints in its last line. Raises ChildError."""
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
    """What it prints, line by line, when it is given `question` to read; and why that is not all, where it ended early
    or its time was over."""
    try:
        done = _run(module, (), question, timeout_s, environment)
    except subprocess.TimeoutExpired as error:
        return _whole_lines(error.stdout), _no_answer(timeout_s)
    return _whole_lines(done.stdout), _last_line(done.stderr) if done.returncode else None


def python_path() -> str:
    """PYTHONPATH for our own processes: they find this package wherever the user is."""
    ours = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([ours, *filter(None, [os.environ.get("PYTHONPATH")])])


def _run(
    module: str, words: tuple[str, ...], question: str, timeout_s: float, environment: Mapping[str, str] | None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", f"batch_inference.{module}", *words],
        input=question,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout_s,
        env={**os.environ, **(environment or {}), "PYTHONPATH": python_path()},
        check=False,
    )


def _no_answer(timeout_s: float) -> str:
    return f"no answer within {timeout_s:.0f} s"


def _last_line(text: str) -> str:
    """The error that it ended with, without what its message says in further lines; else the last line."""
    lines = text.strip().splitlines() or [NO_REASON]
    return plain(next((line for line in reversed(lines) if _ERROR.match(line)), lines[-1]))


def _whole_lines(output: str | bytes | None) -> list[Any]:
    """Without one that it was still writing; of a process that ran out of time they come as bytes."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    values = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            values.append(json.loads(line))
    return values
