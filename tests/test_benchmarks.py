"""What the programs of benchmarks/ work out: no engine here."""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from builders import make_point, make_result
from conftest import REPOSITORY


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
        return importlib.import_module(name)

    return load


def test_resume_runs_no_command_twice(load: Any, tmp_path: Path) -> None:
    call = load("ways").call
    ran = tmp_path / "ran"
    command = [sys.executable, "-c", f"open({str(ran)!r}, 'a').write('x')"]
    first_s = call(command, tmp_path / "log.txt")
    assert call(command, tmp_path / "log.txt", resume=True) == first_s
    assert ran.read_text() == "x"
    call([*command, "another"], tmp_path / "log.txt", resume=True)
    call(command, tmp_path / "log.txt")
    assert ran.read_text() == "xxx"


def test_resume_runs_what_failed_again(load: Any, tmp_path: Path) -> None:
    call = load("ways").call
    command = [sys.executable, "-c", f"open({str(tmp_path / 'there')!r})"]
    with pytest.raises(SystemExit):
        call(command, tmp_path / "log.txt", resume=True)
    (tmp_path / "there").touch()
    assert call(command, tmp_path / "log.txt", resume=True) > 0


def test_engine_flags_replace_the_sizes_of_the_grid(load: Any) -> None:
    shared_flags = load("ways").shared_flags
    args = Namespace(model="m", points=[(4, 64), (16, 8)], max_tokens=16, engine_flags=["--max-num-seqs", "256"])
    assert shared_flags(args) == ["--model", "m", "--max-model-len", "80", "--max-num-seqs", "256"]


def test_processes_that_were_not_run_are_estimated(load: Any) -> None:
    """Two of three points measured: 10 and 12 s around the runs, so the third has 11 s and its own 4 runs of 2 s."""
    against = load("against_vllm_bench")
    points = [make_point(batch, 64, latencies_s=[2.0] * 3) for batch in (1, 2, 4)]
    result = make_result(points=points, engine={"compile_cache": "warm"}, environment={"cpu_count": 16})
    args = Namespace(
        points=[(1, 64), (2, 64), (4, 64)], batch_sizes=(1, 2, 4), seq_lens=(64,), warmup_runs=1, num_runs=3,
        max_tokens=32, cold=False, warm=True, model="m", engine_flags=[],
    )  # fmt: skip
    phases = {"import_s": 3.0, "engine_s": 5.0, "warmup_s": 2.0, "timed_s": 6.0}
    every = [against.phases(phases, wall_s, "") for wall_s in (18.0, 20.0)]
    bench = {point: {"latencies_s": [2.0, 2.0, 2.0]} for point in args.points[:2]}
    ours = against.phases(phases, 19.0, "")
    document = against.compared(args, result, ours, bench, every)
    assert document["estimated_points"] == 1
    assert document["wall_s_of_bench"] == pytest.approx(18 + 20 + 11 + 4 * 2)
    assert document["wall_ratio"] == pytest.approx(3.0)
    assert [row["ratio"] for row in document["points"]] == [1.0, 1.0, None]
    table = "\n".join(against.table(args, document))
    assert "m, 3 x 1 points, 32 output tokens, 1 warm-up and 3 timed runs a point; a warm compile cache" in table
    assert "| vllm bench latency, 2 of 3 processes |" in table
    assert "| **wall time** | 19.0 | 38.0 |  |" in table
    assert "| **wall time of all 3, 1 estimated** | 19.0 | 57.0 | 3.0 |" in table


def test_both_tools_find_the_same_caches(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the engines, bytecode included; with --cold an empty folder for each, whatever the user has set."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    script = "import os; print(*(os.environ.get(n, '') for n in ('TRITON_CACHE_DIR', 'PYTHONDONTWRITEBYTECODE')))"
    against = load("against_vllm_bench")

    def folder(*, cold: bool) -> str:
        with against.compile_cache(cold):
            load("ways").call([sys.executable, "-c", script], tmp_path / "log.txt")
        return (tmp_path / "log.txt").read_text().strip()

    assert folder(cold=False) == "/mine"
    first, second = folder(cold=True), folder(cold=True)
    assert first.endswith("/triton")
    assert first != second
