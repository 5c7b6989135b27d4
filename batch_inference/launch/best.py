"""The preset `best`: loads one setting after another, in the order of core/race.py, until no other can win.

All measurements are in the usual result files, and earlier ones are taken from there: an engine is
started only for what is missing.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from batch_inference.core.climb import TIE, Climb, Tried
from batch_inference.core.config import EXPERTS_FLAG, LIMITS, MIN_RUNS, ConfigError, ExperimentConfig, flag_of
from batch_inference.core.packages import missing_to_analyse
from batch_inference.core.race import Found, Goal, Layout, Load, Race, Search, layouts
from batch_inference.core.streams import say
from batch_inference.core.text import counted, listed, on_each, short, wrapped
from batch_inference.core.values import AUTO, AUTO_SIZES, COST, LATENCY_GOAL, PER_DEVICE, THROUGHPUT
from batch_inference.launch.jobs import Here, Job, folder_of, job_of
from batch_inference.launch.options import Options
from batch_inference.launch.overview import PlannedJob
from batch_inference.launch.presets import Preset, Setting
from batch_inference.launch.processes import Processes
from batch_inference.launch.running import wait_for_others
from batch_inference.launch.stored import file_of, result_of
from batch_inference.plan.devices import Devices
from batch_inference.plan.obstacles import ALL_HIDDEN

# Results need installed packages; the plan works without them.
if TYPE_CHECKING:
    from batch_inference.core.results import Point, Result

_ASKED = ("--goal", *map(flag_of, LIMITS))
# What each load gets its own values of: flags of the search, and the sizes.
_OWN_FLAGS = ("--batch-sizes", "--seq-lens", "--packed", *_ASKED)
# What is chosen for each load, and what the search itself must know: after -- only the loads would get them.
_SEARCHED = (
    "--batch-sizes", "--tensor-parallel-size", "--pipeline-parallel-size", "--data-parallel-size", "--to-beat",
    "-tp", "-pp", "-dp", EXPERTS_FLAG, "-ep", "--packed",
)  # fmt: skip
# A user who sets how often a point runs sets it for all settings.
_RUNS = ("--num-runs", "--max-runs")
_BEFORE = (*_ASKED, "--prompts-file", "--seq-lens", "--output-dir", "--overwrite")
# Each load has its own file, and there is one node.
_NOT_FOR_LOADS = ("--output-file", "--nnodes", "--node-rank", "--master-addr", "--master-port")
_KEEPS_NONE = "no batch size that was tried stays within"
# No engine of a real model starts faster.
_LEAST_START_S = 10.0
# Runs and warm-ups of a point in a study.
_RUNS_OF_A_STUDY = 5
_SETTINGS_OF_A_STUDY = 4


def check_search(options: Options, devices: Devices) -> None:
    """Raises ConfigError for what `best` does not accept, or lacks."""
    if not len(devices):
        raise ConfigError(ALL_HIDDEN)
    if options.batch_sizes != Options.batch_sizes and options.batch_sizes != AUTO_SIZES:
        raise ConfigError(f"--batch-sizes {listed(options.batch_sizes)}: best searches them; leave it out")
    _check_behind(options.flags)
    if options.goal == LATENCY_GOAL and options.prompts_file:
        raise ConfigError(
            f"--goal {LATENCY_GOAL}: a workload is one job, fastest where throughput is highest; leave it out"
        )
    if options.goal == COST and options.device_hour_price is None:
        raise ConfigError(f"--goal {COST}: it also needs a price; add --device-hour-price PRICE")
    if options.devices and not options.dry_run and options.devices > len(devices):
        raise ConfigError(f"--devices {options.devices}: only {len(devices)} are there ({devices.kind}); lower it")
    budget_s = (options.budget_device_minutes or float("inf")) * 60 / len(devices)
    if budget_s < _LEAST_START_S:
        raise ConfigError(
            f"--budget-device-minutes {options.budget_device_minutes:g}: on {counted(len(devices), 'device')} that is "
            f"{budget_s:.2g} s, too short to start an engine; raise it"
        )


def _check_behind(flags: Sequence[str]) -> None:
    """Raises ConfigError for flags that the loads would get, but not the search."""
    for word in flags:
        # vLLM takes underscores too.
        if (flag := word.partition("=")[0].replace("_", "-")) in _SEARCHED:
            raise ConfigError(f"{flag} after --: best searches it; leave it out")
        if flag in _BEFORE:
            raise ConfigError(f"{flag} after --: best must know it; give it before --")
        if flag in _NOT_FOR_LOADS:
            raise ConfigError(f"{flag} after --: best sets it for each of its loads, on one node; leave it out")


def check_budgets(config: ExperimentConfig) -> None:
    """Raises ConfigError for an axis that an answer cannot express."""
    if len(config.budgets) > 1:
        raise ConfigError(
            f"--max-num-batched-tokens {listed(config.budgets)}: best compares settings at one of them; give only one"
        )


def as_search(options: Options) -> Options:
    """The options with which the settings of a search are planned."""
    given = AUTO in options.passed_on
    words = options.passed_on if given else (*options.passed_on, "--batch-sizes", AUTO)
    # A load gets its own sizes, and a plan the number of devices it is for.
    return replace(options, passed_on=words, devices=options.devices if options.dry_run else None)


def settings_to_search(options: Options, devices: int, *, has_experts: bool) -> list[Setting]:
    """Candidates, and their single replicas, which are loaded first."""
    chosen = candidates(options.goal, devices, has_experts=has_experts)
    needed = dict.fromkeys([*(one.replica for one in chosen), *chosen])
    return [_setting(layout) for layout in sorted(needed, key=lambda one: (one.num_devices, one.pp, one.dp))]


def candidates(goal: str, devices: int, *, has_experts: bool) -> list[Layout]:
    """For a goal per device, any number of devices; otherwise those that use all."""
    exactly = goal not in (PER_DEVICE, COST)
    found = layouts(devices, exactly=exactly)
    if has_experts and devices > 1:
        found += [replace(one, experts=True) for one in layouts(devices) if one.pp == 1]
    return found


def _setting(layout: Layout) -> Setting:
    return Setting(layout.tp, layout.pp, layout.dp, experts=layout.experts)


def _layout(setting: Setting) -> Layout:
    return Layout(setting.tp, setting.pp, setting.dp, setting.experts)


@dataclass
class Best:
    """One search."""

    preset: Preset
    options: Options
    here: Here
    devices: Devices
    processes: Processes
    jobs: dict[Layout, PlannedJob] = field(default_factory=dict)
    search: Search = field(default_factory=lambda: Search({}))
    walls_s: list[float] = field(default_factory=list)  # of the loads
    steps: int = 0  # loads, including those that were completely measured before
    loads: int = 0
    used_s: float = 0.0
    ended_by_budget: bool = False
    failed: list[Job] = field(default_factory=list)
    paths: dict[Layout, Path] = field(default_factory=dict)  # of their result files
    # Why batch sizes have no result, at each prompt length.
    lost_sizes: dict[tuple[Layout, int | None], dict[int, str]] = field(default_factory=dict)
    starts_s: list[float] = field(default_factory=list)
    # The mean time of a batch of every point measured, by what tells it from other points of its setting.
    batches_s: dict[tuple[int | None, int], list[float]] = field(default_factory=dict)

    @property
    def flags_of_analysis(self) -> list[str]:
        """With which an analysis answers the same question."""
        goal = [] if self.options.goal == THROUGHPUT else ["--goal", self.options.goal]
        return [*goal, *itertools.chain(*_given(self.options, (*LIMITS, "device_hour_price")))]

    @property
    def length_to_use(self) -> int | None:
        """The longest: what is written to use has one batch size, and so one length. None for a workload."""
        return max(self.search.races, key=lambda length: length or 0)

    @property
    def is_answered(self) -> bool:
        return all(race.best() for race in self.search.races.values())

    def run(self, jobs: Sequence[PlannedJob]) -> None:
        """Until nothing is open, or the budget is used up. Raises SystemExit after a signal, and with 2 if what the
        user asked is wrong for every setting."""
        self.jobs = {_layout(one.job.setting): one for one in jobs}
        self.search = self._search_among(jobs[0].config)
        while loads := self.search.next_loads(len(self.devices)):
            if self._is_over_budget():
                self.ended_by_budget = True
                return
            began_s = time.monotonic()
            before = self._written()
            for load, job, code in self._measured(loads):
                self._keep(load, job, code)
            wall_s = time.monotonic() - began_s
            self.used_s += wall_s
            self.steps += len(loads)
            # No engine starts if everything was measured before.
            if started := len(self._written() - before):
                self.loads += started
                self.walls_s.append(wall_s)

    def _search_among(self, first: ExperimentConfig) -> Search:
        goal = self.options.goal
        has_experts = any(layout.experts for layout in self.jobs)
        chosen = candidates(goal, len(self.devices), has_experts=has_experts)
        feasible = frozenset(layout for layout, one in self.jobs.items() if one.reason is None)
        lengths: tuple[int | None, ...] = (None,) if first.prompts_file else first.seq_lens
        what = Goal(goal == LATENCY_GOAL, goal in (PER_DEVICE, COST))
        return Search({length: Race(what, chosen, feasible) for length in lengths})

    def _note_start(self, result: Result) -> None:
        """This and the times of batches are for an estimate of what a study of all settings would take."""
        from batch_inference.launch.replay import Recorded, layout_of

        recorded = Recorded(layout_of(result), result)
        if recorded.start_s:
            # Closing the engine and the gaps between runs take time too.
            self.starts_s.append(recorded.start_s + recorded.beside_s)

    def _note_batches(self, points: Sequence[Point]) -> None:
        for point in points:
            if (batch_s := point.summary.get("latency_mean_s")) is not None:
                self.batches_s.setdefault((point.seq_len, point.batch_size), []).append(batch_s)

    def write_to_use(self) -> str | None:
        """Writes the answer at the longest prompts for use, and returns the command that runs it, or the folder if
        there is none; None if a package for that is missing."""
        length = self.length_to_use
        found = self.search.races[length].best()
        if found is None or found.best is None or missing_to_analyse(plots=False):
            return None
        from batch_inference.analyze.tables import load_setting
        from batch_inference.analyze.to_use import write_winner
        from batch_inference.analyze.winner import Winner

        config, folder = self.jobs[found.layout].config, Path(folder_of(self.preset, self.options), "best")
        path = self.paths[found.layout]
        max_tokens = next(limit for _, seq_len, limit, *_ in config.points() if seq_len == length)
        chosen = Winner(
            load_setting(path), self.jobs[found.layout].job.name, found.best.batch_size,
            None,
            length, max_tokens, config.workload,
            f"the best for {self.options.goal} that a search found",
        )  # fmt: skip
        try:
            written = write_winner(chosen, folder)
        except OSError as error:
            say(f"error: {folder}: cannot be written to: {error.strerror}")
            return None
        return (written.run_command or str(folder)) if written else None

    def study_s(self) -> float | None:
        """Roughly what all settings that could win would take, at all sizes that were tried; None if no engine was
        started."""
        settings = {one for race in self.search.races.values() for one in race.candidates if one in race.feasible}
        if not self.starts_s:
            return None
        points_s = sum(_RUNS_OF_A_STUDY * fmean(times) for times in self.batches_s.values())
        return len(settings) * (fmean(self.starts_s) + points_s)

    def _is_over_budget(self) -> bool:
        budget = self.options.budget_device_minutes
        if budget is None:
            return False
        return (self.used_s + max(self.walls_s, default=0.0)) * len(self.devices) / 60 > budget

    def _measured(self, loads: Sequence[Load]) -> Iterator[tuple[Load, Job, int]]:
        beside = len(loads) > 1
        jobs = [self._job_of(load, beside=beside) for load in loads]
        for number, (load, job) in enumerate(zip(loads, jobs, strict=True), self.steps + 1):
            sizes = f"{listed(load.sizes)} at once" if load.sizes else "batch sizes searched"
            # A setting of a killed search may still be measuring.
            wait_for_others(job.config, f"[{number}] {job.name}", self.processes)
            say(f"[{number}] {job.name}, {sizes} -> {job.config.output_path}")
        if not beside:
            yield loads[0], jobs[0], self.processes.run(jobs[0].words)
            return
        # This needs installed packages; --help does not.
        from batch_inference.launch.packing import Packing

        of_job = {job.name: load for load, job in zip(loads, jobs, strict=True)}
        for job, code in Packing(jobs, self.devices, self.processes).run():
            yield of_job[job.name], job, code
        self.processes.end_if_stopped()

    def _job_of(self, load: Load, *, beside: bool) -> Job:
        kept, rest = [], iter(self.options.passed_on)
        for word in rest:
            # A setting that is measured once more, now alone, keeps what this search has measured of it.
            if word == "--overwrite" and load.layout in self.paths:
                continue
            if word not in _OWN_FLAGS:
                kept.append(word)
            elif word != "--packed":
                next(rest, None)
        sizes = ["--batch-sizes", ",".join(map(str, load.sizes))] if load.sizes else self._search_flags(load)
        lengths = ["--seq-lens", ",".join(map(str, load.lengths))] if load.lengths != (None,) else []
        packed = ["--packed"] if beside else []
        options = replace(self.options, passed_on=(*kept, *lengths, *sizes, *packed), devices=None)
        return job_of(_setting(load.layout), 0, 0, self.preset, options, self.here)

    def _search_flags(self, load: Load) -> list[str]:
        words = ["--batch-sizes", AUTO, "--goal", self.options.goal]
        if any(load.to_beat):
            words += ["--to-beat", ",".join(f"{value:.6g}" for value in load.to_beat)]
        words += itertools.chain(*_given(self.options, LIMITS))
        return words if load.is_answer or self._says_runs else [*words, "--max-runs", str(MIN_RUNS)]

    @property
    def _says_runs(self) -> bool:
        words = (*self.options.passed_on, *self.options.flags)
        return any(word.partition("=")[0] in _RUNS for word in words)

    def _written(self) -> set[tuple[str, int]]:
        """The result files of the folder, each with its modification time."""
        with contextlib.suppress(OSError):
            folder = Path(folder_of(self.preset, self.options))
            return {(path.name, path.stat().st_mtime_ns) for path in folder.glob("*.json")}
        return set()

    def _keep(self, load: Load, job: Job, code: int) -> None:
        from batch_inference.measure.resume import is_warm

        if code == 2 and not any(race.found for race in self.search.races.values()):
            raise SystemExit(2)  # a wrong flag or model is wrong for all
        if code:
            self.failed.append(job)
        path, result = file_of(job.config) or (None, None)
        if path and result:
            self.paths[load.layout] = path
            self._note_start(result)
        for length, to_beat in zip(load.lengths, load.to_beat, strict=True):
            race = self.search.races[length]
            points = _points(result, job.config, length)
            self._note_batches(points)
            self.lost_sizes[load.layout, length] = _lost_sizes(points)
            # What ran beside others is no answer where this setting was to run alone, but tells how far to climb.
            alone = [one for one in points if is_warm(one, job.config)]
            tried = tried_in(result, alone, self.options)
            if tried:
                climb = Climb(AUTO_SIZES, rises=self.options.goal != LATENCY_GOAL, to_beat=to_beat)
                # What was lost on the way up may have been better than everything measured.
                before = race.found.get(load.layout)  # beside others
                went_on = code == 0 and all(point.verdict != "invalid" for point in points)
                is_searched = load.sizes is None or (before is not None and before.is_exhausted)
                climbed = tried if len(alone) == len(points) else tried_in(result, points, self.options)
                is_exhausted = went_on and is_searched and climb.is_exhausted(climbed)
                race.found[load.layout] = Found(load.layout, tried, is_exhausted, not job.config.packed)
            else:
                where = f"; see {job.config.log_path}" if job.config.log_path.exists() else ""
                race.lost[load.layout] = f"{_why_lost(result, points)}{where}"


def tried_in(result: Result | None, points: Sequence[Point], options: Options) -> list[Tried]:
    from batch_inference.core.tried import limits_of, tried_of

    kept = [point for point in points if point.status == "ok" and point.verdict != "invalid"]
    return tried_of(result, kept, options.goal, limits_of(options)) if result else []


def _points(result: Result | None, config: ExperimentConfig, length: int | None) -> list[Point]:
    """The points that were asked for at this length, of any batch size, whatever became of them. A file may hold more,
    such as other workloads, output lengths or tokens per step."""
    asked = {shape[1:] for shape in config.points() if shape[1] == length}
    return [point for point in result.points if point.shape[1:] in asked] if result else []


def _why_lost(result: Result | None, points: Sequence[Point]) -> str:
    if result and result.failure:
        return result.failure.reason
    reasons = [reason for point in points for reason in (point.reason, *point.verdict_reasons) if reason]
    return reasons[0] if reasons else "nothing was measured"


def _lost_sizes(points: Sequence[Point]) -> dict[int, str]:
    return {one.batch_size: one.failure or one.status for one in points if one.status != "ok"}


def what_best_saves(done: Sequence[Job]) -> str | None:
    """For the end of a study: what a search for the same answer would have taken. None for few settings."""
    if len(done) < _SETTINGS_OF_A_STUDY or any(job.config.prompts_file or job.config.packed for job in done):
        return None
    from batch_inference.launch.replay import replayed, study_of

    results = [result for job in done if (result := result_of(job.config))]
    study = study_of(results)
    # How long a resumed study took is unknown.
    is_whole = all(one.environment.ended_at and not one.environment.resumed_from for one in results)
    if len(study.settings) < _SETTINGS_OF_A_STUDY or not is_whole or not study.lengths:
        return None
    answer = replayed(study, Goal())
    missed = max(answer.distances.values())
    found = "the highest throughput" if missed <= TIE else f"{1 - missed:.1%} of the highest throughput"
    return (
        f"best would have found {found} with {counted(answer.loads, 'engine start')}, in about "
        f"{answer.wall_s / study.wall_s:.0%} of this time"
    )


# --- what is said in the end ------------------------------------------------------------------------------------------


def report(best: Best) -> list[str]:
    """For each prompt length the answer, the other settings, and what was not loaded and why; and what it took."""
    lines = []
    for length, race in best.search.races.items():
        what = f"{best.options.goal}, " + ("this workload" if length is None else f"prompts of {length} tokens")
        found = race.best()
        lines.append(f"Best for {what}: " + (_named(found) if found else "none"))
        texts = [*_loaded(best, race), *_lost(best, race, length), *_not_loaded(best, race)]
        lines += [line for text in texts for line in wrapped(f"  {text}", indent=6)] + [""]
    return [*lines, *wrapped(_took(best), indent=2)]


def _named(found: Found) -> str:
    size = f"{found.best.batch_size} at once" if found.best else "no size"
    return f"{found.layout}, {size}{on_each(found.layout.dp)}"


def _loaded(best: Best, race: Race) -> Iterator[str]:
    """The best first, then those that are as good, then the others."""
    first, ties = race.best(), race.ties()
    nearest = race.nearest()
    if first:
        yield _value(best, race, first)
    elif nearest and 1 < nearest[1].excess < math.inf:
        layout, tried = nearest
        yield (
            f"{_KEEPS_NONE} {_limits(best.options)}; the nearest is {layout} with {tried.batch_size} at once, "
            f"{short(tried.excess, 3)} times its limit"
        )
    for found in sorted(race.found.values(), key=race.value_of, reverse=True):
        if found is first:
            continue
        if found.best:
            word = "as good, within its interval: " if found in ties else ""
            yield f"{word}{_named(found)}: {_value(best, race, found)}{_though_better(best, race, first, found)}"
        elif any(tried.keeps_limits for tried in found.tried):
            yield f"{found.layout}: its runs say nothing about the whole job; raise --sample"
        elif first:
            yield f"{found.layout}: {_KEEPS_NONE} {_limits(best.options)}"


def _though_better(best: Best, race: Race, first: Found | None, found: Found) -> str:
    """Why a setting with a better number than the first is not the answer: it leaves devices idle."""
    if first is None or found.layout in race.candidates or race.value_of(found) <= race.value_of(first):
        return ""
    return f"; better, but on {found.layout.num_devices} of {counted(len(best.devices), 'device')}"


def _lost(best: Best, race: Race, length: int | None) -> Iterator[str]:
    """Sizes that failed might have been better than the best of their setting."""
    for layout in race.found:
        if lost := best.lost_sizes.get((layout, length)):
            yield f"{layout}: failed with {listed(f'{size} at once ({why})' for size, why in lost.items())}"


def _value(best: Best, race: Race, found: Found) -> str:
    """In the unit of the goal, with its interval."""
    value, half = race.value_of(found), race.half_of(found)
    doubt = " (suspect)" if found.best and found.best.is_suspect else ""
    if best.options.goal == LATENCY_GOAL:
        return f"{_with_half(1 / value, half / value**2)} s per batch{doubt}"
    over_all = " over the whole job" if best.options.prompts_file else ""
    words = f"{_with_half(value, half)} tok/s{_per_device(best)}{over_all}"
    if best.options.device_hour_price is None or found.best is None:
        return words + doubt
    cost = best.options.device_hour_price * found.layout.num_devices / 3600 / found.best.value * 1e6
    return f"{words}, {short(cost)} per million output tokens{doubt}"


def _with_half(value: float, half: float) -> str:
    return f"{short(value)} ±{half / value:.1%}" if math.isfinite(half) else short(value)


def _per_device(best: Best) -> str:
    return " per device" if best.options.goal in (PER_DEVICE, COST) else ""


def _not_loaded(best: Best, race: Race) -> Iterator[str]:
    """Grouped by reason."""
    by_reason: dict[str, list[str]] = {}
    for layout in race.candidates:
        if layout not in race.found:
            by_reason.setdefault(_why_not(best, race, layout), []).append(str(layout))
    for why, names in by_reason.items():
        word = "failed" if why in race.lost.values() else "not loaded"
        yield f"{word}: {listed(names)}: {why}"


def _why_not(best: Best, race: Race, layout: Layout) -> str:
    if reason := best.jobs[layout].reason:
        return f"cannot run: {reason}"
    if layout in race.lost:
        return race.lost[layout]
    if layout.replica in race.lost:
        return f"{layout.replica} failed: {race.lost[layout.replica]}"
    bound = race.bound(layout)
    if layout in race.open() or not math.isfinite(bound.most):
        return "the budget ran out first"
    if best.options.goal == LATENCY_GOAL:
        return f"{short(1 / bound.most)} s or longer: {bound}"
    return f"at most {short(bound.most)} tok/s{_per_device(best)}: {bound}"


def _limits(options: Options) -> str:
    return listed(map(" ".join, _given(options, LIMITS)))


def _given(options: Options, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Of these numbers, the flags of those that were given, each with its value."""
    for name in names:
        if (value := getattr(options, name)) is not None:
            yield flag_of(name), f"{value:g}"


def _took(best: Best) -> str:
    devices = len(best.devices)
    used = f"{best.used_s * devices / 60:.1f} device-minutes ({counted(devices, 'device')}, {best.used_s:.0f} s)"
    words = f"This call used {used} for {counted(best.loads, 'load')}"
    if study_s := best.study_s():
        words += f"; a study of all settings at these batch sizes would take about {study_s * devices / 60:.3g}"
    if best.ended_by_budget:
        words += f"; the budget of {best.options.budget_device_minutes:g} ended the search"
    return words
