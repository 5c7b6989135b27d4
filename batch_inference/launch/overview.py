"""The plan of a whole preset: which settings can run here, how, and what they will need.

    python -m batch_inference.launch.overview NNODES NODE_RANK [--plan]    a command per line on stdin, quoted

Without --plan it answers one line per command: why that setting cannot run, or nothing; what the user should know
before hours of measuring goes to standard error. It fails where a result file would stop a setting later. With --plan:
a table as comment lines, and the commands that can run, so that the whole can be read, and pasted.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from batch_inference.core.config import ConfigError, ExperimentConfig, parse_flags
from batch_inference.core.text import WIDTH, counted, listed, wrapped
from batch_inference.plan.devices import Devices, find_devices, smallest_memory_gib
from batch_inference.plan.memory import SIZES_UNKNOWN, memory_plan
from batch_inference.plan.model import ModelFacts, read_model_facts
from batch_inference.plan.obstacles import infeasible

_SCRIPT = "batch_inference_experiment.py"
_COLUMNS = ("setting", "devices", "replicas", "by")
_MEMORY = ("weights GiB", "KV tokens", "fit in one wave")
UNKNOWN = "unknown"
_WHY_TORCHRUN = (
    "over nodes: one replica by vLLM's own mp; more (DP) by torchrun, because vLLM's offline engine knows no replicas"
)

_PACKED = "side by side where devices are free, the longest first; points are marked"


@dataclass(frozen=True)
class Setting:
    """One command of the launcher."""

    command: str
    config: ExperimentConfig
    facts: ModelFacts | None
    reason: str | None  # why it cannot run here

    @property
    def name(self) -> str:
        return self.config.setting_name

    @property
    def obstacle(self) -> str | None:
        """Why nothing would come of it: that reason, or a result file in the way."""
        return self.reason or self.config.output_conflict


def setting_of(command: str, nnodes: int, devices: Devices) -> Setting:
    """Raises ConfigError for flags that are wrong, and for a model folder that is none."""
    config = config_of(shlex.split(command))
    facts = read_model_facts(config.model)
    return Setting(command, config, facts, _uneven(config, nnodes) or _infeasible(config, facts, nnodes, devices))


def config_of(words: Sequence[str]) -> ExperimentConfig:
    """What a command line asks of the experiment script. Raises ConfigError."""
    script = next(index for index, word in enumerate(words) if word.endswith(_SCRIPT))
    return parse_flags(words[script + 1 :])[0]


def _uneven(config: ExperimentConfig, nnodes: int) -> str | None:
    if config.num_devices % nnodes == 0:
        return None
    return f"its {counted(config.num_devices, 'device')} cannot be shared out evenly over {nnodes} nodes"


def _infeasible(config: ExperimentConfig, facts: ModelFacts | None, nnodes: int, devices: Devices) -> str | None:
    if config.distributed_executor_backend == "ray":
        return infeasible(config, facts, devices)
    needed, there = config.num_devices, len(devices) * nnodes
    if needed > there:
        return f"it needs {needed} devices, there are {there} ({devices.kind})"
    # Every node is taken to be like this one.
    return infeasible(config, facts, devices, needed // nnodes)


def table(settings: Sequence[Setting], nnodes: int, devices: Devices) -> list[str]:
    """What the settings will need, a line each; without the memory where the model's sizes cannot be read from here."""
    here_gib = smallest_memory_gib(devices)
    memory = [_memory_cells(setting, devices, setting.config.device_memory_gib or here_gib) for setting in settings]
    rows = [
        [setting.name, str(setting.config.num_devices), str(setting.config.data_parallel_size), _by(setting, nnodes)]
        for setting in settings
    ]
    if any(memory):
        rows = [row + (cells or [UNKNOWN] * len(_MEMORY)) for row, cells in zip(rows, memory, strict=True)]
    rows.insert(0, [*_COLUMNS, *(_MEMORY if any(memory) else ())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _memory_cells(setting: Setting, devices: Devices, memory_gib: float | None) -> list[str] | None:
    config = setting.config
    memory = memory_plan(config, setting.facts, devices, memory_gib)
    if memory is None:
        return None
    if memory.pool_gib is None:
        return [f"{memory.weights_gib:.3g}", UNKNOWN, UNKNOWN]
    tokens = memory.kv_cache_tokens(config.max_model_len or config.longest_request)
    waves = (memory.requests_in_one_wave(seq_len + config.max_tokens) for seq_len in config.seq_lens)
    return [f"{memory.weights_gib:.3g}", str(tokens), " / ".join(map(str, waves))]


def _by(setting: Setting, nnodes: int) -> str:
    """How vLLM's processes are started."""
    if setting.reason:
        return "-"
    backend = setting.config.distributed_executor_backend
    words = {None: "uni", "external_launcher": "torchrun", "ray": "Ray"}.get(backend, str(backend))
    return f"{words}, {nnodes} nodes" if nnodes > 1 else words


def uncompared(settings: Sequence[Setting]) -> list[str]:
    """The settings with replicas whose batches never add up to one that another setting on as many devices has."""
    runnable = [setting.config for setting in settings if setting.reason is None]
    lines = []
    for config in runnable:
        others = [other for other in runnable if other.num_devices == config.num_devices and other is not config]
        totals, replicas = _global_batches(config), config.data_parallel_size
        if replicas == 1 or not others or any(totals & _global_batches(other) for other in others):
            continue
        # These bring the replicas to what others have; where nothing divides, the others to what the replicas have.
        missing = {batch // replicas for batch in config.batch_sizes if batch % replicas == 0} or totals
        lines.append(
            f"{config.setting_name} will not be compared with {', '.join(other.setting_name for other in others)}: its "
            f"replicas' batches add up to {listed(sorted(totals))}; add {listed(sorted(missing))} to --batch-sizes"
        )
    return lines


def _global_batches(config: ExperimentConfig) -> set[int]:
    return {batch * config.data_parallel_size for batch in config.batch_sizes}


def plan(settings: Sequence[Setting], nnodes: int, devices: Devices) -> list[str]:
    """The table, what cannot run and why, and the commands for the rest."""
    config = settings[0].config
    nodes = f" on each of {nnodes} nodes" if nnodes > 1 else ""
    rows = table(settings, nnodes, devices)
    knows_memory = rows[0].endswith(_MEMORY[-1])
    head = (
        f"{config.model} on {counted(len(devices), f'{devices.kind} device')}{nodes}",
        f"{len(list(config.points()))} points each: batch sizes {listed(config.batch_sizes)} x lengths "
        f"{listed(config.seq_lens)}, {config.max_tokens} output tokens",
        _WHY_TORCHRUN if nnodes > 1 else "",
        _PACKED if config.packed else "",
        "" if knows_memory else f"memory: {SIZES_UNKNOWN}",
    )
    obstacles = [f"{setting.name} cannot run: {setting.obstacle}" for setting in settings if setting.obstacle]
    remarks = [*obstacles, *uncompared(settings)]
    lines = [*_wrapped(head), "", *rows, *([""] if remarks else []), *_wrapped(remarks)]
    commands = [setting.command for setting in settings if setting.obstacle is None]
    return [f"# {line}".rstrip() for line in lines] + commands


def _wrapped(texts: Iterable[str]) -> list[str]:
    # "# " stands before each.
    return [line for text in texts for line in wrapped(text, indent=2, width=WIDTH - 2)]


def main(words: Sequence[str]) -> int:
    nnodes, node_rank, devices = int(words[0]), int(words[1]), find_devices()
    try:
        settings = [setting_of(line, nnodes, devices) for line in sys.stdin.read().rstrip("\n").split("\n")]
        if "--plan" in words:
            print("\n".join(plan(settings, nnodes, devices)))
            return 0
        if node_rank == 0:
            _check_files(settings)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(setting.reason or "" for setting in settings))
    for line in uncompared(settings):
        print(f"note: {line}", file=sys.stderr)
    return 0


def _check_files(settings: Sequence[Setting]) -> None:
    """Raises ConfigError for a result file in the way: not after the settings before it have been measured."""
    for setting in settings:
        if setting.reason is None and setting.obstacle:
            raise ConfigError(setting.obstacle)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
