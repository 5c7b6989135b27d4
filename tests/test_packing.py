"""Settings side by side: jobs of which only the name and the sizes count here."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_launcher import LAUNCHER

from batch_inference.core.config import ExperimentConfig
from batch_inference.launch import packing
from batch_inference.launch.console import Outcomes
from batch_inference.launch.jobs import Job
from batch_inference.launch.packing import Packing, longest_first, on
from batch_inference.launch.presets import Setting
from batch_inference.launch.processes import Processes
from batch_inference.measure.locks import lock_of, locked
from batch_inference.plan.devices import Devices
from conftest import TINY, stub_environment

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


@pytest.mark.slow
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


def test_what_a_setting_printed_before_is_gone(tmp_path: Path) -> None:
    again = job(tmp_path, "again")
    again.console_path.write_text("of an earlier preset\n")
    assert list(Packing([again], FOUR, Processes()).run()) == [(again, 0)]
    assert again.console_path.read_text().startswith('{"gpus": ')


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
    assert f"error: {tmp_path}/taken/bad_results.txt: bad's output cannot be written" in capsys.readouterr().err


@pytest.mark.slow
def test_two_launchers_print_into_files_of_their_own(tmp_path: Path) -> None:
    one = job(tmp_path, "one")
    with locked(lock_of(one.console_path), "the other launcher's"):
        one.console_path.write_text("what the other prints")
        assert list(Packing([one], FOUR, Processes()).run()) == [(one, 0)]
    assert one.console_path.read_text() == "what the other prints"
    assert "time" in json.loads((tmp_path / "one_results_2.txt").read_text())
    assert list(Packing([one], FOUR, Processes()).run()) == [(one, 0)]
    assert "time" in seen_by(one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one_results.txt", "one_results_2.txt"]


def packed_study(folder: Path) -> subprocess.CompletedProcess[str]:
    """The launcher's, with four devices on whatever cores there are: the stub needs none."""
    flags = ["--model", TINY, "--batch-sizes", "1", "--seq-lens", "8"]
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


class FakeProcesses:
    """Starts nothing: what is asked for, and on which devices. A process has ended when it is looked at twice, and
    until then nobody else may have its devices."""

    are_stopped = False

    def __init__(self) -> None:
        self.started: list[dict[str, str]] = []
        self.in_use: set[str] = set()

    def start(self, _words: Any, variables: dict[str, str], _output: Any) -> Any:
        devices = set(variables["CUDA_VISIBLE_DEVICES"].split(","))
        assert not self.in_use & devices
        self.in_use |= devices
        self.started.append(variables)
        looks = iter((None, 0))
        return SimpleNamespace(poll=lambda: next(looks), devices=devices, looks=looks)

    def ended(self, process: Any) -> int:
        assert next(process.looks, "over") == "over"
        self.in_use -= process.devices
        return 0


def test_a_setting_of_replicas_has_the_devices_of_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = iter(range(20))  # one that never fits would be waited for without end
    monkeypatch.setattr(packing, "time", SimpleNamespace(sleep=lambda _: next(looks)))
    processes = FakeProcesses()
    jobs = [job(tmp_path, "tp_2", tp=2), job(tmp_path, "tp_2_dp_2", tp=2, dp=2)]
    jobs += [job(tmp_path, "dp_3", dp=3), job(tmp_path, "dp_3_ep", dp=3)]
    # As text 10 comes before 8.
    devices = Devices("gpu", ("8", "9", "10", "11"))
    list(Packing(jobs, devices, processes).run())  # type: ignore[arg-type]
    # The longest first; only one of them fits at a time, and freed devices are taken in their own order.
    assert [one["CUDA_VISIBLE_DEVICES"] for one in processes.started] == ["8,9,10", "8,9,10", "8,9,10,11", "8,9"]
    said = [line.partition(" -> ")[0] for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert said == [
        "[1/4] dp_3 on devices 8,9,10",
        "[2/4] dp_3_ep on devices 8,9,10",
        "[3/4] tp_2_dp_2 on devices 8,9,10,11",
        "[4/4] tp_2 on devices 8,9",
    ]


@pytest.mark.parametrize(("words", "code"), [("exit 3", 3), ("exit 0", 0), ("kill -9 $$", 137), ("kill -15 $$", 143)])
def test_an_exit_code_is_as_a_shell_tells_it(words: str, code: int) -> None:
    assert Processes().run(["sh", "-c", words]) == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_decides_the_exit_code_the_first_and_the_second_time(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes, codes, kills = Processes(), [], []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(os, "killpg", lambda group, sent: kills.append((group, sent)))
    processes._running.append(SimpleNamespace(pid=2**22 + 7))  # type: ignore[arg-type]
    processes.stop(number)
    assert kills == [(2**22 + 7, number)]
    with pytest.raises(SystemExit) as caught:
        processes.end_if_stopped()
    assert caught.value.code == code
    # The first one says why; the second means at once.
    processes.stop(signal.SIGTERM)
    assert codes == [code]
    assert kills[1] == (2**22 + 7, signal.SIGKILL)


def test_an_interrupted_setting_interrupts_its_preset(tmp_path: Path) -> None:
    outcomes, one = Outcomes(), job(tmp_path, "one")
    for code in (130, 143):
        with pytest.raises(SystemExit) as caught:
            outcomes.keep(one, code)
        assert caught.value.code == code
    outcomes.keep(one, 0)
    outcomes.keep(one, 1)
    assert (outcomes.done, outcomes.failed, outcomes.none_ran) == ([one], [one], False)


def test_those_that_wait_can_be_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "time", SimpleNamespace(sleep=lambda _: None))
    jobs = [job(tmp_path, f"tp_4_{number}", tp=4) for number in range(3)]
    packed = Packing(jobs, FOUR, FakeProcesses())  # type: ignore[arg-type]
    running = packed.run()
    assert next(running) == (jobs[0], 0)
    assert packed.waiting == packed.give_up() == jobs[1:]
    assert list(running) == []


def test_devices_are_named_one_or_many() -> None:
    assert [on(Devices("gpu", ids)) for ids in (("3",), ("3", "5"))] == ["device 3", "devices 3,5"]
    assert [on(Devices("cpu", ids)) for ids in (("0,1",), ("0,1", "2,3"))] == ["cores 0,1", "cores 0,1,2,3"]


def test_what_starts_while_a_signal_comes_gets_it_too() -> None:
    processes = Processes()
    processes._is_starting = True
    processes.stop(signal.SIGTERM)  # does not end this process: somebody has to wait for the other
    assert processes.start(["sleep", "10"]).wait() == -signal.SIGTERM


@pytest.mark.parametrize(
    ("words", "number"), [("exec sleep 10", signal.SIGTERM), ("trap '' TERM; echo; exec sleep 10", signal.SIGKILL)]
)
def test_who_does_not_end_when_asked_to_is_killed(words: str, number: int) -> None:
    reads, writes = os.pipe()
    processes = Processes()
    with os.fdopen(writes, "wb") as output:
        process = processes.start(["sh", "-c", words], output=output)
    if "echo" in words:
        assert os.read(reads, 1) == b"\n"  # it has heard what it is to ignore
    processes.end(process, 0.05 if number == signal.SIGKILL else 60.0)
    assert process.wait() == -number
    processes.end(process, 60.0)  # it has ended
    os.close(reads)


def test_a_setting_reads_nothing_of_what_the_user_types(tmp_path: Path) -> None:
    kept, (reading, writing) = os.dup(0), os.pipe()
    processes = Processes()
    try:
        os.dup2(reading, 0)
        with (tmp_path / "seen").open("wb") as output:
            process = processes.start(["readlink", "/proc/self/fd/0"], None, output)
    finally:
        os.dup2(kept, 0)
        for descriptor in (kept, reading, writing):
            os.close(descriptor)
    process.wait(10)
    assert processes.ended(process) == 0
    assert (tmp_path / "seen").read_text() == "/dev/null\n"
