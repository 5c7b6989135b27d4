"""What the folder of a preset holds and tells the launcher: why a setting failed, which points are already measured,
and how long the others may take.

Files are found by the settings in them, never by their names.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
    load_s: float | None = None  # until its engine was ready
    job_requests: int | None = None  # of the whole workload
    sampled: Mapping[Shape, int] = field(default_factory=dict)  # how many requests each queue point ran
    pace_s: Mapping[int, float] = field(default_factory=dict)  # its seconds per request of a replica, by batch size


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
    queues = [one for one in points if one.workload and one.runs]
    return Stored(
        name=result.name,
        model=result.config.model,
        settings=result.config.same_settings(),
        device_kind=result.environment.device_kind,
        written_s=path.stat().st_mtime,
        failure=result.failure.kind if result.failure else None,
        measured=frozenset(point.shape for point in points),
        seconds_per_point=_seconds_per_point(result, sum(point.engine is None for point in points)),
        load_s=result.engine.load_s.total_s if result.engine else None,
        job_requests=max((job.requests for job in result.jobs), default=None),
        sampled={point.shape: len(point.runs[-1].requests.latency_s) for point in queues},
        pace_s={} if result.config.packed else {point.batch_size: _pace_s(point) for point in queues},
    )


def _pace_s(point: Point) -> float:
    run = point.runs[-1]
    return run.latency_s * len(run.replicas) / len(run.requests.latency_s)


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
    """How many points of its grid are still to be measured."""
    return len(_open(config))


def _open(config: ExperimentConfig) -> set[Shape]:
    wanted = set(config.points())
    if not config.overwrite:
        for one in stored_in(folder_of(config)):
            if one.name == config.setting_name and one.settings == config.same_settings():
                wanted -= {shape for shape in one.measured if _is_enough(one, shape, config)}
    return wanted


def _is_enough(stored: Stored, shape: Shape, config: ExperimentConfig) -> bool:
    """A queue point whose sample was smaller is measured again."""
    if shape not in stored.sampled:
        return True
    from batch_inference.measure.job import requests_of_point

    asked = requests_of_point(config, shape[0])
    return stored.sampled[shape] >= min(asked, stored.job_requests or asked)


def time_left(configs: Sequence[ExperimentConfig], device_kind: str) -> str | None:
    """For the points of these settings that are not yet measured, from what was measured with the same model on the
    same kind of device; None if there is nothing yet."""
    left_s, used = 0.0, 0
    for config in configs:
        points = _open(config)
        if not points:
            continue
        alike = [one for one in stored_in(folder_of(config)) if _is_alike(one, config, device_kind)]
        if not alike:
            return None
        left_s += _job_s(config, points, alike) if config.workload else len(points) * _mean_s(alike)
        used = max(used, len(alike))
    return f"{about_time(left_s)} left, from {counted(used, 'setting')} measured" if used else None


def _is_alike(stored: Stored, config: ExperimentConfig, device_kind: str) -> bool:
    tells = bool(stored.pace_s) if config.workload else stored.seconds_per_point is not None
    return tells and stored.model == config.model_shown and stored.device_kind == device_kind


def _mean_s(alike: Sequence[Stored]) -> float:
    return fmean(one.seconds_per_point or 0.0 for one in alike)


def _job_s(config: ExperimentConfig, points: Iterable[Shape], alike: Sequence[Stored]) -> float:
    """Samples take as long as they have requests: at the pace that a replica has at the nearest batch size."""
    from batch_inference.measure.job import WARMUP_LIVES, requests_of_point

    seconds = fmean(one.load_s or 0.0 for one in alike)
    for batch_size, *_ in points:
        near = min((size for one in alike for size in one.pace_s), key=lambda size: abs(math.log(size / batch_size)))
        pace_s = fmean(one.pace_s[near] for one in alike if near in one.pace_s)
        whole = min(one.job_requests or math.inf for one in alike)
        requests = min(requests_of_point(config, batch_size), whole) / config.data_parallel_size
        seconds += pace_s * (requests + WARMUP_LIVES * batch_size)
    return seconds
