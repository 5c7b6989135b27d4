"""The lengths of a job's requests in a few numbers, and how well a sample represents the whole."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate
from typing import Annotated

from msgspec import Meta, Struct

PERCENTS = (5, 25, 50, 75, 95, 99)

_Length = Annotated[int, Meta(ge=1, le=2**31)]
_Tokens = Annotated[float, Meta(ge=0, le=2**31)]
_Difference = Annotated[float, Meta(ge=-(2**31), le=2**31)]
_PerPercent = Meta(min_length=len(PERCENTS), max_length=len(PERCENTS))


class Lengths(Struct):
    """Of prompts or of outputs, in tokens."""

    requests: Annotated[int, Meta(ge=1, le=2**62)]
    mean: _Tokens
    deviation: _Tokens  # standard deviation: how much they differ
    percentiles: Annotated[list[_Length], _PerPercent]
    longest: _Length


class Difference(Struct):
    """A sample's lengths minus the job's; all 0 if the sample is the whole job."""

    relative_mean: _Difference  # 0.02 if the sample's mean is 2 % above the job's
    # In standard deviations of the job's lengths; as fractions of their mean if they are all equal.
    mean: _Difference
    percentiles: Annotated[list[_Difference], _PerPercent]
    # Kolmogorov-Smirnov: the share of requests up to any length differs by no more than this.
    distance: Annotated[float, Meta(ge=0, le=1)]


class Likeness(Struct):
    """How well a sample represents the job."""

    prompt_tokens: Difference
    output_tokens: Difference

    @property
    def relative_mean(self) -> float:
        """In one number: 0.02 if one of the mean lengths is 2 % off and the other no more."""
        return max(abs(self.prompt_tokens.relative_mean), abs(self.output_tokens.relative_mean))

    @property
    def distance(self) -> float:
        return max(self.prompt_tokens.distance, self.output_tokens.distance)


class Distribution:
    """How often each length occurs: far fewer numbers than a job of millions has requests."""

    def __init__(self, tokens: Iterable[int]) -> None:
        counts = Counter(tokens)
        if not counts:
            raise ValueError("there are no lengths")
        self._values = sorted(counts)
        self._up_to = list(accumulate(counts[value] for value in self._values))  # requests
        self.requests = self._up_to[-1]
        self.mean = sum(value * count for value, count in counts.items()) / self.requests
        squares = math.fsum(count * (value - self.mean) ** 2 for value, count in counts.items())
        self.deviation = math.sqrt(squares / self.requests)

    def percentile(self, percent: int) -> int:
        """The shortest length that `percent` percent of the requests do not exceed."""
        rank = -(-percent * self.requests // 100)
        return self._values[bisect_left(self._up_to, rank)]

    def summary(self) -> Lengths:
        percentiles = [self.percentile(percent) for percent in PERCENTS]
        return Lengths(self.requests, self.mean, self.deviation, percentiles, self._values[-1])

    def difference_from(self, job: Distribution) -> Difference:
        mean = self.mean - job.mean
        unit = job.deviation or job.mean
        percentiles = [(self.percentile(percent) - job.percentile(percent)) / unit for percent in PERCENTS]
        return Difference(mean / job.mean, mean / unit, percentiles, self._distance(job))

    def _distance(self, other: Distribution) -> float:
        """Between two of our lengths our share is constant and theirs rises: the largest gap is at one of the two."""
        return max(
            abs(self._share(bisect(self._values, value)) - other._share(bisect(other._values, value)))
            for value in self._values
            for bisect in (bisect_left, bisect_right)
        )

    def _share(self, lengths: int) -> float:
        """Share of the requests that have one of the `lengths` shortest lengths."""
        return self._up_to[lengths - 1] / self.requests if lengths else 0.0


def likeness(
    sample_prompts: Iterable[int], sample_outputs: Iterable[int], prompts: Distribution, outputs: Distribution
) -> Likeness:
    """`prompts`, `outputs`: of the whole job, so that several samples can be compared with them."""
    return Likeness(
        Distribution(sample_prompts).difference_from(prompts), Distribution(sample_outputs).difference_from(outputs)
    )
