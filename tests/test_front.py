"""The Pareto front of points with intervals, against the same rule written without any shortcut."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from batch_inference.analyze.front import Measured, is_on_front

# Latency, its half width, throughput, its half width.
Point = tuple[float, float, float, float]


def front(*points: Point) -> list[bool]:
    found: list[bool] = is_on_front(Measured(*np.array(points, dtype=float).reshape(-1, 4).T)).tolist()
    return found


def beats(one: Point, other: Point) -> bool:
    """Better in one of the two beyond both intervals, and in the other not worse beyond them."""
    faster, slower = one[0] + one[1] < other[0] - other[1], one[0] - one[1] > other[0] + other[1]
    higher, lower = one[2] - one[3] > other[2] + other[3], one[2] + one[3] < other[2] - other[3]
    return (faster and not lower) or (higher and not slower)


def by_the_rule(points: Sequence[Point]) -> list[bool]:
    known: dict[int, bool] = {}

    def is_on(number: int) -> bool:
        if number not in known:
            known[number] = not any(
                is_on(other) for other in range(len(points)) if beats(points[other], points[number])
            )
        return known[number]

    return [is_on(number) for number in range(len(points))]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], []),
        ([(1, 0, 1, 0)], [True]),
        # Each better in one of the two.
        ([(1, 0, 1, 0), (2, 0, 2, 0)], [True, True]),
        ([(1, 0, 2, 0), (2, 0, 1, 0)], [True, False]),
        # Faster by less than the intervals tell, at a quarter of the throughput.
        ([(34.000, 0.1, 25, 1), (34.002, 0.1, 100, 1)], [False, True]),
        # As high, as far as one can tell, and slower.
        ([(1, 0.1, 10.0, 0.5), (2, 0.1, 10.2, 0.5)], [True, False]),
        # Nothing tells these two apart; nor these, which are the same.
        ([(1, 0.1, 10, 1), (1.05, 0.1, 10.5, 1)], [True, True]),
        ([(1, 0, 10, 0), (1, 0, 10, 0)], [True, True]),
        # Intervals that touch tell nothing.
        ([(1, 0.5, 10, 0), (2, 0.5, 10, 0)], [True, True]),
        ([(1, 0.5, 10, 0), (2, 0.4, 10, 0)], [True, False]),
    ],
)
def test_a_point_is_on_the_front_unless_another_is_better_beyond_both_intervals(
    points: Sequence[Point], expected: list[bool]
) -> None:
    assert front(*points) == expected


def test_a_row_of_points_each_like_its_neighbour_keeps_its_fastest() -> None:
    """The second beats the first, and the third the second: but the third is slower than the first."""
    assert front((1.0, 0.1, 10, 1), (1.15, 0.1, 20, 1), (1.3, 0.1, 30, 1)) == [True, False, True]


def test_the_front_is_that_of_the_rule() -> None:
    draw = random.Random(7)
    for _ in range(200):
        points = [
            (draw.randint(1, 8), draw.choice((0, 0.5, 1)), draw.randint(1, 8), draw.choice((0, 0.5, 1)))
            for _ in range(draw.randint(1, 12))
        ]
        assert front(*points) == by_the_rule(points)
