"""Standard streams and signals without a process: what is kept in mind of a write that failed, and what is said."""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batch_inference.core import signals, streams
from batch_inference.core.parser import Parser
from batch_inference.core.signals import EXIT_CODES, end_in_order
from batch_inference.core.streams import Output, print_kept, say, show


def output_to(path: Path, monkeypatch: pytest.MonkeyPatch) -> Output:
    """What standard output writes to from now on: set in the test itself, as pytest sets its own before it."""
    made = Output(os.open(path, os.O_CREAT | os.O_RDWR), "w")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(made)))
    return made


def test_what_is_printed_is_there_at_once_and_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = output_to(tmp_path / "out", monkeypatch)
    assert show("a https://me:hush@h/") == 0
    assert (tmp_path / "out").read_text() == "a https://<login>@h/\n"
    print_kept("b https://me:hush@h/", Path("there"))
    assert (tmp_path / "out").read_text() == "a https://<login>@h/\nb https://<login>@h/\n"
    say("c https://me:hush@h/")
    say()
    assert capsys.readouterr().err == "c https://<login>@h/\n\n"
    assert output.problem is None


def test_what_could_not_be_printed_is_said_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output_to(tmp_path / "out", monkeypatch).problem = OSError(errno.ENOSPC, "No space left on device")
    assert show("a") == 1
    print_kept("b", Path("some/where"))
    assert capsys.readouterr().err == (
        "error: standard output cannot be written: No space left on device\n"
        "note: standard output cannot be written: No space left on device; what it would have shown is in some/where\n"
    )


@pytest.mark.parametrize(("number", "kept"), [(errno.EPIPE, False), (errno.ENOSPC, True), (errno.EBADF, True)])
def test_that_nobody_reads_is_no_problem_and_all_else_is(number: int, kept: bool) -> None:
    """A descriptor that always fails."""
    reading, writing = os.pipe()
    made = Output(writing, "w")
    os.close(reading)
    if number != errno.EPIPE:
        made.close()
        made = Output(os.open("/dev/full", os.O_WRONLY), "w")
        if number == errno.EBADF:
            os.close(made.fileno())
    assert made.write(b"abc") == 3
    assert made.write(memoryview(b"abcd").cast("B", (2, 2))) == 4
    assert (made.problem and made.problem.errno) == (number if kept else None)
    if number != errno.EBADF:
        made.close()


def test_what_does_not_block_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    made, waited = Output(writing, "w"), []

    def wait(*given: Any) -> None:
        waited.append(given)
        os.read(reading, 1 << 20)

    monkeypatch.setattr(select, "select", wait)
    data = b"x" * 65536
    assert [made.write(data), made.write(data)] == [65536, 65536]
    assert waited == [([], [made], [])]
    made.close()
    os.close(reading)


def test_a_stream_at_its_number_is_replaced_and_another_is_kept(tmp_path: Path) -> None:
    file = (tmp_path / "x").open("w", encoding="latin-1")
    secured: Any = streams._secured(file.fileno(), file, False)
    raw = secured.buffer.raw
    assert (type(raw), raw.fileno(), raw.closefd, raw.problem) == (Output, file.fileno(), False, None)
    assert (secured.encoding, secured.errors, secured.line_buffering) == ("latin-1", "batch_inference", True)
    closed: Any = streams._secured(file.fileno(), None, True)
    assert (closed.encoding, str(closed.buffer.raw.problem)) == ("utf-8", f"[Errno {errno.EBADF}] it is closed")
    other = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert streams._secured(file.fileno(), other, True) is other
    assert other.errors == "batch_inference"
    text = io.StringIO()
    assert streams._secured(file.fileno(), text, False) is text
    assert streams._secured(file.fileno() + 1, file, False) is file
    file.close()


def test_signs_of_ours_have_others_in_ascii() -> None:
    error = UnicodeEncodeError("ascii", "_±●×≈≤≥…é_", 1, 9, "x")
    assert streams._shown_otherwise(error) == ("+-#x~<=>=...\\xe9", 9)
    with pytest.raises(UnicodeDecodeError):
        streams._shown_otherwise(UnicodeDecodeError("ascii", b"\xff", 0, 1, "x"))


# --- signals ------------------------------------------------------------------------------------------------------


class Handlers(dict[int, Any]):
    """Of a process: what is set by signal.signal() and read by signal.getsignal()."""

    def set(self, number: int, handler: Callable[..., Any]) -> None:
        self[number] = handler


@pytest.fixture
def handlers(monkeypatch: pytest.MonkeyPatch) -> Handlers:
    made = Handlers({signal.SIGINT: "python's", signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL})
    monkeypatch.setattr(signal, "signal", made.set)
    monkeypatch.setattr(signal, "getsignal", made.__getitem__)
    return made


def test_the_exit_codes_are_those_of_a_shell() -> None:
    assert EXIT_CODES == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def test_ctrl_c_is_left_to_python_unless_asked_for_and_what_is_ignored_stays_so(handlers: Handlers) -> None:
    end_in_order()
    end = signals._end
    assert handlers == {signal.SIGINT: "python's", signal.SIGTERM: end, signal.SIGHUP: end}
    end_in_order(EXIT_CODES)
    assert set(handlers.values()) == {end}
    handlers |= {signal.SIGHUP: signal.SIG_IGN, signal.SIGTERM: signal.SIG_DFL}
    end_in_order()
    assert handlers == {signal.SIGINT: end, signal.SIGTERM: end, signal.SIGHUP: signal.SIG_IGN}


@pytest.mark.parametrize("number", EXIT_CODES)
def test_the_end_is_said_and_a_second_hangup_is_no_second_wish(
    number: signal.Signals, handlers: Handlers, capsys: pytest.CaptureFixture[str]
) -> None:
    end_in_order(EXIT_CODES)
    with pytest.raises(SystemExit) as ended:
        signals._end(number, None)
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err == f"ended by {number.name}\n"
    assert handlers[signal.SIGHUP](signal.SIGHUP, None) is None
    assert (handlers[signal.SIGINT], handlers[signal.SIGTERM]) == (signals._end, signals._end)


def test_a_hangup_that_is_handled_by_others_stays_theirs(handlers: Handlers, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: str) -> None:
        raise RuntimeError("reentrant call")

    monkeypatch.setattr(signals, "say", interrupted)
    with pytest.raises(SystemExit) as ended:
        signals._end(signal.SIGTERM, None)
    assert (ended.value.code, handlers[signal.SIGHUP]) == (143, signal.SIG_DFL)


# --- help ---------------------------------------------------------------------------------------------------------


def test_help_that_cannot_be_shown_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    from batch_inference.core.errors import CleanError

    parser, shown = Parser(CleanError, usage="u", description="d\n  d", epilog="e\n  e"), []
    parser.add_argument("--long", help="h")

    def show_as(code: int) -> Callable[[str], int]:
        return lambda text: shown.append(text) or code

    for code in (0, 1):
        monkeypatch.setattr("batch_inference.core.parser.show", show_as(code))
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(["--help"])
        assert ended.value.code == code
    text = "usage: u\n\nd\n  d\n\noptions:\n  -h, --help   show this help message and exit\n  --long LONG  h\n\ne\n  e"
    assert shown == [text, text]
    file = io.StringIO()
    parser.print_help(file)
    assert file.getvalue() == text + "\n"
    with pytest.raises(CleanError, match=r"^unrecognized arguments: --lon x$"):
        parser.parse_args(["--lon", "x"])
