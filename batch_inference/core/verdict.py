"""The verdict on a measured point: every reason to reject it, or to read it with care."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from statistics import fmean, median

from batch_inference.core.capacity import request_slots, requests_in_kv_cache, running_requests, waves
from batch_inference.core.config import MIN_RUNS
from batch_inference.core.metrics import run_latencies_s
from batch_inference.core.results import Point, Result, Timeline, Verdict, Warmup
from batch_inference.core.statistics import is_steady, relative_ci95, trend
from batch_inference.core.text import counted

# A kernel compiled in mid-run makes a warm-up several times slower than the next. Two that agree end the warm-up.
STEADY_WITHIN = 0.05
# A mean known no better than this cannot decide between settings.
WIDEST_INTERVAL = 0.1
# Runs that only scatter by a percent often enough look like a trend smaller than this.
DRIFT_OVER = 0.03
# Two settings on two H200s went from 1.11 s in two warm-ups to 0.61 s in all runs, for no known reason.
UNLIKE_WARMUPS = 0.15
# A process wakes up about 0.1 ms late on a quiet machine, and milliseconds late on a busy one.
SHORTEST_RUN_S = 0.01
# The clocks of different machines differ by far less.
LONGER_THAN_PASSED = 0.01
# Below it vLLM has room for another request; a block or two at the end may stay free.
FULL_KV_CACHE = 0.9
# What narrows an interval, before more runs do.
_BE_ALONE = "keep other work off the devices"
# What neither a quiet machine nor more runs change.
_PIPELINE = "runs of a pipeline differ by nature: docs/measuring.md, Pipelines"
# How its reason begins.
_PACKED = "packed"
# NVML's harmless reasons for a clock below the highest: it is set so, or there is nothing to do. A GPU at its
# power limit is at full load; the limit is in the file.
_USUAL_CLOCK_REASONS = {
    "gpu_idle",
    "applications_clocks_setting",
    "user_defined_clocks",  # NVML's older name of the same
    "display_clock_setting",
    "sync_boost",
    "sw_power_cap",
}


def judge(result: Result, point: Point) -> tuple[list[str], Verdict]:
    """Reasons to doubt a measured point, and the verdict: "valid", "suspect" or "invalid"."""
    invalid = [reason for find in _INVALID for reason in find(result, point)]
    suspect = [reason for find in _SUSPECT for reason in find(result, point)]
    return invalid + suspect, "invalid" if invalid else "suspect" if suspect else "valid"


def is_settled(warmups: Sequence[Warmup]) -> bool:
    """True if the last two warm-ups took equally long, and vLLM compiled nothing during the last."""
    if not is_steady([warmup.latency_s for warmup in warmups], STEADY_WITHIN):
        return False
    return not warmups[-1].jit_compilations


def _token_counts(result: Result, point: Point) -> list[str]:
    if point.seq_len is None or point.max_tokens is None:
        # A workload, whose counts are checked where its requests are known.
        wrong = sum(run.counters.miscounted or 0 for run in point.runs)
        return [f"{counted(wrong, 'request')} came back with a different number of tokens than asked"] if wrong else []
    requests = point.batch_size * result.data_parallel_size
    asked = (requests * point.seq_len, requests * point.max_tokens)
    came = {(run.prompt_tokens, run.output_tokens) for run in point.runs} - {asked}
    return [
        f"{prompt} prompt and {output} output tokens came back, but {asked[0]} and {asked[1]} were asked for"
        for prompt, output in sorted(came)
    ]


def _prefix_hits(_: Result, point: Point) -> list[str]:
    if point.workload and point.workload.is_cached:
        return []  # they are part of what is measured
    hits = sum(run.counters.prefix_cache_hit_tokens for run in point.runs)
    return [f"{hits} prompt tokens came from the prefix cache"] if hits else []


def _longer_than_passed(_: Result, point: Point) -> list[str]:
    """A run is timed where the engine is; the program that asked for it waited at least as long."""
    timed = [(run.latency_s, run.passed_s) for run in point.runs if run.passed_s is not None]
    wrong = [(took_s, passed_s) for took_s, passed_s in timed if took_s > passed_s * (1 + LONGER_THAN_PASSED)]
    if not wrong:
        return []
    took_s, passed_s = max(wrong)
    return [f"a run reports {took_s:.3g} s, but only {passed_s:.3g} s passed meanwhile; check the nodes' clocks"]


def _preempted(_: Result, point: Point) -> list[str]:
    count = sum(run.counters.preemptions for run in point.runs)
    return [f"{count} requests were preempted for lack of KV cache"] if count else []


def _waves(result: Result, point: Point) -> list[str]:
    running, batch_size = running_requests(result, point), point.batch_size
    if (waves(point, running) or 1) == 1:
        return []
    slots, in_cache = request_slots(result, point), requests_in_kv_cache(result, point)
    if slots and slots < batch_size:
        return [f"ran in waves: batch_size {batch_size} is over max_num_seqs {slots}"]
    if in_cache and in_cache < batch_size:
        return [f"ran in waves: the KV cache holds {in_cache} of {batch_size} requests"]
    if _ends_while_prompts_wait(result, point):
        return []
    return [f"ran in waves: at most {running} of {batch_size} requests ran at once"]


def _empty_places(result: Result, point: Point) -> list[str]:
    """For a queue in which fewer requests ran at once than should have."""
    running, places = running_requests(result, point), _places(point)
    if point.workload is None or running is None or running >= places:
        return []
    slots, kv_use = request_slots(result, point), max((run.memory.peak_kv_use or 0.0 for run in point.runs), default=0)
    if slots and slots < places:
        why = f"--max-num-seqs is {slots}"
    elif kv_use >= FULL_KV_CACHE:
        why = "the KV cache was full"
    else:
        why = "the first requests end while prompts of others still wait for room in a step"
    return [f"at most {running} of {places} places were taken: {why}"]


def _places(point: Point) -> int:
    """Per replica: it may have fewer requests in all."""
    return min([point.batch_size, *(part.requests for run in point.runs for part in run.replicas if part.requests)])


def _ends_while_prompts_wait(result: Result, point: Point) -> bool:
    """True for outputs so short that the first requests end before vLLM's tokens per step reach the last ones:
    a larger cache would not change that."""
    engine = result.engine_of(point)
    budget = point.max_num_batched_tokens or (engine.max_num_batched_tokens if engine else None)
    if not budget or point.seq_len is None or point.max_tokens is None:
        return False
    # Twice, because requests that already decode take their share of each step.
    return point.max_tokens <= 2 * math.ceil(point.batch_size * point.seq_len / budget)


def _no_plateau(result: Result, point: Point) -> list[str]:
    """For a sample. A job that ran as a whole needs no plateau, and if places stay empty the sample is not the cause. A
    request with a single output token ends at once, so a sample of such requests never has a plateau."""
    if point.workload is None or point.summary.get("plateau_output_tok_per_s") is not None:
        return []
    outputs = point.runs[0].requests.output_tokens
    if _empty_places(result, point) or _ran_as_a_whole(result, point) or max(outputs) <= 1:
        return []
    ran = len(outputs)
    return [
        f"sample too small for a plateau: {ran} requests, {point.batch_size} at once on each replica; raise --sample"
    ]


def _ran_as_a_whole(result: Result, point: Point) -> bool:
    """Whether a queue point's sample is the job itself."""
    job = result.job_of(point.workload) if point.workload else None
    return job is not None and len(point.runs[0].requests.output_tokens) >= job.requests


def _wide_plateau(result: Result, point: Point) -> list[str]:
    """For a sample whose order allows a steady plateau."""
    rate, half = (point.summary.get(name) for name in ("plateau_output_tok_per_s", "plateau_ci95_tok_per_s"))
    if point.workload is None or point.workload.order.endswith("first") or not rate or half is None:
        return []
    if half <= WIDEST_INTERVAL * rate or _ran_as_a_whole(result, point):
        return []
    return [f"plateau: the 95 % interval of its throughput is over ±{WIDEST_INTERVAL:.0%}; raise --sample"]


def _unsteady_plateau(result: Result, point: Point) -> list[str]:
    """A trend over the plateau that is larger than DRIFT_OVER and than its own interval. Sorted requests have one."""
    if point.workload is None or point.workload.order.endswith("first"):
        return []
    for run in point.runs:
        for replica in run.replicas:
            rates = _plateau_rates(replica.timeline, point.batch_size)
            change = trend(rates)
            if change and abs(change[0]) > max(change[1], DRIFT_OVER * fmean(rates)):
                how = "faster" if change[0] > 0 else "slower"
                return [
                    f"plateau not steady: it becomes {how} by {abs(change[0]) / fmean(rates):.0%} from its beginning "
                    f"to its end{_steadier(result, point)}"
                ]
    return []


def _steadier(result: Result, point: Point) -> str:
    """What would help. Of a file whose requests come in no order, other work is the usual reason."""
    in_given_order = point.workload is not None and point.workload.order == "given"
    advice = [_BE_ALONE, *([] if _ran_as_a_whole(result, point) else ["raise --sample"])]
    advice += ["give --order shuffled"] if in_given_order else []
    *others, last = advice
    return f"; {', '.join(others)}, or {last}" if others else f"; {last}"


def _plateau_rates(timeline: Timeline | None, batch_size: int) -> list[float]:
    """Tokens per second, prompt and output, in ten parts of the plateau: each part holds many requests."""
    if timeline is None:
        return []
    full = [number for number, running in enumerate(timeline.running) if running >= 0.95 * batch_size]
    if not full or full[-1] - full[0] < 2 * _PARTS:
        return []
    edges = [full[0] + round(part * (full[-1] - full[0]) / _PARTS) for part in range(_PARTS + 1)]
    return [
        sum(timeline.prompt_tokens[start + 1 : end + 1] + timeline.output_tokens[start + 1 : end + 1])
        / (timeline.end_s[end] - timeline.end_s[start])
        for start, end in itertools.pairwise(edges)
    ]


def _never_steady(_: Result, point: Point) -> list[str]:
    # Fewer than two cannot be known to differ.
    if len(point.warmups) < 2 or point.workload or is_settled(point.warmups):
        return []
    if point.warmups[-1].jit_compilations:
        return ["not steady: vLLM was still compiling kernels in the last warm-up; raise --warmup-runs"]
    return [f"not steady after {len(point.warmups)} warm-ups: the last two differ by more than {STEADY_WITHIN:.0%}"]


def _compiled_late(_: Result, point: Point) -> list[str]:
    if not any(run.counters.jit_compilations for run in point.runs):
        return []
    return ["vLLM kept compiling kernels during timed runs; raise --warmup-runs"]


def _wide_interval(result: Result, point: Point) -> list[str]:
    """In a pipeline each run divides the batch in its own way, however quiet the machine is."""
    reasons = _too_wide(result, point)
    if result.config.pipeline_parallel_size == 1:
        return reasons
    return [f"{reason} ({_PIPELINE})" if reason.startswith("runs differ") else reason for reason in reasons]


def _too_wide(result: Result, point: Point) -> list[str]:
    if point.workload:
        return []  # a single run: its plateau's interval tells
    width, asked = relative_ci95(run_latencies_s(point), result.is_adaptive(point)), result.config
    is_step = asked.searches and asked.num_runs is None and len(point.runs) <= MIN_RUNS
    if is_step and (width is None or width > asked.target_ci):
        return [f"{counted(len(point.runs), 'run')}: only a step towards the best batch size (--batch-sizes auto)"]
    if width is None:
        return ["a single run has no interval; raise --num-runs"]
    if asked.num_runs is None and width > asked.target_ci:
        target = f"{asked.target_ci * 100:.3g}%"
        differ = f"runs differ: after {len(point.runs)} the 95 % interval is over ±{target}"
        return [f"{differ}; {_BE_ALONE}, or raise --max-runs"]
    if width > WIDEST_INTERVAL:
        return [f"runs differ: the 95 % interval is over ±{WIDEST_INTERVAL:.0%}; {_BE_ALONE}, or raise --num-runs"]
    return []


def _drift(_: Result, point: Point) -> list[str]:
    """A trend larger than DRIFT_OVER and than its own 95 % interval: runs that only scatter show one in at
    most 5 of 100 points."""
    latencies_s = run_latencies_s(point)
    change = trend(latencies_s)
    if change is None or abs(change[0]) <= max(change[1], DRIFT_OVER * fmean(latencies_s)):
        return []
    how = "slower" if change[0] > 0 else "faster"
    return [f"drift: runs become {how} by over {DRIFT_OVER:.0%} from the first to the last"]


def _unlike_warmups(_: Result, point: Point) -> list[str]:
    """Warm-ups that agree with each other but not with the runs after them: something else was steady."""
    if len(point.warmups) < 2 or point.workload or not is_settled(point.warmups):
        return []
    # The median, because a single slow run shows in the interval.
    last_s, middle_s = point.warmups[-1].latency_s, median(run_latencies_s(point))
    if abs(last_s - middle_s) <= UNLIKE_WARMUPS * max(last_s, middle_s):
        return []
    return [f"the last warm-up took {last_s:.3g} s, the runs {middle_s:.3g} s; raise --warmup-runs"]


def _too_short(result: Result, point: Point) -> list[str]:
    if min(run_latencies_s(point)) >= SHORTEST_RUN_S:
        return []
    advice = "; raise --sample" if point.workload else "; raise --max-tokens"
    if _ran_as_a_whole(result, point):
        advice = ""
    return [f"runs under {SHORTEST_RUN_S * 1000:.0f} ms are too short to time{advice}"]


def _throttled(_: Result, point: Point) -> list[str]:
    said = {reason for run in point.runs for reason in run.clocks.throttle_reasons or []}
    reasons = sorted(said - _USUAL_CLOCK_REASONS)
    return [f"clocks were throttled: {', '.join(reasons)}; check cooling and power"] if reasons else []


def _not_alone(_: Result, point: Point) -> list[str]:
    if not any(run.clocks.other_processes for run in point.runs):
        return []
    return ["another process was on the devices; end it, or choose others with CUDA_VISIBLE_DEVICES"]


def was_packed(point: Point) -> bool:
    """True if other settings ran beside the point."""
    return any(reason.startswith(_PACKED) for reason in point.verdict_reasons)


def _packed(result: Result, _: Point) -> list[str]:
    if not result.config.packed:
        return []
    return [f"{_PACKED}: other settings ran beside it; measure the decisive points again without --pack"]


_Check = Callable[[Result, Point], list[str]]
_PARTS = 10  # of a plateau
_INVALID: tuple[_Check, ...] = (_token_counts, _prefix_hits, _longer_than_passed)
_SUSPECT: tuple[_Check, ...] = (
    _preempted, _waves, _empty_places, _no_plateau, _wide_plateau, _unsteady_plateau, _never_steady, _compiled_late,
    _wide_interval, _drift, _unlike_warmups, _too_short, _throttled, _not_alone, _packed,
)  # fmt: skip
