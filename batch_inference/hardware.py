"""The devices of this machine: how many, which ones a replica gets, their memory and their energy.

A device is a GPU; on a machine without one, an equal slice of the cores that this process may use.
Counting needs the standard library alone, because --dry-run and the launcher count before anything is installed;
measuring uses NVML (nvidia-ml-py) on GPUs and psutil on the CPU.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from batch_inference.config import ConfigError

GIB = 2**30
# What a monitor reads at one moment: "scope", and lists with one number per device (scope "device") or replica.
Reading = dict[str, Any]
# A machine without a GPU is divided into at most as many devices as a common GPU node has.
MAX_CPU_DEVICES = 8


@dataclass(frozen=True)
class Devices:
    """The devices that this process may use. `ids`: what CUDA_VISIBLE_DEVICES takes, or cores like "0-3"."""

    kind: Literal["gpu", "cpu"]
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def slice_for(self, replica: int, devices_per_replica: int) -> Devices:
        """The devices of replica number `replica`, counted from 0."""
        start = replica * devices_per_replica
        return Devices(self.kind, self.ids[start : start + devices_per_replica])

    def environment(self) -> dict[str, str]:
        """The variables that make vLLM use exactly these devices."""
        if self.kind == "gpu":
            return {"CUDA_VISIBLE_DEVICES": ",".join(self.ids)}
        if "VLLM_CPU_OMP_THREADS_BIND" in os.environ:  # the user has decided
            return {}
        return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(self.ids)}

    def rank_environment(self, local_rank: int) -> dict[str, str]:
        """The same for one rank of a torchrun job: vLLM takes its GPU by LOCAL_RANK, and binds no cores there."""
        if self.kind == "gpu":
            return {}
        cores = self.ids[local_rank]
        return {"OMP_NUM_THREADS": str(cores.count(",") + 1), "OMP_PLACES": f"{{{cores}}}", "OMP_PROC_BIND": "true"}


def find_devices() -> Devices:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves visible; without a GPU, the slices of the cores."""
    physical = _gpu_ids()
    if not physical:
        return Devices("cpu", tuple(_core_slices()))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return Devices("gpu", physical)
    return Devices("gpu", tuple(_visible(visible, physical)))


def _visible(variable: str, physical: tuple[str, ...]) -> Iterator[str]:
    """As CUDA reads CUDA_VISIBLE_DEVICES: what comes after the first entry that is no GPU does not count."""
    for part in map(str.strip, variable.split(",")):
        if part not in physical and not part.startswith(("GPU-", "MIG-")):
            return
        yield part


def smallest_memory_gib(devices: Devices) -> float | None:
    """Memory of the smallest of the GPUs; None without GPUs, or where NVML is not installed."""
    if devices.kind == "cpu" or not devices.ids:
        return None
    try:
        sizes: list[float] = [device["memory_gib"] for device in GpuMonitor(devices).describe()]
    except ConfigError:
        return None
    return min(sizes)


def _gpu_ids() -> tuple[str, ...]:
    # The driver's own list: as fast as a directory listing, where nvidia-smi takes a tenth of a second.
    nodes = sorted(int(node.name[6:]) for node in Path("/dev").glob("nvidia[0-9]*") if node.name[6:].isdecimal())
    if nodes:
        return tuple(str(index) for index in range(len(nodes)))
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
        return tuple(str(index) for index, line in enumerate(listing.splitlines()) if line.startswith("GPU "))
    return ()


def _core_slices() -> Iterator[str]:
    cores = sorted(os.sched_getaffinity(0))
    count = min(len(cores), MAX_CPU_DEVICES)
    width = len(cores) // count
    for index in range(count):
        yield ",".join(map(str, cores[index * width : (index + 1) * width]))


# --- measuring ----------------------------------------------------------------------------------------------------


class GpuMonitor:
    """Memory and energy of some GPUs, by NVML, from outside the engine."""

    def __init__(self, devices: Devices) -> None:
        try:
            import pynvml
        except ModuleNotFoundError:
            raise ConfigError(f"{sys.executable} has no nvidia-ml-py; run ./setup_env.sh") from None
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._handles = [_nvml_handle(pynvml, device_id) for device_id in devices.ids]
        except pynvml.NVMLError as error:
            raise ConfigError(f"CUDA_VISIBLE_DEVICES: '{','.join(devices.ids)}': NVML says: {error}") from error

    def describe(self) -> list[dict[str, Any]]:
        nvml = self._nvml
        return [
            {
                "index": index,
                "name": nvml.nvmlDeviceGetName(handle),
                "uuid": nvml.nvmlDeviceGetUUID(handle),
                "memory_gib": nvml.nvmlDeviceGetMemoryInfo(handle).total / GIB,
                "power_limit_w": _or_none(nvml, lambda h=handle: nvml.nvmlDeviceGetEnforcedPowerLimit(h) / 1000),
            }
            for index, handle in enumerate(self._handles)
        ]

    def driver_version(self) -> str:
        return str(self._nvml.nvmlSystemGetDriverVersion())

    def read(self, _: Iterable[int] = ()) -> Reading:
        """Memory in use, and joules since the driver was loaded (None where a GPU has no counter), per device."""
        nvml = self._nvml
        return {
            "scope": "device",
            "used_gib": [nvml.nvmlDeviceGetMemoryInfo(handle).used / GIB for handle in self._handles],
            "energy_j": [
                _or_none(nvml, lambda h=handle: nvml.nvmlDeviceGetTotalEnergyConsumption(h) / 1000)
                for handle in self._handles
            ],
        }


class CpuMonitor:
    """Resident memory of the replicas' process trees; a CPU has no energy counter that every user may read."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices

    def describe(self) -> list[dict[str, Any]]:
        import psutil

        share_gib = psutil.virtual_memory().total / GIB / len(self._devices)
        return [
            {"index": index, "name": cpu_name(), "cores": cores, "memory_gib": share_gib, "power_limit_w": None}
            for index, cores in enumerate(self._devices.ids)
        ]

    def driver_version(self) -> None:
        return None

    def read(self, pids: Iterable[int] = ()) -> Reading:
        used_gib = [_tree_bytes(pid) / GIB for pid in pids]
        return {"scope": "replica", "used_gib": used_gib, "energy_j": [None] * len(used_gib)}


Monitor = GpuMonitor | CpuMonitor


def joined(readings: Sequence[Reading]) -> Reading:
    """The readings of several ranks or replicas, each of devices of its own, as one."""
    lists = {
        name: [value for reading in readings for value in reading[name]]
        for name, values in readings[0].items()
        if isinstance(values, list)
    }
    return {**readings[0], **lists}


def drawn_j(before: Reading, after: Reading) -> float | None:
    """Joules that the devices drew between two readings; None where one is unknown."""
    pairs = list(zip(before["energy_j"], after["energy_j"], strict=True))
    return None if any(None in pair for pair in pairs) else sum(end_j - start_j for start_j, end_j in pairs)


def monitor(devices: Devices) -> Monitor:
    return GpuMonitor(devices) if devices.kind == "gpu" else CpuMonitor(devices)


def _nvml_handle(nvml: Any, device_id: str) -> Any:
    if device_id.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(device_id))
    # CUDA takes the beginning of an identifier for the whole; NVML does not.
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        if nvml.nvmlDeviceGetUUID(handle).startswith(device_id):
            return handle
    return nvml.nvmlDeviceGetHandleByUUID(device_id)


def _or_none(nvml: Any, read: Any) -> Any:
    """What `read` returns, or None where this GPU or driver does not offer it."""
    try:
        return read()
    except nvml.NVMLError:
        return None


def _tree_bytes(pid: int) -> int:
    import psutil

    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
    return total


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return os.uname().machine


if __name__ == "__main__":
    found = find_devices()
    sys.stdout.write(f"{len(found)} {found.kind}\n")
