"""Settings side by side: jobs of which only the name and the sizes count here."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_launcher import LAUNCHER

from batch_inference.core.config import ExperimentConfig
from batch_inference.launch.jobs import Job
from batch_inference.launch.packing import Packing, longest_first
from batch_inference.launch.presets import Setting
from batch_inference.launch.processes import Processes
from batch_inference.plan.devices import Devices
from conftest import REPOSITORY, stub_environment

# Writes down when it ran, and on what.
PROGRAM = """
import json, os, sys, time
began_s = time.monotonic()
time.sleep(0.2)
seen = {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "cores": sorted(os.sched_getaffinity(0))}
print(json.dumps({**seen, "time": [began_s, time.monotonic()]}))
sys.exit(int(sys.argv[1]))
"""
FOUR = Devices("gpu", ("0", "1", "2", "3"))


def job(folder: Path, name: str, tp: int = 1, dp: int = 1, code: int = 0) -> Job:
    config = ExperimentConfig(
        tensor_parallel_size=tp, data_parallel_size=dp, name=name, output_file=f"{folder}/{name}_results.json"
    )
    return Job(name, (sys.executable, "-c", PROGRAM, str(code)), config, Setting(tp, 1, dp))


def seen_by(one: Job) -> dict[str, object]:
    seen: dict[str, object] = json.loads(one.console_path.read_text())
    return seen


def test_the_longest_come_first() -> None:
    jobs = [job(Path(), "tp_4", tp=4), job(Path(), "tp_1"), job(Path(), "dp_2", dp=2), job(Path(), "tp_2", tp=2)]
    assert [one.name for one in longest_first(jobs)] == ["dp_2", "tp_1", "tp_2", "tp_4"]


def test_no_two_settings_are_on_the_same_device_at_the_same_time(tmp_path: Path) -> None:
    jobs = [job(tmp_path, f"job_{number}", tp=size) for number, size in enumerate((1, 1, 2, 3, 4, 2))]
    ended = dict(Packing(jobs, FOUR, Processes()).run())
    assert set(ended) == set(jobs)
    assert set(ended.values()) == {0}
    ran = [(*seen_by(one)["time"], set(str(seen_by(one)["gpus"]).split(","))) for one in jobs]  # type: ignore[misc]
    assert [len(gpus) for *_, gpus in ran] == [1, 1, 2, 3, 4, 2]
    together = [
        (first, second)
        for index, first in enumerate(ran)
        for second in ran[index + 1 :]
        if first[0] < second[1] and second[0] < first[1]
    ]
    # The two of one device and one of two fill the four.
    assert len(together) >= 3
    assert not any(first[2] & second[2] for first, second in together)


def test_exit_codes_are_kept_and_what_is_printed_is_shown_behind_the_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [job(tmp_path, "good"), job(tmp_path, "bad", code=3)]
    assert {one.name: code for one, code in Packing(jobs, FOUR, Processes()).run()} == {"good": 0, "bad": 3}
    lines = capsys.readouterr().err.splitlines()
    assert f"[1/2] good on device 0 -> {tmp_path}/good_results.json" in lines
    assert any(line.startswith('bad: {"gpus": "1"') for line in lines)


def test_on_cpus_a_setting_has_cores_of_its_own_and_the_others_stay_as_they_were(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0)
    core = min(allowed)
    (ended,) = Packing([job(tmp_path, "one")], Devices("cpu", (str(core),)), Processes()).run()
    assert ended[1] == 0
    assert seen_by(ended[0])["cores"] == [core]
    assert os.sched_getaffinity(0) == allowed


def test_after_a_signal_nothing_more_is_started_and_what_runs_gets_it(tmp_path: Path) -> None:
    processes = Processes()
    quick, last = job(tmp_path, "quick"), job(tmp_path, "last", tp=4)
    slow = dataclasses.replace(job(tmp_path, "slow"), words=("sleep", "30"))
    running = Packing([quick, slow, last], FOUR, processes).run()
    assert next(running) == (quick, 0)
    processes.stop(signal.SIGTERM)
    assert list(running) == [(slow, 143)]
    with pytest.raises(SystemExit, match="143"):
        processes.end_if_stopped()


def test_a_signal_while_nothing_runs_ends_at_once() -> None:
    with pytest.raises(SystemExit, match="130"):
        Processes().stop(signal.SIGINT)


def test_one_whose_output_has_no_place_has_failed_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").touch()
    jobs = [job(tmp_path / "taken", "bad"), job(tmp_path, "good", tp=4)]
    assert {one.name: code for one, code in Packing(jobs, FOUR, Processes()).run()} == {"bad": 1, "good": 0}
    assert f"error: {tmp_path}/taken/bad_results.txt: what bad prints cannot be written" in capsys.readouterr().err


def packed_study(folder: Path) -> subprocess.CompletedProcess[str]:
    """The launcher's, with four devices on whatever cores there are: the stub needs none."""
    flags = ["--model", str(REPOSITORY / "models" / "tiny-llama"), "--batch-sizes", "1", "--seq-lens", "8"]
    core = min(os.sched_getaffinity(0))
    return subprocess.run(
        [str(LAUNCHER), "tensor-parallel", "--pack", *flags, "--", "--num-runs", "3", "--max-tokens", "4"],
        cwd=folder,
        env=stub_environment(PYTHON=sys.executable, VLLM_CPU_OMP_THREADS_BIND="|".join([str(core)] * 4)),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.slow
def test_the_launcher_packs_real_sweeps_and_their_points_say_so(tmp_path: Path) -> None:
    done = packed_study(tmp_path)
    assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / "experiment_results").glob("*_results.json"))
    assert [file.name for file in files] == [f"tp_{size}_results.json" for size in (1, 2, 4)]
    for file in files:
        (point,) = json.loads(file.read_text())["points"]
        assert point["status"] == "ok"
        assert any(reason.startswith("packed: ") for reason in point["verdict_reasons"])
    assert "tp_2:   [1/1] 1 x 8: " in done.stderr
    # Every point is there: no setting has anything to measure.
    again = packed_study(tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("nothing is left to measure") == 3
