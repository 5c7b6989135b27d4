"""The flags of analyze_results.py; no import here is slow, so that --help is not."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

from batch_inference.core.errors import CleanError
from batch_inference.core.parser import Parser
from batch_inference.core.text import quoted
from batch_inference.core.values import non_empty, path_text, plain_text, without_value

DESCRIPTION = """\
Turn the result files of batch_inference_experiment.py into a decision: the
best setting and batch size per prompt length, TP against PP against DP,
scaling, and the changes since earlier results. It prints a summary, and writes
report.html, report.md, results.csv, summary.json and plots. It also writes the
winner as files to use: a config for `vllm serve`, and a script."""

EPILOG = """\
examples:
  python analyze_results.py --input experiment_results
  python analyze_results.py --input experiment_results --max-ttft-s 0.5
  python analyze_results.py --input new --compare old --fail-on-regression 3

exit codes:
  0 everything was read
  1 some files could not be read (they are named), or no point was measured
  2 wrong use   3 a regression, with --fail-on-regression
  129, 130, 143 interrupted"""


# Of --goal.
GOALS = ("throughput", "per-device", "latency", "cost")
# More than any number of seconds, money or percent that is meant: results are computed from it without overflow.
MOST = 1e9


class UsageError(CleanError):
    """A mistake the user can fix: the message names the flag, the value found, and what to do."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Raises UsageError naming the flag."""
    words = sys.argv[1:] if argv is None else argv
    if flag := without_value(words):
        raise UsageError(f"{flag} --: the dashes are no value; give one")
    flags = build_parser().parse_args(words)
    if flags.fail_on_regression is not None and flags.compare is None:
        raise UsageError(
            f"--fail-on-regression {flags.fail_on_regression:g}: there is nothing to compare with; add --compare DIR"
        )
    if flags.goal == "cost" and flags.device_hour_price is None:
        raise UsageError("--goal cost: nothing says what a device costs; add --device-hour-price PRICE")
    if flags.no_plots:
        flags.plots = ()
    return flags


def build_parser() -> argparse.ArgumentParser:
    usage = "python analyze_results.py --input PATH [options]"
    parser = Parser(UsageError, usage=usage, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add(
        "--input",
        type=old_path,
        required=True,
        metavar="PATH",
        help="a result file, or a folder of them with its subfolders",
    )
    add(
        "--output-dir",
        type=new_path,
        metavar="DIR",
        help="where to write; default: `analysis` in the folder, or `analysis_tp_2` beside tp_2_results.json",
    )
    add("--model", type=name, metavar="NAME", help="only results of this model: the whole name, or its last part")
    add("--setting", type=names_of("setting"), metavar="NAMES", help="only these settings, like `tp_2,dp_2`")
    _add_decision_flags(parser.add_argument_group("the decision"))
    _add_job_flags(parser.add_argument_group("a job (queue points)"))
    _add_comparison_flags(parser.add_argument_group("what is compared"))
    drawn = parser.add_argument_group("plots").add_mutually_exclusive_group()
    drawn.add_argument(
        "--plots", type=names_of("plot"), metavar="NAMES", help="draw only these, like `throughput,pareto`"
    )
    drawn.add_argument("--no-plots", action="store_true", help="draw no plots")
    return parser


def _add_decision_flags(group: argparse._ArgumentGroup) -> None:
    for name, what in (
        ("latency", "batch latency"),
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
        help="the percentile that these limits apply to; default: 99",
    )
    group.add_argument(
        "--goal",
        choices=GOALS,
        default=GOALS[0],
        help="the goal whose winner is written to `best`; default: throughput",
    )
    group.add_argument(
        "--device-hour-price",
        type=positive,
        metavar="PRICE",
        help="price of one device for an hour; adds the cost per million output tokens, and of a job",
    )


def _add_job_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--job", type=old_path, metavar="FILE", help="forecast this workload instead of the one that was sampled")
    add("--job-requests", type=whole, metavar="N", help="forecast this many requests of its kind, like 5000000 or 1e9")
    add(
        "--deadline-hours",
        type=positive,
        metavar="H",
        help="say how many replicas and devices finish the job in this time",
    )


def _add_comparison_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--baseline",
        type=name,
        metavar="NAME",
        help="the setting that scaling is measured against; default: the one with the fewest devices",
    )
    add(
        "--compare",
        type=old_path,
        metavar="PATH",
        help="earlier results, compared point by point with those of --input",
    )
    add(
        "--fail-on-regression",
        type=not_negative,
        metavar="PCT",
        help="exit code 3 if a point is lost, or worse by more than PCT %%",
    )
    add(
        "--group-by",
        type=names_of("column"),
        metavar="COLUMNS",
        help="rank points together if these columns agree",
    )
    add("--allow-mixed", action="store_true", help="rank points together even if they are not alike; titles say so")


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number")
    if abs(value) > MOST:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is over {MOST:.0f}")
    return value


def positive(text: str) -> float:
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def whole(text: str) -> int:
    value = positive(text)
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number")
    return int(value)


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


def name(text: str) -> str:
    return _checked(plain_text, text)


def new_path(text: str) -> Path:
    return Path(_checked(path_text, text))


def old_path(text: str) -> Path:
    """What is only read may be called as it likes."""
    return Path(_checked(non_empty, text))


def _checked(check: Callable[[str], str], text: str) -> str:
    try:
        return check(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{quoted(text)} was given; {error}") from None


def names_of(what: str) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        found = tuple(one.strip() for one in name(text).split(",") if one.strip())
        if not found:
            raise argparse.ArgumentTypeError(f"{quoted(text)} names no {what}")
        return found

    return names
