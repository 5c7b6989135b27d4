"""Signals that end a program in order."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batch_inference.core import signals
from batch_inference.core.signals import EXIT_CODES, held_back
from conftest import REPOSITORY, with_ctrl_c
from in_process import called

PROGRAM = """
import signal, sys
from batch_inference.core.signals import EXIT_CODES, end_in_order
end_in_order(EXIT_CODES)
try:
    print("ready", flush=True)
    signal.pause()
finally:
    print("closing", flush=True)
    sys.stdin.readline()
    print("closed")
"""


def test_the_analysis_ends_in_order_by_each_of_them(tmp_path: Path) -> None:
    handlers: list[object] = []

    def main() -> int:
        try:
            runpy.run_path(str(REPOSITORY / "analyze_results.py"), run_name="__main__")
        finally:
            handlers.extend(map(signal.getsignal, EXIT_CODES))
        return 0

    assert called(main, ["analyze_results.py", "--help"], tmp_path, os.environ).returncode == 0
    assert set(handlers) == {signals._end}


def started(*before: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*before, sys.executable, "-c", PROGRAM],
        cwd=REPOSITORY, text=True, preexec_fn=with_ctrl_c,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", EXIT_CODES)
def test_each_has_its_exit_code_and_what_is_open_is_closed(number: signal.Signals) -> None:
    process = started()
    process.send_signal(number)
    assert process.communicate("\n", timeout=30) == ("closing\nclosed\n", f"ended by {number.name}\n")
    assert process.returncode == 128 + number


def test_a_hangup_after_another_signal_disturbs_nothing() -> None:
    process = started()
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "closing\n"
    process.send_signal(signal.SIGHUP)
    assert process.communicate("\n", timeout=30) == ("closed\n", "ended by SIGTERM\n")
    assert process.returncode == 143


def test_an_ignored_hangup_stays_ignored() -> None:
    process = started("nohup")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate("\n", timeout=30)
    assert "SIGHUP" not in errors
    assert process.returncode == 143


@pytest.fixture
def arrived() -> Iterator[list[int]]:
    """Signals as they take effect."""
    took_effect: list[int] = []
    before = {number: signal.signal(number, lambda number, _: took_effect.append(number)) for number in EXIT_CODES}
    yield took_effect
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", EXIT_CODES)
def test_one_is_held_back_until_a_change_is_whole(number: signal.Signals, arrived: list[int]) -> None:
    with held_back():
        with held_back():
            signal.raise_signal(number)
        assert not arrived
    assert arrived == [number]
    signal.raise_signal(number)
    assert arrived == [number, number]


def test_within_a_change_a_second_one_does_not_wait_either(arrived: list[int]) -> None:
    with held_back(), held_back():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert arrived == [signal.SIGTERM]


def test_one_that_is_held_back_takes_effect_where_the_change_fails(arrived: list[int]) -> None:
    with contextlib.suppress(OSError), held_back():
        signal.raise_signal(signal.SIGTERM)
        raise OSError
    assert arrived == [signal.SIGTERM]


def test_a_second_one_does_not_wait_for_a_change_that_hangs(arrived: list[int]) -> None:
    with held_back():
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
            assert not arrived
        for count in (1, 2):
            signal.raise_signal(signal.SIGINT)
            assert arrived == [signal.SIGINT] * count
    assert arrived == [signal.SIGINT] * 2


def test_one_that_comes_between_two_restored_handlers_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    restored, real = [], signal.signal
    before = {number: signal.getsignal(number) for number in EXIT_CODES}

    def interrupted(number: int, handler: Any) -> Any:
        done = real(number, handler)
        if handler == before[signal.Signals(number)]:
            restored.append(number)
            if len(restored) == 1:
                raise KeyboardInterrupt
        return done

    real(signal.SIGTERM, lambda *_: None)
    before[signal.SIGTERM] = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signal, "signal", interrupted)
    with pytest.raises(KeyboardInterrupt), held_back():
        pass
    assert {number: signal.getsignal(number) for number in EXIT_CODES} == before
    real(signal.SIGTERM, signal.SIG_DFL)
    assert not signals._is_held


def test_a_thread_has_nothing_to_hold_back() -> None:
    worked = []

    def work() -> None:
        with held_back():
            worked.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert worked == [True]


@pytest.mark.parametrize("number", EXIT_CODES)
def test_one_that_comes_while_python_shuts_down_changes_no_exit_code(number: signal.Signals) -> None:
    # A module is cleared after Python has given the signals back their default.
    program = f"""
import os, sys
from batch_inference.core.signals import end_in_order
end_in_order()
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid()):
        kill(pid, {int(number)})
sys.modules["late"] = Late()
sys.exit(3)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 3
