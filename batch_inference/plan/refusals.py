"""What an error of vLLM says about a setting: that vLLM refuses it on every machine, or only that nothing is known.

Only known obstacles count: the machine that plans may lack what the one that measures has.
"""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass

from batch_inference.core.text import plain, short_name

# Limits of the planning machine, and of a model without memory behind it.
_OF_THE_MACHINE = re.compile(
    r"meta tensor|meta device|\bCPU\b|\bCUDA\b|\bGPUs?\b|\bROCm\b|\bXPU\b|compute capability|[Bb]ackend|kernel|"
    r"[Tt]riton|torchvision|No module named|not installed|libcuda|connect|offline|huggingface\.co|world size",
)
# vLLM's rules for a model and its sizes, which hold on every machine (0.26 to 0.33).
_OF_THE_SETTING = re.compile(
    r"divisible|not aligned with the quantized weight|% *(self\.)?(tp_size|ep_size|tensor_parallel|world_size)|"
    r"attention heads|[Pp]ipeline parallel|PPMissingLayer|[Nn]um(ber of)? ?_?experts",
)
_OF_THE_LENGTH = re.compile(r"max_model_len .*is greater than the derived")
# pydantic's wrapper around vLLM's message.
_PYDANTIC = re.compile(r"(?:Value|Assertion) error, (.*?)(?:\[type=|$)", re.DOTALL)
_LONGEST = 300


@dataclass(frozen=True)
class Judged:
    """Exactly one of the two is set, in one line."""

    refusal: str | None = None
    unknown: str | None = None


def judged(error: BaseException) -> Judged:
    words = _words(error)
    if isinstance(error, (ValueError, AssertionError, NotImplementedError, AttributeError)):
        of_the_setting = _OF_THE_SETTING.search(words) and not _OF_THE_MACHINE.search(words)
        if of_the_setting or is_about_length(words):
            return Judged(refusal=_first_sentence(words))
    return Judged(unknown=_first_sentence(words))


def is_about_length(words: str | None) -> bool:
    return bool(_OF_THE_LENGTH.search(words or ""))


def may_pass(error: BaseException) -> bool:
    """Whether it may be gone next time: a package can be installed, a disk can come back. Without a system error
    number, an OSError means that a model's folder lacks something, and a name that a version lacks it."""
    text = str(error)
    if isinstance(error, OSError):
        return error.errno is not None
    if isinstance(error, ImportError):
        return not text.startswith("cannot import name")
    return isinstance(error, MemoryError) or "No module named" in text


def _words(error: BaseException) -> str:
    """vLLM's own message, in one line."""
    text = str(error).strip()
    if framed := _PYDANTIC.search(text):
        text = framed[1].strip()
    if not text:  # a bare assertion: use the asserted expression
        frames = traceback.extract_tb(error.__traceback__)
        text = (frames[-1].line if frames else None) or ""
    says_enough = framed or isinstance(error, (ValueError, AssertionError, NotImplementedError))
    name = "" if says_enough and text else f"{type(error).__name__}: "
    return " ".join(plain(f"{name}{text}").split())


def _first_sentence(words: str) -> str:
    """Later sentences are advice for other programs."""
    return short_name(words.split(". ")[0].removesuffix("."), _LONGEST)
