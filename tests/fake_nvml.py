"""NVML on a machine with two GPUs, of which the first has no energy counter and the second is too hot."""

# ruff: noqa: N802, N816 - NVML's own names

from types import SimpleNamespace

from batch_inference.plan.devices import GIB


class NVMLError(Exception):
    pass


NVML_CLOCK_SM = 1
nvmlClocksThrottleReasonNone = 0
nvmlClocksThrottleReasonGpuIdle = 1
nvmlClocksThrottleReasonSwPowerCap = 4
nvmlClocksThrottleReasonHwThermalSlowdown = 64
nvmlClocksThrottleReasonAll = 69


def nvmlInit() -> None:
    pass


def nvmlDeviceGetHandleByIndex(index: int) -> int:
    return index


def nvmlDeviceGetName(handle: int) -> str:
    return f"GPU {handle}"


def nvmlDeviceGetUUID(handle: int) -> str:
    return f"GPU-{handle}"


def nvmlDeviceGetEnforcedPowerLimit(_handle: int) -> int:
    return 700_000


def nvmlDeviceGetPowerUsage(handle: int) -> int:
    return 70_000 + handle * 1000


def nvmlDeviceGetMaxClockInfo(handle: int, _clock: int) -> int:
    return 1980 - handle


nvmlDeviceGetClockInfo = nvmlDeviceGetMaxClockInfo


def nvmlDeviceGetMemoryInfo(handle: int) -> SimpleNamespace:
    return SimpleNamespace(total=80 * GIB, used=(1 + handle) * GIB)


def nvmlDeviceGetTotalEnergyConsumption(handle: int) -> int:
    if handle == 0:
        raise NVMLError
    return 5000


def nvmlDeviceGetComputeRunningProcesses(_handle: int) -> list[SimpleNamespace]:
    return []


def nvmlDeviceGetCurrentClocksThrottleReasons(handle: int) -> int:
    return (nvmlClocksThrottleReasonGpuIdle, nvmlClocksThrottleReasonHwThermalSlowdown)[handle]
