"""Finds misspelt vLLM flags before an engine loads: vLLM is asked once for its flags, and they are kept.

    python -m batch_inference.measure.vllm_flags      prints them as JSON; takes as long as importing vLLM

Python's own library is enough once they are kept, because plans check too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from batch_inference.core.config import ConfigError
from batch_inference.core.flags import unknown_flag_message, value_with_dash
from batch_inference.core.installed_vllm import keep, kept, kept_path, vllm_folder, vllm_version
from batch_inference.core.secrets import follows_secret

# Importing vLLM takes 10 to 20 s; much longer on a network disk, or if nothing is compiled yet.
ASK_TIMEOUT_S = 300.0


def check_vllm_flags(words: Iterable[str], say: Callable[[str], None]) -> None:
    """Raises ConfigError for a flag that vLLM does not know; checks nothing if vLLM is not installed. `words`:
    what will be passed on to vLLM."""
    words = list(words)
    flags = [(place, flag) for place, word in enumerate(words) if (flag := _flag_of(word))]
    package = vllm_folder() if flags else None
    if package is None:
        return
    known = _kept(cache_file(package)) or _asked(package, say)
    for place, flag in flags:
        if known and flag not in known:
            # The word after a flag that takes a secret may be that secret.
            before = follows_secret(words, place)
            raise value_with_dash(before) if before else ConfigError(unknown_flag_message(flag, known))


def _flag_of(word: str) -> str | None:
    """As vLLM reads it: --kv_transfer_config.kv_role=both sets a part of --kv-transfer-config. None for a value, and
    for a short flag, which vLLM's own parser looks at."""
    name = word.partition("=")[0].partition(".")[0].replace("_", "-")
    return name if name.startswith("--") and name != "--" else None


def cache_file(package: Path) -> Path:
    return kept_path(package, "flags.json")


def _kept(path: Path) -> list[str]:
    """Empty if none are kept, or if the file is not a list of flags."""
    flags = kept(path)
    usable = isinstance(flags, list) and all(isinstance(flag, str) and flag.startswith("--") for flag in flags)
    return flags if usable else []


def _asked(package: Path, say: Callable[[str], None]) -> list[str]:
    """vLLM's own answer; empty if it gives none, because then it checks its flags when it starts."""
    from batch_inference.core.child import ChildError, ask

    version = vllm_version()
    say(f"note: asking vLLM {version} once for its flags, to find misspelt ones; importing it takes several seconds")
    try:
        flags: list[str] = ask("measure.vllm_flags", timeout_s=ASK_TIMEOUT_S)
    except ChildError as error:
        say(f"note: vLLM could not be asked for its flags ({error}); it checks them when it starts")
        return []
    keep(flags, cache_file(package))
    return flags


if __name__ == "__main__":
    from batch_inference.measure.engine import known_flags

    print(json.dumps(known_flags()))
