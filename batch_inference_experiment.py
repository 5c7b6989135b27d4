#!/usr/bin/env python3
"""Measure one TP/PP/DP setting of a model on vLLM; see --help."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from types import FrameType

from batch_inference.config import ConfigError, ExperimentConfig, parse_flags
from batch_inference.hardware import Devices, find_devices
from batch_inference.plan import ModelFacts, describe, infeasible, read_model_facts


def main() -> int:
    try:
        config, notes = parse_flags(sys.argv[1:])
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        devices = find_devices()
        facts = read_model_facts(config.model)
        if config.dry_run:
            print("\n".join(describe(config, facts, devices)))
            return 0
        check_machine(config, facts, devices)
        return measure(config, devices)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; finished points are kept", file=sys.stderr)
        return 130


def check_machine(config: ExperimentConfig, facts: ModelFacts | None, devices: Devices) -> None:
    """Everything that can be known to fail before an engine loads. Raises ConfigError."""
    reason = infeasible(config, facts, devices)
    if reason:
        raise ConfigError(reason)
    path = config.output_path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output-file {path}: its folder cannot be made: {error.strerror}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--output-file {path}: cannot be written there; give a file in a folder you may write to")
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"{sys.executable} has no vLLM; run ./setup_env.sh and use .venv/bin/python")


def measure(config: ExperimentConfig, devices: Devices) -> int:
    # These need installed packages, and --help and --dry-run must answer without them.
    from batch_inference.console import Console, closing_table
    from batch_inference.environment import collect_environment
    from batch_inference.experiment import Experiment, starting_result
    from batch_inference.hardware import monitor
    from batch_inference.replicas import LocalReplicas
    from batch_inference.results import ResultFileError

    signal.signal(signal.SIGTERM, _end_on_sigterm)
    used = Devices(devices.kind, devices.ids[: config.num_devices])
    watch = monitor(used)
    console = Console()
    try:
        result = starting_result(config, collect_environment(used, watch))
        config.log_path.write_text("")
        Experiment(config, result, watch, console).run(LocalReplicas(config, used, config.log_path))
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
    print("ended by SIGTERM; finished points are kept", file=sys.stderr)
    raise SystemExit(143)


if __name__ == "__main__":
    sys.exit(main())
