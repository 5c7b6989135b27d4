#!/usr/bin/env python3
"""Turn result files into a summary, a CSV, plots and a report; see --help."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from batch_inference.results import ResultFileError

if TYPE_CHECKING:
    from batch_inference.tables import Setting

DESCRIPTION = """\
Turn the result files of batch_inference_experiment.py into a decision: the
best setting and batch size per prompt length, as a summary, results.csv
(one row per point), report.md and plots."""

EPILOG = """\
example:
  python analyze_results.py --input results/tensor-parallel

exit codes:
  0 everything was read   1 some files were not (they are named)   2 wrong use"""


class UsageError(Exception):
    """A mistake the user can fix: the message names the flag, the value found, and what to do."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(argv: list[str] | None = None) -> int:
    # A terminal that cannot show a character gets another one, and no traceback.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        flags = build_parser().parse_args(argv)
        settings, problems = read_settings(find_files(flags.input))
        if not settings:
            raise UsageError(f"--input {nothing_readable(problems)}")
        folder = make_folder(flags.output_dir or default_folder(flags.input))
        summary = write_analysis(settings, folder, with_plots=not flags.no_plots)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed; run ./setup_env.sh and use .venv/bin/python", file=sys.stderr)
        return 2
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    show(summary)
    return 1 if problems else 0


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        usage="python analyze_results.py --input PATH [--output-dir DIR] [--no-plots]",
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", type=Path, required=True, metavar="PATH", help="a result file, or a folder of them")
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="where to write; default: the folder `analysis` beside the files"
    )
    parser.add_argument("--no-plots", action="store_true", help="leave the plots out")
    return parser


def find_files(path: Path) -> list[Path]:
    """The JSON files at `path`: itself, or those directly in it. Raises UsageError where there are none."""
    try:
        if not path.exists():
            raise UsageError(f"--input {path}: does not exist; give a result file, or the folder that holds some")
        if not path.is_dir():
            return [path]
        # Names that begin with a dot are half-written files, and what macOS leaves on foreign disks.
        found = sorted(file for file in path.glob("*.json") if not file.name.startswith(".") and not file.is_dir())
    except OSError as error:
        raise UsageError(f"--input {path}: cannot be read: {error.strerror}") from error
    if not found:
        raise UsageError(f"--input {path}: holds no result files (*.json); run an experiment with its output there")
    return found


def read_settings(paths: list[Path]) -> tuple[list[Setting], list[str]]:
    """What can be read, and what is wrong with the other files."""
    # Slow import; --help must not pay for it.
    from batch_inference.tables import load_setting

    settings, problems = [], []
    for path in paths:
        try:
            settings.append(load_setting(path))
        except ResultFileError as error:
            problems.append(str(error))
    return settings, problems


def nothing_readable(problems: list[str]) -> str:
    shown = "; ".join(problems[:3])
    return shown if len(problems) <= 3 else f"{shown}; and {len(problems) - 3} more files that cannot be read"


def default_folder(path: Path) -> Path:
    return (path if path.is_dir() else path.parent) / "analysis"


def make_folder(folder: Path) -> Path:
    """Raises UsageError unless files can be written into `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output-dir {folder}: cannot be made: {error.strerror}; choose another") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"--output-dir {folder}: cannot be written to; choose another")
    return folder


def write_analysis(settings: list[Setting], folder: Path, *, with_plots: bool) -> str:
    """The summary. Raises UsageError where the files of the analysis cannot be written."""
    try:
        return analyse(settings, folder, with_plots=with_plots)
    except OSError as error:
        raise UsageError(f"--output-dir {folder}: cannot be written to: {error.strerror}; choose another") from error


def analyse(settings: list[Setting], folder: Path, *, with_plots: bool) -> str:
    """Write every file into `folder`, and return the summary that names them."""
    from batch_inference.report import as_markdown, as_text, sections
    from batch_inference.tables import point_table, write_csv

    points = point_table(settings)
    plots: list[tuple[str, Path]] = []
    missing: list[str] = []
    if with_plots:
        # Another slow import, and not needed without plots.
        from batch_inference.plots import write_plots

        plots, missing = write_plots(points, folder)
    parts = sections(settings, points)
    csv_path, report_path = folder / "results.csv", folder / "report.md"
    write_csv(points, csv_path)
    report_path.write_text(as_markdown(parts, plots, missing), encoding="utf-8")
    files = [str(path) for path in (csv_path, report_path, *(path for _, path in plots))]
    return "\n".join([as_text(parts), "", *(f"not drawn: {reason}" for reason in missing), *files])


def show(text: str) -> None:
    """Print; a reader that has seen enough, like `head`, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes once more at exit: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
