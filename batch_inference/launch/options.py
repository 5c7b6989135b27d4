"""The launcher's own options, each declared once with its default, help and check."""

# A new option is one field of Options and its use; parsing and --help follow.

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from batch_inference.core.config import MEETING_SECRET, ConfigError, ExperimentConfig, flag_of
from batch_inference.core.text import listed, quoted, wrapped
from batch_inference.core.values import GOALS, non_empty, one_of, path_text, seconds

_FLAGS = {field.name: field for field in dataclasses.fields(ExperimentConfig)}
_NEED_NODES = ("master_port", "node_rank", "wait_for_nodes_s", "settle_s", "meeting_secret")
# In --help, the width before an option's help.
_COLUMN = 24


def _option(
    default: Any,
    help_text: str,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
    gives: str | None = None,
) -> Any:
    """Without a metavar it is a switch. `gives`: the flag that it stands for in the experiment script."""
    metadata = {"help": help_text, "metavar": metavar, "parse": parse, "gives": gives}
    return dataclasses.field(default=default, metadata=metadata)


def _flag(name: str, metavar: str | None = None, *, help_text: str | None = None, is_passed_on: bool = True) -> Any:
    """An option that is also a flag of the experiment script, with its default, its check and, unless another is given,
    its help. If it is not passed on, the launcher builds the script's words itself."""
    field = _FLAGS[name]
    gives = flag_of(name) if is_passed_on else None
    return _option(field.default, help_text or field.metadata["help"], metavar, field.metadata["parse"], gives)


@dataclass(frozen=True)
class Options:
    """What the user asks of the launcher, in the order of --help."""

    model: str = _flag("model", "MODEL")
    batch_sizes: tuple[int, ...] = _flag("batch_sizes", "N,N,..")
    seq_lens: tuple[int, ...] = _flag("seq_lens", "N,N,..")
    prompts_file: str | None = _flag("prompts_file", "FILE")
    goal: str = _option(
        GOALS[0], f"for best, and for --batch-sizes auto: {listed(GOALS)}", "GOAL", one_of(GOALS), gives="--goal"
    )
    max_latency_s: float | None = _flag(
        "max_latency_s",
        "S",
        help_text="for best, and for --batch-sizes auto: upper limit of the p99 latency of a batch",
    )
    max_ttft_s: float | None = _flag("max_ttft_s", "S")
    max_tpot_s: float | None = _flag("max_tpot_s", "S")
    budget_device_minutes: float | None = _option(
        None, "for best: end the search before it takes more than this (devices x minutes)", "B", seconds
    )
    device_hour_price: float | None = _option(
        None, "for best: price of one device for an hour, for --goal cost", "PRICE", seconds
    )
    job: bool = _option(False, "for quickstart: also measure a small workload, as a second part")
    output_dir: str | None = _option(
        None, f"folder of the result files (default: {_FLAGS['output_dir'].default})", "DIR", path_text
    )
    resume: bool = _flag("resume")
    overwrite: bool = _flag("overwrite")
    pack: bool = _option(
        False, "run settings side by side where devices are free; their points are marked", gives="--packed"
    )
    dry_run: bool = _flag("dry_run", help_text="print the plan and the commands, and stop", is_passed_on=False)
    json: bool = _option(False, "with --dry-run: the plan as JSON, a list with an object for each setting")
    devices: int | None = _flag(
        "devices",
        "N",
        help_text="for best: use this many; with --dry-run: plan for this many GPUs instead of this machine's devices",
        is_passed_on=False,
    )
    device_memory_gib: float | None = _flag("device_memory_gib", "X", is_passed_on=False)
    master_addr: str | None = _flag(
        "master_addr",
        "HOST",
        help_text="for several nodes: the address of one of them, which is node 0; run the same command on each",
        is_passed_on=False,
    )
    master_port: int = _flag(
        "master_port",
        "PORT",
        help_text="port where the nodes meet; the ports after it, two for each setting, must be free there too",
        is_passed_on=False,
    )
    nnodes: int | None = _option(
        None,
        "nodes to spread each setting over evenly (default: as few of those that come as can hold it)",
        "N",
        _FLAGS["nnodes"].metadata["parse"],
    )
    node_rank: int | None = _option(
        None,
        "number of this node (default: SLURM_NODEID; otherwise 0 if HOST is an address of this machine, and the others "
        "in order of arrival)",
        "N",
        _FLAGS["node_rank"].metadata["parse"],
    )
    wait_for_nodes_s: float = _option(600.0, "seconds to wait for other nodes", "S", seconds)
    settle_s: float = _option(
        15.0, "without --nnodes: seconds from the last node's arrival until node 0 begins", "S", seconds
    )
    meeting_secret: str | None = _option(
        None,
        f"secret that a node must know to take part; better set in {MEETING_SECRET}, which ps does not show",
        "WORD",
        non_empty,
    )
    help: bool = _option(False, "show this help")

    preset: str | None = None
    words: tuple[str, ...] = ()  # after the preset's name
    passed_on: tuple[str, ...] = ()  # the options above as flags of the experiment script, in the user's order
    flags: tuple[str, ...] = ()  # after --

    @property
    def is_over_nodes(self) -> bool:
        return self.master_addr is not None and self.nnodes != 1


_OPTIONS = {flag_of(field.name): field for field in dataclasses.fields(Options) if "help" in field.metadata}


def parse_options(words: Sequence[str]) -> Options:
    """Raises ConfigError for what is wrong with any preset."""
    end = words.index("--") if "--" in words else len(words)
    given: dict[str, Any] = {}
    plain: list[str] = []
    passed_on: list[str] = []
    rest = iter(words[:end])
    for word in rest:
        if not word.startswith("-"):
            plain.append(word)
            continue
        flag, text = _with_value("--help" if word == "-h" else word, rest)
        field = _OPTIONS[flag]
        given[field.name] = True if text is None else _value_of(flag, text)
        if field.metadata["gives"]:
            passed_on += [field.metadata["gives"], *([] if text is None else [text])]
    if "help" not in given:
        _check_plan(given)
        _check_nodes(given)
    return Options(
        **given,
        preset=plain[0] if plain else None,
        words=tuple(plain[1:]),
        passed_on=tuple(passed_on),
        flags=tuple(words[end + 1 :]),
    )


def _with_value(word: str, rest: Iterator[str]) -> tuple[str, str | None]:
    """An option and its value, which may be the next word; None for a switch. Raises ConfigError."""
    flag, equals, text = word.partition("=")
    if flag not in _OPTIONS:
        raise ConfigError(f"{flag}: unknown option; see --help (flags for the experiment script go after --)")
    if _OPTIONS[flag].metadata["metavar"] is None:
        if equals:
            raise ConfigError(f"{flag}: {quoted(text)} was given, but it takes no value")
        return flag, None
    if not equals:
        text = next(rest, "")
    if not text or (text.startswith("-") and not equals):
        raise ConfigError(f"{flag}: a value is needed")
    return flag, text


def _value_of(flag: str, text: str) -> Any:
    try:
        return _OPTIONS[flag].metadata["parse"](text)
    except ValueError as error:
        raise ConfigError(f"{flag}: {quoted(text)} was given; {error}") from None


def _check_plan(given: dict[str, Any]) -> None:
    """Raises ConfigError for options of a plan without a plan. A search takes --devices too."""
    if "dry_run" in given:
        return
    if "json" in given:
        raise ConfigError("--json: it works only with a plan; add --dry-run")


def _check_nodes(given: dict[str, Any]) -> None:
    """Fills in the number of this node if it is known. Raises ConfigError."""
    nnodes = given.get("nnodes")
    # Without it each node would run the whole preset by itself.
    for name in () if {"master_addr", "nnodes"} & set(given) else _NEED_NODES:
        if name in given:
            raise ConfigError(f"{flag_of(name)}: '{given[name]}' was given without --master-addr HOST; add it")
    if nnodes == 1 or not {"master_addr", "nnodes"} & set(given):
        return
    # Under Slurm each node can be given the same command.
    if "node_rank" not in given and (number := os.environ.get("SLURM_NODEID")):
        given["node_rank"] = _value_of("--node-rank", number)
    if nnodes and given.get("node_rank", 0) >= nnodes:
        raise ConfigError(
            f"--node-rank: '{given['node_rank']}' was given, but --nnodes {nnodes} allows {nnodes - 1} at most"
        )
    if given.get("pack"):
        flag = "nnodes" if nnodes else "master_addr"
        raise ConfigError(f"--pack: it shares out one node's devices, but {flag_of(flag)} '{given[flag]}' was given")


def options_help() -> list[str]:
    """The options, in a line or two each."""
    lines = []
    for flag, field in _OPTIONS.items():
        heading = f"  -h, {flag}" if flag == "--help" else f"  {flag} {field.metadata['metavar'] or ''}"
        if len(heading) >= _COLUMN:
            lines.append(heading.rstrip())
            heading = ""
        lines += wrapped(f"{heading:<{_COLUMN}}{field.metadata['help']}{_default_of(field)}", indent=_COLUMN)
    return lines


def _default_of(field: dataclasses.Field[Any]) -> str:
    if field.default in (None, False) or "default" in field.metadata["help"]:
        return ""
    shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    return f" (default: {shown:g})" if isinstance(shown, float) else f" (default: {shown})"
