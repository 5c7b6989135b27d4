"""The report of an analysis: which sections, in which order, and the files that say it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from batch_inference.analyze import about
from batch_inference.analyze.answers import Analysis
from batch_inference.analyze.exports import write_results_csv, write_summary_json
from batch_inference.analyze.files import SUMMARY, remove_plots
from batch_inference.analyze.headline import headline
from batch_inference.analyze.job_sections import job_section
from batch_inference.analyze.layouts import layouts
from batch_inference.analyze.markdown import as_markdown
from batch_inference.analyze.page import as_html
from batch_inference.analyze.same_answers import same_answers
from batch_inference.analyze.sections import Section, best, compared, pareto, scaling
from batch_inference.analyze.terminal import as_text, closing, terminal_width
from batch_inference.analyze.to_use import ToUse
from batch_inference.core.files import write_whole


def sections_of(analysis: Analysis, to_use: ToUse | None = None) -> list[Section]:
    """Everything that the files say, in the order in which it is read: the decision first."""
    return [section for section in _in_order(analysis, to_use) if section.pairs or section.rows or section.lines]


def _in_order(analysis: Analysis, to_use: ToUse | None) -> Iterator[Section]:
    if analysis.comparison is not None:
        yield compared(analysis.comparison)
    for answer in analysis.jobs:
        yield job_section(answer, analysis)
    for group in analysis.groups:
        yield best(group, analysis)
    if to_use:
        yield to_use.section
    for group in analysis.groups:
        yield from layouts(group)
    yield from map(scaling, analysis.groups)
    yield from map(pareto, analysis.groups)
    yield from same_answers(analysis)
    yield about.measured(analysis)
    yield about.settings(analysis)
    yield about.problems(analysis)


def write_report(
    analysis: Analysis,
    unreadable: Sequence[str],
    folder: Path,
    plots: Sequence[str] | None = None,
    to_use: ToUse | None = None,
) -> str:
    """Write every file into `folder`, and return the text for the terminal, which names them. `plots`: their names;
    None is all of them.

    Raises OSError where a file cannot be written.
    """
    drawn, missing = _draw(analysis, folder, plots)
    sections = sections_of(analysis, to_use)
    head = headline(analysis)
    if to_use and to_use.section.commands:
        head = replace(head, command=tuple(to_use.section.commands[0]), runs=to_use.runs)
    page, report, results, summary = (folder / name for name in ("report.html", "report.md", "results.csv", SUMMARY))
    write_results_csv(analysis.rows, results)
    write_summary_json(analysis, unreadable, summary, to_use)
    write_whole(report, [as_markdown(sections, drawn, missing, head)])
    write_whole(page, [as_html(sections, analysis.rows, drawn, missing, head)])
    _remove_parquet(folder)
    remove_plots(folder, [file for _, path in drawn for file in (path, path.with_suffix(".svg"))])
    used = to_use.files if to_use else []
    files = [*used, page, report, results, summary]
    width, images = terminal_width(), [path for _, path in drawn]
    return "\n".join([as_text(sections, head, width), "", *closing(missing, files, images, width)])


def _draw(analysis: Analysis, folder: Path, names: Sequence[str] | None) -> tuple[list[tuple[str, Path]], list[str]]:
    if names is not None and not names:
        return [], []
    # A slow import, and not needed without plots.
    from batch_inference.analyze.plot_jobs import job_tables
    from batch_inference.analyze.plots import write_plots

    return write_plots(analysis.groups, folder, names, job_tables(analysis))


def _remove_parquet(folder: Path) -> None:
    """Earlier versions wrote the table as Parquet too: what is left of one tells of another analysis."""
    old = folder / "results.parquet"
    if old.is_file():
        old.unlink()
