from __future__ import annotations

import pytest

from batch_inference.core.prompts import make_prompts


def prompts(*seed_parts: object, **changes: object) -> list[list[int]]:
    options = {"num_prompts": 3, "seq_len": 50, "vocab_size": 1000, "avoid": {1, 2}, "seed_parts": seed_parts}
    return make_prompts(**{**options, **changes})  # type: ignore[arg-type]


def test_lengths_are_exact_and_ids_lie_in_the_vocabulary() -> None:
    made = prompts(0)
    assert [len(prompt) for prompt in made] == [50, 50, 50]
    assert all(0 <= token < 1000 for prompt in made for token in prompt)


def test_special_ids_never_occur() -> None:
    made = prompts(0, vocab_size=8, seq_len=500)
    assert {token for prompt in made for token in prompt} == {0, 3, 4, 5, 6, 7}


def test_equal_seeds_give_equal_prompts_and_known_ones() -> None:
    assert prompts(0, 512, "run", 1) == prompts(0, 512, "run", 1)
    # A literal, so that prompts cannot change between versions unnoticed.
    assert prompts(0, 512, "run", 1, num_prompts=1, seq_len=4) == [[939, 176, 907, 435]]


@pytest.mark.parametrize("other", [(1, 512, "run", 1), (0, 512, "run", 2), (0, 512, "warmup", 1), (0, 256, "run", 1)])
def test_each_seed_point_and_run_has_its_own_prompts(other: tuple[object, ...]) -> None:
    assert prompts(0, 512, "run", 1) != prompts(*other)


def test_no_two_prompts_of_a_run_share_a_prefix() -> None:
    made = prompts(0, num_prompts=20)
    assert len({tuple(prompt[:8]) for prompt in made}) == 20


def test_a_vocabulary_of_special_ids_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="no token id"):
        prompts(0, vocab_size=2, avoid={0, 1})
