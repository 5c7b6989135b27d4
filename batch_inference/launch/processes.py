"""The running processes, each in its own process group, and what signals do to them.

The first INT, TERM or HUP is passed on to all of them once; a second INT or TERM kills their groups, and this process
ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import IO, NoReturn

from batch_inference.core.signals import EXIT_CODES

_PR_SET_PDEATHSIG = 1


class Processes:
    def __init__(self) -> None:
        self._running: list[subprocess.Popen[bytes]] = []
        self._told: set[int] = set()  # those that have received the signal
        self._is_starting = False
        self._stopped_by: signal.Signals | None = None

    def __enter__(self) -> Processes:
        for number in EXIT_CODES:
            # Signals that nohup or a shell's & has set to be ignored stay ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.stop)
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever went wrong, nothing is left behind."""
        self._kill()

    @property
    def are_stopped(self) -> bool:
        """True after the first signal: nothing may be started any more."""
        return self._stopped_by is not None

    def run(self, words: Sequence[str], variables: Mapping[str, str] | None = None) -> int:
        """Start a process, with these variables beside ours, and wait for its exit code, as a shell gives it. Ends
        this process after a signal."""
        process = self.start(words, variables)
        process.wait()
        code = self.ended(process)
        self.end_if_stopped()
        return code

    def start(
        self,
        words: Sequence[str],
        variables: Mapping[str, str] | None = None,
        output: IO[bytes] | None = None,
        *,
        ends_with_us: bool = False,
    ) -> subprocess.Popen[bytes]:
        """`output`: where all its output goes. `ends_with_us`: it gets SIGTERM if this process is killed."""
        self._is_starting = True
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0,
                env={**os.environ, **(variables or {})},
                preexec_fn=_end_with_parent if ends_with_us else None,
            )  # fmt: skip
            self._running.append(process)
        finally:
            self._is_starting = False
        # A signal may have come before it could be passed on.
        self._tell()
        return process

    def end(self, process: subprocess.Popen[bytes], patience_s: float) -> None:
        """Ask it to end, and wait; then kill its group."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                _send(process, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience_s)

    def ended(self, process: subprocess.Popen[bytes]) -> int:
        """For a process that has ended: its exit code, as a shell gives it."""
        self._running.remove(process)
        code = process.returncode
        return 128 - code if code < 0 else code

    def end_if_stopped(self) -> None:
        if self._stopped_by is not None:
            raise SystemExit(EXIT_CODES[self._stopped_by])

    def stop(self, number: int, _frame: FrameType | None = None) -> None:
        """The handler of the signals."""
        if self._stopped_by is not None:
            # A closed terminal sends it twice, by its shell and by the kernel, and systemd sends it after SIGTERM.
            if number == signal.SIGHUP:
                return
            self._kill_and_end(self._stopped_by)
        self._stopped_by = signal.Signals(number)
        if not self._running and not self._is_starting:
            self.end_if_stopped()
        self._tell()

    def _tell(self) -> None:
        for process in self._running:
            if self._stopped_by is not None and process.pid not in self._told:
                self._told.add(process.pid)
                _send(process, self._stopped_by)

    def _kill_and_end(self, first: signal.Signals) -> NoReturn:
        self._kill()
        os._exit(EXIT_CODES[first])

    def _kill(self) -> None:
        for process in self._running:
            _send(process, signal.SIGKILL)


def _end_with_parent() -> None:
    """Runs in a new process, before it becomes another program."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.killpg(process.pid, number)
