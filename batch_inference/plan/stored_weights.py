"""The sizes of weights that lie in a model folder, by the headers of its safetensors files.

A header is a length of 8 bytes and JSON; nothing behind it is read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from batch_inference.core.files import check_regular, open_regular, read_regular
from batch_inference.core.text import quoted
from batch_inference.plan.parts import Parts, UnknownError

# The format's own bound is 100 MB; files of 5 GB have some 100 kB.
_LONGEST_HEADER = 2**24
_LONGEST_INDEX = 2**26
_SAME = 1.01
_INDEX = "model.safetensors.index.json"
# What vLLM leaves in the file: causal masks and rotary tables of older checkpoints, and layers of other models.
_NOT_LOADED = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$|(^|\.)mtp\.")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks?)\.(\d{1,6})\.")
_FLOATS = ("F64", "F32", "F16", "BF16")
# In one matrix, which cannot be divided here.
_QUERIES_AND_KEYS = re.compile(r"\.(qkv_proj|query_key_value|c_attn|Wqkv)\.")
_KEYS = re.compile(r"\.(k_proj|v_proj)\.")
_EXPERTS = re.compile(r"\.experts\.")
_ROUTER = re.compile(r"\.gate\.weight$")
_EMBEDDING = re.compile(r"embed|\bwte\b")
_HEAD = re.compile(r"^(lm_head|embed_out|output)\b|\boutput_layer\b")


@dataclass(frozen=True)
class _File:
    """What is read once, as long as it does not change."""

    path: Path
    size: int
    changed_ns: int


@dataclass(frozen=True)
class Tensor:
    name: str
    dtype: str  # in the format's words
    shape: tuple[int, ...]
    size: int  # bytes

    @property
    def layer(self) -> int | None:
        found = _LAYER.search(self.name)
        return int(found[1]) if found else None


def stored_tensors(folder: Path, layers: int | None, float_bytes: int | None) -> list[Tensor]:
    """All that vLLM loads; empty where no safetensors file is there. `layers`: of the model, where it is known;
    `float_bytes`: of a number in vLLM, where it may be another than in the file. Raises UnknownError."""
    tensors: dict[str, Tensor] = {}
    for path in _files(folder):
        try:
            check_regular(path)
            stat = path.stat()
            tensors |= {tensor.name: tensor for tensor in _tensors(_File(path, stat.st_size, stat.st_mtime_ns))}
        except (OSError, ValueError, RecursionError) as error:
            raise UnknownError(f"{quoted(path.name)} cannot be read as safetensors ({error})") from error
    loaded = [tensor for tensor in tensors.values() if _is_loaded(tensor, layers)]
    return [
        dataclasses.replace(tensor, size=math.prod(tensor.shape) * float_bytes)
        if float_bytes and tensor.dtype in _FLOATS
        else tensor
        for tensor in loaded
    ]


def total_bytes(tensors: Sequence[Tensor], *, is_tied: bool) -> int:
    return sum(tensor.size for tensor in tensors if not (is_tied and _HEAD.search(tensor.name)))


def parts_in_bytes(tensors: Sequence[Tensor], counted: Parts, tp: int, pp: int) -> Parts:
    """The files of a model whose parameters are `counted`. Raises UnknownError."""
    if tp > counted.kv_heads and any(_QUERIES_AND_KEYS.search(tensor.name) for tensor in tensors):
        raise UnknownError(f"{tp} ranks copy KV heads that lie in one matrix with the queries")
    sums: Counter[str] = Counter()
    per_layer: Counter[int] = Counter()
    for tensor in tensors:
        if tensor.layer is not None:
            per_layer[tensor.layer] += tensor.size
        sums[_part(tensor, counted)] += tensor.size
    if len(per_layer) != counted.layers or not sums["embedding"] or (counted.head and not sums["head"]):
        raise UnknownError("the files in the folder hold other tensors than the formulas know")
    if pp > 1 and max(per_layer.values()) > _SAME * min(per_layer.values()):
        raise UnknownError("layers in the files have different sizes")
    of_layers = counted.layers
    return dataclasses.replace(
        counted,
        split=sums["split"] / of_layers,
        kv=sums["kv"] / of_layers,
        experts=sums["experts"] / of_layers,
        whole=sums["whole"] / of_layers,
        embedding=sums["embedding"],
        head=sums["head"] if counted.head else 0,
        beside=sums["beside"],
    )


def _part(tensor: Tensor, counted: Parts) -> str:
    name = tensor.name
    if tensor.layer is None:
        return "head" if _HEAD.search(name) else "embedding" if _EMBEDDING.search(name) else "beside"
    if counted.num_experts and _EXPERTS.search(name):
        return "experts"
    if len(tensor.shape) < 2 or (counted.num_experts and _ROUTER.search(name)):
        return "whole"
    return "kv" if _KEYS.search(name) else "split"


def _is_loaded(tensor: Tensor, layers: int | None) -> bool:
    is_mask = len(tensor.shape) == 4 and tensor.shape[:2] == (1, 1)
    # Layers behind the last one are for guessing tokens ahead.
    is_behind = layers is not None and tensor.layer is not None and tensor.layer >= layers
    return not (is_mask or is_behind or _NOT_LOADED.search(tensor.name))


def _files(folder: Path) -> list[Path]:
    """As vLLM chooses them. Raises UnknownError."""
    found = sorted(folder.glob("*.safetensors"))
    index = folder / _INDEX
    if any(path.name.startswith("consolidated") for path in found):
        raise UnknownError("weights in Mistral's format lie in the folder")
    if not index.exists():
        return found
    try:
        check_regular(index)
        if index.stat().st_size > _LONGEST_INDEX:
            raise ValueError("it is too long")
        names = {str(name) for name in json.loads(read_regular(index))["weight_map"].values()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UnknownError(f"{_INDEX} cannot be read ({error})") from error
    if not found:  # dummy weights need none
        return []
    missing = sorted(names - {path.name for path in found})
    if missing:
        raise UnknownError(f"{quoted(missing[0])} of {_INDEX} is missing")
    return [path for path in found if path.name in names]


@lru_cache(maxsize=4096)
def _tensors(file: _File) -> tuple[Tensor, ...]:
    with open_regular(file.path, "rb") as opened:
        start = opened.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 0 < length <= min(_LONGEST_HEADER, file.size - 8):
            raise ValueError("it has no header")
        header = json.loads(opened.read(length))
    return tuple(_tensors_of(header, file.size - 8 - length))


def _tensors_of(header: Any, size: int) -> Iterator[Tensor]:
    """`size`: of what is behind the header. Raises ValueError for what is no header."""
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            start, end = entry["data_offsets"]
            tensor = Tensor(name, str(entry["dtype"]), tuple(map(int, entry["shape"])), int(end) - int(start))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"its tensor {quoted(name)} has no size") from None
        is_inside = 0 <= int(start) <= int(end) <= size and min(tensor.shape, default=0) >= 0
        # The smallest type has two numbers in a byte.
        if not is_inside or math.prod(tensor.shape) > 2 * tensor.size:
            raise ValueError(f"its tensor {quoted(name)} is not in the file")
        yield tensor
