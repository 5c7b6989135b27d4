"""vLLM's arithmetic of KV cache blocks, for the plan and the results. Needs only Python's own library.

vLLM holds one block back, and a request takes whole blocks (block_pool.py and kv_cache_utils.py in vllm/v1/core of 0.26
and 0.32).
"""

from __future__ import annotations

import math


def requests_that_fit(num_blocks: int, block_size: int, tokens: int) -> int:
    """How many whole requests of `tokens`, prompt and output, a cache of `num_blocks` holds at once."""
    return max(0, num_blocks - 1) // math.ceil(tokens / block_size)


def capacity_in_tokens(num_blocks: int, block_size: int, max_model_len: int) -> int:
    """What vLLM calls the size of the cache: how many of its longest requests fit, times their length."""
    return int(num_blocks / math.ceil(max_model_len / block_size) * max_model_len)
