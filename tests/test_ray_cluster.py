from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.measure.ray_cluster import Cluster, environment_of, find_cluster
from batch_inference.plan.devices import Devices
from batch_inference.plan.obstacles import infeasible
from conftest import REPOSITORY, STUB


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Where a cluster would listen; the stub stands in for Ray, and no cluster was started on this machine."""
    monkeypatch.syspath_prepend(str(STUB))
    monkeypatch.setenv("PYTHONPATH", str(STUB))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def started_here(folder: Path, address: str) -> None:
    """As `ray start` leaves it."""
    (folder / "ray").mkdir()
    (folder / "ray" / "ray_current_cluster").write_text(address)


@pytest.mark.usefixtures("address")
def test_without_a_cluster_vllm_has_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_cluster() is None
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert find_cluster() is None


def test_the_cluster_of_the_environment_is_joined(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("STUB_RAY_GPUS", "16")
    assert find_cluster() == Cluster(address, 16)


@pytest.mark.parametrize("asked", ["", "auto"])
def test_a_cluster_that_runs_here_is_joined(
    address: str, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", asked)
    monkeypatch.setenv("STUB_RAY_GPUS", "2")
    started_here(tmp_path, address)
    assert find_cluster() == Cluster(address, 2)


@pytest.mark.usefixtures("address")
def test_what_a_cluster_that_ended_left_behind_is_no_cluster(tmp_path: Path) -> None:
    started_here(tmp_path, "127.0.0.1:1")
    assert find_cluster() is None


@pytest.mark.usefixtures("address")
@pytest.mark.parametrize("asked", ["127.0.0.1:1", "auto", "head"])
def test_an_address_that_leads_nowhere_is_said(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", asked)
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS: '{asked}': no Ray cluster answers there"):
        find_cluster()


def test_a_cluster_that_cannot_be_joined_gives_rays_reason(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=f"at {address} cannot be joined: ConnectionError: nothing at {address}"):
        find_cluster()


def test_workers_of_a_cluster_that_is_joined_find_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    job = json.loads(environment_of("head:6379")["RAY_JOB_CONFIG_JSON_ENV_VAR"])
    assert str(REPOSITORY) in job["runtime_env"]["env_vars"]["PYTHONPATH"]
    # Ray merges no two environments of a job: that of `ray job submit` stays.
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert environment_of("head:6379") == {"RAY_ADDRESS": "head:6379"}


def test_the_devices_of_the_cluster_count_and_not_those_of_this_machine() -> None:
    config = ExperimentConfig(tensor_parallel_size=8, distributed_executor_backend="ray")
    one_gpu = Devices("gpu", ("0",))
    assert infeasible(config, None, one_gpu, ray_gpus=16) is None
    said = "TP x PP x DP is 8, the Ray cluster has 4 GPUs; lower --tensor-parallel-size"
    assert (infeasible(config, None, one_gpu, ray_gpus=4) or "").startswith(said)
    # Nobody asks a cluster for a plan.
    assert infeasible(config, None, one_gpu) is None
