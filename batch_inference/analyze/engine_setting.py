"""A measured point as the settings of an engine that is to be used: what the file says, and what the point needs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batch_inference.analyze.engine_words import settings_of_words
from batch_inference.core.results import EngineInfo, Point, Result, StoredConfig
from batch_inference.core.secrets import placeholders, redact, redact_value
from batch_inference.core.text import listed, plain
from batch_inference.core.values import AUTO_LENGTH

# The user's own words on graphs go before ours.
_GRAPHS = ("max_cudagraph_capture_size", "cudagraph_capture_sizes", "compilation_config")

_CORES = re.compile(r"[\d,-]+", re.ASCII)


@dataclass(frozen=True)
class EngineSetting:
    """Of one replica, by the names of vLLM's EngineArgs; and how many replicas there are."""

    values: dict[str, Any]
    why: dict[str, str]  # of some of them, for who reads the file
    sampling: dict[str, float]
    replicas: int
    devices_per_replica: int
    is_coupled: bool  # the replicas of a mixture of experts that share out its experts
    nnodes: int
    on_cpu: bool
    cores: tuple[str, ...] = ()  # of each worker of all replicas, on a CPU
    notes: list[str] = field(default_factory=list)  # what is not as it was measured


def engine_setting(result: Result, point: Point, engine: EngineInfo) -> EngineSetting:
    """`engine`: the one that measured the point."""
    config = result.config
    words = redact(config.engine_args)
    given, unknown = settings_of_words(words)
    is_dummy = given.get("load_format") == "dummy"
    if is_dummy:
        del given["load_format"]
    values, why = _values(config, engine, point)
    if not any(name in given for name in _GRAPHS):
        _keep_graphs(values, why, engine)
    notes = list(_notes(config, engine, is_dummy=is_dummy, unknown=unknown))
    return EngineSetting(
        values={name: value for name, value in values.items() if value is not None} | given,
        why=why,
        sampling={"temperature": config.temperature, "top_p": config.top_p, "max_tokens": config.max_tokens},
        replicas=config.data_parallel_size,
        devices_per_replica=config.devices_per_replica,
        is_coupled=config.enable_expert_parallel and config.data_parallel_size > 1,
        nnodes=config.nnodes,
        on_cpu=result.environment.device_kind == "cpu",
        cores=_cores(result),
        notes=notes,
    )


def _cores(result: Result) -> tuple[str, ...]:
    """As vLLM has them; none where a device is no list of cores, or there are more nodes than one."""
    cores = [device.cores or "" for device in result.environment.devices]
    return tuple(cores) if result.config.nnodes == 1 and all(map(_CORES.fullmatch, cores)) else ()


def _values(config: StoredConfig, engine: EngineInfo, point: Point) -> tuple[dict[str, Any], dict[str, str]]:
    """None is what vLLM decides."""
    # What vLLM made of it is what was measured; the share of a device on the CPU is its own number.
    asked_length = None if config.max_model_len == AUTO_LENGTH else config.max_model_len
    slots = engine.max_num_seqs or config.max_num_seqs or point.batch_size
    why = {
        "max_num_seqs": "requests at once, as at the best point",
        "max_model_len": "the longest prompt and output that were measured; raise it for longer requests",
    }
    budget = point.max_num_batched_tokens or config.largest_budget
    if budget is None and engine.max_num_batched_tokens:
        why["max_num_batched_tokens"] = "what vLLM's LLM class chose, as measured; its server may choose another value"
    if engine.language_model_only:
        why["language_model_only"] = "measured with text alone; remove this line for images, which then take memory"
    return {
        "model": _model(config),
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "distributed_executor_backend": _backend(config),
        "max_model_len": engine.max_model_len or asked_length,
        "max_num_seqs": min(point.batch_size, slots),
        "max_num_batched_tokens": budget or engine.max_num_batched_tokens,
        "dtype": engine.dtype or config.dtype,
        "gpu_memory_utilization": engine.gpu_memory_utilization or config.gpu_memory_utilization,
        "enforce_eager": config.enforce_eager or None,
        "trust_remote_code": config.trust_remote_code or None,
        "language_model_only": engine.language_model_only or None,
    }, why


def _model(config: StoredConfig) -> str:
    model = redact_value(config.model)
    if model.startswith("~"):  # which neither a shell nor vLLM reads in a file
        with contextlib.suppress(RuntimeError):  # a user that is not here
            return str(Path(model).expanduser())
    return model


def _backend(config: StoredConfig) -> str | None:
    if config.distributed_executor_backend != "external_launcher":
        return config.distributed_executor_backend
    return "mp" if config.devices_per_replica > 1 else None


def _keep_graphs(values: dict[str, Any], why: dict[str, str], engine: EngineInfo) -> None:
    """An engine captures graphs for up to twice the requests that it may run at once: one that is loaded for fewer has
    fewer, and was 6 to 12 % slower than the same point on the larger one."""
    if engine.enforce_eager or engine.cudagraph_mode in (None, "NONE"):
        return
    largest = max(engine.cudagraph_capture_sizes, default=0)
    if largest and values["max_num_seqs"] < (engine.max_num_seqs or 0):
        values["max_cudagraph_capture_size"] = largest
        why["max_cudagraph_capture_size"] = (
            f"the measured engine was loaded for {engine.max_num_seqs} requests at once, with CUDA graphs for these; "
            f"with graphs for {values['max_num_seqs']} alone it may be slower"
        )


def _notes(config: StoredConfig, engine: EngineInfo, *, is_dummy: bool, unknown: list[str]) -> Iterator[str]:
    if is_dummy:
        yield "It was measured with dummy weights (--load-format dummy); these files load the model's real weights."
    for name in placeholders([config.model, *config.engine_args]):
        yield f"{name} stands for a secret, which is never written to a file: put its value in that place."
    if unknown:
        yield f"Flags that are left out, because their full names are not known: {plain(listed(unknown))}."
    if "external_launcher" in (config.distributed_executor_backend, engine.executor):
        yield "It was measured under torchrun, with another model runner than these files have: measure without it too."
    if config.nnodes > 1:
        yield f"Each replica is spread over {config.nnodes} nodes: run.py, which is for one node, is left out."
