#!/usr/bin/env python3
"""Turn result files into a summary, a CSV, plots and a report; see --help."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from batch_inference.results import Result


class InputError(Exception):
    """A mistake the user can fix: the message names the flag, the value found, and what to do."""


def main() -> int:
    args = parse_arguments()
    try:
        check_input(args.input)
        # Slow imports: --help and wrong input must not pay for them.
        from batch_inference.tables import find_results, points_table

        results, errors = find_results(args.input)
        for error in errors:
            print(f"error: {error}", file=sys.stderr)
        if not results:
            raise InputError(f"--input {args.input}: no result file that can be read; give a folder of result files")
        table = points_table(results)
        written = write_files(results, table, output_folder(args), plots=not args.no_plots)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_summary(results, table, written)
    return 1 if errors else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Summary, CSV, plots and report of the result files of batch_inference_experiment.py.",
        epilog="exit codes: 0 all files analysed; 1 some could not be read; 2 wrong use",
        allow_abbrev=False,
    )
    parser.add_argument("--input", type=Path, required=True, help="a result file, or a folder of them")
    parser.add_argument("--output-dir", type=Path, help="where to write (default: 'analysis' beside the result files)")
    parser.add_argument("--no-plots", action="store_true", help="leave the plots out")
    return parser.parse_args()


def check_input(path: Path) -> None:
    if not path.exists():
        raise InputError(f"--input {path}: there is no such file or folder; give a result file or a folder of them")
    if path.is_dir() and not any(path.glob("*.json")):
        raise InputError(f"--input {path}: the folder holds no *.json file; give the folder of the result files")


def output_folder(args: argparse.Namespace) -> Path:
    """Made where it is missing."""
    base: Path = args.input if args.input.is_dir() else args.input.parent
    folder: Path = args.output_dir or base / "analysis"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output-dir {folder}: cannot be made: {error.strerror}; give another folder") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output-dir {folder}: cannot be written to; give another folder")
    return folder


def write_files(results: list[Result], table: pd.DataFrame, folder: Path, *, plots: bool) -> list[str]:
    """CSV, plots and report; a line for each, and for each plot that was left out."""
    from batch_inference.report import markdown
    from batch_inference.tables import write_csv

    write_csv(table, folder / "results.csv")
    paths: list[Path] = []
    left_out: list[str] = []
    if plots and len(table):
        from batch_inference.plots import draw_all

        paths, left_out = draw_all(table, folder)
    (folder / "report.md").write_text(markdown(results, table, paths, left_out), encoding="utf-8")
    named = [("table", folder / "results.csv"), ("report", folder / "report.md"), *(("plot", path) for path in paths)]
    return [f"{kind:<7} {path}" for kind, path in named] + [f"no plot {reason}" for reason in left_out]


def print_summary(results: list[Result], table: pd.DataFrame, written: list[str]) -> None:
    from batch_inference.report import summary

    try:
        print(summary(results, table), "", *written, sep="\n", flush=True)
    except BrokenPipeError:
        # The reader, `head` perhaps, has seen enough. Nothing more can be said on standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
