"""Which requests of a job each point runs, and on which replica."""

from __future__ import annotations

import json
import random
from array import array
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.queue_runs import LIVES
from batch_inference.core.results import PointKey, workload_key
from batch_inference.core.workload import Workload
from batch_inference.measure import job as job_module
from batch_inference.measure.job import FEWEST_REQUESTS, JobFile
from batch_inference.measure.job_lengths import FEWEST_LIVES, JobLengths, read_job
from batch_inference.measure.messages import Asked


def lengths(count: int) -> tuple[list[int], list[int]]:
    """Of prompts up to 500 and outputs up to 200; no two requests are alike."""
    drawn = random.Random(0).sample(range(500 * 200), count)
    return [1 + number // 200 for number in drawn], [1 + number % 200 for number in drawn]


def job_of(count: int = 1000, left_out: str | None = None, **changes: Any) -> JobFile:
    """Of lengths alone; the file is none that is looked at."""
    prompts, outputs = lengths(count)
    if isinstance(number := changes.get("output_lengths"), int):
        outputs = [number] * count
    longest = max(map(sum, zip(prompts, outputs, strict=True)))
    known = {"prompts_file": "job.jsonl", "workload_longest": longest, "workload_hash": "abc"}
    config = ExperimentConfig(**{"batch_sizes": (4,), **known, **changes})
    return JobFile(config, JobLengths(Workload(Path("job.jsonl")), array("I", prompts), array("I", outputs), left_out))


@pytest.fixture(autouse=True)
def without_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "ids_of", lambda _workload, _config, indices: [None] * len(indices))


def key_of(job: JobFile, batch_size: int = 4) -> PointKey:
    return PointKey(batch_size, None, None, workload_key(job.config))


def asked(job: JobFile, batch_size: int = 4, requests: int | None = None) -> list[list[tuple[Any, int]]]:
    return [[(one.prompt, one.max_tokens) for one in share] for share in job.shares(key_of(job, batch_size), requests)]


# --- how many ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "replicas", "sample", "size"),
    [
        (1, 1, None, FEWEST_REQUESTS),
        (2, 1, None, FEWEST_REQUESTS),
        (8, 1, None, 8 * LIVES),
        (8, 3, None, 3 * 8 * LIVES),
        (1, 2, None, 2 * FEWEST_REQUESTS),
        (500, 1, None, 1000),  # more than there are
        (1, 1, 700, 700),
        (8, 2, 700, 700),  # of all replicas
    ],
)
def test_a_point_runs_as_many_requests_as_it_needs(
    batch_size: int, replicas: int, sample: int | None, size: int
) -> None:
    job = job_of(data_parallel_size=replicas, sample=sample)
    assert job.sample_size(batch_size) == size
    assert sum(map(len, asked(job, batch_size))) == size
    assert len(job) == 1000


def test_a_plateau_has_the_room_of_some_lives_between_its_ends() -> None:
    assert (LIVES, FEWEST_LIVES, FEWEST_REQUESTS) == (12, 2, 32)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"sample": 1001},
            "--sample 1001: job.jsonl has 1000 requests; lower it, or drop it to run as many as are needed",
        ),
        (
            {"sample": 15, "batch_sizes": (1, 8, 4)},
            "--sample 15: with 8 at once on 1 replica there is no plateau below 16; raise it, or lower --batch-sizes",
        ),
        (
            {"sample": 31, "batch_sizes": (8,), "data_parallel_size": 2},
            "--sample 31: with 8 at once on 2 replicas there is no plateau below 32; raise it, or lower --batch-sizes",
        ),
    ],
)
def test_a_sample_that_cannot_be_is_one_line_before_anything_is_planned(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    config = replace(written(tmp_path, *[one(3, 4)] * 1000), **changes)
    with pytest.raises(ConfigError) as caught:
        read_job(config, print)
    assert str(caught.value) == said.replace("job.jsonl", str(config.prompts_file))


@pytest.mark.parametrize(
    "changes", [{"sample": 16, "batch_sizes": (8,)}, {"sample": 1000, "batch_sizes": (800,)}, {"sample": 1000}]
)
def test_a_sample_may_be_as_small_as_two_lives_and_as_large_as_the_job(changes: dict[str, Any], tmp_path: Path) -> None:
    read_job(replace(written(tmp_path, *[one(3, 4)] * 1000), **changes), print)
    assert job_of(**changes).sample_size(8) == changes["sample"]


# --- which ------------------------------------------------------------------------------------------------------------


def test_every_point_takes_the_beginning_of_one_permutation() -> None:
    job = job_of(batch_sizes=(4, 16))
    # The larger one first: what was drawn for it is cut.
    large, small = (Counter(asked(job, batch_size)[0]) for batch_size in (16, 4))
    assert small <= large
    assert (small.total(), large.total()) == (48, 192)
    # And another sweep of the same seed draws the same, whichever point comes first.
    again = job_of(batch_sizes=(4, 16))
    assert [Counter(asked(again, batch_size)[0]) for batch_size in (4, 16)] == [small, large]
    assert Counter(asked(job_of(seed=1), 4)[0]) != small


def test_a_sample_of_everything_is_every_request_once() -> None:
    prompts, outputs = lengths(1000)
    assert asked(job_of(sample=1000), 4) == [list(zip(prompts, outputs, strict=True))]


@pytest.mark.parametrize("order", ["given", "shuffled", "longest-first", "shortest-first"])
def test_the_order_of_the_queue_is_the_one_asked_for(order: str) -> None:
    (queue,) = asked(job_of(order=order), 4)
    (given,) = asked(job_of(), 4)
    assert Counter(queue) == Counter(given)
    outputs = [tokens for _, tokens in queue]
    assert (outputs == sorted(outputs)) == (order == "shortest-first")
    assert (outputs == sorted(outputs, reverse=True)) == (order == "longest-first")
    assert (queue == given) == (order == "given")


def test_given_is_the_order_of_the_file() -> None:
    places = {pair: number for number, pair in enumerate(zip(*lengths(1000), strict=True))}
    numbers = [places[pair] for pair in asked(job_of(), 4)[0]]
    assert numbers == sorted(numbers)


def test_replicas_share_a_queue_out_by_tokens() -> None:
    job = job_of(data_parallel_size=3)
    shares = asked(job, 16)
    assert len(shares) == 3
    tokens = [sum(prompt + output for prompt, output in share) for share in shares]
    assert max(tokens) - min(tokens) <= 700  # the longest request
    # Together they run what one would.
    one = job_of(sample=job.sample_size(16), batch_sizes=(4,))
    assert Counter(request for share in shares for request in share) == Counter(asked(one, 16)[0])


def test_a_replica_may_have_nothing_to_do() -> None:
    assert [len(share) for share in asked(job_of(2, data_parallel_size=3), 4)] == [1, 1, 0]


def test_a_warm_up_runs_the_first_requests_of_the_sample() -> None:
    job = job_of()
    (few,), (all_,) = asked(job, 4, requests=8), asked(job, 4)
    assert len(few) == 8
    assert Counter(few) < Counter(all_)
    # Never more than the point itself.
    assert len(asked(job, 1, requests=900)[0]) == FEWEST_REQUESTS


def test_ids_of_texts_go_with_their_lengths_whatever_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, outputs = lengths(40)
    wanted: list[list[int]] = []

    def ids_of(_workload: Any, _config: Any, indices: list[int]) -> list[list[int] | None]:
        wanted.append(list(indices))
        return [None if index % 2 else [index] * prompts[index] for index in indices]

    monkeypatch.setattr(job_module, "ids_of", ids_of)
    job = job_of(40, order="longest-first", data_parallel_size=2)
    shares = job.shares(key_of(job))
    for share in shares:
        for one in share:
            if isinstance(one.prompt, list):
                assert (len(one.prompt), one.max_tokens) == (prompts[one.prompt[0]], outputs[one.prompt[0]])
    assert sum(isinstance(one.prompt, list) for share in shares for one in share) == 20
    # They are asked for in one go.
    assert len(wanted) == 1
    assert isinstance(shares[0][0], Asked)


def test_of_the_models_own_end_every_request_may_take_as_much() -> None:
    job = job_of(output_lengths="eos", max_tokens=77)
    # The file's own lengths say nothing then: `read_job` has put the limit in their place.
    prompts, _ = lengths(1000)
    job = JobFile(job.config, JobLengths(Workload(Path("x")), prompts, [77] * 1000, None))
    assert {tokens for share in job.shares(key_of(job)) for tokens in (one.max_tokens for one in share)} == {77}
    assert job.described().output_tokens is None
    assert job.described().output_lens is None
    assert job.described().outputs is None
    assert job.sample(4).outputs is None
    assert job.sample(4).output_difference is None


# --- what the file says of it -----------------------------------------------------------------------------------------


def test_a_job_is_described_by_its_lengths_alone() -> None:
    prompts, outputs = lengths(1000)
    job = job_of(left_out="3 bad lines")
    told = job.described()
    assert (told.content_hash, told.output_lengths, told.requests) == ("abc", "file", 1000)
    assert (told.prompt_tokens, told.output_tokens) == (sum(prompts), sum(outputs))
    assert told.longest == max(map(sum, zip(prompts, outputs, strict=True)))
    assert (told.prompt_lens, told.output_lens) == (prompts, outputs)
    assert (told.every, told.last) == (1, 1000)
    assert told.outputs is not None
    assert (told.prompts.mean, told.outputs.longest) == (sum(prompts) / 1000, max(outputs))
    assert told.left_out == "3 bad lines"


def test_of_a_long_job_every_so_manieth_and_all_of_the_end_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "_BULK", 100)
    monkeypatch.setattr(job_module, "_LAST", 50)
    prompts, _ = lengths(1000)
    told = job_of().described()
    # 950 are thinned to 95, which are 100 at most.
    assert (told.every, told.last) == (10, 50)
    assert told.prompt_lens == [*prompts[:950:10], *prompts[950:]]
    assert told.requests == 1000
    assert told.prompt_tokens == sum(prompts)


def test_how_well_a_sample_stands_for_the_job_is_told() -> None:
    job = job_of(sample=1000)
    whole = job.sample(4)
    assert (whole.prompts, whole.outputs) == (job.described().prompts, job.described().outputs)
    assert whole.output_difference is not None
    assert (whole.prompt_difference.distance, whole.output_difference.relative_mean) == (0.0, 0.0)
    part = job_of().sample(4)
    assert part.prompts.requests == 48
    assert 0 < part.prompt_difference.distance < 0.2


# --- read -------------------------------------------------------------------------------------------------------------


def written(folder: Path, *lines: Any) -> ExperimentConfig:
    path = folder / "job.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return ExperimentConfig(prompts_file=str(path))


def one(prompt: int, output: int | None = None) -> dict[str, int]:
    return {"prompt_tokens": prompt, **({"output_tokens": output} if output else {})}


def test_what_a_file_says_becomes_the_longest_request_and_a_name_of_its_content(tmp_path: Path) -> None:
    config, found = read_job(written(tmp_path, one(7, 5), one(3, 8), one(9, 1)), print)
    assert (list(found.prompt_tokens), list(found.output_tokens)) == ([7, 3, 9], [5, 8, 1])
    assert (config.workload_longest, config.longest_request, config.lengths) == (12, 12, (12,))
    assert found.left_out is None
    again, _ = read_job(written(tmp_path, one(7, 5), one(3, 8), one(9, 1)), print)
    other, _ = read_job(written(tmp_path, one(7, 5), one(3, 8), one(9, 2)), print)
    assert config.workload_hash == again.workload_hash != other.workload_hash
    assert config.workload_hash


@pytest.mark.parametrize(
    ("asked_for", "outputs"),
    [({"output_lengths": 20}, [20, 20]), ({"output_lengths": "eos", "max_tokens": 30}, [30, 30])],
)
def test_lengths_of_outputs_may_be_others_than_the_files(
    asked_for: dict[str, Any], outputs: list[int], tmp_path: Path
) -> None:
    config, found = read_job(replace(written(tmp_path, one(7, 5), one(9)), **asked_for), print)
    assert list(found.output_tokens) == outputs
    assert config.workload_longest == 9 + outputs[0]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([one(1, 1), one(2), one(3)], "2 requests of 3 have no output length (first: request 2)"),
        ([one(1, 1), one(2)], "1 request of 2 has no output length (first: request 2)"),
    ],
)
def test_a_file_that_does_not_say_how_long_outputs_are_is_told_what_to_do(
    lines: list[Any], said: str, tmp_path: Path
) -> None:
    config = written(tmp_path, *lines)
    with pytest.raises(ConfigError) as caught:
        read_job(config, print)
    assert str(caught.value) == f"--prompts-file {config.prompts_file}: {said}; give --output-lengths N, or eos"


def test_a_request_that_is_longer_than_asked_for_is_refused(tmp_path: Path) -> None:
    config = written(tmp_path, one(7, 5), one(50, 50))
    with pytest.raises(ConfigError) as caught:
        read_job(replace(config, max_model_len=99), print)
    assert str(caught.value) == (
        f"--prompts-file {config.prompts_file}: its longest request takes 100 tokens, more than --max-model-len 99; "
        "raise it or shorten the requests"
    )
    for allowed in (100, -1, None):
        assert read_job(replace(config, max_model_len=allowed), print)[0].workload_longest == 100


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    config = written(tmp_path, one(7, 5), {"prompt_tokens": 0}, one(3, 8))
    with pytest.raises(
        ConfigError, match=r"job\.jsonl, line 2: its prompt_tokens '0' is not a number of tokens from 1"
    ):
        read_job(config, print)
    read, found = read_job(replace(config, skip_bad_lines=True), print)
    assert list(found.prompt_tokens) == [7, 3]
    assert found.left_out == f"--prompts-file {config.prompts_file}: left out: 1 bad line"
    assert read.workload_longest == 12
