from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from batch_inference.config import ConfigError, ExperimentConfig
from batch_inference.hardware import Devices
from batch_inference.replicas import LocalReplicas, ReplicaError, read_log_tail, root_cause
from conftest import REPOSITORY, stub_environment

ONE_CORE = Devices("cpu", ("0",))


@pytest.fixture
def replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    for name, value in stub_environment().items():
        monkeypatch.setenv(name, value)
    config = ExperimentConfig(batch_sizes=(1, 2), seq_lens=(8,), max_tokens=4)
    made = LocalReplicas(config, ONE_CORE, tmp_path / "x.log")
    yield made
    made.close()


def test_a_replica_loads_runs_and_leaves_no_process(replicas: LocalReplicas) -> None:
    (engine,) = replicas.start()
    assert engine["vllm_version"] == "0.32.0"
    assert engine["weights_gib"] == 1.0
    (pid,) = replicas.pids()
    (outcome,) = replicas.run(2, 8, 4, (0, "run", 0))
    assert (outcome["prompt_tokens"], outcome["output_tokens"]) == (16, 8)
    assert outcome["start_s"] == 0.0
    assert outcome["end_s"] >= 0.002
    replicas.close()
    with pytest.raises(ProcessLookupError):
        os.killpg(pid, 0)


def test_a_replica_leads_a_process_group_of_its_own(replicas: LocalReplicas) -> None:
    replicas.start()
    (pid,) = replicas.pids()
    assert os.getpgid(pid) == pid != os.getpgid(0)


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
        replicas.run(1, 8, 4, (0,))


def test_a_wrong_vllm_flag_is_wrong_use_not_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in stub_environment().items():
        monkeypatch.setenv(name, value)
    replicas = LocalReplicas(ExperimentConfig(engine_args=("--quantisation", "x")), ONE_CORE, tmp_path / "x.log")
    try:
        with pytest.raises(ConfigError, match="did you mean --quantization"):
            replicas.start()
    finally:
        replicas.close()
    assert "stub vLLM is loading" not in (tmp_path / "x.log").read_text()


def test_an_engine_ends_itself_when_its_supervisor_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from batch_inference.config import ExperimentConfig\n"
        "from batch_inference.hardware import Devices\n"
        "from batch_inference.replicas import LocalReplicas\n"
        "r = LocalReplicas(ExperimentConfig(), Devices('cpu', ('0',)), Path(sys.argv[1]))\n"
        "r.start(); print(r.pids()[0], flush=True); time.sleep(60)\n"
    )
    environment = stub_environment()
    environment["PYTHONPATH"] += os.pathsep + str(REPOSITORY)
    supervisor = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "x.log")], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert supervisor.stdout is not None
    pid = int(supervisor.stdout.readline())
    supervisor.kill()
    supervisor.wait()
    deadline_s = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()


def test_the_root_cause_is_not_the_error_that_hands_it_on() -> None:
    log = [
        "(EngineCore pid=7) ERROR 11-24 10:00:00 [core.py:1] ValueError: heads must be divisible",
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
        "INFO all is well",
    ]
    assert root_cause(log) == "ValueError: heads must be divisible"
    assert root_cause(["INFO nothing here"]) is None


def test_colour_codes_do_not_reach_the_log_tail(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("\x1b[1;36m(EngineCore pid=1)\x1b[0;0m ValueError: no\n")
    assert read_log_tail(log) == ["(EngineCore pid=1) ValueError: no"]
    assert read_log_tail(tmp_path / "absent.log") == []
