"""README and docs against the program: every command in them is run or parsed, every table and output compared."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from pages import DOCS, README, Part, checkout, output_of, pages, parts
from test_decisions import anchors
from test_launcher import Launcher

from batch_inference.analyze.flags import build_parser
from batch_inference.analyze.plots import JOB_PLOTS, PLOTS
from batch_inference.core.config import ExperimentConfig, flag_of
from batch_inference.core.flags import parse_flags
from batch_inference.core.results import SCHEMA_VERSION
from batch_inference.core.text import wrapped
from batch_inference.core.verdict import judge
from batch_inference.launch.options import Options
from batch_inference.plan.devices import find_devices
from builders import make_point, make_result
from conftest import REPOSITORY, commands_of, stub_environment

LAUNCHER = REPOSITORY / "run_batch_experiments.sh"
FLAGS, ANALYSIS, EXTENDING, PICTURES = (
    DOCS / name for name in ("flags.md", "analysis.md", "extending.md", "h100/README.md")
)
LONGEST_README, LONGEST_SAMPLE = 260, 25
# vLLM's own, and those of tests and benchmarks.
FOREIGN_FLAGS = {
    "--config", "--config-format", "--enable-expert-parallel", "--enable-prefix-caching", "--fast", "--hf-config-path",
    "--hf-overrides", "--hf-token", "--kv-cache-dtype", "--kv-cache-memory-bytes", "--load-format",
    "--max-cudagraph-capture-size", "--quantization", "--recorded", "--tokenizer",
}  # fmt: skip


def relative(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def commands() -> set[str]:
    """Every line of every bash block, continued lines joined and comments left out."""
    text = "".join(page.read_text() for page in pages())
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return {shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))}


def section(page: Path, title: str) -> str:
    text = page.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert text, f"{title} in {page}"
    return text


def table_rows(text: str) -> list[list[str]]:
    """The rows of a table whose first cell is code."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]


def launch(*words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**stub_environment(**variables), "PYTHON": sys.executable}
    return subprocess.run(
        [str(LAUNCHER), *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", sorted(commands()))
def test_every_command_is_understood(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    match words:
        case ["torchrun", *_]:
            parse_flags(words[words.index("batch_inference_experiment.py") + 1 :])
        case ["python", "batch_inference_experiment.py", *flags]:
            parse_flags(flags)
        case ["python", "analyze_results.py", *flags]:
            build_parser().parse_args(flags)
        case ["./run_batch_experiments.sh", *options]:
            (tmp_path / "prompts.jsonl").write_text('{"prompt_tokens": 8, "output_tokens": 4}\n')
            check_plan(options, checkout(tmp_path))
        case _:
            check_other(words)


def check_other(words: list[str]) -> None:
    """A command of other programs over our files, or a script that takes few words."""
    match words:
        case ["python" | "vllm" | "source" | "sbatch", *rest]:
            written = {
                ".venv/bin/activate",
                "experiment_results/best/run.py",
                "experiment_results/best/vllm_config.yaml",
            }
            files = [word for word in rest if "/" in word]
            assert files
            assert all(file in written or (REPOSITORY / file).exists() for file in files)
        case ["pip", "install", *packages]:
            text = "".join((REPOSITORY / file).read_text() for file in ("requirements.txt", "requirements-cpu.txt"))
            assert set(packages) - {"ray"} < set(re.findall(r"^[a-z]+", text, re.MULTILINE))
        case ["pre-commit", "install"]:
            assert (REPOSITORY / ".pre-commit-config.yaml").exists()
        case [script, *options]:
            assert os.access(REPOSITORY / script, os.X_OK)
            assert all(option in (REPOSITORY / script).read_text() for option in options)


def test_the_preset_that_a_page_shows_is_one(tmp_path: Path) -> None:
    shown = re.search(r"```\n(# .*\npreset_(\w+)\(\) \{\n.*?)```", EXTENDING.read_text(), re.DOTALL)
    assert shown is not None
    before, machinery, after = LAUNCHER.read_text().partition("# --- Machinery")
    launcher = checkout(tmp_path) / LAUNCHER.name
    launcher.unlink()
    launcher.write_text(f"{before}{shown[1]}\n{machinery}{after}")
    launcher.chmod(0o755)
    planned = output_of(
        f"./{LAUNCHER.name} {shown[2]} --model models/tiny-llama --seq-lens 64 --dry-run -- --load-format dummy",
        tmp_path,
    )
    assert re.findall(r"--name (\w+) .*(--max-num-batched-tokens \d+)", planned) == [
        ("tp_2_steps_2048", "--max-num-batched-tokens 2048"),
        ("tp_2_steps_8192", "--max-num-batched-tokens 8192"),
    ]


def check_plan(words: list[str], folder: Path) -> None:
    """The launcher takes the words, and the experiment script takes what the launcher makes of them."""
    done = Launcher(folder)("--dry-run", *words)
    assert done.returncode == 0, done.stderr
    for planned in commands_of(done):
        script = next(index for index, word in enumerate(planned) if word.endswith("batch_inference_experiment.py"))
        parse_flags(planned[script + 1 :])


# --- tables -----------------------------------------------------------------------------------------------------------


def test_every_flag_of_the_experiment_is_in_the_table_with_its_default() -> None:
    fields = [field for field in dataclasses.fields(ExperimentConfig) if "help" in field.metadata]
    check_defaults(section(FLAGS, "The experiment script"), fields)


def test_every_option_of_the_launcher_is_in_the_table_with_its_default() -> None:
    fields = [field for field in dataclasses.fields(Options) if "help" in field.metadata]
    check_defaults(section(FLAGS, "The launcher"), fields)


def check_defaults(text: str, fields: list[dataclasses.Field[object]]) -> None:
    rows = {row[0].split("`")[1]: row for row in table_rows(text)}
    assert list(rows) == [flag_of(field.name) for field in fields]
    for field in fields:
        if isinstance(field.default, bool) or field.default is None:
            continue
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)
        assert rows[flag_of(field.name)][1].strip("`") == shown.removesuffix(".0")


def test_every_flag_of_the_analysis_is_in_its_table() -> None:
    actions = build_parser()._actions
    flags = {option for action in actions for option in action.option_strings} - {"-h", "--help"}
    rows = table_rows(section(FLAGS, "The analysis"))
    assert {word for row in rows for word in re.findall(r"`(--[a-z-]+)", row[0])} == flags


def test_every_preset_is_in_the_table_of_the_readme() -> None:
    presets = re.findall(r"^preset_([a-z-]+)\(\)", LAUNCHER.read_text(), re.MULTILINE)
    assert [row[0].strip("`") for row in table_rows(section(README, "The launcher"))] == presets


def test_every_option_that_the_launcher_says_in_its_help_is_in_the_table(tmp_path: Path) -> None:
    options = re.findall(r"^  (?:-h, )?(--[a-z-]+)", launch("--help", cwd=tmp_path).stdout, re.MULTILINE)
    assert len(options) > 8
    assert options == [row[0].strip("`") for row in table_rows(section(FLAGS, "The launcher"))]


def test_every_flag_that_a_page_names_is_one() -> None:
    """Also those in running text, and in the tables of the README."""
    known = {flag_of(field.name) for fields in (ExperimentConfig, Options) for field in dataclasses.fields(fields)}
    known |= {option for action in build_parser()._actions for option in action.option_strings}
    for page in (README, *DOCS.glob("*.md")):
        if page.name == "decisions.md":  # it also tells of what there was, and of other programs
            continue
        named = set(re.findall(r"`(?:[^`\n]*\s)?(--[a-z][a-z-]+)", page.read_text()))
        assert not named - known - FOREIGN_FLAGS, page.name


def test_every_plot_and_every_dependency_is_named() -> None:
    rows = [row[0].strip("`") for row in table_rows(section(ANALYSIS, "What is written"))]
    assert [row for row in rows if not row.startswith("*") and row.endswith(".png")] == [
        f"{name}.png" for name, _, _ in (*JOB_PLOTS, *PLOTS)
    ]
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    for package in (re.split(r"[<>=~]", line)[0] for line in lines if line and not line.startswith("#")):
        assert package.lower() in section(README, "Dependencies").lower()


# --- what programs wrote ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "part"),
    [pytest.param(page, part, id=f"{relative(page)}: {part.source}") for page in pages() for part in parts(page)],
)
def test_what_a_page_shows_is_what_the_program_says(page: Path, part: Part, tmp_path: Path) -> None:
    again = "PYTHONPATH=. python tests/pages.py"
    assert part.shown == part.made(checkout(tmp_path)), f"{relative(page)} is not up to date: {again}"


def test_no_part_is_missed_for_being_written_in_another_way() -> None:
    shown = [part for page in pages() for part in parts(page)]
    assert sum(page.read_text().count("<!-- end -->") for page in pages()) == len(shown)
    assert sum(part.chosen is None for part in shown) == 25
    assert sum(part.chosen is not None for part in shown) >= 8


def test_commands_of_outputs_stand_where_a_reader_sees_them() -> None:
    """A marker is not shown; tables of the program's own lists are no outputs."""
    shown = {part.source for page in pages() for part in parts(page) if part.chosen is not None}
    assert not {command for command in shown if " -m " not in command} - commands()


PICTURE_ROWS = [[cell.strip("`") for cell in row] for row in table_rows(PICTURES.read_text())]


@pytest.mark.slow
@pytest.mark.parametrize(("picture", "command", "plot"), PICTURE_ROWS)
def test_a_picture_is_what_its_command_draws(picture: str, command: str, plot: str, tmp_path: Path) -> None:
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    subprocess.run(words, cwd=checkout(tmp_path), check=True, capture_output=True, timeout=120)
    # Without the channel of transparency; other versions of a font move edges by a pixel.
    drawn, shown = (matplotlib.image.imread(file)[..., :3] for file in (tmp_path / plot, PICTURES.parent / picture))
    assert drawn.shape == shown.shape
    assert np.abs(drawn - shown).mean() < 0.01, f"{command} and copy {plot} to docs/h100/{picture}"


def test_every_picture_has_its_command() -> None:
    assert {row[0] for row in PICTURE_ROWS} == {file.name for file in PICTURES.parent.glob("*.png")}


# --- pages ------------------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= LONGEST_README
    prose = [line for line in lines if not line.startswith(("|", "<!--", "./", "python", "!"))]
    assert max(map(len, prose)) <= 120


def test_every_page_says_in_its_first_line_what_it_is_for_and_the_readme_leads_to_it() -> None:
    by_benchmarks = {
        name for file in (REPOSITORY / "benchmarks").glob("*.py")
        for name in re.findall(r"> ?docs/(\w+\.md)", file.read_text())
    }  # fmt: skip
    assert by_benchmarks
    for page in DOCS.glob("*.md"):
        if page.name in by_benchmarks:
            continue
        heading, first, *_ = page.read_text().split("\n\n")
        assert re.fullmatch(r"# \S[^\n]*", heading), page.name
        assert first.startswith("This page ") or page.name == "decisions.md", page.name
        assert f"](docs/{page.name}" in README.read_text(), page.name


def test_every_file_that_a_page_names_exists() -> None:
    for page in (*pages(), PICTURES):
        if page.name == "decisions.md":  # its own tests know what was superseded
            continue
        for name in re.findall(
            r"`((?:docs|tests|models|batch_inference|examples|benchmarks)/[\w./-]+)`", page.read_text()
        ):
            assert (REPOSITORY / name).exists(), f"{page.name}: {name}"
        for room, module in re.findall(r"`(core|plan|measure|launch|analyze)/(\w+\.py)`", page.read_text()):
            assert (REPOSITORY / "batch_inference" / room / module).exists(), f"{page.name}: {room}/{module}"


def test_every_link_leads_to_a_page_and_a_heading_that_exist() -> None:
    checked = 0
    for page in (*pages(), PICTURES, REPOSITORY / "examples" / "README.md"):
        for name, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
            if "://" in name:
                continue
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), f"{page.name}: {name}"
            if anchor:
                assert anchor in anchors(without_code(target.read_text())), f"{page.name}: {name}#{anchor}"
                checked += 1
    assert checked > 20


def without_code(text: str) -> str:
    """A comment in a block of code is no heading."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def test_every_page_that_the_program_names_exists() -> None:
    sources = [
        *(REPOSITORY / "batch_inference").rglob("*.py"), *REPOSITORY.glob("*.py"), *REPOSITORY.glob("*.sh"),
        *REPOSITORY.glob("*.txt"), *(REPOSITORY / "benchmarks").glob("*.py"),
    ]  # fmt: skip
    named = {name for file in sources for name in re.findall(r"\bdocs/\w+\.md", file.read_text())}
    assert len(named) > 5
    # What a benchmark was told to write is named in its --help.
    assert not {name for name in named if not (REPOSITORY / name).exists()}


def test_every_module_that_a_page_calls_can_be_called() -> None:
    for page in pages():
        for module in re.findall(r"python -m (batch_inference[\w.]+)", page.read_text()):
            assert importlib.util.find_spec(module), module


def test_the_changelog_has_its_headings() -> None:
    text = (REPOSITORY / "CHANGELOG.md").read_text()
    assert re.findall(r"^##+ (.*)$", text, re.MULTILINE) == ["Unreleased", "Features", "Fixes", "Result format"]
    for entries in text.split("\n### ")[1:3]:
        dates = re.findall(r"\((2\d{3}-\d\d-\d\d)\)$", entries, re.MULTILINE)
        assert len(dates) == entries.count("\n- ") > 5
        assert dates == sorted(dates, reverse=True), "newest first"
    versions = re.findall(r"^- \*\*Version (\d+)\*\*", text, re.MULTILINE)
    assert versions == [str(number) for number in range(SCHEMA_VERSION, 0, -1)]


def test_there_is_one_readme() -> None:
    """The name that sites show is a link to it."""
    assert (REPOSITORY / "README.md").readlink() == Path("README_batch_inference.md")


# --- the sample output of the quick start -----------------------------------------------------------------------------


def masked(text: str) -> set[str]:
    """Lines without what differs from run to run: numbers, verdicts and their reasons, the width of columns."""
    # A note is one line, however it was wrapped.
    text = re.sub(r"(?<=\S)\n {4}(?=[^ \d])|(?<=[^-])\n {4}(?=\d\S* ±)", " ", text)
    text = re.sub(r"\nFailed, missing and doubtful\n.*?\n\n", "\n", text, flags=re.DOTALL)
    text = re.sub(r"^ {6}\S.*\n", "", text, flags=re.MULTILINE)  # the reasons below a point
    # The answer names who wins, and whether another is as good.
    text = re.sub(r"\nOn \d devices? \(.*?(?=\nBest\n|\n\.\.\.\n)", "", text, flags=re.DOTALL)
    text = re.sub(r"\*(?=\s)", "", text)
    text = re.sub(r"\b(valid|suspect|invalid)\b", "VERDICT", text)
    text = re.sub(r"-{3,}", "-", re.sub(r"\d+(\.\d+)?", "#", text))
    lines = {" ".join(line.split()) for line in text.splitlines()}
    noise = ("* VERDICT", "tie, ", "±# s")
    return {line for line in lines if not line.startswith(noise)}


def sample() -> str:
    shown = re.search(r"```\n(\[1/2\] .*?)```", section(README, "Quick start"), re.DOTALL)
    assert shown is not None
    return shown[1]


def test_the_sample_output_is_short_and_fits_a_terminal() -> None:
    assert len(sample().splitlines()) <= LONGEST_SAMPLE
    assert max(map(len, sample().splitlines())) <= 80


def test_the_reason_in_the_sample_is_the_verdicts() -> None:
    point = make_point(latencies_s=[1.0, 1.3] * 5, verdict="suspect")
    reasons, _ = judge(make_result(points=[point], config={"num_runs": None, "target_ci": 0.05}), point)
    (differ,) = (reason for reason in reasons if reason.startswith("runs differ"))
    assert "\n".join(wrapped(f"      {differ}", indent=6)) in sample()


@pytest.mark.slow
@pytest.mark.skipif(len(find_devices()) < 2, reason="the sample is of two devices")
def test_the_sample_output_is_what_the_quick_start_prints(tmp_path: Path) -> None:
    # Long enough runs to be steady.
    done = launch("quickstart", cwd=tmp_path, STUB_RUN_S="0.01")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^On 2 devices \(.*tiny-llama, 64 \+ 32 tokens: ", done.stdout, re.MULTILINE)
    printed = masked(done.stdout + done.stderr.replace(f"{REPOSITORY}/", ""))
    # Whether the best point is suspect is a matter of the machine, too.
    of_this_machine = ("device", "host", "model", "ready after", "installing", "installed", "...", "VERDICT: see below")
    missing = {line for line in masked(sample()) - printed if not line.startswith(of_this_machine)}
    assert not missing
