"""How many requests run at once, as counted by vLLM or computed from its limits."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest

from batch_inference.core.capacity import (
    padded_batch_size,
    request_slots,
    requests_in_kv_cache,
    running_requests,
    waves,
)
from batch_inference.core.kv_blocks import capacity_in_tokens, requests_that_fit
from batch_inference.core.results import EngineInfo, Point, Result
from builders import make_point, make_result, make_run

# As vLLM 0.32.0 reports them: 512 blocks of 128 tokens, of which a request of 80 takes a whole one.
BLOCKS = {"num_gpu_blocks": 512, "block_size": 128, "max_model_len": 80, "kv_cache_tokens": 40960}


def measured(batch_size: int, engine: dict[str, Any], peaks: tuple[int | None, ...] = (None,)) -> tuple[Result, Point]:
    """A point of requests of 64 + 16 tokens, with a run for each of `peaks`."""
    runs = [make_run(1.0, requests=batch_size) for _ in peaks]
    for run, peak in zip(runs, peaks, strict=True):
        run.counters.peak_running = peak
    point = make_point(batch_size, 64, max_tokens=16, runs=runs)
    result = make_result(points=[point])
    result.engine = msgspec.convert({"vllm_version": "0.32.0", **engine}, EngineInfo)
    return result, point


@pytest.mark.parametrize(
    ("engine", "fitting"),
    [
        (BLOCKS, 511),  # one block is held back
        ({**BLOCKS, "max_model_len": 2048, "kv_cache_tokens": 512 * 128}, 511),
        ({**BLOCKS, "block_size": 16, "kv_cache_tokens": 512 * 16}, 102),  # 511 // 5
        # By tokens, where blocks do not explain what vLLM says: models with several kinds of layers.
        ({**BLOCKS, "kv_cache_tokens": 8000}, 100),
        ({"kv_cache_tokens": 8000}, 100),
        ({**BLOCKS, "num_gpu_blocks": None, "kv_cache_tokens": 8000}, 100),
        ({"kv_cache_tokens": 79}, 1),
        ({"num_gpu_blocks": 512, "block_size": 128}, None),
        ({}, None),
    ],
)
def test_the_kv_cache_holds_whole_requests(engine: dict[str, Any], fitting: int | None) -> None:
    assert requests_in_kv_cache(*measured(4, engine)) == fitting


def test_rounding_to_blocks_makes_a_second_wave_that_tokens_do_not_show() -> None:
    engine = {"num_gpu_blocks": 11, "block_size": 64, "max_model_len": 128, "kv_cache_tokens": 704}
    result, point = measured(8, engine)
    assert point.batch_size * 80 <= 704
    assert (running_requests(result, point), waves(point, running_requests(result, point))) == (5, 2)


@pytest.mark.parametrize(
    ("batch_size", "engine", "running", "in_waves"),
    [
        (4, {"max_num_seqs": 8}, 4, 1),
        (9, {"max_num_seqs": 8}, 8, 2),
        (17, {"max_num_seqs": 8}, 8, 3),
        (17, {"max_num_seqs": 8, "kv_cache_tokens": 400}, 5, 4),
        (4, {}, None, None),
    ],
)
def test_the_tighter_limit_decides(
    batch_size: int, engine: dict[str, Any], running: int | None, in_waves: int | None
) -> None:
    result, point = measured(batch_size, engine)
    assert (running_requests(result, point), waves(point, running_requests(result, point))) == (running, in_waves)


@pytest.mark.parametrize(
    ("peaks", "running"),
    [((8, 8), 8), ((8, 6), 6), ((8, None), 4)],  # counted in every run, or computed
)
def test_what_vllm_counted_is_preferred(peaks: tuple[int | None, ...], running: int) -> None:
    assert running_requests(*measured(8, {"max_num_seqs": 4}, peaks)) == running


def padded_of(result: Result, point: Point) -> int | None:
    return padded_batch_size(result, point, running_requests(result, point))


@pytest.mark.parametrize(
    ("engine", "padded"),
    [
        ({"cudagraph_capture_sizes": [1, 2, 4, 8]}, 4),
        ({"cudagraph_capture_sizes": [8, 4, 2, 1], "max_num_seqs": 2}, 2),  # a step holds what runs, not what was asked
        ({"cudagraph_capture_sizes": [1, 2]}, None),  # too large for any graph
        ({"cudagraph_capture_sizes": [1, 2, 4], "enforce_eager": True}, None),
        ({"cudagraph_capture_sizes": [1, 2, 4], "cudagraph_mode": "NONE"}, None),
        ({}, None),
    ],
)
def test_a_batch_is_padded_to_the_next_captured_graph(engine: dict[str, Any], padded: int | None) -> None:
    defaults = {"max_num_seqs": 8, "cudagraph_mode": "FULL_AND_PIECEWISE"}
    assert padded_of(*measured(3, {**defaults, **engine})) == padded


def test_how_stages_share_a_batch_is_not_known() -> None:
    engine = {"max_num_seqs": 8, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": [4]}
    result, point = measured(3, engine)
    result.config = dataclasses.replace(result.config, pipeline_parallel_size=2)
    assert padded_of(result, point) is None


def test_a_point_of_an_earlier_sweep_is_seen_with_its_own_engine() -> None:
    result, point = measured(8, {"max_num_seqs": 8})
    result.earlier_engines = [EngineInfo("0.32.0", max_num_seqs=4)]
    point.engine = 0
    assert waves(point, running_requests(result, point)) == 2


@pytest.mark.parametrize(
    ("kv_cache_tokens", "fitting"),
    [
        # 512 blocks are 40960 tokens of requests of 80, give or take one for vLLM's rounding; one is held back.
        (40959, 511),
        (40961, 511),
        (40962, 40962 // 80),
        (40958, 40958 // 80),
        (512 * 128, 511),  # or all their tokens, as some versions count
    ],
)
def test_blocks_count_where_they_explain_the_capacity_to_a_token(kv_cache_tokens: int, fitting: int) -> None:
    assert requests_in_kv_cache(*measured(4, {**BLOCKS, "kv_cache_tokens": kv_cache_tokens})) == fitting


def test_a_request_takes_whole_blocks_and_one_block_is_held_back() -> None:
    assert [requests_that_fit(blocks, 16, 16) for blocks in (0, 1, 2, 9)] == [0, 0, 1, 8]
    assert [requests_that_fit(9, 16, tokens) for tokens in (15, 17, 32, 33)] == [8, 4, 4, 2]


def test_the_capacity_is_how_many_of_the_longest_requests_fit() -> None:
    # A request of 24 takes 2 blocks of 16: 50 of them.
    assert capacity_in_tokens(100, 16, 24) == 50 * 24
    assert capacity_in_tokens(101, 16, 24) == int(50.5 * 24)


@pytest.mark.parametrize("missing", ["num_gpu_blocks", "block_size", "max_model_len"])
def test_without_all_its_numbers_a_pool_of_blocks_is_none(missing: str) -> None:
    assert requests_in_kv_cache(*measured(4, {**BLOCKS, missing: None})) == 40960 // 80


def test_requests_of_unlike_lengths_are_not_counted_by_their_length() -> None:
    result, point = measured(4, BLOCKS)
    assert requests_in_kv_cache(result, msgspec.structs.replace(point, seq_len=None, max_tokens=None)) is None


def test_of_a_point_without_an_engine_or_with_requests_that_differ_little_is_known() -> None:
    result, point = measured(4, {**BLOCKS, "max_num_seqs": 3})
    for name in ("seq_len", "max_tokens"):
        other = msgspec.structs.replace(point, **{name: None})
        assert (requests_in_kv_cache(result, other), running_requests(result, other)) == (None, 3)
    point.runs = []
    assert running_requests(result, point) == 3
    result.engine = None
    assert [find(result, point) for find in (request_slots, requests_in_kv_cache, running_requests)] == [None] * 3
    assert padded_batch_size(result, point, 4) is None
    assert waves(point, None) is None


@pytest.mark.parametrize("missing", ["num_gpu_blocks", "block_size", "max_model_len"])
def test_blocks_count_where_all_of_them_is_known(missing: str) -> None:
    assert requests_in_kv_cache(*measured(4, {**BLOCKS, missing: None})) == 40960 // 80
    assert requests_in_kv_cache(*measured(4, {**BLOCKS, missing: 0})) == 40960 // 80


def test_no_graph_is_padded_to_where_none_is_known_to_be_used() -> None:
    sizes = {"cudagraph_capture_sizes": [1, 2, 4], "max_num_seqs": 8}
    assert padded_of(*measured(3, {**sizes, "cudagraph_mode": None})) is None
    assert padded_of(*measured(4, {**sizes, "cudagraph_mode": "FULL"})) == 4
    assert padded_of(*measured(3, {"cudagraph_capture_sizes": [4], "cudagraph_mode": "FULL"})) is None
