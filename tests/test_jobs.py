"""What queue points answer for a job, and how it is said."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

import analyze_results
from batch_inference.analyze.answers import Question, analyse
from batch_inference.analyze.flags import UsageError
from batch_inference.analyze.headline import headline
from batch_inference.analyze.job_file import lengths_in
from batch_inference.analyze.job_sections import few_words, interval_text, job_section, time_text
from batch_inference.analyze.jobs import JobAnswer, JobError, JobQuestion, gains_of_orders, job_answers
from batch_inference.analyze.queues import phases
from batch_inference.analyze.tables import load_setting
from batch_inference.core.forecast import JobLengths
from batch_inference.core.job_times import job_throughput, lengths_of_job
from batch_inference.core.lengths import Distribution
from batch_inference.core.queue_runs import Interval
from batch_inference.core.results import Job, Point, Result, WorkloadKey
from builders import make_point, make_queue_point, make_result, save_all

# The queue of `make_queue_point`: each request 8 prompt and 4 output tokens.
PROMPT, OUTPUT = 8, 4


def job(requests: int = 480, output: int | None = OUTPUT, **changes: Any) -> Job:
    prompts, outputs = [PROMPT] * requests, [output or 1] * requests
    values: dict[str, Any] = {
        "content_hash": "abc", "output_lengths": "file", "requests": requests, "prompt_tokens": sum(prompts),
        "output_tokens": sum(outputs) if output else None, "longest": PROMPT + (output or 1), "every": 1,
        "last": requests, "prompt_lens": prompts, "output_lens": outputs if output else None,
        "prompts": Distribution(prompts).summary(), "outputs": Distribution(outputs).summary() if output else None,
    }  # fmt: skip
    return Job(**{**values, **changes})


def queue(batch_size: int = 2, requests: int = 48, *, life_s: float = 1.0, replicas: int = 1, **changes: Any) -> Point:
    shares = (requests,) * replicas
    point = make_queue_point(batch_size, shares, life_s=life_s, prompt=PROMPT, output=OUTPUT, **changes)
    times, count = point.runs[0].requests, requests * replicas
    # Places that take turns, and not all in one step.
    starts_s = [life_s * (index % requests) / batch_size for index in range(count)]
    times.queue_s = starts_s
    times.ttft_s = [start_s + life_s / OUTPUT for start_s in starts_s]
    times.latency_s = [start_s + life_s for start_s in starts_s]
    return point


def setting(
    name: str, *points: Point, sizes: tuple[int, int, int] = (1, 1, 1), jobs: Sequence[Job] = (), **changes: Any
) -> Result:
    return make_result(name, points, sizes, jobs=list(jobs or [job()]), **changes)


def answers(tmp_path: Path, *results: Result, **asked: Any) -> list[JobAnswer]:
    loaded = [load_setting(path) for path in save_all(list(results), tmp_path)]
    return job_answers(loaded, lambda one: one.name, JobQuestion(**asked))


def answer(tmp_path: Path, *results: Result, **asked: Any) -> JobAnswer:
    (found,) = answers(tmp_path, *results, **asked)
    return found


def test_the_hours_of_a_job_are_its_requests_at_the_samples_pace(tmp_path: Path) -> None:
    # Two at once, each a second: two requests a second, and 480 of them.
    found = answer(tmp_path, setting("tp_1", queue()), price=3.0)
    (row,) = found.rows
    assert found.requests == 480
    assert row.hours.value * 3600 == pytest.approx(240, rel=0.03)
    assert row.hours.low is not None
    assert row.hours.high is not None
    assert row.hours.low < 240 / 3600 < row.hours.high
    assert row.cost is not None
    assert row.cost.value == pytest.approx(3 * row.hours.value)
    assert row.output_tok_per_s == pytest.approx(480 * OUTPUT / 240, rel=0.03)


def test_the_fastest_comes_first_and_what_may_be_as_fast_is_a_tie(tmp_path: Path) -> None:
    slow, fast = setting("tp_1", queue(life_s=2.0)), setting("tp_2", queue(life_s=1.0), sizes=(2, 1, 1))
    near = setting("pp_2", queue(life_s=1.001), sizes=(1, 2, 1))
    found = answer(tmp_path, slow, near, fast)
    assert [row.setting for row in found.rows] == ["tp_2", "pp_2", "tp_1"]
    assert [row.setting for row in found.ties] == ["pp_2"]
    assert found.best is found.rows[0]
    # Half as many devices for twice as long: the slow one costs no more, and is not the fastest.
    assert [row.device_hours.value / row.hours.value for row in found.rows] == pytest.approx([2, 2, 1])


def test_a_suspect_forecast_does_not_go_before_a_valid_one_that_may_be_as_fast(tmp_path: Path) -> None:
    def near(name: str, life_s: float, verdict: str) -> Result:
        return setting(name, queue(life_s=life_s, verdict=verdict), sizes=(2, 1, 1))

    found = answer(tmp_path, near("fast", 1.0, "suspect"), near("sure", 1.01, "valid"), near("slow", 3.0, "valid"))
    assert [row.setting for row in found.rows] == ["sure", "fast", "slow"]
    assert [row.setting for row in found.ties] == ["fast"]
    apart = answer(tmp_path, near("fast", 1.0, "suspect"), near("slow", 3.0, "valid"))
    assert [row.setting for row in apart.rows] == ["fast", "slow"]


def test_the_answer_of_a_job_names_what_is_as_good(tmp_path: Path) -> None:
    results = [setting("tp_2", queue(), sizes=(2, 1, 1)), setting("pp_2", queue(), sizes=(1, 2, 1))]
    (sentence, *_) = headline(
        analyse([load_setting(path) for path in save_all(results, tmp_path)], Question())
    ).sentences
    assert re.search(r"min \(0\.136 device-hours; tied within the intervals with [TP]P=2\)\. ", sentence), sentence


def first_sentence(tmp_path: Path, *results: Result) -> str:
    loaded = [load_setting(path) for path in save_all(list(results), tmp_path)]
    return headline(analyse(loaded, Question())).sentences[0]


def test_a_job_that_was_still_faster_at_the_largest_size_says_so(tmp_path: Path) -> None:
    two, four = queue(2), queue(4, 96, life_s=1.5)
    said = first_sentence(tmp_path, setting("tp_1", two, four))
    words = (
        r"4 is the largest size measured with TP=1, and throughput still grew by 3\d % from 2: try larger ones with "
    )
    assert re.search(f" {words}--batch-sizes.$", said), said


@pytest.mark.parametrize(
    "results",
    [
        setting("tp_1", queue(4, 96, life_s=1.5)),
        setting("tp_1", queue(2), queue(4, 96, life_s=2.5)),  # slower
        setting(
            "tp_1",
            queue(2),
            queue(4, 96, life_s=1.5),
            config={"batch_sizes": [2, 4, 8], "prompts_file": "j.jsonl", "workload_hash": "abc"},
        ),
        setting("tp_1", queue(2), queue(4, 96, life_s=1.5, counters={"peak_running": 3})),
        setting("tp_1", queue(2), queue(4, 96, life_s=1.5, counters={"preemptions": 1})),
        setting("tp_1", queue(2), queue(4, 96, life_s=1.5, memory={"peak_kv_use": 0.97})),
        # All requests run at once.
        setting("tp_1", queue(2, 4), queue(4, 4, life_s=1.5), jobs=[job(4)]),
        setting("tp_1", queue(2), queue(4, 96, life_s=1.5, order="longest-first")),
    ],
)
def test_of_a_job_no_larger_size_is_named_where_it_would_not_help(tmp_path: Path, results: Result) -> None:
    assert "--batch-sizes" not in first_sentence(tmp_path, results)


def test_replicas_share_the_job(tmp_path: Path) -> None:
    found = answer(tmp_path, setting("dp_2", queue(replicas=2), sizes=(1, 1, 2)))
    (row,) = found.rows
    assert (row.num_devices, row.devices_per_replica) == (2, 1)
    assert row.hours.value * 3600 == pytest.approx(120, rel=0.05)


def test_more_requests_take_as_much_longer(tmp_path: Path) -> None:
    once = answer(tmp_path, setting("tp_1", queue())).rows[0]
    often = answer(tmp_path, setting("tp_1", queue()), requests=480e6)
    assert often.requests == 480e6
    assert often.rows[0].hours.value == pytest.approx(1e6 * once.hours.value, rel=0.03)
    assert often.prompt_tokens == 480e6 * PROMPT


def test_a_job_that_was_run_is_not_forecast(tmp_path: Path) -> None:
    whole = queue(requests=48)
    found = answer(tmp_path, setting("tp_1", whole, jobs=[job(48)]))
    (row,) = found.rows
    assert row.point.is_whole_job
    assert row.hours.value * 3600 == pytest.approx(whole.runs[0].latency_s)


def test_the_runs_of_a_whole_job_tell_how_far_they_are_apart(tmp_path: Path) -> None:
    """Where that is more than equal runs usually differ."""
    wide = queue(requests=48)
    for life_s in (1.3, 0.75):
        wide.runs += queue(requests=48, life_s=life_s).runs
    found = answer(tmp_path, setting("tp_1", wide, jobs=[job(48)]))
    (row,) = found.rows
    assert row.hours.value * 3600 == pytest.approx(np.mean([run.latency_s for run in wide.runs]))
    spread = np.std(np.log([run.latency_s for run in wide.runs]), ddof=1) * np.sqrt(1 + 1 / 3)
    assert row.hours.high is not None
    assert row.hours.high / row.hours.value == pytest.approx(np.exp(1.96 * spread), rel=0.01)
    assert row.hours.low is not None
    assert row.hours.low > 0
    said = said_of(found)
    assert "tp_1 ran the whole job 3 times" in said
    assert " s in the last run." in said
    point = next(iter(setting("tp_1", wide, jobs=[job(48)]).points))
    searched = job_throughput(setting("tp_1", wide, jobs=[job(48)]), point)
    assert searched is not None
    assert searched.high == pytest.approx(48 * OUTPUT / (row.hours.low * 3600))


def test_replicas_that_are_slow_by_turns_make_no_job_slower_or_faster(tmp_path: Path) -> None:
    """What counts is when the last one is done."""
    point = uneven(1.2)
    other = uneven(1.2)
    times = other.runs[0].requests
    for of_requests in (times.queue_s, times.ttft_s, times.latency_s):
        of_requests[:] = [*of_requests[48:], *of_requests[:48]]
    point.runs += other.runs
    (row,) = answer(tmp_path, setting("dp_2", point, sizes=(1, 1, 2), jobs=[job(96)])).rows
    assert row.is_as_run
    assert row.hours.high is not None
    assert row.hours.high / row.hours.value == pytest.approx(np.exp(1.96 * 0.01 * np.sqrt(1.5)))


def said_of(found: JobAnswer, analysis: Any = None) -> str:
    asked = SimpleNamespace(jobs=[found], question=SimpleNamespace(price=None))
    return " ".join(job_section(found, analysis or cast(Any, asked)).lines)


def test_of_a_job_that_was_run_the_drain_is_the_one_that_was_seen(tmp_path: Path) -> None:
    found = answer(tmp_path, setting("tp_1", queue(requests=48), jobs=[job(48)]))
    (row,) = found.rows
    assert row.is_as_run
    start_s, end_s = phases(row.point)[-1]
    plateau = row.point.plateau
    assert plateau is not None
    rate = interval_text(plateau, unit="tok/s")
    said = said_of(found)
    assert f"tp_1 ran the whole job with {rate} on the plateau. The drain, in which fewer" in said
    assert f"took {end_s - start_s:.2f} s." in said


@pytest.mark.parametrize(
    ("kind", "sizes", "least"),
    [("gpu", (1, 1, 1), "2.8"), ("gpu", (1, 2, 1), "14"), ("cpu", (1, 1, 1), "11")],
)
@pytest.mark.parametrize("whole", [True, False])
def test_an_interval_is_never_narrower_than_equal_runs_differ_and_that_is_said(
    tmp_path: Path, kind: str, sizes: tuple[int, int, int], least: str, whole: bool
) -> None:
    device = {"device_kind": kind, "devices": [{"name": "one"}] * (sizes[0] * sizes[1])}
    found = answer(tmp_path, setting("s", queue(), sizes=sizes, jobs=[job(48 if whole else 480)], environment=device))
    (row,) = found.rows
    assert row.is_as_run == whole
    assert row.hours.high is not None
    assert row.hours.high / row.hours.value - 1 >= row.forecast.equal_runs - 1e-9
    words = f"95 % confidence interval, for s at least ±{least} % because two equal runs differ by that. Not in"
    assert words in said_of(found)


def test_of_a_wide_interval_its_least_width_is_not_said(tmp_path: Path) -> None:
    found = answer(tmp_path, setting("s", queue()))
    (row,) = found.rows
    hours = row.hours.value
    wide = replace(row, hours=Interval(hours, 0.9 * hours, 1.1 * hours))
    assert "95 % confidence interval. Not in" in said_of(replace(found, rows=[wide]))
    unknown = replace(row, hours=Interval(hours))
    assert "95 % confidence interval. Not in" in said_of(replace(found, rows=[unknown]))


def uneven(slower: float) -> Point:
    """Two replicas, of which the second takes longer for as much."""
    point = queue(replicas=2)
    times = point.runs[0].requests
    for of_requests in (times.queue_s, times.ttft_s, times.latency_s):
        of_requests[48:] = [slower * one_s for one_s in of_requests[48:]]
    return point


@pytest.mark.parametrize(
    ("whole", "said"),
    [
        # 24 s and a half: 24 rounds of two places that take turns.
        (True, "The replicas were done after 24.5 to 29.4 s; the job takes as long as the last."),
        (False, r"The replicas are done after 2\.0\d* to 2\.[34]\d* min; the job takes as long as the last\."),
    ],
)
def test_of_replicas_that_are_not_done_together_it_is_said_when_each_is(tmp_path: Path, whole: bool, said: str) -> None:
    jobs = [job(96 if whole else 480)]
    found = answer(tmp_path, setting("dp_2", uneven(1.2), sizes=(1, 1, 2), jobs=jobs))
    assert found.rows[0].is_as_run == whole
    assert re.search(said, said_of(found)), said_of(found)
    even = answer(tmp_path, setting("dp_2", uneven(1.0), sizes=(1, 1, 2), jobs=jobs))
    assert "The replicas" not in said_of(even)


def test_a_sample_that_cannot_tell_its_plateau_says_what_it_takes(tmp_path: Path) -> None:
    """The interval is as wide as its value."""
    (row,) = answer(tmp_path, setting("dp_2", queue(4, 24, replicas=2), sizes=(1, 1, 2))).rows
    rate = row.forecast.output_tokens_per_s
    assert rate is not None
    wide = replace(row, forecast=replace(row.forecast, output_tokens_per_s=Interval(rate.value, 1.0, 3 * rate.value)))
    found = answer(tmp_path, setting("dp_2", queue(4, 24, replicas=2), sizes=(1, 1, 2)))
    assert "on the plateau" in said_of(found)
    said = said_of(replace(found, rows=[wide]))
    assert "on the plateau" not in said
    assert said.startswith("dp_2 is forecast from 48 requests that were run, by fitted steps. The drain, in which ")
    assert (
        " s. 48 requests are too few to tell the throughput of its plateau: with 4 at once on each replica that "
        "takes about 96 in all: --sample 96." in said
    )


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(2.0, 1.9, 2.1), "2.00 ±0.10 h"),
        (Interval(49.31, 39.01, 62.33), "49 h (39 to 62)"),
        (Interval(0.137, 0.1083, 0.1731), "8.2 min (6.5 to 10.4)"),
        (Interval(3.0), "3.000 h"),
    ],
)
def test_an_interval_that_is_wider_on_one_side_is_told_by_its_ends(interval: Interval, text: str) -> None:
    assert time_text(interval) == text


def test_settings_of_a_job_are_called_by_their_layout_and_by_their_name_where_two_share_it(tmp_path: Path) -> None:
    def first(*results: Result) -> str:
        loaded = [load_setting(path) for path in save_all(list(results), tmp_path)]
        return headline(analyse(loaded, Question())).sentences[0]

    two = setting("dp_2", queue(replicas=2), sizes=(1, 1, 2))
    assert ": DP=2 with 2 at once on each replica takes " in first(two)
    assert ": DP=2 (dp_2) with 2 at once on each replica takes " in first(
        two, setting("other", queue(replicas=2, life_s=2.0), sizes=(1, 1, 2))
    )


def test_the_start_of_the_engine_is_said_to_be_left_out(tmp_path: Path) -> None:
    def first(**engine: Any) -> str:
        paths = save_all([setting("tp_1", queue(), engine=engine)], tmp_path)
        return headline(analyse([load_setting(path) for path in paths], Question())).sentences[0]

    assert first(load_s={"total_s": 95.2}).endswith(" The start of the engine comes on top: here 95 s.")


def test_another_job_is_forecast_and_one_unlike_all_that_was_measured_is_refused(tmp_path: Path) -> None:
    def lengths(prompt: int, output: int) -> JobLengths:
        return JobLengths(np.full(960, prompt), np.full(960, output))

    found = answer(tmp_path, setting("tp_1", queue()), lengths=lengths(PROMPT, OUTPUT), name="other.jsonl")
    assert found.rows[0].hours.value * 3600 == pytest.approx(480, rel=0.03)
    with pytest.raises(JobError, match=r"^--job other\.jsonl: cannot be forecast from tp_1, 2 at once: .+"):
        answer(tmp_path, setting("tp_1", queue()), lengths=lengths(100 * PROMPT, OUTPUT), name="other.jsonl")


def test_a_sample_smaller_than_what_runs_at_once_is_left_out_and_named(tmp_path: Path) -> None:
    found = answer(tmp_path, setting("tp_1", queue(batch_size=64, requests=48), queue(batch_size=2)))
    assert [row.point.batch_size for row in found.rows] == [2]
    assert re.fullmatch(r"tp_1, 64 at once: no forecast, .*; raise --sample", found.left_out[0])


def test_a_job_that_ran_as_a_whole_is_ranked_even_where_it_did_not_fill_its_places(tmp_path: Path) -> None:
    whole = queue(batch_size=64, requests=48)
    found = answer(tmp_path, setting("tp_1", whole, jobs=[job(48)]))
    assert [row.point.batch_size for row in found.rows] == [64]
    assert found.rows[0].hours.value * 3600 == pytest.approx(whole.runs[0].latency_s)
    assert found.left_out == []
    # Another number of requests would have to be forecast, and a larger sample is not to be had.
    more = answer(tmp_path, setting("tp_1", whole, jobs=[job(48)]), requests=1000)
    assert more.left_out == [
        "tp_1, 64 at once: no forecast, the sample has 48 requests for 64 places; lower --batch-sizes"
    ]


def test_points_with_cached_prefixes_are_never_ranked_with_others(tmp_path: Path) -> None:
    cached = queue(workload=WorkloadKey("abc", "file", "given", is_cached=True))
    found = answers(tmp_path, setting("tp_1", queue(), cached))
    assert [(one.is_cached, len(one.rows)) for one in found] == [(False, 1), (True, 1)]


def test_what_came_from_the_cache_is_said(tmp_path: Path) -> None:
    workload = WorkloadKey("abc", "file", "given", is_cached=True)
    cached = queue(workload=workload, counters={"prefix_cache_hit_tokens": 48 * PROMPT // 4})
    analysis = analyse([load_setting(path) for path in save_all([setting("tp_1", cached)], tmp_path)], Question())
    section = job_section(analysis.jobs[0], analysis)
    assert section.title == "For this job, prefixes cached"
    assert "tp_1: 25% of the prompt tokens that were run came from the prefix cache." in section.lines


def test_other_content_and_other_output_lengths_are_other_jobs(tmp_path: Path) -> None:
    points = [
        queue(workload=WorkloadKey(content, lengths, "given")) for content, lengths in (("abc", "file"), ("d", 7))
    ]
    jobs = [job(), job(content_hash="d", output_lengths=7)]
    assert [one.output_lengths for one in answers(tmp_path, setting("tp_1", *points, jobs=jobs))] == ["file", 7]


def test_ends_of_the_models_own_at_other_limits_are_other_jobs(tmp_path: Path) -> None:
    def limited(name: str, limit: int) -> Result:
        point = queue(workload=WorkloadKey("abc", "eos", "given"))
        point.max_tokens = limit
        return setting(name, point, jobs=[job(output_lengths="eos", output=None)])

    found = answers(tmp_path, limited("short", 128), limited("long", 1024))
    assert [(one.limit, one.rows[0].setting) for one in found] == [(1024, "long"), (128, "short")]
    assert few_words(found[0], found) == "480 requests, ended by the model, at most 1024 tokens"


def test_two_jobs_of_as_many_requests_are_told_apart_by_their_tokens(tmp_path: Path) -> None:
    points = [queue(workload=WorkloadKey(content, "file", "given")) for content in ("abc", "d")]
    longer = job(content_hash="d", prompt_lens=[2 * PROMPT] * 480)
    found = answers(tmp_path, setting("tp_1", *points, jobs=[job(), longer]))
    assert [few_words(one, found) for one in found] == [
        "480 requests of 3,840 prompt tokens", "480 requests of 7,680 prompt tokens",
    ]  # fmt: skip
    assert few_words(found[0]) == "480 requests"


def test_a_file_is_forecast_from_what_it_is_like_and_the_rest_left_out(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"lengths": JobLengths(np.full(99, 3 * PROMPT), np.full(99, OUTPUT)), "name": "f.jsonl"}
    unlike, like = queue(4), queue(2)
    like.runs[0].requests.prompt_tokens = [3 * PROMPT] * 48
    found = answer(tmp_path, setting("tp_1", unlike, like), **asked)
    assert [row.point.batch_size for row in found.rows] == [2]
    assert "no forecast from tp_1, 4 at once: The mean prompt of the job has 24 tokens, and that of " in said_of(found)
    with pytest.raises(JobError, match=r"^--job f.jsonl: cannot be forecast from tp_1, 4 at once: The mean .*f.jsonl$"):
        answers(tmp_path, setting("tp_1", unlike), **asked)


def test_an_invalid_point_answers_nothing(tmp_path: Path) -> None:
    assert answers(tmp_path, setting("tp_1", queue(verdict="invalid"))) == []


def test_what_an_order_saves_is_said_where_both_were_measured(tmp_path: Path) -> None:
    found = answer(tmp_path, setting("tp_1", queue(life_s=1.0), queue(life_s=0.8, order="longest-first")))
    ((where, order, saved, is_told),) = gains_of_orders(found)
    assert (where, order) == ("tp_1, 2 at once", "longest-first")
    assert saved == pytest.approx(0.2, abs=0.02)
    assert ("may be chance" in said_of(found)) != is_told


def test_an_order_that_saves_less_than_is_known_is_not_praised(tmp_path: Path) -> None:
    found = answer(tmp_path, setting("tp_1", queue(life_s=1.0), queue(life_s=0.999, order="longest-first")))
    ((*_, is_told),) = gains_of_orders(found)
    assert not is_told
    assert "compared with the order of the file; the intervals overlap, so this may be chance." in said_of(found)


def test_a_batch_of_the_mean_lengths_is_held_against_the_plateau(tmp_path: Path) -> None:
    near, far = make_point(2, PROMPT, max_tokens=OUTPUT), make_point(2, 10 * PROMPT, max_tokens=OUTPUT)
    (row,) = answer(tmp_path, setting("tp_1", queue(), near, far)).rows
    plateau = row.point.summary["plateau_output_tok_per_s"]
    assert plateau
    assert near.summary["output_tok_per_s"]
    assert row.grid_ratio == pytest.approx(near.summary["output_tok_per_s"] / plateau)
    assert answer(tmp_path, setting("tp_1", queue(), far)).rows[0].grid_ratio is None
    near.verdict = "invalid"
    assert answer(tmp_path, setting("tp_1", queue(), near)).rows[0].grid_ratio is None


def test_a_deadline_asks_for_the_fewest_devices_that_are_in_time(tmp_path: Path) -> None:
    both = (setting("tp_1", queue()), setting("tp_2", queue(life_s=0.9), sizes=(2, 1, 1)))
    found = answer(tmp_path, *both, deadline_h=100 / 3600)
    deadline = found.deadline
    assert deadline is not None
    # 240 s on one device: three of them, and hardly faster on two each.
    assert (deadline.row.setting, deadline.devices) == ("tp_1", 3)
    assert deadline.hours.high is not None
    assert deadline.margin == pytest.approx(1 - deadline.hours.high * 36)
    late = answer(tmp_path, *both, deadline_h=0.1 / 3600)
    assert (late.deadline, late.is_late) == (None, True)


def test_what_ran_the_whole_job_in_time_is_in_time(tmp_path: Path) -> None:
    """A forecast for other numbers of replicas is less sure, and would take more of them."""
    whole = queue(replicas=2)
    found = answer(tmp_path, setting("dp_2", whole, sizes=(1, 1, 2), jobs=[job(96)]), deadline_h=26 / 3600)
    assert found.deadline is not None
    assert (found.deadline.replicas, found.deadline.devices) == (2, 2)
    assert found.deadline.hours == found.rows[0].hours
    assert found.deadline.hours.high is not None
    assert found.deadline.margin == pytest.approx(1 - found.deadline.hours.high * 3600 / 26)
    # A forecast of as many replicas may be shorter, and is less sure.
    slow = answer(tmp_path, setting("dp_2", uneven(1.3), sizes=(1, 1, 2), jobs=[job(96)]), deadline_h=33 / 3600)
    assert slow.deadline is not None
    assert slow.deadline.hours == slow.rows[0].hours
    late = answer(tmp_path, setting("dp_2", whole, sizes=(1, 1, 2), jobs=[job(96)]), deadline_h=20 / 3600)
    assert late.deadline is not None
    assert late.deadline.replicas > 2


def test_replicas_that_share_experts_are_not_counted_singly(tmp_path: Path) -> None:
    coupled = setting(
        "dp_2_ep", queue(replicas=2), sizes=(1, 1, 2), config={"engine_args": ["--enable-expert-parallel"]}
    )
    for seconds, replicas in ((1000, 2), (125, 4)):
        deadline = answer(tmp_path, coupled, deadline_h=seconds / 3600).deadline
        assert deadline is not None
        assert (deadline.replicas, deadline.devices) == (replicas, replicas)
    # Also of a job that has fewer requests than there are replicas.
    assert answer(tmp_path, coupled, requests=1, deadline_h=1).deadline is not None


def test_the_fewest_device_hours_may_be_tied(tmp_path: Path) -> None:
    results = [
        setting("tp_2", queue(life_s=1.0), sizes=(2, 1, 1)),
        setting("tp_1", queue(life_s=1.99)),
        setting("tp_4", queue(life_s=3.0), sizes=(4, 1, 1)),
    ]
    found = answer(tmp_path, *results)
    assert found.cheapest is not None
    assert (found.cheapest.setting, [row.setting for row in found.as_cheap]) == ("tp_1", ["tp_2"])
    words = "TP=1 with 2 at once takes the fewest device-hours: 8.1"
    said = first_sentence(tmp_path, *results)
    assert words in said
    assert "0.135 device-hours; tied within the intervals with TP=2)" in said


@pytest.mark.parametrize(
    ("kind", "deadline_h", "warns"), [("cpu", 0.03, True), ("cpu", 1.0, False), ("gpu", 0.03, False)]
)
def test_more_replicas_on_the_cores_of_one_machine_are_not_promised(
    tmp_path: Path, kind: str, deadline_h: float, warns: bool
) -> None:
    results = [setting("tp_1", queue(), environment={"device_kind": kind})]
    loaded = [load_setting(path) for path in save_all(results, tmp_path)]
    analysis = analyse(loaded, Question(job=JobQuestion(deadline_h=deadline_h)))
    lines = job_section(analysis.jobs[0], analysis).lines
    assert any("and count whole machines" in line for line in lines) == warns
    assert ("devices, each on a machine of its own: " in headline(analysis).sentences[0]) == warns


def test_what_wins_for_a_deadline_is_called_that_in_the_answer_and_the_section(tmp_path: Path) -> None:
    results = [setting("tp_1", queue()), setting("dp_2", queue(replicas=2, life_s=0.7), sizes=(1, 1, 2))]

    def said(deadline_h: float) -> tuple[str, dict[str, str]]:
        loaded = [load_setting(path) for path in save_all(results, tmp_path)]
        analysis = analyse(loaded, Question(job=JobQuestion(deadline_h=deadline_h)))
        return headline(analysis).sentences[0], dict(job_section(analysis.jobs[0], analysis).pairs)

    sentence, pairs = said(45 / 3600)
    words = r"For the deadline of 0\.0125 h take 4 replicas as in DP=2 with 2 at once on each replica, so 4 devices: "
    assert re.search(words, sentence), sentence
    assert re.match(r"4 replicas as in dp_2 \(4 devices\), 2 at once on each replica: ", pairs["for the deadline"])
    results[1].points[0].verdict = "suspect"
    assert re.search(rf"{words}[\d.]+ ± [\d.]+ s \(suspect\)\.", said(45 / 3600)[0])
    sentence, pairs = said(0.1 / 3600)
    late = "No number of replicas meets the deadline of 2.77778e-05 h: the longest request alone takes longer."
    assert sentence.endswith(late)
    assert pairs["for the deadline"].startswith("no number of replicas is in time")


def test_thinned_lengths_weigh_as_much_as_the_job_has_requests() -> None:
    thinned = job(requests=1003, every=10, last=3, prompt_lens=[PROMPT] * 103, output_lens=[OUTPUT] * 103)
    lengths = lengths_of_job(thinned)
    assert lengths.requests == pytest.approx(1003)
    assert list(lengths.weights[-4:]) == [10, 1, 1, 1]


# --- the files and what is said ------------------------------------------------------------------------------------


def analysed(tmp_path: Path, capsys: pytest.CaptureFixture[str], results: Sequence[Result], *flags: str) -> str:
    save_all(list(results), tmp_path / "r")
    code = analyze_results.main(["--input", str(tmp_path / "r"), "--no-plots", *flags])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


def test_the_job_comes_first_with_its_hours_cost_and_deadline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doubtful = make_point(2, PROMPT, max_tokens=OUTPUT, verdict="suspect", verdict_reasons=["runs differ"])
    results = [setting("tp_1", queue(), doubtful)]
    said = analysed(tmp_path, capsys, results, "--device-hour-price", "36", "--deadline-hours", "0.03")
    text = " ".join(said.split())
    answer, _, rest = text.partition(" For this job ")
    assert rest.startswith("job 480 requests: 3,840 prompt and 1,920 output tokens")
    assert re.match(r"The job of 480 requests on 1 × H100, Llama-2-7b-chat-hf: TP=1 with 2 at once takes 4\.0\d* ± "
                    r"[\d.]+ min \(0\.0\d+ device-hours\) and costs 2\.4\d* at 36 per device-hour\. The start of the "
                    r"engine comes on top: here 40 s\. For the deadline of 0\.03 h take 3 replicas of TP=1 "
                    r"with 2 at once on each replica, so 3 devices: 1\.3\d* ± [\d.]+ min, "
                    r"at a cost of 2\.4\d\. On 1 × H100", answer)  # fmt: skip
    assert re.search(r"fastest tp_1, 2 at once: 4\.0\d* ±[\d.]+ min, [\d.]+ ±[\d.]+ device-hours, cost 2\.4", text)
    assert re.search(r"for the deadline 3 replicas of tp_1 \(3 devices\), 2 at once on each replica: "
                     r"1\.3\d* ±[\d.]+ min, at a cost of 2\.4\d; at the upper end of that interval \d+% of the time is "
                     r"left", text)  # fmt: skip
    assert " output tokens 4 " in text
    assert "suspect (tp_1, batch 2 x length 8): runs differ" in text
    lines = said.partition("\n\n/")[0].splitlines()
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    (one,) = json.loads((tmp_path / "r" / "analysis" / "summary.json").read_text())["jobs"]
    assert (one["requests"], one["fastest"][0]["batch_size"], one["deadline"]["devices"]) == (480, 2, 3)
    rows = (tmp_path / "r" / "analysis" / "results.csv").read_text().splitlines()
    assert len(rows) == 3


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ("--job-requests", "7"),
            "--job-requests 7: --input {} has no queue point; measure with --prompts-file first",
        ),
        (
            ("--deadline-hours", "7"),
            "--deadline-hours 7.0: --input {} has no queue point; measure with --prompts-file first",
        ),
    ],
)
def test_a_question_about_a_job_needs_a_queue_point(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: Sequence[str], told: str
) -> None:
    save_all([make_result(points=[make_point(1)])], tmp_path)
    assert analyze_results.main(["--input", str(tmp_path), "--no-plots", *flags]) == 2
    assert capsys.readouterr().err == f"error: {told.format(tmp_path)}\n"


def test_a_file_of_another_job_needs_both_lengths(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.csv", tmp_path / "bad.jsonl"
    good.write_text("prompt_tokens,output_tokens\n8,4\n9,5\n")
    lengths = lengths_in(good)
    assert (lengths.prompt_tokens.tolist(), lengths.output_tokens.tolist()) == ([8, 9], [4, 5])  # type: ignore[union-attr]
    bad.write_text('{"prompt": "hello", "output_tokens": 4}\n')
    with pytest.raises(UsageError, match=r"^--job .*bad\.jsonl, request 1: its prompt has no length; give the lengths"):
        lengths_in(bad)
    # The analysis has no flag by which lines are left out.
    bad.write_text('{"prompt_tokens": 0, "output_tokens": 4}\n')
    with pytest.raises(UsageError, match=r"bad\.jsonl, line 1: .*; fix it, or leave it out$"):
        lengths_in(bad)
    with pytest.raises(UsageError, match=r"^--job .*none\.jsonl: it cannot be read"):
        lengths_in(tmp_path / "none.jsonl")
