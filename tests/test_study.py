"""The files of a study: which one a setting goes to, and who may write it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_launcher import Launcher

import batch_inference_experiment
from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.result_file import Heading, load_result, save_result
from batch_inference.core.results import DeviceInfo, Environment, Result, StoredConfig
from batch_inference.launch import running
from batch_inference.measure import locks, study
from batch_inference.measure.locks import LockedError, devices_in_use, holder_of, lock_of, locked
from batch_inference.measure.study import check_writable_paths, choose, claimed, differences
from batch_inference.plan.devices import find_devices
from conftest import REPOSITORY, SMALL_GRID, TINY, experiment_command, stub_environment
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


def test_a_model_folder_of_the_same_name_elsewhere_is_another(
    config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its path is as it was written, from where it was measured."""
    for place in ("one", "two"):
        (tmp_path / place / "m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "one")
    config = dataclasses.replace(config, model="m")
    save(config.output_path, config)
    assert choose(config, HERE) == (config.output_path, [])
    monkeypatch.chdir(tmp_path / "two")
    path, (note,) = choose(config, HERE)
    assert path != config.output_path
    assert re.search(r" holds model m \([0-9a-f]{16}\); this goes to .*tp_1_m-[0-9a-f]{16}_results\.json$", note)
    (tmp_path / "two" / "n").mkdir()
    path, (note,) = choose(dataclasses.replace(config, model="n"), HERE)
    assert path.name == "tp_1_n_results.json"
    assert " holds model m; this goes to " in note
    same = dataclasses.replace(config, model=str(tmp_path / "one" / "m"))
    assert choose(same, HERE) == (config.output_path, [])


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
        with pytest.raises(
            ConfigError, match=r"mine\.json: it was measured with different settings: seed was 0, now 7"
        ):
            choose(dataclasses.replace(named, seed=7, **flags), HERE)
    named.output_path.write_text("precious")
    with pytest.raises(ConfigError, match=r"mine\.json: it is not a result of this program; move it away"):
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


def test_devices_that_another_sweep_uses_are_kept_in_the_file(
    experiment: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t").mkdir()
    monkeypatch.setattr(locks.tempfile, "gettempdir", lambda: str(tmp_path / "t"))
    cores = find_devices().ids[0]
    with devices_in_use([DeviceInfo(0, "a CPU", cores=cores)], "tp_9"):
        done = experiment()
    used = f"cores {cores}: used by process {os.getpid()} on {socket.gethostname()} (tp_9)"
    assert f"note: {used}" in done.stderr.splitlines()
    # Alone, but beside what was measured then.
    assert "used by" not in experiment("--batch-sizes", "1,2,4").stderr
    environment = load_result(tmp_path / "tp_1_results.json").environment
    assert environment.used_by_others == [used]
    assert len(environment.resumed_from) == 1


@pytest.mark.slow
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


@pytest.mark.slow
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
        "[1/4] tp_1: process 7 on node-b is measuring it; it will be tried again at the end",
        "[2/4] tp_2 -> experiment_results/tp_2_results.json",
        "[3/4] tp_4 skipped: it needs 4 devices, but there are 2 (gpu)",
        "[4/4] tp_8 skipped: it needs 8 devices, but there are 2 (gpu)",
    ]
    assert done.stderr.count("[1/4] tp_1 waits: process 7 on node-b is measuring it") == 1


@pytest.mark.slow
def test_two_launchers_share_a_folder(tmp_path: Path) -> None:
    """The second goes on to the next setting, and tries again at the end what the first is measuring."""
    flags = ("--model", TINY, "--batch-sizes", "1,2", "--seq-lens", "8")
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
    assert re.search(
        r"\[1/4\] tp_1: process \d+ on .* is measuring it; it will be tried again at the end", second.stderr
    )
    assert "done: tp_2 tp_1" in second.stderr
    assert "of 2 points are kept" in " ".join(second.stderr.split())
    assert sorted(path.name for path in lock.parent.glob("*.json")) == ["tp_1_results.json", "tp_2_results.json"]


def test_what_tells_two_settings_apart_is_said_in_few_words(config: ExperimentConfig) -> None:
    """Of each its name and both values, in the order of the settings; then vLLM, then the devices."""
    there = Environment(devices=[DeviceInfo(1, "B"), DeviceInfo(0, "A"), DeviceInfo(2, "B")])
    other = dataclasses.replace(config, seed=7, dtype="float32", engine_args=("--quantization", "fp8"))
    heading = Heading(config.setting_name, StoredConfig.of(config), there)
    names = list(config.same_settings())
    told = [(one.what, one.before, one.now) for one in differences(other, HERE, heading)]
    settings = {
        "dtype": ("dtype", "auto", "float32"),
        "seed": ("seed", "0", "7"),
        "engine_args": ("engine_args", "none", "--quantization fp8"),
    }
    assert told == [
        *(settings[name] for name in names if name in settings),
        ("vLLM", "unknown", "0.32.0"),
        ("devices", "A + B", "NVIDIA H100"),
    ]
    nothing = Heading(config.setting_name, StoredConfig.of(config), Environment())
    assert [one.before for one in differences(config, HERE, nothing)] == ["unknown", "unknown"]


@pytest.mark.parametrize(
    ("value", "words"),
    [([], "none"), (["a", "b"], "a b"), ("/models/llama/", "llama"), ("org/name", "name"), (7, "7"), (None, "None")],
)
def test_a_setting_is_said_in_few_words(value: object, words: str) -> None:
    assert study._short(value) == words


@pytest.mark.parametrize(
    ("what", "now", "name"),
    [
        ("model", "Llama 2/13b", "tp_1_Llama-2-13b_results.json"),
        ("seed", "7", "tp_1_seed_7_results.json"),
        ("vLLM", "0.26.0", "tp_1_vLLM_0.26.0_results.json"),
        ("max_model_len", "64", "tp_1_max-model-len_64_results.json"),
        ("engine_args", "--.a=b.--", "tp_1_a-b_results.json"),
        ("devices", "NVIDIA H100 + NVIDIA H200", "tp_1_NVIDIA-H100-NVIDIA-H200_results.json"),
        ("model", "x" * 61, f"tp_1_{'x' * 60}_results.json"),
        (None, None, "tp_1_results.json"),
    ],
)
def test_a_name_says_what_is_different(what: str | None, now: str | None, name: str, tmp_path: Path) -> None:
    told = [study.Difference(what, "before", now or ""), study.Difference("seed", "0", "9")] if what else []
    usual = tmp_path / "tp_1_results.json"
    assert study._free_name(usual, told, set()) == tmp_path / name
    # Those that are taken get a number, the lowest that is free.
    (tmp_path / name).touch()
    stem = name.removesuffix("_results.json")
    second, third = tmp_path / f"{stem}_2_results.json", tmp_path / f"{stem}_3_results.json"
    assert study._free_name(usual, told, set()) == second
    assert study._free_name(usual, told, {second}) == third


def test_a_name_that_holds_something_else_is_left_to_it(config: ExperimentConfig) -> None:
    usual = config.output_path
    usual.parent.mkdir(parents=True)
    usual.write_text("precious")
    second = usual.with_name("tp_1_2_results.json")
    assert choose(config, HERE) == (second, [f"{usual} holds something else; this goes to {second}"])
    # A link that leads nowhere is something too.
    usual.unlink()
    usual.symlink_to("nowhere")
    assert choose(config, HERE)[0] == second
    usual.unlink()
    other = dataclasses.replace(config, seed=7)
    save(usual, other)
    path = usual.with_name("tp_1_seed_0_results.json")
    assert choose(config, HERE) == (path, [f"{usual} holds seed 7; this goes to {path}"])


def test_hidden_files_and_folders_are_no_results(config: ExperimentConfig) -> None:
    folder = config.output_path.parent
    assert study._results_in(folder) == []
    for name in ("b.json", "a.json", ".hidden.json", "c.txt"):
        folder.mkdir(exist_ok=True, parents=True)
        (folder / name).touch()
    (folder / "folder.json").mkdir()
    assert study._results_in(folder) == [folder / "a.json", folder / "b.json"]


def test_what_cannot_be_written_is_named(config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result itself, or what lies beside it; a folder that is not there yet is made."""
    checked: list[tuple[str, str]] = []
    fails: list[str] = []

    def check(kind: str) -> Any:
        def one(path: Path) -> None:
            checked.append((kind, path.name))
            if path.name in fails:
                raise PermissionError(13, "Permission denied")

        return one

    for name, kind in {"check_writable": "file", "_check_log": "log", "check_no_link": "no link"}.items():
        monkeypatch.setattr(study, name, check(kind))
    two = dataclasses.replace(config, data_parallel_size=2, name="x", output_dir=f"{config.output_dir}/new/deep")
    check_writable_paths(two)
    result = two.output_path.name
    everything = [
        ("file", result),
        ("log", two.log_path.name),
        ("log", two.log_path.with_suffix(".replica_1.log").name),
        ("no link", study.journal_of(two.output_path).name),
        ("no link", lock_of(two.output_path).name),
    ]
    assert checked == everything
    for _, name in everything:
        fails[:] = [name]
        with pytest.raises(ConfigError) as caught:
            check_writable_paths(two)
        what = "it" if name == result else name
        assert str(caught.value) == (
            f"--output-file {two.output_path}: {what} cannot be written: Permission denied; "
            "give a file in a folder you may write to"
        )


def test_a_named_file_tells_five_differences_at_most(config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    named = dataclasses.replace(config, output_file=f"{config.output_dir}/mine.json")
    save(named.output_path, named)
    told = [study.Difference(f"s{number}", f"b{number}", f"n{number}") for number in range(6)]
    monkeypatch.setattr(study, "differences", lambda *_: told)
    with pytest.raises(ConfigError) as caught:
        choose(named, HERE)
    assert str(caught.value) == (
        f"--output-file {named.output_path}: it was measured with different settings: s0 was b0, now n0; "
        "s1 was b1, now n1; s2 was b2, now n2; s3 was b3, now n3; s4 was b4, now n4; give another name"
    )
    named.output_path.unlink()
    named.output_path.symlink_to("nowhere")  # whether it can be made is seen next
    assert choose(named, HERE) == (named.output_path, [])


@pytest.mark.parametrize("names_file", [True, False])
def test_a_file_that_another_holds_is_waited_for_or_passed_by(
    names_file: bool, config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the user named, or that has the same settings, is the user's to free; the usual name goes to another."""
    held = "process 7 on node-1 (tp_1, settings other)"

    @contextlib.contextmanager
    def refused(path: Path, _purpose: str) -> Any:
        if path == lock_of(config.output_path):
            raise LockedError(held)
        yield True

    monkeypatch.setattr(study, "locked", refused)
    if not names_file:
        second = config.output_path.with_name("tp_1_2_results.json")
        with claimed(config, HERE) as (mine, notes):
            assert (mine.output_path, notes) == (
                second, [f"{config.output_path} holds something else; this goes to {second}"],
            )  # fmt: skip
        held = f"process 7 on node-1 ({locks.purpose_of(config)})"
    chosen = dataclasses.replace(config, output_file=str(config.output_path)) if names_file else config
    with pytest.raises(ConfigError) as caught, claimed(chosen, HERE):
        pass
    assert str(caught.value) == (
        f"--output-file {config.output_path}: {held} is measuring into it; wait until it ends, or give another "
        "--output-dir"
    )


def test_a_name_that_another_took_meanwhile_is_chosen_anew(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [config.output_path, config.output_path.with_name("b.json"), config.output_path.with_name("b.json")]
    asked: list[Path] = []
    monkeypatch.setattr(study, "choose", lambda *_: (paths[0] if not asked else paths[1], [f"about {len(asked)}"]))

    @contextlib.contextmanager
    def lock(path: Path, _purpose: str) -> Any:
        asked.append(path)
        yield len(asked) < 2

    monkeypatch.setattr(study, "locked", lock)
    with claimed(config, HERE) as (mine, notes):
        assert mine.output_path == paths[1]
        assert notes == ["about 1", f"{paths[1].parent} cannot lock files: start only one program at a time there"]
    assert asked == [lock_of(path) for path in paths[:2]]
