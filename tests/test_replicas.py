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
from typing import Any, ClassVar

import pytest

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.results import EngineInfo
from batch_inference.measure import engine_process
from batch_inference.measure import replicas as replicas_module
from batch_inference.measure import worker as worker_module
from batch_inference.measure.engine_process import (
    EngineProcess,
    LogMark,
    Patience,
    ReplicaError,
    quiet_environment,
    read_log_tail,
    replica_log,
    root_cause,
)
from batch_inference.measure.hardware import Reading
from batch_inference.measure.messages import (
    Asked,
    Done,
    Join,
    Joined,
    Load,
    Loaded,
    Outcome,
    Prepare,
    Queue,
    Ready,
    Start,
)
from batch_inference.measure.replicas import LocalReplicas, TorchrunReplicas, coupling_of, ports_of
from batch_inference.measure.vllm_objects import count_outputs
from batch_inference.measure.worker import Worker
from batch_inference.plan.devices import Devices
from batch_inference.plan.place import Place
from conftest import REPOSITORY, STUB, is_running, loaded_with, running_in, stub_environment

ONE_CORE = Devices("cpu", ("0",))
TwoByTwo = Callable[..., LocalReplicas]


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
    began_s = time.monotonic()
    (outcome,) = replicas.run()
    passed_s = time.monotonic() - began_s
    assert (outcome.prompt_tokens, outcome.output_tokens) == (16, 8)
    assert outcome.start_s == 0.0
    assert 0.002 <= outcome.end_s <= passed_s
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


# Raw times of four ranks or replicas, by clocks whose zeros are no business of ours, and what is made of them.
BEGAN_S, TOOK_S = (100.0, 5000.0, 7.0, 2048.0), (0.001, 0.003, 0.002, 0.0015)


def timed(start_s: float, took_s: float, used_gib: float | None = None) -> Done:
    outcome = count_outputs([], start_s, start_s + took_s)
    if used_gib is not None:
        before, after = (Reading("device", used_gib=[used_gib], energy_j=[used_gib * at]) for at in (1.0, 3.0))
        outcome.readings = (before, after)
    return Done(outcome)


def test_a_run_takes_no_longer_than_has_passed_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The headline latency, bounded from above by a clock of the test's own; no process runs."""
    replicas = LocalReplicas(ExperimentConfig(data_parallel_size=4, output_file=f"{tmp_path}/x.json"), ONE_CORE)
    replicas._processes = [SimpleNamespace(log_since=SimpleNamespace(compilations=lambda: 0))] * 4  # type: ignore[list-item]

    def answers(commands: list[Start], *_: Any) -> list[Done]:
        # One replica begins a little after the others, and the common start is that of the first.
        at_s = commands[0].at_s or 0.0
        while time.monotonic() < at_s + 0.005:
            time.sleep(0.001)
        return [timed(at_s + 0.001 * number, took_s) for number, took_s in enumerate(TOOK_S)]

    monkeypatch.setattr(replicas, "_all", answers)
    began_s = time.monotonic()
    outcomes = replicas.run()
    passed_s = time.monotonic() - began_s
    assert [one.start_s for one in outcomes] == pytest.approx([0.0, 0.001, 0.002, 0.003])
    assert [one.end_s for one in outcomes] == pytest.approx([0.001, 0.004, 0.004, 0.0045])
    assert all(0.0 < one.end_s <= (one.passed_s or 0.0) <= passed_s for one in outcomes)


def test_ranks_count_from_their_own_start_and_a_replica_is_as_slow_as_its_slowest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"tensor_parallel_size": 2, "data_parallel_size": 2, "output_file": f"{tmp_path}/x.json"}
    replicas = TorchrunReplicas(ExperimentConfig(**shape), {}, Place(0, 4, 0, 4))
    used_gib = (1.0, 2.0, 4.0, 8.0)
    ranks = [timed(*numbers) for numbers in zip(BEGAN_S, TOOK_S, used_gib, strict=True)]
    monkeypatch.setattr(replicas, "_all", lambda *_: ranks)
    began_s = time.monotonic()
    outcomes = replicas.run()
    passed_s = time.monotonic() - began_s
    assert [(one.start_s, one.end_s) for one in outcomes] == [(0.0, pytest.approx(0.003)), (0.0, pytest.approx(0.002))]
    assert outcomes[0].passed_s is not None
    assert outcomes[0].passed_s <= passed_s
    read = [one.readings for one in outcomes if one.readings]
    assert [[reading.used_gib for reading in pair] for pair in read] == [[[1.0, 2.0]] * 2, [[4.0, 8.0]] * 2]
    assert [pair[1].energy_j for pair in read] == [[3.0, 6.0], [12.0, 24.0]]


def test_a_replica_leads_a_process_group_of_its_own(replicas: LocalReplicas) -> None:
    replicas.start()
    (pid,) = replicas.pids()
    assert os.getpgid(pid) == pid != os.getpgid(0)


@pytest.mark.slow
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
def two_by_two(tmp_path: Path) -> TwoByTwo:
    """TP=2 DP=2 on four GPUs."""

    def make(changes: dict[str, Any] | None = None, **how: Any) -> LocalReplicas:
        sizes = {"tensor_parallel_size": 2, "data_parallel_size": 2, "output_file": f"{tmp_path}/x.json"}
        config = ExperimentConfig(batch_sizes=(2,), seq_lens=(8,), **(sizes | (changes or {})))
        return LocalReplicas(config, Devices("gpu", ("0", "3", "5", "7")), **how)

    return make


def variables_of(replicas: LocalReplicas) -> list[dict[str, str]]:
    """What both are given, with what they inherit. That it reaches them is looked at once, below."""
    return [{**os.environ, **replicas._environment(number)} for number in range(2)]


@pytest.mark.slow
def test_each_replica_has_its_own_devices_ports_and_log(
    two_by_two: TwoByTwo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in stub_environment().items():
        monkeypatch.setenv(name, value)
    replicas = two_by_two(coupled=False)
    try:
        assert len(replicas.start()) == 2
        first, second = (loaded_with(replica_log(tmp_path / "x.log", replica)) for replica in range(2))
    finally:
        replicas.close()
    assert (first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]) == ("0,3", "5,7")
    assert abs(int(first["VLLM_PORT"]) - int(second["VLLM_PORT"])) >= 100
    # vLLM refuses coupled replicas of a dense model.
    assert "VLLM_DP_RANK" not in first


def test_coupled_replicas_know_each_other(two_by_two: TwoByTwo) -> None:
    first, second = variables_of(two_by_two(coupled=True))
    assert (first["VLLM_DP_RANK"], second["VLLM_DP_RANK"]) == ("0", "1")
    assert (first["VLLM_DP_RANK_LOCAL"], second["VLLM_DP_RANK_LOCAL"]) == ("0", "0")
    assert first["VLLM_DP_SIZE"] == second["VLLM_DP_SIZE"] == "2"
    assert first["VLLM_DP_MASTER_PORT"] == second["VLLM_DP_MASTER_PORT"]
    # vLLM keeps ten ports from there for itself.
    assert int(first["VLLM_PORT"]) >= int(first["VLLM_DP_MASTER_PORT"]) + 10


def test_replicas_of_a_ray_cluster_that_is_joined_leave_the_devices_to_ray(
    two_by_two: TwoByTwo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first, second = variables_of(two_by_two({"distributed_executor_backend": "ray"}, ray_address="10.0.0.1:6379"))
    assert first["RAY_ADDRESS"] == second["RAY_ADDRESS"] == "10.0.0.1:6379"
    assert "CUDA_VISIBLE_DEVICES" not in {**first, **second}
    # Processes of the cluster do not inherit our environment, and must find this package.
    assert str(REPOSITORY) in first["RAY_JOB_CONFIG_JSON_ENV_VAR"]


def test_replicas_without_a_ray_cluster_start_one_each_on_their_own_devices(
    two_by_two: TwoByTwo,
) -> None:
    first, second = variables_of(two_by_two({"distributed_executor_backend": "ray"}, ray_address="local"))
    assert first["RAY_ADDRESS"] == second["RAY_ADDRESS"] == "local"
    assert (first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]) == ("0,3", "5,7")


@pytest.mark.slow
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
    two_by_two: TwoByTwo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PORT", "20000")
    first, second = variables_of(two_by_two(coupled=False))
    assert (first["VLLM_PORT"], second["VLLM_PORT"]) == ("20000", "20100")


@pytest.mark.slow
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

    monkeypatch.setattr(worker_module, "time", SimpleNamespace(monotonic=lambda: now_s[0], sleep=sleep))

    class FakeEngine:
        def read_devices(self) -> Reading:
            read_s.append(now_s[0])
            return Reading("device", used_gib=[1.0], energy_j=[float(len(read_s))])

        def run(self, _prompts: Any, _max_tokens: int, wait: Callable[[], None]) -> Outcome:
            wait()
            return count_outputs([], now_s[0], now_s[0])

    made = Worker(0.0)
    made._reads_devices, made._next = True, Prepare(1, 1, 1, [])
    outcome = made._run(FakeEngine(), 100.3)  # type: ignore[arg-type]
    assert outcome.start_s == pytest.approx(100.3)
    assert read_s[0] == pytest.approx(100.3 - worker_module.READ_LEAD_S)
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


# --- what each replica and rank gets, without any process ----------------------------------------------------------


def test_every_replica_has_a_hundred_ports_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PORT", raising=False)
    monkeypatch.setattr(os, "getpid", lambda: 15 * 100 + 7)
    ports = [int(ports_of(replica)["VLLM_PORT"]) for replica in range(4)]
    assert ports == [22_100, 22_200, 22_300, 22_400]
    # Coupled replicas meet below these, and all in one place.
    found = [coupling_of(replica, 4) for replica in range(4)]
    assert {one["VLLM_DP_MASTER_PORT"] for one in found} == {"22000"}
    assert [(one["VLLM_DP_RANK"], one["VLLM_DP_SIZE"], one["VLLM_DP_RANK_LOCAL"]) for one in found] == [
        (str(replica), "4", "0") for replica in range(4)
    ]


@pytest.mark.parametrize(
    ("sizes", "address", "devices"),
    [
        ((2, 1, 2), None, ["0,3", "5,7"]),
        ((1, 2, 2), None, ["0,3", "5,7"]),
        ((1, 1, 4), None, ["0", "3", "5", "7"]),
        ((4, 1, 1), None, ["0,3,5,7"]),
        ((2, 1, 2), "local", ["0,3", "5,7"]),
        ((2, 1, 2), "10.0.0.1:6379", [None, None]),
    ],
)
def test_a_replica_sees_its_slice_of_the_devices(
    sizes: tuple[int, int, int], address: str | None, devices: list[str | None]
) -> None:
    tp, pp, dp = sizes
    config = ExperimentConfig(tensor_parallel_size=tp, pipeline_parallel_size=pp, data_parallel_size=dp)
    made = LocalReplicas(config, Devices("gpu", ("0", "3", "5", "7")), ray_address=address)
    found = [made._environment(replica) for replica in range(dp)]
    assert [one.get("CUDA_VISIBLE_DEVICES") for one in found] == devices
    # Only replicas that start together must not look for ports in the same place.
    assert ["VLLM_PORT" in one for one in found] == [dp > 1] * dp
    assert not any("VLLM_DP_RANK" in one for one in found)


@pytest.mark.parametrize(
    ("changes", "lead_s"),
    [({}, 0.0), ({"data_parallel_size": 2}, 0.02), ({"nnodes": 2, "tensor_parallel_size": 2}, 0.3)],
)
def test_the_common_start_leaves_time_for_every_replica_to_wait(
    changes: dict[str, Any], lead_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = LocalReplicas(ExperimentConfig(output_file=f"{tmp_path}/x.json", **changes), ONE_CORE)
    count = made._config.data_parallel_size
    made._processes = [SimpleNamespace(log_since=SimpleNamespace(compilations=lambda: 2))] * count  # type: ignore[list-item]
    monkeypatch.setattr(replicas_module, "time", SimpleNamespace(monotonic=lambda: 100.0))
    at_s: list[float | None] = []

    def answers(commands: list[Start], *_: Any) -> list[Done]:
        at_s.extend(command.at_s for command in commands)
        return [timed(100.5, 1.0)] * len(commands)

    monkeypatch.setattr(made, "_all", answers)
    outcome = made.run()[0]
    assert at_s == [pytest.approx(100.0 + lead_s)] * count
    assert (outcome.start_s, outcome.end_s, outcome.jit_compilations) == (0.0, 1.0, 2)


@pytest.mark.parametrize(("rank", "replica"), [(0, 0), (3, 0), (4, 1), (7, 1)])
def test_ranks_belong_to_replicas_as_vllm_counts_them(rank: int, replica: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "Engine", lambda *_: SimpleNamespace(info=EngineInfo("0.32.0")))
    made = Worker(0.0, Place(rank, 8, rank, 8))
    shape = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "data_parallel_size": 2}
    made._do(Load(ExperimentConfig(distributed_executor_backend="external_launcher", **shape), 0))
    assert made._replica == replica
    assert made._reads_devices
    local = Worker(0.0)
    local._do(Load(ExperimentConfig(**shape), 1))
    assert (local._replica, local._reads_devices) == (1, False)


def test_replicas_of_one_stream_have_prompts_of_their_own() -> None:
    asked: list[Any] = []
    made = Worker(0.0)
    made._engine = SimpleNamespace(make_prompts=lambda *words: asked.append(words), limit=lambda *_: None)  # type: ignore[assignment]
    for made._replica in (0, 1):
        made._do(Prepare(2, 8, 4, [0, "run", 3]))
    assert asked == [(2, 8, [0, "run", 3, 0]), (2, 8, [0, "run", 3, 1])]
    assert isinstance(made._next, Prepare)
    assert made._next.max_tokens == 4


def test_a_start_is_waited_for_and_never_for_less_than_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(worker_module, "time", SimpleNamespace(monotonic=lambda: 100.0, sleep=slept.append))
    worker_module._sleep_until(100.5)
    worker_module._sleep_until(100.5, lead_s=0.25)
    worker_module._sleep_until(99.0)
    worker_module._sleep_until(None)
    assert slept == [0.5, 0.25, 0.0]


# --- what is made of an engine that says nothing, or the wrong thing -----------------------------------------------


@pytest.mark.parametrize(
    ("waiting_for", "kind", "said"),
    [
        ("startup_timeout", "timeout_startup", "no answer within --startup-timeout 20 s"),
        ("point_timeout", "timeout_point", "no answer within --point-timeout 30 s"),
    ],
)
def test_patience_ends_when_its_own_flag_says(
    waiting_for: str, kind: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(monotonic=lambda: clock.now_s, now_s=100.0)
    monkeypatch.setattr(engine_process, "time", clock)
    patience = Patience(ExperimentConfig(startup_timeout=20.0, point_timeout=30.0), waiting_for)
    limit_s = {"startup_timeout": 20.0, "point_timeout": 30.0}[waiting_for]
    for passed_s, is_over in ((0.0, False), (limit_s, False), (limit_s + 0.5, True)):
        clock.now_s = 100.0 + passed_s
        assert patience.is_over is is_over
    process: Any = object.__new__(EngineProcess)
    process.log_path = tmp_path / "absent.log"
    late = process.late(patience)
    assert (late.kind, late.reason) == (kind, said)


def test_a_part_that_is_gone_is_the_reason_once_vllm_had_time_to_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: clock.now_s, now_s=100.0)
    monkeypatch.setattr(engine_process, "time", clock)
    process: Any = object.__new__(EngineProcess)
    process._parts, process._dead_since_s = {os.getpid(): "VLLM::EngineCore"}, None
    assert process._dead_part() is None
    process._parts[2**22 + 7] = "VLLM::Worker_TP1"
    found = []
    for clock.now_s in (100.0, 103.0, 103.5):
        found.append(process._dead_part())
    assert found == [None, None, "VLLM::Worker_TP1"]


def test_the_end_of_a_log_is_its_last_lines_and_bytes(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("".join(f"line {number}\n" for number in range(100)))
    process: Any = object.__new__(EngineProcess)
    process.log_path = log
    assert process._log_end() == [f"line {number}" for number in range(60, 100)]
    assert read_log_tail(log, max_bytes=16) == ["line 98", "line 99"]
    mark = LogMark(log)
    with log.open("a") as more:
        more.write("line 100\nERROR ValueError: of after the mark\n")
    assert mark.lines() == ["line 100", "ERROR ValueError: of after the mark"]
    assert LogMark(tmp_path / "absent.log").compilations() == 0


def test_of_several_errors_the_last_one_is_the_cause() -> None:
    log = ["ERROR ValueError: the first", "INFO all is well", "(Worker) ERROR [x.py:1] OSError: the last", "INFO end"]
    assert root_cause(log) == "OSError: the last"


@pytest.mark.parametrize(
    ("changes", "logs"),
    [
        ({}, ["x.log"]),
        ({"data_parallel_size": 2}, ["x.log", "x.replica_1.log"]),
        ({"data_parallel_size": 2, "distributed_executor_backend": "external_launcher"}, ["x.log"]),
        ({"nnodes": 2, "tensor_parallel_size": 2, "node_rank": 1}, ["x.node_1.log"]),
    ],
)
def test_the_logs_that_will_be_written_are_known_before(changes: dict[str, Any], logs: list[str]) -> None:
    config = ExperimentConfig(output_file="x.json", **changes)
    assert [path.name for path in engine_process.log_paths(config)] == logs


# --- starting, waiting and ending, with processes that are none ----------------------------------------------------


class FakeProcess:
    """Answers what it is told to, on a pipe of its own; notes what is asked of it."""

    made: ClassVar[list[FakeProcess]] = []

    def __init__(self, environment: dict[str, str], log_path: Path, nodes: Any = None) -> None:
        self.environment, self.log_path, self.nodes = environment, log_path, nodes
        self.sent: list[Any] = []
        self.answers: list[list[Any]] = []
        self.ended_at_s: float | None = None
        self.is_asked_to_close = self.has_parts = False
        self.pid = 4000 + len(FakeProcess.made)
        self._reads, writes = os.pipe()
        os.close(writes)  # what has ended can always be read
        FakeProcess.made.append(self)

    def fileno(self) -> int:
        return self._reads

    def send(self, command: Any) -> None:
        self.sent.append(command)
        answers = {Load: Loaded(EngineInfo("0.32.0")), Prepare: Ready(), Queue: Ready()}
        self.answers.append([answers[type(command)]] if type(command) in answers else [])

    def replies(self) -> list[Any]:
        return self.answers.pop(0) if self.answers else []

    def late(self, patience: Patience) -> ReplicaError:
        return ReplicaError(f"{self.log_path.name} is late, {patience.waiting_for}", [])

    def remember_parts(self) -> None:
        self.has_parts = True

    def ask_to_close(self) -> None:
        self.is_asked_to_close = True

    def end(self, deadline_s: float) -> None:
        self.ended_at_s = deadline_s
        os.close(self._reads)


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> list[FakeProcess]:
    monkeypatch.setattr(FakeProcess, "made", [])
    monkeypatch.setattr(replicas_module, "EngineProcess", FakeProcess)
    return FakeProcess.made


@pytest.mark.parametrize(("coupled", "ranks"), [(False, [None, None]), (True, ["0", "1"])])
def test_a_process_for_each_replica_is_loaded_with_its_number(
    coupled: bool, ranks: list[str | None], no_process: list[FakeProcess], tmp_path: Path
) -> None:
    config = ExperimentConfig(data_parallel_size=2, output_file=f"{tmp_path}/x.json")
    made = LocalReplicas(config, Devices("gpu", ("4", "5")), coupled=coupled)
    assert len(made.start()) == 2
    assert [one.environment["CUDA_VISIBLE_DEVICES"] for one in no_process] == ["4", "5"]
    assert [one.environment.get("VLLM_DP_RANK") for one in no_process] == ranks
    assert [one.log_path.name for one in no_process] == ["x.log", "x.replica_1.log"]
    assert [[command.replica for command in one.sent] for one in no_process] == [[0], [1]]
    assert all(one.has_parts for one in no_process)
    assert made.pids() == [4000, 4001]
    made.prepare(Prepare(2, 8, 4, [0]))
    assert [len(one.sent) for one in no_process] == [2, 2]
    made.close()


@pytest.mark.parametrize(("hurry", "patience_s"), [(False, 15.0), (True, 0.5)])
def test_all_replicas_are_asked_to_close_before_one_is_waited_for(
    hurry: bool, patience_s: float, no_process: list[FakeProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = LocalReplicas(
        ExperimentConfig(data_parallel_size=2, output_file=f"{tmp_path}/x.json"), Devices("cpu", ("0", "1"))
    )
    made.start()
    monkeypatch.setattr(replicas_module, "time", SimpleNamespace(monotonic=lambda: 100.0))
    asked: list[bool] = []
    end = FakeProcess.end
    monkeypatch.setattr(
        FakeProcess,
        "end",
        lambda self, at_s: (asked.extend(one.is_asked_to_close for one in no_process), end(self, at_s)),
    )
    made.close(hurry=hurry)
    assert asked == [True] * 4
    assert [one.ended_at_s for one in no_process] == [100.0 + patience_s] * 2
    made.close()  # of nothing
    assert made.pids() == []


def test_who_does_not_answer_in_time_is_late_and_who_did_is_not(no_process: list[FakeProcess], tmp_path: Path) -> None:
    config = ExperimentConfig(point_timeout=0.001)
    quick, slow = (FakeProcess({}, tmp_path / f"{name}.log") for name in ("quick", "slow"))
    quick.answers = [[Ready()]]
    with pytest.raises(ReplicaError, match=r"slow\.log is late, point_timeout"):
        engine_process.receive([quick, slow], Patience(config, "point_timeout"))  # type: ignore[list-item]
    # An answer that is there counts, however late it is looked at.
    quick.answers, slow.answers = [[Ready()]], [[Joined()]]
    patience = Patience(config, "point_timeout")
    patience._end_s = 0.0
    assert engine_process.receive([quick, slow], patience) == [[Ready()], [Joined()]]  # type: ignore[list-item]
    for one in no_process:
        one.end(0.0)


def test_an_answer_to_something_else_is_none(no_process: list[FakeProcess], tmp_path: Path) -> None:
    made = LocalReplicas(ExperimentConfig(output_file=f"{tmp_path}/x.json"), ONE_CORE)
    made.start()
    no_process[0].answers = [[Ready()]]
    with pytest.raises(TypeError, match="Ready was answered instead of Loaded"):
        made._all([Prepare(1, 8, 4, [0])], Loaded)
    made.close()


@pytest.mark.parametrize(("hurry", "joins"), [(False, True), (True, False)])
def test_ranks_that_had_nothing_to_do_are_told_that_it_is_over(
    hurry: bool, joins: bool, no_process: list[FakeProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas_module, "time", SimpleNamespace(monotonic=lambda: 100.0))
    shape = {"tensor_parallel_size": 2, "output_file": f"{tmp_path}/x.json", "point_timeout": 0.001}
    made = TorchrunReplicas(ExperimentConfig(startup_timeout=0.001, **shape), {"A": "1"}, Place(0, 2, 0, 2))
    made.close(hurry=hurry)
    made.close(hurry=hurry)  # once
    assert [[type(command) for command in one.sent] for one in no_process] == ([[Join]] if joins else [])
    assert [one.ended_at_s for one in no_process] == ([115.0] if joins else [])
    assert not made.can_restart


@pytest.mark.parametrize("given", [None, "0"])
def test_nothing_is_told_of_how_vllm_is_used_unless_the_user_wants_it(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", given) if given else monkeypatch.delenv("VLLM_NO_USAGE_STATS", False)
    assert quiet_environment()["VLLM_NO_USAGE_STATS"] == (given or "1")


# --- queues -----------------------------------------------------------------------------------------------------------


def test_each_replica_is_told_its_own_share_of_a_queue_alone(no_process: list[FakeProcess], tmp_path: Path) -> None:
    """The shares of others may be large."""
    config = ExperimentConfig(data_parallel_size=3, output_file=f"{tmp_path}/x.json")
    made = LocalReplicas(config, Devices("gpu", ("0", "1", "2")))
    made.start()
    shares = [[Asked(8, 4), Asked(9, 2)], [Asked([5, 6], 3)], []]
    queue = Queue(shares, 4, [0, "queue"], ends_itself=True, max_num_batched_tokens=64)
    made.prepare(queue)
    told = [one.sent[-1] for one in no_process]
    assert [command.shares for command in told] == [
        [shares[0], [], []], [[], shares[1], []], [[], [], []],
    ]  # fmt: skip
    # Where it stands says whose it is; all else is as it was said.
    assert {(one.batch_size, tuple(one.stream), one.ends_itself, one.max_num_batched_tokens) for one in told} == {
        (4, (0, "queue"), True, 64)
    }
    assert queue.shares == shares
    made.close()


def test_rank_0_of_torchrun_is_told_all_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    made = TorchrunReplicas(ExperimentConfig(data_parallel_size=2), {}, Place(0, 2, 0, 2))
    told: list[Any] = []
    monkeypatch.setattr(made, "_all", lambda *words: told.append(words[0]) or [])
    queue = Queue([[Asked(8, 4)], [Asked(9, 1)]], 4, [0])
    made.prepare(queue)
    assert told == [queue]
