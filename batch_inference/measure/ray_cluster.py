"""A Ray cluster: is there one to join, and does it have enough GPUs? The only file that imports ray.

    python -m batch_inference.measure.ray_cluster ADDRESS      prints {"gpus": 8}

asks in its own process, so that nothing of Ray stays in the supervising script.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from batch_inference.core.child import ChildError, ask, python_path
from batch_inference.core.config import ConfigError

# RAY_ADDRESS if each engine should start its own cluster.
OWN_CLUSTER = "local"
# Set by `ray job submit` for its jobs.
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_AUTH_MODE = "RAY_AUTH_MODE"
_CONNECT_TIMEOUT_S = 3.0
_ASK_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Cluster:
    address: str
    gpus: int


def find_cluster() -> Cluster | None:
    """The cluster of RAY_ADDRESS, otherwise the one that `ray start` left running on this machine; None if vLLM will
    have to start one. Raises ConfigError if RAY_ADDRESS leads nowhere or Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(f"--distributed-executor-backend ray: {sys.executable} has no ray; pip install ray")
    asked = os.environ.get("RAY_ADDRESS", "")
    if asked == OWN_CLUSTER:
        return None
    address = _started_here() if asked in ("", "auto") else asked
    if address is None or not _answers(address):
        if asked:
            raise ConfigError(f"RAY_ADDRESS: {asked!r}: no Ray cluster answers there; unset it to start one")
        return None
    return Cluster(address, _count_gpus(address))


def _started_here() -> str | None:
    """Ray itself looks there for the latest cluster of this machine (see ray.init)."""
    folder = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()))
    try:
        return (folder / "ray" / "ray_current_cluster").read_text().strip() or None
    except OSError:
        return None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True


def _count_gpus(address: str) -> int:
    try:
        return int(ask("measure.ray_cluster", address, timeout_s=_ASK_TIMEOUT_S, environment=_authentication())["gpus"])
    except ChildError as error:
        raise ConfigError(f"the Ray cluster at {address} cannot be joined: {error}") from error


def environment_of(address: str) -> dict[str, str]:
    """The variables that make vLLM join the cluster at `address`, and let its workers find this package there."""
    if address == OWN_CLUSTER:
        return {"RAY_ADDRESS": address}
    environment = {"RAY_ADDRESS": address, **_authentication()}
    if _JOB not in os.environ:
        # Workers of an existing cluster do not inherit our environment.
        environment[_JOB] = json.dumps({"runtime_env": {"env_vars": {"PYTHONPATH": python_path()}}})
    return environment


def _authentication() -> dict[str, str]:
    """The variable that makes Ray show the user's token, if there is one.

    Ray 2.60 makes a token for the first cluster that a program starts, and from then on `ray start` asks everybody for
    it. But it shows it unasked only at the address `auto`, not at one that is given.
    """
    has_token = "RAY_AUTH_TOKEN" in os.environ or _token_file().exists()
    return {_AUTH_MODE: "token"} if has_token and _AUTH_MODE not in os.environ else {}


def _token_file() -> Path:
    # A Path fails to expand ~ for a user who has no home, as in some containers.
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token"))  # noqa: PTH111


def main(address: str) -> None:
    import ray

    ray.init(address, logging_level="ERROR", log_to_driver=False)
    print(json.dumps({"gpus": int(ray.cluster_resources().get("GPU", 0))}))
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
