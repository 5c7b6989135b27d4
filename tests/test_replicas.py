from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.measure import worker
from batch_inference.measure.engine_process import (
    ReplicaError,
    quiet_environment,
    read_log_tail,
    replica_log,
    root_cause,
)
from batch_inference.measure.hardware import Reading
from batch_inference.measure.messages import Outcome, Prepare
from batch_inference.measure.replicas import LocalReplicas
from batch_inference.measure.vllm_objects import count_outputs
from batch_inference.measure.worker import Worker
from batch_inference.plan.devices import Devices
from conftest import REPOSITORY, STUB, is_running, loaded_with, running_in, stub_environment

ONE_CORE = Devices("cpu", ("0",))


@pytest.fixture
def replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    for name, value in stub_environment().items():
        monkeypatch.setenv(name, value)
    config = ExperimentConfig(batch_sizes=(1, 2), seq_lens=(8,), max_tokens=4, output_file=f"{tmp_path}/x.json")
    made = LocalReplicas(config, ONE_CORE)
    yield made
    made.close()


def test_a_replica_loads_runs_and_leaves_no_process(replicas: LocalReplicas) -> None:
    (engine,) = replicas.start()
    assert engine.vllm_version == "0.32.0"
    assert engine.weights_gib == 1.0
    (pid,) = replicas.pids()
    replicas.prepare(Prepare(2, 8, 4, [0, "run", 0]))
    (outcome,) = replicas.run()
    assert (outcome.prompt_tokens, outcome.output_tokens) == (16, 8)
    assert outcome.start_s == 0.0
    assert outcome.end_s >= 0.002
    replicas.close()
    assert running_in(pid) == []


def test_zombies_that_nobody_reaps_are_not_waited_for(replicas: LocalReplicas, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose first process reaps no orphans: here it is this one."""
    sent, killpg = [], os.killpg

    def send(group: int, number: int) -> None:
        sent.append(number)
        killpg(group, number)

    monkeypatch.setattr(os, "killpg", send)
    prctl, subreaper = ctypes.CDLL(None).prctl, 36
    prctl(subreaper, 1)
    try:
        replicas.start()
        (pid,) = replicas.pids()
        replicas.close()
        orphans = 0
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-pid, 0):
                orphans += 1
    finally:
        prctl(subreaper, 0)
    assert orphans
    assert signal.SIGKILL not in sent


def test_a_replica_leads_a_process_group_of_its_own(replicas: LocalReplicas) -> None:
    replicas.start()
    (pid,) = replicas.pids()
    assert os.getpgid(pid) == pid != os.getpgid(0)


def test_an_engine_writes_bytecode_where_the_machine_switches_it_off(
    replicas: LocalReplicas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "bytecode"))
    replicas.start()
    assert list((tmp_path / "bytecode").rglob("worker.*.pyc"))


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"HOME": "/home/me"}, "/home/me/.triton/cache"),
        ({"HOME": "/home/me", "TRITON_HOME": "/fast"}, "/fast/.triton/cache"),
        ({"TRITON_HOME": "/fast", "TRITON_CACHE_DIR": "/mine"}, "/mine"),
    ],
)
def test_all_engines_share_tritons_cache(
    variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TRITON_HOME", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert quiet_environment()["TRITON_CACHE_DIR"] == folder


def test_an_engine_that_does_not_start_is_explained_by_its_log(
    replicas: LocalReplicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_FAIL", "load")
    with pytest.raises(ReplicaError) as caught:
        replicas.start()
    assert caught.value.reason == "ValueError: the planted reason"
    assert any("stub vLLM is loading" in line for line in caught.value.log_tail)


def test_a_killed_engine_is_noticed(replicas: LocalReplicas) -> None:
    replicas.start()
    os.kill(replicas.pids()[0], signal.SIGKILL)
    with pytest.raises(ReplicaError, match="signal SIGKILL"):
        replicas.prepare(
            Prepare(
                1,
                8,
                4,
                [
                    0,
                ],
            )
        )


def test_a_wrong_vllm_flag_is_wrong_use_not_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in stub_environment().items():
        monkeypatch.setenv(name, value)
    config = ExperimentConfig(engine_args=("--quantisation", "x"), output_file=f"{tmp_path}/x.json")
    replicas = LocalReplicas(config, ONE_CORE)
    try:
        with pytest.raises(ConfigError, match="did you mean --quantization"):
            replicas.start()
    finally:
        replicas.close()
    assert "stub vLLM is loading" not in (tmp_path / "x.log").read_text()


def test_an_engine_ends_itself_when_its_supervisor_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from batch_inference.core.config import ExperimentConfig\n"
        "from batch_inference.plan.devices import Devices\n"
        "from batch_inference.measure.replicas import LocalReplicas\n"
        "r = LocalReplicas(ExperimentConfig(output_file=sys.argv[1]), Devices('cpu', ('0',)))\n"
        "r.start(); print(r.pids()[0], flush=True); time.sleep(60)\n"
    )
    environment = stub_environment()
    environment["PYTHONPATH"] += os.pathsep + str(REPOSITORY)
    supervisor = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "x.json")], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert supervisor.stdout is not None
    pid = int(supervisor.stdout.readline())
    supervisor.kill()
    supervisor.wait()
    deadline_s = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not is_running(pid)


def test_a_worker_that_nobody_hears_any_more_ends_what_it_has_started(tmp_path: Path) -> None:
    """The supervisor is gone, and the reply is the first to meet that: the commands have not ended yet."""
    commands_read, commands_write = os.pipe()
    replies_read, replies_write = os.pipe()
    worker = subprocess.Popen(
        [sys.executable, "-m", "batch_inference.measure.worker", str(commands_read), str(replies_write)],
        pass_fds=[commands_read, replies_write],
        env={**stub_environment(), "PYTHONPATH": f"{STUB}{os.pathsep}{REPOSITORY}"},
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    for descriptor in (commands_read, replies_read, replies_write):
        os.close(descriptor)
    config = dataclasses.asdict(ExperimentConfig(output_file=f"{tmp_path}/x.json"))
    load = {"op": "load", "config": config, "replica": 0}
    os.write(commands_write, json.dumps(load).encode() + b"\n")
    assert worker.wait(timeout=30) == -signal.SIGKILL
    os.close(commands_write)


@pytest.fixture
def two_by_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Starts TP=2 DP=2 on four GPUs; the variables of both replicas."""
    for name, value in stub_environment().items():
        monkeypatch.setenv(name, value)
    made: list[LocalReplicas] = []

    def start(changes: dict[str, Any] | None = None, **how: Any) -> list[dict[str, str]]:
        sizes = {"tensor_parallel_size": 2, "data_parallel_size": 2, "output_file": f"{tmp_path}/x.json"}
        config = ExperimentConfig(batch_sizes=(2,), seq_lens=(8,), **(sizes | (changes or {})))
        made.append(LocalReplicas(config, Devices("gpu", ("0", "3", "5", "7")), **how))
        assert len(made[0].start()) == 2
        return [loaded_with(replica_log(tmp_path / "x.log", replica)) for replica in range(2)]

    yield start
    for replicas in made:
        replicas.close()


def test_each_replica_has_its_own_devices_ports_and_log(two_by_two: Callable[..., list[dict[str, str]]]) -> None:
    first, second = two_by_two(coupled=False)
    assert (first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]) == ("0,3", "5,7")
    assert abs(int(first["VLLM_PORT"]) - int(second["VLLM_PORT"])) >= 100
    # vLLM refuses coupled replicas of a dense model.
    assert "VLLM_DP_RANK" not in first


def test_coupled_replicas_know_each_other(two_by_two: Callable[..., list[dict[str, str]]]) -> None:
    first, second = two_by_two(coupled=True)
    assert (first["VLLM_DP_RANK"], second["VLLM_DP_RANK"]) == ("0", "1")
    assert (first["VLLM_DP_RANK_LOCAL"], second["VLLM_DP_RANK_LOCAL"]) == ("0", "0")
    assert first["VLLM_DP_SIZE"] == second["VLLM_DP_SIZE"] == "2"
    assert first["VLLM_DP_MASTER_PORT"] == second["VLLM_DP_MASTER_PORT"]
    # vLLM keeps ten ports from there for itself.
    assert int(first["VLLM_PORT"]) >= int(first["VLLM_DP_MASTER_PORT"]) + 10


def test_replicas_of_a_ray_cluster_that_is_joined_leave_the_devices_to_ray(
    two_by_two: Callable[..., list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first, second = two_by_two({"distributed_executor_backend": "ray"}, ray_address="10.0.0.1:6379")
    assert first["RAY_ADDRESS"] == second["RAY_ADDRESS"] == "10.0.0.1:6379"
    assert "CUDA_VISIBLE_DEVICES" not in {**first, **second}
    # Processes of the cluster do not inherit our environment, and must find this package.
    assert str(REPOSITORY) in first["RAY_JOB_CONFIG_JSON_ENV_VAR"]


def test_replicas_without_a_ray_cluster_start_one_each_on_their_own_devices(
    two_by_two: Callable[..., list[dict[str, str]]],
) -> None:
    first, second = two_by_two({"distributed_executor_backend": "ray"}, ray_address="local")
    assert first["RAY_ADDRESS"] == second["RAY_ADDRESS"] == "local"
    assert (first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]) == ("0,3", "5,7")


def test_replicas_start_together_with_prompts_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in stub_environment(STUB_RUN_S="0.2").items():
        monkeypatch.setenv(name, value)
    shape = {"batch_sizes": (2,), "seq_lens": (8,), "max_tokens": 4}
    config = ExperimentConfig(data_parallel_size=2, output_file=f"{tmp_path}/x.json", **shape)
    replicas = LocalReplicas(config, Devices("cpu", ("0", "1")))
    try:
        replicas.start()
        replicas.prepare(Prepare(2, 8, 4, [0, "run", 0]))
        outcomes = replicas.run()
    finally:
        replicas.close()
    assert min(outcome.start_s for outcome in outcomes) == 0
    # One after the other, the second would start when the first has ended.
    assert max(outcome.start_s for outcome in outcomes) < min(outcome.end_s for outcome in outcomes)
    logs = [replica_log(tmp_path / "x.log", replica).read_text() for replica in range(2)]
    prompts = [line for log in logs for line in log.splitlines() if line.startswith("prompts ")]
    assert len(set(prompts)) == 2


def test_replicas_of_a_user_who_names_a_port_look_in_different_places_too(
    two_by_two: Callable[..., list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PORT", "20000")
    first, second = two_by_two(coupled=False)
    assert (first["VLLM_PORT"], second["VLLM_PORT"]) == ("20000", "20100")


def test_a_replica_that_fails_is_noticed_while_another_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coupled replicas wait for each other: the first would answer when its limit is over, and blame itself."""
    for name, value in stub_environment().items():
        monkeypatch.setenv(name, value)
    shape = {"batch_sizes": (2,), "seq_lens": (8,), "max_tokens": 4, "point_timeout": 3600.0}
    config = ExperimentConfig(data_parallel_size=2, output_file=f"{tmp_path}/x.json", **shape)
    replicas = LocalReplicas(config, Devices("cpu", ("0", "1")))
    own = replicas._environment
    monkeypatch.setattr(replicas, "_environment", lambda number: own(number) | {"STUB_FAIL": ("hang", "run:2")[number]})
    try:
        replicas.start()
        replicas.prepare(Prepare(2, 8, 4, [0, "run", 0]))
        with pytest.raises(ReplicaError, match="out of memory"):
            replicas.run()
    finally:
        replicas.close(hurry=True)


def test_devices_are_read_right_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they draw while the start is waited for is no part of the run's energy."""

    now_s, read_s = [100.0], []

    def sleep(seconds: float) -> None:
        now_s[0] += seconds

    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: now_s[0], sleep=sleep))

    class FakeEngine:
        def read_devices(self) -> Reading:
            read_s.append(now_s[0])
            return Reading("device", used_gib=[1.0], energy_j=[float(len(read_s))])

        def run(self, _prompts: Any, _max_tokens: int, wait: Callable[[], None]) -> Outcome:
            wait()
            return count_outputs([], now_s[0], now_s[0])

    made = Worker(0.0)
    made._reads_devices = True
    outcome = made._run(FakeEngine(), 100.3)  # type: ignore[arg-type]
    assert outcome.start_s == pytest.approx(100.3)
    assert read_s[0] == pytest.approx(100.3 - worker.READ_LEAD_S)
    assert read_s[1] >= outcome.start_s
    assert outcome.readings is not None
    assert [reading.energy_j for reading in outcome.readings] == [[1.0], [2.0]]


def test_the_root_cause_is_not_the_error_that_hands_it_on() -> None:
    log = [
        "(EngineCore pid=7) ERROR 11-24 10:00:00 [core.py:1] ValueError: heads must be divisible",
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
        "INFO all is well",
    ]
    assert root_cause(log) == "ValueError: heads must be divisible"
    assert root_cause(["INFO nothing here"]) is None
    killed = "(EngineCore pid=7) ERROR [m.py:315] Worker proc VllmWorker-1 died unexpectedly (exit code: -9), shutting"
    handed_on = "(EngineCore pid=7) ERROR [core.py:1510] RuntimeError: cancelled"
    said = root_cause([killed, handed_on]) or ""
    assert said.startswith("Worker proc VllmWorker-1 died unexpectedly (exit code: -9)")


def test_colour_codes_do_not_reach_the_log_tail(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("\x1b[1;36m(EngineCore pid=1)\x1b[0;0m ValueError: no\n")
    assert read_log_tail(log) == ["(EngineCore pid=1) ValueError: no"]
    assert read_log_tail(tmp_path / "absent.log") == []


def test_kernels_compiled_during_a_run_are_counted_by_the_log(
    replicas: LocalReplicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_FAIL", "compile:2")
    replicas.start()
    counted: list[Any] = []
    for run in range(4):
        replicas.prepare(Prepare(2, 8, 4, [0, "run", run]))
        counted += [outcome.jit_compilations for outcome in replicas.run()]
    # The stub compiles in every third run.
    assert counted == [0, 0, 1, 0]
