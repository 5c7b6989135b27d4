"""The flags of the experiment script: the parser, the checks of one flag and of several, and vLLM's own flags."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

from batch_inference.core.config import (
    LIMITS,
    MIN_RUNS,
    PREFIX_FLAG,
    ConfigError,
    ExperimentConfig,
    as_compared,
    flag_of,
)
from batch_inference.core.parser import Parser
from batch_inference.core.secrets import dashed_secret, left_placeholder
from batch_inference.core.text import has_control, quoted
from batch_inference.core.values import AUTO, AUTO_LENGTH, LONGEST_NAME_BYTES, OWN_END, one_of, without_value

# Its lock, its journal, its logs and its temporary file lie beside a result file and are named after it.
_LONGEST_FILE_NAME_BYTES = LONGEST_NAME_BYTES - 35

DESCRIPTION = """\
Measure one TP/PP/DP setting of a model on vLLM: every batch size at every
prompt length, or a workload of your own, with one engine load. Any other vLLM
engine flag (--load-format dummy, --quantization fp8 ...) is passed on to vLLM."""

EPILOG = """\
example:
  python batch_inference_experiment.py --model meta-llama/Llama-3.1-8B \\
      --tensor-parallel-size 2 --batch-sizes 1,16,64 --seq-lens 512,2048

exit codes:
  0 every point is ok
  1 some work failed (the result file says which), or the plan cannot run
  2 wrong use
  129, 130, 143 interrupted; finished points are kept"""

# Flags that only a plan takes, to describe another machine.
PLAN_FLAGS = ("--devices", "--device-memory-gib")

# vLLM flags that this program sets itself, and why a user's own value would break the measurement.
_REPLICAS_ARE_OURS = "this program starts the replicas; use --data-parallel-size"
SCHEDULER_FLAG = "--scheduler-cls"
OWNED_BY_US = {
    "--config": "write its flags on the command line, so that they are checked and kept in the file",
    PREFIX_FLAG: "cached prefixes would count as computed prompt tokens; use it with a workload (--prompts-file)",
    "--disable-log-stats": "the request times come from vLLM's own statistics",
    "--enable-mfu-metrics": "it is always on, for MFU and MBU",
    "--jit-monitor-verbose": "it is always on, so that kernels compiled late are noticed",
    "--worker-extension-cls": "it is used to ask the workers for their memory",
    "--data-parallel-backend": _REPLICAS_ARE_OURS,
    "--data-parallel-rank": _REPLICAS_ARE_OURS,
    "--data-parallel-size-local": _REPLICAS_ARE_OURS,
    "--data-parallel-address": _REPLICAS_ARE_OURS,
    "--data-parallel-rpc-port": _REPLICAS_ARE_OURS,
}


def _argparse_type(field: dataclasses.Field[Any]) -> Callable[[str], Any]:
    choices = field.metadata["options"].get("choices")
    parse = one_of(choices) if choices else field.metadata["parse"]

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise ConfigError(f"{flag_of(field.name)}: {quoted(text)} was given; {error}") from None

    return convert


# Kept, because a plan parses the words of every setting.
@functools.cache
def build_parser() -> argparse.ArgumentParser:
    usage = "python batch_inference_experiment.py [flags] [vLLM engine flags]"
    parser = Parser(ConfigError, usage=usage, description=DESCRIPTION, epilog=EPILOG)
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
        if not options.keys() & {"choices", "metavar"}:
            options["metavar"] = _metavar(field)
        options["type"] = _argparse_type(field)
        parser.add_argument(name, default=field.default, help=field.metadata["help"] + suffix, **options)
    return parser


def _metavar(field: dataclasses.Field[Any]) -> str:
    if field.type == tuple[int, ...]:
        return "N,N,.."
    if field.type in (float, float | None):
        return "X"
    return "N" if field.type in (int, int | None) else field.name.rpartition("_")[2].upper()


def parse_flags(argv: Sequence[str]) -> tuple[ExperimentConfig, list[str]]:
    """Flags -> configuration and notes for the user. Raises ConfigError for anything wrong in the flags alone."""
    # Before anything is parsed: argparse would take the -h of -hush for --help.
    if flag := dashed_secret(argv):
        raise value_with_dash(flag)
    if left := left_placeholder(argv):
        raise ConfigError(f"{left} is a placeholder for a secret; put the value in its place")
    words = _long_flags(argv)
    if flag := without_value(words):
        raise ConfigError(f"{flag}: '--' was given, which is not a value; give one")
    namespace, rest = build_parser().parse_known_args(words)
    _check_engine_args(rest, has_workload=namespace.prompts_file is not None)
    if namespace.prompts_file is not None and _is_given("--seq-lens", words):
        raise ConfigError(
            f"--seq-lens {','.join(map(str, namespace.seq_lens))}: a workload has its own lengths; drop this flag or "
            "--prompts-file"
        )
    values = vars(namespace)
    notes = _drop_repeats(values)
    config = ExperimentConfig(**values, engine_args=tuple(rest))
    _check_together(config)
    return config, notes


def _drop_repeats(values: dict[str, Any]) -> list[str]:
    """Drops what a list of sizes repeats; returns notes for the user."""
    notes = []
    for name in ("batch_sizes", "seq_lens", "max_num_batched_tokens"):
        if not isinstance(values[name], tuple):
            continue
        unique = tuple(dict.fromkeys(values[name]))
        if len(unique) < len(values[name]):
            notes.append(f"{flag_of(name)}: repeats are dropped; {','.join(map(str, unique))} will be measured")
            values[name] = unique
    if isinstance(budgets := values["max_num_batched_tokens"], tuple) and len(budgets) == 1:
        values["max_num_batched_tokens"] = budgets[0]
    return notes


def without_plan_flags(words: Sequence[str]) -> list[str]:
    """The same words without the flags that only a plan takes."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, equals, _ = word.partition("=")
        if flag not in PLAN_FLAGS:
            kept.append(word)
        elif not equals:
            next(rest, None)
    return kept


def _long_flags(argv: Sequence[str]) -> list[str]:
    """-tp 2 -> --tensor-parallel-size 2. argparse would accept -t for -tp even with abbreviations off."""
    known = {field.metadata["short"]: flag_of(field.name) for field in dataclasses.fields(ExperimentConfig)
             if field.metadata.get("short")}  # fmt: skip
    return [known.get((parts := word.partition("="))[0], parts[0]) + parts[1] + parts[2] for word in argv]


def _is_given(flag: str, words: Sequence[str]) -> bool:
    return any(word.partition("=")[0] == flag for word in words)


def _check_engine_args(words: Sequence[str], *, has_workload: bool) -> None:
    """Find the mistakes in the words left for vLLM that can be seen without vLLM."""
    ours = [flag_of(field.name) for field in dataclasses.fields(ExperimentConfig) if "help" in field.metadata]
    if words and not words[0].startswith("-"):
        raise ConfigError(f"{quoted(words[0])} is not a flag; write lists with commas, like --batch-sizes 1,4,8")
    for word in words:
        _check_engine_word(word)
        if not word.startswith("--"):
            continue
        flag = word.partition("=")[0].replace("_", "-")
        if flag in OWNED_BY_US and not (flag == PREFIX_FLAG and has_workload):
            raise owned_by_us(flag)
        if flag in ours:
            raise ConfigError(f"{word.partition('=')[0]} is written {flag} here")
        longer = [name for name in ours if name.startswith(flag)]
        if longer:
            raise ConfigError(f"{flag} is an abbreviation; write {' or '.join(longer)}")


def value_with_dash(flag: str) -> ConfigError:
    return ConfigError(f"{flag}: its value begins with -; join flag and value with =")


def _check_engine_word(word: str) -> None:
    # JSON may be written over several lines.
    if has_control(word, allowed="\n\t"):
        raise ConfigError(f"{quoted(word)} contains control characters; leave them out")
    if word == "--":
        raise ConfigError("-- has no meaning here: vLLM's flags go beside those of this program; leave it out")


def owned_by_us(flag: str) -> ConfigError:
    return ConfigError(f"{flag} cannot be passed on to vLLM: {OWNED_BY_US[flag]}")


def unknown_flag_message(flag: str, vllm_flags: Sequence[str]) -> str:
    """What to say about a flag that neither we nor vLLM know."""
    ours = [flag_of(field.name) for field in dataclasses.fields(ExperimentConfig)]
    near = difflib.get_close_matches(flag.partition("=")[0], [*ours, *vllm_flags], n=1)
    advice = f"did you mean {near[0]}?" if near else "see --help, and vLLM's own engine flags"
    return f"{flag} is not a flag of this program or of vLLM; {advice}"


def _check_together(config: ExperimentConfig) -> None:
    if config.overwrite and config.resume:
        raise ConfigError("--overwrite and --resume exclude each other; give only one")
    _check_search(config)
    _check_workload(config)
    _check_answers(config)
    if config.prompts_file is None:
        check_longest(config)
    if config.devices is not None and not config.dry_run:
        raise devices_without_plan(config.devices)
    _check_names(config)
    _check_runs(config)
    _check_backend(config)
    _check_nodes(config)


def _check_search(config: ExperimentConfig) -> None:
    for name in () if config.searches else ("goal", "to_beat", *LIMITS):
        if (value := getattr(config, name)) != getattr(ExperimentConfig, name):
            raise ConfigError(
                f"{flag_of(name)} {as_compared(value)}: it works only with --batch-sizes {AUTO}; add that, or drop it"
            )
    for name in ("max_latency_s", "max_ttft_s") if config.prompts_file else ():
        if (value := getattr(config, name)) is not None:
            raise ConfigError(
                f"{flag_of(name)} {as_compared(value)}: the requests of a workload wait in one queue, so their waiting "
                "times are those of the sample; drop it, or limit --max-tpot-s"
            )


def check_longest(config: ExperimentConfig) -> None:
    """For a workload, once its file is read. Raises ConfigError."""
    longest = config.max_model_len
    if longest not in (None, AUTO_LENGTH) and config.longest_request > longest:
        raise ConfigError(
            f"{config.longest_in_words}, more than --max-model-len {longest}; raise it or shorten the requests"
        )


def _check_answers(config: ExperimentConfig) -> None:
    if config.compare_answers and config.engine_word("--load-format") == "dummy":
        raise ConfigError(
            "--compare-answers: --load-format dummy gives each device other weights; give a model with real weights, "
            "or drop it"
        )


def _check_workload(config: ExperimentConfig) -> None:
    if config.prompts_file is None:
        for name in ("output_lengths", "sample", "order", "skip_bad_lines"):
            if (value := getattr(config, name)) != getattr(ExperimentConfig, name):
                given = flag_of(name) if value is True else f"{flag_of(name)} {value}"
                raise ConfigError(f"{given}: it works only with a workload; add --prompts-file FILE, or drop it")
    elif config.output_lengths == OWN_END and config.engine_word("--load-format") == "dummy":
        raise ConfigError(
            f"--output-lengths {OWN_END}: dummy weights (--load-format) never end an answer; give a model with "
            "real weights, or another --output-lengths"
        )
    if config.changes_limits and (scheduler := config.engine_word(SCHEDULER_FLAG)):
        raise ConfigError(
            f"{SCHEDULER_FLAG} {scheduler}: several batch sizes of a workload, or several --max-num-batched-tokens, "
            "are measured on one engine load with this program's own scheduler; give one of each, or drop it"
        )


def devices_without_plan(devices: int) -> ConfigError:
    return ConfigError(
        f"--devices {devices}: it is only for a plan; add --dry-run, or drop it: a measurement uses this machine's "
        "devices (CUDA_VISIBLE_DEVICES chooses among them)"
    )


def _check_names(config: ExperimentConfig) -> None:
    """The parts of a path were checked one by one; the file name is made from them."""
    path = config.output_path
    if len(os.fsencode(path.name)) > _LONGEST_FILE_NAME_BYTES:
        flag, text = ("--output-file", path.name) if config.output_file else ("--name", config.setting_name)
        raise ConfigError(
            f"{flag}: {quoted(text)} was given, which makes a file name of {len(os.fsencode(path.name))} bytes; "
            f"at most {_LONGEST_FILE_NAME_BYTES} are allowed, because the files beside it have longer names; shorten it"
        )


def _check_runs(config: ExperimentConfig) -> None:
    """Either exactly --num-runs, or as many as --target-ci needs."""
    if config.num_runs is None:
        if config.max_runs < MIN_RUNS:
            raise ConfigError(
                f"--max-runs {config.max_runs}: at least {MIN_RUNS} runs are made; "
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
        raise ConfigError(f"--distributed-executor-backend uni runs one device, but TP x PP is {size}; use mp")
    if backend == "ray" and config.packed:
        raise ConfigError(
            "--packed (the launcher's --pack) shares out the devices of this machine, but Ray assigns its cluster's; "
            "drop it, or --distributed-executor-backend ray"
        )


def _check_one_node(config: ExperimentConfig) -> None:
    """Under torchrun, which numbers the nodes itself, these flags do no harm."""
    if config.distributed_executor_backend == "external_launcher":
        return
    for name in ("node_rank", "master_addr"):
        if value := getattr(config, name):
            raise ConfigError(
                f"{flag_of(name)} {value}: without --nnodes there is one node; add --nnodes N, or drop it"
            )


def _check_nodes(config: ExperimentConfig) -> None:
    backend, size = config.distributed_executor_backend, config.devices_per_replica
    if config.nnodes == 1:
        _check_one_node(config)
        return
    if backend not in (None, "mp"):
        raise ConfigError(
            f"--nnodes {config.nnodes} works only with --distributed-executor-backend mp, but {backend} was given; "
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
