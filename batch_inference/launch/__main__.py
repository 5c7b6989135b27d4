"""What run_batch_experiments.sh starts, with its table of presets: measure the settings of one of them.

    python -P -m batch_inference.launch TABLE PYTHON PREFIX WORDS..

TABLE: a line per word of the presets, quoted for a shell. PYTHON: what measures. PREFIX: what stands before the names
of our own files in commands. WORDS: the user's.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from batch_inference.core.config import ConfigError
from batch_inference.core.packages import missing_to_analyse, missing_to_measure
from batch_inference.launch.console import Outcomes, say, say_how_to_analyse, say_outcomes, show
from batch_inference.launch.jobs import ANALYSIS, Here, check_together, folder_of, jobs_of
from batch_inference.launch.options import Options, parse_options
from batch_inference.launch.overview import PlannedJob, check_files, plan, planned, uncompared
from batch_inference.launch.presets import Preset, find_preset, read_table, settings_of
from batch_inference.launch.processes import Processes
from batch_inference.launch.running import run_jobs
from batch_inference.launch.usage import usage
from batch_inference.plan.devices import find_devices


def main(argv: Sequence[str]) -> int:
    table, python, prefix, *words = argv
    here = Here(python, prefix)
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
            devices = find_devices()
            settings, left_out = settings_of(preset, options, len(devices))
            jobs = [planned(job, options.nnodes, devices) for job in jobs_of(settings, preset, options, here)]
            if options.dry_run:
                return show("\n".join(plan(jobs, left_out, options.nnodes, devices)))
            if options.node_rank == 0:
                check_files(jobs)
            install_where_needed(jobs, here, argv, processes)
            check_packages(jobs, preset)
            for line in [*left_out, *uncompared(jobs)]:
                say(f"note: {line}")
            return close(run_jobs(jobs, options, devices, processes), preset, options, here, processes)
        except ConfigError as error:
            say(f"error: {error}")
            return 2


def install_where_needed(jobs: Sequence[PlannedJob], here: Here, argv: Sequence[str], processes: Processes) -> None:
    """Where neither the user nor .venv has a Python, and the one at hand has no vLLM: makes .venv, and starts again."""
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
    """Raises ConfigError where something is not installed that measures, or that analyses a demo in the end."""
    if all(one.reason for one in jobs):
        return
    if missing := missing_to_measure() or (missing_to_analyse(plots=True) if preset.is_demo else None):
        raise ConfigError(missing)


def close(outcomes: Outcomes, preset: Preset, options: Options, here: Here, processes: Processes) -> int:
    """The closing report, and the exit code."""
    say_outcomes(outcomes)
    if outcomes.none_ran:
        say(f"error: no setting of {preset.name} can run on this machine")
        return 1
    folder = folder_of(preset, options)
    if options.node_rank > 0:
        say("the results are on node 0")
    elif not preset.is_demo:
        say_how_to_analyse(here, folder)
    elif outcomes.done:
        say()
        # Its exit code 2 would say that the preset was used wrongly.
        if processes.run([here.python, here.path(ANALYSIS), "--input", folder]):
            return 1
    return 1 if outcomes.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
