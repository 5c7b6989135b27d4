"""Every metric against a number worked out by hand."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from batch_inference.core.forecast import BATCH_MEANS
from batch_inference.core.metrics import (
    METRIC_BY_NAME,
    METRICS,
    Measured,
    markdown_table,
    summarise,
    summary_and_method,
)
from batch_inference.core.results import EngineInfo, LoadTimes, Peaks, Requests
from builders import make_point, make_queue_point, make_result, make_run

# Two replicas of TP=2, two requests each: 4 requests of 100 prompt and 10 output tokens, in two runs of 2 s and 3 s.
RUNS = [
    make_run(
        2.0,
        requests=4,
        seq_len=100,
        max_tokens=10,
        times=Requests(
            ttft_s=[0.2, 0.2, 0.4, 0.4],
            latency_s=[2.0, 2.0, 1.3, 1.3],
            queue_s=[0.0, 0.0, 0.1, 0.1],
            output_tokens=[10, 10, 10, 10],
        ),
        energy_j=600.0,
        memory={
            "scope": "device",
            "used_gib": [10.0, 11.0, 12.0, 13.0],
            "peak_gib": [11.0, 12.0, 13.0, 15.0],
            "peak_kv_use": 0.08,
        },
        counters={
            "preemptions": 1,
            "prefix_cache_hit_tokens": 0,
            "peak_running": 2,
            "flops_per_device": 4 * 10**14,
            "memory_bytes_per_device": 1 * 10**12,
        },
        clocks={"sm_mhz": [1900.0, 1800.0, 1900.0, None]},
    ),
    make_run(
        3.0,
        requests=4,
        seq_len=100,
        max_tokens=10,
        times=Requests(
            ttft_s=[0.3, 0.3, 0.3, 0.3],
            latency_s=[3.0, 3.0, 3.0, 3.0],
            queue_s=[0.2, 0.2, 0.2, 0.2],
            output_tokens=[10, 10, 10, 10],
        ),
        energy_j=1000.0,
        memory={
            "scope": "device",
            "used_gib": [10.0, 11.0, 12.0, 14.0],
            "peak_gib": [11.0, 12.0, 13.0, 14.0],
            "peak_kv_use": 0.09,
        },
        counters={
            "preemptions": 2,
            "prefix_cache_hit_tokens": 0,
            "peak_running": 1,
            "flops_per_device": 6 * 10**14,
            "memory_bytes_per_device": 2 * 10**12,
        },
        clocks={"sm_mhz": [2000.0]},
    ),
]
POINT = make_point(2, 100, max_tokens=10, runs=RUNS)
RESULT = make_result(
    "tp_2_dp_2",
    [POINT],
    (2, 1, 2),
    engine={
        "weights_gib": 6.5,
        "kv_pool_gib": 30.0,
        "activations_gib": 1.5,
        "kv_cache_tokens": 2200,
        "load_s": {"total_s": 40.0},
        "cudagraph_mode": "FULL_AND_PIECEWISE",
        "cudagraph_capture_sizes": [4, 8],
    },
    environment={
        "devices": [{"name": "a GPU", "idle_power_w": 70.0}] * 4,
        "peaks": {"flops_per_s": 1e15, "bytes_per_s": 2e12, "source": "a datasheet"},
    },
)
EXPECTED = {
    "output_tok_per_s": 16.0,  # 80 tokens / 5 s
    "prompt_tok_per_s": 160.0,  # 800 / 5
    "total_tok_per_s": 176.0,
    "requests_per_s": 1.6,  # 2 x 2 replicas x 2 runs / 5
    "output_tok_per_s_per_device": 4.0,  # on 4 devices
    "latency_mean_s": 2.5,
    "latency_p50_s": 2.5,
    "latency_p90_s": 2.9,
    "latency_p99_s": 2.99,
    "runs": 2,
    "latency_ci95_s": 8.8942,  # 1.4 x 12.706 x sqrt(0.5) / sqrt(2)
    "ttft_mean_s": 0.3,
    "ttft_p50_s": 0.3,
    "ttft_p90_s": 0.4,  # sorted: .2 .2 .3 .3 .3 .3 .4 .4; rank 6.3
    "ttft_p99_s": 0.4,
    # (2 - .2) / 9 = .2 twice, (1.3 - .4) / 9 = .1 twice, (3 - .3) / 9 = .3 four times
    "tpot_mean_s": 0.225,
    "tpot_p50_s": 0.25,
    "tpot_p90_s": 0.3,
    "tpot_p99_s": 0.3,
    # sorted: 1.3 1.3 2 2 3 3 3 3
    "request_latency_mean_s": 2.325,
    "request_latency_p50_s": 2.5,
    "request_latency_p90_s": 3.0,
    "request_latency_p99_s": 3.0,
    # sorted: 0 0 .1 .1 .2 .2 .2 .2
    "queue_mean_s": 0.125,
    "queue_p50_s": 0.15,
    "queue_p90_s": 0.2,
    "queue_p99_s": 0.2,
    "memory_used_gib": 14.0,
    "memory_peak_gib": 15.0,
    "weights_gib": 6.5,
    "kv_pool_gib": 30.0,
    "activations_gib": 1.5,
    "kv_cache_tokens": 2200,
    "kv_use": 0.1,  # 2 x 110 / 2200: the batch of one replica in its own cache
    "kv_peak_use": 0.09,
    "running_requests": 1,
    "waves": 2,
    "padded_batch_size": 4,
    "preemptions": 3,
    "energy_j_per_output_token": 20.0,  # 1600 J / 80 tokens
    "idle_power_w": 280.0,
    "sm_mhz": 1900.0,
    "mfu": 0.2,  # 1e15 / (5 s x 1e15)
    "mbu": 0.3,  # 3e12 / (5 s x 2e12)
    "load_s": 40.0,
}
# Two replicas, two requests at once on each, all of 100 prompt and 10 output tokens and of 1 s: 12 rounds on one, 13 on
# the other. There is no step in which a place is free.
QUEUE_POINT = make_queue_point(2, (24, 26), counters={"prefix_cache_hit_tokens": 1250})
QUEUE_RESULT = make_result("dp_2", [QUEUE_POINT], (1, 1, 2))
QUEUE_EXPECTED = {
    "plateau_output_tok_per_s": 40.0,  # 2 replicas x 2 x 10
    "plateau_ci95_tok_per_s": 0.0,  # every round is like any other, and there are more than ten
    "plateau_prompt_tok_per_s": 400.0,
    "plateau_requests_per_s": 4.0,
    "ramp_s": 0.0,
    "drain_s": 1.0,  # the last round of either
    "imbalance": 0.04,  # 26 x 110 / (25 x 110) - 1
    "prefix_hit_share": 0.25,  # 1250 / 5000
}


def test_every_metric_has_a_number_worked_out_by_hand() -> None:
    assert set(EXPECTED | QUEUE_EXPECTED) == {metric.name for metric in METRICS}
    assert not set(EXPECTED) & set(QUEUE_EXPECTED)


@pytest.mark.parametrize("name", QUEUE_EXPECTED)
def test_a_metric_of_a_queue_is_what_its_definition_says_and_a_batch_has_none(name: str) -> None:
    formula = METRIC_BY_NAME[name].formula
    assert formula(Measured(QUEUE_RESULT, QUEUE_POINT)) == pytest.approx(QUEUE_EXPECTED[name])
    # Of a batch too it can be counted what came from a cache.
    assert formula(Measured(RESULT, POINT)) == (0.0 if name == "prefix_hit_share" else None)


def test_a_queue_has_no_waves_and_the_numbers_of_the_whole_too() -> None:
    numbers = summarise(QUEUE_RESULT, QUEUE_POINT)
    assert (numbers["waves"], numbers["kv_use"], numbers["running_requests"]) == (None, None, 2)
    # 50 requests in 13 s.
    assert numbers["output_tok_per_s"] == pytest.approx(500 / 13)
    assert numbers["request_latency_p50_s"] == pytest.approx(7.0)  # of the queue, waiting included


def test_where_the_interval_of_a_plateau_is_from_is_told_with_the_numbers() -> None:
    assert summary_and_method(QUEUE_RESULT, QUEUE_POINT) == (summarise(QUEUE_RESULT, QUEUE_POINT), BATCH_MEANS)
    # Without a plateau, of a batch, and of what failed there is none.
    for point in (make_queue_point(4, (3,)), make_point(), make_point(status="oom", verdict=None, runs=[])):
        assert summary_and_method(RESULT, point)[1] is None


def test_a_queue_that_never_has_all_places_taken_has_no_plateau() -> None:
    numbers = summarise(QUEUE_RESULT, make_queue_point(4, (3,)))
    assert {numbers[name] for name in QUEUE_EXPECTED if name.startswith("plateau")} == {None}
    assert numbers["drain_s"] == 1.0


@pytest.mark.parametrize("name", EXPECTED)
def test_a_metric_is_what_its_definition_says(name: str) -> None:
    assert METRIC_BY_NAME[name].formula(Measured(RESULT, POINT)) == pytest.approx(EXPECTED[name])


def test_a_point_without_runs_has_no_numbers() -> None:
    point = make_point(status="oom", verdict=None, runs=[])
    assert set(summarise(RESULT, point).values()) == {None}


@pytest.mark.parametrize(
    ("peaks", "flops"), [(None, 4 * 10**14), (Peaks(1e15, 2e12, "a datasheet"), 0), (Peaks(1e15, 2e12, ""), None)]
)
def test_a_share_is_unknown_where_the_peak_is_or_vllm_estimates_no_work(peaks: Peaks | None, flops: int | None) -> None:
    run = make_run(1.0, counters={"preemptions": 0, "prefix_cache_hit_tokens": 0, "flops_per_device": flops})
    result = make_result(points=[])
    result.environment.peaks = peaks
    assert METRIC_BY_NAME["mfu"].formula(Measured(result, make_point(runs=[run]))) is None


def test_a_model_that_computes_in_fewer_bits_has_another_peak() -> None:
    assert RESULT.engine is not None
    result = replace(RESULT, engine=replace(RESULT.engine, quantization="fp8"))
    assert METRIC_BY_NAME["mfu"].formula(Measured(result, POINT)) is None
    assert METRIC_BY_NAME["mbu"].formula(Measured(result, POINT)) == pytest.approx(EXPECTED["mbu"])


def test_one_run_has_no_interval() -> None:
    assert summarise(RESULT, make_point(latencies_s=[1.0]))["latency_ci95_s"] is None


def test_requests_of_one_output_token_have_no_time_per_output_token() -> None:
    numbers = summarise(RESULT, make_point(max_tokens=1))
    assert numbers["tpot_mean_s"] is None
    assert numbers["tpot_p99_s"] is None
    assert numbers["ttft_mean_s"] is not None


def test_energy_of_some_runs_alone_is_no_energy_of_the_point() -> None:
    runs = [make_run(1.0, energy_j=5.0), make_run(1.0, energy_j=None)]
    assert summarise(RESULT, make_point(runs=runs))["energy_j_per_output_token"] is None


def test_no_output_token_has_no_energy_per_token() -> None:
    runs = [make_run(1.0, energy_j=5.0, output_tokens=0)]
    assert summarise(RESULT, make_point(runs=runs))["energy_j_per_output_token"] is None


@pytest.mark.parametrize("used", [None, []])
def test_memory_that_nobody_measured_is_unknown(used: list[float] | None) -> None:
    runs = [make_run(1.0, memory={"scope": "device", "used_gib": used})]
    assert summarise(RESULT, make_point(runs=runs))["memory_used_gib"] is None


@pytest.mark.parametrize("engine", [None, EngineInfo("0.32.0"), EngineInfo("0.32.0", load_s=LoadTimes(import_s=3.0))])
def test_an_engine_that_says_nothing_leaves_its_numbers_unknown(engine: EngineInfo | None) -> None:
    result = make_result()
    result.engine = engine
    numbers = summarise(result, make_point())
    names = (
        "weights_gib", "kv_pool_gib", "kv_cache_tokens", "kv_use", "load_s", "running_requests", "waves",
        "padded_batch_size",
    )  # fmt: skip
    assert {numbers[name] for name in names} == {None}


def test_names_are_unique_and_end_with_their_unit() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        if metric.unit in ("s", "GiB"):
            assert metric.name.endswith({"s": "_s", "GiB": "_gib"}[metric.unit])


def test_the_table_for_the_readme_has_a_line_for_every_metric() -> None:
    lines = markdown_table().splitlines()
    assert len(lines) == len(METRICS) + 2
    assert all(f"`{metric.name}`" in line for metric, line in zip(METRICS, lines[2:], strict=True))


def test_a_failed_point_has_no_numbers_though_some_of_its_runs_are_there() -> None:
    assert set(summarise(RESULT, make_point(status="error", verdict=None)).values()) == {None}


def test_two_output_tokens_have_one_time_between_them() -> None:
    # 1 s, of which a tenth until the first token.
    assert summarise(RESULT, make_point(latencies_s=[1.0], max_tokens=2))["tpot_p90_s"] == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("watts", "together"), [([70.0, 71.0], 141.0), ([70.0, None], None), ([None, None], None), ([], None)]
)
def test_the_idle_power_is_that_of_all_devices_or_unknown(watts: list[float | None], together: float | None) -> None:
    devices = [{"name": "a GPU", "idle_power_w": value} for value in watts]
    result = make_result(points=[], environment={"devices": devices})
    assert summarise(result, make_point())["idle_power_w"] == together


def test_a_workload_of_unlike_requests_has_no_share_of_the_cache_that_a_batch_needs() -> None:
    point = replace(make_point(), seq_len=None, max_tokens=None)
    assert summarise(RESULT, point)["kv_use"] is None


def test_the_table_says_which_direction_is_better() -> None:
    lines = markdown_table().splitlines()
    assert any(line.startswith("| `output_tok_per_s` | tok/s | higher | ") for line in lines)
    assert any(line.startswith("| `latency_p99_s` | s | lower | percentile 99 ") for line in lines)
    assert any(line.startswith("| `latency_ci95_s` | s |  | ") for line in lines)
