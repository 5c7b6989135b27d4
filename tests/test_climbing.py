"""Which point of a load is next: `--batch-sizes auto`, and the points of a grid in turn."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.metrics import summarise
from batch_inference.core.results import Point, PointKey
from batch_inference.core.values import AUTO_SIZES
from batch_inference.measure.climbing import Climbing, InTurn
from builders import make_point, make_result
from conftest import experiment_command, stub_environment

Run = Callable[..., "subprocess.CompletedProcess[str]"]
SEARCH: dict[str, Any] = {"batch_sizes": AUTO_SIZES, "seq_lens": (64,), "max_tokens": 32}


def keys(config: ExperimentConfig) -> list[PointKey]:
    return [PointKey(batch, length, tokens) for batch, length, tokens, *_ in config.points()]


def measured(key: PointKey, latencies_s: list[float]) -> Point:
    point = make_point(key.batch_size, key.seq_len or 0, latencies_s)
    point.summary = summarise(make_result(points=[point]), point)
    return point


def batch_s(size: int) -> float:
    """Throughput rises up to 128, and falls."""
    return 1 + size / 100 + (size / 180) ** 3


def loaded(config: ExperimentConfig, kept: list[Point] | None = None, lost_at: int = 10_000) -> list[tuple[int, int]]:
    """Sizes in the order in which they are measured, and the runs of each."""
    climbing, order = Climbing(config, make_result(), keys(config), kept or []), []
    while (planned := climbing.next_point()) is not None:
        size = planned.key.batch_size
        if size >= lost_at:
            climbing.told(Point(size, 64, 32, "oom", reason="out of memory"))
            order.append((size, 0))
            continue
        before = [run.latency_s for run in planned.so_far.runs] if planned.so_far else []
        wanted = planned.runs or max(3, len(before) + 1)
        runs_s = before + [batch_s(size) * (1 + 0.0002 * (number % 2)) for number in range(len(before), wanted)]
        climbing.told(measured(planned.key, runs_s))
        order.append((size, len(runs_s) - len(before)))
        assert len(order) < 30
    return order


def test_few_runs_are_made_on_the_way_and_more_of_the_best() -> None:
    order = loaded(ExperimentConfig(**SEARCH))
    assert order[:5] == [(16, 3), (32, 2), (64, 2), (128, 2), (256, 2)]
    assert order[-1] == (128, 1)  # to three


def test_what_was_found_is_said_for_each_length() -> None:
    config = ExperimentConfig(**{**SEARCH, "seq_lens": (64, 128), "max_latency_s": 1.5})
    climbing = Climbing(config, make_result(), keys(config), [])
    assert climbing.answers() == []
    for length, sizes in ((64, (16, 32, 64)), (128, (16,))):
        for size in sizes:
            climbing.told(measured(PointKey(size, length, 32), [batch_s(size) * length / 64] * 3))
    climbing.told(Point(128, 64, 32, "oom", reason="out of memory"))
    assert climbing.answers() == [
        "best for throughput at length 64: 32 at once",
        "no batch size that was tried keeps the limits at length 128; the nearest is 16 at once, 1.55 times its limit",
    ]


def test_a_best_that_cannot_win_gets_no_more_runs() -> None:
    best = 128 * 32 / batch_s(128)
    for to_beat, ends in ((best * 1.1, 2), (best * 0.9, 1)):
        assert loaded(ExperimentConfig(**SEARCH, to_beat=(to_beat,)))[-1][1] == ends


def test_what_an_earlier_load_measured_is_not_measured_again() -> None:
    config = ExperimentConfig(**SEARCH)
    points = [measured(key, [batch_s(key.batch_size)] * 3) for key in keys(config) if 16 <= key.batch_size <= 256]
    assert [pair for pair in loaded(config, points) if pair[0] in AUTO_SIZES] == []
    # Runs of two engines are never put together: the best has too few, and is measured anew.
    few = [measured(key, [batch_s(key.batch_size)] * 2) for key in keys(config) if 16 <= key.batch_size <= 256]
    climbing = Climbing(config, make_result(), keys(config), few)
    planned = climbing.next_point()
    while planned is not None and planned.key.batch_size not in AUTO_SIZES:
        climbing.told(measured(planned.key, [batch_s(planned.key.batch_size)] * 2))
        planned = climbing.next_point()
    assert planned is not None
    assert (planned.key.batch_size, planned.so_far, planned.runs) == (128, None, None)


def test_a_size_that_lost_its_engine_is_the_last_one() -> None:
    order = loaded(ExperimentConfig(**SEARCH), lost_at=100)
    assert [size for size, _ in order][:4] == [16, 32, 64, 128]
    assert all(size < 128 for size, _ in order[4:])


def test_each_length_has_a_search_of_its_own() -> None:
    config = ExperimentConfig(**{**SEARCH, "seq_lens": (64, 128), "goal": "latency"})
    climbing = Climbing(config, make_result(), keys(config), [])
    seen = []
    while (planned := climbing.next_point()) is not None:
        climbing.told(measured(planned.key, [1.0, 1.0, 1.0]))
        seen.append((planned.key.batch_size, planned.key.seq_len))
    assert seen == [(1, 64), (1, 128)]


def test_the_points_of_a_grid_come_in_turn() -> None:
    config = ExperimentConfig(batch_sizes=(1, 2), seq_lens=(64,))
    order = InTurn(keys(config))
    planned = order.next_point()
    assert planned is not None
    assert planned.key.batch_size == 1
    order.told(make_point(1, 64, max_tokens=128))
    assert [key.batch_size for key in order.rest] == [2]


# --- the whole program ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_program_searches_and_goes_on_where_it_was(tmp_path: Path) -> None:
    words = ("--load-format", "dummy", "--batch-sizes", "auto", "--goal", "latency", "--num-runs", "2")
    command = experiment_command(tmp_path, *words, "--seq-lens", "8", "--max-tokens", "4")
    runs = [
        subprocess.run(command, cwd=tmp_path, env=stub_environment(), capture_output=True, text=True, timeout=60)
        for _ in range(2)
    ]
    assert [done.returncode for done in runs] == [0, 0], runs[0].stderr
    document = json.loads((tmp_path / "tp_1_results.json").read_text())
    assert [(point["batch_size"], len(point["runs"])) for point in document["points"]] == [(1, 2)]
    assert document["config"]["batch_sizes"] == list(AUTO_SIZES)
    assert "[1] 1 x 8: " in runs[0].stderr
    assert "\n\nbest for latency at length 8: 1 at once\n\n" in runs[0].stdout
    assert "nothing is left to measure" in runs[1].stderr


@pytest.mark.parametrize("flag", [("--goal", "latency"), ("--max-ttft-s", "1"), ("--to-beat", "5")])
def test_its_flags_need_a_search(experiment: Run, flag: tuple[str, str]) -> None:
    done = experiment(*flag)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {flag[0]} ")
    assert done.stderr.endswith("it works only with --batch-sizes auto; add that, or drop it\n")
