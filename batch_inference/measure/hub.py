"""Downloads a model from the hub, once for all replicas and settings of a node, before an engine starts.

    python -m batch_inference.measure.hub look|fetch REQUEST      in its own process; REQUEST: a _Request as JSON

The files are those that vLLM's loader takes (0.26 to 0.33). vLLM itself fetches anything else it wants.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.failures import ADVICE, SAME_FOR_ALL, WorkFailedError, classify
from batch_inference.core.text import plain
from batch_inference.plan.devices import GIB
from batch_inference.plan.model_place import WEIGHT_FILES, is_on_hub

_YES = ("1", "ON", "YES", "TRUE")
LOOK_TIMEOUT_S, FETCH_TIMEOUT_S = 60.0, 7 * 86_400.0


@dataclass(frozen=True)
class _Request:
    """What to fetch, and where to; None is the hub's own default."""

    model: str
    load_format: str
    revision: str | None
    folder: str | None
    files: tuple[str, ...] = ()  # what a look found to be needed


@dataclass(frozen=True)
class _Answer:
    """That process's answer: what a look found, or why it failed."""

    missing_bytes: int = 0
    folder: str = ""  # where they go
    files: tuple[str, ...] = ()  # all needed files
    problem: str | None = None
    is_here: bool = False  # if there is a problem: whether some version of the model is on this machine


def fetch_models(configs: Sequence[ExperimentConfig], say: Callable[[str], None]) -> None:
    """Fetches what is on the hub and not on this machine. Raises WorkFailedError if the model is unavailable, or
    the disk too small."""
    for request, token in {request: config.engine_word("--hf-token") for config in configs
                           if (request := _request(config))}.items():  # fmt: skip
        _fetch(request, {"HF_TOKEN": token} if token else {}, say)


def _request(config: ExperimentConfig) -> _Request | None:
    """None for a model that is not fetched from the hub, or not now."""
    offline = any(os.environ.get(name, "").upper() in _YES for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    elsewhere = os.environ.get("VLLM_USE_MODELSCOPE", "").upper() in _YES
    load_format = config.engine_word("--load-format") or "auto"
    # ORG/NAME:QUANTIZATION is one file of many.
    if offline or elsewhere or load_format not in WEIGHT_FILES or not is_on_hub(config.model):
        return None
    return _Request(config.model, load_format, config.engine_word("--revision"), config.engine_word("--download-dir"))


def _fetch(request: _Request, environment: dict[str, str], say: Callable[[str], None]) -> None:
    found = _ask("look", request, environment, LOOK_TIMEOUT_S)
    if problem := found.problem:
        kind = classify("load", problem)
        if kind in SAME_FOR_ALL - {"network_offline"} and not found.is_here:
            raise WorkFailedError(f"--model {request.model}: {problem}; {kind}: {ADVICE[kind]}")
        # vLLM may find everything it needs on this machine.
        say(f"note: the hub could not be asked for {request.model} ({problem}); vLLM will try itself")
        return
    needed, folder = found.missing_bytes, Path(found.folder)
    if not needed:
        return
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if needed > free:
        raise WorkFailedError(
            f"--model {request.model}: {_gib(needed)} must be downloaded into {folder}, where {_gib(free)} are free; "
            "free disk space, or choose another folder (HF_HOME, or vLLM's --download-dir)"
        )
    say(f"{request.model}: downloading {_gib(needed)} into {folder}, once for all replicas and settings of this node")
    request = dataclasses.replace(request, files=tuple(found.files))
    if problem := _ask("fetch", request, environment, FETCH_TIMEOUT_S).problem:
        raise WorkFailedError(f"--model {request.model}: {problem}; {ADVICE[classify('load', problem)]}")


def _ask(what: str, request: _Request, environment: dict[str, str], timeout_s: float) -> _Answer:
    from batch_inference.core.child import ChildError, ask

    words = (what, json.dumps(dataclasses.asdict(request)))
    try:
        return _Answer(**ask("measure.hub", *words, timeout_s=timeout_s, environment=environment))
    except ChildError as error:
        return _Answer(problem=str(error))


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB"


# --- in the separate process ------------------------------------------------------------------------------------------


def _look(request: _Request) -> _Answer:
    from huggingface_hub import constants

    folder = Path(request.folder or constants.HF_HUB_CACHE)
    blobs = folder / f"models--{request.model.replace('/', '--')}" / "blobs"
    files = _files(request)
    missing = [file for file in files if not (blobs / _blob_name(file)).exists()]
    size_bytes = sum(file.size or 0 for file in missing)
    return _Answer(size_bytes, str(folder), tuple(file.rfilename for file in files))


def _files(request: _Request) -> list[Any]:
    """The weights in the format that vLLM prefers, and the small files beside them; nothing from subfolders."""
    import huggingface_hub

    listing = huggingface_hub.HfApi().model_info(
        request.model, revision=request.revision, files_metadata=True, timeout=LOOK_TIMEOUT_S / 3
    )
    top = [file for file in listing.siblings or [] if "/" not in file.rfilename]
    names = [file.rfilename for file in top]
    weights = next((found for like in WEIGHT_FILES[request.load_format] if (found := fnmatch.filter(names, like))), [])
    return [file for file in top if file.rfilename in weights or file.rfilename.endswith(".json")]


def _blob_name(file: Any) -> str:
    """The name of its content in the hub's cache."""
    return str(file.lfs.sha256 if file.lfs else file.blob_id)


def _download(request: _Request) -> _Answer:
    import huggingface_hub

    huggingface_hub.snapshot_download(
        request.model, revision=request.revision, cache_dir=request.folder, allow_patterns=list(request.files)
    )
    return _Answer()


def _is_here(request: _Request) -> bool:
    import huggingface_hub

    try:
        huggingface_hub.snapshot_download(
            request.model, revision=request.revision, cache_dir=request.folder, local_files_only=True
        )
    except (OSError, ValueError):
        return False
    return True


def main(what: str, words: str) -> _Answer:
    request = _Request(**json.loads(words))
    try:
        return _look(request) if what == "look" else _download(request)
    except (OSError, ValueError) as error:  # the hub's own errors are of these two kinds
        reason = (str(error).strip().splitlines() or [""])[0]
        return _Answer(problem=plain(f"{type(error).__name__}: {reason}"), is_here=_is_here(request))


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(main(*sys.argv[1:]))))
