"""What people see while a setting is measured: progress on stderr, the closing table on stdout."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.failures import ADVICE
from batch_inference.core.files import open_regular
from batch_inference.core.results import EngineInfo, Point, PointKey, Result, WorkloadKey
from batch_inference.core.secrets import redact_text
from batch_inference.core.signals import held_back
from batch_inference.core.streams import say
from batch_inference.core.text import counted, listed, plain, short, table, with_budget, wrapped

# Usually two agree; with more, a point takes longer than the bar expects.
EXPECTED_WARMUPS = 2
LOG_LOOK_S = 0.2
# What vLLM's log says when a part of the start begins, in any of its versions.
_PARTS = (
    (re.compile("Loading model|Starting to load"), "loading weights"),
    (re.compile(r"Model loading took|torch\.compile|Dynamo"), "compiling"),
    (re.compile("KV cache (memory|size)"), "warming up"),
    (re.compile("Capturing CUDA graph"), "capturing CUDA graphs"),
)
_SHORT_REASON = re.compile("[:;]")  # what comes before is the short form
_BATCH_LEGEND = "  batch x length: output throughput ±95 % interval, latency, TTFT, memory"
_QUEUE_LEGEND = "  requests at once: output throughput on the plateau ±95 % interval, time, memory"


class Console:
    """Progress bar with ETA (only on a terminal), one line per finished point, vLLM's log with --verbose."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._log: LogFollower | None = None
        self._loading: _LoadingBar | None = None
        self._number = 0
        self._total: int | None = 0
        self._told: set[PointKey] = set()
        self._expected_runs = 0
        self._loading_since_s = 0.0
        self._said: set[str] = set()  # reasons to doubt a point, already shown

    def note(self, text: str) -> None:
        """A line above the bar, if there is one. It may be from a log, which may hold a secret."""
        bar = self._loading.bar if self._loading else self._bar
        if bar is None or bar.disable:
            say(text)
            return
        with held_back():  # interrupted, tqdm would release a lock that it did not get
            bar.write(redact_text(text), file=sys.stderr)

    def loading(self, config: ExperimentConfig) -> None:
        self._loading_since_s = time.monotonic()
        self.note(f"{config.setting_name}: loading {config.model_shown} on {counted(config.num_devices, 'device')}")
        self.note(f"  vLLM's log: {config.log_path}")
        if config.verbose:
            self._log = LogFollower(config.log_path, self.note)
        elif sys.stderr.isatty():
            self._loading = _LoadingBar(config.log_path)

    def loaded(self, engine: EngineInfo) -> None:
        self._end_loading()
        self.note(
            f"  ready after {time.monotonic() - self._loading_since_s:.0f} s: vLLM {engine.vllm_version}, "
            f"{engine.dtype}, weights {_gib(engine.weights_gib)}, KV cache {engine.kv_cache_tokens} tokens"
        )

    def asking(self) -> None:
        self.note("  asking for the answers to compare")

    def all_there(self, config: ExperimentConfig, kept: Sequence[Point]) -> None:
        self._wrapped(f"{config.setting_name}: {_kept_words(config, kept, len(kept))}: nothing is left to measure")

    def start(self, config: ExperimentConfig, total: int | None, kept: Sequence[Point]) -> None:
        """`total`: None if a search decides which points are measured."""
        # Imported here, because --help and --dry-run show no bar.
        from tqdm import tqdm

        done, fewest_runs = len(kept), config.fewest_runs
        if kept:
            self._wrapped(f"  {_kept_words(config, kept, total or done)}")
        self.note(_QUEUE_LEGEND if config.prompts_file else _BATCH_LEGEND)
        self._number, self._total, self._expected_runs = done, total, EXPECTED_WARMUPS + fewest_runs
        self._told = {point.key for point in kept}
        self._bar = tqdm(
            total=total,
            initial=done,
            file=sys.stderr,
            leave=False,
            dynamic_ncols=True,
            disable=None,
            smoothing=0,
            bar_format="{desc} |{bar}| {percentage:3.0f}% after {elapsed}, {remaining} left"
            if total
            else "{desc}, after {elapsed}",
        )

    def running(self, point: Point, phase: str, index: int) -> None:
        made = len(point.warmups) + len(point.runs)
        # A point that takes more runs than expected stays just short of done until it is.
        self._bar.n = self._number + made / max(made + 1, self._expected_runs)
        word = "warm-up" if phase == "warmup" else "run"
        self._bar.set_description_str(f"{_shape(point)}, {word} {index + 1}")

    def repeating(self, point: Point) -> None:
        self._wrapped(f"      {_shape(point)}: vLLM compiled a kernel; the run becomes a warm-up and is repeated")

    def too_long(self, point: Point, expected_s: float, limit_s: float) -> None:
        self._wrapped(
            f"      {_shape(point)}: warning: at the pace of its warm-up the sample takes {expected_s:,.0f} s or more, "
            f"over --point-timeout {limit_s:g}; raise it, or give a smaller --sample"
        )

    def restarting(self, point: Point) -> None:
        self._wrapped(f"      {_shape(point)}: the engine is restarted")

    def point_done(self, point: Point) -> None:
        is_new = point.key not in self._told
        self._number += is_new
        self._told.add(point.key)
        number = f"{self._number}/{self._total}" if self._total else str(self._number)
        more = "" if is_new else ", more runs"
        self._wrapped(f"  [{number}] {_shape(point)}{more}: {point_words(point)}")
        advice = [f"{point.failure}: {ADVICE[point.failure]}"] if point.failure else []
        self._say_reasons([*point.verdict_reasons, *advice])
        self._bar.n = self._number
        self._bar.refresh()

    def _say_reasons(self, reasons: Sequence[str]) -> None:
        """Each in full only once: many points may share a reason."""
        for reason in reasons:
            if reason not in self._said:
                self._wrapped(f"      {reason}")
        if known := [_SHORT_REASON.split(reason)[0] for reason in reasons if reason in self._said]:
            self._wrapped(f"      {listed(known)}: as above")
        self._said.update(reasons)

    def _wrapped(self, text: str) -> None:
        for line in wrapped(text, indent=6):
            self.note(line)

    def _end_loading(self) -> None:
        if self._loading is not None:
            self._loading.end()
            self._loading = None

    def close(self) -> None:
        self._end_loading()
        if self._log is not None:
            self._log.stop()
        if self._bar is not None:
            self._bar.close()


class _LoadingBar:
    """What vLLM is doing until it is ready, and for how long already: minutes, with a large model."""

    def __init__(self, log_path: Path) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            desc="starting vLLM", file=sys.stderr, leave=False, dynamic_ncols=True, bar_format="  {elapsed} {desc}"
        )
        self._log = LogFollower(log_path, self._look_at, self.bar.refresh)

    def _look_at(self, line: str) -> None:
        if doing := next((words for begin, words in _PARTS if begin.search(line)), None):
            self.bar.set_description_str(doing)

    def end(self) -> None:
        self._log.stop()
        self.bar.close()


class LogFollower:
    """Shows every line added to a log until it is stopped."""

    def __init__(self, path: Path, show: Callable[[str], None], looked: Callable[[], object] = lambda: None) -> None:
        """`looked` is called each time the log was looked at."""
        self._path, self._show, self._looked = path, show, looked
        self._seen_bytes = path.stat().st_size if path.exists() else 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._ended.wait(LOG_LOOK_S):
            self._show_new()
            self._looked()
        self._show_new()

    def _show_new(self) -> None:
        with contextlib.suppress(OSError), open_regular(self._path, "rb") as log:
            log.seek(self._seen_bytes)
            *lines, _unfinished = log.read().split(b"\n")
            for line in lines:
                self._seen_bytes += len(line) + 1
                self._show(plain(line.decode(errors="replace")))

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()


def _kept_words(config: ExperimentConfig, kept: Sequence[Point], total: int) -> str:
    suspect = sum(point.verdict == "suspect" for point in kept)
    doubt = ", and suspect" if suspect == len(kept) else f", {suspect} of them suspect" if suspect else ""
    verb = "is" if len(kept) == 1 else "are"
    return f"{len(kept)} of {counted(total, 'point')} {verb} kept from {config.output_path}{doubt}"


def _shape(point: Point) -> str:
    """8 x 512, or 8 at once for a workload; with the tokens per step if they are an axis."""
    start = f"{point.batch_size} at once" if point.workload else f"{point.batch_size} x {point.seq_len}"
    budget = point.max_num_batched_tokens
    return with_budget(start, budget) if budget else start


def key_words(point: Point) -> list[str]:
    """What tells a point from others, with the names of its sizes."""
    sizes = ("batch_size", "seq_len", "max_num_batched_tokens")
    return [f"{name} {size}" for name in sizes if (size := getattr(point, name)) is not None]


def point_words(point: Point) -> str:
    """One finished point in a few words: throughput with its interval, latency, TTFT, memory, verdict."""
    summary = point.summary
    throughput, latency_s = summary.get("output_tok_per_s"), summary.get("latency_mean_s")
    if throughput is None or latency_s is None:
        return f"{point.status}: {point.reason}"
    if point.workload:
        return _queue_words(point, throughput, latency_s)
    ci95_s, ttft_s, used_gib = (summary[name] for name in ("latency_ci95_s", "ttft_mean_s", "memory_used_gib"))
    interval = f" ±{ci95_s / latency_s:.1%}" if ci95_s is not None else ""
    words = [
        f"{short(throughput)} tok/s{interval}",
        f"{short(latency_s, 3)} s",
        f"TTFT {short(ttft_s, 3)} s" if ttft_s is not None else "",
        f"{short(used_gib, 3)} GiB" if used_gib is not None else "",
        str(point.verdict),
    ]
    return ", ".join(filter(None, words))


def _queue_words(point: Point, throughput: float, latency_s: float) -> str:
    """Throughput on the plateau with its interval, or over all without a plateau; time, drain, memory, verdict."""
    summary = point.summary
    plateau, half = summary["plateau_output_tok_per_s"], summary["plateau_ci95_tok_per_s"]
    interval = f" ±{half / plateau:.1%}" if plateau and half is not None else ""
    used_gib = summary["memory_used_gib"]
    words = [
        f"{short(plateau)} tok/s{interval} on the plateau" if plateau else f"{short(throughput)} tok/s over all",
        f"{counted(len(point.runs[0].requests.output_tokens), 'request')} in {short(latency_s, 3)} s",
        f"drain {short(summary['drain_s'], 2)} s",
        f"{short(used_gib, 3)} GiB" if used_gib is not None else "",
        str(point.verdict),
    ]
    return ", ".join(filter(None, words))


_BATCH_COLUMNS = {
    "tok/s": "output_tok_per_s",
    "latency s": "latency_mean_s",
    "± s": "latency_ci95_s",
    "TTFT s": "ttft_mean_s",
    "TPOT s": "tpot_mean_s",
    "GiB": "memory_used_gib",
    "runs": "runs",
}
_LENGTHS_FROM: dict[str | int, str] = {"file": "output lengths from the file", "eos": "outputs end by themselves"}
_QUEUE_COLUMNS = {
    "tok/s": "plateau_output_tok_per_s",
    "± tok/s": "plateau_ci95_tok_per_s",
    "over all": "output_tok_per_s",
    "time s": "latency_mean_s",
    "drain s": "drain_s",
    "GiB": "memory_used_gib",
}


def closing_table(result: Result) -> str:
    """Every point of a setting, within 80 columns; one table for batches, and one for each workload and order."""
    queues = [point for point in result.points if point.workload]
    batches = [point for point in result.points if not point.workload]
    tables = []
    if batches:
        budgets = any(point.max_num_batched_tokens for point in batches)
        # Both are in the file; next to another size there is no room for them.
        dropped = ("TTFT s", "TPOT s") if budgets else ()
        columns = {name: metric for name, metric in _BATCH_COLUMNS.items() if name not in dropped}
        tables.append(_points_table(batches, {"batch": "batch_size", "length": "seq_len"}, columns, budgets))
    for workload in dict.fromkeys(point.workload for point in queues if point.workload):
        points = [point for point in queues if point.workload == workload]
        budgets = any(point.max_num_batched_tokens for point in points)
        heading = "\n".join(wrapped(_workload_words(result, workload), indent=2))
        tables.append(f"{heading}\n{_points_table(points, {'at once': 'batch_size'}, _QUEUE_COLUMNS, budgets)}")
    return "\n\n".join(tables)


def _workload_words(result: Result, workload: WorkloadKey) -> str:
    """Which requests a table of queue points is about, and how they were run."""
    job = result.job_of(workload)
    words = [
        f"workload {workload.content_hash[:8]}" + (f" of {counted(job.requests, 'request')}" if job else ""),
        _LENGTHS_FROM.get(workload.output_lengths) or f"{workload.output_lengths} output tokens each",
        f"order {workload.order}",
        "prefixes cached" if workload.is_cached else "",
    ]
    return ", ".join(filter(None, words))


def _points_table(
    points: Sequence[Point], sizes: Mapping[str, str], columns: Mapping[str, str], has_budgets: bool
) -> str:
    sizes = {**sizes, **({"per step": "max_num_batched_tokens"} if has_budgets else {})}
    rows = [
        [
            *(str(getattr(point, name) or "") for name in sizes.values()),
            *(short(point.summary.get(name), 0 if name == "runs" else 4) for name in columns.values()),
            str(point.verdict if point.status == "ok" else point.status),
        ]
        for point in points
    ]
    headers = [*sizes, *columns, "verdict"]
    return table(headers, rows, (*("right",) * (len(headers) - 1), "left"))


def _gib(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:.2f} GiB" if value >= 1 else f"{value * 1024:.0f} MiB"
