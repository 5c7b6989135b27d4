"""The devices of this machine: how many, which ones a replica gets, their memory and their energy.

A device is a GPU; on a machine without one, an equal slice of the cores that this process may use.
Counting needs the standard library alone, because --dry-run and the launcher count before anything is installed;
measuring uses NVML (nvidia-ml-py) on GPUs and psutil on the CPU.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from batch_inference.config import ConfigError

GIB = 2**30
# What a monitor reads at one moment: "scope", and lists with one number per device (scope "device") or replica.
Reading = dict[str, Any]
# A machine without a GPU is divided into at most as many devices as a common GPU node has.
MAX_CPU_DEVICES = 8


# vLLM's variable for the cores of each rank.
_BINDING = "VLLM_CPU_OMP_THREADS_BIND"
_BY_BUS = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
_CORES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")

# Between two looks at the clocks: often enough for a run of a second, and nothing beside an engine's step.
SAMPLE_S = 0.1
# Contexts of other processes come and go.
RETURNED_WITHIN_GIB = 0.5


@dataclass(frozen=True)
class _Sample:
    used_gib: float
    sm_mhz: float | None
    reasons: tuple[str, ...]


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
            # CUDA's own order is by speed; NVML, which says what was measured on, counts by the bus.
            return {"CUDA_VISIBLE_DEVICES": ",".join(self.ids), **_BY_BUS}
        if _BINDING in os.environ and not _bound_cores():  # a word of vLLM's: the user has decided
            return {}
        return {_BINDING: "|".join(self.ids)}

    def rank_environment(self, local_rank: int) -> dict[str, str]:
        """The same for one rank of a torchrun job: vLLM takes its GPU by LOCAL_RANK, and binds no cores there."""
        if self.kind == "gpu":
            return _BY_BUS
        cores = self.ids[local_rank]
        return {"OMP_NUM_THREADS": str(cores.count(",") + 1), "OMP_PLACES": f"{{{cores}}}", "OMP_PROC_BIND": "true"}


def find_devices() -> Devices:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves visible; without a GPU, the lists of cores in vLLM's own
    VLLM_CPU_OMP_THREADS_BIND, or else slices of all cores."""
    physical = _gpu_ids()
    if not physical:
        return Devices("cpu", _bound_cores() or tuple(_core_slices()))
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


def _bound_cores() -> tuple[str, ...]:
    """One list of cores per rank, as VLLM_CPU_OMP_THREADS_BIND has them ("0-3|4,6" -> "0,1,2,3" and "4,6"); empty where
    it is not set, or a word like "auto"."""
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
        self._throttle_bits = _throttle_bits(pynvml)

    def describe(self, *, in_use: bool = False) -> list[dict[str, Any]]:
        """What the devices are, and what they hold and draw before an engine loads; unknown once they are `in_use`."""
        nvml = self._nvml
        return [
            {
                "index": index,
                "name": nvml.nvmlDeviceGetName(handle),
                "uuid": nvml.nvmlDeviceGetUUID(handle),
                "memory_gib": (memory := nvml.nvmlDeviceGetMemoryInfo(handle)).total / GIB,
                "used_before_gib": None if in_use else memory.used / GIB,
                "power_limit_w": self._watts(nvml.nvmlDeviceGetEnforcedPowerLimit, handle),
                "idle_power_w": None if in_use else self._watts(nvml.nvmlDeviceGetPowerUsage, handle),
                "max_sm_mhz": _or_none(nvml, lambda h=handle: nvml.nvmlDeviceGetMaxClockInfo(h, nvml.NVML_CLOCK_SM)),
            }
            for index, handle in enumerate(self._handles)
        ]

    def _watts(self, read: Callable[[Any], int], handle: Any) -> float | None:
        watts: float | None = _or_none(self._nvml, lambda: read(handle) / 1000)
        return watts

    def driver_version(self) -> str:
        return str(self._nvml.nvmlSystemGetDriverVersion())

    def read(self, pids: Iterable[int] = ()) -> Reading:
        """Memory in use, joules since the driver was loaded (None where a GPU has no counter), and processes that
        belong to none of the process groups of `pids`, per device."""
        nvml = self._nvml
        ours = {group for pid in pids if (group := _group_of(pid)) is not None}
        return {
            "scope": "device",
            "used_gib": self._used_gib(),
            "energy_j": [
                _or_none(nvml, lambda h=handle: nvml.nvmlDeviceGetTotalEnergyConsumption(h) / 1000)
                for handle in self._handles
            ],
            "other_processes": [self._count_others(handle, ours) for handle in self._handles],
        }

    def held(self, before: Reading) -> str | None:
        """Which devices hold more than `before`, and for whom; None where none does."""
        for index, (earlier_gib, held_gib) in enumerate(zip(before["used_gib"], self._used_gib(), strict=True)):
            if held_gib > earlier_gib + RETURNED_WITHIN_GIB:
                pids = self._running(self._handles[index]) or []
                holders = ", ".join(f"process {pid}" for pid in pids) or "a process not seen here"
                return f"GPU {index} holds {held_gib - earlier_gib:.1f} GiB more than before, for {holders}"
        return None

    def _used_gib(self) -> list[float]:
        return [self._nvml.nvmlDeviceGetMemoryInfo(handle).used / GIB for handle in self._handles]

    def _running(self, handle: Any) -> list[int] | None:
        """Processes that compute on a device; None where NVML does not tell."""
        running = _or_none(self._nvml, lambda: self._nvml.nvmlDeviceGetComputeRunningProcesses(handle))
        return None if running is None else [process.pid for process in running]

    def _count_others(self, handle: Any, ours: set[int]) -> int | None:
        """In a container only its own processes can be told apart; the others are not counted."""
        pids = self._running(handle)
        if pids is None:
            return None
        groups = map(_group_of, pids)
        return sum(group is not None and group not in ours for group in groups)

    @contextlib.contextmanager
    def watch(self) -> Iterator[dict[str, Any]]:
        """Look at clocks and memory every SAMPLE_S while the block runs; what was seen is in the dictionary after it:
        sm_mhz (mean) and peak_gib per device, and throttle_reasons."""
        seen: dict[str, Any] = {}
        samples: list[list[_Sample]] = []
        over = threading.Event()

        def look() -> None:
            while not over.wait(SAMPLE_S):
                samples.append([self._sample(handle) for handle in self._handles])

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield seen
        finally:
            over.set()
            thread.join()
        if samples:
            per_device = list(zip(*samples, strict=True))
            clocks = [[sample.sm_mhz for sample in device if sample.sm_mhz is not None] for device in per_device]
            seen["sm_mhz"] = [fmean(values) if values else None for values in clocks]
            seen["peak_gib"] = [max(sample.used_gib for sample in device) for device in per_device]
            seen["throttle_reasons"] = sorted({name for moment in samples for one in moment for name in one.reasons})

    def _sample(self, handle: Any) -> _Sample:
        nvml = self._nvml
        bits = _or_none(nvml, lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)) or 0
        return _Sample(
            used_gib=nvml.nvmlDeviceGetMemoryInfo(handle).used / GIB,
            sm_mhz=_or_none(nvml, lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            reasons=tuple(name for name, bit in self._throttle_bits if bits & bit),
        )


class CpuMonitor:
    """Resident memory of the replicas' process trees; a CPU has no energy counter that every user may read."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices

    def describe(self, *, in_use: bool = False) -> list[dict[str, Any]]:  # noqa: ARG002 - cores tell the same then
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

    def held(self, _: Reading) -> None:
        """Main memory is the kernel's to give back, with the process."""

    @contextlib.contextmanager
    def watch(self) -> Iterator[dict[str, Any]]:
        yield {}


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


def clocks_of(after: Reading, seen: dict[str, Any]) -> dict[str, Any]:
    """What a Run keeps of clocks and neighbours: where they were watched, sm_mhz, throttle_reasons, other_processes."""
    others = [count for count in after.get("other_processes", []) if count is not None]
    clocks: dict[str, Any] = {name: seen[name] for name in ("sm_mhz", "throttle_reasons") if name in seen}
    if others:
        clocks["other_processes"] = sum(others)
    return clocks


def _group_of(pid: int) -> int | None:
    """None for a process that is gone, or belongs to another container."""
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def _throttle_bits(nvml: Any) -> list[tuple[str, int]]:
    """NVML's reasons for a clock below the highest: their names in lower case, and their bits."""
    prefix = "nvmlClocksThrottleReason"
    words = {name.removeprefix(prefix): bit for name, bit in vars(nvml).items() if name.startswith(prefix)}
    return [(_snake(word), bit) for word, bit in words.items() if word not in ("None", "All", "Unknown")]


def _snake(word: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", word).lower()


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
