"""Argument lists of the three programs: taken as they are meant, or refused in one line; never a traceback."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from batch_inference.analyze.flags import UsageError
from batch_inference.analyze.flags import build_parser as analysis_parser
from batch_inference.analyze.flags import parse as parse_analysis
from batch_inference.core import values
from batch_inference.core.config import ConfigError, ExperimentConfig, flag_of
from batch_inference.core.flags import parse_flags
from batch_inference.core.results import StoredConfig
from batch_inference.core.text import has_control
from batch_inference.launch.__main__ import plan_jobs
from batch_inference.launch.jobs import Here, check_together
from batch_inference.launch.options import Options, parse_options
from batch_inference.launch.overview import plan, plan_as_json
from batch_inference.launch.presets import Preset, find_preset, read_table
from batch_inference.launch.spread import alike
from batch_inference.plan.devices import Devices
from batch_inference.plan.model import read_model_facts
from batch_inference.plan.place import check_place
from batch_inference.plan.printed import setting_plan
from conftest import REPOSITORY, TINY, stub_environment
from fuzz.tries import NUMBERS, chance, told

LISTS_OF_A_TRY = 10
# So many tries start the real program too.
REAL = NUMBERS[:4]
DEVICES = Devices("gpu", tuple("01234567"))

# What must never be taken, and what may be, whatever it means.
WHOLE_BAD = [
    "0", "-1", "1.5", "1e3", "", " ", "abc", "nan", "0x10", "²", "½", "1 2", "None", "true", "--", "+-1", "9" * 5000,
]  # fmt: skip
WHOLE_ODD = ["2", "\u0661", "\uff11", " 1 ", "1_0", "+1", "01", "99999999999999999999", "2147483648"]
LIST_BAD = ["1,", ",1", "1,,2", "1-8", "1;2", "1 4", "0,1", "-1,2", "", ",", "[1,2]", "a,b", "1.0,2", "nan", "²", "--"]
LIST_ODD = ["1,2", "1, 2", "1,1,1", "2,1", ",".join(map(str, range(1, 400))), "\uff11,\uff12", "+1,2", "2147483648"]
NUMBER_BAD = ["nan", "inf", "-inf", "1e309", "-1", "", "abc", "1,5", "0x1p3", "--1", "½", "--"]
NUMBER_ODD = ["0.5", "1e-320", "\u0660.5", "5e-324", " 0.5 ", "1e308", ".5", "5.", "0"]
TEXTS = [
    "", " ", "x", "é漢字", "a\nb", "\x1b[31mred\x1b[0m", "-x", "--x", "--", "=1+1", "a/b", "../up", "x" * 300, "$(id)",
    "`id`", "'q'", '"dq"', "\\", "%s", "*", "~", "\udcff", "a\tb", "\u202e", "\u2028", ".", "/", "x/" * 3000,
]  # fmt: skip
STRAY = [
    "stray", "--", "-", "-x", "-tp2", "-n 2", "--tensor_parallel_size 2", "--batch-size 1", "--batch-sizes 1 2 4",
    "--config x", "--enable-prefix-caching", "--load-format dummy", "--load-format=\x1b[31m", "--quantization",
    "--block-size 0", f"--kv-cache-memory-bytes {'9' * 5000}", f"--block-size={'9' * 400}",
    "--hf-overrides {\n}", "--bogus\x07 1", "",
]  # fmt: skip


def one_of_a_flag(rng: random.Random, flag: str, bad: Sequence[str], odd: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words, and a bad value among them."""
    value = rng.choice(bad if bad and chance(rng, 0.5) else odd)
    # argparse takes a value that begins with a dash for a flag.
    words = [f"{flag}={value}"] if value.startswith("-") or chance(rng, 0.4) else [flag, value]
    return words, [f"{flag}={value}"] if value in bad else []


_PYTHONS_WORDS = re.compile("invalid literal|could not convert|Exceeds the limit|object has no|unexpected keyword")


def check_refusal(error: Exception, folder: Path) -> None:
    message = str(error).replace(str(folder), "")
    assert not has_control(message)
    assert not _PYTHONS_WORDS.search(message)
    assert 3 < len(message) < 7000  # a path may be long


# --- the experiment script --------------------------------------------------------------------------------------------


def experiment_words(rng: random.Random) -> tuple[list[str], list[str]]:
    words, bad = ["--dry-run"], list[str]()
    fields = [field for field in dataclasses.fields(ExperimentConfig) if "help" in field.metadata]
    for _ in range(rng.choice([1, 1, 2, 2, 3, 5])):
        field = rng.choice(fields)
        if chance(rng, 0.15):
            words += rng.choice(STRAY).split(" ")
        elif field.type is bool:
            words.append(flag_of(field.name))
        else:
            more, its_bad = one_of_a_flag(rng, flag_of(field.name), *values_of(field))
            words, bad = words + more, bad + its_bad
    return (words if chance(rng, 0.2) else ["--model", TINY, *words]), bad


def values_of(field: dataclasses.Field[Any]) -> tuple[Sequence[str], Sequence[str]]:
    if field.type in (int, int | None):
        parse = field.metadata["parse"]
        good = "0" if parse in (values.node_number, values.seed) else "-1" if parse is values.token_length else None
        return [text for text in WHOLE_BAD if text != good], WHOLE_ODD
    if field.type in (float, float | None):
        return NUMBER_BAD, NUMBER_ODD
    return (LIST_BAD, LIST_ODD) if field.type == tuple[int, ...] else ((), TEXTS)


def take_experiment(words: list[str]) -> str:
    config, notes = parse_flags(words)
    check_place(config, None)
    facts = read_model_facts(config.model)
    stored = StoredConfig.of(config)
    # A file holds no bytes that are no text.
    if not any("\udcff" in word for word in words):
        assert msgspec.json.decode(msgspec.json.encode(stored), type=StoredConfig) == stored
    return "\n".join([*setting_plan(config, facts, DEVICES, 80.0), *notes])


# --- the launcher -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def presets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Preset]:
    """As the script's own table says them."""
    python = tmp_path_factory.mktemp("python") / "python"
    python.write_text('#!/bin/sh\nprintf %s "$4"\n')
    python.chmod(0o755)
    command = [str(REPOSITORY / "run_batch_experiments.sh")]
    done = subprocess.run(
        command, env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True, check=True
    )
    return read_table(done.stdout)


def launcher_words(rng: random.Random, presets: Sequence[str]) -> tuple[list[str], list[str]]:
    words, bad = [rng.choice(presets)] if chance(rng, 0.95) else [], list[str]()
    if words == ["custom"]:
        for key in rng.choices(["TP", "PP", "DP", "tp", "N"], weights=[4, 4, 4, 1, 1], k=rng.choice([0, 1, 1, 2])):
            value = rng.choice(WHOLE_BAD if chance(rng, 0.3) else WHOLE_ODD)
            words.append(f"{key}={value}")
            bad += [words[-1]] if value in WHOLE_BAD else []
    options = [field for field in dataclasses.fields(Options) if "help" in field.metadata and field.name != "help"]
    for _ in range(rng.choice([0, 1, 2, 3])):
        field = rng.choice(options)
        if chance(rng, 0.15):
            words += rng.choice(["extra", "--unknown 1", "-x", "", "--model", "--pack=1", "-", "custom"]).split(" ")
        elif field.metadata["metavar"] is None:
            words.append(flag_of(field.name))
        else:
            more, its_bad = one_of_a_flag(rng, flag_of(field.name), *values_of_option(field))
            words, bad = words + more, bad + its_bad
    words += ["--dry-run"] if "--dry-run" not in words else []
    if chance(rng, 0.3):
        words += ["--", *experiment_words(rng)[0]]
    return (words if chance(rng, 0.2) else ["--model", TINY, *words]), bad


def values_of_option(field: dataclasses.Field[Any]) -> tuple[Sequence[str], Sequence[str]]:
    # Options() reads its types late, as text.
    kinds = {"N": (WHOLE_BAD, WHOLE_ODD), "PORT": (WHOLE_BAD, WHOLE_ODD), "N,N,..": (LIST_BAD, LIST_ODD)}
    kinds |= {"X": (NUMBER_BAD, NUMBER_ODD), "S": (NUMBER_BAD, NUMBER_ODD)}
    bad, odd = kinds.get(field.metadata["metavar"], ((), TEXTS))
    return [text for text in bad if not (field.name == "node_rank" and text == "0")], odd


def take_launcher(words: list[str], presets: dict[str, Preset]) -> str:
    options = parse_options(words)
    preset = find_preset(presets, options.preset or "")
    check_together(preset, options)
    nodes = alike(len(DEVICES), options.nnodes if options.is_over_nodes else 1)
    jobs, left_out = plan_jobs(preset, options, Here("python", ""), DEVICES, nodes)
    return "\n".join([*plan(jobs, left_out, "", DEVICES), plan_as_json(jobs, DEVICES)])


# --- the analysis -------------------------------------------------------------------------------------------------


def analysis_words(rng: random.Random) -> tuple[list[str], list[str]]:
    words, bad = ["--input", rng.choice([".", *TEXTS])] if chance(rng, 0.95) else [], list[str]()
    actions = [action for action in analysis_parser()._actions if action.dest not in ("help", "input")]
    for _ in range(rng.choice([0, 1, 2, 3])):
        action = rng.choice(actions)
        flag = action.option_strings[-1]
        if chance(rng, 0.1):
            words += rng.choice(["stray", "--bogus", "--max-latency", "--", "-x", "--input"]).split(" ")
        elif action.nargs == 0:
            words.append(flag)
        else:
            is_number = action.metavar in ("S", "P", "PRICE", "PCT")
            more, its_bad = one_of_a_flag(rng, flag, *((NUMBER_BAD, NUMBER_ODD) if is_number else ((), TEXTS)))
            words, bad = words + more, bad + its_bad
    return words, bad


# --- the tries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", NUMBERS)
def test_the_experiment_script_takes_or_refuses(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = random.Random(f"experiment {number}")
    for _ in range(LISTS_OF_A_TRY):
        words, bad = experiment_words(rng)
        with told(number, words):
            try:
                assert not has_control(take_experiment(words), allowed="\n\t")
                assert not bad
            except ConfigError as error:
                check_refusal(error, tmp_path)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_launcher_takes_or_refuses(
    number: int, presets: dict[str, Preset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = random.Random(f"launcher {number}")
    for _ in range(LISTS_OF_A_TRY):
        words, bad = launcher_words(rng, list(presets))
        with told(number, words):
            try:
                assert not has_control(take_launcher(words, presets), allowed="\n\t")
                assert not bad
            except ConfigError as error:
                check_refusal(error, tmp_path)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_analysis_takes_or_refuses(number: int) -> None:
    rng = random.Random(f"analysis {number}")
    for _ in range(LISTS_OF_A_TRY):
        words, bad = analysis_words(rng)
        with told(number, words):
            try:
                parse_analysis(words)
                assert not bad
            except UsageError as error:
                check_refusal(error, Path.cwd())


@pytest.mark.parametrize("number", REAL)
@pytest.mark.parametrize("script", ["batch_inference_experiment.py", "analyze_results.py"])
def test_the_programs_say_what_their_parsers_do(number: int, script: str, tmp_path: Path) -> None:
    rng = random.Random(f"real {number}")
    words, bad = experiment_words(rng) if script.startswith("batch") else analysis_words(rng)
    command = [sys.executable, str(REPOSITORY / script), *words]
    with told(number, words):
        done = subprocess.run(command, cwd=tmp_path, env=stub_environment(), capture_output=True, timeout=60)
        out, errors = (text.decode("utf-8", "backslashreplace") for text in (done.stdout, done.stderr))
        assert not has_control(out + errors, allowed="\n\t")
        assert "Traceback" not in errors
        assert done.returncode in ({2} if bad else {0, 1, 2})
        said = [line for line in errors.splitlines() if not line.startswith("note: ")]
        assert done.returncode != 2 or (len(said) == 1 and said[0].startswith("error: "))
