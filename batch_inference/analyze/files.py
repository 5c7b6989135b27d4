"""The files that an analysis reads, and the folder that it writes to."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from batch_inference.analyze.flags import UsageError

SUMMARY = "summary.json"
# What the folder of an analysis is called, or begins with; such folders hold no results.
ANALYSIS = "analysis"
# And that of what is to be used.
BEST = "best"
# Somebody's whole disk has more, and reading every JSON file of it takes hours.
MOST_FOLDERS = 10_000


@dataclass(frozen=True)
class Found:
    """The result files at a path or below it, and what is wrong with folders that cannot be read."""

    paths: list[Path] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def find_files(flag: str, path: Path, others: Iterable[Path | None] = ()) -> Found:
    """The JSON files at `path`: itself, or those in it and in the folders below it, but not those in `others`.

    Raises UsageError where there are none.
    """
    try:
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            return _found_below(flag, path, others)
    except FileNotFoundError:
        raise UsageError(f"{flag} {path}: does not exist; give a result file, or the folder that holds some") from None
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(kind):
        raise UsageError(f"{flag} {path}: is no regular file and no folder; give a result file, or a folder of them")
    return Found([path])


def _found_below(flag: str, top: Path, others: Iterable[Path | None]) -> Found:
    """Raises OSError where `top` cannot be read."""
    found = Found()
    for number, (folder, files) in enumerate(_folders(top, others)):
        if number == MOST_FOLDERS:
            raise UsageError(
                f"{flag} {top}: more than {MOST_FOLDERS} folders lie below it; give the folder that the results are in"
            )
        if not isinstance(files, OSError):
            found.paths.extend(files)
        elif folder == top:
            raise files
        else:
            found.unreadable.append(f"{folder}: this folder cannot be read: {files.strerror}")
    if not found.paths:
        if any(files and not isinstance(files, OSError) for _, files in _folders(top, ())):
            raise UsageError(
                f"{flag} {top}: holds only results of the other set, or of --output-dir; keep the two sets apart"
            )
        raise UsageError(f"{flag} {top}: holds no result files (*.json); run an experiment with its output there")
    return found


# By which the kernel knows a file or folder, whatever links lead to it.
_Identity = tuple[int, int]


def _folders(top: Path, others: Iterable[Path | None]) -> Iterator[tuple[Path, list[Path] | OSError]]:
    """Each folder from `top` down with the result files in it, or why it cannot be read. Links come last, so that what
    they lead to has its own name; what was seen already is not seen again."""
    seen = {identity for other in others if other and (identity := _identity(other))} - {_identity(top)}
    waiting, links = [top], list[Path]()
    while waiting or links:
        folder = (waiting or links).pop(0)
        if (identity := _identity(folder)) in seen:
            continue
        if identity:
            seen.add(identity)
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: (entry.is_symlink(), entry.name))
        except OSError as error:
            yield folder, error
            continue
        yield folder, [folder / entry.name for entry in entries if _may_be_a_result(entry, seen)]
        for entry in filter(_may_hold_results, entries):
            (links if entry.is_symlink() else waiting).append(folder / entry.name)


def _may_hold_results(entry: os.DirEntry[str]) -> bool:
    try:
        return not entry.name.startswith((".", ANALYSIS)) and entry.is_dir()
    except OSError:
        return False  # a loop of links


def _identity(path: Path) -> _Identity | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _may_be_a_result(entry: os.DirEntry[str], seen: set[_Identity]) -> bool:
    """Names that begin with a dot are half-written files, and what macOS leaves on foreign disks. The summary is this
    program's own, where --output-dir was the folder of the results. `seen` grows by the file."""
    if not entry.name.endswith(".json") or entry.name.startswith(".") or entry.name == SUMMARY:
        return False
    try:
        status = entry.stat()
    except OSError:
        return True  # a link to nothing: whoever reads it says so
    identity = (status.st_dev, status.st_ino)
    if not stat.S_ISREG(status.st_mode) or identity in seen:
        return False
    seen.add(identity)
    return True


# --- the folder that is written to --------------------------------------------------------------------------------


def make_folder(folder: Path) -> Path:
    """Raises UsageError unless files can be written into `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_this_folder(folder, f"cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise not_this_folder(folder, "cannot be written to")
    return folder


def not_this_folder(folder: Path, why: str) -> UsageError:
    return UsageError(f"--output-dir {folder}: {why}; choose another")


def default_folder(path: Path) -> Path:
    """Where the analysis of `path` goes unless --output-dir says otherwise: that of a single file does not replace the
    one of its folder."""
    if path.is_dir():
        return path / ANALYSIS
    return path.with_name(f"{ANALYSIS}_{path.stem.removesuffix('_results')}")


def folder_to_use(path: Path, output_dir: Path | None) -> Path:
    """Where the winner of `path` is written to be used: beside its analysis, so in the folder of the results."""
    if output_dir:
        return output_dir / BEST
    analysis = default_folder(path)
    return analysis.with_name(analysis.name.replace(ANALYSIS, BEST, 1))


# --- plots of earlier analyses ------------------------------------------------------------------------------------


# Into the first bytes of a file go its format's header and the mark.
_HEAD_BYTES = 4096


def mark_of(plot: Path) -> str:
    """What a plot says of its origin, in the metadata of PNG and SVG."""
    return f"batch_inference analyze_results.py: {plot.name}"


def dark_variant(plot: Path) -> Path:
    """The same plot, for a dark page."""
    return plot.with_stem(f"{plot.stem}_dark")


def remove_plots(folder: Path, keep: Iterable[Path]) -> None:
    """Removes the plots that this program wrote into `folder`, but those to `keep` and their dark variants. What has no
    mark is another program's, and what has the mark of another name is a copy that somebody made."""
    kept = {name for path in keep for name in (path.name, dark_variant(path).name)}
    for path in sorted([*folder.glob("*.png"), *folder.glob("*.svg")]):
        if path.name not in kept and _is_marked(path):
            path.unlink()


def _is_marked(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return mark_of(path).encode() in file.read(_HEAD_BYTES)
    except OSError:
        return False
