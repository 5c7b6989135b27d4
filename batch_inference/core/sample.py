"""Which requests of a job are run: an order in which every beginning represents the whole.

All points share one order, and each takes as much of its beginning as it needs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

# The R2 sequence: steps that spread points evenly over a square, however many are taken (M. Roberts, 2018). The
# number is the root of x^3 = x + 1.
_ROOT = 1.324717957244746
_STEPS = (1 / _ROOT, 1 / _ROOT**2)


def representative_order(prompt_tokens: Sequence[int], output_tokens: Sequence[int], seed: int) -> Iterator[int]:
    """Indices of all requests, each once.

    Requests lie on a square: in columns by output length, and within a column by prompt length. Places are taken by a
    sequence that is evenly spread at every moment, from a start drawn by `seed`. All requests are equally likely to be
    among the first n, as long as n is a small part of all.
    """
    count = len(prompt_tokens)
    if len(output_tokens) != count:
        raise ValueError(f"{count} prompt lengths, {len(output_tokens)} output lengths")
    draw = random.Random(f"sample/{seed}")
    columns = _columns(prompt_tokens, output_tokens, draw)
    column_of = [number for number, column in enumerate(columns) for _ in column]
    across, along = draw.random(), draw.random()
    left = set(range(count))
    # Towards the end most places it meets are already taken.
    for _ in range(4 * count):
        across, along = (across + _STEPS[0]) % 1, (along + _STEPS[1]) % 1
        column = columns[column_of[int(across * count)]]
        index = column[int(along * len(column))]
        if index in left:
            left.remove(index)
            yield index
    rest = sorted(left)
    draw.shuffle(rest)
    yield from rest


def _columns(prompt_tokens: Sequence[int], output_tokens: Sequence[int], draw: random.Random) -> list[list[int]]:
    """About as many columns as each is long. Equal requests are in random order."""
    indices = list(range(len(prompt_tokens)))
    draw.shuffle(indices)
    indices.sort(key=output_tokens.__getitem__)
    wide = max(1, math.isqrt(len(indices)))
    columns = [indices[start : start + wide] for start in range(0, len(indices), wide)]
    for column in columns:
        column.sort(key=prompt_tokens.__getitem__)
    return columns
