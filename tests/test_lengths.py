"""Lengths in a few numbers, and how well a sample stands for the job."""

from __future__ import annotations

import random
from array import array
from itertools import islice

import msgspec
import numpy as np
import pytest

from batch_inference.core.lengths import PERCENTS, Difference, Distribution, Lengths, Likeness, likeness
from batch_inference.core.sample import representative_order


def lognormal(count: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [1 + int(draw.lognormvariate(4.3, 1.0)) for _ in range(count)]


JOBS = {
    "one": [7],
    "equal": [128] * 50,
    "two humps": [30] * 70 + [4000] * 30,
    "one giant": [*range(1, 200), 100_000],
    "lognormal": lognormal(1234, 1),
}


@pytest.mark.parametrize("tokens", JOBS.values(), ids=JOBS)
def test_a_summary_is_what_numpy_finds(tokens: list[int]) -> None:
    found = Distribution(array("I", tokens)).summary()
    assert (found.requests, found.longest) == (len(tokens), max(tokens))
    assert found.mean == pytest.approx(np.mean(tokens), rel=1e-12)
    assert found.deviation == pytest.approx(np.std(tokens), rel=1e-9)
    assert found.percentiles == np.percentile(tokens, PERCENTS, method="inverted_cdf").tolist()


def test_order_does_not_matter() -> None:
    tokens = lognormal(500, 2)
    assert Distribution(tokens).summary() == Distribution(sorted(tokens)).summary()


@pytest.mark.parametrize("tokens", JOBS.values(), ids=JOBS)
def test_the_whole_job_stands_for_itself(tokens: list[int]) -> None:
    found = Distribution(reversed(tokens)).difference_from(Distribution(tokens))
    assert found == Difference(0.0, 0.0, [0.0] * len(PERCENTS), 0.0)


def test_differences_are_signed_and_in_deviations_of_the_job() -> None:
    job = Distribution([80, 120])  # mean 100, deviation 20
    found = Distribution([120, 120, 120, 140]).difference_from(job)
    assert found == Difference(0.25, 1.25, [2.0, 2.0, 2.0, 0.0, 1.0, 1.0], 0.5)
    assert Distribution([90]).difference_from(job).relative_mean == pytest.approx(-0.1)


def test_differences_from_a_job_of_equal_lengths_are_parts_of_its_mean() -> None:
    found = Distribution([150]).difference_from(Distribution([100, 100]))
    assert found == Difference(0.5, 0.5, [0.5] * len(PERCENTS), 1.0)


@pytest.mark.parametrize("seed", range(20))
def test_the_distance_is_the_farthest_of_all_lengths(seed: int) -> None:
    """Ours against the definition, tried at every length; either may have lengths that the other does not have."""
    draw = random.Random(seed)
    ours, theirs = ([draw.randint(1, 30) for _ in range(draw.randint(1, 20))] for _ in range(2))

    def share(tokens: list[int], length: int) -> float:
        return sum(one <= length for one in tokens) / len(tokens)

    expected = max(abs(share(ours, length) - share(theirs, length)) for length in range(32))
    assert Distribution(ours).difference_from(Distribution(theirs)).distance == pytest.approx(expected, abs=1e-12)
    assert Distribution(theirs).difference_from(Distribution(ours)).distance == pytest.approx(expected, abs=1e-12)


def test_the_one_number_is_that_of_the_worse_column() -> None:
    prompts, outputs = Distribution([100, 200]), Distribution([10, 30])
    found = likeness([100, 200], [10, 10, 30], prompts, outputs)
    assert found.relative_mean == pytest.approx(1 / 6)
    assert found.distance == pytest.approx(1 / 6)
    assert likeness([90, 180], [10, 30], prompts, outputs).relative_mean == pytest.approx(0.1)


def test_no_requests_have_no_lengths() -> None:
    with pytest.raises(ValueError, match=r"^there are no lengths$"):
        Distribution([])


# Of few requests the long ones are a matter of chance in either.
@pytest.mark.parametrize(("size", "shares"), [(32, (0.75, 0.95, 0.95)), (200, (0.6, 0.7, 0.85))])
def test_a_beginning_of_the_representative_order_stands_better_than_a_random_sample(
    size: int, shares: tuple[float, ...]
) -> None:
    """Over many seeds: in the distance, in the mean and in the percentiles, of both lengths. `shares`: of the errors
    that chance makes."""
    outputs = lognormal(2000, 3)
    prompts = [1 + output // 2 + other for output, other in zip(outputs, lognormal(2000, 4), strict=True)]
    job = Distribution(prompts), Distribution(outputs)

    def errors(samples: list[list[int]]) -> list[float]:
        """Mean distance, mean error of means, mean error of percentiles."""
        found = [
            likeness([prompts[index] for index in sample], [outputs[index] for index in sample], *job)
            for sample in samples
        ]
        columns = [column for one in found for column in (one.prompt_tokens, one.output_tokens)]
        percentiles = [abs(value) for column in columns for value in column.percentiles]
        return [
            float(np.mean([one.distance for one in found])),
            float(np.mean([one.relative_mean for one in found])),
            float(np.mean(percentiles)),
        ]

    ours = errors([list(islice(representative_order(prompts, outputs, seed), size)) for seed in range(40)])
    chance = errors([random.Random(seed).sample(range(2000), size) for seed in range(40)])
    assert all(one < share * other for one, other, share in zip(ours, chance, shares, strict=True)), (ours, chance)


@pytest.mark.parametrize("tokens", JOBS.values(), ids=JOBS)
def test_a_result_file_can_hold_both(tokens: list[int]) -> None:
    """Of any job and any sample, one request of the shortest included."""
    job = Distribution(tokens)
    summary, found = job.summary(), likeness([1], tokens, job, job)
    assert msgspec.json.decode(msgspec.json.encode(summary), type=Lengths) == summary
    assert msgspec.json.decode(msgspec.json.encode(found), type=Likeness) == found
