"""Which requests of a job are run: an order in which every beginning stands for the whole.

One order for all points: each takes the beginning that it needs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

# The R2 sequence: steps that spread points over a square evenly, however many are taken (M. Roberts, 2018). The
# number is the root of x^3 = x + 1.
_ROOT = 1.324717957244746
_STEPS = (1 / _ROOT, 1 / _ROOT**2)


def representative_order(prompt_tokens: Sequence[int], output_tokens: Sequence[int], seed: int) -> Iterator[int]:
    """Indices of all requests, each once.

    They lie on a square: by output length in columns, and within a column by prompt length. Places are taken by a
    sequence that is spread evenly at any moment, from where `seed` draws. Any request is as likely as any other to be
    among the first n, as long as these are few of all.
    """
    count = len(prompt_tokens)
    if len(output_tokens) != count:
        raise ValueError(f"{count} prompt lengths, {len(output_tokens)} output lengths")
    draw = random.Random(f"sample/{seed}")
    columns = _columns(prompt_tokens, output_tokens, draw)
    column_of = [number for number, column in enumerate(columns) for _ in column]
    across, along = draw.random(), draw.random()
    left = set(range(count))
    # Towards the end most places that are met are taken.
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
    """As many as each is long, about. Equals stand in random order."""
    indices = list(range(len(prompt_tokens)))
    draw.shuffle(indices)
    indices.sort(key=output_tokens.__getitem__)
    wide = max(1, math.isqrt(len(indices)))
    columns = [indices[start : start + wide] for start in range(0, len(indices), wide)]
    for column in columns:
        column.sort(key=prompt_tokens.__getitem__)
    return columns
