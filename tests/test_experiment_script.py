"""batch_inference_experiment.py as a user runs it, on the stub vLLM."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import batch_inference_experiment
from batch_inference.core.config import ExperimentConfig
from batch_inference.plan.devices import Devices
from batch_inference.plan.model import read_model_facts
from batch_inference_experiment import Surroundings, show_plan
from conftest import (
    REPOSITORY,
    SMALL_GRID,
    TINY,
    assert_answers_at_once,
    assert_as_the_schema_says,
    experiment_command,
    is_running,
    stub_environment,
    with_ctrl_c,
)

pytestmark = pytest.mark.slow

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def test_flags_become_a_result_file_a_log_and_a_table(experiment: Run, tmp_path: Path) -> None:
    done = experiment("-tp", "2", "--load-format", "dummy")
    assert done.returncode == 0, done.stderr
    assert_as_the_schema_says(tmp_path / "tp_1_results.json")
    document = json.loads((tmp_path / "tp_1_results.json").read_text())
    assert document["status"] == "complete"
    assert [(point["batch_size"], point["status"]) for point in document["points"]] == [(1, "ok"), (2, "ok")]
    assert [run["output_tokens"] for point in document["points"] for run in point["runs"]] == [4, 4, 8, 8]
    assert document["engine"]["load_format"] == "dummy"
    assert document["engine"]["executor"] == "mp"
    assert document["environment"]["ended_at"] >= document["environment"]["started_at"]
    assert "stub vLLM is loading" in (tmp_path / "tp_1_results.log").read_text()
    table = done.stdout.splitlines()
    assert table[0].split()[:2] == ["batch", "length"]
    # On a busy machine runs of milliseconds may differ enough to be suspect.
    assert [line.split()[-1] for line in table[2:4]] == [point["verdict"] for point in document["points"]]
    assert table[-1] == str(tmp_path / "tp_1_results.json")
    assert "stub vLLM" not in done.stderr
    assert "[2/2] 2 x 8" in done.stderr


def prompts_in(log: Path) -> list[str]:
    """Every prompt that the stub was given, as text."""
    lines = [line for line in log.read_text().splitlines() if line.startswith("prompts ")]
    return [prompt for line in lines for prompt in re.findall(r"\[(.*?)\]", line)]


def test_prompts_are_fresh_for_every_run_and_the_same_for_every_setting(experiment: Run, tmp_path: Path) -> None:
    made = []
    for number, flags in enumerate((["-tp", "1"], ["-tp", "2"], ["--seed", "1"])):
        file = ("--output-file", str(tmp_path / f"{number}.json"))
        assert experiment("--seq-lens", "64", *flags, *file).returncode == 0
        made.append(prompts_in(tmp_path / f"{number}.log"))
    for prompts in made:
        assert len(set(prompts)) == len(prompts)
        ids = {token for prompt in prompts for token in prompt.split(", ")}
        assert not {"1", "2"} & ids  # special, by the stub's model
    one, two, other_seed = map(set, made)
    # Two warm-ups and two runs of one prompt and of two prompts; a busy machine may have needed more warm-ups.
    assert len(one & two) >= 4 * (1 + 2)
    assert not one & other_seed


def test_verbose_shows_the_log_of_vllm(experiment: Run) -> None:
    done = experiment("--verbose")
    assert done.returncode == 0, done.stderr
    assert "stub vLLM is loading" in done.stderr
    assert "stub vLLM" not in done.stdout


def test_a_name_and_the_default_file_follow_the_sizes(tmp_path: Path) -> None:
    command = experiment_command(tmp_path, *SMALL_GRID, "-pp", "2")
    del command[4:6]
    done = subprocess.run(command, cwd=tmp_path, env=stub_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "experiment_results" / "pp_2_results.json").read_text())["name"] == "pp_2"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--batch-sizes", "0"), "--batch-sizes"),
        (("--node-rank", "1"), "--node-rank 1: without --nnodes there is one node"),
        (("--name", "a\x1b[31m\nb"), "--name: 'a\\x1b[31m\\nb' was given"),
        (("--devices", "8"), "--devices 8: it is only for a plan; add --dry-run"),
        (("--quantisation", "fp8"), "did you mean --quantization?"),
        (("--model", "./absent"), "--model ./absent: there is no such folder"),
        (("--max-model-len", "4096"), "--max-model-len 4096 is more than the model's 2048"),
        (("-tp", "3"), "TP x PP x DP is 3 devices, but this machine has"),
        (("--distributed-executor-backend", "ray"), "ray is refused by vLLM on the CPU; use mp"),
        (("-tp", "2", "--distributed-executor-backend", "external_launcher"), "torchrun --nproc-per-node 2"),
        (("--output-file", "/proc/nowhere/x.json"), "--output-file /proc/nowhere/x.json"),
        (("--output-file", "/proc/x.json"), "--output-file /proc/x.json"),
        (("--output-file", "x" * 300), "shorten it"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2_with_nothing_loaded(
    experiment: Run, tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    done = experiment(*flags)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in done.stderr
    log = tmp_path / "tp_1_results.log"
    assert not log.exists() or "stub vLLM is loading" not in log.read_text()


def test_a_wrong_vllm_flag_leaves_no_result_file_behind(experiment: Run, tmp_path: Path) -> None:
    assert experiment("--quantisation", "fp8").returncode == 2
    assert not (tmp_path / "tp_1_results.json").exists()
    assert experiment("--quantization", "fp8", "--dry-run").returncode == 0


def test_repeats_are_noted_and_dropped(experiment: Run) -> None:
    done = experiment("--batch-sizes", "1,1,2", "--dry-run")
    assert done.returncode == 0
    assert "note: --batch-sizes: repeats are dropped; 1,2 will be measured" in done.stderr


def test_the_same_command_again_goes_on(experiment: Run, tmp_path: Path) -> None:
    assert experiment().returncode == 0
    first = (tmp_path / "tp_1_results.json").read_text()
    again = experiment()
    assert again.returncode == 0, again.stderr
    assert "2 of 2 points are kept from" in again.stderr
    assert (tmp_path / "tp_1_results.json").read_text() == first
    grown = experiment("--resume", "--batch-sizes", "1,2,3")
    assert grown.returncode == 0, grown.stderr
    assert "2 of 3 points are kept" in grown.stderr
    old, new = json.loads(first), json.loads((tmp_path / "tp_1_results.json").read_text())
    assert [{**point, "engine": None} for point in new["points"][:2]] == old["points"]
    assert [point["engine"] for point in new["points"]] == [0, 0, None]
    assert [engine["max_num_seqs"] for engine in new["earlier_engines"]] == [2]
    assert len(new["points"]) == 3
    anew = experiment("--overwrite")
    assert (anew.returncode, "are kept" in anew.stderr) == (0, False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tp_1_results.json", "tp_1_results.log"]


def test_resume_with_nothing_left_to_do_loads_no_engine(experiment: Run, tmp_path: Path) -> None:
    assert experiment().returncode == 0
    done = experiment("--resume", STUB_FAIL="load")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "tp_1_results.json").read_text())["status"] == "complete"


def test_an_engine_that_does_not_start_is_exit_1_with_the_cause_and_the_log(experiment: Run, tmp_path: Path) -> None:
    done = experiment(STUB_FAIL="load")
    assert done.returncode == 1
    assert "error: tp_1: ValueError: the planted reason" in done.stderr
    assert str(tmp_path / "tp_1_results.log") in done.stderr
    assert_as_the_schema_says(tmp_path / "tp_1_results.json")
    assert json.loads((tmp_path / "tp_1_results.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(("fail", "status"), [("run:2", "oom"), ("die:2", "error")])
def test_a_failing_point_is_recorded_and_the_others_are_kept(
    experiment: Run, tmp_path: Path, fail: str, status: str
) -> None:
    done = experiment(STUB_FAIL=fail)
    assert done.returncode == 1
    assert_as_the_schema_says(tmp_path / "tp_1_results.json")
    points = json.loads((tmp_path / "tp_1_results.json").read_text())["points"]
    assert [point["status"] for point in points] == ["ok", status]
    assert points[1]["log_tail"]


@pytest.mark.parametrize(
    ("fail", "said"),
    [("tokens", "output tokens came back"), ("prefix", "prefix cache")],
)
def test_a_run_that_did_not_do_what_was_asked_is_invalid(experiment: Run, tmp_path: Path, fail: str, said: str) -> None:
    assert experiment(STUB_FAIL=fail).returncode == 0
    assert_as_the_schema_says(tmp_path / "tp_1_results.json")
    point = json.loads((tmp_path / "tp_1_results.json").read_text())["points"][0]
    assert point["verdict"] == "invalid"
    assert said in point["verdict_reasons"][0]


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupted_script_keeps_its_file_and_leaves_no_process(
    tmp_path: Path, signal_number: signal.Signals, code: int
) -> None:
    process, engines = hanging_script(tmp_path)
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert json.loads((tmp_path / "tp_1_results.json").read_text())["status"] == "partial"
    assert not list(filter(is_running, engines))
    assert names_in(tmp_path) == ["tp_1_results.json", "tp_1_results.log"]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_terminal_that_is_closed_hangs_up_twice(tmp_path: Path) -> None:
    process, engines = hanging_script(tmp_path)
    process.send_signal(signal.SIGHUP)
    assert process.stderr is not None
    while "ended by SIGHUP" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGHUP)
    assert process.stderr.read() == "\nending the engine; finished points are kept\n"
    assert process.wait(timeout=30) == 129
    assert json.loads((tmp_path / "tp_1_results.json").read_text())["status"] == "partial"
    assert not list(filter(is_running, engines))


def test_variables_that_torchrun_did_not_set_are_named(experiment: Run) -> None:
    done = experiment(RANK="x\x1b", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    assert done.stderr == "error: RANK: 'x\\x1b' is not a number; unset it outside torchrun\n"
    assert done.returncode == 2


def test_a_plan_counts_with_the_memory_that_is_given_before_that_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pool(given_gib: float | None) -> float:
        config = ExperimentConfig(model=TINY, seq_lens=(512,), device_memory_gib=given_gib)
        here = Surroundings(read_model_facts(config.model), Devices("gpu", ("0",)), None, None)
        assert show_plan(config, here) == 0
        found = re.search(r"([0-9.]+) GiB are available for it", " ".join(capsys.readouterr().out.split()))
        assert found
        return float(found[1])

    monkeypatch.setattr(batch_inference_experiment, "smallest_memory_gib", lambda _: 40.0)
    assert (pool(None), pool(80.0)) == pytest.approx((32.0, 64.0), rel=0.01)


@pytest.mark.parametrize(
    ("dtype", "model", "measured"),
    [
        ("float32", "tiny-llama", "float32"),
        ("half", "tiny-llama", "float16"),
        ("auto", "tiny-llama", "bfloat16"),
        # Of a model that cannot be read from here it is not known.
        ("auto", None, "bfloat16"),
    ],
)
def test_peaks_are_measured_in_what_the_model_computes_in(
    dtype: str, model: str | None, measured: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = read_model_facts(str(REPOSITORY / "models" / model)) if model else None
    here = Surroundings(facts, Devices("cpu", ("0",)), None, None)
    peaks: Any = SimpleNamespace()
    monkeypatch.setattr("batch_inference.measure.peaks.measure_peaks", lambda devices, told: (peaks, devices, told))
    config = ExperimentConfig(dtype=dtype)
    assert batch_inference_experiment.measured_peaks(config, here) == (peaks, here.devices, measured)


def test_one_rank_of_each_node_says_what_is_wrong(experiment: Run) -> None:
    def told(rank: int, local_rank: int) -> str:
        place = {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": "2"}
        done = experiment("--num-runs", "0", **place)
        assert done.returncode == 2
        return done.stderr

    assert [bool(told(*ranks)) for ranks in ((0, 0), (1, 1), (2, 0), (3, 1))] == [True, False, True, False]


def test_what_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    process, _ = hanging_script(tmp_path, "nohup")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "SIGHUP" not in errors


def hanging_script(folder: Path, *before: str) -> tuple[subprocess.Popen[str], list[int]]:
    """The script in the middle of a run that never ends, and the pids of its engine processes."""
    process = subprocess.Popen(
        [*before, *experiment_command(folder, *SMALL_GRID)],
        env=stub_environment(STUB_FAIL="hang"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=with_ctrl_c,
    )
    log = folder / "tp_1_results.log"
    _wait_for(lambda: log.exists() and "prompts" in log.read_text())
    engines = _children(process.pid)
    assert engines
    return process, engines


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_impatient_user_leaves_no_process_behind(tmp_path: Path, signal_number: signal.Signals) -> None:
    process, engines = hanging_script(tmp_path)
    process.send_signal(signal_number)
    assert process.stderr is not None
    assert any("ending the engine" in line for line in process.stderr)
    process.send_signal(signal_number)
    process.communicate(timeout=30)
    assert process.returncode in (130, 143)
    _wait_for(lambda: not any(map(is_running, engines)))


def test_files_of_the_users_own_are_no_modules_of_ours(tmp_path: Path) -> None:
    for name in ("queue.py", "batch_inference"):
        (tmp_path / name).write_text("raise SystemExit('not meant')")
    command = experiment_command(tmp_path, *SMALL_GRID)
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=stub_environment(), timeout=60)
    assert done.returncode == 0, done.stderr


def test_resume_goes_on_with_the_log(experiment: Run, tmp_path: Path) -> None:
    experiment()
    log = tmp_path / "tp_1_results.log"
    before = log.read_text()
    experiment("--resume", "--batch-sizes", "1,2,3")
    assert log.read_text().startswith(before)
    assert log.read_text().count("stub vLLM is loading") == 2


def test_no_secret_of_the_command_line_or_the_environment_is_written(experiment: Run, tmp_path: Path) -> None:
    done = experiment("--hf-token", "hush-1", HF_TOKEN="hush-2", VLLM_API_KEY="hush-3")
    assert done.returncode == 0, done.stderr
    assert "hush" not in (tmp_path / "tp_1_results.json").read_text()


def test_the_plan_loads_nothing_and_says_what_will_run(experiment: Run, tmp_path: Path) -> None:
    done = experiment("--dry-run")
    assert done.returncode == 0
    assert "2 points, 2 timed runs each" in " ".join(done.stdout.split())
    assert done.stdout.splitlines()[-1] == "verdict   can run"
    assert list(tmp_path.iterdir()) == []


def test_a_plan_for_another_machine_counts_its_devices(experiment: Run) -> None:
    model = ("--model", str(REPOSITORY / "models" / "llama-2-7b"), "-tp", "4")
    done = experiment("--dry-run", *model, "--devices", "4", "--device-memory-gib", "80")
    told = " ".join(done.stdout.split())
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "verdict   can run")
    assert "4 of 4 gpu devices" in told
    assert "60.9 GiB are available for it" in told
    done = experiment("--dry-run", *model, "--devices", "2")
    assert done.returncode == 1
    assert "cannot run: TP x PP x DP is 4 devices, but this machine has 2 GPUs" in " ".join(done.stdout.split())


def test_a_python_without_vllm_is_told_what_to_do(tmp_path: Path) -> None:
    # -S: no site-packages at all, as on a fresh machine.
    command = experiment_command(tmp_path, *SMALL_GRID)
    command.insert(1, "-S")
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 2
    told = "error: vllm, torch are not installed: pip install vllm torch pandas matplotlib seaborn; without a GPU: "
    assert done.stderr == f"{told}./setup_env.sh\n"


@pytest.mark.parametrize("flag", ["--help", "--dry-run"])
def test_help_and_plan_answer_at_once_without_heavy_imports(flag: str) -> None:
    assert_answers_at_once([sys.executable, "batch_inference_experiment.py", flag], REPOSITORY, dict(os.environ))


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("stub", "expected"),
    [
        # The way to each is looked at where the engine is (test_engine.py).
        ({}, (None, True)),
        ({"STUB_MULTIMODAL": "1"}, (True, True)),
        ({"STUB_MULTIMODAL": "internvl"}, (True, False)),
        ({"STUB_MULTIMODAL": "1", "STUB_LACKS": "language_model_only"}, (None, False)),
    ],
)
def test_a_multimodal_model_is_measured_on_text_and_the_file_says_how(
    experiment: Run, tmp_path: Path, stub: dict[str, str], expected: tuple[bool | None, bool]
) -> None:
    done = experiment(**stub)
    assert done.returncode == 0, done.stderr
    engine = json.loads((tmp_path / "tp_1_results.json").read_text())["engine"]
    assert (engine["language_model_only"], engine["skip_tokenizer_init"]) == expected
    prompts = re.findall(r"^prompts (.*)$", (tmp_path / "tp_1_results.log").read_text(), re.MULTILINE)
    # 5 stands for an image, in the config above that of the text.
    assert not {1, 2, 5} & {int(number) for line in prompts for number in re.findall(r"\d+", line)}


# --- workloads --------------------------------------------------------------------------------------------------------

QUEUE_GRID = ("--batch-sizes", "2,4")


def write_job(folder: Path, count: int = 120, name: str = "job.jsonl") -> Path:
    """Lengths alone; the longest request of 120 takes 70 tokens."""
    path = folder / name
    lengths = [{"prompt_tokens": 1 + number * 7 % 60, "output_tokens": 1 + number % 12} for number in range(count)]
    path.write_text("".join(f"{json.dumps(one)}\n" for one in lengths))
    return path


def points_of(folder: Path) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = json.loads((folder / "tp_1_results.json").read_text())["points"]
    return points


def test_a_workload_becomes_a_queue_point_for_each_batch_size_on_one_load(experiment: Run, tmp_path: Path) -> None:
    path = write_job(tmp_path)
    done = experiment("--prompts-file", str(path), "-dp", "2", "--seed", "3", grid=QUEUE_GRID)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "tp_1_results.json").read_text())
    (job,) = document["jobs"]
    assert (job["requests"], job["longest"], job["output_lengths"]) == (120, 70, "file")
    assert job["prompt_lens"] == [1 + number * 7 % 60 for number in range(120)]
    assert document["engine"]["max_model_len"] == 70
    assert document["engine"]["max_num_seqs"] == 4
    points = document["points"]
    assert [(point["batch_size"], point["status"]) for point in points] == [(2, "ok"), (4, "ok")]
    # 64 of 120, and then no more than there are: 2 replicas x 12 lives of 4 requests.
    assert [len(point["runs"][0]["requests"]["output_tokens"]) for point in points] == [64, 96]
    for point in points:
        (run,) = point["runs"]
        shares = [replica["requests"] for replica in run["replicas"]]
        assert sum(shares) == len(run["requests"]["output_tokens"]) == point["sample"]["prompts"]["requests"]
        assert run["counters"]["miscounted"] == 0
        assert run["counters"]["peak_running"] == point["batch_size"]
        assert sum(sum(replica["timeline"]["output_tokens"]) for replica in run["replicas"]) == run["output_tokens"]
        assert max(max(replica["timeline"]["running"]) for replica in run["replicas"]) <= point["batch_size"]
    for name in ("tp_1_results.log", "tp_1_results.replica_1.log"):
        assert (tmp_path / name).read_text().count("stub vLLM is loading") == 1
    table = done.stdout.splitlines()
    assert table[0] == (
        f"workload {job['content_hash'][:8]} of 120 requests, output lengths from the file, order given"
    )
    assert table[1].split()[:3] == ["at", "once", "tok/s"]
    assert [line.split()[0] for line in table[3:5]] == ["2", "4"]
    assert "[2/2] 4 at once: " in done.stderr


def test_points_of_a_workload_are_kept_and_other_ones_are_added(experiment: Run, tmp_path: Path) -> None:
    path = str(write_job(tmp_path))
    assert experiment("--prompts-file", path, grid=QUEUE_GRID).returncode == 0
    before = points_of(tmp_path)
    again = experiment("--prompts-file", path, grid=QUEUE_GRID, STUB_FAIL="load")
    assert (again.returncode, "nothing is left to measure" in " ".join(again.stderr.split())) == (0, True)
    other = str(write_job(tmp_path, 100, "other.jsonl"))
    for flags in (("--prompts-file", other), ("--prompts-file", path, "--output-lengths", "5")):
        assert experiment(*flags, "--batch-sizes", "2", grid=()).returncode == 0
    points = points_of(tmp_path)
    assert [{**point, "engine": None} for point in points[:2]] == before
    assert len({json.dumps([point["batch_size"], point["workload"]]) for point in points}) == len(points) == 4
    assert {tuple(point["runs"][0]["requests"]["output_tokens"]) for point in points[3:]} == {(5,) * 32}


def test_requests_that_come_back_otherwise_make_a_queue_point_invalid(experiment: Run, tmp_path: Path) -> None:
    done = experiment("--prompts-file", str(write_job(tmp_path)), grid=QUEUE_GRID, STUB_FAIL="tokens")
    assert done.returncode == 0, done.stderr
    assert [point["verdict"] for point in points_of(tmp_path)] == ["invalid", "invalid"]
    said = "1 request came back with a different number of tokens than asked"
    assert points_of(tmp_path)[0]["verdict_reasons"][0] == said
    assert said in done.stderr


def test_the_model_may_end_its_outputs_where_it_has_weights(experiment: Run, tmp_path: Path) -> None:
    path = str(write_job(tmp_path))
    done = experiment("--prompts-file", path, "--output-lengths", "eos", "--max-tokens", "9", grid=QUEUE_GRID)
    assert done.returncode == 0, done.stderr
    (point, _) = points_of(tmp_path)
    # Of the stub every third request ends after two tokens.
    assert sorted(set(point["runs"][0]["requests"]["output_tokens"])) == [2, 9]
    assert (point["max_tokens"], point["runs"][0]["counters"]["miscounted"]) == (9, 0)


def test_tokens_per_step_are_points_of_their_own_with_a_workload_and_without(experiment: Run, tmp_path: Path) -> None:
    budgets = ("--max-num-batched-tokens", "16,256")
    done = experiment("--prompts-file", str(write_job(tmp_path)), *budgets, "--batch-sizes", "4", grid=())
    assert done.returncode == 0, done.stderr
    small, large = points_of(tmp_path)
    assert (small["max_num_batched_tokens"], large["max_num_batched_tokens"]) == (16, 256)
    steps = [sum(point["runs"][0]["replicas"][0]["timeline"]["steps"]) for point in (small, large)]
    assert steps[0] > steps[1]
    assert json.loads((tmp_path / "tp_1_results.json").read_text())["engine"]["max_num_batched_tokens"] == 256
    done = experiment(*budgets)
    assert done.returncode == 0, done.stderr
    sizes = ("seq_len", "batch_size", "max_num_batched_tokens")
    assert [tuple(point[name] for name in sizes) for point in points_of(tmp_path)[2:]] == [
        (8, 1, 16), (8, 2, 16), (8, 1, 256), (8, 2, 256),
    ]  # fmt: skip


def test_prefixes_that_are_cached_are_a_part_of_the_point(experiment: Run, tmp_path: Path) -> None:
    path = str(write_job(tmp_path))
    done = experiment("--prompts-file", path, "--enable_prefix_caching", grid=QUEUE_GRID)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "tp_1_results.json").read_text())
    assert document["engine"]["enable_prefix_caching"] is True
    assert {point["workload"]["is_cached"] for point in document["points"]} == {True}
    # Of lengths alone no two prompts are alike.
    assert [point["summary"]["prefix_hit_share"] for point in document["points"]] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("lines", "flags", "said"),
    [
        ("", (), "{file}: it has no usable request; write one on each line"),
        ("\n \n", (), "{file}: it has no usable request; write one on each line"),
        ("[]", (), "{file}: it has no usable request; write one on each line"),
        (
            '{"prompt_tokens": 8, "output_tokens": 4}\n{"prompt',
            (),
            "{file}, line 2: it is not JSON; fix it, or leave it out with --skip-bad-lines",
        ),
        (
            '{"prompt_tokens": 8, "output_tokens": 4}\n\n{"prompt_tokens": 0, "output_tokens": 4}\n',
            (),
            "{file}, line 3: its prompt_tokens '0' is not a number of tokens from 1 to 134217728; fix it, or leave it "
            "out with --skip-bad-lines",
        ),
        (
            '{"prompt_tokens": 8, "output_tokens": -4}',
            (),
            "{file}, line 1: its output_tokens '-4' is not a number of tokens from 1 to 134217728; fix it, or leave it "
            "out with --skip-bad-lines",
        ),
        ('{"prompt_tokens": 0}', ("--skip-bad-lines",), "{file}: it has no usable request; write one on each line"),
        (
            "prompt_tokens,output_tokens\n8,x\n",
            (),
            "{file}, line 2: its output_tokens 'x' is not a number of tokens from",
        ),
        (
            "a,b\n1,2\n",
            (),
            "{file}, line 1: 'a,b' begins like neither JSON nor a CSV with the columns prompt_tokens, output",
        ),
        (
            '{"prompt_tokens": 8}\n',
            (),
            "{file}: 1 request of 1 has no output length (first: request 1); give --output-lengths N, or eos",
        ),
        (
            '{"prompt_tokens": 2000, "output_tokens": 49}\n',
            (),
            "{file}: its longest request takes 2049 tokens, more than the model's 2048; shorten the requests",
        ),
        (
            '{"prompt_tokens": 8, "output_tokens": 4}\n',
            ("--max-model-len", "11"),
            "{file}: its longest request takes 12 tokens, more than --max-model-len 11; raise it or shorten the "
            "requests",
        ),
        (
            '{"custom_id": "a", "url": "/v1/embeddings", "body": {"input": "x"}}\n',
            (),
            "{file}: not measured: 1 for embeddings (first: line 1); leave them out with --skip-bad-lines",
        ),
    ],
)
def test_a_file_that_is_no_job_is_one_line_that_names_it_and_the_place(
    experiment: Run, tmp_path: Path, lines: str, flags: tuple[str, ...], said: str
) -> None:
    path = tmp_path / "job"
    path.write_text(lines)
    done = experiment("--prompts-file", str(path), *flags, grid=QUEUE_GRID)
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said.format(file=f"error: --prompts-file {path}") in error
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("tp_1*"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ("--sample", "121"),
            "--sample 121: {file} has 120 requests; lower it, or drop it to run as many as are needed",
        ),
        (("--sample", "7"), "--sample 7: with 4 at once on 1 replica there is no plateau below 8; raise it, or lower"),
        (("--sample", "15", "-dp", "2"), "--sample 15: with 4 at once on 2 replicas there is no plateau below 16"),
        (("--seq-lens", "8"), "--seq-lens 8: a workload has its own lengths; drop this flag or --prompts-file"),
        (("--output-lengths", "eos", "--load-format", "dummy"), "--output-lengths eos: dummy weights (--load-format)"),
        (("--scheduler-cls", "a.B"), "--scheduler-cls a.B: several batch sizes of a workload"),
    ],
)
def test_what_is_wrong_with_what_is_asked_of_a_job_is_one_line(
    experiment: Run, tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    path = write_job(tmp_path)
    done = experiment("--prompts-file", str(path), *flags, grid=QUEUE_GRID)
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: {said.format(file=path)}")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "tp_1_results.json").exists()


@pytest.mark.parametrize("kind", ["folder", "fifo", "absent"])
def test_what_is_no_file_is_no_workload(experiment: Run, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "job"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    done = experiment("--prompts-file", str(path), grid=QUEUE_GRID)
    why = {"folder": "Is a directory", "fifo": "it is not a regular file", "absent": "No such file or directory"}[kind]
    assert (done.returncode, done.stderr) == (
        2,
        f"error: --prompts-file {path}: it cannot be read ({why}); give a file\n",
    )


def test_what_is_left_out_of_a_job_stands_in_the_file(experiment: Run, tmp_path: Path) -> None:
    path = write_job(tmp_path)
    path.write_text(path.read_text() + "no JSON\n" + '{"url": "/v1/embeddings", "body": {}}\n')
    done = experiment("--prompts-file", str(path), "--skip-bad-lines", grid=QUEUE_GRID)
    assert done.returncode == 0, done.stderr
    (job,) = json.loads((tmp_path / "tp_1_results.json").read_text())["jobs"]
    assert job["requests"] == 120
    assert job["left_out"].endswith("left out: 1 for embeddings, 1 bad line")


def test_a_job_smaller_than_its_places_runs_as_a_whole(experiment: Run, tmp_path: Path) -> None:
    """Also where a replica has nothing to do."""
    path = write_job(tmp_path, 1)
    done = experiment("--prompts-file", str(path), "-dp", "2", grid=QUEUE_GRID)
    assert done.returncode == 0, done.stderr
    for point in points_of(tmp_path):
        assert [replica["requests"] for replica in point["runs"][0]["replicas"]] == [1, 0]
        assert not any("places" in reason or "too small" in reason for reason in point["verdict_reasons"])


@pytest.mark.parametrize("flags", [("--max-model-len", "512"), ("--max-model-len", "auto")])
def test_a_node_that_knows_the_length_needs_no_workload_of_its_own(
    experiment: Run, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """And is not held against the lengths of a grid that nobody asked for, of which the longest is over the model's."""
    nodes = ("--nnodes", "2", "-tp", "2", "--master-addr", "127.0.0.1", "--node-rank", "1", "--dry-run")
    absent = ("--prompts-file", str(tmp_path / "absent"))
    done = experiment(*absent, *nodes, *flags, grid=QUEUE_GRID)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "verdict   can run"), done.stdout
    done = experiment(*absent, *nodes, grid=QUEUE_GRID)
    assert (done.returncode, "it cannot be read" in done.stderr) == (2, True)
