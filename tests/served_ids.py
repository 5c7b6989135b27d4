"""Which token ids vLLM itself makes of requests, one JSON list for each: by its server, without an engine behind it,
and by the data sets of its benchmark.

    python tests/served_ids.py MODEL LINES CUSTOM SHAREGPT      files of OpenAI batch lines, custom prompts, ShareGPT
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any


def main(model: str, lines: str, custom: str, sharegpt: str) -> None:
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for ids in [*of_server(model, Path(lines)), *of_benchmark(model, custom, sharegpt)]:
            print(json.dumps(ids), file=answers)


def of_server(model: str, lines: Path) -> list[list[int]]:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.renderers.online_renderer import OnlineRenderer
    from vllm.renderers.registry import renderer_from_config

    try:
        from vllm.entrypoints.launchers.run_batch import BatchRequestInput
    except ImportError:
        from vllm.entrypoints.openai.run_batch import BatchRequestInput
    config = EngineArgs(model=model).create_engine_config()
    renderer = OnlineRenderer(
        config.model_config,
        renderer_from_config(config),
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
    )

    async def ids_of(line: str) -> list[int]:
        document = json.loads(line)
        rendered: Any
        if document["url"].endswith("/chat/completions"):
            _, rendered = await renderer.render_chat(BatchRequestInput.model_validate_json(line).body)
        else:
            # `vllm run-batch` takes chats alone; its server takes these.
            rendered = await renderer.render_completion(CompletionRequest.model_validate(document["body"]))
        return list(rendered[0]["prompt_token_ids"])

    async def all_ids() -> list[list[int]]:
        return [await ids_of(line) for line in lines.read_text().splitlines()]

    return asyncio.run(all_ids())


def of_benchmark(model: str, custom: str, sharegpt: str) -> list[list[int]]:
    """And the length that it gives each answer of ShareGPT, behind its prompt."""
    from transformers import AutoTokenizer
    from vllm.benchmarks.datasets import CustomDataset, ShareGPTDataset

    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for kind, path in ((CustomDataset, custom), (ShareGPTDataset, sharegpt)):
        # Of more than there are it repeats some.
        for sample in kind(dataset_path=path, disable_shuffle=True).sample(tokenizer, num_requests=2):
            ids = tokenizer(sample.prompt).input_ids
            assert len(ids) == sample.prompt_len
            found.append([*ids, sample.expected_output_len])
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
