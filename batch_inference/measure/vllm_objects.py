"""Reads vLLM's own objects: its settings, its workers, its outputs, its steps.

Imports nothing of vLLM: engine.py hands the objects over.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal, NamedTuple

from msgspec.structs import replace

from batch_inference.core.results import EngineInfo, Requests, Timeline, WorkerInfo
from batch_inference.measure.messages import Outcome
from batch_inference.measure.tokenizer_files import added_ids
from batch_inference.plan.devices import GIB

# image_token_id, boi_token_index, eos_token_ids, video_start_id ...
_ID_NAME = re.compile(
    r"tokens?_(ids?|index|indices|idx)$|^(image|img|video|audio|vision|speech|media|frame)_(\w+_)?ids?$"
)

# For a queue's timeline.
_INTERVAL_S, _FEWEST_INTERVALS = 0.5, 100


def weights_bytes_of(model: Any, packed_item_size: int) -> int:
    """Bytes of this rank's parameters, including those that the CPU backend packed into its own buffers."""
    visible = sum(item.numel() * item.element_size() for item in model.parameters())
    # Packing leaves an empty weight behind; the layer still knows its sizes.
    emptied = [
        module
        for module in model.modules()
        if hasattr(module, "input_size") and getattr(module, "weight", None) is not None and module.weight.numel() == 0
    ]
    return int(visible + packed_item_size * sum(_elements(module) for module in emptied))


def _elements(layer: Any) -> int:
    """Elements of a linear layer's weight on this rank; a layer that every rank holds whole has no partial sizes."""
    inputs = getattr(layer, "input_size_per_partition", layer.input_size)
    return int(inputs * getattr(layer, "output_size_per_partition", layer.output_size))


def compile_cache_of(counted: Any, by_torch: Mapping[str, int]) -> Literal["cold", "warm"] | None:
    """Whether a process had to compile ("cold") or found everything in the compile cache ("warm"), by vLLM's
    CompilationCounter or, where vLLM leaves it to torch (on a CPU), by what torch's inductor counts; None if there
    was nothing to compile."""
    loaded = counted.num_aot_artifacts_loaded or counted.num_compiled_artifacts_loaded
    if counted.num_aot_compiles or counted.num_cache_entries_updated:
        return "cold"
    # A graph equal to an earlier one is counted here too, though nothing is compiled for it.
    if counted.num_inductor_compiles and not loaded:
        return "cold"
    if loaded:
        return "warm"
    if by_torch.get("fxgraph_cache_miss"):
        return "cold"
    return "warm" if by_torch.get("fxgraph_cache_hit") else None


def kv_bytes_of(caches: Any) -> int:
    """Bytes of a KV pool; layers may share storage."""
    storages = (tensor.untyped_storage() for tensor in _tensors(caches))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(caches: Any) -> Iterable[Any]:
    """The tensors in a nest of lists: some layers keep several per cache."""
    for cache in caches:
        if isinstance(cache, (list, tuple)):
            yield from _tensors(cache)
        else:
            yield cache


class Step(NamedTuple):
    at_s: float  # time.monotonic when it became known here
    prompt_tokens: int  # of the requests whose first token came in it
    output_tokens: int
    running: int  # including those that ended in it
    waiting: int


class StepWatch:
    """What vLLM's scheduler says about every step: most requests that ran at once, largest share of the KV cache in
    use, and for a queue all steps."""

    def __init__(self, logger_manager: Any) -> None:
        """`logger_manager`: of an LLMEngine; every step passes its `record`."""
        self._record = logger_manager.record
        logger_manager.record = self.record
        self.forget()

    def forget(self, *, keeps_steps: bool = False) -> None:
        """Call before a run; only a queue needs its steps, and nothing is added to those of a batch."""
        self._keeps_steps = keeps_steps
        self._running, self._kv_use = 0, 0.0
        self._steps: list[Step] = []

    @property
    def running(self) -> int | None:
        """None if vLLM has not said."""
        return self._running or None

    @property
    def kv_use(self) -> float | None:
        """None also for requests of one token, which have left the cache by the time vLLM looks."""
        return self._kv_use or None

    def timeline(self, start_s: float) -> Timeline:
        """The steps since `forget`, from `start_s` (time.monotonic)."""
        return timeline_of(self._steps, start_s)

    def record(self, scheduler_stats: Any, iteration_stats: Any, **keywords: Any) -> None:
        if scheduler_stats is not None:
            # vLLM counts after the requests that ended in this step have left.
            ended = len(iteration_stats.finished_requests) if iteration_stats else 0
            running = scheduler_stats.num_running_reqs + ended
            self._running = max(self._running, running)
            if self._keeps_steps and iteration_stats:
                self._steps.append(
                    Step(
                        time.monotonic(),
                        iteration_stats.num_prompt_tokens,
                        iteration_stats.num_generation_tokens,
                        running,
                        scheduler_stats.num_waiting_reqs,
                    )
                )
            self._kv_use = max(self._kv_use, scheduler_stats.kv_cache_usage)
        self._record(scheduler_stats=scheduler_stats, iteration_stats=iteration_stats, **keywords)


def with_workers(engine: EngineInfo, workers: list[WorkerInfo]) -> EngineInfo:
    """What is known about an engine, completed with what all its workers report."""
    activations = [worker.activation_bytes for worker in workers if worker.activation_bytes is not None]
    compile_s = [worker.compile_s for worker in workers if worker.compile_s is not None]
    caches = [worker.compile_cache for worker in workers if worker.compile_cache]
    return replace(
        engine,
        runner=workers[0].runner,
        load_s=replace(engine.load_s, compile_s=max(compile_s, default=None)),
        compile_cache="cold" if "cold" in caches else "warm" if caches else None,
        weights_gib=max(worker.weights_bytes for worker in workers) / GIB,
        kv_pool_gib=max(worker.kv_bytes for worker in workers) / GIB,
        activations_gib=max(activations) / GIB if len(activations) == len(workers) else None,
        workers=workers,
    )


def effective_settings(vllm_version: str, config: Any) -> EngineInfo:
    """The settings of a VllmConfig that decide what a measurement means."""
    model, parallel, scheduler = config.model_config, config.parallel_config, config.scheduler_config
    cache, compilation = config.cache_config, config.compilation_config
    executor = parallel.distributed_executor_backend
    speculative = getattr(config, "speculative_config", None)
    return EngineInfo(
        vllm_version=vllm_version,
        executor=executor if isinstance(executor, str) else getattr(executor, "__name__", None),
        tensor_parallel_size=parallel.tensor_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        # Under torchrun vLLM runs one stage after another, and each batch through all of them before the next.
        pipeline_stages_overlap=None if parallel.pipeline_parallel_size == 1 else executor != "external_launcher",
        enable_expert_parallel=getattr(parallel, "enable_expert_parallel", None),
        decode_context_parallel_size=getattr(parallel, "decode_context_parallel_size", None),
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=model.quantization,
        max_model_len=model.max_model_len,
        enforce_eager=model.enforce_eager,
        # A model with only text has nothing to leave out.
        language_model_only=getattr(model.multimodal_config, "language_model_only", None),
        skip_tokenizer_init=model.skip_tokenizer_init,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        chunked_prefill=scheduler.enable_chunked_prefill,
        async_scheduling=scheduler.async_scheduling,
        speculative_method=getattr(speculative, "method", None),
        num_speculative_tokens=getattr(speculative, "num_speculative_tokens", None),
        kv_connector=getattr(getattr(config, "kv_transfer_config", None), "kv_connector", None),
        gpu_memory_utilization=cache.gpu_memory_utilization,
        kv_cache_dtype=cache.cache_dtype,
        block_size=cache.block_size,
        num_gpu_blocks=cache.num_gpu_blocks,
        enable_prefix_caching=cache.enable_prefix_caching,
        load_format=str(getattr(config.load_config.load_format, "value", config.load_config.load_format)),
        compilation_mode=getattr(compilation.mode, "name", None),
        cudagraph_mode=getattr(compilation.cudagraph_mode, "name", None),
        cudagraph_capture_sizes=list(compilation.cudagraph_capture_sizes or []),
        kv_cache_tokens=cache.kv_cache_size_tokens,
    )


def timeline_of(steps: Sequence[Step], start_s: float) -> Timeline:
    """In intervals of half a second, or of a hundredth of a short run."""
    line = Timeline([], [], [], [], [], [])
    if not steps:
        return line
    wide_s = min(_INTERVAL_S, max((steps[-1].at_s - start_s) / _FEWEST_INTERVALS, 1e-6))
    for _, group in itertools.groupby(steps, key=lambda step: int((step.at_s - start_s) / wide_s)):
        of_interval = list(group)
        line.end_s.append(of_interval[-1].at_s - start_s)
        line.steps.append(len(of_interval))
        line.prompt_tokens.append(sum(step.prompt_tokens for step in of_interval))
        line.output_tokens.append(sum(step.output_tokens for step in of_interval))
        line.running.append(round(fmean(step.running for step in of_interval), 2))
        line.waiting.append(of_interval[-1].waiting)
    return line


def add_queue(
    outcome: Outcome, outputs: Sequence[Any], asked: Sequence[tuple[int, int]], began_s: float, *, ends_itself: bool
) -> None:
    """Adds the lengths and times of each request in a queue, and whether they are as `asked` (prompt and output tokens
    of each). `began_s`: by wall clock, like vLLM's arrivals. `ends_itself`: the model may end an output earlier.

    A process that submits thousands of requests hears of first tokens late, each with a different delay. So the times
    are the engine's own, by one clock, shifted so that no token was heard before it was made.
    """
    requests = outcome.requests
    requests.arrival_s = [max(0.0, output.metrics.arrival_time - began_s) for output in outputs]
    stats = [output.metrics for output in outputs]
    heard_s = [since + ttft_s for since, ttft_s in zip(requests.arrival_s, requests.ttft_s, strict=True)]
    ahead_s = min((heard - one.first_token_ts for heard, one in zip(heard_s, stats, strict=True)), default=0.0)
    waits_s = [ahead_s - arrival_s for arrival_s in requests.arrival_s]
    requests.queue_s = [max(0.0, one.scheduled_ts + wait_s) for one, wait_s in zip(stats, waits_s, strict=True)]
    requests.ttft_s = [one.first_token_ts + wait_s for one, wait_s in zip(stats, waits_s, strict=True)]
    requests.latency_s = [one.last_token_ts + wait_s for one, wait_s in zip(stats, waits_s, strict=True)]
    requests.prompt_tokens = [len(output.prompt_token_ids) for output in outputs]
    came = zip(requests.prompt_tokens, requests.output_tokens, strict=True)
    outcome.miscounted = sum(
        prompt != wanted[0] or not (1 if ends_itself else wanted[1]) <= output <= wanted[1]
        for (prompt, output), wanted in zip(came, asked, strict=True)
    )


def count_outputs(outputs: Sequence[Any], start_s: float, end_s: float) -> Outcome:
    """Tokens and times of vLLM's RequestOutputs, in submission order.

    `arrival_time` is wall clock and the `*_ts` are monotonic, so only durations within one clock are used:
    first_token_latency runs from arrival to first token, on the wall clock of the submitting process.
    """
    requests = Requests([], [], [], [])
    for output in outputs:
        stats = output.metrics
        ttft_s = stats.first_token_latency
        requests.ttft_s.append(ttft_s)
        requests.latency_s.append(ttft_s + stats.last_token_ts - stats.first_token_ts)
        # Never below 0: the two clocks differ by microseconds when nothing waits.
        requests.queue_s.append(max(0.0, ttft_s - (stats.first_token_ts - stats.scheduled_ts)))
        requests.output_tokens.append(sum(len(completion.token_ids) for completion in output.outputs))
    return Outcome(
        start_s=start_s,
        end_s=end_s,
        prompt_tokens=sum(len(output.prompt_token_ids) for output in outputs),
        output_tokens=sum(requests.output_tokens),
        requests=requests,
        prefix_cache_hit_tokens=sum(output.num_cached_tokens or 0 for output in outputs),
    )


def special_ids(model_config: Any) -> set[int]:
    """The ids that are not text, by a ModelConfig: those named in the config of the model and its parts
    (bos_token_id, image_token_index ...); for a multimodal model also those that its tokenizer adds."""
    configs = (model_config.hf_config, model_config.hf_text_config)
    named = {number for config in configs for number in _named_ids(config.to_dict())}
    if model_config.multimodal_config is None:
        return named
    return named | added_ids(model_config.tokenizer, model_config.tokenizer_revision)


def _named_ids(values: dict[Any, Any]) -> Iterator[int]:
    """From a config as plain values; some parts have numbers as names (id2label)."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _named_ids(value)
        elif _ID_NAME.search(str(name)):
            yield from (number for number in (value if isinstance(value, list) else [value]) if _is_id(number))


def _is_id(value: object) -> bool:
    """-1 and None mean there is none."""
    return type(value) is int and value >= 0
