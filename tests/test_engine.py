from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.results import EngineInfo, WorkerInfo
from batch_inference.measure import engine
from batch_inference.measure.engine import (
    MEASURING_SETTINGS,
    engine_settings,
    has_whole_estimate,
    node_settings,
    parse_engine_flags,
)
from batch_inference.measure.vllm_objects import FullestMoment, compile_cache_of, count_outputs, with_workers
from batch_inference.plan.devices import Devices
from conftest import STUB


@pytest.fixture
def stub_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUB))


def output(*, prompt: int, tokens: int, ttft_s: float, decode_s: float, cached: int | None = 0) -> SimpleNamespace:
    stats = SimpleNamespace(
        arrival_time=time.time(),
        queued_ts=100.0,
        scheduled_ts=100.0 + ttft_s / 4,
        first_token_ts=100.0 + ttft_s,
        last_token_ts=100.0 + ttft_s + decode_s,
        first_token_latency=ttft_s,
    )
    completion = SimpleNamespace(token_ids=[0] * tokens)
    return SimpleNamespace(prompt_token_ids=[0] * prompt, outputs=[completion], metrics=stats, num_cached_tokens=cached)


def test_tokens_are_counted_from_the_outputs_and_times_stay_within_one_clock() -> None:
    counted = count_outputs(
        [output(prompt=5, tokens=3, ttft_s=0.4, decode_s=1.0), output(prompt=5, tokens=2, ttft_s=0.8, decode_s=0.5)],
        start_s=1.0,
        end_s=2.5,
    )
    assert (counted.start_s, counted.end_s) == (1.0, 2.5)
    assert (counted.prompt_tokens, counted.output_tokens) == (10, 5)
    assert counted.requests.ttft_s == [0.4, 0.8]
    assert counted.requests.latency_s == pytest.approx([1.4, 1.3])
    assert counted.requests.queue_s == pytest.approx([0.1, 0.2])
    assert counted.requests.output_tokens == [3, 2]


def test_the_fullest_moment_of_a_run_is_that_of_its_steps_alone() -> None:
    seen: list[dict[str, Any]] = []
    manager = SimpleNamespace(record=lambda **keywords: seen.append(keywords))
    fullest = FullestMoment(manager)
    for running, ended, kv_use in ((2, 0, 0.1), (3, 2, 0.2), (1, 0, 0.4), (0, 1, 0.0)):
        manager.record(
            scheduler_stats=SimpleNamespace(num_running_reqs=running, kv_cache_usage=kv_use),
            iteration_stats=SimpleNamespace(finished_requests=[None] * ended),
        )
    manager.record(scheduler_stats=None, iteration_stats=None, mm_cache_stats="m")
    assert (fullest.running, fullest.kv_use) == (5, 0.4)
    # vLLM's own statistics go on.
    assert len(seen) == 5
    assert seen[-1] == {"scheduler_stats": None, "iteration_stats": None, "mm_cache_stats": "m"}
    fullest.forget()
    assert (fullest.running, fullest.kv_use) == (None, None)


@pytest.mark.parametrize(
    ("counts", "word"),
    [
        ({"num_aot_compiles": 1, "num_cache_entries_updated": 3, "num_inductor_compiles": 33}, "cold"),
        # vLLM 0.26 on an H200, all found: equal graphs are counted as compiled, and are not.
        ({"num_aot_artifacts_loaded": 1, "num_compiled_artifacts_loaded": 3, "num_inductor_compiles": 30}, "warm"),
        ({"num_compiled_artifacts_loaded": 3}, "warm"),
        ({"num_compiled_artifacts_loaded": 3, "num_cache_entries_updated": 1}, "cold"),
        ({"num_aot_compiles": 1, "num_compiled_artifacts_loaded": 3}, "cold"),
        ({"num_inductor_compiles": 33}, "cold"),  # the cache is switched off
        ({}, None),
    ],
)
def test_a_start_is_cold_where_something_new_was_compiled(counts: dict[str, int], word: str | None) -> None:
    names = (
        "num_aot_artifacts_loaded", "num_aot_compiles", "num_cache_entries_updated", "num_compiled_artifacts_loaded",
        "num_inductor_compiles",
    )  # fmt: skip
    assert compile_cache_of(SimpleNamespace(**dict.fromkeys(names, 0) | counts)) == word


@pytest.mark.parametrize(
    ("of_workers", "together"),
    [(["warm", "warm"], "warm"), (["warm", "cold"], "cold"), ([None, "warm"], "warm"), ([None, None], None)],
)
def test_one_rank_that_compiles_makes_the_start_a_cold_one(of_workers: list[Any], together: Any) -> None:
    workers = [WorkerInfo(host="a", weights_bytes=1, kv_bytes=1, runner="x", compile_cache=word) for word in of_workers]
    assert with_workers(EngineInfo("0.32.0"), workers).compile_cache == together


def test_prefix_cache_hits_are_counted_and_an_unknown_count_is_no_hit() -> None:
    outputs = [output(prompt=5, tokens=1, ttft_s=0.1, decode_s=0.0, cached=cached) for cached in (None, 0, 16)]
    assert count_outputs(outputs, 0.0, 1.0).prefix_cache_hit_tokens == 16


@pytest.mark.usefixtures("stub_vllm")
def test_what_is_left_open_is_sized_for_the_grid() -> None:
    config = ExperimentConfig(batch_sizes=(2, 8), seq_lens=(64, 32), max_tokens=16)
    settings = engine_settings(config)
    assert settings["max_num_seqs"] == 8
    assert settings["max_model_len"] == 80
    assert {name: settings[name] for name in MEASURING_SETTINGS} == MEASURING_SETTINGS


@pytest.mark.usefixtures("stub_vllm")
@pytest.mark.parametrize(("kind", "share"), [("gpu", 0.8), ("cpu", 0.2)])
def test_on_the_cpu_all_workers_share_one_memory(monkeypatch: pytest.MonkeyPatch, kind: Any, share: float) -> None:
    monkeypatch.setattr(engine, "find_devices", lambda: Devices(kind, ("0", "1", "2", "3")))
    config = ExperimentConfig(tensor_parallel_size=2, data_parallel_size=2)
    assert engine_settings(config)["gpu_memory_utilization"] == share


@pytest.mark.usefixtures("stub_vllm")
def test_a_flag_overrides_what_the_grid_would_need() -> None:
    settings = engine_settings(ExperimentConfig(max_num_seqs=3, max_model_len=4096))
    assert (settings["max_num_seqs"], settings["max_model_len"]) == (3, 4096)


@pytest.mark.usefixtures("stub_vllm")
def test_only_vllm_flags_that_were_given_are_passed_on() -> None:
    assert parse_engine_flags(["--load-format", "dummy"]) == {"load_format": "dummy"}
    # Given, though equal to vLLM's default: still the user's word.
    assert parse_engine_flags(["--quantization", "fp8", "--load-format", "auto"])["load_format"] == "auto"
    assert parse_engine_flags([]) == {}


@pytest.mark.usefixtures("stub_vllm")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--quantisation", "fp8"],
            "--quantisation is no flag of this program or of vLLM; did you mean --quantization?",
        ),
        (["--batchsizes", "1"], "did you mean --batch-sizes?"),
        (["--zzz"], "see --help"),
        (["--block-size", "two"], "argument --block-size: invalid"),
        # What only vLLM's parser knows to be a flag of ours, or one that breaks the measurement.
        (["-n", "2"], "--nnodes is a flag of this program too; write it out"),
        (["-tp", "2"], "--tensor-parallel-size is a flag of this program too"),
        (["--load-form", "dummy"], "did you mean --load-format?"),
    ],
)
def test_a_misspelt_vllm_flag_is_named_with_its_likely_meaning(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_engine_flags(words)
    assert said in str(caught.value)


@pytest.mark.usefixtures("stub_vllm")
@pytest.mark.parametrize(
    ("quantization", "replicas", "is_whole"), [(None, 1, True), ("auto_awq", 1, False), (None, 2, False)]
)
def test_an_estimate_of_a_part_of_the_work_is_none(quantization: str | None, replicas: int, is_whole: bool) -> None:
    config = SimpleNamespace(
        model_config=SimpleNamespace(quantization=quantization),
        parallel_config=SimpleNamespace(data_parallel_size=replicas),
    )
    assert has_whole_estimate(config) is is_whole


def test_over_nodes_vllm_has_the_port_after_that_on_which_they_meet() -> None:
    config = ExperimentConfig(nnodes=2, node_rank=1, master_addr="head", master_port=1234, tensor_parallel_size=2)
    assert node_settings(config) == {
        "distributed_executor_backend": "mp",
        "nnodes": 2,
        "node_rank": 1,
        "master_addr": "head",
        "master_port": 1235,
    }
    assert node_settings(ExperimentConfig()) == {}
