"""A module of ours in a process of its own: which of its words is the answer, and what is said where there is none."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from batch_inference.core import child
from batch_inference.core.child import ChildError, ask


def answer_of(end: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Any]:
    """The command, and what `ask` makes of its end."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> Any:
        commands.append(command)
        if isinstance(end, Exception):
            raise end
        if isinstance(end, subprocess.CompletedProcess):
            return end
        return subprocess.CompletedProcess(command, 0, end, "")

    monkeypatch.setattr(child.subprocess, "run", run)
    answer = ask("measure.hub", "look", "{}", timeout_s=60.0)
    return commands[0], answer


def test_the_last_line_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    command, answer = answer_of('INFO: a library greets\n{"gpus": 8}\n', monkeypatch)
    assert answer == {"gpus": 8}
    assert command == [sys.executable, "-P", "-m", "batch_inference.measure.hub", "look", "{}"]


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (subprocess.TimeoutExpired("x", 60), "no answer within 60 s"),
        (subprocess.CompletedProcess("x", 1, "", "Traceback:\n  in x\nOSError: \x1b[2Jgone\n"), "OSError:  [2Jgone"),
        (
            subprocess.CompletedProcess("x", 1, "", "Traceback:\nx.DriverError: no GPU\nAn Error of\nthe driver\n"),
            "x.DriverError: no GPU",
        ),
        (
            subprocess.CompletedProcess(
                "x", 1, "", "KeyError: 'a'\n\nDuring handling of it:\n  in x\nValueError: no a\n"
            ),
            "ValueError: no a",
        ),
        (subprocess.CompletedProcess("x", 1, "", "Killed\n"), "Killed"),
        (subprocess.CompletedProcess("x", 1, "", ""), "no reason is given"),
    ],
)
def test_without_an_answer_the_last_line_is_the_reason(end: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ChildError) as caught:
        answer_of(end, monkeypatch)
    assert str(caught.value) == said


def test_a_process_of_its_own_has_our_environment_and_what_is_asked_for_and_finds_this_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[dict[str, Any]] = []

    def run(command: list[str], **options: Any) -> Any:
        calls.append(options)
        return subprocess.CompletedProcess(command, 0, "1\n", "")

    monkeypatch.setattr(child.subprocess, "run", run)
    monkeypatch.setattr(child, "python_path", lambda: "/ours:/theirs")
    monkeypatch.setattr(child, "os", SimpleNamespace(environ={"A": "1", "B": "1", "PYTHONPATH": "/theirs"}))
    ask("measure.hub", timeout_s=7.5)
    ask("measure.hub", timeout_s=7.5, environment={"B": "2", "PYTHONPATH": "/other"})
    ours = {"input": "", "capture_output": True, "text": True, "errors": "replace", "timeout": 7.5, "check": False}
    assert calls == [
        {**ours, "env": {"A": "1", "B": "1", "PYTHONPATH": "/ours:/theirs"}},
        {**ours, "env": {"A": "1", "B": "2", "PYTHONPATH": "/ours:/theirs"}},
    ]


# --- a stream of lines ----------------------------------------------------------------------------------------------


def stream_of(program: str, monkeypatch: pytest.MonkeyPatch, question: str = "", silence_s: float = 30.0) -> Any:
    monkeypatch.setattr(child, "_command", lambda module: [sys.executable, "-c", program, module])
    return child.ask_for_a_stream("measure.tokenizing", question, silence_s=silence_s)


def test_lines_come_as_they_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    # It waits for its own end: whoever reads has the lines before.
    program = "import sys, time\nprint(sys.stdin.read(), flush=True)\nprint('no JSON\\n[2', end=']', flush=True)\n"
    stream = stream_of(f"{program}print(flush=True)\ntime.sleep(600)", monkeypatch, '{"a": 1}')
    assert [next(stream), next(stream)] == [{"a": 1}, [2]]
    stream.close()


def test_long_lines_are_whole_and_a_last_one_needs_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import json, sys\nfor _ in range(3): print(json.dumps([7] * 10**5))\nprint(0, end='')"
    assert list(stream_of(program, monkeypatch)) == [[7] * 10**5] * 3 + [0]


def test_who_fails_says_why_after_its_lines_and_reads_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import os, sys\nprint(1, flush=True)\nos.close(0)\nprint('x' * 10**6, file=sys.stderr)\nraise ValueError('a')"
    )
    stream = stream_of(program, monkeypatch, question="0" * 10**7)
    assert next(stream) == 1
    with pytest.raises(ChildError, match=r"^ValueError: a$"):
        next(stream)


@pytest.mark.slow
def test_who_is_silent_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("import time\ntime.sleep(600)", "import os, time\nos.close(1)\ntime.sleep(600)"):
        with pytest.raises(ChildError, match=r"^no answer within 1 s$"):
            list(stream_of(program, monkeypatch, silence_s=1.0))
