from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from batch_inference.core.child import ChildError
from batch_inference.core.config import ConfigError
from batch_inference.core.results import DeviceInfo
from batch_inference.measure import peaks
from batch_inference.measure.peaks import datasheet_peaks, measure_peaks, peaks_of
from batch_inference.plan.devices import Devices


@pytest.mark.parametrize(
    ("name", "bytes_per_s"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("NVIDIA H100 PCIe", 2.0e12),
        ("NVIDIA H200", 4.8e12),
        ("NVIDIA H200 NVL", 4.8e12),
        ("NVIDIA A100-SXM4-40GB", 1.555e12),
        ("NVIDIA A100-SXM4-80GB", 2.039e12),
        ("NVIDIA L40S", 0.864e12),
        ("NVIDIA L4", 0.3e12),
    ],
)
def test_a_device_is_known_by_its_name(name: str, bytes_per_s: float) -> None:
    found = peaks_of(name, "bfloat16")
    assert found is not None
    assert found.bytes_per_s == bytes_per_s
    assert found.source.startswith("https://www.nvidia.com/")


@pytest.mark.parametrize(
    "name",
    ["NVIDIA H20", "NVIDIA GH200 480GB", "NVIDIA L40", "NVIDIA A1000", "AMD EPYC", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"],
)
def test_a_device_of_a_similar_name_is_not_taken_for_another(name: str) -> None:
    assert peaks_of(name, "bfloat16") is None


def test_devices_of_one_kind_have_a_peak() -> None:
    same, other = DeviceInfo(0, "NVIDIA H200 NVL"), DeviceInfo(0, "NVIDIA H200")
    found = datasheet_peaks([same, same], "float16")
    assert found is not None
    assert found.flops_per_s == 835.5e12
    assert datasheet_peaks([same, other], "float16") is None
    assert datasheet_peaks([], "float16") is None


def test_sixteen_bits_are_what_the_table_knows() -> None:
    assert peaks_of("NVIDIA H200", "float32") is None


@pytest.mark.slow
def test_the_peaks_of_a_core_can_be_measured() -> None:
    found = measure_peaks(Devices("cpu", ("0",)), "bfloat16")
    assert 1e9 < found.flops_per_s < 1e14
    assert 1e8 < found.bytes_per_s < 1e12
    assert found.source.startswith("measured")


@pytest.mark.slow
def test_a_measurement_that_fails_says_why() -> None:
    with pytest.raises(ConfigError, match=r"--measure-peaks: .*no_such_type.*; leave it out"):
        measure_peaks(Devices("cpu", ("0",)), "no_such_type")


class FakeTorch:
    """So much of torch as is used, on a clock of its own: a product takes 1/8 s and a copy 1/16 s, the first of each
    100 s."""

    def __init__(self, *, has_gpu: bool) -> None:
        self.now_s, self.waits, self.threads = 0.0, 0, 0
        self.first = {"product", "copy"}
        self.bfloat16, self.uint8 = "bfloat16", "uint8"
        self.cuda = SimpleNamespace(is_available=lambda: has_gpu, synchronize=self._wait)

    def _wait(self) -> None:
        self.waits += 1

    def _take(self, what: str, seconds: float) -> None:
        self.now_s += 100.0 if what in self.first else seconds
        self.first.discard(what)

    def device(self, name: str) -> str:
        return name

    def set_num_threads(self, count: int) -> None:
        self.threads = count

    def randn(self, *shape: int, device: str, dtype: str) -> Any:
        return SimpleNamespace(shape=shape, device=device, dtype=dtype)

    def matmul(self, left: Any, right: Any) -> None:
        assert left.shape == right.shape
        self._take("product", 0.125)

    def empty(self, _count: int, **_: Any) -> Any:
        return SimpleNamespace(copy_=lambda _: self._take("copy", 0.0625))


@pytest.mark.parametrize(
    ("has_gpu", "cores", "size", "count"),
    [(True, [], 8192, 2**30), (False, [], 2048, 2**27), (False, ["0,2"], 2048, 2**27), (True, ["0,2"], 2048, 2**27)],
)
def test_a_product_and_a_copy_are_counted_twice_and_the_first_of_each_not(
    has_gpu: bool, cores: list[str], size: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch, bound, printed = FakeTorch(has_gpu=has_gpu), [], []
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(peaks, "time", SimpleNamespace(perf_counter=lambda: torch.now_s))
    monkeypatch.setattr(os, "sched_setaffinity", lambda *words: bound.append(words))
    monkeypatch.setattr("builtins.print", printed.append)
    peaks.main("bfloat16", *cores)
    # A product is a multiplication and an addition of each; a copy reads and writes each byte.
    assert json.loads(printed[0]) == {
        "flops_per_s": pytest.approx(2 * size**3 / 0.125),
        "bytes_per_s": pytest.approx(2 * count / 0.0625),
    }
    assert (bound, torch.threads) == (([(0, {0, 2})], 2) if cores else ([], 0))
    # A GPU answers before it has worked: it is waited for after the first, and after every five.
    assert torch.waits == (2 + 1 + 2 if has_gpu and not cores else 0)


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        (Devices("gpu", ("3", "5")), ("measure.peaks", "bfloat16")),
        (Devices("cpu", ("0,1", "2,3")), ("measure.peaks", "bfloat16", "0,1")),
    ],
)
def test_the_first_device_alone_is_measured(
    devices: Devices, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def ask(*said: str, environment: dict[str, str], timeout_s: float) -> dict[str, float]:
        asked.append((said, environment, timeout_s))
        return {"flops_per_s": 3e12, "bytes_per_s": 4e11}

    monkeypatch.setattr(peaks, "ask", ask)
    found = measure_peaks(devices, "bfloat16")
    assert (found.flops_per_s, found.bytes_per_s, found.dtype) == (3e12, 4e11, "bfloat16")
    assert asked == [(words, devices.slice_for(0, 1).environment(), 300.0)]


def test_a_device_that_cannot_be_measured_is_the_users_to_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: str, **__: Any) -> Any:
        raise ChildError("it ended with exit code 1")

    monkeypatch.setattr(peaks, "ask", ask)
    with pytest.raises(ConfigError, match=r"^--measure-peaks: it ended with exit code 1; leave it out$"):
        measure_peaks(Devices("gpu", ("0",)), "bfloat16")


@pytest.mark.parametrize(
    ("name", "flops_per_s"),
    [
        ("NVIDIA B200", 2250e12), ("NVIDIA H200", 989.4e12), ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 NVL", 835.5e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12), ("NVIDIA A100-PCIE-40GB", 312e12), ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12), ("NVIDIA A10", 125e12), ("Tesla V100-SXM2-32GB", 125e12),
    ],
)  # fmt: skip
def test_the_dense_peak_in_16_bits_is_that_of_the_datasheet(name: str, flops_per_s: float) -> None:
    found = peaks_of(name, "float16")
    assert found is not None
    assert found.flops_per_s == flops_per_s
