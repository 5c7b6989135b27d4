"""`--compare-answers`: what is kept of answers, how they are asked, and what is said of them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_experiment import FakeReplicas, run
from test_report import flat, read

from batch_inference.analyze.answers import Question, analyse
from batch_inference.analyze.headline import headline
from batch_inference.analyze.report import sections_of
from batch_inference.analyze.terminal import as_text
from batch_inference.core.answers import (
    REQUESTS,
    beginnings,
    between_replicas,
    differences,
    first_difference,
    lengths_for,
    of_itself,
)
from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.flags import parse_flags
from batch_inference.core.result_file import load_result
from batch_inference.core.results import Answers, Result
from batch_inference.measure.engine_process import ReplicaError
from batch_inference.measure.messages import Answer, Answered
from builders import make_point, make_result

ANSWER = list(range(100, 132))


@pytest.fixture
def config(tmp_path: Path) -> ExperimentConfig:
    return ExperimentConfig(
        batch_sizes=(1, 4), seq_lens=(64,), max_tokens=32, num_runs=1, output_file=f"{tmp_path}/x.json",
        compare_answers=True,
    )  # fmt: skip


class Answering(FakeReplicas):
    """Whose answers are made by `answers(replica)`: of all at once, and in two halves."""

    def __init__(self, *words: Any, **named: Any) -> None:
        super().__init__(*words, **named)
        self.asked: list[Answer] = []

    def answer(self, asked: Answer) -> list[Answered]:
        self.asked.append(asked)
        answers = [[number] * asked.max_tokens for number in range(asked.requests)]
        otherwise = [[0] * asked.max_tokens, *answers[1:]]
        return [Answered(answers, otherwise), *[Answered(otherwise, otherwise)] * (self.replicas - 1)]


# --- what is kept of an answer ----------------------------------------------------------------------------------------


def test_answers_are_alike_up_to_the_first_token_that_differs() -> None:
    draw = random.Random(0)
    for _ in range(200):
        place = draw.randrange(len(ANSWER))
        other = [*ANSWER[:place], ANSWER[place] + 1, *ANSWER[place + 1 :]]
        assert first_difference(beginnings(ANSWER), beginnings(other)) == place + 1
    assert first_difference(beginnings(ANSWER), beginnings(list(ANSWER))) is None


def test_no_token_is_in_what_is_kept() -> None:
    """Equal tokens at other places, or after other ones, look otherwise."""
    kept = beginnings([7, 7, 7])
    assert len(kept) == 3 * 4
    assert len({kept[:4], kept[4:8], kept[8:]}) == 3


@pytest.mark.parametrize(("longest", "lengths"), [(640, (64, 32)), (96, (64, 32)), (40, (20, 20)), (3, (2, 1))])
def test_what_is_asked_fits_into_the_engine(longest: int, lengths: tuple[int, int]) -> None:
    assert lengths_for(longest) == lengths
    assert sum(lengths) <= longest


# --- asking -----------------------------------------------------------------------------------------------------------


def test_every_engine_is_asked_after_its_points_and_once(config: ExperimentConfig) -> None:
    replicas = Answering(replicas=2)
    result = run(dataclasses.replace(config, data_parallel_size=2), replicas)
    assert replicas.asked == [Answer(REQUESTS, 64, 32, [0, "answers"])]
    assert replicas.calls[-1] == (4, "run", 0)
    answers = load_result(config.output_path).answers
    assert answers == result.answers
    assert answers is not None
    assert (len(answers.first), of_itself(answers).firsts) == (REQUESTS, [])  # its first answer was 0 anyway
    assert [found.count for found in between_replicas(answers)] == [0]

    again = Answering(replicas=2)
    run(dataclasses.replace(config, data_parallel_size=2), again)
    assert (again.asked, again.starts) == ([], 0)
    # Of a grid that leaves less room the question is another one.
    other = Answering(replicas=2)
    run(dataclasses.replace(config, data_parallel_size=2, seq_lens=(8,)), other)
    assert other.asked == [Answer(REQUESTS, 20, 20, [0, "answers"])]


def test_points_that_were_measured_before_are_kept_and_the_engine_is_asked(config: ExperimentConfig) -> None:
    run(dataclasses.replace(config, compare_answers=False), FakeReplicas())
    replicas = Answering()
    result = run(config, replicas)
    assert (replicas.calls, len(replicas.asked)) == ([], 1)
    assert [point.status for point in result.points] == ["ok", "ok"]


def test_nothing_that_was_measured_is_lost_where_the_engine_does_not_answer(
    config: ExperimentConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    class Silent(Answering):
        def answer(self, _asked: Answer) -> list[Answered]:
            raise ReplicaError("no answer within --point-timeout 600 s", [])

    result = run(config, Silent())
    assert (result.status, result.answers) == ("complete", None)
    assert [point.status for point in load_result(config.output_path).points] == ["ok", "ok"]
    assert "warning: --compare-answers: the engine did not answer: no answer within" in capsys.readouterr().err


def test_dummy_weights_have_no_answers_to_compare() -> None:
    with pytest.raises(ConfigError, match="--compare-answers: --load-format dummy gives each device other weights"):
        parse_flags(["--compare-answers", "--load-format", "dummy"])


# --- what is said -----------------------------------------------------------------------------------------------------


def answers_of(seed: int, changed: dict[int, int], again: dict[int, int] | None = None, **more: Any) -> Answers:
    """`changed`: number of a request -> the token from which on its answer is another one."""
    return Answers(seed, 64, 32, told(changed), told(again or {}), **more)


def told(changed: dict[int, int]) -> list[str]:
    answers = [[1000 * number + place for place in range(32)] for number in range(REQUESTS)]
    for number, first in changed.items():
        answers[number][first - 1 :] = [9] * (33 - first)
    return list(map(beginnings, answers))


def report_of(tmp_path: Path, *results: Result) -> str:
    analysis = analyse(read(results, tmp_path), Question())
    return flat(as_text(sections_of(analysis), headline(analysis)))


def settings(*of_each: Answers | None) -> list[Result]:
    sizes: Sequence[tuple[int, int, int]] = [(1, 1, 1), (2, 1, 1), (4, 1, 1)]
    made = [make_result(f"tp_{tp}", [make_point()], (tp, pp, dp)) for tp, pp, dp in sizes]
    for result, answers in zip(made, of_each, strict=False):
        result.answers = answers
    return made[: len(of_each)]


def test_settings_are_compared_with_the_smallest_one_and_that_with_itself(tmp_path: Path) -> None:
    text = report_of(
        tmp_path, *settings(answers_of(0, {}, {3: 20}), answers_of(0, {1: 9, 5: 30}), answers_of(0, {2: 4}))
    )
    assert "Same answers?" in text
    assert "tp_1 itself, in two halves 32 1 20 20" in text
    assert "tp_2 tp_1 32 2 9 19.5" in text
    assert "tp_4 tp_1 32 1 4 4" in text
    assert (
        "tp_2 answers 2 of 32 requests differently from tp_1. Asked again in two halves, tp_1 answers 1 differently "
        "from itself. The usual reason is rounding, which depends on the layout."
    ) in text
    # As many as TP=1 with itself are no news.
    assert "tp_4 answers" not in text


def test_a_setting_with_other_weights_is_found(tmp_path: Path) -> None:
    text = report_of(tmp_path, *settings(answers_of(0, {}), answers_of(0, dict.fromkeys(range(30), 1))))
    assert (
        "tp_2 does not seem to run the same model as tp_1: 30 of 32 answers differ, most of them from the first tokens"
        in text
    )
    assert "Do not use tp_2 yet: most answers look like those of another model; see “Same answers?”." in text
    assert "rounding" not in text
    # Many that differ late are rounding.
    late = report_of(tmp_path / "late", *settings(answers_of(0, {}), answers_of(0, dict.fromkeys(range(30), 12))))
    assert "is not the model" not in late


def test_a_replica_with_other_weights_is_found(tmp_path: Path) -> None:
    wrong = told(dict.fromkeys(range(32), 1))
    text = report_of(tmp_path, *settings(answers_of(0, {}), answers_of(0, {}, other_replicas=[told({}), wrong])))
    assert "tp_2, its replica 2, does not seem to run the same model as replica 0" in text
    assert "tp_2 its replica 1 32 0" in text


def test_only_answers_to_the_same_are_compared(tmp_path: Path) -> None:
    text = report_of(tmp_path, *settings(answers_of(0, {}), answers_of(1, {1: 1}), None))
    assert "tp_2 tp_1" not in text
    assert text.count("itself, in two halves") == 2
    assert "Same answers?" not in report_of(tmp_path / "none", *settings(None, None))


def test_as_many_answers_as_were_asked_are_compared() -> None:
    with pytest.raises(ValueError, match="zip"):
        differences(told({}), told({})[1:])
