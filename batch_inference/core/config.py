"""What was asked: one frozen ExperimentConfig, each field a flag with its type, default, check and help."""

# No `from __future__ import annotations` here: the parser reads the field types.
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from batch_inference.core.errors import CleanError
from batch_inference.core.secrets import redact, redact_value
from batch_inference.core.values import (
    FROM_FILE,
    GOALS,
    ORDERS,
    OWN_END,
    Doublings,
    batch_sizes,
    device_count,
    fraction,
    gib,
    host,
    interval,
    name_text,
    node_number,
    numbers,
    output_lengths,
    path_text,
    port,
    prompt_lengths,
    request_count,
    run_count,
    seconds,
    seed,
    size_with_suffix,
    temperature,
    token_count,
    token_length,
    tokens_per_step,
)

# Fewer runs also give an interval, but chance alone makes it wide.
MIN_RUNS = 3
BACKENDS = ("mp", "ray", "external_launcher", "uni")
# The variable that holds the secret which nodes prove to each other that they know.
MEETING_SECRET = "BATCH_INFERENCE_MEETING_SECRET"
# vLLM's variable that, if 0, keeps an engine in the process that made it.
SEPARATE = "VLLM_ENABLE_V1_MULTIPROCESSING"
# vLLM's own: each device holds whole experts of a mixture, instead of a slice of every one.
EXPERTS_FLAG = "--enable-expert-parallel"
# The limits of a search and of an analysis, in seconds.
LIMITS = ("max_latency_s", "max_ttft_s", "max_tpot_s")
PREFIX_FLAG = "--enable-prefix-caching"
# Content, output lengths, order, whether prefixes are cached.
Workload = tuple[str, str | int, str, bool]
# Batch size, prompt length, output tokens, workload, tokens per step.
Shape = tuple[int, int | None, int | None, Workload | None, int | None]


class ConfigError(CleanError):
    """A mistake the user can fix: the message names the flag, the value found, and what to do."""


def _flag(
    default: Any,
    help_text: str,
    parse: Callable[[str], Any] | None = None,
    *,
    measured: bool = True,
    short: str | None = None,
    **argparse_options: Any,
) -> Any:
    """A field that is a flag. `measured`: it changes what is measured, so it is part of `settings_hash`."""
    metadata = {"help": help_text, "parse": parse, "measured": measured, "short": short, "options": argparse_options}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """What was asked: one field per flag, in the order of --help. None means that vLLM or the grid decides."""

    model: str = _flag("meta-llama/Llama-2-7b-chat-hf", "model folder or hub name", path_text)
    tensor_parallel_size: int = _flag(1, "TP: devices that share each layer", device_count, short="-tp")
    pipeline_parallel_size: int = _flag(1, "PP: stages that the layers are split into", device_count, short="-pp")
    data_parallel_size: int = _flag(1, "DP: replicas of the model, each with its own batch", device_count, short="-dp")
    distributed_executor_backend: str | None = _flag(
        None, "how vLLM runs its workers; default: uni for one device, mp for more", choices=BACKENDS
    )
    nnodes: int = _flag(1, "nodes that TP x PP is spread over; run the same command on each", device_count)
    node_rank: int = _flag(0, "number of this node; node 0 writes the file", node_number, measured=False)
    master_addr: str | None = _flag(None, "address of node 0, for --nnodes", host, measured=False)
    master_port: int = _flag(29500, "port of node 0; the next one must be free too", port, measured=False)
    batch_sizes: tuple[int, ...] = _flag(
        (1, 4, 8, 16),
        "requests handed to each replica at once (for a workload: running at once); auto searches for the best",
        batch_sizes,
        measured=False,
    )
    goal: str = _flag(GOALS[0], "for --batch-sizes auto: what counts as best", choices=GOALS, measured=False)
    to_beat: tuple[float, ...] | None = _flag(
        None,
        "for --batch-sizes auto: tok/s (or batches/s) to reach per prompt length; a setting that cannot is given up",
        numbers,
        measured=False,
        metavar="X,X,..",
    )
    max_latency_s: float | None = _flag(
        None,
        "for --batch-sizes auto: upper limit of the p99 latency of a batch, over its runs",
        seconds,
        measured=False,
    )
    max_ttft_s: float | None = _flag(
        None, "the same for the time to first token, over requests", seconds, measured=False
    )
    max_tpot_s: float | None = _flag(
        None, "the same for the time per output token, over requests", seconds, measured=False
    )
    seq_lens: tuple[int, ...] = _flag((512, 1024, 2048), "prompt lengths in tokens", prompt_lengths, measured=False)
    max_tokens: int = _flag(128, "output tokens of each request, exact", token_count, measured=False)
    prompts_file: str | None = _flag(
        None, "a workload in place of --seq-lens; its requests are queued (see the README)", path_text, measured=False
    )
    output_lengths: str | int = _flag(
        FROM_FILE,
        "for a workload: file (exactly as it says), eos (where the model stops, at most --max-tokens), or N for all",
        output_lengths,
        measured=False,
        metavar="file|eos|N",
    )
    sample: int | None = _flag(
        None,
        "how many requests of the workload to run; default: enough for a plateau at each batch size",
        request_count,
        measured=False,
    )
    order: str = _flag(
        ORDERS[0],
        "queue order of the workload's requests (longest and shortest first: by output length)",
        choices=ORDERS,
        measured=False,
    )
    skip_bad_lines: bool = _flag(
        False, "skip requests of the workload that are malformed or not supported, and count them", measured=False
    )
    compare_answers: bool = _flag(
        False,
        "compare greedy answers between settings and report those that differ; needs real weights",
        measured=False,
    )
    max_model_len: int | None = _flag(
        None, "longest prompt plus output; auto: whatever fits; default: what the grid needs", token_length
    )
    dtype: str = _flag(
        "auto",
        "data type of weights and activations",
        choices=("auto", "half", "float16", "bfloat16", "float", "float32"),
    )
    max_num_seqs: int | None = _flag(
        None, "most requests that vLLM runs at once; default: the largest batch size", request_count
    )
    max_num_batched_tokens: int | tuple[int, ...] | None = _flag(
        None,
        "most tokens per engine step; several, separated by commas, are each measured; default: vLLM's own",
        tokens_per_step,
        metavar="N,N,..",
    )
    gpu_memory_utilization: float = _flag(
        0.8, "share of each device's memory for vLLM (on the CPU: of main memory, for all devices)", fraction
    )
    temperature: float = _flag(0.8, "sampling temperature; 0 is greedy", temperature)
    top_p: float = _flag(0.95, "nucleus sampling", fraction)
    num_runs: int | None = _flag(
        None,
        f"exact number of timed runs per point; default: {MIN_RUNS} or more, as --target-ci and --max-runs say",
        run_count,
        measured=False,
    )
    target_ci: float = _flag(
        0.02,
        "runs go on until the 95 %% interval of the mean latency is within this fraction of the mean",
        interval,
        measured=False,
    )
    max_runs: int = _flag(10, "most timed runs per point", run_count, measured=False)
    warmup_runs: int = _flag(
        1,
        "fewest warm-ups per point; up to 5 are made until two in a row agree within 5 %%",
        run_count,
        measured=False,
    )
    seed: int = _flag(0, "seed of prompts, weights and sampling", seed)
    enforce_eager: bool = _flag(False, "no compilation and no CUDA graphs")
    trust_remote_code: bool = _flag(False, "allow code that comes with the model")
    output_dir: str = _flag("experiment_results", "folder of the result files", path_text, measured=False)
    output_file: str | None = _flag(
        None, "result file; default: NAME_results.json in --output-dir; the log is beside it", path_text, measured=False
    )
    name: str | None = _flag(
        None, "name of the setting; default: made from the sizes, like tp_2", name_text, measured=False
    )
    overwrite: bool = _flag(False, "measure again what was already measured with the same settings", measured=False)
    resume: bool = _flag(False, "keep what was measured with the same settings and go on; the default", measured=False)
    startup_timeout: float = _flag(1800, "seconds that an engine may take to start", seconds, measured=False)
    point_timeout: float = _flag(
        900, "seconds without a finished run after which a point is given up", seconds, measured=False
    )
    packed: bool = _flag(
        False, "mark every point as measured beside other settings; set by the launcher's --pack", measured=False
    )
    measure_peaks: bool = _flag(
        False, "measure a device's peaks, for MFU and MBU; default: those of its datasheet", measured=False
    )
    verbose: bool = _flag(False, "also show vLLM's log (of the first replica) on stderr", measured=False)
    dry_run: bool = _flag(False, "print the plan and stop", measured=False)
    devices: int | None = _flag(
        None, "for --dry-run: plan for this many GPUs instead of this machine's devices", device_count, measured=False
    )
    device_memory_gib: float | None = _flag(
        None, "for --dry-run: memory of one GPU of the machine that is planned for", gib, measured=False
    )
    engine_args: tuple[str, ...] = ()  # vLLM's own flags, as given
    # Of the workload, once its file is read: prompt and output of its longest request, and what it holds.
    workload_longest: int | None = dataclasses.field(default=None, metadata={"measured": False})
    workload_hash: str | None = dataclasses.field(default=None, metadata={"measured": False})

    @property
    def num_devices(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size

    @property
    def devices_per_replica(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def fewest_runs(self) -> int:
        """Timed runs that every point has at least."""
        return self.num_runs or MIN_RUNS

    @property
    def runs_in_words(self) -> str:
        return str(self.num_runs) if self.num_runs else f"{MIN_RUNS} to {self.max_runs}"

    @property
    def devices_per_node(self) -> int:
        return self.num_devices // self.nnodes

    @property
    def devices_elsewhere(self) -> bool:
        """True if devices may be on other machines or Ray assigns them: only the worker that holds one can read it."""
        return self.nnodes > 1 or self.distributed_executor_backend in ("external_launcher", "ray")

    @property
    def longest_request(self) -> int:
        """Tokens of the longest request of the grid or the workload, prompt and output."""
        return max(self.request_tokens)

    @property
    def longest_in_words(self) -> str:
        """Who says how long the longest request is."""
        if self.workload_longest:
            return f"--prompts-file {self.prompts_file}: its longest request takes {self.workload_longest} tokens"
        return f"--seq-lens {max(self.seq_lens)} plus --max-tokens {self.max_tokens} is {self.longest_request}"

    @property
    def lengths(self) -> tuple[int, ...]:
        """What a plan is made for: the prompt lengths of the grid, or the longest request of a workload. If another
        process has read the workload, --max-model-len is all that is known."""
        if self.prompts_file is None:
            return self.seq_lens
        return (self.workload_longest or max(1, self.max_model_len or 1),)

    @property
    def request_tokens(self) -> tuple[int, ...]:
        """Tokens of a request, prompt and output, for each of the `lengths`."""
        return self.lengths if self.prompts_file else tuple(length + self.max_tokens for length in self.seq_lens)

    @property
    def searches(self) -> bool:
        """Whether to search for the best batch size instead of measuring all of them."""
        return isinstance(self.batch_sizes, Doublings)

    @property
    def least_batch(self) -> int:
        """The batch that must fit in a plan: for a search the smallest size, since a search ends where memory does."""
        return min(self.batch_sizes) if self.searches else max(self.batch_sizes)

    @property
    def budgets(self) -> tuple[int | None, ...]:
        """Tokens per engine step where they are an axis of the sweep; otherwise None, and the engine uses its own."""
        return self.max_num_batched_tokens if isinstance(self.max_num_batched_tokens, tuple) else (None,)

    @property
    def largest_budget(self) -> int | None:
        """What the engine is loaded with; None for vLLM's own."""
        budgets = self.max_num_batched_tokens
        return max(budgets) if isinstance(budgets, tuple) else budgets

    @property
    def changes_limits(self) -> bool:
        """Whether the loaded engine gets new limits on what it runs at once between points."""
        slots = self.max_num_seqs or max(self.batch_sizes)
        return len(self.budgets) > 1 or (self.prompts_file is not None and min(self.batch_sizes) < slots)

    @property
    def setting_name(self) -> str:
        """`name`, or one made from the sizes above 1: tp_2, tp_2_pp_2_dp_2, tp_2_nodes_2; tp_1 if all are 1. With
        expert parallelism, tp_2_ep."""
        sizes = {
            "tp": self.tensor_parallel_size,
            "pp": self.pipeline_parallel_size,
            "dp": self.data_parallel_size,
        }
        parts = [f"{key}_{size}" for key, size in sizes.items() if size > 1] or ["tp_1"]
        prefix = ["torchrun"] if self.distributed_executor_backend == "external_launcher" else []
        nodes = [f"nodes_{self.nnodes}"] if self.nnodes > 1 else []
        experts = ["ep"] if self.enable_expert_parallel else []
        return self.name or "_".join(prefix + parts + nodes + experts)

    @property
    def output_path(self) -> Path:
        return Path(self.output_file or Path(self.output_dir) / f"{self.setting_name}_results.json")

    @property
    def log_path(self) -> Path:
        path = self.output_path
        return path.with_suffix(".log") if path.suffix == ".json" else path.with_name(path.name + ".log")

    @property
    def model_shown(self) -> str:
        """What anybody may read: a URL may hold a password."""
        return redact_value(self.model)

    def engine_word(self, flag: str) -> str | None:
        """The value of one of vLLM's own flags; None if it is not given, or stands alone."""
        words: list[str] = []
        for word in self.engine_args:
            name, equals, value = word.partition("=") if word.startswith("-") else (word, "", "")
            words += [name.replace("_", "-") if word.startswith("-") else name, *([value] if equals else [])]
        found = dict(itertools.pairwise(words)).get(flag)
        return None if found is None or found.startswith("--") else found

    def engine_number(self, flag: str) -> int | None:
        """The same for a flag whose value is a size, like 4096 or 8G."""
        word = self.engine_word(flag)
        return size_with_suffix(word) if word else None

    @property
    def enable_expert_parallel(self) -> bool:
        """Whether each device holds whole experts instead of a slice of every one."""
        return wants_whole_experts(self.engine_args)

    @property
    def caches_prefixes(self) -> bool:
        """Whether prefixes that requests share are computed only once."""
        return _is_on(PREFIX_FLAG, self.engine_args)

    @property
    def workload(self) -> Workload | None:
        """The part of a workload that tells points apart."""
        if self.prompts_file is None:
            return None
        return (self.workload_hash or "", self.output_lengths, self.order, self.caches_prefixes)

    def points(self) -> Iterator[Shape]:
        """What tells the points of the sweep apart, batch sizes innermost. A workload has its own lengths; where
        the model ends its outputs, they have a limit."""
        workload, limit = self.workload, self.max_tokens if self.output_lengths == OWN_END else None
        lengths = ((None, limit),) if workload else tuple((length, self.max_tokens) for length in self.seq_lens)
        for budget, (seq_len, max_tokens), batch_size in itertools.product(self.budgets, lengths, self.batch_sizes):
            yield batch_size, seq_len, max_tokens, workload, budget

    def same_settings(self) -> dict[str, Any]:
        """Equal if two configurations measure the same, however they were written: what the engine gets once
        defaults are filled in and paths resolved. The grid and its number of runs are not settings, nor are
        secrets: nothing can be guessed from what is kept of them."""
        values = {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(ExperimentConfig)
            if item.metadata.get("measured", True)
        }
        return {
            **values,
            "model": self.model_identity,
            "distributed_executor_backend": self.distributed_executor_backend or self.own_backend,
            "dtype": {"half": "float16", "float": "float32"}.get(self.dtype, self.dtype),
            "engine_args": sorted(_flags_with_values(redact(self.engine_args))),
            # Several are an axis of the sweep, like its batch sizes.
            "max_num_batched_tokens": None if len(self.budgets) > 1 else self.max_num_batched_tokens,
        }

    @property
    def model_identity(self) -> str:
        """Equal for the same model, however it is named from here. It tells no more of a path than the last part."""
        place = _resolved(self.model)
        return redact_value(self.model if place is None else f"{place.name} ({_hash_of({'model': str(place)})})")

    @property
    def own_backend(self) -> str:
        """How vLLM runs its workers unless it is told."""
        return "uni" if self.devices_per_replica == 1 else "mp"

    def settings_hash(self) -> str:
        return _hash_of(self.same_settings())

    def arguments(self) -> dict[str, str]:
        """Equal if two processes are about to measure the same settings and grid; by flag."""
        names = (
            "model", "batch_sizes", "seq_lens", "max_tokens", "num_runs", "target_ci", "max_runs", "warmup_runs",
            "output_lengths", "sample", "order", "skip_bad_lines", "compare_answers", "max_num_batched_tokens", "goal",
            "to_beat", *LIMITS,
        )  # fmt: skip
        # A model may be in another folder on another node, under the same name. So may a workload, of which node 0
        # sends what is run.
        workload = self.prompts_file and Path(self.prompts_file).name
        values = {**self.same_settings(), **{name: getattr(self, name) for name in names}}
        values |= {"model": self.model_shown, "prompts_file": workload}
        told = {flag_of(name): as_compared(value) for name, value in values.items()}
        told["vLLM's flags"] = told.pop("--engine-args")
        return told

    def arguments_hash(self) -> str:
        return _hash_of(self.arguments())


def wants_whole_experts(words: Iterable[str]) -> bool:
    return _is_on(EXPERTS_FLAG, words, short="-ep")


def _is_on(flag: str, words: Iterable[str], short: str | None = None) -> bool:
    """Whether a switch of vLLM is on in a command line; the last word counts, as it does for vLLM."""
    known = {flag: True, short: True, flag.replace("--", "--no-", 1): False}
    said = [known[word] for word in (word.replace("_", "-") for word in words) if word in known]
    return bool(said and said[-1])


def as_compared(value: Any) -> str:
    """As it is written after a flag. A long value is cut to its beginning and what tells it from others."""
    if value is None or value == []:
        return "not given"
    if isinstance(value, (list, tuple)):
        value = (" " if isinstance(value, list) else ",").join(map(str, value))
    text = json.dumps(str(value))[1:-1]
    return text if len(text) <= 200 else f"{text[:150]} ({_hash_of({'': text})})"


def _resolved(model: str) -> Path | None:
    """The real path of a folder or file; None for a hub name."""
    path = Path(model).expanduser()
    try:
        return path.resolve() if path.is_dir() or path.is_file() else None
    except OSError:  # too long for a file name
        return None


def _flags_with_values(words: Sequence[str]) -> Iterator[str]:
    """--block_size=16 and --block-size 16 alike: "--block-size 16"."""
    flag: list[str] = []
    for word in words:
        if word.startswith("-"):
            if flag:
                yield " ".join(flag)
            name, *value = word.split("=", 1)
            flag = [name.replace("_", "-"), *value]
        else:
            flag.append(word)
    if flag:
        yield " ".join(flag)


def _hash_of(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def flag_of(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")
