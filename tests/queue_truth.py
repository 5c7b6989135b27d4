"""Queues whose truth is known: an engine that is nothing but costs of steps and noise, and mixes of lengths."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from batch_inference.core.queue_runs import Floats, Integers, QueueRun
from batch_inference.core.queue_simulation import WORK, simulate_work

Mix = Callable[[int, np.random.Generator], tuple[Integers, Integers]]

# Seconds for a step, a prompt token, a token made, a token looked back on, a step that reads: about an H100's, 8B.
COSTS = np.array([6.8e-3, 22e-6, 42e-6, 5e-9, 0.0])
# Of the seconds of a step: together with those near to it, alone, and of all of a run.
SLOW_NOISE, FAST_NOISE, RUN_NOISE = 0.03, 0.03, 0.01
_MEMORY = 0.95


def narrow(count: int, draw: np.random.Generator) -> tuple[Integers, Integers]:
    return draw.integers(90, 111, count), draw.integers(45, 56, count)


def lognormal(count: int, draw: np.random.Generator) -> tuple[Integers, Integers]:
    prompts, outputs = np.exp(draw.normal(5, 1, count)), np.exp(draw.normal(4, 0.8, count))
    return prompts.clip(5, 3000).astype(np.int64), outputs.clip(2, 500).astype(np.int64)


def two_humps(count: int, draw: np.random.Generator) -> tuple[Integers, Integers]:
    def humps(few: tuple[int, int], many: tuple[int, int]) -> Integers:
        return np.where(draw.random(count) < 0.3, draw.integers(*few, count), draw.integers(*many, count))

    return humps((800, 1200), (30, 60)), humps((150, 250), (10, 30))


def one_giant(count: int, draw: np.random.Generator) -> tuple[Integers, Integers]:
    """Of a lognormal mix; towards the end, where it makes the drain."""
    prompts, outputs = lognormal(count, draw)
    place = draw.integers(count * 3 // 4, count)
    prompts[place], outputs[place] = 3000, 2000
    return prompts, outputs


MIXES: dict[str, Mix] = {"narrow": narrow, "lognormal": lognormal, "two humps": two_humps, "one giant": one_giant}


def queue_run(
    lengths: tuple[Integers, Integers],
    batch_size: int,
    draw: np.random.Generator | None = None,
    budget: int | None = 2048,
    costs: Floats = COSTS,
) -> QueueRun:
    """One replica's run of these prompt and output lengths, in this order; without `draw` without noise."""
    queue = simulate_work(*lengths, batch_size, budget)
    steps_s = queue.work @ costs[:WORK]
    if draw is not None:
        steps_s = steps_s * np.exp(noise(len(steps_s), draw))
    ends_s = np.cumsum(steps_s)
    starts_s = ends_s - steps_s
    return QueueRun(*lengths, starts_s[queue.scheduled], ends_s[queue.first], ends_s[queue.last], batch_size, budget)


def noise(count: int, draw: np.random.Generator) -> Floats:
    """Logarithms: neighbours err together, and a whole run does."""
    slow, now = np.empty(count), draw.normal()
    for step, change in enumerate(draw.normal(size=count) * (1 - _MEMORY**2) ** 0.5):
        now = _MEMORY * now + change
        slow[step] = now
    return SLOW_NOISE * slow + FAST_NOISE * draw.normal(size=count) + RUN_NOISE * draw.normal()
