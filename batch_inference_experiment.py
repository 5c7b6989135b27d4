#!/usr/bin/env python3
"""Measure one TP/PP/DP setting of a model on vLLM; see --help."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.failures import ADVICE, WorkFailedError
from batch_inference.core.flags import parse_flags
from batch_inference.core.packages import missing_to_measure
from batch_inference.core.secrets import redact_text, remember
from batch_inference.core.signals import end_in_order
from batch_inference.core.streams import print_kept, say, say_notes, secure_streams, show
from batch_inference.core.text import wrapped
from batch_inference.measure.job_lengths import JobLengths, read_job
from batch_inference.measure.vllm_flags import check_vllm_flags
from batch_inference.measure.vllm_version import check_vllm_version
from batch_inference.plan.by_vllm import ask_vllm
from batch_inference.plan.devices import Devices, devices_elsewhere, find_devices, smallest_memory_gib
from batch_inference.plan.model import ModelFacts, facts_of
from batch_inference.plan.model_place import check_weights, note_on_name
from batch_inference.plan.needs import memory_against, needs_of
from batch_inference.plan.obstacles import devices_against, is_coupled, rules_against
from batch_inference.plan.place import Place, check_place, find_place
from batch_inference.plan.printed import setting_plan
from batch_inference.plan.said import Said

# Measuring needs installed packages; --help and --dry-run work without them.
if TYPE_CHECKING:
    from batch_inference.core.results import Environment, Peaks, Result
    from batch_inference.measure.hardware import Monitor
    from batch_inference.measure.nodes import Nodes
    from batch_inference.measure.ray_cluster import Cluster
    from batch_inference.measure.replicas import Replicas


@dataclass(frozen=True)
class Surroundings:
    """What this process finds: the model's sizes, this machine's devices, its place in a torchrun job, a Ray cluster
    to join, and what vLLM says about the setting. None for what does not exist."""

    facts: ModelFacts | None
    devices: Devices
    place: Place | None
    cluster: Cluster | None
    said: Said | None = None
    job: JobLengths | None = None  # of a workload, on the node that distributes it

    @property
    def processes(self) -> int | None:
        """How many torchrun started on this node."""
        return self.place.local_world_size if self.place else None

    @property
    def ray_gpus(self) -> int:
        return self.cluster.gpus if self.cluster else len(self.devices)

    def memory_gib(self, config: ExperimentConfig) -> float | None:
        """Of the smallest device, if it can be found or is given."""
        return config.device_memory_gib or smallest_memory_gib(self.devices)


def main() -> int:
    secure_streams()
    remember(sys.argv[1:], os.environ)
    place = None
    try:
        place = find_place()
        # torchrun ends the other ranks with SIGTERM, at once: they have nothing to save.
        if place is None or place.leads:
            end_in_order()
        config, notes = parse_flags(sys.argv[1:])
        config, job = read_workload(config, place)
        here = look_around(config, place, job)
        work = choose(config, here)
        if place is None or place.leads:
            say_notes([*notes, *filter(None, [note_on_name(config), job.left_out if job else None])])
        return work(config, here)
    except ConfigError as error:
        # Every rank of a node finds the same error; one reports it.
        if place is None or place.local_rank == 0:
            say(f"error: {error}")
        return 2
    except WorkFailedError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130


def read_workload(config: ExperimentConfig, place: Place | None) -> tuple[ExperimentConfig, JobLengths | None]:
    """One process reads it and hands out what is run. Raises ConfigError for a file that is not a job."""
    leads = place.leads if place else config.node_rank == 0
    if config.prompts_file is None or not (leads or config.max_model_len is None):
        return config, None
    if place and not leads:  # rank 0 decides the length that its engine needs
        return config, None
    return read_job(config, say)


def look_around(config: ExperimentConfig, place: Place | None, job: JobLengths | None = None) -> Surroundings:
    """Raises ConfigError as `ask` does, and if a model folder or RAY_ADDRESS leads nowhere or a place does not fit."""
    check_place(config, place)
    facts, cluster = facts_of(config), None
    devices = devices_elsewhere(config.devices) if config.devices else find_devices()
    # A plan needs no cluster, and vLLM refuses Ray on the CPU.
    if config.distributed_executor_backend == "ray" and devices.kind == "gpu" and not config.dry_run:
        from batch_inference.measure.ray_cluster import find_cluster

        cluster = find_cluster()
    here = Surroundings(facts, devices, place, cluster, job=job)
    # One of a node's ranks asks.
    asks = place is None or place.local_rank == 0
    knows_lengths = config.prompts_file is None or config.workload_longest is not None
    return replace(here, said=ask(config, here)) if asks and knows_lengths else here


def ask(config: ExperimentConfig, here: Surroundings) -> Said | None:
    """Raises ConfigError for a flag that vLLM does not know, for a folder without weights, and for a vLLM that cannot
    load our engines."""
    if not config.dry_run and (warning := check_vllm_version(say)):
        say(f"warning: {warning}")
    check_vllm_flags(config.engine_args, say)
    check_weights(config)  # a flag that is misspelt may be --load-format
    if not config.dry_run and devices_against(config, here.devices, here.processes, here.ray_gpus):
        return None
    setting = (config, here.facts, here.memory_gib(config))
    (said,) = ask_vllm([setting], here.devices, say, only_in_doubt=not config.dry_run)
    return said


def choose(config: ExperimentConfig, here: Surroundings) -> Callable[[ExperimentConfig, Surroundings], int]:
    """What this process should do. Raises ConfigError, before an engine loads, if that cannot work."""
    follows = here.place is not None and not here.place.leads
    if config.dry_run:
        if follows:
            return say_nothing
        return show_plan
    reason = devices_against(config, here.devices, here.processes, here.ray_gpus)
    # Only one rank of a node knows what vLLM says; it speaks for the others.
    if reason is None and (here.place is None or here.place.local_rank == 0):
        reason = model_against(config, here)
    if reason:
        raise ConfigError(reason)
    if missing := missing_to_measure():
        raise ConfigError(missing)
    if follows:
        return follow_rank_0
    # torchrun numbers the nodes itself, whatever --node-rank says.
    return measure if here.place or config.node_rank == 0 else serve_node_0


def model_against(config: ExperimentConfig, here: Surroundings) -> str | None:
    """Why the model cannot run like this, in one line; None if nothing speaks against it."""
    needs = needs_of(config, here.facts, here.devices, here.memory_gib(config), here.said)
    return rules_against(config, here.facts, here.devices, here.said) or memory_against(needs)


def say_nothing(_config: ExperimentConfig, _here: Surroundings) -> int:
    return 0


def show_plan(config: ExperimentConfig, here: Surroundings) -> int:
    lines = setting_plan(config, here.facts, here.devices, here.memory_gib(config), here.said)
    shown = show("\n".join(lines))
    return 1 if devices_against(config, here.devices) or model_against(config, here) else shown


def measure(config: ExperimentConfig, here: Surroundings) -> int:
    from batch_inference.measure.hardware import monitor
    from batch_inference.measure.locks import devices_in_use
    from batch_inference.measure.study import claimed

    # In a job over several nodes, the devices of this node.
    devices = here.devices.slice_for(0, here.processes or config.devices_per_node)
    watch = monitor(devices)
    environment = environment_of(config, here, devices, watch)
    with (
        claimed(config, environment) as (config, notes),
        devices_in_use(environment.devices, f"{config.setting_name}, {config.output_path}") as used,
    ):
        say_notes([*notes, *used])
        environment.used_by_others = list(map(redact_text, used))
        return sweep(config, here, devices, watch, environment)


def sweep(
    config: ExperimentConfig, here: Surroundings, devices: Devices, watch: Monitor, environment: Environment
) -> int:
    from batch_inference.core.result_file import ResultFileError
    from batch_inference.measure.console import Console
    from batch_inference.measure.engine_process import log_paths
    from batch_inference.measure.experiment import Experiment
    from batch_inference.measure.hub import fetch_models
    from batch_inference.measure.job import JobFile
    from batch_inference.measure.logs import empty_log
    from batch_inference.measure.nodes import meet
    from batch_inference.measure.resume import starting_result

    result = starting_result(config, environment)
    if not result.points:  # a log with earlier points is continued
        for log in log_paths(config):
            empty_log(log)
    job = JobFile(config, here.job) if here.job else None
    experiment = Experiment(config, result, watch, Console(), job)
    # Ranks of torchrun start their engines together, and vLLM itself has one of them download.
    if config.data_parallel_size > 1 and here.place is None and experiment.is_open:
        fetch_models([config], say)
    try:
        with contextlib.ExitStack() as open_nodes:
            nodes = open_nodes.enter_context(meet(config, say)) if config.nnodes > 1 else None
            experiment.run(build_replicas(config, here, devices, nodes), nodes)
    except ResultFileError as error:
        say(f"error: {error}")
        if measured := experiment.unsaved():
            say(f"what was measured, as it would have been saved:\n{measured}")
        return 1
    return tell(config, result, experiment.answers(), is_whole=experiment.is_whole)


def environment_of(config: ExperimentConfig, here: Surroundings, devices: Devices, watch: Monitor) -> Environment:
    from batch_inference.measure.environment import collect_environment

    environment = collect_environment(devices, watch)
    environment.peaks = measured_peaks(config, here) if config.measure_peaks else None
    return environment


def measured_peaks(config: ExperimentConfig, here: Surroundings) -> Peaks:
    """The most that one device can do. No engine is loaded yet: a model that cannot be read from here most likely uses
    16 bits."""
    from batch_inference.measure.peaks import measure_peaks

    dtype = here.facts.dtype_used(config.dtype) if here.facts else config.dtype
    return measure_peaks(here.devices, dtype if dtype.endswith(("16", "32")) else "bfloat16")


def build_replicas(config: ExperimentConfig, here: Surroundings, devices: Devices, nodes: Nodes | None) -> Replicas:
    from batch_inference.measure.ray_cluster import OWN_CLUSTER
    from batch_inference.measure.replicas import LocalReplicas, TorchrunReplicas

    if here.place:
        return TorchrunReplicas(config, devices.rank_environment(here.place.local_rank), here.place)
    ray_address = None
    if config.distributed_executor_backend == "ray":
        ray_address = here.cluster.address if here.cluster else OWN_CLUSTER
    coupled = is_coupled(config, here.facts)
    return LocalReplicas(config, devices, coupled=coupled, nodes=nodes, ray_address=ray_address)


def tell(config: ExperimentConfig, result: Result, answers: Sequence[str], *, is_whole: bool) -> int:
    """Say how it ended, with the answers of a search; returns the exit code."""
    from batch_inference.measure.console import closing_table

    if result.failure:
        kind = result.failure.kind
        raise WorkFailedError(
            f"{config.setting_name}: {result.failure.reason}\n  {kind}: {ADVICE[kind]}\n  vLLM's log: {config.log_path}"
        )
    found = "\n".join(line for answer in answers for line in wrapped(answer, indent=2))
    print_kept("\n\n".join(filter(None, [closing_table(result), found, str(config.output_path)])), config.output_path)
    return 0 if is_whole else 1


def serve_node_0(config: ExperimentConfig, here: Surroundings) -> int:
    """Any node but 0: its devices work for the engine on node 0 until node 0 says that the setting is over."""
    from batch_inference.measure.engine_process import ReplicaError, log_paths
    from batch_inference.measure.logs import empty_log
    from batch_inference.measure.nodes import meet
    from batch_inference.measure.replicas import hold_workers
    from batch_inference.measure.study import check_writable_paths

    check_writable_paths(config)
    (log,) = log_paths(config)
    empty_log(log)
    with meet(config, say) as nodes:
        print(f"{config.setting_name}: node {config.node_rank} works for node 0, which prints the results")
        print(f"  vLLM's log: {log}", flush=True)
        try:
            hold_workers(config, here.devices.slice_for(0, config.devices_per_node), nodes)
        except ReplicaError as error:
            raise WorkFailedError(f"{config.setting_name}: {error.reason}\n  vLLM's log: {log}") from error
    return 0


def follow_rank_0(config: ExperimentConfig, here: Surroundings) -> int:
    """Any rank of torchrun but 0: it does what rank 0 says."""
    from batch_inference.measure.engine_process import quiet_environment, rank_log
    from batch_inference.measure.worker import follow

    assert here.place is not None
    os.environ.update(quiet_environment() | here.devices.rank_environment(here.place.local_rank))
    return follow(config, here.place, rank_log(config.log_path, here.place.rank))


if __name__ == "__main__":
    sys.exit(main())
