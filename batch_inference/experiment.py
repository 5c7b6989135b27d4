"""One setting: warm up, repeat, judge and save every point of the grid, on one engine load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from batch_inference.config import ConfigError, ExperimentConfig
from batch_inference.console import Console
from batch_inference.environment import now
from batch_inference.hardware import Monitor, Reading, drawn_j, joined
from batch_inference.metrics import summarise
from batch_inference.replicas import ReplicaError, Replicas
from batch_inference.results import Point, PointKey, Requests, Result, Run, load_result, save_result
from batch_inference.statistics import ci95_half_width, is_steady, mean

# A kernel compiled in mid-run shows as a warm-up several times slower than the next: two that agree end the warm-up.
STEADY_WITHIN = 0.05
MAX_WARMUPS = 5
# A mean that is known no better than this decides nothing between settings.
WIDEST_INTERVAL = 0.1


class Experiment:
    """Runs the grid of `config` on `replicas` and keeps the result file up to date."""

    def __init__(self, config: ExperimentConfig, result: Result, monitor: Monitor, console: Console) -> None:
        self._config = config
        self._monitor = monitor
        self._console = console
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
            if not self._config.output_path.exists():
                self._save()
            raise
        finally:
            self._console.close()
            replicas.close(hurry=hurry)
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
        for point in self.result.points:
            point.engine = _of_its_own({**before, **point.engine}, self.result.engine)
        self._console.loaded(self.result)

    def _measure_grid(self, replicas: Replicas) -> None:
        open_points = self._open_points()
        self._console.start(len(self._grid()), len(self._grid()) - len(open_points))
        for number, key in enumerate(open_points):
            point = Point(*key, status="ok")
            try:
                self._measure(point, replicas)
            except ReplicaError as error:
                point.status = "oom" if is_out_of_memory(error) else "error"
                point.reason, point.log_tail = error.reason, error.log_tail
                self._add(point)
                reason = f"the engine was lost at batch_size {point.batch_size}, seq_len {point.seq_len}"
                self.result.points += [Point(*rest, "skipped", reason) for rest in open_points[number + 1 :]]
                return
            self._add(point)
        self.result.status = "complete"

    def _add(self, point: Point) -> None:
        if point.status == "ok":
            point.verdict_reasons, point.verdict = judge(self.result, point)
        point.summary = summarise(self.result, point)
        self.result.points.append(point)
        self._save()
        self._console.point_done(point)

    def _measure(self, point: Point, replicas: Replicas) -> None:
        latencies_s: list[float] = []
        while not self._is_warm(latencies_s):
            latencies_s.append(self._run(point, replicas, "warmup", len(latencies_s)).latency_s)
        point.warmups = [{"latency_s": latency_s} for latency_s in latencies_s]
        for index in range(self._config.num_runs):
            point.runs.append(self._run(point, replicas, "run", index))

    def _is_warm(self, latencies_s: list[float]) -> bool:
        if len(latencies_s) < self._config.warmup_runs:
            return False
        return is_steady(latencies_s, STEADY_WITHIN) or len(latencies_s) >= max(MAX_WARMUPS, self._config.warmup_runs)

    def _run(self, point: Point, replicas: Replicas, phase: str, index: int) -> Run:
        self._console.running(point, phase, index)
        stream = (self._config.seed, point.seq_len, point.batch_size, phase, index)
        replicas.prepare(point.batch_size, point.seq_len, point.max_tokens, stream)
        before = self._monitor.read(replicas.pids())
        outcomes = replicas.run()
        after = self._monitor.read(replicas.pids())
        if "readings" in outcomes[0]:  # the devices may be on other machines: those who hold them have read them
            before, after = (joined(both) for both in zip(*(outcome["readings"] for outcome in outcomes), strict=True))
        return combine(outcomes, before, after)

    def _fail(self, error: ReplicaError) -> None:
        self.result.status = "failed"
        self.result.engine["failure"] = {"reason": error.reason, "log_tail": error.log_tail}

    def _save(self) -> None:
        save_result(self.result, self._config.output_path)


def combine(outcomes: list[dict[str, Any]], before: Reading, after: Reading) -> Run:
    """One run out of what each replica reports: the last end, the sum of tokens, every request."""
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
        memory={name: after[name] for name in ("scope", "used_gib")},
        counters={
            name: sum(outcome[name] for outcome in outcomes) for name in ("preemptions", "prefix_cache_hit_tokens")
        },
        unknown={} if energy_j is not None else {"energy_j": "this machine has no energy counter for its devices"},
    )


def _of_its_own(measured_on: dict[str, Any], engine: dict[str, Any]) -> dict[str, Any]:
    """What was otherwise with the engine of an earlier sweep: the grid decides some of its sizes."""
    return {
        name: value
        for name, value in measured_on.items()
        if name in engine and name != "workers" and engine[name] != value
    }


def is_out_of_memory(error: ReplicaError) -> bool:
    return "out of memory" in error.reason.lower() or "OutOfMemoryError" in error.reason


# --- the verdict --------------------------------------------------------------------------------------------------


def judge(result: Result, point: Point) -> tuple[list[str], Any]:
    """Reasons not to believe a measured point, and "valid", "suspect" or "invalid"."""
    invalid = [reason for find in _INVALID for reason in find(result, point)]
    suspect = [reason for find in _SUSPECT for reason in find(result, point)]
    return invalid + suspect, "invalid" if invalid else "suspect" if suspect else "valid"


def _token_counts(result: Result, point: Point) -> list[str]:
    requests = point.batch_size * result.data_parallel_size
    asked = (requests * point.seq_len, requests * point.max_tokens)
    counted = {(run.prompt_tokens, run.output_tokens) for run in point.runs} - {asked}
    return [
        f"{prompt} prompt and {output} output tokens came back, {asked[0]} and {asked[1]} were asked"
        for prompt, output in sorted(counted)
    ]


def _prefix_hits(_: Result, point: Point) -> list[str]:
    hits = sum(run.counters["prefix_cache_hit_tokens"] for run in point.runs)
    return [f"{hits} prompt tokens came from the prefix cache"] if hits else []


def _preempted(_: Result, point: Point) -> list[str]:
    count = sum(run.counters["preemptions"] for run in point.runs)
    return [f"{count} requests were preempted for want of KV cache"] if count else []


def _waves(result: Result, point: Point) -> list[str]:
    slots = result.engine.get("max_num_seqs")
    if slots and point.batch_size > slots:
        return [f"ran in waves: batch_size {point.batch_size} is over max_num_seqs {slots}"]
    tokens = point.batch_size * (point.seq_len + point.max_tokens)
    capacity = result.engine.get("kv_cache_tokens")
    if capacity and tokens > capacity:
        return [f"ran in waves: {tokens} tokens are more than the KV cache holds ({capacity})"]
    return []


def _never_steady(_: Result, point: Point) -> list[str]:
    latencies_s = [warmup["latency_s"] for warmup in point.warmups]
    # Fewer than two are not known to differ.
    if len(latencies_s) < 2 or is_steady(latencies_s, STEADY_WITHIN):
        return []
    return [f"not steady after {len(latencies_s)} warm-ups: the last two differ by more than {STEADY_WITHIN:.0%}"]


def _wide_interval(_: Result, point: Point) -> list[str]:
    latencies_s = [run.latency_s for run in point.runs]
    half_width_s, mean_s = ci95_half_width(latencies_s), mean(latencies_s)
    if half_width_s is None or mean_s is None or half_width_s <= WIDEST_INTERVAL * mean_s:
        return []
    return [f"runs differ: the 95 % interval is over ±{WIDEST_INTERVAL:.0%}; raise --num-runs"]


_Check = Callable[[Result, Point], list[str]]
_INVALID: tuple[_Check, ...] = (_token_counts, _prefix_hits)
_SUSPECT: tuple[_Check, ...] = (_preempted, _waves, _never_steady, _wide_interval)


# --- the file to start from ---------------------------------------------------------------------------------------


def starting_result(config: ExperimentConfig, environment: dict[str, Any]) -> Result:
    """A new result, or with --resume the one on disk. Raises ConfigError where the file speaks against either."""
    fresh = Result(config.setting_name, "partial", config.to_json(), environment, engine={})
    path = config.output_path
    if not path.exists() or config.overwrite:
        return fresh
    if not config.resume:
        raise ConfigError(
            f"--output-file {path}: it exists; give --resume to add to it, --overwrite to replace it, or another name"
        )
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
