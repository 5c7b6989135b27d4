"""The plan of a whole preset: which settings can run here, how, and what they need.

The text is a script: a table in comment lines, and the commands that can run, to read and paste.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.secrets import placeholders, redact
from batch_inference.core.text import WIDTH, counted, listed, wrapped
from batch_inference.launch.jobs import Job
from batch_inference.launch.stored import time_left
from batch_inference.plan.by_vllm import ask_vllm
from batch_inference.plan.devices import Devices, smallest_memory_gib
from batch_inference.plan.memory import NOT_COUNTED
from batch_inference.plan.model import ModelFacts, facts_of
from batch_inference.plan.needs import Needs, memory_against, needs_of
from batch_inference.plan.obstacles import devices_against, rules_against
from batch_inference.plan.printed import by_whom, grid_words, job_words
from batch_inference.plan.said import Said

_COLUMNS = ("setting", "devices", "replicas", "by")
_MEMORY = ("weights GiB", "KV tokens", "fit in one wave")
UNKNOWN = "unknown"
_WHY_TORCHRUN = (
    "over nodes: one replica by vLLM's own mp; several (DP) by torchrun, because vLLM's offline engine has no replicas"
)

_PACKED = "side by side where devices are free, the longest first; points are marked"


@dataclass(frozen=True)
class PlannedJob:
    """A job, and what is known about it before it runs."""

    job: Job
    facts: ModelFacts | None
    reason: str | None  # why it cannot run here
    said: Said | None = None  # by vLLM
    needs: Needs | None = None  # None: not determined yet

    @property
    def config(self) -> ExperimentConfig:
        return self.job.config


def planned(
    jobs: Sequence[Job], devices: Devices, say: Callable[[str], None], *, only_in_doubt: bool = False
) -> list[PlannedJob]:
    """Asks vLLM once for all of them, or for those in doubt. Raises ConfigError for a folder that is not a model, and
    for a sample that is too small for all settings that could run."""
    facts = [facts_of(job.config) for job in jobs]
    here_gib = smallest_memory_gib(devices)
    settings = [
        (job.config, known, job.config.device_memory_gib or here_gib) for job, known in zip(jobs, facts, strict=True)
    ]
    answers = ask_vllm(settings, devices, say, only_in_doubt=only_in_doubt)
    found = [PlannedJob(job, known, None, said) for job, known, said in zip(jobs, facts, answers, strict=True)]
    found = [
        replace(one, reason=_obstacle(one, devices) or memory_against(need), needs=need)
        for one, need in zip(found, all_needs(found, devices), strict=True)
    ]
    # A mistake of the user's is one where it leaves nothing to be measured.
    mistakes = [one.job.reason for one in found if one.reason is not None and one.reason == one.job.reason]
    if mistakes and all(one.reason for one in found):
        raise ConfigError(mistakes[0])
    return found


def _obstacle(one: PlannedJob, devices: Devices) -> str | None:
    nnodes = one.job.setting.nodes
    infeasible = _uneven(one.config, nnodes) or _infeasible(one.config, one.facts, nnodes, devices, one.said)
    return infeasible or one.job.reason


def _uneven(config: ExperimentConfig, nnodes: int) -> str | None:
    if config.num_devices % nnodes == 0:
        return None
    return f"its {counted(config.num_devices, 'device')} cannot be divided evenly among {nnodes} nodes"


def _infeasible(
    config: ExperimentConfig, facts: ModelFacts | None, nnodes: int, devices: Devices, said: Said | None
) -> str | None:
    needed, there = config.num_devices, len(devices) * nnodes
    # Every node is assumed to be like this one.
    on_each = None if config.distributed_executor_backend == "ray" else needed // nnodes
    if on_each and needed > there > 0:
        return f"it needs {needed} devices, but there are {there} ({devices.kind})"
    return devices_against(config, devices, on_each) or rules_against(config, facts, devices, said)


def all_needs(jobs: Sequence[PlannedJob], devices: Devices) -> list[Needs]:
    """The needs of each job, determined only once."""
    here_gib = smallest_memory_gib(devices)
    return [
        one.needs or needs_of(one.config, one.facts, devices, one.config.device_memory_gib or here_gib, one.said)
        for one in jobs
    ]


def table(jobs: Sequence[PlannedJob], needs: Sequence[Needs]) -> list[str]:
    """What the settings will need, a line each; without memory if nothing about it is known."""
    knows_sizes = any(need.source and not need.is_refused for need in needs)
    rows = [
        [one.job.name, str(one.config.num_devices), str(one.config.data_parallel_size), _by(one, one.job.setting.nodes)]
        for one in jobs
    ]
    if knows_sizes:
        rows = [row + _cells(need) for row, need in zip(rows, needs, strict=True)]
    rows.insert(0, [*_COLUMNS, *(_MEMORY if knows_sizes else ())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cells(needs: Needs) -> list[str]:
    weights = UNKNOWN if needs.weights_gib is None else f"{needs.weights_gib:.3g}"
    tokens = UNKNOWN if needs.kv_cache_tokens is None else str(needs.kv_cache_tokens)
    waves = needs.requests_in_one_wave
    return [weights, tokens, " / ".join(map(str, waves.values())) if waves else UNKNOWN]


def plan_as_json(jobs: Sequence[PlannedJob], devices: Devices) -> str:
    """A list with an object for each setting, including those that cannot run; null for what is unknown."""
    settings = [
        {
            "name": one.job.name,
            "devices": one.config.num_devices,
            "replicas": one.config.data_parallel_size,
            "obstacle": one.reason,
            **_told(need),
        }
        for one, need in zip(jobs, all_needs(jobs, devices), strict=True)
    ]
    return json.dumps(settings, indent=2)


def _told(needs: Needs) -> dict[str, Any]:
    return {name: value for name, value in asdict(needs).items() if name not in ("kv_gib", "pool_gib")}


def _by(one: PlannedJob, nnodes: int) -> str:
    """How vLLM's processes are started."""
    if one.reason:
        return "-"
    backend = one.config.distributed_executor_backend
    words = {None: "uni", "external_launcher": "torchrun", "ray": "Ray"}.get(backend, str(backend))
    return f"{words}, {nnodes} nodes" if nnodes > 1 else words


def uncompared(jobs: Iterable[PlannedJob]) -> list[str]:
    """The settings with replicas whose batches never add up to one of another setting on as many devices. With a
    workload all settings do the same job, however many requests run at once."""
    runnable = [one.job for one in jobs if one.reason is None and one.config.prompts_file is None]
    runnable = [job for job in runnable if not job.config.searches]
    lines = []
    for job in runnable:
        config = job.config
        others = [other for other in runnable if other.config.num_devices == config.num_devices and other is not job]
        totals, replicas = _global_batches(config), config.data_parallel_size
        if replicas == 1 or not others or any(totals & _global_batches(other.config) for other in others):
            continue
        # Sizes that let the replicas match the others or, if nothing divides, let the others match the replicas.
        missing = {batch // replicas for batch in config.batch_sizes if batch % replicas == 0} or totals
        lines.append(
            f"{job.name} will not be compared with {listed(other.name for other in others)}: its replicas' batches add "
            f"up to {listed(sorted(totals))}; add {listed(sorted(missing))} to --batch-sizes"
        )
    return lines


def _global_batches(config: ExperimentConfig) -> set[int]:
    return {batch * config.data_parallel_size for batch in config.batch_sizes}


def plan(jobs: Sequence[PlannedJob], left_out: Sequence[str], nodes: str, devices: Devices) -> list[str]:
    """The table, what cannot run and why, and the commands for the rest. `nodes`: where the devices are."""
    needs = all_needs(jobs, devices)
    rows = table(jobs, needs) if jobs else []
    head = [*_head([one.config for one in jobs], nodes, devices), _sources(jobs, needs)] if jobs else []
    obstacles = [f"{one.job.name} cannot run: {one.reason}" for one in jobs if one.reason]
    can_run = [one.config for one in jobs if one.reason is None]
    left = None if any(config.packed for config in can_run) else time_left(can_run, devices.kind)
    hidden = _hidden(jobs)
    margin = [NOT_COUNTED] if any(need.activations_counted is False for need in needs) else []
    unknown = _for_some(_names_by(jobs, (need.unknown for need in needs)), len(jobs))
    remarks = [
        *unknown,
        *margin,
        *left_out,
        *obstacles,
        *uncompared(jobs),
        *([left] if left else []),
        *([hidden] if hidden else []),
    ]
    parts = [_wrapped(head), rows, _wrapped(remarks)]
    lines = [line for part in parts if part for line in ("", *part)][1:]
    commands = [shlex.join(redact(one.job.words)) for one in jobs if one.reason is None]
    return [f"# {line}".rstrip() for line in lines] + commands


def _hidden(jobs: Iterable[PlannedJob]) -> str | None:
    """What the commands leave out, if anything."""
    names = dict.fromkeys(name for one in jobs if one.reason is None for name in placeholders(one.job.words))
    return f"fill in what is not shown here: {listed(names)}" if names else None


def _head(configs: Sequence[ExperimentConfig], nodes: str, devices: Devices) -> tuple[str, ...]:
    config = configs[0]
    return (
        f"{config.model_shown} on {counted(len(devices), f'{devices.kind} device')}{nodes}",
        *dict.fromkeys(_points_words(one) for one in configs),
        _WHY_TORCHRUN if nodes else "",
        _PACKED if config.packed else "",
    )


def _points_words(config: ExperimentConfig) -> str:
    if config.prompts_file:
        return f"for each: {job_words(config)}"
    if config.searches:  # as many as it needs
        return f"for each: {grid_words(config)}"
    return f"{counted(len(list(config.points())), 'point')} each: {grid_words(config)}"


def _sources(jobs: Sequence[PlannedJob], needs: Sequence[Needs]) -> str:
    """Where the numbers come from; empty if there are none."""
    by = _names_by(jobs, ([by_whom(need.source)] if need.source else [] for need in needs))
    return f"memory: {'; '.join(_for_some(by, len(jobs)))}" if by else ""


def _names_by(jobs: Sequence[PlannedJob], texts: Iterable[Iterable[str]]) -> dict[str, list[str]]:
    """The names of the settings that each text is about."""
    names: dict[str, list[str]] = {}
    for one, said in zip(jobs, texts, strict=True):
        for text in said:
            names.setdefault(text, []).append(one.job.name)
    return names


def _for_some(told: Mapping[str, Sequence[str]], count: int) -> list[str]:
    """A text that is not about all settings is followed by their names."""
    return [text if len(names) == count else f"{text} ({listed(names)})" for text, names in told.items()]


def _wrapped(texts: Iterable[str]) -> list[str]:
    # Each gets "# " in front.
    return [line for text in texts for line in wrapped(text, indent=2, width=WIDTH - 2)]
