"""The plots of a job: its throughput over time, its hours against its cost, and what more requests at once bring.

Each is a function from the table of one job, a row per queue point, to a figure; JOB_PLOTS names them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise, zip_longest
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from batch_inference.analyze.answers import Analysis
from batch_inference.analyze.compare import SIZES
from batch_inference.analyze.front import Measured, is_on_front
from batch_inference.analyze.job_sections import few_words, unit_of
from batch_inference.analyze.jobs import ALIKE, JobAnswer, JobRow
from batch_inference.analyze.plot_colors import color
from batch_inference.analyze.plot_labels import Label, Place, label_marks
from batch_inference.analyze.plot_looks import ALL_NAMED, DASHES, NAMED, Look, looks, named, of_settings
from batch_inference.analyze.plot_marks import Series, draw_bars, draw_marks, draw_others
from batch_inference.analyze.plot_style import (
    FRONT,
    WIDTH_IN,
    NothingToShowError,
    axis_label,
    batch_axis,
    handles_of,
    in_short,
    label_outside,
    new_figure,
    value_axis,
    words_only,
)
from batch_inference.analyze.plot_timeline import timeline
from batch_inference.analyze.queues import PLATEAU
from batch_inference.analyze.tables import setting_labels
from batch_inference.core.text import on_each

_TIMELINE = "Throughput over time"
_COST = "Cost of the job against its time"
_THROUGHPUT = "Throughput against requests at once"
# An interval that is wider than the axis of its values need not be on it as a whole.
_MOST_OF_INTERVAL = 2.0
_OTHERS = "the others"
# A cost below that has zeros after the point, for which there is no room left of an axis.
_LONG_NUMBERS = 0.01


def job_tables(analysis: Analysis) -> list[tuple[str, pd.DataFrame]]:
    """Of each job what the titles of its plots end with, and its table."""
    categories = list(analysis.rows["setting"].cat.categories)
    several = len(analysis.jobs) > 1
    labels = setting_labels(analysis.settings)
    sizes = pd.DataFrame(
        {labels[one.path]: [one.shared.get(name) for name in SIZES] for one in analysis.settings}, index=list(SIZES)
    ).T
    return [
        (_mark(answer, number if several else None), _with_sizes(job_table(answer, categories), sizes))
        for number, answer in enumerate(analysis.jobs, 1)
    ]


def _with_sizes(table: pd.DataFrame, sizes: pd.DataFrame) -> pd.DataFrame:
    """By which the settings of a family look alike."""
    return table.assign(**{name: table["setting"].astype(object).map(sizes[name]) for name in SIZES})


def _mark(answer: JobAnswer, number: int | None) -> str:
    words = [f"job {number}"] if number else []
    words += ["prefixes cached"] if answer.is_cached else []
    return f" ({', '.join(words)})" if words else ""


def job_table(answer: JobAnswer, settings: Sequence[str]) -> pd.DataFrame:
    """A row per point, the fastest first; `settings` are all of the analysis, by which each gets its look."""
    table = pd.DataFrame([_cells(row, answer) for row in answer.rows])
    if table.empty:
        return pd.DataFrame({"setting": pd.Categorical([], categories=list(settings))})
    table["setting"] = pd.Categorical(table["setting"], categories=list(settings))
    names = _fastest_and_cheapest(answer) if table["setting"].nunique() > ALL_NAMED else list(settings)
    return table.assign(_named=table["setting"].isin(names))


def _cells(row: JobRow, answer: JobAnswer) -> dict[str, Any]:
    unit, per_hour = unit_of(answer)
    time, cost, plateau = row.hours, row.cost, row.point.plateau
    return {
        **dict.fromkeys(("device_name", "model", "vllm_version", "dtype", "quantization", "max_tokens")),
        **dict(zip(ALIKE, answer.group, strict=False)),
        "job": few_words(answer),
        "setting": row.setting,
        "batch_size": row.point.batch_size,
        "replicas": row.point.replicas,
        "tokens_per_step": row.point.tokens_per_step,
        "order": row.point.workload.order,
        "verdict": row.point.verdict,
        "unit": unit,
        **_scaled("time", time.value, time.low, time.high, per_hour),
        "is_priced": cost is not None,
        **(
            _scaled("cost", cost.value, cost.low, cost.high, 1.0)
            if cost
            else _scaled("cost", time.value, time.low, time.high, per_hour * row.num_devices)
        ),
        PLATEAU: plateau and plateau.value,
        "_half": None if plateau is None or plateau.high is None else plateau.high - plateau.value,
        "whole": row.point.summary.get("output_tok_per_s"),
        "point": row.point,
    }


def _scaled(name: str, value: float, low: float | None, high: float | None, factor: float) -> dict[str, float]:
    """The columns of a value and its interval; without one, that is the value alone."""
    low, high = (value if end is None else end for end in (low, high))
    return {name: value * factor, f"{name}_low": low * factor, f"{name}_high": high * factor}


def _fastest_and_cheapest(answer: JobAnswer) -> list[str]:
    """The settings to name of too many, in turns."""
    cheapest = sorted(answer.rows, key=lambda row: row.device_hours.value)
    ranked = [dict.fromkeys(row.setting for row in rows) for rows in (answer.rows, cheapest)]
    in_turns = dict.fromkeys(name for name in chain.from_iterable(zip_longest(*ranked)) if name)
    return list(in_turns)[:NAMED]


def _check(points: pd.DataFrame) -> None:
    if points.empty:
        raise NothingToShowError("no point has a forecast")


# --- the plots ----------------------------------------------------------------------------------------------------


def job_timeline(points: pd.DataFrame) -> Figure:
    _check(points)
    return timeline(points, f"{_TIMELINE}, the fastest point of each setting")


def job_cost(points: pd.DataFrame) -> Figure:
    """A mark per point, the number of requests at once beside it, and a line through those that nothing beats."""
    _check(points)
    per_step = " / tokens per step" if points["tokens_per_step"].notna().any() else ""
    handles = [*handles_of(points, named(points))]
    best = points[_is_front(points)]
    if len(best) > 1:
        handles.append(Line2D([], [], color=color("ink"), linewidth=1, label=FRONT))
    handles.append(words_only(f"number: requests at once{per_step}"))
    figure, (axes,) = new_figure(points, _COST + _of_many(points, _OTHERS), 1, 3.8, handles)
    if points["cost"].max() < _LONG_NUMBERS:
        figure.subplots_adjust(left=1.0 / WIDTH_IN)
    look, shown = looks(points), points[points["setting"].isin(named(points))]
    others = points.drop(shown.index)
    draw_others(axes, others, "time", "cost")
    for name, here in shown.groupby("setting", observed=True):
        errors = {
            f"{which}err": here[[f"{column}_low", f"{column}_high"]].sub(here[column], axis=0).abs().to_numpy().T
            for which, column in (("x", "time"), ("y", "cost"))
        }
        draw_bars(axes, here["time"].to_numpy(), here["cost"].to_numpy(), look[str(name)], **errors)
    axes.step(best["time"], best["cost"], where="post", color=color("ink"), linewidth=1, zorder=1.5)
    value_axis(axes, *_limits(points, "time"), "x")
    _upright_axis(axes, *_limits(points, "cost"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(in_short))
    of_settings = [Series(shown[shown["setting"] == name], look[name]) for name in named(points)]
    sizes_pt = draw_marks(axes, of_settings, "time", "cost")
    parts = [one.points.assign(size_pt=size_pt) for one, size_pt in zip(of_settings, sizes_pt, strict=True)]
    first = points.iloc[0]
    cost = "Cost of the job" if first["is_priced"] else f"Device time of the job [device-{first['unit']}]"
    label_outside([axes], f"Time of the job [{first['unit']}]", cost)
    _label_points(axes, pd.concat(parts).sort_index(), best)
    return figure


def _is_front(points: pd.DataFrame) -> pd.Series[bool]:
    """What nothing beats beyond the intervals, and of that what is cheaper than all faster ones. The points are in
    order of their time."""
    time_half, cost_half = (
        points[f"{name}_high"].sub(points[f"{name}_low"]).to_numpy() / 2 for name in ("time", "cost")
    )
    on = is_on_front(Measured(points["time"].to_numpy(), time_half, -points["cost"].to_numpy(), cost_half))
    costs = points["cost"].where(on)
    return costs < costs.cummin().ffill().shift().fillna(math.inf)


def _limits(points: pd.DataFrame, column: str) -> tuple[float, float]:
    """The least value, and the highest end of an interval that is no wider than can be shown."""
    highest = points[column].max()
    return points[column].min(), min(points[f"{column}_high"].max(), _MOST_OF_INTERVAL * highest)


def _upright_axis(axes: Axes, low: float, high: float) -> None:
    """With room above the highest."""
    value_axis(axes, low, high)
    if axes.get_yscale() == "linear":
        axes.set_ylim(0, 1.07 * high)


def _label_points(axes: Axes, shown: pd.DataFrame, best: pd.DataFrame) -> None:
    """The points of the front first, because there may be no room for all."""
    several_orders = shown["order"].nunique() > 1
    ordered = pd.concat([shown[shown.index.isin(best.index)], shown[~shown.index.isin(best.index)]])
    rows: list[Any] = list(ordered.itertuples())
    labels = [Label((row.time, row.cost), _text(row, several_orders), row.size_pt) for row in rows]
    lines: list[tuple[Place, Place]] = []
    for row in rows:
        lines.append(((row.time_low, row.cost), (row.time_high, row.cost)))
        lines.append(((row.time, row.cost_low), (row.time, row.cost_high)))
    corners = zip(best["time"].tolist(), best["cost"].tolist(), strict=True)
    for (x, y), (next_x, next_y) in pairwise(corners):
        lines += [((x, y), (next_x, y)), ((next_x, y), (next_x, next_y))]
    label_marks(axes, labels, lines)


def _text(row: Any, several_orders: bool) -> str:
    budget = "" if pd.isna(row.tokens_per_step) else f"/{row.tokens_per_step:.0f}"
    return f"{row.batch_size}{budget}" + (f" {row.order}" if several_orders and row.order != "given" else "")


def job_throughput(points: pd.DataFrame) -> Figure:
    """A facet per order of the requests; a line per setting and budget of tokens per step."""
    _check(points)
    look, shown = looks(points), named(points)
    orders = sorted(points["order"].unique(), key=lambda order: (order != "given", order))
    budgets = sorted(points["tokens_per_step"].dropna().unique())
    thin = Line2D(
        [], [], color=color("ink"), linewidth=0.6, label="thin line: mean of the whole sample, drain included"
    )
    handles = [*handles_of(points, shown), *_budget_handles(budgets), thin]
    if points[PLATEAU].isna().any():
        handles.append(words_only("no mark: too few requests for a plateau"))
    title = _THROUGHPUT + _of_many(points, _OTHERS)
    figure, grid = new_figure(points, title, len(orders), 3.6 if len(orders) == 1 else 2.9, handles)
    drawn: list[list[Series]] = []
    for axes, order in zip(grid, orders, strict=True):
        here = points[points["order"] == order]
        if len(orders) > 1:
            axes.set_title(f"order: {order}")
        others = here[~here["setting"].isin(shown)]
        draw_others(axes, others, "batch_size", PLATEAU)
        drawn.append([_draw_line(axes, line, _with_dash(look[setting], budget, budgets))
                      for setting, budget, line in _lines(here, shown)])  # fmt: skip
        batch_axis(axes, points["batch_size"])
    values = points[[PLATEAU, "whole"]].astype(float)
    highest = pd.concat([values[PLATEAU] + points["_half"].astype(float).fillna(0), values["whole"]]).max()
    _upright_axis(figure.axes[0], values.min().min(), highest)
    for axes, series in zip(grid, drawn, strict=True):
        draw_marks(axes, series, "batch_size", PLATEAU)
    each = on_each(int(points["replicas"].max()))
    label_outside(figure.axes, f"Requests at once{each}", axis_label("output_tok_per_s"))
    return figure


def _lines(points: pd.DataFrame, names: Sequence[str]) -> Iterator[tuple[str, float | None, pd.DataFrame]]:
    for name in names:
        of_setting = points[points["setting"] == name].sort_values("batch_size")
        # 0 stands for none: NaN equals nothing.
        budgets = of_setting["tokens_per_step"].astype(float).fillna(0)
        for budget in sorted(budgets.unique().tolist()):
            yield name, budget or None, of_setting[budgets == budget]


def _draw_line(axes: Axes, line: pd.DataFrame, look: Look) -> Series:
    batches = line["batch_size"].to_numpy(dtype=float)
    whole, plateau = line["whole"].to_numpy(dtype=float), line[PLATEAU].to_numpy(dtype=float)
    style = {"color": look["color"], "linestyle": look["linestyle"]}
    # A single one would not be seen without its dot.
    axes.plot(batches, whole, linewidth=0.6, marker=".", markersize=3.5, gid="thin", **style)
    (through_plateaus,) = axes.plot(batches, plateau, linewidth=1.4, **style)
    draw_bars(axes, batches, plateau, look, yerr=line["_half"].to_numpy(dtype=float))
    return Series(line, look, through_plateaus)


def _with_dash(look: Look, budget: float | None, budgets: Sequence[float]) -> Look:
    if budget is None:
        return look
    return {**look, "linestyle": DASHES[budgets.index(budget) % len(DASHES)]}


def _budget_handles(budgets: Sequence[float]) -> list[Line2D]:
    return [
        Line2D([], [], color=color("ink"), linestyle=DASHES[index % len(DASHES)], label=f"{budget:.0f} tokens per step")
        for index, budget in enumerate(budgets)
    ]


def _of_many(points: pd.DataFrame, others: str) -> str:
    shown, settings = len(named(points)), points["setting"].nunique()
    return f" ({of_settings(shown, settings, others)})" if shown < settings else ""


# Name of the file, title, function.
JOB_PLOTS: tuple[tuple[str, str, Callable[[pd.DataFrame], Figure]], ...] = (
    ("job_timeline", _TIMELINE, job_timeline),
    ("job_cost", _COST, job_cost),
    ("job_throughput", _THROUGHPUT, job_throughput),
)
