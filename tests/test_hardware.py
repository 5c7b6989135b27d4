from __future__ import annotations

import os
from pathlib import Path

import pytest

from batch_inference import hardware
from batch_inference.hardware import CpuMonitor, Devices, find_devices

EIGHT_GPUS = Devices("gpu", tuple("01234567"))


@pytest.mark.parametrize(
    ("replica", "per_replica", "visible"), [(0, 2, "0,1"), (1, 2, "2,3"), (3, 2, "6,7"), (1, 4, "4,5,6,7")]
)
def test_each_replica_sees_its_own_slice_of_the_gpus(replica: int, per_replica: int, visible: str) -> None:
    environment = EIGHT_GPUS.slice_for(replica, per_replica).environment()
    assert environment == {"CUDA_VISIBLE_DEVICES": visible}


def test_cores_are_shared_out_one_slice_per_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr(hardware, "_gpu_ids", tuple)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(17)))
    devices = find_devices()
    assert devices.kind == "cpu"
    assert devices.ids[:2] == ("0,1", "2,3")
    assert len(devices) == 8
    assert devices.slice_for(1, 2).environment() == {"VLLM_CPU_OMP_THREADS_BIND": "4,5|6,7"}


def test_a_binding_of_the_users_own_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
    assert Devices("cpu", ("0", "1")).environment() == {}


@pytest.mark.parametrize(
    ("visible", "ids"),
    [
        (None, ("0", "1", "2", "3")),
        ("2,0", ("2", "0")),
        ("", ()),
        ("-1", ()),
        ("GPU-a", ("GPU-a",)),
        ("0,-1,1", ("0",)),
        ("1,7,2", ("1",)),
        ("0,abc", ("0",)),
    ],
)
def test_cuda_visible_devices_decides(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, ids: tuple[str, ...]
) -> None:
    monkeypatch.setattr(hardware, "_gpu_ids", lambda: ("0", "1", "2", "3"))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_devices() == Devices("gpu", ids)


def test_memory_of_a_process_tree_is_what_the_kernel_says() -> None:
    (used_gib,) = CpuMonitor(Devices("cpu", ("0",))).read([os.getpid()])["used_gib"]
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident_gib = resident_pages * os.sysconf("SC_PAGE_SIZE") / hardware.GIB
    assert used_gib == pytest.approx(resident_gib, rel=0.2)
