"""A module of ours in a process of its own, asked one question: it prints a line of JSON, and ends.

For what must leave nothing behind in the script that supervises: torch on a device, a connection to Ray.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from batch_inference.core.text import NO_REASON, plain
from batch_inference.measure.environment import python_path


class ChildError(Exception):
    """It gave no answer; the message is the reason in one line."""


def ask(module: str, *words: str, timeout_s: float, environment: Mapping[str, str] | None = None) -> Any:
    """What `python -m batch_inference.MODULE WORDS` prints in its last line. Raises ChildError."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", f"batch_inference.{module}", *words],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**os.environ, **(environment or {}), "PYTHONPATH": python_path()},
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise ChildError(f"no answer within {timeout_s:.0f} s") from None
    except subprocess.CalledProcessError as error:
        raise ChildError(plain((error.stderr.strip().splitlines() or [NO_REASON])[-1])) from error
    return json.loads(done.stdout.splitlines()[-1])
