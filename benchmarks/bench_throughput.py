"""`vllm bench throughput` itself, which also says how long its requests were: the flags are its own.

Without the `vllm bench` command around it, as bench_latency.py. The prompt and output tokens of each request of the
timed run, in the order of its queue, go to the file named by the variable LENGTHS.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    from vllm import LLM
    from vllm.benchmarks.throughput import add_cli_args
    from vllm.benchmarks.throughput import main as bench_throughput
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    last: list[Any] = []  # of the calls: a warm-up comes before the timed run
    generate = LLM.generate

    def kept(*args: Any, **keywords: Any) -> Any:
        last[:] = generate(*args, **keywords)
        return list(last)

    LLM.generate = kept
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    bench_throughput(parser.parse_args(sys.argv[1:]))
    lengths = [(len(output.prompt_token_ids), len(output.outputs[0].token_ids)) for output in last]
    Path(os.environ["LENGTHS"]).write_text(json.dumps(lengths))


if __name__ == "__main__":  # vLLM's own processes import this file again
    main()
