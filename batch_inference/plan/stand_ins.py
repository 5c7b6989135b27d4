"""Stand-ins for a worker's surroundings while a model is built only for its sizes.

Only for the process of `meta_device`, which ends afterwards: none of this may be present when an engine measures.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

# Names in vLLM's parallel_state.py (0.26 to 0.33): the first are needed, the others are missing in older versions.
_GROUPS = ("_WORLD", "_TP", "_PP", "_DP", "_EP")
_NEWER_GROUPS = ("_DCP", "_PCP", "_EPLB", "_ETP")
# Variables of a job that this process may have been started in.
_VARIABLES_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class UnknownError(Exception):
    """vLLM cannot be asked this; the message says why."""


def prepare(own_folder: str) -> None:
    """Call before vLLM is imported. `own_folder`: for what it would keep; an engine must never find what was seen
    here."""
    for name in _VARIABLES_OF_RANKS:
        os.environ.pop(name, None)
    # The devices belong to whoever is measuring.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.update(
        VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1", VLLM_CACHE_ROOT=own_folder, HF_HUB_OFFLINE="1"
    )
    # Otherwise vLLM's CPU platform looks for it in this machine's memory.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # Vision models need it when they are imported, but compute nothing with it while they are built.
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_Anything("torchvision"))


@contextlib.contextmanager
def quickest_cpu() -> Iterator[None]:
    """For a CPU vLLM that plans for GPUs: it would refuse layers for which this machine's cores are too slow."""
    import torch

    with mock.patch.object(torch.cpu, "_is_amx_tile_supported", return_value=True, create=True):
        yield


@contextlib.contextmanager
def no_streams() -> Iterator[None]:
    """For a GPU vLLM that sees no GPU: layers create streams and events, but use them only to compute."""
    import torch

    class Unused:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

    with contextlib.ExitStack() as replaced:
        if not torch.cuda.is_available():
            for name, value in (("Stream", Unused), ("Event", Unused), ("current_device", lambda: "meta")):
                replaced.enter_context(mock.patch.object(torch.cuda, name, value))
        yield


class _Anything(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A package that contains whatever is looked up in it."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, fullname: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        is_in_it = fullname.partition(".")[0] == self._package
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if is_in_it else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        module = mock.MagicMock(name=spec.name, __version__="0.0.0")
        module.__spec__, module.__path__, module.__name__ = spec, [], spec.name
        return module

    def exec_module(self, module: Any) -> None:
        pass


class Group:
    """A rank of a group without its other ranks. It says how many there are; nothing can be sent."""

    def __init__(self, size: int, rank: int = 0) -> None:
        self.world_size, self.ranks = size, list(range(size))
        self.rank = self.rank_in_group = self.local_rank = rank
        self.first_rank, self.last_rank = 0, size - 1
        self.is_first_rank, self.is_last_rank = rank == 0, rank == size - 1
        self.next_rank, self.prev_rank = (rank + 1) % size, (rank - 1) % size
        self.device_communicator = None
        self.use_custom_op_call = False
        self.unique_name = f"planned_{size}"
        self.cpu_group = self.device_group = mock.Mock(**{"size.return_value": size, "rank.return_value": rank})


def be_first_rank_of(stage: int, parallel: Any, parallel_state: Any) -> None:
    """For vLLM's layers, which ask `parallel_state` for a rank. `parallel`: a ParallelConfig. Raises UnknownError."""
    missing = [name for name in _GROUPS if not hasattr(parallel_state, name)]
    if missing:
        raise UnknownError(f"its parallel_state.py has no {', '.join(missing)}")
    tp, pp, dp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.data_parallel_size
    prefill = getattr(parallel, "prefill_context_parallel_size", 1)
    groups = {
        "_WORLD": Group(tp * pp * prefill, stage * tp * prefill),
        "_TP": Group(tp),
        "_PP": Group(pp, stage),
        "_DP": Group(dp),
        "_EP": Group(dp * tp * prefill),
        "_DCP": Group(getattr(parallel, "decode_context_parallel_size", 1)),
        "_PCP": Group(prefill),
        "_EPLB": Group(dp * tp * prefill),
        "_ETP": Group(tp),
    }
    for name in (*_GROUPS, *(name for name in _NEWER_GROUPS if hasattr(parallel_state, name))):
        setattr(parallel_state, name, groups[name])
    parallel.rank = stage * tp * prefill
