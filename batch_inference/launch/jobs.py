"""The settings of a preset as jobs: each one's command line, and what it asks of the experiment script."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from batch_inference.core.config import SEPARATE, ConfigError, ExperimentConfig, flag_of
from batch_inference.core.flags import PLAN_FLAGS, devices_without_plan, parse_flags, without_plan_flags
from batch_inference.core.streams import say
from batch_inference.launch.options import Options
from batch_inference.launch.presets import Preset, Setting, without
from batch_inference.measure.job_lengths import SampleTooSmallError, read_job
from batch_inference.plan.devices import find_devices

EXPERIMENT, ANALYSIS = "batch_inference_experiment.py", "analyze_results.py"
WORKLOAD = "examples/workload.jsonl"


@dataclass(frozen=True)
class Here:
    """How commands are written for the user's current folder."""

    python: str
    prefix: str  # before the names of our own files; empty in the folder of the checkout

    def path(self, name: str) -> str:
        return f"{self.prefix}{name}"


@dataclass(frozen=True)
class Job:
    """One setting to be measured."""

    name: str  # in the preset
    words: tuple[str, ...]  # the command
    config: ExperimentConfig
    setting: Setting
    port: int = 0  # its first port on node 0, for several nodes
    reason: str | None = None  # why what is asked of it cannot be measured with this setting, wherever it runs

    @property
    def console_path(self) -> Path:
        """Where its output goes if another job runs beside it."""
        return self.config.output_path.with_suffix(".txt")


def folder_of(preset: Preset, options: Options) -> str:
    """Where its result files go."""
    return options.output_dir or preset.folder or ExperimentConfig.output_dir


def check_together(preset: Preset, options: Options) -> None:
    """Raises ConfigError for options that the preset does not allow, or lacks."""
    if preset.is_search:
        preset.check_no_words(options.words)
        _check_one_node(preset, options)
    else:
        _check_no_search(preset, options)
    if options.job and not preset.is_demo:
        raise ConfigError(f"--job: it works only with quickstart; with {preset.name} give --prompts-file FILE")
    if options.job and options.prompts_file:
        raise ConfigError(f"--prompts-file {options.prompts_file}: --job measures its own workload; drop one of them")
    if options.nnodes in (None, 1) and not options.is_over_nodes:
        return
    given = f"--nnodes: '{options.nnodes}'" if options.nnodes else f"--master-addr: '{options.master_addr}'"
    if preset.is_demo:
        raise ConfigError(f"{given} was given, but {preset.name} is for one node")
    if options.master_addr is None:
        raise ConfigError(f"{given} was given, but --master-addr HOST is needed too")


def _check_one_node(preset: Preset, options: Options) -> None:
    if options.nnodes not in (None, 1) or options.is_over_nodes:
        given = f"--nnodes {options.nnodes}" if options.nnodes else f"--master-addr {options.master_addr}"
        raise ConfigError(
            f"{given}: {preset.name} runs on one node; leave it out, or use another preset for several nodes"
        )


def _check_no_search(preset: Preset, options: Options) -> None:
    if options.devices and not options.dry_run:
        raise devices_without_plan(options.devices)
    for name in ("budget_device_minutes", "device_hour_price"):
        if (value := getattr(options, name)) is not None:
            raise ConfigError(f"{flag_of(name)} {value:g}: it is for best, not {preset.name}; leave it out")


def nodes_in_words(options: Options) -> str:
    """Where the devices of a plan are; empty for one node."""
    if not options.is_over_nodes:
        return ""
    if options.nnodes:
        return f" on each of {options.nnodes} nodes"
    return " on each node, if all are like this one; a setting takes as many nodes as it needs"


def jobs_of(settings: Sequence[Setting], preset: Preset, options: Options, here: Here) -> list[Job]:
    """Raises ConfigError for flags that are wrong."""
    most = 65535 - 2 * len(settings)
    if options.is_over_nodes and options.master_port > most:
        raise ConfigError(
            f"--master-port: '{options.master_port}' was given, but {preset.name} takes two ports per setting after "
            f"it: at most {most}"
        )
    # Its own ports, so that no setting meets what the one before may still be closing on node 0.
    ports = itertools.count(options.master_port + 1, 2)
    rank = options.node_rank or 0
    parts = [preset, *([preset.over(here.path(WORKLOAD))] if options.job else [])]
    return [job_of(setting, next(ports), rank, part, options, here) for part in parts for setting in settings]


def job_of(setting: Setting, port: int, rank: int, preset: Preset, options: Options, here: Here) -> Job:  # noqa: PLR0913
    """`rank`: this node's number among those of the setting. Raises ConfigError for flags that are wrong."""
    nodes = _node_flags(setting, port, rank, options)
    start, backend = [here.python], ["--distributed-executor-backend", "mp"] if setting.tp * setting.pp > 1 else []
    # A first try should be short; a study should measure what vLLM does by itself.
    if preset.is_demo and SEPARATE not in os.environ and _runs_on_cores(options):
        start = ["env", f"{SEPARATE}=0", *start]
    if setting.torchrun:
        start = _torchrun(setting.num_devices // setting.nodes, nodes, here)
        backend = ["--distributed-executor-backend", "external_launcher"]
    # A setting that cannot be divided evenly is skipped, and is not an error of the preset.
    elif setting.num_devices % setting.nodes == 0:
        backend += nodes
    of_preset = preset.flags
    if options.prompts_file or _gives(options, "--prompts-file"):
        of_preset = without("--seq-lens", of_preset)
    if _gives(options, "--num-runs"):
        of_preset = without("--target-ci", of_preset)
    flags = [
        "--name", setting.name, "--output-dir", folder_of(preset, options),
        "--tensor-parallel-size", str(setting.tp), "--pipeline-parallel-size", str(setting.pp),
        "--data-parallel-size", str(setting.dp), *backend, *of_preset,
        *setting.flags_beside([*of_preset, *options.flags]),
    ]  # fmt: skip
    # A folder of the user's own may hold results that took hours.
    if preset.is_demo and not (preset.goes_on or options.resume or options.output_dir):
        flags.append("--overwrite")
    flags += options.passed_on
    config, reason = _with_lengths(parse_flags([*flags, *_plan_flags(options), *options.flags])[0])
    if config.devices != options.devices:
        raise ConfigError("--devices: give it once and before --, because sizes of the preset may depend on it")
    flags += without_plan_flags(options.flags)
    words = (*start, here.path(EXPERIMENT), *flags)
    return Job(setting.name, words, config, setting, port, reason)


def _gives(options: Options, name: str) -> bool:
    return any(word.partition("=")[0] == name for word in options.flags)


def _runs_on_cores(options: Options) -> bool:
    return not options.devices and find_devices().kind == "cpu"


def _with_lengths(config: ExperimentConfig) -> tuple[ExperimentConfig, str | None]:
    """With the lengths of a workload's requests, if its file is on this node, and why they are too few for the setting.
    Raises ConfigError if it is not a job."""
    if config.prompts_file is None or (config.node_rank and not Path(config.prompts_file).exists()):
        return config, None
    try:
        return read_job(config, say)[0], None
    except SampleTooSmallError as error:
        return error.config, str(error)


def _plan_flags(options: Options) -> list[str]:
    """What a plan is made for; its commands do not say so."""
    if not options.dry_run:
        return []
    values = (options.devices, options.device_memory_gib)
    given = [[flag, str(value)] for flag, value in zip(PLAN_FLAGS, values, strict=True) if value is not None]
    return list(itertools.chain(["--dry-run"], *given))


def _torchrun(processes: int, nodes: list[str], here: Here) -> list[str]:
    # torchrun would set the same and print a banner.
    start = [] if os.environ.get("OMP_NUM_THREADS") else ["env", "OMP_NUM_THREADS=1"]
    start += [here.python, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return start + (nodes or ["--standalone"])


def _node_flags(setting: Setting, port: int, rank: int, options: Options) -> list[str]:
    """The same for torchrun and for the experiment script; none for one node."""
    if setting.nodes == 1:
        return []
    return [
        "--nnodes", str(setting.nodes), "--node-rank", str(rank),
        "--master-addr", options.master_addr or "", "--master-port", str(port),
    ]  # fmt: skip
