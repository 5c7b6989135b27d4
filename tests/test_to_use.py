"""What was found, written to be used: vLLM's configuration file, and the scripts that run with it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from html import unescape
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from test_jobs import job, queue, setting

import analyze_results
from batch_inference.analyze import decide, flags
from batch_inference.analyze.answers import Analysis, Question, analyse
from batch_inference.analyze.decide import Limits
from batch_inference.analyze.engine_setting import EngineSetting, engine_setting
from batch_inference.analyze.engine_words import settings_of_words
from batch_inference.analyze.jobs import JobQuestion
from batch_inference.analyze.markdown import as_markdown
from batch_inference.analyze.page import as_html
from batch_inference.analyze.report import write_report
from batch_inference.analyze.sections import Section
from batch_inference.analyze.tables import load_setting
from batch_inference.analyze.terminal import as_text
from batch_inference.analyze.to_use import MARK, ToUse, write_to_use
from batch_inference.analyze.winner import Winner, winner
from batch_inference.analyze.yaml_text import scalar, yaml_text
from batch_inference.core.results import EngineInfo, Point, Result, WorkloadKey
from batch_inference.plan.devices import find_devices
from builders import make_point, make_result, save_all
from conftest import REPOSITORY, free_ports, stub_environment

GRAPHS = {
    "max_num_seqs": 256,
    "cudagraph_mode": "FULL_AND_PIECEWISE",
    "cudagraph_capture_sizes": [1, 2, 4, 256, 512],
    "max_num_batched_tokens": 8192,
    "gpu_memory_utilization": 0.8,
}


def analysed(results: Sequence[Result], folder: Path, **asked: Any) -> Analysis:
    return analyse([load_setting(path) for path in save_all(results, folder)], Question(**asked))


def won(results: Sequence[Result], folder: Path, goal: str = "throughput", **asked: Any) -> Winner:
    found = winner(analysed(results, folder, **asked), goal)
    assert found
    return found


def written(results: Sequence[Result], folder: Path, goal: str = "throughput", **asked: Any) -> ToUse:
    """Into the folder `best`."""
    found = write_to_use(analysed(results, folder / "in", **asked), goal, folder / "best")
    assert found
    return found


def setting_of(point: Point | None = None, **changes: Any) -> EngineSetting:
    point = point or make_point(64, 512)
    return of_point(make_result("s", [point], changes.pop("sizes", (1, 1, 1)), **changes), point)


def of_point(result: Result, point: Point) -> EngineSetting:
    engine = result.engine_of(point)
    assert engine
    return engine_setting(result, point, engine)


# --- which point --------------------------------------------------------------------------------------------------


def grid(
    name: str, seconds: dict[tuple[int, int], float], sizes: tuple[int, int, int] = (1, 1, 1), **of: Any
) -> Result:
    """(batch size, length) -> latency."""
    points = [
        make_point(batch, length, [s, s * 1.01, s * 0.99], replicas=sizes[2]) for (batch, length), s in seconds.items()
    ]
    return make_result(name, points, sizes, **of)


def test_the_winner_is_that_of_the_longest_prompts_and_the_others_are_named(tmp_path: Path) -> None:
    one = grid("tp_1", {(1, 64): 1, (8, 64): 2, (1, 512): 2, (8, 512): 9})
    two = grid("tp_2", {(1, 64): 0.9, (8, 64): 3, (1, 512): 1.5, (8, 512): 4}, (2, 1, 1))
    found = won([one, two], tmp_path)
    assert (found.name, found.batch_size, found.seq_len, found.why) == ("tp_2", 8, 512, "best throughput at length 512")
    assert found.notes == ("Other lengths have other winners: tp_1 at batch 8 for length 64.",)


@pytest.mark.parametrize(
    ("goal", "name", "batch_size"),
    [("throughput", "tp_2", 8), ("per-device", "tp_1", 8), ("latency", "tp_2", 1), ("cost", "tp_1", 8)],
)
def test_a_goal_has_its_own_winner(goal: str, name: str, batch_size: int, tmp_path: Path) -> None:
    one = grid("tp_1", {(1, 64): 1, (8, 64): 2})
    two = grid("tp_2", {(1, 64): 0.9, (8, 64): 1.6}, (2, 1, 1))
    found = won([one, two], tmp_path, goal, price=2.0)
    assert (found.name, found.batch_size) == (name, batch_size)
    assert found.why.startswith(f"best {goal.replace('-', ' ')} ")


def test_the_goals_of_the_flag_are_those_of_the_decision() -> None:
    assert tuple(goal.name.replace(" ", "-") for goal in decide.GOALS) == flags.GOALS


def test_the_winner_keeps_the_limits_and_says_so(tmp_path: Path) -> None:
    one = grid("tp_1", {(1, 64): 1, (8, 64): 2})
    found = won([one], tmp_path, limits=Limits(latency_s=1.5))
    assert (found.batch_size, found.why) == (1, "best throughput at length 64 with latency p99 ≤ 1.5 s")
    assert winner(analysed([one], tmp_path, limits=Limits(latency_s=0.5)), "throughput") is None


def test_unlike_things_have_no_common_winner_and_that_of_most_points_is_written(tmp_path: Path) -> None:
    small = grid("tp_1", {(1, 64): 0.1}, config={"model": "other/model"})
    large = grid("tp_2", {(1, 64): 1, (8, 64): 2}, (2, 1, 1))
    found = won([small, large], tmp_path)
    assert found.name == "tp_2"
    assert [note[:46] for note in found.notes] == ["There are 2 groups; this is the winner of grou"]


def test_what_is_not_believable_never_wins(tmp_path: Path) -> None:
    result = make_result("tp_1", [make_point(1, 64), make_point(8, 64, verdict="invalid")])
    assert won([result], tmp_path).batch_size == 1
    result = make_result("tp_1", [make_point(1, 64, verdict="invalid")])
    assert winner(analysed([result], tmp_path), "throughput") is None
    assert won([make_result("tp_1", [make_point(1, 64, verdict="suspect")])], tmp_path).is_suspect


def test_two_files_of_one_setting_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    paths = [*save_all([grid("tp_1", {(1, 64): 1})], tmp_path), *save_all([grid("tp_1", {(4, 64): 1})], tmp_path / "a")]
    found = winner(analyse([load_setting(path, top=tmp_path) for path in paths], Question()), "throughput")
    assert found
    assert (found.setting.path, found.batch_size) == (paths[1], 4)


def test_a_budget_that_is_an_axis_is_the_points_own(tmp_path: Path) -> None:
    points = [make_point(4, 64, [s], max_num_batched_tokens=budget) for budget, s in ((2048, 2), (8192, 1))]
    result = make_result("tp_1", points, config={"max_num_batched_tokens": [2048, 8192]})
    found = won([result], tmp_path)
    assert (found.name, found.tokens_per_step) == ("tp_1, 8192 tokens per step", 8192)
    assert [found.is_of(point) for point in result.points] == [False, True]
    assert of_point(result, points[0]).values["max_num_batched_tokens"] == 2048


@pytest.mark.slow
def test_a_job_goes_before_a_grid_and_a_deadline_before_the_fastest(tmp_path: Path) -> None:
    one, two = setting("tp_1", queue(2)), setting("tp_2", queue(4, life_s=1.5), make_point(1, 64), sizes=(2, 1, 1))
    found = won([one, two], tmp_path)
    assert (found.name, found.batch_size, found.why) == ("tp_2", 4, "the fastest, for the job of 480 requests")
    assert found.is_of(two.points[0])
    assert not found.is_of(two.points[1])
    found = won([one, two], tmp_path, "per-device")
    assert (found.name, found.why) == ("tp_1", "the fewest device-hours, for the job of 480 requests")
    assert won([one, two], tmp_path, "latency").seq_len == 64
    assert found.notes == ()
    found = won([setting("tp_1", queue(2, order="longest-first"))], tmp_path / "sorted")
    assert found.notes == ("It was measured with the requests longest-first; give yours in that order.",)
    found = won([one, two], tmp_path, job=JobQuestion(deadline_h=100 / 3600))
    assert (found.name, found.replicas) == ("tp_1", 3)
    assert found.why == "the fewest devices for the deadline, for the job of 480 requests"


# --- its settings -------------------------------------------------------------------------------------------------


def test_a_point_has_the_sizes_that_were_measured() -> None:
    found = setting_of(engine={"max_num_seqs": 64, "max_num_batched_tokens": 8192, "gpu_memory_utilization": 0.4})
    assert found.values == {
        "model": "meta-llama/Llama-2-7b-chat-hf", "tensor_parallel_size": 1, "pipeline_parallel_size": 1,
        "max_model_len": 4096, "max_num_seqs": 64, "max_num_batched_tokens": 8192, "dtype": "bfloat16",
        "gpu_memory_utilization": 0.4,
    }  # fmt: skip
    assert found.sampling == {"temperature": 0.8, "top_p": 0.95, "max_tokens": 128} | {"max_tokens": 32}
    assert (found.replicas, found.devices_per_replica, found.is_coupled, found.notes) == (1, 1, False, [])


@pytest.mark.parametrize(
    ("engine", "batch_size", "graphs"),
    [
        ({}, 64, 512),
        ({}, 256, None),  # the engine was loaded for just that
        ({"cudagraph_mode": "NONE"}, 64, None),
        ({"cudagraph_mode": None}, 64, None),
        ({"enforce_eager": True}, 64, None),
        ({"cudagraph_capture_sizes": []}, 64, None),
    ],
)
def test_graphs_are_those_of_the_engine_that_measured(
    engine: dict[str, Any], batch_size: int, graphs: int | None
) -> None:
    found = setting_of(make_point(batch_size, 512), engine=GRAPHS | engine)
    assert found.values["max_num_seqs"] == batch_size
    assert found.values.get("max_cudagraph_capture_size") == graphs
    assert ("max_cudagraph_capture_size" in found.why) == (graphs is not None)


@pytest.mark.parametrize("flag", ["--max-cudagraph-capture-size", "--cudagraph-capture-sizes"])
def test_graphs_that_the_user_chose_stay(flag: str) -> None:
    found = setting_of(engine=GRAPHS, config={"engine_args": [flag, "128"]})
    value = [128] if flag.endswith("sizes") else 128
    assert {name: of for name, of in found.values.items() if "graph" in name} == {flag[2:].replace("-", "_"): value}


def test_of_a_batch_in_waves_as_many_run_as_ran() -> None:
    assert setting_of(make_point(64, 512), engine={"max_num_seqs": 16}).values["max_num_seqs"] == 16


def test_an_earlier_engine_of_the_file_is_the_one_that_counts() -> None:
    earlier = EngineInfo("0.30.0", dtype="float16", max_num_seqs=8)
    result = make_result("s", [make_point(4, 512, engine=0), make_point(4, 64)], earlier_engines=[earlier])
    assert [of_point(result, point).values["dtype"] for point in result.points] == ["float16", "bfloat16"]


@pytest.mark.parametrize(
    ("sizes", "backend", "written_as"),
    [
        ((1, 1, 1), None, None), ((1, 1, 1), "uni", "uni"), ((2, 1, 1), "mp", "mp"), ((2, 1, 1), "ray", "ray"),
        ((2, 1, 1), "external_launcher", "mp"), ((1, 1, 2), "external_launcher", None),
    ],
)  # fmt: skip
def test_torchrun_is_needed_by_nobody_else(sizes: Any, backend: str | None, written_as: str | None) -> None:
    found = setting_of(sizes=sizes, config={"distributed_executor_backend": backend})
    assert found.values.get("distributed_executor_backend") == written_as
    assert any("torchrun" in note for note in found.notes) == (backend == "external_launcher")


def test_what_a_value_says_more_than_itself_is_written_too() -> None:
    config = {"enforce_eager": True, "trust_remote_code": True, "max_model_len": -1}
    found = setting_of(config=config, engine={"language_model_only": True})
    assert (found.values["enforce_eager"], found.values["trust_remote_code"]) == (True, True)
    assert (found.values["language_model_only"], found.values["max_model_len"]) == (True, 4096)
    assert "language_model_only" in found.why


@pytest.mark.parametrize(("model", "written_as"), [("~/m", "/home/me/m"), ("~no.such/m", "~no.such/m"), ("m~", "m~")])
def test_a_home_is_the_one_of_whoever_analyses(model: str, written_as: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert setting_of(config={"model": model}).values["model"] == written_as


def test_dummy_weights_are_for_measuring_alone() -> None:
    found = setting_of(config={"engine_args": ["--load-format", "dummy", "--kv-cache-dtype", "fp8"]})
    assert (found.values["kv_cache_dtype"], "load_format" in found.values) == ("fp8", False)
    assert ["dummy weights" in note for note in found.notes] == [True]
    found = setting_of(config={"engine_args": ["--load-format=runai_streamer"]})
    assert (found.values["load_format"], found.notes) == ("runai_streamer", [])


def test_no_secret_is_written_and_its_place_is_named(tmp_path: Path) -> None:
    # As a file of an earlier version may hold them.
    words = ["--hf-token", "hf_hushhushhush", "--model-loader-extra-config", '{"token": "hushhush", "x": 1}']
    result = grid("tp_1", {(1, 64): 1}, config={"engine_args": words, "model": "https://me:hushhush@host/model"})
    to_use = written([result], tmp_path)
    texts = [path.read_text() for path in to_use.files] + to_use.section.lines
    assert not [text for text in texts if "hush" in text]
    config = (tmp_path / "best" / "vllm_config.yaml").read_text()
    assert 'hf-token: "<hf_token>"\n' in config
    for name in ("<hf_token>", "<token>", "<login>"):
        assert (
            f"# {name} stands for a secret, which is never written to a file: put its value in that place.\n" in config
        )
        assert sum(line.startswith(name) for line in to_use.section.lines) == 1


def test_of_a_job_that_the_model_ends_the_point_with_the_winners_limit_is_used(tmp_path: Path) -> None:
    points = [queue(2, workload=WorkloadKey("abc", "eos", "given"), life_s=life_s) for life_s in (2.0, 1.0)]
    for point, limit in zip(points, (1024, 128), strict=True):
        point.max_tokens = limit
    jobs = [job(output_lengths="eos", output=None)]
    found = won([setting("tp_1", *points, jobs=jobs)], tmp_path)
    assert found.max_tokens in (128, 1024)
    assert [found.is_of(point) for point in points] == [found.max_tokens == 1024, found.max_tokens == 128]


def test_replicas_of_experts_are_coupled() -> None:
    words = {"config": {"engine_args": ["--enable-expert-parallel"]}}
    assert setting_of(sizes=(1, 1, 2), **words).is_coupled
    assert not setting_of(sizes=(2, 1, 1), **words).is_coupled
    assert setting_of(sizes=(2, 1, 1), **words).values["enable_expert_parallel"] is True
    assert not setting_of(sizes=(1, 1, 2)).is_coupled


# --- vLLM's flags -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "settings", "unknown"),
    [
        ("--a b --c-d=e --f_g 1 --h 0.5", {"a": "b", "c_d": "e", "f_g": 1, "h": 0.5}, []),
        ("--a --no-b --c", {"a": True, "b": False, "c": True}, []),
        ("--a 1 --a 2", {"a": 2}, []),
        ("--a 007 --b 1e3 --c 1_0", {"a": "007", "b": "1e3", "c": "1_0"}, []),
        ("--d nan --e inf --f -1", {"d": "nan", "e": "inf", "f": -1}, []),
        ("--a b c --d '[1]'", {"a": ["b", "c"], "d": "[1]"}, []),
        ("--a '{\"b\": [1, true]}' --c '{'", {"a": {"b": [1, True]}, "c": "{"}, []),
        ("--kv-cache-memory-bytes 4G --revision 4G", {"kv_cache_memory_bytes": 4 * 2**30, "revision": "4G"}, []),
        ("-q fp8 -O3", {"quantization": "fp8", "optimization_level": 3}, []),
        ("-ep -dcp 2", {"enable_expert_parallel": True, "decode_context_parallel_size": 2}, []),
        ("-O=2 -O 1", {"optimization_level": 1}, []),
        ("-x 1 -zz.a=1 --a 2", {"a": 2}, ["-x", "-zz.a"]),
        ("--a.b-c.d 16k --a.e x --a.f true", {"a": {"b-c": {"d": 16000}, "e": "x", "f": True}}, []),
        ("--a.b+ x,y --a.b+ z -cc.mode 3", {"a": {"b": ["x", "y", "z"]}, "compilation_config": {"mode": 3}}, []),
        ("--a '{\"b\": 1}' --a.c 2", {"a": {"b": 1, "c": 2}}, []),
        ("'--a\": 1}\nimport os' x --A b", {}, ['--a": 1}\nimport os', "--A"]),
        ("x", {}, []),
        ("", {}, []),
        ("--cudagraph-capture-sizes 1 2 4", {"cudagraph_capture_sizes": [1, 2, 4]}, []),
        ("--cudagraph_capture_sizes=8", {"cudagraph_capture_sizes": [8]}, []),
        ("--kv-cache-dtype-skip-layers 0", {"kv_cache_dtype_skip_layers": ["0"]}, []),
        ("--revision 123456", {"revision": "123456"}, []),
    ],
)  # fmt: skip
def test_words_are_read_as_vllm_reads_them(line: str, settings: dict[str, Any], unknown: list[str]) -> None:
    assert settings_of_words(shlex.split(line)) == (settings, unknown)


# --- YAML ---------------------------------------------------------------------------------------------------------

ODD = [
    "meta-llama/Llama-3.1-8B", "/models/a b", "~x", "./x", "../x", "a: b", "a #b", "- a", "'a'", '"a"', "a\\b", "yes",
    "No", "null", "~", "1", "1.0", "1e5", ".5e+3", ".inf", "0x10", "01-ai/Yi", "12:30:45", "<hf_token>", "{a}", "[a]",
    "*a", "&a", "!a", "%a", "@a", "`a", "|", ">", "?", "", " a ", "größe", "模型", "😀", "a\nb", "a\tb", "\x1b[1m",
    "a\u2028b", "a\x85b", "\u202eab", "\ufeffx", "\udcff", "a\x7fb", "=", "<<", "--x", "\u2066x", "x:", "y", "é\u0301",
]  # fmt: skip


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_text_is_read_back_as_it_was(text: str, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    path = tmp_path / "a.yaml"
    path.write_text(yaml_text([text], {"some_name": text, "b": {text: [text]}}, {"b": text}), encoding="utf-8")
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == {"some-name": text, "b": {text: [text]}}
    assert not [line for line in path.read_text(encoding="utf-8").splitlines() if line[:1] not in "#sb"]


def test_names_and_paths_need_no_quotes() -> None:
    plain = ["meta-llama/Llama-3.1-8B", "/models/x", "./x", "../x", "models/tiny-llama", "bfloat16", "fp8"]
    assert [scalar(text) for text in plain] == plain
    assert [scalar(value) for value in (1, 0.8, True, [1, "a"], {"a": None})] == [
        "1", "0.8", "true", '[1, "a"]', '{"a": null}',
    ]  # fmt: skip


# --- the files ----------------------------------------------------------------------------------------------------


def test_a_file_for_vllm_serve_says_what_it_is_of(tmp_path: Path) -> None:
    result = grid("dp_2", {(64, 512): 1}, (1, 1, 2), engine=GRAPHS)
    to_use = written([result], tmp_path)
    assert (tmp_path / "best" / "vllm_config.yaml").read_text() == textwrap.dedent(f"""\
        # {MARK}
        # dp_2, 64 at once on each of 2 replicas: best throughput at length 512.
        # Measured with vLLM 0.32.0 in dp_2_results.json.
        # This is one replica; the command says how many there are.
        model: meta-llama/Llama-2-7b-chat-hf
        tensor-parallel-size: 1
        pipeline-parallel-size: 1
        # the longest prompt and output that were measured; raise it for longer requests
        max-model-len: 4096
        # requests at once, as at the best point
        max-num-seqs: 64
        # what vLLM's LLM class chose, as measured; its server may choose another value
        max-num-batched-tokens: 8192
        dtype: bfloat16
        gpu-memory-utilization: 0.8
        # the measured engine was loaded for 256 requests at once, with CUDA graphs for these; with graphs for
        # 64 alone it may be slower
        max-cudagraph-capture-size: 512
        """)
    assert [path.name for path in to_use.files] == ["vllm_config.yaml", "run.py"]
    config = str(tmp_path / "best" / "vllm_config.yaml")
    assert to_use.section == Section(
        "To use",
        [("setting", "dp_2, 64 at once on each of 2 replicas"), ("because", "best throughput at length 512")],
        commands=[
            ["python", str(tmp_path / "best" / "run.py"), "requests.jsonl", "answers.jsonl"],
            [
                "vllm",
                "run-batch",
                "-i",
                "requests.jsonl",
                "-o",
                "answers.jsonl",
                "--config",
                config,
                "--data-parallel-size",
                "2",
            ],
            ["vllm", "serve", "--config", config, "--data-parallel-size", "2"],
        ],
    )


def test_a_suspect_winner_is_marked(tmp_path: Path) -> None:
    section = written([make_result("tp_1", [make_point(4, 64, verdict="suspect")])], tmp_path).section
    assert section.pairs[0] == ("setting", "tp_1, 4 at once*")
    assert section.lines == ["* suspect: see below, and do not rely on it alone."]


def test_what_an_earlier_analysis_wrote_goes_and_what_others_wrote_stays(tmp_path: Path) -> None:
    best = tmp_path / "best"
    over_nodes = grid("tp_2_nodes_2", {(4, 64): 1}, (2, 1, 1), config={"nnodes": 2})
    to_use = written([over_nodes], tmp_path)
    assert [path.name for path in to_use.files] == ["vllm_config.yaml", "ray_data.py"]
    assert [words[1] for words in to_use.section.commands] == [str(best / "ray_data.py"), "serve"]
    assert to_use.section.commands[1][-6:] == ["--nnodes", "2", "--node-rank", "0", "--master-addr", "ADDRESS"]
    assert "'distributed_executor_backend'" not in (text := (best / "ray_data.py").read_text())
    assert '"distributed_executor_backend": "ray",' in text
    (best / "notes.txt").write_text("mine")
    written([grid("tp_2_nodes_2", {(4, 64): 1})], tmp_path)
    assert sorted(path.name for path in best.iterdir()) == ["notes.txt", "run.py", "vllm_config.yaml"]
    (best / "run.py").write_text("print('my own')")
    to_use = written([grid("tp_2_nodes_2", {(4, 64): 1})], tmp_path)
    assert (best / "run.py").read_text() == "print('my own')"
    assert to_use.files == [best / "vllm_config.yaml"]
    assert to_use.section.lines == [f"run.py in {best} was not written by this program and was left as it is."]
    assert [words[:2] for words in to_use.section.commands] == [["vllm", "run-batch"], ["vllm", "serve"]]
    (best / "vllm_config.yaml").write_text("port: 1")
    to_use = written([grid("tp_2_nodes_2", {(4, 64): 1})], tmp_path)
    assert (to_use.files, to_use.section.commands) == ([], [])
    (best / "vllm_config.yaml").unlink()
    written([grid("tp_2_nodes_2", {(4, 64): 1})], tmp_path)
    none = analysed([make_result("tp_2_nodes_2", [make_point(1, 64, verdict="invalid")])], tmp_path / "in")
    assert write_to_use(none, "throughput", best) is None
    assert sorted(path.name for path in best.iterdir()) == ["notes.txt", "run.py"]


def test_a_file_that_is_gone_since_it_was_read_is_no_winner(tmp_path: Path) -> None:
    analysis = analysed([grid("tp_1", {(1, 64): 1})], tmp_path)
    (tmp_path / "tp_1_results.json").unlink()
    assert write_to_use(analysis, "throughput", tmp_path / "best") is None
    assert not (tmp_path / "best").exists()


def in_bash(command: str) -> list[str]:
    """The words that a shell makes of it."""
    said = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    return said.stdout.splitlines()


def test_a_command_can_be_copied_from_everywhere(tmp_path: Path) -> None:
    folder = tmp_path / "it's <a> folder"
    result = grid("dp_2", {(64, 512): 1}, (1, 1, 2))
    to_use = write_to_use(analysed([result], tmp_path), "throughput", folder)
    assert to_use
    words = ["python", str(folder / "run.py"), "requests.jsonl", "answers.jsonl"]
    shown = as_text([to_use.section]).partition("  python ")
    assert in_bash(f"{shown[1]}{shown[2]}".partition("\n  vllm run-batch")[0]) == words
    block = as_markdown([to_use.section], [], []).partition("```bash\n")[2].partition("\n```")[0]
    assert in_bash(block.splitlines()[0]) == words
    page = as_html([to_use.section], analysed([result], tmp_path).points, [], [])
    block = page.partition("<pre>")[2].partition("</pre>")[0]
    assert "<a>" not in block
    assert in_bash(unescape(re.sub("</?span>", "", block))) == words


def test_a_long_command_fits_a_terminal() -> None:
    words = ["vllm", *(f"--flag-{number}" for number in range(20))]
    lines = as_text([Section("T", commands=[words])]).splitlines()[1:]
    assert max(map(len, lines)) <= 80
    assert in_bash("\n".join(lines)) == words


@pytest.mark.slow
def test_the_program_writes_them_beside_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_all([grid("tp_1", {(1, 64): 1, (4, 64): 2}), grid("tp_2", {(1, 64): 0.5}, (2, 1, 1))], tmp_path)
    for words, folder, at_once in (
        (["--input", str(tmp_path)], tmp_path / "best", 4),
        (["--input", str(tmp_path), "--goal", "latency"], tmp_path / "best", 1),
        (["--input", str(tmp_path / "tp_1_results.json")], tmp_path / "best_tp_1", 4),
        (["--input", str(tmp_path), "--output-dir", str(tmp_path / "out")], tmp_path / "out" / "best", 4),
    ):
        assert analyze_results.main([*words, "--no-plots"]) == 0
        assert f"max-num-seqs: {at_once}\n" in (folder / "vllm_config.yaml").read_text()
        assert str(folder / "run.py") in capsys.readouterr().out
        assert not [path for path in folder.iterdir() if path.suffix == ".json"]


def test_the_summary_has_it_for_scripts(tmp_path: Path) -> None:
    save_all([grid("dp_2", {(4, 64): 1}, (1, 1, 2))], tmp_path)
    assert analyze_results.main(["--input", str(tmp_path), "--no-plots"]) == 0
    assert json.loads((tmp_path / "analysis" / "summary.json").read_text())["to_use"] == {
        "setting": "dp_2", "because": "best throughput at length 64", "max_num_seqs": 4, "replicas": 2,
        "devices_per_replica": 1, "replicas_in_time": None,
        "files": [str(tmp_path / "best" / name) for name in ("vllm_config.yaml", "run.py")],
    }  # fmt: skip


def test_a_folder_whose_name_is_no_text_is_a_folder(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/\xff\n"))
    analysis = analysed([grid("dp_2", {(4, 64): 1}, (1, 1, 2))], folder)
    to_use = write_to_use(analysis, "throughput", folder / "best")
    assert to_use
    assert "run.py" in write_report(analysis, [], folder, (), to_use)
    assert (folder / "best" / "run.py").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_all([grid("tp_1", {(1, 64): 1})], tmp_path)
    (tmp_path / "best").write_text("a file of somebody")
    assert analyze_results.main(["--input", str(tmp_path), "--no-plots"]) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert str(tmp_path / "best") in told.err


def test_on_a_cpu_vllms_command_is_not_needed(tmp_path: Path) -> None:
    cpu = {"device_kind": "cpu", "devices": [{"name": "a CPU", "cores": cores} for cores in ("0,1", "2,3")]}
    section = written([grid("dp_2", {(4, 64): 1}, (1, 1, 2), environment=cpu)], tmp_path).section
    config = str(tmp_path / "best" / "vllm_config.yaml")
    bind = "VLLM_CPU_OMP_THREADS_BIND='0,1|2,3'"
    assert section.commands == [
        ["python", str(tmp_path / "best" / "run.py"), "requests.jsonl", "answers.jsonl"],
        [
            bind, "python", "-m", "vllm.entrypoints.openai.run_batch", "-i", "requests.jsonl", "-o", "answers.jsonl",
            "--config", config, "--data-parallel-size", "2",
        ],
        [bind, "python", "-m", "vllm.entrypoints.openai.api_server", "--config", config, "--data-parallel-size", "2"],
    ]  # fmt: skip
    assert section.lines[-1].startswith("The lines with python -m do what vllm serve and vllm run-batch do: ")


# --- run.py -------------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "hi"}]


def run(
    result: Result, requests: Sequence[Any], tmp_path: Path, **variables: str
) -> tuple[subprocess.CompletedProcess[str], list[Any]]:
    """run.py of this result on the stub, and its answers."""
    written([result], tmp_path)
    (tmp_path / "requests.jsonl").write_text("".join(f"{json.dumps(request)}\n" for request in requests))
    command = [sys.executable, "best/run.py", "requests.jsonl", "answers.jsonl"]
    # Each line in one piece, whoever else prints.
    environment = stub_environment(PYTHONUNBUFFERED="", **variables)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=50)
    answers = tmp_path / "answers.jsonl"
    return done, [json.loads(line) for line in answers.read_text().splitlines()] if answers.exists() else []


def names_of(folder: Path) -> dict[str, Any]:
    """What run.py defines, without running it."""
    space: dict[str, Any] = {"__name__": "read"}
    exec(compile((folder / "run.py").read_text(), "run.py", "exec"), space)
    return space


def loaded(done: subprocess.CompletedProcess[str], name: str) -> list[str]:
    """What the variable was in each engine."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("stub vLLM is loading")]
    variables = [dict(word.split("=", 1) for word in shlex.split(line)[4:]) for line in lines]
    return sorted(found[name] for found in variables if name in found)


def told_at_the_end(done: subprocess.CompletedProcess[str]) -> str:
    """The last line, with the time and the rate as T and R."""
    last = done.stderr.splitlines()[-1]
    return re.sub(r"in [\d,]+\.\d s \([\d,]+ tok/s\)", "in T s (R tok/s)", last)


def test_requests_of_every_kind_are_answered(tmp_path: Path) -> None:
    requests = [
        {"prompt": "ab"},
        {"prompt_token_ids": [5, 6, 7], "output_tokens": 3},
        {"custom_id": "x", "body": {"prompt": "c", "max_tokens": 2}},
        {"prompt": [1, 2], "max_tokens": 1},
        {"messages": CHAT, "max_tokens": 4},
        {"prompt": "d"},
    ]
    done, answers = run(grid("tp_2", {(4, 64): 1}, (2, 1, 1)), requests, tmp_path)
    assert done.returncode == 0, done.stderr
    assert answers == [
        {"index": 0, "custom_id": None, "text": "2 for [97, 98]", "output_tokens": 2, "finish_reason": "stop"},
        {"index": 1, "custom_id": None, "text": "3 for [5, 6, 7]", "output_tokens": 3, "finish_reason": "length"},
        {"index": 2, "custom_id": "x", "text": "2 for [99]", "output_tokens": 2, "finish_reason": "length"},
        {"index": 3, "custom_id": None, "text": "1 for [1, 2]", "output_tokens": 1, "finish_reason": "length"},
        {"index": 4, "custom_id": None, "text": "4 for [104, 105]", "output_tokens": 4, "finish_reason": "length"},
        {"index": 5, "custom_id": None, "text": "32 for [100]", "output_tokens": 32, "finish_reason": "length"},
    ]
    assert told_at_the_end(done) == (
        "answers.jsonl: 6 of 6 requests answered, 44 output tokens in T s (R tok/s), 1 ended by itself"
    )
    assert loaded(done, "CUDA_VISIBLE_DEVICES") == ["0,1"]


@pytest.mark.parametrize("sizes", [(1, 1, 1), pytest.param((1, 1, 2), marks=pytest.mark.slow)], ids=["one", "replicas"])
def test_a_request_that_is_refused_takes_no_other_along(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    requests = [{"prompt": text, "max_tokens": 1, "custom_id": text[0]} for text in ("a", "b", "c" * 4096, "d")]
    done, answers = run(grid("s", {(4, 64): 1}, sizes), requests, tmp_path)
    assert done.returncode == 1
    assert told_at_the_end(done) == (
        "answers.jsonl: 3 of 4 requests answered, 3 output tokens in T s (R tok/s), 0 ended by themselves, "
        '1 failed: see "error"'
    )
    assert [answer.get("text") for answer in answers] == ["1 for [97]", "1 for [98]", None, "1 for [100]"]
    error = "the prompt has 4096 tokens, and max_model_len is 4096"
    assert answers[2] == {"index": 2, "custom_id": "c", "error": error}


def test_an_engine_that_dies_refuses_nobody(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"index": 0, "text": "of an earlier run"}\n')
    os.utime(tmp_path / "answers.jsonl", (1, 1))
    died_before = run(grid("s", {(4, 64): 1}), [{"prompt": "a"}], tmp_path, STUB_FAIL="load")
    assert died_before[0].stderr.splitlines()[-1] == "the engine failed or was stopped; answered so far: nothing"
    assert died_before[1]
    done, answers = run(grid("s", {(4, 64): 1}), [{"prompt": "a"}], tmp_path, STUB_FAIL="dies")
    assert (done.returncode, answers) == (1, [])
    *_, error, last = done.stderr.splitlines()
    assert "EngineDeadError" in error
    assert last == "the engine failed or was stopped; answered so far: nothing"


@pytest.mark.parametrize("sizes", [(1, 1, 1), pytest.param((1, 1, 2), marks=pytest.mark.slow)], ids=["one", "replicas"])
def test_the_time_is_that_of_the_requests_without_the_start_of_the_engine(
    sizes: tuple[int, int, int], tmp_path: Path
) -> None:
    """One engine makes 104 tokens, one after another; each of two makes 52."""
    began = time.monotonic()
    requests = [{"prompt": "b", "max_tokens": 50}] * 4
    done, _ = run(grid("s", {(1, 64): 1}, sizes), requests, tmp_path, STUB_STEP_S="0.01", STUB_LOAD_S="1")
    took_s = time.monotonic() - began
    found = re.search(r": 4 of 4 .* 104 output tokens in ([\d.]+) s", done.stderr.splitlines()[-1])
    assert found, done.stderr
    assert 1.0 / sizes[2] <= float(found[1]) < took_s - 0.9


def test_who_is_ended_ends_the_replicas_too(tmp_path: Path) -> None:
    written([grid("tp_1", {(1, 64): 1})], tmp_path)
    (tmp_path / "requests.jsonl").write_text('{"prompt": "a"}\n')
    command = [sys.executable, "best/run.py", "requests.jsonl", "answers.jsonl"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=stub_environment(STUB_LOAD_S="60"), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline().startswith("stub vLLM is loading")
    process.terminate()
    # Its output ends when nobody is left who could write to it.
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    assert errors.splitlines()[-1] == "the engine failed or was stopped; answered so far: nothing"


@pytest.mark.slow
@pytest.mark.parametrize("engine_args", [[], ["--enable-expert-parallel"]], ids=["independent", "coupled"])
def test_replicas_share_the_requests_and_the_devices(engine_args: list[str], tmp_path: Path) -> None:
    """64 of each are submitted together; the last two are too few for all."""
    requests = [
        {"messages": [{"role": "user", "content": chr(number + 1)}], "max_completion_tokens": 1}
        for number in range(194)
    ]
    result = grid("dp_3", {(1, 64): 1}, (2, 1, 3), config={"engine_args": engine_args})
    done, answers = run(result, requests, tmp_path, CUDA_VISIBLE_DEVICES="7,6,5,4,3,2")
    assert done.returncode == 0, done.stderr
    found = [(answer["index"], answer["text"]) for answer in answers]
    assert found == [(number, f"1 for [{number + 1}]") for number in range(194)]
    assert loaded(done, "CUDA_VISIBLE_DEVICES") == ["3,2", "5,4", "7,6"]
    assert len(set(loaded(done, "VLLM_PORT"))) == 3
    coupled = [[], [], []] if not engine_args else [["3"] * 3, ["0", "1", "2"], ["0"] * 3]
    assert [loaded(done, f"VLLM_DP_{name}") for name in ("SIZE", "RANK", "RANK_LOCAL")] == coupled
    # Each coupled replica submits as often as the others: one has no request among the last two, and makes one up.
    assert done.stdout.count("\nprompts ") + done.stdout.startswith("prompts ") == (6 if engine_args else 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "best", "in", "requests.jsonl"]


@pytest.mark.slow
def test_on_a_cpu_replicas_have_cores_of_their_own(tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two replicas need two cores")
    cpu = {"device_kind": "cpu", "devices": [{"name": "a CPU"}] * 2}
    done, answers = run(grid("dp_2", {(4, 64): 1}, (1, 1, 2), environment=cpu), [{"prompt": "a"}] * 3, tmp_path)
    assert (done.returncode, len(answers)) == (0, 3), done.stderr
    one, two = loaded(done, "VLLM_CPU_OMP_THREADS_BIND")
    assert not set(one.split(",")) & set(two.split(","))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt_tokens": 5}', "requests.jsonl, line 2: is no request with prompt, prompt_token_ids or messages"),
        ("[1]", "requests.jsonl, line 2: is no request with prompt, prompt_token_ids or messages"),
        ("{", "requests.jsonl, line 2: is no request with prompt, prompt_token_ids or messages"),
    ],
)  # fmt: skip
def test_a_bad_request_is_named_before_an_engine_loads(line: str, told: str, tmp_path: Path) -> None:
    written([grid("dp_2", {(4, 64): 1}, (1, 1, 2))], tmp_path)
    (tmp_path / "requests.jsonl").write_text(f'{{"prompt": "a"}}\n{line}\n')
    assert_refused(["requests.jsonl", "answers.jsonl"], told, tmp_path)


def assert_refused(arguments: list[str], told: str, folder: Path) -> None:
    """run.py, before an engine loads."""
    command = [sys.executable, "best/run.py", *arguments]
    done = subprocess.run(command, cwd=folder, env=stub_environment(), capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{told}\n")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--help"], "usage: python best/run.py REQUESTS.jsonl ANSWERS.jsonl"),
        (["good", "answers", "1"], "usage: python best/run.py REQUESTS.jsonl ANSWERS.jsonl"),
        (["no", "answers"], "no: cannot be read: No such file or directory"),
        (["best", "answers"], "best: cannot be read: Is a directory"),
        (["latin", "answers"], "latin: is no text in UTF-8"),
        (["empty", "answers"], "empty: holds no requests"),
        (["good", "no/answers"], "no/answers: its folder does not exist; create it first"),
        (["good", "best"], "best: is a folder; give a file for the answers"),
        (["good", "link"], "link: holds the requests; give another file for the answers"),
    ],
)
def test_wrong_use_is_said_in_one_line_before_an_engine_loads(arguments: list[str], told: str, tmp_path: Path) -> None:
    written([grid("tp_1", {(4, 64): 1})], tmp_path)
    (tmp_path / "good").write_text('{"prompt": "a"}\n')
    (tmp_path / "link").symlink_to("good")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "latin").write_bytes('{"prompt": "ä"}\n'.encode("latin-1"))
    assert_refused(arguments, told, tmp_path)
    assert (tmp_path / "good").read_text() == '{"prompt": "a"}\n'


def test_a_request_for_no_tokens_is_left_to_vllm_to_refuse(tmp_path: Path) -> None:
    written([grid("tp_1", {(4, 64): 1})], tmp_path)
    space = names_of(tmp_path / "best")
    limits = [space["request"](line, "line 1")[1] for line in ('{"prompt": "a", "max_tokens": 0}', '{"prompt": "a"}')]
    assert limits == [0, space["SAMPLING"]["max_tokens"]]


@pytest.mark.slow
def test_a_replica_that_fails_loses_no_answers_of_the_others(tmp_path: Path) -> None:
    requests = [{"prompt": "a"}] * 3
    done, answers = run(grid("dp_2", {(4, 64): 1}, (1, 1, 2)), requests, tmp_path, STUB_FAIL="run:1")
    assert (done.returncode, answers) == (1, [])
    assert done.stderr.splitlines()[-1] == (
        "1 of 2 replicas failed or were stopped; answered so far: answers.jsonl.part_0"
    )
    assert len((tmp_path / "answers.jsonl.part_0").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
def test_what_was_answered_before_a_ctrl_c_is_kept_and_named(replicas: int, tmp_path: Path) -> None:
    """Each replica answers 64 requests at a time; of the others none is begun."""
    written([grid(f"dp_{replicas}", {(1, 64): 1}, (1, 1, replicas))], tmp_path)
    (tmp_path / "requests.jsonl").write_text('{"prompt": "a"}\n' * 200 * replicas)
    environment = stub_environment(STUB_STEP_S="0.002")
    command = [sys.executable, "best/run.py", "requests.jsonl", "answers.jsonl"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    names = ["answers.jsonl"] if replicas == 1 else ["answers.jsonl.part_0", "answers.jsonl.part_1"]
    while not all((tmp_path / name).exists() and (tmp_path / name).stat().st_size for name in names):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    why = "the engine failed or was stopped" if replicas == 1 else "2 of 2 replicas failed or were stopped"
    # Python's own tracker of the replicas' resources may warn after that.
    assert f"{why}; answered so far: {', '.join(names)}" in errors.splitlines()
    kept = [json.loads(line)["index"] for name in names for line in (tmp_path / name).read_text().splitlines()]
    assert kept
    assert len(kept) < 200 * replicas


def test_too_few_devices_are_said(tmp_path: Path) -> None:
    done, _ = run(grid("dp_2", {(4, 64): 1}, (2, 1, 2)), [{"prompt": "a"}], tmp_path, CUDA_VISIBLE_DEVICES="0,1")
    assert (done.returncode, done.stderr) == (1, "CUDA_VISIBLE_DEVICES=0,1: 4 GPUs are needed\n")


def test_odd_names_are_words_and_never_code(tmp_path: Path) -> None:
    model = "/m/it's \"a\" \\ model\u202e'); import os #"
    words = ["--revision", "'''\"\"\"\n", '--x": __import__("os").abort(), "y', "1", "--quantization", "a'b"]
    written([grid("tp_1", {(4, 64): 1}, config={"model": model, "engine_args": words})], tmp_path)
    engine = names_of(tmp_path / "best")["ENGINE"]
    assert (engine["model"], engine["revision"], engine["quantization"]) == (model, "'''\"\"\"\n", "a'b")
    assert not [name for name in engine if not name.isidentifier()]


def asked_of(model: str) -> list[Any]:
    """Three chats that fit, and one that does not."""
    texts = ["What is rain?", "Name a colour.", "word " * 300, "Say yes."]
    bodies = [{"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 5} for text in texts]
    return [
        {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}
        for number, body in enumerate(bodies)
    ]


@pytest.mark.vllm
@pytest.mark.parametrize("replicas", [1, 2])
def test_real_engines_answer_by_what_was_written(replicas: int, real_model: str, tmp_path: Path) -> None:
    """run.py, and vLLM's own programs with the file: each answers three of four."""
    if len(find_devices()) < replicas:
        pytest.skip(f"needs {replicas} devices")
    kind = find_devices().kind
    result = grid(
        "s", {(4, 64): 1}, (1, 1, replicas),
        config={"model": real_model, "engine_args": ["--kv-cache-memory-bytes", "64M"], "enforce_eager": True},
        engine={"max_model_len": 96, "gpu_memory_utilization": 0.2},
        environment={"device_kind": kind, "devices": [{"name": "one", "cores": cores} for cores in cores_of(replicas)]},
    )  # fmt: skip
    run_py, run_batch, serve = written([result], tmp_path).section.commands
    (tmp_path / "requests.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in asked_of(real_model)))

    assert [answer.get("output_tokens", 0) > 0 for answer in answers_of(run_py, 1, tmp_path)] == [
        True,
        True,
        False,
        True,
    ]
    found = {answer["custom_id"]: answer["error"] for answer in answers_of(run_batch, 0, tmp_path)}
    assert {custom_id for custom_id, error in found.items() if error} == {"2"}
    assert len(found) == 4
    assert 1 <= served_tokens([*serve, "--port", str(free_ports(1))], real_model, tmp_path) <= 5


def cores_of(replicas: int) -> list[str | None]:
    devices = find_devices()
    return [cores if devices.kind == "cpu" else None for cores in devices.ids[:replicas]]


def in_a_shell(command: Sequence[str]) -> list[str]:
    """With the programs of the environment that runs the tests."""
    path = shlex.quote(str(Path(sys.executable).parent))
    return ["bash", "-c", f'PATH={path}:"$PATH"; exec env {" ".join(command)}']


def answers_of(command: Sequence[str], returncode: int, folder: Path) -> list[Any]:
    done = subprocess.run(in_a_shell(command), cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == returncode, done.stderr[-5000:]
    lines = (folder / "answers.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def served_tokens(command: Sequence[str], model: str, folder: Path) -> int:
    """How many tokens the server answers a completion with; then it is ended."""
    url = f"http://127.0.0.1:{command[-1]}"
    body = json.dumps({"model": model, "prompt": "The sea is", "max_tokens": 5}).encode()
    asked = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(in_a_shell(command), cwd=folder, stdout=log, stderr=log)
        try:
            while server.poll() is None:
                try:
                    with urllib.request.urlopen(asked, timeout=60) as answer:
                        tokens: int = json.load(answer)["usage"]["completion_tokens"]
                        return tokens
                except urllib.error.URLError:  # it does not listen yet
                    time.sleep(1)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=60)
    pytest.fail((folder / "server.log").read_text()[-5000:])


# --- ray_data.py --------------------------------------------------------------------------------------------------


def for_a_deadline(tmp_path: Path, **config: Any) -> Path:
    result = setting("tp_2", queue(2), sizes=(2, 1, 1), engine={"max_num_seqs": 2}, config=config)
    to_use = written([result], tmp_path, job=JobQuestion(deadline_h=100 / 3600))
    assert [path.name for path in to_use.files] == ["vllm_config.yaml", "run.py", "ray_data.py"]
    assert (
        "deadline",
        "met by 3 replicas, so 6 devices, as in ray_data.py; the other commands start 1",
    ) in to_use.section.pairs
    # The one that has three replicas.
    assert [Path(words[1]).name for words in to_use.section.commands[:2]] == ["ray_data.py", "run.py"]
    why = "the fewest devices for the deadline, for the job of 480 requests"
    assert to_use.runs == f"This runs tp_2, 2 at once on each of 3 replicas ({why}):"
    return tmp_path / "best" / "ray_data.py"


def module_of(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("ray_data_of_a_test", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("build", "template"), [("build_processor", "chat_template_stage"), ("build_llm_processor", "apply_chat_template")]
)
def test_ray_gets_what_was_found_whatever_it_calls_it(
    build: str, template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    newer = {"should_continue_on_error": True, "log_engine_metrics": False} if build == "build_processor" else {}
    end = "_stage" if build == "build_processor" else ""

    class Config(SimpleNamespace):
        model_fields = {template: None, **newer}  # noqa: RUF012

    def builds(config: Any, **how: Callable[[Any], Any]) -> Any:
        made.append((vars(config), how))
        return "processor"

    ray, data = ModuleType("ray"), ModuleType("ray.data")
    data.llm = SimpleNamespace(vLLMEngineProcessorConfig=Config, **{build: builds})  # type: ignore[attr-defined]
    ray.data = data  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", data)
    script = module_of(for_a_deadline(tmp_path))
    assert script.make_processor(is_chat=True) == "processor"
    ((config, how),) = made
    assert config.pop("engine_kwargs") == script.ENGINE
    assert script.ENGINE["tensor_parallel_size"] == 2
    assert config == {
        "model_source": "meta-llama/Llama-2-7b-chat-hf", "concurrency": (3, 3), "batch_size": 1,
        "max_concurrent_batches": 8, template: True, **newer,
        # vLLM's own work, for which Ray would want more cores than there may be.
        f"tokenize{end}": False, f"detokenize{end}": False,
    }  # fmt: skip
    sampling = {"temperature": 0.8, "top_p": 0.95, "max_tokens": 32}
    assert how["preprocess"]({"prompt": "a", "output_tokens": 5}) == {
        "custom_id": None,
        "prompt": "a",
        "sampling_params": sampling | {"max_tokens": 5},
    }
    assert how["preprocess"]({"body": {"messages": CHAT}, "custom_id": "x"}) == {
        "custom_id": "x",
        "messages": CHAT,
        "sampling_params": sampling,
    }
    answer = how["postprocess"]({"generated_text": "b", "custom_id": 7})
    assert script.readable(answer) == {"custom_id": 7, "text": "b", "error": None}
    refused = {"prompt": "long", "custom_id": 8, "generated_text": None, "__inference_error__": "too long"}
    assert script.readable(refused) == {"custom_id": 8, "text": None, "error": "too long"}


def test_coupled_replicas_are_none_of_rays(tmp_path: Path) -> None:
    result = setting(
        "dp_2_ep", queue(2, replicas=2), sizes=(1, 1, 2), config={"engine_args": ["--enable-expert-parallel"]}
    )
    to_use = written([result], tmp_path, job=JobQuestion(deadline_h=1))
    assert [path.name for path in to_use.files] == ["vllm_config.yaml", "run.py"]
    assert to_use.section.pairs[-1] == ("deadline", "met by 2 replicas, so 2 devices")
    assert Path(to_use.section.commands[0][1]).name == "run.py"
    assert to_use.runs.startswith("This runs dp_2_ep, 2 at once on each of 2 replicas (")


@pytest.mark.vllm
def test_the_real_ray_builds_the_processor(tmp_path: Path) -> None:
    python = os.environ.get("RAY_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import ray.data.llm"], capture_output=True).returncode:
        pytest.skip("Ray Data is not installed: pip install 'ray[data]', or RAY_PYTHON=/of/an/environment/python")
    path = for_a_deadline(tmp_path, model=str(REPOSITORY / "models" / "tiny-llama"))
    program = (
        "import ray_data\nprocessor = ray_data.make_processor(is_chat=True)\n"
        "print(type(processor).__name__, *processor.list_stage_names())"
    )
    done = subprocess.run([python, "-c", program], cwd=path.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    name, *stages = done.stdout.splitlines()[-1].split()
    assert name == "Processor"
    assert [stage for stage in stages if "vLLMEngineStage" in stage]
    assert not [stage for stage in stages if "okenize" in stage]


# --- vLLM's own parser --------------------------------------------------------------------------------------------

PARSES = """
import json, sys
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
for path in sys.argv[1:]:
    found = []
    for kind in (EngineArgs, AsyncEngineArgs):
        given = kind.add_cli_args(FlexibleArgumentParser()).parse_args(["--config", path])
        found.append(kind.from_cli_args(given))
    names = {line.partition(":")[0].replace("-", "_") for line in open(path) if line[0] != "#"}
    values = [{name: getattr(made, name) for name in sorted(names)} for made in found]
    assert values[0] == values[1]
    print("FOUND", json.dumps(values[0], default=vars))
"""


@pytest.mark.vllm
def test_vllms_own_parser_takes_the_file_and_says_the_same(tmp_path: Path) -> None:
    words = shlex.split(
        "--kv-cache-dtype fp8 --kv-cache-memory-bytes 4G --no-async-scheduling --hf-overrides '{\"a\": [1, true]}' "
        "-q fp8 --served-model-name a 'b c' --revision 007 --enable-expert-parallel --hf-token hf_hushhush"
    )
    settings = []
    for number, changes in enumerate(
        (
            {"engine": GRAPHS},
            {"config": {"engine_args": words, "enforce_eager": True, "trust_remote_code": True}, "engine": GRAPHS},
            {
                "config": {
                    "model": '/models/it\'s "a" model: 模型 #1',
                    "distributed_executor_backend": "external_launcher",
                }
            },
        )
    ):
        folder = tmp_path / str(number)
        written([grid("tp_2", {(64, 512): 1}, (2, 1, 1), **changes)], folder)
        settings.append(folder / "best")
    paths = [str(folder / "vllm_config.yaml") for folder in settings]
    done = subprocess.run([sys.executable, "-c", PARSES, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line.removeprefix("FOUND")) for line in done.stdout.splitlines() if line.startswith("FOUND")]
    for folder, values in zip(settings, found, strict=True):
        # run.py gives the same to LLM.
        assert values == names_of(folder)["ENGINE"]
    assert [values.get("max_cudagraph_capture_size") for values in found] == [512, 512, None]
    assert (found[1]["kv_cache_memory_bytes"], found[1]["hf_token"]) == (4 * 2**30, "<hf_token>")
