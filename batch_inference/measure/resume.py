"""The result to start from: a new one, or the one on disk, whose good points are kept."""

from __future__ import annotations

from msgspec.structs import replace

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.metrics import run_latencies_s
from batch_inference.core.result_file import load_result
from batch_inference.core.results import Environment, Job, Point, Result, StoredConfig
from batch_inference.core.statistics import is_narrow
from batch_inference.core.verdict import was_packed


def starting_result(config: ExperimentConfig, environment: Environment) -> Result:
    """A new result, with what is already in the file of `config`, whose settings are the same. Raises
    ResultFileError for a file that cannot be read."""
    fresh = Result(config.setting_name, "partial", StoredConfig.of(config), environment, points=[])
    if config.overwrite or not config.output_path.exists():
        return fresh
    old = load_result(config.output_path)
    fresh.points = [point for point in old.points if point.status == "ok" and point.verdict != "invalid"]
    for point in fresh.points:
        if old.is_adaptive(point) != fresh.is_adaptive(point):
            point.is_adaptive = old.is_adaptive(point)
    fresh.engine, fresh.earlier_engines, fresh.jobs = old.engine, old.earlier_engines, old.jobs
    fresh.answers = old.answers
    if fresh.points:
        environment.resumed_from = [*old.environment.resumed_from, old.environment.started_at]
        used = [*old.environment.used_by_others, *environment.used_by_others]
        environment.used_by_others = list(dict.fromkeys(used))
    return fresh


def is_enough(point: Point, config: ExperimentConfig, requests: int | None = None) -> bool:
    """Whether a point that was measured before already meets what is asked now; `requests`: for a queue."""
    return is_warm(point, config) and has_runs_enough(point, config, requests)


def is_warm(point: Point, config: ExperimentConfig) -> bool:
    """Whether its runs count, however few they are."""
    return len(point.warmups) >= config.warmup_runs and (config.packed or not was_packed(point))


def has_runs_enough(point: Point, config: ExperimentConfig, requests: int | None = None) -> bool:
    """Either exactly --num-runs, or as many as --target-ci needs. A single run of a queue has an interval, so one is
    enough if it has as many `requests` as asked."""
    if requests is not None:
        long_enough = [run for run in point.runs if len(run.requests.output_tokens) >= requests]
        return len(long_enough) >= (config.num_runs or 1)
    if len(point.runs) < config.fewest_runs or config.num_runs is not None:
        return len(point.runs) >= config.fewest_runs
    return len(point.runs) >= config.max_runs or is_narrow(run_latencies_s(point), config.target_ci)


def keep_job(result: Result, job: Job) -> None:
    """Keep it beside the jobs of earlier sweeps whose points are still there."""
    used = {point.workload.job for point in result.points if point.workload}
    result.jobs = [*(one for one in result.jobs if one.key != job.key and one.key in used), job]


def set_aside_engine(result: Result) -> None:
    """Call before another engine is kept: points of an earlier sweep keep theirs, because the grid decides some of an
    engine's sizes."""
    if result.engine is None:
        return
    measured = [point for point in result.points if point.engine is None]
    if measured:
        result.earlier_engines = [*result.earlier_engines, replace(result.engine, workers=[], replicas=[])]
    for point in measured:
        point.engine = len(result.earlier_engines) - 1
