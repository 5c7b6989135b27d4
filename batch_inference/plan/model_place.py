"""Where a model lies, by how it is written: a folder here, a file, an object store, or the hub.

What lies elsewhere is vLLM's to judge: a plan says that it is unknown, and why, and nothing is refused for it.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Literal

from batch_inference.core.config import ConfigError, ExperimentConfig

Kind = Literal["folder", "file", "store", "hub"]
# s3://, gs://, az:// and whatever a loader of vLLM's may add.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HERE = ("/", "./", "../", "~")
# One of the files of a hub name: org/name/file.gguf.
_FILE_OF_HUB = re.compile(r"[^/]+/[^/]+/[^/]+\.gguf", re.IGNORECASE)
_FORMAT = "--config-format"
_PARAMS = "params.json"
_CONFIG_PATH = "--hf-config-path"


def kind_of(model: str, flag: str = "--model") -> Kind:
    """Raises ConfigError for a path that leads nowhere."""
    kind = _kind(model)
    if kind is None:
        raise ConfigError(f"{flag} {model}: there is no such folder; give a model folder or a hub name (org/name)")
    return kind


def is_on_hub(model: str) -> bool:
    """True for all of a model of the hub, and not one of its files: org/name:QUANTIZATION, org/name/file.gguf."""
    return _kind(model) == "hub" and ":" not in model and not _FILE_OF_HUB.fullmatch(model)


def expanded(model: str) -> Path:
    try:
        return Path(model).expanduser()
    except RuntimeError:  # nobody knows whose home that is
        return Path(model)


def _kind(model: str) -> Kind | None:
    """None for a path that leads nowhere. What may be a hub name is one, even where a folder has the name of its
    organisation: whoever keeps org/one here may want org/two from the hub."""
    if _SCHEME.match(model):
        return "store"
    path = expanded(model)
    with contextlib.suppress(OSError):  # too long to be a path, or not ours to read
        if path.exists():
            return "folder" if path.is_dir() else "file" if path.is_file() else None
    is_path = model.startswith(_HERE) or (model.count("/") > 1 and not _FILE_OF_HUB.fullmatch(model))
    return None if is_path else "hub"


def config_source(config: ExperimentConfig) -> str:
    """Where vLLM reads the model's config from."""
    return config.engine_word(_CONFIG_PATH) or config.model


def source_flag(config: ExperimentConfig) -> str:
    return _CONFIG_PATH if config.engine_word(_CONFIG_PATH) else "--model"


def why_elsewhere(config: ExperimentConfig) -> str | None:
    """Why there is no config.json to read here; None where there should be one. Raises ConfigError for a path that
    leads nowhere."""
    kind_of(config.model)
    source = config_source(config)
    kind = kind_of(source, source_flag(config))
    form = config.engine_word(_FORMAT) or "auto"
    if form not in ("auto", "hf"):
        return f"vLLM alone reads a model by {_FORMAT} {form}"
    if kind == "folder":
        folder = expanded(source)
        is_mistrals = form == "auto" and (folder / _PARAMS).exists() and not (folder / "config.json").exists()
        return f"vLLM alone reads the {_PARAMS} of a model without config.json" if is_mistrals else None
    return {
        "file": "vLLM alone reads a model of one file",
        "store": "vLLM alone reads a model of an object store",
        "hub": "a hub name says nothing of the model's sizes from here" + _no_folder(source),
    }[kind]


def prefers_params(config: ExperimentConfig) -> bool:
    """Whether vLLM reads a params.json though there is a config.json too: of a folder with Mistral's own weights."""
    folder = expanded(config_source(config))
    is_free = config.engine_word(_FORMAT) in (None, "auto")
    return is_free and (folder / _PARAMS).exists() and any(folder.glob("consolidated*.safetensors"))


def _no_folder(name: str) -> str:
    """More of a hub name that looks like a folder too."""
    parent = Path(name).parent
    with contextlib.suppress(OSError):  # too long to be a path
        if parent != Path() and parent.is_dir():
            return f" (the folder {parent} here has none of that name)"
    return ""
