"""The settings of a preset, measured: one after the other, or side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from batch_inference.core.failures import SAME_FOR_ALL
from batch_inference.core.text import listed
from batch_inference.launch.console import Outcomes, say
from batch_inference.launch.jobs import Job
from batch_inference.launch.options import Options
from batch_inference.launch.overview import PlannedJob
from batch_inference.launch.processes import Processes
from batch_inference.launch.stored import failure_since, time_left
from batch_inference.plan.devices import Devices

if TYPE_CHECKING:
    from batch_inference.launch.together import Leader


def run_jobs(
    jobs: Sequence[PlannedJob],
    options: Options,
    devices: Devices,
    processes: Processes,
    leader: Leader | None = None,
) -> Outcomes:
    """`leader`: of the nodes, where there are several. Raises SystemExit after a signal, and with 2 where what the user
    asked is wrong for every setting."""
    outcomes = Outcomes()
    packed = []
    for number, one in enumerate(jobs, start=1):
        heading = f"[{number}/{len(jobs)}] {one.job.name}"
        if one.reason:
            say(f"{heading} skipped: {one.reason}")
            outcomes.skipped.append(one.job)
        elif options.pack:
            packed.append(one.job)
        else:
            say(f"{heading} -> {one.config.output_path}")
            say_time_left(jobs[number - 1 :], devices)
            since_s = time.time()
            code = leader.run(one.job, heading) if leader else processes.run(one.job.words)
            # A flag or a model that is wrong for the first setting is wrong for all.
            if code == 2 and outcomes.none_ran:
                raise SystemExit(2)
            outcomes.keep(one.job, code)
            rest = [other.job for other in jobs[number:]]
            if code and is_same_for_all(one.job, rest, since_s):
                outcomes.skipped += rest
                break
        if leader and leader.problem:
            not_begun = listed(later.job.name for later in jobs[number:] if later.reason is None)
            say(f"error: {leader.problem}; the preset ends, not begun: {not_begun or 'none'}")
            break
    if packed:
        _run_side_by_side(packed, outcomes, devices, processes)
    return outcomes


def say_time_left(jobs: Sequence[PlannedJob], devices: Devices) -> None:
    left = time_left([one.config for one in jobs if one.reason is None], devices.kind)
    if left:
        say(f"  {left}")


def is_same_for_all(failed: Job, rest: Sequence[Job], since_s: float) -> bool:
    """Whether what kept a setting from having an engine would keep all others from it too; says so."""
    kind = failure_since(failed.config, since_s)
    if kind not in SAME_FOR_ALL:
        return False
    if rest:
        say(f"{listed(job.name for job in rest)} skipped: {kind} would be the same for every setting")
    return True


def _run_side_by_side(jobs: Sequence[Job], outcomes: Outcomes, devices: Devices, processes: Processes) -> None:
    from batch_inference.launch.packing import Packing

    packing, since_s = Packing(jobs, devices, processes), time.time()
    ended = []
    for job, code in packing.run():
        ended.append((job, code))
        if code and is_same_for_all(job, packing.waiting, since_s):
            outcomes.skipped += packing.give_up()
    processes.end_if_stopped()
    for job, code in ended:
        outcomes.keep(job, code)
    if all(code == 2 for _, code in ended):
        raise SystemExit(2)
