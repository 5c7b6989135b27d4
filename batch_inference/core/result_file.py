"""Result files on disk: written completely or not at all, and read with every value checked against its type.

python -m batch_inference.core.result_file >batch_inference/core/result.schema.json      the JSON Schema
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from msgspec import Struct

from batch_inference.core.failures import WorkFailedError
from batch_inference.core.files import read_regular, real, write_whole
from batch_inference.core.results import SCHEMA_VERSION, Environment, Point, Result, StoredConfig
from batch_inference.core.text import short_name


class ResultFileError(WorkFailedError):
    """A result file that cannot be read or written: the message names the file, the problem, and what to do."""


# --- writing ------------------------------------------------------------------------------------------------------


def to_json(result: Result) -> str:
    """One line per point, because one number per line is unreadable; the rest is indented.

    Raises ValueError, naming the field, for NaN or infinity: msgspec would silently write them as null.
    """
    lines = ",\n".join(point_line(point) for point in result.points)
    return "".join([head_of(result), lines and lines + "\n", POINTS_END])


# The head ends in this line; then come the lines of the points, separated by commas, and then the end.
FIRST_POINT = b' "points": [\n'
POINTS_END = " ]\n}\n"


def head_of(result: Result) -> str:
    """Everything up to where the points begin. Raises ValueError as `to_json` does."""
    document = {name: getattr(result, name) for name in result.__struct_fields__ if name != "points"}
    for name, value in document.items():
        check_finite(value, f"{result.name}.{name}")
    text = msgspec.json.format(_encoded({"schema_version": result.schema_version, **document}), indent=1).decode()
    return text.removesuffix("\n}") + ",\n" + FIRST_POINT.decode()


def point_line(point: Point) -> str:
    """One point as one line, without a line break. Raises ValueError as `to_json` does."""
    check_finite(point, f"batch_size {point.batch_size}, seq_len {point.seq_len}")
    return _encoded(point).decode()


def check_finite(value: Any, where: str) -> None:
    for place in _not_finite(value, where):
        raise ValueError(f"{place} is not a finite number")


def _encoded(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        # A path or a variable may contain bytes that are not UTF-8.
        return msgspec.json.encode(_encodable(msgspec.to_builtins(value)))


def _encodable(value: Any) -> Any:
    """The same, with a question mark for every character that JSON cannot represent."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_encodable(name): _encodable(item) for name, item in value.items()}
    return [_encodable(item) for item in value] if isinstance(value, list) else value


def _not_finite(value: Any, where: str) -> Iterator[str]:
    """The place of every number that is NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield where
    for name, item in _parts(value):
        yield from _not_finite(item, f"{where}{name}")


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What is inside, with its place relative to the whole."""
    if isinstance(value, Struct):
        yield from ((f".{name}", getattr(value, name)) for name in value.__struct_fields__)
    elif dataclasses.is_dataclass(value):
        yield from ((f".{item.name}", getattr(value, item.name)) for item in dataclasses.fields(value))
    elif isinstance(value, dict):
        yield from ((f".{name}", item) for name, item in value.items())
    elif isinstance(value, list) and not _are_finite(value):
        yield from ((f"[{number}]", item) for number, item in enumerate(value))


def _are_finite(values: list[Any]) -> bool:
    """Whether it is a list of finite numbers only: the long lists of a run are, and are checked in one go."""
    try:
        return all(map(math.isfinite, values))
    except TypeError:
        return False


def save_result(result: Result, path: Path) -> None:
    """Raises ResultFileError as `write_document` does."""
    write_document(path, [to_json(result)])


def write_document(path: Path, parts: Iterable[str]) -> None:
    """Raises ResultFileError if the disk or the folder does not allow it; the previous file is then intact."""
    try:
        write_whole(path, parts)
    except OSError as error:
        raise cannot_be_written(path, error) from error


def cannot_be_written(path: Path, error: OSError) -> ResultFileError:
    return ResultFileError(f"{path}: cannot be written: {error.strerror}; free disk space or choose another path")


# --- reading ------------------------------------------------------------------------------------------------------


# --- the journal: points that are not in the file yet -------------------------------------------------------------


class JournalHead(Struct):
    """Its first line: which file it continues. If that is another file, the journal has already been folded in."""

    started_at: str | None
    points: int  # how many the file held


def journal_of(path: Path) -> Path:
    """Beside the file itself if `path` is a link to it."""
    file = real(path)
    return file.with_name(file.name + ".journal")


def _with_journal(result: Result, path: Path) -> Result:
    """The file and its journal are one; a later point replaces an earlier one of the same key. Raises
    ResultFileError."""
    try:
        first, *lines = read_regular(journal_of(path)).split(b"\n")[:-1]  # a line without an end was cut short
    except (OSError, ValueError):
        return result
    try:
        if msgspec.json.decode(first, type=JournalHead) == JournalHead(
            result.environment.started_at, len(result.points)
        ):
            new = {(point := msgspec.json.decode(line, type=Point)).key: point for line in lines}
            result.points = [point for point in result.points if point.key not in new] + list(new.values())
    except (ValueError, RecursionError) as error:
        # The file itself is complete, and need not be moved away.
        raise ResultFileError(f"{journal_of(path)}: has no points of {path.name} ({error}); move it away") from error
    return result


# --- types --------------------------------------------------------------------------------------------------------


class Heading(Struct):
    """What tells one result from another, without its points."""

    name: str
    config: StoredConfig
    environment: Environment


def read_heading(path: Path) -> Heading | None:
    """None if it is not a result of this program."""
    try:
        return msgspec.json.decode(read_regular(path), type=Heading)
    except (OSError, ValueError, RecursionError):
        return None


class _Header(Struct):
    schema_version: int
    config: msgspec.Raw = msgspec.Raw(b"null")


class _PlainHeader(Struct):
    schema_version: int
    config: Any = None


class _Needed(Struct):
    """What `config` must contain: with defaults, a foreign file would look like one of ours."""

    model: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_size: int


def load_result(path: Path) -> Result:
    """Read one result file. Raises ResultFileError, naming the file, the field, its value and what would fit."""
    try:
        data = read_regular(path)
    except OSError as error:
        raise ResultFileError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return _with_journal(_decoded(data), path)
    except _InConfigError as error:
        raise ResultFileError(f"{path}: not a result of this program: config: {error}") from error
    except msgspec.ValidationError as error:
        raise ResultFileError(f"{path}: not a result of this program: {_in_words(error, data)}") from error
    except _OtherVersionError as error:
        raise ResultFileError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ResultFileError(f"{path}: not valid JSON ({error}); move it away, and run that setting again") from error


class _OtherVersionError(ValueError):
    pass


class _InConfigError(ValueError):
    pass


def _decoded(data: bytes) -> Result:
    try:
        header = msgspec.json.decode(data, type=_Header)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        # Python's own reader accepts what version 1 could contain: characters that are not UTF-8.
        return _converted(json.loads(data, parse_constant=_refuse_constant))
    _check_version(header.schema_version)
    if header.schema_version < SCHEMA_VERSION:
        return _converted(msgspec.json.decode(data))
    _check_config(msgspec.json.decode(header.config))
    result = msgspec.json.decode(data, type=Result)
    # Until 2026-11-27 a point that had got more runs could be there twice.
    result.points = list({point.key: point for point in result.points}.values())
    return result


def _converted(document: Any) -> Result:
    header = msgspec.convert(document, _PlainHeader)
    _check_version(header.schema_version)
    _check_config(header.config)
    return msgspec.convert(_from_version_1(document) if header.schema_version == 1 else document, Result)


def _check_version(version: int) -> None:
    if version < 1:
        raise _OtherVersionError("not a result of this program: schema_version is below 1")
    if version > SCHEMA_VERSION:
        told = short_name(str(version), 20)
        raise _OtherVersionError(f"schema_version is {told}, but this program reads up to {SCHEMA_VERSION}; update it")


def _check_config(config: Any) -> None:
    try:
        msgspec.convert(config, _Needed)
    except msgspec.ValidationError as error:
        raise _InConfigError(_in_words(error, msgspec.json.encode(config))) from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _in_words(error: msgspec.ValidationError, data: bytes) -> str:
    """ "Expected `int`, got `str` - at `$.points[0].seq_len`" -> "points[0].seq_len is 'x', expected `int`"."""
    what, _, where = str(error).partition(" - at `")
    place = where.rstrip("`").removeprefix("$").removeprefix(".")
    wanted = f"{what[:1].lower()}{what[1:]}"
    if wanted.startswith("invalid enum value"):
        wanted = "which is not one of the allowed words"
    if not place:
        return wanted
    value = _value_at(place, data)
    if value is None:
        return f"{place}: {wanted}"
    return f"{place} is {short_name(value, 40)}, {wanted.partition(', got')[0]}"


def _value_at(place: str, data: bytes) -> str | None:
    """A plain value of the document as text; None if the place does not exist or holds more than one value."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None  # the types were checked before the end was reached
    for step in re.findall(r"[^.\[\]]+", place):
        if isinstance(document, list) and step.isdecimal() and int(step) < len(document):
            document = document[int(step)]
        elif isinstance(document, dict) and step in document:
            document = document[step]
        else:
            return None
    return repr(document) if isinstance(document, (str, int, float)) else None


def _from_version_1(document: Any) -> Any:
    """The document in version 2. Failures were in `engine`, and each point held what differed in its own engine."""
    if not isinstance(document, dict) or not isinstance(document.get("engine"), dict):
        return document
    engine = document["engine"]
    beside = {name: engine[name] for name in ("failure", "restarts") if name in engine}
    upgraded = {**document, **beside, "engine": engine if "vllm_version" in engine else None}
    earlier: list[dict[str, Any]] = []
    if isinstance(document.get("points"), list):
        upgraded["points"] = [_point_from_version_1(point, engine, earlier) for point in document["points"]]
    return {**upgraded, "earlier_engines": earlier, "schema_version": SCHEMA_VERSION}


def _point_from_version_1(point: Any, engine: dict[str, Any], earlier: list[dict[str, Any]]) -> Any:
    """Adds the point's own engine to `earlier` unless an earlier point had the same."""
    own = point.get("engine") if isinstance(point, dict) else None
    if not isinstance(own, dict):
        return point
    if not own:
        return {**point, "engine": None}
    whole = {**engine, **own, "workers": [], "replicas": []}
    if whole not in earlier:
        earlier.append(whole)
    return {**point, "engine": earlier.index(whole)}


def json_schema() -> dict[str, Any]:
    schema = msgspec.json.schema(Result)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Result", **schema}


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
