"""`vllm bench latency` itself, with a stopwatch around its phases. Its flags are unchanged.

It runs without the `vllm bench` command, which does not start with the CPU build of vLLM 0.32.0. The seconds go to
the file named by the variable STOPWATCH: import_s, engine_s, and calls_s of every LLM.generate, warm-ups first.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED_S = time.monotonic()


def watched(function: Callable[..., Any], taken_s: list[float]) -> Callable[..., Any]:
    def call(*args: Any, **keywords: Any) -> Any:
        started_s = time.monotonic()
        answer = function(*args, **keywords)
        taken_s.append(time.monotonic() - started_s)
        return answer

    return call


def main() -> None:
    from vllm import LLM
    from vllm.benchmarks.latency import add_cli_args
    from vllm.benchmarks.latency import main as bench_latency
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    imported_s = time.monotonic()
    engine_s: list[float] = []
    calls_s: list[float] = []
    LLM.__init__ = watched(LLM.__init__, engine_s)
    LLM.generate = watched(LLM.generate, calls_s)
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    bench_latency(parser.parse_args(sys.argv[1:]))
    seconds = {"import_s": imported_s - STARTED_S, "engine_s": sum(engine_s), "calls_s": calls_s}
    Path(os.environ["STOPWATCH"]).write_text(json.dumps(seconds))


if __name__ == "__main__":  # vLLM's own processes import this file again
    main()
