"""What is shown while a setting is measured."""

from __future__ import annotations

import io
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.failures import ADVICE
from batch_inference.core.lengths import Lengths
from batch_inference.core.results import EngineInfo, Job, Point, Requests, WorkloadKey
from batch_inference.core.text import wrapped
from batch_inference.measure.console import Console, closing_table, key_words, point_words
from builders import make_point, make_queue_point, make_result, make_run


def shown(point: Point) -> str:
    make_result(points=[point])
    return point_words(point)


def measure(console: Console, points: list[Point], runs: int = 3) -> None:
    """Tell the console of a sweep, as the experiment does."""
    console.start(ExperimentConfig(num_runs=runs), len(points), [])
    for point in points:
        measured = Point(point.batch_size, point.seq_len, point.max_tokens, "ok")
        for index in range(2):
            console.running(measured, "warmup", index)
            measured.warmups.append({"latency_s": 1.0})
        for index, run in enumerate(point.runs):
            console.running(measured, "run", index)
            measured.runs.append(run)
        console.point_done(point)
    console.close()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_point_is_one_line_of_all_that_matters() -> None:
    point = make_point(64, 2048, latencies_s=[1.0, 1.01, 0.99], max_tokens=128)
    assert shown(point) == "8192 tok/s ±3.5%, 1.00 s, TTFT 0.100 s, 60.0 GiB, valid"


def test_what_is_unknown_is_left_out() -> None:
    run = make_run(1.0, memory={"scope": "replica", "used_gib": None})
    assert shown(make_point(runs=[run], verdict="suspect")) == "32.00 tok/s, 1.00 s, TTFT 0.100 s, suspect"


def test_every_line_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    reasons = ["another process was on the devices; end it, or choose others with CUDA_VISIBLE_DEVICES"]
    large = make_point(4096, 131072, latencies_s=[7000.0, 9999.0], verdict="suspect", verdict_reasons=reasons)
    failed = Point(8192, 131072, 32, "oom", reason="torch.OutOfMemoryError: " + "CUDA out of memory. " * 9)
    make_result(points=[large, failed])
    console = Console()
    measure(console, [replace(large, batch_size=size) for size in range(4096 - 98, 4097)])
    console.repeating(large)
    console.point_done(failed)
    printed = capsys.readouterr().err
    assert max(map(len, printed.splitlines())) <= 80
    assert "[99/99] 4096 x 131072: " in printed
    assert reasons[0] in " ".join(printed.split())


def test_without_a_terminal_there_is_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    measure(Console(), [make_point(), make_point(2)])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "\r" not in "".join(lines)


def test_a_terminal_shows_points_and_runs_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    measure(Console(), [make_point(), make_point(2, latencies_s=[1.0] * 8)])
    bars = re.findall(r"(\d+ x 64, [\w-]+ \d).*?(\d+)% after \d+:\d+, (.*?) left", terminal.getvalue())
    percents = [int(percent) for _, percent, _ in bars]
    assert percents == sorted(percents)
    # Two warm-ups and three runs make a point, and the second takes longer than expected.
    assert {("1 x 64, warm-up 2", "10"), ("1 x 64, run 3", "40"), ("2 x 64, warm-up 1", "50")} <= {
        (what, percent) for what, percent, _ in bars
    }
    assert max(percents[:-1]) < 100
    assert re.fullmatch(r"\d+:\d+", bars[-1][2])


class Interrupted(Terminal):
    """Ctrl-C comes before this text."""

    before = "a note"

    def write(self, text: str, /) -> int:
        if text == self.before:
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_a_line_above_the_bar_is_written_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, console = Interrupted(), Console()
    monkeypatch.setattr(sys, "stderr", terminal)
    console.start(ExperimentConfig(), 2, [])
    with pytest.raises(KeyboardInterrupt):
        console.note("a note")
    assert "a note\n" in terminal.getvalue()
    console.close()


class Screen(Terminal):
    """Tells when a text has been shown."""

    def waited_for(self, text: str) -> bool:
        end_s = time.monotonic() + 5
        while text not in self.getvalue() and time.monotonic() < end_s:
            time.sleep(0.01)
        return text in self.getvalue()


def test_a_terminal_shows_what_vllm_is_doing_until_it_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("batch_inference.measure.console.LOG_LOOK_S", 0.01)
    config = ExperimentConfig(output_file=str(tmp_path / "tp_1_results.json"))
    console = Console()
    console.loading(config)
    assert screen.waited_for("00:00 starting vLLM")
    with config.log_path.open("a") as log:
        for line, words in (
            ("INFO 11-27 [model_runner.py:284] Loading model from scratch...", "loading weights"),
            ("INFO 11-27 [model_runner.py:305] Model loading took 15.0 GiB and 1.9 seconds", "compiling"),
            ("INFO 11-27 [gpu_worker.py:560] Available KV cache memory: 94.83 GiB", "warming up"),
            ("Capturing CUDA graphs (PIECEWISE):   0%|          | 0/35", "capturing CUDA graphs"),
        ):
            print(line, file=log, flush=True)
            assert screen.waited_for(f"00:00 {words}") or screen.waited_for(f"00:01 {words}")
    console.note("a note from elsewhere")
    console.loaded(EngineInfo(vllm_version="0.32.0", dtype="bfloat16"))
    console.close()
    # The bar is wiped before anything else is written.
    shown = re.split(r"[\r\n]+", screen.getvalue())
    assert "a note from elsewhere" in shown
    assert [line.startswith("  ready after 0 s: vLLM 0.32.0") for line in shown].count(True) == 1
    assert shown[-1] == ""


def test_without_a_terminal_nothing_moves_while_it_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.loading(ExperimentConfig(output_file=str(tmp_path / "tp_1_results.json")))
    console.close()
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_verbose_shows_what_is_added_to_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ExperimentConfig(output_file=str(tmp_path / "tp_1_results.json"), verbose=True)
    config.log_path.write_text("of an earlier sweep\n")
    console = Console()
    console.loading(config)
    with config.log_path.open("a") as log:
        log.write("loading weights\nunfini")
    console.close()
    printed = capsys.readouterr().err.splitlines()
    assert printed[-1] == "loading weights"
    assert "of an earlier sweep" not in printed


def test_the_log_is_shown_while_it_grows_and_may_appear_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown_lines: list[str] = []
    arrived = threading.Event()
    console = Console()

    def note(text: Any) -> None:
        shown_lines.append(text)
        if "line" in text:
            arrived.set()

    monkeypatch.setattr(console, "note", note)
    config = ExperimentConfig(output_file=str(tmp_path / "tp_1_results.json"), verbose=True)
    console.loading(config)
    for text in ("line one\nli", "ne two\n"):
        arrived.clear()
        with config.log_path.open("a") as log:
            log.write(text)
        assert arrived.wait(5)
    console.close()
    assert shown_lines[2:] == ["line one", "line two"]


def test_the_interval_is_a_share_of_the_latency() -> None:
    # 1.4 x 12.706 x 0.2828 / sqrt(2) = 3.558 s, of 4 s
    assert shown(make_point(latencies_s=[4.2, 3.8])).startswith("8.000 tok/s ±88.9%, 4.00 s, ")


def test_what_is_kept_and_what_is_doubtful_of_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    config = ExperimentConfig(output_file="x.json", num_runs=3)
    kept = [make_point(1), make_point(2, verdict="suspect"), make_point(4, verdict="suspect")]
    console = Console()
    console.start(config, 5, kept)
    console.close()
    assert "3 of 5 points are kept from x.json, 2 of them suspect" in " ".join(capsys.readouterr().err.split())
    console.all_there(config, kept[:2])
    said = "tp_1: 2 of 2 points are kept from x.json, 1 of them suspect: nothing is left to measure"
    assert " ".join(capsys.readouterr().err.split()) == said


def test_points_are_numbered_after_those_that_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    console, point = Console(), make_point(2)
    make_result(points=[point])
    console.start(ExperimentConfig(num_runs=3), 3, [make_point(1)])
    console.point_done(point)
    console.close()
    assert "  [2/3] 2 x 64: 64.00 tok/s" in capsys.readouterr().err


def test_a_lost_point_is_shown_with_its_class_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    console, point = Console(), Point(4, 64, 32, "oom", reason="CUDA out of memory", failure="oom_run")
    console.start(ExperimentConfig(num_runs=3), 1, [])
    console.point_done(point)
    console.restarting(point)
    console.close()
    printed = capsys.readouterr().err
    assert "[1/1] 4 x 64: oom: CUDA out of memory" in printed
    assert "oom_run: use smaller --batch-sizes" in printed
    assert "4 x 64: the engine is restarted" in printed


def test_a_reason_that_many_points_share_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    wide, drift = "runs differ: the interval is over ±5%; raise --max-runs", "drift; a trend"
    points = [
        make_point(size, verdict="suspect", verdict_reasons=reasons)
        for size, reasons in ((1, [wide]), (2, [wide, drift]), (4, []), (8, [wide, drift]))
    ]
    make_result(points=points)
    measure(Console(), points)
    printed = capsys.readouterr().err
    assert (printed.count(wide), printed.count(drift)) == (1, 1)
    assert [line for line in printed.splitlines() if line.startswith("      ")] == [
        f"      {wide}", f"      {drift}", "      runs differ: as above", "      runs differ, drift: as above",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("gib", "text"), [(None, "unknown"), (0.25, "256 MiB"), (1.0, "1.00 GiB"), (12.555, "12.55 GiB")]
)
def test_an_engine_that_is_ready_is_described(gib: float | None, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.loading(ExperimentConfig(output_file="x.json", tensor_parallel_size=2, model="m"))
    console.loaded(EngineInfo("0.32.0", dtype="bfloat16", weights_gib=gib, kv_cache_tokens=16000))
    printed = capsys.readouterr().err.splitlines()
    assert printed[:2] == ["tp_2: loading m on 2 devices", "  vLLM's log: x.log"]
    # It has taken no time worth a second.
    assert printed[2] == f"  ready after 0 s: vLLM 0.32.0, bfloat16, weights {text}, KV cache 16000 tokens"


def test_every_column_of_the_closing_table_shows_what_its_heading_says() -> None:
    latency_s = [2.0, 2.0]
    times = Requests([0.5, 0.25], latency_s, [0.0, 0.0], [32, 32])
    runs = [make_run(run_s, requests=2, times=times, memory={"used_gib": [61.5, 60.0]}) for run_s in (2.0, 3.0, 4.0)]
    result = make_result(points=[make_point(2, runs=runs), Point(4, 64, 32, "oom", reason="x")])
    head, _, first, second = closing_table(result).splitlines()
    # 192 tokens in 9 s; 1.4 x 4.303 x 1 / sqrt(3); (0.5 + 0.25) / 2; (1.5 + 1.75) / 2 / 31
    assert " ".join(head.split()) == "batch length tok/s latency s ± s TTFT s TPOT s GiB runs verdict"
    assert first.split() == ["2", "64", "21.33", "3.000", "3.478", "0.3750", "0.0524", "61.50", "3", "valid"]
    assert second.split() == ["4", "64", "oom"]


def test_a_line_above_the_bar_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    console = Console()
    console.start(ExperimentConfig(), 1, [])
    console.note("vLLM says: --hf-token=hush-hush is wrong")
    console.close()
    assert "--hf-token=<hf_token> is wrong" in terminal.getvalue()
    assert "hush-hush" not in terminal.getvalue()


def test_what_is_shown_of_a_sweep_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    """What is kept, what the columns are, a repetition, a point with its doubts, one that failed."""
    config = ExperimentConfig(output_file="x.json", num_runs=3)
    good = make_point(2, 8, verdict="suspect", verdict_reasons=["first reason", "second reason"])
    lost = Point(4, 16, 32, "oom", reason="CUDA out of memory", failure="oom_run")
    make_result(points=[good, lost])
    console = Console()
    console.start(config, 3, [make_point(1)])
    console.repeating(good)
    console.point_done(good)
    console.restarting(lost)
    console.point_done(lost)
    console.close()
    console.all_there(config, [make_point(1)])
    shown_lines = capsys.readouterr().err.splitlines()
    advice = wrapped(f"      oom_run: {ADVICE['oom_run']}", indent=6)
    assert shown_lines == [
        "  1 of 3 points is kept from x.json",
        "  batch x length: output throughput ±95 % interval, latency, TTFT, memory",
        "      2 x 8: vLLM compiled a kernel; the run becomes a warm-up and is repeated",
        "  [2/3] 2 x 8: 64.00 tok/s ±3.5%, 1.00 s, TTFT 0.100 s, 60.0 GiB, suspect",
        "      first reason",
        "      second reason",
        "      4 x 16: the engine is restarted",
        "  [3/3] 4 x 16: oom: CUDA out of memory",
        *advice,
        *wrapped("tp_1: 1 of 1 point is kept from x.json: nothing is left to measure", indent=6),
    ]


def test_a_point_of_which_a_number_is_unknown_is_its_status_and_reason() -> None:
    point = make_point(1, reason="why")
    make_result(points=[point])
    for name in ("output_tok_per_s", "latency_mean_s"):
        point.summary = {**point.summary, name: None}
        assert point_words(point) == "ok: why"
        make_result(points=[point])


# --- queues and tokens per step ---------------------------------------------------------------------------------------


def test_a_queue_point_is_its_plateau_its_time_and_its_drain() -> None:
    # 4 at once, 12 rounds of 1 s, of 10 tokens each.
    assert shown(make_queue_point(4, (48,))) == (
        "40.00 tok/s ±0.0% on the plateau, 48 requests in 12.0 s, drain 1.0 s, 60.0 GiB, valid"
    )
    run = make_queue_point(4, (48,)).runs[0]
    run.memory.used_gib = None
    assert "GiB" not in shown(make_queue_point(4, runs=[run]))


def test_a_queue_without_a_plateau_is_its_rate_over_all() -> None:
    point = make_queue_point(4, (3,), verdict="suspect")
    assert shown(point) == "30.00 tok/s over all, 3 requests in 1.00 s, drain 1.0 s, 60.0 GiB, suspect"
    assert shown(make_queue_point(4, (1,))).startswith("10.00 tok/s over all, 1 request in ")


def test_an_interval_that_is_not_known_is_left_out() -> None:
    point = make_queue_point(4, (48,))
    make_result(points=[point])
    point.summary["plateau_ci95_tok_per_s"] = None
    assert point_words(point).startswith("40.00 tok/s on the plateau, ")


def test_a_failed_queue_point_is_its_reason() -> None:
    assert shown(make_queue_point(4, status="oom", verdict=None, reason="CUDA out of memory", runs=[])) == (
        "oom: CUDA out of memory"
    )


@pytest.mark.parametrize(
    ("point", "shape", "key"),
    [
        (make_point(8, 512), "8 x 512", "batch_size 8, seq_len 512"),
        (
            make_point(8, 512, max_num_batched_tokens=2048),
            "8 x 512, 2048 tokens per step",
            "batch_size 8, seq_len 512, max_num_batched_tokens 2048",
        ),
        (make_queue_point(8), "8 at once", "batch_size 8"),
        (
            make_queue_point(8, max_num_batched_tokens=64),
            "8 at once, 64 tokens per step",
            "batch_size 8, max_num_batched_tokens 64",
        ),
    ],
)
def test_a_point_is_shown_by_all_that_tells_it_from_others(
    point: Point, shape: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console()
    console.start(ExperimentConfig(num_runs=3), 1, [])
    console.restarting(point)
    console.close()
    assert f"      {shape}: the engine is restarted" in capsys.readouterr().err
    assert ", ".join(key_words(point)) == key


def test_the_legend_says_what_the_numbers_of_a_queue_are(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.start(ExperimentConfig(prompts_file="w.jsonl"), 2, [])
    console.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "  requests at once: output throughput on the plateau ±95 % interval, time, memory"


def test_every_column_of_a_queue_shows_what_its_heading_says() -> None:
    # 12 rounds of 2 s, 4 at once, 10 tokens each; and a sample that never fills its places.
    points = [
        make_queue_point(4, (48,), life_s=2.0),
        make_queue_point(16, (8,), verdict="suspect"),
        make_queue_point(32, status="oom", verdict=None, runs=[]),
    ]
    _, head, _, *rows = closing_table(make_result(points=points)).splitlines()
    assert re.split(r"  +", head) == [
        "at once", "tok/s", "± tok/s", "over all", "time s", "drain s", "GiB", "verdict",
    ]  # fmt: skip
    assert [row.split() for row in rows] == [
        ["4", "20.00", "0.0000", "20.00", "24.00", "2.000", "60.00", "valid"],
        ["16", "80.00", "1.000", "1.000", "60.00", "suspect"],
        ["32", "oom"],
    ]


def test_tables_of_batches_and_queues_stand_apart_each_with_its_tokens_per_step_where_there_are_some() -> None:
    points = [
        make_point(16384, 131072, max_tokens=4096, max_num_batched_tokens=131072),
        make_queue_point(16384, (16384,), output=100_000, max_num_batched_tokens=131072),
        make_queue_point(4),
    ]
    first, second = closing_table(make_result(points=points)).split("\n\n")
    assert re.split(r"  +", first.splitlines()[0].strip()) == [
        "batch", "length", "per step", "tok/s", "latency s", "± s", "GiB", "runs", "verdict",
    ]  # fmt: skip
    assert re.split(r"  +", second.splitlines()[1])[:3] == ["at once", "per step", "tok/s"]
    assert max(len(line) for part in (first, second) for line in part.splitlines()) <= 80
    # Where one point has none of its own, its cell is empty.
    assert second.splitlines()[-1].split()[0] == "4"
    assert "per step" not in closing_table(make_result(points=[make_point(), make_queue_point(4)]))


def test_the_bar_of_a_queue_goes_on_and_names_its_point(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    console, point = Console(), make_queue_point(4, (48,))
    make_result(points=[point])
    console.start(ExperimentConfig(prompts_file="w.jsonl"), 2, [])
    console.running(make_queue_point(4, runs=[], warmups=[]), "warmup", 0)
    console.running(make_queue_point(4, runs=[]), "run", 0)
    console.point_done(point)
    console.close()
    bars = re.findall(r"(4 at once, [\w-]+ \d).*?(\d+)% after", terminal.getvalue())
    assert {what for what, _ in bars} == {"4 at once, warm-up 1", "4 at once, run 1"}
    assert [int(percent) for _, percent in bars] == sorted(int(percent) for _, percent in bars)
    assert bars[-1][1] == "50"


def test_every_workload_and_every_way_through_it_has_a_table_that_says_which() -> None:
    lengths = Lengths(500, 100.0, 0.0, [100] * 6, 100)
    job = Job("abcdef0123456789", "file", 500, 100, 100, 200, 1, 1, [100], [100], lengths, lengths)
    keys = [
        WorkloadKey("abcdef0123456789", "file", "given"),
        WorkloadKey("abcdef0123456789", "file", "longest-first"),
        WorkloadKey("abcdef0123456789", "eos", "given"),
        WorkloadKey("0123456789abcdef", 64, "shuffled", is_cached=True),
    ]
    points = [make_queue_point(batch_size, workload=key) for batch_size in (2, 4) for key in keys]
    tables = closing_table(make_result(points=points, jobs=[job])).split("\n\n")
    assert [table.splitlines()[0] for table in tables] == [
        "workload abcdef01 of 500 requests, output lengths from the file, order given",
        "workload abcdef01 of 500 requests, output lengths from the file, order",
        "workload abcdef01, outputs end by themselves, order given",
        "workload 01234567, 64 output tokens each, order shuffled, prefixes cached",
    ]
    assert tables[1].splitlines()[1] == "  longest-first"
    assert [[line.split()[0] for line in table.splitlines()[-2:]] for table in tables] == [["2", "4"]] * 4
    assert max(len(line) for table in tables for line in table.splitlines()) <= 80
