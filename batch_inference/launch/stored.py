"""What the folder of a preset holds and tells the launcher: why a setting failed, which points are already measured,
and how long the others may take.

Files are found by the settings in them, never by their names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from batch_inference.core.config import ExperimentConfig, Shape
from batch_inference.core.text import about_time, counted

# A plan for an empty folder needs no installed package.
if TYPE_CHECKING:
    from batch_inference.core.results import Point, Result

_WHOLE_SECOND = 1.0  # some file systems store no fractions


@dataclass(frozen=True)
class Stored:
    """A result file, without its runs."""

    name: str
    model: str
    settings: dict[str, Any]
    device_kind: str | None
    written_s: float
    failure: str | None  # the class of what kept the setting from getting an engine
    measured: frozenset[Shape]
    seconds_per_point: float | None  # in its last sweep, including loading; None if unknown


_read: dict[tuple[Path, int], Stored | None] = {}


def folder_of(config: ExperimentConfig) -> Path:
    return config.output_path.parent


def stored_in(folder: Path) -> list[Stored]:
    """Every readable result file; each is read once until it changes."""
    found = []
    with contextlib.suppress(OSError):
        for path in sorted(folder.glob("*.json")):
            key = (path, path.stat().st_mtime_ns)
            if not path.name.startswith(".") and key not in _read:
                _read[key] = _stored(path)
            if one := _read.get(key):
                found.append(one)
    return found


def _stored(path: Path) -> Stored | None:
    try:
        from batch_inference.core.result_file import ResultFileError, load_result
    except ModuleNotFoundError:  # msgspec comes with vLLM, and plans work without it
        return None
    try:
        result = load_result(path)
    except ResultFileError:
        return None
    points = [one for one in result.points if one.status == "ok"]
    return Stored(
        name=result.name,
        model=result.config.model,
        settings=result.config.same_settings(),
        device_kind=result.environment.device_kind,
        written_s=path.stat().st_mtime,
        failure=result.failure.kind if result.failure else None,
        measured=frozenset(map(_shape, points)),
        seconds_per_point=_seconds_per_point(result, sum(point.engine is None for point in points)),
    )


def _shape(point: Point) -> Shape:
    workload = point.workload.as_tuple() if point.workload else None
    return point.batch_size, point.seq_len, point.max_tokens, workload, point.max_num_batched_tokens


def _seconds_per_point(result: Result, points: int) -> float | None:
    """`points`: how many the last sweep measured. What ran beside others says nothing about running alone."""
    begin, end = result.environment.started_at, result.environment.ended_at
    if not begin or not end or not points or result.config.packed:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()) / points
    return None


def failure_since(config: ExperimentConfig, since_s: float) -> str | None:
    """The class of the reason why this setting has no engine, from a file written after `since_s` (time.time())."""
    for one in stored_in(folder_of(config)):
        if one.name == config.setting_name and one.failure and one.written_s > since_s - _WHOLE_SECOND:
            return one.failure
    return None


def result_of(config: ExperimentConfig) -> Result | None:
    """The result in the folder with the settings of `config`, the newest if there are several."""
    found = file_of(config)
    return found[1] if found else None


def file_of(config: ExperimentConfig) -> tuple[Path, Result] | None:
    """The same, with its path."""
    from batch_inference.core.result_file import ResultFileError, load_result, read_heading

    folder = folder_of(config)
    with contextlib.suppress(OSError):
        paths = [path for path in folder.glob("*.json") if not path.name.startswith(".")]
        for path in sorted(paths, key=lambda one: one.stat().st_mtime, reverse=True):
            heading = read_heading(path)
            if (
                heading
                and heading.name == config.setting_name
                and heading.config.same_settings() == config.same_settings()
            ):
                with contextlib.suppress(ResultFileError):
                    return path, load_result(path)
    return None


def measured_by(config: ExperimentConfig) -> str | None:
    """Who is measuring this setting into this folder now; None if nobody is."""
    from batch_inference.measure.locks import holders_in, purpose_of

    purpose = purpose_of(config)
    return next((holder for holder in holders_in(folder_of(config)) if purpose in holder), None)


def taken_since(config: ExperimentConfig, since_s: float) -> str | None:
    """Who began to measure this setting after `since_s` (time.time()), and may have ended since; None if nobody did."""
    from batch_inference.measure.locks import ANOTHER

    written = (
        one.written_s
        for one in stored_in(folder_of(config))
        if one.name == config.setting_name and one.settings == config.same_settings()
    )
    ended = max(written, default=0.0) > since_s - _WHOLE_SECOND
    return measured_by(config) or (ANOTHER if ended else None)


def is_anything_measured(folder: Path) -> bool:
    return any(one.measured for one in stored_in(folder))


def open_points(config: ExperimentConfig) -> int:
    """Points of its grid that are still to be measured."""
    wanted = set(config.points())
    if not config.overwrite:
        for one in stored_in(folder_of(config)):
            if one.name == config.setting_name and one.settings == config.same_settings():
                wanted -= one.measured
    return len(wanted)


def time_left(configs: Sequence[ExperimentConfig], device_kind: str) -> str | None:
    """For the points of these settings that are not yet measured, from what was measured with the same model on the
    same kind of device; None if there is nothing yet."""
    left_s, used = 0.0, 0
    for config in configs:
        points = open_points(config)
        alike = list(_like(config, device_kind)) if points else []
        if points and not alike:
            return None
        left_s += points * fmean(alike) if alike else 0.0
        used = max(used, len(alike))
    return f"{about_time(left_s)} left, from {counted(used, 'setting')} measured" if used else None


def _like(config: ExperimentConfig, device_kind: str) -> Iterable[float]:
    for one in stored_in(folder_of(config)):
        if one.model == config.model_shown and one.device_kind == device_kind and one.seconds_per_point is not None:
            yield one.seconds_per_point
