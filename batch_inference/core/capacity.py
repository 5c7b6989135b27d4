"""How many requests of a point run at once in one replica: vLLM splits a batch that does not fit into waves."""

from __future__ import annotations

import math

from batch_inference.core.kv_blocks import capacity_in_tokens, requests_that_fit
from batch_inference.core.results import EngineInfo, Point, Result


def running_requests(result: Result, point: Point) -> int | None:
    """The most requests that ran at once: as vLLM counted them, otherwise as its limits allow."""
    counted = [run.counters.peak_running for run in point.runs]
    known = [count for count in counted if count]
    if known and len(known) == len(counted):
        return min(known)
    limits = [limit for limit in (request_slots(result, point), requests_in_kv_cache(result, point)) if limit]
    return min(point.batch_size, *limits) if limits else None


def waves(point: Point, running: int | None) -> int | None:
    """`running`: from `running_requests`. None for a queue, where one request takes the place of another."""
    return None if running is None or point.workload else math.ceil(point.batch_size / running)


def request_slots(result: Result, point: Point) -> int | None:
    """The most requests that vLLM's scheduler runs at once."""
    engine = result.engine_of(point)
    return engine.max_num_seqs if engine else None


def requests_in_kv_cache(result: Result, point: Point) -> int | None:
    """Whole requests of this point, prompt and output, that the KV cache of one replica holds."""
    engine, tokens = result.engine_of(point), point.tokens_per_request
    if engine is None or tokens is None or not engine.kv_cache_tokens:
        return None
    blocks = _blocks_of_one_pool(engine, engine.kv_cache_tokens)
    fitting = requests_that_fit(*blocks, tokens) if blocks else engine.kv_cache_tokens // tokens
    # vLLM starts no engine whose cache is too small for one request.
    return max(1, fitting)


def _blocks_of_one_pool(engine: EngineInfo, kv_cache_tokens: int) -> tuple[int, int] | None:
    """Number and size of the blocks if every layer takes blocks from one pool. None for models that mix kinds of
    layers and for contexts spread over devices: there vLLM's capacity in tokens is not the one computed here."""
    blocks, block_size, longest = engine.num_gpu_blocks, engine.block_size, engine.max_model_len
    if not (blocks and block_size and longest):
        return None
    of_longest = capacity_in_tokens(blocks, block_size, longest)
    is_one_pool = abs(kv_cache_tokens - of_longest) <= 1 or kv_cache_tokens == blocks * block_size
    return (blocks, block_size) if is_one_pool else None


def padded_batch_size(result: Result, point: Point, running: int | None) -> int | None:
    """Requests in a decoding step once it is padded to a captured graph; None if no graph is used, and with
    pipeline stages, which divide the batch among them in a way that is not known here."""
    engine = result.engine_of(point)
    if engine is None or running is None or result.config.pipeline_parallel_size > 1:
        return None
    if engine.enforce_eager or engine.cudagraph_mode in (None, "NONE"):
        return None
    return min((size for size in engine.cudagraph_capture_sizes if size >= running), default=None)
