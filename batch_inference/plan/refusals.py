"""What an error of vLLM's says of a setting: that vLLM refuses it wherever it runs, or only that nothing is known.

Nothing is an obstacle that is not known for one: the machine that plans may lack what the one that measures has.
"""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass

from batch_inference.core.text import plain, short_name

# Limits of the machine that plans, and of a model without memory behind it.
_OF_THE_MACHINE = re.compile(
    r"meta tensor|meta device|\bCPU\b|\bCUDA\b|\bGPUs?\b|\bROCm\b|\bXPU\b|compute capability|[Bb]ackend|kernel|"
    r"[Tt]riton|torchvision|No module named|not installed|libcuda|connect|offline|huggingface\.co|world size",
)
# Rules of vLLM's that hold for a model and its sizes, on every machine (0.26 to 0.33).
_OF_THE_SETTING = re.compile(
    r"divisible|not aligned with the quantized weight|% *(self\.)?(tp_size|ep_size|tensor_parallel|world_size)|"
    r"attention heads|[Pp]ipeline parallel|PPMissingLayer|[Nn]um(ber of)? ?_?experts",
)
_OF_THE_LENGTH = re.compile(r"max_model_len .*is greater than the derived")
# pydantic's frame around vLLM's words.
_PYDANTIC = re.compile(r"(?:Value|Assertion) error, (.*?)(?:\[type=|$)", re.DOTALL)
_LONGEST = 300


@dataclass(frozen=True)
class Judged:
    """One of the two is there, in one line."""

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
    """Whether it may be gone the next time: a package can be installed, a disk can come back. Without a number of the
    system's, an OSError is of what a model's folder lacks, and a name is what a version lacks."""
    text = str(error)
    if isinstance(error, OSError):
        return error.errno is not None
    if isinstance(error, ImportError):
        return not text.startswith("cannot import name")
    return isinstance(error, MemoryError) or "No module named" in text


def _words(error: BaseException) -> str:
    """vLLM's own, in one line."""
    text = str(error).strip()
    if framed := _PYDANTIC.search(text):
        text = framed[1].strip()
    if not text:  # a bare assertion: what was asserted says it
        frames = traceback.extract_tb(error.__traceback__)
        text = (frames[-1].line if frames else None) or ""
    says_enough = framed or isinstance(error, (ValueError, AssertionError, NotImplementedError))
    name = "" if says_enough and text else f"{type(error).__name__}: "
    return " ".join(plain(f"{name}{text}").split())


def _first_sentence(words: str) -> str:
    """The next ones are advice for other programs."""
    return short_name(words.split(". ")[0].removesuffix("."), _LONGEST)
