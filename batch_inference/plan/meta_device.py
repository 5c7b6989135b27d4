"""What vLLM itself says about settings, without loading anything: it builds their models on torch's meta device.

    python -m batch_inference.plan.meta_device <QUESTIONS     prints a line of JSON for each

QUESTIONS: as JSON, {"own_folder": where vLLM may keep what it finds out here, "questions": [Question, ..]}.

Runs in its own process, with stand-ins for a worker's surroundings. vLLM's names that are not public (0.26 to
0.33) are looked up, with a reason if they are missing, and any failure makes the answer unknown.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from batch_inference.plan.devices import GIB
from batch_inference.plan.memory import LOADS_AS_STORED
from batch_inference.plan.refusals import is_about_length, judged, may_pass
from batch_inference.plan.stand_ins import UnknownError, be_first_rank_of, no_streams, prepare, quickest_cpu

# The block size of most attention backends on GPUs; a vLLM for the CPU has another.
_GPU_BLOCK = 16
# As in our engines: without a multimodal model's parts for anything but text. 0.28 to 0.31 would read the
# processor's files for the second while building the model, though a config is enough for its sizes.
_TEXT_ALONE = {"language_model_only": True, "mm_device_do_normalize": False}
# More than any device has: how many requests fit into it tells what one takes.
_ROOMY_BYTES = 2**50
# In torch's errors: something without memory behind it was read.
_READS_META = re.compile(r"meta tensor|register_meta|on the meta device|Tensor\.item\(\)")


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """vLLM's answer to a Question of `by_vllm`: the fields of a Said."""
    told: dict[str, Any] = {}
    try:
        for_others = _is_for_others(question)
        with no_streams(), quickest_cpu() if for_others else contextlib.nullcontext():
            _tell(question, told)
    except UnknownError as error:
        told["unknown"] = str(error)
    except Exception as error:  # noqa: BLE001 - vLLM's error may say something about the setting
        found = judged(error)
        told.update(unknown=found.unknown, may_pass=may_pass(error))
        told["refusal"] = found.refusal or told.get("refusal")
    return told


def _tell(question: dict[str, Any], told: dict[str, Any]) -> None:
    arguments = _engine_arguments(question)
    try:
        config = _config_of(arguments, question)
    except ValueError as error:
        told["refusal"] = judged(error).refusal
        if not is_about_length(told["refusal"]):
            raise
        # The sizes are known anyway.
        arguments.max_model_len = None
        config = _config_of(arguments, question)
    told["longest"] = _longest(config.model_config)
    if (runner := getattr(config.model_config, "runner_type", "generate")) != "generate":
        told["refusal"] = f"it does not generate text (vLLM's runner for it is {runner})"
        return
    _refuse_to_guess(arguments, config)
    # A GPU's block size must not be fitted to this machine; a hybrid model's follows from its layers.
    fits_block = config.model_config.is_hybrid or not _is_for_others(question)
    stages = [
        _stage(config, number, fits_block=fits_block) for number in range(config.parallel_config.pipeline_parallel_size)
    ]
    told["weights_gib"] = max(stage.weights_bytes for stage in stages) / GIB
    told.update(_kv_cache(stages, question, _pool_asked_bytes(arguments, question)))


# --- its configuration ----------------------------------------------------------------------------------------------


def _engine_arguments(question: dict[str, Any]) -> Any:
    """Uses vLLM's own parser. Raises UnknownError for what it rejects: vLLM says so when it starts."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise UnknownError(" ".join(message.split()))

    parser = EngineArgs.add_cli_args(Parser(add_help=False, allow_abbrev=False))
    parser.set_defaults(**{name: value for name, value in _TEXT_ALONE.items() if hasattr(EngineArgs, name)})
    arguments = EngineArgs.from_cli_args(parser.parse_args(question["words"]))
    if _is_for_others(question) and arguments.block_size is None:
        arguments.block_size = _GPU_BLOCK
    return arguments


def _config_of(arguments: Any, question: dict[str, Any]) -> Any:
    from vllm.usage.usage_lib import UsageContext

    # The steps of an offline engine depend on the size of its GPU; vLLM has a default for unknown ones.
    context = None if _is_for_others(question) else UsageContext.LLM_CLASS
    return copy.deepcopy(arguments).create_engine_config(usage_context=context)


def _is_for_others(question: dict[str, Any]) -> bool:
    """Whether it is for GPUs, and vLLM has none here."""
    from vllm.platforms import current_platform

    return bool(question["for_gpus"]) and not current_platform.is_cuda_alike()


def _longest(model_config: Any) -> int | None:
    """The model's own longest length, whatever was asked for."""
    with contextlib.suppress(AttributeError, TypeError, ValueError):
        return int(copy.copy(model_config).get_and_verify_max_len(None))
    return None


def _refuse_to_guess(arguments: Any, config: Any) -> None:
    """Raises UnknownError if a device will hold something other than the model as it is built."""
    model = config.model_config
    parts = (model.hf_config, model.hf_text_config)
    names = ("quantization_config", "compression_config")
    reasons = {
        "weights are quantized while they load": arguments.quantization is not None
        and not any(getattr(part, name, None) for part in parts for name in names),
        f"--load-format {arguments.load_format} may change the weights": str(arguments.load_format).replace("_", "-")
        not in LOADS_AS_STORED,
        "vLLM learns the sizes in a GGUF file only when it loads it": model.quantization == "gguf",
        "part of the weights goes to main memory": getattr(arguments, "cpu_offload_gb", 0)
        or getattr(arguments, "offload_group_size", 0),
        "a draft model's memory is not planned": config.speculative_config,
        "adapters' memory is not planned": config.lora_config,
    }
    if found := [reason for reason, applies in reasons.items() if applies]:
        raise UnknownError(found[0])


# --- its weights ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stage:
    """What the first rank of a stage holds."""

    config: Any  # its VllmConfig
    weights_bytes: int
    copies_bytes: int  # copies that layers make of their weights while loading
    kv_specs: dict[str, Any]  # what each of its layers keeps per token, as a KVCacheSpec


def _stage(config: Any, number: int, *, fits_block: bool) -> _Stage:
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.platforms import current_platform

    config = copy.deepcopy(config)  # as each worker has its own
    be_first_rank_of(number, config.parallel_config, parallel_state)
    model = _built(config, torch.device("meta"))
    weights_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    with set_current_vllm_config(config):
        if fits_block and hasattr(current_platform, "update_block_size_for_backend"):
            current_platform.update_block_size_for_backend(config)
        return _Stage(config, weights_bytes, _copies_bytes(model, config.model_config.dtype), _kv_specs(config))


def _copies_bytes(model: Any, dtype: Any) -> int:
    """MLA keeps a separate, unquantized copy of what expands its keys and values (W_UK and W_UV)."""
    layers = [layer for layer in model.modules() if hasattr(layer, "kv_b_proj") and hasattr(layer, "kv_lora_rank")
              and hasattr(layer, "get_kv_cache_spec")]  # fmt: skip
    parameters = sum(
        layer.num_heads * (layer.qk_nope_head_dim + layer.v_head_dim) * layer.kv_lora_rank for layer in layers
    )
    return int(parameters * dtype.itemsize)


def _built(config: Any, device: Any) -> Any:
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(config.model_config.dtype):
        try:
            with device:
                return initialize_model(copy.copy(config))
        except (NotImplementedError, RuntimeError) as error:
            if not _READS_META.search(str(error)):
                raise
        # It reads some tensors while it is being built: then only what will be loaded has no memory.
        config.compilation_config.static_forward_context.clear()
        with _parameters_on(device):
            return initialize_model(config)


@contextlib.contextmanager
def _parameters_on(device: Any) -> Iterator[None]:
    import torch

    register = torch.nn.Module.register_parameter

    def register_there(module: Any, name: str, parameter: Any) -> None:
        if type(parameter) is torch.nn.Parameter and parameter.device != device:
            own = vars(parameter)
            parameter = torch.nn.Parameter(parameter.data.to(device), requires_grad=parameter.requires_grad)
            vars(parameter).update(own)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_there
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


# --- its KV cache ---------------------------------------------------------------------------------------------------


def _kv_specs(config: Any) -> dict[str, Any]:
    """Found the way GPUModelRunner.get_kv_cache_spec does."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.worker import utils

    specs = {}
    for name, layer in get_layers_from_vllm_config(config, AttentionLayerBase).items():
        shared = getattr(layer, "kv_sharing_target_layer_name", None)
        spec = None if shared else layer.get_kv_cache_spec(config)
        if spec is None:
            continue
        if hasattr(utils, "customize_attention_spec") and hasattr(spec, "num_kv_heads"):
            spec = utils.customize_attention_spec(layer.get_attn_backend(), spec)
        specs[name] = spec
    return specs


def _pool_asked_bytes(arguments: Any, question: dict[str, Any]) -> int | None:
    """The size of the KV cache if the user sets it."""
    if question["pool_gib"] is not None:
        return int(question["pool_gib"] * GIB)
    asked = getattr(arguments, "kv_cache_memory_bytes", None)
    return None if asked is None else int(asked)


def _kv_cache(stages: Sequence[_Stage], question: dict[str, Any], pool_asked_bytes: int | None) -> dict[str, Any]:
    if not any(stage.kv_specs for stage in stages):
        return {}
    _choose_layout(stages)
    roomy = _Cache(stages, [_ROOMY_BYTES] * len(stages))
    told: dict[str, Any] = {
        "kv_gib": [_ROOMY_BYTES / roomy.concurrency(tokens) / GIB for tokens in question["requests"]]
    }
    share_gib = question["share_gib"]
    if pool_asked_bytes is None and share_gib is None:
        return told
    pools = [pool_asked_bytes or int(share_gib * GIB) - stage.weights_bytes - stage.copies_bytes for stage in stages]
    told["pool_gib"] = min(pools) / GIB
    cache = _Cache(stages, pools) if min(pools) > 2 * _ROOMY_BYTES / roomy.num_blocks else None
    told["waves"] = [cache.requests_at_once(tokens) if cache else 0 for tokens in question["requests"]]
    longest = stages[0].config.model_config.max_model_len
    told["kv_cache_tokens"] = int(cache.concurrency(longest) * longest) if cache else 0
    return told


class _Cache:
    """The KV cache that vLLM lays out in the given bytes of each stage."""

    def __init__(self, stages: Sequence[_Stage], pools: Sequence[int]) -> None:
        from vllm.v1.core import kv_cache_utils

        self._utils, self._config = kv_cache_utils, stages[0].config
        # For the plan, the longest request need not fit.
        with self._as_long_as(1):
            specs = [dict(stage.kv_specs) for stage in stages]
            caches = _laid_out(self._config, specs, list(pools))
        self._cache = min(caches, key=lambda cache: cache.num_blocks)
        self.num_blocks: int = self._cache.num_blocks

    def concurrency(self, tokens: int) -> float:
        """How many requests of `tokens` all blocks add up to."""
        with self._as_long_as(tokens):
            return float(self._utils.get_max_concurrency_for_kv_cache_config(self._config, self._cache))

    def requests_at_once(self, tokens: int) -> int:
        # vLLM holds one block back. Rounding makes up for what floating point takes from a whole number.
        return int(round(self.concurrency(tokens) * (self.num_blocks - 1) / self.num_blocks, 9))

    @contextlib.contextmanager
    def _as_long_as(self, tokens: int) -> Iterator[None]:
        model = self._config.model_config
        kept = model.max_model_len
        model.max_model_len = tokens
        try:
            yield
        finally:
            model.max_model_len = kept


def _laid_out(config: Any, specs: list[dict[str, Any]], pools: list[int]) -> Any:
    """The cache of each stage. Since 0.33 vLLM does this in another module, and groups the layers before."""
    try:
        from vllm.v1.core import kv_cache_planning
    except ImportError:
        from vllm.v1.core import kv_cache_utils

        return kv_cache_utils.get_kv_cache_configs(config, specs, pools)
    groups = kv_cache_planning.get_global_kv_cache_groups(config, specs)
    return kv_cache_planning.get_kv_cache_configs(config, specs, pools, groups)


def _choose_layout(stages: Sequence[_Stage]) -> None:
    """As the engine does before it lays out the cache, in versions that have several layouts."""
    caches = [stage.config.cache_config for stage in stages]
    if getattr(caches[0], "kv_cache_layout", "none") is not None:
        return
    from vllm.v1.attention.backends import utils
    from vllm.v1.worker import worker_base

    for stage in stages:
        names = [
            layout.name
            for layout in worker_base.get_supported_kv_cache_layouts(
                worker_base.get_current_attn_backends(stage.config)
            )
        ]
        specs = [spec for one in stages for spec in one.kv_specs.values()]
        utils.resolve_kv_cache_layout(stage.config, [names], specs)


# --- the process ----------------------------------------------------------------------------------------------------


def look_without_processes() -> None:
    """vLLM inspects a kind of model in a process that imports all of vLLM again. This process is as good."""
    registry: Any = importlib.import_module("vllm.model_executor.models.registry")
    if hasattr(registry, "_run_in_subprocess"):
        registry._run_in_subprocess = lambda look: look()


def main() -> None:
    asked = json.load(sys.stdin)
    # Anything else that is printed goes elsewhere.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        prepare(asked["own_folder"])
        look_without_processes()
        for question in asked["questions"]:
            print(json.dumps(answer(question)), file=answers, flush=True)


if __name__ == "__main__":
    main()
