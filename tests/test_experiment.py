"""The grid loop, with replicas that answer from a script instead of an engine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from array import array
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.growing_file import GrowingFile
from batch_inference.core.metrics import summarise
from batch_inference.core.queue_runs import LIVES
from batch_inference.core.result_file import load_result, save_result
from batch_inference.core.results import (
    Clocks,
    Counters,
    DeviceInfo,
    EngineInfo,
    Environment,
    Failure,
    LoadTimes,
    Memory,
    Peaks,
    Point,
    ReplicaRun,
    Requests,
    Result,
    Run,
    Warmup,
    WorkerInfo,
)
from batch_inference.core.text import short
from batch_inference.core.workload import Workload
from batch_inference.measure import experiment
from batch_inference.measure import job as job_module
from batch_inference.measure.combine import as_warmup, combine
from batch_inference.measure.console import Console, closing_table
from batch_inference.measure.engine_process import ReplicaError
from batch_inference.measure.experiment import Experiment
from batch_inference.measure.hardware import Reading, Seen
from batch_inference.measure.job import FEWEST_REQUESTS, JobFile
from batch_inference.measure.job_lengths import JobLengths
from batch_inference.measure.messages import Outcome, Prepare, Queue
from batch_inference.measure.resume import has_runs_enough, is_enough, keep_job, set_aside_engine, starting_result
from builders import make_point, make_queue_point, make_queue_run, make_result, make_run, make_timeline

DIFFER = "runs differ: after 10 the 95 % interval is over ±2%; keep other work off the devices, or raise --max-runs"
ENGINE = EngineInfo(
    vllm_version="0.32.0",
    dtype="bfloat16",
    weights_gib=1.0,
    kv_pool_gib=0.5,
    kv_cache_tokens=1000,
    max_num_seqs=8,
    load_s=LoadTimes(total_s=30.0),
)


def outcome(batch_size: int, seq_len: int, max_tokens: int, latency_s: float, **changes: Any) -> Outcome:
    requests = Requests(
        ttft_s=[0.1] * batch_size,
        latency_s=[latency_s] * batch_size,
        queue_s=[0.0] * batch_size,
        output_tokens=[max_tokens] * batch_size,
    )
    numbers = {
        "start_s": 0.0,
        "end_s": latency_s,
        "prompt_tokens": batch_size * seq_len,
        "output_tokens": batch_size * max_tokens,
        "preemptions": 0,
        "prefix_cache_hit_tokens": 0,
    }
    return Outcome(requests=requests, **{**numbers, **changes})


def sizes(point: Point) -> tuple[int | None, ...]:
    return (point.batch_size, point.seq_len, point.max_tokens)


class FakeReplicas:
    """Each run takes what `latency_s(batch_size, phase, index)` says; that of `fail_at` fails, and vLLM compiles
    kernels in those of `compiles_in` (phase, index)."""

    def __init__(
        self,
        latency_s: Callable[[int, str, int], float] = lambda *_: 2.0,
        *,
        fail_at: tuple[int, str, int] | Callable[[int, int], bool] | None = None,
        replicas: int = 1,
        changes: dict[str, Any] | None = None,
        compiles_in: Collection[tuple[str, int]] = (),
    ) -> None:
        self.latency_s, self.fail_at, self.replicas, self.changes = latency_s, fail_at, replicas, changes or {}
        self.error = ReplicaError("torch.OutOfMemoryError: CUDA out of memory", ["the log's end"])
        self.compiles_in = compiles_in
        self.starts = 0
        self.calls: list[tuple[int, str, int]] = []
        self.closed = self.hurried = False

    def start(self) -> list[EngineInfo]:
        self.starts += 1
        return [ENGINE] * self.replicas

    def prepare(self, prompts: Prepare) -> None:
        self.prompts = prompts

    def run(self) -> list[Outcome]:
        batch_size, seq_len = self.prompts.batch_size, self.prompts.seq_len
        *_, phase, index = self.prompts.stream
        assert isinstance(phase, str)
        assert isinstance(index, int)
        where = (batch_size, phase, index)
        if self.fail_at(batch_size, seq_len) if callable(self.fail_at) else self.fail_at == where:
            raise self.error
        self.calls.append((batch_size, phase, index))
        taken_s = self.latency_s(batch_size, phase, index)
        compiled = {"jit_compilations": 2} if (phase, index) in self.compiles_in else {}
        return [
            outcome(batch_size, seq_len, self.prompts.max_tokens, taken_s, **self.changes, **compiled)
        ] * self.replicas

    can_restart = True

    def pids(self) -> list[int]:
        return [1]

    def close(self, *, hurry: bool = False) -> None:
        self.closed, self.hurried = True, self.hurried or hurry


# A machine that has no counters for its devices.
UNREAD = Reading("replica", used_gib=[1.0], energy_j=[None])


class FakeMonitor:
    """Draws 50 J between any two readings."""

    joules = 0.0

    def read(self, _: Any = ()) -> Reading:
        self.joules += 50.0
        return Reading("device", used_gib=[2.5], energy_j=[self.joules], other_processes=[0])

    def held(self, _before: Any) -> str | None:
        return None

    @contextlib.contextmanager
    def watch(self) -> Iterator[Seen]:
        yield Seen(sm_mhz=[1980.0], peak_gib=[3.0], throttle_reasons=["gpu_idle"])


@pytest.fixture
def config(tmp_path: Path) -> ExperimentConfig:
    return ExperimentConfig(
        batch_sizes=(1, 4), seq_lens=(8,), max_tokens=4, output_file=str(tmp_path / "tp_1_results.json")
    )


def run(config: ExperimentConfig, replicas: FakeReplicas) -> Result:
    result = starting_result(config, Environment(started_at="then"))
    Experiment(config, result, FakeMonitor(), Console()).run(replicas)  # type: ignore[arg-type]
    on_disk = load_result(config.output_path)
    # What is saved need not stay in memory.
    assert [replace(point, runs=[], warmups=[]) for point in on_disk.points] == result.points
    if replicas.starts:
        assert replace(on_disk, points=[]) == replace(result, points=[])
    return on_disk


def test_throughput_is_exact(config: ExperimentConfig) -> None:
    result = run(config, FakeReplicas())
    assert result.status == "complete"
    assert [sizes(point) for point in result.points] == [(1, 8, 4), (4, 8, 4)]
    summary = result.points[1].summary
    assert summary["output_tok_per_s"] == 4 * 4 / 2.0
    assert summary["prompt_tok_per_s"] == 4 * 8 / 2.0
    assert summary["latency_mean_s"] == 2.0
    assert summary["latency_ci95_s"] == 0.0
    assert summary["energy_j_per_output_token"] == 50 / 16
    assert summary["memory_used_gib"] == 2.5
    assert result.points[1].verdict == "valid"


def test_num_runs_are_timed_after_the_warmups(config: ExperimentConfig) -> None:
    replicas = FakeReplicas()
    result = run(dataclasses.replace(config, num_runs=4), replicas)
    assert [len(point.runs) for point in result.points] == [4, 4]
    first_point = [(phase, index) for batch_size, phase, index in replicas.calls if batch_size == 1]
    assert first_point == [("warmup", 0), ("warmup", 1), ("run", 0), ("run", 1), ("run", 2), ("run", 3)]


def timed(times_s: list[float]) -> Callable[[int, str, int], float]:
    """Timed runs take these; warm-ups 1 s."""
    return lambda _, phase, index: times_s[index] if phase == "run" else 1.0


@pytest.mark.parametrize(
    ("times_s", "runs"),
    [
        ([1.0] * 10, 3),
        # The interval is 4.87 % after 3 runs, 2.99 % after 4, 1.90 % after 5.
        ([1.0, 1.014, 0.986, 1.007, 1.0, 9.0], 5),
        ([1.0, 1.1] * 5, 10),
    ],
)
def test_runs_go_on_until_the_interval_is_narrow_enough(
    config: ExperimentConfig, times_s: list[float], runs: int
) -> None:
    result = run(dataclasses.replace(config, batch_sizes=(1,)), FakeReplicas(timed(times_s)))
    assert [run.latency_s for run in result.points[0].runs] == times_s[:runs]


def test_target_and_limit_of_the_runs_are_the_flags(config: ExperimentConfig) -> None:
    noisy = FakeReplicas(timed([1.0, 1.014, 0.986, 1.007, 1.0] * 2))
    assert len(run(dataclasses.replace(config, target_ci=0.05), noisy).points[0].runs) == 3
    limited = dataclasses.replace(config, target_ci=0.001, max_runs=4, overwrite=True)
    assert len(run(limited, noisy).points[0].runs) == 4


def test_an_interval_that_is_not_reached_is_said(config: ExperimentConfig) -> None:
    result = run(config, FakeReplicas(timed([1.0, 1.06] * 5)))
    assert result.points[0].verdict_reasons == [DIFFER]


def test_a_single_run_is_suspect_because_nobody_knows_its_interval(config: ExperimentConfig) -> None:
    result = run(dataclasses.replace(config, num_runs=1), FakeReplicas())
    assert result.points[0].verdict == "suspect"
    assert result.points[0].verdict_reasons == ["a single run has no interval; raise --num-runs"]


def test_a_kernel_compiled_in_the_first_warmups_never_reaches_a_timed_run(config: ExperimentConfig) -> None:
    spikes = {0: 7.2, 1: 1.5}
    result = run(config, FakeReplicas(lambda _, phase, index: spikes.get(index, 1.0) if phase == "warmup" else 1.0))
    assert [warmup.latency_s for warmup in result.points[0].warmups] == [7.2, 1.5, 1.0, 1.0]
    assert {run.latency_s for run in result.points[0].runs} == {1.0}


def test_a_point_that_never_becomes_steady_is_measured_and_suspect(config: ExperimentConfig) -> None:
    result = run(config, FakeReplicas(lambda _, phase, index: 1.0 + index % 2 if phase == "warmup" else 1.0))
    assert len(result.points[0].warmups) == 5
    assert result.points[0].verdict == "suspect"
    assert "not steady after 5 warm-ups" in result.points[0].verdict_reasons[0]


def test_a_timed_run_that_compiled_becomes_a_warmup_and_is_repeated_when_steady_again(
    config: ExperimentConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    times_s = {("run", 1): 3.81, ("warmup", 3): 1.5}
    replicas = FakeReplicas(
        lambda _, phase, index: times_s.get((phase, index), 1.24), compiles_in=[("warmup", 0), ("run", 1)]
    )
    point = run(dataclasses.replace(config, batch_sizes=(1,), num_runs=3), replicas).points[0]
    assert point.warmups == [
        Warmup(1.24, jit_compilations=2),
        Warmup(1.24),
        Warmup(3.81, jit_compilations=2, reason=point.warmups[2].reason),
        Warmup(1.5),
        Warmup(1.24),
        Warmup(1.24),
    ]
    assert "until vLLM compiled a kernel during it" in str(point.warmups[2].reason)
    assert [run.latency_s for run in point.runs] == [1.24] * 3
    assert point.verdict == "valid"
    assert "vLLM compiled a kernel; the run becomes a warm-up and is repeated" in capsys.readouterr().err
    # Each with prompts of its own, the repeated one too.
    assert [index for _, phase, index in replicas.calls if phase == "run"] == [0, 1, 2, 3]


def test_a_run_that_is_slow_for_no_known_reason_stays(config: ExperimentConfig) -> None:
    point = run(config, FakeReplicas(timed([1.0, 3.1] + [1.0] * 8))).points[0]
    assert [run.latency_s for run in point.runs] == [1.0, 3.1] + [1.0] * 8
    assert len(point.warmups) == 2
    assert point.verdict_reasons == [DIFFER]


def test_compiling_again_and_again_ends_and_is_suspect(config: ExperimentConfig) -> None:
    always = [("run", index) for index in range(20)]
    point = run(dataclasses.replace(config, num_runs=3), FakeReplicas(compiles_in=always)).points[0]
    assert len(point.runs) == 3
    assert sum(warmup.reason is not None for warmup in point.warmups) == 3
    assert point.verdict_reasons == ["vLLM kept compiling kernels during timed runs; raise --warmup-runs"]


def test_a_last_warmup_that_compiled_is_not_steady(config: ExperimentConfig) -> None:
    point = run(config, FakeReplicas(compiles_in=[("warmup", index) for index in range(5)])).points[0]
    assert len(point.warmups) == 5
    assert point.verdict_reasons == [
        "not steady: vLLM was still compiling kernels in the last warm-up; raise --warmup-runs"
    ]


def test_more_warmups_are_made_when_asked_for(config: ExperimentConfig) -> None:
    result = run(dataclasses.replace(config, warmup_runs=7), FakeReplicas())
    assert len(result.points[0].warmups) == 7


def test_prompts_of_every_run_come_from_a_stream_of_their_own(config: ExperimentConfig) -> None:
    streams: list[tuple[Any, ...]] = []

    class Recorder(FakeReplicas):
        def prepare(self, prompts: Prepare) -> None:
            streams.append(tuple(prompts.stream))
            super().prepare(prompts)

    run(config, Recorder())
    assert len(set(streams)) == len(streams) == 10


@pytest.mark.parametrize(
    ("changes", "verdict", "said"),
    [
        ({"output_tokens": 15}, "invalid", "32 prompt and 15 output tokens came back, but 32 and 16 were asked for"),
        ({"prompt_tokens": 31}, "invalid", "31 prompt and 16 output tokens came back"),
        ({"prefix_cache_hit_tokens": 16}, "invalid", "48 prompt tokens came from the prefix cache"),
        ({"preemptions": 2}, "suspect", "6 requests were preempted"),
    ],
)
def test_each_reason_against_a_point_is_found(
    config: ExperimentConfig, changes: dict[str, Any], verdict: str, said: str
) -> None:
    result = run(dataclasses.replace(config, batch_sizes=(4,)), FakeReplicas(changes=changes))
    assert result.points[0].verdict == verdict
    assert said in result.points[0].verdict_reasons[0]


@pytest.mark.parametrize(
    ("batch_size", "seq_len", "said"),
    [(9, 8, "batch_size 9 is over max_num_seqs 8"), (8, 200, "the KV cache holds 4 of 8 requests")],
)
def test_a_batch_that_runs_in_waves_is_suspect(
    config: ExperimentConfig, batch_size: int, seq_len: int, said: str
) -> None:
    result = run(dataclasses.replace(config, batch_sizes=(batch_size,), seq_lens=(seq_len,)), FakeReplicas())
    assert result.points[0].verdict == "suspect"
    assert said in result.points[0].verdict_reasons[0]


@pytest.mark.parametrize(("spread", "verdict"), [(0.04, "valid"), (0.05, "suspect")])
def test_runs_that_differ_too_much_are_suspect(config: ExperimentConfig, spread: float, verdict: str) -> None:
    # The standard deviation is the spread, and the 95 % interval 4.303 / sqrt(3) = 2.48 of it.
    times_s = [1.0, 1.0 + spread, 1.0 - spread]
    result = run(dataclasses.replace(config, num_runs=3), FakeReplicas(timed(times_s)))
    assert result.points[0].verdict == verdict
    assert [reason[:11] for reason in result.points[0].verdict_reasons] == ["runs differ"] * (verdict == "suspect")


def test_a_setting_ended_while_its_engine_closes_is_complete(config: ExperimentConfig) -> None:
    class EndedWhileClosing(FakeReplicas):
        def close(self, *, hurry: bool = False) -> None:
            super().close(hurry=hurry)
            if not hurry:
                raise SystemExit(143)

    experiment = Experiment(config, starting_result(config, Environment()), FakeMonitor(), Console())  # type: ignore[arg-type]
    with pytest.raises(SystemExit):
        experiment.run(EndedWhileClosing())
    assert load_result(config.output_path).status == "complete"


def test_a_point_that_fails_after_some_runs_has_no_verdict_and_no_numbers(
    config: ExperimentConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(config, FakeReplicas(fail_at=(4, "run", 2)))
    point = result.points[1]
    assert (point.status, point.verdict, len(point.runs)) == ("oom", None, 2)
    assert set(point.summary.values()) == {None}
    assert "4 x 8: oom: torch.OutOfMemoryError: CUDA out of memory" in capsys.readouterr().err


def test_energy_is_read_after_the_prompts_are_made(config: ExperimentConfig) -> None:
    order: list[str] = []

    class Watched(FakeReplicas):
        def prepare(self, *words: Any) -> None:
            order.append("prepare")
            super().prepare(*words)

        def run(self) -> list[dict[str, Any]]:
            order.append("run")
            return super().run()

    class Watch(FakeMonitor):
        def read(self, _: Any = ()) -> dict[str, Any]:
            order.append("read")
            return super().read()

    experiment = Experiment(config, starting_result(config, Environment()), Watch(), Console())  # type: ignore[arg-type]
    experiment.run(Watched())
    # The first is what the devices hold before any engine.
    assert order[:5] == ["read", "prepare", "read", "run", "read"]


def test_replicas_that_see_their_own_devices_are_believed(config: ExperimentConfig) -> None:
    readings = tuple(Reading("device", used_gib=[1.0, 2.0], energy_j=[at_j, at_j]) for at_j in (1.0, 4.5))
    replicas = FakeReplicas(replicas=2, changes={"readings": readings})
    result = run(dataclasses.replace(config, data_parallel_size=2), replicas)
    measured = result.points[0].runs[0]
    assert measured.energy_j == 14.0
    assert measured.memory.used_gib == [1.0, 2.0, 1.0, 2.0]


def test_devices_that_ray_gives_out_are_not_watched_from_here(config: ExperimentConfig) -> None:
    for backend, clocks in (("mp", [1980.0]), ("ray", None)):
        result = run(dataclasses.replace(config, distributed_executor_backend=backend, overwrite=True), FakeReplicas())
        assert result.points[0].runs[0].clocks.sm_mhz == clocks


def test_the_peak_is_that_of_the_type_that_vllm_runs_in(config: ExperimentConfig) -> None:
    """Of a model whose own type only vLLM can read, as one from a hub."""
    environment = Environment(devices=[DeviceInfo(0, "NVIDIA H100 80GB HBM3")])
    result = starting_result(config, environment)
    Experiment(config, result, FakeMonitor(), Console()).run(FakeReplicas())  # type: ignore[arg-type]
    peaks = load_result(config.output_path).environment.peaks
    assert peaks is not None
    assert (peaks.flops_per_s, peaks.dtype) == (989.4e12, "bfloat16")


def test_a_device_without_a_counter_makes_the_energy_unknown(config: ExperimentConfig) -> None:
    readings = tuple(Reading("device", used_gib=[1.0, 2.0], energy_j=[at_j, None]) for at_j in (1.0, 4.5))
    measured = run(config, FakeReplicas(changes={"readings": readings})).points[0].runs[0]
    assert measured.energy_j is None
    assert "energy_j" in measured.unknown


def statuses(result: Result) -> dict[tuple[int, int], str]:
    return {(point.batch_size, point.seq_len): point.status for point in result.points}


def test_a_lost_engine_is_started_again_and_larger_batches_of_that_length_are_implied(config: ExperimentConfig) -> None:
    replicas = FakeReplicas(fail_at=lambda batch_size, seq_len: batch_size == 4 and seq_len == 16)
    result = run(dataclasses.replace(config, batch_sizes=(1, 4, 8), seq_lens=(16, 8)), replicas)
    assert statuses(result) == {
        (1, 16): "ok", (4, 16): "oom", (8, 16): "skipped", (1, 8): "ok", (4, 8): "ok", (8, 8): "ok",
    }  # fmt: skip
    lost, implied = result.points[1:3]
    assert (lost.reason, lost.failure) == ("torch.OutOfMemoryError: CUDA out of memory", "oom_run")
    assert lost.log_tail == ["the log's end"]
    assert implied.reason == "implied by batch_size 4: oom_run"
    assert (replicas.starts, result.restarts, result.status) == (2, 1, "complete")


def test_batches_in_falling_order_are_implied_by_no_larger_one(config: ExperimentConfig) -> None:
    result = run(dataclasses.replace(config, batch_sizes=(8, 4, 1)), FakeReplicas(fail_at=lambda size, _: size == 8))
    assert statuses(result) == {(8, 8): "oom", (4, 8): "ok", (1, 8): "ok"}


def test_no_engine_is_started_for_points_that_are_all_implied(config: ExperimentConfig) -> None:
    replicas = FakeReplicas(fail_at=(4, "warmup", 0))
    result = run(dataclasses.replace(config, batch_sizes=(1, 4, 8)), replicas)
    assert statuses(result) == {(1, 8): "ok", (4, 8): "oom", (8, 8): "skipped"}
    assert replicas.starts == 1
    assert replicas.closed


def test_two_losses_in_a_row_end_the_sweep(config: ExperimentConfig) -> None:
    replicas = FakeReplicas(fail_at=lambda size, _: size == 1)
    result = run(dataclasses.replace(config, batch_sizes=(4, 1), seq_lens=(8, 16, 32)), replicas)
    # A point that went well in between is no row.
    assert list(statuses(result).values()) == ["ok", "oom"] * 3
    replicas = FakeReplicas(fail_at=lambda *_: True)
    result = run(dataclasses.replace(config, batch_sizes=(1,), seq_lens=(8, 16, 32), overwrite=True), replicas)
    assert list(statuses(result).values()) == ["oom", "oom", "skipped"]
    assert result.points[2].reason == "2 engines were lost one after another, the last at batch_size 1, seq_len 16"
    assert (replicas.starts, result.status) == (2, "partial")


def test_an_engine_that_does_not_come_back_ends_the_sweep(config: ExperimentConfig) -> None:
    class OnlyOnce(FakeReplicas):
        def start(self) -> list[EngineInfo]:
            if self.starts:
                raise ReplicaError("ValueError: Free memory on device", [])
            return super().start()

    result = run(dataclasses.replace(config, seq_lens=(8, 16)), OnlyOnce(fail_at=(4, "warmup", 0)))
    assert list(statuses(result).values()) == ["ok", "oom", "skipped", "skipped"]
    said = "the engine did not come back after batch_size 4, seq_len 8: ValueError: Free memory on device"
    assert result.points[2].reason == said
    assert result.status == "partial"


def test_ranks_that_cannot_be_called_back_leave_the_rest_of_the_grid(config: ExperimentConfig) -> None:
    replicas = FakeReplicas(fail_at=(4, "warmup", 0))
    replicas.can_restart = False
    result = run(dataclasses.replace(config, seq_lens=(8, 16)), replicas)
    assert list(statuses(result).values()) == ["ok", "oom", "skipped", "skipped"]
    assert result.points[2].reason == "the engine was lost at batch_size 4, seq_len 8"


def test_a_hang_is_a_timeout(config: ExperimentConfig) -> None:
    replicas = FakeReplicas(fail_at=(4, "run", 1))
    replicas.error = ReplicaError("no answer within --point-timeout 900 s", [], "timeout_point")
    point = run(config, replicas).points[1]
    assert (point.status, point.failure, point.verdict) == ("timeout", "timeout_point", None)


def test_devices_that_hold_memory_stop_the_sweep_and_name_the_holder(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "DEVICES_TIMEOUT_S", 0.0)
    monkeypatch.setattr(FakeMonitor, "held", lambda *_: "GPU 0 holds 12.5 GiB more than before, for process 7")
    replicas = FakeReplicas(fail_at=(4, "warmup", 0))
    result = run(dataclasses.replace(config, seq_lens=(8, 16)), replicas)
    assert "for process 7" in (result.points[2].reason or "")
    assert replicas.starts == 1


def test_other_nodes_are_dismissed_before_their_memory_is_waited_for(config: ExperimentConfig) -> None:
    happened: list[str] = []

    class Nodes:
        def dismiss(self, *, failed: bool) -> None:
            happened.append(f"dismissed, failed: {failed}")

    class Watch(FakeMonitor):
        def held(self, _before: Any) -> str | None:
            happened.append("waited")
            return None

    sweep = Experiment(config, starting_result(config, Environment()), Watch(), Console())  # type: ignore[arg-type]
    sweep.run(FakeReplicas(), Nodes())  # type: ignore[arg-type]
    assert happened == ["dismissed, failed: False", "waited"]


def test_an_engine_that_does_not_start_leaves_a_failed_file(config: ExperimentConfig) -> None:
    class Broken(FakeReplicas):
        def start(self) -> list[EngineInfo]:
            raise ReplicaError("ValueError: no", ["tail"])

    result = run(config, Broken())
    assert result.status == "failed"
    assert result.failure == Failure("unknown", "ValueError: no", ["tail"])
    assert result.points == []


def test_an_interrupted_sweep_leaves_its_finished_points_on_disk(config: ExperimentConfig) -> None:
    class Interrupted(FakeReplicas):
        def run(self) -> list[Outcome]:
            if self.prompts.batch_size == 4:
                raise KeyboardInterrupt
            return super().run()

    replicas = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        run(config, replicas)
    on_disk = load_result(config.output_path)
    assert on_disk.status == "partial"
    assert [sizes(point) for point in on_disk.points] == [(1, 8, 4)]
    assert replicas.closed
    assert replicas.hurried


def test_replicas_are_summed_and_timed_to_the_last_end() -> None:
    first, second = outcome(2, 8, 4, 1.0), outcome(2, 8, 4, 1.5, start_s=0.1)
    combined = combine([first, second], UNREAD, UNREAD, Seen())
    assert combined.latency_s == 1.5
    assert (combined.prompt_tokens, combined.output_tokens) == (32, 16)
    assert combined.requests.latency_s == [1.0, 1.0, 1.5, 1.5]
    assert [replica.end_s for replica in combined.replicas] == [1.0, 1.5]
    assert combined.energy_j is None
    assert "energy_j" in combined.unknown


def test_what_replicas_report_beyond_the_needed_is_joined_and_kept() -> None:
    first = outcome(2, 8, 4, 1.0, peak_running=2, peak_kv_use=0.25, jit_compilations=1)
    second = outcome(2, 8, 4, 1.0, peak_running=1, peak_kv_use=0.5, jit_compilations=3)
    combined = combine([first, second], UNREAD, UNREAD, Seen())
    assert combined.counters == Counters(
        preemptions=0,
        prefix_cache_hit_tokens=0,
        jit_compilations=4,
        peak_running=1,
    )
    # What no replica tells is unknown; what one tells is at least that.
    assert combine([outcome(2, 8, 4, 1.0)] * 2, UNREAD, UNREAD, Seen()).counters == Counters(0, 0)
    one_tells = combine([second, outcome(2, 8, 4, 1.0)], UNREAD, UNREAD, Seen())
    assert one_tells.counters.jit_compilations == 3
    assert combined.memory == Memory("replica", used_gib=[1.0], peak_kv_use=0.5)
    assert combined.clocks == Clocks()


def test_what_the_devices_showed_meanwhile_is_kept(config: ExperimentConfig) -> None:
    measured = run(config, FakeReplicas()).points[0].runs[0]
    assert measured.memory == Memory("device", used_gib=[2.5], peak_gib=[3.0])
    assert measured.clocks == Clocks(sm_mhz=[1980.0], throttle_reasons=["gpu_idle"], other_processes=0)


def test_the_work_of_a_device_is_that_of_the_busiest_replica() -> None:
    idle, busy = outcome(2, 8, 4, 1.0, flops_per_device=5), outcome(2, 8, 4, 1.0, flops_per_device=7)
    assert combine([idle, busy], UNREAD, UNREAD, Seen()).counters.flops_per_device == 7


def test_resume_measures_only_what_is_missing(config: ExperimentConfig) -> None:
    run(config, FakeReplicas(fail_at=(4, "warmup", 0)))
    replicas = FakeReplicas()
    grown = dataclasses.replace(config, resume=True, batch_sizes=(1, 4, 8))
    result = run(grown, replicas)
    assert {batch_size for batch_size, *_ in replicas.calls} == {4, 8}
    assert sorted(sizes(point) for point in result.points) == [(1, 8, 4), (4, 8, 4), (8, 8, 4)]
    assert result.status == "complete"
    assert result.environment.resumed_from == ["then"]


def test_a_point_stays_as_it_was_measured_when_the_next_sweep_has_a_fixed_number_of_runs(
    config: ExperimentConfig,
) -> None:
    """Runs that ended by their own interval need a wider one."""
    adaptive = dataclasses.replace(config, num_runs=None, target_ci=0.5, batch_sizes=(1,))
    (before,) = run(adaptive, FakeReplicas()).points
    fixed = dataclasses.replace(config, num_runs=3, batch_sizes=(1, 2))
    run(fixed, FakeReplicas())
    result = load_result(config.output_path)
    assert [(point.batch_size, result.is_adaptive(point)) for point in result.points] == [(1, True), (2, False)]
    assert summarise(result, result.points[0])["latency_ci95_s"] == before.summary["latency_ci95_s"]
    run(dataclasses.replace(adaptive, batch_sizes=(1, 2, 4)), FakeReplicas())
    result = load_result(config.output_path)
    kept = {point.batch_size: result.is_adaptive(point) for point in result.points}
    assert kept == {1: True, 2: False, 4: True}


def test_resume_with_nothing_open_starts_no_engine_and_keeps_the_file(config: ExperimentConfig) -> None:
    before = run(config, FakeReplicas())
    replicas = FakeReplicas(fail_at=(1, "warmup", 0))
    after = run(dataclasses.replace(config, resume=True), replicas)
    assert replicas.calls == []
    assert after == before


def test_a_wrong_flag_found_by_vllm_costs_no_old_measurement(config: ExperimentConfig) -> None:
    class Wrong(FakeReplicas):
        def start(self) -> list[EngineInfo]:
            raise ConfigError("--quantisation is not a flag")

    run(config, FakeReplicas())
    before = config.output_path.read_text()
    with pytest.raises(ConfigError):
        run(dataclasses.replace(config, overwrite=True), Wrong())
    assert config.output_path.read_text() == before


@pytest.mark.parametrize("already_there", [True, False])
def test_interrupted_while_loading_leaves_the_old_file_or_a_partial_one(
    config: ExperimentConfig, already_there: bool
) -> None:
    class Interrupted(FakeReplicas):
        def start(self) -> list[EngineInfo]:
            raise KeyboardInterrupt

    if already_there:
        run(config, FakeReplicas())
    with pytest.raises(KeyboardInterrupt):
        run(dataclasses.replace(config, overwrite=True), Interrupted())
    on_disk = load_result(config.output_path)
    assert on_disk.status == ("complete" if already_there else "partial")
    assert len(on_disk.points) == (2 if already_there else 0)


def test_interrupted_while_saving_loses_no_point(config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted_once(of: GrowingFile, line: str) -> None:
        append(of, line)
        if not saved:
            saved.append(line)
            raise KeyboardInterrupt

    saved: list[str] = []
    append = GrowingFile._append
    monkeypatch.setattr(GrowingFile, "_append", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        run(config, FakeReplicas())
    on_disk = load_result(config.output_path)
    assert (on_disk.status, [point.batch_size for point in on_disk.points]) == ("partial", [1])


def test_resume_measures_invalid_points_again(config: ExperimentConfig) -> None:
    before = run(config, FakeReplicas(changes={"prefix_cache_hit_tokens": 1}))
    assert {point.verdict for point in before.points} == {"invalid"}
    after = run(dataclasses.replace(config, resume=True), FakeReplicas())
    assert [(point.batch_size, point.verdict) for point in after.points] == [(1, "valid"), (4, "valid")]


def test_points_of_an_earlier_sweep_keep_the_engine_that_measured_them(config: ExperimentConfig) -> None:
    class Larger(FakeReplicas):
        def start(self) -> list[EngineInfo]:
            return [replace(ENGINE, max_num_seqs=64, kv_cache_tokens=500)]

    run(config, FakeReplicas())
    result = run(dataclasses.replace(config, batch_sizes=(1, 4, 64), resume=True), Larger())
    assert [point.engine for point in result.points] == [0, 0, None]
    assert result.earlier_engines == [ENGINE]
    assert [point.summary["kv_use"] for point in result.points] == [12 / 1000, 48 / 1000, 768 / 500]
    assert summarise(result, result.points[0]) == result.points[0].summary


def test_points_with_fewer_runs_than_asked_are_measured_again_and_kept_until_then(config: ExperimentConfig) -> None:
    run(dataclasses.replace(config, num_runs=3), FakeReplicas())
    replicas = FakeReplicas(fail_at=(4, "warmup", 0))
    result = run(dataclasses.replace(config, num_runs=5), replicas)
    found = {point.batch_size: (point.status, len(point.runs)) for point in result.points}
    assert found == {1: ("ok", 5), 4: ("ok", 3)}
    enough = FakeReplicas()
    run(dataclasses.replace(config, num_runs=2), enough)
    assert enough.calls == []


def test_points_that_others_ran_beside_are_measured_again_alone(config: ExperimentConfig) -> None:
    run(dataclasses.replace(config, packed=True), FakeReplicas())
    beside = FakeReplicas()
    run(dataclasses.replace(config, packed=True), beside)
    assert beside.calls == []
    assert [point.verdict for point in run(config, FakeReplicas()).points] == ["valid", "valid"]


def test_saving_writes_each_point_about_three_times_however_many_there_are(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: written.append(os.fstat(file).st_size))
    config = dataclasses.replace(config, batch_sizes=(1,), seq_lens=tuple(range(1, 257)), num_runs=1)
    run(config, FakeReplicas())
    folds = len(written) - 256  # one journal line for each point
    assert folds <= 12


def test_the_closing_table_fits_80_columns(config: ExperimentConfig) -> None:
    result = run(config, FakeReplicas())
    numbers = dict.fromkeys(result.points[0].summary, 99999.9) | {"runs": 10.0}
    long = Point(4096, 131072, 128, "ok", verdict="suspect", summary=numbers)
    result.points.append(long)
    result.points.append(Point(8192, 131072, 128, "skipped", reason="x"))
    lines = closing_table(result).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1].split() == ["8192", "131072", "skipped"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (24531.4, "24531"), (213.82, "213.8"), (1.5, "1.500"), (0.0047, "0.0047"), (0.0, "0.0000")],
)
def test_numbers_are_short_and_plain(value: float | None, text: str) -> None:
    assert short(value) == text


def test_the_file_is_valid_json_without_nan(config: ExperimentConfig) -> None:
    run(config, FakeReplicas())
    text = config.output_path.read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the file"))


# --- what is enough, what is kept, and what is said of it ----------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "enough"),
    [
        ({}, True),
        ({"warmup_runs": 2}, True),
        ({"warmup_runs": 3}, False),
        ({"num_runs": 3}, True),
        ({"num_runs": 4}, False),
        ({"num_runs": 1}, True),
        ({"target_ci": 0.001}, False),
        ({"target_ci": 0.001, "max_runs": 3}, True),
    ],
)
def test_a_point_is_enough_where_it_has_all_that_is_asked_now(
    config: ExperimentConfig, changes: dict[str, Any], enough: bool
) -> None:
    point = make_point(latencies_s=[1.0, 1.001, 0.999], warmups=[{"latency_s": 1.0}] * 2)
    asked = dataclasses.replace(config, **changes)
    assert is_enough(point, asked) is enough
    packed = replace(point, verdict_reasons=["packed: other settings ran beside it"])
    assert not is_enough(packed, asked)
    assert is_enough(packed, dataclasses.replace(asked, packed=True)) is enough


def test_only_what_was_measured_and_is_believed_is_gone_on_with(config: ExperimentConfig) -> None:
    points = [
        make_point(1, 8),
        make_point(2, 8, verdict="suspect"),
        make_point(4, 8, verdict="invalid"),
        make_point(8, 8, status="error", verdict=None),
    ]
    before = {"started_at": "then", "resumed_from": ["long ago"]}
    save_result(make_result(points=points, environment=before), config.output_path)
    environment = Environment(started_at="now")
    assert [point.batch_size for point in starting_result(config, environment).points] == [1, 2]
    assert environment.resumed_from == ["long ago", "then"]
    assert starting_result(dataclasses.replace(config, overwrite=True), Environment()).points == []


def test_a_file_without_a_good_point_is_no_beginning(config: ExperimentConfig) -> None:
    save_result(make_result(points=[make_point(1, 8, verdict="invalid")]), config.output_path)
    environment = Environment(started_at="now")
    assert starting_result(config, environment).points == []
    assert environment.resumed_from == []


def test_an_engine_is_set_aside_for_the_points_that_it_measured() -> None:
    result = make_result(points=[make_point(1), make_point(2)])
    result.earlier_engines, result.points[0].engine = [EngineInfo("0.26.0")], 0
    set_aside_engine(result)
    assert [point.engine for point in result.points] == [0, 1]
    assert [engine.vllm_version for engine in result.earlier_engines] == ["0.26.0", "0.32.0"]
    # Nothing is left that it has measured.
    set_aside_engine(result)
    assert len(result.earlier_engines) == 2
    none = make_result()
    none.engine = None
    set_aside_engine(none)
    assert none.earlier_engines == []


def swept(config: ExperimentConfig, replicas: FakeReplicas, monitor: Any = None, **environment: Any) -> Experiment:
    result = starting_result(config, Environment(**environment))
    sweep = Experiment(config, result, monitor or FakeMonitor(), Console())
    sweep.run(replicas)
    return sweep


def test_a_sweep_is_whole_where_every_point_is_measured_and_none_failed_on_the_way(config: ExperimentConfig) -> None:
    assert swept(config, FakeReplicas()).is_whole
    # A point that fails in place of a good one takes nothing from it, and yet the sweep is not whole.
    more = dataclasses.replace(config, num_runs=5)
    again = swept(more, FakeReplicas(fail_at=(4, "warmup", 0)))
    assert all(point.status == "ok" for point in again.result.points)
    assert not again.is_whole
    lost = swept(dataclasses.replace(config, overwrite=True), FakeReplicas(fail_at=(4, "warmup", 0)))
    assert not lost.is_whole


def test_a_lost_engine_is_not_waited_for(config: ExperimentConfig) -> None:
    good, lost = FakeReplicas(), FakeReplicas(fail_at=(4, "warmup", 0))
    swept(config, good)
    swept(dataclasses.replace(config, overwrite=True), lost)
    assert (good.hurried, lost.hurried) == (False, True)

    # One that came back ends in order.
    class Closing(FakeReplicas):
        def close(self, *, hurry: bool = False) -> None:
            super().close(hurry=hurry)
            closings.append(hurry)

    closings: list[bool] = []
    grid = dataclasses.replace(config, overwrite=True, batch_sizes=(4, 1))
    swept(grid, Closing(fail_at=(4, "warmup", 0)))
    assert closings == [True, False]


def test_memory_that_does_not_come_back_in_the_end_is_a_warning(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert swept(config, FakeReplicas()).is_whole
    assert "warning" not in capsys.readouterr().err
    clock = SimpleNamespace(now_s=0.0)

    def sleep(seconds: float) -> None:
        clock.now_s += seconds

    monkeypatch.setattr(experiment, "time", SimpleNamespace(monotonic=lambda: clock.now_s, sleep=sleep))

    class Holding(FakeMonitor):
        until_s = 1e9

        def held(self, _before: Any) -> str | None:
            return "GPU 0 holds 12.5 GiB more than before, for process 7" if clock.now_s < self.until_s else None

    again = dataclasses.replace(config, overwrite=True)
    assert swept(again, FakeReplicas(), Holding()).is_whole
    assert 60.0 <= clock.now_s < 61.0
    said = "warning: device memory did not come back within 60 s: GPU 0 holds 12.5 GiB more than before, for process 7"
    assert said in capsys.readouterr().err
    # What takes its time is waited for.
    clock.now_s, Holding.until_s = 0.0, 30.0
    swept(again, FakeReplicas(), Holding())
    assert 30.0 <= clock.now_s < 31.0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(("asked", "made"), [(1, 5), (3, 5), (5, 5), (6, 6), (9, 9)])
def test_warmups_that_never_agree_end_at_five_or_at_as_many_as_asked(
    config: ExperimentConfig, asked: int, made: int
) -> None:
    never = FakeReplicas(lambda _, phase, index: 1.0 + index % 2 if phase == "warmup" else 1.0)
    point = run(dataclasses.replace(config, warmup_runs=asked), never).points[0]
    assert len(point.warmups) == made
    assert f"not steady after {made} warm-ups" in point.verdict_reasons[0]


def test_as_many_warmups_as_asked_are_made_though_they_agree_earlier(config: ExperimentConfig) -> None:
    for asked, made in ((1, 2), (2, 2), (4, 4), (6, 6)):
        point = run(dataclasses.replace(config, warmup_runs=asked, overwrite=True), FakeReplicas()).points[0]
        assert len(point.warmups) == made


def test_a_run_that_compiled_counts_as_the_first_warmup_of_its_series(config: ExperimentConfig) -> None:
    for asked, made in ((1, 2 + 2), (3, 3 + 3), (4, 4 + 4)):
        replicas = FakeReplicas(compiles_in=[("run", 0)])
        asked_for = dataclasses.replace(config, warmup_runs=asked, batch_sizes=(1,), overwrite=True)
        assert len(run(asked_for, replicas).points[0].warmups) == made


def test_each_replica_is_kept_where_there_are_several(config: ExperimentConfig) -> None:
    one = run(config, FakeReplicas()).engine
    assert one is not None
    assert one.replicas == []
    two = run(dataclasses.replace(config, data_parallel_size=2, overwrite=True), FakeReplicas(replicas=2)).engine
    assert two is not None
    assert [replica.kv_cache_tokens for replica in two.replicas] == [1000, 1000]


@pytest.mark.parametrize(
    ("backend", "kind", "names"),
    [("mp", "gpu", ["here"]), ("ray", "gpu", ["there", "there too"]), ("external_launcher", "cpu", ["here"])],
)
def test_devices_that_are_elsewhere_are_those_that_the_workers_name(
    config: ExperimentConfig, backend: str, kind: Any, names: list[str]
) -> None:
    workers = [
        WorkerInfo(1, 1, device=DeviceInfo(0, "there")),
        WorkerInfo(1, 1),
        WorkerInfo(1, 1, device=DeviceInfo(0, "there too")),
    ]

    class WithWorkers(FakeReplicas):
        def start(self) -> list[EngineInfo]:
            super().start()
            return [replace(ENGINE, workers=workers)]

    asked = dataclasses.replace(config, distributed_executor_backend=backend)
    found = swept(asked, WithWorkers(), device_kind=kind, devices=[DeviceInfo(0, "here")]).result
    assert [device.name for device in found.environment.devices] == names


def test_a_peak_that_was_measured_is_not_replaced_by_a_datasheets(config: ExperimentConfig) -> None:
    measured = Peaks(1e12, 1e11, "measured")
    h100 = [DeviceInfo(0, "NVIDIA H100 80GB HBM3")]
    assert swept(config, FakeReplicas(), devices=h100, peaks=measured).result.environment.peaks == measured


def test_sums_of_replicas_and_their_extremes() -> None:
    first = outcome(2, 8, 4, 1.0, preemptions=1, prefix_cache_hit_tokens=16, memory_bytes_per_device=5, passed_s=1.25)
    second = outcome(2, 8, 4, 1.5, preemptions=2, prefix_cache_hit_tokens=32, memory_bytes_per_device=7, passed_s=1.75)
    energy = [Reading("device", [1.0, 2.0], [joules, 2 * joules]) for joules in (10.0, 25.0)]
    seen = Seen(sm_mhz=[1980.0], peak_gib=[3.0], throttle_reasons=["gpu_idle"])
    combined = combine([first, second], *energy, seen)
    assert (combined.counters.preemptions, combined.counters.prefix_cache_hit_tokens) == (3, 48)
    assert combined.counters.memory_bytes_per_device == 7
    assert (combined.latency_s, combined.passed_s) == (1.5, 1.75)
    assert (combined.energy_j, combined.unknown) == (45.0, {})
    assert (combined.memory.used_gib, combined.memory.peak_gib) == ([1.0, 2.0], [3.0])
    assert combined.requests.ttft_s == [0.1] * 4
    assert combined.requests.output_tokens == [4] * 4


def test_every_number_of_a_run_has_its_place() -> None:
    """Each with a value of its own, and the second replica's beside the first's."""

    def one(number: int) -> Outcome:
        base = 100.0 * number
        return Outcome(
            start_s=base + 1, end_s=base + 2, prompt_tokens=int(base) + 3, output_tokens=int(base) + 4,
            requests=Requests([base + 5], [base + 6], [base + 7], [int(base) + 8]),
            prefix_cache_hit_tokens=int(base) + 9, preemptions=int(base) + 10, peak_running=int(base) + 11,
            peak_kv_use=base + 12, flops_per_device=int(base) + 13, memory_bytes_per_device=int(base) + 14,
            jit_compilations=int(base) + 15, passed_s=base + 16,
        )  # fmt: skip

    before = Reading("device", used_gib=[1.0, 2.0], energy_j=[10.0, 20.0], other_processes=[5, 6])
    after = Reading("device", used_gib=[3.0, 4.0], energy_j=[11.0, 22.0], other_processes=[1, 2])
    seen = Seen(sm_mhz=[1980.0, None], peak_gib=[7.0, 8.0], throttle_reasons=["gpu_idle"])
    for outcomes in ([one(1), one(2)], [one(2), one(1)]):
        first, second = outcomes
        run = combine(outcomes, before, after, seen)
        assert run == Run(
            latency_s=202.0,
            prompt_tokens=306,
            output_tokens=308,
            replicas=[
                ReplicaRun(0, first.start_s, first.end_s, first.prompt_tokens, first.output_tokens),
                ReplicaRun(1, second.start_s, second.end_s, second.prompt_tokens, second.output_tokens),
            ],
            requests=Requests(
                [*first.requests.ttft_s, *second.requests.ttft_s],
                [*first.requests.latency_s, *second.requests.latency_s],
                [*first.requests.queue_s, *second.requests.queue_s],
                [*first.requests.output_tokens, *second.requests.output_tokens],
            ),
            energy_j=3.0,
            passed_s=216.0,
            memory=Memory("device", used_gib=[3.0, 4.0], peak_gib=[7.0, 8.0], peak_kv_use=212.0),
            counters=Counters(
                preemptions=320, prefix_cache_hit_tokens=318, jit_compilations=330, peak_running=111,
                flops_per_device=213, memory_bytes_per_device=214,
            ),
            unknown={},
            clocks=Clocks(sm_mhz=[1980.0, None], throttle_reasons=["gpu_idle"], other_processes=3),
        )  # fmt: skip
    blind = combine([one(1)], replace(before, energy_j=[None, 1.0]), after, seen)
    assert blind.energy_j is None
    assert blind.unknown == {"energy_j": "this machine has no energy counter for its devices"}


@pytest.mark.parametrize(("compilations", "kept"), [(None, None), (0, None), (3, 3)])
def test_a_warm_up_keeps_its_time_its_kernels_and_its_reason(compilations: int | None, kept: int | None) -> None:
    run = make_run(1.5, counters={"jit_compilations": compilations})
    assert as_warmup(run) == Warmup(1.5, kept, None)
    assert as_warmup(run, "why") == Warmup(1.5, kept, "why")


@pytest.mark.parametrize(
    ("num_runs", "latencies_s", "enough"),
    [
        (3, [1.0, 2.0, 3.0], True),  # however wide
        (4, [1.0, 1.0, 1.0], False),  # however narrow
        (None, [1.0, 2.0, 3.0], False),
        (None, [1.0, 1.0, 1.0], True),
        (None, [1.0, 1.0], False),
        (None, [1.0, 2.0, 3.0, 4.0, 5.0], True),  # as many as are allowed
    ],
)
def test_runs_are_counted_where_a_number_was_asked_for_and_judged_where_not(
    num_runs: int | None, latencies_s: list[float], enough: bool, config: ExperimentConfig
) -> None:
    asked = dataclasses.replace(config, num_runs=num_runs, target_ci=0.02, max_runs=5)
    assert has_runs_enough(make_point(latencies_s=latencies_s), asked) is enough


# --- queues -----------------------------------------------------------------------------------------------------------


class QueueReplicas(FakeReplicas):
    """Whose requests start together, as many as may run at once, and take a second each. What is asked is written
    down; that of `fail_at` (batch size, phase) fails."""

    def __init__(self, *, fail_queue: tuple[int, str] | None = None, miscounted: int = 0, replicas: int = 1) -> None:
        super().__init__(replicas=replicas)
        self.fail_queue, self.miscounted = fail_queue, miscounted
        self.asked: list[Queue] = []

    def prepare(self, prompts: Any) -> None:
        self.prompts = prompts
        self.asked.append(prompts)

    def run(self) -> list[Outcome]:
        queue: Any = self.prompts
        phase = queue.stream[-2]
        if self.fail_queue == (queue.batch_size, phase):
            raise self.error
        return [self._ran(share, queue.batch_size) for share in queue.shares]

    def _ran(self, share: list[Any], batch_size: int) -> Outcome:
        starts_s = [float(number // batch_size) for number in range(len(share))]
        outputs = [one.max_tokens for one in share]
        prompts = [one.prompt if isinstance(one.prompt, int) else len(one.prompt) for one in share]
        requests = Requests(
            ttft_s=starts_s, latency_s=[start_s + 1 for start_s in starts_s], queue_s=starts_s, output_tokens=outputs,
            arrival_s=[0.0] * len(share), prompt_tokens=prompts,
        )  # fmt: skip
        rounds = -(-len(share) // batch_size)
        return Outcome(
            0.0, float(rounds) or 1e-3, sum(prompts), sum(outputs), requests, 0, miscounted=self.miscounted,
            timeline=make_timeline(batch_size, rounds, 1.0, 100, 10), peak_running=min(batch_size, len(share)) or None,
        )  # fmt: skip

    @property
    def measured(self) -> list[tuple[int, str, int]]:
        """Batch size, phase and requests of each run."""
        return [(one.batch_size, str(one.stream[-2]), sum(map(len, one.shares))) for one in self.asked]


@pytest.fixture
def job(config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> ExperimentConfig:
    """What is asked of a workload of 500 requests of 100 and 10 tokens."""
    monkeypatch.setattr(job_module, "ids_of", lambda _workload, _config, indices: [None] * len(indices))
    return dataclasses.replace(config, prompts_file="job.jsonl", workload_hash="abc", workload_longest=110)


def queued(config: ExperimentConfig, replicas: FakeReplicas, requests: int = 500) -> Result:
    outputs = config.output_lengths if isinstance(config.output_lengths, int) else 10
    lengths = array("I", [100] * requests), array("I", [outputs] * requests)
    found = JobFile(config, JobLengths(Workload(Path("job.jsonl")), *lengths, None))
    result = starting_result(config, Environment(started_at="then"))
    Experiment(config, result, FakeMonitor(), Console(), found).run(replicas)  # type: ignore[arg-type]
    on_disk = load_result(config.output_path)
    assert [replace(point, runs=[], warmups=[]) for point in on_disk.points] == result.points
    return on_disk


def test_all_batch_sizes_of_a_queue_are_measured_on_one_load_by_one_run_each(job: ExperimentConfig) -> None:
    replicas = QueueReplicas()
    result = queued(job, replicas)
    assert replicas.starts == 1
    assert replicas.measured == [
        (1, "warmup", 2), (1, "run", FEWEST_REQUESTS), (4, "warmup", 8), (4, "run", 4 * LIVES),
    ]  # fmt: skip
    assert [(point.batch_size, point.seq_len, point.max_tokens) for point in result.points] == [
        (1, None, None), (4, None, None),
    ]  # fmt: skip
    assert [(point.verdict, len(point.runs), len(point.warmups)) for point in result.points] == [("valid", 1, 1)] * 2
    # 4 x 10 tokens of each second.
    assert [point.summary["plateau_output_tok_per_s"] for point in result.points] == [10.0, 40.0]
    assert [point.plateau_interval_by for point in result.points] == ["batch means"] * 2
    assert result.status == "complete"


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        # The warm-ups of 2 and 8 requests take 2 s, the samples 32 s and 12 s.
        ({}, []),
        ({"point_timeout": 22.0}, []),
        ({"point_timeout": 21.9}, [(1, 22)]),
        ({"point_timeout": 8.0}, [(1, 22), (4, 9)]),
        ({"point_timeout": 8.0, "sample": 8}, []),
        ({"point_timeout": 8.0, "warmup_runs": 3}, [(1, 22), (4, 9)]),
    ],
)
def test_a_sample_that_will_take_too_long_is_foretold(
    job: ExperimentConfig, changes: dict[str, Any], sizes: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    """But never given up beforehand."""
    result = queued(dataclasses.replace(job, **changes), QueueReplicas())
    assert [point.status for point in result.points] == ["ok", "ok"]
    said = " ".join(capsys.readouterr().err.split())
    warnings = re.findall(
        r"(\d+) at once: warning: at the pace of its warm-up the sample takes (\d+) s or more, ", said
    )
    assert [(int(size), int(seconds)) for size, seconds in warnings] == sizes
    advice = f"over --point-timeout {changes.get('point_timeout', 900):g}; raise it, or give a smaller --sample"
    assert said.count(advice) == len(sizes)


def test_a_warmup_that_compiled_foretells_nothing(job: ExperimentConfig, capsys: pytest.CaptureFixture[str]) -> None:
    class Compiling(QueueReplicas):
        def run(self) -> list[Outcome]:
            compiled = 1 if self.prompts.stream[-2] == "warmup" else 0
            return [replace(one, jit_compilations=compiled) for one in super().run()]

    queued(dataclasses.replace(job, point_timeout=8.0), Compiling())
    assert "--point-timeout" not in capsys.readouterr().err


def test_every_run_of_a_queue_has_a_stream_of_its_own(job: ExperimentConfig) -> None:
    replicas = QueueReplicas()
    queued(dataclasses.replace(job, num_runs=2, warmup_runs=2), replicas)
    streams = {tuple(one.stream) for one in replicas.asked}
    assert len(streams) == len(replicas.asked) == 2 * (2 + 2)
    assert not any(one.ends_itself for one in replicas.asked)


def test_as_many_runs_and_warmups_of_a_queue_as_asked_are_made(job: ExperimentConfig) -> None:
    result = queued(dataclasses.replace(job, num_runs=2, warmup_runs=3), QueueReplicas())
    assert [(len(point.runs), len(point.warmups)) for point in result.points] == [(2, 3)] * 2
    assert [point.verdict for point in result.points] == ["valid", "valid"]


def test_the_file_says_which_job_it_is_and_how_well_the_sample_stands_for_it(job: ExperimentConfig) -> None:
    result = queued(job, QueueReplicas())
    (told,) = result.jobs
    assert (told.content_hash, told.output_lengths, told.requests, told.longest) == ("abc", "file", 500, 110)
    point = result.points[1]
    assert point.workload is not None
    assert point.workload.as_tuple() == ("abc", "file", "given", False)
    assert point.sample is not None
    assert (point.sample.prompts.requests, point.sample.prompt_difference.distance) == (48, 0.0)
    (part,) = point.runs[0].replicas
    assert part.requests == 48
    assert part.timeline is not None
    assert sum(part.timeline.output_tokens) == 480


def test_the_shares_of_replicas_and_what_they_took_are_kept(job: ExperimentConfig) -> None:
    replicas = QueueReplicas(replicas=2)
    result = queued(dataclasses.replace(job, data_parallel_size=2, batch_sizes=(4,)), replicas)
    assert [len(share) for share in replicas.asked[-1].shares] == [48, 48]
    (point,) = result.points
    assert [part.requests for part in point.runs[0].replicas] == [48, 48]
    assert len(point.runs[0].requests.arrival_s) == 96
    assert (point.summary["plateau_output_tok_per_s"], point.summary["imbalance"]) == (80.0, 0.0)


def test_a_replica_without_a_request_is_no_failure(job: ExperimentConfig) -> None:
    few = dataclasses.replace(job, data_parallel_size=3, batch_sizes=(4,))
    (point,) = queued(few, QueueReplicas(replicas=3), requests=2).points
    assert [part.requests for part in point.runs[0].replicas] == [1, 1, 0]
    assert point.status == "ok"
    # Neither is the sample too small, where it is all there is.
    assert point.verdict_reasons == []


@pytest.mark.parametrize(
    ("change", "measured"),
    [
        ({}, []),
        ({"sample": 40}, []),  # the earlier run has more
        ({"sample": 60}, [(4, "warmup", 8), (4, "run", 60)]),
        ({"num_runs": 2}, [(4, "warmup", 8), (4, "run", 48), (4, "run", 48)]),
        ({"batch_sizes": (4, 8)}, [(8, "warmup", 16), (8, "run", 96)]),
        ({"warmup_runs": 2}, [(4, "warmup", 8), (4, "warmup", 8), (4, "run", 48)]),
        ({"target_ci": 0.0001}, []),  # a queue has its interval in itself
    ],
)
def test_a_queue_point_is_measured_again_where_more_is_asked(
    change: dict[str, Any], measured: list[Any], job: ExperimentConfig
) -> None:
    first = dataclasses.replace(job, batch_sizes=(4,))
    before = queued(first, QueueReplicas())
    replicas = QueueReplicas()
    after = queued(dataclasses.replace(first, **change), replicas)
    assert replicas.measured == measured
    if not measured:
        assert after == before
    # In place of the earlier one, and not beside it.
    assert [point.batch_size for point in after.points] == sorted({4, *change.get("batch_sizes", ())})


@pytest.mark.parametrize(
    ("change", "jobs"),
    [
        ({"workload_hash": "other"}, [("abc", "file"), ("other", "file")]),
        ({"order": "longest-first"}, [("abc", "file")]),
        ({"output_lengths": 7}, [("abc", "file"), ("abc", 7)]),
        ({"output_lengths": "eos"}, [("abc", "file"), ("abc", "eos")]),
        ({"max_num_batched_tokens": (64, 128)}, [("abc", "file")]),
    ],
)
def test_what_is_another_workload_or_another_way_through_it_is_another_point_of_the_same_file(
    change: dict[str, Any], jobs: list[Any], job: ExperimentConfig
) -> None:
    before = queued(dataclasses.replace(job, batch_sizes=(4,)), QueueReplicas())
    replicas = QueueReplicas()
    after = queued(dataclasses.replace(job, batch_sizes=(4,), **change), replicas)
    new = len(change.get("max_num_batched_tokens", (None,)))
    assert len(after.points) == 1 + new
    assert replace(after.points[0], engine=None) == before.points[0]
    assert len({point.key for point in after.points}) == 1 + new
    assert [(one.content_hash, one.output_lengths) for one in after.jobs] == jobs
    # And both are kept from now on.
    again = QueueReplicas()
    queued(dataclasses.replace(job, batch_sizes=(4,), **change), again)
    queued(dataclasses.replace(job, batch_sizes=(4,)), again)
    assert again.asked == []


def test_batches_and_queues_go_into_one_file(config: ExperimentConfig, job: ExperimentConfig) -> None:
    run(config, FakeReplicas())
    result = queued(job, QueueReplicas())
    assert [(point.batch_size, point.seq_len) for point in result.points] == [(1, 8), (4, 8), (1, None), (4, None)]
    shown = closing_table(result)
    assert max(map(len, shown.splitlines())) <= 80
    assert [line.split()[0] for line in shown.splitlines() if line and line[0] != "-"] == [
        "batch", "1", "4", "workload", "at", "1", "4",
    ]  # fmt: skip
    again = FakeReplicas()
    run(config, again)
    assert again.calls == []


def test_counts_that_are_wrong_make_a_queue_point_invalid_and_it_is_measured_again(job: ExperimentConfig) -> None:
    before = queued(job, QueueReplicas(miscounted=2))
    assert [point.verdict for point in before.points] == ["invalid", "invalid"]
    assert before.points[0].verdict_reasons == ["2 requests came back with a different number of tokens than asked"]
    after = queued(job, QueueReplicas())
    assert [point.verdict for point in after.points] == ["valid", "valid"]
    assert len(after.jobs) == 1


def test_a_queue_that_loses_its_engine_implies_larger_ones_of_the_same_queue(job: ExperimentConfig) -> None:
    wide = dataclasses.replace(job, batch_sizes=(2, 4, 8), max_num_batched_tokens=(64, 128))
    replicas = QueueReplicas(fail_queue=(4, "run"))
    result = queued(wide, replicas)
    found = [(point.batch_size, point.max_num_batched_tokens, point.status) for point in result.points]
    assert found == [
        (2, 64, "ok"), (4, 64, "oom"), (8, 64, "skipped"), (2, 128, "ok"), (4, 128, "oom"), (8, 128, "skipped"),
    ]  # fmt: skip
    assert result.points[2].reason == "implied by batch_size 4: oom_run"
    assert result.restarts == 1
    assert [one.max_num_batched_tokens for one in replicas.asked] == [64] * 4 + [128] * 4


def test_the_model_may_end_its_outputs_where_that_is_asked_for(job: ExperimentConfig) -> None:
    replicas = QueueReplicas()
    result = queued(dataclasses.replace(job, output_lengths="eos", batch_sizes=(4,)), replicas)
    assert {one.ends_itself for one in replicas.asked} == {True}
    (point,) = result.points
    assert point.max_tokens == 4  # what it may take at most
    assert point.sample is not None
    assert (point.sample.outputs, point.sample.output_difference, result.jobs[0].output_tokens) == (None, None, None)
    # Another limit may end other outputs.
    again = QueueReplicas()
    assert (
        len(queued(dataclasses.replace(job, output_lengths="eos", batch_sizes=(4,), max_tokens=5), again).points) == 2
    )


def test_two_budgets_make_two_points_of_a_batch(config: ExperimentConfig) -> None:
    prepared: list[tuple[int, int | None]] = []

    class Recorder(FakeReplicas):
        def prepare(self, prompts: Prepare) -> None:
            prepared.append((prompts.batch_size, prompts.max_num_batched_tokens))
            super().prepare(prompts)

    result = run(dataclasses.replace(config, max_num_batched_tokens=(64, 128), num_runs=3), Recorder())
    assert list(dict.fromkeys(prepared)) == [(1, 64), (4, 64), (1, 128), (4, 128)]
    assert [(point.batch_size, point.max_num_batched_tokens, point.verdict) for point in result.points] == [
        (1, 64, "valid"), (4, 64, "valid"), (1, 128, "valid"), (4, 128, "valid"),
    ]  # fmt: skip
    # A third goes on, and none is measured twice.
    before = len(prepared)
    grown = run(dataclasses.replace(config, max_num_batched_tokens=(64, 256), num_runs=3), Recorder())
    assert {tokens for _, tokens in prepared[before:]} == {256}
    assert len(grown.points) == 6
    assert max(map(len, closing_table(grown).splitlines())) <= 80


def test_an_interrupted_job_keeps_its_finished_queue_points(job: ExperimentConfig) -> None:
    class Interrupted(QueueReplicas):
        def run(self) -> list[Outcome]:
            if self.prompts.batch_size == 4 and self.prompts.stream[-2] == "run":
                raise KeyboardInterrupt
            return super().run()

    with pytest.raises(KeyboardInterrupt):
        queued(job, Interrupted())
    on_disk = load_result(job.output_path)
    assert (on_disk.status, [point.batch_size for point in on_disk.points]) == ("partial", [1])
    assert [one.content_hash for one in on_disk.jobs] == ["abc"]
    rest = QueueReplicas()
    assert len(queued(job, rest).points) == 2
    assert {batch_size for batch_size, *_ in rest.measured} == {4}


def test_a_queue_point_is_enough_where_a_run_has_as_many_requests_as_are_asked(config: ExperimentConfig) -> None:
    point = make_queue_point(2, (24,))
    for requests, num_runs, enough in (
        (24, None, True),
        (25, None, False),
        (1, None, True),
        (24, 1, True),
        (24, 2, False),
    ):
        asked = dataclasses.replace(config, num_runs=num_runs)
        assert has_runs_enough(point, asked, requests) is enough
        assert is_enough(point, asked, requests) is enough
    point.runs.append(make_queue_run(2, (20,)))
    two = dataclasses.replace(config, num_runs=2)
    assert [has_runs_enough(point, two, requests) for requests in (20, 21)] == [True, False]


def test_a_job_is_kept_as_long_as_a_point_of_it_is_there(job: ExperimentConfig) -> None:
    result = queued(dataclasses.replace(job, batch_sizes=(4,)), QueueReplicas())
    (first,) = result.jobs
    other, newer = replace(first, content_hash="other"), replace(first, requests=7)
    keep_job(result, other)
    assert result.jobs == [first, other]
    # Described anew, it stands once; and that of no point is forgotten.
    keep_job(result, newer)
    assert result.jobs == [newer]
    result.points = []
    keep_job(result, other)
    assert result.jobs == [other]


def test_no_token_id_of_a_text_is_in_the_file(job: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "ids_of", lambda _workload, _config, indices: [[987654321] * 100 for _ in indices])
    replicas = QueueReplicas()
    queued(job, replicas)
    assert replicas.asked[0].shares[0][0].prompt == [987654321] * 100
    for path in job.output_path.parent.iterdir():
        assert b"987654321" not in path.read_bytes()


def test_replicas_of_a_queue_are_joined_by_the_common_start() -> None:
    requests = Requests([0.5], [1.0], [0.25], [10], arrival_s=[0.125], prompt_tokens=[100])
    line = make_timeline(1, 1, 1.0, 100, 10)
    parts = [
        Outcome(start_s, start_s + 1.0, 100, 10, requests, 0, timeline=line, miscounted=wrong, peak_running=1)
        for start_s, wrong in ((0.0, 1), (0.5, 2))
    ]
    joined = combine(parts, UNREAD, UNREAD, Seen())
    assert joined.requests.arrival_s == [0.125, 0.625]
    assert joined.requests.prompt_tokens == [100, 100]
    assert (joined.counters.miscounted, joined.latency_s) == (3, 1.5)
    timelines = [part.timeline for part in joined.replicas]
    assert [part.requests for part in joined.replicas] == [1, 1]
    assert all(timelines)
    assert [timeline.end_s[0] for timeline in timelines if timeline] == [0.1, 0.6]
    # What a replica itself has told stays as it was.
    assert line.end_s[0] == 0.1
    batch = combine([outcome(1, 8, 4, 1.0)], UNREAD, UNREAD, Seen())
    assert (batch.replicas[0].requests, batch.replicas[0].timeline, batch.counters.miscounted) == (None, None, None)


def test_what_was_begun_beside_is_waited_for_and_raises_there() -> None:
    done: list[str] = []
    wait = experiment._begun(lambda: done.append("read"))
    wait()
    assert done == ["read"]

    def fail() -> None:
        raise ConfigError("no template")

    wait = experiment._begun(fail)
    with pytest.raises(ConfigError, match="no template"):
        wait()
