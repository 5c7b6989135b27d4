"""A queue point's replicas as arrays, its plateau and its drain."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from batch_inference.core import queue_points
from batch_inference.core.forecast import BATCH_MEANS, FITTED_STEPS
from batch_inference.core.queue_points import Plateau, runs_of, summary_of
from batch_inference.core.queue_runs import Interval, QueueRun
from batch_inference.core.results import Point, Requests
from builders import make_queue_point, make_queue_run, make_result


def runs(point: Point, **sections: Any) -> list[list[QueueRun]]:
    return runs_of(make_result(points=[point], **sections), point)


def uneven(lives: int, scatter: float = 0.3, seed: int = 0) -> QueueRun:
    """Four at once for so many mean lives; requests live differently long."""
    draw = np.random.default_rng(seed)
    count = 4 * lives
    lengths_s = draw.uniform(1 - scatter, 1 + scatter, count)
    free_s, scheduled_s = [0.0] * 4, []
    for length_s in lengths_s:
        place = free_s.index(min(free_s))
        scheduled_s.append(free_s[place])
        free_s[place] += length_s
    starts_s = np.array(scheduled_s)
    outputs = np.round(100 * lengths_s).astype(int)
    return QueueRun(np.full(count, 50), outputs, starts_s, starts_s + 0.01, starts_s + lengths_s, 4)


def test_the_requests_of_a_run_belong_to_its_replicas_in_their_order() -> None:
    point = make_queue_point(2, (24, 26))
    ((first, second),) = runs(point)
    assert (len(first.prompt_tokens), len(second.prompt_tokens)) == (24, 26)
    assert (first.batch_size, first.end_s, second.end_s) == (2, 12.0, 13.0)
    assert second.scheduled_s.tolist() == [float(number // 2) for number in range(26)]


def test_times_count_from_the_common_start() -> None:
    """A request is scheduled so long after it arrived, and arrived so long after the start."""
    point = make_queue_point(1, (1,))
    point.runs[0].requests = Requests(
        ttft_s=[0.75], latency_s=[2.0], queue_s=[0.5], output_tokens=[10], arrival_s=[0.25], prompt_tokens=[100]
    )
    ((replica,),) = runs(point)
    assert (replica.scheduled_s, replica.first_token_s, replica.last_token_s) == ([0.75], [1.0], [2.25])


def test_a_replica_without_a_request_is_left_out() -> None:
    point = make_queue_point(2, (24, 26))
    point.runs[0].replicas.insert(1, make_queue_run(2, (2,)).replicas[0])
    point.runs[0].replicas[1].requests = 0
    assert [len(replica.prompt_tokens) for replica in runs(point)[0]] == [24, 26]


@pytest.mark.parametrize(("own", "of_engine", "budget"), [(512, 2048, 512), (None, 2048, 2048), (None, None, None)])
def test_the_tokens_per_step_are_the_points_or_the_engines(
    own: int | None, of_engine: int | None, budget: int | None
) -> None:
    point = make_queue_point(2, (24,), max_num_batched_tokens=own)
    assert runs(point, engine={"max_num_batched_tokens": of_engine})[0][0].max_num_batched_tokens == budget


def test_a_long_plateau_has_an_interval_by_batch_means() -> None:
    summary = summary_of([[uneven(40)]])
    assert summary.plateau is not None
    assert summary.plateau.method == BATCH_MEANS
    rate = summary.plateau.output_tok_per_s
    # Four at once, each 100 tokens per second.
    assert rate.value == pytest.approx(400, rel=0.02)
    assert rate.low is not None
    assert rate.high is not None
    assert rate.low < rate.value < rate.high < 1.1 * rate.value
    assert 0 < summary.drain_s < 1.4
    assert summary.ramp_s == pytest.approx(0.01)


def test_a_short_plateau_has_an_interval_by_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_points, "_relative_by_fitted_steps", lambda _run: 0.125)
    summary = summary_of([[uneven(5)]])
    assert summary.plateau is not None
    assert summary.plateau.method == FITTED_STEPS
    value = summary.plateau.output_tok_per_s.value
    assert summary.plateau.output_tok_per_s == Interval(value, 0.875 * value, 1.125 * value)


@pytest.mark.parametrize("says_nothing", ["too_small", "forecast"])
def test_a_run_of_which_nothing_can_be_fitted_may_be_off_by_all_of_its_rate(
    says_nothing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = "the sample is small" if says_nothing == "too_small" else SimpleNamespace(output_tokens_per_s=None)
    monkeypatch.setattr(queue_points, says_nothing, lambda *_: answer)
    summary = summary_of([[uneven(2)]])
    assert summary.plateau is not None
    rate = summary.plateau.output_tok_per_s
    assert (rate.low, rate.high) == (0.0, 2 * rate.value)


def test_replicas_add_up_and_their_intervals_as_independent_ones_do() -> None:
    one, other = uneven(40), uneven(40, seed=1)
    alone = [summary_of([[replica]]).plateau for replica in (one, other)]
    both = summary_of([[one, other]]).plateau
    assert both is not None
    assert all(alone)
    halves = [part.output_tok_per_s.high - part.output_tok_per_s.value for part in alone if part]  # type: ignore[operator]
    assert both.output_tok_per_s.value == sum(part.output_tok_per_s.value for part in alone if part)
    assert both.output_tok_per_s.high == pytest.approx(both.output_tok_per_s.value + np.hypot(*halves))
    assert both.prompt_tok_per_s == sum(part.prompt_tok_per_s for part in alone if part)
    assert both.requests_per_s == sum(part.requests_per_s for part in alone if part)


def test_one_replica_without_a_plateau_leaves_the_point_without() -> None:
    short = QueueRun(*(np.ones(2) for _ in range(5)), batch_size=4)
    summary = summary_of([[uneven(40), short]])
    assert summary.plateau is None
    assert summary_of([[uneven(40)], [short]]).plateau is None
    # Its drain is known all the same.
    assert summary.drain_s > 0


def test_ramp_and_drain_are_those_of_the_replica_that_takes_longest() -> None:
    point = make_queue_point(2, (24, 26), life_s=2.0)
    summary = summary_of(runs(point))
    assert summary.drain_s == 2.0
    quick, slow = make_queue_run(2, (24,), life_s=1.0), make_queue_run(2, (24,), life_s=3.0)
    apart = make_queue_point(2, runs=[quick, slow])
    # Of several runs the mean.
    assert summary_of(runs(apart)).drain_s == 2.0


def test_several_runs_are_averaged_and_their_interval_becomes_no_narrower() -> None:
    """What is off in the sample is off in each of them."""
    one, other = uneven(40), uneven(40, seed=1)
    alone = [summary_of([[replica]]).plateau for replica in (one, other)]
    both = summary_of([[one], [other]]).plateau
    assert isinstance(both, Plateau)
    values = [part.output_tok_per_s.value for part in alone if part]
    halves = [part.output_tok_per_s.high - part.output_tok_per_s.value for part in alone if part]  # type: ignore[operator]
    assert both.output_tok_per_s.value == pytest.approx(sum(values) / 2)
    assert both.output_tok_per_s.high == pytest.approx(both.output_tok_per_s.value + max(halves))
