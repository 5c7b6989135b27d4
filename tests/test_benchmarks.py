"""What the programs of benchmarks/ work out: no engine here."""

from __future__ import annotations

import importlib
import itertools
import json
import random
import re
import subprocess
import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import pytest

from batch_inference.core.results import Timeline
from builders import make_point, make_result, make_run
from conftest import REPOSITORY, stub_environment


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
        return importlib.import_module(name)

    return load


def test_resume_runs_no_command_twice(load: Any, tmp_path: Path) -> None:
    call = load("ways").call
    ran = tmp_path / "ran"
    command = [sys.executable, "-c", f"open({str(ran)!r}, 'a').write('x')"]
    first_s = call(command, tmp_path / "log.txt")
    assert call(command, tmp_path / "log.txt", resume=True) == first_s
    assert ran.read_text() == "x"
    call([*command, "another"], tmp_path / "log.txt", resume=True)
    call(command, tmp_path / "log.txt")
    assert ran.read_text() == "xxx"


def test_resume_runs_what_failed_again(load: Any, tmp_path: Path) -> None:
    call = load("ways").call
    command = [sys.executable, "-c", f"open({str(tmp_path / 'there')!r})"]
    with pytest.raises(SystemExit):
        call(command, tmp_path / "log.txt", resume=True)
    (tmp_path / "there").touch()
    assert call(command, tmp_path / "log.txt", resume=True) > 0


def test_engine_flags_replace_the_sizes_of_the_grid(load: Any) -> None:
    shared_flags = load("ways").shared_flags
    args = Namespace(model="m", points=[(4, 64), (16, 8)], max_tokens=16, engine_flags=["--max-num-seqs", "256"])
    assert shared_flags(args) == ["--model", "m", "--max-model-len", "80", "--max-num-seqs", "256"]


def test_processes_that_were_not_run_are_estimated(load: Any) -> None:
    """Two of three points measured: 10 and 12 s around the runs, so the third has 11 s and its own 4 runs of 2 s."""
    against = load("against_vllm_bench")
    points = [make_point(batch, 64, latencies_s=[2.0] * 3) for batch in (1, 2, 4)]
    result = make_result(points=points, engine={"compile_cache": "warm"}, environment={"cpu_count": 16})
    args = Namespace(
        points=[(1, 64), (2, 64), (4, 64)], batch_sizes=(1, 2, 4), seq_lens=(64,), warmup_runs=1, num_runs=3,
        max_tokens=32, cold=False, warm=True, model="m", engine_flags=[],
    )  # fmt: skip
    phases = {"import_s": 3.0, "engine_s": 5.0, "warmup_s": 2.0, "timed_s": 6.0}
    every = [against.phases(phases, wall_s, "") for wall_s in (18.0, 20.0)]
    bench = {point: {"latencies_s": [2.0, 2.0, 2.0]} for point in args.points[:2]}
    ours = against.phases(phases, 19.0, "")
    document = against.compared(args, result, ours, bench, every)
    assert document["estimated_points"] == 1
    assert document["wall_s_of_bench"] == pytest.approx(18 + 20 + 11 + 4 * 2)
    assert document["wall_ratio"] == pytest.approx(3.0)
    assert [row["ratio"] for row in document["points"]] == [1.0, 1.0, None]
    table = "\n".join(against.table(args, document))
    assert "m, 3 x 1 points, 32 output tokens, 1 warm-up and 3 timed runs a point; a warm compile cache" in table
    assert "| vllm bench latency, 2 of 3 processes |" in table
    assert "| **wall time** | 19.0 | 38.0 |  |" in table
    assert "| **wall time of all 3, 1 estimated** | 19.0 | 57.0 | 3.0 |" in table


@pytest.mark.parametrize(("given", "found"), [(None, "1"), ("0", "0")])
def test_engines_of_ours_run_as_those_of_others(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, found: str
) -> None:
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(name, given)
    script = f"import os; print(os.environ[{name!r}])"
    load("ways").call([sys.executable, "-c", script], tmp_path / "log.txt")
    assert (tmp_path / "log.txt").read_text().strip() == found


def test_both_tools_find_the_same_caches(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the engines, bytecode included; with --cold an empty folder for each, whatever the user has set."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    script = "import os; print(*(os.environ.get(n, '') for n in ('TRITON_CACHE_DIR', 'PYTHONDONTWRITEBYTECODE')))"
    against = load("against_vllm_bench")

    def folder(*, cold: bool) -> str:
        with against.compile_cache(cold):
            load("ways").call([sys.executable, "-c", script], tmp_path / "log.txt")
        return (tmp_path / "log.txt").read_text().strip()

    assert folder(cold=False) == "/mine"
    first, second = folder(cold=True), folder(cold=True)
    assert first.endswith("/triton")
    assert first != second


# --- runs of a pipeline ----------------------------------------------------------------------------------------------


def scattered(load: Any, latency_s: float, requests: list[int], **changes: Any) -> Any:
    """A run of 32 steps of a pipeline of two stages, of 10 ms each in its first half and then of 20 ms."""
    raw = {"batch_size": 16, "seq_len": 64, "way": "plain", "latency_s": latency_s, "throttled_us": 0}
    steps = [(0.0, number, requests[number % 2], 0) for number in range(32)]
    results = [(0.01 * number + 0.01 * max(0, number - 15), requests[number % 2]) for number in range(32)]
    return load("pipeline_scatter").compact({**raw, "steps": steps, "results": results, **changes}, stages=2)


def test_what_is_kept_of_a_run_of_a_pipeline(load: Any) -> None:
    ran = scattered(load, 0.5, [10, 6])
    assert ran.micro_batches == [10, 6]
    # From the fourth step on: ten parts of two steps.
    assert ran.parts_s == pytest.approx([0.02] * 6 + [0.04] * 4)
    assert scattered(load, 0.5, [16, 0]).micro_batches == [16, 0]
    assert scattered(load, 0.5, [16, 0], results=[(0.0, 16)] * 20).parts_s == []
    with pytest.raises(ValueError, match=r"plain: 16 requests were handed over, \[16, 16\] run"):
        scattered(load, 0.5, [16, 16])


def test_runs_of_a_pipeline_are_a_row_for_each_way(load: Any) -> None:
    runs = [scattered(load, 1.0, [16, 0]), scattered(load, 1.2, [10, 6]), scattered(load, 1.0, [8, 8], way="even")]
    setting = {"model": "m", "tensor_parallel_size": 1, "pipeline_parallel_size": 2, "max_tokens": 16}
    text = load("pipeline_scatter").table({**setting, "device": "cpu", "vllm": "0.32.0"}, runs)
    assert text.splitlines()[0].endswith("Time for which the container's CPU limit held it back: 0 s.")
    assert text.splitlines()[-2:] == [
        "| 16 | 64 | plain | 2 | 1.100 | 12.9% | 18.2% | 36.9% | 1, 2 |",
        "| 16 | 64 | even | 1 | 1.000 |  | 0.0% | 36.9% | 2 |",
    ]


def test_a_way_becomes_what_the_scheduler_is_told(load: Any) -> None:
    wanted = load("pipeline_scatter").wanted
    assert wanted("plain", 10, 4) == {"held": 0, "split": [], "interval_s": 0.005}
    assert wanted("held", 10, 4) == {"held": 10, "split": [], "interval_s": 0.005}
    assert wanted("even/short", 10, 4) == {"held": 10, "split": [3, 3, 3, 3], "interval_s": 0.0002}
    assert wanted("6,0,2", 10, 4) == {"held": 10, "split": [6, 0, 2], "interval_s": 0.005}


@pytest.mark.parametrize("text", ["odd", "plain/long", "6,,2", "held/short/short"])
def test_a_way_that_is_none_is_refused(load: Any, text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="plain, held, even or 6,6,4 is needed"):
        load("pipeline_scatter").way(text)


def test_held_back_by_the_limit_of_the_container(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown without such a file, or where it does not say."""
    scatter, file = load("pipeline_scatter"), tmp_path / "cpu.stat"
    monkeypatch.setattr(scatter, "CPU_STAT", file)
    found = [scatter.throttled_us()]
    for text in ("usage_usec 5\n", "usage_usec 5\nnr_throttled 1\nthrottled_usec 70\n"):
        file.write_text(text)
        found.append(scatter.throttled_us())
    assert found == [None, None, 70]


def test_the_recorded_runs_of_a_pipeline_give_the_numbers_of_the_pages(load: Any) -> None:
    scatter = load("pipeline_scatter")
    folder = REPOSITORY / "docs"
    recorded = json.loads((folder / "h200" / "pipeline_scatter.json").read_text())
    setting = {name: value for name, value in recorded.items() if name not in ("rows", "runs")}
    runs = [scatter.Ran(**run) for run in recorded["runs"]]
    assert scatter.document(setting, runs) == recorded
    assert scatter.table(setting, runs) + "\n" == (folder / "h200" / "pipeline_scatter.md").read_text()
    page = " ".join((folder / "measuring.md").read_text().split())
    for batch_size, text in ((16, "1.15, 1.32, 1.79 and 2.12 s at 16"), (64, "1.58, 1.94 and 2.23 s at 64")):
        by_number: dict[int, list[float]] = {}
        for run in runs:
            if run.batch_size == batch_size and not run.way.endswith("/short"):
                by_number.setdefault(sum(map(bool, run.micro_batches)), []).append(run.latency_s)
        *first, last = [f"{fmean(by_number[number]):.2f}" for number in sorted(by_number)]
        assert f"{', '.join(first)} and {last} s at {batch_size}" == text
        assert text in page


# --- a queue against engines of their own, and against `vllm bench throughput` ----------------------------------------


class Tokenizer:
    """Words of two letters, with the space before them; any other text is a token for each letter, and every text
    begins with a token of its own. The last word comes back as letters."""

    def __init__(self) -> None:
        letters = "abcdefghijklmnopqrst"
        words = [f" {first}{second}" for first in letters for second in "abcdefgh"]
        self.vocabulary = ["<s>", *letters, " ", *words]

    def decode(self, ids: list[int]) -> str:
        (number,) = ids
        return self.vocabulary[number]

    def __call__(self, text: str) -> Namespace:
        known = self.vocabulary[:-1]
        pieces = [[piece] if piece in known else list(piece) for piece in re.findall(" [a-z]+|[a-z]+", text)]
        return Namespace(input_ids=[known.index(piece) for piece in ["<s>", *itertools.chain(*pieces)]])


def test_texts_are_as_long_as_asked(load: Any) -> None:
    """And hold no token that the model has not, which has fewer than the tokenizer."""
    tokenizer = Tokenizer()
    texts = load("known_texts").KnownTexts(tokenizer, vocab_size=150, seed=0)
    for tokens in (4, 5, 300):
        ids = tokenizer(texts.text(tokens)).input_ids
        assert len(ids) == tokens
        assert max(ids) < 150
    assert texts.text(30) != texts.text(30)
    with pytest.raises(ValueError, match="a text of 1 tokens has 2"):
        texts.text(1)


def test_a_tokenizer_without_words_is_refused(load: Any) -> None:
    with pytest.raises(ValueError, match="only 0 words of one token"):
        load("known_texts").KnownTexts(Tokenizer(), vocab_size=22, seed=0)


def test_requests_are_in_order_once_vllm_has_shuffled_them(load: Any) -> None:
    pairs = [(f"prompt {number}", f"answer {number}") for number in range(20)]
    entries = load("known_texts").sharegpt(pairs, seed=3)
    # As vLLM's ShareGPTDataset does.
    random.seed(3)
    random.shuffle(entries)
    assert [tuple(turn["value"] for turn in entry["conversations"]) for entry in entries] == pairs


def test_what_vllm_would_drop_is_left_out(load: Any, tmp_path: Path) -> None:
    file = tmp_path / "lengths.csv"
    file.write_text("prompt_tokens,output_tokens\n8,4\n3,8\n8,3\n1025,4\n1024,1025\n1024,1024\n9,9\n9,10\n")
    args = Namespace(prompts_file=file, requests=3, batch_sizes=[2], output_dir=tmp_path, tokenizer=None)
    queue = load("queue_fidelity").make_queue(args)
    assert queue.lengths == [(8, 4), (1024, 1024), (9, 9)]
    assert queue.left_out == 4
    asked = [json.loads(line) for line in queue.own_file.read_text().splitlines()]
    assert asked[0] == {"prompt_tokens": 8, "output_tokens": 4}
    args.requests = 5
    with pytest.raises(ValueError, match=r"--requests 5: .*lengths\.csv has 4 usable lengths"):
        load("queue_fidelity").make_queue(args)


def test_other_requests_than_asked_are_wrong(load: Any) -> None:
    differences = load("queue_fidelity").differences
    asked = [(8, 4), (9, 5)]
    assert not list(differences([(8, 4), (9, 5)], asked))
    assert list(differences([(8, 4)], asked)) == ["1 requests of 12 tokens were run in place of 2 of 26"]
    assert list(differences([(8, 4), (9, 6)], asked)) == ["2 requests of 27 tokens were run in place of 2 of 26"]
    (same_counts,) = differences([(9, 5), (8, 4)], asked)
    assert same_counts == "requests were run in a different order, or with different lengths"


def test_a_run_over_its_limits_is_wrong(load: Any) -> None:
    """Two requests of 100 + 3 tokens: at most 20 tokens in each of 14 steps, or all prompts in the first of 3."""
    fidelity = load("queue_fidelity")
    lengths = [(100, 3), (100, 3)]
    queue = Namespace(lengths=lengths)

    def wrong(prompts: list[int], outputs: list[int], running: int) -> list[str]:
        steps = len(prompts)
        line = Timeline(
            [0.1 * step for step in range(steps)], [1] * steps, prompts, outputs, [2.0] * steps, [0] * steps
        )
        run = make_run(2.0, requests=2, seq_len=100, max_tokens=3, counters={"peak_running": running})
        run.requests.prompt_tokens = [100, 100]
        run.replicas[0].timeline = line
        ran = fidelity.ran_by_us(run, fidelity.Limit(2, 20), queue)
        assert ran.steps == steps
        return list(ran.wrong)

    one_by_one = [0] * 4 + [100] + [0] * 5 + [100] + [0] * 3, [0] * 4 + [1] * 3 + [0] * 3 + [1] * 3 + [0]
    assert wrong(*one_by_one, running=2) == []
    assert wrong(*one_by_one, running=1) == ["1 requests ran at once"]
    assert wrong([200, 0, 0], [2, 2, 2], running=2) == ["182 tokens more than the budget of its steps"]


def test_ratios_of_queues_and_what_is_wrong_with_them(load: Any) -> None:
    fidelity = load("queue_fidelity")
    own, other = fidelity.Limit(2, None), fidelity.Limit(8, 256)

    def ran(*seconds: float, steps: int | None = None, wrong: Any = ()) -> list[Any]:
        return [fidelity.Ran(elapsed_s, list(wrong), steps) for elapsed_s in seconds]

    measured = {
        "together": {own: ran(10, 9, 11, steps=70), other: ran(5, steps=30)},
        "alone": {own: ran(10, 10, 9.9, steps=71), other: ran(5.2, steps=30)},
        "bench": {own: ran(10.4, steps=72), other: ran(5, wrong=["9 requests ran"])},
    }
    rows = [fidelity.row_of(limit, measured, tokens=1000) for limit in (own, other)]
    assert [row["to_alone"] for row in rows] == pytest.approx([1.0, 1.04])
    assert [row["to_bench"] for row in rows] == pytest.approx([1.04, 1.0])
    assert (
        fidelity.markdown(rows[0]) == "| 2 | vLLM's own | 100.0 | 100.0 | 96.2 | 1.000 | 1.040 | 20.0% | 70 | 71 | 72 |"
    )
    assert fidelity.is_close(rows[0], 0.05)
    assert not fidelity.is_close(rows[0], 0.02)
    assert not fidelity.is_close(rows[1], 0.02)
    assert list(fidelity.what_is_wrong(measured)) == ["bench, 8 at once, 256 tokens per step: 9 requests ran"]


def test_without_a_tokenizer_there_is_no_bench_to_compare(load: Any) -> None:
    fidelity = load("queue_fidelity")
    limit = fidelity.Limit(2, None)
    measured = {"together": {limit: [fidelity.Ran(10.0, [])]}, "alone": {limit: []}}
    row = fidelity.row_of(limit, measured, tokens=1000)
    assert row["to_bench"] is None
    assert fidelity.markdown(row) == "| 2 | vLLM's own | 100.0 |  |  |  |  | 0.0% |  |  |  |"
    assert list(fidelity.what_is_wrong(measured)) == ["alone, 2 at once: it was not measured"]


def test_what_vllm_bench_says_is_held_against_the_file(load: Any, tmp_path: Path, monkeypatch: Any) -> None:
    fidelity = load("queue_fidelity")
    told: dict[str, Any] = {"elapsed_time": 4.0, "num_requests": 2, "total_num_tokens": 26}
    commands = []

    def call(command: list[str], _: Path, **variables: str) -> None:
        commands.append(command)
        Path(command[command.index("--output-json") + 1]).write_text(json.dumps(told))
        Path(variables["RAN"]).write_text(json.dumps({"lengths": [[8, 4], [9, 5]], "steps": 6}))

    monkeypatch.setattr(fidelity, "call", call)
    args = Namespace(model="m", tokenizer="t", seed=0, output_dir=tmp_path, engine_flags=["--enforce-eager"])
    queue = fidelity.Queue([(8, 4), (9, 5)], 0, tmp_path / "own", tmp_path / "shared", 0.1)
    assert fidelity.bench_of(args, queue, fidelity.Limit(2, 256)) == fidelity.Ran(4.0, [], 6)
    given = dict(itertools.pairwise(commands[0]))
    assert given["--max-num-seqs"] == "2"
    assert given["--max-num-batched-tokens"] == "256"
    assert given["--num-warmups"] == "4"
    assert given["--max-model-len"] == "14"
    assert {"--enforce-eager", "--no-enable-prefix-caching", "--disable-detokenize"} <= given.keys()
    assert "--skip-tokenizer-init" not in given
    told["num_requests"] = 1  # though the lengths are right
    assert fidelity.bench_of(args, queue, fidelity.Limit(2, None)).wrong == ["it says 1 requests and 26 tokens"]


def test_another_way_begins_in_each_round(load: Any) -> None:
    turns = load("ways").turns
    ways = ("together", "alone", "bench")
    rounds = [turns(ways, number) for number in range(4)]
    assert rounds[0] == list(ways)
    assert rounds[1] == ["alone", "bench", "together"]
    assert rounds[2] == ["bench", "together", "alone"]
    assert rounds[3] == rounds[0]


@pytest.mark.slow
def test_all_limits_on_one_load_and_each_on_its_own(tmp_path: Path) -> None:
    """By the stand-in for vLLM; the time of its steps is no matter here."""
    done = queue_fidelity(tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "queue_fidelity.json").read_text())
    assert [(row["batch_size"], row["budget"]) for row in document["points"]] == [(2, None), (4, None)]
    assert len(document["runs"]) == 4
    assert all(row["together_steps"] == row["alone_steps"] for row in document["points"])
    assert (tmp_path / "queue_fidelity.md").read_text() == done.stdout


@pytest.mark.slow
def test_a_token_too_few_is_told(tmp_path: Path) -> None:
    done = queue_fidelity(tmp_path, STUB_FAIL="tokens")
    assert done.returncode == 1
    assert "wrong: alone, 4 at once: 40 requests of 3408 tokens were run in place of 40 of 3409\n" in done.stderr


def queue_fidelity(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/queue_fidelity.py", "--model", "models/tiny-llama", "--batch-sizes", "2,4"]
    command += ["--requests", "40", "--rounds", "1", "--tolerance", "100", "--output-dir", str(folder)]
    command += ["--", "--load-format", "dummy"]
    environment = stub_environment(**variables)
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
