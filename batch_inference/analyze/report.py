"""Everything that the analysis says, section by section; report.py and page.py write them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from batch_inference.analyze.answers import Analysis, values
from batch_inference.analyze.sections import ROW_LIMIT, Section, best, compared, layouts, pareto, scaling
from batch_inference.analyze.tables import TO_MENTION, differing, setting_labels


def sections(analysis: Analysis) -> list[Section]:
    """Everything that the files say, in the order in which it is read: the decision first."""
    found: list[Section] = []
    if analysis.comparison is not None:
        found.append(compared(analysis.comparison))
    found += [best(part, analysis) for part in analysis.parts]
    for part in analysis.parts:
        found += layouts(part)
    found += [scaling(part) for part in analysis.parts]
    found += [pareto(part) for part in analysis.parts]
    found += [_about(analysis), _settings(analysis), _problems(analysis)]
    return [section for section in found if section.facts or section.rows or section.lines]


# --- what was measured --------------------------------------------------------------------------------------------


def _about(analysis: Analysis) -> Section:
    points = analysis.points
    names = {"model": "model", "device": "device_name", "vLLM": "vllm_version", "dtype": "dtype",
             "output tokens": "max_tokens", "host": "host"}  # fmt: skip
    facts = [
        (label, _few(list(map(str, points[column].dropna().unique()))))
        for label, column in names.items()
        if column not in analysis.unlike
    ]
    lines = list(_groups(analysis))
    for part in analysis.parts:
        mixed = differing(part.points, TO_MENTION)
        if mixed:
            where = f"In group {part.number} settings" if analysis.unlike else "Settings"
            lines.append(f"{where} also differ in {', '.join(mixed)}; see results.csv.")
    return Section("Measured", [(label, value) for label, value in facts if value], lines=lines)


def _groups(analysis: Analysis) -> Iterator[str]:
    if analysis.unlike:
        yield (f"{len(analysis.parts)} groups of unlike points, never ranked together; they differ in "
               f"{', '.join(analysis.unlike)}:")  # fmt: skip
        for part in analysis.parts:
            who = _few(list(map(str, part.points["setting"].unique())))
            yield f"group {part.number}: {values(part.points, analysis.unlike)} ({who})"
    for part in analysis.parts:
        if part.mixed:
            yield f"MIXED, as you allow it: points that differ in {', '.join(part.mixed)} are ranked together."


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _settings(analysis: Analysis) -> Section:
    labels = setting_labels(analysis.settings)
    several = len(analysis.parts) > 1
    pairs = analysis.points[["setting", "group"]].drop_duplicates().astype({"setting": str})
    of_setting = pairs.groupby("setting")["group"].agg(lambda numbers: ",".join(map(str, sorted(numbers))))
    rows = []
    ordered = sorted(analysis.settings, key=lambda setting: (setting.num_devices, labels[setting.path]))
    for setting in ordered[:ROW_LIMIT]:
        label = labels[setting.path]
        group = [of_setting.get(label, "")] if several else []
        done = f"{setting.points_ok}/{setting.points_asked}"
        load = "" if setting.load_s is None else f"{setting.load_s:.1f}"
        rows.append([label, *group, str(setting.num_devices), done, setting.status, load])
    header = ("setting", *(["group"] if several else []), "devices", "points ok", "status", "load s")
    numbers = frozenset({"devices", "points ok", "load s"})
    return Section("Settings", header=header, rows=rows, numbers=numbers, more=len(ordered) - len(rows))


def _problems(analysis: Analysis) -> Section:
    labels = setting_labels(analysis.settings)
    points = analysis.points
    lines = [f"{labels[setting.path]} failed: {setting.failure}" for setting in analysis.settings if setting.failure]
    lost = points[points["status"] != "ok"].fillna({"reason": "no reason is given"})
    for (name, status, reason), rows in lost.groupby(["setting", "status", "reason"], observed=True, sort=False):
        lines.append(f"{name}: {status}, {_where(rows)}: {reason}")
    doubtful = points[(points["status"] == "ok") & points["verdict"].isin(["suspect", "invalid"])]
    doubtful = doubtful.fillna({"verdict_reasons": "no reason is given"})
    keys = ["setting", "verdict", "verdict_reasons"]
    for (name, verdict, reasons), rows in doubtful.groupby(keys, observed=True, sort=False):
        lines.append(f"{name}: {verdict}, {_where(rows)}: {reasons}")
    return Section("Failed, skipped and doubtful", lines=lines)


def _where(rows: pd.DataFrame) -> str:
    """batch 1, 4 x length 512; single points are not named where the shapes make no full grid."""
    batches, lengths = sorted(rows["batch_size"].unique()), sorted(rows["seq_len"].unique())
    if len(rows) < len(batches) * len(lengths):
        return "batch x length " + ", ".join(
            f"{a}x{b}" for a, b in zip(rows["batch_size"], rows["seq_len"], strict=True)
        )
    return f"batch {', '.join(map(str, batches))} x length {', '.join(map(str, lengths))}"
