"""The launcher's parts in this process, whole outputs at a time: its options and help, the words of each setting, the
plan, what is done in which order, and what it tells the system of a new process."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batch_inference.core import streams
from batch_inference.core.config import MEETING_SECRET, ConfigError, ExperimentConfig
from batch_inference.core.failures import WorkFailedError
from batch_inference.core.signals import EXIT_CODES
from batch_inference.launch import __main__ as launch
from batch_inference.launch import overview
from batch_inference.launch import processes as processes_of_ours
from batch_inference.launch.console import Outcomes, say_how_to_analyse, say_outcomes
from batch_inference.launch.jobs import Here, Job, check_together, job_of, nodes_in_words
from batch_inference.launch.options import Options, options_help, parse_options
from batch_inference.launch.overview import PlannedJob, plan
from batch_inference.launch.presets import Preset, Setting
from batch_inference.launch.processes import Processes
from batch_inference.launch.spread import NodeDevices, alike
from batch_inference.launch.usage import usage
from batch_inference.measure import greeting
from batch_inference.plan.devices import Devices
from batch_inference.plan.needs import Needs
from conftest import REPOSITORY

HERE = Here("py", "x/")
EIGHT = Devices("gpu", tuple("01234567"))
STUDY, DEMO = Preset("study", "a comment", flags=["--max-tokens", "8"]), Preset("quickstart", "", is_demo=True)

# --- options ----------------------------------------------------------------------------------------------------------

DEFAULTS = {
    "model": "meta-llama/Llama-2-7b-chat-hf", "batch_sizes": (1, 4, 8, 16), "seq_lens": (512, 1024, 2048),
    "prompts_file": None, "goal": "throughput", "max_latency_s": None, "max_ttft_s": None, "max_tpot_s": None,
    "budget_device_minutes": None, "device_hour_price": None, "job": False,
    "output_dir": None, "resume": False, "overwrite": False, "pack": False,
    "dry_run": False, "json": False,
    "devices": None, "device_memory_gib": None, "master_addr": None, "master_port": 29500, "nnodes": None,
    "node_rank": None, "wait_for_nodes_s": 600.0, "settle_s": 15.0, "meeting_secret": None, "help": False,
    "preset": None, "words": (), "passed_on": (), "flags": (),
}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("", {}),
        ("study", {"preset": "study"}),
        ("custom TP=2 --resume PP=2", {
            "preset": "custom", "words": ("TP=2", "PP=2"), "resume": True, "passed_on": ("--resume",)}),
        ("--seq-lens=64 --model m s --overwrite --pack --batch-sizes 1,2 --output-dir o", {
            "preset": "s", "seq_lens": (64,), "model": "m", "overwrite": True, "pack": True, "batch_sizes": (1, 2),
            "output_dir": "o",
            "passed_on": ("--seq-lens", "64", "--model", "m", "--overwrite", "--packed", "--batch-sizes", "1,2")}),
        ("s --dry-run --json --devices 4 --device-memory-gib 80", {
            "preset": "s", "dry_run": True, "json": True, "devices": 4, "device_memory_gib": 80.0}),
        ("s --master-addr h --master-port 7 --nnodes 3 --node-rank 2 --wait-for-nodes-s 5 --settle-s 0.5 "
         "--meeting-secret w", {
             "preset": "s", "master_addr": "h", "master_port": 7, "nnodes": 3, "node_rank": 2, "wait_for_nodes_s": 5.0,
             "settle_s": 0.5, "meeting_secret": "w"}),
        # The first -- ends the launcher's own.
        ("s -- --pack -- --seed 1", {"preset": "s", "flags": ("--pack", "--", "--seed", "1")}),
        # Who asks for help is not told what is wrong with the rest.
        ("-h --json --settle-s 1", {"help": True, "json": True, "settle_s": 1.0}),
        ("--help --devices 4", {"help": True, "devices": 4}),
        ("s --nnodes 1 --node-rank 0", {"preset": "s", "nnodes": 1, "node_rank": 0}),
        ("s --nnodes 1 --pack", {"preset": "s", "nnodes": 1, "pack": True, "passed_on": ("--packed",)}),
    ],
)  # fmt: skip
def test_a_line_of_words_gives_these_options_and_no_others(
    line: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    assert asdict(parse_options(line.split())) == DEFAULTS | changes


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("s --nope=3", "--nope: unknown option; see --help (flags for the experiment script go after --)"),
        ("s --pack=3", "--pack: '3' was given, but it takes no value"),
        ("s --model", "--model: a value is needed"),
        ("s --model=", "--model: a value is needed"),
        ("s --model --pack", "--model: a value is needed"),
        ("s --settle-s -1 --master-addr h", "--settle-s: a value is needed"),
        ("s --json", "--json: it works only with a plan; add --dry-run"),
        ("s --master-port 7", "--master-port: '7' was given without --master-addr HOST; add it"),
        ("s --node-rank 1", "--node-rank: '1' was given without --master-addr HOST; add it"),
        ("s --wait-for-nodes-s 7", "--wait-for-nodes-s: '7.0' was given without --master-addr HOST; add it"),
        ("s --settle-s 7", "--settle-s: '7.0' was given without --master-addr HOST; add it"),
        ("s --meeting-secret w", "--meeting-secret: '<meeting_secret>' was given without --master-addr HOST; add it"),
        ("s --nnodes 2 --node-rank 2", "--node-rank: '2' was given, but --nnodes 2 allows 1 at most"),
        ("s --nnodes 2 --pack", "--pack: it shares out one node's devices, but --nnodes '2' was given"),
        ("s --master-addr h --pack", "--pack: it shares out one node's devices, but --master-addr 'h' was given"),
        (
            "s --master-addr h --nnodes 2 --pack",
            "--pack: it shares out one node's devices, but --nnodes '2' was given",
        ),
    ],
)
def test_a_wrong_line_is_named_in_these_words(line: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    with pytest.raises(ConfigError) as caught:
        parse_options(line.split())
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("line", "number", "rank"),
    [
        ("s --master-addr h", "3", 3),
        ("s --nnodes 4 --master-addr h", "3", 3),
        ("s --nnodes 4 --master-addr h --node-rank 1", "3", 1),
        ("s --master-addr h", "", None),
        ("s", "3", None),
        ("s --nnodes 1", "3", None),
    ],
)
def test_slurm_numbers_the_nodes_where_the_user_does_not(
    line: str, number: str, rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.setenv("SLURM_NODEID", number)
    assert parse_options(line.split()).node_rank == rank


def test_a_number_of_slurm_is_checked_like_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, said in (
        ("x", "--node-rank: 'x' was given"),
        ("2", "--node-rank: '2' was given, but --nnodes 2 allows"),
    ):
        monkeypatch.setenv("SLURM_NODEID", number)
        with pytest.raises(ConfigError, match=f"^{said}"):
            parse_options(["s", "--nnodes", "2", "--master-addr", "h"])


def test_an_address_alone_is_over_nodes_and_one_node_is_not() -> None:
    asked = [Options(), Options(nnodes=2), Options(master_addr="h"), Options(master_addr="h", nnodes=1)]
    assert [one.is_over_nodes for one in asked] == [False, False, True, False]
    assert Options(master_addr="h", nnodes=2).is_over_nodes


def test_the_help_of_every_option_and_preset_is_as_it_is_shown() -> None:
    lines = usage([STUDY, Preset("custom", "own")]).splitlines()
    assert lines[:9] == [
        "usage: ./run_batch_experiments.sh [options] PRESET [options] [-- flags]", "",
        "Run the settings of a preset, one process and one result file each.", "", "presets:",
        "  study                     a comment", "  custom                    own", "",
        "options, before or after the preset:",
    ]  # fmt: skip
    shown = options_help()
    assert lines[9:] == [
        *shown,
        "  -- flags              everything after -- goes to the experiment script", "", "examples:",
        "  ./run_batch_experiments.sh quickstart",
        "  ./run_batch_experiments.sh tensor-parallel --model meta-llama/Llama-3.1-8B",
        "  ./run_batch_experiments.sh custom TP=2 PP=2 --batch-sizes 1,16 -- --num-runs 5", "",
        "exit codes: 0 every setting ok; 1 some failed, or none could run; 2 wrong use;",
        "129, 130, 143 interrupted. A setting that cannot run here (devices, heads,",
        "layers) is skipped. PYTHON=/path/to/python chooses the Python that has vLLM.",
    ]  # fmt: skip
    assert [line[:24].rstrip() for line in shown if line[2] != " "] == [
        "  --model MODEL", "  --batch-sizes N,N,..", "  --seq-lens N,N,..", "  --prompts-file FILE",
        "  --goal GOAL", "  --max-latency-s S", "  --max-ttft-s S", "  --max-tpot-s S", "  --budget-device-minute",
        "  --device-hour-price PR", "  --job", "  --output-dir DIR", "  --resume",
        "  --overwrite", "  --pack", "  --dry-run", "  --json", "  --devices N", "  --device-memory-gib X",
        "  --master-addr HOST", "  --master-port PORT", "  --nnodes N", "  --node-rank N", "  --wait-for-nodes-s S",
        "  --settle-s S", "  --meeting-secret WORD", "  -h, --help",
    ]  # fmt: skip
    text = " ".join(" ".join(shown).split())
    defaults = [part.partition(")")[0] for part in text.split("(default: ")[1:]]
    assert defaults == [
        "meta-llama/Llama-2-7b-chat-hf", "1,4,8,16", "512,1024,2048", "throughput", "experiment_results", "29500",
        "as few of those that come as can hold it",
        "SLURM_NODEID; otherwise 0 if HOST is an address of this machine, and the others in order of arrival",
        "600", "15",
    ]  # fmt: skip


# --- the words of each setting ----------------------------------------------------------------------------------------

SIZES = "--tensor-parallel-size {} --pipeline-parallel-size {} --data-parallel-size {}"
NODES = "--nnodes 2 --node-rank 1 --master-addr h --master-port 7"


@pytest.mark.parametrize(
    ("setting", "of", "line", "words"),
    [
        (Setting(1, 1, 1), STUDY, "", "py x/E --name tp_1 --output-dir experiment_results " + SIZES.format(1, 1, 1)
         + " --max-tokens 8"),
        # The preset's flags, those of the setting, the user's options and the user's flags: the last one counts.
        (Setting(1, 2, 2, suffix="ep", flags=("--a", "b")), STUDY, "--seq-lens 64 --pack -- --seed 1",
         "py x/E --name pp_2_dp_2_ep --output-dir experiment_results " + SIZES.format(1, 2, 2)
         + " --distributed-executor-backend mp --max-tokens 8 --a b --seq-lens 64 --packed --seed 1"),
        (Setting(1, 1, 4), STUDY, "--output-dir o", "py x/E --name dp_4 --output-dir o " + SIZES.format(1, 1, 4)
         + " --max-tokens 8"),
        (Setting(4, 1, 1, nodes=2), STUDY, "--master-addr h", "py x/E --name tp_4_nodes_2 --output-dir "
         "experiment_results " + SIZES.format(4, 1, 1) + f" --distributed-executor-backend mp {NODES} --max-tokens 8"),
        (Setting(3, 1, 1, nodes=2), STUDY, "--master-addr h", "py x/E --name tp_3_nodes_2 --output-dir "
         "experiment_results " + SIZES.format(3, 1, 1) + " --distributed-executor-backend mp --max-tokens 8"),
        (Setting(2, 1, 2, torchrun=True, nodes=2), STUDY, "--master-addr h",
         f"env OMP_NUM_THREADS=1 py -m torch.distributed.run --nproc-per-node 2 {NODES} x/E --name "
         "torchrun_tp_2_dp_2_nodes_2 --output-dir experiment_results " + SIZES.format(2, 1, 2)
         + " --distributed-executor-backend external_launcher --max-tokens 8"),
        (Setting(2, 1, 1, torchrun=True), STUDY, "",
         "env OMP_NUM_THREADS=1 py -m torch.distributed.run --nproc-per-node 2 --standalone x/E --name "
         "torchrun_tp_2 --output-dir experiment_results " + SIZES.format(2, 1, 1)
         + " --distributed-executor-backend external_launcher --max-tokens 8"),
        (Setting(1, 1, 1), DEMO, "--seq-lens 64", "py x/E --name tp_1 --output-dir quickstart_results "
         + SIZES.format(1, 1, 1) + " --overwrite --seq-lens 64"),
        (Setting(1, 1, 1), DEMO, "--resume", "py x/E --name tp_1 --output-dir quickstart_results "
         + SIZES.format(1, 1, 1) + " --resume"),
    ],
)  # fmt: skip
def test_the_command_of_a_setting_is_this_word_for_word(
    setting: Setting, of: Preset, line: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # set to nothing, it says nothing
    monkeypatch.setattr("batch_inference.launch.jobs.find_devices", lambda: Devices("gpu", ("0",)))
    if "--a" in setting.flags:
        monkeypatch.setattr("batch_inference.launch.jobs.parse_flags", lambda _: [ExperimentConfig()])
    job = job_of(setting, 7, 1, of, parse_options(["s", *line.split()]), HERE)
    assert " ".join(job.words) == words.replace("x/E", "x/batch_inference_experiment.py")
    assert (job.name, job.setting, job.port) == (setting.name, setting, 7)


def test_a_first_look_on_cores_has_no_process_of_its_own_for_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def words(preset: Preset, line: str = "s") -> tuple[str, ...]:
        return job_of(Setting(1, 1, 1), 7, 0, preset, parse_options(line.split()), HERE).words

    demo = Preset("quick", "", is_demo=True, flags=["--target-ci", "0.05"])
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    monkeypatch.setattr("batch_inference.launch.jobs.find_devices", lambda: Devices("cpu", ("0",)))
    assert words(demo)[:3] == ("env", "VLLM_ENABLE_V1_MULTIPROCESSING=0", HERE.python)
    assert words(STUDY)[0] == HERE.python
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    assert words(demo)[0] == HERE.python
    # Exactly so many runs have no target.
    assert "--target-ci" in words(demo)
    assert "--target-ci" not in words(demo, "s -- --num-runs 2")


def test_the_flags_of_the_user_decide_for_the_plan_too() -> None:
    job = job_of(
        Setting(1, 1, 1), 7, 0, STUDY, parse_options(["s", "--dry-run", "--", "--max-tokens", "9", "--dry-run"]), HERE
    )
    assert (job.config.max_tokens, job.config.dry_run) == (9, True)
    for line in ("s --dry-run -- --devices 4", "s --dry-run --devices 2 -- --devices 4"):
        with pytest.raises(ConfigError, match=r"^--devices: give it once and before --, "):
            job_of(Setting(1, 1, 1), 7, 0, STUDY, parse_options(line.split()), HERE)
    memory = parse_options(
        ["s", "--dry-run", "--device-memory-gib", "8", "--", "--device-memory-gib", "9", "--seed", "1"]
    )
    job = job_of(Setting(1, 1, 1), 7, 0, STUDY, memory, HERE)
    assert job.config.device_memory_gib == 9
    assert job.words[-3:] == ("8", "--seed", "1")
    assert job.console_path == Path("experiment_results/tp_1_results.txt")


@pytest.mark.parametrize(
    ("of", "line", "said"),
    [
        (DEMO, "--nnodes 2 --master-addr h", "--nnodes: '2' was given, but quickstart is for one node"),
        (DEMO, "--master-addr h", "--master-addr: 'h' was given, but quickstart is for one node"),
        (STUDY, "--nnodes 2", "--nnodes: '2' was given, but --master-addr HOST is needed too"),
        (STUDY, "--nnodes 2 --master-addr h", None),
        (STUDY, "--nnodes 1", None),
        (DEMO, "--nnodes 1 --master-addr h", None),
        (DEMO, "", None),
    ],
)
def test_what_a_preset_allows_of_several_nodes(of: Preset, line: str, said: str | None) -> None:
    options = parse_options(["s", *line.split()])
    if said is None:
        check_together(of, options)
        return
    with pytest.raises(ConfigError) as caught:
        check_together(of, options)
    assert str(caught.value) == said


def test_ports_are_counted_for_several_nodes_only_and_the_number_of_this_node_is_passed_on() -> None:
    settings, ports = [Setting(2, 1, 1, nodes=2), Setting(4, 1, 1, nodes=2)], "s --master-port 65532 --nnodes"
    assert len(launch.jobs_of([Setting(1, 1, 1)] * 2, STUDY, parse_options(f"{ports} 1".split()), HERE)) == 2
    with pytest.raises(ConfigError) as caught:
        launch.jobs_of(settings, STUDY, parse_options(f"{ports} 2 --master-addr h".split()), HERE)
    assert str(caught.value) == (
        "--master-port: '65532' was given, but study takes two ports per setting after it: at most 65531"
    )
    jobs = launch.jobs_of(
        settings, STUDY, parse_options(["s", "--master-addr", "h", "--nnodes", "2", "--node-rank", "1"]), HERE
    )
    assert [(job.port, job.config.node_rank, job.config.master_port) for job in jobs] == [
        (29501, 1, 29501), (29503, 1, 29503),
    ]  # fmt: skip


# --- the plan ---------------------------------------------------------------------------------------------------------


def plan_of(line: str, settings: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(REPOSITORY)
    preset = Preset("mine", "", [words.split() for words in settings.split(",")], ["--max-tokens", "8"])
    options = parse_options(["mine", "--dry-run", *line.split()])
    nodes = alike(8, options.nnodes if options.is_over_nodes else 1)
    jobs, left_out = launch.plan_jobs(preset, options, HERE, EIGHT, nodes)
    lines = plan(jobs, left_out, nodes_in_words(options), EIGHT)
    return [line if line.startswith("#") else line.partition(" --output-dir")[0] for line in lines]


TINY = "--model models/tiny-llama --device-memory-gib 1 --devices 8"
PLANS = {
    f"{TINY} --batch-sizes 8,1 --seq-lens 64,128 : TP=1,DP=2,TP=2 torchrun,TP=4 PP=2,TP=16,TP=N/3": """
# models/tiny-llama on 8 gpu devices
# 4 points each: batch sizes 8, 1 x lengths 64, 128, 8 output tokens
# memory: by formula
#
# setting        devices  replicas  by        weights GiB  KV tokens  fit in one wave
# tp_1           1        1         uni       0.0359       378336     5007 / 2781
# dp_2           2        2         uni       0.0359       378336     5007 / 2781
# torchrun_tp_2  2        1         torchrun  0.018        774459     10250 / 5694
# tp_4_pp_2      8        1         mp        0.00449      3151225    41707 / 23170
# tp_16          16       1         -         0.00234      1579866    20909 / 11616
#
# activations are not counted: in our runs on GPUs vLLM had 0.7 to 4.1 GiB (1 to
#   7 %) less per device for the KV cache (docs/plan_check.md)
# TP=N/3 is left out: N/3 of 8 devices is not a whole number
# tp_16 cannot run: it needs 16 devices, but there are 8 (gpu)
# dp_2 will not be compared with torchrun_tp_2: its replicas' batches add up to
#   2, 16; add 4 to --batch-sizes
# 3 s left
# fill in what is not shown here: A, B
py x/batch_inference_experiment.py --name tp_1
py x/batch_inference_experiment.py --name dp_2
py -m torch.distributed.run --nproc-per-node 2 --standalone x/batch_inference_experiment.py --name torchrun_tp_2
py x/batch_inference_experiment.py --name tp_4_pp_2
""",
    f"{TINY} --batch-sizes 2 --seq-lens 64 --master-addr h : TP=2,TP=4 DP=4,TP=4 PP=4,TP=32": """
# models/tiny-llama on 8 gpu devices on each node, if all are like this one; a
#   setting takes as many nodes as it needs
# 1 point each: batch sizes 2 x lengths 64, 8 output tokens
# over nodes: one replica by vLLM's own mp; several (DP) by torchrun, because
#   vLLM's offline engine has no replicas
# memory: by formula
#
# setting                     devices  replicas  by                 weights GiB  KV tokens  fit in one wave
# tp_2                        2        1         mp                 0.018        738014     10250
# torchrun_tp_4_dp_4_nodes_2  16       4         torchrun, 2 nodes  0.00898      1492992    20735
# tp_4_pp_4_nodes_2           16       1         mp, 2 nodes        0.00415      6008428    83450
# tp_32_nodes_4               32       1         -                  0.00123      1507608    20938
#
# activations are not counted: in our runs on GPUs vLLM had 0.7 to 4.1 GiB (1 to
#   7 %) less per device for the KV cache (docs/plan_check.md)
# tp_32_nodes_4 cannot run: --tensor-parallel-size 32 does not divide the
#   model's 8 attention heads
# torchrun_tp_4_dp_4_nodes_2 will not be compared with tp_4_pp_4_nodes_2: its
#   replicas' batches add up to 8; add 8 to --batch-sizes
# 3 s left
# fill in what is not shown here: A, B
py x/batch_inference_experiment.py --name tp_2
py -m torch.distributed.run --nproc-per-node 8 --nnodes 2 --node-rank 0 --master-addr h --master-port 29503 \
x/batch_inference_experiment.py --name torchrun_tp_4_dp_4_nodes_2
py x/batch_inference_experiment.py --name tp_4_pp_4_nodes_2
""",
    "--model who/knows --batch-sizes 2 --seq-lens 64 --pack : TP=1,TP=3 PP=3": """
# who/knows on 8 gpu devices
# 1 point each: batch sizes 2 x lengths 64, 8 output tokens
# side by side where devices are free, the longest first; points are marked
#
# setting    devices  replicas  by
# tp_1       1        1         uni
# tp_3_pp_3  9        1         -
#
# memory unknown: a hub name says nothing about the model's sizes
# tp_3_pp_3 cannot run: it needs 9 devices, but there are 8 (gpu)
# fill in what is not shown here: A, B
py x/batch_inference_experiment.py --name tp_1
""",
    "--model who/knows --nnodes 2 --master-addr h --batch-sizes 2 --seq-lens 64 : TP=3,TP=2": """
# who/knows on 8 gpu devices on each of 2 nodes
# 1 point each: batch sizes 2 x lengths 64, 8 output tokens
# over nodes: one replica by vLLM's own mp; several (DP) by torchrun, because
#   vLLM's offline engine has no replicas
#
# setting       devices  replicas  by
# tp_3_nodes_2  3        1         -
# tp_2_nodes_2  2        1         mp, 2 nodes
#
# memory unknown: a hub name says nothing about the model's sizes
# tp_3_nodes_2 cannot run: its 3 devices cannot be divided evenly among 2 nodes
# 3 s left
# fill in what is not shown here: A, B
py x/batch_inference_experiment.py --name tp_2_nodes_2
""",
    "--nnodes 2 --master-addr h : TP=N/3": """
# TP=N/3 is left out: N/3 of 16 devices is not a whole number
""",
}


@pytest.mark.parametrize("asked", PLANS)
def test_the_plan_is_this_line_for_line(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_of: list[list[str]] = []

    def left(configs: Any, kind: str) -> str | None:
        asked_of.append([*(config.setting_name for config in configs), kind])
        return "3 s left" if configs else None

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(overview, "time_left", left)
    monkeypatch.setattr(overview, "placeholders", lambda words: ["A", "B"] if "--name" in words else [])
    line, _, settings = asked.partition(" : ")
    lines = plan_of(line, settings, monkeypatch)
    assert "\n".join(lines) == PLANS[asked].strip().replace("\\\n", "")
    can_run = [words.partition("--name ")[2] for words in lines if not words.startswith("#")]
    assert asked_of == ([] if "--pack" in line else [[*can_run, "gpu"]])


def test_a_secret_is_in_no_command_of_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "redact", lambda words: ["hidden", *words[:1]])
    assert plan_of("--model who/knows --batch-sizes 1", "TP=1", monkeypatch)[-1] == "hidden py"


# --- what is done, in which order -------------------------------------------------------------------------------------


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the parts of the launcher would do."""
    log: list[Any] = []
    kept: dict[str, Any] = {
        "check_vllm_flags": lambda words, _say: log.append(["flags", *words]),
        "install_where_needed": lambda jobs, *_: log.append(["install", len(jobs)]),
        "check_packages": lambda jobs, _preset: log.append(["packages", len(jobs)]),
        "keep_secret": lambda _options: log.append("secret"),
        "fetch_models": lambda configs, _say: log.append(["fetch", *configs]),
        "to_be_fetched": lambda jobs: [one.job.name for one in jobs],
        "work_over_nodes": lambda *_: log.append("meet") or 5,
        "run_jobs": lambda jobs, *_: log.append(["run", *(one.job.name for one in jobs)]) or "outcomes",
        "close": lambda outcomes, *_: log.append(outcomes) or 7,
        "find_devices": lambda: EIGHT,
    }
    for name, instead in kept.items():
        monkeypatch.setattr(launch, name, instead)
    for place in (launch, streams):  # notes are said there
        monkeypatch.setattr(place, "say", lambda text: log.append(f"says {text}"))
    return log


def worked(line: str) -> int:
    preset = Preset("study", "", settings=[["TP=1", "--foo", "1"], ["DP=2", "--bar=2"], ["TP=2"], ["TP=N/3"]])
    options = parse_options(["study", "--model", "who/knows", "--batch-sizes", "1", *line.split()])
    return launch.work(preset, options, HERE, ["table", "py", "x/", "study"], Processes())


LEFT_OUT = "says note: TP=N/3 is left out: N/3 of {0} devices is not a whole number"
UNCOMPARED = "says note: dp_2 will not be compared with tp_2: its replicas' batches add up to 2; add 2 to --batch-sizes"


def test_what_is_wrong_is_found_before_anything_is_installed_and_notes_come_before_the_settings(log: list[Any]) -> None:
    assert worked("") == 7
    assert log == [
        ["flags", "--foo", "1", "--bar=2"], ["install", 3], ["packages", 3], ["fetch", "tp_1", "dp_2", "tp_2"],
        LEFT_OUT.format(8), UNCOMPARED, ["run", "tp_1", "dp_2", "tp_2"], "outcomes",
    ]  # fmt: skip


def test_over_nodes_the_secret_and_the_models_are_there_before_they_meet(log: list[Any]) -> None:
    assert worked("--master-addr h") == 5
    assert log == [
        ["flags", "--foo", "1", "--bar=2"], ["install", 3], ["packages", 3], "secret",
        ["fetch", "tp_1", "dp_2", "tp_2"], "meet",
    ]  # fmt: skip
    log.clear()
    assert worked("--master-addr h --nnodes 1") == 7
    assert "secret" not in log


def test_a_plan_does_nothing_else(log: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert worked("--dry-run --devices 4 --json") == 0
    assert log == [["flags", "--foo", "1", "--bar=2"], LEFT_OUT.format(4)]
    shown = json.loads(capsys.readouterr().out)
    nothing = {
        **dict.fromkeys(("weights_gib", "kv_cache_tokens", "requests_in_one_wave", "source")),
        "unknown": ["memory unknown: a hub name says nothing about the model's sizes"],
        **dict.fromkeys(("max_model_len", "activations_counted")),
    }
    assert shown == [
        {"name": name, "devices": devices, "replicas": replicas, "obstacle": None, **nothing}
        for name, devices, replicas in (("tp_1", 1, 1), ("dp_2", 2, 2), ("tp_2", 2, 1))
    ]
    assert worked("--dry-run --devices 4") == 0
    assert capsys.readouterr().out.startswith("# who/knows on 4 gpu devices\n")


def test_what_the_nodes_cannot_hold_is_said_before_what_this_one_cannot() -> None:
    options = parse_options(["study", "--master-addr", "h", "--model", "who/knows"])
    preset = Preset("study", "", settings=[["TP=4"], ["TP=16"]])
    jobs, _ = launch.plan_jobs(preset, options, HERE, Devices("gpu", ("0", "1")), NodeDevices([2, 2], None))
    assert [(one.job.name, one.reason) for one in jobs] == [
        ("tp_4_nodes_2", None),
        ("tp_16", "it needs 16 devices, in equal parts on some of the nodes, but they have 2, 2"),
    ]  # fmt: skip


SHARED = [["TP=N"], ["DP=N", "experts"], ["TP=2", "DP=N/2", "experts"]]
ONE_NODE = (
    "N is 2 in this plan, the devices of one node; in a run it counts all nodes that come, and --nnodes sets their "
    "number"
)


@pytest.mark.parametrize(
    ("nodes", "settings", "names", "said"),
    [
        # Those that have come, and those that the user says will come.
        (NodeDevices([2, 2], None), SHARED,
         ["tp_4_nodes_2", "torchrun_dp_4_nodes_2_ep", "torchrun_tp_2_dp_2_nodes_2_ep"], []),
        (alike(2, 4), SHARED, ["tp_8_nodes_4", "torchrun_dp_8_nodes_4_ep", "torchrun_tp_2_dp_4_nodes_4_ep"], []),
        (alike(2, 1), SHARED[:2], ["tp_2", "dp_2_ep"], []),
        # Nobody knows yet.
        (alike(2, None), SHARED[:2], ["tp_2", "dp_2_ep"], [ONE_NODE]),
        (alike(2, None), [["TP=8"]], ["tp_8_nodes_4"], []),
    ],
)  # fmt: skip
def test_n_is_the_devices_of_all_nodes(
    nodes: NodeDevices, settings: list[list[str]], names: list[str], said: list[str]
) -> None:
    options = parse_options(["study", "--master-addr", "h", "--model", "who/knows"])
    preset = Preset("study", "", settings=settings)
    jobs, told = launch.plan_jobs(preset, options, HERE, Devices("gpu", ("0", "1")), nodes)
    assert [one.job.name for one in jobs] == names
    assert {one.reason for one in jobs} == {None}
    assert told == said


@pytest.mark.parametrize(
    ("words", "problem", "code", "out", "err"),
    [
        (["--help"], None, 0, "usage: ", ""),
        ([], None, 2, "", "usage: "),
        (["nope"], None, 2, "", "error: 'nope' is not a preset; choose one of: study custom\n"),
        (
            ["study", "--nnodes", "2"],
            None,
            2,
            "",
            "error: --nnodes: '2' was given, but --master-addr HOST is needed too\n",
        ),
        (["study"], ConfigError("wrong"), 2, "", "error: wrong\n"),
        (["study"], WorkFailedError("failed"), 1, "", "error: failed\n"),
        (["study"], None, 6, "", ""),
    ],
)
def test_each_end_of_the_launcher_has_its_code_and_its_stream(  # noqa: PLR0913
    words: list[str], problem: Exception | None, code: int, out: str, err: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    log: list[Any] = []

    def work(preset: Preset, options: Options, here: Here, argv: list[str], _processes: object) -> int:
        assert (preset.name, options.preset, here, argv[3:]) == ("study", "study", HERE, words)
        if problem:
            raise problem
        return 6

    monkeypatch.setattr(launch, "Processes", contextlib.nullcontext)
    monkeypatch.setattr(launch, "work", work)
    monkeypatch.setattr(launch, "secure_streams", lambda: log.append("streams"))
    monkeypatch.setattr(launch, "remember", lambda given, variables: log.append((given, variables is os.environ)))
    table = "preset\x1fstudy\x1fa comment\x1f\x1esetting\x1fTP=1\x1f\x1epreset\x1fcustom\x1f\x1f\x1e"
    assert launch.main([table, "py", "x/", *words]) == code
    said = capsys.readouterr()
    assert (said.out.startswith(out), said.err.startswith(err)) == (True, True)
    assert (bool(said.out), bool(said.err)) == (bool(out), bool(err))
    assert log == ["streams", (words, True)]


def test_the_secret_of_the_flag_is_known_to_all_that_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str | None] = []
    monkeypatch.setattr(greeting, "secret_of_nodes", lambda: checked.append(os.environ.get(MEETING_SECRET)))
    monkeypatch.setenv(MEETING_SECRET, "of the variable")
    launch.keep_secret(Options())
    launch.keep_secret(Options(meeting_secret="of the flag"))
    assert checked == ["of the variable", "of the flag"]


def planned(*reasons: str | None) -> Any:
    return [SimpleNamespace(reason=reason) for reason in reasons]


@pytest.mark.parametrize(
    ("python", "chosen", "reasons", "has_vllm", "installs"),
    [
        ("python3", None, (None, "no"), False, True),
        ("python3", "", (None,), False, True),
        ("python3", "/my/python", (None,), False, False),
        (".venv/bin/python", None, (None,), False, False),
        ("python3", None, ("no", "no"), False, False),
        ("python3", None, (None,), True, False),
    ],
)
@pytest.mark.parametrize("code", [0, 3])
def test_it_is_installed_only_where_nobody_has_a_python_with_vllm(  # noqa: PLR0913
    code: int, python: str, chosen: str | None, reasons: tuple[str | None, ...], *, has_vllm: bool, installs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    log: list[Any] = []
    monkeypatch.delenv("PYTHON", raising=False)
    if chosen is not None:
        monkeypatch.setenv("PYTHON", chosen)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: (name == "vllm" and has_vllm) or None)
    monkeypatch.setattr(os, "execv", lambda *words: log.append(words))
    processes: Any = SimpleNamespace(run=lambda words: log.append(words) or code)
    argv = ["table", python, "x/", "study", "--resume"]
    with pytest.raises(SystemExit) if installs and code else contextlib.nullcontext() as ended:
        launch.install_where_needed(planned(*reasons), Here(python, "x/"), argv, processes)
    setup = [str(REPOSITORY / "setup_env.sh")]
    ours = "x/.venv/bin/python"
    again = (ours, [ours, "-P", "-m", "batch_inference.launch", "table", ours, "x/", "study", "--resume"])
    assert log == ([] if not installs else [setup] if code else [setup, again])
    assert ended is None or ended.value.code == 3


@pytest.mark.parametrize(
    ("measures", "analyses", "of", "reasons", "said"),
    [
        (None, None, DEMO, (None,), None),
        ("no vLLM", "no plots", DEMO, (None,), "no vLLM"),
        (None, "no plots", DEMO, ("no", None), "no plots"),
        (None, "no plots", STUDY, (None,), None),
        ("no vLLM", None, STUDY, (None, "no"), "no vLLM"),
        ("no vLLM", "no plots", DEMO, ("no", "no"), None),
    ],
)
def test_packages_are_asked_for_by_what_will_need_them(  # noqa: PLR0913
    measures: str | None, analyses: str | None, of: Preset, reasons: tuple[str | None, ...], said: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(launch, "missing_to_measure", lambda: measures)
    monkeypatch.setattr(launch, "missing_to_analyse", lambda *, plots: analyses if plots else None)
    with pytest.raises(ConfigError) if said else contextlib.nullcontext() as caught:
        launch.check_packages(planned(*reasons), of)
    assert (str(caught.value) if caught else None) == said


def job_named(name: str, folder: str) -> Job:
    config = ExperimentConfig(name=name, output_dir=folder)
    return Job(name, (name,), config, Setting(1, 1, 1))


@pytest.mark.parametrize(
    ("of", "done", "failed", "is_measured", "analysis", "code", "last"),
    [
        (STUDY, "a b", "", False, None, 0, "analyse with: py x/analyze_results.py --input 'o p'"),
        (STUDY, "a", "b", False, None, 1, "analyse with: py x/analyze_results.py --input 'o p'"),
        (STUDY, "", "b", True, None, 1, "analyse with: py x/analyze_results.py --input 'o p'"),
        (STUDY, "", "b", False, None, 1, "done: none   skipped: s   failed: b"),
        (STUDY, "", "", True, None, 1, "error: no setting of study can run on this machine"),
        (DEMO, "", "", True, None, 1, "error: no setting of quickstart can run on this machine"),
        (DEMO, "a", "", False, 0, 0, ""),
        (DEMO, "a", "b", False, 0, 1, ""),
        (DEMO, "a", "", False, 2, 1, ""),
        (DEMO, "", "b", True, None, 1, "done: none   skipped: s   failed: b"),
    ],
)
def test_the_end_says_how_to_go_on_and_a_demo_goes_on_itself(  # noqa: PLR0913
    of: Preset, done: str, failed: str, *, is_measured: bool, analysis: int | None, code: int, last: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    ran: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "is_anything_measured", lambda folder: is_measured and folder == Path("o p"))
    processes: Any = SimpleNamespace(run=lambda words: ran.append(words) or analysis)
    kept = [[job_named(name, "o p") for name in names.split()] for names in (done, "s", failed)]
    assert launch.close(Outcomes(*kept), of, Options(output_dir="o p"), HERE, processes) == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["", f"done: {done or 'none'}   skipped: s   failed: {failed or 'none'}"]
    assert lines[-1] == last
    assert ran == ([] if analysis is None else [["py", "x/analyze_results.py", "--input", "o p"]])


def test_every_failed_setting_that_has_a_log_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [job_named(name, str(tmp_path)) for name in "abc"]
    for job in (jobs[0], jobs[2]):
        job.config.log_path.write_text("")
    say_outcomes(Outcomes(failed=jobs))
    assert capsys.readouterr().err.splitlines()[2:] == [
        f"  a: see {jobs[0].config.log_path}", f"  c: see {jobs[2].config.log_path}",
    ]  # fmt: skip


def test_every_interruption_ends_the_preset_with_its_own_code() -> None:
    for code in (129, 130, 143):
        with pytest.raises(SystemExit) as ended:
            Outcomes().keep(job_named("a", ""), code)
        assert ended.value.code == code
    outcomes = Outcomes()
    for code in (1, 2, 15, 0):  # 15 is a signal's number, and no code of one
        outcomes.keep(job_named(str(code), ""), code)
    assert ([job.name for job in outcomes.failed], [job.name for job in outcomes.done]) == (["1", "2", "15"], ["0"])


# --- new processes, and signals ---------------------------------------------------------------------------------------


class Started:
    """In place of a process: how it was asked for, and what it gets."""

    def __init__(self, words: Any, **asked: Any) -> None:
        self.words, self.asked = words, asked
        self.pid = 2**22 + len(words)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and timeout is not None:
            raise subprocess.TimeoutExpired("x", timeout)
        self.returncode = 4
        return 4


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(subprocess, "Popen", Started)
    monkeypatch.setattr(os, "killpg", lambda pid, number: sent.append((pid, number)))
    return sent


def test_a_new_process_gets_our_variables_and_its_own_which_count_more(
    signalled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OURS", "1")
    monkeypatch.setenv("BOTH", "1")
    processes, output = Processes(), Any
    one: Any = processes.start(["x"], {"BOTH": "2"}, output, ends_with_us=True)  # type: ignore[arg-type]
    assert one.asked.pop("env") == {**os.environ, "BOTH": "2"}
    assert one.asked == {
        "stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, "process_group": 0,
        "preexec_fn": processes_of_ours._end_with_parent,
    }  # fmt: skip
    other: Any = processes.start(["x"])
    assert other.asked["preexec_fn"] is None
    assert other.asked["env"] == dict(os.environ)
    seen, start = list[Any](), Processes.start
    monkeypatch.setattr(Processes, "start", lambda self, *given: seen.append(given) or start(self, *given))
    assert processes.run(["x"], {"A": "1"}) == 4
    assert seen == [(["x"], {"A": "1"})]
    assert signalled == []


def test_it_hears_of_the_end_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    library = SimpleNamespace(prctl=lambda *given: asked.append(given))
    monkeypatch.setattr(processes_of_ours.ctypes, "CDLL", lambda name: library if name is None else None)
    processes_of_ours._end_with_parent()
    assert asked == [(1, signal.SIGTERM)]  # PR_SET_PDEATHSIG


def test_all_that_run_get_the_first_signal_once_and_are_killed_by_the_second(
    signalled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    processes = Processes()
    first, second = processes.start(["1"]), processes.start(["1", "2"])
    processes.stop(signal.SIGINT)
    told = [(first.pid, signal.SIGINT), (second.pid, signal.SIGINT)]
    assert signalled == told
    third = processes.start(["1", "2", "3"])  # it was being started
    told.append((third.pid, signal.SIGINT))
    processes.stop(signal.SIGHUP)
    assert (signalled, codes) == (told, [])
    first.returncode = 130
    assert processes.ended(first) == 130
    processes.stop(signal.SIGTERM)
    killed = [(second.pid, signal.SIGKILL), (third.pid, signal.SIGKILL)]
    assert (signalled, codes) == (told + killed, [130])
    # And whatever goes wrong here.
    processes.__exit__()
    assert signalled == told + killed + killed


def test_one_that_does_not_end_is_asked_and_then_killed(signalled: list[Any]) -> None:
    processes = Processes()
    one = processes.start(["1"])
    processes.end(one, 3)
    assert signalled == [(one.pid, signal.SIGTERM), (one.pid, signal.SIGKILL)]
    one.returncode = -9
    processes.end(one, 3)
    assert len(signalled) == 2
    assert processes.ended(one) == 137


def test_a_signal_waits_for_one_that_is_being_started(signalled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes()

    def starts(words: Any, **asked: Any) -> Started:
        processes.stop(signal.SIGTERM)
        return Started(words, **asked)

    monkeypatch.setattr(subprocess, "Popen", starts)
    one = processes.start(["1"])
    assert signalled == [(one.pid, signal.SIGTERM)]
    with pytest.raises(SystemExit) as ended:
        processes.end_if_stopped()
    assert ended.value.code == 143
    # One that cannot be started is over with.
    processes = Processes()
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: Path("/no/such/file").stat())
    with pytest.raises(OSError, match="No such file"):
        processes.start(["1"])
    with pytest.raises(SystemExit):
        processes.stop(signal.SIGHUP)


def test_signals_are_handled_unless_they_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    handled: dict[int, Any] = {}
    ignored = [signal.SIGHUP]
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    monkeypatch.setattr(signal, "signal", handled.__setitem__)
    with Processes() as processes:
        assert handled == {number: processes.stop for number in EXIT_CODES if number != signal.SIGHUP}


def test_how_to_analyse_is_a_line_to_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    say_how_to_analyse(HERE, "a b")
    assert capsys.readouterr().err == "analyse with: py x/analyze_results.py --input 'a b'\n"


def test_the_help_of_an_option_begins_in_one_column() -> None:
    lines = options_help()
    usual = [
        line
        for line in lines
        if line.split()[0] not in ("--meeting-secret", "--budget-device-minutes", "--device-hour-price")
    ]
    assert all(line[23:24] in (" ", "D") and line[24] != " " for line in usual)
    assert "  --pack                run settings side by side where devices are free; their" in lines


@pytest.mark.parametrize(
    "line",
    ["s --output-dir ''", "s --wait-for-nodes-s=-1 --master-addr h", "s --settle-s=-1 --master-addr h",
     "s --wait-for-nodes-s nan --master-addr h", "s --settle-s inf --master-addr h", "s --nnodes 0 --master-addr h",
     "s --node-rank=-1 --master-addr h", "s --master-port 65536 --master-addr h", "s --output-dir=a\0b"],
)  # fmt: skip
def test_a_value_that_cannot_be_meant_is_wrong(line: str) -> None:
    words = ["" if word == "''" else word for word in line.split(" ")]
    with pytest.raises(ConfigError, match=r"^--[a-z-]+: "):
        parse_options(words)


def one_planned(line: str = "", setting: Setting = Setting(1, 1, 1), **changes: Any) -> PlannedJob:  # noqa: B008
    job = job_of(setting, 7, 0, STUDY, parse_options(["s", *line.split()]), HERE)
    return PlannedJob(replace(job, **changes), None, None)


def test_uneven_shares_are_the_first_reason() -> None:
    one = one_planned("--master-addr h", Setting(9, 1, 1, nodes=2))
    (found,) = overview.planned([one.job], Devices("gpu", ("0",)), print)
    assert found.reason == "its 9 devices cannot be divided evenly among 2 nodes"


def test_weights_that_do_not_fit_are_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        overview,
        "needs_of",
        lambda config, *_: Needs(9.0 / config.tensor_parallel_size, pool_gib=config.num_devices - 2),
    )
    jobs = [one_planned("", Setting(size, 1, 1)).job for size in (1, 2, 4, 16)]
    assert [one.reason for one in overview.planned(jobs, EIGHT, print)] == [
        "9 GiB of weights do not fit into 8 GiB of a device (its memory x --gpu-memory-utilization); raise "
        "--tensor-parallel-size or --pipeline-parallel-size",
        "4.5 GiB of weights do not fit into 4.5 GiB of a device (its memory x --gpu-memory-utilization); raise "
        "--tensor-parallel-size or --pipeline-parallel-size",
        None,
        "it needs 16 devices, but there are 8 (gpu)",
    ]


def test_what_is_known_of_some_settings_is_shown_and_the_rest_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def needs(config: ExperimentConfig, *about: Any) -> Needs:
        given.append(about)
        if config.tensor_parallel_size == 1:
            return Needs(unknown=("why", "more"))
        return Needs(12.345, None, {42: 200, 92: 100}, "formula", ("less",), 7, 1.0, 2.0, False)

    monkeypatch.setattr(overview, "needs_of", needs)
    monkeypatch.setattr(overview, "smallest_memory_gib", lambda found: 40.0 if found is EIGHT else None)
    jobs = [one_planned("--seq-lens 42,92,93", setting) for setting in (Setting(1, 1, 1), Setting(2, 1, 1))]
    jobs[1] = dataclasses.replace(jobs[1], said="said")  # type: ignore[arg-type]
    found = overview.all_needs(jobs, EIGHT)
    assert given == [(None, EIGHT, 40.0, None), (None, EIGHT, 40.0, "said")]
    assert [row.split()[4:] for row in overview.table(jobs, found)[1:]] == [
        ["unknown"] * 3, ["12.3", "unknown", "200", "/", "100"],
    ]  # fmt: skip
    asked = json.loads(overview.plan_as_json(jobs, EIGHT))
    assert [list(one.items())[4:] for one in asked] == [
        [
            ("weights_gib", None), ("kv_cache_tokens", None), ("requests_in_one_wave", None), ("source", None),
            ("unknown", ["why", "more"]), ("max_model_len", None), ("activations_counted", None),
        ],
        [
            ("weights_gib", 12.345), ("kv_cache_tokens", None), ("requests_in_one_wave", {"42": 200, "92": 100}),
            ("source", "formula"), ("unknown", ["less"]), ("max_model_len", 7), ("activations_counted", False),
        ],
    ]  # fmt: skip
    shown = [line for line in overview.plan(jobs, [], "", EIGHT) if line.startswith("# ")]
    for line in ("# memory: by formula (tp_2)", "# why (tp_1)", "# more (tp_1)", "# less (tp_2)"):
        assert line in shown


def test_the_needs_of_a_setting_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def needs(config: ExperimentConfig, *_: Any) -> Needs:
        looked.append(config.tensor_parallel_size)
        return Needs(1.0, source="formula")

    monkeypatch.setattr(overview, "needs_of", needs)
    jobs = [one_planned("", Setting(size, 1, 1)).job for size in (1, 2)]
    found = overview.planned(jobs, EIGHT, print)
    assert [one["weights_gib"] for one in json.loads(overview.plan_as_json(found, EIGHT))] == [1.0, 1.0]
    assert overview.plan(found, [], "", EIGHT)
    assert looked == [1, 2]


def test_settings_that_are_all_refused_have_no_memory_to_show() -> None:
    jobs = [one_planned("--seq-lens 42")]
    assert [row.split() for row in overview.table(jobs, [Needs(source="vLLM 9.9")])] == [
        ["setting", "devices", "replicas", "by"], ["tp_1", "1", "1", "uni"],
    ]  # fmt: skip


def test_replicas_are_compared_where_they_meet_any_other() -> None:
    settings = (Setting(4, 1, 1), Setting(1, 1, 4), Setting(2, 1, 2))
    jobs = [one_planned("--batch-sizes 1,2", setting) for setting in settings]
    # 2 and 4 there, 4 and 8 here: they meet each other, though not the setting without replicas.
    assert overview.uncompared(jobs) == []
    jobs = [one_planned("--batch-sizes 6,4,2,8", setting) for setting in (Setting(16, 1, 1), Setting(1, 1, 16))]
    assert overview.uncompared(jobs) == [
        "dp_16 will not be compared with tp_16: its replicas' batches add up to 32, 64, 96, 128; add 32, 64, 96, 128 "
        "to --batch-sizes"
    ]
    jobs = [one_planned("--batch-sizes 7,24,8", setting) for setting in (Setting(8, 1, 1), Setting(1, 1, 8))]
    assert overview.uncompared(jobs)[0].endswith("add up to 56, 64, 192; add 1, 3 to --batch-sizes")


def test_replicas_of_a_job_are_compared_whatever_runs_at_once() -> None:
    settings = (Setting(16, 1, 1), Setting(1, 1, 16))
    flags = f"--batch-sizes 6,4,2,8 -- --prompts-file {REPOSITORY}/examples/workload.jsonl"
    jobs = [one_planned(flags, setting) for setting in settings]
    assert overview.uncompared(jobs) == []


def test_what_is_hidden_in_commands_is_named_where_they_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "placeholders", lambda words: [f"<{words[0]}>", "<both>"])
    monkeypatch.setattr(overview, "redact", lambda words: words)
    jobs = [one_planned(words=(name,)) for name in "abc"]
    jobs[1] = replace(jobs[1], reason="no devices")
    lines = plan(jobs, [], "", EIGHT)
    assert "# fill in what is not shown here: <a>, <both>, <c>" in lines
    assert lines[-2:] == ["a", "c"]


def test_the_model_of_a_plan_is_shown_without_what_is_secret() -> None:
    one = one_planned("--model https://user:word@host/model")
    assert "word" not in plan([one], [], "", EIGHT)[0]
    assert plan([one], [], "", EIGHT)[0] == f"# {one.config.model_shown} on 8 gpu devices"
