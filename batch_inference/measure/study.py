"""Which file a setting goes to: the one that already has it, or a new one with its own name; and who may write it.

A file is found again by its settings, not by its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.files import check_no_link, check_writable, open_regular
from batch_inference.core.result_file import Heading, journal_of, read_heading
from batch_inference.core.results import Environment
from batch_inference.measure.engine_process import log_paths
from batch_inference.measure.locks import LockedError, lock_of, locked, purpose_of

# Longest text in a file name.
_NO_WORD = re.compile(r"[^A-Za-z0-9.]+")
_HASH = re.compile(r" \([0-9a-f]{16}\)$")  # of a model folder's place
# How many names are tried.
_MOST_NAMES = 10_000


@dataclasses.dataclass(frozen=True)
class Difference:
    """What tells two settings apart."""

    what: str
    before: str
    now: str


@contextlib.contextmanager
def claimed(config: ExperimentConfig, here: Environment) -> Iterator[tuple[ExperimentConfig, list[str]]]:
    """The configuration with its file, claimed while the block runs, and notes for the user. Raises ConfigError
    if the file that the user named holds something else, cannot be written, or is being written by another."""
    notes: list[str] = []
    taken: set[Path] = set()  # by settings that are being measured but have no file yet
    purpose = purpose_of(config)
    while True:
        path, about = choose(config, here, taken)
        chosen = dataclasses.replace(config, output_file=str(path))
        check_writable_paths(chosen)
        try:
            with locked(lock_of(path), purpose) as is_locked:
                # Somebody else may have taken the name since.
                if choose(config, here, taken)[0] != path:
                    continue
                if not is_locked:
                    notes.append(f"{path.parent} cannot lock files: start only one program at a time there")
                yield chosen, [*about, *notes]
                return
        except LockedError as error:
            if config.output_file is None and purpose not in str(error) and path not in taken:
                taken.add(path)
                continue
            raise ConfigError(
                f"--output-file {path}: {error} is measuring into it; wait until it ends, or give another --output-dir"
            ) from None


def choose(config: ExperimentConfig, here: Environment, taken: Collection[Path] = ()) -> tuple[Path, list[str]]:
    """The file, none of those `taken`, and what the user should know about it. Raises ConfigError if a file that the
    user named holds something else."""
    if config.output_file is not None:
        return _named_by_user(config, here), []
    folder, usual = Path(config.output_dir), config.output_path
    same = [
        (heading.environment.started_at or "", path)
        for path in _results_in(folder)
        if (heading := read_heading(path)) and heading.name == config.setting_name
        and not differences(config, here, heading)
    ]  # fmt: skip
    if same:
        return max(same)[1], []
    if _is_free(usual, taken):
        return usual, []
    heading = read_heading(usual)
    told = differences(config, here, heading) if heading else []
    path = _free_name(usual, told, taken)
    holds = f"{told[0].what} {told[0].before}" if told else "something else"
    return path, [f"{usual} holds {holds}; this goes to {path}"]


def _named_by_user(config: ExperimentConfig, here: Environment) -> Path:
    path = config.output_path
    if not os.path.lexists(path) or not path.is_file():  # checked next: whether it can be made
        return path
    heading = read_heading(path)
    if heading is None:
        raise ConfigError(
            f"--output-file {path}: it is not a result of this program; move it away, or give another name"
        )
    told = differences(config, here, heading)
    if told:
        words = "; ".join(f"{one.what} was {one.before}, now {one.now}" for one in told[:5])
        raise ConfigError(f"--output-file {path}: it was measured with different settings: {words}; give another name")
    return path


def differences(config: ExperimentConfig, here: Environment, heading: Heading) -> list[Difference]:
    """What makes points of the two differ: settings, vLLM, or devices."""
    old, new = heading.config.same_settings(), config.same_settings()
    found = [Difference(name, *_told_apart(old[name], new[name])) for name in new if old[name] != new[name]]
    before, now = _place(heading.environment), _place(here)
    return found + [Difference(what, before[what], now[what]) for what in now if before[what] != now[what]]


def _place(environment: Environment) -> dict[str, str]:
    devices = sorted({device.name for device in environment.devices})
    return {"vLLM": environment.versions.get("vllm", "unknown"), "devices": " + ".join(devices) or "unknown"}


def _told_apart(old: object, new: object) -> tuple[str, str]:
    """In few words; of model folders the names, if these are enough."""
    before, now = _short(old), _short(new)
    names = _HASH.sub("", before), _HASH.sub("", now)
    return (before, now) if names[0] == names[1] else names


def _short(value: object) -> str:
    """A value in few words."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    # Of a hub name the last part.
    return value.rstrip("/").rpartition("/")[2] if isinstance(value, str) else str(value)


def _is_free(path: Path, taken: Collection[Path]) -> bool:
    return path not in taken and not os.path.lexists(path)


def _free_name(usual: Path, told: list[Difference], taken: Collection[Path]) -> Path:
    """A name that says what differs, with a number if that is taken too."""
    words = _NO_WORD.sub("-", told[0].now).strip("-.")[:60] if told else ""
    stem = usual.name.removesuffix("_results.json")
    stem = "_".join(filter(None, [stem, words if told and told[0].what == "model" else _worded(told, words)]))
    names = [f"{stem}_results.json", *(f"{stem}_{number}_results.json" for number in range(2, _MOST_NAMES))]
    return next(path for name in names if _is_free(path := usual.with_name(name), taken))


def _worded(told: list[Difference], words: str) -> str:
    """seed_7, vLLM_0.26.0; engine arguments need no name in front."""
    if not told or told[0].what in ("engine_args", "devices"):
        return words
    return f"{_NO_WORD.sub('-', told[0].what)}_{words}"


def _results_in(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(path for path in folder.glob("*.json") if path.is_file() and not path.name.startswith("."))
    return []


def check_writable_paths(config: ExperimentConfig) -> None:
    """Check that result, log, journal and lock can be written, without changing them. Raises ConfigError."""
    path = checked = config.output_path
    checks: list[tuple[Path, Callable[[Path], None]]] = [
        (path, check_writable),
        *((log, _check_log) for log in log_paths(config)),
        (journal_of(path), check_no_link),
        (lock_of(path), check_no_link),
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for checked, check in checks:
            check(checked)
    except OSError as error:
        what = "it" if checked == path else checked.name
        raise ConfigError(
            f"--output-file {path}: {what} cannot be written: {error.strerror}; "
            "give a file in a folder you may write to"
        ) from error


def _check_log(path: Path) -> None:
    if path.exists():
        with open_regular(path, "ab"):
            pass
    else:  # a link may lead where nothing can be made
        check_writable(path)
