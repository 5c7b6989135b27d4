"""The main faults on a real vLLM engine: a process tree that nobody wrote for these tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.conftest import Outcome, Sweep, points_of

pytestmark = pytest.mark.vllm

# Eager: to compile is no fault, and takes a third of a start.
ENGINE = ("--load-format", "dummy", "--kv-cache-memory-bytes", "67108864", "--max-tokens", "64", "--enforce-eager")
LOADING = "Initializing a V1 LLM engine"
WORKER = b"batch_inference.measure.worker"


def start(folder: Path, *flags: str, **variables: str) -> Sweep:
    return Sweep(folder, *ENGINE, *flags, stub=False, **variables)


def process_of(sweep: Sweep, name: bytes) -> int:
    return next(pid for pid in sweep.processes() if name in Path(f"/proc/{pid}/cmdline").read_bytes())


def wait_for_point(sweep: Sweep) -> None:
    sweep.wait_for(lambda: bool(sweep.announced()))


def test_real_sigkill_of_the_script_and_resume(tmp_path: Path, judged: Callable[..., Outcome]) -> None:
    sweep = start(tmp_path)
    wait_for_point(sweep)
    sweep.process.kill()
    outcome = judged(sweep, resume=False)
    assert (outcome.exit_code, outcome.lost_points, outcome.orphans) == (-9, 0, 0)
    kept = points_of(sweep.document())
    again = start(tmp_path, "--resume", "--seq-lens", "8")
    outcome = judged(again, resume=False)
    assert (outcome.exit_code, outcome.orphans) == (0, 0)
    assert points_of(again.document()) == kept | {(1, 8), (2, 8), (3, 8)}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT_while_timing", "SIGTERM_at_loading"])
def test_real_signal(tmp_path: Path, judged: Callable[..., Outcome], number: signal.Signals) -> None:
    sweep = start(tmp_path)
    if number == signal.SIGINT:
        wait_for_point(sweep)
    else:
        sweep.wait_for(lambda: sweep.log.exists() and LOADING in sweep.log.read_text())
    sweep.process.send_signal(number)
    outcome = judged(sweep, resume=False)
    assert outcome.exit_code == 128 + number
    assert (outcome.lost_points, outcome.orphans) == (0, 0)
    document = sweep.document()
    assert document is not None
    assert document["status"] == "partial"


@pytest.mark.parametrize(
    ("separate", "killed"), [("0", "worker_killed"), ("1", "engine_crash")], ids=["in_process", "separate"]
)
def test_real_sigkill_of_the_engine_and_a_hang(
    tmp_path: Path, judged: Callable[..., Outcome], separate: str, killed: str
) -> None:
    """The first length loses its engine to SIGKILL; the second hangs, because the new engine is stopped: vLLM's own
    process below the one that answers the script, or this one."""
    # So many runs that the second length is not at its end before its engine is stopped.
    sweep = start(tmp_path, "--point-timeout", "20", "--num-runs", "12", VLLM_ENABLE_V1_MULTIPROCESSING=separate)
    name = b"EngineCore" if separate == "1" else WORKER
    wait_for_point(sweep)
    os.kill(process_of(sweep, name), signal.SIGKILL)
    sweep.wait_for(lambda: "the engine is restarted" in sweep.errors(), 60)
    # A point of the second length, by the second engine.
    sweep.wait_for(lambda: any(seq_len == 16 for _, seq_len in sweep.announced()))
    os.kill(process_of(sweep, name), signal.SIGSTOP)
    outcome = judged(sweep, resume=False)
    document = sweep.document()
    assert document is not None
    failures = {(point["batch_size"], point["seq_len"]): point["failure"] for point in document["points"]}
    assert killed in {kind for (_, seq_len), kind in failures.items() if seq_len == 8}, failures
    assert "timeout_point" in {kind for (_, seq_len), kind in failures.items() if seq_len == 16}, failures
    assert (outcome.exit_code, outcome.lost_points, outcome.orphans) == (1, 0, 0)


def test_real_sigkill_of_a_replica(tmp_path: Path, judged: Callable[..., Outcome]) -> None:
    # So many runs that the second point is not at its end before its engine is killed.
    sweep = start(tmp_path, "--seq-lens", "8", "--batch-sizes", "1,2", "--num-runs", "12")
    wait_for_point(sweep)
    os.kill(process_of(sweep, WORKER), signal.SIGKILL)
    outcome = judged(sweep, resume=False)
    assert (outcome.exit_code, outcome.lost_points, outcome.orphans) == (1, 0, 0)
    assert "worker_killed" in sweep.errors()


def test_real_kv_cache_that_holds_no_request(tmp_path: Path, judged: Callable[..., Outcome]) -> None:
    sweep = start(tmp_path, "--kv-cache-memory-bytes", "1000")
    outcome = judged(sweep, resume=False)
    assert (outcome.exit_code, outcome.orphans) == (1, 0)
    assert "kv_too_small: shorten --seq-lens" in sweep.errors(), sweep.errors()
    document = sweep.document()
    assert document is not None
    assert document["status"] == "failed"
