"""The answer before all tables: what to take, how fast it is, and how sure that is, in a sentence or two."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from batch_inference.analyze.answers import Analysis, Group, mixed_mark, values_of
from batch_inference.analyze.compare import LAYOUT, layout
from batch_inference.analyze.decide import COST, GOALS, Choice
from batch_inference.analyze.job_sections import at_cost, job_words, replicas_words, time_text
from batch_inference.analyze.jobs import ALIKE, Deadline, JobAnswer, JobRow
from batch_inference.analyze.larger import Growth, growth_of_batch, growth_of_job, try_larger
from batch_inference.analyze.replicas import said, to_measure, unmeasured_replicas
from batch_inference.analyze.same_answers import of_another_model
from batch_inference.analyze.sections import counts_of_changes
from batch_inference.analyze.tables import differing, half_width
from batch_inference.analyze.wording import HEADING, few, short_names, spoken, suspect_words, tied, with_interval
from batch_inference.core.text import counted, on_each, plain, short, significant

# What a sentence names itself, or says of no group.
_NAMED = ("model", "device_name", "device_kind", "max_tokens")
# What is said of other goals, where the same point is the best, and where another is.
_ALSO = (
    ("latency", "It also has the shortest batch time:", "the shortest batch time"),
    ("cost", "It costs", "the least cost"),
)
_THROUGHPUT = GOALS[0].column
# A group has a sentence for each of so many prompt lengths; of several groups each has one.
_LENGTHS = 3
# Characters of a setting's own name, where its layout does not tell it.
_LONGEST_NAME = 32
# The maker, and the memory, which the list of facts has.
_MAKER, _MEMORY = re.compile(r"^(NVIDIA|AMD) +"), re.compile(r"[ -]\d+ ?GB\b.*$")


@dataclass(frozen=True)
class Headline:
    """What the page, the report and the terminal begin with."""

    title: str = HEADING
    facts: tuple[str, ...] = ()
    sentences: tuple[str, ...] = ()  # the first is the answer, the others go with it
    command: tuple[str, ...] = ()  # of the winner: words, quoted for a shell
    runs: str = ""  # what the command runs, since the answer may name several settings
    unmeasured: str = ""  # what might be better than the answer, and was not measured
    to_measure: tuple[str, ...] = ()  # the command that measures it


NO_HEADLINE = Headline()


def headline(analysis: Analysis) -> Headline:
    """Without a command of the winner, which may not have been written."""
    names = _Names(analysis)
    models = list(dict.fromkeys(map(names.model, _values(analysis, "model"))))
    title = f"{HEADING} of {few(models, 2)}" if models else HEADING
    facts, sentences = tuple(_facts(analysis)), tuple(_sentences(analysis, names))
    better = unmeasured_replicas(analysis)
    doubt = (said(better), to_measure(better, analysis)) if better else ("", ())
    return Headline(title, facts, sentences, unmeasured=doubt[0], to_measure=doubt[1])


def _values(analysis: Analysis, column: str) -> list[str]:
    return [plain(value) for value in analysis.rows[column].dropna().unique()] if column in analysis.rows else []


def _facts(analysis: Analysis) -> Iterator[str]:
    """Model, devices, vLLM, date."""
    yield counted(sum(one.part_of is None for one in analysis.settings), "setting")
    for column, before in (("model", ""), ("device_name", ""), ("vllm_version", "vLLM ")):
        if values := _values(analysis, column):
            yield before + few(values, 3)
    if days := sorted({text[:10] for text in _values(analysis, "started_at")}):
        yield days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


class _Names:
    """Short names of models and devices, where these tell apart what the files hold."""

    def __init__(self, analysis: Analysis) -> None:
        self._models = _shortened(_values(analysis, "model"), lambda name: name.rstrip("/").rpartition("/")[2])
        self._devices = _shortened(
            _values(analysis, "device_name"), lambda name: _MEMORY.sub("", _MAKER.sub("", name)) or name
        )

    def model(self, name: object) -> str:
        return self._models.get(plain(name), "a model without a name")

    def devices(self, count: int, name: object, kind: object) -> str:
        """4 × H100; but devices that are cores are all of one CPU."""
        device = self._devices.get(plain(name))
        if kind == "cpu" and device:
            return f"{counted(count, 'device')} ({plain(name)})"
        return f"{count} × {device}" if device else counted(count, "device")


def _shortened(names: Sequence[str], shorten: Any) -> dict[str, str]:
    found = {name: shorten(name) or name for name in names}
    return found if len(set(found.values())) == len(found) else {name: name for name in names}


def _sentences(analysis: Analysis, names: _Names) -> Iterator[str]:
    if not analysis.groups and not analysis.jobs:
        yield "No point was measured; the reasons are below."
    if analysis.comparison is not None:
        points = analysis.comparison.points
        changes = counts_of_changes(points) or "no point is in both"
        yield f"Compared with the earlier results, {counted(len(points), 'point')}: {changes}."
    # Of one that nothing can be said of, its section gives the reasons.
    answered = [answer for answer in analysis.jobs if answer.rows] or analysis.jobs
    for answer in sorted(answered, key=lambda one: -len(one.rows)):
        yield from _job_sentences(answer, analysis, names)
    for group in sorted(analysis.groups, key=lambda one: (-len(one.points), one.number)):
        yield from _group_sentences(group, analysis, names)
    if wrong := of_another_model(analysis):
        yield f"Do not use {few(wrong, 3)} yet: most answers look like those of another model; see “Same answers?”."


# --- batches ------------------------------------------------------------------------------------------------------


def _group_sentences(group: Group, analysis: Analysis, names: _Names) -> Iterator[str]:
    place = _place(group, analysis, names)
    by_length: dict[int, list[Choice]] = {}
    for choice in group.choices:
        by_length.setdefault(choice.seq_len, []).append(choice)
    if not by_length:
        yield f"{place}: no valid point was measured; the reasons are below."
    # Of several groups that of the longest prompts, which the files to be used are for.
    lengths = sorted(by_length)[:_LENGTHS] if len(analysis.groups) == 1 else sorted(by_length)[-1:]
    limits = str(analysis.question.limits)
    more = len(by_length) - len(lengths)
    larger = list(try_larger([one for length in lengths for one in _growing(group, by_length[length], analysis)]))
    for number, length in enumerate(lengths, 1):
        where = f"{place}, " if number == 1 else "At "
        what = f"{where}{_tokens(group, length)}{f', with {limits}' if limits else ''}"
        rest = [f"{counted(more, 'more prompt length')} below."] if more else []
        last = [*larger, *rest] if number == len(lengths) else []
        yield f"{what}: {' '.join([*_advice(group, by_length[length]), *last])}"


def _place(group: Group, analysis: Analysis, names: _Names) -> str:
    """On 4 × H100, llama-3.1-8b, and what else tells this group from others of such devices and this model."""
    most = int(group.points["num_devices"].max())
    devices, models = (list(group.points[column].unique()) for column in ("device_name", "model"))
    kind = group.points["device_kind"].iloc[0]
    on = names.devices(most, devices[0], kind) if len(devices) == 1 else counted(most, "device")
    model = names.model(models[0]) if len(models) == 1 else counted(len(models), "model")
    alike = analysis.points[analysis.points["device_name"].isin(devices) & analysis.points["model"].isin(models)]
    others = [name for name in differing(alike, analysis.unlike) if name not in _NAMED]
    unlike = f" ({values_of(group.points, others)})" if others else ""
    return f"On {on}, {model}{unlike}{mixed_mark(group.mixed)}"


def _tokens(group: Group, length: int) -> str:
    outputs = group.points.loc[group.points["seq_len"] == length, "max_tokens"].dropna().unique()
    return f"{length} + {int(outputs[0])} tokens" if len(outputs) == 1 else f"{length} tokens"


def _advice(group: Group, choices: Sequence[Choice]) -> Iterator[str]:
    """The throughput, what else the same point is the best for, and then other points."""
    by_goal = {choice.goal.name: choice for choice in choices if choice.best is not None}
    fastest = by_goal.get("throughput")
    if fastest is None or fastest.best is None:
        yield "no point meets the limits."
        return
    yield f"{_taken(group, fastest.best)} gives {_number(fastest, _as_good(group, fastest))}."
    others = [(by_goal[name], same, apart) for name, same, apart in _ALSO if name in by_goal]
    for choice, same, _ in others:
        if _is_same(choice.best, fastest.best):
            yield f"{same} {_number(choice)}."
    for choice, _, apart in others:
        if not _is_same(choice.best, fastest.best):
            yield f"For {apart} take {_taken(group, choice.best or {})}: {_number(choice, _as_good(group, choice))}."


def _growing(group: Group, choices: Sequence[Choice], analysis: Analysis) -> Iterator[tuple[str, Growth]]:
    """Of the points that `_advice` takes those whose throughput was still growing."""
    for choice in choices:
        if choice.best is not None and choice.goal.column in (_THROUGHPUT, COST):
            growth = growth_of_batch(choice.best, group, analysis)
            if growth is not None:
                yield called(group, choice.best), growth


def _is_same(one: Mapping[Hashable, Any] | None, two: Mapping[Hashable, Any] | None) -> bool:
    names = ("setting", "batch_size")
    return one is not None and two is not None and all(one[name] == two[name] for name in names)


def _taken(group: Group, row: Mapping[Hashable, Any]) -> str:
    """DP=4 at 256 requests per replica; TP=2 on 2 devices at 16 requests."""
    devices = int(row["num_devices"])
    on = f" on {counted(devices, 'device')}" if devices < group.points["num_devices"].max() else ""
    each = " per replica" if int(row["data_parallel_size"]) > 1 else ""
    return f"{called(group, row)}{on} at {counted(int(row['batch_size']), 'request')}{each}"


def called(group: Group, row: Mapping[Hashable, Any]) -> str:
    """The layout, which says more than the name of a file; and that name, where another setting has the layout too."""
    sizes = [int(row[name]) for name in LAYOUT]
    alike = group.points
    for name in LAYOUT:
        alike = alike[alike[name] == row[name]]
    words = layout(*sizes)
    names = short_names(map(str, alike["setting"].unique()), _LONGEST_NAME)
    return words if len(names) == 1 else f"{words} ({names[str(row['setting'])]})"


def _number(choice: Choice, more: str = "") -> str:
    best, goal = choice.best or {}, choice.goal
    digits = with_interval(best[goal.column], half_width(best, goal.column))
    return f"{spoken(digits)} {goal.unit}{suspect_words(best, more)}"


def _as_good(group: Group, choice: Choice) -> str:
    """Settings whose interval overlaps that of the best; of the cost they are those of the throughput per device."""
    return "" if choice.goal.column == COST else "".join(tied([called(group, row) for row in choice.ties]))


# --- jobs ---------------------------------------------------------------------------------------------------------


def _job_sentences(answer: JobAnswer, analysis: Analysis, names: _Names) -> Iterator[str]:
    of_group = dict(zip(ALIKE, answer.group, strict=False))
    model, job = names.model(of_group["model"]), job_words(answer, analysis.jobs)
    best, cheapest = answer.best, answer.cheapest
    if best is None or cheapest is None:
        yield f"The job of {job}, {model}: no measured point can forecast it; the reasons are below."
        return
    place = names.devices(best.num_devices, of_group["device_name"], of_group["device_kind"])
    hours = _hours(best, [_called_row(row, answer) for row in answer.ties])
    takes = f"takes {hours}{_cost(best)}{_price(analysis)}. {_start(best)}"
    said = [f"The job of {job} on {place}, {model}: {_row_taken(best, answer)} {takes}"]
    if cheapest is not best:
        hours = _hours(cheapest, [_called_row(row, answer) for row in answer.as_cheap])
        said.append(f"{_row_taken(cheapest, answer)} takes the fewest device-hours: {hours}{_cost(cheapest)}.")
    said += _deadline_sentence(answer, analysis.question.job.deadline_h or 0.0)
    taken = [best] if cheapest is best else [best, cheapest]
    growths = [(row, growth_of_job(row, answer)) for row in taken]
    said += try_larger([(_called_row(row, answer), growth) for row, growth in growths if growth is not None])
    yield " ".join(said)


def _deadline_sentence(answer: JobAnswer, asked_h: float) -> Iterator[str]:
    deadline = answer.deadline
    if answer.is_late:
        yield f"No number of replicas meets the deadline of {asked_h:g} h: the longest request alone takes longer."
    if deadline:
        row = deadline.row
        yield (
            f"For the deadline of {asked_h:g} h take {replicas_words(deadline, _called_row(row, answer))} with "
            f"{row.point.batch_size} at once{on_each(deadline.replicas)}, so {counted(deadline.devices, 'device')}"
            f"{_of_machines(deadline, answer)}: "
            f"{spoken(time_text(deadline.hours))}{suspect_words({'verdict': row.point.verdict})}{at_cost(deadline)}."
        )


def _of_machines(deadline: Deadline, answer: JobAnswer) -> str:
    """Devices that are cores share the memory of their machine: what was measured is what so many of them do."""
    measured = deadline.row.num_devices
    if "cpu" not in answer.group or deadline.devices <= measured:
        return ""
    return ", each on a machine of its own" if measured == 1 else f", at most {measured} on a machine"


def _row_taken(row: JobRow, answer: JobAnswer) -> str:
    return f"{_called_row(row, answer)} with {row.point.batch_size} at once{on_each(row.point.replicas)}"


def _called_row(row: JobRow, answer: JobAnswer) -> str:
    """The same of a job."""
    alike = {one.setting for one in answer.rows if one.layout == row.layout}
    return row.layout if len(alike) == 1 else f"{row.layout} ({row.setting})"


def _start(row: JobRow) -> str:
    """A job of minutes is one whose engine's start counts."""
    return "The start of the engine comes on top" + ("." if row.load_s is None else f": here {short(row.load_s, 2)} s.")


def _hours(row: JobRow, others: Sequence[str]) -> str:
    """4 min (0.13 device-hours); `others` may be as good."""
    used = f"{spoken(significant(row.device_hours.value))} device-hours"
    return spoken(time_text(row.hours)) + suspect_words(
        {"verdict": row.point.verdict}, "; ".join([used, *tied(others)])
    )


def _price(analysis: Analysis) -> str:
    return "" if analysis.question.price is None else f" at {analysis.question.price:g} per device-hour"


def _cost(row: JobRow) -> str:
    return "" if row.cost is None else f" and costs {spoken(significant(row.cost.value))}"
