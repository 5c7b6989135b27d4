"""The sizes of the weights in a model folder, from the headers of its safetensors files.

A header is a length in 8 bytes and JSON; nothing after it is read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from batch_inference.core.files import check_regular, open_regular, read_regular
from batch_inference.core.text import quoted
from batch_inference.plan.parts import Parts, UnknownError

# The format's own limit is 100 MB; files of 5 GB have about 100 kB.
_LONGEST_HEADER = 2**24
_LONGEST_INDEX = 2**26
_SAME = 1.01
_INDEX = "model.safetensors.index.json"
# What vLLM does not load: causal masks and rotary tables of older checkpoints, and heads that guess ahead.
_NOT_LOADED = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$|(^|\.)mtp\.")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks?)\.(\d{1,6})\.")
_FLOATS = ("F64", "F32", "F16", "BF16")
# What a tensor is, judging by its name: the first match counts.
_IN_LAYERS = {
    "experts": re.compile(r"\.experts\."),
    "router": re.compile(r"\.gate\.weight$"),
    "kv": re.compile(r"\.(k_proj|v_proj)\."),
    "fused": re.compile(r"\.(qkv_proj|query_key_value|c_attn|Wqkv)\."),  # queries, keys and values in one
}
_BESIDE_LAYERS = {
    "head": re.compile(r"^(lm_head|embed_out|output)\b|\boutput_layer\b"),
    "embedding": re.compile(r"embed|\bwte\b"),
}


@dataclass(frozen=True)
class Group:
    """Tensors that are divided in the same way."""

    kind: str  # one of the above; "split" or "whole" for others in a layer, "beside" for the rest
    layer: int | None
    is_float: bool  # vLLM holds it in its own type


@dataclass
class Amount:
    size: int = 0  # bytes
    numbers: int = 0

    def add(self, other: Amount) -> None:
        self.size += other.size
        self.numbers += other.numbers


Stored = Mapping[Group, Amount]


@dataclass(frozen=True)
class _File:
    """A file that is read once, as long as it does not change."""

    path: Path
    size: int
    changed_ns: int


@dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: str  # in the format's names
    shape: tuple[int, ...]
    size: int  # bytes


def stored_weights(folder: Path) -> Stored:
    """Empty if there is no safetensors file. Raises UnknownError."""
    sums: dict[Group, Amount] = {}
    names: set[str] = set()
    for path in _files(folder):
        try:
            check_regular(path)
            stat = path.stat()
            found, groups = _content(_File(path, stat.st_size, stat.st_mtime_ns))
        except (OSError, ValueError, RecursionError) as error:
            raise UnknownError(f"{quoted(path.name)} cannot be read as safetensors ({error})") from error
        if names & found:
            raise UnknownError(f"tensors of {quoted(path.name)} are in another file too")
        names |= found
        for group, amount in groups.items():
            sums.setdefault(group, Amount()).add(amount)
    return sums


def total_bytes(stored: Stored, layers: int | None, float_bytes: int | None, *, is_tied: bool) -> int:
    """Everything that vLLM loads. `layers`: of the model, if known; `float_bytes`: of a number in vLLM, if it may
    differ from the file's."""
    return sum(
        float_bytes * amount.numbers if float_bytes and group.is_float else amount.size
        for group, amount in stored.items()
        if not (is_tied and group.kind == "head") and not _is_behind(group, layers)
    )


def _is_behind(group: Group, layers: int | None) -> bool:
    # Layers after the last one guess tokens ahead.
    return layers is not None and group.layer is not None and group.layer >= layers


def parts_in_bytes(stored: Stored, counted: Parts, tp: int, pp: int) -> Parts:
    """The files of a model whose parameters are `counted`. Raises UnknownError."""
    sums: Counter[str] = Counter()
    per_layer: Counter[int] = Counter()
    for group, amount in stored.items():
        if not _is_behind(group, counted.layers):
            sums[group.kind] += amount.size
        if not _is_behind(group, counted.layers) and group.layer is not None:
            per_layer[group.layer] += amount.size
    if len(per_layer) != counted.layers or not sums["embedding"] or (counted.head and not sums["head"]):
        raise UnknownError("the files in the folder hold other tensors than the formulas expect")
    if tp > counted.kv_heads and sums["fused"]:
        raise UnknownError(f"{tp} ranks copy KV heads that share a matrix with the queries")
    if pp > 1 and max(per_layer.values()) > _SAME * min(per_layer.values()):
        raise UnknownError("layers in the files have different sizes")
    # Without experts, a gate is one of the split matrices.
    router = "whole" if counted.num_experts else "split"
    sums[router] += sums["router"]
    return dataclasses.replace(
        counted,
        split=(sums["split"] + sums["fused"]) / counted.layers,
        kv=sums["kv"] / counted.layers,
        experts=sums["experts"] / counted.layers,
        whole=sums["whole"] / counted.layers,
        embedding=sums["embedding"],
        head=sums["head"] if counted.head else 0,
        beside=sums["beside"],
    )


def _files(folder: Path) -> list[Path]:
    """Chosen the way vLLM does. Raises UnknownError."""
    found = sorted(folder.glob("*.safetensors"))
    index = folder / _INDEX
    if any(path.name.startswith("consolidated") for path in found):
        raise UnknownError("the folder holds weights in Mistral's format")
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
def _content(file: _File) -> tuple[frozenset[str], Stored]:
    """The names of its tensors, and what vLLM loads of them."""
    sums: dict[Group, Amount] = {}
    names = []
    for tensor in _tensors(file):
        names.append(tensor.name)
        is_mask = len(tensor.shape) == 4 and tensor.shape[:2] == (1, 1)
        if not is_mask and not _NOT_LOADED.search(tensor.name):
            sums.setdefault(_group(tensor), Amount()).add(Amount(tensor.size, math.prod(tensor.shape)))
    return frozenset(names), sums


def _group(tensor: _Tensor) -> Group:
    is_float = tensor.dtype in _FLOATS
    found = _LAYER.search(tensor.name)
    kinds, other = (_IN_LAYERS, "split" if len(tensor.shape) > 1 else "whole") if found else (_BESIDE_LAYERS, "beside")
    kind = next((kind for kind, pattern in kinds.items() if pattern.search(tensor.name)), other)
    return Group(kind, int(found[1]) if found else None, is_float)


def _tensors(file: _File) -> Iterator[_Tensor]:
    """Raises ValueError if it is not a safetensors file."""
    with open_regular(file.path, "rb") as opened:
        start = opened.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 0 < length <= min(_LONGEST_HEADER, file.size - 8):
            raise ValueError("it has no header")
        header = json.loads(opened.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    for name, entry in header.items():
        if name != "__metadata__":
            yield _tensor(name, entry, file.size - 8 - length)


def _tensor(name: str, entry: Any, size: int) -> _Tensor:
    """`size`: of what follows the header. Raises ValueError."""
    try:
        start, end = map(int, entry["data_offsets"])
        tensor = _Tensor(name, str(entry["dtype"]), tuple(map(int, entry["shape"])), end - start)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(f"its tensor {quoted(name)} has no size") from None
    is_inside = 0 <= start <= end <= size and min(tensor.shape, default=0) >= 0
    # The smallest type has two numbers in a byte.
    if not is_inside or math.prod(tensor.shape) > 2 * tensor.size:
        raise ValueError(f"its tensor {quoted(name)} is not in the file")
    return tensor
