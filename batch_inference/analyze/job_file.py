"""Another job, as a file of lengths: what is forecast for it needs no text and no tokenizer."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np

from batch_inference.analyze.flags import UsageError
from batch_inference.core.config import ConfigError
from batch_inference.core.forecast import JobLengths
from batch_inference.core.workload import Workload


def lengths_in(path: Path) -> JobLengths:
    """Raises UsageError for a file that does not say the lengths of its requests."""
    prompts, outputs = array("I"), array("I")
    try:
        for number, entry in enumerate(Workload(path, flag="--job").entries(), 1):
            prompt = entry.prompt_tokens or len(entry.prompt_token_ids or ())
            if not prompt or not entry.output_tokens:
                missing = "prompt" if not prompt else "output"
                raise UsageError(
                    f"--job {path}, request {number}: its {missing} has no length; give the lengths, in lines like "
                    '{"prompt_tokens": 812, "output_tokens": 96}'
                )
            prompts.append(prompt)
            outputs.append(entry.output_tokens)
    except ConfigError as error:
        raise UsageError(str(error)) from error
    return JobLengths(np.array(prompts, dtype=np.int64), np.array(outputs, dtype=np.int64))
