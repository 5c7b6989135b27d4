"""Bounds of a mean latency that hold however often one looks, for a choice made while runs are still coming in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from batch_inference.core.statistics import standard_error, t_quantile

# Runs are lopsided to the slow side: some few are much slower, none is much faster. The mean lies above what a few runs
# show more often than Student's t allows for, and the upper bound has this many times its distance.
_SLOW_SIDE = 1.4


def anytime_bounds(latencies_s: Sequence[float], candidates: int, error: float = 0.05) -> tuple[float, float]:
    """What the mean latency is not below and not above; (-inf, inf) for fewer than three runs. One may look after each
    run of so many `candidates`, and stop or go on for whatever reason: in a share of 1 - `error` of such searches all
    bounds of all candidates hold. Of a candidate's share of the error the first look has a half, the next a sixth, a
    twelfth, ..., together never more than all: early ones save most."""
    if candidates < 1 or not 0 < error < 1:
        raise ValueError(f"{candidates} candidates, an error of {error}: at least 1, and between 0 and 1")
    count = len(latencies_s)
    if count < 3:
        return -math.inf, math.inf
    share = error / candidates / ((count - 2) * (count - 1))
    center = fmean(latencies_s)
    distance = t_quantile(count - 1, share) * standard_error(latencies_s)
    return center - distance, center + _SLOW_SIDE * distance
