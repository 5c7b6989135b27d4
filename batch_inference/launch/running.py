"""Measures the settings of a preset, one after another or side by side."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.failures import SAME_FOR_ALL
from batch_inference.core.streams import say
from batch_inference.core.text import listed
from batch_inference.launch.console import Outcomes
from batch_inference.launch.jobs import Job
from batch_inference.launch.options import Options
from batch_inference.launch.overview import PlannedJob
from batch_inference.launch.processes import Processes
from batch_inference.launch.stored import failure_since, measured_by, taken_since, time_left
from batch_inference.plan.devices import Devices

if TYPE_CHECKING:
    from batch_inference.launch.together import Leader

POLL_S = 1.0  # how often to check on a setting that another program measures


def run_jobs(
    jobs: Sequence[PlannedJob],
    options: Options,
    devices: Devices,
    processes: Processes,
    leader: Leader | None = None,
) -> Outcomes:
    """`leader`: of the nodes, if there are several. Raises SystemExit after a signal, and with 2 if what the user
    asked is wrong for every setting."""
    outcomes = Outcomes()
    outcomes.skipped += [one.job for one in jobs if one.reason]
    in_turn = _OneByOne(jobs, outcomes, devices, processes, leader)
    if options.pack:
        for place, one in enumerate(jobs):
            if one.reason:
                _say_skipped(jobs, place)
        taken = _run_side_by_side([one.job for one in jobs if not one.reason], outcomes, devices, processes)
        in_turn.wait_for([place for place, one in enumerate(jobs) if one.job in taken])
    else:
        in_turn.run()
    return outcomes


def _heading(jobs: Sequence[PlannedJob], place: int) -> str:
    return f"[{place + 1}/{len(jobs)}] {jobs[place].job.name}"


def _say_skipped(jobs: Sequence[PlannedJob], place: int) -> None:
    say(f"{_heading(jobs, place)} skipped: {jobs[place].reason}")


def wait_for_others(config: ExperimentConfig, heading: str, processes: Processes) -> None:
    """Wait until nobody else is measuring this setting into its folder. Raises SystemExit after a signal."""
    said = False
    while holder := measured_by(config):
        if not said:
            say(f"{heading} waits: {holder} is measuring it")
            said = True
        time.sleep(POLL_S)
        processes.end_if_stopped()


class _OneByOne:
    """The settings in turn; if another program is measuring one, it is tried again at the end."""

    def __init__(
        self,
        jobs: Sequence[PlannedJob],
        outcomes: Outcomes,
        devices: Devices,
        processes: Processes,
        leader: Leader | None,
    ) -> None:
        self._jobs, self._outcomes, self._devices = jobs, outcomes, devices
        self._processes, self._leader = processes, leader
        self._elsewhere: list[int] = []  # places of the settings that other programs are measuring
        self._tried_again: set[int] = set()  # places that another program seemed to have measured meanwhile

    def run(self) -> None:
        for place, one in enumerate(self._jobs):
            if one.reason:
                _say_skipped(self._jobs, place)
            elif holder := measured_by(one.config):
                self._leave(place, holder)
            elif self._ends_preset(place, range(place + 1, len(self._jobs))):
                return
        self.wait_for([])

    def wait_for(self, places: Sequence[int]) -> None:
        """Settings that other programs are measuring: wait for them to end, then do what is left."""
        self._elsewhere += places
        self._tried_again.update(places)
        while self._elsewhere:
            place = self._elsewhere.pop(0)
            self._wait_for_others(place)
            if self._ends_preset(place, ()):
                return

    def _leave(self, place: int, holder: str) -> None:
        say(f"{_heading(self._jobs, place)}: {holder} is measuring it; it will be tried again at the end")
        self._elsewhere.append(place)

    def _wait_for_others(self, place: int) -> None:
        wait_for_others(self._jobs[place].config, _heading(self._jobs, place), self._processes)

    def _ends_preset(self, place: int, after: Iterable[int]) -> bool:
        """Measure a setting; returns whether those that are left need not be tried: those `after` it, and those that
        wait for other programs."""
        job, heading = self._jobs[place].job, _heading(self._jobs, place)
        left = [self._jobs[number] for number in sorted({*after, *self._elsewhere})]
        say(f"{heading} -> {job.config.output_path}")
        say_time_left([self._jobs[place], *left], self._devices)
        since_s = time.time()
        code = self._leader.run(job, heading) if self._leader else self._processes.run(job.words)
        if code == 2 and (holder := self._holder_since(place, since_s)):
            self._leave(place, holder)
            return False
        # A wrong flag or model is wrong for all settings.
        if code == 2 and self._outcomes.none_ran:
            raise SystemExit(2)
        self._outcomes.keep(job, code)
        later = [one.job for one in left if not one.reason]
        if code and is_same_for_all(job, later, since_s):
            self._outcomes.skipped += later
            return True
        if self._leader and self._leader.problem:
            not_begun = listed(one.name for one in later)
            say(f"error: {self._leader.problem}; the preset ends; not started: {not_begun or 'none'}")
            return True
        return False

    def _holder_since(self, place: int, since_s: float) -> str | None:
        """Who measures the setting, or began to and has ended since. The latter is believed once: what was written may
        be the setting's own, which was then refused."""
        config = self._jobs[place].job.config
        if place in self._tried_again:
            return measured_by(config)
        self._tried_again.add(place)
        return taken_since(config, since_s)


def say_time_left(jobs: Sequence[PlannedJob], devices: Devices) -> None:
    left = time_left([one.config for one in jobs if one.reason is None], devices.kind)
    if left:
        say(f"  {left}")


def is_same_for_all(failed: Job, rest: Sequence[Job], since_s: float) -> bool:
    """Whether what kept a setting from getting an engine would also stop all others; says so."""
    kind = failure_since(failed.config, since_s)
    if kind not in SAME_FOR_ALL:
        return False
    if rest:
        say(f"{listed(job.name for job in rest)} skipped: {kind} would be the same for every setting")
    return True


def _run_side_by_side(jobs: Sequence[Job], outcomes: Outcomes, devices: Devices, processes: Processes) -> list[Job]:
    """Settings that other programs are measuring are skipped and returned."""
    from batch_inference.launch.packing import Packing

    packing, since_s = Packing(jobs, devices, processes), time.time()
    ended, taken = [], []
    for job, code in packing.run():
        if code == 2 and taken_since(job.config, since_s):
            taken.append(job)
            continue
        ended.append((job, code))
        if code and is_same_for_all(job, packing.waiting, since_s):
            outcomes.skipped += packing.give_up()
    processes.end_if_stopped()
    for job, code in ended:
        outcomes.keep(job, code)
    if ended and not taken and all(code == 2 for _, code in ended):
        raise SystemExit(2)
    return taken
