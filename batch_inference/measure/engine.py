"""One vLLM engine: the file that imports vLLM to measure."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from batch_inference.core.config import PREFIX_FLAG, SEPARATE, ConfigError, ExperimentConfig, flag_of
from batch_inference.core.flags import OWNED_BY_US, owned_by_us, unknown_flag_message
from batch_inference.core.prompts import make_prompts
from batch_inference.core.results import LoadTimes, WorkerInfo
from batch_inference.measure.cpu_engine import end_at_once
from batch_inference.measure.hardware import Monitor, Reading, joined, monitor
from batch_inference.measure.limits import SCHEDULER, Limits
from batch_inference.measure.messages import Asked, Outcome
from batch_inference.measure.vllm_objects import (
    StepWatch,
    add_queue,
    compile_cache_of,
    count_outputs,
    effective_settings,
    kv_bytes_of,
    special_ids,
    weights_bytes_of,
    with_workers,
)
from batch_inference.plan.devices import Devices, find_devices

# Prompts of token ids need no tokenizer; cached prefixes would not be computed; without statistics
# RequestOutput.metrics is None; and without the last two vLLM neither estimates its work nor names every kernel that it
# compiles late.
MEASURING_SETTINGS = {
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "disable_log_stats": False,
    "worker_extension_cls": "batch_inference.measure.engine.WorkerExtension",
    "enable_mfu_metrics": True,
    "jit_monitor_verbose": True,
}
# Prompts are only text: otherwise a multimodal model prepares for images, and needs its tokenizer for that. Not every
# version of vLLM has it.
_TEXT_ALONE = {"language_model_only": True}

# vLLM's counters -> their names in a run.
_COUNTERS = {
    "vllm:num_preemptions": "preemptions",
}
_ESTIMATES = {
    "vllm:estimated_flops_per_gpu": "flops_per_device",
    "vllm:estimated_read_bytes_per_gpu": "memory_bytes_per_device",
    "vllm:estimated_write_bytes_per_gpu": "memory_bytes_per_device",
}
COUNTED = (*_COUNTERS, *_ESTIMATES)


class WorkerExtension:
    """Added to vLLM's workers (`worker_extension_cls`), so that each can be asked what it holds."""

    def batch_inference_report(self) -> Any:
        """A WorkerInfo, in plain types that vLLM can pass between processes."""
        from vllm.compilation.counter import compilation_counter

        runner: Any = self.model_runner  # type: ignore[attr-defined]
        config: Any = self.vllm_config  # type: ignore[attr-defined]
        return msgspec.to_builtins(
            WorkerInfo(
                host=socket.gethostname(),
                device=self._batch_inference_monitor().identify(in_use=True)[0],
                weights_bytes=weights_bytes_of(runner.model, config.model_config.dtype.itemsize),
                kv_bytes=kv_bytes_of(runner.kv_caches),
                activation_bytes=getattr(self, "peak_activation_memory", None),
                compile_s=config.compilation_config.compilation_time or None,  # 0.0: vLLM did not measure it
                compile_cache=compile_cache_of(compilation_counter, _counted_by_torch()),
                runner=f"{type(runner).__module__}.{type(runner).__name__}",
            )
        )

    def batch_inference_read(self) -> Any:
        """A Reading of this rank's own device, on whatever machine."""
        return msgspec.to_builtins(self._batch_inference_monitor().read([os.getpid()]))

    def batch_inference_end_at_once(self) -> None:
        """Make this rank's process end at once when it ends."""
        end_at_once()

    def _batch_inference_monitor(self) -> Monitor:
        if not hasattr(self, "_batch_inference_watch"):
            device: Any = self.device  # type: ignore[attr-defined]
            self._batch_inference_watch = monitor(_devices_of(device))
        return self._batch_inference_watch


def _counted_by_torch() -> Mapping[str, int]:
    """What torch's inductor found in its cache and what it did not; empty if torch's compiler was never imported."""
    module = sys.modules.get("torch._dynamo.utils")
    return module.counters["inductor"] if module else {}


def _devices_of(device: Any) -> Devices:
    """A torch.device as one of our devices. CUDA numbers those that a process can see; NVML numbers all."""
    if device.type == "cpu":
        return Devices("cpu", (",".join(map(str, sorted(os.sched_getaffinity(0)))),))
    import torch

    return Devices("gpu", (f"GPU-{torch.cuda.get_device_properties(device).uuid}",))


def _engine_parser() -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise ConfigError(" ".join(message.split()))  # pydantic's messages have several lines

    return EngineArgs.add_cli_args(Parser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS))


def known_flags() -> list[str]:
    """The long flags of vLLM's engine."""
    actions = _engine_parser()._actions
    return sorted({flag for action in actions for flag in action.option_strings if flag.startswith("--")})


def _given_to_vllm(config: ExperimentConfig) -> dict[str, Any]:
    return parse_engine_flags(config.engine_args, may_cache_prefixes=config.prompts_file is not None)


def parse_engine_flags(words: Sequence[str], *, may_cache_prefixes: bool = False) -> dict[str, Any]:
    """vLLM's own flags -> the keyword arguments that the user gave. Raises ConfigError for a wrong flag or value."""
    from vllm.engine.arg_utils import EngineArgs

    parser = _engine_parser()
    # argparse keeps what a namespace already holds, so what is still `unset` afterwards was not given.
    unset = object()
    namespace = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), unset))
    try:
        given = vars(parser.parse_args(list(words), namespace))
    except ConfigError as error:
        known = [flag_of(name) for name in vars(namespace)]
        raise ConfigError(_explain(str(error), known)) from None
    fields = _names_of(EngineArgs)
    settings = {name: value for name, value in given.items() if value is not unset and name in fields}
    for name, value in settings.items():
        if not (may_cache_prefixes and flag_of(name) == PREFIX_FLAG):
            _refuse_ours(name, value)
    return settings


def _names_of(engine_args: Any) -> set[str]:
    """The settings that this version of vLLM accepts, by its class EngineArgs."""
    return {field.name for field in dataclasses.fields(engine_args)}


def _refuse_ours(name: str, value: Any) -> None:
    """vLLM also has short flags, which only its parser knows: -n for --nnodes."""
    flag = flag_of(name)
    if name in {field.name for field in dataclasses.fields(ExperimentConfig)}:
        raise ConfigError(f"{flag} is also a flag of this program; write it in full")
    if flag in OWNED_BY_US and value != MEASURING_SETTINGS.get(name, ...):
        raise owned_by_us(flag)


def _explain(message: str, vllm_flags: Sequence[str]) -> str:
    unknown = re.match(r"unrecognized arguments: (--?[\w.-]+)", message)
    return unknown_flag_message(unknown[1], vllm_flags) if unknown else message


def engine_settings(config: ExperimentConfig) -> dict[str, Any]:
    """Keyword arguments of vLLM's LLM."""
    ours = {**own_settings(config), **node_settings(config)}
    # Under torchrun vLLM itself assigns ranks to replicas; otherwise each replica is its own engine.
    if config.distributed_executor_backend == "external_launcher":
        ours["data_parallel_size"] = config.data_parallel_size
    return _with_tokenizer_where_needed({**ours, **_text_alone(), **_given_to_vllm(config)})


def own_settings(config: ExperimentConfig) -> dict[str, Any]:
    """What every engine gets. Open sizes are fitted to the grid, without slots that no point uses."""
    return {
        "model": str(Path(config.model).expanduser()) if config.model.startswith("~") else config.model,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "distributed_executor_backend": config.distributed_executor_backend,
        "max_model_len": config.max_model_len or config.longest_request,
        "max_num_seqs": config.max_num_seqs or max(config.batch_sizes),
        "max_num_batched_tokens": config.largest_budget,
        "dtype": config.dtype,
        "gpu_memory_utilization": memory_share(config),
        "enforce_eager": config.enforce_eager,
        "trust_remote_code": config.trust_remote_code,
        "seed": config.seed,
        **MEASURING_SETTINGS,
        **({"scheduler_cls": SCHEDULER} if config.changes_limits else {}),
    }


def _text_alone() -> dict[str, Any]:
    from vllm.engine.arg_utils import EngineArgs

    return {name: value for name, value in _TEXT_ALONE.items() if name in _names_of(EngineArgs)}


def _with_tokenizer_where_needed(settings: dict[str, Any]) -> dict[str, Any]:
    """The same, with the tokenizer if vLLM cannot start the model without it, according to its own ModelConfig."""
    from vllm.engine.arg_utils import EngineArgs

    if not settings["skip_tokenizer_init"]:
        return settings
    model = EngineArgs(**settings).create_model_config()
    return {**settings, "skip_tokenizer_init": False} if _needs_tokenizer(model) else settings


def _needs_tokenizer(model: Any) -> bool:
    """Whether vLLM will create a multimodal processor, according to a ModelConfig without the tokenizer."""
    if not model.is_multimodal_model:
        return False
    try:
        # If an older vLLM does not say, the tokenizer does no harm.
        return bool(getattr(model, "supports_multimodal_inputs", True))
    except ValueError:  # InternVL needs the vocabulary to answer
        return True


def node_settings(config: ExperimentConfig) -> dict[str, Any]:
    """What vLLM's `mp` executor needs to span several nodes; empty for one node."""
    if config.nnodes == 1:
        return {}
    return {
        "distributed_executor_backend": "mp",
        "nnodes": config.nnodes,
        "node_rank": config.node_rank,
        "master_addr": config.master_addr,
        # The nodes met on the port itself and keep it open.
        "master_port": config.master_port + 1,
    }


def serve_node_0(config: ExperimentConfig) -> None:
    """Be the workers of this node for the engine on node 0, until it shuts down."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    settings = EngineArgs(**engine_settings(config))
    vllm_config = settings.create_engine_config(usage_context=UsageContext.LLM_CLASS, headless=True)
    MultiprocExecutor(vllm_config, monitor_workers=False).start_worker_monitor(inline=True)


def memory_share(config: ExperimentConfig) -> float:
    """vLLM's share of a GPU. On the CPU every worker takes its share of the whole main memory, so they divide one."""
    on_cpu = find_devices().kind == "cpu"
    return config.gpu_memory_utilization / (config.devices_per_node if on_cpu else 1)


class Engine:
    """A loaded vLLM engine that runs one batch at a time."""

    def __init__(self, config: ExperimentConfig, started_s: float) -> None:
        import vllm

        imported_s = time.monotonic()
        self._config = config
        settings = engine_settings(config)
        self._limits = Limits() if config.changes_limits else None
        self._llm = vllm.LLM(**settings)
        ready_s = time.monotonic()
        self._sampling_params = vllm.SamplingParams
        model_config = self._llm.llm_engine.model_config
        self._vocab_size: int = model_config.get_vocab_size()
        self._special_ids = special_ids(model_config)
        self._counted = _COUNTERS | (_ESTIMATES if has_whole_estimate(self._llm.llm_engine.vllm_config) else {})
        self._steps = StepWatch(self._llm.llm_engine.logger_manager)
        load_s = LoadTimes(
            import_s=imported_s - started_s,
            engine_s=ready_s - imported_s,
            total_s=ready_s - started_s,
        )
        engine = effective_settings(vllm.__version__, self._llm.llm_engine.vllm_config)
        engine.multiprocess_engine = os.environ.get(SEPARATE, "1") != "0"
        engine.load_s = load_s
        workers = self._llm.collective_rpc("batch_inference_report")
        self.info = with_workers(engine, msgspec.convert(workers, list[WorkerInfo]))
        # A rank of torchrun is the script itself, whose exit code counts; what GPUs hold is torn down in order.
        own = config.distributed_executor_backend != "external_launcher" and find_devices().kind == "cpu"
        self.ends_at_once = own and not engine.multiprocess_engine
        if self.ends_at_once:
            self._llm.collective_rpc("batch_inference_end_at_once")

    def make_prompts(self, batch_size: int, seq_len: int, seed_parts: Sequence[object]) -> list[dict[str, list[int]]]:
        prompts = make_prompts(
            num_prompts=batch_size,
            seq_len=seq_len,
            vocab_size=self._vocab_size,
            avoid=self._special_ids,
            seed_parts=tuple(seed_parts),
        )
        return [{"prompt_token_ids": prompt} for prompt in prompts]

    def make_queue(self, asked: Sequence[Asked], seed_parts: Sequence[object]) -> list[dict[str, list[int]]]:
        """The prompts of a queue: ids unchanged, and as many ids as asked for a bare length. Raises ConfigError for
        ids that the model does not have."""
        largest = max((max(one.prompt, default=0) for one in asked if isinstance(one.prompt, list)), default=0)
        if largest >= self._vocab_size:
            # On a GPU they would end the engine. They are not shown, because they come from the user's own text.
            raise ConfigError(
                f"--prompts-file {self._config.prompts_file}: it has token ids outside the "
                f"{self._vocab_size} of the model; use the model's own tokenizer"
            )
        lengths = [one.prompt for one in asked if isinstance(one.prompt, int)]
        (ids,) = (prompt["prompt_token_ids"] for prompt in self.make_prompts(1, sum(lengths), seed_parts))
        ends = itertools.accumulate(lengths)
        made = (ids[end - length : end] for length, end in zip(lengths, ends, strict=True))
        return [{"prompt_token_ids": next(made) if isinstance(one.prompt, int) else one.prompt} for one in asked]

    def limit(self, requests: int | None, tokens_per_step: int | None) -> None:
        """Limit what runs at once from now on; None: as the engine was loaded."""
        if self._limits:
            self._limits.set(requests, tokens_per_step)

    def run(self, prompts: list[dict[str, list[int]]], max_tokens: int, wait: Callable[[], None]) -> Outcome:
        """Submit one batch when `wait` returns, wait until it ends, and count what came back."""
        self._steps.forget()
        return self._run(prompts, self._params(max_tokens), wait)[0]

    def run_queue(
        self,
        prompts: list[dict[str, list[int]]],
        asked: Sequence[Asked],
        wait: Callable[[], None],
        *,
        ends_itself: bool,
    ) -> Outcome:
        """The same for a queue of requests with their own lengths; `ends_itself`: the model may end an output."""
        params = [self._params(one.max_tokens, ends_itself=ends_itself) for one in asked]
        self._steps.forget(keeps_steps=True)
        outcome, outputs, began_s = self._run(prompts, params, wait)
        lengths = [
            (len(prompt["prompt_token_ids"]), one.max_tokens) for prompt, one in zip(prompts, asked, strict=True)
        ]
        add_queue(outcome, outputs, lengths, began_s, ends_itself=ends_itself)
        outcome.timeline = self._steps.timeline(outcome.start_s)
        return outcome

    def answer(self, prompts: list[dict[str, list[int]]], max_tokens: int) -> list[list[int]]:
        """The tokens of each answer, always the likeliest one, and none from the cache of an earlier answer."""
        self._forget_prefixes()
        params = self._sampling_params(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _params(self, max_tokens: int, *, ends_itself: bool = False) -> Any:
        return self._sampling_params(
            temperature=self._config.temperature,
            top_p=self._config.top_p,
            max_tokens=max_tokens,
            ignore_eos=not ends_itself,
            detokenize=False,
        )

    def _run(
        self, prompts: list[dict[str, list[int]]], params: Any, wait: Callable[[], None]
    ) -> tuple[Outcome, list[Any], float]:
        """What was counted, vLLM's outputs, and the start by wall clock."""
        self._forget_prefixes()
        before = self._counters()
        wait()
        start_s, began_s = time.monotonic(), time.time()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        end_s = time.monotonic()
        outcome = count_outputs(outputs, start_s, end_s)
        counted = {name: value - before[name] for name, value in self._counters().items()}
        outcome.preemptions = counted["preemptions"]
        outcome.flops_per_device = counted.get("flops_per_device")
        outcome.memory_bytes_per_device = counted.get("memory_bytes_per_device")
        outcome.peak_running, outcome.peak_kv_use = self._steps.running, self._steps.kv_use
        return outcome, outputs, began_s

    def _forget_prefixes(self) -> None:
        """Drop those of earlier runs with perhaps the same prompts: a run should only find what its requests share."""
        if self._config.caches_prefixes and not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache, which holds the prompts of the run before")

    def read_devices(self) -> Reading:
        """Memory and energy of every worker's devices, read where they are."""
        return joined(msgspec.convert(self._llm.collective_rpc("batch_inference_read"), list[Reading]))

    def _counters(self) -> dict[str, int]:
        """vLLM's own counters since the engine started: preempted requests, and its estimates of the work of one
        device if they cover all of it."""
        counted = dict.fromkeys(self._counted.values(), 0)
        for metric in self._llm.get_metrics():
            if metric.name in self._counted:
                counted[self._counted[metric.name]] += int(metric.value)
        return counted

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


def has_whole_estimate(config: Any) -> bool:
    """Whether vLLM estimates all of the work of a device, according to its VllmConfig.

    It silently leaves out the parts of a model whose quantization it has no size for, and divides the
    feed-forward layers over replicas even if each holds them whole (vllm/v1/metrics/perf.py of 0.26 and 0.32).
    """
    from vllm.v1.metrics.perf import ModelMetrics

    parts = {part.component_type() for part in ModelMetrics(config).metrics}
    return config.parallel_config.data_parallel_size == 1 and "ffn" in parts and bool(parts & {"attn", "mla_attn"})
