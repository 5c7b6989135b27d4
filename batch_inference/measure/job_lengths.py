"""How long the requests of a workload are. The file is read once, before anything is planned or loaded.

Python's own library alone, because a plan looks too.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.flags import check_longest
from batch_inference.core.text import counted
from batch_inference.core.values import FROM_FILE, OWN_END
from batch_inference.core.workload import Workload
from batch_inference.measure.texts import lengths_of

# Smallest sample, in requests per request that runs at once: with fewer, nothing is left between its two ends.
FEWEST_LIVES = 2


class SampleTooSmallError(ConfigError):
    """For one setting: another, with fewer replicas, may do with as few requests. `config` has the longest request."""

    def __init__(self, message: str, config: ExperimentConfig) -> None:
        super().__init__(message)
        self.config = config


@dataclass(frozen=True)
class JobLengths:
    """For each request, in the order of the file; for the output, the most that it takes."""

    workload: Workload
    prompt_tokens: Sequence[int]
    output_tokens: Sequence[int]
    left_out: str | None  # what was left out, and how much


def read_job(config: ExperimentConfig, say: Callable[[str], None]) -> tuple[ExperimentConfig, JobLengths]:
    """The configuration with the longest request filled in. Raises ConfigError for a file that is not a job, or not
    the one asked for."""
    assert config.prompts_file is not None
    workload = Workload(Path(config.prompts_file), config.skip_bad_lines)
    found = lengths_of(workload, config, say)
    outputs = _output_lengths(found.output_tokens, config)
    longest = max(map(sum, zip(found.prompt_tokens, outputs, strict=True)))
    config = dataclasses.replace(config, workload_longest=longest, workload_hash=found.content_hash)
    check_longest(config)
    _check_sample(config, len(outputs))
    return config, JobLengths(workload, found.prompt_tokens, outputs, workload.told())


def _output_lengths(said: Sequence[int], config: ExperimentConfig) -> Sequence[int]:
    """The most for each request; raises ConfigError if they should come from the file, and it does not say them."""
    asked = config.output_lengths
    if asked == FROM_FILE:
        if missing := sum(not tokens for tokens in said):
            first = next(number for number, tokens in enumerate(said, 1) if not tokens)
            raise ConfigError(
                f"--prompts-file {config.prompts_file}: {counted(missing, 'request')} of {len(said)} "
                f"{'has' if missing == 1 else 'have'} no output length (first: request {first}); give --output-lengths "
                f"N, or {OWN_END}"
            )
        return said
    return array("I", [config.max_tokens if asked == OWN_END else int(asked)]) * len(said)


def _check_sample(config: ExperimentConfig, requests: int) -> None:
    """Raises ConfigError for a sample that does not fit a job of `requests` requests."""
    sample = config.sample
    if sample is None:
        return
    if sample > requests:
        raise ConfigError(
            f"--sample {sample}: {config.prompts_file} has {counted(requests, 'request')}; lower it, or drop it to run "
            "as many as are needed"
        )
    largest, replicas = config.least_batch, config.data_parallel_size
    if sample < min(requests, FEWEST_LIVES * largest * replicas):
        raise SampleTooSmallError(
            f"--sample {sample}: with {largest} at once on {counted(replicas, 'replica')} there is no plateau below "
            f"{FEWEST_LIVES * largest * replicas}; raise it, or lower --batch-sizes",
            config,
        )
