from __future__ import annotations

import pytest

from batch_inference.core.config import ConfigError
from batch_inference.core.results import DeviceInfo
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
    peaks = peaks_of(name, "bfloat16")
    assert peaks is not None
    assert peaks.bytes_per_s == bytes_per_s
    assert peaks.source.startswith("https://www.nvidia.com/")


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
    peaks = measure_peaks(Devices("cpu", ("0",)), "bfloat16")
    assert 1e9 < peaks.flops_per_s < 1e14
    assert 1e8 < peaks.bytes_per_s < 1e12
    assert peaks.source.startswith("measured")


@pytest.mark.slow
def test_a_measurement_that_fails_says_why() -> None:
    with pytest.raises(ConfigError, match=r"--measure-peaks: .*no_such_type.*; leave it out"):
        measure_peaks(Devices("cpu", ("0",)), "no_such_type")
