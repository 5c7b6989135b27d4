"""The devices of this machine: how many there are, and which ones a replica gets.

A device is a GPU or, on a machine without one, an equal slice of the cores that this process may use.
Needs only Python's own library, because --dry-run and the launcher count devices before anything is installed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

GIB = 2**30
# A machine without a GPU is divided into at most as many devices as a common GPU node has GPUs.
MAX_CPU_DEVICES = 8


# vLLM's variable for the cores of each rank.
_BINDING = "VLLM_CPU_OMP_THREADS_BIND"
_BY_BUS = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
_CORES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
# Entries of CUDA_VISIBLE_DEVICES; a number has no more digits than can be converted.
_NUMBER = re.compile(r"\s*\+?([0-9]{1,9})")
_IDENTIFIER = re.compile("GPU-|MIG-")
_UUID = re.compile(r"\(UUID: ((?:GPU|MIG)-[^)]+)\)")


@dataclass(frozen=True)
class Devices:
    """The devices that this process may use. `ids`: what CUDA_VISIBLE_DEVICES takes, or cores like "0-3".
    `are_here`: False for GPUs of another machine that a plan is made for."""

    kind: Literal["gpu", "cpu"]
    ids: tuple[str, ...]
    are_here: bool = True

    def __len__(self) -> int:
        return len(self.ids)

    def slice_for(self, replica: int, devices_per_replica: int) -> Devices:
        """The devices of replica number `replica`, counted from 0."""
        start = replica * devices_per_replica
        return Devices(self.kind, self.ids[start : start + devices_per_replica])

    def environment(self) -> dict[str, str]:
        """The variables that make vLLM use exactly these devices."""
        if self.kind == "gpu":
            # CUDA's own order is by speed; NVML, which identifies the devices, counts by bus.
            return {"CUDA_VISIBLE_DEVICES": ",".join(self.ids), **_BY_BUS}
        if _BINDING in os.environ and not _bound_cores():  # one of vLLM's words: the user has decided
            return {}
        return {_BINDING: "|".join(self.ids)}

    def rank_environment(self, local_rank: int) -> dict[str, str]:
        """The same for one rank of a torchrun job: vLLM picks its GPU by LOCAL_RANK there, and binds no cores."""
        if self.kind == "gpu":
            return _BY_BUS
        cores = self.ids[local_rank]
        return {"OMP_NUM_THREADS": str(cores.count(",") + 1), "OMP_PLACES": f"{{{cores}}}", "OMP_PROC_BIND": "true"}


def find_devices() -> Devices:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves visible. Without a GPU, the lists of cores in vLLM's own
    VLLM_CPU_OMP_THREADS_BIND, otherwise slices of all cores."""
    physical = _gpu_ids()
    if not physical:
        return Devices("cpu", _bound_cores() or tuple(_core_slices()))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return Devices("gpu", physical)
    return Devices("gpu", _visible(visible, physical))


def devices_elsewhere(count: int) -> Devices:
    """`count` GPUs of another machine."""
    return Devices("gpu", tuple(map(str, range(count))), are_here=False)


def _visible(variable: str, physical: tuple[str, ...]) -> tuple[str, ...]:
    """Reads CUDA_VISIBLE_DEVICES as CUDA does: everything after the first entry that is not a GPU is ignored, and if a
    GPU is named twice, none is visible.

    The first rule is in CUDA's documentation. The second, and the reading of an entry, follow torch.cuda's
    _parse_visible_devices and _transform_uuid_to_ordinals, which vLLM uses: a list holds numbers or
    identifiers, whichever comes first; a number may have spaces around it and anything after it; an identifier may be
    shortened if only one GPU begins that way.
    """
    named = _IDENTIFIER.match(variable)
    if named:
        return _identified(variable.split(","), named[0])
    numbers: list[int] = []
    for part in variable.split(","):
        number = _NUMBER.match(part)
        if number is None:
            break
        if int(number[1]) in numbers:
            return ()
        numbers.append(int(number[1]))
    there = itertools.takewhile(lambda number: number < len(physical), numbers)
    return tuple(physical[number] for number in there)


def _identified(parts: list[str], kind: str) -> tuple[str, ...]:
    """`kind`: GPU-, or MIG- for a part of a GPU. If the driver does not list them, all of the kind are assumed to
    exist; older names of parts (MIG-GPU-.../1/0) are never listed."""
    there = [name for name in _gpu_identifiers() if name.startswith(kind)]
    named = list(itertools.takewhile(lambda part: part.startswith(kind), parts))
    meant = [
        [name for name in there if name.startswith(part)] if there and "/" not in part else [part] for part in named
    ]
    clear = [names[0] for names in itertools.takewhile(lambda names: len(names) == 1, meant)]
    named_twice = len(set(named)) < len(named) or len(set(clear)) < len(clear)
    return () if named_twice else tuple(named[: len(clear)])


def _gpu_ids() -> tuple[str, ...]:
    # The driver's own list is as fast as a directory listing; nvidia-smi takes a tenth of a second.
    nodes = sorted(int(node.name[6:]) for node in Path("/dev").glob("nvidia[0-9]*") if node.name[6:].isdecimal())
    if nodes:
        return tuple(str(index) for index in range(len(nodes)))
    # The parts of a divided GPU are listed below it.
    return tuple(map(str, range(sum(line.startswith("GPU ") for line in _nvidia_smi()))))


def _gpu_identifiers() -> list[str]:
    """Identifiers of this machine's GPUs, and of the parts of those that are divided."""
    return [found[1] for line in _nvidia_smi() if (found := _UUID.search(line))]


def _nvidia_smi() -> tuple[str, ...]:
    """A line for each GPU and for each part of one; none if nvidia-smi cannot be asked."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
        return tuple(listing.splitlines())
    return ()


def _bound_cores() -> tuple[str, ...]:
    """One list of cores per rank, as VLLM_CPU_OMP_THREADS_BIND has them ("0-3|4,6" -> "0,1,2,3" and "4,6"); empty if
    it is not set or is a word like "auto"."""
    lists = os.environ.get(_BINDING, "").split("|")
    if not all(_CORES.fullmatch(cores) for cores in lists):
        return ()
    return tuple(",".join(map(str, cores_of(cores))) for cores in lists)


def cores_of(text: str) -> list[int]:
    """ "0-2,5" -> 0, 1, 2, 5."""
    ends = [part.split("-") for part in text.split(",")]
    return [core for part in ends for core in range(int(part[0]), int(part[-1]) + 1)]


def _core_slices() -> Iterator[str]:
    cores = sorted(os.sched_getaffinity(0))
    count = min(len(cores), MAX_CPU_DEVICES)
    width = len(cores) // count
    for index in range(count):
        yield ",".join(map(str, cores[index * width : (index + 1) * width]))


# --- their memory -------------------------------------------------------------------------------------------------


def smallest_memory_gib(devices: Devices) -> float | None:
    """Memory of the smallest GPU; None without GPUs here, or if NVML cannot be asked or does not answer."""
    if devices.kind == "cpu" or not devices.ids or not devices.are_here:
        return None
    nvml = find_nvml()
    if nvml is None:
        return None
    try:
        nvml.nvmlInit()
        handles = [nvml_handle(nvml, device_id) for device_id in devices.ids]
        return min(int(nvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles) / GIB
    except nvml.NVMLError:
        return None


def find_nvml() -> Any:
    """The Python module that asks NVML: nvidia-ml-py if it is installed, otherwise the copy inside vLLM,
    which is found without importing vLLM; None if there is neither."""
    with contextlib.suppress(ImportError):
        return importlib.import_module("pynvml")
    with contextlib.suppress(ImportError, ValueError):
        vllm = importlib.util.find_spec("vllm")
        for folder in (vllm and vllm.submodule_search_locations) or ():
            copy = Path(folder) / "third_party" / "pynvml.py"
            if copy.is_file():
                return _module_at(copy)
    return None


@cache
def _module_at(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("batch_inference_pynvml", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # the module looks itself up there
    spec.loader.exec_module(module)
    return module


def nvml_handle(nvml: Any, device_id: str) -> Any:
    """NVML's handle of a device, by number or identifier. Raises NVMLError if there is none."""
    if device_id.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(device_id))
    # CUDA accepts the beginning of an identifier for the whole; NVML does not.
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        if nvml.nvmlDeviceGetUUID(handle).startswith(device_id):
            return handle
    return nvml.nvmlDeviceGetHandleByUUID(device_id)
