"""Which point of an analysis is written to be used: one of a job where there is a job, else one of a grid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from batch_inference.analyze.answers import Analysis, Group
from batch_inference.analyze.decide import COST, GOALS, Choice, Goal
from batch_inference.analyze.job_sections import requests_words
from batch_inference.analyze.jobs import JobAnswer, JobRow
from batch_inference.analyze.tables import MeasuredSetting
from batch_inference.core.config import Workload
from batch_inference.core.results import Point

# As --goal has it.
_GOALS = {goal.name.replace(" ", "-"): goal for goal in GOALS}


@dataclass(frozen=True)
class Winner:
    """One measured point: of which file, why it, and what is to be known of the choice."""

    setting: MeasuredSetting
    name: str  # as the report calls the setting
    batch_size: int
    tokens_per_step: int | None
    seq_len: int | None = None  # None for one of a job
    max_tokens: int | None = None  # of a job, where the model itself ends
    workload: Workload | None = None
    why: str = ""
    is_suspect: bool = False
    replicas: int | None = None  # that a deadline needs
    notes: tuple[str, ...] = ()

    def is_of(self, point: Point) -> bool:
        """Whether a point of the setting's file is this one."""
        return point.shape == (self.batch_size, self.seq_len, self.max_tokens, self.workload, self.tokens_per_step)


def winner(analysis: Analysis, goal_word: str) -> Winner | None:
    """The best by that goal; None where no point is measured, believable and within the limits."""
    goal = _GOALS[goal_word]
    found = _of_jobs(analysis, goal) if goal.better == "higher" or goal.column == COST else None
    return found or _of_groups(analysis, goal)


# --- jobs ---------------------------------------------------------------------------------------------------------


def _of_jobs(analysis: Analysis, goal: Goal) -> Winner | None:
    """Of several jobs that with the most points; what a deadline needs goes before the goal."""
    answer = max(analysis.jobs, key=lambda one: len(one.rows), default=None)
    if answer is None or answer.best is None or answer.cheapest is None:
        return None
    deadline = answer.deadline
    is_throughput = goal == GOALS[0]
    row = deadline.row if deadline else answer.best if is_throughput else answer.cheapest
    why = "the fewest devices for the deadline" if deadline else "the fastest" if is_throughput else ""
    return _of_row(analysis, answer, row, why or "the fewest device-hours", deadline.replicas if deadline else None)


def _of_row(analysis: Analysis, answer: JobAnswer, row: JobRow, why: str, replicas: int | None) -> Winner:
    point = row.point
    setting = next(one for one in analysis.settings if any(queue is point for queue in one.queues))
    return Winner(
        setting, row.setting, point.batch_size, point.tokens_per_step,
        max_tokens=point.max_tokens, workload=point.workload.as_tuple(),
        why=f"{why}, for the job of {requests_words(answer)}",
        is_suspect=point.verdict == "suspect", replicas=replicas,
        notes=tuple(_notes_of_job(analysis, point.workload.order)),
    )  # fmt: skip


def _notes_of_job(analysis: Analysis, order: str) -> Iterator[str]:
    if len(analysis.jobs) > 1:
        yield f"There are {len(analysis.jobs)} jobs; this is the winner of the one with the most points."
    if order != "given":
        yield f"It was measured with the requests {order}; give yours in that order."


# --- grids --------------------------------------------------------------------------------------------------------


def _of_groups(analysis: Analysis, goal: Goal) -> Winner | None:
    """Of several groups that with the most points, because unlike things have no common winner."""
    for group in sorted(analysis.groups, key=lambda one: (-len(one.points), one.number)):
        choices = [choice for choice in group.choices if choice.goal == goal and choice.best is not None]
        if choices:
            return _of_choices(analysis, group, choices)
    return None


def _of_choices(analysis: Analysis, group: Group, choices: Sequence[Choice]) -> Winner | None:
    """That of the longest prompts: what fits them fits shorter ones."""
    choice = max(choices, key=lambda one: one.seq_len)
    best = choice.best or {}
    rows = group.points
    for name in ("setting", "batch_size", "seq_len", "max_tokens"):
        rows = rows[rows[name].isna() if pd.isna(best[name]) else rows[name] == best[name]]
    row = rows.iloc[0]
    limits = str(analysis.question.limits)
    return Winner(
        next(one for one in analysis.settings if one.file == row["file"]), str(best["setting"]),
        int(best["batch_size"]), _known(row["tokens_per_step"]), int(best["seq_len"]), _known(best["max_tokens"]),
        why=f"best {choice.goal.name} at length {choice.seq_len}" + (f" with {limits}" if limits else ""),
        is_suspect=best["verdict"] == "suspect", notes=tuple(_notes(analysis, group, choices, choice)),
    )  # fmt: skip


def _known(value: Any) -> int | None:
    return None if pd.isna(value) else int(value)


def _notes(analysis: Analysis, group: Group, choices: Sequence[Choice], chosen: Choice) -> Iterator[str]:
    if len(analysis.groups) > 1:
        most = "one of those with the most points" if _has_equals(group, analysis) else "which has the most points"
        yield (
            f"There are {len(analysis.groups)} groups; this is the winner of {group.name}, {most}. "
            "Choose another with --model or --setting."
        )
    others = [
        f"{choice.best['setting']} at batch {choice.best['batch_size']} for length {choice.seq_len}"
        for choice in choices
        if choice.best and chosen.best and _place(choice.best) != _place(chosen.best)
    ]
    if others:
        yield f"Other lengths have other winners: {', '.join(others)}."


def _has_equals(group: Group, analysis: Analysis) -> bool:
    return sum(len(other.points) == len(group.points) for other in analysis.groups) > 1


def _place(best: Mapping[object, object]) -> tuple[object, object]:
    return best["setting"], best["batch_size"]
