"""`vllm bench throughput` itself, which also records what it ran. Its flags are unchanged.

It runs without the `vllm bench` command, like bench_latency.py. The file named by the variable RAN gets, for the timed
run, the prompt and output tokens of each request in queue order, and the number of engine steps that made a token.
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
    from vllm.v1.engine.output_processor import OutputProcessor

    steps = 0
    last: list[Any] = []  # outputs of the last call: a warm-up comes before the timed run
    generate, process_outputs = LLM.generate, OutputProcessor.process_outputs

    def kept(*args: Any, **keywords: Any) -> Any:
        nonlocal steps
        steps = 0
        last[:] = generate(*args, **keywords)
        return list(last)

    def counted(self: Any, outputs: Any, *args: Any, **keywords: Any) -> Any:
        nonlocal steps
        steps += bool(outputs)
        return process_outputs(self, outputs, *args, **keywords)

    LLM.generate, OutputProcessor.process_outputs = kept, counted
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    bench_throughput(parser.parse_args(sys.argv[1:]))
    lengths = [(len(output.prompt_token_ids), len(output.outputs[0].token_ids)) for output in last]
    Path(os.environ["RAN"]).write_text(json.dumps({"lengths": lengths, "steps": steps}))


if __name__ == "__main__":  # vLLM's own processes import this file again
    main()
