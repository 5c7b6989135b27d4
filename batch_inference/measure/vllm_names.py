"""Which of the vLLM names that we use are missing in the installed version.

    python -m batch_inference.measure.vllm_names      prints them as JSON; takes as long as importing vLLM

It imports what it looks for, as an engine would.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.installed_vllm import vllm_folder
from batch_inference.core.text import plain

# module -> its names; attributes or fields of a class follow a dot.
Names = Mapping[str, Iterable[str]]
# Without these, no engine loads or no run is counted.
NEEDED = {
    "vllm": ("LLM.generate", "LLM.collective_rpc", "LLM.get_metrics", "SamplingParams"),
    "vllm.engine.arg_utils": ("EngineArgs.add_cli_args", "EngineArgs.create_model_config"),
    "vllm.utils.argparse_utils": ("FlexibleArgumentParser",),
    "vllm.compilation.counter": ("compilation_counter",),
    "vllm.v1.metrics.perf": ("ModelMetrics",),
    "vllm.v1.metrics.stats": (
        "RequestStateStats.first_token_latency", "RequestStateStats.scheduled_ts",
        "RequestStateStats.first_token_ts", "RequestStateStats.last_token_ts",
    ),
}  # fmt: skip
# For several nodes, for the plan by vLLM, and for the texts of a workload.
OTHERS = {
    "vllm.usage.usage_lib": ("UsageContext.LLM_CLASS",),
    "vllm.v1.executor.multiproc_executor": ("MultiprocExecutor",),
    "vllm.engine.arg_utils": (
        "EngineArgs.create_engine_config",
        "EngineArgs.data_parallel_size",
        "EngineArgs.nnodes",
        "EngineArgs.node_rank",
        "EngineArgs.master_addr",
        "EngineArgs.master_port",
    ),
    "vllm.platforms": ("current_platform",),
    "vllm.config": ("set_current_vllm_config", "get_layers_from_vllm_config"),
    "vllm.distributed.parallel_state": ("_WORLD", "_TP", "_PP", "_DP", "_EP"),
    "vllm.model_executor.model_loader.utils": ("initialize_model",),
    "vllm.model_executor.layers.attention_layer_base": ("AttentionLayerBase",),
    "vllm.utils.torch_utils": ("set_default_torch_dtype",),
    "vllm.v1.core.kv_cache_utils": ("get_kv_cache_configs", "get_max_concurrency_for_kv_cache_config"),
    "vllm.renderers.registry": ("renderer_from_config",),
    "vllm.renderers.base": ("BaseRenderer.render_messages",),
    "vllm.renderers.online_renderer": ("OnlineRenderer._make_request_with_harmony",),
    "vllm.entrypoints.openai.chat_completion.protocol": ("ChatCompletionRequest.build_chat_params",),
    "vllm.utils.mistral": ("is_mistral_tokenizer",),
    "vllm.tokenizers.mistral": ("maybe_serialize_tool_calls", "truncate_tool_call_ids", "validate_request_params"),
}

# Where else the names of a module may be: versions differ.
ALSO_IN = {"vllm.v1.core.kv_cache_utils": "vllm.v1.core.kv_cache_planning"}


def missing_of(names: Names) -> list[str]:
    return [
        f"{module}.{name}"
        for module, those in names.items()
        for name in those
        if not (_has(module, name) or _has(ALSO_IN.get(module, module), name))
    ]


def _has(module: str, name: str) -> bool:
    try:
        owner: Any = importlib.import_module(module)
        for part in name.split("."):
            # A field without a default is not an attribute of its class.
            if not hasattr(owner, part) and part not in getattr(owner, "__dataclass_fields__", ()):
                return False
            owner = getattr(owner, part, None)
    except ImportError:  # of the module, or of what it imports lazily
        return False
    return True


def missing_metrics(names: Iterable[str]) -> list[str]:
    """The counters that vLLM's metrics do not name."""
    folder = vllm_folder()
    text = "".join(path.read_text() for path in folder.glob("v1/metrics/*.py")) if folder else ""
    return [name for name in names if name not in text]


def main() -> None:
    from batch_inference.measure import engine

    settings = {"vllm.engine.arg_utils": [f"EngineArgs.{name}" for name in engine.own_settings(ExperimentConfig())]}
    missing = {
        "needed": [*missing_of(NEEDED), *missing_of(settings)],
        "others": [*missing_of(OTHERS), *missing_metrics(engine.COUNTED)],
    }
    print(json.dumps({kind: [plain(name) for name in names] for kind, names in missing.items()}))


if __name__ == "__main__":
    main()
