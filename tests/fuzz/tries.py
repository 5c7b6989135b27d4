"""Which tries are made: FUZZ_TRIES of them, numbered from FUZZ_FIRST on. The number alone decides what a try does."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator

IN_CI = 15
FIRST, COUNT = int(os.environ.get("FUZZ_FIRST", "0")), int(os.environ.get("FUZZ_TRIES", IN_CI))
NUMBERS = range(FIRST, FIRST + COUNT)


@contextlib.contextmanager
def told(number: int, about: object) -> Iterator[None]:
    """A failure in the block says what was tried, and how to try it again."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"tried: {about!a}\nagain: FUZZ_FIRST={number} FUZZ_TRIES=1 python -m pytest -n 0 tests/fuzz")
        raise


def chance(rng: random.Random, share: float) -> bool:
    return rng.random() < share
