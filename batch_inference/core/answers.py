"""Whether settings give the same answers: `--compare-answers`.

Each engine answers the same prompts greedily. No token of an answer is kept, only a digest of each of its
beginnings: of the first token, of the first two, and so on. Two answers agree up to where their digests differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from batch_inference.core.results import Answers

# Few, because every engine is asked; enough to tell a few percent that differ from none.
REQUESTS = 32
OUTPUT_TOKENS = 32
PROMPT_TOKENS = 64
# Hexadecimal digits per beginning: one difference in 65,536 goes unseen, and the next beginning shows it.
_DIGITS = 4
# Rounding changes an answer where two tokens are about equally likely, even the first. If most change that early,
# it is a different model.
_WRONG_UP_TO = 2


def beginnings(tokens: Sequence[int]) -> str:
    """A digest of each beginning of an answer, one after the other."""
    hashed, digests = hashlib.sha256(), []
    for token in tokens:
        hashed.update(token.to_bytes(8, "little"))
        digests.append(hashed.hexdigest()[:_DIGITS])
    return "".join(digests)


def first_difference(one: str, other: str) -> int | None:
    """The number, from 1, of the first token that differs; None if none does. Takes answers as `beginnings`."""
    pairs = zip(_parts(one), _parts(other), strict=True)
    return next((number for number, (mine, yours) in enumerate(pairs, 1) if mine != yours), None)


def _parts(digests: str) -> Iterator[str]:
    return (digests[place : place + _DIGITS] for place in range(0, len(digests), _DIGITS))


@dataclass(frozen=True)
class Differences:
    """How some answers differ from others to the same prompts."""

    requests: int
    firsts: Sequence[int]  # the first differing token of each answer that differs

    @property
    def count(self) -> int:
        return len(self.firsts)

    @property
    def is_another_model(self) -> bool:
        """Whether most answers differ from one of their first tokens on."""
        return 2 * self.count > self.requests and median(self.firsts) <= _WRONG_UP_TO


def differences(ones: Sequence[str], others: Sequence[str]) -> Differences:
    firsts = [first_difference(one, other) for one, other in zip(ones, others, strict=True)]
    return Differences(len(firsts), [first for first in firsts if first is not None])


def of_itself(answers: Answers) -> Differences:
    """Of the same engine, asked again in two halves: a batch of another size rounds differently."""
    return differences(answers.first, answers.again)


def between_replicas(answers: Answers) -> list[Differences]:
    """How each other replica differs from the first."""
    return [differences(answers.first, other) for other in answers.other_replicas]


def lengths_for(longest: int) -> tuple[int, int]:
    """Tokens of a prompt and of an answer, for an engine that takes requests of `longest` tokens."""
    output_tokens = min(OUTPUT_TOKENS, longest // 2)
    return min(PROMPT_TOKENS, longest - output_tokens), output_tokens


def is_asked(answers: Answers | None, seed: int, longest: int) -> bool:
    """Whether such an engine has already been asked."""
    return answers is not None and question_of(answers) == (seed, *lengths_for(longest), REQUESTS)


def question_of(answers: Answers) -> tuple[int, int, int, int]:
    """What was asked; only answers to the same question are compared."""
    return answers.seed, answers.prompt_tokens, answers.output_tokens, len(answers.first)
