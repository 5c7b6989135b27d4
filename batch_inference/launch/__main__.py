"""What run_batch_experiments.sh starts, with its table of presets: measures the settings of one preset.

    python -P -m batch_inference.launch TABLE PYTHON PREFIX WORDS..

TABLE: a line per word of the presets, quoted for a shell. PYTHON: what measures. PREFIX: what precedes the names
of our own files in commands. WORDS: the user's.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from batch_inference.core.config import MEETING_SECRET, ConfigError, ExperimentConfig
from batch_inference.core.failures import WorkFailedError
from batch_inference.core.packages import missing_to_analyse, missing_to_measure
from batch_inference.core.secrets import remember
from batch_inference.core.streams import say, say_notes, secure_streams, show
from batch_inference.launch.best import (
    Best,
    as_search,
    check_budgets,
    check_search,
    report,
    settings_to_search,
    what_best_saves,
)
from batch_inference.launch.console import Outcomes, say_how_to_analyse, say_outcomes
from batch_inference.launch.jobs import ANALYSIS, Here, Job, check_together, folder_of, job_of, jobs_of, nodes_in_words
from batch_inference.launch.options import Options, parse_options
from batch_inference.launch.overview import PlannedJob, plan, plan_as_json, planned, uncompared
from batch_inference.launch.presets import Preset, Setting, find_preset, has_n, read_table, settings_of
from batch_inference.launch.processes import Processes
from batch_inference.launch.running import run_jobs
from batch_inference.launch.spread import NodeDevices, alike
from batch_inference.launch.stored import is_anything_measured, open_points
from batch_inference.launch.usage import usage
from batch_inference.measure.hub import fetch_models
from batch_inference.measure.vllm_flags import check_vllm_flags
from batch_inference.measure.vllm_version import check_vllm_version
from batch_inference.plan.devices import Devices, devices_elsewhere, find_devices
from batch_inference.plan.model import facts_of
from batch_inference.plan.model_place import check_weights


def main(argv: Sequence[str]) -> int:
    secure_streams()
    table, python, prefix, *words = argv
    here = Here(python, prefix)
    remember(words, os.environ)
    with Processes() as processes:
        try:
            presets = read_table(table)
            options = parse_options(words)
            if options.help:
                return show(usage(presets.values()))
            if options.preset is None:
                say(usage(presets.values()))
                return 2
            preset = find_preset(presets, options.preset)
            check_together(preset, options)
            return work(preset, options, here, argv, processes)
        except ConfigError as error:
            say(f"error: {error}")
            return 2
        except WorkFailedError as error:
            say(f"error: {error}")
            return 1


def work(preset: Preset, options: Options, here: Here, argv: Sequence[str], processes: Processes) -> int:
    devices = devices_elsewhere(options.devices) if options.devices and options.dry_run else find_devices()
    if preset.is_search and options.devices and options.devices < len(devices):
        devices = devices.slice_for(0, options.devices)
    nodes = alike(len(devices), options.nnodes if options.is_over_nodes else 1)
    jobs, left_out = plan_jobs(preset, options, here, devices, nodes)
    check_vllm_flags((word for one in jobs for word in one.config.engine_args), say)
    # A flag that is misspelt may be --load-format.
    for one in jobs:
        check_weights(one.config)
    if options.dry_run:
        return show_plan(jobs, left_out, options, devices)
    install_where_needed(jobs, here, argv, processes)
    check_packages(jobs, preset)
    if options.is_over_nodes:
        keep_secret(options)
    # On every node, before they meet, because it may take long.
    fetch_models(to_be_fetched(jobs), say)
    if options.is_over_nodes:
        return work_over_nodes(preset, options, here, devices, processes)
    if preset.is_search:
        return find_best(Best(preset, options, here, devices, processes), jobs)
    say_notes([*left_out, *uncompared(jobs)])
    return close(run_jobs(jobs, options, devices, processes), preset, options, here, processes)


def work_over_nodes(preset: Preset, options: Options, here: Here, devices: Devices, processes: Processes) -> int:
    # These need installed packages; the plan works without them.
    from batch_inference.launch.meeting import introduction, meet
    from batch_inference.launch.together import Follower, Leader

    def job(setting: Setting, port: int, rank: int) -> Job:
        return job_of(setting, port, rank, preset, options, here)

    met = meet(options, introduction(preset, options, devices))
    if met.node > 0:
        return Follower(met, job, processes).serve()
    with Leader(met, len(devices), options.nnodes, processes) as leader:
        jobs, left_out = plan_jobs(preset, options, here, devices, leader.devices)
        say_notes([*left_out, *uncompared(jobs)])
        code = close(run_jobs(jobs, options, devices, processes, leader), preset, options, here, processes)
        leader.code = 1 if leader.problem else code
        return leader.code


def keep_secret(options: Options) -> None:
    """Keep it where the meeting finds it, and so do the settings' own processes. Raises ConfigError."""
    from batch_inference.measure.greeting import secret_of_nodes

    if options.meeting_secret:
        os.environ[MEETING_SECRET] = options.meeting_secret
    secret_of_nodes()


def plan_jobs(
    preset: Preset, options: Options, here: Here, devices: Devices, nodes: NodeDevices
) -> tuple[list[PlannedJob], list[str]]:
    """The settings, and a line for each that is left out or may change. Raises ConfigError."""
    if preset.is_search:
        return plan_search(preset, options, here, devices), []
    settings, left_out = settings_of(preset, options, nodes.total, nodes.spread)
    if not nodes.are_all and has_n(preset, options):
        left_out.append(
            f"N is {nodes.total} in this plan, the devices of one node; in a run it counts all nodes that come, and "
            "--nnodes sets their number"
        )
    jobs = planned(jobs_of(settings, preset, options, here), devices, say, only_in_doubt=not options.dry_run)
    if options.is_over_nodes:
        jobs = [replace(one, reason=nodes.obstacle(one.job.setting) or one.reason) for one in jobs]
    return jobs, left_out


def plan_search(preset: Preset, options: Options, here: Here, devices: Devices) -> list[PlannedJob]:
    """Every setting that may be loaded. Raises ConfigError."""
    check_search(options, devices)
    options = as_search(options)
    one = job_of(Setting(1, 1, 1), 0, 0, preset, options, here)
    check_budgets(one.config)
    facts = facts_of(one.config)
    settings = settings_to_search(options, len(devices), has_experts=facts is not None and facts.is_moe)
    return planned(jobs_of(settings, preset, options, here), devices, say, only_in_doubt=not options.dry_run)


def find_best(best: Best, jobs: Sequence[PlannedJob]) -> int:
    """Returns the exit code: 1 if nothing is found, or if a loaded setting failed."""
    if all(one.reason for one in jobs):
        for one in jobs:
            say(f"{one.job.name} skipped: {one.reason}")
        return none_can_run(best.preset)
    best.run(jobs)
    say_how_to_analyse(best.here, folder_of(best.preset, best.options), best.flags_of_analysis)
    written = best.write_to_use()
    of_one = f", for prompts of {best.length_to_use} tokens" if len(best.search.races) > 1 else ""
    shown = show("\n".join([*report(best), *([f"to use{of_one}: {written}"] if written else [])]))
    return shown if best.is_answered and not best.failed else 1


def show_plan(jobs: Sequence[PlannedJob], left_out: Sequence[str], options: Options, devices: Devices) -> int:
    """A plan to read and paste from, or for scripts with --json; returns the exit code."""
    if not options.json:
        return show("\n".join(plan(jobs, left_out, nodes_in_words(options), devices)))
    say_notes(left_out)
    return show(plan_as_json(jobs, devices))


def to_be_fetched(jobs: Sequence[PlannedJob]) -> list[ExperimentConfig]:
    """The settings to be measured, if several engines load the model: one after another, or side by side."""
    configs = [one.config for one in jobs if one.reason is None and open_points(one.config)]
    return configs if len(configs) > 1 or any(config.data_parallel_size > 1 for config in configs) else []


def install_where_needed(jobs: Sequence[PlannedJob], here: Here, argv: Sequence[str], processes: Processes) -> None:
    """If neither the user nor .venv provides a Python, and the current one has no vLLM: make .venv, and start again."""
    chosen = os.environ.get("PYTHON") or here.python != "python3"
    if chosen or all(one.reason for one in jobs) or importlib.util.find_spec("vllm"):
        return
    checkout = Path(__file__).resolve().parents[2]
    code = processes.run([str(checkout / "setup_env.sh")])
    if code:
        raise SystemExit(code)
    python = here.path(".venv/bin/python")
    os.execv(python, [python, "-P", "-m", "batch_inference.launch", argv[0], python, *argv[2:]])


def check_packages(jobs: Sequence[PlannedJob], preset: Preset) -> None:
    """Raises ConfigError if a package for measuring is missing, or one for a demo's final analysis, and for a
    vLLM that cannot load our engines."""
    if all(one.reason for one in jobs):
        return
    if missing := missing_to_measure() or (missing_to_analyse(plots=True) if preset.is_demo else None):
        raise ConfigError(missing)
    check_vllm_version(say)  # each setting gives the warning itself


def none_can_run(preset: Preset) -> int:
    say(f"error: no setting of {preset.name} can run on this machine")
    return 1


def close(outcomes: Outcomes, preset: Preset, options: Options, here: Here, processes: Processes) -> int:
    """The closing report, and the exit code."""
    say_outcomes(outcomes)
    if outcomes.none_ran:
        return none_can_run(preset)
    folder = folder_of(preset, options)
    if saved := what_best_saves(outcomes.done):
        say(saved)
    if not preset.is_demo:
        if outcomes.done or is_anything_measured(Path(folder)):
            say_how_to_analyse(here, folder)
    elif outcomes.done:
        say()
        # Its exit code 2 would mean that the preset was used wrongly.
        if processes.run([here.python, here.path(ANALYSIS), "--input", folder]):
            return 1
    return 1 if outcomes.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
