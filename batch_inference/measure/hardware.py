"""What the devices hold, draw and do while an engine runs: NVML for GPUs, psutil for the CPU."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from msgspec import Struct

from batch_inference.core.config import ConfigError
from batch_inference.core.results import Clocks, DeviceInfo
from batch_inference.plan.devices import GIB, Devices, find_nvml, nvml_handle

# Between two looks at the clocks: often enough for a run of a second, and no burden on an engine.
SAMPLE_S = 0.1
# Tolerance for the contexts of other processes, which come and go.
RETURNED_WITHIN_GIB = 0.5


class Reading(Struct):
    """What a monitor reads at one moment: a number per device or per replica, as `scope` says."""

    scope: Literal["device", "replica"]
    used_gib: list[float] | None  # None where NVML does not tell it, as on GPUs that share the main memory
    energy_j: list[float | None]  # since the driver was loaded; None without a counter
    other_processes: list[int | None] = []  # those that are not ours


class Seen(Struct):
    """What a monitor saw during a run; None if nobody looked."""

    sm_mhz: list[float | None] | None = None  # mean per device
    peak_gib: list[float] | None = None  # per device
    throttle_reasons: list[str] | None = None


@dataclass(frozen=True)
class _Sample:
    used_gib: float | None
    sm_mhz: float | None
    reasons: tuple[str, ...]


class GpuMonitor:
    """Memory and energy of some GPUs, by NVML, from outside the engine."""

    def __init__(self, devices: Devices) -> None:
        nvml = find_nvml()
        if nvml is None:
            raise ConfigError(
                f"{sys.executable} has no nvidia-ml-py, and vLLM's copy of it is missing: pip install nvidia-ml-py"
            )
        self._nvml = nvml
        try:
            nvml.nvmlInit()
            self._handles = [nvml_handle(nvml, device_id) for device_id in devices.ids]
        except nvml.NVMLError as error:
            raise ConfigError(f"CUDA_VISIBLE_DEVICES: '{','.join(devices.ids)}': NVML says: {error}") from error
        self._throttle_bits = _throttle_bits(nvml)

    def identify(self, *, in_use: bool = False) -> list[DeviceInfo]:
        """What the devices are, and what they hold and draw before an engine loads (unknown once they are `in_use`)."""
        nvml = self._nvml
        return [
            DeviceInfo(
                index=index,
                name=nvml.nvmlDeviceGetName(handle),
                uuid=nvml.nvmlDeviceGetUUID(handle),
                memory_gib=self._memory_gib(handle, "total"),
                used_before_gib=None if in_use else self._memory_gib(handle, "used"),
                power_limit_w=self._watts(nvml.nvmlDeviceGetEnforcedPowerLimit, handle),
                idle_power_w=None if in_use else self._watts(nvml.nvmlDeviceGetPowerUsage, handle),
                max_sm_mhz=_or_none(nvml, lambda h=handle: nvml.nvmlDeviceGetMaxClockInfo(h, nvml.NVML_CLOCK_SM)),
            )
            for index, handle in enumerate(self._handles)
        ]

    def _watts(self, read: Callable[[Any], int], handle: Any) -> float | None:
        watts: float | None = _or_none(self._nvml, lambda: read(handle) / 1000)
        return watts

    def driver_version(self) -> str:
        return str(self._nvml.nvmlSystemGetDriverVersion())

    def read(self, pids: Iterable[int] = ()) -> Reading:
        """Memory in use, joules since the driver was loaded (None if a GPU has no counter), and processes that
        belong to none of the process groups of `pids`, per device."""
        nvml = self._nvml
        ours = {group for pid in pids if (group := _group_of(pid)) is not None}
        return Reading(
            scope="device",
            used_gib=self._used_gib(),
            energy_j=[
                _or_none(nvml, lambda h=handle: nvml.nvmlDeviceGetTotalEnergyConsumption(h) / 1000)
                for handle in self._handles
            ],
            other_processes=[self._count_others(handle, ours) for handle in self._handles],
        )

    def held(self, before: Reading) -> str | None:
        """Which devices hold more than `before`, and for whom; None if none does."""
        now_gib = self._used_gib()
        if before.used_gib is None or now_gib is None:
            return None
        for index, (earlier_gib, held_gib) in enumerate(zip(before.used_gib, now_gib, strict=True)):
            if held_gib > earlier_gib + RETURNED_WITHIN_GIB:
                pids = self._running(self._handles[index]) or []
                holders = ", ".join(f"process {pid}" for pid in pids) or "a process not seen here"
                return f"GPU {index} holds {held_gib - earlier_gib:.1f} GiB more than before, for {holders}"
        return None

    def _used_gib(self) -> list[float] | None:
        return _all_known([self._memory_gib(handle, "used") for handle in self._handles])

    def _memory_gib(self, handle: Any, part: Literal["total", "used"]) -> float | None:
        read = self._nvml.nvmlDeviceGetMemoryInfo
        gib: float | None = _or_none(self._nvml, lambda: getattr(read(handle), part) / GIB)
        return gib

    def _running(self, handle: Any) -> list[int] | None:
        """Processes that compute on a device; None if NVML does not say."""
        running = _or_none(self._nvml, lambda: self._nvml.nvmlDeviceGetComputeRunningProcesses(handle))
        return None if running is None else [process.pid for process in running]

    def _count_others(self, handle: Any, ours: set[int]) -> int | None:
        """In a container only its own processes can be identified; others are not counted."""
        pids = self._running(handle)
        if pids is None:
            return None
        groups = map(_group_of, pids)
        return sum(group is not None and group not in ours for group in groups)

    @contextlib.contextmanager
    def watch(self) -> Iterator[Seen]:
        """Look at clocks and memory every SAMPLE_S while the block runs; what was seen is available afterwards."""
        seen = Seen()
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
            seen.sm_mhz = [fmean(values) if values else None for values in clocks]
            used = [[sample.used_gib for sample in device if sample.used_gib is not None] for device in per_device]
            seen.peak_gib = _all_known([max(values, default=None) for values in used])
            seen.throttle_reasons = sorted({name for moment in samples for one in moment for name in one.reasons})

    def _sample(self, handle: Any) -> _Sample:
        nvml = self._nvml
        bits = _or_none(nvml, lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)) or 0
        return _Sample(
            used_gib=self._memory_gib(handle, "used"),
            sm_mhz=_or_none(nvml, lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            reasons=tuple(name for name, bit in self._throttle_bits if bits & bit),
        )


class CpuMonitor:
    """Resident memory of the replicas' process trees; a CPU has no energy counter that every user may read."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices

    def identify(self, *, in_use: bool = False) -> list[DeviceInfo]:  # noqa: ARG002 - cores look the same then
        import psutil

        share_gib = psutil.virtual_memory().total / GIB / len(self._devices)
        return [
            DeviceInfo(index=index, name=cpu_name(), cores=cores, memory_gib=share_gib)
            for index, cores in enumerate(self._devices.ids)
        ]

    def driver_version(self) -> None:
        return None

    def read(self, pids: Iterable[int] = ()) -> Reading:
        used_gib = [_tree_bytes(pid) / GIB for pid in pids]
        return Reading(scope="replica", used_gib=used_gib, energy_j=[None] * len(used_gib))

    def held(self, _: Reading) -> None:
        """The kernel takes main memory back when the process ends."""

    @contextlib.contextmanager
    def watch(self) -> Iterator[Seen]:
        yield Seen()


Monitor = GpuMonitor | CpuMonitor


def joined(readings: Sequence[Reading]) -> Reading:
    """The readings of several ranks or replicas, each on its own devices, as one."""
    return Reading(
        scope=readings[0].scope,
        used_gib=_all_known([value for reading in readings for value in reading.used_gib or (None,)]),
        energy_j=[value for reading in readings for value in reading.energy_j],
        other_processes=[value for reading in readings for value in reading.other_processes],
    )


def drawn_j(before: Reading, after: Reading) -> float | None:
    """Joules that the devices drew between two readings; None if either is unknown."""
    pairs = list(zip(before.energy_j, after.energy_j, strict=True))
    known = [(start_j, end_j) for start_j, end_j in pairs if start_j is not None and end_j is not None]
    return sum(end_j - start_j for start_j, end_j in known) if len(known) == len(pairs) else None


def clocks_of(after: Reading, seen: Seen) -> Clocks:
    """What a Run keeps about clocks and neighbours."""
    others = [count for count in after.other_processes if count is not None]
    return Clocks(seen.sm_mhz, seen.throttle_reasons, sum(others) if others else None)


def _group_of(pid: int) -> int | None:
    """None for a process that is gone or in another container."""
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


def _all_known(values: Sequence[float | None]) -> list[float] | None:
    """None if any is unknown."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def _or_none(nvml: Any, read: Any) -> Any:
    """What `read` returns, or None if this GPU or driver does not offer it."""
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
