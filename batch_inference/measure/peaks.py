"""The most that one device can do, on which MFU and MBU are based: from datasheets, or from --measure-peaks.

    python -m batch_inference.measure.peaks DTYPE [CORES]      prints {"flops_per_s": ..., "bytes_per_s": ...}

measures in its own process, on the first device that it sees, before any engine loads.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from batch_inference.core.child import ChildError, ask
from batch_inference.core.config import ConfigError
from batch_inference.core.results import DeviceInfo, Peaks
from batch_inference.plan.devices import Devices

# Words in NVML's name -> dense 16-bit tensor throughput (FP16 and BF16, without sparsity), memory bandwidth, and the
# page on which NVIDIA states them. The first entry whose words are all in the name counts.
DATASHEETS: tuple[tuple[str, float, float, str], ...] = (
    ("B200", 2250e12, 8.0e12, "https://www.nvidia.com/en-us/data-center/dgx-b200/"),
    ("H200 NVL", 835.5e12, 4.8e12, "https://www.nvidia.com/en-us/data-center/h200/"),
    ("H200", 989.4e12, 4.8e12, "https://www.nvidia.com/en-us/data-center/h200/"),
    ("H100 NVL", 835.5e12, 3.9e12, "https://www.nvidia.com/en-us/data-center/h100/"),
    ("H100 PCIe", 756e12, 2.0e12, "https://www.nvidia.com/en-us/data-center/h100/"),
    ("H100", 989.4e12, 3.35e12, "https://www.nvidia.com/en-us/data-center/h100/"),
    ("A100-SXM4-40GB", 312e12, 1.555e12, "https://www.nvidia.com/en-us/data-center/a100/"),
    ("A100-PCIE-40GB", 312e12, 1.555e12, "https://www.nvidia.com/en-us/data-center/a100/"),
    ("A100 80GB PCIe", 312e12, 1.935e12, "https://www.nvidia.com/en-us/data-center/a100/"),
    ("A100", 312e12, 2.039e12, "https://www.nvidia.com/en-us/data-center/a100/"),
    ("L40S", 362e12, 0.864e12, "https://www.nvidia.com/en-us/data-center/l40s/"),
    ("L4", 121e12, 0.3e12, "https://www.nvidia.com/en-us/data-center/l4/"),
    ("A10", 125e12, 0.6e12, "https://www.nvidia.com/en-us/data-center/products/a10-gpu/"),
    ("V100", 125e12, 0.9e12, "https://www.nvidia.com/en-us/data-center/v100/"),
)
_MEASURE_TIMEOUT_S = 300.0
_LEAST_S = 0.5  # of timed work for each of the two


def peaks_of(device_name: str, dtype: str | None) -> Peaks | None:
    """What a device's datasheet says for weights of `dtype`; None if it is not known here."""
    # A slice of a GPU has only a share.
    if dtype not in ("float16", "bfloat16") or re.search(r"\bMIG\b", device_name):
        return None
    for words, flops_per_s, bytes_per_s, source in DATASHEETS:
        # Whole words: an H200 is not an H20, and a GH200 is not an H200.
        if re.search(rf"\b{words}\b", device_name):
            return Peaks(flops_per_s, bytes_per_s, source, dtype)
    return None


def datasheet_peaks(devices: Sequence[DeviceInfo], dtype: str | None) -> Peaks | None:
    """`peaks_of` the devices in a result file; None if they are not all the same."""
    names = {device.name for device in devices}
    return peaks_of(names.pop(), dtype) if len(names) == 1 else None


def measure_peaks(devices: Devices, dtype: str) -> Peaks:
    """One matrix product and one copy on the first device, in a few seconds. Raises ConfigError if it fails."""
    first = devices.slice_for(0, 1)
    words = [dtype, *(first.ids if first.kind == "cpu" else ())]
    try:
        found = ask("measure.peaks", *words, timeout_s=_MEASURE_TIMEOUT_S, environment=first.environment())
    except ChildError as error:
        raise ConfigError(f"--measure-peaks: {error}; leave it out") from error
    return Peaks(found["flops_per_s"], found["bytes_per_s"], "measured: one matrix product, one copy", dtype)


def main(dtype: str, cores: str | None = None) -> None:
    import torch

    on_gpu = torch.cuda.is_available() and cores is None
    if cores is not None:
        own = {int(core) for core in cores.split(",")}
        os.sched_setaffinity(0, own)
        torch.set_num_threads(len(own))
    device = torch.device("cuda" if on_gpu else "cpu")
    # Large enough to fill the device, and far larger than its caches.
    size, count = (8192, 2**30) if on_gpu else (2048, 2**27)

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    left, right = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    product_s = _seconds_each(lambda: torch.matmul(left, right), wait)
    source, target = (torch.empty(count, device=device, dtype=torch.uint8) for _ in range(2))
    copy_s = _seconds_each(lambda: target.copy_(source), wait)
    print(json.dumps({"flops_per_s": 2 * size**3 / product_s, "bytes_per_s": 2 * count / copy_s}))


def _seconds_each(work: Callable[[], Any], wait: Callable[[], None]) -> float:
    """Seconds per call, over enough calls; the first is not counted."""
    work()
    wait()
    calls, start_s = 0, time.perf_counter()
    while True:
        for _ in range(5):
            work()
        wait()
        calls += 5
        taken_s = time.perf_counter() - start_s
        if taken_s >= _LEAST_S:
            return taken_s / calls


if __name__ == "__main__":
    main(*sys.argv[1:])
