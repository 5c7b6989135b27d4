"""One sweep, one fault, and what is left: on the stub vLLM, whose engine is a process tree of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from batch_inference.core.result_file import load_result
from batch_inference.measure.leftovers import all_shared_memory, shared_memory_of
from conftest import REPOSITORY, TINY, stub_environment, with_ctrl_c

GRID = {(batch_size, seq_len) for batch_size in (1, 2, 3) for seq_len in (8, 16)}
SWEEP = ("--batch-sizes", "1,2,3", "--seq-lens", "8,16", "--max-tokens", "4", "--num-runs", "2", "--warmup-runs", "2")
# What the supervisor may take to end everything, and the kernel to forget it.
ORPHANS_WITHIN_S = 15.0
# For a moment of a sweep, and for its end. A real engine needs a minute for its start alone, and longer on a machine
# with other work.
STUB_PATIENCE_S, REAL_PATIENCE_S = (30.0, 90.0), (240.0, 240.0)
_DONE = re.compile(r"\[\d+/\d\] (\d+) x (\d+):")


@dataclass
class Outcome:
    """What a fault did: one row of the table at the end."""

    fault: str
    exit_code: int | None = None
    lost_points: int = 0
    orphans: int = 0  # processes, and shared memory
    problems: list[str] = field(default_factory=list)


OUTCOMES: list[Outcome] = []


class Sweep:
    """The experiment script at work; every process that it starts can be told by a variable of its own."""

    def __init__(self, folder: Path, *flags: str, stub: bool = True, redirection: str = "", **variables: str) -> None:
        """`redirection`: of its streams, as in bash."""
        self.move_to(folder)
        self._shared_memory_before = all_shared_memory()
        self.moment_within_s, self.end_within_s = STUB_PATIENCE_S if stub else REAL_PATIENCE_S
        self._groups: set[int] = set()
        self._is_stub = stub
        self._mark = f"FAULT_TEST={uuid.uuid4().hex}"
        name, value = self._mark.split("=")
        variables = {"PYTHON": sys.executable, **variables}
        environment = stub_environment(**variables) if stub else {**os.environ, **variables}
        with self._errors.open("ab") as errors:
            self.process = subprocess.Popen(
                ["bash", "-c", f'exec "$@" {redirection}', "-", *self.command(*flags)], cwd=folder,
                env={**environment, name: value}, preexec_fn=with_ctrl_c, start_new_session=True,
                stdout=subprocess.DEVNULL, stderr=errors,
            )  # fmt: skip

    def command(self, *flags: str) -> list[str]:
        words = [sys.executable, str(REPOSITORY / "batch_inference_experiment.py"), *SWEEP, *flags]
        return [*words, "--model", TINY, "--output-file", str(self.file)]

    def move_to(self, folder: Path) -> None:
        """Where the sweep's files are to be found."""
        self.folder = folder
        self.file = folder / "x_results.json"
        self.log = folder / "x_results.log"
        self._errors = folder / "errors.txt"

    def errors(self) -> str:
        return self._errors.read_text()

    def what_is_known(self) -> str:
        """For a test that fails."""
        log = self.log.read_text(errors="replace")[-2000:] if self.log.exists() else "none"
        return f"{self.errors()}\nThe log's end:\n{log}"

    def wait_for(self, seen: Callable[[], bool], within_s: float | None = None) -> None:
        deadline_s = time.monotonic() + (within_s or self.moment_within_s)
        while not seen():
            assert time.monotonic() < deadline_s, self.what_is_known()
            time.sleep(0.01)
        self.processes()  # remembers the groups, for when their leaders are gone

    def processes(self) -> list[int]:
        """The script and everything that it has started, wherever it hangs in the tree of processes: by the variable,
        and by the group of one that has it, because vLLM's processes write their title over their environment."""
        alive: dict[int, int] = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                pid, state = int(process.name), (process / "stat").read_text().rpartition(")")[2].split()[0]
                if state == "Z":  # holds nothing
                    continue
                alive[pid] = os.getpgid(pid)
                if self._mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                    self._groups.add(alive[pid])
        # The test itself may share the script's group.
        groups = self._groups - {os.getpgid(0)}
        return [pid for pid, group in alive.items() if group in groups]

    def orphans(self) -> list[int]:
        """What is left after ORPHANS_WITHIN_S."""
        deadline_s = time.monotonic() + ORPHANS_WITHIN_S
        while (left := self.processes()) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        return left

    def shared_memory_left(self) -> set[Path]:
        """Of this sweep alone: others make such files too. Those of the stub have its mark in their names; of the real
        vLLM's, those that no process of anybody else has mapped."""
        new = all_shared_memory() - self._shared_memory_before
        if self._is_stub:
            return {file for file in new if self._mark.partition("=")[2] in file.name}
        of_others: set[Path] = set()
        for pid in psutil.pids():
            with contextlib.suppress(ProcessLookupError):
                if (group := os.getpgid(pid)) not in self._groups:
                    of_others |= shared_memory_of(group)
        return {file for file in new - of_others if file.exists()}

    def document(self) -> dict[str, Any] | None:
        if not self.file.exists():
            return None
        json.loads(self.file.read_text())  # whole and valid at any moment; what came after it is in the journal
        document: dict[str, Any] = msgspec.to_builtins(load_result(self.file))
        return document

    def announced(self) -> set[tuple[int, int]]:
        """Points that the console has said to be done."""
        return {(int(batch_size), int(seq_len)) for batch_size, seq_len in _DONE.findall(self.errors())}


def points_of(document: dict[str, Any] | None, *statuses: str) -> set[tuple[int, int]]:
    points = document["points"] if document else []
    return {(point["batch_size"], point["seq_len"]) for point in points if point["status"] in (statuses or ("ok",))}


@pytest.fixture
def judged(request: pytest.FixtureRequest) -> Iterator[Callable[..., Outcome]]:
    """Fills the sweep's row of the table: exit code, points that were announced and are not in the file, orphans, and
    whether --resume makes of it what a sweep without a fault would have been."""
    outcome = Outcome(request.node.name.removeprefix("test_").removeprefix("a_"))
    OUTCOMES.append(outcome)
    sweeps: list[Sweep] = []

    def judge(sweep: Sweep, *, resume: bool = True) -> Outcome:
        sweeps.append(sweep)
        try:
            outcome.exit_code = sweep.process.wait(timeout=sweep.end_within_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the sweep has not ended within {sweep.end_within_s:g} s\n{sweep.what_is_known()}")
        left = [*map(str, sweep.orphans()), *map(str, sweep.shared_memory_left())]
        # What is killed cannot take away what it has half written.
        left += [] if outcome.exit_code == -signal.SIGKILL else map(str, sweep.folder.glob(".*.tmp"))
        outcome.orphans = len(left)
        outcome.problems += [f"left behind: {one}" for one in left]
        document = sweep.document()
        outcome.lost_points = len(sweep.announced() - points_of(document, "ok", "oom", "error", "timeout", "skipped"))
        if resume:
            again = Sweep(sweep.folder, "--resume", STUB_RUN_S="0.002")
            sweeps.append(again)
            if again.process.wait(timeout=60) != 0 or points_of(again.document()) != GRID:
                outcome.problems.append(f"--resume: {again.errors()[-500:]}")
        return outcome

    yield judge
    for sweep in sweeps:
        for pid in sweep.processes():
            os.kill(pid, signal.SIGKILL)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not OUTCOMES:
        return
    terminalreporter.section("faults tried")
    for one in OUTCOMES:
        counts = f"lost points {one.lost_points}  orphans {one.orphans}"
        terminalreporter.write_line(f"{one.fault:<54} exit {one.exit_code!s:>4}  {counts}")
    lost, orphans = sum(one.lost_points for one in OUTCOMES), sum(one.orphans for one in OUTCOMES)
    terminalreporter.write_line(f"{len(OUTCOMES)} faults tried: {lost} points lost, {orphans} orphans")
