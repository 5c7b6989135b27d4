"""THE RESULT SCHEMA: what a result file holds, type by type.

The raw measurements are the truth; `summary` is derived by metrics.py and can always be recomputed.
An unknown number is None with a reason beside it, never 0, -1, NaN or "inf". The bounds reject what no
measurement can be, so that no formula has to expect it. result_file.py reads and writes these types.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct, field

from batch_inference.core.config import ExperimentConfig, Shape, Workload
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

    ttft_s: list[Seconds]  # arrival to first token, including the wait in the queue
    latency_s: list[Seconds]  # arrival to last token
    queue_s: list[Seconds]  # arrival to first scheduled
    output_tokens: list[Count]
    # Only for a queue point, whose requests differ and have to wait.
    arrival_s: list[Seconds] = []  # from the common start
    prompt_tokens: list[Count] = []

    def __post_init__(self) -> None:
        sizes = {len(self.ttft_s), len(self.latency_s), len(self.queue_s), len(self.output_tokens)}
        sizes |= {len(of_queue) for of_queue in (self.arrival_s, self.prompt_tokens) if of_queue}
        if len(sizes) > 1:
            raise ValueError("its lists differ in length")


class Timeline(Struct):
    """What a replica's scheduler reported about its steps, combined into intervals: one list entry each."""

    end_s: list[Seconds]  # of the interval, from the common start
    steps: list[Count]
    prompt_tokens: list[Count]  # of the requests whose first token came in it
    output_tokens: list[Count]
    running: list[Annotated[float, Meta(ge=0, le=1e9)]]  # requests, mean over its steps
    waiting: list[Count]  # requests, at its end


class ReplicaRun(Struct):
    """One replica's part of a run; times from the common start."""

    replica: Count
    start_s: Seconds
    end_s: Seconds
    prompt_tokens: Count
    output_tokens: Count
    # For a queue point: how many of the run's requests it had, and its steps.
    requests: Count | None = None
    timeline: Timeline | None = None


class Memory(Struct):
    """GiB in use: one number per device or per replica, as `scope` says."""

    scope: Literal["device", "replica"]
    used_gib: list[Gib] | None  # after the run; None if unknown
    peak_gib: list[Gib] | None = None  # during the run, if it was watched
    # Share of the KV cache in use at the fullest moment of the fullest replica.
    peak_kv_use: Annotated[float, Meta(ge=0, le=1e6)] | None = None


class Counters(Struct):
    """What vLLM counted during a run, over all replicas; None if it does not say."""

    preemptions: Count
    prefix_cache_hit_tokens: Count
    jit_compilations: Count | None = None  # kernels that vLLM compiled during the run
    peak_running: Count | None = None  # most requests that ran at once, of the replica with the fewest
    miscounted: Count | None = None  # requests of a queue that came back with a different number of tokens than asked
    # vLLM's own estimates of the work of one device in the busiest replica.
    flops_per_device: Work | None = None
    memory_bytes_per_device: Work | None = None


class Clocks(Struct):
    """What was seen of clocks and neighbours; None if nobody watched."""

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
    # The time that passed by the clock of the program that asked for the run; `latency_s` is part of it.
    passed_s: Seconds | None = None
    clocks: Clocks = field(default_factory=Clocks)
    unknown: dict[str, str] = {}  # name of a number that is None -> why


class Warmup(Struct):
    """A run that is not counted."""

    latency_s: Seconds
    jit_compilations: Count | None = None
    reason: str | None = None  # why, if a timed run was moved here


# What tells the jobs of a file apart: the content of the workload, and where its output lengths come from.
JobKey = tuple[str, str | int]


class Job(Struct):
    """The requests of a workload, of which a sample is run: only their lengths, in the order of the file."""

    content_hash: str
    output_lengths: Literal["file", "eos"] | Size
    requests: Size
    prompt_tokens: Count
    output_tokens: Count | None  # None if the model decides where to end
    longest: Size  # prompt and output of the longest request
    # The lists hold every nth request, and all of the last ones, because those make the drain.
    every: Size
    last: Count  # how many at the end of the lists stand only for themselves
    prompt_lens: list[Size]
    output_lens: list[Size] | None
    prompts: Lengths
    outputs: Lengths | None
    left_out: str | None = None

    @property
    def key(self) -> JobKey:
        return self.content_hash, self.output_lengths


class Sample(Struct):
    """Which requests of the job a queue point ran, and how well they represent it."""

    prompts: Lengths
    outputs: Lengths | None
    # Difference from the job's; None if the model chooses its output lengths.
    prompt_difference: Difference
    output_difference: Difference | None


class WorkloadKey(Struct, frozen=True):
    """Which requests a queue point ran: the content of the file, where output lengths come from, and the order."""

    content_hash: str
    output_lengths: Literal["file", "eos"] | Size
    order: Literal["given", "shuffled", "longest-first", "shortest-first"]
    is_cached: bool = False  # shared prefixes are computed only once (--enable-prefix-caching)

    def as_tuple(self) -> Workload:
        """The same as ExperimentConfig.workload."""
        return self.content_hash, self.output_lengths, self.order, self.is_cached

    @property
    def job(self) -> JobKey:
        """The key of the job that the requests belong to."""
        return self.content_hash, self.output_lengths


def workload_key(config: ExperimentConfig) -> WorkloadKey:
    """For a configuration that has a workload."""
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

    batch_size: Size  # requests handed to each replica, or the most that run on each
    seq_len: Size | None  # exact prompt length in tokens; None for a workload, which has its own lengths
    max_tokens: Size | None  # exact output tokens of each request; None likewise; a limit if the model ends them
    status: PointStatus
    workload: WorkloadKey | None = None
    sample: Sample | None = None  # for a queue point
    max_num_batched_tokens: Size | None = None  # tokens per step, if that is an axis of the sweep
    reason: str | None = None
    failure: str | None = None  # the class of the failure, from failures.py
    log_tail: list[str] | None = None
    verdict: Verdict | None = None
    verdict_reasons: list[str] = []
    warmups: list[Warmup] = []
    runs: list[Run] = []
    summary: dict[str, float | None] = {}
    plateau_interval_by: str | None = None  # for a queue point: the method, "batch means" or "fitted steps"
    engine: int | None = None  # which of `earlier_engines` measured it; None: the last one
    is_adaptive: bool | None = None  # of an earlier sweep; None: as `config` has it

    @property
    def key(self) -> PointKey:
        return PointKey(self.batch_size, self.seq_len, self.max_tokens, self.workload, self.max_num_batched_tokens)

    @property
    def shape(self) -> Shape:
        """As `ExperimentConfig.points` has it."""
        workload = self.workload.as_tuple() if self.workload else None
        return self.batch_size, self.seq_len, self.max_tokens, workload, self.max_num_batched_tokens

    @property
    def tokens_per_request(self) -> int | None:
        """Prompt and output; None if requests differ."""
        return None if self.seq_len is None or self.max_tokens is None else self.seq_len + self.max_tokens


# --- the engine ---------------------------------------------------------------------------------------------------


class DeviceInfo(Struct):
    """What a device is, and its memory use and power draw before an engine loaded."""

    index: Count
    name: str
    memory_gib: Gib | None = None
    uuid: str | None = None
    cores: str | None = None  # for a slice of a CPU
    used_before_gib: Gib | None = None
    power_limit_w: Watts | None = None
    idle_power_w: Watts | None = None
    max_sm_mhz: Mhz | None = None


class WorkerInfo(Struct):
    """What one of vLLM's workers reports that it holds. The first files did not have all of it."""

    weights_bytes: Count
    kv_bytes: Count
    host: str | None = None
    runner: str | None = None
    device: DeviceInfo | None = None
    activation_bytes: Count | None = None  # the peak that vLLM saw when profiling
    compile_s: Seconds | None = None
    compile_cache: Literal["cold", "warm"] | None = None


class LoadTimes(Struct):
    """Seconds from the worker's start: vLLM's import, the engine, and both; the engine's include compiling."""

    import_s: Seconds | None = None
    engine_s: Seconds | None = None
    total_s: Seconds | None = None
    compile_s: Seconds | None = None


class ReplicaInfo(Struct):
    """What is particular to each replica; None for what is the same as in the first."""

    load_s: LoadTimes | None = None
    workers: list[WorkerInfo] = []
    num_gpu_blocks: Count | None = None
    kv_cache_tokens: Count | None = None


class EngineInfo(Struct):
    """The settings that vLLM really runs with, read back from it, and what it holds; for the first replica."""

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
    language_model_only: bool | None = None  # for a multimodal model
    skip_tokenizer_init: bool | None = None
    max_num_seqs: Count | None = None
    max_num_batched_tokens: Count | None = None
    chunked_prefill: bool | None = None
    async_scheduling: bool | None = None
    speculative_method: str | None = None
    num_speculative_tokens: Count | None = None
    kv_connector: str | None = None  # moves the KV cache elsewhere, for example to main memory
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
    # If one rank compiles, all wait for it.
    compile_cache: Literal["cold", "warm"] | None = None
    # On the fullest device.
    weights_gib: Gib | None = None
    kv_pool_gib: Gib | None = None
    activations_gib: Gib | None = None
    workers: list[WorkerInfo] = []
    replicas: list[ReplicaInfo] = []  # empty if there is only one


# --- the file -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredConfig(ExperimentConfig):
    """What was asked, as a file holds it: with a placeholder like <hf_token> for each secret, and with a hash of what
    changes a measurement, which contains no secret.

    A field that an older file lacks gets its default.
    """

    config_hash: str | None = None
    model_id: str | None = None  # a relative path is of the folder in which it was given

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if not 1 <= getattr(self, name) <= MOST_DEVICES:
                raise ValueError(f"{name} is {getattr(self, name)}")
        for name in ("batch_sizes", "seq_lens"):
            for size in getattr(self, name):
                if not 1 <= size <= 2**31:
                    raise ValueError(f"{name} holds {size}, which is not a size")

    @classmethod
    def of(cls, config: ExperimentConfig) -> StoredConfig:
        values = {item.name: getattr(config, item.name) for item in dataclasses.fields(ExperimentConfig)}
        values |= {name: redact_value(value) for name, value in values.items() if isinstance(value, str)}
        values["engine_args"] = tuple(redact(config.engine_args))
        return cls(**values, config_hash=config.settings_hash(), model_id=config.model_identity)

    @property
    def model_identity(self) -> str:
        return self.model_id or super().model_identity


class Peaks(Struct):
    """The most that one device can do, and where the numbers come from."""

    flops_per_s: Annotated[float, Meta(ge=1, le=1e24)]
    bytes_per_s: Annotated[float, Meta(ge=1, le=1e24)]
    source: str
    dtype: str | None = None


class Environment(Struct):
    """Where it was measured, so that two files can be told apart. It contains no secret."""

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
    variables: dict[str, str] = {}  # for those that may hold a secret, only that they are set
    peaks: Peaks | None = None
    resumed_from: list[str | None] = []  # when the earlier sweeps of this file began
    used_by_others: list[str] = []  # for each device that another sweep used when one of this file began: which and who


class Failure(Struct):
    """Why a setting did not get an engine."""

    kind: str = field(name="class")  # from failures.py
    reason: str
    log_tail: list[str] = []


class Answers(Struct):
    """How the answers to --compare-answers begin, for each request in the form of answers.py, without tokens."""

    seed: int
    prompt_tokens: Count
    output_tokens: Count
    first: list[str]  # from the first replica, all requests at once
    again: list[str]  # from the same replica, in two halves
    other_replicas: list[list[str]] = []  # all at once


class Result(Struct):
    """One setting: what was asked, where it ran, the engine that vLLM made, and every point."""

    name: str
    status: RunStatus
    config: StoredConfig
    environment: Environment
    points: list[Point]
    engine: EngineInfo | None = None  # None until it is loaded
    jobs: list[Job] = []  # the workloads of its queue points
    failure: Failure | None = None  # for a setting that failed as a whole
    restarts: Count = 0  # of the engine, after it was lost
    answers: Answers | None = None
    earlier_engines: list[EngineInfo] = []  # from earlier sweeps of this file, for the points that they measured
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for number, point in enumerate(self.points):
            if point.engine is not None and not 0 <= point.engine < len(self.earlier_engines):
                earlier = len(self.earlier_engines)
                raise ValueError(f"points[{number}].engine is {point.engine}, but there are {earlier}")
            if point.status == "ok" and self.engine is None:
                raise ValueError(f"points[{number}] is measured, but there is no engine")
            if point.status == "ok" and not point.runs:
                raise ValueError(f"points[{number}] is ok, but has no runs")

    def engine_of(self, point: Point) -> EngineInfo | None:
        """The engine that measured the point."""
        return self.engine if point.engine is None else self.earlier_engines[point.engine]

    def is_adaptive(self, point: Point) -> bool:
        """Whether the number of runs of the point depended on how they went. For a queue it never does."""
        is_adaptive = self.config.num_runs is None if point.is_adaptive is None else point.is_adaptive
        return is_adaptive and point.workload is None

    def job_of(self, workload: WorkloadKey) -> Job | None:
        return next((job for job in self.jobs if job.key == workload.job), None)

    @property
    def data_parallel_size(self) -> int:
        return self.config.data_parallel_size

    @property
    def num_devices(self) -> int:
        """Devices of the setting: TP x PP x DP."""
        return self.config.num_devices
