"""The result to start from: a new one, or the one on disk, whose good points are kept."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from msgspec.structs import replace

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.result_file import check_writable, load_result
from batch_inference.core.results import (
    Environment,
    PointKey,
    Result,
    StoredConfig,
)
from batch_inference.measure.engine_process import log_paths


def starting_result(config: ExperimentConfig, environment: Environment) -> Result:
    """A new result, or with --resume the one on disk. Raises ConfigError where the file speaks against either."""
    fresh = Result(config.setting_name, "partial", StoredConfig.of(config), environment, points=[])
    path = config.output_path
    if config.output_conflict:
        raise ConfigError(config.output_conflict)
    if not path.exists() or config.overwrite:
        return fresh
    return _resumed(config, fresh, path)


def _resumed(config: ExperimentConfig, fresh: Result, path: Path) -> Result:
    old = load_result(path)
    if old.config.config_hash != fresh.config.config_hash:
        raise ConfigError(f"--resume: {path} was measured with other settings: {_differences(old, fresh)}")
    elsewhere = _measured_elsewhere(old.environment, fresh.environment)
    if elsewhere:
        raise ConfigError(f"--resume: {path} was measured elsewhere: {elsewhere}; give another --output-file")
    old.points = [point for point in old.points if point.status == "ok" and point.verdict != "invalid"]
    grid = {PointKey(*key, config.max_tokens) for key in config.points()}
    if grid <= {point.key for point in old.points}:
        return old
    fresh.points, fresh.engine, fresh.earlier_engines = old.points, old.engine, old.earlier_engines
    fresh.environment.resumed_from = [*old.environment.resumed_from, old.environment.started_at]
    return fresh


def set_aside_engine(result: Result) -> None:
    """Before another engine is kept: the points of an earlier sweep keep theirs, because the grid decides some of its
    sizes."""
    if result.engine is None:
        return
    measured = [point for point in result.points if point.engine is None]
    if measured:
        result.earlier_engines = [*result.earlier_engines, replace(result.engine, workers=[], replicas=[])]
    for point in measured:
        point.engine = len(result.earlier_engines) - 1


def _measured_elsewhere(old: Environment, now_here: Environment) -> str | None:
    """What makes points of two sweeps unlike: another vLLM, or other devices."""
    vllm = (old.versions.get("vllm"), now_here.versions.get("vllm"))
    devices = tuple(sorted({device.name for device in environment.devices}) for environment in (old, now_here))
    for name, (before, here) in (("vLLM", vllm), ("devices", devices)):
        if before != here:
            return f"{name} was {before}, now {here}"
    return None


def _differences(old: Result, fresh: Result) -> str:
    differing = [
        f"{name} was {getattr(old.config, name)!r}, now {getattr(fresh.config, name)!r}"
        for name in fresh.config.measured_settings()
        if getattr(old.config, name) != getattr(fresh.config, name)
    ]
    return "; ".join(differing) or "the file holds no comparable settings"


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
