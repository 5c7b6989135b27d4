"""What vLLM, if installed, says about the settings of a plan: asked once for all of them, and kept.

It is asked in its own process (`meta_device`), which has ended by the time the answer is used. Needs only Python's own
library, because plans use it too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from batch_inference.core.config import SEPARATE, ConfigError, ExperimentConfig
from batch_inference.core.files import read_regular
from batch_inference.core.installed_vllm import cache_home, keep, kept, kept_path, vllm_folder, vllm_version
from batch_inference.core.secrets import is_secret_name, redact, redact_text
from batch_inference.core.text import counted, plain, quoted
from batch_inference.plan.devices import Devices, find_devices
from batch_inference.plan.memory import FORMULA, asked_gib
from batch_inference.plan.model import ModelFacts
from batch_inference.plan.model_place import expanded
from batch_inference.plan.needs import needs_of
from batch_inference.plan.obstacles import is_coupled, rules_against
from batch_inference.plan.said import Said

# Importing vLLM takes 10 to 20 s, and much longer on a network disk; after that, a setting takes a second or two.
LIMIT_VARIABLE = "BATCH_INFERENCE_PLAN_LIMIT_S"
_LIMIT_S, _LIMIT_PER_SETTING_S = 120.0, 10.0
# Without these, vLLM cannot be asked.
_NEEDED = ("engine/arg_utils.py", "distributed/parallel_state.py", "v1/core/kv_cache_utils.py")
# The files of a model's folder that tell its sizes; a tokenizer's files are large and say nothing.
_SAYING = ("*config.json", "params.json", "*.py")
_KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"


@dataclass(frozen=True)
class Question:
    """A setting, in the form in which vLLM is asked about it."""

    words: list[str]  # flags of its engine
    for_gpus: bool
    share_gib: float | None  # of a device's memory, for weights and KV cache together
    pool_gib: float | None  # what vLLM takes for the KV cache, whatever else is left
    requests: list[int]  # tokens of each, prompt and output


Setting = tuple[ExperimentConfig, ModelFacts | None, float | None]  # and the memory of a device in GiB


def ask_vllm(
    settings: Sequence[Setting], devices: Devices, say: Callable[[str], None], *, only_in_doubt: bool = False
) -> list[Said | None]:
    """The answer for each setting; None if vLLM is not installed or not to be asked.

    `only_in_doubt`: an engine is about to say it anyway, so asking is worth its seconds only if the formulas cannot
    tell that the setting can run. What was asked before is still used. Raises ConfigError if the limit is no number.
    """
    limit_s = _limit_s(len(settings))
    folder = vllm_folder() if limit_s else None
    if folder is None:
        return [None] * len(settings)
    version = vllm_version()
    if missing := [name for name in _NEEDED if not (folder / name).exists()]:
        return [Said(version, unknown=f"it has no {missing[0]}")] * len(settings)
    questions = [question_of(*setting, devices) for setting in settings]
    paths = [_answer_path(folder, question, config) for question, (config, *_) in zip(questions, settings, strict=True)]
    found = {path: _said(kept(path), version) for path in paths if path}
    asked = {
        path: question
        for path, question, setting in zip(paths, questions, settings, strict=True)
        if path and found[path] is None and not (only_in_doubt and _surely_runs(setting, devices))
    }
    if asked:
        found |= _asked(asked, kept_path(folder, "plans") / "vllm", limit_s, say)
    # About a config that is not on this machine, the plan says more than vLLM does.
    return [found[path] if path else None for path in paths]


def _surely_runs(setting: Setting, devices: Devices) -> bool:
    """Whether the formulas know all sizes, nothing speaks against the setting, and the weights take at most half of the
    share of a device, if that is known."""
    config, facts, memory_gib = setting
    if facts is None or rules_against(config, facts, devices):
        return False
    needs = needs_of(config, facts, devices, memory_gib, None)
    if needs.source != FORMULA or needs.unknown or needs.weights_gib is None:
        return False
    is_asked = asked_gib(config) is not None  # a pool of the user's own size, whatever else is left
    return is_asked or needs.pool_gib is None or needs.weights_gib <= needs.pool_gib


def _limit_s(count: int) -> float:
    text = os.environ.get(LIMIT_VARIABLE)
    if not text:
        return _LIMIT_S + _LIMIT_PER_SETTING_S * count
    if not text.isdecimal() or len(text) > 6:
        raise ConfigError(f"{LIMIT_VARIABLE}: {quoted(text)} is not a whole number of seconds; 0 plans by formula")
    return float(text)


def question_of(
    config: ExperimentConfig, facts: ModelFacts | None, memory_gib: float | None, devices: Devices
) -> Question:
    for_gpus = devices.kind == "gpu" or config.device_memory_gib is not None
    share_gib = memory_gib * config.gpu_memory_utilization if for_gpus and memory_gib else None
    space = "" if for_gpus else os.environ.get(_KV_SPACE, "")
    requests = list(config.request_tokens)
    words = [*_words(config, coupled=is_coupled(config, facts)), *config.engine_args]
    return Question(words, for_gpus, share_gib, float(space) if space.isdecimal() else None, requests)


def _words(config: ExperimentConfig, *, coupled: bool) -> Iterator[str]:
    """The flags that an engine of a replica is started with, without those that change no size."""
    values = {
        "--model": os.path.expanduser(config.model),  # noqa: PTH111 - not every model is a path
        "--tensor-parallel-size": config.tensor_parallel_size,
        "--pipeline-parallel-size": config.pipeline_parallel_size,
        "--data-parallel-size": config.data_parallel_size if coupled else None,
        # Workers hold the same whoever starts them; otherwise vLLM would look for Ray or torchrun.
        "--distributed-executor-backend": "mp" if config.devices_per_replica > 1 or coupled else None,
        "--max-model-len": config.max_model_len or config.longest_request,
        "--max-num-seqs": config.max_num_seqs or max(config.batch_sizes),
        "--max-num-batched-tokens": config.largest_budget,
        "--dtype": config.dtype,
    }
    for flag, value in values.items():
        if value is not None:
            yield from (flag, str(value))
    yield from ("--skip-tokenizer-init", "--no-enable-prefix-caching", "--enforce-eager")
    if config.trust_remote_code:
        yield "--trust-remote-code"


# --- asking ---------------------------------------------------------------------------------------------------------


def _asked(
    asked: dict[Path, Question], own_folder: Path, limit_s: float, say: Callable[[str], None]
) -> dict[Path, Said | None]:
    from batch_inference.core.child import ask_for_lines

    version = vllm_version()
    settings = counted(len(asked), "setting")
    say(f"note: asking vLLM {version} for the plan of {settings}; importing it takes several seconds, once")
    questions = [dataclasses.asdict(question) for question in asked.values()]
    told = json.dumps({"own_folder": str(own_folder), "questions": questions})
    lines, problem = ask_for_lines("plan.meta_device", told, timeout_s=limit_s)
    found: dict[Path, Said | None] = {}
    for path, line in zip(asked, lines, strict=False):
        found[path] = said = _said(line, version)
        if said and not line.get("may_pass"):
            keep(_without_secrets(line), path)
    reason = redact_text(problem or "no answer")
    if not all(found.get(path) for path in asked):
        say(f"note: vLLM {version} could not answer for the whole plan ({reason}); the rest is by formula")
    return {path: found.get(path) or Said(version, unknown=reason) for path in asked}


def _without_secrets(line: dict[str, Any]) -> dict[str, Any]:
    return {name: redact_text(value) if isinstance(value, str) else value for name, value in line.items()}


def _said(line: Any, version: str) -> Said | None:
    """None if it is not an answer: a file may hold anything."""
    if not isinstance(line, dict):
        return None
    kinds: dict[str, type | tuple[type, ...]] = {
        "refusal": str, "unknown": str, "weights_gib": float, "pool_gib": float, "kv_cache_tokens": int,
        "longest": int, "kv_gib": list, "waves": list,
    }  # fmt: skip
    values: dict[str, Any] = {name: line.get(name) for name in kinds}
    if any(value is not None and not isinstance(value, kinds[name]) for name, value in values.items()):
        return None
    if not all(isinstance(one, (int, float)) for name in ("kv_gib", "waves") for one in values[name] or ()):
        return None
    texts = {name: redact_text(plain(values[name])) for name in ("refusal", "unknown") if values[name]}
    said = Said(version, **{**values, **texts})
    return said if said.refusal or said.unknown or said.weights_gib is not None else None


# --- what is kept ---------------------------------------------------------------------------------------------------


def _answer_path(folder: Path, question: Question, config: ExperimentConfig) -> Path | None:
    """One for each model content, question, vLLM, kind of machine and version of ours; None for a model whose config
    is not here."""
    model = [(path.name, _content(path)) for source in _sources(config) for path in _saying_files(source)]
    if not any(name in ("config.json", "params.json") for name, _ in model):
        return None
    variables = {name: value for name, value in sorted(os.environ.items())
                 # Whether an engine has its own process changes no size: the quick start sets this for its engines.
                 if name.startswith("VLLM_") and name != SEPARATE and not is_secret_name(name)}  # fmt: skip
    told = {**dataclasses.asdict(question), "words": redact(question.words)}
    identity = hashlib.sha256(
        json.dumps([told, variables, model, _code(), _machine()]).encode(errors="replace")
    ).hexdigest()[:24]
    return kept_path(folder, "plans") / f"{identity}.json"


@cache
def _code() -> list[tuple[str, str]]:
    """The code that asks: another version of it may ask differently."""
    return [(path.name, _content(path)) for path in sorted(Path(__file__).parent.glob("*.py"))]


@cache
def _machine() -> list[str]:
    """What vLLM also looks at: machines that share a home folder may differ."""
    gpus = {
        line
        for path in Path("/proc/driver/nvidia/gpus").glob("*/information")
        for line in _text(path).splitlines()
        if line.startswith("Model:")
    }
    return [find_devices().kind, *sorted(gpus), "amx" if "amx_tile" in _text(Path("/proc/cpuinfo")) else ""]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _saying_files(folder: Path) -> list[Path]:
    try:
        return sorted(path for kind in _SAYING for path in folder.glob(kind) if path.is_file())
    except (OSError, ValueError):
        return []


def _content(path: Path) -> str:
    try:
        return hashlib.sha256(read_regular(path)).hexdigest()
    except OSError as error:
        return str(error)


def _sources(config: ExperimentConfig) -> Iterator[Path]:
    """The folders from which vLLM reads a model's config without the network."""
    for name in filter(None, (config.model, config.engine_word("--hf-config-path"))):
        yield expanded(name)
        for folder in filter(None, (config.engine_word("--download-dir"), hub_cache())):
            with contextlib.suppress(OSError, ValueError):  # too long for a path, or not a path
                yield from sorted(Path(folder).glob(f"models--{name.replace('/', '--')}/snapshots/*"))


def hub_cache() -> str:
    """The cache folder, found the way huggingface_hub does."""
    home = os.environ.get("HF_HOME") or cache_home() / "huggingface"
    return os.environ.get("HF_HUB_CACHE") or f"{home}/hub"
