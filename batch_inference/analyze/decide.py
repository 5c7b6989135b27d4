"""Which setting and batch size to take: limits, goals, winners and their ties, cost, and the Pareto front."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from batch_inference.analyze.compare import PLACE, halves, overlapping, simplicity
from batch_inference.analyze.front import Measured, is_on_front
from batch_inference.analyze.tables import believable, half_width, percentile_column
from batch_inference.core.metrics import METRIC_BY_NAME, Better
from batch_inference.core.text import short

Record = dict[Hashable, Any]

COST = "cost_per_million_output_tokens"


@dataclass(frozen=True)
class Goal:
    """What is asked for: the column that decides, its unit, and which direction is better."""

    name: str
    column: str
    unit: str
    better: Better


def _goal(name: str, column: str) -> Goal:
    metric = METRIC_BY_NAME[column]
    return Goal(name, column, metric.unit, metric.better or "higher")


GOALS = (
    _goal("throughput", "output_tok_per_s"),
    _goal("per device", "output_tok_per_s_per_device"),
    _goal("latency", "latency_mean_s"),
    Goal("cost", COST, "per M tokens", "lower"),  # where a price is given
)


@dataclass(frozen=True)
class Limits:
    """What a choice must keep, in seconds, at percentile `percent`; None is no limit."""

    latency_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    percent: float = 99

    def columns(self) -> dict[str, float]:
        """Column of the table -> the most it may be."""
        limits = {"latency": self.latency_s, "ttft": self.ttft_s, "tpot": self.tpot_s}
        return {percentile_column(name, self.percent): most for name, most in limits.items() if most is not None}

    def __str__(self) -> str:
        return ", ".join(
            f"{words} ≤ {most:g} s" for words, most in zip(self._words(), self.columns().values(), strict=True)
        )

    def said_of(self, row: Record) -> str:
        """The numbers of a point that are limited."""
        return ", ".join(
            f"{words} {short(row[name])} s" for words, name in zip(self._words(), self.columns(), strict=True)
        )

    def _words(self) -> list[str]:
        words = {"latency": self.latency_s, "TTFT": self.ttft_s, "TPOT": self.tpot_s}
        return [f"{name} p{self.percent:g}" for name, most in words.items() if most is not None]


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Choice:
    """The best point for a goal at a prompt length, and of every other setting whose interval overlaps that of the
    highest, its own best: `best` is one of them, and `ties` are the others.

    `best` is None where no point keeps the limits; `nearest` is then the one that misses them by least.
    """

    seq_len: int
    goal: Goal
    best: Record | None
    ties: list[Record] = field(default_factory=list)
    nearest: Record | None = None


# What a choice tells of a point, beside the numbers that were asked for.
_RECORD = (*PLACE, "latency_mean_s", "latency_ci95_s", "engine_args")


def choices(points: pd.DataFrame, limits: Limits = NO_LIMITS) -> Iterator[Choice]:
    """Per prompt length and goal of one group; nothing for a length without a believable point."""
    goals = [goal for goal in GOALS if goal.column in points]
    # A table of a hundred columns is slow to sort.
    columns = dict.fromkeys([*_RECORD, *(goal.column for goal in goals), *limits.columns()])
    for length, here in believable(points)[list(columns)].groupby("seq_len"):
        seq_len = int(str(length))
        allowed = here[keeps(here, limits)]
        if allowed.empty:
            yield Choice(seq_len, goals[0], None, nearest=_nearest(here, limits))
            continue
        for goal in goals:
            # The cost is that of the throughput per device, and so are its best point and its ties.
            by = GOALS[1] if goal.column == COST else goal
            values = allowed[by.column].dropna().sort_values(ascending=by.better == "lower", kind="stable")
            # The best point of each setting stands for it.
            ranked = allowed.loc[allowed.loc[values.index, "setting"].drop_duplicates().index]
            if not ranked.empty:
                yield Choice(seq_len, goal, *_best_and_ties(ranked, by))


def _best_and_ties(ranked: pd.DataFrame, goal: Goal) -> tuple[Record, list[Record]]:
    """Ties are all whose interval overlaps that of the highest. The best is the simplest within the interval of the
    highest: so it is not lower by more than chance makes it."""
    highest: Record = ranked.iloc[0].to_dict()
    half = half_width(highest, goal.column) or 0.0
    as_good = overlapping(ranked[goal.column], halves(ranked, goal.column), highest[goal.column], half)
    as_good.iloc[0] = True
    records: list[Record] = sorted(ranked[as_good].to_dict("records"), key=_simplicity)
    best = next(row for row in records if abs(row[goal.column] - highest[goal.column]) <= half)
    return best, [row for row in records if row is not best]


# What decides between settings that the measurement cannot tell apart, in the order of `_simplicity`.
_WHY_SIMPLER = ("is not suspect", "has fewer devices", "has fewer kinds of parallelism", "has fewer flags of vLLM's")


def why_before_better(choice: Choice) -> tuple[Record, str] | None:
    """The best of the ties, where its number is better than that of the winner, and why it is not the winner."""
    if choice.best is None or not choice.ties:
        return None
    column, sign = choice.goal.column, 1 if choice.goal.better == "higher" else -1
    highest = max(choice.ties, key=lambda row: sign * row[column])
    if sign * highest[column] <= sign * choice.best[column]:
        return None
    pairs = zip(_simplicity(choice.best), _simplicity(highest), _WHY_SIMPLER, strict=True)
    return highest, next(why for mine, other, why in pairs if mine < other)


def _simplicity(row: Record) -> tuple[int, ...]:
    """What the measurement cannot tell apart, the effort of running it can: fewest devices, fewest kinds of
    parallelism, fewest flags of vLLM's. But one to rely on goes before a suspect one."""
    flags = row["engine_args"]
    is_suspect = row["verdict"] == "suspect"
    return (is_suspect, int(row["num_devices"]), simplicity(row), 0 if pd.isna(flags) else len(str(flags).split()))


def keeps(points: pd.DataFrame, limits: Limits) -> pd.Series[bool]:
    """Which points keep all limits; an unknown number keeps none."""
    kept = pd.Series(True, index=points.index)
    for name, most in limits.columns().items():
        kept &= points[name].astype(float) <= most
    return kept


def _nearest(points: pd.DataFrame, limits: Limits) -> Record | None:
    excess = pd.DataFrame({name: points[name].astype(float) / most for name, most in limits.columns().items()})
    worst = excess.max(axis=1, skipna=False).to_numpy()
    known = points[~pd.isna(worst)]
    return None if known.empty else known.iloc[int(worst[~pd.isna(worst)].argmin())].to_dict()


def with_cost(table: pd.DataFrame, price: float | None) -> pd.DataFrame:
    """Adds the cost of a million output tokens, in the currency of `price`, which is that of a device for an hour."""
    if price is None:
        return table
    per_s = price * table["num_devices"].astype(float) / 3600
    return table.assign(**{COST: per_s / table["output_tok_per_s"] * 1e6})


def with_pareto(table: pd.DataFrame) -> pd.DataFrame:
    """Adds `pareto`: no other point of the group and length is better in latency or in throughput per device beyond
    both intervals, and in the other not worse beyond them."""
    latency, throughput = "latency_mean_s", "output_tok_per_s_per_device"
    points = believable(table).dropna(subset=[latency, throughput])
    columns = points[latency], points["latency_ci95_s"], points[throughput], halves(points, throughput)
    numbers = np.array([column.fillna(0.0).to_numpy(dtype=float) for column in columns])
    front = np.zeros(len(points), dtype=bool)
    for places in points.groupby(["group", "seq_len"]).indices.values():
        front[places] = is_on_front(Measured(*numbers[:, places]))
    return table.assign(pareto=table.index.isin(points.index[front]))
