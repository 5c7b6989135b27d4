"""Signals that end a program in order: open files are saved and closed, and the exit code names the signal."""

from __future__ import annotations

import atexit
import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import NoReturn

from batch_inference.core.streams import say

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def end_in_order(numbers: Iterable[signal.Signals] = (signal.SIGTERM, signal.SIGHUP)) -> None:
    """These signals end this process as an exception would. Ctrl-C does so anyway, with a traceback if it isn't caught.
    Signals that nohup or the parent has set to be ignored stay ignored."""
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    atexit.register(_end_as_decided)


_is_held = False


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """A signal that comes while the block runs takes effect at its end, so that what is changed there is changed as a
    whole. A second one does not wait: what it interrupts may hang. Only the main thread is ever interrupted."""
    global _is_held
    if _is_held or threading.current_thread() is not threading.main_thread():
        yield
        return
    came, is_told = list[int](), False
    before: dict[int, Callable[[int, FrameType | None], object]] = {}

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal is_told
        came.append(number)
        # A hangup is no second request, as below.
        if len(came) > 1 and number != signal.SIGHUP:
            is_told = True
            before[number](number, frame)

    _is_held = True
    try:
        # An exception while one is restored keeps none of the others from it.
        with contextlib.ExitStack() as handlers:
            for number in EXIT_CODES:
                if callable(handler := signal.getsignal(number)):
                    before[number] = handler
                    handlers.callback(signal.signal, number, handler)
                    signal.signal(number, hold)
            yield
    finally:
        _is_held = False
        if came and not is_told:
            before[came[0]](came[0], None)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    # A terminal that is closed sends SIGHUP twice, by its shell and by the kernel, and systemd sends it after SIGTERM:
    # it is not a second request. A handler, because new processes would inherit an ignored signal.
    if signal.getsignal(signal.SIGHUP) is _end:
        signal.signal(signal.SIGHUP, lambda *_: None)
    with contextlib.suppress(RuntimeError):  # it came while something was being printed
        say(f"ended by {signal.Signals(number).name}")
    raise SystemExit(EXIT_CODES[signal.Signals(number)])


def _end_as_decided() -> None:
    """The exit code is decided. Python restores the default handlers while it shuts down: a signal that came then
    would end the program as if its work had been cut short."""
    for number in EXIT_CODES:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_IGN)
