from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batch_inference.core.child import ChildError
from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.measure import ray_cluster
from batch_inference.measure.ray_cluster import Cluster, environment_of, find_cluster
from batch_inference.plan.devices import Devices
from builders import infeasible
from conftest import REPOSITORY, STUB


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Where a cluster would listen; the stub stands in for Ray, and no cluster was started on this machine."""
    monkeypatch.syspath_prepend(str(STUB))
    monkeypatch.setenv("PYTHONPATH", str(STUB))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    without_token(monkeypatch, tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def without_token(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("HOME", str(home))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


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


def test_workers_of_a_cluster_that_is_joined_find_this_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_token(monkeypatch, tmp_path)
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
    said = "TP x PP x DP is 8, but the Ray cluster has 4 GPUs; lower --tensor-parallel-size"
    assert (infeasible(config, None, one_gpu, ray_gpus=4) or "").startswith(said)
    # Nobody asks a cluster for a plan.
    assert infeasible(config, None, one_gpu) is None


def test_a_cluster_is_asked_for_its_gpus_and_left_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[Any] = []
    resources: dict[str, float] = {"GPU": 8.0, "CPU": 64.0}
    stub = SimpleNamespace(
        init=lambda *words, **options: done.append((words, options)),
        cluster_resources=lambda: resources,
        shutdown=lambda: done.append("left"),
    )
    monkeypatch.setitem(sys.modules, "ray", stub)
    ray_cluster.main("10.0.0.1:6379")
    resources.pop("GPU")
    ray_cluster.main("10.0.0.1:6379")
    assert capsys.readouterr().out == '{"gpus": 8}\n{"gpus": 0}\n'
    assert done == [(("10.0.0.1:6379",), {"logging_level": "ERROR", "log_to_driver": False}), "left"] * 2


def test_what_asks_a_cluster_waits_a_minute_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_token(monkeypatch, tmp_path)
    asked: list[Any] = []

    def ask(*words: str, **options: Any) -> Any:
        asked.append((words, options))
        if len(asked) > 1:
            raise ChildError("no answer within 60 s")
        return {"gpus": 4}

    monkeypatch.setattr(ray_cluster, "ask", ask)
    assert ray_cluster._count_gpus("head:1") == 4
    with pytest.raises(ConfigError) as caught:
        ray_cluster._count_gpus("head:1")
    assert str(caught.value) == "the Ray cluster at head:1 cannot be joined: no answer within 60 s"
    assert asked == [(("measure.ray_cluster", "head:1"), {"timeout_s": 60.0, "environment": {}})] * 2


@pytest.mark.parametrize(
    ("address", "at"),
    [("10.0.0.1:6379", ("10.0.0.1", 6379)), ("[fe80::1]:6379", ("fe80::1", 6379)), ("head", None), ("a:b", None)],
)
def test_an_address_is_a_host_and_a_port(
    address: str, at: tuple[str, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []
    closed: list[bool] = []

    def connect(at: tuple[str, int], timeout: float) -> Any:
        called.append((at, timeout))
        return SimpleNamespace(close=lambda: closed.append(True))

    monkeypatch.setattr(ray_cluster.socket, "create_connection", connect)
    assert ray_cluster._answers(address) is (at is not None)
    assert called == ([(at, 3.0)] if at else [])
    assert closed == [True] * len(called)


@pytest.mark.parametrize("where", ["home", "file", "variable"])
def test_the_users_token_is_shown_to_a_cluster(where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray 2.60 itself shows it only at the address `auto`."""
    without_token(monkeypatch, tmp_path)
    asked: list[Any] = []
    monkeypatch.setattr(ray_cluster, "ask", lambda *_, **options: asked.append(options) or {"gpus": 4})
    assert "RAY_AUTH_MODE" not in environment_of("head:1")
    if where == "variable":
        monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    elif where == "file":
        (tmp_path / "token").write_text("secret")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    else:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("secret")
    assert environment_of("head:1")["RAY_AUTH_MODE"] == "token"
    assert "secret" not in str(environment_of("head:1"))
    ray_cluster._count_gpus("head:1")
    assert asked == [{"timeout_s": 60.0, "environment": {"RAY_AUTH_MODE": "token"}}]
    # A cluster of its own has the token from Ray, and what the user says about tokens stays.
    assert environment_of("local") == {"RAY_ADDRESS": "local"}
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "RAY_AUTH_MODE" not in environment_of("head:1")


def test_the_variables_that_join_a_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_token(monkeypatch, tmp_path)
    monkeypatch.setattr(ray_cluster, "python_path", lambda: "/ours")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    job = '{"runtime_env": {"env_vars": {"PYTHONPATH": "/ours"}}}'
    assert environment_of("local") == {"RAY_ADDRESS": "local"}
    assert environment_of("head:1") == {"RAY_ADDRESS": "head:1", "RAY_JOB_CONFIG_JSON_ENV_VAR": job}
    # A job that Ray itself runs has one already.
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert environment_of("head:1") == {"RAY_ADDRESS": "head:1"}


def test_without_ray_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster.importlib.util, "find_spec", lambda name: {"ray": None}[name])
    with pytest.raises(ConfigError) as caught:
        find_cluster()
    assert str(caught.value) == f"--distributed-executor-backend ray: {sys.executable} has no ray; pip install ray"


@pytest.mark.parametrize(("content", "found"), [("head:1\n", "head:1"), ("\n", None), (None, None)])
def test_a_cluster_of_this_machine_is_in_a_file_of_rays(
    content: str | None, found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        started_here(tmp_path, content)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(ray_cluster.tempfile, "gettempdir", lambda: str(tmp_path))
    assert ray_cluster._started_here() == found
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "elsewhere"))
    assert ray_cluster._started_here() is None
