"""The preset `best`, with recorded results in place of engines."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_launcher import Launcher, config_of

from batch_inference.core.climb import Tried
from batch_inference.core.config import ConfigError
from batch_inference.core.metrics import summarise
from batch_inference.core.race import Found, Layout, Load
from batch_inference.core.result_file import load_result, save_result
from batch_inference.core.results import Failure, StoredConfig
from batch_inference.core.values import AUTO_SIZES
from batch_inference.launch import best as searching
from batch_inference.launch import replay
from batch_inference.launch.__main__ import plan_search
from batch_inference.launch.best import (
    Best,
    candidates,
    check_search,
    report,
    settings_to_search,
    what_best_saves,
)
from batch_inference.launch.jobs import Here, Job, check_together, job_of
from batch_inference.launch.options import parse_options
from batch_inference.launch.presets import Preset, Setting
from batch_inference.launch.replay import Replay
from batch_inference.plan.devices import Devices
from conftest import REPOSITORY, with_weights

RECORDED = REPOSITORY / "tests" / "h100x4"
BEST = Preset("best", "", is_search=True)
HERE = Here("python", "")
FOUR = Devices("gpu", ("0", "1", "2", "3"))


class Engines:
    """In place of the processes of the launcher: measuring is to write what was recorded."""

    def __init__(self, broken: Sequence[str] = (), took_s: float = 60.0, lost_at: int = 10_000) -> None:
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.most_runs: dict[str, int] = {}
        self._broken = broken
        self._took_s = took_s
        self._lost_at = lost_at
        self.now_s = 0.0

    def run(self, words: Sequence[str]) -> int:
        config = config_of(list(words))
        self.now_s += self._took_s
        self.calls.append((config.setting_name, tuple(config.batch_sizes)))
        self.most_runs[config.setting_name] = config.max_runs
        recorded = RECORDED / f"{config.setting_name}_results.json"
        if not recorded.exists():
            return 1
        result = load_result(recorded)
        result.config, result.name = StoredConfig.of(config), config.setting_name
        if config.setting_name in self._broken:
            config.log_path.touch()
            result.points, result.failure = [], Failure("oom_load", "out of memory while loading", [])
            result.status = "failed"
        if not config.searches:
            result.points = [point for point in result.points if point.batch_size in config.batch_sizes]
        for point in result.points:
            point.summary = summarise(result, point)
        lost = [point for point in result.points if point.batch_size >= self._lost_at]
        for point in lost:
            point.status, point.reason, point.runs, point.summary = "oom", "out of memory", [], {}
        save_result(result, config.output_path)
        return int(config.setting_name in self._broken or bool(lost))

    def monotonic(self) -> float:
        return self.now_s

    def end_if_stopped(self) -> None:
        pass


class Side:
    """Settings side by side, one after the other."""

    def __init__(self, jobs: Sequence[Job], devices: Devices, engines: Engines) -> None:
        self._jobs, self._engines = jobs, engines
        assert sum(job.config.num_devices for job in jobs) <= len(devices)
        assert all(job.config.packed for job in jobs)

    def run(self) -> Iterator[tuple[Job, int]]:
        return ((job, self._engines.run(job.words)) for job in self._jobs)


def searched(
    tmp_path: Path, line: str = "", monkeypatch: pytest.MonkeyPatch | None = None, **engines: Any
) -> tuple[Best, Engines]:
    """`monkeypatch`: to have the clock of the engines."""
    words = f"best --model {with_weights('llama-3.1-8b')} --seq-lens 512 --output-dir {tmp_path} {line}"
    options, fake = parse_options(words.split()), Engines(**engines)
    if monkeypatch:
        monkeypatch.setattr(searching, "time", fake)
    best = Best(BEST, options, HERE, FOUR, fake)  # type: ignore[arg-type]
    best.run(plan_search(BEST, options, HERE, FOUR))
    return best, fake


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would be asked for the plan; and no processes."""
    monkeypatch.setattr("batch_inference.launch.packing.Packing", Side)
    monkeypatch.setattr("batch_inference.launch.overview.ask_vllm", lambda settings, *_, **__: [None] * len(settings))


def test_one_replica_and_four_of_them_are_loaded_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best, engines = searched(tmp_path, "", monkeypatch)
    assert engines.calls == [("tp_1", tuple(AUTO_SIZES)), ("dp_4", (256,))]
    assert best.is_answered
    assert "\n".join(report(best)) == (
        "Best for throughput, prompts of 512 tokens: DP=4, 256 at once on each replica\n"
        "  25494 ±0.7% tok/s\n"
        "  TP=1, 256 at once: 6416 ±0.9% tok/s\n"
        "  not loaded: PP=2 DP=2, PP=4, TP=2 DP=2, TP=2 PP=2, TP=4: at most 25494 tok/s:\n"
        "      the same devices as DP=4, with the same work divided further\n"
        "\n"
        "This call used 8.0 device-minutes (4 devices, 120 s) for 2 loads; a study of all\n"
        "  settings at these batch sizes would take about 53.7"
    )


def test_a_setting_that_is_no_answer_gets_few_runs(tmp_path: Path) -> None:
    """Who says how many runs has said it for all."""
    for line, runs in {
        "": {"tp_1": 3, "dp_4": 10}, "--goal per-device": {"tp_1": 10}, "-- --max-runs 7": {"tp_1": 7, "dp_4": 7},
    }.items():  # fmt: skip
        assert searched(Path(tempfile.mkdtemp(dir=tmp_path)), line)[1].most_runs == runs


def test_some_of_the_devices_are_enough(tmp_path: Path) -> None:
    best, engines = searched(tmp_path, "--devices 4")
    assert best.is_answered
    assert [name for name, _ in engines.calls] == ["tp_1", "dp_4"]


def test_the_answer_is_written_to_be_used(tmp_path: Path) -> None:
    """That of the search, whatever else lies in the folder."""
    best, _ = searched(tmp_path, "--max-latency-s 3")
    (race,) = best.search.races.values()
    found = race.best()
    assert found is not None
    assert found.best is not None
    assert best.write_to_use() == f"python {tmp_path}/best/run.py requests.jsonl answers.jsonl"
    config = (tmp_path / "best" / "vllm_config.yaml").read_text()
    assert f"max-num-seqs: {found.best.batch_size}\n" in config
    assert f"tensor-parallel-size: {found.layout.tp}\n" in config
    assert "the best for throughput that a search found" in config
    (tmp_path / "best" / "run.py").write_text("print('my own')")
    assert best.write_to_use() == str(tmp_path / "best")


def test_what_was_measured_is_in_the_usual_files(tmp_path: Path) -> None:
    searched(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["dp_4_results.json", "tp_1_results.json"]


def test_for_the_shortest_time_one_request_is_enough(tmp_path: Path) -> None:
    """The recorded grid begins at 16: its smallest size stands for it."""
    best, engines = searched(tmp_path, "--goal latency")
    assert ("tp_4", tuple(AUTO_SIZES)) in engines.calls
    first = report(best)[:2]
    assert first[0].startswith("Best for latency, prompts of 512 tokens: TP=4, ")
    # Its ten runs differ, and nobody should rely on it alone.
    assert re.fullmatch(r"  0\.55\d+ ±[\d.]+% s per batch \(suspect\)", first[1])


def test_a_better_setting_on_fewer_devices_is_said(tmp_path: Path) -> None:
    """On few cores a small model is fastest on one of them."""
    best, _ = searched(tmp_path, "--goal latency")
    (race,) = best.search.races.values()
    (one,) = race.found[Layout()].tried[:1]
    assert "better" not in "\n".join(report(best))
    race.found[Layout()] = Found(Layout(), [replace(one, value=10.0, half=0.1, own_half=None)], is_exhausted=True)
    said = " ".join(" ".join(report(best)).split())
    assert "TP=1, 16 at once: 0.1000 ±1.0% s per batch; better, but on 1 of 4 devices" in said


def test_for_one_device_the_price_is_said(tmp_path: Path) -> None:
    best, engines = searched(tmp_path, "--goal cost --device-hour-price 2.5")
    assert [name for name, _ in engines.calls] == ["tp_1"]
    # 2.5 / 3600 s / 6416 tok/s x 10^6
    assert report(best)[1] == "  6416 ±0.9% tok/s per device, 0.1082 per million output tokens"


def test_a_setting_that_cannot_be_loaded_is_named_with_its_reason(tmp_path: Path) -> None:
    best, engines = searched(tmp_path, broken=["tp_1"])
    said = " ".join(" ".join(report(best)).split())
    assert "not loaded: DP=4, PP=2 DP=2" not in said
    assert "not loaded: DP=4: TP=1 failed: out of memory while loading; see" in said
    assert best.is_answered
    assert best.failed[0].name == "tp_1"
    assert ("tp_2", tuple(AUTO_SIZES)) in engines.calls


def test_a_size_that_is_lost_bounds_nothing(tmp_path: Path) -> None:
    """Nobody knows what it would have done: others may do more than all that was measured."""
    best, engines = searched(tmp_path, lost_at=64)
    assert {name for name, _ in engines.calls} >= {"tp_1", "dp_4", "tp_2", "tp_4"}
    said = " ".join(" ".join(report(best)).split())
    assert "at most" not in said
    assert "TP=1: failed with 64 at once (oom), 128 at once (oom), 256 at once (oom)" in said


def test_the_interval_is_that_of_the_result_file(tmp_path: Path) -> None:
    """Wider than Student's where the number of runs was not fixed, as docs/metrics.md says."""
    best, _ = searched(tmp_path)
    (race,) = best.search.races.values()
    found = race.best()
    assert found is not None
    assert found.best is not None
    result = load_result(tmp_path / "dp_4_results.json")
    (point,) = (one for one in result.points if one.batch_size == found.best.batch_size)
    share = point.summary["latency_ci95_s"] / point.summary["latency_mean_s"]
    assert race.half_of(found) / race.value_of(found) == pytest.approx(share)
    assert f"±{share:.1%} tok/s" in report(best)[1]


@pytest.mark.parametrize("words", ["-- --num-runs 3", "-- --num-runs=3"])
def test_how_often_a_point_runs_is_the_users_choice(words: str, tmp_path: Path) -> None:
    """The search adds no --max-runs of its own, which would contradict it."""
    best, engines = searched(tmp_path, words)
    assert best.is_answered
    assert [name for name, _ in engines.calls] == ["tp_1", "dp_4"]


def test_the_analysis_is_asked_the_same_question(tmp_path: Path) -> None:
    assert searched(tmp_path)[0].flags_of_analysis == []
    best, _ = searched(tmp_path, "--goal cost --device-hour-price 2.5 --max-latency-s 60")
    assert best.flags_of_analysis == [
        "--goal", "cost", "--max-latency-s", "60", "--device-hour-price", "2.5",
    ]  # fmt: skip


def test_a_setting_that_is_measured_again_alone_keeps_its_points(tmp_path: Path) -> None:
    best, _ = searched(tmp_path, "--overwrite")
    assert "--overwrite" not in best._job_of(Load(Layout(), (256,), (512,)), beside=False).words
    assert "--overwrite" in best._job_of(Load(Layout(2), (256,), (512,)), beside=False).words


def test_points_of_other_tokens_per_step_are_no_answer(tmp_path: Path) -> None:
    """A study over several of them may lie in the same file, and be faster."""
    best, engines = searched(tmp_path)
    (path,) = (path for layout, path in best.paths.items() if layout == Layout(dp=4))
    result = load_result(path)
    faster = load_result(path).points
    for point in faster:
        point.batch_size, point.max_num_batched_tokens = 2 * point.batch_size, 1024
        for run in point.runs:
            run.latency_s /= 2
    result.points += [*faster, msgspec.structs.replace(faster[0], batch_size=1024, status="oom", runs=[])]
    save_result(result, path)
    engines.calls.clear()
    (job,) = [one.job for layout, one in best.jobs.items() if layout == Layout(dp=4)]
    before = best.search.races[512].found[Layout(dp=4)]
    best._keep(Load(Layout(dp=4), (256,), (512,), (0.0,)), job, 0)
    after = best.search.races[512].found[Layout(dp=4)]
    assert [one.batch_size for one in after.tried] == [one.batch_size for one in before.tried]
    assert best.lost_sizes[Layout(dp=4), 512] == {}


def test_points_that_ran_beside_others_are_no_answer_for_a_setting_alone(tmp_path: Path) -> None:
    best, _ = searched(tmp_path)
    path, layout = best.paths[Layout()], Layout()
    result = load_result(path)
    for point in result.points[:-1]:
        point.verdict_reasons = ["packed: other settings ran beside it"]
    save_result(result, path)
    best._keep(Load(layout, (256,), (512,), (0.0,)), best.jobs[layout].job, 0)
    assert [one.batch_size for one in best.search.races[512].found[layout].tried] == [result.points[-1].batch_size]


def test_without_a_visible_device_nothing_is_searched() -> None:
    with pytest.raises(ConfigError, match=r"^CUDA_VISIBLE_DEVICES hides every GPU of this machine; unset it"):
        check_search(parse_options(["best"]), Devices("gpu", ()))


def test_what_was_measured_before_is_no_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched(tmp_path)
    monkeypatch.setattr(Engines, "run", lambda *_: 0)
    best, _ = searched(tmp_path)
    assert best.is_answered
    assert "for 0 loads" in report(best)[-2]


def test_a_setting_that_keeps_no_limit_is_said_beside_the_best(tmp_path: Path) -> None:
    best, _ = searched(tmp_path, "--max-latency-s 0.7")
    said = " ".join(" ".join(report(best)).split())
    assert "Best for throughput, prompts of 512 tokens: TP=4" in said
    assert "TP=1: no batch size that was tried stays within --max-latency-s 0.7" in said


def test_without_limits_none_is_said_to_be_broken(tmp_path: Path) -> None:
    best, _ = searched(tmp_path, broken=["dp_4", "tp_4", "pp_4", "tp_2_pp_2", "tp_2_dp_2"])
    said = " ".join(" ".join(report(best)).split())
    assert "Best for throughput, prompts of 512 tokens: none" in said
    assert "keeps" not in said
    assert re.search(r"  failed: DP=4: out of memory while loading; see\s", "\n".join(report(best)))


def test_one_token_budget_is_searched_at(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        searched(tmp_path, "-- --max-num-batched-tokens 2048,8192")
    assert str(caught.value) == (
        "--max-num-batched-tokens 2048, 8192: best compares settings at one of them; give only one"
    )


def test_a_winner_that_ran_beside_others_is_measured_alone(tmp_path: Path) -> None:
    best, engines = searched(tmp_path, "--goal per-device", broken=["tp_1"])
    of_two = [sizes for name, sizes in engines.calls if name == "tp_2"]
    assert of_two == [tuple(AUTO_SIZES), (256,)]
    assert report(best)[0].endswith("TP=2, 256 at once")
    assert best.is_answered


def test_a_point_that_says_nothing_is_no_answer(tmp_path: Path) -> None:
    """As of a sample that is too short for a job."""
    best, _ = searched(tmp_path, "--goal cost --device-hour-price 1")
    (race,) = best.search.races.values()
    silent = [Tried(16, 0.0, math.inf)]
    race.found = {layout: Found(layout, silent, is_exhausted=False) for layout in race.candidates}
    assert race.best() is None
    said = report(best)
    assert said[0] == "Best for cost, prompts of 512 tokens: none"
    assert said[1] == "  TP=1: its runs say nothing about the whole job; raise --sample"


@pytest.mark.slow
def test_a_setting_that_another_process_measures_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one that outlives a search that was killed."""
    holders = iter(["process 7", "process 7"])
    monkeypatch.setattr("batch_inference.launch.running.measured_by", lambda _: next(holders, None))
    best, _ = searched(tmp_path)
    assert best.is_answered
    assert capsys.readouterr().err.count("[1] tp_1 waits: process 7 is measuring it\n") == 1


def test_a_budget_ends_the_search_before_it_is_used_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best, engines = searched(tmp_path, "--budget-device-minutes 7.9", monkeypatch)
    assert len(engines.calls) == 1  # four minutes each
    said = " ".join(" ".join(report(best)).split())
    assert "Best for throughput, prompts of 512 tokens: none" in said
    assert "DP=4, PP=4" in said or "the budget ran out first" in said
    assert said.endswith("the budget of 7.9 ended the search")
    assert not best.is_answered


def test_limits_that_nothing_keeps_name_the_nearest(tmp_path: Path) -> None:
    best, _ = searched(tmp_path, "--max-latency-s 0.1")
    said = " ".join(" ".join(report(best)).split())
    assert (
        "no batch size that was tried stays within --max-latency-s 0.1; the nearest is TP=4 with 16 at once, 5." in said
    )


def test_limits_are_told_to_each_load_and_kept(tmp_path: Path) -> None:
    best, _ = searched(tmp_path, "--max-latency-s 2")
    (race,) = best.search.races.values()
    found = race.best()
    assert found is not None
    assert found.best is not None
    assert found.best.excess <= 1


def test_a_study_says_in_the_end_what_a_search_would_have_taken(tmp_path: Path) -> None:
    options, engines = parse_options(["study", "--seq-lens", "512", "--output-dir", str(tmp_path)]), Engines()
    settings = [Setting(1, 1, 1), Setting(2, 1, 1), Setting(4, 1, 1), Setting(1, 1, 4), Setting(1, 4, 1)]
    jobs = [job_of(setting, 0, 0, Preset("study", ""), options, HERE) for setting in settings]
    for job in jobs:
        engines.run([*job.words, "--batch-sizes", "16,32,64,128,256"])
    said = what_best_saves(jobs)
    assert said is not None
    assert re.fullmatch(
        r"best would have found the highest throughput with 2 engine starts, in about \d\d% of this time", said
    )
    assert what_best_saves(jobs[:3]) is None


def test_a_study_says_if_a_search_would_have_missed_its_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, engines = parse_options(["study", "--seq-lens", "512", "--output-dir", str(tmp_path)]), Engines()
    settings = [Setting(1, 1, 1), Setting(2, 1, 1), Setting(4, 1, 1), Setting(1, 1, 4)]
    jobs = [job_of(setting, 0, 0, Preset("study", ""), options, HERE) for setting in settings]
    for job in jobs:
        engines.run([*job.words, "--batch-sizes", "16,32,64,128,256"])
    for missed, said in ((0.02, "the highest throughput"), (0.034, "96.6% of the highest throughput")):
        missing = Replay({512: missed}, 60.0, 2)
        monkeypatch.setattr(replay, "replayed", lambda *_, missing=missing: missing)
        assert str(what_best_saves(jobs)).startswith(f"best would have found {said} with 2 engine starts")


def test_candidates_are_all_ways_to_use_the_devices() -> None:
    assert len(candidates("throughput", 8, has_experts=False)) == 10
    assert all(one.num_devices == 8 for one in candidates("latency", 8, has_experts=False))
    assert all(one.dp == 1 for one in candidates("per-device", 8, has_experts=False))
    with_experts = candidates("throughput", 4, has_experts=True)
    assert {one for one in with_experts if one.experts} == {
        Layout(4, 1, 1, True), Layout(2, 1, 2, True), Layout(1, 1, 4, True)
    }  # fmt: skip
    settings = settings_to_search(parse_options(["best"]), 4, has_experts=False)
    assert {one.name for one in settings} == {
        "tp_1", "tp_2", "tp_4", "pp_2", "pp_4", "dp_4", "tp_2_pp_2", "tp_2_dp_2", "pp_2_dp_2"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("TP=2", "'TP=2' is one word too many after the preset best"),
        ("-- -tp 2", "-tp after --: best searches it; leave it out"),
        ("-- -ep", "-ep after --: best searches it; leave it out"),
        ("-- --enable_expert_parallel", "--enable-expert-parallel after --: best searches it; leave it out"),
        ("-- --overwrite", "--overwrite after --: best must know it; give it before --"),
        ("-- --seq_lens=8", "--seq-lens after --: best must know it; give it before --"),
        ("-- --output-dir x", "--output-dir after --: best must know it; give it before --"),
        ("-- --nnodes=2", "--nnodes after --: best sets it for each of its loads, on one node; leave it out"),
        ("--nnodes 2 --master-addr h", "--nnodes 2: best runs on one node"),
        ("--master-addr h", "--master-addr h: best runs on one node"),
        ("--batch-sizes 1,2", "--batch-sizes 1, 2: best searches them"),
        ("-- --batch-sizes 1,2", "--batch-sizes after --: best searches it; leave it out"),
        ("-- --tensor-parallel-size=2", "--tensor-parallel-size after --: best searches it; leave it out"),
        ("-- --max-ttft-s 2", "--max-ttft-s after --: best must know it; give it before --"),
        ("--goal cost", "--goal cost: it also needs a price; add --device-hour-price PRICE"),
        ("--devices 5", "--devices 5: only 4 are there (gpu); lower it"),
        (
            "--budget-device-minutes 0.6",
            "--budget-device-minutes 0.6: on 4 devices that is 9 s, too short to start an engine",
        ),
    ],
)
def test_what_a_search_does_not_take_is_one_line(line: str, said: str) -> None:
    def checked() -> None:
        options = parse_options(["best", *line.split()])
        check_together(BEST, options)
        check_search(options, FOUR)

    with pytest.raises(ConfigError) as caught:
        checked()
    assert str(caught.value).startswith(said)


def test_nodes_are_refused_before_what_they_need(tmp_path: Path) -> None:
    done = Launcher(tmp_path)("best", "--nnodes", "2")
    assert (done.returncode, done.stderr) == (
        2, "error: --nnodes 2: best runs on one node; leave it out, or use another preset for several nodes\n",
    )  # fmt: skip


@pytest.mark.parametrize("flag", ["--budget-device-minutes", "--device-hour-price"])
def test_its_options_are_of_no_other_preset(tmp_path: Path, flag: str) -> None:
    done = Launcher(tmp_path)("tensor-parallel", flag, "5")
    assert done.returncode == 2
    assert done.stderr == f"error: {flag} 5: it is for best, not tensor-parallel; leave it out\n"


def test_its_plan_names_all_settings_that_may_be_loaded(tmp_path: Path) -> None:
    done = Launcher(tmp_path)("best", "--dry-run", "--model", with_weights("llama-3.1-8b"), DEVICES="4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--batch-sizes auto") == 9
    assert "# for each: batch sizes auto (up to 1024) x lengths " in done.stdout
