from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_nvml
import msgspec
import psutil
import pytest

from batch_inference.core.config import ConfigError
from batch_inference.core.results import Clocks, DeviceInfo
from batch_inference.measure import hardware
from batch_inference.measure.hardware import CpuMonitor, GpuMonitor, Reading, Seen, clocks_of, drawn_j, joined
from batch_inference.plan import devices as plan_devices
from batch_inference.plan.devices import Devices, find_devices, find_nvml, smallest_memory_gib

EIGHT_GPUS = Devices("gpu", tuple("01234567"))


@pytest.mark.parametrize(
    ("replica", "per_replica", "visible"), [(0, 2, "0,1"), (1, 2, "2,3"), (3, 2, "6,7"), (1, 4, "4,5,6,7")]
)
def test_each_replica_sees_its_own_slice_of_the_gpus(replica: int, per_replica: int, visible: str) -> None:
    environment = EIGHT_GPUS.slice_for(replica, per_replica).environment()
    # The numbers are NVML's, which counts by the bus.
    assert environment == {"CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert EIGHT_GPUS.rank_environment(replica) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def test_cores_are_shared_out_one_slice_per_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr(plan_devices, "_gpu_ids", tuple)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(17)))
    devices = find_devices()
    assert devices.kind == "cpu"
    assert devices.ids[:2] == ("0,1", "2,3")
    assert len(devices) == 8
    assert devices.slice_for(1, 2).environment() == {"VLLM_CPU_OMP_THREADS_BIND": "4,5|6,7"}


@pytest.mark.parametrize(
    ("binding", "ids"),
    [("0-3|4,6", ("0,1,2,3", "4,6")), ("5", ("5",)), ("auto", ("0", "1")), ("nobind", ("0", "1")), ("", ("0", "1"))],
)
def test_a_binding_of_the_users_own_says_which_cores_are_devices(
    monkeypatch: pytest.MonkeyPatch, binding: str, ids: tuple[str, ...]
) -> None:
    monkeypatch.setattr(plan_devices, "_gpu_ids", tuple)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", binding)
    devices = find_devices()
    assert devices == Devices("cpu", ids)
    # A word is vLLM's own to read.
    expected = {} if binding in ("auto", "nobind", "") else {"VLLM_CPU_OMP_THREADS_BIND": "|".join(ids)}
    assert devices.environment() == expected


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
        ("0,0", ()),
        ("0,1,2,1", ()),
        ("0,-1,0", ("0",)),  # what comes after the end of the list is not read
        ("1,1,-1", ()),
        (" 2 , 0", ("2", "0")),
        ("0,,1", ("0",)),
        (",0", ()),
        (" ", ()),
        ("abc", ()),
        ("1gpu2,2x", ("1", "2")),
        ("+1,01", ()),
        ("03", ("3",)),
        ("9" * 5000, ()),
        ("\u0661", ()),
        ("0,GPU-a", ("0",)),
        ("GPU-a,0", ("GPU-a",)),
        ("GPU-a,GPU-b", ("GPU-a", "GPU-b")),
        ("GPU-a, GPU-b", ("GPU-a",)),
        ("GPU-a,GPU-a", ()),
        ("GPU-a,MIG-b", ("GPU-a",)),
        ("MIG-a,MIG-b", ("MIG-a", "MIG-b")),
        ("MIG-GPU-a/1/0,MIG-GPU-a/2/0", ("MIG-GPU-a/1/0", "MIG-GPU-a/2/0")),
        ("MIG-a,MIG-a", ()),
        ("gpu-a", ()),
    ],
)
def test_cuda_visible_devices_decides(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, ids: tuple[str, ...]
) -> None:
    monkeypatch.setattr(plan_devices, "_gpu_ids", lambda: ("0", "1", "2", "3"))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_devices() == Devices("gpu", ids)


LISTED = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aa11-2233)
  MIG 3g.40gb     Device  0: (UUID: MIG-5566-77)
  MIG 3g.40gb     Device  1: (UUID: MIG-5599-00)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-aa22-4455)
"""


@pytest.mark.parametrize(
    ("visible", "ids"),
    [
        ("GPU-aa11-2233,GPU-aa22-4455", ("GPU-aa11-2233", "GPU-aa22-4455")),
        ("GPU-aa2,GPU-aa1", ("GPU-aa2", "GPU-aa1")),
        ("GPU-aa", ()),  # both begin so
        ("GPU-aa1,GPU-aa", ("GPU-aa1",)),
        ("GPU-bb,GPU-aa1", ()),
        ("GPU-aa1,GPU-bb,GPU-aa2", ("GPU-aa1",)),
        ("GPU-aa1,GPU-aa11", ()),  # one GPU twice
        ("GPU-aa1,GPU-bb,GPU-aa1", ()),
        ("MIG-5566,MIG-5599-00", ("MIG-5566", "MIG-5599-00")),
        ("MIG-55", ()),
        ("MIG-6,MIG-5566", ()),
        ("MIG-GPU-aa11-2233/1/0", ("MIG-GPU-aa11-2233/1/0",)),
    ],
)
def test_an_identifier_may_be_cut_where_one_gpu_alone_begins_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, ids: tuple[str, ...]
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTED}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(plan_devices, "_gpu_ids", lambda: ("0", "1"))
    assert find_devices() == Devices("gpu", ids)


def test_memory_of_a_process_tree_is_what_the_kernel_says() -> None:
    (used_gib,) = CpuMonitor(Devices("cpu", ("0",))).read([os.getpid()]).used_gib
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident_gib = resident_pages * os.sysconf("SC_PAGE_SIZE") / plan_devices.GIB
    assert used_gib == pytest.approx(resident_gib, rel=0.2)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> GpuMonitor:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml)
    return GpuMonitor(Devices("gpu", ("0", "1")))


# As the real one does.
LOOKS_ITSELF_UP = "\nimport sys\nsys.modules[__name__].nvmlInit()\n"


@pytest.fixture
def vllm_without_nvidia_ml_py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A vLLM that may not be imported; the folder of what it brings along."""
    folder = tmp_path / "vllm" / "third_party"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise SystemExit('vLLM was imported')")
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_without_nvidia_ml_py_the_copy_in_vllm_is_asked(vllm_without_nvidia_ml_py: Path) -> None:
    (vllm_without_nvidia_ml_py / "pynvml.py").write_text(Path(fake_nvml.__file__).read_text() + LOOKS_ITSELF_UP)
    devices = Devices("gpu", ("0", "1"))
    assert smallest_memory_gib(devices) == 80
    assert GpuMonitor(devices).read().used_gib == [1, 2]
    assert find_nvml() is find_nvml()
    assert "vllm" not in sys.modules


@pytest.mark.usefixtures("vllm_without_nvidia_ml_py")
def test_without_any_nvml_a_plan_knows_no_memory_and_nothing_is_measured() -> None:
    devices = Devices("gpu", ("0",))
    assert smallest_memory_gib(devices) is None
    with pytest.raises(ConfigError, match=r"has no nvidia-ml-py, and .* pip install nvidia-ml-py$"):
        GpuMonitor(devices)


def test_the_copy_in_vllm_has_all_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the vLLM that is installed here, where one is."""
    monkeypatch.delitem(sys.modules, "vllm", raising=False)  # another test's stub
    monkeypatch.setitem(sys.modules, "pynvml", None)
    nvml = find_nvml()
    if nvml is None:
        pytest.skip("no vLLM is installed")
    source = Path(hardware.__file__).read_text() + Path(plan_devices.__file__).read_text()
    asked = set(re.findall(r"nvml\.((?:nvml|NVML)\w+)", source))
    assert len(asked) > 12
    assert {name for name in asked if not hasattr(nvml, name)} == set()


def test_devices_are_described_before_anything_runs(gpus: GpuMonitor) -> None:
    first, second = gpus.identify()
    assert (first.memory_gib, first.used_before_gib, first.power_limit_w) == (80, 1, 700)
    assert (second.name, second.idle_power_w, second.max_sm_mhz) == ("GPU 1", 71, 1979)


def test_what_a_device_draws_under_an_engine_is_not_called_idle(gpus: GpuMonitor) -> None:
    (idle, _), (loaded, _) = gpus.identify(), gpus.identify(in_use=True)
    assert idle.used_before_gib is not None
    assert idle.idle_power_w is not None
    assert loaded == msgspec.structs.replace(idle, used_before_gib=None, idle_power_w=None)


def test_what_a_gpu_has_no_counter_for_is_unknown(gpus: GpuMonitor) -> None:
    reading = gpus.read()
    assert reading.energy_j == [None, 5.0]
    assert reading.used_gib == [1, 2]


def test_a_gpu_that_shares_the_main_memory_tells_none_of_its_own(
    gpus: GpuMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(_handle: int) -> None:
        raise fake_nvml.NVMLError

    before = gpus.read()
    monkeypatch.setattr(fake_nvml, "nvmlDeviceGetMemoryInfo", unsupported)
    monkeypatch.setattr(hardware, "SAMPLE_S", 0.01)
    assert [(one.memory_gib, one.used_before_gib) for one in gpus.identify()] == [(None, None)] * 2
    reading = gpus.read()
    assert (reading.used_gib, joined([reading, before]).used_gib) == (None, None)
    assert (gpus.held(before), gpus.held(reading)) == (None, None)
    with gpus.watch() as seen:
        time.sleep(0.2)
    assert (seen.peak_gib, seen.sm_mhz) == (None, [1980, 1979])


@pytest.fixture
def neighbour() -> Iterator[int]:
    """A process of another group, as an engine of somebody else is."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    yield process.pid
    process.kill()
    process.wait()


def test_processes_of_other_groups_are_neighbours(
    gpus: GpuMonitor, neighbour: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = os.getpid()
    running = [SimpleNamespace(pid=pid) for pid in (own, neighbour, 2**22 + 1)]
    monkeypatch.setattr(fake_nvml, "nvmlDeviceGetComputeRunningProcesses", lambda handle: running * handle)
    assert gpus.read([own]).other_processes == [0, 1]
    assert gpus.read([own, neighbour]).other_processes == [0, 0]
    assert clocks_of(gpus.read([own]), Seen()).other_processes == 1


def test_clocks_are_watched_while_a_run_is_on(gpus: GpuMonitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "SAMPLE_S", 0.01)
    clock_of, is_last_asked = fake_nvml.nvmlDeviceGetClockInfo, threading.Event()

    def asked(handle: int, clock: int) -> int:
        if handle == 1:
            is_last_asked.set()
        return clock_of(handle, clock)

    monkeypatch.setattr(fake_nvml, "nvmlDeviceGetClockInfo", asked)
    with gpus.watch() as seen:
        assert is_last_asked.wait(20)
    assert seen == Seen(
        sm_mhz=[1980, 1979],
        peak_gib=[1, 2],
        throttle_reasons=["gpu_idle", "hw_thermal_slowdown"],
    )


def test_a_run_too_short_to_be_watched_says_nothing_of_clocks(gpus: GpuMonitor) -> None:
    with gpus.watch() as seen:
        pass
    assert seen == Seen()
    assert clocks_of(Reading("device", [1.0], [None], [None]), seen) == Clocks()


def test_the_cpu_has_no_clocks_to_watch() -> None:
    with CpuMonitor(Devices("cpu", ("0",))).watch() as seen:
        pass
    assert clocks_of(CpuMonitor(Devices("cpu", ("0",))).read([os.getpid()]), seen) == Clocks()


def test_a_device_that_holds_more_than_before_names_its_holders(
    gpus: GpuMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = gpus.read()
    assert gpus.held(before) is None
    before.used_gib[1] -= 1.5
    assert gpus.held(before) == "GPU 1 holds 1.5 GiB more than before, for a process not seen here"
    monkeypatch.setattr(fake_nvml, "nvmlDeviceGetComputeRunningProcesses", lambda _: [SimpleNamespace(pid=7)])
    assert gpus.held(before) == "GPU 1 holds 1.5 GiB more than before, for process 7"


# --- which devices, and how much of each ---------------------------------------------------------------------------


def test_a_rank_of_torchrun_has_a_thread_for_each_of_its_cores() -> None:
    devices = Devices("cpu", ("0,1,2", "7"))
    assert devices.rank_environment(0) == {
        "OMP_NUM_THREADS": "3", "OMP_PLACES": "{0,1,2}", "OMP_PROC_BIND": "true",
    }  # fmt: skip
    assert devices.rank_environment(1)["OMP_NUM_THREADS"] == "1"
    assert devices.rank_environment(1)["OMP_PLACES"] == "{7}"


def test_a_binding_that_is_a_word_for_one_rank_is_vllms_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1|nobind")
    assert plan_devices._bound_cores() == ()
    assert Devices("cpu", ("0", "1")).environment() == {}


def test_gpus_are_counted_by_the_drivers_own_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "nvidia1-caps"):
        (tmp_path / name).touch()
    monkeypatch.setattr(plan_devices, "Path", lambda _: tmp_path)
    assert plan_devices._gpu_ids() == ("0", "1", "2")


def test_where_the_driver_has_no_list_its_tool_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_devices, "Path", lambda _: tmp_path)
    listing = "GPU 0: NVIDIA H100 (UUID: a)\n  MIG 1g.10gb Device 0: (UUID: b)\nGPU 1: NVIDIA H100 (UUID: c)\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=listing))
    assert plan_devices._gpu_ids() == ("0", "1")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="No devices found\n"))
    assert plan_devices._gpu_ids() == ()


def test_the_plan_counts_with_the_memory_of_the_smallest_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml)
    sizes = {0: 80, 1: 40, 2: 141}
    monkeypatch.setattr(
        fake_nvml, "nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(total=sizes[handle] * plan_devices.GIB)
    )
    assert smallest_memory_gib(Devices("gpu", ("0", "1", "2"))) == 40
    assert smallest_memory_gib(Devices("gpu", ("0", "2"))) == 80
    # Nothing here is asked about GPUs that are elsewhere, hidden, or none.
    assert smallest_memory_gib(plan_devices.devices_elsewhere(2)) is None
    assert smallest_memory_gib(Devices("gpu", ())) is None
    assert smallest_memory_gib(Devices("cpu", ("0",))) is None
    monkeypatch.setattr(fake_nvml, "nvmlInit", _refuse)
    assert smallest_memory_gib(Devices("gpu", ("0",))) is None


def _refuse(*_: Any) -> Any:
    raise fake_nvml.NVMLError


def test_a_gpu_is_found_by_its_number_or_the_beginning_of_its_identifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_nvml, "nvmlDeviceGetCount", lambda: 3, raising=False)
    monkeypatch.setattr(fake_nvml, "nvmlDeviceGetHandleByUUID", _refuse, raising=False)
    monkeypatch.setattr(fake_nvml, "nvmlDeviceGetUUID", lambda handle: f"GPU-{handle}a3f-e201")
    assert [plan_devices.nvml_handle(fake_nvml, name) for name in ("1", "GPU-2a", "GPU-0a3f-e201")] == [1, 2, 0]
    with pytest.raises(fake_nvml.NVMLError):
        plan_devices.nvml_handle(fake_nvml, "GPU-7")


def test_a_gpu_that_nvml_does_not_know_is_wrong_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml)
    monkeypatch.setattr(fake_nvml, "nvmlDeviceGetHandleByIndex", _refuse)
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES: '0,1': NVML says"):
        GpuMonitor(Devices("gpu", ("0", "1")))


# --- what is read, bound by bound ----------------------------------------------------------------------------------


def test_half_a_gib_more_than_before_is_what_comes_and_goes(gpus: GpuMonitor) -> None:
    before = gpus.read()
    before.used_gib[1] -= 0.5
    assert gpus.held(before) is None
    before.used_gib[1] -= 0.25
    assert gpus.held(before) == "GPU 1 holds 0.8 GiB more than before, for a process not seen here"


def test_neighbours_that_nvml_does_not_tell_of_are_unknown_and_not_none(
    gpus: GpuMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_nvml, "nvmlDeviceGetComputeRunningProcesses", _refuse)
    assert gpus.read([os.getpid()]).other_processes == [None, None]


@pytest.mark.parametrize(
    ("counted", "together"), [([1, 2], 3), ([None, 2], 2), ([0, 0], 0), ([None], None), ([], None)]
)
def test_neighbours_of_all_devices_are_added_up(counted: list[int | None], together: int | None) -> None:
    assert clocks_of(Reading("device", [1.0], [None], counted), Seen()).other_processes == together


def test_readings_of_several_workers_are_one() -> None:
    one, two = Reading("device", [1.0], [10.0], [0]), Reading("device", [2.0, 3.0], [None, 20.0], [2, None])
    assert joined([one, two]) == Reading("device", [1.0, 2.0, 3.0], [10.0, None, 20.0], [0, 2, None])


@pytest.mark.parametrize(
    ("before_j", "after_j", "drawn"),
    [
        ([1.0, 20.0], [4.5, 26.0], 9.5),
        ([None, 20.0], [4.5, 26.0], None),
        ([1.0, 20.0], [4.5, None], None),
        ([None, None], [None, None], None),
    ],
)
def test_energy_is_what_all_devices_drew_or_unknown(
    before_j: list[float | None], after_j: list[float | None], drawn: float | None
) -> None:
    assert drawn_j(Reading("device", [1.0, 1.0], before_j), Reading("device", [1.0, 1.0], after_j)) == drawn


def test_a_clock_is_the_mean_and_memory_the_peak_of_what_was_seen(
    gpus: GpuMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "SAMPLE_S", 0.001)
    made: dict[int, list[Any]] = {0: [], 1: []}

    def sample(handle: int) -> Any:
        number = len(made[handle])
        clock = None if handle else 1000.0 + 100 * (number % 3)
        made[handle].append(hardware._Sample(5.0 - number % 4, clock, ()))
        return made[handle][-1]

    monkeypatch.setattr(gpus, "_sample", sample)
    with gpus.watch() as seen:
        while len(made[1]) < 5:
            time.sleep(0.001)
    clocks = [one.sm_mhz for one in made[0]]
    assert seen.sm_mhz == [pytest.approx(sum(clocks) / len(clocks)), None]
    assert seen.peak_gib == [5.0, 5.0]


def test_a_gpu_that_does_not_say_why_it_is_slow_has_no_reason(
    gpus: GpuMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", _refuse)
    assert gpus._sample(0).reasons == ()
    assert gpus._sample(0).used_gib == 1


def test_devices_of_a_cpu_share_its_memory_equally(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=64 * plan_devices.GIB))
    devices = Devices("cpu", ("0,1", "2,3", "4,5", "6,7"))
    found = hardware.monitor(devices).identify()
    assert [(one.index, one.cores, one.memory_gib) for one in found] == [
        (0, "0,1", 16), (1, "2,3", 16), (2, "4,5", 16), (3, "6,7", 16),
    ]  # fmt: skip


def test_the_cpu_is_named_as_the_kernel_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A CPU: v2 @ 3 GHz\nmodel name\t: another\n")
    monkeypatch.setattr(hardware, "Path", lambda _: tmp_path / "cpuinfo")
    assert hardware.cpu_name() == "A CPU: v2 @ 3 GHz"


def test_gpus_are_watched_by_nvml_and_cores_by_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml)
    assert isinstance(hardware.monitor(Devices("gpu", ("0",))), GpuMonitor)
    assert isinstance(hardware.monitor(Devices("cpu", ("0",))), CpuMonitor)
    assert CpuMonitor(Devices("cpu", ("0",))).read([2**22 + 1]).used_gib == [0]


def test_gpus_are_described_field_by_field(gpus: GpuMonitor, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = gpus.identify()
    common = {"memory_gib": 80.0, "power_limit_w": 700.0}
    assert first == DeviceInfo(
        index=0, name="GPU 0", uuid="GPU-0", used_before_gib=1.0, idle_power_w=70.0, max_sm_mhz=1980, **common
    )
    assert second == DeviceInfo(
        index=1, name="GPU 1", uuid="GPU-1", used_before_gib=2.0, idle_power_w=71.0, max_sm_mhz=1979, **common
    )
    monkeypatch.setattr(fake_nvml, "nvmlSystemGetDriverVersion", lambda: b"570".decode(), raising=False)
    assert gpus.driver_version() == "570"
    assert CpuMonitor(Devices("cpu", ("0",))).driver_version() is None
    assert CpuMonitor(Devices("cpu", ("0",))).held(Reading("replica", [], [])) is None


def test_nvml_is_begun_before_it_is_asked_and_what_it_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(hardware, "find_nvml", lambda: fake_nvml)
    monkeypatch.setattr(hardware, "nvml_handle", lambda _, device: asked.append(device) or device)
    monkeypatch.setattr(fake_nvml, "nvmlInit", lambda: asked.append("begun"))
    GpuMonitor(Devices("gpu", ("3", "1")))
    assert asked == ["begun", "3", "1"]

    def fail() -> None:
        raise fake_nvml.NVMLError("Not Found")

    monkeypatch.setattr(fake_nvml, "nvmlInit", fail)
    with pytest.raises(ConfigError) as caught:
        GpuMonitor(Devices("gpu", ("3", "1")))
    assert str(caught.value) == "CUDA_VISIBLE_DEVICES: '3,1': NVML says: Not Found"
    monkeypatch.setattr(hardware, "find_nvml", lambda: None)
    with pytest.raises(ConfigError) as caught:
        GpuMonitor(Devices("gpu", ("0",)))
    assert str(caught.value) == (
        f"{sys.executable} has no nvidia-ml-py, and vLLM's copy of it is missing: pip install nvidia-ml-py"
    )


def test_all_who_hold_a_device_are_named(gpus: GpuMonitor, monkeypatch: pytest.MonkeyPatch) -> None:
    before = gpus.read()
    before.used_gib[0] -= 0.75
    before.used_gib[1] -= 9.0
    running = [SimpleNamespace(pid=7), SimpleNamespace(pid=8)]
    monkeypatch.setattr(fake_nvml, "nvmlDeviceGetComputeRunningProcesses", lambda handle: running[: 2 - handle])
    assert gpus.held(before) == "GPU 0 holds 0.8 GiB more than before, for process 7, process 8"


def test_readings_of_several_devices_are_joined_field_by_field() -> None:
    one = Reading("device", used_gib=[1.0], energy_j=[None], other_processes=[3])
    two = Reading("device", used_gib=[2.0, 4.0], energy_j=[5.0, 6.0], other_processes=[None, 7])
    assert joined([one, two]) == Reading("device", [1.0, 2.0, 4.0], [None, 5.0, 6.0], [3, None, 7])


def test_reasons_for_a_slow_clock_are_named_in_small_letters() -> None:
    assert hardware._throttle_bits(fake_nvml) == [("gpu_idle", 1), ("sw_power_cap", 4), ("hw_thermal_slowdown", 64)]


def test_a_cpu_without_a_name_is_that_of_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "Path", lambda _: tmp_path / "cpuinfo")
    assert hardware.cpu_name() == os.uname().machine
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nCPU part\t: 0xd0c\n")
    assert hardware.cpu_name() == os.uname().machine


def test_the_memory_of_a_replica_is_that_of_its_whole_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    class Process:
        def __init__(self, pid: int) -> None:
            if pid == 9:
                raise psutil.NoSuchProcess(pid)
            self.pid = pid

        def children(self, *, recursive: bool) -> list[Process]:
            assert recursive
            return [Process(self.pid + 1), Process(self.pid + 2)]

        def memory_info(self) -> SimpleNamespace:
            if self.pid == 5:  # has ended meanwhile
                raise psutil.NoSuchProcess(self.pid)
            return SimpleNamespace(rss=self.pid * plan_devices.GIB)

    monkeypatch.setattr(psutil, "Process", Process)
    reading = CpuMonitor(Devices("cpu", ("0", "1", "2"))).read([1, 4, 9])
    assert reading == Reading("replica", used_gib=[1.0 + 2 + 3, 4.0 + 6, 0.0], energy_j=[None] * 3)
