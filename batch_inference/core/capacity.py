"""How many requests of a point run at once in one replica: vLLM runs a batch that does not fit in waves, unasked."""

from __future__ import annotations

import math
from typing import Any

from batch_inference.core.kv_blocks import capacity_in_tokens, requests_that_fit
from batch_inference.core.results import Point, Result


def running_requests(result: Result, point: Point) -> int | None:
    """The most requests that ran at once: as vLLM counted them, or else as its limits allow."""
    counted = [run.counters.get("peak_running") for run in point.runs]
    known = [count for count in counted if count]
    if known and len(known) == len(counted):
        return min(known)
    limits = [limit for limit in (request_slots(result, point), requests_in_kv_cache(result, point)) if limit]
    return min(point.batch_size, *limits) if limits else None


def waves(result: Result, point: Point) -> int | None:
    running = running_requests(result, point)
    return None if running is None else math.ceil(point.batch_size / running)


def request_slots(result: Result, point: Point) -> int | None:
    """Requests that vLLM's scheduler runs at once at most."""
    slots: int | None = result.engine_of(point).get("max_num_seqs")
    return slots


def requests_in_kv_cache(result: Result, point: Point) -> int | None:
    """Whole requests of this point, prompt and output, that the KV cache of one replica holds."""
    engine = result.engine_of(point)
    tokens = point.seq_len + point.max_tokens
    if _is_one_pool_of_blocks(engine):
        fitting = requests_that_fit(engine["num_gpu_blocks"], engine["block_size"], tokens)
    elif engine.get("kv_cache_tokens"):
        fitting = engine["kv_cache_tokens"] // tokens
    else:
        return None
    # vLLM starts no engine whose cache is too small for one request.
    return max(1, int(fitting))


def _is_one_pool_of_blocks(engine: dict[str, Any]) -> bool:
    """True where every layer takes `block_size` tokens to a block of one pool. Models that mix kinds of layers, and
    contexts spread over devices, do otherwise; there vLLM's capacity in tokens is not the one computed here."""
    names = ("num_gpu_blocks", "block_size", "kv_cache_tokens", "max_model_len")
    blocks, block_size, tokens, longest = (engine.get(name) or 0 for name in names)
    if not (blocks and block_size and tokens and longest):
        return False
    of_longest = capacity_in_tokens(blocks, block_size, longest)
    return bool(abs(tokens - of_longest) <= 1 or tokens == blocks * block_size)


def padded_batch_size(result: Result, point: Point) -> int | None:
    """Requests in a decoding step when it is padded to a captured graph; None where no graph is used, and with
    pipeline stages, which divide the batch among them in a way that is not known here."""
    engine, running = result.engine_of(point), running_requests(result, point)
    without_graphs = engine.get("enforce_eager") or engine.get("cudagraph_mode") in (None, "NONE")
    if running is None or without_graphs or int(result.config["pipeline_parallel_size"]) > 1:
        return None
    sizes = engine.get("cudagraph_capture_sizes") or []
    return min((size for size in sizes if size >= running), default=None)
