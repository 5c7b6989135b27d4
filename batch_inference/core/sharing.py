"""In which order the requests of a workload are queued, and which replica gets which."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence


def ordered(
    requests: Sequence[int], prompt_tokens: Sequence[int], output_tokens: Sequence[int], order: str, seed: int
) -> list[int]:
    """The `requests`, numbers in the file, as they stand in the queue. Lengths are those of all of the file; the output
    decides, because it is what takes time, and of equals the prompt."""
    queue = sorted(requests)
    if order == "shuffled":
        random.Random(f"order/{seed}").shuffle(queue)
    elif order != "given":
        queue.sort(
            key=lambda request: (output_tokens[request], prompt_tokens[request]), reverse=order == "longest-first"
        )
    return queue


def shared_out(prompt_tokens: Sequence[int], output_tokens: Sequence[int], replicas: int) -> list[list[int]]:
    """Places in the queue of the requests of each replica: the next one goes to the replica with the fewest tokens so
    far. Lengths are in the order of the queue."""
    shares: list[list[int]] = [[] for _ in range(replicas)]
    tokens = [(0, replica) for replica in range(replicas)]
    for place, (prompt, output) in enumerate(zip(prompt_tokens, output_tokens, strict=True)):
        so_far, replica = tokens[0]
        shares[replica].append(place)
        heapq.heapreplace(tokens, (so_far + prompt + output, replica))
    return shares
