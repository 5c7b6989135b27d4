#!/usr/bin/env python3
"""Measure one TP/PP/DP setting of a model on vLLM; see --help."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from batch_inference.core.config import ConfigError, ExperimentConfig, parse_flags
from batch_inference.core.failures import ADVICE
from batch_inference.core.results import ResultFileError, check_writable, to_json
from batch_inference.measure.hardware import monitor, smallest_memory_gib
from batch_inference.measure.nodes import Nodes, NodesError, meet
from batch_inference.measure.peaks import measure_peaks
from batch_inference.measure.ranks import Place, find_place
from batch_inference.measure.ray_cluster import OWN_CLUSTER, Cluster, find_cluster
from batch_inference.measure.replicas import (
    LocalReplicas,
    ReplicaError,
    Replicas,
    TorchrunReplicas,
    node_log,
    quiet_environment,
    rank_log,
    replica_log,
    serve_node_0,
)
from batch_inference.plan.devices import Devices, find_devices
from batch_inference.plan.model import ModelFacts, read_model_facts
from batch_inference.plan.obstacles import infeasible, is_coupled
from batch_inference.plan.printed import setting_plan


@dataclass(frozen=True)
class Surroundings:
    """What this process finds: the model's sizes, this machine's devices, its place in a torchrun job, and a Ray
    cluster to join. None where there is none of the kind."""

    facts: ModelFacts | None
    devices: Devices
    place: Place | None
    cluster: Cluster | None

    @property
    def processes(self) -> int | None:
        """How many torchrun has started on this node."""
        return self.place.local_world_size if self.place else None


def main() -> int:
    place = find_place()
    try:
        config, notes = parse_flags(sys.argv[1:])
        check_place(config, place)
        here = look_around(config, place)
        if place and not place.leads:
            return 0 if config.dry_run else follow_rank_0(config, here, place)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        if config.dry_run:
            memory_gib = config.device_memory_gib or smallest_memory_gib(here.devices)
            print("\n".join(setting_plan(config, here.facts, here.devices, memory_gib)))
            return 0
        check_machine(config, here)
        return measure(config, here) if config.node_rank == 0 else serve(config, here.devices)
    except ConfigError as error:
        # Every rank of a node finds the same; one says it.
        if place is None or place.local_rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def look_around(config: ExperimentConfig, place: Place | None) -> Surroundings:
    """Raises ConfigError for a model folder, or a RAY_ADDRESS, that leads nowhere."""
    facts, devices = read_model_facts(config.model), find_devices()
    # A plan asks nobody, and vLLM refuses Ray on the CPU.
    joins = config.distributed_executor_backend == "ray" and devices.kind == "gpu" and not config.dry_run
    return Surroundings(facts, devices, place, find_cluster() if joins else None)


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


def follow_rank_0(config: ExperimentConfig, here: Surroundings, place: Place) -> int:
    from batch_inference.measure.worker import follow

    reason = infeasible(config, here.facts, here.devices, here.processes)
    if reason:
        raise ConfigError(reason)
    os.environ.update(quiet_environment() | here.devices.rank_environment(place.local_rank))
    return follow(config, place, rank_log(config.log_path, place.rank))


def check_machine(config: ExperimentConfig, here: Surroundings) -> None:
    """Everything that can be known to fail before an engine loads. Raises ConfigError."""
    ray_gpus = here.cluster.gpus if here.cluster else len(here.devices)
    reason = infeasible(config, here.facts, here.devices, here.processes, ray_gpus)
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
    if config.node_rank > 0:
        return [node_log(config.log_path, config.node_rank)]
    replicas = 1 if config.distributed_executor_backend == "external_launcher" else config.data_parallel_size
    return [replica_log(config.log_path, replica) for replica in range(replicas)]


def serve(config: ExperimentConfig, devices: Devices) -> int:
    """A node other than 0: its devices work for the engine there, until node 0 says that the setting is over."""
    signal.signal(signal.SIGTERM, _end_on_sigterm)
    log = log_paths(config)[0]
    log.write_text("")
    try:
        with meet(config) as nodes:
            print(f"{config.setting_name}: node {config.node_rank} works for node 0, which prints the results")
            print(f"  vLLM's log: {log}", flush=True)
            serve_node_0(config, devices.slice_for(0, config.devices_per_node), nodes)
    except NodesError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ReplicaError as error:
        print(f"error: {config.setting_name}: {error.reason}\n  vLLM's log: {log}", file=sys.stderr)
        return 1
    return 0


def measure(config: ExperimentConfig, here: Surroundings) -> int:
    # These need installed packages, and --help and --dry-run must answer without them.
    from batch_inference.measure.console import Console, closing_table
    from batch_inference.measure.environment import collect_environment
    from batch_inference.measure.experiment import Experiment, starting_result

    signal.signal(signal.SIGTERM, _end_on_sigterm)
    # Of a job over several nodes, those of this one.
    used = here.devices.slice_for(0, here.processes or config.devices_per_node)
    watch = monitor(used)
    result = None
    console = Console()
    try:
        environment = collect_environment(used, watch)
        environment["peaks"] = measured_peaks(config, here) if config.measure_peaks else None
        result = starting_result(config, environment)
        if not result.points:  # a log of earlier points is gone on with
            for log in log_paths(config):
                log.write_text("")
        with contextlib.ExitStack() as open_nodes:
            nodes = open_nodes.enter_context(meet(config)) if config.nnodes > 1 else None
            replicas = build_replicas(config, here, used, nodes)
            Experiment(config, result, watch, console).run(replicas)
            if nodes:
                nodes.dismiss(failed=result.status == "failed")
    except NodesError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ResultFileError as error:
        print(f"error: {error}", file=sys.stderr)
        if result is not None and result.points:
            print("what was measured, as it would have been saved:", file=sys.stderr)
            print(to_json(result), file=sys.stderr)
        return 1
    if result.status == "failed":
        failure = result.engine["failure"]
        print(f"error: {config.setting_name}: {failure['reason']}", file=sys.stderr)
        print(f"  {failure['class']}: {ADVICE[failure['class']]}", file=sys.stderr)
        print(f"  vLLM's log: {config.log_path}", file=sys.stderr)
        return 1
    print(closing_table(result))
    print(f"\n{config.output_path}")
    return 0 if all(point.status == "ok" for point in result.points) else 1


def measured_peaks(config: ExperimentConfig, here: Surroundings) -> dict[str, Any]:
    """What one device can do at most. No engine is loaded yet: a model that cannot be read from here is most likely in
    16 bits."""
    dtype = here.facts.dtype_used(config.dtype) if here.facts else config.dtype
    return measure_peaks(here.devices, dtype if dtype.endswith(("16", "32")) else "bfloat16")


def build_replicas(config: ExperimentConfig, here: Surroundings, devices: Devices, nodes: Nodes | None) -> Replicas:
    if here.place:
        return TorchrunReplicas(config, devices.rank_environment(here.place.local_rank), here.place)
    ray_address = None
    if config.distributed_executor_backend == "ray":
        ray_address = here.cluster.address if here.cluster else OWN_CLUSTER
    coupled = is_coupled(config, here.facts)
    return LocalReplicas(config, devices, coupled=coupled, nodes=nodes, ray_address=ray_address)


def _end_on_sigterm(_signal_number: int, _frame: FrameType | None) -> None:
    print("ended by SIGTERM", file=sys.stderr)
    raise SystemExit(143)


if __name__ == "__main__":
    sys.exit(main())
