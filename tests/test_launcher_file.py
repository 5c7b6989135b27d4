"""run_batch_experiments.sh as a file: small, one table of presets, found and started wherever a copy of it lies."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_launcher import LAUNCHER, Launcher, config_of, table_of

from batch_inference.launch.presets import read_table
from conftest import REPOSITORY, commands_of, is_running, with_ctrl_c

pytestmark = pytest.mark.slow

WAITING = 'trap "" INT TERM HUP; touch deaf; sleep 30 & wait; wait'


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    return Launcher(tmp_path)


def with_preset(launcher: Launcher, *lines: str) -> Launcher:
    """The launcher with one more preset, `mine`, from a copy of the checkout's file."""
    text = LAUNCHER.read_text()
    body = "".join(f"  {line}\n" for line in lines)
    head, machinery, tail = text.partition("# --- Machinery")
    copy = launcher.folder / "copy.sh"
    copy.write_text(f"{head}# a preset of a test\npreset_mine() {{\n{body}}}\n\n{machinery}{tail}")
    copy.chmod(0o755)
    launcher.file = copy
    launcher.environment["SLURM_SUBMIT_DIR"] = str(REPOSITORY)
    return launcher


def test_the_file_stays_a_table_of_presets_and_one_exec() -> None:
    text = LAUNCHER.read_text()
    assert len(text.splitlines()) <= 150
    assert len(re.findall(r"^\s*exec ", text, re.MULTILINE)) == 1
    assert not re.search(r"\beval\b", text)


def test_shellcheck_has_nothing_to_say() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, LAUNCHER], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_help_has_the_comment_of_every_preset(launcher: Launcher) -> None:
    done = with_preset(launcher, "setting TP=2")("--help")
    presets = re.findall(r"^# (.+)\npreset_([a-z-]+)\(\)", launcher.file.read_text(), re.MULTILINE)
    assert ("a preset of a test", "mine") in presets
    for comment, name in presets:
        assert re.search(rf"^  {name} +{re.escape(comment)}$", done.stdout, re.MULTILINE)


def test_a_setting_may_have_sizes_of_the_machine_a_suffix_and_flags_of_its_own(launcher: Launcher) -> None:
    with_preset(
        launcher,
        "flags --max-tokens 16 --seed 1",
        "setting TP=N suffix=ep --enable-expert-parallel --seed 2",
        "setting TP=N/2 DP=2",
        "setting PP=N/4 torchrun suffix=x.1",
    )
    done = launcher("mine", "--dry-run", "--", "--dtype", "half")
    assert done.returncode == 0, done.stderr
    configs = [config_of(words) for words in commands_of(done)]
    assert [config.name for config in configs] == ["tp_8_ep", "tp_4_dp_2", "torchrun_pp_2_x.1"]
    assert [config.seed for config in configs] == [2, 1, 1]
    assert configs[0].engine_args == ("--enable-expert-parallel",)
    assert configs[1].engine_args == ()
    assert {(config.max_tokens, config.dtype) for config in configs} == {(16, "half")}
    assert str(configs[0].output_path) == "experiment_results/tp_8_ep_results.json"
    assert "torch.distributed.run" in commands_of(done)[2]
    assert launcher("mine").returncode == 0
    assert launcher.names() == ["tp_8_ep", "tp_4_dp_2", "torchrun_pp_2_x.1"]


def test_a_setting_without_a_size_on_this_machine_is_left_out_with_a_line(launcher: Launcher) -> None:
    with_preset(launcher, "setting TP=N/4 suffix=ep", "setting TP=1")
    plan, done = launcher("mine", "--dry-run", DEVICES="6"), launcher("mine", DEVICES="6")
    said = "TP=N/4 suffix=ep is left out: N/4 of 6 devices is not a whole number"
    assert (plan.returncode, plan.stderr) == (0, "")
    assert said in " ".join(plan.stdout.replace("#", "").split())
    assert f"note: {said}" in done.stderr.splitlines()
    assert (done.returncode, launcher.names()) == (0, ["tp_1"])


def test_a_plan_for_another_machine_has_its_devices_as_n(launcher: Launcher) -> None:
    with_preset(launcher, "setting TP=N", "setting TP=N/16")
    done = launcher("mine", "--dry-run", "--devices", "8", DEVICES="2")
    assert [config_of(words).name for words in commands_of(done)] == ["tp_8"]
    assert "TP=N/16 is left out" in done.stdout
    done = launcher("mine", "--dry-run", "--json", "--devices", "8", DEVICES="2")
    assert [one["name"] for one in json.loads(done.stdout)] == ["tp_8"]
    assert done.stderr.startswith("note: TP=N/16 is left out")


def test_where_every_setting_is_left_out_none_can_run(launcher: Launcher) -> None:
    with_preset(launcher, "setting TP=N/7")
    done, plan = launcher("mine"), launcher("mine", "--dry-run")
    assert done.returncode == 1
    assert "no setting of mine can run" in done.stderr
    assert (plan.returncode, commands_of(plan)) == (0, [])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["setting TP=two"], "preset mine: 'setting TP=two': 'TP=two' is neither a flag nor TP=N"),
        (["setting TP=2 TP=4"], "preset mine: 'setting TP=2 TP=4': TP is given twice"),
        (["setting TP=2", "setting TP=2 --seed 1"], "preset mine: two settings are named tp_2; give one a suffix=WORD"),
        (["made_by magic"], "preset mine: 'made_by magic': it is one of custom"),
        (["echo 'what is this'"], "preset mine: 'what is this' is not a line of a preset"),
        (["setting TP=2 --max-tokens none"], "--max-tokens: 'none' was given"),
        (["setting TP=N/0"], "preset mine: 'setting TP=N/0': TP=N/0 is not a size"),
        (["false"], "preset mine: this command fails: false"),
    ],
)
def test_a_slip_in_a_preset_is_named(launcher: Launcher, lines: list[str], said: str) -> None:
    done = with_preset(launcher, *lines)("mine")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["mine2", "Mine", "my_fp8"])
def test_a_preset_may_have_any_plain_name(launcher: Launcher, name: str) -> None:
    with_preset(launcher, "setting TP=2 --seed 1")
    launcher.file.write_text(launcher.file.read_text().replace("preset_mine()", f"preset_{name} ()"))
    assert launcher(name, "--dry-run").returncode == 0


def test_a_preset_that_is_not_found_is_said(launcher: Launcher) -> None:
    with_preset(launcher, "setting TP=2")
    launcher.file.write_text(launcher.file.read_text().replace("preset_mine()", "function preset_mine"))
    done = launcher("tensor-parallel", "--dry-run")
    assert (done.returncode, done.stderr) == (
        2, "error: preset_mine: write it as preset_mine() at the beginning of a line\n",
    )  # fmt: skip


def test_words_of_a_preset_may_hold_anything(launcher: Launcher) -> None:
    with_preset(launcher, 'setting TP=2 --quantization $\'{"a": \\t"\\u3000 c"}\'')
    assert launcher("mine").returncode == 0
    (call,) = launcher.calls_file.read_text().rstrip("\n").split("\n")
    assert config_of(call.split("\x1f")[:-1]).engine_args == ("--quantization", '{"a": \t"\u3000 c"}')


def test_a_demo_replaces_only_what_is_in_its_own_folder_and_is_for_one_node(launcher: Launcher) -> None:
    with_preset(launcher, "demo", "setting TP=2")
    assert launcher("mine").returncode == 0
    assert launcher("mine", "--output-dir", "precious").returncode == 0
    overwrite = [config_of(call).overwrite for call in launcher.calls() if "--name" in call]
    assert overwrite == [True, False]
    assert launcher.calls()[-1][0].endswith("analyze_results.py")
    assert "mine is for one node" in launcher("mine", "--nnodes", "2").stderr


def test_any_word_of_a_preset_reaches_the_script(launcher: Launcher) -> None:
    words = r"""it's "$(x)" \ é *"""
    quoted = "'" + words.replace("'", "'\\''") + "'"
    launcher = with_preset(launcher, f"setting TP=1 --served-model-name {quoted}")
    assert launcher("mine").returncode == 0
    assert config_of(launcher.calls()[0]).engine_args == ("--served-model-name", words)


def test_more_nodes_than_a_setting_has_devices_skip_it(launcher: Launcher) -> None:
    done = launcher("tensor-parallel", "--nnodes", "4", "--master-addr", "h", "--dry-run")
    assert [config_of(words).name for words in commands_of(done)] == ["tp_4_nodes_4", "tp_8_nodes_4"]
    assert "tp_2_nodes_4 cannot run: its 2 devices cannot be divided evenly among 4 nodes" in " ".join(
        done.stdout.replace("#", "").split()
    )


def run_copy(
    copy: Path, folder: Path, launcher: Launcher, *words: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {**launcher.environment, **variables}
    return subprocess.run(["bash", copy, *words], cwd=folder, env=environment, capture_output=True, text=True)


def test_sbatch_of_the_launcher_finds_the_checkout(launcher: Launcher) -> None:
    """Slurm runs a copy of the script from a folder of its own."""
    copy = launcher.folder / "slurm_script"
    shutil.copy(LAUNCHER, copy)
    submitted = run_copy(
        copy, launcher.folder, launcher, "custom", "TP=1", "--dry-run", SLURM_SUBMIT_DIR=str(REPOSITORY)
    )
    assert submitted.returncode == 0, submitted.stderr
    assert commands_of(submitted)[0][1] == str(REPOSITORY / "batch_inference_experiment.py")
    here = run_copy(copy, REPOSITORY, launcher, "custom", "TP=1", "--dry-run")
    assert commands_of(here)[0][1] == "batch_inference_experiment.py"


def test_a_copy_that_finds_no_checkout_says_what_to_do(launcher: Launcher) -> None:
    copy = launcher.folder / "slurm_script"
    shutil.copy(LAUNCHER, copy)
    done = run_copy(copy, launcher.folder, launcher, "custom", "TP=1", SLURM_SUBMIT_DIR="/no/such/folder")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert "start the script (or sbatch) in the folder of the checkout" in done.stderr


@pytest.mark.parametrize("words", [("--help",), ("scaling-study", "--dry-run"), ("--nope",)])
def test_help_plan_and_wrong_use_need_pythons_own_library_alone(launcher: Launcher, words: tuple[str, ...]) -> None:
    python = Path(launcher.environment["PYTHON"])
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    environment = {name: value for name, value in launcher.environment.items() if name != "PYTHONPATH"}
    done = subprocess.run([LAUNCHER, *words], cwd=launcher.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == (2 if words == ("--nope",) else 0), done.stderr


def test_what_the_user_has_python_find_stays_found(launcher: Launcher) -> None:
    python = Path(launcher.environment["PYTHON"])
    python.write_text('#!/bin/sh\nprintf %s "$PYTHONPATH"\n')
    for theirs, whole in (("/theirs:/more", f"{REPOSITORY}:/theirs:/more"), ("", str(REPOSITORY))):
        assert launcher.as_program("--help", PYTHONPATH=theirs).stdout == whole


SETUP = """\
#!/usr/bin/env bash
echo "setup" >>"$CALLS"
here=$(dirname "$0")
mkdir -p "$here/.venv/bin" && cp "$PYTHON_IN_VENV" "$here/.venv/bin/python"
exit "${SETUP_FAILS:-0}"
"""


@pytest.fixture
def bare(launcher: Launcher) -> Launcher:
    """A checkout without .venv, on a machine whose python3 has no vLLM; its setup_env.sh makes a fake one."""
    checkout = launcher.folder / "checkout"
    shutil.copytree(REPOSITORY / "batch_inference", checkout / "batch_inference")
    shutil.copy(LAUNCHER, checkout)
    tools = launcher.folder / "bin"
    tools.mkdir()
    for file, text in {
        checkout / "setup_env.sh": SETUP,
        tools / "python3": f'#!/bin/sh\nexec {sys.executable} -S "$@"\n',
    }.items():
        file.write_text(text)
        file.chmod(0o755)
    launcher.environment["PYTHON_IN_VENV"] = launcher.environment.pop("PYTHON")
    launcher.environment["PATH"] = f"{tools}:{os.environ['PATH']}"
    launcher.environment.pop("PYTHONPATH", None)
    launcher.file = checkout / "run_batch_experiments.sh"
    return launcher


def test_what_measures_nothing_installs_nothing(bare: Launcher) -> None:
    for words in (("--help",), ("nope",), ("custom", "TP=1", "--dry-run"), ("custom", "TP=512")):
        bare.as_program(*words)
    assert bare.calls() == []


def test_an_installation_is_found_whatever_the_folder_is_called(bare: Launcher) -> None:
    folder = bare.folder / "co [1] *"
    (bare.folder / "checkout").rename(folder)
    installed = bare.folder / "installed"
    (installed / "bin").mkdir(parents=True)
    shutil.copy(bare.environment["PYTHON_IN_VENV"], installed / "bin" / "python")
    (installed / ".installed-abc").touch()
    (folder / ".venv").symlink_to(installed)
    bare.file = folder / "run_batch_experiments.sh"
    done = bare.as_program("custom", "TP=1")
    assert done.returncode == 0, done.stderr
    assert (bare.calls_file.read_text().count("setup"), bare.names()) == (0, ["tp_1"])


def test_a_missing_vllm_is_installed_and_the_preset_goes_on(bare: Launcher) -> None:
    done = bare.as_program("custom", "TP=1", "--output-dir", "x y")
    assert done.returncode == 0, done.stderr
    assert bare.calls_file.read_text().splitlines()[0] == "setup"
    assert bare.names() == ["tp_1"]
    assert (
        f"analyse with: {bare.folder}/checkout/.venv/bin/python {bare.folder}/checkout/analyze_results.py"
        in done.stderr
    )


def test_a_failed_installation_ends_the_launcher(bare: Launcher) -> None:
    assert bare.as_program("custom", "TP=1", SETUP_FAILS="1").returncode == 1
    assert bare.names() == []


def start(launcher: Launcher, *command: str, python: str | None = None) -> subprocess.Popen[str]:
    """The launcher until its first setting runs. `python`: what that does, instead of sleeping."""
    if python:
        path = Path(launcher.environment["PYTHON"])
        path.write_text(path.read_text() + python)
    process = subprocess.Popen(
        [*command, str(LAUNCHER), "custom", "TP=1"],
        cwd=launcher.folder, env={**launcher.environment, **({} if python else {"WAIT_FOR": "tp_1"})}, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=with_ctrl_c,
    )  # fmt: skip
    deadline_s = time.monotonic() + 10
    while not launcher.names():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    return process


def children_of(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_a_second_signal_kills_what_does_not_end(launcher: Launcher) -> None:
    process = start(launcher, python=WAITING)
    deadline_s = time.monotonic() + 10
    while not (launcher.folder / "deaf").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    (setting,) = children_of(process)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 130
    deadline_s = time.monotonic() + 5
    while is_running(setting):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_a_terminal_that_is_closed_hangs_up_twice_and_kills_nothing(launcher: Launcher) -> None:
    process = start(launcher, python=WAITING)
    time.sleep(0.3)  # the setting has to be deaf by now
    (setting,) = children_of(process)
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.3)
    assert Path(f"/proc/{setting}").exists()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 129


def test_what_nohup_ignores_stays_ignored(launcher: Launcher) -> None:
    process = start(launcher, "nohup")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 143


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&-", "| head -n 1", "2>&1 | head -n 1"])
def test_a_closed_terminal_or_pipe_costs_no_setting_and_no_traceback(launcher: Launcher, redirection: str) -> None:
    for words in ("--help", "custom TP=1 --dry-run", "custom TP=1", "custom TP=1 --pack"):
        done = subprocess.run(
            ["bash", "-c", f"{LAUNCHER} {words} {redirection}"], cwd=launcher.folder, env=launcher.environment,
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
    deadline_s = time.monotonic() + 5
    while len(launcher.names()) < 2:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_the_presets_of_the_file_are_these() -> None:
    presets = read_table(table_of(LAUNCHER.read_text()).stdout)
    tensor, pipeline, data = ([[f"{key}={size}"] for size in sizes] for key, sizes in (
        ("TP", (1, 2, 4, 8)), ("PP", (1, 2, 4)), ("DP", (1, 2, 4)),
    ))  # fmt: skip
    mixed = [["TP=2", "PP=2"], ["TP=4", "PP=2"], ["TP=2", "PP=4"], ["TP=4", "PP=4"]]
    replicas = [["TP=2", "DP=2"], ["TP=4", "DP=2"], ["TP=2", "DP=4"]]
    four = "TP2_PP2, TP4_PP2, TP2_PP4, TP4_PP4"
    assert [(one.name, one.comment, one.settings) for one in presets.values()] == [
        ("tensor-parallel", "TP=1, 2, 4, 8", tensor),
        ("pipeline-parallel", "PP=1, 2, 4", pipeline),
        ("mixed-parallel", four, mixed),
        ("data-parallel", "DP=1, 2, 4", data),
        (
            "scaling-study",
            "all of the above, plus TP2_DP2, TP4_DP2, TP2_DP4",
            tensor + pipeline + mixed + data + replicas,
        ),
        ("torchrun-tensor-parallel", "TP=2, 4, 8 under torchrun", [[*words, "torchrun"] for words in tensor[1:]]),
        ("torchrun-mixed-parallel", f"{four} under torchrun", [[*words, "torchrun"] for words in mixed]),
        (
            "expert-parallel",
            "TP=N; with whole experts TP=N, DP=N, TP=2 DP=N/2",
            [["TP=N"], ["TP=N", "experts"], ["DP=N", "experts"], ["TP=2", "DP=N/2", "experts"]],
        ),
        ("custom", "one setting: any of TP=x PP=y DP=z, and experts", []),
        ("best", "searches for the best setting on all devices", []),
        ("quickstart", "a first try: a tiny model at TP=1, 2, with analysis", [["TP=1"], ["TP=2"]]),
    ]
    special = [(one.name, one.made_by, one.is_demo, one.flags) for one in presets.values() if one.flags or one.made_by]
    flags = (
        "--load-format dummy --kv-cache-memory-bytes 268435456 "
        "--batch-sizes 1,2,4 --seq-lens 64,128 --max-tokens 32 --target-ci 0.05"
    )
    assert special == [
        ("custom", "custom", False, []),
        ("quickstart", None, True, ["--model", f"{REPOSITORY}/models/tiny-llama", *flags.split()]),
    ]
