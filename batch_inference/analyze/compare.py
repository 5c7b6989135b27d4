"""Ratios of measured throughputs with their intervals: scaling, TP against PP against DP, a result set against another.

Throughput is a fixed number of tokens over the mean latency of the runs: every test and interval is one of latencies.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from batch_inference.analyze.student import Floats, p_values, quantiles_95
from batch_inference.analyze.tables import GROUP_BY, TO_MENTION, MeasuredSetting, believable, groups

# What a ratio is made of.
MEASURED = ["output_tok_per_s", "latency_mean_s", "latency_ci95_s", "timed_runs"]
SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
# What tells layouts apart: the sizes, and how experts and the KV cache are shared out.
LAYOUT = (*SIZES, "enable_expert_parallel", "decode_context_parallel_size")
# Where a point stands: what every list of points tells of each.
PLACE = ("setting", "num_devices", *LAYOUT, "seq_len", "max_tokens", "batch_size", "global_batch_size", "verdict")
# Points alike in these do the same work on as many devices.
EQUAL_WORK = ["num_devices", "seq_len", "max_tokens", "global_batch_size"]


def ratios(points: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """Row by row: output throughput of `points` over that of `others`, as the columns `ratio`, `ratio_ci95` (half
    width of the 95 % interval, to first order) and `p_value` (Welch's t test of the mean latencies); NaN for unknown.
    """
    new, old = _runs(points), _runs(others)
    ratio = _column(points, "output_tok_per_s") / _column(others, "output_tok_per_s")
    relative, degrees = _welch(new.error / new.mean, old.error / old.mean, new.runs, old.runs)
    error, welch_degrees = _welch(new.error, old.error, new.runs, old.runs)
    p_value = _p_value(new.mean - old.mean, error, welch_degrees)
    half = ratio * np.where(relative == 0, 0, quantiles_95(degrees) * relative)
    return pd.DataFrame({"ratio": ratio, "ratio_ci95": half, "p_value": p_value}, index=points.index)


@dataclass(frozen=True)
class _Runs:
    """Mean latency, its standard error, and the number of runs: one entry per point."""

    mean: Floats
    error: Floats
    runs: Floats


def _runs(points: pd.DataFrame) -> _Runs:
    mean, half, runs = (_column(points, name) for name in MEASURED[1:])
    # The interval is Student's quantile times the standard error: division gives the error back, and a larger one
    # where the runs decided themselves when they were enough.
    return _Runs(mean, half / quantiles_95(np.where(runs > 1, runs - 1, np.nan)), runs)


def _column(points: pd.DataFrame, name: str) -> Floats:
    return points[name].to_numpy(dtype=float)


def _welch(one: Floats, two: Floats, runs_one: Floats, runs_two: Floats) -> tuple[Floats, Floats]:
    """Error of a difference of two means, and the degrees of freedom of it (Welch-Satterthwaite)."""
    variance = one**2 + two**2
    with np.errstate(divide="ignore", invalid="ignore"):
        degrees = variance**2 / (one**4 / (runs_one - 1) + two**4 / (runs_two - 1))
    return np.sqrt(variance), degrees


def _p_value(difference: Floats, error: Floats, degrees: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        p_value = p_values(difference / error, degrees)
    # Runs without any spread, as a test may have them: equal or not is then certain.
    certain: Floats = np.where(error == 0, (difference == 0).astype(float), p_value)
    return certain


def overlapping(
    values: pd.Series[float], halves: pd.Series[float], value: float | pd.Series[float], half: float | pd.Series[float]
) -> pd.Series[bool]:
    """Which intervals overlap the one of `value`, or row by row those of `value`; an unknown half width counts as 0, so
    that it shows no tie."""
    return (values - value).abs() <= halves.fillna(0) + half


def halves(points: pd.DataFrame, metric: str) -> pd.Series[float]:
    """Half widths of the 95 % intervals of a metric that goes with the mean latency or with one over it."""
    return points["latency_ci95_s"] / points["latency_mean_s"] * points[metric]


# --- scaling ------------------------------------------------------------------------------------------------------


def with_scaling(table: pd.DataFrame, baseline: str | None = None) -> pd.DataFrame:
    """Adds `scaling_baseline` and, against it at equal seq_len, `speedup` (ratio of output throughputs) and
    `scaling_efficiency` (speed-up / ratio of the device counts) with half widths `_ci95`: strong scaling at equal
    global_batch_size, and with the prefix `weak_` at equal batch_size, which is that of each replica.

    The baseline is the setting of that name, else the group's setting of the fewest devices that has most points.
    """
    names = {number: _baseline(points, baseline) for number, points in groups(table)}
    table = table.assign(scaling_baseline=table["group"].map(names).astype(object))
    measured = believable(table)
    base = measured[measured["setting"].astype(object) == measured["scaling_baseline"]]
    strong, weak = _against(table, base, "global_batch_size"), _against(table, base, "batch_size")
    return table.assign(**strong, **weak.add_prefix("weak_"))


def baseline_of(points: pd.DataFrame) -> str | None:
    """What `with_scaling` held the points of one group against."""
    return next(iter(points["scaling_baseline"].dropna()), None)


def _baseline(points: pd.DataFrame, baseline: str | None) -> str | None:
    points = believable(points)
    if baseline is not None:
        return baseline if (points["setting"] == baseline).any() else None
    smallest = points[points["num_devices"] == points["num_devices"].min()]["setting"].astype(str)
    return None if smallest.empty else str(smallest.value_counts(sort=False).idxmax())


def _against(table: pd.DataFrame, base: pd.DataFrame, batch: str) -> pd.DataFrame:
    keys = ["group", "seq_len", "max_tokens", batch]
    reference = base[[*keys, *MEASURED, "num_devices"]].drop_duplicates(keys)
    others = table[keys].merge(reference, how="left", on=keys).set_axis(table.index)
    found = ratios(table, others)
    devices = table["num_devices"].astype(float) / others["num_devices"].astype(float)
    # A point against itself is 1 by definition, not by measurement.
    half = found["ratio_ci95"].where(table["setting"].astype(object) != table["scaling_baseline"], 0.0)
    half = half.where(found["ratio"].notna())
    return pd.DataFrame(
        {
            "speedup": found["ratio"],
            "speedup_ci95": half,
            "scaling_efficiency": found["ratio"] / devices,
            "scaling_efficiency_ci95": half / devices,
        }
    )


# --- TP, PP or DP -------------------------------------------------------------------------------------------------


def layout(tp: int, pp: int, dp: int, ep: int = 0, dcp: int = 1) -> str:
    """4, 1, 2 -> TP=4 DP=2; with expert parallelism TP=4 DP=2 EP."""
    words = [f"{name}={size}" for name, size in (("TP", tp), ("PP", pp), ("DP", dp)) if size > 1] or ["TP=1"]
    return " ".join([*words, *(["EP"] if ep else []), *([f"DCP={dcp}"] if dcp > 1 else [])])


def layout_order(tp: int, pp: int, dp: int, ep: int = 0, dcp: int = 1) -> tuple[int, ...]:
    """TP, PP and DP alone come before the mixed ones."""
    return (sum(size > 1 for size in (tp, pp, dp)), -tp, -pp, -dp, ep, dcp)


def simplicity(row: Mapping[Hashable, Any]) -> int:
    """How many kinds of parallelism a setting has: 0 for one device, 2 for TP=2 DP=2."""
    sizes = (*SIZES, "decode_context_parallel_size")
    return sum(int(row[name]) > 1 for name in sizes) + bool(row["enable_expert_parallel"])


def side_by_side(points: pd.DataFrame) -> pd.DataFrame:
    """The fastest point of every layout at EQUAL_WORK, in the order in which they are shown.

    Beside its work, sizes and measured numbers each row has `layout`, and `_order` by which layouts are sorted;
    `ratio`, `ratio_ci95` and `p_value` against the first layout at that work; `is_first`; `is_alone`, where no other
    layout did that work; `is_best`, else, for the highest throughput and for all whose interval overlaps it.
    """
    columns = [*dict.fromkeys([*EQUAL_WORK, *MEASURED, *LAYOUT, "setting", "batch_size", "verdict"])]
    points = believable(points)[columns].dropna(subset="output_tok_per_s")
    sizes = [points[name].astype(int).tolist() for name in LAYOUT]
    order = pd.Series(list(map(layout_order, *sizes)), index=points.index, dtype=object)
    points = points.assign(layout=list(map(layout, *sizes)), _order=order)
    fastest = points.sort_values("output_tok_per_s", ascending=False, kind="stable")
    fastest = fastest.drop_duplicates([*EQUAL_WORK, "layout"])
    return _judged(fastest.sort_values([*EQUAL_WORK, "_order"]))


def _judged(rows: pd.DataFrame) -> pd.DataFrame:
    first = rows.drop_duplicates(EQUAL_WORK)
    others = rows[EQUAL_WORK].merge(first[[*EQUAL_WORK, *MEASURED]], on=EQUAL_WORK, how="left").set_axis(rows.index)
    is_first = ~rows.duplicated(EQUAL_WORK)
    throughput, half = rows["output_tok_per_s"], halves(rows, "output_tok_per_s").fillna(0)
    best = rows.assign(half=half).sort_values("output_tok_per_s", ascending=False, kind="stable")
    best = best.drop_duplicates(EQUAL_WORK)[[*EQUAL_WORK, "output_tok_per_s", "half"]]
    winner = rows[EQUAL_WORK].merge(best, on=EQUAL_WORK, how="left").set_axis(rows.index)
    is_best = overlapping(throughput, half, winner["output_tok_per_s"], winner["half"])
    is_alone = rows.groupby(EQUAL_WORK)["layout"].transform("size") == 1
    return rows.assign(
        **ratios(rows, others), is_first=is_first, is_alone=is_alone, is_best=is_best & ~is_alone.astype(bool)
    )


# --- one result set against another -------------------------------------------------------------------------------

_SAME_POINT = ["name", *LAYOUT, "executor_class", "batch_size", "seq_len", "max_tokens"]
_ASKED_POINT = [*_SAME_POINT, "tokens_per_step"]
_SURE_AS_ASKED = ("model", "executor_class")  # of GROUP_BY, what no engine changes
AskedPoint = Mapping[str, Any]  # the columns of a point that are known of it, measured or not


@dataclass(frozen=True)
class SetComparison:
    """Two result sets, point by point.

    `points` has the columns of the newer points, `old_output_tok_per_s`, `ratio` (new / old), `ratio_ci95`,
    `p_value`, `p_holm` (corrected for the number of points) and `change`: better or worse (`p_holm` under 0.05),
    maybe better or maybe worse (only `p_value` is), no difference, unknown (fewer than two runs), or lost (measured
    before, now failed, invalid, or asked for and not reached).
    """

    points: pd.DataFrame
    # Column -> its values in the older and the newer set, where the points that both hold are unlike in it.
    unlike: dict[str, tuple[str, str]] = field(default_factory=dict)
    only_new: int = 0
    only_old: int = 0
    invalid_old: int = 0  # points of the newer set that failed or were invalid in the older one
    repeated: int = 0  # points that a set holds twice: which of them is meant cannot be known


def asked_points(settings: Iterable[MeasuredSetting]) -> Iterator[AskedPoint]:
    """The points of the settings' grids, measured or not, as `compare_sets` takes them."""
    for setting in settings:
        known = setting.shared
        if setting.load_s is None:
            # What only an engine would have told (its dtype, its devices) is left open.
            known = {name: value for name, value in known.items() if name in _SURE_AS_ASKED or name not in GROUP_BY}
        for batch, length, most, _, budget in setting.asked:
            if length is not None:
                point = {"batch_size": batch, "seq_len": length, "max_tokens": most, "tokens_per_step": budget}
                yield {**known, "name": setting.name, **point}


def compare_sets(new: pd.DataFrame, old: pd.DataFrame, asked: Iterable[AskedPoint] = ()) -> SetComparison:
    """Points of equal name, layout, batch and lengths; `asked`: those that the files of `new` should hold."""
    # Where a set holds a point twice, of two models, say, what tells the two apart belongs to the point.
    within = sorted(_telling_apart(new) | _telling_apart(old))
    new, old = (_keyed(table, [*_SAME_POINT, *within]) for table in (new, old))
    one, two = (table[~table.index.duplicated(keep=False)] for table in (new, old))
    repeated = len(new) - len(one) + len(old) - len(two)
    unbelieved, two = two, believable(two)
    pairs = one.index.intersection(two.index, sort=False)
    alone = two[~two.index.isin(new.index)]
    never_reached = alone[_were_asked(alone, asked, within)]
    one_paired, two_paired = one.reindex(pairs), two.reindex(pairs)
    return SetComparison(
        points=_changes(one_paired, two_paired, never_reached),
        unlike=_unlike(one_paired, two_paired),
        only_new=len(one.index.difference(unbelieved.index)),
        invalid_old=len(one.index.intersection(unbelieved.index.difference(two.index))),
        only_old=len(alone) - len(never_reached),
        repeated=repeated,
    )


def _were_asked(points: pd.DataFrame, asked: Iterable[AskedPoint], within: Sequence[str]) -> list[bool]:
    """Which of the points are among those asked for; what is not known of one of these may be anything."""
    known: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for one in asked:
        key = tuple(_key_text(one.get(name)) for name in _ASKED_POINT)
        known.setdefault(key, []).append({name: _key_text(one[name]) for name in within if name in one})
    rows = points[within].map(_key_text).to_dict("records")
    keys = _keyed(points, _ASKED_POINT).index
    return [any(one.items() <= row.items() for one in known.get(key, ())) for key, row in zip(keys, rows, strict=True)]


def _keyed(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """The table with the text of these columns as its index."""
    return table.set_axis(pd.MultiIndex.from_arrays([table[name].map(_key_text) for name in keys], names=keys))


def _key_text(value: Any) -> str:
    """Alike in a column that has unknowns, and therefore floats, and in one that has none."""
    if pd.isna(value):
        return "None"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _telling_apart(table: pd.DataFrame) -> set[str]:
    """The columns of GROUP_BY, and the tokens per step, in which rows of the same point differ."""
    points = _keyed(table, _SAME_POINT)
    repeated = points[points.index.duplicated(keep=False)]
    columns = [name for name in (*GROUP_BY, "tokens_per_step") if name not in _SAME_POINT]
    kinds = repeated[columns].astype(str).groupby(level=_SAME_POINT).nunique()
    return {name for name in columns if (kinds[name] > 1).any()}


def _unlike(new: pd.DataFrame, old: pd.DataFrame) -> dict[str, tuple[str, str]]:
    values = {name: (_values(old, name), _values(new, name)) for name in (*GROUP_BY, *TO_MENTION)}
    return {name: pair for name, pair in values.items() if pair[0] != pair[1]}


def _values(table: pd.DataFrame, name: str) -> str:
    """`num_runs` is empty where each point takes as many runs as its interval needs."""
    column = table[name].dropna().convert_dtypes()
    adaptive = ["adaptive"] if name == "num_runs" and len(column) < len(table) else []
    return ", ".join([*sorted(map(str, column.unique())), *adaptive]) or "unknown"


def _changes(new: pd.DataFrame, old: pd.DataFrame, never_reached: pd.DataFrame) -> pd.DataFrame:
    found = ratios(new, old)
    lost = (new["status"] != "ok") | (new["verdict"] == "invalid")
    found = found.mask(lost)
    changes = new.assign(old_output_tok_per_s=old["output_tok_per_s"], **found, p_holm=holm(_column(found, "p_value")))
    rows = zip(lost, changes["ratio"], changes["p_value"], changes["p_holm"], strict=True)
    changes = changes.assign(change=[_change(*row) for row in rows])
    if never_reached.empty:
        return changes
    gone = never_reached.assign(old_output_tok_per_s=never_reached["output_tok_per_s"], output_tok_per_s=np.nan)
    return pd.concat([changes, gone.assign(status="failed", change="lost")])


def _change(lost: bool, ratio: float, p_value: float, p_holm: float) -> str:
    if lost:
        return "lost"
    if np.isnan(p_holm):
        return "unknown"
    if p_value >= 0.05:
        return "no difference"
    way = "better" if ratio > 1 else "worse"
    return way if p_holm < 0.05 else f"maybe {way}"


def holm(p_values: Floats) -> Floats:
    """Holm's correction for many comparisons; unknown (NaN) ones are none."""
    known = np.flatnonzero(~np.isnan(p_values))
    order = known[np.argsort(p_values[known], kind="stable")]
    steps = np.maximum.accumulate((len(order) - np.arange(len(order))) * p_values[order])
    corrected = np.full(len(p_values), np.nan)
    corrected[order] = np.minimum(steps, 1)
    return corrected


def regressions(comparison: SetComparison, percent: float) -> pd.DataFrame:
    """The points that are lost, or worse with a throughput more than `percent` % lower."""
    points = comparison.points
    slower = (points["change"] == "worse") & (points["ratio"] < 1 - percent / 100)
    return points[slower | (points["change"] == "lost")]
