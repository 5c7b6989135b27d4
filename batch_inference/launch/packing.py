"""Settings of a preset side by side, each on its own devices: the launcher's --pack.

The longest first, each as soon as enough devices are free. A setting's output goes to NAME_results.txt beside its
result file (NAME_results_2.txt if another launcher uses that), and to standard error after its name.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from batch_inference.core.streams import say
from batch_inference.launch.jobs import Job
from batch_inference.launch.processes import Processes
from batch_inference.measure.console import LogFollower
from batch_inference.measure.locks import LockedError, lock_of, locked
from batch_inference.measure.logs import empty_log, open_log
from batch_inference.plan.devices import Devices, cores_of

LOOK_S = 0.1


def longest_first(jobs: Iterable[Job]) -> list[Job]:
    """A replica on fewer devices takes longer for the same batches. Among equally long ones, the one on the most
    devices is the hardest to place."""
    return sorted(jobs, key=lambda job: (job.config.devices_per_replica, -job.config.num_devices))


@dataclass(frozen=True)
class _Running:
    """A started job; its output is shown after its name."""

    job: Job
    devices: Devices
    process: Popen[bytes]
    follower: LogFollower
    console: ExitStack  # holds the lock of its output file

    def close(self) -> None:
        self.follower.stop()
        self.console.close()


class Packing:
    """Jobs on the devices of this machine, no two on the same device."""

    def __init__(self, jobs: Iterable[Job], devices: Devices, processes: Processes) -> None:
        self._waiting = longest_first(jobs)
        self._total = len(self._waiting)
        self._devices = devices
        self._free = list(devices.ids)
        self._processes = processes
        self._running: list[_Running] = []

    @property
    def waiting(self) -> list[Job]:
        return list(self._waiting)

    def give_up(self) -> list[Job]:
        """Jobs that still wait are no longer started."""
        given_up = self.waiting
        self._waiting.clear()
        return given_up

    def run(self) -> Iterator[tuple[Job, int]]:
        """Every job with its exit code, as they end. After a signal, it waits for the running ones."""
        while self._running or (self._waiting and not self._processes.are_stopped):
            yield from self._start_what_fits()
            time.sleep(LOOK_S)
            for one in [one for one in self._running if one.process.poll() is not None]:
                one.close()
                self._running.remove(one)
                self._free = sorted([*self._free, *one.devices.ids], key=self._devices.ids.index)
                yield one.job, self._processes.ended(one.process)

    def _start_what_fits(self) -> Iterator[tuple[Job, int]]:
        """Jobs that cannot be started count as failed; the others go on."""
        for job in list(self._waiting):
            if job.config.num_devices <= len(self._free) and not self._processes.are_stopped:
                devices = Devices(self._devices.kind, tuple(self._free[: job.config.num_devices]))
                del self._free[: len(devices)]
                self._waiting.remove(job)
                number = self._total - len(self._waiting)
                say(f"[{number}/{self._total}] {job.name} on {on(devices)} -> {job.config.output_path}")
                try:
                    self._running.append(self._start(job, devices))
                except OSError as error:
                    say(f"error: {job.console_path}: {job.name}'s output cannot be written there: {error.strerror}")
                    self._free += devices.ids
                    yield job, 1

    def _start(self, job: Job, devices: Devices) -> _Running:
        """Raises OSError."""
        with ExitStack() as held:
            path = _own_console(job, held)
            empty_log(path)
            follower = LogFollower(path, lambda line: say(f"{job.name}: {line}"))
            return _Running(job, devices, self._process_of(job, devices, path), follower, held.pop_all())

    def _process_of(self, job: Job, devices: Devices, path: Path) -> Popen[bytes]:
        """`path`: where its output goes."""
        allowed = os.sched_getaffinity(0)
        with open_log(path) as console:
            # A child inherits the cores, so that the front end of a CPU engine does not disturb the other engines.
            if devices.kind == "cpu":
                os.sched_setaffinity(0, {core for cores in devices.ids for core in cores_of(cores)})
            try:
                return self._processes.start(job.words, devices.environment(), console)
            finally:
                os.sched_setaffinity(0, allowed)


def _own_console(job: Job, held: ExitStack) -> Path:
    """A file that no other launcher prints into while `held` is open. Raises OSError."""
    path = job.console_path
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(2):
        try:
            held.enter_context(locked(lock_of(path), f"{job.name}, what it prints"))
            break
        except LockedError:
            path = job.console_path.with_stem(f"{job.console_path.stem}_{number}")
    return path


def on(devices: Devices) -> str:
    what = "device" if devices.kind == "gpu" else "cores"
    return f"{what}{'s' if devices.kind == 'gpu' and len(devices) > 1 else ''} {','.join(devices.ids)}"
