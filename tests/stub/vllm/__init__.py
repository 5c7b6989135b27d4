"""A stand-in for vLLM with the same names and strict keywords: `PYTHONPATH=tests/stub` puts it in vLLM's place.

Loading takes STUB_LOAD_S seconds, a run STUB_RUN_S, and a step of a queue STUB_STEP_S. STUB_FLAGS are more flags that
it knows, STUB_EXPECTS are arguments that it must get, as JSON, STUB_SAYS is said in the log and in the reason of a
start that fails, and STUB_WRITES is written past Python, as another process does. STUB_MULTIMODAL is a model with
images too, and STUB_LACKS a name that this version does not have yet. STUB_FAIL makes it misbehave:
  load          the engine does not start; the cause stands only in the log, as with vLLM
  run:N         batches of N requests fail with an out-of-memory error
  die:N         batches of N requests kill the process
  compile:N     every third batch of N requests compiles a kernel, as the log says
  tokens        one output token is missing
  prefix        prompt tokens come from the prefix cache
  prefix-stays  and it cannot be emptied
  dies          it is dead when it is given a request
  hang          the first run never ends
"""

import atexit
import importlib
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from types import SimpleNamespace

from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.stats import RequestStateStats

# What decides which devices, ports and part of the model an engine gets.
DEVICE_VARIABLES = ("CUDA_VISIBLE", "VLLM_CPU", "OMP_PLACES", "VLLM_PORT", "VLLM_DP", "RAY")

__version__ = "0.32.0"
FAIL = os.environ.get("STUB_FAIL", "")
EXPECTED = json.loads(os.environ.get("STUB_EXPECTS", "{}"))
SAYS = os.environ.get("STUB_SAYS", "")
WRITES = os.environ.get("STUB_WRITES", "").encode()
RUN_S = float(os.environ.get("STUB_RUN_S", "0.002"))
STEP_S = float(os.environ.get("STUB_STEP_S", "0.0005"))  # of a queue


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    top_p: float = 1.0
    ignore_eos: bool = False
    detokenize: bool = True


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[SimpleNamespace]
    metrics: RequestStateStats
    num_cached_tokens: int


class Scheduler:
    def __init__(self, vllm_config):
        self.max_num_active_reqs = vllm_config.scheduler_config.max_num_seqs
        self.max_num_scheduled_tokens = vllm_config.scheduler_config.max_num_batched_tokens

    def schedule(self):
        pass


class LLM:
    def __init__(self, **keywords):
        args = EngineArgs(**keywords)
        if args.data_parallel_size > 1 and args.distributed_executor_backend != "external_launcher":
            raise ValueError("LLM(data_parallel_size>1) is not supported for single-process usage")
        # What decides which devices and which part of the model this engine gets.
        seen = (
            shlex.quote(f"{name}={value}") for name, value in os.environ.items() if name.startswith(DEVICE_VARIABLES)
        )
        print("stub vLLM is loading", *seen, flush=True)
        # As vLLM does; later versions leave out the token alone.
        print("non-default args:", {name: value for name, value in vars(args).items() if value}, flush=True)
        print(SAYS, file=sys.stderr)
        if any(vars(args)[name] != value for name, value in EXPECTED.items()):
            raise RuntimeError("other arguments came than STUB_EXPECTS has")
        _fork_engine_core()
        time.sleep(float(os.environ.get("STUB_LOAD_S", "0")))
        if FAIL == "load":
            print(f"(EngineCore pid=1) ERROR 01-01 [core.py:1] ValueError: the planted reason{SAYS}", file=sys.stderr)
            os.write(2, WRITES)
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        os.write(2, WRITES)
        self.args = args
        model_config = args.create_model_config()
        # As vLLM makes the processor of images.
        if model_config.supports_multimodal_inputs and args.skip_tokenizer_init:
            raise ValueError("StubProcessor requires a tokenizer and cannot be initialized")
        # vLLM's engine is a process of its own, and lives on when the one that started it is killed.
        together = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") == "0"
        in_process = together or args.distributed_executor_backend == "external_launcher"
        self.core = None if in_process else subprocess.Popen(["VLLM::EngineCore", "3600"], executable="/bin/sleep")
        # Its processes talk through shared memory, whose owner removes it at an orderly end.
        mark = os.environ.get("FAULT_TEST")  # of the test whose sweep this is
        self.queue = SharedMemory(f"psm_{mark}_{os.getpid()}" if mark else None, create=True, size=16)
        # A process that ends in order takes its engine along.
        atexit.register(self._shut_down)
        self.calls = 0
        self.queued = []
        self.cached = set()
        config = _vllm_config(args)
        config.scheduler_config.get_scheduler_cls = lambda: Scheduler
        kind = Scheduler
        if args.scheduler_cls:
            module, _, name = args.scheduler_cls.rpartition(".")
            kind = getattr(importlib.import_module(module), name)
        self.scheduler = kind(vllm_config=config)
        self.llm_engine = SimpleNamespace(
            model_config=model_config,
            vllm_config=_vllm_config(args),
            engine_core=SimpleNamespace(shutdown=self._shut_down),
            logger_manager=SimpleNamespace(record=lambda **_: None),
        )

    def _shut_down(self):
        atexit.unregister(self._shut_down)
        self.queue.close()
        self.queue.unlink()
        if self.core:
            self.core.kill()
            self.core.wait()

    def collective_rpc(self, method):
        world_size = self.args.tensor_parallel_size * self.args.pipeline_parallel_size
        if self.args.distributed_executor_backend == "external_launcher":
            world_size = 1  # each rank is an engine with one worker
        if method == "batch_inference_read":
            return [{"scope": "replica", "used_gib": [1.5], "energy_j": [None]}] * world_size
        if method == "batch_inference_end_at_once":
            return [None] * world_size
        assert method == "batch_inference_report"
        report = {
            "host": "stub",
            "device": {"index": 0, "name": "a stub"},
            "weights_bytes": 2**30,
            "kv_bytes": 2**29,
            "activation_bytes": 2**28,
            "compile_s": 0.25,
            "compile_cache": "warm",
            "runner": "stub.Runner",
        }
        return [report] * world_size

    def get_metrics(self):
        # Between two calls lies a run: 1 TFLOP, 3 GB read and 1 GB written.
        self.calls += 1
        work = {"flops": 1e12, "read_bytes": 3e9, "write_bytes": 1e9} if self.args.enable_mfu_metrics else {}
        return [
            SimpleNamespace(name="vllm:num_preemptions", value=0),
            *(SimpleNamespace(name=f"vllm:estimated_{n}_per_gpu", value=v * self.calls) for n, v in work.items()),
        ]

    def reset_prefix_cache(self):
        self.cached.clear()
        return FAIL != "prefix-stays"

    def _cached_tokens(self, prompt):
        if FAIL == "prefix":
            return 16
        was_cached = self.args.enable_prefix_caching and tuple(prompt) in self.cached
        self.cached.add(tuple(prompt))
        return len(prompt) if was_cached else 0

    def enqueue(self, prompts, sampling_params, use_tqdm=True):
        """What is queued so has an answer in text, and is refused alone where it is too long."""
        assert sampling_params.detokenize
        assert not self.args.skip_tokenizer_init
        most = self.llm_engine.vllm_config.model_config.max_model_len
        for prompt in prompts:
            ids = prompt["prompt_token_ids"] if "prompt_token_ids" in prompt else list(map(ord, prompt["prompt"]))
            if FAIL == "dies":
                raise EngineDeadError
            if len(ids) >= most:
                raise VLLMValidationError(f"the prompt has {len(ids)} tokens, and max_model_len is {most}")
            self.queued.append((ids, sampling_params))

    def enqueue_chat(self, messages, sampling_params, use_tqdm=True):
        prompts = [{"prompt": "".join(message["content"] for message in chat)} for chat in messages]
        self.enqueue(prompts, sampling_params, use_tqdm)

    def wait_for_completion(self):
        queued, self.queued = self.queued, []
        print("prompts", *(ids for ids, _ in queued), flush=True)
        _misbehave(len(queued))
        return self._run_queue([ids for ids, _ in queued], [params for _, params in queued])

    def generate(self, prompts, sampling_params, use_tqdm=True):
        is_queue = isinstance(sampling_params, list)
        params = sampling_params if is_queue else [sampling_params] * len(prompts)
        # What is measured shows no bar, and has no texts.
        assert not use_tqdm
        assert not any(of.detokenize for of in params)
        # A letter is a token.
        prompts = [
            prompt if "prompt_token_ids" in prompt else {"prompt_token_ids": list(map(ord, prompt["prompt"]))}
            for prompt in prompts
        ]
        sizes = (len(prompt["prompt_token_ids"]) + of.max_tokens for prompt, of in zip(prompts, params, strict=True))
        longest = max(sizes, default=0)
        assert longest <= self.llm_engine.vllm_config.model_config.max_model_len
        print("prompts", *(prompt["prompt_token_ids"] for prompt in prompts), flush=True)
        _misbehave(len(prompts))
        _compile_late(len(prompts))
        if is_queue:
            return self._run_queue([prompt["prompt_token_ids"] for prompt in prompts], sampling_params)
        time.sleep(RUN_S)
        for running, ended in ((len(prompts), []), (0, prompts)):
            self._record(running, ended)
        return [_output(prompt["prompt_token_ids"], sampling_params.max_tokens) for prompt in prompts]

    def _record(self, running, ended, waiting=0, prompt_tokens=0, output_tokens=0):
        self.llm_engine.logger_manager.record(
            scheduler_stats=SimpleNamespace(
                num_running_reqs=running, num_waiting_reqs=waiting, kv_cache_usage=running / 100
            ),
            iteration_stats=SimpleNamespace(
                finished_requests=ended, num_prompt_tokens=prompt_tokens, num_generation_tokens=output_tokens
            ),
            mm_cache_stats=None,
        )

    def _run_queue(self, prompts, params):
        """One token of each running request in a step; whole prompts, as many as the scheduler takes."""
        arrived = time.time()
        waiting, running, done = list(range(len(prompts))), {}, {}
        stamps = {}
        while waiting or running:
            self.scheduler.schedule()
            budget, new = self.scheduler.max_num_scheduled_tokens - len(running), []
            while waiting and len(running) < self.scheduler.max_num_active_reqs:
                if new and len(prompts[waiting[0]]) > budget:
                    break
                new.append(waiting.pop(0))
                budget -= len(prompts[new[-1]])
                running[new[-1]] = 0
                stamps[new[-1]] = [time.monotonic()]
            time.sleep(STEP_S)
            now = time.monotonic()
            for index in list(running):
                running[index] += 1
                if running[index] == 1:
                    stamps[index].append(now)
                    stamps[index].append(time.time() - arrived)
                # A model with an end of its own ends some of its answers early.
                own_end = not params[index].ignore_eos and index % 3 == 0 and running[index] >= 2
                if running[index] == params[index].max_tokens or own_end:
                    done[index] = (running.pop(index), now)
            ended = [index for index in done if done[index][1] == now]
            first = [index for index in stamps if len(stamps[index]) == 3 and stamps[index][1] == now]
            self._record(
                len(running),
                ended,
                len(waiting),
                sum(len(prompts[index]) for index in first),
                len(running) + len(ended),
            )
        return [
            RequestOutput(
                prompt,
                [_completion(prompt, done[index][0] - (FAIL == "tokens" and index == 0), params[index].max_tokens)],
                RequestStateStats(
                    arrival_time=arrived,
                    queued_ts=stamps[index][0],
                    scheduled_ts=stamps[index][0],
                    first_token_ts=stamps[index][1],
                    last_token_ts=done[index][1],
                    first_token_latency=stamps[index][2],
                ),
                self._cached_tokens(prompt),
            )
            for index, prompt in enumerate(prompts)
        ]


def _fork_engine_core():
    """vLLM forks its EngineCore on GPUs: whatever the process waits for in another thread must survive that."""
    core = multiprocessing.get_context("fork").Process(target=int)
    core.start()
    core.join(timeout=5)
    if core.is_alive():
        core.kill()
        raise RuntimeError("the forked EngineCore hangs")


def _misbehave(batch_size):
    if f"run:{batch_size}" == FAIL:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if f"die:{batch_size}" == FAIL:
        os.abort()
    if FAIL == "hang":
        time.sleep(3600)


def _compile_late(batch_size):
    """Every third batch of that size, as vLLM says it."""
    if f"compile:{batch_size}" == FAIL:
        batches.append(batch_size)
        if len(batches) % 3 == 0:
            print("(Worker pid=1) WARNING Triton kernel JIT compilation during inference: _k. This causes", flush=True)


batches = []


def _output(prompt, max_tokens):
    tokens = max_tokens - (FAIL == "tokens")
    # Wall clock and monotonic clock are far apart on purpose: a difference between them would show.
    now = time.monotonic()
    stats = RequestStateStats(
        arrival_time=time.time(),
        queued_ts=now,
        scheduled_ts=now + 0.25 * RUN_S,
        first_token_ts=now + 0.5 * RUN_S,
        last_token_ts=now + RUN_S,
        first_token_latency=0.5 * RUN_S,
    )
    return RequestOutput(prompt, [_completion(prompt, tokens, tokens)], stats, 16 if FAIL == "prefix" else 0)


def _completion(prompt, tokens, most):
    """Its text tells which prompt it is of."""
    reason = "length" if tokens == most else "stop"
    return SimpleNamespace(token_ids=[7] * tokens, text=f"{tokens} for {prompt}", finish_reason=reason)


def _vllm_config(args):
    world_size = args.tensor_parallel_size * args.pipeline_parallel_size
    return SimpleNamespace(
        model_config=args.create_model_config(),
        parallel_config=SimpleNamespace(
            distributed_executor_backend=args.distributed_executor_backend or ("mp" if world_size > 1 else "uni"),
            tensor_parallel_size=args.tensor_parallel_size,
            pipeline_parallel_size=args.pipeline_parallel_size,
            data_parallel_size=args.data_parallel_size,
        ),
        scheduler_config=SimpleNamespace(
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens or 2048,
            enable_chunked_prefill=True,
            async_scheduling=False,
        ),
        cache_config=SimpleNamespace(
            gpu_memory_utilization=args.gpu_memory_utilization,
            cache_dtype="auto",
            block_size=16,
            num_gpu_blocks=1000,
            enable_prefix_caching=args.enable_prefix_caching,
            kv_cache_size_tokens=16000,
        ),
        load_config=SimpleNamespace(load_format=args.load_format),
        compilation_config=SimpleNamespace(
            mode=SimpleNamespace(name="NONE"), cudagraph_mode=SimpleNamespace(name="NONE"), cudagraph_capture_sizes=[]
        ),
    )
