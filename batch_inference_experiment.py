#!/usr/bin/env python3
"""Measure one TP/PP/DP setting of a model on vLLM; see --help."""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from batch_inference.config import ConfigError, ExperimentConfig, parse_flags
from batch_inference.hardware import Devices, find_devices, smallest_memory_gib
from batch_inference.plan import ModelFacts, describe, infeasible, is_coupled, read_model_facts
from batch_inference.ranks import Place, find_place
from batch_inference.replicas import replica_log
from batch_inference.results import check_writable


def main() -> int:
    place = find_place()
    try:
        config, notes = parse_flags(sys.argv[1:])
        check_place(config, place)
        devices = find_devices()
        facts = read_model_facts(config.model)
        if place and not place.leads:
            return 0 if config.dry_run else follow_rank_0(config, facts, devices, place)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        if config.dry_run:
            memory_gib = config.device_memory_gib or smallest_memory_gib(devices)
            print("\n".join(describe(config, facts, devices, memory_gib)))
            return 0
        check_machine(config, facts, devices, place)
        return measure(config, facts, devices, place)
    except ConfigError as error:
        # Every rank of a node finds the same; one says it.
        if place is None or place.local_rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def check_place(config: ExperimentConfig, place: Place | None) -> None:
    """--distributed-executor-backend external_launcher and torchrun belong together. Raises ConfigError."""
    needed = config.num_devices
    if config.distributed_executor_backend != "external_launcher":
        if place:
            raise ConfigError("torchrun started this: give --distributed-executor-backend external_launcher")
    elif place is None:
        if not config.dry_run:
            raise ConfigError(
                "--distributed-executor-backend external_launcher: start it with "
                f"torchrun --nproc-per-node {needed} batch_inference_experiment.py ..."
            )
    elif place.world_size != needed:
        raise ConfigError(
            f"torchrun started {place.world_size} processes, TP x PP x DP is {needed}; "
            f"give --nproc-per-node so that all nodes together have {needed}"
        )


def follow_rank_0(config: ExperimentConfig, facts: ModelFacts | None, devices: Devices, place: Place) -> int:
    from batch_inference.replicas import quiet_environment, rank_log
    from batch_inference.worker import follow

    reason = infeasible(config, facts, devices, place.local_world_size)
    if reason:
        raise ConfigError(reason)
    os.environ.update(quiet_environment() | devices.rank_environment(place.local_rank))
    return follow(config, place, rank_log(config.log_path, place.rank))


def check_machine(config: ExperimentConfig, facts: ModelFacts | None, devices: Devices, place: Place | None) -> None:
    """Everything that can be known to fail before an engine loads. Raises ConfigError."""
    reason = infeasible(config, facts, devices, place.local_world_size if place else None)
    if reason:
        raise ConfigError(reason)
    check_output(config)
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"{sys.executable} has no vLLM; run ./setup_env.sh and use .venv/bin/python")


def check_output(config: ExperimentConfig) -> None:
    """Try whether result and log can be written, and leave both as they are. Raises ConfigError."""
    path = config.output_path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        check_writable(path)
        for log in filter(Path.exists, log_paths(config)):
            with log.open("ab"):
                pass
    except OSError as error:
        raise ConfigError(
            f"--output-file {path}: it or its log cannot be written: {error.strerror}; "
            "give a file in a folder you may write to"
        ) from error


def log_paths(config: ExperimentConfig) -> list[Path]:
    replicas = 1 if config.distributed_executor_backend == "external_launcher" else config.data_parallel_size
    return [replica_log(config.log_path, replica) for replica in range(replicas)]


def measure(config: ExperimentConfig, facts: ModelFacts | None, devices: Devices, place: Place | None) -> int:
    # These need installed packages, and --help and --dry-run must answer without them.
    from batch_inference.console import Console, closing_table
    from batch_inference.environment import collect_environment
    from batch_inference.experiment import Experiment, starting_result
    from batch_inference.hardware import monitor
    from batch_inference.replicas import LocalReplicas, TorchrunReplicas
    from batch_inference.results import ResultFileError

    signal.signal(signal.SIGTERM, _end_on_sigterm)
    # Of a job over several nodes, those of this one.
    used = Devices(devices.kind, devices.ids[: place.local_world_size if place else config.num_devices])
    replicas = (
        TorchrunReplicas(config, devices.rank_environment(place.local_rank), config.log_path)
        if place
        else LocalReplicas(config, used, config.log_path, coupled=is_coupled(config, facts))
    )
    watch = monitor(used)
    console = Console()
    try:
        result = starting_result(config, collect_environment(used, watch))
        if not result.points:  # a log of earlier points is gone on with
            for log in log_paths(config):
                log.write_text("")
        Experiment(config, result, watch, console).run(replicas)
    except ResultFileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if result.status == "failed":
        print(f"error: {config.setting_name}: {result.engine['failure']['reason']}", file=sys.stderr)
        print(f"  vLLM's log: {config.log_path}", file=sys.stderr)
        return 1
    print(closing_table(result))
    print(f"\n{config.output_path}")
    return 0 if all(point.status == "ok" for point in result.points) else 1


def _end_on_sigterm(_signal_number: int, _frame: FrameType | None) -> None:
    print("ended by SIGTERM", file=sys.stderr)
    raise SystemExit(143)


if __name__ == "__main__":
    sys.exit(main())
