"""The last sections of the report: what was measured, the settings, and what failed or is doubtful."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from batch_inference.analyze.answers import Analysis
from batch_inference.analyze.sections import ROW_LIMIT, Section
from batch_inference.analyze.tables import TO_MENTION, MeasuredSetting, differing, setting_labels
from batch_inference.analyze.wording import column_words, few
from batch_inference.core.text import NO_REASON, counted, listed

# A reason names so many of the settings that have it; results.csv has all.
_PLACES = 5


def measured(analysis: Analysis) -> Section:
    points = analysis.rows
    names = {"model": "model", "device": "device_name", "vLLM": "vllm_version", "dtype": "dtype",
             "output tokens": "max_tokens", "host": "host"}  # fmt: skip
    pairs = [
        # Queue points have no output length of their own.
        (label, _names((analysis.points if column == "max_tokens" else points)[column].dropna()))
        for label, column in names.items()
        if column not in analysis.unlike
    ]
    pairs.insert(0, ("files", _files(analysis)))
    lines = [*analysis.notes, *_groups(analysis)]
    for group in analysis.groups:
        if mixed := differing(group.points, TO_MENTION):
            where = f"The settings of group {group.number}" if analysis.unlike else "The settings"
            lines.append(f"{where} also differ in {listed(map(column_words, mixed))}; results.csv has the values.")
    return Section("Measured", [(label, value) for label, value in pairs if value], lines=lines)


def _files(analysis: Analysis) -> str:
    folders = {setting.path.parent for setting in analysis.settings}
    names = few([setting.file for setting in analysis.settings], 3)
    return f"{len(analysis.settings)} in {counted(len(folders), 'folder')}: {names}"


def _groups(analysis: Analysis) -> Iterator[str]:
    if analysis.unlike:
        yield (f"{len(analysis.groups)} groups of points that cannot be compared with each other: they differ in "
               f"{listed(map(column_words, analysis.unlike))}. Each is ranked on its own:")  # fmt: skip
        for group in analysis.groups:
            yield f"{group.name} ({_names(group.points['setting'])})"
    for group in analysis.groups:
        if group.mixed:
            yield f"MIXED: --allow-mixed ranks points together that differ in {listed(map(column_words, group.mixed))}."


def _names(column: pd.Series[Any]) -> str:
    return few(list(map(str, column.unique())), 12)


def settings(analysis: Analysis) -> Section:
    labels = setting_labels(analysis.settings)
    several = len(analysis.groups) > 1
    # By file, because a setting has a name for each number of tokens per step.
    numbers = analysis.points[["file", "group"]].drop_duplicates()
    of_file = numbers.groupby("file")["group"].agg(lambda found: ",".join(map(str, sorted(found))))
    rows = []
    ordered = sorted(analysis.settings, key=lambda setting: (setting.num_devices, labels[setting.path]))
    for setting in ordered[:ROW_LIMIT]:
        label = labels[setting.path]
        group = [of_file.get(setting.file, "")] if several else []
        done = f"{setting.points_ok}/{setting.points_asked}"
        load = "" if setting.load_s is None else f"{setting.load_s:.1f}"
        label += "" if setting.part_of is None else f", in {setting.file}"
        rows.append([label, *group, str(setting.num_devices), done, setting.status, load])
    header = ("setting", *(["group"] if several else []), "devices", "points ok", "status", "load s")
    to_the_right = frozenset({"devices", "points ok", "load s"})
    more = len(ordered) - len(rows)
    return Section("Settings", header=header, rows=rows, numbers=to_the_right, more=more, is_detail=True)


def problems(analysis: Analysis) -> Section:
    labels = setting_labels(analysis.settings)
    points = analysis.rows
    is_ok = points["status"] == "ok"
    lines = [f"{labels[setting.path]} failed: {setting.failure}" for setting in analysis.settings if setting.failure]
    lines += [_interrupted(labels[setting.path], setting) for setting in analysis.settings if setting.is_interrupted]
    lines += [
        f"{labels[setting.path]} began on devices that another sweep used: {'; '.join(setting.used_by_others)}"
        for setting in analysis.settings
        if setting.used_by_others
    ]
    lines += _by_reason(points[~is_ok], "status", "reason")
    lines += _by_reason(points[is_ok & points["verdict"].isin(["suspect", "invalid"])], "verdict", "verdict_reasons")
    return Section("Failed, missing and doubtful", lines=lines)


def _interrupted(name: str, setting: MeasuredSetting) -> str:
    missing = setting.points_asked - setting.num_points
    are = "is" if missing == 1 else "are"
    return (
        f"{name} was interrupted: {missing} of {counted(setting.points_asked, 'point')} {are} missing. Run the same "
        "command again to measure what is left."
    )


def _by_reason(points: pd.DataFrame, what: str, why: str) -> Iterator[str]:
    """Each reason once, with all settings and points that have it."""
    for (word, reason), rows in points.fillna({why: NO_REASON}).groupby([what, why], observed=True, sort=False):
        places = [f"{name}, {_where(of)}" for name, of in rows.groupby("setting", observed=True, sort=False)]
        yield f"{word} ({few(places, _PLACES, '; and {} more settings', '; ')}): {reason}"


def _where(rows: pd.DataFrame) -> str:
    """batch 1, 4 x length 512; single points are not named where the shapes make no full grid."""
    if rows["workload"].notna().any():
        return f"{listed(sorted(rows['batch_size'].unique()))} at once"
    # Beside queue points, which have none, lengths are no whole numbers to pandas.
    rows = rows.astype({"seq_len": int})
    batches, lengths = sorted(rows["batch_size"].unique()), sorted(rows["seq_len"].unique())
    if len(rows) < len(batches) * len(lengths):
        points = zip(rows["batch_size"], rows["seq_len"], strict=True)
        return f"batch x length {listed(f'{batch}x{length}' for batch, length in points)}"
    return f"batch {listed(batches)} x length {listed(lengths)}"
