"""How many requests and tokens a loaded engine takes at once: changed between runs, without a restart.

vLLM's scheduler keeps both as plain attributes, but may live in its own process. The process that holds the engine
writes them into memory that the scheduler reads before each step; a scheduler that only does this is placed
in front of vLLM's own (`--scheduler-cls`).
"""

from __future__ import annotations

import copy
import os
import struct
from typing import Any

SCHEDULER = f"{__name__}.LimitedScheduler"
_VARIABLE = "BATCH_INFERENCE_LIMITS"
_FORMAT = "qq"  # requests, tokens per step; 0: as loaded
_REQUESTS = ("max_num_active_reqs", "max_num_running_reqs")  # the first that vLLM has; 0.26 has only the second
_TOKENS = "max_num_scheduled_tokens"


class Limits:
    """The limits of the engine that this process loads next."""

    def __init__(self) -> None:
        # Unnamed, so that nothing is left behind; children find it through this process.
        self._file = os.memfd_create("limits")
        os.environ[_VARIABLE] = f"/proc/{os.getpid()}/fd/{self._file}"
        self.set(None, None)

    def set(self, requests: int | None, tokens: int | None) -> None:
        """Applies from the next step on; None: as the engine was loaded."""
        os.pwrite(self._file, struct.pack(_FORMAT, requests or 0, tokens or 0), 0)


class _Limiting:
    """Comes before a vLLM scheduler among the bases of a class."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._limits = os.open(os.environ[_VARIABLE], os.O_RDONLY)
        name = next(name for name in _REQUESTS if hasattr(self, name))
        self._as_loaded = {name: getattr(self, name), _TOKENS: getattr(self, _TOKENS)}

    def schedule(self, *arguments: Any, **keywords: Any) -> Any:
        wanted = struct.unpack(_FORMAT, os.pread(self._limits, struct.calcsize(_FORMAT), 0))
        for (name, loaded), value in zip(self._as_loaded.items(), wanted, strict=True):
            setattr(self, name, min(value, loaded) if value else loaded)
        return super().schedule(*arguments, **keywords)  # type: ignore[misc]


class LimitedScheduler:
    """vLLM's own choice of scheduler, made to obey the limits."""

    def __new__(cls, vllm_config: Any, *arguments: Any, **keywords: Any) -> Any:
        # As if none had been named: vLLM has one with async scheduling and one without.
        own = copy.copy(vllm_config.scheduler_config)
        own.scheduler_cls = None
        limited = type(cls.__name__, (_Limiting, own.get_scheduler_cls()), {})
        return limited(vllm_config, *arguments, **keywords)
