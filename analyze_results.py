#!/usr/bin/env python3
"""Turn result files into a summary, a CSV, plots and a report; see --help."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from batch_inference.core.results import ResultFileError

if TYPE_CHECKING:
    from batch_inference.analyze.answers import Analysis
    from batch_inference.analyze.tables import Setting

DESCRIPTION = """\
Turn the result files of batch_inference_experiment.py into a decision: the
best setting and batch size per prompt length, TP against PP against DP,
scaling, and the change against earlier results; as a summary, report.html,
report.md, results.csv, summary.json and plots."""

EPILOG = """\
examples:
  python analyze_results.py --input results/tensor-parallel
  python analyze_results.py --input results/llama --max-ttft-s 0.5 --device-hour-price 2.5
  python analyze_results.py --input results/new --compare results/old --fail-on-regression 3

exit codes:
  0 everything was read   1 some files were not (they are named)   2 wrong use
  3 a regression, with --fail-on-regression"""


SUMMARY = "summary.json"


class UsageError(Exception):
    """A mistake the user can fix: the message names the flag, the value found, and what to do."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(argv: list[str] | None = None) -> int:
    # A terminal that cannot show a character gets another one, and no traceback.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        flags = parse(argv)
        settings, problems = read_settings("--input", flags.input, flags.slo_percentile)
        earlier, unread = (
            read_settings("--compare", flags.compare, flags.slo_percentile) if flags.compare else (None, [])
        )
        problems += unread
        check_plots(flags.plots)
        analysis = ask(settings, flags, earlier)
        folder = make_folder(flags.output_dir or default_folder(flags.input))
        text = write_analysis(analysis, problems, folder, plots=flags.plots)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed; run ./setup_env.sh and use .venv/bin/python", file=sys.stderr)
        return 2
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    show(text)
    return gate(analysis, flags.fail_on_regression) or (1 if problems else 0)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Raises UsageError naming the flag."""
    flags = build_parser().parse_args(argv)
    if flags.fail_on_regression is not None and flags.compare is None:
        raise UsageError(f"--fail-on-regression {flags.fail_on_regression:g}: compares with nothing; add --compare DIR")
    if flags.no_plots:
        flags.plots = ()
    return flags


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        usage="python analyze_results.py --input PATH [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input", type=Path, required=True, metavar="PATH", help="a result file, or a folder of them")
    add(
        "--output-dir", type=Path, metavar="DIR", help="where to write; default: the folder `analysis` beside the files"
    )
    _add_decision_flags(parser.add_argument_group("the decision"))
    _add_comparison_flags(parser.add_argument_group("what is compared"))
    drawn = parser.add_argument_group("plots").add_mutually_exclusive_group()
    drawn.add_argument("--plots", type=names_of("plot"), metavar="NAMES", help="only these, like `throughput,pareto`")
    drawn.add_argument("--no-plots", action="store_true", help="leave the plots out")
    return parser


def _add_decision_flags(group: argparse._ArgumentGroup) -> None:
    for name, what in (
        ("latency", "latency of a batch"),
        ("ttft", "time to first token"),
        ("tpot", "time per output token"),
    ):
        group.add_argument(
            f"--max-{name}-s", type=positive, metavar="S", help=f"take only points whose {what} is at most this"
        )
    group.add_argument(
        "--slo-percentile",
        type=percentage,
        default=99.0,
        metavar="P",
        help="the percentile of these limits; default: 99",
    )
    group.add_argument(
        "--device-hour-price", type=positive, metavar="PRICE", help="of one device; adds cost per million output tokens"
    )


def _add_comparison_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--baseline", metavar="NAME", help="scaling is against this setting; default: that of the fewest devices")
    add("--compare", type=Path, metavar="PATH", help="earlier results: point by point better, worse or no difference")
    add("--fail-on-regression", type=not_negative, metavar="PCT", help="exit 3 where a point is lost, or worse by more")
    add("--group-by", type=names_of("column"), metavar="COLUMNS", help="rank together what is alike in these columns")
    add("--allow-mixed", action="store_true", help="rank unlike things together; every title says so")


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return value


def positive(text: str) -> float:
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def not_negative(text: str) -> float:
    value = number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def percentage(text: str) -> float:
    value = number(text)
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 100")
    return value


def names_of(what: str) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        found = tuple(name.strip() for name in text.split(",") if name.strip())
        if not found:
            raise argparse.ArgumentTypeError(f"{text!r} names no {what}")
        return found

    return names


def find_files(flag: str, path: Path) -> list[Path]:
    """The JSON files at `path`: itself, or those directly in it. Raises UsageError where there are none."""
    try:
        if not path.exists():
            raise UsageError(f"{flag} {path}: does not exist; give a result file, or the folder that holds some")
        if not path.is_dir():
            return [path]
        # Names that begin with a dot are half-written files, and what macOS leaves on foreign disks. The summary is
        # this program's own, where --output-dir was the folder of the results.
        found = sorted(
            file
            for file in path.glob("*.json")
            if not file.name.startswith(".") and file.name != SUMMARY and not file.is_dir()
        )
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot be read: {error.strerror}") from error
    if not found:
        raise UsageError(f"{flag} {path}: holds no result files (*.json); run an experiment with its output there")
    return found


def read_settings(flag: str, path: Path, percent: float) -> tuple[list[Setting], list[str]]:
    """What can be read, and what is wrong with the other files. Raises UsageError where nothing can be."""
    paths = find_files(flag, path)
    # Slow import; --help must not pay for it.
    from batch_inference.analyze.tables import load_settings

    settings, problems = [], []
    for found in load_settings(paths, percent):
        if isinstance(found, ResultFileError):
            # A file name may hold a line break; an error is one line.
            problems.append(" ".join(str(found).split()))
        else:
            settings.append(found)
    if not settings:
        raise UsageError(f"{flag} {nothing_readable(problems)}")
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


def ask(settings: list[Setting], flags: argparse.Namespace, earlier: list[Setting] | None) -> Analysis:
    """Raises UsageError where the files cannot answer."""
    from batch_inference.analyze.answers import Question, QuestionError, analyse
    from batch_inference.analyze.decide import Limits

    limits = Limits(flags.max_latency_s, flags.max_ttft_s, flags.max_tpot_s, flags.slo_percentile)
    question = Question(limits, flags.device_hour_price, flags.baseline, flags.group_by, flags.allow_mixed)
    try:
        return analyse(settings, question, earlier)
    except QuestionError as error:
        raise UsageError(str(error)) from error


def gate(analysis: Analysis, percent: float | None) -> int:
    """The exit code of --fail-on-regression: 3 for a regression, 2 where there was nothing to judge."""
    from batch_inference.analyze.compare import regressions

    if percent is None or analysis.comparison is None:
        return 0
    points, flag = analysis.comparison.points, f"--fail-on-regression {percent:g}"
    if found := len(regressions(analysis.comparison, percent)):
        print(f"error: {flag}: {found} of {len(points)} points are lost or worse by more", file=sys.stderr)
        return 3
    if (points["change"] == "unknown").all():
        what = "no point is in both sets with two runs or more; compare settings of the same name and grid"
        print(f"error: {flag}: {what}", file=sys.stderr)
        return 2
    return 0


def write_analysis(analysis: Analysis, problems: list[str], folder: Path, *, plots: tuple[str, ...] | None) -> str:
    """The summary. Raises UsageError where the files of the analysis cannot be written."""
    try:
        return write_all(analysis, problems, folder, plots=plots)
    except OSError as error:
        raise UsageError(f"--output-dir {folder}: cannot be written to: {error.strerror}; choose another") from error


def write_all(analysis: Analysis, problems: list[str], folder: Path, *, plots: tuple[str, ...] | None) -> str:
    """Write every file into `folder`, and return the summary that names them; `plots` None is all of them."""
    from batch_inference.analyze.exports import write_csv
    from batch_inference.analyze.page import as_html
    from batch_inference.analyze.report import sections
    from batch_inference.analyze.summary_json import write_summary
    from batch_inference.analyze.terminal import as_markdown, as_text
    from batch_inference.core.text import wrapped

    drawn, missing = draw(analysis, folder, plots)
    parts = sections(analysis)
    page, report, table = folder / "report.html", folder / "report.md", folder / "results.csv"
    numbers = folder / SUMMARY
    files = [page, report, table, numbers]
    write_csv(analysis.points, table)
    write_summary(analysis, problems, numbers)
    remove_parquet(folder)
    report.write_text(as_markdown(parts, drawn, missing), encoding="utf-8")
    page.write_text(as_html(parts, analysis.points, drawn, missing), encoding="utf-8")
    not_drawn = [line for reason in missing for line in wrapped(f"not drawn: {reason}", indent=2)]
    return "\n".join([as_text(parts), "", *not_drawn, *map(str, files), *(str(path) for _, path in drawn)])


def remove_parquet(folder: Path) -> None:
    """Earlier versions wrote the table as Parquet too: what is left of one tells of another analysis."""
    old = folder / "results.parquet"
    if old.is_file():
        old.unlink()


def check_plots(names: tuple[str, ...] | None) -> None:
    """Raises UsageError for a plot that there is not."""
    if not names:
        return
    from batch_inference.analyze.plots import PLOTS

    known = [name for name, _, _ in PLOTS]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"--plots {','.join(unknown)}: no such plot; choose of {', '.join(known)}")


def draw(analysis: Analysis, folder: Path, names: tuple[str, ...] | None) -> tuple[list[tuple[str, Path]], list[str]]:
    """(title, path) of each plot, and why each of the others was not drawn."""
    if names == ():
        return [], []
    # Another slow import, and not needed without plots.
    from batch_inference.analyze.plots import write_plots

    return write_plots(analysis.parts, folder, names)


def show(text: str) -> None:
    """Print; a reader that has seen enough, like `head`, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes once more at exit: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
