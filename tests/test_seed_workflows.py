"""Every command that users were promised, as it was written, in the order in which it stands, in one folder.

On the stub vLLM and eight devices. Commands under torchrun are planned here, because each of its processes imports
torch; they run in test_torchrun.py and test_real_vllm.py. The workflow of several nodes runs in test_two_nodes.py.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY, stub_environment

pytestmark = pytest.mark.slow

EIGHT_DEVICES = "|".join(str(core % len(os.sched_getaffinity(0))) for core in range(8))
CHAT_13B = "meta-llama/Llama-2-13b-chat-hf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder in which the scripts can be called as if it were the checkout."""
    for name in ("run_batch_experiments.sh", "batch_inference_experiment.py", "analyze_results.py"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    return tmp_path


def run(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    variables = {
        "VLLM_CPU_OMP_THREADS_BIND": EIGHT_DEVICES,
        "STUB_RUN_S": "0.001",
        "STUB_LOAD_S": "0",
        "PYTHON": sys.executable,
    }
    return subprocess.run(
        words, cwd=folder, env=stub_environment(**variables), capture_output=True, text=True, timeout=300
    )


def succeeds(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    done = run(folder, command)
    assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    return done


def kept_whole(done: subprocess.CompletedProcess[str]) -> int:
    """Settings of which nothing was measured again."""
    return " ".join(done.stderr.split()).count("nothing is left to measure")


def results(folder: Path, name: str = "experiment_results") -> set[str]:
    return {path.name.removesuffix("_results.json") for path in (folder / name).glob("*.json")}


TENSOR = {"tp_1", "tp_2", "tp_4", "tp_8"}
MIXED = {"tp_2_pp_2", "tp_4_pp_2", "tp_2_pp_4"}  # TP4_PP4 needs sixteen devices
STUDY = TENSOR | MIXED | {"pp_2", "pp_4", "dp_2", "dp_4", "tp_2_dp_2", "tp_4_dp_2", "tp_2_dp_4"}


def test_quick_start(folder: Path) -> None:
    succeeds(folder, "./run_batch_experiments.sh tensor-parallel")
    assert results(folder) == TENSOR
    succeeds(folder, f'./run_batch_experiments.sh --model "{CHAT_13B}" --batch-sizes "1,2,4,8" tensor-parallel')
    of_13b = {f"{name}_Llama-2-13b-chat-hf" for name in TENSOR}
    assert results(folder) == TENSOR | of_13b
    succeeds(folder, "./run_batch_experiments.sh mixed-parallel")
    assert results(folder) == TENSOR | of_13b | MIXED
    planned = succeeds(folder, "./run_batch_experiments.sh torchrun-mixed-parallel --dry-run")
    assert "torch.distributed.run --nproc-per-node 4" in planned.stdout
    succeeds(folder, "./run_batch_experiments.sh data-parallel")
    study = succeeds(folder, "./run_batch_experiments.sh scaling-study")
    assert results(folder) == STUDY | of_13b
    # What the presets before it have measured is kept.
    assert kept_whole(study) == len(TENSOR | MIXED | {"dp_2", "dp_4"})


def test_the_main_script(folder: Path) -> None:
    succeeds(
        folder,
        'python batch_inference_experiment.py --model "meta-llama/Llama-2-7b-chat-hf" --tensor-parallel-size 2 '
        '--pipeline-parallel-size 2 --data-parallel-size 1 --batch-sizes "1,4,8,16" --seq-lens "512,1024,2048" '
        '--max-num-seqs 256 --gpu-memory-utilization 0.8 --output-file "my_experiment_results.json"',
    )
    document = json.loads((folder / "my_experiment_results.json").read_text())
    assert (document["status"], len(document["points"])) == ("complete", 12)


def test_combined_configurations_and_debugging(folder: Path) -> None:
    for command in (
        '--tensor-parallel-size 2 --pipeline-parallel-size 2 --batch-sizes "1,2,4,8"',
        '--tensor-parallel-size 2 --data-parallel-size 2 --batch-sizes "1,4,8,16"',
        "--enforce-eager --num-runs 1",
        '--tensor-parallel-size 1 --batch-sizes "1" --seq-lens "512" --num-runs 1',
    ):
        succeeds(folder, f"python batch_inference_experiment.py {command}")
    # Eager is another setting than the last one.
    assert results(folder) == {"tp_2_pp_2", "tp_2_dp_2", "tp_1", "tp_1_enforce-eager_False"}


def test_the_launcher(folder: Path) -> None:
    succeeds(folder, f'./run_batch_experiments.sh --model "{CHAT_13B}" tensor-parallel')
    succeeds(folder, './run_batch_experiments.sh --batch-sizes "1,2,4,8,16" --seq-lens "256,512,1024" mixed-parallel')
    succeeds(folder, "./run_batch_experiments.sh custom TP=4 PP=2 DP=1")
    assert results(folder) == TENSOR | MIXED
    planned = succeeds(
        folder, './run_batch_experiments.sh --model "meta-llama/Llama-2-70b-chat-hf" scaling-study --dry-run'
    )
    assert planned.stdout.count("batch_inference_experiment.py") == len(STUDY)
    assert "Options" in succeeds(folder, "./run_batch_experiments.sh --help").stdout.title()


def test_the_analysis(folder: Path) -> None:
    succeeds(folder, "./run_batch_experiments.sh tensor-parallel")
    succeeds(folder, "python analyze_results.py --input experiment_results")
    analysis = folder / "experiment_results" / "analysis"
    assert (analysis / "results.csv").exists()
    assert (analysis / "throughput.png").exists()
    succeeds(folder, "python analyze_results.py --input experiment_results/tp_2_results.json")
    succeeds(folder, "python analyze_results.py --input experiment_results --no-plots")
    succeeds(folder, "python analyze_results.py --input experiment_results --output-dir my_analysis")
    assert (folder / "my_analysis" / "report.html").exists()


def test_workflow_1(folder: Path) -> None:
    succeeds(folder, './run_batch_experiments.sh --model "my-model" tensor-parallel')
    succeeds(folder, "python analyze_results.py --input experiment_results")
    study = succeeds(folder, './run_batch_experiments.sh --model "my-model" scaling-study')
    assert results(folder) == STUDY
    assert kept_whole(study) == len(TENSOR)


def test_workflow_2(folder: Path) -> None:
    succeeds(folder, './run_batch_experiments.sh --batch-sizes "1,4,8,16,32" mixed-parallel')
    focused = succeeds(folder, "./run_batch_experiments.sh custom TP=4 PP=2 DP=1")
    assert kept_whole(focused) == 1
    succeeds(
        folder,
        "python batch_inference_experiment.py --tensor-parallel-size 4 --pipeline-parallel-size 2 "
        '--batch-sizes "8,16,32,64" --seq-lens "1024,2048"',
    )
    assert results(folder) == MIXED
    points = json.loads((folder / "experiment_results" / "tp_4_pp_2_results.json").read_text())["points"]
    assert {(point["batch_size"], point["seq_len"]) for point in points} >= {(64, 1024), (64, 2048), (1, 512)}


def test_workflow_3_is_planned_on_one_node(folder: Path) -> None:
    addresses = '--master-addr "192.168.1.100" --master-port 29500'
    planned = run(folder, f'./run_batch_experiments.sh --model "large-model" {addresses} scaling-study --dry-run')
    assert planned.returncode == 0, planned.stderr
