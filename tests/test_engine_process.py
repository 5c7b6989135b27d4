"""An engine process seen from the supervisor, with a process that is none: what it is given, and what is made of its
end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from batch_inference.core.config import ConfigError
from batch_inference.core.results import EngineInfo, Requests, WorkerInfo
from batch_inference.measure import engine_process, replicas
from batch_inference.measure.engine_process import EngineProcess, ReplicaError, quiet_environment, root_cause
from batch_inference.measure.messages import (
    Close,
    Done,
    Failed,
    Join,
    Joined,
    Load,
    Loaded,
    Outcome,
    Prepare,
    Ready,
    Serve,
    Start,
    encode,
)
from batch_inference.plan.devices import Devices
from batch_inference.plan.place import Place

PID = 2**22 + 4321  # of no process


class FakePopen:
    def __init__(self, command: list[str], **options: Any) -> None:
        self.command, self.options, self.pid = command, options, PID
        self.log_name = options["stdout"].name
        self.returncode: int | None = None
        self.waited_s: list[float] = []
        # The ends of the process's own: the supervisor closes its copies.
        self.reads, self.writes = (os.dup(descriptor) for descriptor in options["pass_fds"])

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout_s: float) -> None:
        self.waited_s.append(timeout_s)
        raise subprocess.TimeoutExpired("x", timeout_s)

    def say(self, *replies: Any) -> None:
        os.write(self.writes, encode(replies) + b"\n")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "x.log"


@pytest.fixture
def process(log: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    log.write_text("ERROR ValueError: of an earlier engine\n")
    monkeypatch.setattr(engine_process.subprocess, "Popen", FakePopen)
    monkeypatch.setattr(engine_process, "quiet_environment", lambda: {"B": "quiet", "C": "quiet"})
    for name in "ABC":
        monkeypatch.setenv(name, "user")
    made = EngineProcess({"C": "replica", "D": "replica"}, log)
    yield made
    for descriptor in (made._process.reads, made._process.writes):
        os.close(descriptor)
    made._commands.close()
    made._replies.close()


def test_a_worker_is_started_with_its_pipes_its_log_and_its_environment(process: Any, log: Path) -> None:
    """The replica's own variables before the quiet ones, and those before the user's."""
    made = process._process
    pipes = made.options.pop("pass_fds")
    environment = made.options.pop("env")
    assert made.command == [sys.executable, "-P", "-m", "batch_inference.measure.worker", *map(str, pipes)]
    assert {name: environment[name] for name in "ABCD"} == {"A": "user", "B": "quiet", "C": "replica", "D": "replica"}
    assert environment["PATH"] == os.environ["PATH"]
    assert made.log_name == str(log)
    assert made.options.pop("stdout") is made.options.pop("stderr")
    assert made.options == {"stdin": subprocess.DEVNULL, "start_new_session": True}
    assert process.pid == PID
    assert log.read_text() == "ERROR ValueError: of an earlier engine\n"  # gone on with


def test_commands_go_one_way_and_replies_the_other(process: Any) -> None:
    prepare = Prepare(2, 8, 4, [0])
    process.send(prepare)
    process.ask_to_close()
    assert os.read(process._process.reads, 1000) == encode(prepare) + b"\n" + encode(Close()) + b"\n"
    assert process.replies() == []
    process._process.say(Ready(), Joined())
    process._process.say(Joined())
    assert process.replies() == [Ready(), Joined()]
    assert process.replies() == [Joined()]
    assert process.replies() == []
    os.write(process._process.writes, encode([Ready()])[:5])
    assert process.replies() == []
    os.write(process._process.writes, encode([Ready()])[5:] + b"\n")
    assert process.replies() == [Ready()]


@pytest.mark.parametrize(
    ("replies", "error", "said"),
    [
        ([Ready(), Failed("--dtype x: no", usage=True)], ConfigError, "--dtype x: no"),
        ([Failed("RuntimeError: no\nmore\x1b[2J", usage=False)], ReplicaError, "RuntimeError: no"),
        ([{"event": "ready"}, {"event": "other"}], ReplicaError, "the engine gave an invalid answer: Invalid value"),
    ],
)
def test_a_failure_is_the_users_or_the_engines(replies: list[Any], error: Any, said: str, process: Any) -> None:
    process._process.say(*replies)
    with pytest.raises(error) as caught:
        process.replies()
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_the_cause_of_a_failure_is_what_the_log_says_after_the_command(process: Any, log: Path) -> None:
    process.send(Close())
    with log.open("a") as more:
        more.write("ERROR OSError: the cause\n")
    process._process.say(Failed("RuntimeError: Engine core initialization failed", usage=False))
    with pytest.raises(ReplicaError) as caught:
        process.replies()
    assert caught.value.reason == str(caught.value) == "OSError: the cause"
    assert caught.value.log_tail == ["ERROR ValueError: of an earlier engine", "ERROR OSError: the cause"]
    assert caught.value.kind is None


@pytest.mark.parametrize(
    ("code", "said"), [(-9, "signal SIGKILL"), (-15, "signal SIGTERM"), (3, "exit code 3"), (0, "exit code 0")]
)
def test_a_process_that_has_ended_is_told_by_how(code: int, said: str, process: Any) -> None:
    process._process.returncode = code
    with pytest.raises(ReplicaError) as caught:
        process.replies()
    assert caught.value.reason == f"the engine process ended with {said}"


def test_a_part_or_a_node_that_is_gone_is_named(process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[str | None] = [None, "node 2 is gone; its output says why"]
    process._nodes = SimpleNamespace(lost=lambda: lost.pop(0))
    assert process.replies() == []
    with pytest.raises(ReplicaError) as caught:
        process.replies()
    assert caught.value.reason == "node 2 is gone; its output says why"
    monkeypatch.setattr(process, "_dead_part", lambda: "VLLM::Worker_TP1")
    with pytest.raises(ReplicaError) as caught:
        process.replies()
    assert caught.value.reason == "vLLM's process VLLM::Worker_TP1 ended without a word"


def test_the_parts_of_an_engine_are_those_that_vllm_has_named(
    process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pid, words in {7: b"VLLM::EngineCore\0", 8: b"python\0VLLM::x\0", 9: b" VLLM::Worker_TP0 \0-m\0"}.items():
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cmdline").write_bytes(words)
    of_group = {PID: [tmp_path / name for name in ("6", "7", "8", "9")]}
    monkeypatch.setattr(engine_process, "processes_of", lambda group: of_group[group])
    monkeypatch.setattr(engine_process, "shared_memory_of", lambda group: {Path(f"of_{group}")})
    process.remember_parts()
    assert process._parts == {7: "VLLM::EngineCore", 9: "VLLM::Worker_TP0"}
    assert process._shared_memory == {Path(f"of_{PID}")}


@pytest.mark.parametrize(
    ("looks", "signals"),
    [
        ((True,), []),
        ((False, True, True), [signal.SIGTERM]),
        ((False, False, False, True), [signal.SIGTERM, signal.SIGKILL]),
    ],
)
def test_what_does_not_end_in_order_is_asked_and_then_killed(
    looks: tuple[bool, ...], signals: list[int], process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    removed: list[Any] = []
    waited_s: list[float] = []
    empty = iter(looks)
    monkeypatch.setattr(process, "_group_is_empty", lambda patience_s: waited_s.append(patience_s) or next(empty))
    monkeypatch.setattr(engine_process, "time", SimpleNamespace(monotonic=lambda: 100.0))
    monkeypatch.setattr(engine_process.os, "killpg", lambda *words: sent.append(words))
    monkeypatch.setattr(engine_process, "shared_memory_of", lambda group: {Path(f"of_{group}_{len(sent)}")})
    monkeypatch.setattr(engine_process, "remove", removed.append)
    process._shared_memory = {Path("remembered")}
    process.end(102.5)
    assert process._process.waited_s == [2.5]
    assert sent == [(PID, number) for number in signals]
    assert waited_s == [0.0, 3.0, 0.0, 5.0][: len(looks)]
    assert removed == [{Path("remembered"), *(Path(f"of_{PID}_{number}") for number in range(len(signals)))}]
    assert process._replies.closed
    assert process._commands.closed


def test_the_variables_of_every_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "python_path", lambda: "/ours")
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME", "VLLM_NO_USAGE_STATS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    expected = {
        "PYTHONPATH": "/ours",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "",
        "TRITON_CACHE_DIR": "/home/me/.triton/cache",
        "VLLM_NO_USAGE_STATS": "1",
    }
    assert quiet_environment() == expected
    monkeypatch.setenv("TRITON_HOME", "/data")
    assert quiet_environment() == {**expected, "TRITON_CACHE_DIR": "/data/.triton/cache"}
    monkeypatch.setenv("TRITON_CACHE_DIR", "/fast")
    assert quiet_environment() == {**expected, "TRITON_CACHE_DIR": "/fast"}


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (["OSError:  much space "], "OSError: much space"),
        (["vllm.engine.EngineDeadError: x", "torch.OutOfMemoryError: CUDA out of memory"],
         "OutOfMemoryError: CUDA out of memory"),
        (["ValueError: a", "EngineCore encountered an issue: RuntimeError: b"], "ValueError: a"),
        (["Worker proc A died unexpectedly (exit code: 1)", "Worker proc B died unexpectedly (exit code: -9)"],
         "Worker proc A died unexpectedly (exit code: 1); -9 usually means that the kernel ran out of main memory"),
        (["an Error: of none"], None),
    ],
)  # fmt: skip
def test_the_cause_is_the_last_error_of_its_own_or_the_first_that_died(lines: list[str], cause: str | None) -> None:
    assert root_cause(lines) == cause


def test_a_node_holds_its_workers_until_node_0_dismisses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    class Process:
        def __init__(self, *words: Any) -> None:
            done.append(words)

        def send(self, command: Any) -> None:
            done.append(command)

        def replies(self) -> None:
            done.append("looks")

        def end(self, at_s: float) -> None:
            done.append(("ends", at_s))

    says = [False, False, True]
    waited_s: list[float] = []
    nodes: Any = SimpleNamespace(
        environment=lambda: {"B": "nodes", "C": "nodes"},
        dismissed=lambda timeout_s: waited_s.append(timeout_s) or says.pop(0),
    )
    devices: Any = SimpleNamespace(environment=lambda: {"A": "devices", "B": "devices"})
    monkeypatch.setattr(replicas, "EngineProcess", Process)
    monkeypatch.setattr(replicas, "time", SimpleNamespace(monotonic=lambda: 100.0))
    config = replicas.ExperimentConfig(
        nnodes=3, node_rank=2, tensor_parallel_size=3, output_file=str(tmp_path / "x.json")
    )
    replicas.hold_workers(config, devices, nodes)
    environment = {"A": "devices", "B": "nodes", "C": "nodes"}
    assert done == [(environment, tmp_path / "x.node_2.log"), Serve(config), "looks", "looks", ("ends", 100.0)]
    assert waited_s == [0.5] * 3


class FakeEngineProcess:
    """Answers for the four ranks of a job, and writes down what it is told."""

    made: ClassVar[list[FakeEngineProcess]] = []

    def __init__(self, *words: Any) -> None:
        self.words, self.told = words, []
        FakeEngineProcess.made.append(self)

    def send(self, command: Any) -> None:
        self.told.append(command)

    def ask_to_close(self) -> None:
        self.told.append("close")

    def end(self, at_s: float) -> None:
        self.told.append(("end", at_s))


def answers_of(command: Any) -> list[Any]:
    if isinstance(command, Load):
        workers = [WorkerInfo(host=f"rank-{rank}", weights_bytes=rank, kv_bytes=rank, runner="x") for rank in range(4)]
        return [Loaded(EngineInfo("0.32.0", block_size=rank, workers=[workers[rank]])) for rank in range(4)]
    if isinstance(command, Start):
        requests = Requests([], [], [], [])
        return [Done(Outcome(10.0 * rank, 10.0 * rank + 1 + rank, rank, 8, requests, 0)) for rank in range(4)]
    return [{Join: Joined, Prepare: Ready}[type(command)]()] * 4


@pytest.mark.parametrize(("hurry", "patience_s"), [(False, 15.0), (True, 0.5)])
def test_a_torchrun_job_is_led_through_one_process_and_told_by_replica(
    hurry: bool, patience_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[str] = []

    def receive(processes: list[Any], patience: Any) -> list[list[Any]]:
        (process,) = processes
        waited.append(patience)
        return [answers_of(process.told[-1])]

    class Mark:
        def __init__(self, path: Path) -> None:
            self.path = path

        def compilations(self) -> int:
            return {"x.log": 1, "x.rank_1.log": 10, "x.rank_2.log": 100, "x.rank_3.log": 1000}[self.path.name]

    FakeEngineProcess.made = []
    clock = SimpleNamespace(now_s=100.0)

    def monotonic() -> float:
        clock.now_s += 2.0
        return float(clock.now_s)

    monkeypatch.setattr(replicas, "EngineProcess", FakeEngineProcess)
    monkeypatch.setattr(replicas, "receive", receive)
    monkeypatch.setattr(replicas, "Patience", lambda _, waiting_for: waiting_for)
    monkeypatch.setattr(replicas, "LogMark", Mark)
    monkeypatch.setattr(replicas, "time", SimpleNamespace(monotonic=monotonic))
    config = replicas.ExperimentConfig(
        tensor_parallel_size=2, data_parallel_size=2, distributed_executor_backend="external_launcher",
        output_file=str(tmp_path / "x.json"),
    )  # fmt: skip
    job = replicas.TorchrunReplicas(config, {"A": "1"}, Place(0, 4, 0, 4))
    engines = job.start()
    # Of each replica the first rank's engine, with the workers of all its ranks.
    assert [(one.block_size, [worker.host for worker in one.workers]) for one in engines] == [
        (0, ["rank-0", "rank-1"]),
        (2, ["rank-2", "rank-3"]),
    ]
    prepare = Prepare(2, 8, 4, [0])
    job.prepare(prepare)
    first, second = job.run()
    assert [(one.start_s, one.end_s, one.prompt_tokens) for one in (first, second)] == [(0.0, 2.0, 0), (0.0, 4.0, 2)]
    assert (first.jit_compilations, first.passed_s) == (1111, 2.0)
    assert (second.jit_compilations, second.passed_s) == (None, None)
    assert job.pids() == []
    assert not job.can_restart
    job.close(hurry=hurry)
    job.close(hurry=hurry)
    (process,) = FakeEngineProcess.made
    assert process.words == ({"A": "1"}, tmp_path / "x.log")
    ends_s = clock.now_s + patience_s
    assert process.told == [Join(config), Load(config, 0), prepare, Start(), "close", ("end", ends_s)]
    assert waited == ["startup_timeout", "startup_timeout", "point_timeout", "point_timeout"]
    # Only the logs of this node are seen here.
    two_nodes = replicas.TorchrunReplicas(config, {}, Place(0, 4, 0, 2))
    assert [log.name for log in two_nodes._logs] == ["x.log", "x.rank_1.log"]


def test_the_environment_of_a_replica_is_put_together_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the nodes say counts most."""
    monkeypatch.setenv("VLLM_PORT", "20000")
    monkeypatch.setattr(replicas.os, "getpid", lambda: 16)
    monkeypatch.setattr(replicas, "environment_of", lambda address: {"RAY_ADDRESS": address, "CUDA_DEVICE_ORDER": "?"})
    nodes: Any = SimpleNamespace(environment=lambda: {"VLLM_HOST_IP": "10.0.0.1", "VLLM_DP_MASTER_IP": "10.0.0.1"})
    config = replicas.ExperimentConfig(
        tensor_parallel_size=2, data_parallel_size=2, output_file=str(tmp_path / "x.json")
    )
    devices = Devices("gpu", ("4", "5", "6", "7"))
    on_gpus = {"CUDA_VISIBLE_DEVICES": "6,7", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    port = {"VLLM_PORT": "20100"}
    coupling = {
        "VLLM_DP_SIZE": "2",
        "VLLM_DP_RANK": "1",
        "VLLM_DP_RANK_LOCAL": "0",
        "VLLM_DP_MASTER_IP": "127.0.0.1",
        "VLLM_DP_MASTER_PORT": "16000",
    }

    def given(**options: Any) -> dict[str, str]:
        return replicas.LocalReplicas(config, devices, **options)._environment(1)

    assert given() == on_gpus | port
    assert given(coupled=True) == on_gpus | port | coupling
    assert given(coupled=True, nodes=nodes) == on_gpus | port | coupling | nodes.environment()
    assert given(ray_address="local") == {"RAY_ADDRESS": "local"} | on_gpus | port
    assert given(ray_address="head:1") == {"RAY_ADDRESS": "head:1", "CUDA_DEVICE_ORDER": "?"} | port
    # Other nodes have ended with the engine, and cannot be called back.
    assert replicas.LocalReplicas(config, devices).can_restart
    assert not replicas.LocalReplicas(config, devices, nodes=nodes).can_restart
