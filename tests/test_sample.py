"""An order of requests in which every beginning stands for the whole."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice

import pytest

from batch_inference.core.sample import representative_order


def lengths(count: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Lognormal, as chats are; prompts and outputs go together a little."""
    draw = random.Random(seed)
    outputs = [1 + int(draw.lognormvariate(4.3, 1.0)) for _ in range(count)]
    return [1 + int(output * 0.5 + draw.lognormvariate(5.5, 1.0)) for output in outputs], outputs


@pytest.mark.parametrize("count", [0, 1, 2, 3, 16, 17, 100, 1023, 1024, 1025])
def test_every_request_comes_once(count: int) -> None:
    prompts, outputs = lengths(count)
    assert sorted(representative_order(prompts, outputs, 7)) == list(range(count))


def test_a_seed_says_which_and_another_says_others() -> None:
    prompts, outputs = lengths(500)
    first, again, other = (list(representative_order(prompts, outputs, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first[:50] != other[:50]


@pytest.mark.parametrize(("size", "share"), [(10, 1.3), (100, 0.75), (400, 0.6)])
def test_a_beginning_is_closer_to_the_whole_than_a_random_sample(size: int, share: float) -> None:
    """In the mean of both lengths, over many seeds; `share`: of the error that chance makes."""
    prompts, outputs = lengths(2000)
    for values in (prompts, outputs):
        mean = sum(values) / len(values)

        def error(sample: list[int], values: list[int] = values, mean: float = mean) -> float:
            return (sum(values[index] for index in sample) / len(sample) / mean - 1) ** 2

        ours = [error(list(islice(representative_order(prompts, outputs, seed), size))) for seed in range(60)]
        chance = [error(random.Random(seed).sample(range(2000), size)) for seed in range(600)]
        assert (sum(ours) / len(ours)) ** 0.5 < share * (sum(chance) / len(chance)) ** 0.5


def test_any_request_is_as_likely_as_any_other() -> None:
    prompts, outputs = [5, 5, 1, 90, 17, 3, 3], [1, 2, 2, 50, 7, 9, 9]
    tries = 4000
    seen = Counter(index for seed in range(tries) for index in islice(representative_order(prompts, outputs, seed), 3))
    expected = 3 * tries / 7
    assert all(abs(seen[index] - expected) < 5 * (expected * 4 / 7) ** 0.5 for index in range(7)), seen


def test_lists_of_other_lengths_are_no_job() -> None:
    with pytest.raises(ValueError, match=r"^2 prompt lengths, 1 output lengths$"):
        list(representative_order([1, 2], [1], 0))
