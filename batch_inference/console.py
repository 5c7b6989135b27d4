"""What people see while a setting is measured: progress on stderr, the closing table on stdout."""

from __future__ import annotations

import sys
import time
from typing import Any

from batch_inference.config import ExperimentConfig
from batch_inference.results import Point, Result


class Console:
    """Progress bar with ETA (only on a terminal), one line per finished point, a closing table."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._number = 0
        self._total = 0
        self._loading_since_s = 0.0

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def loading(self, config: ExperimentConfig) -> None:
        self._loading_since_s = time.monotonic()
        devices = config.num_devices
        plural = "s" if devices > 1 else ""
        self.note(f"{config.setting_name}: loading {config.model} on {devices} device{plural}")
        self.note(f"  vLLM's log: {config.log_path}")

    def loaded(self, result: Result) -> None:
        engine = result.engine
        self.note(
            f"  ready after {time.monotonic() - self._loading_since_s:.0f} s: vLLM {engine['vllm_version']}, "
            f"{engine['dtype']}, weights {_gib(engine['weights_gib'])}, KV cache {engine['kv_cache_tokens']} tokens"
        )

    def start(self, total: int, done: int) -> None:
        # Imported here: --help and --dry-run show no bar.
        from tqdm import tqdm

        if done:
            self.note(f"  {done} of {total} points are kept from the earlier file")
        self._number, self._total = done, total
        self._bar = tqdm(
            total=total, initial=done, file=sys.stderr, unit="point", leave=False, dynamic_ncols=True, disable=None
        )

    def running(self, point: Point, phase: str, index: int) -> None:
        word = "warm-up" if phase == "warmup" else "run"
        self._bar.set_description(f"batch {point.batch_size} x len {point.seq_len}, {word} {index + 1}")

    def repeating(self, point: Point) -> None:
        self._bar.write(
            f"      batch {point.batch_size} x len {point.seq_len}: vLLM compiled a kernel during a timed run; "
            "it is kept as a warm-up",
            file=sys.stderr,
        )

    def point_done(self, point: Point) -> None:
        self._number += 1
        line = f"  [{self._number}/{self._total}] batch {point.batch_size} x len {point.seq_len}: "
        self._bar.write(line + point_words(point), file=sys.stderr)
        for reason in point.verdict_reasons:
            self._bar.write(f"      {reason}", file=sys.stderr)
        self._bar.update(1)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def point_words(point: Point) -> str:
    """One finished point in a few words: throughput with its interval, latency, TTFT, verdict."""
    summary = point.summary
    throughput, latency_s = summary.get("output_tok_per_s"), summary.get("latency_mean_s")
    if throughput is None or latency_s is None:
        return f"{point.status}: {point.reason}"
    ci95_s, ttft_s = summary["latency_ci95_s"], summary["ttft_mean_s"]
    interval = f" ±{ci95_s / latency_s:.1%}" if ci95_s is not None else ""
    ttft = f", TTFT {ttft_s:.3f} s" if ttft_s is not None else ""
    return f"{throughput:.1f} tok/s{interval}, {latency_s:.3f} s{ttft}, {point.verdict}"


def closing_table(result: Result) -> str:
    """Every point of a setting, within 80 columns."""
    import tabulate

    tabulate.MIN_PADDING = 0  # the headers are no wider than they must be
    columns = {
        "tok/s": "output_tok_per_s",
        "latency s": "latency_mean_s",
        "± s": "latency_ci95_s",
        "TTFT s": "ttft_mean_s",
        "TPOT s": "tpot_mean_s",
        "GiB": "memory_used_gib",
    }
    rows = [
        [
            point.batch_size,
            point.seq_len,
            *(short(point.summary.get(name)) for name in columns.values()),
            point.verdict if point.status == "ok" else point.status,
        ]
        for point in result.points
    ]
    headers = ["batch", "length", *columns, "verdict"]
    align = (*("right",) * (len(headers) - 1), "left")
    return tabulate.tabulate(rows, headers=headers, colalign=align if rows else None, disable_numparse=True)


def short(value: float | None) -> str:
    """Four significant digits, never in powers of ten; empty for unknown."""
    if value is None:
        return ""
    whole_digits = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    # Below 1 the zeros after the point count too: nothing here is worth more than a tenth of a millisecond.
    return f"{value:.{max(0, 4 - whole_digits)}f}"


def _gib(value: float) -> str:
    return f"{value:.2f} GiB" if value >= 1 else f"{value * 1024:.0f} MiB"
