"""How long the requests of a job are, in a few numbers; and how well a sample stands for it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from msgspec import Struct

from batch_inference.core.statistics import percentile_of_sorted

QUANTILES = (5, 25, 50, 75, 95, 99)


class Column(Struct):
    """Of one length over all requests, in tokens."""

    mean: float
    quantiles: dict[str, float]  # "5" is the length that 5 % of the requests stay below
    longest: int


class Lengths(Struct):
    requests: int
    prompt_tokens: Column
    output_tokens: Column | None  # None where the model itself ends


def lengths_of(prompt_tokens: Sequence[int], output_tokens: Sequence[int] | None) -> Lengths:
    return Lengths(
        len(prompt_tokens), _column(prompt_tokens), _column(output_tokens) if output_tokens is not None else None
    )


def _column(tokens: Sequence[int]) -> Column:
    ordered = sorted(tokens)
    quantiles = {str(percent): percentile_of_sorted(ordered, percent) or 0.0 for percent in QUANTILES}
    return Column(sum(tokens) / len(tokens), quantiles, ordered[-1])


def distance(sample: Sequence[int], job: Sequence[int]) -> float:
    """Of Kolmogorov and Smirnov: the largest difference, over all lengths, of the share of requests that are no longer;
    0 where the two are alike, 1 where no length is in both."""
    counts = [0, 0]
    sizes = [len(sample), len(job)]
    largest = 0.0
    both = sorted(itertools.chain(((tokens, 0) for tokens in sample), ((tokens, 1) for tokens in job)))
    for _, equal in itertools.groupby(both, key=lambda one: one[0]):
        for _, which in equal:
            counts[which] += 1
        largest = max(largest, abs(counts[0] / sizes[0] - counts[1] / sizes[1]))
    return largest
