"""What each question's section says: the decision, TP against PP against DP, scaling, the front, two sets compared."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from batch_inference.analyze.answers import Analysis, Group, mixed_mark
from batch_inference.analyze.compare import SetComparison, baseline_of
from batch_inference.analyze.decide import COST, Choice, why_before_better
from batch_inference.analyze.tables import GROUP_BY, believable, half_width
from batch_inference.analyze.wording import (
    FRONT_TITLE,
    SUSPECT_LINE,
    column_words,
    few,
    known,
    metric_text,
    suspect_mark,
    with_interval,
)
from batch_inference.core.text import counted, short

# A table has as many rows at most; results.csv and summary.json have them all.
ROW_LIMIT = 500
# Where a title goes on with more than its topic.
_SHORT_TITLE = re.compile(r":| of group | against | \[|, (?:length|output) ")


@dataclass(frozen=True)
class Section:
    """A heading, then pairs (name, value), a table, lines, and commands; each of them may be empty."""

    title: str
    pairs: list[tuple[str, str]] = field(default_factory=list)
    header: tuple[str, ...] = ()
    rows: list[list[str]] = field(default_factory=list)
    numbers: frozenset[str] = frozenset()  # columns set to the right
    lines: list[str] = field(default_factory=list)
    more: int = 0  # rows that are left out
    commands: list[list[str]] = field(default_factory=list)  # to be copied: words, quoted where they must be
    keys: int = 1  # columns that tell what a row is of
    is_more_better: frozenset[str] = frozenset()  # columns that are best sorted from the highest down
    is_detail: bool = False  # for the report, not for the terminal

    @property
    def topic(self) -> str:
        """The title without what only the section itself needs to say."""
        return _SHORT_TITLE.split(self.title)[0]

    @property
    def link(self) -> str:
        """What a link to it is called, of several groups too."""
        _, group, number = self.title.partition(" of group ")
        return self.topic + (f" (group {number.partition(':')[0]})" if group else "")

    @property
    def rest(self) -> str:
        """The line below a table that says how many rows are left out; empty for a whole one."""
        return f"… and {counted(self.more, 'more row')}: results.csv and summary.json have all." if self.more else ""

    @property
    def alignment(self) -> list[str]:
        return ["right" if name in self.numbers else "left" for name in self.header]


# --- the decision -------------------------------------------------------------------------------------------------


def best(group: Group, analysis: Analysis) -> Section:
    limits = str(analysis.question.limits)
    found = [choice for choice in group.choices if choice.best is not None]
    rows = [_choice_row(choice, choice.best) for choice in found if choice.best is not None]
    # Of several settings the cost goes with the throughput per device, and so do its ties.
    lines = [_tie(choice) for choice in found if choice.ties and choice.goal.column != COST]
    lines += [_none_keeps(choice, analysis) for choice in group.choices if choice.best is None]
    lines += _best_notes(group, rows)
    # The value before what a narrow screen may leave out.
    header = ("length", "best", "value", "setting", "batch", "devices")
    pairs = [("limits", limits)] if limits else []
    return Section(
        group.titled("Best"),
        pairs if rows or lines else [],
        header,
        rows,
        frozenset({"length", "devices", "batch"}),
        lines,
    )


def _best_notes(group: Group, rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if (group.points["global_batch_size"] != group.points["batch_size"]).any():
        yield "batch: requests handed to each replica."
    tied = [row for choice in group.choices for row in choice.ties]
    if any(row["verdict"] == "suspect" for row in tied) or any(row[2].endswith("*") for row in rows):
        yield SUSPECT_LINE
    if any("±" in row[2] for row in rows):
        yield "±: 95 % confidence interval of the mean over the runs."
    if any(half_width(choice.best, choice.goal.column) is None for choice in group.choices if choice.best):
        yield "no ±: a single run has no interval and cannot show a tie; raise --num-runs."


def _choice_row(choice: Choice, best: Mapping[Hashable, Any]) -> list[str]:
    goal = choice.goal
    number = metric_text(best, goal.column, goal.unit)
    place = [str(best[name]) for name in ("setting", "batch_size", "num_devices")]
    return [str(choice.seq_len), goal.name, number, *place]


def _tie(choice: Choice) -> str:
    goal = choice.goal
    others = [
        f"{row['setting']} (batch {row['batch_size']}: {metric_text(row, goal.column, goal.unit)})"
        for row in choice.ties
    ]
    shown = few(others, 3, " and {} more settings: summary.json")
    return f"tie, length {choice.seq_len}, {goal.name}, as good within the intervals: {shown}{_before_better(choice)}"


def _before_better(choice: Choice) -> str:
    """A table that names a winner, and beside it a better number, has to say why."""
    found = why_before_better(choice)
    if found is None or choice.best is None:
        return ""
    better, why = found
    return f". {better['setting']} has the better number, but {choice.best['setting']} comes first: it {why}."


def _none_keeps(choice: Choice, analysis: Analysis) -> str:
    start = f"length {choice.seq_len}: no point meets the limits"
    if choice.nearest is None:
        return f"{start}; the percentiles are not known"
    numbers = analysis.question.limits.said_of(choice.nearest)
    return f"{start}; nearest: {choice.nearest['setting']} at batch {choice.nearest['batch_size']}, {numbers}"


# --- scaling, Pareto ----------------------------------------------------------------------------------------------


def scaling(group: Group) -> Section:
    """Per setting and length the largest batch that the baseline has too."""
    points = believable(group.points)
    baseline = baseline_of(points)
    replicas = points.loc[points["setting"] == baseline, "data_parallel_size"]
    points = points[points["setting"] != baseline]
    if baseline is None or points.empty:
        return Section("")
    # Strong and weak are one and the same for a setting with as many replicas as the baseline.
    weak = points[~points["data_parallel_size"].isin(replicas) & points["weak_speedup"].notna()]
    found = pd.concat(
        [_largest(points, "strong", "", "global_batch_size"), _largest(weak, "weak", "weak_", "batch_size")]
    )
    found = found.sort_values(["setting", "seq_len", "scaling"], kind="stable")
    rows = [_scaling_row(row) for row in found.head(ROW_LIMIT).to_dict("records")]
    lines = [
        "strong: at the same global batch; weak: at the same batch per replica. Each row is for the largest batch that "
        "both have; results.csv has all. An efficiency of 1 is ideal."
    ]
    if not rows:
        lines = [f"No other point has the length and batch size of a point of {baseline}."]
    header = ("setting", "devices", "length", "scaling", "batch", "speed-up", "efficiency")
    numbers = frozenset({"devices", "length", "batch", "speed-up", "efficiency"})
    title = group.titled(f"Scaling against {baseline}")
    return Section(
        title, [], header, rows, numbers, lines, len(found) - len(rows),
        is_more_better=frozenset({"speed-up", "efficiency"}), is_detail=True,
    )  # fmt: skip


def _largest(points: pd.DataFrame, scaling: str, prefix: str, batch: str) -> pd.DataFrame:
    """Per setting and length the point of the largest batch; its numbers under the names of strong scaling."""
    names = [f"{name}{end}" for name in ("speedup", "scaling_efficiency") for end in ("", "_ci95")]
    columns = {prefix + name: name for name in names} | {batch: "batch"}
    scaled = points.dropna(subset=f"{prefix}speedup").sort_values("batch_size", kind="stable")
    largest = scaled.drop_duplicates(["setting", "seq_len"], keep="last")
    return largest[["setting", "num_devices", "seq_len", *columns]].rename(columns=columns).assign(scaling=scaling)


def _scaling_row(row: Mapping[Hashable, Any]) -> list[str]:
    place = [str(row[name]) for name in ("setting", "num_devices", "seq_len", "scaling", "batch")]
    numbers = [with_interval(row[name], known(row[f"{name}_ci95"])) for name in ("speedup", "scaling_efficiency")]
    return [*place, *numbers]


def pareto(group: Group) -> Section:
    columns = ["seq_len", "setting", "batch_size", "verdict", "latency_mean_s", "latency_ci95_s",
               "output_tok_per_s_per_device"]  # fmt: skip
    front = group.points.loc[group.points["pareto"].astype(bool), columns].sort_values(
        ["seq_len", "latency_mean_s"], kind="stable"
    )
    rows = [
        [str(row["seq_len"]), str(row["setting"]), str(row["batch_size"]), metric_text(row, "latency_mean_s"),
         metric_text(row, "output_tok_per_s_per_device")]
        for row in front.head(ROW_LIMIT).to_dict("records")
    ]  # fmt: skip
    per_device = "tok/s per device"
    header = ("length", "setting", "batch", "latency s", per_device)
    title = group.titled(FRONT_TITLE)
    lines = [
        "A point is listed unless another is better beyond both intervals. Take one from the top for low latency, "
        "and from the bottom for high throughput per device.",
        *([SUSPECT_LINE] if any(cell.endswith("*") for row in rows for cell in row[3:]) else []),
    ]
    numbers = frozenset(header) - {"setting"}
    return Section(
        title, [], header, rows, numbers, lines if rows else [], len(front) - len(rows),
        is_more_better=frozenset({per_device}), is_detail=True,
    )  # fmt: skip


# --- two result sets ----------------------------------------------------------------------------------------------


_WORST_FIRST = ("lost", "worse", "maybe worse", "better", "maybe better", "unknown", "no difference")


def compared(comparison: SetComparison) -> Section:
    points = comparison.points
    pairs = [("points compared", f"{len(points)}: {counts_of_changes(points)}" if len(points) else "none")]
    ratio = points["ratio"].dropna()
    if not ratio.empty:
        mean = math.exp(ratio.map(math.log).mean())
        pairs.append(
            ("throughput, new / old", f"{mean:.4f} (geometric mean), from {ratio.min():.4f} to {ratio.max():.4f}")
        )
    pairs += [(column_words(name), f"{old} before, {new} now") for name, (old, new) in comparison.unlike.items()]
    order = {word: number for number, word in enumerate(_WORST_FIRST)}
    columns = ["setting", "seq_len", "batch_size", "old_output_tok_per_s", "output_tok_per_s", "ratio", "ratio_ci95",
               "change", "verdict"]  # fmt: skip
    ranked = points[columns].assign(_order=points["change"].map(order)).sort_values(["_order", "ratio"], kind="stable")
    rows = [_change_row(row) for row in ranked.head(ROW_LIMIT).to_dict("records")]
    header = ("setting", "length", "batch", "change", "ratio", "before tok/s", "now tok/s")
    unlike = [name for name in comparison.unlike if name in GROUP_BY and name != "vllm_version"]
    title = "Compared with the earlier results" + mixed_mark(unlike)
    notes = list(_compare_notes(comparison))
    return Section(
        title, pairs, header, rows, frozenset(header) - {"setting", "change"}, notes, len(ranked) - len(rows), keys=3
    )


def counts_of_changes(points: pd.DataFrame) -> str:
    """3 better, 1 worse, 20 no difference"""
    counts = points["change"].value_counts()
    words = ("better", "worse", "lost", "maybe better", "maybe worse", "no difference", "unknown")
    return ", ".join(f"{counts[word]} {word}" for word in words if word in counts)


def _compare_notes(comparison: SetComparison) -> Iterator[str]:
    yield ("better, worse: by Welch's t test at 5 % with the errors of the intervals, and Holm's correction for the "
           "number of points. ±: 95 % interval of each ratio alone.")  # fmt: skip
    if comparison.points["change"].isin({"maybe better", "maybe worse"}).any():
        yield ("maybe: only the test of that point alone says so, as it does for up to one in twenty points without a "
               "change.")  # fmt: skip
    if (comparison.points["change"] == "lost").any():
        yield "lost: measured before; now failed, invalid, or asked for and not reached."
    if (comparison.points["change"] == "unknown").any():
        yield "unknown: a point with a single run; raise --num-runs."
    counts = (
        (comparison.only_new, "only in the new results"),
        (comparison.only_old, "only in the earlier results"),
        (comparison.invalid_old, "failed or invalid in the earlier results"),
        (comparison.repeated, "more than once in one of the sets, and left out"),
    )
    for count, what in counts:
        if count:
            yield f"{counted(count, 'point')} {'is' if count == 1 else 'are'} {what}."
    if any(count for count, _ in counts):
        yield "Points are matched by name, layout, batch and lengths."


def _change_row(row: Mapping[Hashable, Any]) -> list[str]:
    ratio = "" if pd.isna(row["ratio"]) else with_interval(row["ratio"], known(row["ratio_ci95"]))
    numbers = [short(known(row[name])) for name in ("old_output_tok_per_s", "output_tok_per_s")]
    # Beside points that are lost, whole numbers are read as floats.
    sizes = [f"{row[name]:.0f}" for name in ("seq_len", "batch_size")]
    return [str(row["setting"]), *sizes, row["change"] + suspect_mark(row), ratio, *numbers]
