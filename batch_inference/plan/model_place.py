"""Where a model is, judging by how it is written: a folder here, a file, an object store, or the hub.

vLLM judges what is elsewhere: a plan says that it is unknown, and why, and never refuses it.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Literal

from batch_inference.core.config import ConfigError, ExperimentConfig

Kind = Literal["folder", "file", "store", "hub"]
# s3://, gs://, az:// and whatever else vLLM's loaders may add.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HERE = ("/", "./", "../", "~")
# One file of a hub name: org/name/file.gguf.
_FILE_OF_HUB = re.compile(r"[^/]+/[^/]+/[^/]+\.gguf", re.IGNORECASE)
_FORMAT = "--config-format"
_PARAMS = "params.json"
_CONFIG_PATH = "--hf-config-path"
# vLLM's --load-format -> the names of the weights, of which the first that exist count. Other formats load in their own
# ways, and `dummy` loads nothing.
WEIGHT_FILES = {
    "auto": ("consolidated*.safetensors", "*.safetensors", "*.bin", "*.pt"),
    "hf": ("*.safetensors", "*.bin", "*.pt"),
    "safetensors": ("*.safetensors",),
    "fastsafetensors": ("*.safetensors",),
    "mistral": ("consolidated*.safetensors",),
    "npcache": ("*.bin",),
    "pt": ("*.pt",),
}
# Whatever may be weights: some models load files with names of their own, also from a folder in the folder.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def kind_of(model: str, flag: str = "--model") -> Kind:
    """Raises ConfigError for a path that leads nowhere."""
    kind = _kind(model)
    if kind is None:
        raise ConfigError(f"{flag} {model}: there is no such folder; give a model folder or a hub name (org/name)")
    return kind


def is_on_hub(model: str) -> bool:
    """True for a whole model of the hub; not for one of its files (org/name:QUANTIZATION, org/name/file.gguf)."""
    return _kind(model) == "hub" and ":" not in model and not _FILE_OF_HUB.fullmatch(model)


def expanded(model: str) -> Path:
    try:
        return Path(model).expanduser()
    except RuntimeError:  # no such user's home
        return Path(model)


def _kind(model: str) -> Kind | None:
    """None for a path that leads nowhere. A possible hub name counts as one, even if a folder has the name of its
    organisation: whoever keeps org/one here may want org/two from the hub."""
    if _SCHEME.match(model):
        return "store"
    path = expanded(model)
    with contextlib.suppress(OSError):  # too long for a path, or unreadable
        if path.exists():
            return "folder" if path.is_dir() else "file" if path.is_file() else None
    is_path = model.startswith(_HERE) or (model.count("/") > 1 and not _FILE_OF_HUB.fullmatch(model))
    return None if is_path else "hub"


def check_weights(config: ExperimentConfig) -> None:
    """Raises ConfigError for a model folder in which vLLM, after a minute of starting, would find nothing to load.

    Not for a plan for another machine, nor with Ray, whose workers may be on one: the weights may be there.
    """
    is_elsewhere = config.devices or config.device_memory_gib or config.distributed_executor_backend == "ray"
    loads_files = (config.engine_word("--load-format") or "auto") in WEIGHT_FILES
    if is_elsewhere or not loads_files or config.engine_word("--model-weights") or kind_of(config.model) != "folder":
        return
    folder = expanded(config.model)
    if any(path.suffix in _WEIGHTS for pattern in ("*", "*/*") for path in folder.glob(pattern)):
        return
    raise ConfigError(
        f"--model {config.model}: the folder holds no weights (*.safetensors, *.bin, *.pt); give one that does, or "
        "--load-format dummy for random weights"
    )


def config_source(config: ExperimentConfig) -> str:
    """Where vLLM reads the model's config from."""
    return config.engine_word(_CONFIG_PATH) or config.model


def source_flag(config: ExperimentConfig) -> str:
    return _CONFIG_PATH if config.engine_word(_CONFIG_PATH) else "--model"


def why_elsewhere(config: ExperimentConfig) -> str | None:
    """Why there is no config.json to read here; None if there should be one. Raises ConfigError for a path that
    leads nowhere."""
    kind_of(config.model)
    source = config_source(config)
    kind = kind_of(source, source_flag(config))
    form = config.engine_word(_FORMAT) or "auto"
    if form not in ("auto", "hf"):
        return f"only vLLM reads a model with {_FORMAT} {form}"
    if kind == "folder":
        folder = expanded(source)
        is_mistrals = form == "auto" and (folder / _PARAMS).exists() and not (folder / "config.json").exists()
        return f"only vLLM reads the {_PARAMS} of a model without config.json" if is_mistrals else None
    return {
        "file": "only vLLM reads a model in a single file",
        "store": "only vLLM reads a model in an object store",
        "hub": "a hub name says nothing about the model's sizes" + _no_folder(source),
    }[kind]


def prefers_params(config: ExperimentConfig) -> bool:
    """Whether vLLM reads params.json even if there is a config.json: in a folder with Mistral's own weights."""
    folder = expanded(config_source(config))
    is_free = config.engine_word(_FORMAT) in (None, "auto")
    return is_free and (folder / _PARAMS).exists() and any(folder.glob("consolidated*.safetensors"))


def note_on_name(config: ExperimentConfig) -> str | None:
    """On a name of the hub that may be a folder's, misspelt: vLLM would look for it on the hub, for minutes."""
    remark = _no_folder(config.model) if kind_of(config.model) == "hub" else ""
    return f"--model {config.model} is taken as a name on the hub{remark}" if remark else None


def _no_folder(name: str) -> str:
    """A remark on a hub name that also looks like a folder."""
    parent = Path(name).parent
    with contextlib.suppress(OSError):  # too long for a path
        if parent != Path() and parent.is_dir():
            return f" (the folder {parent} here has none of that name)"
    return ""
