"""Which replica runs which requests of a job, and in which order."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Sequence
from typing import Literal, assert_never

Order = Literal["given", "shuffled", "longest-first", "shortest-first"]


def shared_out(prompt_tokens: Sequence[int], output_tokens: Sequence[int], replicas: int) -> list[list[int]]:
    """Indices of each replica's requests, in rising order. Each request goes to the replica that has the fewest
    tokens so far (the first of several), so no two replicas differ by more than the longest request."""
    if replicas < 1:
        raise ValueError(f"{replicas} replicas")
    shares: list[list[int]] = [[] for _ in range(replicas)]
    fewest = [(0, replica) for replica in range(replicas)]
    for index, (prompt, output) in enumerate(zip(prompt_tokens, output_tokens, strict=True)):
        tokens, replica = fewest[0]
        shares[replica].append(index)
        heapq.heapreplace(fewest, (tokens + prompt + output, replica))
    return shares


def imbalance(tokens: Sequence[int]) -> float:
    """Of the replicas' tokens: 0.1 if the largest share is 10 % above the mean. The other replicas wait for it."""
    total = sum(tokens)
    return max(tokens) * len(tokens) / total - 1 if total else 0.0


def ordered(
    indices: Iterable[int], prompt_tokens: Sequence[int], output_tokens: Sequence[int], order: Order, seed: int
) -> list[int]:
    """The order in which these requests are run, whatever order they come in.

    given           as in the file
    shuffled        by `seed`
    longest-first   by output tokens, because a request lasts as long as its output; ties go by prompt tokens, and
                    then as in the file
    shortest-first  the reverse; requests that are equal in both still keep the order of the file
    """
    result = sorted(indices)

    def length(index: int) -> tuple[int, int]:
        return output_tokens[index], prompt_tokens[index]

    match order:
        case "given":
            pass
        case "shuffled":
            random.Random(f"order/{seed}").shuffle(result)
        case "longest-first":
            result.sort(key=length, reverse=True)
        case "shortest-first":
            result.sort(key=length)
        case _:
            assert_never(order)
    return result
