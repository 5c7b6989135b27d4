"""What was found, written so that it can be used: the engine's settings, and the scripts that run with them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from batch_inference.analyze.answers import Analysis
from batch_inference.analyze.engine_setting import EngineSetting, engine_setting
from batch_inference.analyze.scripts import ray_script, run_script
from batch_inference.analyze.sections import Section
from batch_inference.analyze.winner import Winner, winner
from batch_inference.analyze.wording import SUSPECT_LINE
from batch_inference.analyze.yaml_text import yaml_text
from batch_inference.core.files import write_whole
from batch_inference.core.result_file import ResultFileError, load_result
from batch_inference.core.text import counted

CONFIG, RUN, RAY = "vllm_config.yaml", "run.py", "ray_data.py"
# In the first lines of what this program wrote, and may remove.
MARK = "Written by analyze_results.py of batch_inference, anew each time: copy it before you change it."
_REQUESTS, _ANSWERS = "requests.jsonl", "answers.jsonl"


@dataclass(frozen=True)
class ToUse:
    """The section of the report, and the files that it names."""

    section: Section
    files: list[Path]


def write_to_use(analysis: Analysis, goal_word: str, folder: Path) -> ToUse | None:
    """Into `folder`, for the winner by that goal; None where there is none, and then nothing of an earlier one is left.

    Raises OSError where a file cannot be written.
    """
    chosen = winner(analysis, goal_word)
    texts = {}
    section = Section("")
    if chosen:
        try:
            setting, version = _measured(chosen)
        except ResultFileError:  # removed since it was read
            chosen = None
        else:
            texts = _texts(chosen, setting, version)
            section = _section(chosen, setting, folder, texts)
    _remove_others(folder, texts)
    if not chosen:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_whole(folder / name, [text])
    return ToUse(section, [folder / name for name in texts])


def _measured(chosen: Winner) -> tuple[EngineSetting, str]:
    """Read again: of all the files, only the winner's words and engine are needed."""
    result = load_result(chosen.setting.path)
    point = next(point for point in result.points if chosen.is_of(point))
    engine = result.engine_of(point)
    return engine_setting(result, point), engine.vllm_version if engine else "unknown"


def _texts(chosen: Winner, setting: EngineSetting, version: str) -> dict[str, str]:
    """By the name of the file."""
    head = [
        MARK,
        f"{_words(chosen, setting)}: {chosen.why}.",
        f"Measured with vLLM {version} in {chosen.setting.file}.",
        *setting.notes,
    ]
    per_replica = ["Of one replica: how many there are stands in the command."] if setting.replicas > 1 else []
    texts = {CONFIG: yaml_text([*head, *per_replica], setting.values, setting.why)}
    if setting.nnodes == 1:
        texts[RUN] = run_script(head, setting)
    if (chosen.replicas or setting.nnodes > 1) and not setting.is_coupled:
        texts[RAY] = ray_script(head, setting, chosen.replicas or setting.replicas)
    return texts


def _words(chosen: Winner, setting: EngineSetting) -> str:
    each = f" on each of {counted(setting.replicas, 'replica')}" if setting.replicas > 1 else ""
    return f"{chosen.name}, {setting.values['max_num_seqs']} at once{each}"


def _section(chosen: Winner, setting: EngineSetting, folder: Path, texts: dict[str, str]) -> Section:
    pairs = [
        ("setting", _words(chosen, setting) + ("*" if chosen.is_suspect else "")),
        ("because", chosen.why),
    ]
    if chosen.replicas:
        pairs.append(("in time", f"with {counted(chosen.replicas, 'replica')}, as {RAY} has it"))
    lines = [*chosen.notes, *setting.notes, *([SUSPECT_LINE] if chosen.is_suspect else [])]
    return Section("To use", pairs, lines=lines, commands=list(_commands(setting, folder, texts)))


def _commands(setting: EngineSetting, folder: Path, texts: dict[str, str]) -> Iterator[list[str]]:
    """Their words, quoted for a shell."""
    config = ["--config", shlex.quote(str(folder / CONFIG))]
    replicas = ["--data-parallel-size", str(setting.replicas)] if setting.replicas > 1 else []
    nodes = (
        ["--nnodes", str(setting.nnodes), "--node-rank", "0", "--master-addr", "ADDRESS"] if setting.nnodes > 1 else []
    )
    yield ["vllm", "serve", *config, *replicas, *nodes]
    if not nodes:
        yield ["vllm", "run-batch", "-i", _REQUESTS, "-o", _ANSWERS, *config, *replicas]
    for name, target in ((RUN, _ANSWERS), (RAY, "answers")):
        if name in texts:
            yield ["python", shlex.quote(str(folder / name)), _REQUESTS, target]


def _remove_others(folder: Path, texts: dict[str, str]) -> None:
    """What an earlier analysis wrote, and this one does not."""
    for name in (CONFIG, RUN, RAY):
        path = folder / name
        if name not in texts and path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace")[:500]:
            path.unlink()
