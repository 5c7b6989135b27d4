"""Signals that end a program in order: what is open is closed and saved, and the exit code says which it was."""

from __future__ import annotations

import atexit
import contextlib
import signal
from collections.abc import Iterable
from types import FrameType
from typing import NoReturn

from batch_inference.core.streams import say

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def end_in_order(numbers: Iterable[signal.Signals] = (signal.SIGTERM, signal.SIGHUP)) -> None:
    """These end this process as an exception would; Ctrl-C does so anyway, with a traceback where nobody catches it.
    What nohup, or whoever started this, has it ignore stays ignored."""
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    atexit.register(_end_as_decided)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    # A terminal that is closed sends SIGHUP twice, by its shell and by the kernel, and systemd sends it after SIGTERM:
    # it is no second wish. A handler, because what is ignored would be in new processes too.
    if signal.getsignal(signal.SIGHUP) is _end:
        signal.signal(signal.SIGHUP, lambda *_: None)
    with contextlib.suppress(RuntimeError):  # it came while something was being printed
        say(f"ended by {signal.Signals(number).name}")
    raise SystemExit(EXIT_CODES[signal.Signals(number)])


def _end_as_decided() -> None:
    """The exit code is there. Python gives the signals back their default while it shuts down: one that came then
    would end the program as if its work had been cut off."""
    for number in EXIT_CODES:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_IGN)
