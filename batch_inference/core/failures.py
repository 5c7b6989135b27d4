"""Why an engine was lost or never started: one class for each of vLLM's messages, with one line on what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from batch_inference.core.errors import CleanError

Phase = Literal["load", "run"]


class WorkFailedError(CleanError):
    """Work that failed, with nothing wrong in how the program was used: the message is what the user reads."""

    HAS_LINES = True


@dataclass(frozen=True)
class FailureClass:
    """`pattern`: what vLLM 0.26 to 0.33, torch or the model hub say; None if the supervisor itself knows.
    `phase`: None for both."""

    name: str
    pattern: str | None
    advice: str
    phase: Phase | None = None


_SEE_LOG = "see the end of the log"
# The first match counts, so causes come before their consequences.
FAILURES: tuple[FailureClass, ...] = (
    FailureClass("timeout_startup", None, "raise --startup-timeout, or see in the log where the start hangs"),
    FailureClass("timeout_point", None, "raise --point-timeout, or see in the log where the run hangs"),
    FailureClass("model_gated", r"GatedRepoError|gated repo|401 Client Error|403 Client Error|is restricted",
                 "ask for access on the model's page, and set HF_TOKEN"),
    FailureClass("network_offline", r"OfflineModeIsEnabled|LocalEntryNotFoundError|couldn't connect to|Max retries"
                 r"|name resolution|Name or service not known|Network is unreachable|outgoing traffic has been dis",
                 "give a model folder as --model, or connect to the hub"),
    FailureClass("model_not_found", r"RepositoryNotFoundError|not a valid model identifier|404 Client Error"
                 r"|Invalid repository ID or local directory|Repo id must|does not appear to have a file named config",
                 "check --model: a folder with a config.json, or org/name of the hub"),
    FailureClass("tp_not_dividing", r"must be divisible by tensor parallel size|is not divisible by \d"
                 r"|not divisible by tensor",
                 "choose a --tensor-parallel-size that divides the model's heads and sizes"),
    FailureClass("too_few_devices", r"larger than the number of available GPUs|exceeds the total number of available"
                 r"|invalid device ordinal|No CUDA GPUs are available",
                 "lower TP x PP x DP, or free devices; CUDA_VISIBLE_DEVICES may hide some"),
    FailureClass("max_model_len", r"greater than the derived max_model_len|longer than the maximum model length"
                 r"|exceeds? (?:the )?max_model_len", "shorten --seq-lens or --max-tokens, or lower --max-model-len"),
    FailureClass("kv_too_small", r"No available memory for the cache blocks|larger than the available KV cache",
                 "shorten --seq-lens, raise --gpu-memory-utilization or TP"),
    FailureClass("oom_load", r"out of memory|OutOfMemoryError|can't allocate memory|Cannot allocate memory"
                 r"|Free memory on device", "raise TP or PP, or free the device: another process may hold it", "load"),
    FailureClass("oom_run", r"out of memory|OutOfMemoryError|can't allocate memory|Cannot allocate memory",
                 "use smaller --batch-sizes or --seq-lens, or a lower --gpu-memory-utilization", "run"),
    FailureClass("port_in_use", r"Address already in use|EADDRINUSE",
                 "another engine uses the port: set VLLM_PORT or --master-port"),
    FailureClass("worker_killed", r"exit code: -9\b|signal SIGKILL",
                 "usually the machine ran out of main memory: see dmesg, and free some"),
    FailureClass("engine_crash", r"EngineDeadError|died unexpectedly|ended without a word|the engine process ended"
                 r"|node \d+ is gone|Segmentation fault", _SEE_LOG),
    FailureClass("unknown", "", _SEE_LOG),
)  # fmt: skip
# A problem with the model, or with reaching it, affects every setting.
SAME_FOR_ALL = frozenset({"model_gated", "network_offline", "model_not_found"})
ADVICE = {failure.name: failure.advice for failure in FAILURES}


def classify(phase: Phase, reason: str, log_tail: Sequence[str] = ()) -> str:
    """The name of a failure's class: by its reason or, if that says nothing, by the end of the log."""
    # The log from its end, and only errors: the engine survived what it warned about.
    errors = [line for line in reversed(log_tail) if re.search(r"ERROR|Error\b|Exception\b", line)]
    for text in (reason, *errors):
        for failure in FAILURES:
            if failure.pattern and failure.phase in (None, phase) and re.search(failure.pattern, text):
                return failure.name
    return "unknown"


def markdown_table() -> str:
    """The table of docs/troubleshooting.md."""
    rows = [f"| `{failure.name}` | {failure.advice} |" for failure in FAILURES]
    return "\n".join(["| class | what to do |", "|---|---|", *rows])


if __name__ == "__main__":
    print(markdown_table())
