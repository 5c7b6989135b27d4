"""Which points are on the Pareto front of latency and throughput, as far as their intervals can tell. numpy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Measured:
    """Two numbers of each point, and the half widths of their 95 % intervals; an unknown one is 0."""

    latency: Floats
    latency_half: Floats
    throughput: Floats
    throughput_half: Floats

    @property
    def fastest(self) -> Floats:
        return self.latency - self.latency_half

    @property
    def slowest(self) -> Floats:
        return self.latency + self.latency_half

    @property
    def least(self) -> Floats:
        return self.throughput - self.throughput_half

    @property
    def most(self) -> Floats:
        return self.throughput + self.throughput_half


def is_on_front(points: Measured) -> Bools:
    """A point is off where one that is on it is better in one of the two beyond both intervals, and in the other not
    worse beyond them.

    Only one that is on it: of a row of points, each like its neighbour, the last would else take away the first,
    which it is not like.
    """
    on = np.zeros(len(points.latency), dtype=bool)
    open_ = np.ones(len(points.latency), dtype=bool)
    while open_.any():
        # What nothing beats that may still be on it, is on it; what that beats is off.
        new = open_ & ~_beaten(points, open_ | on)
        if not new.any():
            on |= open_
            break
        on |= new
        open_ &= ~new & ~_beaten(points, on)
    return on


def _beaten(points: Measured, by: Bools) -> Bools:
    """The points that one of `by` beats."""
    higher: Bools = _highest_up_to(points.fastest[by], points.least[by], points.slowest) > points.most
    faster = _highest_up_to(-points.most[by], -points.slowest[by], -points.least) > -points.fastest
    beaten: Bools = np.logical_or(higher, faster)
    return beaten


def _highest_up_to(keys: Floats, values: Floats, limits: Floats) -> Floats:
    """For each limit the highest value whose key is not above it; minus infinity where there is none."""
    order = np.argsort(keys, kind="stable")
    highest = np.concatenate([[-np.inf], np.maximum.accumulate(values[order])])
    found: Floats = highest[np.searchsorted(keys[order], limits, side="right")]
    return found
