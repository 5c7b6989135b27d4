"""An engine on CPU cores: it lives in the process that submits to it, so that everything measured runs on these cores.

vLLM itself uses one process to submit, one to schedule, and one for each device. On a CPU each of them imports
vLLM again, one after another, and the first two run beside the cores of the device, or on them.
"""

from __future__ import annotations

import atexit
import importlib.util
import itertools
import multiprocessing
import os
import sys
from multiprocessing.util import Finalize
from pathlib import Path
from typing import NoReturn

from batch_inference.core.config import SEPARATE, ExperimentConfig
from batch_inference.plan.devices import Devices

_OPEN_MP = ("libgomp", "libiomp", "libomp")


def engine_environment(config: ExperimentConfig, cores: Devices) -> dict[str, str]:
    """The variables that make vLLM run a replica this way on `cores`; empty unless asked for."""
    if os.environ.get(SEPARATE, "1") != "0" or not cores.environment():
        return {}
    environment = {
        SEPARATE: "0",
        # vLLM 0.32 cannot read its kept ahead-of-time compilation there, and compiles again at each start.
        "VLLM_USE_AOT_COMPILE": os.environ.get("VLLM_USE_AOT_COMPILE", "0"),
    }
    if config.devices_per_replica == 1 and config.distributed_executor_backend != "mp":
        # vLLM binds workers in their own processes to cores, but not this one.
        environment |= cores.rank_environment(0) | _open_mp()
    return environment


def _open_mp() -> dict[str, str]:
    """vLLM preloads torch's own OpenMP for its worker processes: beside another copy of it, bound threads use only
    one core (vllm#27369)."""
    given = os.environ.get("LD_PRELOAD", "")
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None or any(name in given for name in _OPEN_MP):
        return {}
    package = Path(torch.origin).parent
    folders = (package.parent / "torch.libs", package / "lib")
    library = next(itertools.chain.from_iterable(folder.glob("libgomp*.so*") for folder in folders), None)
    return {"LD_PRELOAD": ":".join(filter(None, (given, str(library))))} if library else {}


def end_at_once() -> None:
    """From now on this process, if vLLM created it, ends as `leave` does."""
    if multiprocessing.parent_process():
        Finalize(None, _leave_where_all_is_well, exitpriority=-100)  # after all others


def _leave_where_all_is_well() -> None:
    if sys.exc_info()[0] is None:
        leave()


def leave() -> NoReturn:
    """End this process without tearing down what it holds: with vLLM and torch, that is 4 s of work for nothing.
    Exit handlers that others have registered still run."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)
