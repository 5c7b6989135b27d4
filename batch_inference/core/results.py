"""THE RESULT SCHEMA: the types of a result file, its version, and how it is saved and loaded.

Raw measurements are the truth; `summary` is derived by metrics.py and can always be computed again.
An unknown number is None with a reason beside it, never 0, -1, NaN or "inf".
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

# History
#   1  first version
SCHEMA_VERSION = 1

RunStatus = Literal["complete", "partial", "failed"]
PointStatus = Literal["ok", "oom", "timeout", "error", "skipped"]
PointKey = tuple[int, int, int]  # batch_size, seq_len, max_tokens
Verdict = Literal["valid", "suspect", "invalid"]


class ResultFileError(Exception):
    """A result file that cannot be read or written: the message names the file, what is wrong, what to do."""


@dataclass(frozen=True)
class Requests:
    """One list entry per request of a run, over all replicas, in submission order; all durations in seconds."""

    ttft_s: list[float]  # arrival to first token, waiting in the queue included
    latency_s: list[float]  # arrival to last token
    queue_s: list[float]  # arrival to first scheduled
    output_tokens: list[int]


@dataclass(frozen=True)
class Run:
    """One timed submission of a point's batch, on all replicas at once."""

    latency_s: float  # common start to the last replica's end
    prompt_tokens: int  # all replicas, counted from the outputs
    output_tokens: int
    replicas: list[dict[str, Any]]  # replica, start_s and end_s (from the common start), tokens
    requests: Requests
    energy_j: float | None
    # used_gib: one number per device (scope "device") or replica (scope "replica"), or None; where it is known,
    # peak_kv_use: share of the KV cache in use at the fullest moment, of the fullest replica
    memory: dict[str, Any]
    # preemptions, prefix_cache_hit_tokens; where they are known, jit_compilations (kernels that vLLM compiled during
    # the run) and peak_running (most requests that ran at once, of the replica with the fewest)
    counters: dict[str, int]
    unknown: dict[str, str] = field(default_factory=dict)  # name of a number that is None -> why
    # Where they were watched: sm_mhz (one number per device), throttle_reasons (NVML's words), other_processes (count)
    clocks: dict[str, Any] = field(default_factory=dict)


@dataclass
class Point:
    """One (batch_size, seq_len) of the grid at a fixed max_tokens."""

    batch_size: int  # requests handed to each replica
    seq_len: int  # prompt length in tokens, exact
    max_tokens: int  # output tokens of each request, exact
    status: PointStatus
    reason: str | None = None
    failure: str | None = None  # the class of the failure, of failures.py
    log_tail: list[str] | None = None
    verdict: Verdict | None = None
    verdict_reasons: list[str] = field(default_factory=list)
    # latency_s, jit_compilations where there were any; reason: of a timed run that was moved here, why
    warmups: list[dict[str, Any]] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    summary: dict[str, float | None] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)  # of an earlier sweep: what differs from the result's engine

    @property
    def key(self) -> PointKey:
        return (self.batch_size, self.seq_len, self.max_tokens)


@dataclass
class Result:
    """One setting: what was asked, where it ran, what vLLM made of it, and every point."""

    name: str
    status: RunStatus
    config: dict[str, Any]
    environment: dict[str, Any]
    engine: dict[str, Any]
    points: list[Point] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def engine_of(self, point: Point) -> dict[str, Any]:
        """The engine that measured the point."""
        return {**self.engine, **point.engine}

    @property
    def devices(self) -> list[dict[str, Any]]:
        """What the environment says of each device."""
        devices = self.environment.get("devices")
        return [device for device in devices if isinstance(device, dict)] if isinstance(devices, list) else []

    @property
    def data_parallel_size(self) -> int:
        return int(self.config["data_parallel_size"])

    @property
    def num_devices(self) -> int:
        """Devices of the setting: TP x PP x DP."""
        tp, pp = int(self.config["tensor_parallel_size"]), int(self.config["pipeline_parallel_size"])
        return tp * pp * self.data_parallel_size


def to_json(result: Result) -> str:
    document = {"schema_version": result.schema_version, **asdict(result)}
    return json.dumps(document, allow_nan=False, indent=1, default=_refuse)


def save_result(result: Result, path: Path) -> None:
    """Write beside and rename, so that a reader sees the old file or the new one, never half of one.

    Raises ResultFileError when the disk or the folder does not allow it; the previous file is intact then.
    """
    text = to_json(result) + "\n"
    beside = _beside(path)
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise ResultFileError(
            f"{path}: cannot be written: {error.strerror}; free the disk or choose another path"
        ) from error
    finally:
        # Gone where it was renamed; left where the disk is full, or somebody interrupted.
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raises OSError unless a file can be made beside `path`; the file at `path` is not touched."""
    beside = _beside(path)
    beside.write_text("{}")
    beside.unlink()


def _beside(path: Path) -> Path:
    # Per-process name: two writers of one file must not share a temporary one.
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def load_result(path: Path) -> Result:
    """Read one result file. Raises ResultFileError naming the file and the reason."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise ResultFileError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ResultFileError(f"{path}: not valid JSON ({error}); run that setting again with --overwrite") from error
    if not isinstance(document, dict) or "schema_version" not in document:
        raise ResultFileError(f"{path}: not a result of this program (no schema_version)")
    version = document["schema_version"]
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ResultFileError(
            f"{path}: schema_version is {version!r}, this program reads up to {SCHEMA_VERSION}; update this program"
        )
    try:
        return _result_from(document)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ResultFileError(f"{path}: not a result of this program ({_describe(error)})") from error


def _result_from(document: dict[str, Any]) -> Result:
    known = {item.name for item in fields(Result)}
    values = {key: value for key, value in document.items() if key in known}
    values["points"] = [_point_from(point) for point in document["points"]]
    result = Result(**values)
    for section in ("config", "environment", "engine"):
        if not isinstance(getattr(result, section), dict):
            raise TypeError(f"{section} is not an object")
    if result.num_devices < 1:
        raise ValueError(f"a setting with {result.num_devices} devices")
    return result


def _point_from(document: dict[str, Any]) -> Point:
    point = Point(**document)
    for name in ("batch_size", "seq_len", "max_tokens"):
        if type(getattr(point, name)) is not int:
            raise TypeError(f"{name} is {getattr(point, name)!r}, not a whole number")
    point.runs = [Run(**{**run, "requests": Requests(**run["requests"])}) for run in document.get("runs", [])]
    for run in point.runs:
        if type(run.latency_s) not in (int, float) or run.latency_s <= 0:
            raise ValueError(f"latency_s is {run.latency_s!r}")
    return point


def _describe(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _refuse(value: object) -> NoReturn:
    raise TypeError(f"{type(value).__name__} does not belong in a result file")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
