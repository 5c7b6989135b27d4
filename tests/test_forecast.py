"""A job's forecast from a sample: against recorded jobs, and against queues whose truth is known."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import queue_truth
from queue_truth import MIXES, lognormal, narrow, queue_run

from batch_inference.core import forecast as forecasting
from batch_inference.core import job_work
from batch_inference.core.forecast import (
    BATCH_MEANS,
    FITTED_STEPS,
    Forecast,
    JobLengths,
    forecast,
    measured,
    mix_outside,
    replicas_for_deadline,
    too_small,
)
from batch_inference.core.queue_runs import Integers, Interval, QueueRun, phases_of
from conftest import REPOSITORY

RECORDED = REPOSITORY / "tests" / "queue_h100"
SAMPLES = ("sample_256_0", "sample_512_0", "sample_512_1")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module("forecast")


def is_held(found: Interval, truth: float) -> bool:
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.value <= found.high
    return found.low <= truth <= found.high


def half_width(found: Interval) -> float:
    assert found.high is not None
    return found.high / found.value - 1


def lengths_of(run: QueueRun) -> JobLengths:
    return JobLengths(run.prompt_tokens, run.output_tokens)


# --- recorded on an H100 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_recorded_job_is_forecast_from_a_sample(benchmark: Any, sample: str) -> None:
    row = benchmark.compare(
        benchmark.recorded(RECORDED / f"{sample}.json", 1, 1), benchmark.recorded(RECORDED / "job.json", 1, 1)
    )
    assert abs(row.error) <= 0.03
    assert row.is_held
    assert row.method == FITTED_STEPS


def test_the_drain_is_that_of_the_job_and_not_of_the_sample(benchmark: Any) -> None:
    """The samples drain for 4.3, 4.6 and, where no request ever waits, 5.1 s, the job for 4.5."""
    job = benchmark.recorded(RECORDED / "job.json", 1, 1)
    true_s = phases_of(job.runs[0]).drain_s
    for sample in SAMPLES:
        found = forecast(benchmark.recorded(RECORDED / f"{sample}.json", 1, 1).runs, job.lengths)
        assert found.drain_s.value == pytest.approx(true_s, rel=0.08)
        assert is_held(found.drain_s, true_s)


def test_a_sample_that_never_waits_tells_less(benchmark: Any) -> None:
    job = benchmark.recorded(RECORDED / "job.json", 1, 1).lengths
    never, twice = (
        forecast(benchmark.recorded(RECORDED / f"{name}.json", 1, 1).runs, job).seconds for name in SAMPLES[:2]
    )
    assert half_width(never) > 2 * half_width(twice)


def test_a_long_plateau_speaks_for_itself(benchmark: Any) -> None:
    job = benchmark.recorded(RECORDED / "job.json", 1, 1)
    found = forecast(job.runs, job.lengths)
    assert found.method == BATCH_MEANS
    assert found.seconds.value == pytest.approx(job.seconds, rel=0.005)
    assert half_width(found.seconds) < 0.05
    assert found.output_tokens_per_s is not None
    # 474,000 of its 486,000 tokens come in the 78 s of the plateau.
    assert found.output_tokens_per_s.value == pytest.approx(5950, rel=0.03)


@pytest.mark.parametrize("sample", SAMPLES[1:])
def test_moments_that_are_blurred_widen_a_forecast_and_do_not_upset_it(benchmark: Any, sample: str) -> None:
    """As a busy process stamps them that hears of tokens late: then steps are seen that never were."""
    draw = np.random.default_rng(0)
    recording = benchmark.recorded(RECORDED / f"{sample}.json", 1, 1)
    (run,) = recording.runs
    late_s = draw.exponential(0.002, len(run.prompt_tokens))
    times_s = {name: getattr(run, name) + late_s for name in ("scheduled_s", "first_token_s", "last_token_s")}
    job = benchmark.recorded(RECORDED / "job.json", 1, 1)
    row = benchmark.compare(replace(recording, runs=[replace(run, **times_s)]), job)
    assert abs(row.error) <= 0.05
    assert row.is_held


# --- where the truth is known -------------------------------------------------------------------------------------


def trial(mix: str, seed: int, batch_size: int, sample: int, order: str = "given") -> tuple[Forecast, QueueRun]:
    """A sample's forecast of a job of ten times its requests, and the job as it ran."""
    draw = np.random.default_rng(seed)
    run, job = (
        queue_run(in_order(MIXES[mix](count, draw), order), batch_size, draw) for count in (sample, 10 * sample)
    )
    return forecast([run], lengths_of(job), order=order), job


def in_order(lengths: tuple[Integers, Integers], order: str) -> tuple[Integers, Integers]:
    if order == "given":
        return lengths
    places = np.argsort(-lengths[1] if order == "longest-first" else lengths[1], kind="stable")
    return lengths[0][places], lengths[1][places]


def check_coverage(trials: list[tuple[Forecast, QueueRun]], least: float) -> None:
    held = [is_held(found.seconds, job.end_s) for found, job in trials]
    assert sum(held) / len(held) >= least
    assert statistics.median(abs(found.seconds.value / job.end_s - 1) for found, job in trials) <= 0.05


@pytest.mark.parametrize("mix", MIXES)
def test_the_interval_holds_jobs_of_ten_times_the_sample(mix: str) -> None:
    check_coverage([trial(mix, seed, 8, 64) for seed in range(6)], 5 / 6)


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "sample"), [(8, 96), (32, 160), (16, 640)])
def test_the_interval_holds_nine_of_ten_jobs(batch_size: int, sample: int) -> None:
    check_coverage([trial(mix, seed, batch_size, sample) for mix in MIXES for seed in range(25)], 0.9)


@pytest.mark.parametrize("order", ["longest-first", "shortest-first"])
def test_sorted_orders_are_forecast_through_the_costs_of_steps(order: str) -> None:
    check_coverage([trial("lognormal", seed, 8, 96, order) for seed in range(6)], 5 / 6)


def test_longest_first_has_the_shorter_drain() -> None:
    lengths = lognormal(800, np.random.default_rng(1))
    run = queue_run(lognormal(200, np.random.default_rng(0)), 16)
    first, last = (
        forecast([run], JobLengths(*in_order(lengths, order)), order=order)
        for order in ("longest-first", "shortest-first")
    )
    assert first.drain_s.value < 0.2 * last.drain_s.value
    assert first.seconds.value < last.seconds.value


def test_a_giant_at_the_end_makes_the_drain() -> None:
    prompts, outputs = narrow(600, np.random.default_rng(0))
    run = queue_run((prompts[:100], outputs[:100]), 8)
    usual = forecast([run], JobLengths(prompts, outputs))
    outputs[590] = 2000
    giant = forecast([run], JobLengths(prompts, outputs))
    # A step of one request alone takes 6.9 ms.
    assert giant.drain_s.value - usual.drain_s.value == pytest.approx(1940 * 6.9e-3, rel=0.1)
    assert is_held(giant.seconds, queue_run((prompts, outputs), 8).end_s)


# --- long jobs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["given", "longest-first"])
@pytest.mark.parametrize("mix", ["lognormal", "two humps"])
def test_arithmetic_gives_what_a_simulation_of_all_gives(mix: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(4)
    run = queue_run(in_order(MIXES[mix](160, draw), order), 16, draw)
    job = JobLengths(*in_order(MIXES[mix](12_000, draw), order))
    simulated = forecast([run], job, order=order)
    monkeypatch.setattr(forecasting, "_SIMULATED", 1000)
    summed = forecast([run], job, order=order)
    assert summed.seconds.value == pytest.approx(simulated.seconds.value, rel=0.005)
    assert summed.drain_s.value == pytest.approx(simulated.drain_s.value, rel=0.05, abs=0.1)
    assert summed.output_tokens_per_s is not None
    assert simulated.output_tokens_per_s is not None
    assert summed.output_tokens_per_s.value == pytest.approx(simulated.output_tokens_per_s.value, rel=0.01)


def test_prompts_are_the_limit_where_the_budget_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 prompt tokens and 4 output tokens a request, 2,048 in a step: one request a step, whatever the places."""
    monkeypatch.setattr(forecasting, "_SIMULATED", 1000)
    run = queue_run((np.full(100, 2000), np.full(100, 4)), 16)
    found = forecast([run], JobLengths(np.full(30_000, 2000), np.full(30_000, 4)))
    assert found.seconds.value == pytest.approx(300 * run.end_s, rel=0.05)


def test_a_billion_requests_take_no_more_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(4)
    run = queue_run(lognormal(160, draw), 16, draw)
    prompts, outputs = lognormal(4000, draw)
    one = forecast([run], JobLengths(prompts, outputs)).seconds.value
    sizes = []
    simulate_work = job_work.simulate_work

    def counted(prompts: Integers, *rest: Any) -> Any:
        sizes.append(len(prompts))
        return simulate_work(prompts, *rest)

    monkeypatch.setattr(job_work, "simulate_work", counted)
    found = forecast([run], JobLengths(prompts, outputs, repeats=250_000.0))
    assert sum(sizes) <= 100_000
    # One ramp and one drain instead of 250,000.
    assert 0.9 * 250_000 * one < found.seconds.value < 250_000 * one
    many = forecast([run], JobLengths(prompts, outputs, repeats=250_000.0), replicas=64)
    assert many.seconds.value == pytest.approx(found.seconds.value / 64, rel=0.04)
    # The slowest of them decides.
    assert many.seconds.value > found.seconds.value / 64


def test_part_of_a_file_is_part_of_its_time() -> None:
    draw = np.random.default_rng(4)
    run = queue_run(lognormal(160, draw), 16, draw)
    prompts, outputs = lognormal(4000, draw)
    one, fifth = (forecast([run], JobLengths(prompts, outputs, repeats=times)).seconds.value for times in (1, 0.2))
    assert fifth == pytest.approx(one / 5, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("output_tokens", ["known", "not known"])
def test_a_thinned_job_is_the_whole_job(output_tokens: str) -> None:
    draw = np.random.default_rng(4)
    run = queue_run(lognormal(160, draw), 16, draw)
    prompts, outputs = lognormal(9000, draw)
    whole = JobLengths(prompts, outputs if output_tokens == "known" else None)
    thinned = whole.thinned(2000)
    assert len(thinned.prompt_tokens) <= 2000
    assert thinned.requests == 9000
    assert thinned.thinned(3000) is thinned
    assert (thinned.prompt_tokens[-1000:] == prompts[-1000:]).all()
    assert (thinned.weights[-1000:] == 1).all()
    few, all_of_it = forecast([run], thinned), forecast([run], whole)
    assert few.seconds.value == pytest.approx(all_of_it.seconds.value, rel=0.04)
    if output_tokens == "known":
        assert few.drain_s.value == pytest.approx(all_of_it.drain_s.value, rel=0.01)


# --- replicas -----------------------------------------------------------------------------------------------------


def two_replicas() -> list[QueueRun]:
    """The second one is slower by 10 %."""
    draw = np.random.default_rng(4)
    fast, slow = (queue_run(lognormal(200, draw), 16) for _ in range(2))
    moments = {name: getattr(slow, name) * 1.1 for name in ("scheduled_s", "first_token_s", "last_token_s")}
    return [fast, replace(slow, **moments)]


def test_the_slowest_replica_decides() -> None:
    runs, job = two_replicas(), JobLengths(*lognormal(4000, np.random.default_rng(5)))
    alone = forecast(runs[:1], job).seconds.value
    both = forecast(runs, job)
    assert both.replicas == 2
    assert both.seconds.value == pytest.approx(alone / 2 * 1.1, rel=0.03)
    assert 0 <= both.imbalance < 0.01
    assert both.output_tokens_per_s is not None
    assert both.output_tokens_per_s.value == pytest.approx(
        2 / 1.05 * forecast(runs[:1], job).output_tokens_per_s.value,  # type: ignore[union-attr]
        rel=0.03,
    )


def test_runs_that_scatter_make_the_interval_wide() -> None:
    """Three runs of one replica, by 6 % apart, as pipelines do: another one may be anywhere between and beyond."""
    run, job = two_replicas()[0], JobLengths(*lognormal(4000, np.random.default_rng(5)))
    names = ("scheduled_s", "first_token_s", "last_token_s")
    runs = [replace(run, **{name: getattr(run, name) * times for name in names}) for times in (0.94, 1.0, 1.06)]
    scattered, steady = forecast(runs, job, 1), forecast([run] * 3, job, 1)
    assert scattered.seconds.value == pytest.approx(steady.seconds.value, rel=0.01)
    assert half_width(steady.seconds) < 0.05 < 0.11 < half_width(scattered.seconds)


def test_a_giant_unbalances_the_shares() -> None:
    prompts, outputs = np.full(40, 10), np.full(40, 10)
    prompts[39] = 1000
    found = forecast([queue_run((prompts[:20], outputs[:20]), 4)], JobLengths(prompts, outputs), replicas=4)
    assert found.imbalance > 1


def test_more_replicas_than_requests() -> None:
    run = queue_run(narrow(40, np.random.default_rng(0)), 4)
    found = forecast([run], JobLengths(np.full(3, 100), np.full(3, 50)), replicas=8)
    assert 0 < found.seconds.value < run.end_s
    assert found.output_tokens_per_s is None


def test_the_fewest_replicas_that_are_in_time() -> None:
    run = queue_run(lognormal(200, np.random.default_rng(4)), 16)
    job = JobLengths(*lognormal(4000, np.random.default_rng(5)), repeats=1000.0)
    deadline_s = forecast([run], job).seconds.value / 37
    answer = replicas_for_deadline([run], job, deadline_s)
    assert answer is not None
    latest_s = answer.forecast.seconds.high
    assert latest_s is not None
    assert latest_s <= deadline_s
    assert answer.margin == pytest.approx(1 - latest_s / deadline_s)
    assert 37 < answer.forecast.replicas < 45
    one_less = forecast([run], job, answer.forecast.replicas - 1).seconds.high
    assert one_less is not None
    assert one_less > deadline_s


def test_no_replicas_are_in_time_for_the_longest_request() -> None:
    run = queue_run(narrow(100, np.random.default_rng(0)), 8)
    job = JobLengths(np.full(500, 100), np.full(500, 50))
    assert replicas_for_deadline([run], job, 0.1) is None
    answer = replicas_for_deadline([run], job, 1e6)
    assert answer is not None
    assert answer.forecast.replicas == 1


# --- outputs of the model's own choice ----------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 26), marks=pytest.mark.slow)])
def test_outputs_that_nobody_knows_are_drawn_from_the_sample(seeds: range) -> None:
    held = []
    for seed in seeds:
        draw = np.random.default_rng(seed)
        run, job = (queue_run(lognormal(count, draw), 8, draw) for count in (160, 1600))
        known, unknown = (
            forecast([run], JobLengths(job.prompt_tokens, outputs)) for outputs in (job.output_tokens, None)
        )
        held.append(is_held(unknown.seconds, job.end_s))
        assert half_width(unknown.seconds) > 1.2 * half_width(known.seconds)
    assert sum(held) >= 0.9 * len(held)


def test_long_prompts_keep_their_outputs() -> None:
    """Summaries: the longer the prompt, the longer the output. A job of the longer half takes longer per request."""
    draw = np.random.default_rng(0)
    prompts = draw.integers(100, 2000, 400)
    run = queue_run((prompts, prompts // 10), 16, draw)
    short, long = (forecast([run], JobLengths(np.full(1000, length), None)).seconds.value for length in (400, 1600))
    assert long > 2.5 * short


@pytest.mark.slow
def test_a_seed_draws_the_same_again() -> None:
    run = queue_run(lognormal(160, np.random.default_rng(0)), 16)
    job = JobLengths(np.full(1000, 200), None)
    assert forecast([run], job, seed=1) == forecast([run], job, seed=1)
    assert forecast([run], job, seed=1) != forecast([run], job, seed=2)


# --- what cannot be told ------------------------------------------------------------------------------------------


def test_a_sample_that_does_not_fill_the_places_is_too_small() -> None:
    run = queue_run(narrow(30, np.random.default_rng(0)), 32)
    assert too_small([run]) == "the sample has 30 requests for 32 places"
    assert too_small([queue_run(narrow(32, np.random.default_rng(0)), 32)]) is None


def test_a_run_of_a_moment_gives_no_interval() -> None:
    run = queue_run((np.array([10, 10]), np.array([2, 2])), 2)
    found = forecast([run], JobLengths(np.full(10, 10), np.full(10, 2)))
    assert found.seconds.value > run.end_s
    assert (found.seconds.low, found.seconds.high) == (None, None)


def test_steps_unlike_all_that_were_seen_make_the_interval_wide() -> None:
    """Equal requests, exactly as many as places: prompts are read in some steps, tokens made in others, never both."""
    draw = np.random.default_rng(0)
    waves, mixed = queue_run((np.full(64, 400), np.full(64, 40)), 64, draw), queue_run(lognormal(400, draw), 64, draw)
    job = JobLengths(*lognormal(4000, draw))
    assert half_width(forecast([waves], job).seconds) > 0.12 > half_width(forecast([mixed], job).seconds)


def test_the_kv_cache_may_be_the_limit() -> None:
    """60 of 256 fit: the forecast is that of 60 places."""
    draw = np.random.default_rng(0)
    run, job = (queue_run(lognormal(count, draw), 60, draw) for count in (500, 3000))
    found = forecast([replace(run, batch_size=256)], lengths_of(job))
    assert found.seconds.value == pytest.approx(job.end_s, rel=0.05)


@pytest.mark.parametrize(
    ("prompts", "outputs", "expected"),
    [
        (200, 50, None),
        (450, 50, "The mean prompt of the job has 450 tokens, and that of the measured sample 200."),
        (90, 50, "The mean prompt of the job has 90 tokens, and that of the measured sample 200."),
        (200, 101, "The mean output of the job has 101 tokens, and that of the measured sample 50."),
        (300, 26, "The job reads 2.9 times as many prompt tokens per output token as the measured sample."),
        (200, None, None),
    ],
)
def test_a_mix_unlike_the_measured_one(prompts: int, outputs: int | None, expected: str | None) -> None:
    run = queue_run((np.array([100, 300, 200, 200] * 10), np.array([20, 80, 50, 50] * 10)), 4)
    job = JobLengths(np.full(100, prompts), None if outputs is None else np.full(100, outputs))
    assert mix_outside([run], job) == expected


def test_requests_longer_than_all_that_were_measured() -> None:
    run = queue_run((np.array([100, 300, 200, 200] * 10), np.array([20, 80, 50, 50] * 10)), 4)
    prompts, outputs = np.full(1000, 200), np.full(1000, 50)
    prompts[3] = 700
    assert mix_outside([run], JobLengths(prompts, outputs)) == (
        "The longest prompt of the job has 700 tokens, and the longest measured 300."
    )
    prompts[3] = 400
    assert mix_outside([run], JobLengths(prompts, outputs)) is None
    outputs[::10] = 100
    assert mix_outside([run], JobLengths(prompts, outputs)) == (
        "18% of the job's output tokens are in requests longer than the longest measured."
    )


def test_costs_of_a_run_are_those_of_the_engine() -> None:
    found = measured([queue_run(lognormal(400, np.random.default_rng(0)), 16)])
    assert found.costs.as_array()[:2] == pytest.approx(queue_truth.COSTS[:2], rel=0.1)
    assert found.factors == pytest.approx(1, abs=0.01)


# --- benchmarks/forecast.py ---------------------------------------------------------------------------------------


def run_benchmark(benchmark: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["forecast.py", "--recorded", str(folder)])
    code: int = benchmark.main()
    return code


def test_the_benchmark_compares_recorded_jobs(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_benchmark(benchmark, RECORDED, monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "| sample_512_1 | 512 | job | 86." in printed
    assert "100% of 3 intervals hold the truth." in printed


def test_the_benchmark_fails_where_a_forecast_does(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that took a third longer than its own requests say; a sample that fills no places is left out."""
    document = json.loads((RECORDED / "sample_512_0.json").read_text())
    (tmp_path / "sample_1.json").write_text(json.dumps(document))
    (tmp_path / "sample_2.json").write_text(json.dumps({**document, "rows": document["rows"][:100]}))
    (tmp_path / "job.json").write_text(json.dumps({**document, "wall": document["wall"] * 1.33}))
    assert run_benchmark(benchmark, tmp_path, monkeypatch) == 1
    printed = capsys.readouterr()
    assert "| no |" in printed.out
    assert printed.err == "sample_2: left out, the sample has 100 requests for 256 places\n"


def test_the_benchmark_says_that_a_folder_has_no_recordings(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_benchmark(benchmark, tmp_path, monkeypatch)
    assert "no job*.json with a sample*.json beside it" in capsys.readouterr().err


def test_a_recording_of_several_replicas(benchmark: Any, tmp_path: Path) -> None:
    rows = json.loads((RECORDED / "sample_512_0.json").read_text())["rows"]
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"wall": 14.0, "replicas": [rows[::2], rows[1::2]]}))
    found = benchmark.recorded(path, 128, 4096)
    assert [run.batch_size for run in found.runs] == [128, 128]
    assert found.lengths.requests == 512
    assert sorted(found.lengths.prompt_tokens) == sorted(row[0] for row in rows)
