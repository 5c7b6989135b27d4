"""One setting: warm up, repeat, judge and save every point of the grid, on one engine load."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.failures import classify
from batch_inference.core.metrics import run_latencies_s, summarise
from batch_inference.core.results import Point, PointKey, PointStatus, Requests, Result, Run, load_result, save_result
from batch_inference.core.statistics import is_narrow
from batch_inference.core.verdict import is_settled, judge
from batch_inference.measure.console import Console
from batch_inference.measure.environment import now
from batch_inference.measure.hardware import Monitor, Reading, clocks_of, drawn_j, joined
from batch_inference.measure.peaks import datasheet_peaks
from batch_inference.measure.replicas import ReplicaError, Replicas

MAX_WARMUPS = 5
# Engines lost one after the other, at different points: it is not the points then.
MOST_LOSSES = 2
# A closed engine hands its memory back within seconds.
DEVICES_TIMEOUT_S = 60.0
_STATUS_OF: dict[str, PointStatus] = {"oom_run": "oom", "oom_load": "oom", "timeout_point": "timeout"}
# Timed runs of a point that are repeated because vLLM compiled a kernel during them.
MAX_REPEATED = 3


class Experiment:
    """Runs the grid of `config` on `replicas` and keeps the result file up to date."""

    def __init__(self, config: ExperimentConfig, result: Result, monitor: Monitor, console: Console) -> None:
        self._config = config
        self._monitor = monitor
        self._console = console
        self._before = monitor.read()
        self._engine_is_lost = False  # and has nothing to end in order
        self._is_saved = True
        self.result = result

    def run(self, replicas: Replicas) -> Result:
        """Load, measure every point that is still open, save after each. The replicas are closed at the end."""
        hurry = False
        try:
            self._measure_open_points(replicas)
            # Before the engine closes, which takes seconds: a finished setting that is ended then is still complete.
            self._save()
        except (KeyboardInterrupt, SystemExit):
            hurry = True
            self._console.note("\nending the engine; finished points are kept")
            # Interrupted while loading: say so in a file, but never in place of one that holds measurements.
            if not (self._is_saved and self._config.output_path.exists()):
                self._save()
            raise
        finally:
            self._console.close()
            replicas.close(hurry=hurry or self._engine_is_lost)
        # The next setting is to find the devices as this one did.
        held = self._wait_for_devices()
        if held:
            self._console.note(f"warning: {held}")
        return self.result

    def _measure_open_points(self, replicas: Replicas) -> None:
        if not self._open_points():
            self._console.note(f"{self._config.setting_name}: every point is there already")
            self.result.status = "complete"
            return
        try:
            self._console.loading(self._config)
            self._describe_engine(replicas.start())
            self._save()
            self._measure_grid(replicas)
            self.result.environment["ended_at"] = now()
        except ReplicaError as error:
            self._fail(error)

    def _open_points(self) -> list[PointKey]:
        done = {point.key for point in self.result.points if point.status == "ok"}
        return [key for key in self._grid() if key not in done]

    def _grid(self) -> list[PointKey]:
        return [(*key, self._config.max_tokens) for key in self._config.points()]

    def _describe_engine(self, engines: list[dict[str, Any]]) -> None:
        """Keep the first replica's engine, and beside it what is not the same in every replica."""
        common, *_ = engines
        differing = [key for key in common if any(engine[key] != common[key] for engine in engines)]
        before = self.result.engine
        self.result.engine = {
            **common,
            "replicas": [{key: engine[key] for key in differing} for engine in engines] if differing else [],
        }
        if self._config.devices_elsewhere and self.result.environment.get("device_kind") == "gpu":
            self.result.environment["devices"] = [
                worker["device"] for engine in engines for worker in engine["workers"]
            ]
        environment = self.result.environment
        if environment.get("peaks") is None:
            environment["peaks"] = datasheet_peaks(self.result.devices, common.get("dtype"))
        for point in self.result.points:
            point.engine = _of_its_own({**before, **point.engine}, self.result.engine)
        self._console.loaded(self.result)

    def _measure_grid(self, replicas: Replicas) -> None:
        open_points = self._open_points()
        self._console.start(len(self._grid()), len(self._grid()) - len(open_points), self._config.fewest_runs)
        losses: list[Point] = []  # engines lost one after the other
        for number, key in enumerate(open_points):
            point = Point(*key, status="ok", reason=self._implied_by(key))
            if point.reason:
                point.status = "skipped"
                self._add(point)
                continue
            try:
                self._measure(point, replicas)
                losses = []
            except ReplicaError as error:
                self._lose(point, error)
                losses.append(point)
            self._add(point)
            self._engine_is_lost = bool(losses)
            if not losses:
                continue
            rest = open_points[number + 1 :]
            needed = any(self._implied_by(key) is None for key in rest)
            if needed and (reason := self._recover(replicas, losses)):
                self.result.points += [Point(*key, "skipped", reason) for key in rest]
                return
        self.result.status = "complete"

    def _implied_by(self, key: PointKey) -> str | None:
        """A smaller batch of the same length that lost its engine: a larger one needs more of everything."""
        for point in self.result.points:
            if point.failure and point.key[1:] == key[1:] and point.batch_size < key[0]:
                return f"implied by batch_size {point.batch_size}: {point.failure}"
        return None

    def _lose(self, point: Point, error: ReplicaError) -> None:
        point.failure = error.kind or classify("run", error.reason, error.log_tail)
        point.status = _STATUS_OF.get(point.failure, "error")
        point.reason, point.log_tail = error.reason, error.log_tail

    def _recover(self, replicas: Replicas, losses: list[Point]) -> str | None:
        """Start the engine again; why the sweep cannot go on, or None."""
        last = losses[-1]
        where = f"batch_size {last.batch_size}, seq_len {last.seq_len}"
        if not replicas.can_restart:
            return f"the engine was lost at {where}"
        if len(losses) >= MOST_LOSSES:
            return f"{len(losses)} engines were lost one after the other, the last at {where}"
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
        self.result.engine["restarts"] = self.result.engine.get("restarts", 0) + 1
        return None

    def _wait_for_devices(self) -> str | None:
        """Until the devices hold no more than before the first engine; who holds them, where that does not come."""
        deadline_s = time.monotonic() + DEVICES_TIMEOUT_S
        while held := self._monitor.held(self._before):
            if time.monotonic() > deadline_s:
                return f"device memory did not come back within {DEVICES_TIMEOUT_S:.0f} s: {held}"
            time.sleep(0.2)
        return None

    def _add(self, point: Point) -> None:
        if point.status == "ok":
            point.verdict_reasons, point.verdict = judge(self.result, point)
        point.summary = summarise(self.result, point)
        self._is_saved = False
        self.result.points.append(point)
        self._save()
        self._console.point_done(point)

    def _measure(self, point: Point, replicas: Replicas) -> None:
        self._warm_up(point, replicas)
        repeated = 0
        while not self._is_known(point):
            run = self._run(point, replicas, "run", len(point.runs) + repeated)
            # Whether a run counts is decided by what vLLM says of it, never by how long it took: a run that is slow
            # for no known reason stays.
            if run.counters.get("jit_compilations") and repeated < MAX_REPEATED:
                repeated += 1
                point.warmups.append(as_warmup(run, "a timed run until vLLM compiled a kernel during it; repeated"))
                self._console.repeating(point)
                self._warm_up(point, replicas)
            else:
                point.runs.append(run)

    def _warm_up(self, point: Point, replicas: Replicas) -> None:
        """Until steady; a run that compiled a kernel is the first of a new series."""
        made = 1 if point.warmups else 0
        most = max(MAX_WARMUPS, self._config.warmup_runs)
        while made < self._config.warmup_runs or not (is_settled(point.warmups) or made >= most):
            run = self._run(point, replicas, "warmup", len(point.warmups))
            point.warmups.append(as_warmup(run))
            made += 1

    def _is_known(self, point: Point) -> bool:
        """Whether the point has runs enough."""
        config = self._config
        if len(point.runs) < config.fewest_runs or config.num_runs is not None:
            return len(point.runs) >= config.fewest_runs
        return len(point.runs) >= config.max_runs or is_narrow(run_latencies_s(point), config.target_ci)

    def _run(self, point: Point, replicas: Replicas, phase: str, index: int) -> Run:
        self._console.running(point, phase, index)
        stream = (self._config.seed, point.seq_len, point.batch_size, phase, index)
        replicas.prepare(point.batch_size, point.seq_len, point.max_tokens, stream)
        before = self._monitor.read(replicas.pids())
        with self._monitor.watch() as seen:
            outcomes = replicas.run()
        after = self._monitor.read(replicas.pids())
        if "readings" in outcomes[0]:  # the devices may be on other machines: those who hold them have read them
            before, after = (joined(both) for both in zip(*(outcome["readings"] for outcome in outcomes), strict=True))
        if self._config.distributed_executor_backend == "ray":
            seen = {}  # of this machine's first devices; Ray may have given out others
        return combine(outcomes, before, after, seen)

    def _fail(self, error: ReplicaError) -> None:
        self.result.status = "failed"
        self._engine_is_lost = True
        kind = error.kind or classify("load", error.reason, error.log_tail)
        self.result.engine["failure"] = {"class": kind, "reason": error.reason, "log_tail": error.log_tail}

    def _save(self) -> None:
        save_result(self.result, self._config.output_path)
        self._is_saved = True


def as_warmup(run: Run, reason: str | None = None) -> dict[str, Any]:
    known = {"jit_compilations": run.counters.get("jit_compilations"), "reason": reason}
    return {"latency_s": run.latency_s, **{name: value for name, value in known.items() if value}}


def combine(outcomes: list[dict[str, Any]], before: Reading, after: Reading, seen: dict[str, Any]) -> Run:
    """One run out of what each replica reports: the last end, the sum of tokens, every request; and out of what the
    devices showed before, after and meanwhile (`seen`)."""
    requests = {
        name: [value for outcome in outcomes for value in outcome["requests"][name]] for name in outcomes[0]["requests"]
    }
    energy_j = drawn_j(before, after)
    kept = ("start_s", "end_s", "prompt_tokens", "output_tokens")
    return Run(
        latency_s=max(outcome["end_s"] for outcome in outcomes),
        prompt_tokens=sum(outcome["prompt_tokens"] for outcome in outcomes),
        output_tokens=sum(outcome["output_tokens"] for outcome in outcomes),
        replicas=[{"replica": index, **{key: outcome[key] for key in kept}} for index, outcome in enumerate(outcomes)],
        requests=Requests(**requests),
        energy_j=energy_j,
        memory={
            **{name: after[name] for name in ("scope", "used_gib")},
            **{name: seen[name] for name in ("peak_gib",) if name in seen},
            **_where_known(outcomes, "peak_kv_use", max),
        },
        counters={
            "preemptions": sum(outcome["preemptions"] for outcome in outcomes),
            "prefix_cache_hit_tokens": sum(outcome["prefix_cache_hit_tokens"] for outcome in outcomes),
            **_where_known(outcomes, "jit_compilations", sum),
            **_where_known(outcomes, "peak_running", min),
            # vLLM's own estimates of the work of one device: of the busiest replica.
            **_where_known(outcomes, "flops_per_device", max),
            **_where_known(outcomes, "memory_bytes_per_device", max),
        },
        unknown={} if energy_j is not None else {"energy_j": "this machine has no energy counter for its devices"},
        clocks=clocks_of(after, seen),
    )


def _where_known(outcomes: list[dict[str, Any]], name: str, join: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """What the replicas that report `name` make together; nothing where none does."""
    values = [outcome[name] for outcome in outcomes if name in outcome]
    return {name: join(values)} if values else {}


def _of_its_own(measured_on: dict[str, Any], engine: dict[str, Any]) -> dict[str, Any]:
    """What was otherwise with the engine of an earlier sweep: the grid decides some of its sizes."""
    return {
        name: value
        for name, value in measured_on.items()
        if name in engine and name != "workers" and engine[name] != value
    }


# --- the file to start from ---------------------------------------------------------------------------------------


def starting_result(config: ExperimentConfig, environment: dict[str, Any]) -> Result:
    """A new result, or with --resume the one on disk. Raises ConfigError where the file speaks against either."""
    fresh = Result(config.setting_name, "partial", config.to_json(), environment, engine={})
    path = config.output_path
    if config.output_conflict:
        raise ConfigError(config.output_conflict)
    if not path.exists() or config.overwrite:
        return fresh
    return _resumed(config, fresh, path)


def _resumed(config: ExperimentConfig, fresh: Result, path: Path) -> Result:
    old = load_result(path)
    if old.config.get("config_hash") != config.config_hash():
        raise ConfigError(f"--resume: {path} was measured with other settings: {_differences(old, config)}")
    elsewhere = _measured_elsewhere(old.environment, fresh.environment)
    if elsewhere:
        raise ConfigError(f"--resume: {path} was measured elsewhere: {elsewhere}; give another --output-file")
    old.points = [point for point in old.points if point.status == "ok" and point.verdict != "invalid"]
    grid = {(*key, config.max_tokens) for key in config.points()}
    if grid <= {point.key for point in old.points}:
        return old
    fresh.points, fresh.engine = old.points, old.engine
    fresh.environment["resumed_from"] = [*old.environment.get("resumed_from", []), old.environment.get("started_at")]
    return fresh


def _measured_elsewhere(old: dict[str, Any], now_here: dict[str, Any]) -> str | None:
    """What makes points of two sweeps unlike: another vLLM, or other devices."""
    for name, of in (
        ("vLLM", lambda environment: environment.get("versions", {}).get("vllm")),
        ("devices", lambda environment: sorted({str(device.get("name")) for device in environment.get("devices", [])})),
    ):
        before, here = of(old), of(now_here)
        if before != here:
            return f"{name} was {before}, now {here}"
    return None


def _differences(old: Result, config: ExperimentConfig) -> str:
    asked = {name: value for name, value in config.to_json().items() if name in config.measured_settings()}
    differing = [
        f"{name} was {old.config.get(name)!r}, now {value!r}"
        for name, value in asked.items()
        if old.config.get(name) != value
    ]
    return "; ".join(differing) or "the file holds no comparable settings"
