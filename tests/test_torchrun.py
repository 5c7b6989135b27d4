"""batch_inference_experiment.py under torchrun, on the stub vLLM: ranks, one file, and what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import SMALL_GRID, experiment_command, loaded_with, stub_environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two devices"),
]
EXTERNAL = ("--distributed-executor-backend", "external_launcher")


def torchrun(folder: Path, processes: int, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    _, *words = experiment_command(folder, *SMALL_GRID, *EXTERNAL, *flags)
    return torchrun_words(folder, processes, *words, **variables)


def torchrun_words(folder: Path, processes: int, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = stub_environment(OMP_NUM_THREADS="1", **variables)
    return subprocess.run([*launcher, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=90)


def document(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "tp_1_results.json").read_text())
    return loaded


def test_ranks_of_one_replica_write_one_file_and_speak_with_one_voice(tmp_path: Path) -> None:
    done = torchrun(tmp_path, 2, "-tp", "2")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "tp_1_results.json",
        "tp_1_results.log",
        "tp_1_results.rank_1.log",
    ]
    assert done.stdout.count("verdict") == 1
    assert done.stderr.count("[2/2] 2 x 8") == 1
    result = document(tmp_path)
    assert result["engine"]["executor"] == "external_launcher"
    assert len(result["engine"]["workers"]) == 2
    run = result["points"][1]["runs"][0]
    # Both ranks hold the same outputs: they count once.
    assert (run["prompt_tokens"], run["output_tokens"], len(run["replicas"])) == (16, 8, 1)
    assert len(run["memory"]["used_gib"]) == 2


def test_replicas_have_their_own_prompts_and_their_tokens_are_summed(tmp_path: Path) -> None:
    done = torchrun(tmp_path, 2, "-dp", "2")
    assert done.returncode == 0, done.stderr
    run = document(tmp_path)["points"][1]["runs"][0]
    assert (run["prompt_tokens"], run["output_tokens"], len(run["replicas"])) == (32, 16, 2)
    assert [replica["output_tokens"] for replica in run["replicas"]] == [8, 8]
    logs = [(tmp_path / name).read_text() for name in ("tp_1_results.log", "tp_1_results.rank_1.log")]
    prompts = [line for log in logs for line in log.splitlines() if line.startswith("prompts ")]
    assert len(set(prompts)) == len(prompts)


def test_ranks_are_bound_to_cores_of_their_own(tmp_path: Path) -> None:
    torchrun(tmp_path, 2, "-pp", "2")
    logs = [tmp_path / name for name in ("tp_1_results.log", "tp_1_results.rank_1.log")]
    assert len({loaded_with(log)["OMP_PLACES"] for log in logs}) == 2


def test_a_wrong_number_of_processes_is_said_once_and_every_rank_ends(tmp_path: Path) -> None:
    done = torchrun(tmp_path, 2, "-tp", "2", "-dp", "2")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "torchrun started 2 processes, but TP x PP x DP is 4" in errors[0]
    assert not (tmp_path / "tp_1_results.json").exists()


def test_a_file_that_exists_ends_every_rank(tmp_path: Path) -> None:
    (tmp_path / "tp_1_results.json").write_text("{}")
    done = torchrun(tmp_path, 2, "-tp", "2")
    assert done.returncode != 0
    assert "it is not a result of this program" in done.stderr
    assert (tmp_path / "tp_1_results.json").read_text() == "{}"


def test_with_nothing_left_to_measure_every_rank_ends_well(tmp_path: Path) -> None:
    assert torchrun(tmp_path, 2, "-tp", "2").returncode == 0
    done = torchrun(tmp_path, 2, "-tp", "2", "--resume", STUB_FAIL="load")
    assert done.returncode == 0, done.stderr
    assert "nothing is left to measure" in " ".join(done.stderr.split())


def test_an_engine_that_does_not_start_is_a_failed_setting(tmp_path: Path) -> None:
    done = torchrun(tmp_path, 2, "-tp", "2", STUB_FAIL="load")
    assert done.returncode != 0
    assert "ValueError: the planted reason" in done.stderr
    assert document(tmp_path)["status"] == "failed"


def test_a_wrong_vllm_flag_is_said_once(tmp_path: Path) -> None:
    done = torchrun(tmp_path, 2, "-tp", "2", "--quantisation", "fp8")
    assert done.returncode != 0
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "did you mean --quantization?" in done.stderr


def test_a_plan_under_torchrun_is_printed_once(tmp_path: Path) -> None:
    done = torchrun(tmp_path, 2, "-tp", "2", "--dry-run")
    assert done.returncode == 0
    assert done.stdout.count("verdict   can run") == 1


def test_replicas_of_a_workload_take_their_shares_and_rank_0_alone_reads_it(tmp_path: Path) -> None:
    workload = tmp_path / "job.jsonl"
    lengths = [{"prompt_tokens": 1 + number % 9, "output_tokens": 1 + number % 5} for number in range(100)]
    workload.write_text("".join(f"{json.dumps(one)}\n" for one in lengths))
    script = experiment_command(tmp_path, "--batch-sizes", "2,4", *EXTERNAL, "-dp", "2")
    script += ["--prompts-file", str(workload), "--max-num-batched-tokens", "16,64"]
    done = torchrun_words(tmp_path, 2, *script[1:])
    assert done.returncode == 0, done.stderr
    points = document(tmp_path)["points"]
    assert [(point["batch_size"], point["max_num_batched_tokens"]) for point in points] == [
        (2, 16), (4, 16), (2, 64), (4, 64),
    ]  # fmt: skip
    for point in points:
        (run,) = point["runs"]
        shares = [replica["requests"] for replica in run["replicas"]]
        assert len(shares) == 2
        assert sum(shares) == len(run["requests"]["output_tokens"]) == point["sample"]["prompts"]["requests"]
        assert run["counters"]["miscounted"] == 0
        # Each rank has a scheduler of its own, and each obeys.
        assert run["counters"]["peak_running"] == point["batch_size"]
        assert all(max(replica["timeline"]["running"]) <= point["batch_size"] for replica in run["replicas"])
    logs = [(tmp_path / name).read_text() for name in ("tp_1_results.log", "tp_1_results.rank_1.log")]
    prompts = [[line for line in log.splitlines() if line.startswith("prompts ")] for log in logs]
    assert not set(prompts[0]) & set(prompts[1])


def test_a_wrong_workload_is_said_once_and_every_rank_ends(tmp_path: Path) -> None:
    done = torchrun_words(
        tmp_path, 2, *experiment_command(tmp_path, *EXTERNAL, "-dp", "2", "--prompts-file", str(tmp_path / "x"))[1:]
    )
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: --prompts-file {tmp_path}/x: it cannot be read (No such file or directory); give a file"]
