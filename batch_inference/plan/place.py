"""This process's place in a torchrun job, if there is one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.text import quoted


@dataclass(frozen=True)
class Place:
    """This process's place in a torchrun job, from the variables that torchrun sets."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def leads(self) -> bool:
        return self.rank == 0


def find_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """None outside torchrun. Raises ConfigError for values that torchrun would not set."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if any(name not in environment for name in names):
        return None
    for name in names:
        if not environment[name].isdecimal():
            raise ConfigError(f"{name}: {quoted(environment[name])} is not a number; unset it outside torchrun")
    return Place(*(int(environment[name]) for name in names))


def check_place(config: ExperimentConfig, place: Place | None) -> None:
    """--distributed-executor-backend external_launcher and torchrun belong together. Raises ConfigError."""
    needed = config.num_devices
    if config.distributed_executor_backend != "external_launcher":
        if place:
            raise ConfigError("torchrun started this program; give --distributed-executor-backend external_launcher")
    elif place is None:
        if not config.dry_run:
            raise ConfigError(
                "--distributed-executor-backend external_launcher: start it with "
                f"torchrun --nproc-per-node {needed} batch_inference_experiment.py ..."
            )
    elif place.world_size != needed:
        raise ConfigError(
            f"torchrun started {place.world_size} processes, but TP x PP x DP is {needed}; "
            f"give --nproc-per-node so that all nodes together have {needed}"
        )
