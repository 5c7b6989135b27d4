"""The files that an analysis reads, and the folder that it writes to."""

from __future__ import annotations

import os
from pathlib import Path

from batch_inference.analyze.flags import UsageError

SUMMARY = "summary.json"


def find_files(flag: str, path: Path) -> list[Path]:
    """The JSON files at `path`: itself, or those directly in it. Raises UsageError where there are none."""
    try:
        if not path.exists():
            raise UsageError(f"{flag} {path}: does not exist; give a result file, or the folder that holds some")
        if not path.is_dir():
            return [path]
        found = sorted(file for file in path.glob("*.json") if _may_be_a_result(file))
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot be read: {error.strerror}") from error
    if not found:
        raise UsageError(f"{flag} {path}: holds no result files (*.json); run an experiment with its output there")
    return found


def _may_be_a_result(file: Path) -> bool:
    """Names that begin with a dot are half-written files, and what macOS leaves on foreign disks. The summary is this
    program's own, where --output-dir was the folder of the results."""
    return not file.name.startswith(".") and file.name != SUMMARY and not file.is_dir()


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
    """Where the analysis of `path` goes unless --output-dir says otherwise."""
    return (path if path.is_dir() else path.parent) / "analysis"
