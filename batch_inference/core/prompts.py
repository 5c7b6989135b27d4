"""Seeded prompts of token ids with exact lengths: no tokenizer, no text, nothing that two runs share."""

from __future__ import annotations

import random
from collections.abc import Collection


def make_prompts(
    *, num_prompts: int, seq_len: int, vocab_size: int, avoid: Collection[int], seed_parts: tuple[object, ...]
) -> list[list[int]]:
    """`num_prompts` lists of `seq_len` token ids in [0, vocab_size), without the ids in `avoid`.

    `seed_parts` (seed, point, run, replica ...) select the random stream: equal parts give equal prompts on every
    machine and for every setting, different parts give independent ones.
    """
    # Seeding with text hashes it with SHA-512: stable between processes, unlike hash().
    stream = random.Random("/".join(map(str, seed_parts)))
    allowed = [token for token in range(vocab_size) if token not in avoid]
    if not allowed:
        raise ValueError(f"no token id is left of a vocabulary of {vocab_size}")
    return [stream.choices(allowed, k=seq_len) for _ in range(num_prompts)]
