"""THE RESULT SCHEMA: what a result file holds, type by type.

Raw measurements are the truth; `summary` is derived by metrics.py and can always be computed again.
An unknown number is None with a reason beside it, never 0, -1, NaN or "inf". The bounds are there to refuse what no
measurement is, so that no formula has to expect it. result_file.py reads and writes these types.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct, field

from batch_inference.core.config import ExperimentConfig, Workload
from batch_inference.core.lengths import Difference, Lengths
from batch_inference.core.secrets import redact, redact_value
from batch_inference.core.values import MOST_DEVICES

# History
#   1  first version
#   2  one line per point; `failure`, `restarts` and `earlier_engines` beside `engine`; a point's key also has its
#      workload and its budget of tokens per step
SCHEMA_VERSION = 2

RunStatus = Literal["complete", "partial", "failed"]
PointStatus = Literal["ok", "oom", "timeout", "error", "skipped"]
Verdict = Literal["valid", "suspect", "invalid"]

Size = Annotated[int, Meta(ge=1, le=2**31)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
Work = Annotated[float, Meta(ge=0, le=1e30)]  # operations or bytes of a run, which may last for days
Seconds = Annotated[float, Meta(ge=-1e9, le=1e9)]
Gib = Annotated[float, Meta(ge=0, le=1e9)]
Joules = Annotated[float, Meta(ge=0, le=1e15)]
Watts = Annotated[float, Meta(ge=0, le=1e9)]
Mhz = Annotated[float, Meta(ge=0, le=1e9)]


# --- a point ------------------------------------------------------------------------------------------------------


class Requests(Struct):
    """One list entry per request of a run, over all replicas, in submission order; all durations in seconds."""

    ttft_s: list[Seconds]  # arrival to first token, waiting in the queue included
    latency_s: list[Seconds]  # arrival to last token
    queue_s: list[Seconds]  # arrival to first scheduled
    output_tokens: list[Count]
    # Of a queue point alone, whose requests differ and have to wait.
    arrival_s: list[Seconds] = []  # from the common start
    prompt_tokens: list[Count] = []

    def __post_init__(self) -> None:
        sizes = {len(self.ttft_s), len(self.latency_s), len(self.queue_s), len(self.output_tokens)}
        sizes |= {len(of_queue) for of_queue in (self.arrival_s, self.prompt_tokens) if of_queue}
        if len(sizes) > 1:
            raise ValueError("its lists are not equally long")


class Timeline(Struct):
    """What the scheduler of a replica said of its steps, put together in intervals: a list entry each."""

    end_s: list[Seconds]  # of the interval, from the common start
    steps: list[Count]
    prompt_tokens: list[Count]  # of the requests that had their first token in it
    output_tokens: list[Count]
    running: list[Annotated[float, Meta(ge=0, le=1e9)]]  # requests, on the mean of its steps
    waiting: list[Count]  # requests, at its end


class ReplicaRun(Struct):
    """One replica's part of a run; times from the common start."""

    replica: Count
    start_s: Seconds
    end_s: Seconds
    prompt_tokens: Count
    output_tokens: Count
    # Of a queue point: how many of the run's requests it had, and its steps.
    requests: Count | None = None
    timeline: Timeline | None = None


class Memory(Struct):
    """GiB in use: one number per device or per replica, as `scope` says."""

    scope: Literal["device", "replica"]
    used_gib: list[Gib] | None  # after the run; None where nobody knows
    peak_gib: list[Gib] | None = None  # during the run, where it was watched
    # Share of the KV cache in use at the fullest moment, of the fullest replica.
    peak_kv_use: Annotated[float, Meta(ge=0, le=1e6)] | None = None


class Counters(Struct):
    """What vLLM counted during a run, of all replicas; None where it does not tell."""

    preemptions: Count
    prefix_cache_hit_tokens: Count
    jit_compilations: Count | None = None  # kernels that vLLM compiled during the run
    peak_running: Count | None = None  # most requests that ran at once, of the replica with the fewest
    miscounted: Count | None = None  # requests of a queue that came back with other numbers of tokens than asked
    # vLLM's own estimates of the work of one device, of the busiest replica.
    flops_per_device: Work | None = None
    memory_bytes_per_device: Work | None = None


class Clocks(Struct):
    """What was seen of clocks and neighbours; None where nobody watched."""

    sm_mhz: list[Mhz | None] | None = None  # mean during the run, per device
    throttle_reasons: list[str] | None = None  # NVML's words
    other_processes: Count | None = None


class Run(Struct):
    """One timed submission of a point's batch, on all replicas at once."""

    # From the common start to the last replica's end.
    latency_s: Annotated[float, Meta(gt=1e-9, le=1e9)]
    prompt_tokens: Count  # all replicas, counted from the outputs
    output_tokens: Count
    replicas: list[ReplicaRun]
    requests: Requests
    memory: Memory
    counters: Counters
    energy_j: Joules | None = None
    # What passed meanwhile by the clock of the program that asked for the run: `latency_s` is a part of it.
    passed_s: Seconds | None = None
    clocks: Clocks = field(default_factory=Clocks)
    unknown: dict[str, str] = {}  # name of a number that is None -> why


class Warmup(Struct):
    """A run that does not count."""

    latency_s: Seconds
    jit_compilations: Count | None = None
    reason: str | None = None  # of a timed run that was moved here: why


# What tells the jobs of a file apart: the content of the workload, and where output lengths are from.
JobKey = tuple[str, str | int]


class Job(Struct):
    """The requests of a workload, of which a sample is run: their lengths alone, in the order of the file."""

    content_hash: str
    output_lengths: Literal["file", "eos"] | Size
    requests: Size
    prompt_tokens: Count
    output_tokens: Count | None  # None where the model itself ends
    longest: Size  # prompt and output of the longest request
    # The lists hold every so-manieth request, and from a moment on all, because the last ones make the drain.
    every: Size
    last: Count  # how many at the end of the lists stand for themselves alone
    prompt_lens: list[Size]
    output_lens: list[Size] | None
    prompts: Lengths
    outputs: Lengths | None
    left_out: str | None = None

    @property
    def key(self) -> JobKey:
        return self.content_hash, self.output_lengths


class Sample(Struct):
    """Which requests of the job a queue point ran, and how well they stand for it."""

    prompts: Lengths
    outputs: Lengths | None
    # From the job's; None where outputs are the model's own choice.
    prompt_difference: Difference
    output_difference: Difference | None


class WorkloadKey(Struct, frozen=True):
    """Which requests a queue point ran: the content of the file, where output lengths are from, and the order."""

    content_hash: str
    output_lengths: Literal["file", "eos"] | Size
    order: Literal["given", "shuffled", "longest-first", "shortest-first"]
    is_cached: bool = False  # prefixes that requests share are computed once (--enable-prefix-caching)

    def as_tuple(self) -> Workload:
        """As ExperimentConfig.workload."""
        return self.content_hash, self.output_lengths, self.order, self.is_cached

    @property
    def job(self) -> JobKey:
        """The key of the job that the requests are of."""
        return self.content_hash, self.output_lengths


def workload_key(config: ExperimentConfig) -> WorkloadKey:
    """Of a configuration that has a workload."""
    return msgspec.convert(dict(zip(WorkloadKey.__struct_fields__, config.workload or (), strict=True)), WorkloadKey)


class PointKey(Struct, frozen=True):
    """What tells the points of a setting apart."""

    batch_size: Size
    seq_len: Size | None
    max_tokens: Size | None
    workload: WorkloadKey | None = None
    max_num_batched_tokens: Size | None = None


class Point(Struct):
    """One batch size at one prompt length and output length (a batch point), or over a workload (a queue point)."""

    batch_size: Size  # requests handed to each replica, or running at most on each
    seq_len: Size | None  # prompt length in tokens, exact; None where a workload has lengths of its own
    max_tokens: Size | None  # output tokens of each request, exact; None likewise; most where the model ends them
    status: PointStatus
    workload: WorkloadKey | None = None
    sample: Sample | None = None  # of a queue point
    max_num_batched_tokens: Size | None = None  # tokens per step, where it is an axis of the sweep
    reason: str | None = None
    failure: str | None = None  # the class of the failure, of failures.py
    log_tail: list[str] | None = None
    verdict: Verdict | None = None
    verdict_reasons: list[str] = []
    warmups: list[Warmup] = []
    runs: list[Run] = []
    summary: dict[str, float | None] = {}
    plateau_interval_by: str | None = None  # of a queue point: the method, "batch means" or "fitted steps"
    engine: int | None = None  # which of `earlier_engines` measured it; None: the last one

    @property
    def key(self) -> PointKey:
        return PointKey(self.batch_size, self.seq_len, self.max_tokens, self.workload, self.max_num_batched_tokens)

    @property
    def tokens_per_request(self) -> int | None:
        """Prompt and output; None where requests differ."""
        return None if self.seq_len is None or self.max_tokens is None else self.seq_len + self.max_tokens


# --- the engine ---------------------------------------------------------------------------------------------------


class DeviceInfo(Struct):
    """What a device is, and what it held and drew before an engine loaded."""

    index: Count
    name: str
    memory_gib: Gib | None = None
    uuid: str | None = None
    cores: str | None = None  # of a slice of a CPU
    used_before_gib: Gib | None = None
    power_limit_w: Watts | None = None
    idle_power_w: Watts | None = None
    max_sm_mhz: Mhz | None = None


class WorkerInfo(Struct):
    """What one of vLLM's workers holds, as it says itself. The first files did not have all of it."""

    weights_bytes: Count
    kv_bytes: Count
    host: str | None = None
    runner: str | None = None
    device: DeviceInfo | None = None
    activation_bytes: Count | None = None  # the peak that vLLM saw when profiling
    compile_s: Seconds | None = None
    compile_cache: Literal["cold", "warm"] | None = None


class LoadTimes(Struct):
    """Seconds from the worker's start: vLLM's import, the engine, both; compiling is part of the engine's."""

    import_s: Seconds | None = None
    engine_s: Seconds | None = None
    total_s: Seconds | None = None
    compile_s: Seconds | None = None


class ReplicaInfo(Struct):
    """What each replica has of its own; None for what is as in the first."""

    load_s: LoadTimes | None = None
    workers: list[WorkerInfo] = []
    num_gpu_blocks: Count | None = None
    kv_cache_tokens: Count | None = None


class EngineInfo(Struct):
    """The settings that vLLM really runs with, read back from it, and what it holds; of the first replica."""

    vllm_version: str
    executor: str | None = None
    tensor_parallel_size: Size | None = None
    pipeline_parallel_size: Size | None = None
    pipeline_stages_overlap: bool | None = None
    enable_expert_parallel: bool | None = None
    decode_context_parallel_size: Size | None = None
    dtype: str | None = None
    quantization: str | None = None
    max_model_len: Count | None = None
    enforce_eager: bool | None = None
    language_model_only: bool | None = None  # of a multimodal model
    skip_tokenizer_init: bool | None = None
    max_num_seqs: Count | None = None
    max_num_batched_tokens: Count | None = None
    chunked_prefill: bool | None = None
    async_scheduling: bool | None = None
    speculative_method: str | None = None
    num_speculative_tokens: Count | None = None
    kv_connector: str | None = None  # by which the KV cache goes elsewhere, to main memory for one
    gpu_memory_utilization: float | None = None
    kv_cache_dtype: str | None = None
    block_size: Count | None = None
    num_gpu_blocks: Count | None = None
    enable_prefix_caching: bool | None = None
    load_format: str | None = None
    compilation_mode: str | None = None
    cudagraph_mode: str | None = None
    cudagraph_capture_sizes: list[Count] = []
    multiprocess_engine: bool | None = None
    kv_cache_tokens: Count | None = None  # of one replica
    runner: str | None = None
    load_s: LoadTimes = field(default_factory=LoadTimes)
    # One rank that compiles is what all wait for.
    compile_cache: Literal["cold", "warm"] | None = None
    # Of the fullest device.
    weights_gib: Gib | None = None
    kv_pool_gib: Gib | None = None
    activations_gib: Gib | None = None
    workers: list[WorkerInfo] = []
    replicas: list[ReplicaInfo] = []  # empty where there is one


# --- the file -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredConfig(ExperimentConfig):
    """What was asked, as a file holds it: with a placeholder like <hf_token> for each secret, and with the hash of what
    changes a measurement, in which no secret is.

    A field that an older file does not have yet reads as its default.
    """

    config_hash: str | None = None

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if not 1 <= getattr(self, name) <= MOST_DEVICES:
                raise ValueError(f"{name} is {getattr(self, name)}")
        for name in ("batch_sizes", "seq_lens"):
            for size in getattr(self, name):
                if not 1 <= size <= 2**31:
                    raise ValueError(f"{name} holds {size}, which is no size")

    @classmethod
    def of(cls, config: ExperimentConfig) -> StoredConfig:
        values = {item.name: getattr(config, item.name) for item in dataclasses.fields(ExperimentConfig)}
        values |= {name: redact_value(value) for name, value in values.items() if isinstance(value, str)}
        values["engine_args"] = tuple(redact(config.engine_args))
        return cls(**values, config_hash=config.settings_hash())


class Peaks(Struct):
    """The most that one device can do, and who says so."""

    flops_per_s: Annotated[float, Meta(ge=1, le=1e24)]
    bytes_per_s: Annotated[float, Meta(ge=1, le=1e24)]
    source: str
    dtype: str | None = None


class Environment(Struct):
    """Where it was measured, so that two files can be told apart. Nothing secret is in it."""

    started_at: str | None = None
    ended_at: str | None = None  # None until the setting is done
    argv: list[str] = []
    host: str | None = None
    platform: str | None = None
    python_version: str | None = None
    cpu_name: str | None = None
    cpu_count: Count | None = None
    versions: dict[str, str] = {}
    device_kind: Literal["gpu", "cpu"] | None = None
    devices: list[DeviceInfo] = []
    driver_version: str | None = None
    topology: str | None = None
    git_commit: str | None = None
    git_dirty: bool | None = None
    variables: dict[str, str] = {}  # of those that may hold a secret, only that they are set
    peaks: Peaks | None = None
    resumed_from: list[str | None] = []  # when the earlier sweeps of this file began


class Failure(Struct):
    """Why a setting has no engine."""

    kind: str = field(name="class")  # of failures.py
    reason: str
    log_tail: list[str] = []


class Answers(Struct):
    """How the answers to --compare-answers begin, for each request in the form of answers.py: no token is in it."""

    seed: int
    prompt_tokens: Count
    output_tokens: Count
    first: list[str]  # of the first replica, all requests at once
    again: list[str]  # of the same one, in two halves
    other_replicas: list[list[str]] = []  # all at once


class Result(Struct):
    """One setting: what was asked, where it ran, what vLLM made of it, and every point."""

    name: str
    status: RunStatus
    config: StoredConfig
    environment: Environment
    points: list[Point]
    engine: EngineInfo | None = None  # None until it is loaded
    jobs: list[Job] = []  # the workloads of its queue points
    failure: Failure | None = None  # of a setting that failed as a whole
    restarts: Count = 0  # of an engine that was lost
    answers: Answers | None = None
    earlier_engines: list[EngineInfo] = []  # of earlier sweeps of this file, for the points that they measured
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for number, point in enumerate(self.points):
            if point.engine is not None and not 0 <= point.engine < len(self.earlier_engines):
                raise ValueError(f"points[{number}].engine is {point.engine}, there are {len(self.earlier_engines)}")
            if point.status == "ok" and self.engine is None:
                raise ValueError(f"points[{number}] is measured, and there is no engine")
            if point.status == "ok" and not point.runs:
                raise ValueError(f"points[{number}] is ok, and has no runs")

    def engine_of(self, point: Point) -> EngineInfo | None:
        """The engine that measured the point."""
        return self.engine if point.engine is None else self.earlier_engines[point.engine]

    def is_adaptive(self, point: Point) -> bool:
        """Whether the runs of the point decided themselves how many there are. Those of a queue never do."""
        return self.config.num_runs is None and point.workload is None

    def job_of(self, workload: WorkloadKey) -> Job | None:
        return next((job for job in self.jobs if job.key == workload.job), None)

    @property
    def data_parallel_size(self) -> int:
        return self.config.data_parallel_size

    @property
    def num_devices(self) -> int:
        """Devices of the setting: TP x PP x DP."""
        return self.config.num_devices
