"""vLLM's own flags as somebody gave them, as settings by name: what vLLM's `--config`, EngineArgs and LLM take."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from batch_inference.core.values import size_with_suffix

# Of what a result file may hold; the sizes of the layout are flags of ours.
_SHORT = {
    "-q": "quantization", "-ep": "enable_expert_parallel", "-dcp": "decode_context_parallel_size",
    "-pcp": "prefill_context_parallel_size", "-sc": "speculative_config", "-cc": "compilation_config",
    "-ac": "attention_config", "-dc": "diffusion_config", "-O": "optimization_level",
}  # fmt: skip
# Sizes that vLLM's parser reads with a suffix, like 4G, and EngineArgs only as numbers.
_SIZES = ("max_num_scheduled_tokens", "kv_cache_memory_bytes", "safetensors_prefetch_block_size",
          "max_num_queued_tokens")  # fmt: skip
# What vLLM's parser makes lists of, also of one entry: of numbers, and of texts; and texts that may look like numbers.
_NUMBERS = ("cudagraph_capture_sizes", "numa_bind_nodes", "device_ids")
_TEXTS = ("kv_cache_dtype_skip_layers", "allowed_media_domains", "lora_target_modules", "ignore_patterns",
          "numa_bind_cpus", "collect_detailed_traces", "sleep_preserve_parameter_names", "logits_processors",
          "cpu_offload_params", "offload_params")  # fmt: skip
_TEXT = ("revision", "code_revision", "tokenizer_revision", "served_model_name")
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_FLAG = re.compile(r"-(?![\d.])")
_LEVEL = re.compile(r"-O=?(\d)")


def settings_of_words(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The words of a command line as settings, of a flag that stands twice the last; and the flags that cannot be
    written by their long name, because nobody knows it here, or it is none."""
    settings: dict[str, Any] = {}
    unknown = []
    for flag, values in _flags(words):
        name, *keys = (flag[2:] if flag.startswith("--") else _long(flag)).split(".")
        name = name.replace("-", "_")
        if not _NAME.fullmatch(name):
            unknown.append(flag)
        elif keys:
            _put(settings, [name, *keys], _of_part(keys[-1], values))
        elif not values:
            settings[name.removeprefix("no_")] = not name.startswith("no_")
        else:
            settings[name] = _of_flag(name, values)
    return settings, unknown


def _flags(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with its values."""
    flag, values = "", list[str]()
    for word in words:
        if not _FLAG.match(word):
            values.append(word)
            continue
        if flag:
            yield flag, values
        level = _LEVEL.fullmatch(word)
        name, equals, value = ("-O", "=", level[1]) if level else word.partition("=")
        flag, values = name, [value] if equals else []
    if flag:
        yield flag, values


def _long(flag: str) -> str:
    """-cc.mode -> compilation_config.mode; nothing for one that is not known."""
    short, dot, rest = flag.partition(".")
    return f"{_SHORT[short]}{dot}{rest}" if short in _SHORT else ""


def _of_flag(name: str, values: Sequence[str]) -> Any:
    if name in _NUMBERS:
        return list(map(_plain, values))
    if name in _TEXTS or len(values) > 1:
        return list(values)
    if name in _TEXT:
        return values[0]
    if name in _SIZES:
        return size_with_suffix(values[0]) or values[0]
    return _plain(values[0])


def _of_part(key: str, values: Sequence[str]) -> Any:
    """Of a flag like --kv-transfer-config.kv_role, as vLLM reads it: JSON, a size, or a text; after a + a list."""
    text = " ".join(values)
    if key.endswith("+"):
        return text.split(",")
    try:
        return json.loads(text)
    except ValueError:
        return size_with_suffix(text) or text


def _plain(text: str) -> Any:
    """A number or an object of JSON where it is one that is written back the same, else the text."""
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except ValueError:
            return text
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if str(number) == text and number not in (float("inf"), float("-inf")) and number == number:
            return number
    return text


def _put(settings: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """{"a": {"b": value}} for the keys a and b, beside what is there."""
    *parents, last = keys
    for key in parents:
        inner = settings.get(key)
        settings[key] = settings = dict(inner) if isinstance(inner, dict) else {}
    last = last.removesuffix("+")
    before = settings.get(last)
    settings[last] = [*before, *value] if isinstance(before, list) and isinstance(value, list) else value
