"""A queue run: its phases and rates, its steps and their costs, and the simulation of any queue."""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import queue_truth
from queue_truth import COSTS, MIXES, lognormal, narrow, queue_run

from batch_inference.core.queue_runs import Integers, QueueRun, done_by, phases_of, places_taken, plateau_rates
from batch_inference.core.queue_simulation import CONTEXT, DECODE, PROMPT, READING, STEPS, WORK, simulate_work
from batch_inference.core.step_costs import StepCosts, costs_of, fit_costs, lag_of, seen_work, simulate


def mixed(count: int, seed: int = 0) -> tuple[Integers, Integers]:
    return lognormal(count, np.random.default_rng(seed))


def equal_requests(count: int, batch_size: int) -> QueueRun:
    """One after another at each place: read for 1 s, and 9 s of 10 tokens."""
    start_s = np.arange(count) // batch_size * 10.0
    lengths = np.full(count, 100), np.full(count, 10)
    return QueueRun(*lengths, start_s, start_s + 1, start_s + 10, batch_size)


# --- phases and rates ---------------------------------------------------------------------------------------------


def test_ramp_plateau_and_drain() -> None:
    """Two places: from 1 s on both make tokens, at 30 s the last two begin, at 40 s they end."""
    phases = phases_of(equal_requests(8, 2))
    assert (phases.ramp_end_s, phases.drain_start_s, phases.end_s) == (1, 30, 40)
    assert (phases.plateau_s, phases.drain_s) == (29, 10)


@pytest.mark.parametrize("requests", [1, 3, 4])
def test_a_sample_that_does_not_fill_the_places_has_no_plateau(requests: int) -> None:
    phases = phases_of(equal_requests(requests, 4))
    assert phases.plateau_s == 0
    assert phases.drain_start_s == 0
    assert plateau_rates(equal_requests(requests, 4)) is None


def test_a_moment_is_no_plateau() -> None:
    """A fifth request that begins when four have nearly read their prompts: a tenth of a life is full."""
    run = equal_requests(5, 4)
    moments_s = np.array([0, 0, 0, 0, 2.0])
    assert phases_of(replace(run, scheduled_s=moments_s, first_token_s=moments_s + 1)).plateau_s == 0


def test_without_requests_there_is_no_run() -> None:
    nothing, one = np.array([], dtype=np.int64), np.array([1.0])
    with pytest.raises(ValueError, match="at least one request"):
        QueueRun(nothing, nothing, nothing, nothing, nothing, 1)
    with pytest.raises(ValueError, match="arrays of equal length"):
        QueueRun(np.array([1]), np.array([1, 2]), one, one, one, 1)


def test_what_is_done_by_a_moment() -> None:
    """10 from 0 to 10 s, 100 at 5 s at once, and 6 from 4 to 6 s."""
    starts_s, ends_s, amounts = np.array([0.0, 5, 4]), np.array([10.0, 5, 6]), np.array([10, 100, 6])
    done = done_by(np.array([0.0, 4, 4.5, 6, 20]), starts_s, ends_s, amounts)
    assert done == pytest.approx([0, 4, 6, 112, 116])


def test_rates_of_the_plateau() -> None:
    """Of 12 lives without noise: each place makes 10 tokens in 10 s, so 2 places 2 a second."""
    rates = plateau_rates(equal_requests(26, 2))
    assert rates is not None
    assert rates.output_tokens.value == pytest.approx(2, rel=0.02)
    assert rates.prompt_tokens.value == pytest.approx(20, rel=0.1)
    assert rates.requests.value == pytest.approx(0.2, rel=0.1)
    assert rates.output_tokens.low is not None
    assert rates.output_tokens.high is not None
    assert rates.output_tokens.low <= rates.output_tokens.value <= rates.output_tokens.high


def test_a_plateau_of_few_lives_has_no_batch_means() -> None:
    rates = plateau_rates(equal_requests(12, 2))
    assert rates is not None
    assert rates.output_tokens.low is None


@pytest.mark.slow
def test_the_interval_by_batch_means_holds_the_rate_of_a_longer_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same engine at the same clocks: neighbours err together, runs do not."""
    monkeypatch.setattr(queue_truth, "RUN_NOISE", 0.0)
    held = 0
    for seed in range(20):
        draw = np.random.default_rng(seed)
        rates = plateau_rates(queue_run(lognormal(400, draw), 8, draw))
        truth = plateau_rates(queue_run(lognormal(2000, draw), 8, draw))
        assert rates is not None
        assert truth is not None
        low, high = rates.output_tokens.low, rates.output_tokens.high
        assert low is not None
        assert high is not None
        held += low <= truth.output_tokens.value <= high
    assert held >= 17


def test_fewer_places_than_asked_where_something_else_is_the_limit() -> None:
    """A KV cache that holds 6 of 32, say."""
    run = queue_run(mixed(200), 6)
    assert places_taken(run) == 6
    assert places_taken(replace(run, batch_size=32)) == 6
    assert places_taken(queue_run(mixed(20), 32)) == 32


# --- the simulation -----------------------------------------------------------------------------------------------


class StepByStep:
    """The same scheduler without any cleverness: one step after the other."""

    def __init__(self, prompts: list[int], outputs: list[int], batch_size: int, budget: int, lag: int) -> None:
        self.prompts, self.outputs, self.budget, self.lag = prompts, outputs, budget, lag
        self.waiting = deque(range(len(prompts)))
        self.running: list[int] = []
        self.read, self.made = [0] * len(prompts), [0] * len(prompts)
        self.free_from = [0] * batch_size  # of each place: the step
        self.work: list[list[int]] = []
        self.last: dict[int, int] = {}  # request -> how many steps had been run
        self.first: dict[int, int] = {}

    def run(self) -> None:
        step = 0
        while self.waiting or self.running:
            self.step(step)
            step += 1

    def step(self, step: int) -> None:
        decoding = [request for request in self.running if self.made[request]]
        context = sum(self.prompts[request] + self.made[request] for request in decoding)
        read = self.read_prompts(step, self.budget - len(decoding))
        if decoding or read:
            self.work.append([1, read, len(decoding), context, int(read > 0)])
        for request in list(self.running):
            if self.read[request] == self.prompts[request]:
                self.make_token(request, step)

    def read_prompts(self, step: int, left: int) -> int:
        before = left
        while left:
            unread = [request for request in self.running if self.read[request] < self.prompts[request]]
            free = [place for place, since in enumerate(self.free_from) if since <= step]
            if not unread and free and self.waiting:
                self.free_from[free[0]] = sys.maxsize
                self.running.append(self.waiting.popleft())
            elif not unread:
                break
            else:
                part = min(left, self.prompts[unread[0]] - self.read[unread[0]])
                self.read[unread[0]] += part
                left -= part
        return before - left

    def make_token(self, request: int, step: int) -> None:
        self.made[request] += 1
        if self.made[request] == 1:
            self.first[request] = len(self.work)
        if self.made[request] == self.outputs[request]:
            self.last[request] = len(self.work)
            self.running.remove(request)
            self.free_from[self.free_from.index(sys.maxsize)] = step + 1 + self.lag


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    ("batch_size", "budget", "lag"), [(1, 64, 0), (1, 64, 2), (4, 64, 1), (8, 300, 0), (8, 4096, 1), (64, 4096, 1)]
)
def test_the_simulation_does_what_a_scheduler_does(mix: str, batch_size: int, budget: int, lag: int) -> None:
    prompts, outputs = MIXES[mix](40, np.random.default_rng(3))
    prompts[7], outputs[5] = 1, 1
    queue = simulate_work(prompts, outputs, batch_size, budget, lag)
    slow = StepByStep(prompts.tolist(), outputs.tolist(), batch_size, budget, lag)
    slow.run()
    assert queue.work.sum(axis=0).tolist() == np.sum(slow.work, axis=0).tolist()
    # At whatever costs, each request has its first and its last token at the same moment.
    costs = np.array([1.0, 0.01, 0.1, 1e-5, 0.5])
    ends_s, expected_s = np.cumsum(queue.work @ costs), np.cumsum(np.array(slow.work) @ costs)
    requests = range(len(prompts))
    assert ends_s[queue.first] == pytest.approx([expected_s[slow.first[request] - 1] for request in requests])
    assert ends_s[queue.last] == pytest.approx([expected_s[slow.last[request] - 1] for request in requests])


def test_a_job_takes_as_many_blocks_as_requests_come_and_go() -> None:
    """Not as many as tokens: 200 requests of 100,000."""
    outputs = np.full(200, 100_000) + np.arange(200)
    queue = simulate_work(np.full(200, 10), outputs, 8, 2048)
    assert queue.work[:, STEPS].sum() > 2_000_000
    assert len(queue.work) < 3 * 200


def test_the_work_of_a_queue_is_that_of_its_requests() -> None:
    prompts, outputs = mixed(300)
    work = simulate_work(prompts, outputs, 16, 2048).work.sum(axis=0)
    assert work[PROMPT] == prompts.sum()
    assert work[DECODE] == (outputs - 1).sum()
    assert work[CONTEXT] == (prompts * (outputs - 1) + outputs * (outputs - 1) // 2).sum()
    assert 0 < work[READING] <= work[STEPS]


def test_a_queue_in_seconds() -> None:
    """One place, one request after the other: a step reads 100 tokens, four make one each, one lies between."""
    costs = StepCosts(1.0, 0.01, 0.0, 0.0, 0.0, lag_steps=0)
    done = simulate(costs, np.array([100, 100]), np.array([5, 5]), 1, 2048)
    assert done.scheduled_s == pytest.approx([0, 6])
    assert done.first_token_s == pytest.approx([2, 8])
    assert done.last_token_s == pytest.approx([6, 12])
    assert done.total_s == pytest.approx(12)


# --- costs of steps -----------------------------------------------------------------------------------------------


def test_the_steps_that_were_seen_are_those_that_were_run() -> None:
    lengths = mixed(400)
    seen, true = seen_work(queue_run(lengths, 16)), simulate_work(*lengths, 16, 2048).work.sum(axis=0)
    assert seen.work.sum(axis=0) == pytest.approx(true, rel=0.02)
    assert seen.seconds.sum() == pytest.approx(float(true @ COSTS))


@pytest.mark.parametrize("mix", MIXES)
def test_costs_are_found_again(mix: str) -> None:
    """What the parts of a step cost where there is no noise; the context is a part of what a token costs."""
    run = queue_run(MIXES[mix](300, np.random.default_rng(1)), 32)
    found = costs_of(run)
    context = float(np.mean(run.prompt_tokens + run.output_tokens / 2))
    assert found.per_step_s == pytest.approx(COSTS[STEPS], rel=0.1)
    assert found.per_prompt_token_s == pytest.approx(COSTS[PROMPT], rel=0.1)
    token_s = found.per_decode_s + context * found.per_context_token_s
    assert token_s == pytest.approx(COSTS[DECODE] + context * COSTS[CONTEXT], rel=0.25)


def test_a_step_that_reads_costs_more_where_that_is_seen() -> None:
    costs = np.array([4e-3, 2e-6, 10e-6, 0, 6e-3])
    found = costs_of(queue_run(mixed(400), 16, costs=costs))
    assert found.per_reading_step_s == pytest.approx(6e-3, rel=0.25)
    assert found.per_step_s == pytest.approx(4e-3, rel=0.05)


def test_no_cost_is_below_zero() -> None:
    draw = np.random.default_rng(5)
    for _ in range(50):
        costs = fit_costs(draw.random((20, WORK)), draw.random(20))
        assert (costs >= 0).all()


def test_the_costs_make_up_the_seconds() -> None:
    draw = np.random.default_rng(5)
    work, seconds = draw.random((40, WORK)), draw.random(40)
    assert work.sum(axis=0) @ fit_costs(work, seconds) == pytest.approx(seconds.sum())


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("mix", ["lognormal", "two humps"])
def test_how_long_a_place_stays_empty_is_seen(mix: str, lag: int) -> None:
    lengths = MIXES[mix](300, np.random.default_rng(2))
    queue = simulate_work(*lengths, 16, 2048, lag)
    ends_s = np.cumsum(queue.work @ COSTS)
    starts_s = np.concatenate([[0.0], ends_s[:-1]])
    run = QueueRun(*lengths, starts_s[queue.scheduled], ends_s[queue.first], ends_s[queue.last], 16, 2048)
    assert lag_of(run, seen_work(run)) == lag


def test_prompts_longer_than_a_step_holds() -> None:
    lengths = np.full(60, 1000), np.full(60, 30)
    run = queue_run(lengths, 8, budget=256)
    assert seen_work(run).work[:, PROMPT].sum() == pytest.approx(60_000)
    assert costs_of(run).per_prompt_token_s == pytest.approx(COSTS[PROMPT], rel=0.15)


@pytest.mark.parametrize("lengths", [([7], [1]), ([7], [5]), ([7, 7, 7], [1, 1, 1])])
def test_the_smallest_runs(lengths: tuple[list[int], list[int]]) -> None:
    """Too few to fit anything well: but what is found takes as long as they took."""
    run = queue_run((np.array(lengths[0]), np.array(lengths[1])), 2)
    seen = seen_work(run)
    assert seen.seconds.sum() == pytest.approx(run.end_s)
    assert seen.work.sum(axis=0) @ costs_of(run).as_array() == pytest.approx(run.end_s)


def test_narrow_mixes_come_in_waves_and_have_a_plateau_all_the_same() -> None:
    assert phases_of(queue_run(narrow(200, np.random.default_rng(0)), 16)).plateau_s > 0
