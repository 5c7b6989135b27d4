"""What each setting looks like in every plot, and which settings are shown where there are too many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any, Literal, TypedDict

import pandas as pd

from batch_inference.analyze.compare import SIZES
from batch_inference.analyze.decide import GOALS
from batch_inference.analyze.plot_colors import SHADES_OF_FAMILY, UNLIKE, shade, unlike
from batch_inference.analyze.tables import believable

# More settings than ALL_NAMED cannot be told apart: then so many of the best are drawn, and the range of the others.
ALL_NAMED, NAMED = 12, 8
# In the order in which they are read. Markers of a family are of a kind, for who sees no colours.
FAMILIES = ("one", "tp", "pp", "dp", "mixed")
_MARKERS: dict[str, tuple[Any, ...]] = {
    "one": ("o", "8", "H", "h"), "tp": ("s", "D", "p", "d"), "pp": ("<", ">", "h", "8"), "dp": ("^", "v", "H", "o"),
    "mixed": ("P", "X", "*", "d"),
}  # fmt: skip
_ALL_MARKERS: tuple[Any, ...] = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
DASHES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")

# A family, or none, and the place within it, or among all.
Seat = tuple[str | None, int]


class Look(TypedDict):
    """What a setting looks like, as matplotlib takes it."""

    color: Any
    marker: Any
    linestyle: Any


def looks(points: pd.DataFrame) -> dict[str, Look]:
    """Colour, marker and dash of every setting: the same for every group of an analysis."""
    return {name: _look(*seat) for name, seat in seats(points).items()}


def _look(family: str | None, number: int) -> Look:
    if family is None:
        dash = DASHES[number // UNLIKE % len(DASHES)]
        return {"color": unlike(number), "marker": _ALL_MARKERS[number % len(_ALL_MARKERS)], "linestyle": dash}
    markers, dash = _MARKERS[family], DASHES[number // SHADES_OF_FAMILY % len(DASHES)]
    return {"color": shade(family, number), "marker": markers[number % len(markers)], "linestyle": dash}


def seats(points: pd.DataFrame) -> dict[str, Seat]:
    """By its setting; that of the whole analysis, where `prepared` has given it."""
    if "_seat" in points:
        return dict(zip(points["setting"].astype(str), points["_seat"], strict=True))
    return _seats([points], named(points))


def family_of(tp: int, pp: int, dp: int) -> str:
    larger = [name for name, size in (("tp", tp), ("pp", pp), ("dp", dp)) if size > 1]
    return "one" if not larger else larger[0] if len(larger) == 1 else "mixed"


def _seats(tables: Sequence[pd.DataFrame], chosen: Iterable[str]) -> dict[str, Seat]:
    """Of `chosen` settings, which have a name in some plot, and then of the others."""
    sizes = _sizes(tables)
    names = list(dict.fromkeys(name for points in tables for name in points["setting"].cat.categories if name in sizes))
    first = set(chosen)
    in_order = sorted(names, key=lambda name: (name not in first, FAMILIES.index(family_of(*sizes[name])), sizes[name]))
    members = [family_of(*sizes[name]) for name in in_order if name in first]
    is_told_by_family = len(set(members)) > 1 and all(members.count(one) <= SHADES_OF_FAMILY for one in members)
    taken: dict[str | None, int] = {}
    found: dict[str, Seat] = {}
    for name in in_order:
        family = family_of(*sizes[name]) if is_told_by_family else None
        found[name] = (family, taken.get(family, 0))
        taken[family] = found[name][1] + 1
    return found


def _sizes(tables: Sequence[pd.DataFrame]) -> dict[str, tuple[int, int, int]]:
    """Of every setting that has a point."""
    found: dict[str, tuple[int, int, int]] = {}
    for points in tables:
        known = points.reindex(columns=["setting", *SIZES]).drop_duplicates("setting").fillna(dict.fromkeys(SIZES, 1))
        for name, tp, pp, dp in known.itertuples(index=False):
            found.setdefault(str(name), (int(tp), int(pp), int(dp)))
    return found


# --- which are shown ----------------------------------------------------------------------------------------------


def named(points: pd.DataFrame) -> list[str]:
    """The settings that get a line of their own, in the order in which they are read: all, or of many the best of
    every goal and length, in turns."""
    if "_named" in points:
        # Chosen from all points of the group, so that every plot of it names the same.
        return in_reading_order(points, points.loc[points["_named"].astype(bool), "setting"].astype(str).unique())
    present = points["setting"].astype(str).unique()
    return in_reading_order(points, present if len(present) <= ALL_NAMED else _best(points))


def in_reading_order(points: pd.DataFrame, names: Iterable[str]) -> list[str]:
    """One device, TP, PP, DP and what mixes them; of each the smaller first."""
    sizes, categories = _sizes([points]), list(points["setting"].cat.categories)
    return sorted(
        map(str, names),
        key=lambda name: (FAMILIES.index(family_of(*sizes[name])), sizes[name], categories.index(name)),
    )


def _best(points: pd.DataFrame) -> list[str]:
    rankings = []
    for goal in GOALS[:3]:
        for _, here in believable(points).groupby("seq_len"):
            ranked = here.sort_values(goal.column, ascending=goal.better == "lower", kind="stable")
            rankings.append(ranked["setting"].astype(str).drop_duplicates().head(NAMED).tolist())
    in_turns = dict.fromkeys(name for name in chain.from_iterable(zip_longest(*rankings)) if name)
    return list(in_turns)[:NAMED]


def prepared(tables: Sequence[pd.DataFrame]) -> list[pd.DataFrame]:
    """The points of each group with the columns `_named` and `_seat`, so that a setting looks alike in all of them."""
    chosen = [named(points) for points in tables]
    found = _seats(tables, chain.from_iterable(chosen))
    return [
        points.assign(_named=points["setting"].isin(names), _seat=_column(points, found))
        for points, names in zip(tables, chosen, strict=True)
    ]


def _column(points: pd.DataFrame, found: Mapping[str, Seat]) -> pd.Series[Any]:
    return pd.Series([found[name] for name in points["setting"].astype(str)], index=points.index, dtype=object)


def of_settings(shown: int, settings: int, others: str | None = None) -> str:
    """Of a title; `others`: what is grey."""
    return f"{shown} leading settings of {settings}" + (f"; grey: {others}" if others else "")
