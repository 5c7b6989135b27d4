"""Every flag once: name, type, default, help and check. Flags become one frozen ExperimentConfig."""

# No `from __future__ import annotations` here: the parser reads the field types.
import argparse
import dataclasses
import difflib
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

DESCRIPTION = """\
Measure one TP/PP/DP setting of a model on vLLM: every batch size at every
prompt length, on one engine load. Any other vLLM engine flag (--load-format
dummy, --quantization fp8, --kv-cache-dtype fp8 ...) is passed on to vLLM."""

EPILOG = """\
example:
  python batch_inference_experiment.py --model meta-llama/Llama-3.1-8B \\
      --tensor-parallel-size 2 --batch-sizes 1,16,64 --seq-lens 512,2048

exit codes:
  0 every point ok   1 some work failed (the file says which)
  2 wrong use        130, 143 interrupted; finished points are kept"""

# Fewer runs have an interval too, but one that is wide by chance alone.
MIN_RUNS = 3

BACKENDS = ("mp", "ray", "external_launcher", "uni")

# vLLM flags that this program sets itself, and why a user's own value would break the measurement.
_REPLICAS_ARE_OURS = "replicas are started by this program; use --data-parallel-size"
OWNED_BY_US = {
    "--config": "write its flags on the command line, so that they are checked and kept in the file",
    "--enable-prefix-caching": "cached prefixes would be counted as computed prompt tokens",
    "--disable-log-stats": "the request times come from vLLM's own statistics",
    "--enable-mfu-metrics": "it is always on, for MFU and MBU",
    "--jit-monitor-verbose": "it is always on, so that no kernel that is compiled late goes unnoticed",
    "--worker-extension-cls": "it is used to ask the workers for their memory",
    "--data-parallel-backend": _REPLICAS_ARE_OURS,
    "--data-parallel-rank": _REPLICAS_ARE_OURS,
    "--data-parallel-size-local": _REPLICAS_ARE_OURS,
    "--data-parallel-address": _REPLICAS_ARE_OURS,
    "--data-parallel-rpc-port": _REPLICAS_ARE_OURS,
}

_SECRET = re.compile(r"token$|key$|secret|password", re.IGNORECASE)


class ConfigError(Exception):
    """A mistake the user can fix: the message names the flag, the value found, and what to do."""


# --- values: text -> value; ValueError says what was expected -----------------------------------------------------


def positive_int(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError("a whole number of at least 1 is needed")
    return int(text)


def natural_int(text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError("a whole number of at least 0 is needed")
    return int(text)


def port(text: str) -> int:
    if not text.strip().isdecimal() or not 1 <= int(text) < 65535:
        raise ValueError("a port from 1 to 65534 is needed")
    return int(text)


def positive_ints(text: str) -> tuple[int, ...]:
    """Comma-separated sizes, in the order given; repeats stay and are dropped with a note by `parse_flags`."""
    try:
        return tuple(positive_int(part) for part in text.split(","))
    except ValueError:
        raise ValueError("whole numbers of at least 1 are needed, separated by commas, like 1,4,8") from None


def token_length(text: str) -> int:
    """A number of tokens; 32k and 32K mean 32,000 and 32,768 as in vLLM's own --max-model-len."""
    match = re.fullmatch(r"(\d+)([kK]?)", text.strip())
    if not match or int(match[1]) < 1:
        raise ValueError("a number of tokens of at least 1 is needed, like 4096")
    return int(match[1]) * {"": 1, "k": 1000, "K": 1024}[match[2]]


def _number_in(low: float, high: float, wanted: str, *, low_is_allowed: bool) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(wanted) from None
        # Written so that NaN fails too.
        if not (low < value <= high or (low_is_allowed and value == low)):
            raise ValueError(wanted)
        return value

    return parse


positive = _number_in(0, sys.float_info.max, "a number above 0 is needed", low_is_allowed=False)
fraction = _number_in(0, 1, "a number above 0 and up to 1 is needed", low_is_allowed=False)
interval = _number_in(0, 1, "a fraction above 0 and up to 1 is needed, like 0.02 for ±2 %", low_is_allowed=False)
temperature = _number_in(0, 100, "a number of at least 0 is needed", low_is_allowed=True)


def non_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("a value is needed")
    return text


# --- the flags ----------------------------------------------------------------------------------------------------


def _flag(
    default: Any,
    help_text: str,
    parse: Callable[[str], Any] | None = None,
    *,
    measured: bool = True,
    short: str | None = None,
    **argparse_options: Any,
) -> Any:
    """A field that is a flag. `measured`: it changes what is measured, and so is part of `settings_hash`."""
    metadata = {"help": help_text, "parse": parse, "measured": measured, "short": short, "options": argparse_options}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """What was asked: one field per flag, in the order of --help. None means: vLLM or the grid decides."""

    model: str = _flag("meta-llama/Llama-2-7b-chat-hf", "model folder or hub name", non_empty)
    tensor_parallel_size: int = _flag(1, "TP: devices that share each layer", positive_int, short="-tp")
    pipeline_parallel_size: int = _flag(1, "PP: stages that the layers are split into", positive_int, short="-pp")
    data_parallel_size: int = _flag(1, "DP: replicas of the model, each with its own batch", positive_int, short="-dp")
    distributed_executor_backend: str | None = _flag(
        None, "how vLLM runs its workers; default: uni for one device, mp for more", choices=BACKENDS
    )
    nnodes: int = _flag(1, "nodes that TP x PP is spread over; run the same command on each", positive_int)
    node_rank: int = _flag(0, "number of this node; node 0 writes the file", natural_int, measured=False)
    master_addr: str | None = _flag(None, "address of node 0, for --nnodes", non_empty, measured=False)
    master_port: int = _flag(29500, "port of node 0; the next one must be free too", port, measured=False)
    batch_sizes: tuple[int, ...] = _flag(
        (1, 4, 8, 16), "requests handed to each replica at once", positive_ints, measured=False
    )
    seq_lens: tuple[int, ...] = _flag((512, 1024, 2048), "prompt lengths in tokens", positive_ints, measured=False)
    max_tokens: int = _flag(128, "output tokens of each request, exact", positive_int, measured=False)
    max_model_len: int | None = _flag(None, "longest prompt plus output; default: what the grid needs", token_length)
    dtype: str = _flag(
        "auto", "weights and activations", choices=("auto", "half", "float16", "bfloat16", "float", "float32")
    )
    max_num_seqs: int | None = _flag(
        None, "requests that vLLM runs at once; default: the largest batch size", positive_int
    )
    max_num_batched_tokens: int | None = _flag(None, "tokens per engine step; default: vLLM's", positive_int)
    gpu_memory_utilization: float = _flag(
        0.8, "share of each device's memory for vLLM (on the CPU: of the main memory, for all)", fraction
    )
    temperature: float = _flag(0.8, "sampling temperature; 0 is greedy", temperature)
    top_p: float = _flag(0.95, "nucleus sampling", fraction)
    num_runs: int | None = _flag(
        None,
        f"timed runs per point, exactly; default: {MIN_RUNS} or more, as --target-ci and --max-runs say",
        positive_int,
    )
    target_ci: float = _flag(
        0.02, "runs go on until the 95 %% interval of the mean latency is within this fraction of it", interval
    )
    max_runs: int = _flag(10, "most timed runs per point", positive_int)
    warmup_runs: int = _flag(
        1, "fewest warm-ups per point; they go on, up to 5, until two in a row agree within 5 %%", positive_int
    )
    seed: int = _flag(0, "seed of prompts, weights and sampling", natural_int)
    enforce_eager: bool = _flag(False, "no compilation and no CUDA graphs")
    trust_remote_code: bool = _flag(False, "allow code that comes with the model")
    output_file: str | None = _flag(
        None, "result file; default: results/NAME_results.json; the log is beside it", non_empty, measured=False
    )
    name: str | None = _flag(None, "name of the setting; default: from the sizes, like tp_2", non_empty, measured=False)
    overwrite: bool = _flag(False, "replace an existing result file", measured=False)
    resume: bool = _flag(False, "keep the good points of an existing result file", measured=False)
    startup_timeout: float = _flag(1800, "seconds that an engine may take to start", positive, measured=False)
    point_timeout: float = _flag(
        900, "seconds without a finished run after which a point is given up", positive, measured=False
    )
    packed: bool = _flag(
        False, "say of every point that other settings run beside this one (the launcher's --pack)", measured=False
    )
    measure_peaks: bool = _flag(
        False, "measure what a device can do, for MFU and MBU; default: its datasheet", measured=False
    )
    verbose: bool = _flag(False, "show vLLM's log (of the first replica) on stderr too", measured=False)
    dry_run: bool = _flag(False, "print the plan and stop", measured=False)
    device_memory_gib: float | None = _flag(
        None, "for --dry-run on a machine without the GPUs: the memory of one of them", positive, measured=False
    )
    engine_args: tuple[str, ...] = ()  # vLLM's own flags, as given

    @property
    def num_devices(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size

    @property
    def devices_per_replica(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def fewest_runs(self) -> int:
        """Timed runs that every point has."""
        return self.num_runs or MIN_RUNS

    @property
    def runs_in_words(self) -> str:
        return str(self.num_runs) if self.num_runs else f"{MIN_RUNS} to {self.max_runs}"

    @property
    def devices_per_node(self) -> int:
        return self.num_devices // self.nnodes

    @property
    def devices_elsewhere(self) -> bool:
        """True where devices may be on other machines or are given out by Ray: who holds one reads it."""
        return self.nnodes > 1 or self.distributed_executor_backend in ("external_launcher", "ray")

    @property
    def longest_request(self) -> int:
        """Tokens of the longest request of the grid, prompt and output."""
        return max(self.seq_lens) + self.max_tokens

    @property
    def setting_name(self) -> str:
        """`name`, or one made from the sizes above 1: tp_2, tp_2_pp_2_dp_2; tp_1 where all are 1."""
        sizes = {
            "tp": self.tensor_parallel_size,
            "pp": self.pipeline_parallel_size,
            "dp": self.data_parallel_size,
        }
        parts = [f"{key}_{size}" for key, size in sizes.items() if size > 1] or ["tp_1"]
        prefix = ["torchrun"] if self.distributed_executor_backend == "external_launcher" else []
        return self.name or "_".join(prefix + parts)

    @property
    def output_conflict(self) -> str | None:
        """Why the output file may not be written; None where it may."""
        if self.overwrite or self.resume or not self.output_path.exists():
            return None
        return (
            f"--output-file {self.output_path}: it exists; give --resume to add to it, --overwrite to replace it, or "
            "another name"
        )

    @property
    def output_path(self) -> Path:
        return Path(self.output_file or f"results/{self.setting_name}_results.json")

    @property
    def log_path(self) -> Path:
        path = self.output_path
        return path.with_suffix(".log") if path.suffix == ".json" else path.with_name(path.name + ".log")

    def engine_word(self, flag: str) -> str | None:
        """The value of one of vLLM's own flags, with - for _; None where it isn't given."""
        words = [part for word in self.engine_args for part in word.replace("_", "-").split("=", 1)]
        return dict(itertools.pairwise(words)).get(flag)

    def engine_number(self, flag: str) -> int | None:
        """The same, where it is a plain number."""
        word = self.engine_word(flag)
        return int(word) if word and word.isdecimal() else None

    def points(self) -> Iterator[tuple[int, int]]:
        """(batch_size, seq_len) of the grid, lengths outermost."""
        return ((batch_size, seq_len) for seq_len in self.seq_lens for batch_size in self.batch_sizes)

    def measured_settings(self) -> dict[str, Any]:
        """The fields that change what a point measures. The grid is not among them, so that it may grow."""
        measured = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata.get("measured", True)
        }
        return {**measured, "engine_args": redact(self.engine_args)}

    def settings_hash(self) -> str:
        return _hash_of(self.measured_settings())

    def arguments_hash(self) -> str:
        """Equal where two processes are about to measure the same: settings and grid."""
        grid = (self.batch_sizes, self.seq_lens, self.max_tokens)
        return _hash_of({**self.measured_settings(), "grid": grid})


def _hash_of(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def redact(argv: Sequence[str]) -> list[str]:
    """The same words, with the values of flags such as --hf-token replaced by ***."""
    words: list[str] = []
    hide_next = False
    for word in argv:
        flag, equals, _ = word.partition("=")
        secret = flag.startswith("-") and bool(_SECRET.search(flag))
        if hide_next and not word.startswith("-"):
            words.append("***")
        else:
            words.append(f"{flag}=***" if secret and equals else word)
        hide_next = secret and not equals
    return words


# --- the parser ---------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def flag_of(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def _argparse_type(field: "dataclasses.Field[Any]") -> Callable[[str], Any]:
    parse = field.metadata["parse"]

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise ConfigError(f"{flag_of(field.name)}: {text!r} was given, {error}") from None

    return convert


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        usage="python batch_inference_experiment.py [flags] [vLLM engine flags]",
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in dataclasses.fields(ExperimentConfig):
        if "help" not in field.metadata:
            continue
        options = dict(field.metadata["options"])
        name = flag_of(field.name)
        if field.type is bool:
            parser.add_argument(name, action="store_true", help=field.metadata["help"])
            continue
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        suffix = "" if field.default is None else f" (default: {shown})"
        suffix = f", or {field.metadata['short']}{suffix}" if field.metadata["short"] else suffix
        if "choices" not in options:
            options |= {"metavar": _metavar(field), "type": _argparse_type(field)}
        parser.add_argument(name, default=field.default, help=field.metadata["help"] + suffix, **options)
    return parser


def _metavar(field: "dataclasses.Field[Any]") -> str:
    if field.type == tuple[int, ...]:
        return "N,N,.."
    if field.type in (float, float | None):
        return "X"
    return "N" if field.type in (int, int | None) else field.name.rpartition("_")[2].upper()


def parse_flags(argv: Sequence[str]) -> tuple[ExperimentConfig, list[str]]:
    """Flags -> configuration and notes for the user. Raises ConfigError for anything wrong in the flags alone."""
    namespace, rest = build_parser().parse_known_args(_long_flags(argv))
    _check_engine_args(rest)
    values = vars(namespace)
    notes = []
    for name in ("batch_sizes", "seq_lens"):
        unique = tuple(dict.fromkeys(values[name]))
        if len(unique) < len(values[name]):
            notes.append(f"{flag_of(name)}: repeats dropped, {','.join(map(str, unique))} is measured")
        values[name] = unique
    config = ExperimentConfig(**values, engine_args=tuple(rest))
    _check_together(config)
    return config, notes


def _long_flags(argv: Sequence[str]) -> list[str]:
    """-tp 2 -> --tensor-parallel-size 2. argparse itself would take -t for -tp, though abbreviations are off."""
    known = {field.metadata["short"]: flag_of(field.name) for field in dataclasses.fields(ExperimentConfig)
             if field.metadata.get("short")}  # fmt: skip
    return [known.get((parts := word.partition("="))[0], parts[0]) + parts[1] + parts[2] for word in argv]


def _check_engine_args(words: Sequence[str]) -> None:
    """Find mistakes in the words left for vLLM that need no vLLM to see."""
    ours = [flag_of(field.name) for field in dataclasses.fields(ExperimentConfig) if "help" in field.metadata]
    if words and not words[0].startswith("-"):
        raise ConfigError(f"{words[0]!r} is no flag; lists are written with commas, like --batch-sizes 1,4,8")
    for word in words:
        if not word.startswith("--"):
            continue
        flag = word.partition("=")[0].replace("_", "-")
        if flag in OWNED_BY_US:
            raise owned_by_us(flag)
        if flag in ours:
            raise ConfigError(f"{word.partition('=')[0]} is written {flag} here")
        longer = [name for name in ours if name.startswith(flag)]
        if longer:
            raise ConfigError(f"{flag} is an abbreviation; write {' or '.join(longer)}")


def owned_by_us(flag: str) -> ConfigError:
    return ConfigError(f"{flag} cannot be passed on to vLLM: {OWNED_BY_US[flag]}")


def unknown_flag_message(flag: str, vllm_flags: Sequence[str]) -> str:
    """What to say of a flag that neither we nor vLLM know."""
    ours = [flag_of(field.name) for field in dataclasses.fields(ExperimentConfig)]
    near = difflib.get_close_matches(flag.partition("=")[0], [*ours, *vllm_flags], n=1)
    advice = f"did you mean {near[0]}?" if near else "see --help, and vLLM's own engine flags"
    return f"{flag} is no flag of this program or of vLLM; {advice}"


def _check_together(config: ExperimentConfig) -> None:
    if config.overwrite and config.resume:
        raise ConfigError("--overwrite and --resume exclude each other; give one of them")
    if config.max_model_len is not None and config.longest_request > config.max_model_len:
        raise ConfigError(
            f"--seq-lens {max(config.seq_lens)} plus --max-tokens {config.max_tokens} is {config.longest_request}, "
            f"over --max-model-len {config.max_model_len}; raise it or shorten the requests"
        )
    _check_runs(config)
    _check_backend(config)
    _check_nodes(config)


def _check_runs(config: ExperimentConfig) -> None:
    """Either exactly --num-runs, or as many as --target-ci needs."""
    if config.num_runs is None:
        if config.max_runs < MIN_RUNS:
            raise ConfigError(
                f"--max-runs {config.max_runs}: {MIN_RUNS} runs are made at least; "
                f"raise it, or give --num-runs {config.max_runs}"
            )
        return
    for name in ("target_ci", "max_runs"):
        value = getattr(config, name)
        if value != getattr(ExperimentConfig, name):
            raise ConfigError(
                f"--num-runs {config.num_runs} means exactly {config.num_runs} runs, whatever {flag_of(name)} {value} "
                "says; drop one of them"
            )


def _check_backend(config: ExperimentConfig) -> None:
    backend, size = config.distributed_executor_backend, config.devices_per_replica
    if backend == "uni" and size > 1:
        raise ConfigError(f"--distributed-executor-backend uni runs one device, TP x PP is {size}; use mp")
    if backend == "ray" and config.packed:
        raise ConfigError(
            "--packed (--pack of the launcher) shares out the devices of this machine, Ray gives out its cluster's; "
            "drop it, or --distributed-executor-backend ray"
        )


def _check_nodes(config: ExperimentConfig) -> None:
    backend, size = config.distributed_executor_backend, config.devices_per_replica
    if config.nnodes == 1:
        return
    if backend not in (None, "mp"):
        raise ConfigError(
            f"--nnodes {config.nnodes} belongs to --distributed-executor-backend mp, {backend} was given; "
            "torchrun takes --nnodes itself, and Ray knows its nodes"
        )
    if config.data_parallel_size > 1:
        raise ConfigError(
            f"--nnodes {config.nnodes} with --data-parallel-size {config.data_parallel_size} needs torchrun; "
            "run_batch_experiments.sh --nnodes calls it"
        )
    if size % config.nnodes:
        raise ConfigError(f"--nnodes {config.nnodes} does not divide TP x PP, which is {size}")
    if config.node_rank >= config.nnodes:
        raise ConfigError(f"--node-rank {config.node_rank}: --nnodes {config.nnodes} goes up to {config.nnodes - 1}")
    if config.master_addr is None:
        raise ConfigError(f"--nnodes {config.nnodes} needs --master-addr too, the address of node 0")
