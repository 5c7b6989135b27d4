"""Texts of known length in tokens, and a ShareGPT file of them for `vllm bench throughput`."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

Lengths = tuple[int, int]  # prompt and output tokens of a request
Encode = Callable[[str], list[int]]
# What vLLM's data set silently leaves out (is_valid_sequence in vllm/benchmarks/datasets).
_FEWEST, _LONGEST_PROMPT, _LONGEST = 4, 1024, 2048
_FEWEST_WORDS = 100


def is_kept(lengths: Lengths) -> bool:
    """Whether vLLM's data set keeps such a request."""
    prompt, output = lengths
    return min(lengths) >= _FEWEST and prompt <= _LONGEST_PROMPT and prompt + output <= _LONGEST


class KnownTexts:
    """Random words that are one token each, whatever comes before them."""

    def __init__(self, tokenizer: Any, vocab_size: int, seed: int) -> None:
        """`vocab_size`: of the model, which may be smaller than the tokenizer's. Raises ValueError if there are not
        enough words."""
        self._encode: Encode = lambda text: list(tokenizer(text).input_ids)
        self._draw = random.Random(seed)
        found = [word for word in map(tokenizer.decode, ([number] for number in range(vocab_size))) if _is_word(word)]
        openers = {word: ids for word in found if max(ids := self._encode(word)) < vocab_size}
        # Includes what the tokenizer puts before each text.
        self._overhead = min(map(len, openers.values()), default=0)
        self._openers = sorted(word for word, ids in openers.items() if len(ids) == self._overhead)
        self._words = sorted(word for word in set(map(str.strip, found)) if self._is_one_token(word, vocab_size))
        if len(self._words) < _FEWEST_WORDS:
            raise ValueError(f"the tokenizer has only {len(self._words)} words of one token")

    def _is_one_token(self, word: str, vocab_size: int) -> bool:
        """Whether it is one token after another word."""
        ids = self._encode(f"{self._openers[0]} {word}")
        return len(ids) == self._overhead + 1 and ids[-1] < vocab_size

    def text(self, tokens: int) -> str:
        """Raises ValueError if its length is not as asked."""
        words = [self._draw.choice(self._openers)]
        words += self._draw.choices(self._words, k=max(0, tokens - self._overhead))
        text = " ".join(words)
        ids = self._encode(text)
        if len(ids) != tokens:
            raise ValueError(f"a text of {tokens} tokens has {len(ids)}")
        return text

    def seconds(self, texts: Sequence[str]) -> float:
        """How long it takes to turn them into token ids."""
        started_s = time.perf_counter()
        for text in texts:
            self._encode(text)
        return time.perf_counter() - started_s


def _is_word(word: str) -> bool:
    return word.isascii() and word.strip(" ").isalpha() and word.islower()


def sharegpt(pairs: Sequence[tuple[str, str]], seed: int) -> list[dict[str, Any]]:
    """The entries of a file whose requests vLLM runs in the order of `pairs`, although it shuffles them by its seed."""
    places = list(range(len(pairs)))
    random.Random(seed).shuffle(places)
    entries: list[dict[str, Any]] = [{}] * len(pairs)
    for place, (prompt, output) in zip(places, pairs, strict=True):
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": output}]
        entries[place] = {"id": str(place), "conversations": turns}
    return entries
