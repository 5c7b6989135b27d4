"""Every reason of a verdict is provoked by one fault, and by nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from batch_inference.core import verdict
from batch_inference.core.lengths import Lengths
from batch_inference.core.results import Job, Point, Verdict, Warmup, WorkloadKey
from batch_inference.core.statistics import relative_ci95, trend
from batch_inference.core.values import AUTO_SIZES
from batch_inference.core.verdict import is_settled, judge, was_packed
from builders import make_point, make_queue_point, make_result, make_run

STEADY = [{"latency_s": 1.0}, {"latency_s": 1.0}]
QUIETER = "keep other work off the devices"
COUNTERS = {"preemptions": 0, "prefix_cache_hit_tokens": 0}


def judged(point: Point, config: dict[str, Any] | None = None, **engine: Any) -> tuple[list[str], Verdict]:
    return judge(make_result(points=[point], config=config or {}, engine=engine), point)


def measured(batch_size: int = 1, latencies_s: Sequence[float] = (1.0, 1.001, 0.999), **changes: Any) -> Point:
    """A point with nothing against it, except for `changes` of its last run."""
    point = make_point(batch_size, latencies_s=latencies_s, warmups=[*STEADY])
    if changes:
        point.runs[-1] = make_run(latencies_s[-1], **{"requests": batch_size, **changes})
    return point


def queued(*, slower: float = 0.0, order: str = "given", shares: Sequence[int] = (48,), **changes: Any) -> Point:
    """A queue point with nothing against it, except that its plateau becomes slower by such a share, evenly."""
    point = make_queue_point(4, shares, order=order, **changes)
    for run in point.runs:
        for replica in run.replicas:
            assert replica.timeline is not None
            count = len(replica.timeline.output_tokens)
            replica.timeline.output_tokens = [round(10_000 * (1 - slower * number / count)) for number in range(count)]
    return point


def jerky(order: str = "given", **changes: Any) -> Point:
    """A queue point whose requests take 1.6 s and 0.4 s by turns, on a plateau that is as fast at its end."""
    point = queued(order=order, **changes)
    requests = point.runs[0].requests
    for name in ("ttft_s", "latency_s", "queue_s"):
        times_s = [time_s + 0.6 * math.sin(math.pi * time_s / 2) for time_s in getattr(requests, name)]
        setattr(requests, name, times_s)
    return point


def test_a_good_point_is_valid_without_a_reason() -> None:
    assert judged(measured()) == ([], "valid")
    # Clocks that the user has set have two names in NVML.
    usual = ["sw_power_cap", "gpu_idle", "applications_clocks_setting", "user_defined_clocks"]
    clocks = {"sm_mhz": [1980.0], "throttle_reasons": usual, "other_processes": 0}
    counters = COUNTERS | {"jit_compilations": 0, "peak_running": 4}
    assert judged(measured(4, clocks=clocks, counters=counters)) == ([], "valid")


FAULTS: dict[str, tuple[Point, str, str]] = {
    "_token_counts": (
        measured(2, output_tokens=63),
        "invalid",
        "63 output tokens came back, but 128 and 64 were asked for",
    ),
    "_prefix_hits": (
        measured(counters=COUNTERS | {"prefix_cache_hit_tokens": 16}),
        "invalid",
        "16 prompt tokens came from the prefix cache",
    ),
    "_longer_than_passed": (
        measured(passed_s=0.98),
        "invalid",
        "a run reports 0.999 s, but only 0.98 s passed meanwhile",
    ),
    "_preempted": (measured(counters=COUNTERS | {"preemptions": 2}), "suspect", "2 requests were preempted"),
    "_never_steady": (
        make_point(warmups=[{"latency_s": 1.0}, {"latency_s": 1.1}]),
        "suspect",
        "not steady after 2 warm-ups: the last two differ by more than 5%",
    ),
    "_compiled_late": (
        measured(counters=COUNTERS | {"jit_compilations": 1}),
        "suspect",
        "vLLM kept compiling kernels during timed runs",
    ),
    "_wide_interval": (measured(latencies_s=[1.0, 1.2] * 5), "suspect", "runs differ: after 10"),
    "_drift": (measured(latencies_s=[1.0, 1.011, 1.019, 1.031, 1.04]), "suspect", "drift: runs become slower"),
    "_unlike_warmups": (
        measured(latencies_s=[0.6, 0.601, 0.599]),
        "suspect",
        "the last warm-up took 1 s, the runs 0.6 s",
    ),
    "_too_short": (make_point(latencies_s=[0.0101, 0.0101, 0.00999]), "suspect", "runs under 10 ms are too short"),
    "_throttled": (
        measured(clocks={"throttle_reasons": ["sw_power_cap", "sw_thermal_slowdown", "hw_slowdown"]}),
        "suspect",
        "clocks were throttled: hw_slowdown, sw_thermal_slowdown; check",
    ),
    "_not_alone": (measured(clocks={"other_processes": 1}), "suspect", "another process was on the devices"),
    "_waves": (measured(9), "suspect", "ran in waves: batch_size 9 is over max_num_seqs 8"),
    "_empty_places": (
        queued(counters={"peak_running": 2}),
        "suspect",
        "at most 2 of 4 places were taken: the first requests end while prompts of others still wait",
    ),
    "_no_plateau": (
        make_queue_point(4, (3,)),
        "suspect",
        "sample too small for a plateau: 3 requests, 4 at once on each replica; raise --sample",
    ),
    "_wide_plateau": (jerky(), "suspect", "plateau: the 95 % interval of its throughput is over ±10%"),
    "_unsteady_plateau": (queued(slower=0.2), "suspect", "plateau not steady: it becomes slower by "),
    "_packed": (measured(), "suspect", "packed: other settings ran beside it"),
}
# What makes a fault of a point that is like any other.
ASKED = {"_packed": {"packed": True}}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_the_one_reason_against_its_point(fault: str) -> None:
    point, expected, said = FAULTS[fault]
    reasons, found = judged(point, {"target_ci": 0.05, **ASKED.get(fault, {})}, max_num_seqs=8)
    assert found == expected
    assert len(reasons) == 1
    assert said in reasons[0]


def test_a_run_may_be_a_part_of_what_passed_and_no_more() -> None:
    """But for clocks that go at slightly different rates, and older files, which do not say what passed."""
    for passed_s in (5.0, 1.0, 0.995, None):
        assert judged(measured(passed_s=passed_s)) == ([], "valid")
    # The headline of a run that was never counted from its start is the time since the machine was started.
    point = make_point(latencies_s=[2048.0] * 3, warmups=[{"latency_s": 2048.0}] * 2)
    for run in point.runs:
        run.passed_s = 1.5
    assert judged(point)[1] == "invalid"


def test_every_rule_has_its_fault() -> None:
    assert {rule.__name__ for rule in (*verdict._INVALID, *verdict._SUSPECT)} == set(FAULTS)


def test_invalid_outweighs_suspect_and_all_reasons_are_given() -> None:
    reasons, found = judged(measured(latencies_s=[1.0, 2.0, 1.0], output_tokens=1))
    assert found == "invalid"
    assert len(reasons) == 2


@pytest.mark.parametrize(
    ("engine", "peak_running", "said"),
    [
        ({"kv_cache_tokens": 400}, None, "ran in waves: the KV cache holds 4 of 8 requests"),
        ({}, 5, "ran in waves: at most 5 of 8 requests ran at once"),
        ({"kv_cache_tokens": 400}, 8, None),  # vLLM counted all of them
        ({"max_num_batched_tokens": 16}, 5, None),  # 32 steps for the prompts alone, and as many output tokens
        ({"max_num_batched_tokens": 64}, 5, "ran in waves: at most 5 of 8 requests ran at once"),
    ],
)
def test_each_kind_of_waves_is_named(engine: dict[str, Any], peak_running: int | None, said: str | None) -> None:
    point = measured(8)
    for run in point.runs:
        run.counters.peak_running = peak_running
    reasons, _ = judged(point, **engine)
    assert reasons == ([said] if said else [])


@pytest.mark.parametrize(
    ("asked", "reasons"),
    [
        # The interval of these three runs, which stopped by themselves, is 1.4 times ±5.2 %.
        ({"num_runs": None, "target_ci": 0.08}, []),
        (
            {"num_runs": None, "target_ci": 0.06, "max_runs": 3},
            [f"runs differ: after 3 the 95 % interval is over ±6%; {QUIETER}, or raise --max-runs"],
        ),
        (
            {"num_runs": None, "target_ci": 0.05, "max_runs": 3},
            [f"runs differ: after 3 the 95 % interval is over ±5%; {QUIETER}, or raise --max-runs"],
        ),
        ({"num_runs": 3, "target_ci": 0.02}, []),
    ],
)
def test_the_bound_of_the_interval_is_the_one_asked_for(asked: dict[str, Any], reasons: list[str]) -> None:
    assert judged(measured(latencies_s=[1.0, 1.021, 0.979]), asked)[0] == reasons


@pytest.mark.parametrize(("stages", "said"), [(1, False), (2, True)])
def test_runs_of_a_pipeline_differ_by_nature(stages: int, said: bool) -> None:
    nature = "(runs of a pipeline differ by nature: docs/measuring.md, Pipelines)"
    differing = measured(latencies_s=[0.8, 1.2] * 5)
    for asked in ({}, {"num_runs": 10}):
        (reason,) = judged(differing, {"pipeline_parallel_size": stages, **asked})[0]
        assert reason.startswith("runs differ: ")
        assert reason.endswith(nature) is said
    (single,) = judged(measured(latencies_s=[1.0]), {"pipeline_parallel_size": stages, "num_runs": 1})[0]
    assert single == "a single run has no interval; raise --num-runs"


@pytest.mark.parametrize(
    ("latencies_s", "drifts"),
    [
        ([1.0, 1.02, 1.04], True),
        ([1.04, 1.02, 1.0], True),
        ([1.0, 1.01, 1.02], False),  # 2 % is too little
        ([1.0, 1.04], False),  # two runs have no trend
        ([1.0, 1.06, 1.0, 1.06, 1.0, 1.06, 1.04], False),  # scatter
    ],
)
def test_drift_is_a_trend_beyond_3_percent_and_its_own_interval(latencies_s: list[float], drifts: bool) -> None:
    reasons, _ = judged(measured(latencies_s=latencies_s), {"target_ci": 1.0})
    assert any(reason.startswith("drift") for reason in reasons) is drifts


@pytest.mark.parametrize("runs", [3, 10])
@pytest.mark.parametrize("spread", [0.01, 0.03, 0.1])
def test_runs_that_only_scatter_seldom_drift(runs: int, spread: float) -> None:
    points: list[list[float]] = np.random.default_rng(0).normal(1.0, spread, (2000, runs)).tolist()
    found = sum(abs(change) > max(width, 0.03) for change, width in filter(None, map(trend, points)))
    assert found / len(points) <= 0.06


# --- at the bounds themselves -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("warmups", "settled"),
    [
        ([(1.0, None), (1.0, None)], True),
        ([(9.0, 3), (1.0, 3), (1.0, None)], True),  # what compiled before the last is over
        ([(1.0, None), (1.0, 1)], False),
        ([(1.0, None), (1.0, 0)], True),
        ([(1.0, None), (1.06, None)], False),
        ([(1.0, None)], False),
        ([], False),
    ],
)
def test_settled_warmups_agree_and_the_last_compiled_nothing(
    warmups: list[tuple[float, int | None]], settled: bool
) -> None:
    assert is_settled([Warmup(*warmup) for warmup in warmups]) is settled


@pytest.mark.parametrize(
    ("warmups", "said"),
    [
        ([(1.0, 2), (1.2, None)], "not steady after 2 warm-ups: the last two differ by more than 5%"),
        (
            [(1.0, None), (1.0, 2)],
            "not steady: vLLM was still compiling kernels in the last warm-up; raise --warmup-runs",
        ),
    ],
)
def test_why_warmups_are_not_steady_is_said_of_the_last(warmups: list[tuple[float, int | None]], said: str) -> None:
    point = make_point(latencies_s=[1.2] * 3)
    point.warmups = [Warmup(*warmup) for warmup in warmups]
    # Warm-ups that do not agree are not compared with the runs: one reason is enough.
    assert judged(point)[0] == [said]


@pytest.mark.parametrize(
    ("warmups_s", "latency_s", "is_unlike"),
    [
        ([9.0, 1.0, 1.0], 1.0, False),  # the last of them
        ([1.0, 1.0], 0.86, False),  # 15 % of the longer one
        ([1.0, 1.0], 0.84, True),
        ([1.0, 1.0], 1.16, False),
        ([1.0, 1.0], 1.19, True),
        ([0.1, 0.1], 0.08, True),  # a share, and no seconds
        ([20.0, 20.0], 18.0, False),
    ],
)
def test_runs_may_differ_from_the_last_warmup_by_a_share_of_the_longer(
    warmups_s: list[float], latency_s: float, is_unlike: bool
) -> None:
    point = make_point(latencies_s=[latency_s] * 3, warmups=[{"latency_s": value} for value in warmups_s])
    assert any("the last warm-up took" in reason for reason in judged(point)[0]) is is_unlike


@pytest.mark.parametrize(("latency_s", "drifts"), [(0.25, "faster"), (4.0, "slower"), (4.0, None)])
def test_drift_is_a_share_of_the_latency_and_has_a_direction(latency_s: float, drifts: str | None) -> None:
    step = {"faster": -0.04, "slower": 0.04, None: 0.01}[drifts]
    reasons, _ = judged(measured(latencies_s=[latency_s * (1 + step * run) for run in range(3)]), {"target_ci": 1.0})
    found = [reason.split()[3].rstrip(",") for reason in reasons if reason.startswith("drift: runs become")]
    assert found == ([drifts] if drifts else [])


def test_what_is_just_within_a_bound_is_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that a double holds exactly, and latencies that meet them."""
    monkeypatch.setattr(verdict, "DRIFT_OVER", 0.03125)
    assert judged(measured(latencies_s=[0.984375, 1.0, 1.015625]), {"target_ci": 1.0}) == ([], "valid")
    monkeypatch.setattr(verdict, "UNLIKE_WARMUPS", 0.25)
    assert judged(measured(latencies_s=[0.75] * 3)) == ([], "valid")
    latencies_s = [1.0, 1.01, 0.99]
    width = relative_ci95(latencies_s, adaptive=True)
    assert judged(measured(latencies_s=latencies_s), {"target_ci": width}) == ([], "valid")
    monkeypatch.setattr(verdict, "WIDEST_INTERVAL", relative_ci95(latencies_s))
    assert judged(measured(latencies_s=latencies_s), {"num_runs": 3}) == ([], "valid")
    monkeypatch.setattr(verdict, "SHORTEST_RUN_S", 1.0)
    assert judged(measured(latencies_s=[1.0] * 3)) == ([], "valid")


def test_with_as_many_runs_as_asked_an_interval_over_10_percent_is_too_wide() -> None:
    for spread, reasons in (
        (0.04, []),
        (0.045, [f"runs differ: the 95 % interval is over ±10%; {QUIETER}, or raise --num-runs"]),
    ):
        assert judged(measured(latencies_s=[1.0, 1.0 + spread, 1.0 - spread]), {"num_runs": 3})[0] == reasons


def test_a_single_run_has_no_interval_to_judge() -> None:
    assert judged(measured(latencies_s=[1.0]))[0] == ["a single run has no interval; raise --num-runs"]


def test_what_several_runs_show_is_added_up() -> None:
    point = measured()
    for run in point.runs:
        run.counters.prefix_cache_hit_tokens, run.counters.preemptions = 16, 2
    reasons, found = judged(point)
    assert reasons[:2] == ["48 prompt tokens came from the prefix cache", reasons[1]]
    assert "6 requests were preempted" in reasons[1]
    assert found == "invalid"


def test_a_workload_has_token_counts_of_its_own_and_is_not_held_against_a_shape() -> None:
    point = replace(measured(), seq_len=None, max_tokens=None)
    assert judged(point, {"seq_lens": [64]}) == ([], "valid")


@pytest.mark.parametrize(
    ("engine", "peak_running", "said"),
    [
        # Slots for all, and no room.
        ({"max_num_seqs": 8, "kv_cache_tokens": 400}, None, "ran in waves: the KV cache holds 4 of 8 requests"),
        # Room and slots for all, and yet.
        ({"max_num_seqs": 8, "kv_cache_tokens": 8 * 96}, 5, "ran in waves: at most 5 of 8 requests ran at once"),
        ({"max_num_seqs": 7, "kv_cache_tokens": 400}, None, "ran in waves: batch_size 8 is over max_num_seqs 7"),
        ({"max_num_seqs": None, "kv_cache_tokens": None}, None, None),
        # 8 prompts of 64 tokens in steps of so many, and 32 output tokens of each: 16 steps, and 15.
        ({"max_num_batched_tokens": 33}, 5, None),
        ({"max_num_batched_tokens": 35}, 5, "ran in waves: at most 5 of 8 requests ran at once"),
    ],
)
def test_the_limit_that_makes_waves_is_the_one_that_is_named(
    engine: dict[str, Any], peak_running: int | None, said: str | None
) -> None:
    point = measured(8)
    for run in point.runs:
        run.counters.peak_running = peak_running
    assert judged(point, **engine)[0] == ([said] if said else [])
    if peak_running:
        # A point's own budget stands before that of the engine.
        point.max_num_batched_tokens = engine.get("max_num_batched_tokens")
        assert judged(point, **(engine | {"max_num_batched_tokens": 2048}))[0] == ([said] if said else [])


@pytest.mark.parametrize(
    ("reasons", "packed"), [([], False), (["drift: x", "packed: other settings"], True), (["drift: packed"], False)]
)
def test_a_packed_point_is_known_by_its_reason(reasons: list[str], packed: bool) -> None:
    assert was_packed(make_point(verdict_reasons=reasons)) is packed


def test_every_reason_is_said_to_the_letter() -> None:
    said = {
        name: judged(point, {"target_ci": 0.05, **ASKED.get(name, {})}, max_num_seqs=8)[0]
        for name, (point, *_) in FAULTS.items()
    }
    assert said == {
        "_token_counts": ["128 prompt and 63 output tokens came back, but 128 and 64 were asked for"],
        "_prefix_hits": ["16 prompt tokens came from the prefix cache"],
        "_longer_than_passed": ["a run reports 0.999 s, but only 0.98 s passed meanwhile; check the nodes' clocks"],
        "_preempted": ["2 requests were preempted for lack of KV cache"],
        "_never_steady": ["not steady after 2 warm-ups: the last two differ by more than 5%"],
        "_compiled_late": ["vLLM kept compiling kernels during timed runs; raise --warmup-runs"],
        "_wide_interval": [f"runs differ: after 10 the 95 % interval is over ±5%; {QUIETER}, or raise --max-runs"],
        "_drift": ["drift: runs become slower by over 3% from the first to the last"],
        "_unlike_warmups": ["the last warm-up took 1 s, the runs 0.6 s; raise --warmup-runs"],
        "_too_short": ["runs under 10 ms are too short to time; raise --max-tokens"],
        "_throttled": ["clocks were throttled: hw_slowdown, sw_thermal_slowdown; check cooling and power"],
        "_not_alone": ["another process was on the devices; end it, or choose others with CUDA_VISIBLE_DEVICES"],
        "_waves": ["ran in waves: batch_size 9 is over max_num_seqs 8"],
        "_empty_places": [
            "at most 2 of 4 places were taken: the first requests end while prompts of others still wait for room "
            "in a step"
        ],
        "_no_plateau": ["sample too small for a plateau: 3 requests, 4 at once on each replica; raise --sample"],
        "_wide_plateau": ["plateau: the 95 % interval of its throughput is over ±10%; raise --sample"],
        "_unsteady_plateau": [
            "plateau not steady: it becomes slower by 20% from its beginning to its end; keep other work off the "
            "devices, raise --sample, or give --order shuffled"
        ],
        "_packed": ["packed: other settings ran beside it; measure the decisive points again without --pack"],
    }


def test_reasons_come_in_their_order_those_of_invalid_points_first() -> None:
    point = measured(9, [0.005, 0.005, 0.005], output_tokens=1, passed_s=0.001)
    point.runs[0].counters.prefix_cache_hit_tokens = 8
    point.runs[0].counters.preemptions = 3
    point.runs[0].counters.jit_compilations = 1
    point.runs[0].clocks.other_processes = 2
    point.runs[0].clocks.throttle_reasons = ["hw_slowdown"]
    reasons, found = judged(point, {"packed": True}, max_num_seqs=8)
    assert [reason.split()[0] + " " + reason.split()[1] for reason in reasons] == [
        "576 prompt", "8 prompt", "a run", "3 requests", "ran in", "vLLM kept", "the last", "runs under",
        "clocks were", "another process", "packed: other",
    ]  # fmt: skip
    assert found == "invalid"


def test_all_replicas_are_counted_and_each_other_count_is_said_once_the_smaller_first() -> None:
    point = make_point(2, replicas=3, warmups=[*STEADY])
    result = make_result(points=[point], sizes=(1, 1, 3), config={"target_ci": 0.05})
    assert judge(result, point) == ([], "valid")
    for run, tokens in zip(point.runs, (190, 180, 180), strict=True):
        run.output_tokens = tokens
    asked = "384 and 192 were asked for"
    assert judge(result, point)[0] == [
        f"384 prompt and 180 output tokens came back, but {asked}",
        f"384 prompt and 190 output tokens came back, but {asked}",
    ]
    point.runs[0].prompt_tokens, point.runs[0].output_tokens = 383, 192
    for run in point.runs[1:]:
        run.output_tokens = 192
    assert judge(result, point)[0] == [f"383 prompt and 192 output tokens came back, but {asked}"]
    for name in ("seq_len", "max_tokens"):
        assert judge(result, replace(point, **{name: None})) == ([], "valid")


def test_of_several_runs_longer_than_what_passed_the_longest_is_named() -> None:
    point = measured(latencies_s=[1.0, 1.002, 1.001])
    for run, passed_s in zip(point.runs, (0.5, 0.6, 0.7), strict=True):
        run.passed_s = passed_s
    assert judged(point)[0] == ["a run reports 1 s, but only 0.6 s passed meanwhile; check the nodes' clocks"]


def test_reasons_of_clocks_that_are_no_fault_are_these() -> None:
    usual = ("gpu_idle", "applications_clocks_setting", "user_defined_clocks", "display_clock_setting", "sync_boost",
             "sw_power_cap")  # fmt: skip
    for reason in usual:
        assert judged(measured(clocks={"throttle_reasons": [reason]})) == ([], "valid")
    for reason in ("hw_slowdown", "hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown"):
        assert judged(measured(clocks={"throttle_reasons": [reason]}))[1] == "suspect"


def test_bounds_are_these() -> None:
    bounds = (verdict.STEADY_WITHIN, verdict.WIDEST_INTERVAL, verdict.DRIFT_OVER, verdict.UNLIKE_WARMUPS)
    assert bounds == (0.05, 0.1, 0.03, 0.15)
    assert (verdict.SHORTEST_RUN_S, verdict.LONGER_THAN_PASSED) == (0.01, 0.01)


@pytest.mark.parametrize("unknown", ["seq_len", "max_tokens"])
def test_of_a_workload_no_steps_of_prompts_are_counted(unknown: str) -> None:
    point = replace(measured(8), **{unknown: None})
    for run in point.runs:
        run.counters.peak_running = 5
    assert judged(point, {"seq_lens": [64]}, max_num_batched_tokens=16)[0] == [
        "ran in waves: at most 5 of 8 requests ran at once"
    ]


# --- of a queue -------------------------------------------------------------------------------------------------------


def test_a_good_queue_point_is_valid_by_one_run_and_one_warmup() -> None:
    """Whatever its requests are like: nothing of a shape is held against it."""
    assert judged(queued()) == ([], "valid")
    assert judged(queued(shares=(48, 52)), max_num_seqs=4) == ([], "valid")


@pytest.mark.parametrize(("wrong", "said"), [(1, "1 request came back"), (7, "7 requests came back")])
def test_requests_of_a_queue_with_other_counts_than_asked_make_it_invalid(wrong: int, said: str) -> None:
    reasons, found = judged(queued(counters={"miscounted": wrong}))
    assert reasons == [f"{said} with a different number of tokens than asked"]
    assert found == "invalid"


def test_prefixes_may_come_from_the_cache_where_that_was_asked_for() -> None:
    point = queued(counters={"prefix_cache_hit_tokens": 16})
    assert judged(point) == (["16 prompt tokens came from the prefix cache"], "invalid")
    point.workload = WorkloadKey("abc", "file", "given", is_cached=True)
    assert judged(point) == ([], "valid")


@pytest.mark.parametrize(
    ("engine", "kv_use", "why"),
    [
        ({"max_num_seqs": 2}, 0.5, "--max-num-seqs is 2"),
        ({"max_num_seqs": 8}, 0.95, "the KV cache was full"),
        ({}, None, "the first requests end while prompts of others still wait for room in a step"),
    ],
)
def test_why_places_of_a_queue_stay_empty_is_said(engine: dict[str, Any], kv_use: float | None, why: str) -> None:
    """And not also that a larger sample would have a plateau."""
    point = make_queue_point(4, (3,), counters={"peak_running": 2}, memory={"peak_kv_use": kv_use})
    assert judged(point, **engine)[0] == [f"at most 2 of 3 places were taken: {why}"]


def test_a_replica_with_fewer_requests_than_places_leaves_none_empty() -> None:
    point = make_queue_point(4, (48, 2), counters={"peak_running": 2})
    assert not any("places" in reason for reason in judged(point)[0])


def job_of(requests: int, content_hash: str = "abc") -> Job:
    lengths = Lengths(requests, 100.0, 0.0, [100] * 6, 100)
    return Job(content_hash, "file", requests, 100, 100, 200, 1, 1, [100], [100], lengths, lengths)


@pytest.mark.parametrize(
    ("jobs", "reasons"),
    [
        ([job_of(4)], ["sample too small for a plateau: 3 requests, 4 at once on each replica; raise --sample"]),
        ([job_of(3)], []),  # the whole job ran
        (
            [job_of(9), job_of(3, "another")],
            ["sample too small for a plateau: 3 requests, 4 at once on each replica; raise --sample"],
        ),
    ],
)
def test_a_job_that_ran_as_a_whole_needs_no_plateau(jobs: list[Job], reasons: list[str]) -> None:
    point = make_queue_point(4, (3,))
    assert judge(make_result(points=[point], jobs=jobs), point)[0] == reasons


@pytest.mark.parametrize(
    ("slower", "order", "said"),
    [
        (0.02, "given", None),
        (0.2, "given", "slower"),
        (0.2, "shuffled", "slower"),
        (-0.2, "given", "faster"),
        # Those have no steady plateau, and nobody expects one.
        (0.2, "longest-first", None),
        (0.2, "shortest-first", None),
    ],
)
def test_a_plateau_that_is_not_steady_has_a_direction(slower: float, order: str, said: str | None) -> None:
    reasons, _ = judged(queued(slower=slower, order=order))
    assert [reason.split(" by ")[0].split()[-1] for reason in reasons] == ([said] if said else [])


@pytest.mark.parametrize(
    ("requests", "order", "advice"),
    [
        (49, "given", ", raise --sample, or give --order shuffled"),
        (49, "shuffled", ", or raise --sample"),
        (48, "given", ", or give --order shuffled"),  # the whole job ran
        (48, "shuffled", ""),
    ],
)
def test_what_makes_a_plateau_steadier_is_said_as_far_as_it_can_be_done(requests: int, order: str, advice: str) -> None:
    point = queued(slower=0.2, order=order)
    (reason,), _ = judge(make_result(points=[point], jobs=[job_of(requests)]), point)
    assert reason.endswith(f"to its end; keep other work off the devices{advice}")


def test_the_plateau_of_any_replica_may_be_the_one_that_is_not_steady() -> None:
    point = queued(shares=(48, 48))
    timelines = [replica.timeline for replica in point.runs[0].replicas]
    assert timelines[1] is not None
    timelines[1].output_tokens = [10_000 - 20 * number for number in range(len(timelines[1].output_tokens))]
    assert len(judged(point)[0]) == 1


def test_ramp_and_drain_and_a_short_plateau_have_no_trend() -> None:
    point = queued(slower=0.2)
    timeline = point.runs[0].replicas[0].timeline
    assert timeline is not None
    full = len(timeline.running) - 20
    timeline.running = [4.0] * full + [1.0] * 20  # what drains is slow
    timeline.output_tokens = [10_000] * full + [1_000] * 20
    assert judged(point) == ([], "valid")
    timeline.running = [4.0] * 20 + [1.0] * (len(timeline.running) - 20)
    timeline.output_tokens = [10_000 - 100 * number for number in range(len(timeline.running))]
    assert judged(point) == ([], "valid")


def test_warmups_and_runs_of_a_queue_that_differ_are_none_of_a_batchs_reasons() -> None:
    """A warm-up is a part of the queue: it takes another time, and one is enough."""
    assert judged(queued(warmups=[Warmup(9.0), Warmup(1.0)])) == ([], "valid")


def test_a_queue_that_is_too_short_to_time_asks_for_a_larger_sample() -> None:
    point = queued(life_s=0.0005)
    assert judged(point)[0] == ["runs under 10 ms are too short to time; raise --sample"]
    # Of the whole job there is no larger one.
    whole = make_result(points=[point], jobs=[job_of(48)])
    assert judge(whole, point)[0] == ["runs under 10 ms are too short to time"]


def test_requests_of_a_single_output_token_need_no_plateau() -> None:
    assert judged(make_queue_point(4, (3,), output=2))[1] == "suspect"
    assert judged(make_queue_point(4, (3,), output=1)) == ([], "valid")


def test_a_plateau_that_is_hardly_known_is_held_against_samples_in_an_order_that_has_one() -> None:
    for point in (jerky("longest-first"), jerky("shortest-first")):
        assert judged(point) == ([], "valid")
    assert len(judged(jerky("shuffled"))[0]) == 1
    whole = jerky()
    assert judge(make_result(points=[whole], jobs=[job_of(48)]), whole) == ([], "valid")
    part = jerky()
    assert len(judge(make_result(points=[part], jobs=[job_of(49)]), part)[0]) == 1


@pytest.mark.parametrize(("num_runs", "is_step"), [(None, True), (3, False)])
def test_only_a_search_that_chooses_its_runs_makes_steps(num_runs: int | None, is_step: bool) -> None:
    point = measured(latencies_s=(1.0, 1.03, 0.97))
    result = make_result(points=[point], config={"num_runs": num_runs})
    result.config = dataclasses.replace(result.config, batch_sizes=AUTO_SIZES)
    reasons, verdict = judge(result, point)
    said = ["3 runs: only a step towards the best batch size (--batch-sizes auto)"]
    assert (reasons, verdict) == ((said, "suspect") if is_step else ([], "valid"))
