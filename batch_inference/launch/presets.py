"""The table of presets in run_batch_experiments.sh: from its lines to settings."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from batch_inference.core.config import EXPERTS_FLAG, ConfigError, ExperimentConfig, wants_whole_experts
from batch_inference.core.text import counted, listed, quoted
from batch_inference.core.values import device_count
from batch_inference.launch.options import Options

_KEYS = ("TP", "PP", "DP")
# N: the number of devices, over all nodes.
_WORD = re.compile(
    r"(?P<key>TP|PP|DP)=(?P<size>[0-9]{1,9}|N(/[0-9]{1,9})?)|torchrun|experts|suffix=(?P<suffix>[\w.-]+)"
)


@dataclass(frozen=True)
class Setting:
    """One setting of a preset."""

    tp: int
    pp: int
    dp: int
    torchrun: bool = False
    suffix: str | None = None
    flags: tuple[str, ...] = ()  # for the experiment script
    nodes: int = 1  # how many it is spread over
    experts: bool = False  # whole experts on each device, by the word or by a flag

    @property
    def num_devices(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def name(self) -> str:
        """From the sizes, as the experiment script would name it, plus the suffix."""
        backend = "external_launcher" if self.torchrun else None
        sizes = ExperimentConfig(
            tensor_parallel_size=self.tp, pipeline_parallel_size=self.pp, data_parallel_size=self.dp,
            distributed_executor_backend=backend, nnodes=self.nodes,
            engine_args=(EXPERTS_FLAG,) if self.experts else (),
        )  # fmt: skip
        # Before the name itself said so, a suffix did.
        suffix = None if self.experts and self.suffix == "ep" else self.suffix
        return f"{sizes.setting_name}_{suffix}" if suffix else sizes.setting_name

    def flags_beside(self, given: Iterable[str]) -> tuple[str, ...]:
        """Its own flags, in addition to those `given` for all settings."""
        is_said = wants_whole_experts([*self.flags, *given])
        return self.flags if is_said or not self.experts else (EXPERTS_FLAG, *self.flags)


@dataclass
class Preset:
    """What the preset's function in the table says."""

    name: str
    comment: str
    settings: list[list[str]] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    made_by: str | None = None
    is_search: bool = False
    is_demo: bool = False
    goes_on: bool = False  # continues in the files of a first part

    def over(self, workload: str) -> Preset:
        """A second part: the same settings with a workload."""
        return replace(self, flags=[*without("--seq-lens", self.flags), "--prompts-file", workload], goes_on=True)

    @property
    def folder(self) -> str | None:
        """Its own folder, if it has one."""
        return f"{self.name}_results" if self.is_demo else None

    def words_of_settings(self, words: Sequence[str]) -> list[list[str]]:
        """The words of each setting. `words`: the user's, after the preset's name. Raises ConfigError."""
        if self.made_by:
            return MADE_BY[self.made_by](words)
        self.check_no_words(words)
        return self.settings

    def check_no_words(self, words: Sequence[str]) -> None:
        """Raises ConfigError."""
        if words:
            raise ConfigError(f"{quoted(words[0])} is one word too many after the preset {self.name}")


def without(name: str, flags: Sequence[str]) -> list[str]:
    """The flags of a preset without this one, which something from the user replaces."""
    kept: list[str] = []
    rest = iter(flags)
    for word in rest:
        flag, equals, _ = word.partition("=")
        if flag != name:
            kept.append(word)
        elif not equals:
            next(rest, None)
    return kept


def read_table(text: str) -> dict[str, Preset]:
    """The presets by their names, in the order of the file. Raises ConfigError."""
    presets: dict[str, Preset] = {}
    for line in filter(None, text.split("\x1e")):
        *words, rest = line.split("\x1f")
        match [*words, rest] if rest else words:
            case ["preset", name, comment]:
                preset = presets[name] = Preset(name, comment)
            case ["setting", *words]:
                preset.settings.append(words)
            case ["flags", *words]:
                preset.flags += words
            case [("demo" | "search") as what]:
                setattr(preset, f"is_{what}", True)
            case ["made_by", name]:
                if name not in MADE_BY:
                    raise ConfigError(f"preset {preset.name}: 'made_by {name}': it is one of {listed(MADE_BY)}")
                preset.made_by = name
            case _:
                raise ConfigError(f"preset {preset.name}: '{' '.join(line.split())}' is not a line of a preset")
    return presets


def find_preset(presets: dict[str, Preset], name: str) -> Preset:
    """Raises ConfigError."""
    if name not in presets:
        raise ConfigError(f"{quoted(name)} is not a preset; choose one of: {' '.join(presets)}")
    return presets[name]


def settings_of(
    preset: Preset, options: Options, devices: int, spread: Callable[[Setting], Setting] = lambda setting: setting
) -> tuple[list[Setting], list[str]]:
    """The settings without repeats, and a line for each that is left out because it does not exist with so many
    devices. `spread`: over nodes. Raises ConfigError."""
    settings: dict[str, Setting] = {}
    left_out = []
    for line in preset.words_of_settings(options.words):
        try:
            setting = spread(_setting(line, devices, preset.flags, options.flags))
        except _NoneHereError as error:
            left_out.append(f"{shlex.join(line)} is left out: {error}")
            continue
        except ValueError as error:
            raise ConfigError(f"preset {preset.name}: 'setting {shlex.join(line)}': {error}") from None
        if settings.setdefault(setting.name, setting) != setting:
            raise ConfigError(f"preset {preset.name}: two settings are named {setting.name}; give one a suffix=WORD")
    return list(settings.values()), left_out


def has_n(preset: Preset, options: Options) -> bool:
    """Whether one of its sizes depends on the number of devices. Raises ConfigError."""
    words = itertools.chain.from_iterable(preset.words_of_settings(options.words))
    return any(match and match["size"] and match["size"].startswith("N") for match in map(_WORD.fullmatch, words))


class _NoneHereError(Exception):
    """A setting that does not exist with these devices."""


def _setting(words: Sequence[str], devices: int, before: Sequence[str] = (), after: Sequence[str] = ()) -> Setting:
    """`before` and `after` its words: the flags for all settings. Raises _NoneHereError, and ValueError for words that
    mean nothing."""
    head = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    found: dict[str, str] = {}
    for word in head:
        match = _WORD.fullmatch(word)
        if not match:
            raise ValueError(f"{quoted(word)} is neither a flag nor TP=N, PP=N, DP=N, experts, torchrun, suffix=WORD")
        name, _, value = word.partition("=")
        if name in found:
            raise ValueError(f"{name} is given twice")
        found[name] = value
    tp, pp, dp = (_size(key, found.get(key, "1"), devices) for key in _KEYS)
    if "experts" in found and tp * dp == 1:
        raise _NoneHereError("experts are divided among TP x DP devices, which is 1")
    flags = tuple(words[len(head) :])
    experts = wants_whole_experts([*before, *([EXPERTS_FLAG] if "experts" in found else []), *flags, *after])
    return Setting(tp, pp, dp, "torchrun" in found, found.get("suffix"), flags, experts=experts)


def _size(key: str, text: str, devices: int) -> int:
    """2 -> 2, N -> the number of devices, N/2 -> half of it."""
    whole, _, part = text.partition("/")
    number, divisor = devices if whole == "N" else int(whole), int(part or "1")
    if divisor == 0 or (number == 0 and whole != "N"):
        raise ValueError(f"{key}={text} is not a size")
    if number % divisor or number == 0:
        raise _NoneHereError(f"{text} of {counted(devices, 'device')} is not a whole number")
    return number // divisor


def _custom(words: Sequence[str]) -> list[list[str]]:
    """One setting with the user's own sizes."""
    found: dict[str, str] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if word != "experts" and (not equals or key not in _KEYS):
            raise ConfigError(f"custom: {quoted(word)} was given, but TP=N, PP=N, DP=N or experts is needed")
        if key in found:
            raise ConfigError(f"custom: {key} is given twice")
        try:
            found[key] = f"{key}={device_count(text)}" if equals else word
        except ValueError as error:
            raise ConfigError(f"custom {key}: {quoted(text)} was given; {error}") from None
    if not set(_KEYS) & set(found):
        raise ConfigError("custom: at least one of TP=N, PP=N, DP=N is needed")
    return [list(found.values())]


# For `made_by` in the table: the user's words after the preset's name -> the words of each setting.
MADE_BY: dict[str, Callable[[Sequence[str]], list[list[str]]]] = {"custom": _custom}
