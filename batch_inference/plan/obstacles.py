"""What cannot work here, and why: the devices, vLLM's own rules, the model's heads, layers and lengths."""

from __future__ import annotations

import os

from batch_inference.core.config import ExperimentConfig
from batch_inference.plan.architectures import padded_vocabulary, split_size
from batch_inference.plan.devices import Devices
from batch_inference.plan.model import ModelFacts
from batch_inference.plan.said import Said


def is_coupled(config: ExperimentConfig, facts: ModelFacts | None) -> bool:
    """True if the replicas divide experts among them, so that vLLM must couple them. A model that cannot be read from
    here is assumed to be the mixture of experts that --enable-expert-parallel is meant for."""
    return config.enable_expert_parallel and config.data_parallel_size > 1 and (facts is None or facts.is_moe)


ALL_HIDDEN = "CUDA_VISIBLE_DEVICES hides every GPU of this machine; unset it, or name existing GPUs, each once"


def devices_against(
    config: ExperimentConfig, devices: Devices, devices_here: int | None = None, ray_gpus: int | None = None
) -> str | None:
    """`devices_here`: how many processes torchrun started on this node. `ray_gpus`: how many the Ray cluster has that
    will assign the devices."""
    lower = "lower --tensor-parallel-size, --pipeline-parallel-size or --data-parallel-size"
    if devices.kind == "gpu" and not devices.ids:
        return ALL_HIDDEN
    if config.distributed_executor_backend == "ray":
        if devices.kind == "cpu":
            return "--distributed-executor-backend ray is refused by vLLM on the CPU; use mp"
        # A plan does not ask the cluster.
        short = ray_gpus is not None and config.num_devices > ray_gpus
        return (
            f"TP x PP x DP is {config.num_devices}, but the Ray cluster has {ray_gpus} GPUs; {lower}" if short else None
        )
    if devices_here is not None:
        short = devices_here > len(devices)
        words = f"torchrun started {devices_here} processes on a node with {len(devices)} {devices.kind} devices"
        return words if short else None
    if config.devices_per_node > len(devices):
        kind = "GPUs" if devices.kind == "gpu" else "CPU devices (slices of the cores)"
        share = f", {config.devices_per_node} on each node" if config.nnodes > 1 else ""
        return (
            f"TP x PP x DP is {config.num_devices} devices{share}, but this machine has {len(devices)} {kind}; {lower}"
        )
    return None


def rules_against(
    config: ExperimentConfig, facts: ModelFacts | None, devices: Devices, said: Said | None = None
) -> str | None:
    """What vLLM or the model does not allow. `said`: by vLLM itself, which overrules us."""
    if devices.kind == "cpu" and config.enforce_eager and config.pipeline_parallel_size > 1:
        return "--enforce-eager with --pipeline-parallel-size on the CPU fails in vLLM; drop --enforce-eager"
    if devices.kind == "cpu" and is_coupled(config, facts):
        return "--enable-expert-parallel with --data-parallel-size on the CPU fails in vLLM; it needs GPUs"
    if said and said.judges:
        # For lengths our own message says more: it names the flags.
        return said.refusal and (_length_against_model(config, said.longest) or f"{said.by} refuses it: {said.refusal}")
    return None if facts is None else _model_against_setting(config, facts)


def _model_against_setting(config: ExperimentConfig, facts: ModelFacts) -> str | None:
    tp, pp = config.tensor_parallel_size, config.pipeline_parallel_size
    heads, kv_heads = facts.num_attention_heads, facts.num_kv_heads
    if config.enable_expert_parallel and not facts.is_moe:
        return "--enable-expert-parallel needs a mixture of experts, but the model has no experts; drop the flag"
    if heads and heads % tp:
        return f"--tensor-parallel-size {tp} does not divide the model's {heads} attention heads"
    if kv_heads and max(kv_heads, tp) % min(kv_heads, tp):
        return f"--tensor-parallel-size {tp} does not fit the model's {kv_heads} KV heads"
    vocabulary = padded_vocabulary(facts)
    if vocabulary and vocabulary % tp:
        return f"--tensor-parallel-size {tp} does not divide the model's vocabulary of {vocabulary} (as vLLM pads it)"
    size = split_size(facts, whole_experts=config.enable_expert_parallel)
    if size and size % tp:
        return f"--tensor-parallel-size {tp} does not divide the model's intermediate size of {size}"
    if facts.num_layers and pp > facts.num_layers:
        return f"--pipeline-parallel-size {pp} is more stages than the model's {facts.num_layers} layers"
    return _length_against_model(config, facts.max_model_len)


def _length_against_model(config: ExperimentConfig, limit: int | None) -> str | None:
    # vLLM's own switch for "I know that the model was not trained for this", read the way vLLM does.
    insists = os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "").strip().lower() in ("1", "true")
    if limit is None or insists:
        return None
    if config.max_model_len and config.max_model_len > limit:
        return f"--max-model-len {config.max_model_len} is more than the model's {limit}; lower it"
    if config.longest_request > limit:
        return f"{config.longest_in_words}, more than the model's {limit}; shorten the requests"
    return None
