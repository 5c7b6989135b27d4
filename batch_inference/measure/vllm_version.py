"""For a vLLM outside the tested versions: which of the names that we use it lacks, said before an engine loads.

It is asked once, in its own process (`vllm_names`), and the answer is kept. Tested versions cost nothing. Needs only
Python's own library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from batch_inference.core.config import ConfigError
from batch_inference.core.installed_vllm import keep, kept, kept_path, release_of, vllm_folder, vllm_version
from batch_inference.core.text import listed
from batch_inference.measure.vllm_flags import ASK_TIMEOUT_S

FIRST, LAST = (0, 26), (0, 33)
# If a module is gone, so are all its names: more than these need not be shown.
_MOST_SHOWN = 8


def check_vllm_version(say: Callable[[str], None]) -> str | None:
    """A warning about an untested version. Raises ConfigError if an engine could not load with it."""
    version = vllm_version()
    release = release_of(version)
    if release is None or FIRST <= release <= LAST or (package := vllm_folder()) is None:
        return None
    found = _missing(package, version, say)
    tried = f"{_words(FIRST)} to {_words(LAST)}"
    if isinstance(found, str):
        return f"vLLM {version} is outside {tried}, and could not be asked which names it lacks ({found})"
    if found["needed"]:
        raise ConfigError(f"vLLM {version} lacks {_shown(found['needed'])}, which an engine needs; install {tried}")
    lacks = f"lacks {_shown(found['others'])}" if found["others"] else "lacks no name that is used here"
    return f"vLLM {version} is outside {tried}; it {lacks}"


def _words(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))


def _shown(names: list[str]) -> str:
    more = len(names) - _MOST_SHOWN
    return listed(names[:_MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _missing(package: Path, version: str, say: Callable[[str], None]) -> dict[str, list[str]] | str:
    """The answer of the process, once for each installation; or why there is none."""
    from batch_inference.core.child import ChildError, ask

    path = _answer_path(package)
    if _is_answer(answer := kept(path)):
        return answer  # type: ignore[no-any-return]
    say(f"note: checking vLLM {version} once, which was not tested; importing it takes several seconds")
    try:
        answer = ask("measure.vllm_names", timeout_s=ASK_TIMEOUT_S)
    except ChildError as error:
        return str(error)
    keep(answer, path)
    return answer  # type: ignore[no-any-return]


def _answer_path(package: Path) -> Path:
    """One for each installation and question: another version of our code uses other names."""
    asked = b"".join(Path(__file__).with_name(name).read_bytes() for name in ("vllm_names.py", "engine.py"))
    return kept_path(package, f"names_{hashlib.sha256(asked).hexdigest()[:12]}.json")


def _is_answer(value: Any) -> bool:
    """Whether it is an answer: a file may hold anything."""
    return (
        isinstance(value, dict)
        and set(value) == {"needed", "others"}
        and all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in value.values())
    )
