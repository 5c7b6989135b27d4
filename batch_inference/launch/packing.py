"""Settings of a preset side by side, each on devices of its own: the launcher's --pack.

    python -m batch_inference.launch.packing COMMAND..       each quoted for the shell, all of the experiment script

The longest first, each as soon as enough devices are free. What a setting prints goes to NAME_results.txt beside its
result file, and to standard error behind its name. Standard output has a line "EXIT_CODE NUMBER" for each that has
ended: which of the commands it was, from 0.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from batch_inference.core.config import ExperimentConfig
from batch_inference.launch.overview import config_of
from batch_inference.measure.console import LogFollower
from batch_inference.plan.devices import Devices, cores_of, find_devices

LOOK_S = 0.1
_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@dataclass(frozen=True)
class Job:
    """One command of the launcher."""

    words: tuple[str, ...]
    config: ExperimentConfig

    @property
    def name(self) -> str:
        return self.config.setting_name

    @property
    def console_path(self) -> Path:
        return self.config.output_path.with_suffix(".txt")


def longest_first(jobs: Iterable[Job]) -> list[Job]:
    """A replica on fewer devices needs longer for the same batches. Of those that need as long, the one on the most
    devices is the hardest to place."""
    return sorted(jobs, key=lambda job: (job.config.devices_per_replica, -job.config.num_devices))


class Packing:
    """Jobs on the devices of this machine: no two on the same one."""

    def __init__(self, jobs: Iterable[Job], devices: Devices) -> None:
        self._waiting = longest_first(jobs)
        self._total = len(self._waiting)
        self._devices = devices
        self._free = list(devices.ids)
        self._running: list[_Running] = []
        self.stopped_by: int | None = None

    def run(self) -> Iterator[tuple[Job, int]]:
        """Every job with its exit code, as they end. After `stop`, those that run are waited for."""
        while self._running or (self._waiting and not self.stopped_by):
            if not self.stopped_by:
                self._start_what_fits()
            time.sleep(LOOK_S)
            for one in [one for one in self._running if one.process.poll() is not None]:
                one.follower.stop()
                self._running.remove(one)
                self._free = sorted([*self._free, *one.devices.ids], key=self._devices.ids.index)
                yield one.job, one.process.returncode

    def stop(self, signal_number: int, _frame: FrameType | None = None) -> None:
        """Start no other. The jobs are in the process group of this process, and get the signal themselves."""
        self.stopped_by = signal_number

    def _start_what_fits(self) -> None:
        for job in list(self._waiting):
            if job.config.num_devices <= len(self._free):
                devices = Devices(self._devices.kind, tuple(self._free[: job.config.num_devices]))
                del self._free[: len(devices)]
                self._waiting.remove(job)
                number = self._total - len(self._waiting)
                say(f"[{number}/{self._total}] {job.name} on {on(devices)} -> {job.config.output_path}")
                self._running.append(_Running(job, devices))


class _Running:
    """A job that has been started; what it prints is shown behind its name."""

    def __init__(self, job: Job, devices: Devices) -> None:
        self.job, self.devices = job, devices
        path = job.console_path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self.follower = LogFollower(path, lambda line: say(f"{job.name}: {line}"))
        allowed = os.sched_getaffinity(0)
        with path.open("ab") as console:
            # A child inherits the cores: the front end of an engine on CPUs is not to disturb the other engines.
            if devices.kind == "cpu":
                os.sched_setaffinity(0, {core for cores in devices.ids for core in cores_of(cores)})
            try:
                self.process = subprocess.Popen(
                    job.words, stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                    env={**os.environ, **devices.environment()},
                )  # fmt: skip
            finally:
                os.sched_setaffinity(0, allowed)


def on(devices: Devices) -> str:
    what = "device" if devices.kind == "gpu" else "cores"
    return f"{what}{'s' if devices.kind == 'gpu' and len(devices) > 1 else ''} {','.join(devices.ids)}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(commands: Sequence[str]) -> int:
    jobs = [Job(words := tuple(shlex.split(command)), config_of(words)) for command in commands]
    packing = Packing(jobs, find_devices())
    for number in _EXIT_CODES:
        signal.signal(number, packing.stop)
    for job, code in packing.run():
        print(code, jobs.index(job), flush=True)
    return _EXIT_CODES[signal.Signals(packing.stopped_by)] if packing.stopped_by else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
