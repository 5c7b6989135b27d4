"""run_batch_experiments.sh with a fake Python that writes down how it was called."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.flags import parse_flags
from batch_inference.launch.__main__ import main as launch
from batch_inference.plan import devices
from conftest import (
    REPOSITORY,
    TINY,
    assert_answers_at_once,
    commands_of,
    running_in,
    stub_environment,
    with_ctrl_c,
    with_weights,
)
from in_process import called

LAUNCHER = REPOSITORY / "run_batch_experiments.sh"
# Runs the launcher's own Python for as many GPUs as it is told; notes the arguments of everything else, and fails or
# waits for the setting it is told to.
FAKE_PYTHON = (
    f"""\
#!/usr/bin/env bash
if [[ "$1 $2 $3" == "-P -m batch_inference.launch" ]]; then
  exec {sys.executable} {REPOSITORY}/tests/with_gpus.py "${{@:4}}"
fi
"""
    + """\
printf -v call '%s\\x1f' "$@"; printf '%s\\n' "$call" >>"$CALLS" # one write: with --pack two of these run at once
[[ $* != *analyze_results.py* ]] || exit "${ANALYSIS:-0}"
[[ $* != *"--name ${WAIT_FOR:-nothing} "* ]] || sleep 30
[[ -z ${RESULTS:-} ]] || cp "$RESULTS"/* experiment_results/
[[ $* != *"--name ${FAIL:-nothing} "* ]] || exit "${FAIL_WITH:-1}"
"""
)
ALL = [
    "tp_1", "tp_2", "tp_4", "tp_8", "pp_2", "pp_4", "tp_2_pp_2", "tp_4_pp_2", "tp_2_pp_4", "tp_4_pp_4", "dp_2", "dp_4",
    "tp_2_dp_2", "tp_4_dp_2", "tp_2_dp_4",
]  # fmt: skip


# Prints the table of presets that the launcher hands on.
PRINT_TABLE = '#!/bin/sh\nprintf %s "$4"\n'


@cache
def table_of(launcher_text: str) -> subprocess.CompletedProcess[str]:
    """What bash makes of the presets in a launcher's file; its errors."""
    with tempfile.TemporaryDirectory() as folder:
        file, python = Path(folder, "launcher.sh"), Path(folder, "python")
        for path, text in ((file, launcher_text), (python, PRINT_TABLE)):
            path.write_text(text)
            path.chmod(0o755)
        environment = {**os.environ, "PYTHON": str(python), "SLURM_SUBMIT_DIR": str(REPOSITORY)}
        return subprocess.run([file], capture_output=True, text=True, cwd=folder, env=environment, timeout=30)


class Launcher:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = LAUNCHER
        self.calls_file = folder / "calls"
        python = folder / "python"
        python.write_text(FAKE_PYTHON)
        python.chmod(0o755)
        self.environment = stub_environment(PYTHON=str(python), CALLS=str(self.calls_file))

    def __call__(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Its Python in this process, for as many GPUs as it is told; what it starts are processes."""
        table = table_of(self.file.read_text())
        if table.returncode:
            return table
        environment = {**self.environment, **variables}
        gpus = tuple(map(str, range(int(environment.get("DEVICES", "8")))))
        command = [table.stdout, environment["PYTHON"], f"{REPOSITORY}/", *words]
        with mock.patch.object(devices, "_gpu_ids", return_value=gpus):
            return called(lambda: launch(command), [str(self.file), *words], self.folder, environment)

    def as_program(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """The file itself, as a user starts it."""
        return subprocess.run(
            [str(self.file), *words],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={**self.environment, **variables},
            timeout=30,
        )

    def calls(self) -> list[list[str]]:
        if not self.calls_file.exists():
            return []
        return [line.split("\x1f")[:-1] for line in self.calls_file.read_text().splitlines()]

    def names(self) -> list[str]:
        return [call[call.index("--name") + 1] for call in self.calls() if "--name" in call]


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    return Launcher(tmp_path)


def config_of(words: list[str]) -> ExperimentConfig:
    """The configuration that the experiment script makes of a command line."""
    script = next(index for index, word in enumerate(words) if word.endswith("batch_inference_experiment.py"))
    return parse_flags(words[script + 1 :])[0]


@pytest.mark.parametrize(
    ("preset", "names"),
    [
        ("tensor-parallel", ["tp_1", "tp_2", "tp_4", "tp_8"]),
        ("pipeline-parallel", ["tp_1", "pp_2", "pp_4"]),
        ("mixed-parallel", ["tp_2_pp_2", "tp_4_pp_2", "tp_2_pp_4", "tp_4_pp_4"]),
        ("data-parallel", ["tp_1", "dp_2", "dp_4"]),
        ("scaling-study", ALL),
        ("quickstart", ["tp_1", "tp_2"]),
    ],
)
def test_a_preset_runs_its_settings_each_once(launcher: Launcher, preset: str, names: list[str]) -> None:
    done = launcher(preset, DEVICES="16")
    assert done.returncode == 0, done.stderr
    assert launcher.names() == names


def test_names_files_and_sizes_belong_together(launcher: Launcher) -> None:
    launcher("mixed-parallel")
    for call in launcher.calls():
        config = config_of(call)
        assert config.name == dataclasses.replace(config, name=None).setting_name
        assert str(config.output_path) == f"experiment_results/{config.name}_results.json"
        assert config.distributed_executor_backend == "mp"


@pytest.mark.parametrize("preset", ["torchrun-tensor-parallel", "torchrun-mixed-parallel"])
def test_torchrun_presets_start_one_process_per_device(launcher: Launcher, preset: str) -> None:
    done = launcher(preset, "--dry-run")
    assert len(commands_of(done)) == 3
    for words in commands_of(done):
        sizes = [int(words[words.index(f"--{kind}-parallel-size") + 1]) for kind in ("tensor", "pipeline", "data")]
        assert int(words[words.index("--nproc-per-node") + 1]) == sizes[0] * sizes[1] * sizes[2]
        assert words[words.index("--distributed-executor-backend") + 1] == "external_launcher"
        assert words[words.index("--name") + 1].startswith("torchrun_tp_")
        assert "--standalone" in words


def test_torchrun_over_nodes_shares_out_the_processes(launcher: Launcher) -> None:
    nodes = ("--nnodes", "2", "--node-rank", "1", "--master-addr", "head", "--master-port", "1234")
    done = launcher("torchrun-tensor-parallel", *nodes, "--dry-run", DEVICES="4")
    words = commands_of(done)[-1]
    assert words[words.index("--nproc-per-node") + 1] == "4"
    assert words[words.index("--node-rank") + 1] == "1"
    assert words[words.index("--master-addr") + 1] == "head"
    assert words[words.index("--master-port") + 1] == "1239"  # of the third setting, which meets on 1238


@pytest.mark.slow
def test_the_slurm_example_gives_every_node_its_number(launcher: Launcher) -> None:
    """srun and scontrol are stand-ins: srun runs its command once for each node."""
    tools = launcher.folder / "bin"
    tools.mkdir()
    srun = 'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "${@:2}"; done'
    for name, text in {"scontrol": "printf 'node-a\\nnode-b\\n'", "srun": srun}.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node-[a-b]"}
    done = subprocess.run(
        ["bash", str(REPOSITORY / "examples" / "slurm_two_nodes.sbatch"), "--dry-run"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**launcher.environment, **job, "PATH": f"{tools}:{os.environ['PATH']}", "DEVICES": "4"},
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    plans = commands_of(done)
    assert len(plans) == 6  # three settings on each node
    assert [words[words.index("--node-rank") + 1] for words in plans] == ["0"] * 3 + ["1"] * 3
    assert {words[words.index("--master-addr") + 1] for words in plans} == {"node-a"}
    assert [words[words.index("--master-port") + 1] for words in plans] == ["20281", "20283", "20285"] * 2


def test_torchrun_skips_what_cannot_be_shared_out_over_the_nodes(launcher: Launcher) -> None:
    nodes = ("--nnodes", "4", "--node-rank", "0", "--master-addr", "head")
    done = launcher("torchrun-tensor-parallel", *nodes, "--dry-run")
    assert [words[words.index("--nproc-per-node") + 1] for words in commands_of(done)] == ["1", "2"]
    said = "torchrun_tp_2_nodes_4 cannot run: its 2 devices cannot be divided evenly among 4 nodes"
    assert said in " ".join(done.stdout.replace("#", "").split())


def test_other_presets_over_nodes_use_mp_for_one_replica_and_torchrun_for_more(launcher: Launcher) -> None:
    nodes = ("--nnodes", "2", "--node-rank", "1", "--master-addr", "head", "--master-port", "1234")
    done = launcher("scaling-study", *nodes, "--dry-run")
    commands = {words[words.index("--name") + 1]: words for words in commands_of(done)}
    replicated = [name for name in ALL if "dp_" in name]
    names = [name for name in ALL if name not in ("tp_1", *replicated)] + [f"torchrun_{name}" for name in replicated]
    assert list(commands) == [f"{name}_nodes_2" for name in names]
    for name, words in commands.items():
        config = config_of(words)
        if name.startswith("torchrun_"):
            assert (config.nnodes, config.distributed_executor_backend) == (1, "external_launcher")
            assert words[words.index("--nnodes") + 1] == "2"
        else:
            assert (config.nnodes, config.node_rank, config.master_addr) == (2, 1, "head")
            assert config.distributed_executor_backend == "mp"
    # No two settings share a port.
    ports = [int(words[words.index("--master-port") + 1]) for words in commands.values()]
    assert all(later - earlier >= 2 for earlier, later in itertools.pairwise(sorted(ports)))
    plan = " ".join(done.stdout.replace("#", "").split())
    assert "one replica by vLLM's own mp; several (DP) by torchrun" in plan
    assert "tp_1_nodes_2 cannot run: its 1 device cannot be divided evenly among 2 nodes" in plan


def test_a_plan_is_a_script_that_says_what_every_setting_needs(launcher: Launcher) -> None:
    model = with_weights("llama-2-7b")
    done = launcher(
        "scaling-study", "--model", model, "--seq-lens", "512", "--dry-run", "--", "--device-memory-gib", "80",
        DEVICES="16",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    comments = [line for line in done.stdout.splitlines() if line.startswith("#")]
    rows = {line.split()[1]: line.split()[2:] for line in comments if len(line.split()) == 8 and "devices" not in line}
    assert list(rows) == ALL
    # devices, replicas, by, weights GiB, KV tokens, requests of 512 + 128 tokens in one wave
    assert rows["tp_1"][:4] == ["1", "1", "uni", "12.6"]
    assert rows["dp_4"][:4] == ["4", "4", "uni", "12.6"]
    assert rows["tp_2_pp_4"][:4] == ["8", "1", "mp", "1.63"]
    pool_tokens = (80 * 0.8 - 12.55) * 2**30 / (2 * 32 * 32 * 128 * 2)
    assert int(rows["tp_1"][4]) == pytest.approx(pool_tokens, rel=0.01)
    assert int(rows["tp_1"][5]) == pytest.approx(pool_tokens / 640, rel=0.01)
    assert max(map(len, comments)) <= 80
    assert len(commands_of(done)) == len(ALL)


def test_a_plan_for_another_machine_counts_its_devices_and_prints_commands_without_its_flags(
    launcher: Launcher,
) -> None:
    model = with_weights("llama-2-7b")
    words = ("tensor-parallel", "--model", model, "--dry-run", "--device-memory-gib", "80")
    elsewhere = launcher(*words, "--devices", "4", DEVICES="0")
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert f"# {model} on 4 gpu devices" in elsewhere.stdout
    assert "# tp_8 cannot run: it needs 8 devices, but there are 4 (gpu)" in elsewhere.stdout
    assert [config_of(words).name for words in commands_of(elsewhere)] == ["tp_1", "tp_2", "tp_4"]
    for planned in commands_of(elsewhere):
        assert not {"--devices", "--device-memory-gib", "--dry-run"} & set(planned)
    # After the dashes it is the script's own, and still of the plan alone.
    after = launcher(*words[:4], "--devices", "4", "--", "--device-memory-gib=80", "--seed", "3")
    assert [config_of(words).seed for words in commands_of(after)] == [3, 3, 3]
    assert [words[-2:] for words in commands_of(after)] == [["--seed", "3"]] * 3
    assert "105360" in after.stdout


def test_a_plan_for_scripts_is_a_list_with_an_object_for_each_setting(launcher: Launcher) -> None:
    model = with_weights("llama-2-7b")
    words = ("tensor-parallel", "--dry-run", "--json", "--devices", "4", "--seq-lens", "512,1024")
    done = launcher(*words, "--model", model, "--device-memory-gib", "80")
    assert (done.returncode, done.stderr) == (0, "")
    plan = json.loads(done.stdout)
    assert [list(one) for one in plan] == [
        [
            "name",
            "devices",
            "replicas",
            "obstacle",
            "weights_gib",
            "kv_cache_tokens",
            "requests_in_one_wave",
            "source",
            "unknown",
            "max_model_len",
            "activations_counted",
        ]
    ] * 4
    first, *_, last = plan
    assert (first["name"], first["devices"], first["replicas"], first["obstacle"]) == ("tp_1", 1, 1, None)
    assert (round(first["weights_gib"], 2), first["kv_cache_tokens"], first["source"]) == (12.55, 105360, "formula")
    assert first["requests_in_one_wave"] == {"512": 164, "1024": 91}
    assert last["obstacle"] == "it needs 8 devices, but there are 4 (gpu)"
    # Unknown is null: the memory of the devices; of a hub model also the weights.
    first = json.loads(launcher(*words, "--model", model).stdout)[0]
    assert (first["kv_cache_tokens"], first["requests_in_one_wave"], first["source"]) == (None, None, "formula")
    first = json.loads(launcher(*words, "--model", "org/name").stdout)[0]
    assert (first["weights_gib"], first["source"]) == (None, None)
    assert first["unknown"] == ["memory unknown: a hub name says nothing about the model's sizes"]


@pytest.mark.parametrize(
    ("batch_sizes", "words"),
    [
        ("1,16,64,256", "add up to 2, 32, 128, 512; add 8, 32, 128 to --batch-sizes"),
        ("1", "add up to 2; add 2 to --batch-sizes"),
        ("1,4,8,16", None),
    ],
)
def test_batches_that_keep_replicas_from_being_compared_are_named_before_they_are_measured(
    launcher: Launcher, batch_sizes: str, words: str | None
) -> None:
    preset = ("scaling-study", "--batch-sizes", batch_sizes)
    done, planned = launcher(*preset, DEVICES="2"), launcher(*preset, "--dry-run", DEVICES="2")
    assert (done.returncode, planned.returncode) == (0, 0)
    plan = " ".join(planned.stdout.replace("#", "").split())
    for text in (done.stderr, plan):
        assert ("dp_2 will not be compared with tp_2, pp_2" in text) == (words is not None)
        assert words is None or words in text
    # The plan says it once, and stays a script.
    assert planned.stderr == ""


def test_a_plan_names_what_the_model_does_not_allow(launcher: Launcher) -> None:
    done = launcher("tensor-parallel", "--model", TINY, "--seq-lens", "64",
                    "--dry-run", DEVICES="16")  # fmt: skip
    assert len(commands_of(done)) == 4
    done = launcher("custom", "PP=8", "--model", TINY, "--seq-lens", "64")
    assert done.returncode == 1
    assert "pp_8 skipped: --pipeline-parallel-size 8 is more stages than the model's 4 layers" in done.stderr


def test_a_ray_cluster_may_have_more_devices_than_this_machine(launcher: Launcher) -> None:
    assert launcher("custom", "TP=8", "--", "--distributed-executor-backend", "ray", DEVICES="1").returncode == 0
    assert launcher.names() == ["tp_8"]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("TP=2",), "tp_2"),
        (("PP=2", "TP=4"), "tp_4_pp_2"),
        (("DP=2", "PP=1"), "dp_2"),
        (("TP=1",), "tp_1"),
        (("TP=2", "PP=2", "DP=2"), "tp_2_pp_2_dp_2"),
        (("DP=4", "experts", "TP=2"), "tp_2_dp_4_ep"),
    ],
)
def test_custom_takes_any_sizes_in_any_order(launcher: Launcher, words: tuple[str, ...], name: str) -> None:
    assert launcher("custom", *words).returncode == 0
    assert launcher.names() == [name]


@pytest.mark.parametrize(
    "words",
    [
        ("--model", "a b", "--seq-lens=64", "--output-dir", "out dir", "custom", "TP=2"),
        ("custom", "--model=a b", "TP=2", "--output-dir", "out dir", "--seq-lens", "64"),
    ],
)
def test_options_stand_before_or_after_the_preset(launcher: Launcher, words: tuple[str, ...]) -> None:
    assert launcher(*words).returncode == 0
    config = config_of(launcher.calls()[0])
    assert (config.model, config.seq_lens, str(config.output_path)) == ("a b", (64,), "out dir/tp_2_results.json")


def test_what_stands_after_the_dashes_goes_to_the_script_and_wins(launcher: Launcher) -> None:
    launcher("custom", "TP=2", "--batch-sizes", "1", "--", "--batch-sizes", "7", "--load-format", "dummy")
    config = config_of(launcher.calls()[0])
    assert config.batch_sizes == (7,)
    assert config.engine_args == ("--load-format", "dummy")


def test_packed_settings_run_side_by_side_the_longest_first_and_are_marked(launcher: Launcher) -> None:
    done = launcher("tensor-parallel", "--pack", FAIL="tp_4", DEVICES="7")
    assert done.returncode == 1
    assert sorted(launcher.names()) == ["tp_1", "tp_2", "tp_4"]
    assert all(config_of(call).packed for call in launcher.calls())
    starts = [line for line in done.stderr.splitlines() if " on device" in line]
    assert starts == [
        "[1/3] tp_1 on device 0 -> experiment_results/tp_1_results.json",
        "[2/3] tp_2 on devices 1,2 -> experiment_results/tp_2_results.json",
        "[3/3] tp_4 on devices 3,4,5,6 -> experiment_results/tp_4_results.json",
    ]
    (end,) = (line for line in done.stderr.splitlines() if line.startswith("done: "))
    assert re.fullmatch(r"done: (tp_1 tp_2|tp_2 tp_1)   skipped: tp_8   failed: tp_4", end)


def test_packed_settings_are_wrong_use_only_where_all_are(launcher: Launcher) -> None:
    assert launcher("tensor-parallel", "--pack", FAIL="tp_1", FAIL_WITH="2", DEVICES="1").returncode == 2
    done = launcher("tensor-parallel", "--pack", FAIL="tp_1", FAIL_WITH="2", DEVICES="3")
    assert done.returncode == 1
    assert "done: tp_2   skipped: tp_4 tp_8   failed: tp_1" in done.stderr


def test_a_plan_says_that_settings_are_packed(launcher: Launcher) -> None:
    done = launcher("tensor-parallel", "--pack", "--dry-run")
    assert "# side by side where devices are free, the longest first; points are marked" in done.stdout
    assert all(config_of(words).packed for words in commands_of(done))


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_resume_and_overwrite_are_passed_on(launcher: Launcher, flag: str) -> None:
    launcher("custom", "TP=1", flag)
    assert launcher.calls()[0].count(flag) == 1
    launcher("quickstart", flag)
    assert config_of(launcher.calls()[1]).resume == (flag == "--resume")


def test_quickstart_ends_with_the_analysis_of_its_folder(launcher: Launcher) -> None:
    launcher("quickstart", "--output-dir", "q")
    *_, last = launcher.calls()
    assert last[0].endswith("analyze_results.py")
    assert last[1:] == ["--input", "q"]


def test_quickstart_analyses_what_succeeded_and_still_names_the_failure(launcher: Launcher) -> None:
    done = launcher("quickstart", FAIL="tp_2")
    assert done.returncode == 1
    assert launcher.calls()[-1][0].endswith("analyze_results.py")


def test_quickstart_without_any_result_is_exit_1_and_starts_no_analysis(launcher: Launcher) -> None:
    done = launcher("quickstart", DEVICES="1", FAIL="tp_1", ANALYSIS="2")
    assert done.returncode == 1
    assert launcher.names() == ["tp_1"]
    assert len(launcher.calls()) == 1


def test_a_failed_analysis_is_no_wrong_use_of_the_launcher(launcher: Launcher) -> None:
    assert launcher("quickstart", ANALYSIS="2").returncode == 1


def test_every_setting_says_where_its_file_goes_and_the_end_how_to_analyse(launcher: Launcher) -> None:
    done = launcher("data-parallel", "--output-dir", "out dir", DEVICES="2")
    assert "[2/3] dp_2 -> out dir/dp_2_results.json" in done.stderr.splitlines()
    advice = next(line for line in done.stderr.splitlines() if line.startswith("analyse with: "))
    assert shlex.split(advice)[-2:] == ["--input", "out dir"]


def test_a_setting_that_needs_more_devices_is_skipped_and_no_failure(launcher: Launcher) -> None:
    done = launcher("tensor-parallel", DEVICES="2")
    assert done.returncode == 0
    assert launcher.names() == ["tp_1", "tp_2"]
    assert "tp_4 skipped: it needs 4 devices, but there are 2" in done.stderr


def test_nothing_that_could_run_is_exit_1(launcher: Launcher) -> None:
    done = launcher("mixed-parallel", DEVICES="2")
    assert done.returncode == 1
    assert "no setting of mixed-parallel can run" in done.stderr


def test_one_failure_does_not_stop_the_rest_and_is_named(launcher: Launcher) -> None:
    done = launcher("tensor-parallel", FAIL="tp_2")
    assert done.returncode == 1
    assert launcher.names() == ["tp_1", "tp_2", "tp_4", "tp_8"]
    assert "done: tp_1 tp_4 tp_8   skipped: none   failed: tp_2" in done.stderr


def test_what_is_wrong_for_the_first_setting_stops_all(launcher: Launcher) -> None:
    done = launcher("tensor-parallel", FAIL="tp_1", FAIL_WITH="2")
    assert done.returncode == 2
    assert launcher.names() == ["tp_1"]


def test_a_setting_refused_later_is_a_failure_like_others(launcher: Launcher) -> None:
    done = launcher("tensor-parallel", FAIL="tp_2", FAIL_WITH="2")
    assert done.returncode == 1
    assert len(launcher.names()) == 4


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_any_path_and_name_reaches_the_script_as_it_was_given(launcher: Launcher, locale: str) -> None:
    folder = """rés  it's $(x) & \\ "y\""""
    for flags in (("--dry-run",), (), ("--pack",)):
        done = launcher.as_program(
            "custom", "TP=1", *flags, "--output-dir", folder, "--", "--name", "my run", LC_ALL=locale
        )
        assert done.returncode == 0, done.stderr
        for words in [*commands_of(done), *launcher.calls()]:
            assert words[words.index("--output-dir") + 1] == folder
            assert config_of(words).name == "my run"
        assert flags == ("--dry-run",) or "done: tp_1 " in done.stderr


@pytest.mark.parametrize("code", ["129", "130", "143"])
def test_an_interrupted_setting_stops_all(launcher: Launcher, code: str) -> None:
    done = launcher("tensor-parallel", FAIL="tp_2", FAIL_WITH=code)
    assert done.returncode == int(code)
    assert launcher.names() == ["tp_1", "tp_2"]


# Each signal, and each way to run settings with two signals; the rest of the pairs are slow.
@pytest.mark.parametrize(
    ("signal_number", "to_group", "code", "flags"),
    [
        (signal.SIGINT, True, 130, ()),  # as a terminal sends it, to the launcher's whole group
        (signal.SIGINT, False, 130, ("--pack",)),
        (signal.SIGTERM, False, 143, ()),
        (signal.SIGHUP, False, 129, ("--pack",)),
        pytest.param(signal.SIGINT, True, 130, ("--pack",), marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, False, 130, (), marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, False, 143, ("--pack",), marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, False, 129, (), marks=pytest.mark.slow),
    ],
)
def test_a_stopped_launcher_starts_no_further_setting_and_leaves_no_process(
    launcher: Launcher, signal_number: signal.Signals, to_group: bool, code: int, flags: tuple[str, ...]
) -> None:
    process = subprocess.Popen(
        [str(LAUNCHER), "tensor-parallel", *flags],
        cwd=launcher.folder,
        env={**launcher.environment, "WAIT_FOR": "tp_2", "DEVICES": "4"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=with_ctrl_c,
    )
    deadline_s = time.monotonic() + 10
    while sorted(launcher.names()) != ["tp_1", "tp_2"]:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    # tp_2 waits; what else still runs with --pack is about to end.
    groups = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert groups
    send = os.killpg if to_group else os.kill
    send(process.pid, signal_number)
    assert process.wait(timeout=10) == code
    assert sorted(launcher.names()) == ["tp_1", "tp_2"]
    while any(map(running_in, groups)):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nope",), "'nope' is not a preset"),
        (("tensor-parallel", "extra"), "'extra' is one word too many"),
        (("custom",), "at least one of TP=N"),
        (("custom", "TP=0"), "custom TP: '0' was given"),
        (("custom", "TP=18446744073709551617"), "custom TP: '18446744073709551617' was given"),
        (("custom", "TP=two"), "custom TP: 'two' was given"),
        (("custom", "XX=2"), "'XX=2' was given"),
        (("custom", "TP=1", "TP=2"), "TP is given twice"),
        (("quickstart", "--devices", "8"), "--devices 8: it is only for a plan; add --dry-run"),
        (("quickstart", "--devices", "0", "--dry-run"), "--devices: '0' was given"),
        (("quickstart", "--dry-run", "--", "--devices", "8"), "--devices: give it once and before --"),
        (("quickstart", "--", "--devices", "8"), "--devices 8: it is only for a plan; add --dry-run"),
        (("quickstart", "--json"), "--json: it works only with a plan; add --dry-run"),
        (("quickstart", "--modle", "x"), "--modle: unknown option"),
        (("quickstart", "-x"), "-x: unknown option"),
        (("quickstart", "--model"), "--model: a value is needed"),
        (("quickstart", "--model="), "--model: a value is needed"),
        (("quickstart", "--model", "--dry-run"), "--model: a value is needed"),
        (("torchrun-tensor-parallel", "--nnodes", "x"), "--nnodes: 'x' was given"),
        (("torchrun-tensor-parallel", "--nnodes", "2"), "--master-addr HOST is needed"),
        (("torchrun-tensor-parallel", "--node-rank", "1"), "--node-rank: '1' was given without --master-addr HOST"),
        (
            ("tensor-parallel", "--settle-s", "0"),
            "--settle-s: '0' was given; a number above 0 and up to 1000000 is needed",
        ),
        (("tensor-parallel", "--master-port", "1"), "--master-port: '1' was given without --master-addr HOST"),
        (
            ("tensor-parallel", "--meeting-secret", "s3"),
            "--meeting-secret: '<meeting_secret>' was given without --master-addr HOST",
        ),
        (("quickstart", "--master-addr", "h"), "--master-addr: 'h' was given, but quickstart is for one node"),
        (("tensor-parallel", "--pack", "--master-addr", "h"), "--master-addr 'h' was given"),
        (("torchrun-tensor-parallel", "--nnodes", "2", "--node-rank", "2"), "--node-rank: '2' was given"),
        (("tensor-parallel", "--nnodes", "2"), "--master-addr HOST is needed too"),
        (("quickstart", "--nnodes", "2"), "quickstart is for one node"),
        (
            ("tensor-parallel", "--nnodes", "2", "--master-addr", "h", "--master-port", "65529"),
            "'65529' was given, but tensor",
        ),
        (
            ("tensor-parallel", "--pack", "--", "--distributed-executor-backend", "ray"),
            "shares out the devices of this",
        ),
        (("tensor-parallel", "--pack", "--nnodes", "2"), "--pack: it shares out one node's devices"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(launcher: Launcher, words: tuple[str, ...], said: str) -> None:
    done = launcher(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr
    assert launcher.calls() == []


def test_a_python_that_cannot_be_run_is_wrong_use(launcher: Launcher) -> None:
    done = launcher.as_program("quickstart", PYTHON="/no/such/python")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "PYTHON: '/no/such/python' cannot be run" in done.stderr
    for redirection in ("2>&-", "2>/dev/full", "2>&1 | true"):
        line = f"set -o pipefail; {LAUNCHER} quickstart {redirection}"
        variables = {**launcher.environment, "PYTHON": "/no/such/python"}
        assert subprocess.run(["bash", "-c", line], env=variables, check=False).returncode == 2
    done = launcher.as_program("quickstart", PYTHON="/no\x1b[31m\n")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert r"PYTHON: $'/no\E[31m\n' cannot be run" in done.stderr


def test_the_launcher_works_through_a_link_and_with_cdpath(launcher: Launcher) -> None:
    link = launcher.folder / "link"
    link.symlink_to(LAUNCHER)
    done = subprocess.run(
        [str(link), "custom", "TP=1", "--dry-run"],
        capture_output=True, text=True, cwd=launcher.folder, timeout=30,
        env={**launcher.environment, "CDPATH": str(launcher.folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert commands_of(done)[0][1] == str(REPOSITORY / "batch_inference_experiment.py")


def test_quickstart_overwrites_only_its_own_folder(launcher: Launcher) -> None:
    launcher("quickstart")
    launcher("quickstart", "--output-dir", "precious")
    overwrite = [config_of(call).overwrite for call in launcher.calls() if "--name" in call]
    assert overwrite == [True, True, False, False]


def test_no_preset_shows_the_usage(launcher: Launcher) -> None:
    done = launcher()
    assert done.returncode == 2
    assert "usage:" in done.stderr


def test_help_names_every_preset_with_its_comment_and_fits_80_columns(launcher: Launcher) -> None:
    done = launcher("--help")
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    for name in re.findall(r"^preset_([a-z-]+)\(\)", LAUNCHER.read_text(), re.MULTILINE):
        assert re.search(rf"^  {name} +\S", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_the_plan_of_a_study_answers_at_once_and_needs_no_environment(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [LAUNCHER, "--dry-run", "scaling-study"]
    assert_answers_at_once(command, tmp_path, environment)
    del environment["PYTHON"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    for words in commands_of(done):
        assert words[1] == str(REPOSITORY / "batch_inference_experiment.py")
    assert list(tmp_path.iterdir()) == []


def test_every_planned_command_is_one_that_the_script_understands(launcher: Launcher) -> None:
    for preset in ("tensor-parallel", "pipeline-parallel", "mixed-parallel", "quickstart"):
        for words in commands_of(launcher(preset, "--dry-run")):
            config = config_of(words)
            assert config.name == dataclasses.replace(config, name=None).setting_name


def test_a_sample_that_is_too_small_for_one_setting_leaves_the_others(launcher: Launcher) -> None:
    """One that cannot run here at all is skipped for that."""
    words = ("data-parallel", "--model", TINY, "--prompts-file", str(REPOSITORY / "examples" / "workload.jsonl"))
    small = (*words, "--batch-sizes", "16", "--dry-run", "--", "--sample", "40")
    two = launcher(*small, DEVICES="2")
    said = " ".join(two.stdout.replace("#", " ").split())
    assert two.returncode == 0, two.stderr
    assert "dp_2 cannot run: --sample 40: with 16 at once on 2 replicas there is no plateau below 64; raise it" in said
    assert "dp_4 cannot run: it needs 4 devices" in said
    # Too small for all that could run is a mistake.
    none = launcher(*small[:-1], "31", DEVICES="2")
    assert none.returncode == 2
    assert none.stderr.startswith("error: --sample 31: with 16 at once on 1 replica there is no plateau below 32")
