"""Fault x moment, on the stub vLLM: what was measured stays, nothing is left behind, --resume completes it."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from strangers import Strangers

from conftest import REPOSITORY, TINY, free_ports
from faults.conftest import GRID, SWEEP, Outcome, Sweep, points_of

pytestmark = pytest.mark.slow
LAUNCHER = str(REPOSITORY / "run_batch_experiments.sh")

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGKILL: -9}
# Moment -> what must be seen before the fault. Loading takes a second, a run a fifth.
MOMENTS: dict[str, Callable[[Sweep], bool]] = {
    "loading": lambda sweep: sweep.log.exists() and "stub vLLM is loading" in sweep.log.read_text(),
    "warming_up": lambda sweep: sweep.log.exists() and sweep.log.read_text().count("prompts ") == 1,
    "timing": lambda sweep: sweep.log.exists() and sweep.log.read_text().count("prompts ") == 3,
    "second_point": lambda sweep: bool(sweep.announced()),
}


class Launched(Sweep):
    """By the launcher."""

    SIZES = "TP=1"

    def command(self, *flags: str) -> list[str]:
        words = ["custom", self.SIZES, "--model", TINY, "--output-dir", ".", *flags, "--", *SWEEP, "--name", "x"]
        return [LAUNCHER, *words]


class Queued(Sweep):
    """Over a workload, as three queue points."""

    def command(self, *flags: str) -> list[str]:
        workload = self.folder / "job.jsonl"
        workload.write_text('{"prompt_tokens": 5, "output_tokens": 3}\n' * 40)
        words = [sys.executable, str(REPOSITORY / "batch_inference_experiment.py"), "--prompts-file", str(workload)]
        return [*words, "--batch-sizes", "1,2,3", "--model", TINY, "--output-file", str(self.file), *flags]


class NodeOfTwo(Launched):
    """By the launcher on one of two nodes, which measure the grid together."""

    SIZES = "TP=4"

    def command(self, *flags: str) -> list[str]:
        nodes = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--wait-for-nodes-s", "60")
        return super().command(*nodes, *flags)


def start(folder: Path, *flags: str, by: type[Sweep] = Sweep, redirection: str = "", **variables: str) -> Sweep:
    variables = {"STUB_LOAD_S": "1", "STUB_RUN_S": "0.2", **variables}
    return by(folder, *flags, redirection=redirection, **variables)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_to_the_script(
    tmp_path: Path, judged: Callable[..., Outcome], number: signal.Signals, moment: str
) -> None:
    sweep = start(tmp_path)
    sweep.wait_for(lambda: MOMENTS[moment](sweep))
    sweep.process.send_signal(number)
    outcome = judged(sweep)
    assert outcome.exit_code == SIGNALS[number]
    assert (outcome.lost_points, outcome.orphans, outcome.problems) == (0, 0, [])


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_in_the_middle_of_a_job(
    tmp_path: Path, judged: Callable[..., Outcome], number: signal.Signals
) -> None:
    """Queue points that were measured stay, and a second sweep measures the rest alone."""
    sweep = start(tmp_path, by=Queued, STUB_STEP_S="0.02", STUB_LOAD_S="0")
    sweep.wait_for(lambda: "[2/3] 2 at once" in sweep.errors())
    sweep.process.send_signal(number)
    outcome = judged(sweep, resume=False)
    assert (outcome.exit_code, outcome.orphans, outcome.problems) == (SIGNALS[number], 0, [])
    before = sweep.document()
    assert before is not None
    assert [(point["batch_size"], point["status"]) for point in before["points"]] == [(1, "ok"), (2, "ok")]
    assert [job["requests"] for job in before["jobs"]] == [40]
    again = start(tmp_path, "--resume", by=Queued, STUB_LOAD_S="0")
    assert judged(again, resume=False).exit_code == 0
    after = again.document()
    assert after is not None
    assert [{**point, "engine": None} for point in after["points"][:2]] == before["points"]
    assert [(point["batch_size"], point["status"]) for point in after["points"][2:]] == [(3, "ok")]
    assert "2 of 3 points are kept" in again.errors()


@pytest.mark.parametrize("trial", range(8))
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_at_any_moment(
    tmp_path: Path, judged: Callable[..., Outcome], number: signal.Signals, trial: int
) -> None:
    # Short runs, so that many of the moments are those in which the file is written.
    sweep = start(tmp_path, STUB_LOAD_S="0", STUB_RUN_S="0.01")
    time.sleep(random.Random(trial).uniform(0.1, 1.1))
    has_begun = bool(sweep.errors())
    sweep.process.send_signal(number)
    outcome = judged(sweep)
    # On a busy machine Python itself may still be starting, and ends as any program does.
    assert outcome.exit_code in (SIGNALS[number], 0, *(() if has_begun else (-number,)))
    assert (outcome.lost_points, outcome.orphans, outcome.problems) == (0, 0, [])


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_replica_is_killed(tmp_path: Path, judged: Callable[..., Outcome], moment: str) -> None:
    sweep = start(tmp_path)
    sweep.wait_for(lambda: MOMENTS[moment](sweep))
    os.kill(
        next(pid for pid in sweep.processes() if b"batch_inference.measure.worker" in command_of(pid)), signal.SIGKILL
    )
    outcome = judged(sweep)
    assert outcome.exit_code == 1
    assert sweep.document() is not None
    assert (outcome.lost_points, outcome.orphans, outcome.problems) == (0, 0, [])


def test_the_engine_of_a_replica_is_killed(tmp_path: Path, judged: Callable[..., Outcome]) -> None:
    """vLLM 0.32 does not notice on the CPU, and its `generate` never returns; nor does the stub's for a while."""
    sweep = start(tmp_path, STUB_RUN_S="8", STUB_LOAD_S="0")
    sweep.wait_for(lambda: MOMENTS["warming_up"](sweep))
    os.kill(next(pid for pid in sweep.processes() if command_of(pid).startswith(b"VLLM::")), signal.SIGKILL)
    sweep.wait_for(lambda: "ended without a word" in sweep.errors())
    sweep.process.terminate()
    outcome = judged(sweep)
    assert "engine_crash" in sweep.errors()
    assert (outcome.lost_points, outcome.orphans, outcome.problems) == (0, 0, [])


def test_a_point_that_kills_its_engine_costs_that_point_alone(tmp_path: Path, judged: Callable[..., Outcome]) -> None:
    sweep = start(tmp_path, STUB_FAIL="die:2", STUB_LOAD_S="0")
    outcome = judged(sweep, resume=False)
    document = sweep.document()
    assert outcome.exit_code == 1
    # Larger batches of a length are implied; each length has an engine of its own to lose.
    assert points_of(document) == {(1, 8), (1, 16)}
    assert points_of(document, "error") == {(2, 8), (2, 16)}
    assert points_of(document, "skipped") == {(3, 8), (3, 16)}
    assert (outcome.lost_points, outcome.orphans) == (0, 0)
    assert "engine_crash" in sweep.errors()


def test_out_of_memory_at_a_point(tmp_path: Path, judged: Callable[..., Outcome]) -> None:
    sweep = start(tmp_path, STUB_FAIL="run:3", STUB_LOAD_S="0")
    outcome = judged(sweep)
    assert outcome.exit_code == 1
    assert (outcome.lost_points, outcome.orphans, outcome.problems) == (0, 0, [])
    assert "oom_run: use smaller --batch-sizes" in sweep.errors()


def test_a_run_that_hangs(tmp_path: Path, judged: Callable[..., Outcome]) -> None:
    sweep = start(tmp_path, "--point-timeout", "1", STUB_FAIL="hang", STUB_LOAD_S="0")
    outcome = judged(sweep)
    assert outcome.exit_code == 1
    assert (outcome.lost_points, outcome.orphans, outcome.problems) == (0, 0, [])
    assert "no answer within --point-timeout 1 s" in sweep.errors()


def test_a_start_that_hangs(tmp_path: Path, judged: Callable[..., Outcome]) -> None:
    sweep = start(tmp_path, "--startup-timeout", "1", STUB_LOAD_S="60")
    outcome = judged(sweep)
    assert outcome.exit_code == 1
    assert (outcome.lost_points, outcome.orphans, outcome.problems) == (0, 0, [])
    assert "timeout_startup: raise --startup-timeout" in sweep.errors()


def test_an_engine_that_does_not_start(tmp_path: Path, judged: Callable[..., Outcome]) -> None:
    outcome = judged(start(tmp_path, STUB_FAIL="load", STUB_LOAD_S="0"))
    assert outcome.exit_code == 1
    assert (outcome.lost_points, outcome.orphans, outcome.problems) == (0, 0, [])


def test_a_folder_that_can_no_longer_be_written(tmp_path: Path, judged: Callable[..., Outcome]) -> None:
    """As on a full disk: the last good file stays, and what was measured since is told on standard error."""
    folder, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    folder.mkdir()
    sweep = start(folder, STUB_LOAD_S="0")
    sweep.wait_for(lambda: MOMENTS["second_point"](sweep))
    folder.rename(elsewhere)
    sweep.move_to(elsewhere)
    outcome = judged(sweep, resume=False)
    assert (outcome.exit_code, outcome.orphans) == (1, 0)
    assert "x_results.json: cannot be written: No such file or directory" in sweep.errors()
    told = json.loads(sweep.errors().partition("as it would have been saved:\n")[2])
    assert points_of(sweep.document()) < points_of(told)
    assert sweep.announced() <= points_of(told)


@pytest.mark.parametrize("moment", ["at_once", "later"])
@pytest.mark.parametrize("flags", [("", ""), ("--resume", "--overwrite"), ("--overwrite", "--overwrite")])
def test_a_second_script_with_the_same_file(
    tmp_path: Path, judged: Callable[..., Outcome], flags: tuple[str, str], moment: str
) -> None:
    first, second = at_once_or_later(tmp_path, flags, moment, by=Sweep)
    if moment == "at_once" and first.process.wait(60) == 2:  # the second was faster
        first, second = second, first
    outcome = judged(first, resume=False)
    assert (outcome.exit_code, outcome.lost_points, outcome.problems) == (0, 0, [])
    assert second.process.wait(60) == 2
    assert first.errors().count("is measuring into it; wait until it ends") == 1
    assert points_of(first.document()) == GRID


@pytest.mark.parametrize("moment", ["at_once", "later"])
@pytest.mark.parametrize("flags", [("", ""), ("--resume", "--overwrite"), ("--overwrite", "--pack")])
def test_a_second_launcher_with_the_same_folder(
    tmp_path: Path, judged: Callable[..., Outcome], flags: tuple[str, str], moment: str
) -> None:
    """It waits, and goes on where the first has left off."""
    first, second = at_once_or_later(tmp_path, flags, moment, by=Launched)
    for sweep in (first, second):
        outcome = judged(sweep, resume=False)
        assert (outcome.exit_code, outcome.lost_points, outcome.orphans, outcome.problems) == (0, 0, 0, [])
    assert points_of(first.document()) == GRID
    assert [path.name for path in tmp_path.glob("*.json*")] == ["x_results.json"]


def test_a_launcher_goes_on_after_a_script_that_is_killed(tmp_path: Path, judged: Callable[..., Outcome]) -> None:
    first = start(tmp_path, "--name", "x", STUB_RUN_S="0.5")
    first.wait_for(lambda: MOMENTS["second_point"](first))
    second = start(tmp_path, by=Launched, STUB_RUN_S="0.002")
    second.wait_for(lambda: "waits: process" in second.errors())
    first.process.kill()
    outcome = judged(second, resume=False)
    assert (outcome.exit_code, outcome.lost_points, outcome.orphans, outcome.problems) == (0, 0, 0, [])
    assert points_of(second.document()) == GRID


@pytest.mark.parametrize("by", [Sweep, Launched], ids=["script", "launcher"])
@pytest.mark.parametrize(
    "redirection", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", "2> >(head -n 1)", "2> >(true)"]
)
def test_closed_descriptors(tmp_path: Path, judged: Callable[..., Outcome], redirection: str, by: type[Sweep]) -> None:
    sweep = start(tmp_path, by=by, redirection=redirection, STUB_LOAD_S="0", STUB_RUN_S="0.002")
    outcome = judged(sweep, resume=False)
    assert (outcome.exit_code, outcome.lost_points, outcome.orphans, outcome.problems) == (0, 0, 0, [])
    assert points_of(sweep.document()) == GRID


def test_strangers_where_two_nodes_meet(tmp_path: Path, judged: Callable[..., Outcome]) -> None:
    """At the port of the preset, which stays open, and at that of its setting."""
    port = free_ports(3)
    with Strangers(port, port + 1) as strangers:
        nodes = []
        for name in "ab":
            (tmp_path / name).mkdir()
            nodes.append(NodeOfTwo(tmp_path / name, "--master-port", str(port), VLLM_CPU_OMP_THREADS_BIND="0|0"))
            nodes[0].wait_for(lambda: "is waiting for the others" in nodes[0].errors())
        orphans = judged(nodes[1], resume=False).orphans
        outcome = judged(nodes[0], resume=False)
        assert strangers.calls > 100
    assert outcome.exit_code == 0, nodes[0].errors()
    assert nodes[0].announced() == points_of(nodes[0].document()) == GRID
    assert (outcome.lost_points, orphans + outcome.orphans, outcome.problems) == (0, 0, [])
    assert not any("Traceback" in node.errors() for node in nodes)


def test_no_fault(tmp_path: Path, judged: Callable[..., Outcome]) -> None:
    sweep = start(tmp_path, STUB_LOAD_S="0", STUB_RUN_S="0.002")
    outcome = judged(sweep, resume=False)
    assert outcome.exit_code == 0
    assert sweep.announced() == points_of(sweep.document()) == GRID
    assert outcome.orphans == 0


def at_once_or_later(folder: Path, flags: tuple[str, str], moment: str, by: type[Sweep]) -> tuple[Sweep, Sweep]:
    """Two programs that are told to measure the same into the same file."""
    # The first must still be at work when the second has started, on a busy machine too.
    variables = {"STUB_LOAD_S": "0.2", "STUB_RUN_S": "0.1" if moment == "later" else "0.02"}
    first = start(folder, *flags[0].split(), by=by, **variables)
    if moment == "later":
        first.wait_for(lambda: MOMENTS["warming_up"](first))
    return first, start(folder, *flags[1].split(), by=by, **variables)


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
