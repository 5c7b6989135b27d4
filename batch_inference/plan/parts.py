"""A model as vLLM divides it among devices, counted in parameters or bytes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal


class UnknownError(Exception):
    """What the formulas do not know. The message is the reason, without the word "unknown"."""


@dataclass(frozen=True)
class Parts:
    layers: int
    kv_heads: int
    head_dim: int
    # In each layer:
    split: float  # over the ranks of TP
    kv: float  # likewise, but no finer than a KV head
    experts: float  # over the ranks of TP, or expert by expert
    whole: float  # on each rank
    # Beside the layers:
    embedding: float
    head: float  # 0 if it is the embedding
    beside: float  # on each rank of each stage
    num_experts: int
    vocabulary_on: Literal["ends", "every stage", "unknown"]

    def stages(self, tp: int, pp: int, expert_ranks: int | None) -> list[float]:
        """What a device of each stage holds. `expert_ranks`: how many devices whole experts are divided
        among; None if each expert is split over TP. Raises UnknownError."""
        if pp > 1 and self.vocabulary_on == "unknown":
            raise UnknownError("which stages hold the embedding of this architecture differs between versions of vLLM")
        experts = self.experts / tp if expert_ranks is None else self.experts * self._share_of_experts(expert_ranks)
        layer = self.split / tp + self.kv * max(1 / tp, 1 / self.kv_heads) + experts + self.whole
        counts = layers_of_stages(self.layers, pp)
        return [
            count * layer + self._vocabulary(is_first=stage == 0, is_last=stage == pp - 1) / tp + self.beside
            for stage, count in enumerate(counts)
        ]

    def _share_of_experts(self, ranks: int) -> float:
        # The fullest device, if they do not divide evenly.
        return math.ceil(self.num_experts / ranks) / self.num_experts if self.num_experts else 0

    def _vocabulary(self, *, is_first: bool, is_last: bool) -> float:
        if self.vocabulary_on == "every stage" or (is_first and is_last):
            return self.embedding + self.head
        if is_last:
            return self.head or self.embedding
        return self.embedding if is_first else 0


def layers_of_stages(layers: int, pp: int) -> list[int]:
    """As vLLM does it: leftover layers go to the stages before the last, the rearmost first.

    Raises UnknownError."""
    if pp > 1 and os.environ.get("VLLM_PP_LAYER_PARTITION"):
        raise UnknownError("VLLM_PP_LAYER_PARTITION decides how layers are divided")
    if pp > layers:
        raise UnknownError(f"it has fewer layers than {pp} stages")
    even, left = divmod(layers, pp)
    return [even + (pp - 1 - left <= stage < pp - 1) for stage in range(pp)]
