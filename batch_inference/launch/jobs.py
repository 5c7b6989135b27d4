"""The settings of a preset as jobs: the command line of each, and what it asks of the experiment script."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.flags import PLAN_FLAGS, parse_flags, without_plan_flags
from batch_inference.launch.options import Options
from batch_inference.launch.presets import Preset, Setting

EXPERIMENT, ANALYSIS = "batch_inference_experiment.py", "analyze_results.py"


@dataclass(frozen=True)
class Here:
    """How commands are written where the user stands."""

    python: str
    prefix: str  # before the names of our own files: nothing in the folder of the checkout

    def path(self, name: str) -> str:
        return f"{self.prefix}{name}"


@dataclass(frozen=True)
class Job:
    """One setting to be measured."""

    name: str  # in the preset
    words: tuple[str, ...]  # the command
    config: ExperimentConfig
    meeting_port: int | None = None  # where the nodes meet before torchrun starts

    @property
    def console_path(self) -> Path:
        """What it prints, where another runs beside it."""
        return self.config.output_path.with_suffix(".txt")


def folder_of(preset: Preset, options: Options) -> str:
    """Where its result files go."""
    return options.output_dir or preset.folder or ExperimentConfig.output_dir


def check_together(preset: Preset, options: Options) -> None:
    """Raises ConfigError for options that the preset does not allow, or needs."""
    if options.nnodes > 1 and preset.is_demo:
        raise ConfigError(f"--nnodes: '{options.nnodes}' was given, {preset.name} is for one node")
    if options.nnodes > 1 and options.master_addr is None:
        raise ConfigError(f"--nnodes: '{options.nnodes}' was given, --master-addr HOST is needed too")


def jobs_of(settings: Sequence[Setting], preset: Preset, options: Options, here: Here) -> list[Job]:
    """Raises ConfigError for flags that are wrong."""
    most = 65536 - 2 * len(settings)
    if options.nnodes > 1 and options.master_port > most:
        raise ConfigError(
            f"--master-port: '{options.master_port}' was given, {preset.name} takes two ports for each setting: "
            f"at most {most}"
        )
    # Ports of its own: no setting meets what the one before may still be closing on node 0.
    ports = itertools.count(options.master_port, 2)
    return [_job(setting, port, preset, options, here) for setting, port in zip(settings, ports, strict=False)]


def _job(setting: Setting, port: int, preset: Preset, options: Options, here: Here) -> Job:
    start, backend = [here.python], _by_vllm(setting, port, options)
    if setting.torchrun:
        start = _torchrun(setting.num_devices // options.nnodes, port + 1, options, here)
        backend = ["--distributed-executor-backend", "external_launcher"]
    flags = [
        "--name", setting.name, "--output-dir", folder_of(preset, options),
        "--tensor-parallel-size", str(setting.tp), "--pipeline-parallel-size", str(setting.pp),
        "--data-parallel-size", str(setting.dp), *backend, *preset.flags, *setting.flags,
    ]  # fmt: skip
    # In a folder of the user's own may lie results that took hours.
    if preset.is_demo and not options.resume and options.output_dir is None:
        flags.append("--overwrite")
    flags += options.passed_on
    config = parse_flags([*flags, *_plan_flags(options), *options.flags])[0]
    if config.devices != options.devices:
        raise ConfigError("--devices: give it once and before --, because sizes of the preset may depend on it")
    flags += without_plan_flags(options.flags)
    meeting_port = port if setting.torchrun and options.nnodes > 1 else None
    words = (*start, here.path(EXPERIMENT), *flags)
    return Job(setting.name, words, config, meeting_port)


def _plan_flags(options: Options) -> list[str]:
    """What a plan is made for; no command of it says so."""
    if not options.dry_run:
        return []
    values = (options.devices, options.device_memory_gib)
    given = [[flag, str(value)] for flag, value in zip(PLAN_FLAGS, values, strict=True) if value is not None]
    return list(itertools.chain(["--dry-run"], *given))


def _by_vllm(setting: Setting, port: int, options: Options) -> list[str]:
    per_replica = setting.tp * setting.pp
    if per_replica == 1:
        return []
    flags = ["--distributed-executor-backend", "mp"]
    # One that cannot be shared out evenly is skipped, and no error of the preset.
    if options.nnodes > 1 and per_replica % options.nnodes == 0:
        flags += _node_flags(options, port)
    return flags


def _torchrun(processes: int, port: int, options: Options, here: Here) -> list[str]:
    # torchrun would set the same, with a banner.
    start = [] if os.environ.get("OMP_NUM_THREADS") else ["env", "OMP_NUM_THREADS=1"]
    start += [here.python, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return start + (_node_flags(options, port) if options.nnodes > 1 else ["--standalone"])


def _node_flags(options: Options, port: int) -> list[str]:
    """The same for torchrun and for the experiment script."""
    return [
        "--nnodes", str(options.nnodes), "--node-rank", str(options.node_rank),
        "--master-addr", options.master_addr or "", "--master-port", str(port),
    ]  # fmt: skip
