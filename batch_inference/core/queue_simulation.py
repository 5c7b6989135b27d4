"""Simulates a queue of requests: which steps an engine takes, whatever they cost.

All requests wait from the start, and a free place is filled at once, so the steps follow from the lengths
alone. One simulation gives the seconds for any cost of steps (step_costs.py).

The work in a stretch of time is five numbers: steps, prompt tokens read, tokens made (one for each request that decodes
in a step), context tokens that these attend to, and steps in which prompts are read.

Needs numpy.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass

import numpy as np

from batch_inference.core.queue_runs import Floats, Integers

# Columns of a work array, shape (..., 5).
STEPS, PROMPT, DECODE, CONTEXT, READING = range(5)
WORK = 5
# A step is planned while the one before it runs, so a freed place stays empty for one step. Real runs show 0 or 1.
USUAL_LAG = 1


@dataclass(frozen=True, slots=True)
class SimulatedWork:
    """Blocks of one or more equal steps: their work, shape (blocks, 5), and each request's blocks, shape (requests,).

    A request is scheduled at the start of its block, and makes its first and last token at the end of theirs.
    """

    work: Floats
    scheduled: Integers
    first: Integers
    last: Integers

    @property
    def drain_block(self) -> int:
        """The block from whose start no request waits."""
        return int(self.scheduled.max())


def simulate_work(
    prompt_tokens: Integers,
    output_tokens: Integers,
    batch_size: int,
    max_num_batched_tokens: int | None,
    lag_steps: int = USUAL_LAG,
) -> SimulatedWork:
    """A scheduler with continuous batching: in each step every decoding request first makes a token, then prompts are
    read within the token budget (those already begun first), and then waiting requests come in, first in, first out.

    Steps in a row in which no request comes or goes form one block, so the time taken depends on requests, not tokens.
    """
    return _Scheduler(
        prompt_tokens.tolist(), output_tokens.tolist(), batch_size, max_num_batched_tokens, lag_steps
    ).run()


class _Scheduler:
    def __init__(
        self, prompts: list[int], outputs: list[int], batch_size: int, budget: int | None, lag_steps: int
    ) -> None:
        self.prompts, self.outputs = prompts, outputs
        self.budget = budget or sum(prompts) + batch_size
        self.lag = lag_steps
        self.free = batch_size
        self.freed: deque[tuple[int, int]] = deque()  # (the step from which they are free, places)
        self.waiting = 0  # the next request
        self.reading: deque[list[int]] = deque()  # [request, prompt tokens left]
        self.ends: list[tuple[int, int]] = []  # heap of (step of the last token, request)
        self.decoding = 0
        self.context = 0  # over decoding requests: sum of prompt length minus step of the first token
        self.step = 0
        self.blocks: list[tuple[int, int, int, int, int]] = []
        count = len(prompts)
        self.scheduled, self.first, self.last = [0] * count, [0] * count, [0] * count

    def run(self) -> SimulatedWork:
        while self.waiting < len(self.prompts) or self.reading or self.decoding:
            while self.freed and self.freed[0][0] <= self.step:
                self.free += self.freed.popleft()[1]
            read, started = self._read_prompts()
            steps = 1 if read else self._steps_alike()
            if not read and not self.decoding:
                # All places are empty during the lag, so no step runs.
                self.step += steps
                continue
            self.blocks.append((steps, read, self.decoding * steps, self._context(steps), int(read > 0)))
            self._make_tokens(steps, started)
        return SimulatedWork(
            np.array(self.blocks, dtype=float).reshape(-1, WORK),
            *(np.array(values, dtype=np.int64) for values in (self.scheduled, self.first, self.last)),
        )

    def _read_prompts(self) -> tuple[int, list[int]]:
        """Prompt tokens of this step, and the requests whose prompts are complete with it."""
        left = self.budget - self.decoding
        read, done = 0, []
        while left > 0 and self.reading:
            request, tokens = self.reading[0]
            part = min(tokens, left)
            self.reading[0][1] -= part
            left, read = left - part, read + part
            if part == tokens:
                self.reading.popleft()
                done.append(request)
        while left > 0 and self.free and self.waiting < len(self.prompts):
            request, tokens = self.waiting, self.prompts[self.waiting]
            self.waiting += 1
            self.free -= 1
            self.scheduled[request] = len(self.blocks)
            part = min(tokens, left)
            left, read = left - part, read + part
            if part == tokens:
                done.append(request)
            else:
                self.reading.append([request, tokens - part])
        return read, done

    def _steps_alike(self) -> int:
        """How many, until a request ends or a place becomes free."""
        last = self.ends[0][0] + 1 if self.ends else None
        if self.freed and self.waiting < len(self.prompts):
            last = self.freed[0][0] if last is None else min(last, self.freed[0][0])
        return 1 if last is None else max(1, last - self.step)

    def _context(self, steps: int) -> int:
        first, last = self.step, self.step + steps - 1
        return steps * self.context + self.decoding * (first + last) * steps // 2

    def _make_tokens(self, steps: int, started: list[int]) -> None:
        block, step = len(self.blocks) - 1, self.step + steps - 1
        self.step += steps
        ended = 0
        while self.ends and self.ends[0][0] <= step:
            _, request = heapq.heappop(self.ends)
            self.last[request] = block
            outputs = self.outputs[request]
            self.context -= self.prompts[request] - (step - outputs + 1)
            self.decoding -= 1
            ended += 1
        for request in started:
            self.first[request] = block
            if self.outputs[request] <= 1:
                self.last[request] = block
                ended += 1
                continue
            heapq.heappush(self.ends, (step + self.outputs[request] - 1, request))
            self.context += self.prompts[request] - step
            self.decoding += 1
        if ended:
            self.freed.append((self.step + self.lag, ended))
