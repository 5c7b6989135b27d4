from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace as replace_config
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.results import DeviceInfo, EngineInfo, LoadTimes, WorkerInfo
from batch_inference.measure import engine
from batch_inference.measure.engine import (
    MEASURING_SETTINGS,
    Engine,
    engine_settings,
    has_whole_estimate,
    node_settings,
    parse_engine_flags,
)
from batch_inference.measure.hardware import Reading
from batch_inference.measure.limits import SCHEDULER
from batch_inference.measure.messages import Asked, Outcome
from batch_inference.measure.tokenizer_files import added_ids
from batch_inference.measure.vllm_objects import (
    Step,
    StepWatch,
    add_queue,
    compile_cache_of,
    count_outputs,
    effective_settings,
    kv_bytes_of,
    special_ids,
    timeline_of,
    weights_bytes_of,
    with_workers,
)
from batch_inference.plan.devices import GIB, Devices
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
    watch = StepWatch(manager)
    for running, ended, kv_use in ((2, 0, 0.1), (3, 2, 0.2), (1, 0, 0.4), (0, 1, 0.0)):
        manager.record(
            scheduler_stats=SimpleNamespace(num_running_reqs=running, num_waiting_reqs=0, kv_cache_usage=kv_use),
            iteration_stats=SimpleNamespace(
                finished_requests=[None] * ended, num_prompt_tokens=0, num_generation_tokens=running
            ),
        )
    manager.record(scheduler_stats=None, iteration_stats=None, mm_cache_stats="m")
    assert (watch.running, watch.kv_use) == (5, 0.4)
    # vLLM's own statistics go on.
    assert len(seen) == 5
    assert seen[-1] == {"scheduler_stats": None, "iteration_stats": None, "mm_cache_stats": "m"}
    watch.forget()
    assert (watch.running, watch.kv_use) == (None, None)


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
        # On a CPU vLLM counts nothing, and torch does.
        ({"fxgraph_cache_hit": 5}, "warm"),
        ({"fxgraph_cache_hit": 5, "fxgraph_cache_miss": 1}, "cold"),
        ({"num_compiled_artifacts_loaded": 3, "fxgraph_cache_miss": 1}, "warm"),
    ],
)
def test_a_start_is_cold_where_something_new_was_compiled(counts: dict[str, int], word: str | None) -> None:
    names = (
        "num_aot_artifacts_loaded", "num_aot_compiles", "num_cache_entries_updated", "num_compiled_artifacts_loaded",
        "num_inductor_compiles",
    )  # fmt: skip
    assert compile_cache_of(SimpleNamespace(**dict.fromkeys(names, 0) | counts), counts) == word


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
            "--quantisation is not a flag of this program or of vLLM; did you mean --quantization?",
        ),
        (["--batchsizes", "1"], "did you mean --batch-sizes?"),
        (["--zzz"], "see --help"),
        (["--block-size", "two"], "argument --block-size: invalid"),
        # What only vLLM's parser knows to be a flag of ours, or one that breaks the measurement.
        (["-n", "2"], "--nnodes is also a flag of this program; write it in full"),
        (["-tp", "2"], "--tensor-parallel-size is also a flag of this program"),
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


@pytest.mark.usefixtures("stub_vllm")
def test_vllm_gets_a_model_of_the_home_folder_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for model, told in (("~/m", "/home/me/m"), ("org/name", "org/name"), ("./m", "./m")):
        assert engine_settings(ExperimentConfig(model=model))["model"] == told


@pytest.mark.usefixtures("stub_vllm")
def test_what_would_spoil_a_measurement_is_off_and_what_it_needs_is_on() -> None:
    """Word by word, and not by the table itself: a cached prefix is not computed."""
    settings = engine_settings(ExperimentConfig(seed=7, trust_remote_code=True, enforce_eager=True))
    expected = {
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "enable_mfu_metrics": True,
        "jit_monitor_verbose": True,
        "seed": 7,
        "trust_remote_code": True,
        "enforce_eager": True,
    }
    assert {name: settings[name] for name in expected} == expected
    assert "data_parallel_size" not in settings
    torchrun = ExperimentConfig(data_parallel_size=2, distributed_executor_backend="external_launcher")
    assert engine_settings(torchrun)["data_parallel_size"] == 2


class FakeLLM:
    """Takes what it is handed; its counters grow with every look."""

    def __init__(self) -> None:
        self.looks = 0

    def get_metrics(self) -> list[Any]:
        self.looks += 1
        values = {
            "vllm:num_preemptions": 3,
            "vllm:estimated_flops_per_gpu": 100,
            "vllm:estimated_read_bytes_per_gpu": 20,
            "vllm:estimated_write_bytes_per_gpu": 5,
            "vllm:something_else": 1000,
        }
        return [SimpleNamespace(name=name, value=value * self.looks) for name, value in values.items()]

    def generate(self, prompts: list[Any], params: Any, *, use_tqdm: bool) -> list[Any]:
        self.params, self.use_tqdm = params, use_tqdm
        return [output(prompt=4, tokens=2, ttft_s=0.1, decode_s=0.1) for _ in prompts]


def test_a_run_asks_for_exact_lengths_and_is_timed_from_when_the_wait_is_over() -> None:
    made: Any = object.__new__(Engine)
    made._llm, made._sampling_params = FakeLLM(), SimpleNamespace
    made._config = ExperimentConfig(temperature=0.5, top_p=0.9)
    made._counted = {**engine._COUNTERS, **engine._ESTIMATES}
    made._steps = StepWatch(SimpleNamespace(record=None))
    made._steps._running, made._steps._kv_use = 9, 0.9  # of the run before
    waited_s: list[float] = []

    def wait() -> None:
        waited_s.append(time.monotonic())

    outcome = made.run([{"prompt_token_ids": [1, 2, 3, 4]}] * 3, 2, wait)
    passed_s = time.monotonic() - waited_s[0]
    # Without ignore_eos a model ends when it likes.
    assert vars(made._llm.params) == {
        "temperature": 0.5, "top_p": 0.9, "max_tokens": 2, "ignore_eos": True, "detokenize": False,
    }  # fmt: skip
    assert made._llm.use_tqdm is False
    assert outcome.start_s >= waited_s[0]
    assert 0 <= outcome.end_s - outcome.start_s <= passed_s
    assert (outcome.prompt_tokens, outcome.output_tokens) == (12, 6)
    # What the counters grew by; bytes read and written are moved alike.
    assert (outcome.preemptions, outcome.flops_per_device, outcome.memory_bytes_per_device) == (3, 100, 25)
    assert (outcome.peak_running, outcome.peak_kv_use) == (None, None)


def test_an_engine_is_as_full_and_as_slow_as_its_fullest_and_slowest_worker() -> None:
    workers = [
        WorkerInfo(weights_bytes=2 * GIB, kv_bytes=GIB, activation_bytes=GIB, compile_s=3.0, runner="a"),
        WorkerInfo(weights_bytes=GIB, kv_bytes=3 * GIB, activation_bytes=4 * GIB, compile_s=5.0, runner="b"),
    ]
    whole = with_workers(EngineInfo("0.32.0", load_s=LoadTimes(total_s=9.0)), workers)
    assert (whole.weights_gib, whole.kv_pool_gib, whole.activations_gib, whole.runner) == (2, 3, 4, "a")
    assert (whole.load_s.compile_s, whole.load_s.total_s) == (5.0, 9.0)
    # Of some workers alone it is not known which is the fullest.
    one_silent = [workers[0], replace(workers[1], activation_bytes=None, compile_s=None)]
    some = with_workers(EngineInfo("0.32.0"), one_silent)
    assert (some.activations_gib, some.load_s.compile_s) == (None, 3.0)


class Tensor:
    """So much of torch's as is looked at."""

    def __init__(self, items: int, item_size: int = 2, storage: int = 0) -> None:
        self.items, self.item_size, self.storage = items, item_size, storage

    def numel(self) -> int:
        return self.items

    def element_size(self) -> int:
        return self.item_size

    def untyped_storage(self) -> Any:
        return SimpleNamespace(data_ptr=lambda: self.storage, nbytes=lambda: self.items * self.item_size)


def test_weights_that_were_packed_away_are_counted_by_the_sizes_of_their_layer() -> None:
    sizes = {"input_size": 40, "output_size": 6, "input_size_per_partition": 10, "output_size_per_partition": 3}
    modules = [
        SimpleNamespace(**sizes, weight=Tensor(0)),  # packed
        SimpleNamespace(input_size=7, output_size=5, weight=Tensor(0)),  # whole on every rank
        SimpleNamespace(**sizes, weight=Tensor(30)),  # as it was, and among the parameters
        SimpleNamespace(**sizes, weight=None),
        SimpleNamespace(weight=Tensor(0)),
    ]
    model = SimpleNamespace(parameters=lambda: [Tensor(30), Tensor(5, 4)], modules=lambda: modules)
    assert weights_bytes_of(model, packed_item_size=2) == 60 + 20 + 60 + 70


def test_a_storage_that_layers_share_is_counted_once() -> None:
    caches = [Tensor(8, storage=1), [Tensor(8, storage=1), (Tensor(4, storage=2),)]]
    assert kv_bytes_of(caches) == 16 + 8


def model_config(config: dict[str, Any], text: dict[str, Any] | None = None, **changes: Any) -> SimpleNamespace:
    """A ModelConfig, of a model of text alone unless said otherwise."""
    values = {"multimodal_config": None, "tokenizer": "no/tokenizer", "tokenizer_revision": None, **changes}
    configs = {"hf_config": config, "hf_text_config": config if text is None else text}
    return SimpleNamespace(
        **values, **{name: SimpleNamespace(to_dict=lambda value=value: value) for name, value in configs.items()}
    )


def test_special_tokens_are_no_prompt() -> None:
    names = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None, "vocab_size": 100}
    assert special_ids(model_config(names)) == {1, 2, 3}


def test_markers_of_images_and_the_like_are_no_prompt() -> None:
    text = {"bos_token_id": 1, "num_hidden_layers": 30, "token_type_ids_size": 31}
    config = {
        "image_token_index": 2, "video_token_id": 3, "boi_token_index": 4, "audio_token_ids": [5, 6],
        "image_patch_id": 7, "media_placeholder_token_id": 8, "frame_start_id": 9, "text_config": text,
        "audio_config": {"audio_token_index": 10, "hidden_size": 32},
        "thinker_config": {"vision_config": {"x_token_idx": 11}},
        "id2label": {0: "LABEL_0", 36: 37}, "image_seq_length": 33,
        "tie_word_embeddings": True, "img_token_id": -1, "eos_token_id": True, "vocab_size": 34,
        "speech_token_id": "12", "mm_tokens_per_image": 35, "video_token_indices": [12],
    }  # fmt: skip
    assert special_ids(model_config(config, text)) == set(range(1, 13))


def test_what_the_tokenizer_of_a_multimodal_model_adds_is_no_prompt(tmp_path: Path) -> None:
    added = [{"id": 3, "special": True}, {"id": 4}, {"id": "5"}, 6]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"7": {}, "x": {}}}')
    names = {"bos_token_id": 1}
    with_images: dict[str, Any] = {"multimodal_config": SimpleNamespace(), "tokenizer": str(tmp_path)}
    assert special_ids(model_config(names, **with_images)) == {1, 3, 4, 7}
    assert special_ids(model_config(names, tokenizer=str(tmp_path))) == {1}
    for content in ("[]", "{", '{"added_tokens": 1, "added_tokens_decoder": []}'):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_text(content)
        assert special_ids(model_config(names, **with_images)) == {1}


def test_files_of_the_hub_are_read_where_they_are_here_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text('{"added_tokens": [{"id": 3}]}')
    asked: list[tuple[str, str, str | None]] = []

    def look(repository: str, name: str, *, revision: str | None) -> str | object | None:
        asked.append((repository, name, revision))
        # In the hub's own words: here, and known not to be.
        return str(kept) if name == "tokenizer.json" else object()

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(try_to_load_from_cache=look))
    assert added_ids("org/name", "main") == {3}
    assert asked == [("org/name", "tokenizer.json", "main"), ("org/name", "tokenizer_config.json", "main")]


@pytest.mark.usefixtures("stub_vllm")
@pytest.mark.parametrize(
    ("multimodal", "words", "text_alone", "skips"),
    [
        ("", (), True, True),
        ("1", (), True, True),
        ("internvl", (), True, False),
        # The user's own word counts, and then what vLLM needs for it.
        ("1", ("--no-language-model-only",), False, False),
        ("", ("--no-language-model-only",), False, True),
        ("", ("--no-skip-tokenizer-init",), True, False),
    ],
)
def test_a_multimodal_model_runs_on_text(
    monkeypatch: pytest.MonkeyPatch, multimodal: str, words: tuple[str, ...], text_alone: bool, skips: bool
) -> None:
    monkeypatch.setenv("STUB_MULTIMODAL", multimodal)
    settings = engine_settings(ExperimentConfig(engine_args=words))
    assert (settings["language_model_only"], settings["skip_tokenizer_init"]) == (text_alone, skips)


@pytest.mark.usefixtures("stub_vllm")
@pytest.mark.parametrize("multimodal", [False, True])
def test_without_a_setting_for_text_alone_the_tokenizer_stays(
    monkeypatch: pytest.MonkeyPatch, multimodal: bool
) -> None:
    from vllm.engine import arg_utils

    monkeypatch.setattr(arg_utils, "EngineArgs", arg_utils._EngineArgs)
    monkeypatch.setenv("STUB_MULTIMODAL", "1" if multimodal else "")
    settings = engine_settings(ExperimentConfig())
    assert "language_model_only" not in settings
    assert settings["skip_tokenizer_init"] is not multimodal


def test_where_vllm_does_not_say_whether_it_takes_images_the_tokenizer_stays() -> None:
    assert engine._needs_tokenizer(SimpleNamespace(is_multimodal_model=True))
    assert not engine._needs_tokenizer(SimpleNamespace(is_multimodal_model=False))


@pytest.mark.parametrize(
    ("stages", "executor", "overlap", "said"),
    [
        (1, "mp", None, "mp"),
        (2, "mp", True, "mp"),
        (2, "external_launcher", False, "external_launcher"),
        (2, SimpleNamespace, True, "SimpleNamespace"),
    ],
)
def test_stages_overlap_but_for_torchrun(stages: int, executor: Any, overlap: bool | None, said: str) -> None:
    config = vllm_config(pipeline_parallel_size=stages, distributed_executor_backend=executor)
    found = effective_settings("0.32.0", config)
    assert (found.pipeline_stages_overlap, found.executor, found.pipeline_parallel_size) == (overlap, said, stages)


def test_what_vllm_really_runs_with_is_read_back_field_by_field() -> None:
    found = effective_settings("0.32.0", vllm_config(pipeline_parallel_size=1, distributed_executor_backend="uni"))
    assert found == EngineInfo(
        vllm_version="0.32.0", executor="uni", tensor_parallel_size=2, pipeline_parallel_size=1,
        pipeline_stages_overlap=None, dtype="bfloat16", quantization="fp8", max_model_len=640, enforce_eager=False,
        language_model_only=True, skip_tokenizer_init=False, max_num_seqs=16, max_num_batched_tokens=2048,
        chunked_prefill=True, async_scheduling=False, enable_expert_parallel=True, decode_context_parallel_size=4,
        speculative_method="ngram", num_speculative_tokens=5, kv_connector="OffloadingConnector",
        gpu_memory_utilization=0.8, kv_cache_dtype="auto", block_size=32, num_gpu_blocks=1000,
        enable_prefix_caching=False, load_format="dummy", compilation_mode="VLLM_COMPILE", cudagraph_mode="FULL",
        cudagraph_capture_sizes=[1, 2, 4], kv_cache_tokens=32000,
    )  # fmt: skip


def vllm_config(**parallel: Any) -> SimpleNamespace:
    """A VllmConfig with a number of its own in every place."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            dtype="torch.bfloat16", quantization="fp8", max_model_len=640, enforce_eager=False,
            multimodal_config=SimpleNamespace(language_model_only=True), skip_tokenizer_init=False,
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=2, data_parallel_size=1, enable_expert_parallel=True, decode_context_parallel_size=4,
            **parallel,
        ),
        speculative_config=SimpleNamespace(method="ngram", num_speculative_tokens=5),
        kv_transfer_config=SimpleNamespace(kv_connector="OffloadingConnector"),
        scheduler_config=SimpleNamespace(
            max_num_seqs=16, max_num_batched_tokens=2048, enable_chunked_prefill=True, async_scheduling=False
        ),
        cache_config=SimpleNamespace(
            gpu_memory_utilization=0.8, cache_dtype="auto", block_size=32, num_gpu_blocks=1000,
            enable_prefix_caching=False, kv_cache_size_tokens=32000,
        ),
        load_config=SimpleNamespace(load_format=SimpleNamespace(value="dummy")),
        compilation_config=SimpleNamespace(
            mode=SimpleNamespace(name="VLLM_COMPILE"), cudagraph_mode=SimpleNamespace(name="FULL"),
            cudagraph_capture_sizes=(1, 2, 4),
        ),
    )  # fmt: skip


def test_what_a_version_of_vllm_does_not_know_or_use_is_not_told() -> None:
    config = vllm_config(pipeline_parallel_size=1, distributed_executor_backend="uni")
    config.speculative_config = config.kv_transfer_config = None
    del config.parallel_config.decode_context_parallel_size
    found = effective_settings("0.32.0", config)
    assert (found.speculative_method, found.num_speculative_tokens, found.kv_connector) == (None, None, None)
    assert found.decode_context_parallel_size is None


def test_hits_of_the_prefix_cache_are_those_of_all_requests() -> None:
    outputs = [output(prompt=32, tokens=1, ttft_s=0.1, decode_s=0.0, cached=cached) for cached in (16, 16, None)]
    assert count_outputs(outputs, 0.0, 1.0).prefix_cache_hit_tokens == 32


def test_a_wait_in_the_queue_is_never_below_nothing() -> None:
    late = output(prompt=1, tokens=1, ttft_s=0.1, decode_s=0.0)
    late.metrics.scheduled_ts = late.metrics.first_token_ts - 0.1000002
    assert count_outputs([late], 0.0, 1.0).requests.queue_s == [0.0]


@pytest.mark.usefixtures("stub_vllm")
def test_every_argument_of_vllm_is_known_by_what_it_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_devices", lambda: Devices("gpu", ("0", "1")))
    config = ExperimentConfig(
        model="org/name", tensor_parallel_size=2, pipeline_parallel_size=3, distributed_executor_backend="mp",
        batch_sizes=(4, 16, 2), seq_lens=(64, 512, 8), max_tokens=128, dtype="float16", gpu_memory_utilization=0.8,
        max_num_batched_tokens=2048, seed=7, enforce_eager=True, engine_args=("--quantization", "fp8"),
    )  # fmt: skip
    expected = {
        "model": "org/name",
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 3,
        "distributed_executor_backend": "mp",
        "max_model_len": config.longest_request,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 2048,
        "dtype": "float16",
        "gpu_memory_utilization": 0.8,
        "enforce_eager": True,
        "trust_remote_code": False,
        "seed": 7,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "worker_extension_cls": "batch_inference.measure.engine.WorkerExtension",
        "enable_mfu_metrics": True,
        "jit_monitor_verbose": True,
        "language_model_only": True,
        "quantization": "fp8",
    }
    assert engine_settings(config) == expected
    given = engine_settings(replace_config(config, max_model_len=4096, max_num_seqs=99))
    assert given == {**expected, "max_model_len": 4096, "max_num_seqs": 99}


@pytest.mark.parametrize(("replicas", "estimates"), [(1, True), (2, False)])
def test_an_engine_tells_what_it_is_and_how_long_its_start_took(
    replicas: int, estimates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    worker = WorkerInfo(host="a", weights_bytes=GIB, kv_bytes=2 * GIB, runner="x.Runner")

    class LLM:
        def __init__(self, **settings: Any) -> None:
            made.append(settings)
            self.llm_engine = SimpleNamespace(
                model_config=SimpleNamespace(
                    get_vocab_size=lambda: 1000,
                    multimodal_config=None,
                    hf_config=SimpleNamespace(to_dict=lambda: {"eos_token_id": 2}),
                    hf_text_config=SimpleNamespace(to_dict=lambda: {"eos_token_id": [2, 3]}),
                ),
                vllm_config=vllm_config(pipeline_parallel_size=1, distributed_executor_backend="uni"),
                logger_manager=SimpleNamespace(record=None),
                engine_core=SimpleNamespace(shutdown=lambda: made.append("shut down")),
            )

        def collective_rpc(self, name: str) -> list[Any]:
            made.append(name)
            if name == "batch_inference_end_at_once":
                return [None] * 2
            reading = Reading("device", used_gib=[1.0], energy_j=[2.0])
            return [msgspec.to_builtins({"batch_inference_report": worker, "batch_inference_read": reading}[name])] * 2

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=dict, __version__="0.32.0"))
    monkeypatch.setattr(engine, "engine_settings", lambda config: {"model": config.model})
    monkeypatch.setattr(engine, "has_whole_estimate", lambda _: replicas == 1)
    times_s = iter((103.0, 110.0))
    monkeypatch.setattr(engine, "time", SimpleNamespace(monotonic=lambda: next(times_s)))
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    one = Engine(ExperimentConfig(model="org/name"), 101.0)
    assert one.info == replace(
        effective_settings("0.32.0", one._llm.llm_engine.vllm_config),
        multiprocess_engine=True, load_s=LoadTimes(import_s=2.0, engine_s=7.0, total_s=9.0), workers=[worker] * 2,
        weights_gib=1.0, kv_pool_gib=2.0, runner="x.Runner",
    )  # fmt: skip
    assert set(one._counted.values()) == {"preemptions"} | (
        {"flops_per_device", "memory_bytes_per_device"} if estimates else set()
    )
    asked: dict[str, Any] = {}
    monkeypatch.setattr(engine, "make_prompts", lambda **words: asked.update(words) or [[5, 6], [7, 8]])
    assert one.make_prompts(2, 8, [0, "run"]) == [{"prompt_token_ids": [5, 6]}, {"prompt_token_ids": [7, 8]}]
    assert asked == {"num_prompts": 2, "seq_len": 8, "vocab_size": 1000, "avoid": {2, 3}, "seed_parts": (0, "run")}
    assert one.read_devices() == Reading("device", used_gib=[1.0, 1.0], energy_j=[2.0, 2.0])
    one.close()
    assert made == [{"model": "org/name"}, "batch_inference_report", "batch_inference_read", "shut down"]
    # One that runs in the process of its LLM says so, and on cores its processes end at once.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    ways = [("cpu", None, True), ("cpu", "external_launcher", False), ("gpu", None, False)]
    for kind, backend, at_once in ways:
        made.clear()
        times_s = iter((103.0, 110.0))
        monkeypatch.setattr(engine, "find_devices", lambda kind=kind: Devices(kind, ("0",)))
        alike = Engine(ExperimentConfig(distributed_executor_backend=backend), 101.0)
        assert (alike.info.multiprocess_engine, alike.ends_at_once) == (False, at_once)
        assert ("batch_inference_end_at_once" in made) == at_once


def test_a_worker_tells_of_itself_and_of_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = SimpleNamespace(compilation_counter="counter")
    monkeypatch.setitem(sys.modules, "vllm.compilation.counter", counter)
    by_torch = SimpleNamespace(counters={"inductor": "torch's"})
    monkeypatch.setitem(sys.modules, "torch._dynamo.utils", by_torch)
    monkeypatch.setattr(engine, "compile_cache_of", lambda *counted: {("counter", "torch's"): "warm"}[counted])
    monkeypatch.setattr(engine, "weights_bytes_of", lambda model, size: {("model", 2): 11}[model, size])
    monkeypatch.setattr(engine, "kv_bytes_of", lambda caches: {"caches": 22}[caches])
    monkeypatch.setattr(engine.socket, "gethostname", lambda: "node-7")
    watched, asked = [], []

    class Watch:
        def identify(self, *, in_use: bool = False) -> list[DeviceInfo]:
            assert in_use
            return [DeviceInfo(index=0, name="mine"), DeviceInfo(index=1, name="other")]

        def read(self, pids: list[int]) -> Reading:
            asked.append(pids)
            return Reading("device", used_gib=[1.0], energy_j=[None])

    monkeypatch.setattr(engine, "monitor", lambda devices: watched.append(devices) or Watch())
    monkeypatch.setattr(engine.os, "sched_getaffinity", lambda pid: {0: {12, 3, 5}}[pid])
    runner = SimpleNamespace(model="model", kv_caches="caches")

    class Rank(engine.WorkerExtension):
        model_runner = runner
        vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(dtype=SimpleNamespace(itemsize=2)),
            compilation_config=SimpleNamespace(compilation_time=1.5),
        )
        device = SimpleNamespace(type="cpu")
        peak_activation_memory = 33

    rank = Rank()
    expected = WorkerInfo(
        host="node-7", device=DeviceInfo(index=0, name="mine"), weights_bytes=11, kv_bytes=22, activation_bytes=33,
        compile_s=1.5, compile_cache="warm", runner="types.SimpleNamespace",
    )  # fmt: skip
    assert msgspec.convert(rank.batch_inference_report(), WorkerInfo) == expected
    assert rank.batch_inference_read() == msgspec.to_builtins(Reading("device", used_gib=[1.0], energy_j=[None]))
    assert asked == [[os.getpid()]]
    assert watched == [Devices("cpu", ("3,5,12",))]  # once
    # What vLLM did not measure is unknown.
    rank.vllm_config.compilation_config.compilation_time = 0.0
    del Rank.peak_activation_memory
    unknown = msgspec.convert(rank.batch_inference_report(), WorkerInfo)
    assert unknown == replace(expected, compile_s=None, activation_bytes=None)
    monkeypatch.delitem(sys.modules, "torch._dynamo.utils")
    assert engine._counted_by_torch() == {}  # nothing was compiled


def test_a_gpu_of_torch_is_found_by_its_identifier(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(get_device_properties=lambda device: SimpleNamespace(uuid=f"of-{device.index}"))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert engine._devices_of(SimpleNamespace(type="cuda", index=3)) == Devices("gpu", ("GPU-of-3",))


@pytest.mark.usefixtures("stub_vllm")
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("nnodes", 2, "--nnodes is also a flag of this program; write it in full"),
        ("enable_prefix_caching", False, None),  # as it is anyway
        ("enable_prefix_caching", True, "--enable-prefix-caching"),
        ("quantization", "fp8", None),
    ],
)
def test_what_is_ours_is_no_flag_for_vllm_but_where_it_says_the_same(name: str, value: Any, said: str | None) -> None:
    if said is None:
        engine._refuse_ours(name, value)
        return
    with pytest.raises(ConfigError, match=said):
        engine._refuse_ours(name, value)


@pytest.mark.usefixtures("stub_vllm")
def test_the_long_flags_of_vllm_are_in_order() -> None:
    flags = engine.known_flags()
    assert flags == sorted(set(flags))
    assert {"--quantization", "--load-format"} <= set(flags)
    assert all(flag.startswith("--") for flag in flags)


def test_the_workers_of_a_node_serve_node_0_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    class Executor:
        def __init__(self, config: Any, **options: Any) -> None:
            done.append((config, options))

        def start_worker_monitor(self, **options: Any) -> None:
            done.append(options)

    def arguments(**settings: Any) -> Any:
        done.append(settings)
        return SimpleNamespace(create_engine_config=lambda **words: words)

    modules = {
        "vllm.engine.arg_utils": SimpleNamespace(EngineArgs=arguments),
        "vllm.usage.usage_lib": SimpleNamespace(UsageContext=SimpleNamespace(LLM_CLASS="llm")),
        "vllm.v1.executor.multiproc_executor": SimpleNamespace(MultiprocExecutor=Executor),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(engine, "engine_settings", lambda config: {"model": config.model})
    engine.serve_node_0(ExperimentConfig(model="org/name"))
    assert done == [
        {"model": "org/name"},
        ({"usage_context": "llm", "headless": True}, {"monitor_workers": False}),
        {"inline": True},
    ]


# --- queues -----------------------------------------------------------------------------------------------------------

Loader = Callable[..., Engine]
WORKLOAD = {"prompts_file": "job.jsonl", "workload_longest": 200, "workload_hash": "abc"}


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loader]:
    """An engine on the stub vLLM, in this process; it is imported anew, because it reads its variables then."""
    monkeypatch.syspath_prepend(str(STUB))
    monkeypatch.setenv("STUB_STEP_S", "0")
    monkeypatch.setenv("BATCH_INFERENCE_LIMITS", "")
    made: list[Engine] = []

    def load(fail: str = "", **changes: Any) -> Engine:
        forget_vllm()
        monkeypatch.setenv("STUB_FAIL", fail)
        made.append(Engine(ExperimentConfig(**{"batch_sizes": (2, 8), **WORKLOAD, **changes}), time.monotonic()))
        return made[-1]

    before = forget_vllm()
    yield load
    for one in made:
        one.close()
    forget_vllm()
    sys.modules.update(before)


def forget_vllm() -> dict[str, Any]:
    """What was imported of it."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "vllm"}


def queue_of(*sizes: tuple[int, int]) -> list[Asked]:
    return [Asked(prompt, tokens) for prompt, tokens in sizes]


def ran(one: Engine, asked: list[Asked], *, ends_itself: bool = False) -> Outcome:
    return one.run_queue(one.make_queue(asked, [0, "run", 0]), asked, lambda: None, ends_itself=ends_itself)


def test_prompts_of_a_queue_are_as_long_as_asked_and_ids_of_a_text_are_as_they_are(loaded: Loader) -> None:
    one = loaded()
    asked = [Asked(7, 3), Asked([4, 4, 9], 5), Asked(12, 1), Asked([1], 1)]
    prompts = [prompt["prompt_token_ids"] for prompt in one.make_queue(asked, [0, "run", 0])]
    assert [len(prompt) for prompt in prompts] == [7, 3, 12, 1]
    assert (prompts[1], prompts[3]) == ([4, 4, 9], [1])
    # No special id among those that are made, and nothing that two of them share.
    assert not {1, 2} & {*prompts[0], *prompts[2]}
    assert prompts[0] != prompts[2][:7]
    again, other = (
        [prompt["prompt_token_ids"] for prompt in one.make_queue(asked, [0, "run", index])] for index in (0, 1)
    )
    assert again == prompts
    assert (other[0] != prompts[0], other[1]) == (True, prompts[1])


def test_ids_that_are_none_of_the_model_are_refused_and_not_told(loaded: Loader) -> None:
    one = loaded()
    assert one.make_queue([Asked([0, 99], 3)], [0]) == [{"prompt_token_ids": [0, 99]}]
    for wrong in (100, 31_415_926):
        with pytest.raises(ConfigError) as caught:
            one.make_queue([Asked([5], 3), Asked([4, wrong, 4], 3), Asked(7, 3)], [0])
        assert str(caught.value) == (
            "--prompts-file job.jsonl: it has token ids outside the 100 of the model; use the model's own tokenizer"
        )


def test_every_request_of_a_queue_is_counted_against_what_it_was_asked_for(
    loaded: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Arrivals are by wall clock, which may be corrected by microseconds meanwhile.
    monkeypatch.setenv("STUB_STEP_S", "0.005")
    asked = queue_of((7, 3), (20, 9), (5, 1), (8, 4))
    outcome = ran(loaded(), asked)
    assert outcome.requests.prompt_tokens == [7, 20, 5, 8]
    assert outcome.requests.output_tokens == [3, 9, 1, 4]
    assert (outcome.prompt_tokens, outcome.output_tokens, outcome.miscounted) == (40, 17, 0)
    requests = outcome.requests
    assert all(arrival_s >= 0 for arrival_s in requests.arrival_s)
    for latency_s, ttft_s, queue_s in zip(requests.latency_s, requests.ttft_s, requests.queue_s, strict=True):
        assert latency_s >= ttft_s >= queue_s >= 0
    assert ran(loaded("tokens"), asked).miscounted == 1


def test_no_more_requests_run_at_once_than_a_point_says_and_as_many_as_it_was_loaded_for_afterwards(
    loaded: Loader,
) -> None:
    one, asked = loaded(), queue_of(*[(5, 6)] * 24)
    peaks = []
    for limit in (2, 8, 3, 1, None, 99):
        one.limit(limit, None)
        peaks.append(ran(one, asked).peak_running)
    assert peaks == [2, 8, 3, 1, 8, 8]


def test_fewer_tokens_in_a_step_make_more_steps_of_the_same_tokens(loaded: Loader) -> None:
    one, asked = loaded(max_num_batched_tokens=(64, 512)), queue_of(*[(60, 4)] * 24)
    lines = []
    for tokens in (64, 512, None):
        one.limit(8, tokens)
        outcome = ran(one, asked)
        assert outcome.timeline is not None
        lines.append(outcome.timeline)
        assert (sum(lines[-1].prompt_tokens), sum(lines[-1].output_tokens)) == (24 * 60, 24 * 4)
    few, many, as_loaded = (sum(line.steps) for line in lines)
    assert few > many == as_loaded


def test_the_steps_of_a_queue_are_those_of_its_own_run(loaded: Loader) -> None:
    one, asked = loaded(), queue_of(*[(5, 6)] * 16)
    one.limit(8, None)
    for _ in range(2):
        line = ran(one, asked).timeline
        assert line is not None
        # Two rounds of 8, of 6 steps each.
        assert (sum(line.steps), max(line.running)) == (12, 8.0)
        assert line.waiting[-1] == 0
        assert line.end_s == sorted(line.end_s)
        assert line.end_s[0] >= 0


def test_a_model_that_ends_itself_may_stay_below_and_not_above(loaded: Loader) -> None:
    asked = queue_of(*[(5, 6)] * 6)
    outcome = ran(loaded(), asked, ends_itself=True)
    # Of the stub every third ends after two tokens.
    assert outcome.requests.output_tokens == [2, 6, 6, 2, 6, 6]
    assert outcome.miscounted == 0


def test_a_replica_may_have_an_empty_queue(loaded: Loader) -> None:
    one = loaded()
    one.limit(2, None)
    outcome = ran(one, [])
    assert (outcome.prompt_tokens, outcome.output_tokens, outcome.miscounted, outcome.peak_running) == (0, 0, 0, None)
    assert outcome.timeline is not None
    assert outcome.timeline.steps == []
    assert outcome.end_s >= outcome.start_s


@pytest.mark.parametrize(
    "switch", [("--enable-prefix-caching",), ("--no-enable-prefix-caching", "--enable_prefix_caching")]
)
def test_a_run_finds_no_prompt_of_another_run_in_the_cache(switch: tuple[str, ...], loaded: Loader) -> None:
    """A warm-up and every point have the same prompts."""
    one, asked = loaded(engine_args=switch), [Asked([5, 6, 7], 2), Asked([5, 6, 7], 2), Asked([8, 9], 2)]
    assert one.info.enable_prefix_caching
    # What its own requests share counts, and no more.
    assert [ran(one, asked).prefix_cache_hit_tokens for _ in range(3)] == [3, 3, 3]


def test_an_answer_finds_no_prompt_of_an_answer_before_in_the_cache(
    loaded: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, prompts = loaded(engine_args=("--enable-prefix-caching",)), [{"prompt_token_ids": [5, 6, 7]}]
    one._llm.cached.add((5, 6, 7))
    seen = []
    monkeypatch.setattr(one._llm, "generate", lambda *_, **__: seen.append(set(one._llm.cached)) or [])
    one.answer(prompts, 2)
    assert seen == [set()]


def test_a_cache_that_cannot_be_emptied_is_no_cache_to_measure_with(loaded: Loader) -> None:
    one = loaded("prefix-stays", engine_args=("--enable-prefix-caching",))
    with pytest.raises(RuntimeError, match="did not empty its prefix cache"):
        ran(one, queue_of((5, 2)))
    # Where nothing is cached, nothing is emptied.
    off = loaded("prefix-stays", engine_args=("--enable-prefix-caching", "--no-enable-prefix-caching"))
    assert ran(off, [Asked([5, 6], 2)] * 2).prefix_cache_hit_tokens == 0


@pytest.mark.usefixtures("stub_vllm")
@pytest.mark.parametrize(
    ("changes", "slots", "tokens", "limited"),
    [
        ({}, 8, None, False),  # batches
        (WORKLOAD, 8, None, True),
        ({**WORKLOAD, "batch_sizes": (8,)}, 8, None, False),
        ({**WORKLOAD, "batch_sizes": (8,), "max_num_seqs": 16}, 16, None, True),
        ({**WORKLOAD, "batch_sizes": (8,), "max_num_seqs": 4}, 4, None, False),
        ({**WORKLOAD, "max_num_batched_tokens": 512}, 8, 512, True),
        ({"max_num_batched_tokens": (64, 512, 256)}, 8, 512, True),
        ({**WORKLOAD, "batch_sizes": (8,), "max_num_batched_tokens": (64, 512)}, 8, 512, True),
    ],
)
def test_an_engine_is_loaded_for_the_largest_and_obeys_where_a_point_has_less(
    changes: dict[str, Any], slots: int, tokens: int | None, limited: bool
) -> None:
    settings = engine_settings(ExperimentConfig(**{"batch_sizes": (2, 8), **changes}))
    assert (settings["max_num_seqs"], settings["max_num_batched_tokens"]) == (slots, tokens)
    assert settings.get("scheduler_cls") == (SCHEDULER if limited else None)
    assert settings["max_model_len"] == (200 if "prompts_file" in changes else 2176)


@pytest.mark.usefixtures("stub_vllm")
def test_prefixes_may_be_cached_for_a_workload_alone() -> None:
    words = ("--enable_prefix_caching",)
    assert engine_settings(ExperimentConfig(engine_args=words, **WORKLOAD))["enable_prefix_caching"] is True
    with pytest.raises(ConfigError, match="--enable-prefix-caching cannot be passed on"):
        engine_settings(ExperimentConfig(engine_args=words))


# --- what vLLM's objects say of a queue -------------------------------------------------------------------------------


def test_requests_that_came_back_otherwise_are_counted() -> None:
    def miscounted(sizes: list[tuple[int, int]], *, ends_itself: bool = False) -> int | None:
        outputs = [output(prompt=prompt, tokens=tokens, ttft_s=0.1, decode_s=0.1) for prompt, tokens in sizes]
        outcome = count_outputs(outputs, 0.0, 1.0)
        add_queue(outcome, outputs, [(5, 3)] * len(sizes), time.time(), ends_itself=ends_itself)
        return outcome.miscounted

    assert miscounted([(5, 3), (5, 3)]) == 0
    assert miscounted([(5, 2), (5, 4), (4, 3), (6, 3), (5, 3)]) == 4
    # At most so many, and one at least.
    assert miscounted([(5, 2), (5, 1), (5, 3)], ends_itself=True) == 0
    assert miscounted([(5, 0), (5, 4), (4, 3)], ends_itself=True) == 3


def test_an_arrival_is_told_from_the_start_and_is_never_before_it() -> None:
    outputs = [output(prompt=5, tokens=3, ttft_s=0.4, decode_s=1.0) for _ in range(2)]
    began_s = 1000.0
    outputs[0].metrics.arrival_time, outputs[1].metrics.arrival_time = 1000.25, 999.99
    outcome = count_outputs(outputs, 0.0, 1.0)
    add_queue(outcome, outputs, [(5, 3)] * 2, began_s, ends_itself=False)
    assert outcome.requests.arrival_s == [0.25, 0.0]


def test_moments_of_a_queue_are_by_the_clock_of_the_engine() -> None:
    """Two requests that the engine took into one step, heard of 0.3 s apart: by a process that was busy submitting."""
    outputs = [output(prompt=5, tokens=3, ttft_s=0.4, decode_s=1.0) for _ in range(2)]
    for one, arrival_s, delay_s in zip(outputs, (1000.0, 1000.1), (0.0, 0.3), strict=True):
        one.metrics.arrival_time = arrival_s
        one.metrics.first_token_latency = 1000.4 + delay_s - arrival_s
    outcome = count_outputs(outputs, 0.0, 2.0)
    add_queue(outcome, outputs, [(5, 3)] * 2, 1000.0, ends_itself=False)
    requests = outcome.requests
    for since_s, from_start_s in ((requests.queue_s, 0.1), (requests.ttft_s, 0.4), (requests.latency_s, 1.4)):
        moments_s = [arrival_s + value for arrival_s, value in zip(requests.arrival_s, since_s, strict=True)]
        assert moments_s == pytest.approx([from_start_s] * 2)


def test_steps_are_put_together_in_intervals_of_half_a_second() -> None:
    steps = [
        Step(10.1, 50, 0, 4, 7), Step(10.4, 0, 4, 4, 6), Step(10.5, 0, 4, 3, 6), Step(10.9, 20, 3, 2, 5),
        Step(70.0, 0, 1, 1, 0),
    ]  # fmt: skip
    line = timeline_of(steps, 10.0)
    assert line.end_s == pytest.approx([0.4, 0.9, 60.0])
    assert line.steps == [2, 2, 1]
    assert line.prompt_tokens == [50, 20, 0]
    assert line.output_tokens == [4, 7, 1]
    assert line.running == [4.0, 2.5, 1.0]
    assert line.waiting == [6, 5, 0]


def test_a_short_run_has_a_hundred_intervals_and_one_without_steps_none() -> None:
    line = timeline_of([Step(number / 1000, 0, 1, 1, 0) for number in range(1, 1001)], 0.0)
    assert 100 <= len(line.steps) <= 101
    assert sum(line.steps) == sum(line.output_tokens) == 1000
    assert timeline_of([], 5.0).end_s == []
    # Of no length at all.
    assert timeline_of([Step(5.0, 3, 1, 1, 0)], 5.0).steps == [1]


def test_a_step_runs_also_those_that_end_in_it() -> None:
    manager = SimpleNamespace(record=lambda **_: None)
    watch = StepWatch(manager)
    watch.forget(keeps_steps=True)
    for running, ended, waiting in ((3, 0, 9), (1, 2, 4)):
        manager.record(
            scheduler_stats=SimpleNamespace(num_running_reqs=running, num_waiting_reqs=waiting, kv_cache_usage=0.1),
            iteration_stats=SimpleNamespace(
                finished_requests=[None] * ended, num_prompt_tokens=11, num_generation_tokens=3
            ),
        )
    # What is said without a step is none.
    manager.record(
        scheduler_stats=SimpleNamespace(num_running_reqs=0, num_waiting_reqs=0, kv_cache_usage=0.0),
        iteration_stats=None,
    )
    line = watch.timeline(0.0)
    assert (sum(line.steps), sum(line.prompt_tokens), sum(line.output_tokens), line.waiting[-1]) == (2, 22, 6, 4)
    assert max(line.running) == 3.0
    watch.forget()
    assert watch.timeline(0.0).steps == []
