"""Which replica runs which requests, and in which order."""

from __future__ import annotations

import random
from typing import Any

import pytest

from batch_inference.core.sharing import imbalance, ordered, shared_out

ORDERS: tuple[Any, ...] = ("given", "shuffled", "longest-first", "shortest-first")


def some_lengths(seed: int) -> tuple[list[int], list[int]]:
    """Of a few to many requests: narrow, wide, or with one giant."""
    draw = random.Random(seed)
    count, most = draw.choice([0, 1, 2, 7, 50, 400]), draw.choice([3, 100, 8000])
    prompts, outputs = ([draw.randint(1, most) for _ in range(count)] for _ in range(2))
    if count and seed % 3 == 0:
        outputs[draw.randrange(count)] = 100_000
    return prompts, outputs


@pytest.mark.parametrize("replicas", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("seed", range(12))
def test_every_request_is_run_once_and_no_replica_is_longer_by_more_than_a_request(seed: int, replicas: int) -> None:
    prompts, outputs = some_lengths(seed)
    tokens = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
    shares = shared_out(prompts, outputs, replicas)
    assert len(shares) == replicas
    assert sorted(index for share in shares for index in share) == list(range(len(prompts)))
    assert all(share == sorted(share) for share in shares)
    assert shares == shared_out(prompts, outputs, replicas)
    loads = [sum(tokens[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(tokens, default=0)
    mean = sum(loads) / replicas
    assert 0 <= imbalance(loads) * mean <= max(tokens, default=0) * (1 - 1 / replicas) + 1e-6


def test_the_next_request_goes_to_the_fewest_tokens_and_of_equals_to_the_first() -> None:
    # Tokens: 10, 10, 4, 3, 3, 1. All have 10 before the last.
    assert shared_out([9, 8, 3, 1, 2, 0], [1, 2, 1, 2, 1, 1], 3) == [[0, 5], [1], [2, 3, 4]]
    assert shared_out([5, 5, 5, 5], [1, 1, 1, 1], 2) == [[0, 2], [1, 3]]


def test_a_long_job_is_shared_out_evenly() -> None:
    draw = random.Random(5)
    prompts, outputs = ([1 + int(draw.lognormvariate(5, 1)) for _ in range(20_000)] for _ in range(2))
    shares = shared_out(prompts, outputs, 8)
    assert imbalance([sum(prompts[index] + outputs[index] for index in share) for share in shares]) < 0.005


@pytest.mark.parametrize(
    ("tokens", "expected"), [([5], 0), ([4, 4], 0), ([6, 2], 0.5), ([9, 0, 0], 2), ([0, 0], 0), ([], 0)]
)
def test_imbalance_is_how_far_the_largest_is_above_the_mean(tokens: list[int], expected: float) -> None:
    assert imbalance(tokens) == expected


def test_no_replica_and_columns_of_other_lengths_are_no_way_to_share() -> None:
    with pytest.raises(ValueError, match=r"^0 replicas$"):
        shared_out([1], [1], 0)
    with pytest.raises(ValueError, match="shorter"):
        shared_out([1, 2], [1], 1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(6))
def test_an_order_loses_none_and_does_not_depend_on_how_they_come(seed: int, order: Any) -> None:
    prompts, outputs = some_lengths(seed)
    some = list(range(0, len(prompts), 2))
    found = ordered(some, prompts, outputs, order, 3)
    assert sorted(found) == some
    assert found == ordered(reversed(some), prompts, outputs, order, 3)


def test_orders_go_by_output_then_prompt_then_place_in_the_file() -> None:
    prompts, outputs = [5, 9, 5, 5, 1], [2, 2, 2, 8, 2]
    found = {order: ordered([4, 0, 3, 2, 1], prompts, outputs, order, 0) for order in ORDERS}
    assert found["given"] == [0, 1, 2, 3, 4]
    assert found["longest-first"] == [3, 1, 0, 2, 4]
    assert found["shortest-first"] == [4, 0, 2, 1, 3]


def test_a_seed_says_how_they_are_shuffled() -> None:
    ones = [1] * 100
    first, again, other = (ordered(range(100), ones, ones, "shuffled", seed) for seed in (1, 1, 2))
    assert first == again
    assert first != list(range(100))
    assert first != other
