"""How long the requests of a workload are, and the token ids of those that are run.

Lengths and token ids are read here. Texts and chats go once through vLLM's tokenizer, in its own process
(`tokenizing`); the lengths are kept for the next setting. No text or id of a workload is kept or logged anywhere.
Python's own library alone, because a plan looks too.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import sys
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_inference.core.config import EXPERTS_FLAG, PREFIX_FLAG, ConfigError, ExperimentConfig
from batch_inference.core.failures import WorkFailedError
from batch_inference.core.files import open_regular
from batch_inference.core.installed_vllm import cache_home, keep, kept, kept_path, vllm_folder, vllm_version
from batch_inference.core.secrets import redact
from batch_inference.core.text import plain
from batch_inference.core.workload import Entry, Workload
from batch_inference.plan.by_vllm import hub_cache
from batch_inference.plan.model_place import expanded

# Importing vLLM takes 10 to 20 s, much longer on a network disk, and the tokenizer may come from the hub.
_SILENCE_S = 600.0
# Requests between two looks of the progress bar.
_LOOK = 4096
# For a file in a model's folder: larger ones are weights.
_LARGEST_BYTES = 64 << 20
_ERROR = re.compile(r"[A-Za-z_][\w.]*")
WITHOUT_TEXTS = "a --prompts-file of token ids (prompt_token_ids) or of lengths only (prompt_tokens)"


@dataclass(frozen=True)
class Lengths:
    """In tokens, for each request in the order of the file."""

    prompt_tokens: array[int]
    output_tokens: array[int]  # 0 where the file does not say it
    content_hash: str


class _TextsError(Exception):
    """There are texts among the requests, so a tokenizer is needed."""


def lengths_of(workload: Workload, config: ExperimentConfig, say: Callable[[str], None]) -> Lengths:
    """For all requests; `workload` then knows what was left out. Raises ConfigError for a file that cannot be
    used, or texts without a tokenizer, and WorkFailedError if vLLM's tokenizer gives no answer."""
    workload.left_out, workload.notes, workload.ids = set(), [], {}
    workload.stamp, content_hash = _stamp(workload.path), _content_hash(workload)
    here = _path_of(content_hash, [])
    found = _kept(here, workload) or _kept(_path_of(content_hash, _tokenizer_words(config)), workload)
    if found is None:
        try:
            found, path = _lengths_here(workload), here
        except _TextsError:
            say(
                f"note: vLLM {vllm_version()} tokenizes the texts of {workload.path}, once; importing it takes "
                "several seconds"
            )
            found = _lengths_by_vllm(workload, config)
            # A tokenizer from the hub is on this machine only now.
            path = _path_of(content_hash, _tokenizer_words(config))
        _keep(found, workload, path)
    for note in workload.notes:
        say(f"note: {note}")
    return Lengths(*found, content_hash)


def _content_hash(workload: Workload) -> str:
    """Of the file, and of how bad lines are handled."""
    try:
        content = _content(workload.path)
    except OSError:
        return ""  # reading it says why
    return hashlib.sha256(f"{content} {workload.skip_bad_lines}".encode()).hexdigest()[:32]


def ids_of(workload: Workload, config: ExperimentConfig, indices: Sequence[int]) -> list[list[int] | None]:
    """The ids of these requests, by their place in `lengths_of`; None where the file gives a length. Kept in memory,
    because later points run the same requests and more. Raises as `lengths_of`."""
    wanted = set(indices) - workload.ids.keys()
    if wanted:
        try:
            found = _ids_here(workload, wanted)
        except _TextsError:
            found = _ids_by_vllm(workload, config, wanted)
        if found.keys() != wanted or workload.stamp not in (None, _stamp(workload.path)):
            raise WorkFailedError(
                f"--prompts-file {workload.path}: it has changed since its lengths were read; start again"
            )
        workload.ids.update(found)
    known = (workload.ids[index] for index in indices)
    return [list(ids) if ids is not None else None for ids in known]


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


# --- without texts --------------------------------------------------------------------------------------------------


def _lengths_here(workload: Workload) -> tuple[array[int], array[int]]:
    prompts, outputs = array("I"), array("I")
    with _progress(workload) as shown:
        for number, entry in enumerate(workload.entries()):
            ids = _ids_here_of(entry)
            prompts.append(len(ids) if ids is not None else entry.prompt_tokens or 0)
            outputs.append(entry.output_tokens or 0)
            if number % _LOOK == 0:
                shown(workload.bytes_read)
    return prompts, outputs


def _ids_here(workload: Workload, wanted: set[int]) -> dict[int, array[int] | None]:
    found: dict[int, array[int] | None] = {}
    # A separate reading: one that stops early has not counted everything that is left out.
    again = Workload(workload.path, workload.skip_bad_lines, workload.left_out)
    for index, entry in enumerate(again.entries()):
        if index in wanted:
            ids = _ids_here_of(entry)
            found[index] = array("I", ids) if ids is not None else None
        if len(found) == len(wanted):
            break
    return found


def _ids_here_of(entry: Entry) -> Sequence[int] | None:
    if entry.prompt is not None or entry.messages is not None:
        raise _TextsError
    return entry.prompt_token_ids


# --- by vLLM --------------------------------------------------------------------------------------------------------


def _lengths_by_vllm(workload: Workload, config: ExperimentConfig) -> tuple[array[int], array[int]]:
    prompts, outputs = array("I"), array("I")
    with _progress(workload) as shown, contextlib.closing(_lines(workload, config, None)) as lines:
        for line in lines:
            if "notes" in line:
                _remember(workload, line)
            else:
                prompts.extend(line["prompt_tokens"])
                outputs.extend(line["output_tokens"])
                shown(line["bytes_read"])
    return prompts, outputs


def _remember(workload: Workload, said: dict[str, Any]) -> None:
    """Take over what was left out. Raises TypeError, KeyError or ValueError if the answer does not say."""
    left_out, bad_lines, refused = set(said["left_out"]), int(said["bad_lines"]), Counter(said["refused"])
    workload.notes = [str(note) for note in said["notes"]]
    workload.left_out, workload.bad_lines, workload.refused = left_out, bad_lines, refused


def _ids_by_vllm(workload: Workload, config: ExperimentConfig, wanted: set[int]) -> dict[int, array[int] | None]:
    # It leaves out the same as when the lengths were read.
    found: list[array[int] | None] = []
    with contextlib.closing(_lines(workload, config, sorted(wanted))) as lines:
        for line in lines:
            found += (array("I", ids) if ids is not None else None for ids in line.get("ids", ()))
    return dict(zip(sorted(wanted), found, strict=False))


def _lines(workload: Workload, config: ExperimentConfig, wanted: list[int] | None) -> Generator[dict[str, Any]]:
    """What `tokenizing` says once it is ready."""
    from batch_inference.core.child import ChildError, ask_for_a_stream

    if vllm_folder() is None:
        raise ConfigError(
            f"--prompts-file {workload.path}: its texts need vLLM's tokenizer, but vLLM is not installed here; give "
            f"{WITHOUT_TEXTS}"
        )
    question = {
        "path": str(workload.path),
        "skip_bad_lines": workload.skip_bad_lines,
        "left_out": sorted(workload.left_out),
        "model": str(expanded(config.model)) if config.model.startswith("~") else config.model,
        "trust_remote_code": config.trust_remote_code,
        "engine_args": list(config.engine_args),
        "wanted": wanted,
    }
    is_ready = False
    stream = ask_for_a_stream("measure.tokenizing", json.dumps(question), silence_s=_SILENCE_S)
    try:
        with contextlib.closing(stream) as lines:
            for line in lines:
                if problem := line.get("problem"):
                    raise ConfigError(problem)
                if is_ready:
                    yield line
                is_ready = is_ready or "ready" in line
    except ChildError as error:
        # Once it has read the file, its last words may be from a request.
        found = _ERROR.match(str(error))
        reason = (found[0] if found else "no reason") if is_ready else str(error)
        raise WorkFailedError(
            f"--prompts-file {workload.path}: vLLM {vllm_version()} could not tokenize its texts ({plain(reason)})"
        ) from None


# --- what is kept ---------------------------------------------------------------------------------------------------


def _path_of(content_hash: str, words: Sequence[Any]) -> Path:
    """One for each content, tokenizer and version of our code."""
    identity = hashlib.sha256(json.dumps([content_hash, _code(), words]).encode(errors="replace")).hexdigest()[:24]
    return cache_home() / "batch_inference" / "lengths" / f"{identity}.json"


def _code() -> list[str]:
    """The code that reads: another version of it may read differently."""
    room = Path(__file__).parent
    return [_content(path) for path in (Path(__file__), room / "tokenizing.py", room.parent / "core" / "workload.py")]


def _tokenizer_words(config: ExperimentConfig) -> list[Any]:
    """What tells one tokenizer, with its chat template, from another."""
    folder = vllm_folder()
    # Nearly all of vLLM's flags are irrelevant here, and these change between settings.
    flags = [word for word in redact(config.engine_args) if word not in (EXPERTS_FLAG, PREFIX_FLAG)]
    names = dict.fromkeys(filter(None, (config.model, config.engine_word("--tokenizer"))))
    files = [(name, _files_of(name, config.engine_word("--download-dir"))) for name in names]
    return [str(kept_path(folder, "lengths")) if folder else "", flags, config.trust_remote_code, files]


def _files_of(name: str, download_folder: str | None) -> list[tuple[str, str]]:
    """For a folder the content of its small files; for a hub name its snapshots, named after their content."""
    path = expanded(name)
    with contextlib.suppress(OSError):  # too long for a path, or unreadable
        if path.is_file():
            return [(path.name, f"{path.stat().st_size} {path.stat().st_mtime_ns}")]
        if path.is_dir():
            files = (file for file in sorted([*path.glob("*"), *path.glob("*/*.jinja")]) if file.is_file())
            return [(file.name, _content(file)) for file in files if file.stat().st_size <= _LARGEST_BYTES]
    snapshots = [
        file.name
        for folder in filter(None, (download_folder, hub_cache()))
        for file in sorted(Path(folder).glob(f"models--{name.replace('/', '--')}/snapshots/*"))
    ]
    return [(name, snapshot) for snapshot in snapshots]


def _content(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path, "rb") as file:
        while read := file.read(1 << 20):
            digest.update(read)
    return digest.hexdigest()


def _keep(lengths: tuple[array[int], array[int]], workload: Workload, path: Path) -> None:
    prompts, outputs = (base64.b64encode(zlib.compress(column.tobytes(), 1)).decode() for column in lengths)
    left_out = {"left_out": sorted(workload.left_out), "bad_lines": workload.bad_lines, "refused": workload.refused}
    keep({"prompt_tokens": prompts, "output_tokens": outputs, **left_out, "notes": workload.notes}, path)


def _kept(path: Path, workload: Workload) -> tuple[array[int], array[int]] | None:
    """None if it is not an answer: a file may hold anything."""
    answer = kept(path)
    try:
        prompts, outputs = (_column(answer[name]) for name in ("prompt_tokens", "output_tokens"))
        if not prompts or len(prompts) != len(outputs):
            return None
        _remember(workload, answer)
    except (TypeError, KeyError, ValueError, zlib.error):
        return None
    return prompts, outputs


def _column(text: str) -> array[int]:
    column = array("I")
    column.frombytes(zlib.decompress(base64.b64decode(text)))
    return column


# --- what people see ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(workload: Workload) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal that shows how much of the file is read."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    try:
        from tqdm import tqdm
    except ImportError:  # a plan needs no package
        yield lambda _: None
        return
    size = workload.path.stat().st_size
    bar: Any = tqdm(
        total=size,
        file=sys.stderr,
        leave=False,
        dynamic_ncols=True,
        desc=f"reading {workload.path.name}",
        bar_format="{desc} |{bar}| {percentage:3.0f}%, {remaining} left",
    )

    def show(bytes_read: int) -> None:
        bar.n = min(size, bytes_read)
        bar.refresh()

    with bar:
        yield show
