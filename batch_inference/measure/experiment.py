"""One setting: warm up, repeat, judge and save every point of the grid on one engine load."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import msgspec
from msgspec.structs import replace

from batch_inference.core.answers import REQUESTS, beginnings, is_asked, lengths_for
from batch_inference.core.config import ExperimentConfig
from batch_inference.core.failures import classify
from batch_inference.core.growing_file import GrowingFile
from batch_inference.core.metrics import summary_and_method
from batch_inference.core.results import (
    Answers,
    EngineInfo,
    Failure,
    Point,
    PointKey,
    PointStatus,
    ReplicaInfo,
    Result,
    Run,
    workload_key,
)
from batch_inference.core.values import OWN_END
from batch_inference.core.verdict import is_settled, judge
from batch_inference.measure.climbing import Climbing, InTurn
from batch_inference.measure.combine import as_warmup, combine
from batch_inference.measure.console import Console, key_words
from batch_inference.measure.engine_process import ReplicaError
from batch_inference.measure.environment import now
from batch_inference.measure.hardware import Monitor, Seen
from batch_inference.measure.job import JobFile
from batch_inference.measure.messages import Answer, Prepare, Queue
from batch_inference.measure.nodes import Nodes
from batch_inference.measure.peaks import datasheet_peaks
from batch_inference.measure.replicas import Replicas, joined_readings
from batch_inference.measure.resume import has_runs_enough, is_enough, is_warm, keep_job, set_aside_engine

MAX_WARMUPS = 5
# Engines lost one after another at different points: then the points are not the cause.
MOST_LOSSES = 2
# A closed engine returns its memory within seconds.
DEVICES_TIMEOUT_S = 60.0
_STATUS_OF: dict[str, PointStatus] = {"oom_run": "oom", "oom_load": "oom", "timeout_point": "timeout"}
# How many timed runs of a point are repeated because vLLM compiled a kernel during them.
MAX_REPEATED = 3


class Experiment:
    """Runs the grid of `config` on `replicas` and keeps the result file up to date."""

    def __init__(
        self,
        config: ExperimentConfig,
        result: Result,
        monitor: Monitor,
        console: Console,
        job: JobFile | None = None,
    ) -> None:
        """`job`: the workload that the points are made of, if there is one."""
        self._config = config
        self._job = job
        self._monitor = monitor
        self._console = console
        self._before = monitor.read()
        self._engine_is_lost = False  # and cannot be closed in order
        self._file = GrowingFile(config.output_path, result)
        self._lost: list[Point] = []  # points that failed in this sweep
        self.result = result
        self._order = self._begin()
        if job:
            keep_job(result, job.described())

    def run(self, replicas: Replicas, nodes: Nodes | None = None) -> Result:
        """Load, measure every open point, save after each. At the end the replicas are closed and the
        other `nodes` are dismissed."""
        hurry = False
        try:
            if self.is_open:
                self._measure_open_points(replicas)
                # Before the engine closes, which takes seconds: a setting interrupted then is still complete.
                self._save()
            else:
                # The other ranks of a torchrun job are still waiting: `close` tells them.
                self._console.all_there(self._config, self._kept)
                self.result.status = "complete"
                self._forget_runs()
        except (KeyboardInterrupt, SystemExit):
            hurry = True
            self._console.note("\nending the engine; finished points are kept")
            # Interrupted while loading: record it in the file, but never replace one that holds measurements.
            if self._file.has_begun or not self._config.output_path.exists():
                self._save()
            raise
        finally:
            self._console.close()
            replicas.close(hurry=hurry or self._engine_is_lost)
        if nodes:  # before the wait: they may hold memory on the same devices
            nodes.dismiss(failed=self.result.status == "failed")
        # The next setting should find the devices as this one did.
        held = self._wait_for_devices()
        if held:
            self._console.note(f"warning: {held}")
        return self.result

    @property
    def is_open(self) -> bool:
        """Whether anything is left to measure or to ask."""
        return self._order.next_point() is not None or self._asks_answers

    @property
    def _asks_answers(self) -> bool:
        longest = self._config.longest_request
        return self._config.compare_answers and not is_asked(self.result.answers, self._config.seed, longest)

    @property
    def is_whole(self) -> bool:
        """Whether every point is measured and none failed."""
        return not self._lost and all(point.status == "ok" for point in self.result.points)

    def answers(self) -> list[str]:
        """What a search of batch sizes has found, in lines; nothing of a grid."""
        return self._order.answers()

    def unsaved(self) -> str | None:
        """What was measured, as the file would hold it; None if nothing was."""
        return self._file.told()

    def _measure_open_points(self, replicas: Replicas) -> None:
        try:
            self._console.loading(self._config)
            # Reading texts imports vLLM once more, which takes about as long as starting an engine.
            wait_for_texts = _begun(self._job.read_texts) if self._job else None
            self._keep_engine(replicas.start())
            if wait_for_texts:
                wait_for_texts()
            self._save()
            self._measure_grid(replicas)
            if self._asks_answers and not self._engine_is_lost:
                self._ask(replicas)
            self.result.environment.ended_at = now()
        except ReplicaError as error:
            self._fail(error)

    def _ask(self, replicas: Replicas) -> None:
        """Asked after everything is measured, so that no measurement is lost."""
        self._console.asking()
        seed, (prompt_tokens, output_tokens) = self._config.seed, lengths_for(self._config.longest_request)
        asked = Answer(REQUESTS, prompt_tokens, output_tokens, [seed, "answers"])
        try:
            first, *others = replicas.answer(asked)
        except ReplicaError as error:
            self._engine_is_lost = True
            self._console.note(f"warning: --compare-answers: the engine did not answer: {error.reason}")
            return
        at_once, in_halves = (list(map(beginnings, answers)) for answers in (first.at_once, first.in_halves))
        of_others = [list(map(beginnings, other.at_once)) for other in others]
        self.result.answers = Answers(seed, prompt_tokens, output_tokens, at_once, in_halves, of_others)

    def _begin(self) -> InTurn | Climbing:
        """What to measure; keeps what an earlier sweep measured well enough."""
        config, points, grid = self._config, self.result.points, self._grid()
        if config.searches:
            grid = [key for key in grid if not self._job or self._job.fills(key.batch_size)] or grid[:1]
            climbing = Climbing(config, self.result, grid, [point for point in points if is_warm(point, config)])
            self._kept = climbing.kept
            return climbing
        done = {point.key for point in points if is_enough(point, config, self._requests(point.batch_size))}
        self._kept = [point for point in points if point.key in set(grid) & done]
        return InTurn([key for key in grid if key not in done])

    def _grid(self) -> list[PointKey]:
        workload = workload_key(self._config) if self._job else None
        return [
            PointKey(batch_size, seq_len, max_tokens, workload, budget)
            for batch_size, seq_len, max_tokens, _, budget in self._config.points()
        ]

    def _requests(self, batch_size: int) -> int | None:
        """How many a queue point runs."""
        return self._job.sample_size(batch_size) if self._job else None

    def _keep_engine(self, engines: list[EngineInfo]) -> None:
        """The first replica's engine, and what is particular to each replica. Points that are already there
        keep theirs."""
        set_aside_engine(self.result)
        first = engines[0]
        own = [ReplicaInfo(one.load_s, one.workers, one.num_gpu_blocks, one.kv_cache_tokens) for one in engines]
        self.result.engine = replace(first, replicas=own if len(own) > 1 else [])
        environment = self.result.environment
        if self._config.devices_elsewhere and environment.device_kind == "gpu":
            workers = [worker for engine in engines for worker in engine.workers]
            environment.devices = [worker.device for worker in workers if worker.device is not None]
        if environment.peaks is None:
            environment.peaks = datasheet_peaks(environment.devices, first.dtype)
        self._console.loaded(self.result.engine)

    def _measure_grid(self, replicas: Replicas) -> None:
        self._console.start(self._config, None if self._config.searches else len(self._grid()), self._kept)
        losses: list[Point] = []  # engines lost one after another
        while (planned := self._order.next_point()) is not None:
            point = planned.so_far or _point(planned.key, "ok", self._implied_by(planned.key))
            if point.reason:
                point.status = "skipped"
                self._add(point)
                continue
            try:
                self._measure(point, replicas, planned.runs)
                losses = []
            except ReplicaError as error:
                self._lose(point, error)
                losses.append(point)
            self._add(point)
            self._engine_is_lost = bool(losses)
            if not losses:
                continue
            if self._is_engine_needed() and (reason := self._recover(replicas, losses)):
                for key in self._order.rest:
                    self._keep(_point(key, "skipped", reason))
                return
        self.result.status = "complete"

    def _is_engine_needed(self) -> bool:
        """Whether anything is left to measure that another point has not already shown to fail."""
        if self._order.rest:
            return any(self._implied_by(key) is None for key in self._order.rest)
        return self._order.next_point() is not None

    def _implied_by(self, key: PointKey) -> str | None:
        """A smaller batch of the same length that lost its engine: a larger one needs more of everything."""
        for point in self._lost:
            same_length = point.key == replace(key, batch_size=point.batch_size)
            if point.failure and same_length and point.batch_size < key.batch_size:
                return f"implied by batch_size {point.batch_size}: {point.failure}"
        return None

    def _lose(self, point: Point, error: ReplicaError) -> None:
        point.failure = error.kind or classify("run", error.reason, error.log_tail)
        point.status = _STATUS_OF.get(point.failure, "error")
        point.reason, point.log_tail = error.reason, error.log_tail

    def _recover(self, replicas: Replicas, losses: list[Point]) -> str | None:
        """Restart the engine; returns why the sweep cannot go on, or None."""
        last = losses[-1]
        where = ", ".join(key_words(last))
        if not replicas.can_restart:
            return f"the engine was lost at {where}"
        if len(losses) >= MOST_LOSSES:
            return f"{len(losses)} engines were lost one after another, the last at {where}"
        self._console.restarting(last)
        replicas.close(hurry=True)
        held = self._wait_for_devices()
        if held:
            return held
        try:
            replicas.start()
        except ReplicaError as error:
            return f"the engine did not come back after {where}: {error.reason}"
        self._engine_is_lost = False
        self.result.restarts += 1
        return None

    def _wait_for_devices(self) -> str | None:
        """Wait until the devices hold no more than before the first engine; returns who holds them if they never do."""
        deadline_s = time.monotonic() + DEVICES_TIMEOUT_S
        while held := self._monitor.held(self._before):
            if time.monotonic() > deadline_s:
                return f"device memory did not come back within {DEVICES_TIMEOUT_S:.0f} s: {held}"
            time.sleep(0.2)
        return None

    def _add(self, point: Point) -> None:
        point.summary, point.plateau_interval_by = summary_and_method(self.result, point)
        if point.status == "ok":
            point.verdict_reasons, point.verdict = judge(self.result, point)
        self._order.told(point)
        self._keep(point)
        self._console.point_done(point)

    def _keep(self, point: Point) -> None:
        """Keep a point in the file, not its raw runs in memory. A failure does not replace an earlier measurement."""
        if point.status != "ok":
            self._lost.append(point)
            if any(one.key == point.key for one in self.result.points):
                return
        self._file.add(point)
        self.result.points = [one for one in self.result.points if one.key != point.key] + [_light(point)]

    def _measure(self, point: Point, replicas: Replicas, runs: int | None) -> None:
        """`runs`: how many are enough; None for as many as were asked."""
        point.is_adaptive = None
        if self._job:
            point.sample = self._job.sample(point.batch_size)
        self._warm_up(point, replicas)
        repeated = 0
        while not self._has_enough(point, runs):
            run = self._run(point, replicas, "run", len(point.runs) + repeated)
            # What vLLM says about a run decides whether it counts, never how long it took: a run that is slow
            # for no known reason is kept.
            if run.counters.jit_compilations and repeated < MAX_REPEATED:
                repeated += 1
                point.warmups.append(as_warmup(run, "a timed run until vLLM compiled a kernel during it; repeated"))
                self._console.repeating(point)
                self._warm_up(point, replicas)
            else:
                point.runs.append(run)

    def _has_enough(self, point: Point, runs: int | None) -> bool:
        if runs is not None:
            return len(point.runs) >= runs
        return has_runs_enough(point, self._config, self._requests(point.batch_size))

    def _warm_up(self, point: Point, replicas: Replicas) -> None:
        """Run until steady; a run that compiled a kernel starts a new series. A queue is warm after one short run:
        it finds its plateau while it runs."""
        made = 1 if point.warmups else 0
        if self._job:
            while made < max(1, self._config.warmup_runs):
                point.warmups.append(as_warmup(self._run(point, replicas, "warmup", len(point.warmups))))
                made += 1
            self._foresee_timeout(point, self._job)
            return
        while made < self._config.warmup_runs or not (is_settled(point.warmups) or made >= MAX_WARMUPS):
            run = self._run(point, replicas, "warmup", len(point.warmups))
            point.warmups.append(as_warmup(run))
            made += 1

    def _foresee_timeout(self, point: Point, job: JobFile) -> None:
        """Say it before the sample runs for nothing. A warm-up that compiled says nothing about the pace."""
        last, limit_s = point.warmups[-1], self._config.point_timeout
        if not last.jit_compilations and (expected_s := job.expected_s(point.batch_size, last.latency_s)) > limit_s:
            self._console.too_long(point, expected_s, limit_s)

    def _run(self, point: Point, replicas: Replicas, phase: str, index: int) -> Run:
        self._console.running(point, phase, index)
        replicas.prepare(self._next(point, phase, index))
        before = self._monitor.read(replicas.pids())
        with self._monitor.watch() as seen:
            outcomes = replicas.run()
        after = self._monitor.read(replicas.pids())
        # The devices may be on other machines, whose workers have then read them.
        before, after = joined_readings(outcomes) or (before, after)
        if self._config.distributed_executor_backend == "ray":
            seen = Seen()  # would be of this machine's first devices; Ray may have assigned others
        return combine(outcomes, before, after, seen)

    def _next(self, point: Point, phase: str, index: int) -> Prepare | Queue:
        budget = point.max_num_batched_tokens
        if self._job:
            ends_itself = self._config.output_lengths == OWN_END
            few = self._job.warmup_size(point.batch_size) if phase == "warmup" else None
            shares = self._job.shares(point.key, few)
            stream: list[int | str] = [self._config.seed, "queue", point.batch_size, phase, index]
            return Queue(shares, point.batch_size, stream, ends_itself, budget)
        if point.seq_len is None or point.max_tokens is None:
            raise ValueError(f"{point.key} has no length of its own")
        stream = [self._config.seed, point.seq_len, point.batch_size, phase, index]
        return Prepare(point.batch_size, point.seq_len, point.max_tokens, stream, budget)

    def _fail(self, error: ReplicaError) -> None:
        self.result.status = "failed"
        self._engine_is_lost = True
        kind = error.kind or classify("load", error.reason, error.log_tail)
        self.result.failure = Failure(kind, error.reason, error.log_tail)

    def _save(self) -> None:
        """Save the head with all points; those of earlier sweeps are in memory until then."""
        if self._file.has_begun:
            self._file.fold()
            return
        self._file.begin()
        self._forget_runs()

    def _forget_runs(self) -> None:
        """Their runs are in the file; those of many points would not fit in memory."""
        self.result.points = [_light(point) for point in self.result.points]


def _begun(work: Callable[[], None]) -> Callable[[], None]:
    """Start it in a thread; returns what waits for its end and raises what it raised. An interruption does not wait."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits for it
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def wait() -> None:
        thread.join()
        if raised:
            raise raised[0]

    return wait


def _light(point: Point) -> Point:
    return replace(point, runs=[], warmups=[])


def _point(key: PointKey, status: PointStatus, reason: str | None) -> Point:
    return Point(**msgspec.structs.asdict(key), status=status, reason=reason)
