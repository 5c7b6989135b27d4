#!/usr/bin/env python3
"""Turn result files into a summary, a CSV, plots and a report; see --help."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from batch_inference.analyze.files import default_folder, find_files, folder_to_use, make_folder, not_this_folder
from batch_inference.analyze.flags import UsageError, parse
from batch_inference.core.config import LIMITS, flag_of
from batch_inference.core.packages import missing_to_analyse
from batch_inference.core.signals import EXIT_CODES, end_in_order
from batch_inference.core.streams import print_kept, say, secure_streams
from batch_inference.core.text import escaped, in_short, plain

# pandas and matplotlib are slow imports, and come with what needs them: --help must not pay for them.
if TYPE_CHECKING:
    from batch_inference.analyze.answers import Analysis
    from batch_inference.analyze.jobs import JobQuestion
    from batch_inference.analyze.tables import MeasuredSetting


def main(argv: list[str] | None = None) -> int:
    secure_streams()
    try:
        flags = parse(argv)
        check_packages(flags)
        settings, unreadable, notes = read_settings("--input", flags.input, flags, flags.compare)
        earlier = None
        if flags.compare:
            earlier, also_unreadable, more_notes = read_settings("--compare", flags.compare, flags, flags.input)
            unreadable += also_unreadable
            notes += [f"--compare: {note}" for note in more_notes]
        check_plots(flags.plots)
        analysis = ask(settings, flags, earlier, notes)
        folder = make_folder(flags.output_dir or default_folder(flags.input))
        text = write(analysis, unreadable, folder, flags)
    except UsageError as error:
        return wrong_use(str(error))
    for problem in unreadable:
        complain(problem)
    print_kept(text, folder)
    measured = any(setting.points_ok for setting in settings)
    if not measured:
        complain(f"--input {flags.input}: no point was measured; the report says why")
    return gate(analysis, flags.fail_on_regression) or (1 if unreadable or not measured else 0)


def check_packages(flags: Namespace) -> None:
    """Raises UsageError where something is not installed."""
    if missing := missing_to_analyse(plots=flags.plots is None or bool(flags.plots)):
        raise UsageError(missing)


def read_settings(
    flag: str, path: Path, flags: Namespace, other: Path | None
) -> tuple[list[MeasuredSetting], list[str], list[str]]:
    """What counts of what can be read, what is wrong with the other files, and which of the good ones do not count.
    `other`: where the other set lies. Raises UsageError where nothing can be read, or nothing is as asked."""
    found = find_files(flag, path, (other, flags.output_dir))
    from batch_inference.analyze.sources import chosen, load_settings, newest
    from batch_inference.analyze.tables import MeasuredSetting
    from batch_inference.analyze.wording import few

    settings, unreadable = [], found.unreadable
    for one in load_settings(found.paths, flags.slo_percentile, path if path.is_dir() else path.parent):
        if isinstance(one, MeasuredSetting):
            settings.append(one)
        else:
            unreadable.append(str(one))
    # A file name may hold a line break, or bytes that are no text; an error is one line.
    unreadable = [plain(" ".join(line.split())) for line in unreadable]
    if not settings:
        raise UsageError(f"{flag} {few(unreadable, 3, '; and {} more files that cannot be read', '; ')}")
    asked_for, left_out = chosen(settings, flags.model, flags.setting, f"{flag} {path}")
    counting, older = newest(asked_for)
    return counting, unreadable, left_out + older


def check_plots(names: Sequence[str] | None) -> None:
    """Raises UsageError for a plot that there is not."""
    if not names:
        return
    from batch_inference.analyze.plot_jobs import JOB_PLOTS
    from batch_inference.analyze.plots import PLOTS

    known = [name for name, _, _ in (*JOB_PLOTS, *PLOTS)]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"--plots {in_short(','.join(unknown))}: no such plot; choose of {', '.join(known)}")


def ask(
    settings: list[MeasuredSetting], flags: Namespace, earlier: list[MeasuredSetting] | None, notes: list[str]
) -> Analysis:
    """Raises UsageError where the files cannot answer."""
    from batch_inference.analyze.answers import Question, QuestionError, analyse
    from batch_inference.analyze.decide import Limits

    limits = Limits(flags.max_latency_s, flags.max_ttft_s, flags.max_tpot_s, flags.slo_percentile)
    job = job_question(settings, flags)
    notes = [*notes, *notes_on_jobs(settings, flags)]
    question = Question(limits, flags.device_hour_price, flags.baseline, flags.group_by, flags.allow_mixed, job)
    try:
        return analyse(settings, question, earlier, notes)
    except QuestionError as error:
        raise UsageError(str(error)) from error


def notes_on_jobs(settings: list[MeasuredSetting], flags: Namespace) -> list[str]:
    """Notes on flags that are about batches, where only jobs were measured."""
    if not any(setting.queues for setting in settings) or any(any(setting.batch_points()) for setting in settings):
        return []
    goal = [
        "--goal latency is for batches, and only jobs were measured: no files to use are written. A job is fastest "
        "where throughput is highest."
    ]
    limits = [name for name in LIMITS if getattr(flags, name) is not None]
    said = [
        f"{flag_of(name)} has no effect: it limits the points of a grid, and only jobs were measured."
        for name in limits
    ]
    return [*(goal if flags.goal == "latency" else []), *said]


def job_question(settings: list[MeasuredSetting], flags: Namespace) -> JobQuestion:
    """Raises UsageError for a file of no job, and where no queue point could answer."""
    from batch_inference.analyze.job_file import lengths_in
    from batch_inference.analyze.jobs import JobQuestion

    asked = {"--job": flags.job, "--job-requests": flags.job_requests, "--deadline-hours": flags.deadline_hours}
    given = next((f"{flag} {value}" for flag, value in asked.items() if value is not None), None)
    if given and not any(setting.queues for setting in settings):
        raise UsageError(f"{given}: --input {flags.input} has no queue point; measure with --prompts-file first")
    lengths = lengths_in(flags.job) if flags.job else None
    name = flags.job and flags.job.name
    return JobQuestion(lengths, name, flags.job_requests, flags.deadline_hours, flags.device_hour_price)


def write(analysis: Analysis, unreadable: list[str], folder: Path, flags: Namespace) -> str:
    """The text for the terminal. Raises UsageError where the files of the analysis cannot be written."""
    from batch_inference.analyze.report import write_report
    from batch_inference.analyze.to_use import write_to_use

    into = folder_to_use(flags.input, flags.output_dir)
    try:
        to_use = write_to_use(analysis, flags.goal, into)
        into = folder
        return write_report(analysis, unreadable, into, flags.plots, to_use)
    except OSError as error:
        raise not_this_folder(into, f"cannot be written to: {error.strerror}") from error


def gate(analysis: Analysis, percent: float | None) -> int:
    """The exit code of --fail-on-regression: 3 for a regression, 2 where there was nothing to judge."""
    from batch_inference.analyze.compare import regressions

    if percent is None or analysis.comparison is None:
        return 0
    points, flag = analysis.comparison.points, f"--fail-on-regression {percent:g}"
    if found := len(regressions(analysis.comparison, percent)):
        complain(f"{flag}: {found} of {len(points)} points are lost or worse by more")
        return 3
    unknown = int((points["change"] == "unknown").sum())
    if unknown == len(points):
        what = "no point is in both sets with two runs or more; compare settings of the same name and grid"
        return wrong_use(f"{flag}: {what}")
    if unknown:
        say(f"note: {flag}: {unknown} of {len(points)} points cannot be judged: a single run; raise --num-runs")
    return 0


def wrong_use(message: str) -> int:
    complain(message)
    return 2


def complain(message: str) -> None:
    say(f"error: {escaped(message)}")


if __name__ == "__main__":
    end_in_order(EXIT_CODES)
    sys.exit(main())
