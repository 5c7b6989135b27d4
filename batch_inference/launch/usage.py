"""The text of --help."""

from __future__ import annotations

from collections.abc import Iterable

from batch_inference.launch.options import options_help
from batch_inference.launch.presets import Preset

_HEAD = """\
usage: ./run_batch_experiments.sh [options] PRESET [options] [-- flags]

Run the settings of a preset, one process and one result file each.
"""

_END = """\
  -- flags              everything after -- goes to the experiment script

examples:
  ./run_batch_experiments.sh quickstart
  ./run_batch_experiments.sh tensor-parallel --model meta-llama/Llama-3.1-8B
  ./run_batch_experiments.sh custom TP=2 PP=2 --batch-sizes 1,16 -- --num-runs 5

exit codes: 0 every setting ok; 1 some failed, or none could run; 2 wrong use;
129, 130, 143 interrupted. A setting that cannot run here (devices, heads,
layers) is skipped. PYTHON=/path/to/python chooses the Python that has vLLM."""


def usage(presets: Iterable[Preset]) -> str:
    names = [f"  {preset.name:<25} {preset.comment}" for preset in presets]
    return "\n".join([_HEAD, "presets:", *names, "", "options, before or after the preset:", *options_help(), _END])
