"""The README against the program: every command in it is run or parsed, every table and sample output compared."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_launcher import Launcher

import analyze_results
from batch_inference.analyze.flags import build_parser
from batch_inference.analyze.plots import JOB_PLOTS, PLOTS
from batch_inference.core import failures
from batch_inference.core.config import ExperimentConfig, flag_of
from batch_inference.core.flags import parse_flags
from batch_inference.core.metrics import markdown_table
from batch_inference.plan.devices import find_devices
from conftest import REPOSITORY, commands_of, stub_environment
from in_process import called

README = (REPOSITORY / "README_batch_inference.md").read_text()
LAUNCHER = REPOSITORY / "run_batch_experiments.sh"


def commands() -> list[str]:
    """Every line of every bash block, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def table_rows(text: str) -> list[list[str]]:
    """The rows of a table whose first cell is code."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]


def launch(*words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**stub_environment(**variables), "PYTHON": sys.executable}
    return subprocess.run([str(LAUNCHER), *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("command", commands())
def test_every_command_is_understood(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    while "=" in words[0]:
        words.pop(0)
    match words[:2]:
        case ["torchrun", *_]:
            parse_flags(words[words.index("batch_inference_experiment.py") + 1 :])
        case ["python", "batch_inference_experiment.py"]:
            parse_flags(words[2:])
        case ["python", "analyze_results.py"]:
            build_parser().parse_args(words[2:])
        case ["pip", "install", *packages]:
            assert set(packages) < set(
                re.findall(r"^[a-z]+", (REPOSITORY / "requirements.txt").read_text(), re.MULTILINE)
            )
        case ["./run_batch_experiments.sh", *_]:
            (tmp_path / "prompts.jsonl").write_text('{"prompt_tokens": 8, "output_tokens": 4}\n')
            check_plan(words[1:], tmp_path)
        case _:
            script, *options = words
            assert os.access(REPOSITORY / script, os.X_OK)
            assert all(option in (REPOSITORY / script).read_text() for option in options)


def check_plan(words: list[str], folder: Path) -> None:
    """The launcher takes the words, and the experiment script takes what the launcher makes of them."""
    done = Launcher(folder)("--dry-run", *words)
    assert done.returncode == 0, done.stderr
    for planned in commands_of(done):
        script = next(index for index, word in enumerate(planned) if word.endswith("batch_inference_experiment.py"))
        parse_flags(planned[script + 1 :])


def test_every_flag_is_in_the_table_with_its_default() -> None:
    rows = {row[0].split("`")[1]: row for row in table_rows(section("Measure one setting"))}
    fields = [field for field in dataclasses.fields(ExperimentConfig) if "help" in field.metadata]
    assert list(rows) == [flag_of(field.name) for field in fields]
    for field in fields:
        if isinstance(field.default, bool) or field.default is None:
            continue
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)
        assert rows[flag_of(field.name)][1].strip("`") == shown


def test_every_preset_is_in_the_table() -> None:
    presets = re.findall(r"^preset_([a-z-]+)\(\)", LAUNCHER.read_text(), re.MULTILINE)
    assert [row[0].strip("`") for row in table_rows(section("Run many settings"))] == presets


def test_every_option_of_the_launcher_is_named(tmp_path: Path) -> None:
    help_text = launch("--help", cwd=tmp_path).stdout
    options = re.findall(r"^  (--[a-z-]+)", help_text, re.MULTILINE)
    assert len(options) > 8
    for option in options:
        assert f"`{option}`" in section("Run many settings")


def test_the_plan_that_is_shown_is_what_the_launcher_prints() -> None:
    shown = re.search(r"^\$ \./run_batch_experiments\.sh (.+)\n((?:#.*\n)+)", README, re.MULTILINE)
    assert shown is not None
    done = launch(*shown[1].split(), cwd=REPOSITORY)
    assert done.stdout.startswith(shown[2])


def test_the_table_of_metrics_is_the_one_the_program_prints() -> None:
    shown = README.partition("<!-- metrics -->\n")[2].partition("\n<!-- /metrics -->")[0]
    assert shown == markdown_table(), "paste the output of `python -m batch_inference.core.metrics`"


def test_the_table_of_failures_is_the_one_the_program_prints() -> None:
    shown = README.partition("<!-- failures -->\n")[2].partition("\n<!-- /failures -->")[0]
    assert shown == failures.markdown_table(), "paste the output of `python -m batch_inference.core.failures`"


def test_the_tables_of_measurements_are_those_that_the_programs_wrote() -> None:
    pages = [(REPOSITORY / "docs" / name).read_text() for name in ("performance.md", "best.md")]
    shown = [
        found for page in pages for found in re.findall(r"<!-- (docs/\S+) -->\n(.*?)<!-- end -->", page, re.DOTALL)
    ]
    assert len(shown) == 19
    for name, table in shown:
        assert table == (REPOSITORY / name).read_text(), name


@pytest.mark.parametrize(
    ("title", "first", "flags"),
    [
        ("Analyse", "On 2 × H100, .*", "--input docs/h100/study"),
        ("A job of your own", "The job of .*", "--input docs/h200/job --device-hour-price 2.5"),
    ],
)
def test_the_analysis_that_is_shown_is_what_the_program_says_of_the_files(
    title: str, first: str, flags: str, tmp_path: Path
) -> None:
    shown = re.search(rf"```\n({first}\n.*?)```", section(title), re.DOTALL)
    assert shown is not None
    assert f"python analyze_results.py {flags}" in section(title)
    where, folder, *others = flags.split()
    command = [
        "analyze_results.py",
        where,
        str(REPOSITORY / folder),
        *others,
        "--no-plots",
        "--output-dir",
        Path(folder).parent.name,
    ]
    done = called(analyze_results.main, command, tmp_path, os.environ)
    assert done.stdout.startswith(shown[1]), "paste the beginning of what it prints"


def test_every_plot_and_every_dependency_is_named() -> None:
    assert all(f"`{name}.png`" in section("Analyse") for name, _, _ in (*JOB_PLOTS, *PLOTS))
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    for package in (re.split(r"[<>=~]", line)[0] for line in lines if line and not line.startswith("#")):
        assert package.lower() in section("Dependencies").lower()


def test_every_flag_of_the_analysis_is_in_its_table() -> None:
    actions = build_parser()._actions
    flags = {option for action in actions for option in action.option_strings} - {"-h", "--help"}
    shown = {word for row in table_rows(section("Analyse")) for word in re.findall(r"`(--[a-z-]+)", row[0])}
    assert shown == flags


def test_every_file_and_link_exists() -> None:
    page = (REPOSITORY / "docs" / "performance.md").read_text()
    for name in re.findall(r"`((?:docs|tests|models|batch_inference|examples|benchmarks)/[\w./-]+)`", README + page):
        assert (REPOSITORY / name).exists(), name
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in target or (REPOSITORY / target).exists(), target


def masked(text: str) -> set[str]:
    """Lines without what differs from run to run: numbers, verdicts and their reasons, the width of columns."""
    # A note is one line, however it was wrapped.
    text = re.sub(r"(?<=\S)\n {4}(?=[^ \d])|(?<=[^-])\n {4}(?=\d\S* ±)", " ", text)
    text = re.sub(r"\nFailed, missing and doubtful\n.*?\n\n", "\n", text, flags=re.DOTALL)
    # The answer names who wins, and whether another is as good.
    text = re.sub(r"\nOn \d devices? \(.*?\nBest\n", "\nBest\n", text, flags=re.DOTALL)
    text = re.sub(r"\*(?=\s)", "", text)
    text = re.sub(r"\b(valid|suspect|invalid)\b", "VERDICT", text)
    text = re.sub(r"-{3,}", "-", re.sub(r"\d+(\.\d+)?", "#", text))
    lines = {" ".join(line.split()) for line in text.splitlines()}
    noise = ("runs differ", "not steady", "drift", "* VERDICT", "tie, ", "±# s")
    return {line for line in lines if not line.startswith(noise)}


@pytest.mark.slow
@pytest.mark.skipif(len(find_devices()) < 2, reason="the sample is of two devices")
def test_the_sample_output_is_what_the_quick_start_prints(tmp_path: Path) -> None:
    shown = re.search(r"```\n(\[1/2\] .*?)```", section("Quick start"), re.DOTALL)
    assert shown is not None
    assert max(map(len, shown[1].splitlines())) <= 80
    # Long enough runs to be steady.
    done = launch("quickstart", cwd=tmp_path, STUB_RUN_S="0.01")
    assert done.returncode == 0, done.stderr
    printed = masked(done.stdout + done.stderr.replace(f"{REPOSITORY}/", ""))
    # Whether the best point is suspect is a matter of the machine, too.
    of_this_machine = ("device", "host", "model", "ready after", "installing", "installed", "...", "VERDICT: see below")
    missing = {line for line in masked(shown[1]) - printed if not line.startswith(of_this_machine)}
    assert not missing


def test_there_is_one_readme() -> None:
    """The name that sites show is a link to it."""
    assert (REPOSITORY / "README.md").readlink() == Path("README_batch_inference.md")
