"""Everything that result files answer, worked out once: what report, page, exports and plots show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from batch_inference.analyze.compare import SetComparison, asked_points, compare_sets, side_by_side, with_scaling
from batch_inference.analyze.decide import Choice, Limits, choices, with_cost, with_pareto
from batch_inference.analyze.jobs import JobAnswer, JobError, JobQuestion, job_answers
from batch_inference.analyze.tables import (
    GROUP_BY,
    MeasuredSetting,
    batch_points,
    differing,
    groups,
    point_table,
    setting_labels,
)
from batch_inference.analyze.wording import column_words, value_words
from batch_inference.core.text import in_short


class QuestionError(Exception):
    """The files cannot answer what is asked: the message names the flag, the value found, and what to do."""


@dataclass(frozen=True)
class Question:
    """What is asked of the files."""

    limits: Limits = field(default_factory=Limits)
    price: float | None = None  # of a device for an hour
    baseline: str | None = None
    group_by: tuple[str, ...] | None = None
    allow_mixed: bool = False
    job: JobQuestion = field(default_factory=JobQuestion)


@dataclass(frozen=True)
class Group:
    """Points that are alike, and what they answer."""

    number: int
    name: str  # `group 2: dtype float16`, by what tells it from the others; empty where there is only one
    points: pd.DataFrame
    mixed: list[str]  # columns of GROUP_BY that are not alike, because the user allows it
    choices: list[Choice]
    layouts: pd.DataFrame  # compare.side_by_side

    def titled(self, title: str) -> str:
        """The title of what shows this group alone."""
        of_group = f" of {self.name}" if self.name else ""
        return f"{title}{of_group}{mixed_mark(self.mixed)}"


def mixed_mark(columns: Sequence[str]) -> str:
    """What every title that ranks unlike things together ends with; empty for like ones."""
    return f" [MIXED: {', '.join(map(column_words, columns))}]" if columns else ""


@dataclass(frozen=True)
class Analysis:
    settings: Sequence[MeasuredSetting]
    points: pd.DataFrame  # batch points
    rows: pd.DataFrame  # all points
    groups: list[Group]
    unlike: list[str]  # the columns that tell the groups apart
    question: Question
    comparison: SetComparison | None = None
    notes: Sequence[str] = ()  # which files do not count, and why
    jobs: Sequence[JobAnswer] = ()


def analyse(
    settings: Sequence[MeasuredSetting],
    question: Question,
    earlier: Sequence[MeasuredSetting] | None = None,
    notes: Sequence[str] = (),
) -> Analysis:
    """Raises QuestionError where a name in the question is none of the files'."""
    group_by = _group_by(question)
    try:
        rows = point_table(settings, group_by)
    except KeyError as error:
        name = in_short(error.args[0])
        raise QuestionError(f"--group-by {name}: no such column; results.csv has their names") from error
    points = batch_points(rows)
    _check_mixed(points, question)
    _check_baseline(rows if points.empty else points, question)
    points = with_pareto(with_cost(with_scaling(points, question.baseline), question.price))
    unlike = differing(points, list(group_by))
    found = [_group(number, alike, unlike, question.limits) for number, alike in groups(points)]
    comparison = None
    if earlier is not None:
        before = point_table(earlier)
        comparison = compare_sets(points, batch_points(before), asked_points(settings))
        if before["workload"].notna().any():
            notes = [*notes, "--compare: points of a workload are not compared with earlier ones, only batches"]
    rows = pd.concat([points, rows[rows["workload"].notna()]]) if len(rows) > len(points) else points
    return Analysis(settings, points, rows, found, unlike, question, comparison, notes, _jobs(settings, question))


def _jobs(settings: Sequence[MeasuredSetting], question: Question) -> list[JobAnswer]:
    names = setting_labels(settings)
    try:
        return job_answers(settings, lambda setting: names[setting.path], question.job)
    except JobError as error:
        raise QuestionError(str(error)) from error


def _group_by(question: Question) -> tuple[str, ...]:
    if question.group_by is not None:
        return question.group_by
    return () if question.allow_mixed else GROUP_BY


def _check_mixed(points: pd.DataFrame, question: Question) -> None:
    if question.allow_mixed or question.group_by is None:
        return
    for _, alike in groups(points):
        if mixed := differing(alike, GROUP_BY):
            raise QuestionError(
                f"--group-by {','.join(question.group_by)}: points that differ in {', '.join(mixed)} would be ranked "
                "together; name these columns too, or add --allow-mixed"
            )


def _check_baseline(points: pd.DataFrame, question: Question) -> None:
    names = list(map(str, points["setting"].unique()))
    if question.baseline is not None and question.baseline not in names:
        asked, there = in_short(question.baseline), ", ".join(map(in_short, names[:10]))
        raise QuestionError(f"--baseline {asked}: no such setting; choose one of {there}")


def _group(number: int, points: pd.DataFrame, unlike: Sequence[str], limits: Limits) -> Group:
    return Group(
        number=number,
        name=f"group {number}: {values_of(points, unlike)}" if unlike else "",
        points=points,
        mixed=differing(points, GROUP_BY),
        choices=list(choices(points, limits)),
        layouts=side_by_side(points),
    )


def values_of(points: pd.DataFrame, columns: Sequence[str]) -> str:
    """The values of a group; it has one for each of these columns."""
    first = points.iloc[0]
    return ", ".join(value_words(name, first[name]) for name in columns)
