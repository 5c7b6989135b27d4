"""Which packages the scripts need, and how to install what is missing; checked before anything loads."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from batch_inference.core.text import listed

_ENGINE, _TABLES, _DRAWING = ("vllm", "torch"), ("pandas",), ("matplotlib", "seaborn")
# Packages that come with vLLM and torch.
_BROUGHT = ("msgspec", "psutil", "tqdm")


def missing_to_measure() -> str | None:
    """What is not installed, and the command that installs it; None if nothing is missing."""
    gone = _missing([*_ENGINE, *_BROUGHT])
    if "vllm" not in gone:
        return _in_words(gone, gone)
    gone = [name for name in gone if name in _ENGINE]
    return _in_words(gone, [*_ENGINE, *_TABLES, *_DRAWING], "; without a GPU: ./setup_env.sh")


def missing_to_analyse(*, plots: bool) -> str | None:
    """The same for the analysis. Without vLLM, which brings msgspec, that may be missing too."""
    gone = _missing(["msgspec", *_TABLES, *(_DRAWING if plots else ())])
    return _in_words(gone, dict.fromkeys([*_TABLES, *_DRAWING, *gone]))


def _missing(names: Iterable[str]) -> list[str]:
    return [name for name in names if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    """Without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _in_words(gone: list[str], to_install: Iterable[str], otherwise: str = "") -> str | None:
    if not gone:
        return None
    verb = "is" if len(gone) == 1 else "are"
    return f"{listed(gone)} {verb} not installed: pip install {' '.join(to_install)}{otherwise}"
