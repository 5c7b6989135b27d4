"""The files of a study: which one a setting goes to, and who may write it."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_launcher import Launcher

import batch_inference_experiment
from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.result_file import load_result, save_result
from batch_inference.core.results import DeviceInfo, Environment, Result, StoredConfig
from batch_inference.launch import running
from batch_inference.measure import locks
from batch_inference.measure.locks import LockedError, devices_in_use, holder_of, lock_of, locked
from batch_inference.measure.study import check_writable_paths, choose, claimed
from conftest import REPOSITORY, SMALL_GRID, experiment_command, stub_environment
from in_process import called

HERE = Environment(started_at="2026-01-02", versions={"vllm": "0.32.0"}, devices=[DeviceInfo(0, "NVIDIA H100")])


def save(path: Path, config: ExperimentConfig, here: Environment = HERE) -> Path:
    """A file as a sweep that was interrupted while loading leaves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_result(Result(config.setting_name, "partial", StoredConfig.of(config), here, points=[]), path)
    return path


@pytest.fixture
def config(tmp_path: Path) -> ExperimentConfig:
    return ExperimentConfig(output_dir=str(tmp_path / "study"))


def test_a_setting_that_is_not_there_has_the_usual_name(config: ExperimentConfig) -> None:
    assert choose(config, HERE) == (config.output_path, [])


@pytest.mark.parametrize(
    "again",
    [
        {},
        {"distributed_executor_backend": "uni"},  # the script's own choice for one device
        {"batch_sizes": (1, 2), "seq_lens": (8,), "max_tokens": 5},
        {"num_runs": 7, "warmup_runs": 3},
        {"target_ci": 0.5, "max_runs": 3},
        {"resume": True, "startup_timeout": 5.0},
        {"overwrite": True, "packed": True},
    ],
)
def test_the_same_settings_go_on_in_the_same_file(config: ExperimentConfig, again: dict[str, Any]) -> None:
    save(config.output_path, config)
    assert choose(dataclasses.replace(config, **again), HERE) == (config.output_path, [])


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"dtype": "half"}, {"dtype": "float16"}),
        ({"tensor_parallel_size": 2}, {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}),
        ({"engine_args": ("--block_size=16", "-q", "fp8")}, {"engine_args": ("-q", "fp8", "--block-size", "16")}),
        ({"engine_args": ("--hf-token", "one")}, {"engine_args": ("--hf-token", "two")}),
    ],
)
def test_settings_are_the_same_however_they_are_written(
    config: ExperimentConfig, before: dict[str, Any], now: dict[str, Any]
) -> None:
    before = {"name": "mine", **before}
    path = save(dataclasses.replace(config, **before).output_path, dataclasses.replace(config, **before))
    assert choose(dataclasses.replace(config, **{"name": "mine", **now}), HERE) == (path, [])


def test_a_model_folder_is_the_same_by_any_path(
    config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "m").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "models" / "m")
    save(config.output_path, dataclasses.replace(config, model=str(tmp_path / "models" / "m")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for model in ("models/m", "./models/m/", "link", "~/models/m"):
        assert choose(dataclasses.replace(config, model=model), HERE) == (config.output_path, [])


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        ({"model": "meta-llama/Llama-2-13b-chat-hf"}, "tp_1_Llama-2-13b-chat-hf_results.json", "model Llama-2-7b-chat"),
        ({"dtype": "float32"}, "tp_1_dtype_float32_results.json", "dtype auto"),
        ({"seed": 7}, "tp_1_seed_7_results.json", "seed 0"),
        ({"engine_args": ("--quantization", "fp8")}, "tp_1_quantization-fp8_results.json", "engine_args none"),
    ],
)
def test_other_settings_get_a_name_that_says_what_differs(
    config: ExperimentConfig, change: dict[str, Any], name: str, said: str
) -> None:
    before = save(config.output_path, config).read_bytes()
    other = dataclasses.replace(config, **change)
    path, (note,) = choose(other, HERE)
    assert path.name == name
    assert f"holds {said}" in note
    assert str(path) in note
    # It is found again by its settings, and the other is left alone.
    save(path, other)
    assert choose(other, HERE) == (path, [])
    assert choose(config, HERE) == (config.output_path, [])
    assert config.output_path.read_bytes() == before


@pytest.mark.parametrize(
    "there",
    [
        msgspec.structs.replace(HERE, versions={"vllm": "0.26.0"}),
        msgspec.structs.replace(HERE, devices=[DeviceInfo(0, "NVIDIA H200")]),
    ],
)
def test_another_vllm_or_other_devices_are_other_settings(config: ExperimentConfig, there: Environment) -> None:
    save(config.output_path, config, there)
    assert choose(config, HERE)[0] != config.output_path


def test_which_devices_and_how_many_of_a_kind_make_no_difference(config: ExperimentConfig) -> None:
    four = msgspec.structs.replace(HERE, devices=[DeviceInfo(index, "NVIDIA H100") for index in range(4)])
    save(config.output_path, config, four)
    assert choose(config, HERE) == (config.output_path, [])


def test_a_setting_of_another_name_has_a_file_of_its_own(config: ExperimentConfig) -> None:
    other = dataclasses.replace(config, name="mine")
    save(other.output_path, other)
    assert choose(config, HERE) == (config.output_path, [])


def test_the_log_is_as_it_was_where_it_can_be_written(config: ExperimentConfig) -> None:
    config.log_path.parent.mkdir(parents=True)
    config.log_path.write_text("what vLLM said\n")
    check_writable_paths(config)
    assert config.log_path.read_text() == "what vLLM said\n"


def test_names_that_are_taken_get_a_number(config: ExperimentConfig) -> None:
    folder = config.output_path.parent
    save(config.output_path, config)
    (folder / "tp_1_seed_7_results.json").write_text("{}")
    assert choose(dataclasses.replace(config, seed=7), HERE)[0] == folder / "tp_1_seed_7_2_results.json"


def test_of_several_files_of_a_setting_the_newest_goes_on(config: ExperimentConfig) -> None:
    folder = config.output_path.parent
    save(config.output_path, config)
    newer = save(folder / "b.json", config, msgspec.structs.replace(HERE, started_at="2026-02-01"))
    assert choose(config, HERE) == (newer, [])


def test_a_file_that_the_user_named_is_never_another_setting_s(config: ExperimentConfig) -> None:
    named = dataclasses.replace(config, output_file=f"{config.output_dir}/mine.json")
    assert choose(named, HERE) == (named.output_path, [])
    save(named.output_path, named)
    assert choose(named, HERE) == (named.output_path, [])
    for flags in ({}, {"overwrite": True}):
        with pytest.raises(ConfigError, match=r"mine\.json: it was measured with other settings: seed was 0, now 7"):
            choose(dataclasses.replace(named, seed=7, **flags), HERE)
    named.output_path.write_text("precious")
    with pytest.raises(ConfigError, match=r"mine\.json: it is no result of this program; move it away"):
        choose(named, HERE)


def test_a_second_program_is_told_who_measures(config: ExperimentConfig) -> None:
    with claimed(config, HERE) as (first, notes):
        assert (first.output_path, notes) == (config.output_path, [])
        with (
            pytest.raises(ConfigError, match=f"process {os.getpid()} on .* is measuring into it"),
            claimed(config, HERE),
        ):
            pass
        assert holder_of(config.output_path) is not None
        with claimed(dataclasses.replace(config, seed=7), HERE) as (other, _):  # in the same folder
            assert other.output_path.name == "tp_1_2_results.json"
    assert holder_of(config.output_path) is None
    with claimed(config, HERE):
        pass
    assert not lock_of(config.output_path).exists()


def test_a_lock_ends_with_its_process_even_by_sigkill(tmp_path: Path) -> None:
    path = tmp_path / ".x.lock"
    program = (
        "import sys, time, subprocess\nfrom pathlib import Path\nfrom batch_inference.measure.locks import locked\n"
        f"with locked(Path({str(path)!r}), 'a test'):\n"
        "    left_over = subprocess.Popen(['sleep', '30'])\n"
        "    print(left_over.pid, flush=True)\n    time.sleep(30)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    left_over = int(holder.stdout.readline())
    try:
        with pytest.raises(LockedError, match=f"process {holder.pid} .*a test"), locked(path, "me"):
            pass
        holder.kill()
        holder.wait()
        with locked(path, "me") as is_locked:
            assert is_locked
    finally:
        os.kill(left_over, signal.SIGKILL)


def test_a_file_system_that_cannot_lock_gets_a_note(config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_file: int, _how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with claimed(config, HERE) as (_, notes):
        assert notes == [f"{config.output_dir} cannot lock files: start only one program at a time there"]


def test_devices_that_another_sweep_uses_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks.tempfile, "gettempdir", lambda: str(tmp_path))
    devices = [DeviceInfo(index, "NVIDIA H100", uuid=f"GPU-{index}") for index in range(2)]
    with devices_in_use(devices, "tp_2") as nobody, devices_in_use(devices[1:], "tp_1") as used:
        assert nobody == []
        assert len(used) == 1
        assert re.match(rf"GPU 1: used by process {os.getpid()} on .* \(tp_2\)", used[0])
    with devices_in_use(devices, "tp_2") as nobody:
        assert nobody == []


def test_two_scripts_at_once_never_write_one_file(tmp_path: Path) -> None:
    command = experiment_command(tmp_path, *SMALL_GRID)
    first = subprocess.Popen(command, cwd=tmp_path, env=stub_environment(), stderr=subprocess.PIPE, text=True)
    deadline_s = time.monotonic() + 20
    while not lock_of(tmp_path / "tp_1_results.json").exists() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # it measures for as long as the second looks
    second = called(batch_inference_experiment.main, command[1:], tmp_path, stub_environment())
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2
    assert re.search(rf"error: --output-file .*: process {first.pid} on .* is measuring into it", second.stderr)
    assert first.wait(60) == 0
    assert [point.status for point in load_result(tmp_path / "tp_1_results.json").points] == ["ok", "ok"]


def test_two_seeds_in_one_folder_keep_a_file_each(tmp_path: Path) -> None:
    command = experiment_command(tmp_path, *SMALL_GRID)
    output = command.index("--output-file")
    del command[output : output + 2]
    for seed in ("0", "7", "0"):
        words = [*command[1:], "--seed", seed]
        done = called(batch_inference_experiment.main, words, tmp_path, stub_environment())
        assert done.returncode == 0, done.stderr
    assert "2 of 2 points are kept from experiment_results/tp_1_results.json" in " ".join(done.stderr.split())
    assert sorted(path.name for path in (tmp_path / "experiment_results").glob("*.json")) == [
        "tp_1_results.json", "tp_1_seed_7_results.json",
    ]  # fmt: skip


def test_a_setting_that_another_program_measures_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holders = {"tp_1": ["process 7 on node-b"] * 3}  # one for each time that it is asked for
    monkeypatch.setattr(running, "measured_by", lambda config: holders.get(config.name) and holders[config.name].pop())
    monkeypatch.setattr(running, "POLL_S", 0.01)
    launcher = Launcher(tmp_path)
    done = launcher("tensor-parallel", DEVICES="2")
    assert done.returncode == 0, done.stderr
    assert launcher.names() == ["tp_2", "tp_1"]
    assert done.stderr.splitlines()[:4] == [
        "[1/4] tp_1: process 7 on node-b is measuring it; it is tried again at the end",
        "[2/4] tp_2 -> experiment_results/tp_2_results.json",
        "[3/4] tp_4 skipped: it needs 4 devices, there are 2 (gpu)",
        "[4/4] tp_8 skipped: it needs 8 devices, there are 2 (gpu)",
    ]
    assert done.stderr.count("[1/4] tp_1 waits: process 7 on node-b is measuring it") == 1


@pytest.mark.slow
def test_two_launchers_share_a_folder(tmp_path: Path) -> None:
    """The second goes on to the next setting, and tries again at the end what the first is measuring."""
    flags = ("--model", str(REPOSITORY / "models" / "tiny-llama"), "--batch-sizes", "1,2", "--seq-lens", "8")
    command = [str(REPOSITORY / "run_batch_experiments.sh"), "tensor-parallel", *flags, "--", "--num-runs", "2"]
    variables = {"PYTHON": sys.executable, "STUB_RUN_S": "0.2", "VLLM_CPU_OMP_THREADS_BIND": "0|0"}
    first = subprocess.Popen(
        command, cwd=tmp_path, env=stub_environment(**variables), stderr=subprocess.PIPE, text=True
    )
    lock = lock_of(tmp_path / "experiment_results" / "tp_1_results.json")
    deadline_s = time.monotonic() + 20
    while not lock.exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    second = subprocess.run(
        command, cwd=tmp_path, env=stub_environment(**variables), capture_output=True, text=True, timeout=120
    )
    assert first.wait(60) == 0
    assert second.returncode == 0, second.stderr
    assert re.search(r"\[1/4\] tp_1: process \d+ on .* is measuring it; it is tried again at the end", second.stderr)
    assert "done: tp_2 tp_1" in second.stderr
    assert "of 2 points are kept" in " ".join(second.stderr.split())
    assert sorted(path.name for path in lock.parent.glob("*.json")) == ["tp_1_results.json", "tp_2_results.json"]
