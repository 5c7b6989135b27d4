"""The files of an analysis, read; and which of them count: those asked for, and of the same setting the newest."""

from __future__ import annotations

import gc
import os
import signal
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from batch_inference.analyze.flags import UsageError
from batch_inference.analyze.tables import MeasuredSetting, load_setting, setting_labels
from batch_inference.analyze.wording import few
from batch_inference.core.config import Shape
from batch_inference.core.result_file import ResultFileError
from batch_inference.core.text import counted, in_short


def load_settings(
    paths: Sequence[Path], percent: float = 99, top: Path | None = None
) -> list[MeasuredSetting | ResultFileError]:
    """Each file as `load_setting` reads it, or what is wrong with it; many files on several cores."""
    load = partial(_setting_or_error, percent=percent, top=top)
    if len(paths) < _FILES_OF_A_CORE * 2:
        return list(map(load, paths))
    workers = min(8, os.cpu_count() or 1, len(paths) // _FILES_OF_A_CORE)
    # Fresh processes: a fork would copy the threads of whatever is imported here.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin_reading) as pool:
        return list(pool.map(load, paths, chunksize=8))


# Fewer are read before another process has started.
_FILES_OF_A_CORE = 100


def _begin_reading() -> None:
    """In a process of its own, which its parent ends."""
    gc.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _setting_or_error(path: Path, percent: float, top: Path | None) -> MeasuredSetting | ResultFileError:
    try:
        return load_setting(path, percent, top)
    except ResultFileError as error:
        return error


# --- which of them count ---------------------------------------------------------------------------------------------


def chosen(
    settings: Sequence[MeasuredSetting], model: str | None, names: Sequence[str] | None, where: str
) -> tuple[list[MeasuredSetting], list[str]]:
    """The settings of that model and those names, of all that lie `where`; and a line for each choice that leaves
    something out. Raises UsageError for what is not there."""
    kept, notes = list(settings), []
    if model is not None:
        of_model = [setting for setting in kept if model in _names_of_model(setting)]
        if not of_model:
            raise _unknown("--model", model, where, (str(setting.shared["model"]) for setting in kept))
        notes += _left_out(f"--model {model}", len(kept) - len(of_model))
        kept = of_model
    if names is not None:
        # Either the name, or what the report calls a setting where several share it; with all its files.
        counting, _ = newest(settings)
        labels = setting_labels(counting)
        label_of = {_same_setting(one): labels[one.path] for one in counting}
        called = {setting.path: {setting.name, label_of[_same_setting(setting)]} for setting in kept}
        there = set[str]().union(*called.values())
        if missing := [name for name in names if name not in there]:
            raise _unknown("--setting", ",".join(missing), where, (setting.name for setting in kept))
        of_names = [setting for setting in kept if not called[setting.path].isdisjoint(names)]
        notes += _left_out(f"--setting {','.join(names)}", len(kept) - len(of_names))
        kept = of_names
    return kept, notes


def _names_of_model(setting: MeasuredSetting) -> tuple[str, str]:
    """The whole text, and its last part."""
    model = str(setting.shared["model"])
    return model, Path(model).name


def _unknown(flag: str, value: str, where: str, there: Iterable[str]) -> UsageError:
    return UsageError(f"{flag} {in_short(value)}: not found in {where}, which has {few(sorted(set(there)), 10)}")


def _left_out(flag: str, files: int) -> list[str]:
    return [f"{flag}: {counted(files, 'other file')} left out."] if files else []


def newest(settings: Sequence[MeasuredSetting]) -> tuple[list[MeasuredSetting], list[str]]:
    """Of each point that was measured twice the newest, also if it has failed since; and a line for each setting that
    has several files."""
    alike: dict[tuple[Any, ...], list[MeasuredSetting]] = defaultdict(list)
    for setting in settings:
        alike[_same_setting(setting)].append(setting)
    counts, notes = dict[Path, MeasuredSetting](), list[str]()
    for found in alike.values():
        parts = _parts(sorted(found, key=_measured_at, reverse=True))
        counts |= {part.path: part for part in parts if part.num_points or part.part_of is None}
        if len(found) > 1:
            notes.append(_of_several_files(parts))
    return [counts[setting.path] for setting in settings if setting.path in counts], notes


def _parts(files: Sequence[MeasuredSetting]) -> list[MeasuredSetting]:
    """What counts of the files of one setting, the newest first."""
    newest_file, *older = files
    # One without any points failed, and what was asked of it must not be shown as it once was.
    newer = {*(newest_file.shapes or newest_file.asked)}
    parts = [newest_file]
    for one in older:
        parts.append(replace(one.without(newer), part_of=newest_file.path, answers=None))
        newer.update(one.shapes)
    # What another file has is not missing, and what is missing is so once.
    answers = next((one.answers for one in files if one.answers), None)
    told, tried = set[Shape](), frozenset[Shape]().union(*(one.tried for one in files))
    has = {shape for part in parts for shape in part.shapes}
    for place, part in enumerate(parts):
        asked = part.asked.difference(told, has.difference(part.shapes))
        told |= asked
        parts[place] = replace(part, asked=asked, tried=tried)
    return [replace(parts[0], answers=answers), *parts[1:]]


def _of_several_files(parts: Sequence[MeasuredSetting]) -> str:
    last, *older = parts
    gone, cut = ([one.file for one in reversed(older) if bool(one.num_points) == has] for has in (False, True))
    said = [f"{few(gone, 3)} {'does' if len(gone) == 1 else 'do'} not"] if gone else []
    said += [f"of {few(cut, 3)} only the points that no newer file has"] if cut else []
    return f"{last.name} was measured in several files: {last.file} is the newest and counts, {', '.join(said)}."


def _same_setting(setting: MeasuredSetting) -> tuple[Any, ...]:
    """Alike where the same was asked of the same. A file that does not say what was asked is like no other."""
    names = ("config_hash", "max_tokens", "device_kind", "device_name", "device_cores", "vllm_version")
    asked = setting.shared.get("config_hash")
    return (setting.name, *(setting.shared.get(name) for name in names), None if asked else setting.path)


def _measured_at(setting: MeasuredSetting) -> tuple[datetime, str]:
    """When it ended, or at least began; very long ago where nothing tells."""
    for name in ("ended_at", "started_at"):
        try:
            moment = datetime.fromisoformat(str(setting.shared.get(name)))
        except ValueError:
            continue
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC), setting.file
    return datetime.min.replace(tzinfo=UTC), setting.file
