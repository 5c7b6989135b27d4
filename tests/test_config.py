from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from batch_inference.core import values
from batch_inference.core.config import ConfigError, ExperimentConfig, as_compared
from batch_inference.core.flags import (
    build_parser,
    owned_by_us,
    parse_flags,
    unknown_flag_message,
    without_plan_flags,
)
from batch_inference.core.text import has_control
from batch_inference.core.values import (
    AUTO_LENGTH,
    fraction,
    interval,
    port,
    run_count,
    seconds,
    seed,
    temperature,
    token_length,
    tokens_per_step,
)
from conftest import REPOSITORY

GOLDEN = REPOSITORY / "tests" / "golden"


# A file is not looked at before all flags are.
JOB = ("--prompts-file", "no_such_file.jsonl")


def test_defaults_are_those_of_the_readme() -> None:
    config, notes = parse_flags([])
    assert config == ExperimentConfig()
    assert config.model == "meta-llama/Llama-2-7b-chat-hf"
    assert config.batch_sizes == (1, 4, 8, 16)
    assert config.seq_lens == (512, 1024, 2048)
    assert (config.max_tokens, config.temperature, config.top_p) == (128, 0.8, 0.95)
    assert (config.gpu_memory_utilization, config.trust_remote_code) == (0.8, False)
    assert (config.num_runs, config.target_ci, config.max_runs, config.warmup_runs) == (None, 0.02, 10, 1)
    assert notes == []


@pytest.mark.parametrize(
    ("argv", "fewest", "words"),
    [([], 3, "3 to 10"), (["--max-runs", "20"], 3, "3 to 20"), (["--num-runs", "1"], 1, "1")],
)
def test_the_number_of_runs_is_exact_or_has_bounds(argv: list[str], fewest: int, words: str) -> None:
    config, _ = parse_flags(argv)
    assert (config.fewest_runs, config.runs_in_words) == (fewest, words)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--batch-sizes", "0"], "--batch-sizes: '0'"),
        (["--batch-sizes", "1,-4"], "--batch-sizes: '1,-4'"),
        (["--batch-sizes", "1,four"], "--batch-sizes: '1,four'"),
        (["--batch-sizes", ""], "--batch-sizes: ''"),
        (["--batch-sizes", "1,,2"], "--batch-sizes: '1,,2'"),
        (["--batch-sizes"], "--batch-sizes"),
        (["--batch-sizes", "1", "4"], "'4' is not a flag"),
        (["--seq-lens", "1.5"], "--seq-lens: '1.5'"),
        (["--max-tokens", "0"], "--max-tokens: '0'"),
        (["--num-runs", "-1"], "--num-runs: '-1'"),
        (["--num-runs", "0"], "--num-runs: '0'"),
        (["--target-ci", "2"], "--target-ci: '2' was given; a fraction above 0 and up to 1 is needed, like 0.02"),
        (["--target-ci", "2%"], "--target-ci: '2%'"),
        (["--target-ci", "0"], "--target-ci: '0'"),
        (["--max-runs", "2"], "--max-runs 2: at least 3 runs are made; raise it, or give --num-runs 2"),
        (["--num-runs", "5", "--max-runs", "7"], "--num-runs 5 means exactly 5 runs, whatever --max-runs 7 says"),
        (["--num-runs", "5", "--target-ci", "0.1"], "whatever --target-ci 0.1 says"),
        (["--tensor-parallel-size", "two"], "--tensor-parallel-size: 'two'"),
        (["--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization: '1.5'"),
        (["--gpu-memory-utilization", "0"], "--gpu-memory-utilization: '0'"),
        (["--gpu-memory-utilization", "nan"], "--gpu-memory-utilization: 'nan'"),
        (["--temperature", "-0.1"], "--temperature: '-0.1'"),
        (["--temperature", "inf"], "--temperature: 'inf'"),
        (["--point-timeout", "inf"], "--point-timeout: 'inf'"),
        (["--packed", "--distributed-executor-backend", "ray"], "--packed (the launcher's --pack) shares out"),
        (["--top-p", "0"], "--top-p: '0'"),
        (["--dtype", "int3"], "--dtype"),
        (["--model", ""], "--model: ''"),
        (["--batch-size", "4"], "--batch-size is an abbreviation; write --batch-sizes"),
        (["--batch_sizes", "4"], "is written --batch-sizes here"),
        (["--config", "x.yaml"], "--config cannot be passed on"),
        (["--enable-prefix-caching"], "--enable-prefix-caching cannot be passed on"),
        (["--overwrite", "--resume"], "--overwrite and --resume"),
        (["--max-model-len", "600"], "2176, more than --max-model-len 600"),
        (["--distributed-executor-backend", "mpi"], "--distributed-executor-backend"),
        (["--nnodes", "2", "-tp", "2"], "--nnodes 2 needs --master-addr too"),
        (["--nnodes", "2", "-tp", "3", "--master-addr", "a"], "--nnodes 2 does not divide TP x PP, which is 3"),
        (["--nnodes", "2", "-tp", "2", "-dp", "2", "--master-addr", "a"], "--data-parallel-size 2 needs torchrun"),
        (["--nnodes", "2", "-tp", "2", "--node-rank", "2", "--master-addr", "a"], "--node-rank 2: --nnodes 2 goes up"),
        (["--nnodes", "2", "-tp", "2", "--distributed-executor-backend", "ray"], "mp, but ray was given"),
        (["--master-port", "65535"], "--master-port: '65535' was given; a port from 1 to 65534"),
        (["--distributed-executor-backend", "uni", "-tp", "2"], "uni runs one device, but TP x PP is 2"),
        (["--node-rank", "1"], "--node-rank 1: without --nnodes there is one node; add --nnodes N"),
        (["--master-addr", "head"], "--master-addr head: without --nnodes"),
        (["--max-runs=--"], "--max-runs: '--' was given"),
        (["-dp=--"], "--data-parallel-size: '--' was given"),
        (["--load-format=--"], "--load-format: '--' was given"),
        (["--", "--max-tokens", "4"], "-- has no meaning here"),
        (["--warmup-runs", "2147483648"], "--warmup-runs: '2147483648' was given; at most 10000 is allowed"),
        (["--num-runs", "10001"], "at most 10000"),
        (["--max-runs", "9" * 5000], "99999' was given; at most 10000"),
        (["-tp", "1048577"], "--tensor-parallel-size: '1048577' was given; at most 1048576"),
        (["--batch-sizes", "1,1048577"], "--batch-sizes: '1,1048577' was given; at most 1048576"),
        (["--seq-lens", "134217729"], "at most 134217728"),
        (["--max-model-len", "134218k"], "--max-model-len: '134218k' was given; at most 134217728"),
        (["--max-model-len", "9" * 5000], "at most 134217728"),
        (["--seed", "4294967296"], "--seed: '4294967296' was given; at most 4294967295"),
        (["--point-timeout", "1e308"], "--point-timeout: '1e308' was given; a number above 0 and up to 1000000"),
        (["--device-memory-gib", "1e308"], "--device-memory-gib: '1e308'"),
        (["--temperature", "101"], "a number from 0 to 100"),
        (["--name", "a\nb"], "--name: 'a\\nb' was given; it contains control characters"),
        (["--name", "\x1b[31mred"], "--name: '\\x1b[31mred'"),
        (
            ["--name", "a/b"],
            "--name: 'a/b' was given; a file is named after it, so it may not contain / or begin with .",
        ),
        (["--name", ".a"], "--name: '.a' was given; a file is named after it, so it may not contain / or begin with ."),
        (["--name", "x" * 300], "xxxx' was given; a path may have 4095 bytes, and each name in it 255; shorten it"),
        (["--name", "\u00e9" * 110], "which makes a file name of 233 bytes; at most 220 are allowed"),
        (["--name", "a\udcff"], "--name: 'a\udcff' was given; it contains bytes that are not text"),
        (["--output-dir", "a/\x9b31m"], "--output-dir: 'a/\\x9b31m'"),
        (["--output-dir", "x/" * 3000], "--output-dir: 'x/x/"),
        (["--output-file", "x" * 250], "--output-file: 'xxx"),
        (["--model", "a\u202eb"], "--model: 'a\\u202eb'"),
        (["--model", "m/" + "x" * 300], "--model: 'm/xxx"),
        (["--dtype", "\x1b"], "--dtype: '\\x1b' was given; one of auto, half"),
        (["\x1b[31m"], "'\\x1b[31m' is not a flag"),
        (["--load-format", "\x1b[31m"], "'\\x1b[31m' contains control characters"),
        (["--hf-overrides", '{"a":\r1}'], "contains control characters"),
        (["--sample", "0", *JOB], "--sample: '0' was given; a whole number of at least 1"),
        (["--sample", "9"], "--sample 9: it works only with a workload; add --prompts-file FILE, or drop it"),
        (["--order", "shuffled"], "--order shuffled: it works only with a workload"),
        (["--output-lengths", "eos"], "--output-lengths eos: it works only with a workload"),
        (["--output-lengths", "7"], "--output-lengths 7: it works only with a workload"),
        (["--skip-bad-lines"], "--skip-bad-lines: it works only with a workload"),
        (["--output-lengths", "0", *JOB], "--output-lengths: '0' was given; file, eos or a number of tokens of at"),
        (["--output-lengths", "long", *JOB], "--output-lengths: 'long' was given; file, eos or a number"),
        (["--output-lengths", "134217729", *JOB], "--output-lengths: '134217729' was given; at most 134217728"),
        (["--order", "random", *JOB], "--order: 'random' was given; one of given, shuffled, longest-first, short"),
        (["--prompts-file", ""], "--prompts-file: ''"),
        (["--prompts-file", "a\x1b[31m"], "--prompts-file: 'a\\x1b[31m'"),
        (["--seq-lens", "8,16", *JOB], "--seq-lens 8,16: a workload has its own lengths; drop this flag or --prompts"),
        (["--seq-lens=512,1024,2048", *JOB], "--seq-lens 512,1024,2048: a workload"),  # as it is anyway, and yet
        (
            ["--output-lengths", "eos", "--load-format", "dummy", *JOB],
            "dummy weights (--load-format) never end an answer",
        ),
        (
            ["--batch-sizes", "auto", "--max-latency-s", "3", *JOB],
            "--max-latency-s 3.0: the requests of a workload wait in one queue",
        ),
        (["--batch-sizes", "auto", "--max-ttft-s", "3", *JOB], "drop it, or limit --max-tpot-s"),
        (["--output-lengths=eos", "--load_format=dummy", *JOB], "dummy weights (--load-format) never end an answer"),
        (["--scheduler-cls", "a.B", *JOB], "--scheduler-cls a.B: several batch sizes of a workload"),
        (["--scheduler_cls=a.B", "--max-num-batched-tokens", "64,128"], "--scheduler-cls a.B: several batch sizes"),
        (["--max-num-batched-tokens", "64,0"], "--max-num-batched-tokens: '64,0' was given; a number of tokens"),
        (["--max-num-batched-tokens", "64,,128"], "--max-num-batched-tokens: '64,,128'"),
        (["--max-num-batched-tokens", "64,2147483648"], "at most 2147483647"),
        (["--worker-extension-cls", "a.B", *JOB], "--worker-extension-cls cannot be passed on"),
    ],
)
def test_bad_input_is_one_line_that_names_the_flag_and_the_value(argv: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_flags(argv)
    assert said in str(caught.value)
    assert not has_control(str(caught.value))
    assert len(str(caught.value)) < 500


def test_the_largest_and_the_longest_that_are_possible() -> None:
    config, _ = parse_flags(
        ["-tp", "1048576", "--max-runs", "10000", "--seed", "4294967295", "--seq-lens", "1", "--max-tokens", "1",
         "--max-model-len", "131072K", "--point-timeout", "1e6", "--name", "x" * 207]
    )  # fmt: skip
    assert (config.max_model_len, config.seed) == (2**27, 2**32 - 1)
    assert len(config.output_path.name) == 220


def test_vllm_takes_json_of_several_lines() -> None:
    words = ("--hf-overrides", '{\n\t"a": 1}')
    assert parse_flags(words)[0].engine_args == words


def test_a_number_of_vllm_that_cannot_be_meant_is_for_vllm_to_judge() -> None:
    config, _ = parse_flags(["--block-size", "16", "--kv-cache-memory-bytes", "9" * 5000])
    assert config.engine_number("--block-size") == 16
    assert config.engine_number("--kv-cache-memory-bytes") is None


def test_torchrun_knows_its_nodes_itself() -> None:
    flags = ["--distributed-executor-backend", "external_launcher", "--node-rank", "1", "--master-addr", "head"]
    assert parse_flags(flags)[0].node_rank == 1


def test_repeated_sizes_are_dropped_with_a_note() -> None:
    config, notes = parse_flags(["--batch-sizes", "4,1,4", "--seq-lens", "8,8"])
    assert config.batch_sizes == (4, 1)
    assert config.seq_lens == (8,)
    assert len(notes) == 2
    assert "--batch-sizes" in notes[0]


def test_short_flags_are_those_of_vllm_and_are_not_abbreviated() -> None:
    config, _ = parse_flags(["-tp", "2", "-pp=4"])
    assert (config.tensor_parallel_size, config.pipeline_parallel_size) == (2, 4)
    assert parse_flags(["-t", "2"])[0].tensor_parallel_size == 1
    assert parse_flags(["-t", "2"])[0].engine_args == ("-t", "2")  # vLLM's parser will judge it


def test_the_log_is_beside_the_result_whatever_its_name() -> None:
    for name, log in (("a/x.json", "a/x.log"), ("run.log", "run.log.log"), ("llama-3.1", "llama-3.1.log")):
        assert str(ExperimentConfig(output_file=name).log_path) == log


def test_unknown_flags_are_kept_for_vllm_in_order() -> None:
    config, _ = parse_flags(["--quantization", "fp8", "--max-tokens", "4", "--load-format=dummy"])
    assert config.engine_args == ("--quantization", "fp8", "--load-format=dummy")


@pytest.mark.parametrize(
    ("sizes", "name"),
    [((1, 1), "tp_1"), ((2, 1), "tp_2"), ((1, 4), "pp_4"), ((2, 4), "tp_2_pp_4")],
)
def test_a_setting_is_named_by_its_sizes(sizes: tuple[int, int], name: str) -> None:
    config = ExperimentConfig(tensor_parallel_size=sizes[0], pipeline_parallel_size=sizes[1])
    assert config.setting_name == name
    assert str(config.output_path) == f"experiment_results/{name}_results.json"
    assert str(config.log_path) == f"experiment_results/{name}_results.log"


def test_the_hash_changes_with_what_is_measured_and_not_with_the_grid_or_the_file() -> None:
    base = ExperimentConfig()
    same = dataclasses.replace(base, batch_sizes=(2,), output_file="x.json", name="x", resume=True, max_tokens=9)
    assert same.settings_hash() == base.settings_hash()
    for change in ({"seed": 1}, {"tensor_parallel_size": 2}, {"engine_args": ("--quantization", "fp8")}):
        assert dataclasses.replace(base, **change).settings_hash() != base.settings_hash()


def test_every_flag_has_a_help_text_and_a_field() -> None:
    text = build_parser().format_help()
    for field in dataclasses.fields(ExperimentConfig):
        if field.name not in {"engine_args", "workload_longest", "workload_hash"}:
            assert "--" + field.name.replace("_", "-") in text
            assert len(field.metadata["help"]) > 5


def test_help_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, build_parser().format_help().splitlines())) <= 80


# What changes a measurement, and so makes another setting of it.
MEASURED = {
    "model": "other", "tensor_parallel_size": 2, "pipeline_parallel_size": 2, "data_parallel_size": 2, "nnodes": 2,
    "distributed_executor_backend": "ray", "max_model_len": 4096, "dtype": "float16", "max_num_seqs": 7,
    "max_num_batched_tokens": 512, "gpu_memory_utilization": 0.5, "temperature": 0.1, "top_p": 0.5, "seed": 1,
    "enforce_eager": True, "trust_remote_code": True, "engine_args": ("--block-size", "32"),
}  # fmt: skip
# What is asked of a setting: the points, and how often each is run.
ASKED = {
    "batch_sizes": (2,), "seq_lens": (8,), "max_tokens": 9, "num_runs": 5, "target_ci": 0.1, "max_runs": 20,
    "warmup_runs": 2, "prompts_file": "w.jsonl", "output_lengths": 7, "sample": 9, "order": "shuffled",
    "skip_bad_lines": True, "goal": "latency", "to_beat": (1.0,), "max_latency_s": 1.0, "max_ttft_s": 1.0,
    "max_tpot_s": 1.0, "compare_answers": True,
}  # fmt: skip
OTHERS = {
    "node_rank": 1, "master_addr": "a", "master_port": 1, "output_dir": "x", "output_file": "x.json", "name": "x",
    "overwrite": True, "resume": True, "startup_timeout": 1.0, "point_timeout": 1.0, "packed": True, "verbose": True,
    "measure_peaks": True, "dry_run": True, "devices": 1, "device_memory_gib": 1.0,
    "workload_longest": 9, "workload_hash": "x",
}  # fmt: skip


def test_every_field_is_a_setting_or_asked_of_it_or_neither() -> None:
    assert {field.name for field in dataclasses.fields(ExperimentConfig)} == {*MEASURED, *ASKED, *OTHERS}


@pytest.mark.parametrize("name", [*MEASURED, *ASKED, *OTHERS])
def test_what_two_processes_must_agree_on_is_in_their_hashes(name: str) -> None:
    base, change = ExperimentConfig(), {**MEASURED, **ASKED, **OTHERS}[name]
    other = dataclasses.replace(base, **{name: change})
    assert (other.settings_hash() != base.settings_hash()) is (name in MEASURED)
    assert (other.arguments_hash() != base.arguments_hash()) is (name in {**MEASURED, **ASKED})


def test_equal_settings_have_one_hash_however_they_are_written() -> None:
    one = ExperimentConfig(dtype="half", engine_args=("--block_size=16", "--quantization", "fp8"))
    two = ExperimentConfig(dtype="float16", engine_args=("--quantization", "fp8", "--block-size", "16"))
    assert one.settings_hash() == two.settings_hash()
    assert ExperimentConfig(distributed_executor_backend="uni").settings_hash() == ExperimentConfig().settings_hash()
    many = ExperimentConfig(tensor_parallel_size=2)
    assert dataclasses.replace(many, distributed_executor_backend="mp").settings_hash() == many.settings_hash()
    # A value may hold the sign that joins it with its flag.
    words = "--hf-overrides", '{"rope_type": "a=b"}'
    joined, apart = ExperimentConfig(engine_args=("=".join(words),)), ExperimentConfig(engine_args=words)
    assert joined.settings_hash() == apart.settings_hash()


@pytest.mark.parametrize(
    ("text", "tokens"),
    # As vLLM's own parser reads them.
    [
        ("4096", 4096), ("32k", 32_000), ("32K", 32_768), ("1k", 1000), ("1K", 1024), (" 8 ", 8), ("16.5k", 16_500),
        ("25.6k", 25_600), ("1m", 10**6), ("1M", 2**20), ("0.1g", 10**8),
    ],
)  # fmt: skip
def test_a_length_may_be_in_thousands_or_in_units_of_1024(text: str, tokens: int) -> None:
    assert token_length(text) == tokens
    assert parse_flags(["--seq-lens", "1", "--max-tokens", "1", "--max-model-len", text])[0].max_model_len == tokens


@pytest.mark.parametrize("word", ["auto", "AUTO", "-1"])
def test_vllm_may_find_out_the_length_that_fits(word: str) -> None:
    config, _ = parse_flags(["--seq-lens", "4096", "--max-model-len", word])
    assert config.max_model_len == AUTO_LENGTH == -1


def test_tokens_of_a_step_may_have_a_suffix_too() -> None:
    assert parse_flags(["--max-num-batched-tokens", "16K"])[0].max_num_batched_tokens == 16_384


@pytest.mark.parametrize(
    ("text", "size"),
    [("8G", 8 * 2**30), ("8.5g", 8_500_000_000), ("4096", 4096), ("8.5G", None), ("x", None), ("9" * 40, None)],
)
def test_a_size_of_vllms_own_flags_is_read_as_vllm_reads_it(text: str, size: int | None) -> None:
    config, _ = parse_flags(["--kv-cache-memory-bytes", text])
    assert config.engine_number("--kv-cache-memory-bytes") == size


@pytest.mark.parametrize(
    ("parse", "good", "bad"),
    [
        (run_count, ["1", "7"], ["0", "-1", "1.0", "x", ""]),
        (seed, ["0", "7"], ["-1", "x"]),
        (port, ["1", "65534"], ["0", "65535", "-1", "x"]),
        (token_length, ["1"], ["0", "0k", "-2", "1.5", "1.5K", "1x", "k", "\u0664"]),
        (tokens_per_step, ["1"], ["0", "-1", "auto", "1.5K"]),
        (seconds, ["1e-9", "1e6"], ["0", "-1", "inf", "nan", "x"]),
        (fraction, ["1", "0.001"], ["0", "1.001", "nan"]),
        (interval, ["1", "0.001"], ["0", "1.001", "nan"]),
        (temperature, ["0", "100"], ["-0.001", "100.1", "nan", "inf"]),
    ],
)
def test_bounds_of_a_flag_are_allowed_or_not_as_it_says(parse: Any, good: list[str], bad: list[str]) -> None:
    for text in good:
        assert parse(text) == float(text.rstrip("kK"))
    for text in bad:
        with pytest.raises(ValueError, match=r"is needed"):
            parse(text)


def test_sizes_are_multiplied_and_shared_out() -> None:
    config = ExperimentConfig(tensor_parallel_size=4, pipeline_parallel_size=2, data_parallel_size=3)
    assert (config.num_devices, config.devices_per_replica, config.devices_per_node) == (24, 8, 24)
    nodes = dataclasses.replace(config, data_parallel_size=1, nnodes=2)
    assert (nodes.num_devices, nodes.devices_per_node) == (8, 4)
    assert config.longest_request == 2048 + 128
    assert list(dataclasses.replace(config, batch_sizes=(1, 4), seq_lens=(8, 16)).points()) == [
        (1, 8, 128, None, None), (4, 8, 128, None, None), (1, 16, 128, None, None), (4, 16, 128, None, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "elsewhere"),
    [
        ({}, False),
        ({"distributed_executor_backend": "mp"}, False),
        ({"distributed_executor_backend": "ray"}, True),
        ({"distributed_executor_backend": "external_launcher"}, True),
        ({"nnodes": 2}, True),
    ],
)
def test_devices_of_others_are_read_by_those_who_hold_them(changes: dict[str, Any], elsewhere: bool) -> None:
    assert ExperimentConfig(**changes).devices_elsewhere is elsewhere


def test_the_backend_that_nobody_names_is_one_process_for_one_device() -> None:
    assert [ExperimentConfig(tensor_parallel_size=tp).own_backend for tp in (1, 2)] == ["uni", "mp"]
    assert ExperimentConfig(pipeline_parallel_size=2).own_backend == "mp"
    assert ExperimentConfig(data_parallel_size=2).own_backend == "uni"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"tensor_parallel_size": 4, "nnodes": 2}, "tp_4_nodes_2"),
        ({"distributed_executor_backend": "external_launcher"}, "torchrun_tp_1"),
        ({"distributed_executor_backend": "external_launcher", "data_parallel_size": 4, "nnodes": 2},
         "torchrun_dp_4_nodes_2"),
        ({"tensor_parallel_size": 4, "nnodes": 2, "name": "mine"}, "mine"),
        ({"tensor_parallel_size": 2, "engine_args": ("--enable-expert-parallel",)}, "tp_2_ep"),
        ({"data_parallel_size": 2, "nnodes": 2, "engine_args": ("--x", "1", "--enable_expert_parallel")},
         "dp_2_nodes_2_ep"),
        ({"engine_args": ("-ep", "--no-enable-expert-parallel")}, "tp_1"),
        ({"engine_args": ("--no-enable-expert-parallel", "-ep"), "name": "mine"}, "mine"),
    ],
)  # fmt: skip
def test_the_name_says_what_runs_it_and_on_how_many_nodes(changes: dict[str, Any], name: str) -> None:
    assert ExperimentConfig(**changes).setting_name == name


def test_a_word_of_vllms_is_found_however_it_is_written() -> None:
    config = ExperimentConfig(
        engine_args=("--block_size=16", "--kv-cache-dtype", "fp8_e4m3", "--name", "a_b", "-q", "x")
    )
    words = [config.engine_word(flag) for flag in ("--block-size", "--kv-cache-dtype", "--name", "-q", "--other")]
    assert words == ["16", "fp8_e4m3", "a_b", "x", None]
    assert (config.engine_number("--block-size"), config.engine_number("--name")) == (16, None)


def test_what_nodes_disagree_on_is_told_in_short() -> None:
    told = ExperimentConfig(engine_args=("--block-size", "16"), batch_sizes=(1, 4)).arguments()
    assert (told["--batch-sizes"], told["--max-model-len"], told["--max-tokens"]) == ("1,4", "not given", "128")
    assert told["vLLM's flags"] == "--block-size 16"
    assert ExperimentConfig().arguments()["vLLM's flags"] == "not given"
    long = [ExperimentConfig(model="m" * count).arguments()["--model"] for count in (200, 201, 202)]
    assert long[0] == "m" * 200
    assert long[1].startswith("m" * 150 + " (")
    assert long[1] != long[2]


def test_an_address_may_be_in_brackets() -> None:
    words = ["--nnodes", "2", "-tp", "2", "--master-addr"]
    assert [parse_flags([*words, text])[0].master_addr for text in ("[::1]", "::1", "head")] == ["::1", "::1", "head"]


def test_the_help_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every flag with its default, to the letter: whoever changes one writes the file anew, and reads it."""
    monkeypatch.setenv("COLUMNS", "80")
    assert build_parser().format_help() == (GOLDEN / "experiment_help.txt").read_text()


# Words of a command line, and under them what is said of them.
_LINES = (GOLDEN / "flag_errors.txt").read_text().splitlines()


@pytest.mark.parametrize(
    ("words", "said"), list(zip(_LINES[::2], _LINES[1::2], strict=True)), ids=map(str, range(len(_LINES) // 2))
)
def test_a_mistake_in_the_flags_is_said_to_the_letter(words: str, said: str) -> None:
    """Which flag, which number and which way out a message names."""
    with pytest.raises(ConfigError) as caught:
        parse_flags(shlex.split(words))
    assert f"    {caught.value}" == said


def test_a_flag_that_nobody_knows_is_held_against_ours_and_vllms() -> None:
    def advice(flag: str) -> str:
        return unknown_flag_message(flag, ["--quantization", "--max-log-len"]).removeprefix(f"{flag} is not a flag of ")

    assert [advice(flag) for flag in ("--max-token=4", "--quantisation", "--zzzz")] == [
        "this program or of vLLM; did you mean --max-tokens?",
        "this program or of vLLM; did you mean --quantization?",
        "this program or of vLLM; see --help, and vLLM's own engine flags",
    ]
    assert str(owned_by_us("--data-parallel-rank")).startswith("--data-parallel-rank cannot be passed on to vLLM: ")


def test_notes_of_repeats_name_what_is_left_in_its_order() -> None:
    _, notes = parse_flags(["--batch-sizes", "4,1,4", "--seq-lens", "8,8"])
    assert notes == [
        "--batch-sizes: repeats are dropped; 4,1 will be measured",
        "--seq-lens: repeats are dropped; 8 will be measured",
    ]
    assert parse_flags(["--batch-sizes", "4,1", "--seq-lens", "8"])[1] == []


def test_what_only_a_plan_is_told_is_left_out_with_its_value() -> None:
    words = (
        "--devices 8 -tp 2 --devices=4 --device-memory-gib 80 --load-format dummy --device-memory-gib=1 --x --devices"
    )
    assert without_plan_flags(words.split()) == ["-tp", "2", "--load-format", "dummy", "--x"]


def test_what_is_at_a_bound_of_two_flags_is_allowed() -> None:
    for words in (
        "--max-model-len 640 --seq-lens 512,16",
        "--overwrite",
        "--resume",
        "--x - -q 5 -5",
        "--max-runs 3",
        "--num-runs 5 --max-runs 10 --target-ci 0.02",
        "--devices 8 --dry-run",
        "--nnodes 3 -tp 3 --node-rank 2 --master-addr head",
        "--nnodes 2 -pp 2 --master-addr head --distributed-executor-backend mp",
        "--distributed-executor-backend uni -dp 2",
        "--packed --distributed-executor-backend mp",
        f"--name {'n' * 207}",
        f"--output-file {'f' * 220}",
        f"--output-dir {'d' * 255}",
        f"--model {'/'.join(['x' * 254] * 16)}/{'x' * 15}",
    ):
        parse_flags(words.split())


def test_every_flag_reaches_its_own_field() -> None:
    """With no two values alike, so that none can stand for another."""
    words = (
        "--model m --tensor-parallel-size 2 --pipeline-parallel-size 3 --data-parallel-size 4"
        " --distributed-executor-backend mp --nnodes 1 --master-port 5 --batch-sizes 6,7 --seq-lens 8,9 --max-tokens 10"
        " --max-model-len 110 --dtype half --max-num-seqs 12 --max-num-batched-tokens 13 --gpu-memory-utilization 0.14"
        " --temperature 0.15 --top-p 0.16 --max-runs 18 --target-ci 0.17 --warmup-runs 19 --seed 20 --output-dir d"
        " --output-file f --name n --startup-timeout 21 --point-timeout 22 --devices 23 --device-memory-gib 24"
        " --load-format dummy"
    )
    switches = "enforce_eager", "trust_remote_code", "resume", "packed", "verbose", "measure_peaks", "dry_run"
    config, notes = parse_flags([*words.split(), *("--" + name.replace("_", "-") for name in switches)])
    assert notes == []
    assert config == ExperimentConfig(
        model="m", tensor_parallel_size=2, pipeline_parallel_size=3, data_parallel_size=4,
        distributed_executor_backend="mp", nnodes=1, master_port=5, batch_sizes=(6, 7), seq_lens=(8, 9), max_tokens=10,
        max_model_len=110, dtype="half", max_num_seqs=12, max_num_batched_tokens=13, gpu_memory_utilization=0.14,
        temperature=0.15, top_p=0.16, max_runs=18, target_ci=0.17, warmup_runs=19, seed=20, output_dir="d",
        output_file="f", name="n", startup_timeout=21.0, point_timeout=22.0, devices=23, device_memory_gib=24.0,
        engine_args=("--load-format", "dummy"), **dict.fromkeys(switches, True),
    )  # fmt: skip
    # A file that is named stands before the folder, and a name before the sizes.
    assert (str(config.output_path), config.setting_name) == ("f", "n")


def test_the_defaults_are_these() -> None:
    told = {name: value for name, value in dataclasses.asdict(ExperimentConfig()).items() if value not in (None, False)}
    assert told == {
        "model": "meta-llama/Llama-2-7b-chat-hf", "tensor_parallel_size": 1, "pipeline_parallel_size": 1,
        "data_parallel_size": 1, "nnodes": 1, "master_port": 29500, "batch_sizes": (1, 4, 8, 16),
        "seq_lens": (512, 1024, 2048), "max_tokens": 128, "dtype": "auto", "gpu_memory_utilization": 0.8,
        "temperature": 0.8, "top_p": 0.95, "target_ci": 0.02, "max_runs": 10, "warmup_runs": 1,
        "output_dir": "experiment_results", "startup_timeout": 1800, "point_timeout": 900, "engine_args": (),
        "output_lengths": "file", "order": "given", "goal": "throughput",
    }  # fmt: skip


def test_what_two_nodes_compare_is_all_of_this(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    config = ExperimentConfig(
        model="m", tensor_parallel_size=2, nnodes=2, dtype="half", num_runs=4, engine_args=("-q", "b", "--a_b=c_d")
    )
    assert config.arguments() == {
        "--model": "m", "--tensor-parallel-size": "2", "--pipeline-parallel-size": "1", "--data-parallel-size": "1",
        "--distributed-executor-backend": "mp", "--nnodes": "2", "--batch-sizes": "1,4,8,16",
        "--seq-lens": "512,1024,2048", "--max-tokens": "128", "--max-model-len": "not given", "--dtype": "float16",
        "--max-num-seqs": "not given", "--max-num-batched-tokens": "not given", "--gpu-memory-utilization": "0.8",
        "--temperature": "0.8", "--top-p": "0.95", "--num-runs": "4", "--target-ci": "0.02", "--max-runs": "10",
        "--warmup-runs": "1", "--seed": "0", "--enforce-eager": "False", "--trust-remote-code": "False",
        "--goal": "throughput", "--to-beat": "not given", "--max-latency-s": "not given", "--max-ttft-s": "not given",
        "--max-tpot-s": "not given", "--output-lengths": "file", "--sample": "not given", "--order": "given",
        "--prompts-file": "not given", "--skip-bad-lines": "False", "--compare-answers": "False",
        "vLLM's flags": "--a-b c_d -q b",
    }  # fmt: skip
    # A folder is the same one by any name; a hub name is no folder.
    folder = config.same_settings()["model"]
    assert re.fullmatch(r"m \([0-9a-f]{16}\)", folder)
    (tmp_path / "link").symlink_to("m")
    assert ExperimentConfig(model="link/../m").same_settings()["model"] == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ExperimentConfig(model="~/m").same_settings()["model"] == folder
    (tmp_path / "other" / "m").mkdir(parents=True)
    assert ExperimentConfig(model="other/m").same_settings()["model"] != folder
    assert ExperimentConfig(model="org/~m").same_settings()["model"] == "org/~m"
    too_long = "m" * 5000
    assert ExperimentConfig(model=too_long).same_settings()["model"] == too_long
    assert ExperimentConfig(dtype="float").same_settings()["dtype"] == "float32"


def test_a_flag_that_stands_alone_has_no_value() -> None:
    config = ExperimentConfig(engine_args=("--hf-token", "--quantization", "fp8", "--port", "-1"))
    assert [config.engine_word(flag) for flag in ("--hf-token", "--quantization", "--port")] == [None, "fp8", "-1"]


def test_the_last_of_several_equal_words_counts() -> None:
    config = ExperimentConfig(engine_args=("--block-size", "8", "--block_size=16", "--x", "9" * 18, "--y", "9" * 19))
    assert [config.engine_number(flag) for flag in ("--block-size", "--x", "--y")] == [16, 10**18 - 1, None]


def test_no_secret_is_in_what_is_compared_or_shown() -> None:
    secret = ExperimentConfig(model="https://me:hush@host/m", engine_args=("--hf-token", "hush", "--hf-token=hush"))
    assert secret.model_shown == "https://<login>@host/m"
    for told in (secret.arguments(), secret.same_settings()):
        assert "hush" not in str(told)


def test_a_hash_does_not_depend_on_an_order_and_stays_what_it_was() -> None:
    config = ExperimentConfig(engine_args=("--a", "1"))
    # It is in files: with another one every point would be measured again.
    assert (config.settings_hash(), len(config.arguments_hash())) == ("fc9042a32f313f37", 16)


def test_a_long_value_is_its_beginning_and_a_hash_of_all_of_it() -> None:
    assert as_compared([]) == as_compared(None) == "not given"
    assert (as_compared(["a", "b"]), as_compared((1, 2)), as_compared('a"\n')) == ("a b", "1,2", r"a\"\n")
    assert (as_compared("x" * 200), as_compared("x" * 201)) == ("x" * 200, f"{'x' * 150} (541ec0f2d7818160)")


@pytest.mark.parametrize(
    ("parse", "low", "high"),
    [
        ("device_count", 1, 2**20), ("node_number", 0, 2**20), ("request_count", 1, 2**20), ("token_count", 1, 2**27),
        ("tokens_per_step", 1, 2**31 - 1), ("run_count", 1, 10_000), ("seed", 0, 2**32 - 1), ("port", 1, 65534),
        ("seconds", 1e-9, 1e6), ("gib", 1e-9, 1e6), ("fraction", 1e-9, 1), ("interval", 1e-9, 1),
        ("temperature", 0, 100),
    ],
)  # fmt: skip
def test_each_number_has_its_lowest_and_its_highest(parse: str, low: float, high: float) -> None:
    read = getattr(values, parse)
    assert (read(str(low)), read(f" {high} ")) == (low, high)
    for beyond in (low - 1, high + 1):
        with pytest.raises(ValueError, match=r"is needed|^at most \d+ is allowed$"):
            read(str(beyond))


def test_a_number_may_have_40_digits_and_no_more() -> None:
    assert run_count("0" * 39 + "7") == 7
    for text in ("7" * 41, "1" + "0" * 40):
        with pytest.raises(ValueError, match=r"^at most 10000 is allowed$"):
            run_count(text)


def test_words_are_one_of_those_and_lists_keep_their_order() -> None:
    assert [values.one_of(("a", "b"))(word) for word in ("a", "b")] == ["a", "b"]
    with pytest.raises(ValueError, match=r"^one of a, b is needed$"):
        values.one_of(("a", "b"))("a, b")
    assert values.batch_sizes("4, 1,4") == (4, 1, 4)
    assert values.host("[a") == "[a"
    assert values.host("a]") == "a]"
    assert values.plain_text(" a ") == values.non_empty(" a ") == " a "
    assert [values.without_value(words) for words in (["--a=--", "--b=--"], ["a=--", "-b=--"], ["--a=--x"], [])] == [
        "--a", "-b", None, None,
    ]  # fmt: skip


def test_a_value_may_hold_the_sign_that_joins_it_with_its_flag() -> None:
    config = ExperimentConfig(engine_args=("--x", "a=b_c", "--y=d=e_f"))
    assert [config.engine_word(flag) for flag in ("--x", "--y")] == ["a=b_c", "d=e_f"]


# --- workloads and tokens per step ------------------------------------------------------------------------------------


def test_what_is_asked_of_a_workload_reaches_its_field() -> None:
    words = "--prompts-file w.jsonl --output-lengths 7 --sample 100 --order longest-first --skip-bad-lines"
    config, notes = parse_flags(words.split())
    asked = (config.prompts_file, config.output_lengths, config.sample, config.order, config.skip_bad_lines)
    assert asked == ("w.jsonl", 7, 100, "longest-first", True)
    assert notes == []
    assert [parse_flags([*JOB, "--output-lengths", word])[0].output_lengths for word in ("file", "eos")] == [
        "file",
        "eos",
    ]
    # With weights, and one load for one size, these are the user's.
    parse_flags([*JOB, "--output-lengths", "eos", "--load-format", "auto"])
    parse_flags([*JOB, "--batch-sizes", "4", "--scheduler-cls", "a.B"])


@pytest.mark.parametrize(
    ("text", "sizes", "note"),
    [
        ("2048", 2048, None),
        ("2048,8192", (2048, 8192), None),
        ("16K, 2k", (16_384, 2000), None),
        ("64,128,64", (64, 128), "--max-num-batched-tokens: repeats are dropped; 64,128 will be measured"),
        # One is no axis.
        ("64,64", 64, "--max-num-batched-tokens: repeats are dropped; 64 will be measured"),
    ],
)
def test_tokens_of_a_step_may_be_an_axis(text: str, sizes: Any, note: str | None) -> None:
    config, notes = parse_flags(["--max-num-batched-tokens", text])
    assert config.max_num_batched_tokens == sizes
    assert notes == ([note] if note else [])
    many = isinstance(sizes, tuple)
    assert config.budgets == (sizes if many else (None,))
    assert config.largest_budget == (max(sizes) if many else sizes)


def test_an_axis_of_tokens_per_step_is_no_setting_and_one_size_is() -> None:
    """So that points of another axis go on in the same file."""
    plain, one, two = (ExperimentConfig(max_num_batched_tokens=tokens) for tokens in (None, 64, 128))
    axis, other = (ExperimentConfig(max_num_batched_tokens=tokens) for tokens in ((64, 128), (64, 256)))
    assert axis.settings_hash() == other.settings_hash() == plain.settings_hash()
    assert len({plain.settings_hash(), one.settings_hash(), two.settings_hash()}) == 3
    # Two nodes must be told the same.
    assert len({config.arguments_hash() for config in (plain, one, two, axis, other)}) == 5


def test_points_of_an_axis_are_all_combinations_batch_sizes_innermost() -> None:
    config = ExperimentConfig(batch_sizes=(1, 4), seq_lens=(8, 16), max_tokens=2, max_num_batched_tokens=(64, 32))
    assert list(config.points()) == [
        (batch, length, 2, None, tokens) for tokens in (64, 32) for length in (8, 16) for batch in (1, 4)
    ]


def test_points_of_a_workload_are_told_apart_by_its_content_and_what_is_asked_of_it() -> None:
    config = ExperimentConfig(
        prompts_file="w", workload_hash="abc", batch_sizes=(4, 8), max_num_batched_tokens=(64, 32)
    )
    workload = ("abc", "file", "given", False)
    assert config.workload == workload
    assert list(config.points()) == [
        (batch, None, None, workload, tokens) for tokens in (64, 32) for batch in (4, 8)
    ]  # fmt: skip
    changes: list[dict[str, Any]] = [
        {"workload_hash": "other"},
        {"output_lengths": 7},
        {"output_lengths": "eos"},
        {"output_lengths": "eos", "max_tokens": 7},
        {"order": "longest-first"},
        {"engine_args": ("--enable-prefix-caching",)},
    ]
    points = {tuple(dataclasses.replace(config, **change).points()) for change in [{}, *changes]}
    assert len(points) == 7
    # How many are run, where the file lies and the limit of what has a length of its own are no part of them.
    same: list[dict[str, Any]] = [{"sample": 9}, {"prompts_file": "v"}, {"max_tokens": 7}, {"skip_bad_lines": True}]
    assert {tuple(dataclasses.replace(config, **change).points()) for change in same} == {tuple(config.points())}


@pytest.mark.parametrize(
    ("words", "is_cached"),
    [
        ((), False),
        (("--enable-prefix-caching",), True),
        (("--enable_prefix_caching",), True),
        (("--no-enable-prefix-caching",), False),
        (("--no_enable_prefix_caching",), False),
        (("--enable-prefix-caching", "--block-size", "16", "--no-enable-prefix-caching"), False),
        (("--no-enable-prefix-caching", "--enable-prefix-caching"), True),
    ],
)
def test_prefixes_are_cached_where_the_last_word_says_so(words: tuple[str, ...], is_cached: bool) -> None:
    config, _ = parse_flags([*JOB, *words])
    assert config.workload is not None
    assert (config.workload[3], config.caches_prefixes) == (is_cached, is_cached)


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({"workload_longest": 300}, 300),
        ({"workload_longest": 300, "max_model_len": 4096}, 300),
        # Read by another process: no more than the limit is known, or nothing.
        ({"max_model_len": 512}, 512),
        ({"max_model_len": AUTO_LENGTH}, 1),
        ({}, 1),
    ],
)
def test_a_plan_is_made_for_the_longest_request_of_a_workload(changes: dict[str, Any], longest: int) -> None:
    """And never for the lengths of a grid that nobody asked for."""
    config = ExperimentConfig(prompts_file="w.jsonl", **changes)
    assert (config.lengths, config.request_tokens, config.longest_request) == ((longest,), (longest,), longest)


def test_limits_are_changed_where_points_take_less_than_the_engine_holds() -> None:
    def changes(**fields: Any) -> bool:
        return ExperimentConfig(**fields).changes_limits

    job = {"prompts_file": "w.jsonl"}
    assert [changes(), changes(batch_sizes=(4,)), changes(max_num_seqs=64), changes(max_num_batched_tokens=64)] == [
        False
    ] * 4
    assert changes(max_num_batched_tokens=(64, 128))
    assert changes(**job)
    assert not changes(**job, batch_sizes=(4,))
    assert not changes(**job, batch_sizes=(4,), max_num_seqs=4)
    assert not changes(**job, batch_sizes=(4, 8), max_num_seqs=4)
    assert changes(**job, batch_sizes=(4,), max_num_seqs=8)
    assert changes(**job, batch_sizes=(4,), max_num_batched_tokens=(64, 128))


def test_a_workload_by_another_path_is_the_same_for_two_nodes_and_by_another_name_is_not() -> None:
    one, moved, other = (ExperimentConfig(prompts_file=path) for path in ("/a/w.jsonl", "b/w.jsonl", "/a/v.jsonl"))
    assert one.arguments_hash() == moved.arguments_hash() != other.arguments_hash()
    assert one.arguments()["--prompts-file"] == "w.jsonl"
