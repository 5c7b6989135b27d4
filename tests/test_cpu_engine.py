"""Which engines run in the process that submits to them, and on which cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from batch_inference.core.config import SEPARATE, ExperimentConfig
from batch_inference.measure import cpu_engine
from batch_inference.measure.cpu_engine import engine_environment
from batch_inference.measure.replicas import LocalReplicas
from batch_inference.plan.devices import Devices
from conftest import REPOSITORY

CORES = Devices("cpu", ("0,1", "2,3"))
BOUND = {"OMP_NUM_THREADS": "2", "OMP_PLACES": "{0,1}", "OMP_PROC_BIND": "true"}
TOGETHER = {SEPARATE: "0", "VLLM_USE_AOT_COMPILE": "0"}


@pytest.fixture(autouse=True)
def nothing_else_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SEPARATE, "0")
    for name in ("VLLM_USE_AOT_COMPILE", "VLLM_CPU_OMP_THREADS_BIND", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cpu_engine.importlib.util, "find_spec", lambda _: None)


def variables(devices: Devices = CORES, replica: int = 0, **changes: object) -> dict[str, str]:
    """What a replica is given beyond its devices."""
    how = {name: changes.pop(name) for name in ("coupled", "nodes", "ray_address") if name in changes}
    made = LocalReplicas(ExperimentConfig(**changes), devices, **how)  # type: ignore[arg-type]
    given = made._environment(replica)
    apart = {"VLLM_CPU_OMP_THREADS_BIND", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "VLLM_PORT"}
    return {name: value for name, value in given.items() if name not in apart}


def test_vllm_runs_as_it_does_by_itself_unless_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SEPARATE)
    assert variables() == {}


def test_an_engine_on_one_device_of_cores_runs_in_one_process_bound_to_them() -> None:
    assert variables() == TOGETHER | BOUND


def test_each_replica_is_bound_to_cores_of_its_own() -> None:
    found = [variables(replica=replica, data_parallel_size=2)["OMP_PLACES"] for replica in range(2)]
    assert found == ["{0,1}", "{2,3}"]


@pytest.mark.parametrize(
    "changes",
    [
        {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
        {"pipeline_parallel_size": 2},
        {"distributed_executor_backend": "mp"},
    ],
)
def test_workers_in_processes_of_their_own_are_bound_by_vllm(changes: dict[str, object]) -> None:
    assert variables(**changes) == TOGETHER


def test_gpus_are_left_as_they_are() -> None:
    assert variables(Devices("gpu", ("0", "1"))) == {}


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "1")
    assert variables()["VLLM_USE_AOT_COMPILE"] == "1"
    monkeypatch.setenv(SEPARATE, "0")
    assert variables()[SEPARATE] == "0"
    monkeypatch.setenv(SEPARATE, "1")
    assert variables() == {}


@pytest.mark.parametrize("word", ["auto", "nobind"])
def test_where_vllm_binds_the_cores_it_has_its_own_way(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", word)
    assert variables() == {}


@pytest.mark.parametrize("how", [{"coupled": True}, {"ray_address": "local"}])
def test_engines_that_know_of_others_are_left_as_they_are(how: dict[str, object]) -> None:
    assert SEPARATE not in variables(**how)


def test_an_engine_over_nodes_is_left_as_it_is() -> None:
    nodes = SimpleNamespace(environment=dict)
    made = LocalReplicas(ExperimentConfig(nnodes=2, tensor_parallel_size=2), CORES, nodes=nodes)  # type: ignore[arg-type]
    assert SEPARATE not in made._environment(0)


def a_torch(folder: Path, library: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = folder / library
    path.parent.mkdir(parents=True)
    path.touch()
    origin = folder / "torch" / "__init__.py"
    monkeypatch.setattr(cpu_engine.importlib.util, "find_spec", lambda _: SimpleNamespace(origin=str(origin)))
    return path


@pytest.mark.parametrize("library", ["torch/lib/libgomp.so.1", "torch.libs/libgomp-a34b3233.so.1.0.0"])
def test_torchs_own_open_mp_is_loaded_first(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = a_torch(tmp_path, library, monkeypatch)
    assert variables()["LD_PRELOAD"] == str(path)
    monkeypatch.setenv("LD_PRELOAD", "/x/libtcmalloc_minimal.so.4")
    assert variables()["LD_PRELOAD"] == f"/x/libtcmalloc_minimal.so.4:{path}"
    # vLLM preloads it itself for workers in processes of their own.
    assert "LD_PRELOAD" not in variables(tensor_parallel_size=2)


@pytest.mark.parametrize("given", ["/x/libiomp5.so", "/x/libgomp.so.1:/y/z.so", "/x/libomp.so.5"])
def test_an_open_mp_that_is_given_is_kept(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_torch(tmp_path, "torch/lib/libgomp.so.1", monkeypatch)
    monkeypatch.setenv("LD_PRELOAD", given)
    assert "LD_PRELOAD" not in engine_environment(ExperimentConfig(), CORES.slice_for(0, 1))
    assert os.environ["LD_PRELOAD"] == given


def test_a_torch_without_one_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_torch(tmp_path, "torch/lib/libc10.so", monkeypatch)
    assert variables() == TOGETHER | BOUND


HOLDS = """
import atexit, multiprocessing, sys, weakref
from batch_inference.measure.cpu_engine import end_at_once, leave

class Heavy:
    def __del__(self):
        print("taken apart", flush=True)

def hold(last):
    global held
    held = Heavy()
    atexit.register(print, "done before", flush=True)
    end_at_once()
    end_at_once()
    atexit.register(print, "done after", flush=True)
    weakref.finalize(Heavy, print, "finalized", flush=True)
    if last == "raise":
        raise ValueError("x")

if __name__ == "__main__":
    if sys.argv[1] == "leave":
        hold("")
        leave()
    made = multiprocessing.get_context("spawn").Process(target=hold, args=sys.argv[1:])
    made.start()
    made.join()
    print(f"exit code {made.exitcode}")
"""
DONE = ["done after", "done before", "finalized"]


@pytest.mark.parametrize(
    ("how", "said"),
    [("leave", DONE), ("return", [*DONE, "exit code 0"]), ("raise", [*DONE, "exit code 1"])],
)
def test_a_process_ends_at_once_and_leaves_nothing_undone(how: str, said: list[str], tmp_path: Path) -> None:
    program = tmp_path / "holds.py"
    program.write_text(HOLDS)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, program, how], capture_output=True, text=True, env=environment)
    lines = sorted(done.stdout.splitlines())
    if how == "raise" and "taken apart" in lines:  # as Python ends by itself, where it still can say so
        lines.remove("taken apart")
    assert (done.returncode, lines) == (0, sorted(said))
    assert ("ValueError: x" in done.stderr) == (how == "raise")
