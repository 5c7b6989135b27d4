"""TP, PP or DP? What the report says of settings with equal work on as many devices: in words, and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from batch_inference.analyze.answers import Group
from batch_inference.analyze.compare import LAYOUT, MEASURED, layout, layout_order
from batch_inference.analyze.sections import ROW_LIMIT, Section
from batch_inference.analyze.wording import BOLD, SUSPECT_LINE, Best, few, number_text, widths_line
from batch_inference.core.text import counted, listed

# What a row of the table stands for.
_BLOCK = ["seq_len", "max_tokens", "global_batch_size"]


def layouts(group: Group) -> Iterator[Section]:
    """Per number of devices a table with a column per layout; the first says how they are read."""
    legend = [_LEGEND]
    for devices, measured in group.points.groupby("num_devices"):
        sizes = [tuple(map(int, row)) for row in measured[list(LAYOUT)].drop_duplicates().to_numpy()]
        present = [layout(*row) for row in sorted(sizes, key=lambda row: layout_order(*row))]
        rows = group.layouts[group.layouts["num_devices"] == devices]
        title = group.titled(f"TP, PP or DP? {counted(int(str(devices)), 'device')}{_one_length(rows)}, output tok/s")
        if not rows["is_alone"].all():
            names = list(dict.fromkeys(rows.sort_values("_order")["layout"]))
            yield _layout_table(title, rows, names, legend)
            legend = []
        elif len(present) > 1:
            all_of_them = ", ".join(present)
            line = f"{all_of_them}: not compared, because no two of them were measured at the same number of requests."
            yield Section(title, lines=[line])


def _layout_table(title: str, rows: pd.DataFrame, names: Sequence[str], lines: list[str]) -> Section:
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    columns = [*_BLOCK, "layout", "verdict", "is_best", *MEASURED]
    blocks = rows[_BLOCK].drop_duplicates().sort_values(_BLOCK)
    chosen = rows[columns].merge(blocks.head(ROW_LIMIT), on=_BLOCK)
    for row in chosen.to_dict("records"):
        number = number_text(row, "output_tok_per_s")
        cell = Best(number) if row["is_best"] else number
        cells.setdefault(tuple(row[name] for name in _BLOCK), {})[str(row["layout"])] = cell
    # A length that all have stands in the title.
    keys = ["requests"] if rows["seq_len"].nunique() == 1 else ["length", "requests"]
    table = [
        [*[str(length), str(batch)][-len(keys) :], *(found.get(name, "") for name in names)]
        for (length, _, batch), found in sorted(cells.items(), key=lambda one: one[0])
    ]
    header = (*keys, *names)
    notes = [*lines, *_layout_notes(rows)]
    return Section(
        title, _fastest_layouts(rows), header, table, frozenset(header), notes, len(blocks) - len(table),
        keys=len(keys), is_more_better=frozenset(names),
    )  # fmt: skip


_LEGEND = (
    "requests: on all devices together. "
    f"{BOLD}: the fastest of a row, and every layout whose 95 % interval overlaps that of the fastest."
)


def _one_length(rows: pd.DataFrame) -> str:
    return f", length {rows['seq_len'].iloc[0]}" if rows["seq_len"].nunique() == 1 else ""


def _layout_notes(rows: pd.DataFrame) -> Iterator[str]:
    yield widths_line(rows)
    if (rows["verdict"] == "suspect").any():
        yield SUSPECT_LINE
    if rows.groupby("layout")["setting"].nunique().max() > 1:
        yield "Where several settings have the same layout, each cell shows the fastest of them."


def _fastest_layouts(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """Which layout is the fastest where, in words; lengths of which the same is to be said, together."""
    lengths: dict[str, list[str]] = {}
    for (length, outputs), here in rows.groupby(["seq_len", "max_tokens"]):
        several = rows.loc[rows["seq_len"] == length, "max_tokens"].nunique() > 1
        name = f"{length} + {outputs}" if several else str(length)
        lengths.setdefault(_fastest_where(here), []).append(name)
    if len(lengths) == 1:
        return [("fastest", text) for text in lengths]
    return [(f"length {few(names, 3)}", text) for text, names in lengths.items()]


def _fastest_where(rows: pd.DataFrame) -> str:
    """TP=4 at 16 to 64 requests, DP=4 from 128 on: of each layout the batches at which nothing beats it."""
    compared = rows[~rows["is_alone"]]
    if compared.empty:
        return "no two layouts were measured at the same number of requests"
    return "; ".join([*_compared_where(compared, rows), *_alone_where(rows, compared)])


def _alone_where(rows: pd.DataFrame, compared: pd.DataFrame) -> Iterator[str]:
    """Of larger batches than those that were compared: at 1024 only DP=4 was measured."""
    larger = rows[rows["global_batch_size"] > compared["global_batch_size"].max()]
    for name, batches in larger.groupby("layout", sort=False)["global_batch_size"]:
        yield f"at {listed(sorted(map(int, batches)))} only {name} was measured"


def _compared_where(rows: pd.DataFrame, with_alone: pd.DataFrame) -> list[str]:
    """`with_alone`: also those that nothing can be compared with."""
    last = int(with_alone["global_batch_size"].max())
    batches = sorted(int(batch) for batch in rows["global_batch_size"].unique())
    best = rows[rows["is_best"]].sort_values(["global_batch_size", "_order"])
    if best["layout"].nunique() == 1:
        every = {1: counted(batches[0], "request"), 2: "both batch sizes"}
        of_these = " at which several layouts were measured" if len(rows) < len(with_alone) else ""
        of_these = f", the only batch size{of_these}" if of_these and len(batches) == 1 else of_these
        where = every.get(len(batches), f"all {len(batches)} batch sizes")
        return [f"{best['layout'].iloc[0]}, at {where}{of_these}"]
    places = best.groupby("layout", sort=False)["global_batch_size"].agg(list)
    words = [
        f"{name} {_batch_ranges(found, _batches_of(rows, name), last, '' if number else ' requests')}"
        for number, (name, found) in enumerate(zip(places.index, places, strict=True))
    ]
    notes = ["where two are named, their intervals overlap"] if best["global_batch_size"].duplicated().any() else []
    if any(_has_holes(found, _batches_of(rows, name), batches) for name, found in places.items()):
        notes.append("not every layout was measured at every size")
    return [", ".join(words), *notes]


def _has_holes(found: Sequence[int], measured: Sequence[int], batches: Sequence[int]) -> bool:
    """Whether another layout may be named at a batch between those of this one, which was not measured there."""
    return any(min(found) < batch < max(found) and batch not in measured for batch in batches)


def _batches_of(rows: pd.DataFrame, name: object) -> list[int]:
    return sorted(int(batch) for batch in rows.loc[rows["layout"] == name, "global_batch_size"])


def _batch_ranges(found: Sequence[int], measured: Sequence[int], last: int, unit: str) -> str:
    """at 16 to 64 requests and from 512 on, of the batches at which the layout was measured; `last`: of all layouts."""
    runs: list[list[int]] = []
    for place in sorted(map(measured.index, found)):
        if runs and runs[-1][-1] == place - 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    in_batches = [[measured[place] for place in run] for run in runs]
    return " and ".join(_batch_range(run, last, "" if number else unit) for number, run in enumerate(in_batches))


def _batch_range(run: Sequence[int], last: int, unit: str) -> str:
    of_first = unit.removesuffix("s") if run[0] == 1 else unit
    if len(run) == 1:
        return f"at {run[0]}{of_first}"
    if run[-1] == last:
        return f"from {run[0]}{of_first} on"
    return f"at {run[0]} {'and' if len(run) == 2 else 'to'} {run[-1]}{unit}"
