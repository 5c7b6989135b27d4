"""The experiment script on a real vLLM engine: the tiny model, dummy weights, this machine's devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from batch_inference.core.answers import between_replicas, differences, of_itself
from batch_inference.core.config import ExperimentConfig
from batch_inference.core.results import Answers
from batch_inference.measure.engine import MEASURING_SETTINGS
from batch_inference.plan.devices import Devices, find_devices
from batch_inference.plan.memory import memory_plan
from batch_inference.plan.model import read_model_facts
from conftest import REPOSITORY

pytestmark = pytest.mark.vllm

MODEL = str(REPOSITORY / "models" / "tiny-llama")
GRID = ("--batch-sizes", "1,3", "--seq-lens", "16,40", "--max-tokens", "9", "--num-runs", "2")
SMALL_ENGINE = ("--load-format", "dummy", "--kv-cache-memory-bytes", "67108864")


def measure(
    folder: Path, *flags: str, launcher: tuple[str, ...] = (), grid: tuple[str, ...] = GRID, **variables: str
) -> dict[str, Any]:
    """Run the script as a user would; its result file."""
    file = folder / "tp_1_results.json"
    script = "batch_inference_experiment.py"
    command = [sys.executable, *launcher, script, "--model", MODEL, *SMALL_ENGINE, *grid, *flags]
    done = subprocess.run(
        [*command, "--output-file", str(file)], cwd=REPOSITORY, capture_output=True, text=True, timeout=600,
        env={**os.environ, **variables},
    )  # fmt: skip
    log = file.with_suffix(".log")
    assert done.returncode == 0, done.stderr + log.read_text()[-5000:]
    assert "Traceback" not in done.stderr
    document: dict[str, Any] = json.loads(file.read_text())
    return document


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its own weights, because --load-format dummy gives each device other ones."""
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder)
    return folder


def write_weights(folder: Path, swapped: str | None = None) -> None:
    """Random ones, the same at each call; `swapped`: of this tensor the halves are, as if two devices had each other's
    part of it."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((Path(MODEL) / "config.json").read_text())
    hidden, inner, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    of_keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (words, hidden), "lm_head": (words, hidden), "model.norm": (hidden,)
    }  # fmt: skip
    for layer in range(config["num_hidden_layers"]):
        of_layer = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (of_keys, hidden),
            "self_attn.v_proj": (of_keys, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    draw = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.weight": (
            torch.randn(shape, generator=draw) * shape[-1] ** -0.5 if len(shape) > 1 else torch.ones(shape)
        ).bfloat16()
        for name, shape in shapes.items()
    }
    if swapped:
        upper, lower = tensors[swapped].chunk(2)
        tensors[swapped] = torch.cat([lower, upper])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


Route = tuple[int, int, int, bool]  # TP, PP, DP, whether under torchrun
ROUTES: list[Route] = [(1, 1, 1, False), (2, 1, 1, False), (1, 2, 1, False), (1, 1, 2, False),
          (2, 1, 1, True), (1, 2, 1, True), (1, 1, 2, True)]  # fmt: skip


@pytest.mark.parametrize(
    "route",
    ROUTES,
    ids=["tp_1", "tp_2", "pp_2", "dp_2", "torchrun_tp_2", "torchrun_pp_2", "torchrun_dp_2"],
)
def test_a_setting_gives_exact_tokens_at_every_point(tmp_path: Path, weights: Path, route: Route) -> None:
    tp, pp, dp, torchrun = route
    if len(find_devices()) < tp * pp * dp:
        pytest.skip(f"needs {tp * pp * dp} devices")
    sizes = ("-tp", str(tp), "-pp", str(pp), "-dp", str(dp), *asks(weights))
    if torchrun:
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(tp * pp * dp))
        document = measure(tmp_path, *sizes, "--distributed-executor-backend", "external_launcher", launcher=launcher)
    else:
        document = measure(tmp_path, *sizes)

    assert document["status"] == "complete"
    shapes = [(point["batch_size"], point["seq_len"]) for point in document["points"]]
    assert shapes == [(1, 16), (3, 16), (1, 40), (3, 40)]
    for point in document["points"]:
        assert point["status"] == "ok"
        assert not {"prompt", "prefix"} & set(" ".join(point["verdict_reasons"]).split())
        assert len(point["runs"]) == 2
        for run in point["runs"]:
            check_run(run, point["batch_size"], point["seq_len"], dp)
            # vLLM's own estimates of the work, of which MFU and MBU are made; of coupled replicas they are wrong.
            estimates = [(run["counters"][name] or 0) > 0 for name in ("flops_per_device", "memory_bytes_per_device")]
            assert estimates == [not (torchrun and dp > 1)] * 2
    check_engine(document["engine"], tp, pp, torchrun)
    ANSWERS[route] = answers_in(document)


# Of the routes above.
ANSWERS: dict[Route, Answers] = {}


def asks(weights: Path) -> tuple[str, ...]:
    return ("--model", str(weights), "--load-format", "auto", "--compare-answers")


def answers_in(document: dict[str, Any]) -> Answers:
    return msgspec.convert(document["answers"], Answers)


def test_every_route_answers_the_same_and_a_swapped_shard_does_not(tmp_path: Path) -> None:
    first, *others = (ANSWERS.get(route) for route in ROUTES)
    if first is None or not any(others):
        pytest.skip("the routes above were not measured")
    for other in filter(None, others):
        found = [differences(first.first, other.first), of_itself(other), *between_replicas(other)]
        assert not any(one.is_another_model for one in found)
    write_weights(tmp_path, swapped="model.layers.0.self_attn.q_proj.weight")
    wrong = answers_in(measure(tmp_path, *asks(tmp_path), grid=(*GRID, "--batch-sizes", "1", "--seq-lens", "40")))
    assert differences(first.first, wrong.first).is_another_model


def check_run(run: dict[str, Any], batch_size: int, seq_len: int, dp: int) -> None:
    assert run["prompt_tokens"] == batch_size * dp * seq_len
    assert run["output_tokens"] == batch_size * dp * 9
    assert [replica["output_tokens"] for replica in run["replicas"]] == [batch_size * 9] * dp
    assert run["latency_s"] == max(replica["end_s"] for replica in run["replicas"])
    assert run["requests"]["output_tokens"] == [9] * batch_size * dp
    counters = run["counters"]
    assert [counters[name] for name in ("preemptions", "prefix_cache_hit_tokens", "jit_compilations")] == [0, 0, 0]
    # Every request ran at once, by the scheduler's own count.
    assert counters["peak_running"] == batch_size
    assert 0 < run["memory"]["peak_kv_use"] < 1
    assert all(used_gib > 0 for used_gib in run["memory"]["used_gib"])
    check_times(run)


def check_engine(engine: dict[str, Any], tp: int, pp: int, torchrun: bool) -> None:
    assert (engine["tensor_parallel_size"], engine["pipeline_parallel_size"]) == (tp, pp)
    assert engine["pipeline_stages_overlap"] == (None if pp == 1 else not torchrun)
    assert engine["load_s"]["compile_s"] is None or engine["load_s"]["compile_s"] > 0
    assert engine["compile_cache"] in ("cold", "warm")
    # Of its own accord vLLM has an engine without a process of its own under torchrun alone.
    assert engine["multiprocess_engine"] is not torchrun
    assert engine["enable_prefix_caching"] is False
    assert (engine["max_num_seqs"], engine["max_model_len"]) == (3, 49)
    assert len(engine["workers"]) == tp * pp
    config = ExperimentConfig(tensor_parallel_size=tp, pipeline_parallel_size=pp)
    planned = memory_plan(config, read_model_facts(MODEL), Devices("cpu", ()), None)
    assert engine["weights_gib"] == pytest.approx(planned.weights_gib, rel=0.03)


def check_times(run: dict[str, Any]) -> None:
    requests = run["requests"]
    for ttft_s, latency_s, queue_s in zip(requests["ttft_s"], requests["latency_s"], requests["queue_s"], strict=True):
        assert 0 <= queue_s <= ttft_s < latency_s
        # The process that submits may see the first token late, where the machine is busy; two clocks mixed up would be
        # off by years.
        assert latency_s < 2 * run["latency_s"]


@pytest.mark.parametrize("separate", ["0", "1"], ids=["in_process", "separate"])
def test_a_queue_keeps_its_limits_on_one_load(tmp_path: Path, separate: str) -> None:
    """Which vLLM is never told: its scheduler is, whether it has a process of its own."""
    workload = tmp_path / "workload.jsonl"
    lengths = [{"prompt_tokens": 8 + 7 * number % 60, "output_tokens": 3 + number % 9} for number in range(64)]
    workload.write_text("".join(f"{json.dumps(one)}\n" for one in lengths))
    queue = ("--prompts-file", str(workload), "--batch-sizes", "2,5", "--max-num-batched-tokens", "64,512")
    document = measure(tmp_path, grid=queue, VLLM_ENABLE_V1_MULTIPROCESSING=separate)

    assert document["engine"]["multiprocess_engine"] is (separate == "1")
    assert document["engine"]["max_num_seqs"] == 5
    assert document["engine"]["max_num_batched_tokens"] == 512
    points = {(point["batch_size"], point["max_num_batched_tokens"]): point for point in document["points"]}
    assert list(points) == [(2, 64), (5, 64), (2, 512), (5, 512)]
    steps = {}
    for key, point in points.items():
        (run,) = point["runs"]
        counters, (replica,) = run["counters"], run["replicas"]
        assert (counters["miscounted"], counters["peak_running"]) == (0, key[0])
        assert len(run["requests"]["output_tokens"]) == replica["requests"] == (32 if key[0] == 2 else 60)
        timeline = replica["timeline"]
        assert sum(timeline["output_tokens"]) == run["output_tokens"]
        assert sum(timeline["prompt_tokens"]) == run["prompt_tokens"]
        assert timeline["waiting"][-1] == 0
        steps[key] = sum(timeline["steps"])
        assert point["summary"]["plateau_output_tok_per_s"] > 0
    # The prompts of five requests are more than a step of 64 tokens takes.
    assert steps[5, 64] > steps[5, 512]


def test_a_misspelt_vllm_flag_is_found_by_vllms_own_parser(tmp_path: Path) -> None:
    command = [sys.executable, "batch_inference_experiment.py", "--model", MODEL, "--quantisation", "fp8"]
    done = subprocess.run(
        [*command, "--output-file", str(tmp_path / "x.json"), "--seq-lens", "16"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "--quantisation is not a flag of this program or of vLLM; did you mean --quantization?" in done.stderr
    assert list(tmp_path.iterdir()) == []  # before an engine starts


def test_the_stub_and_vllm_agree_on_every_name_we_use() -> None:
    program = """
import dataclasses, inspect, json, vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.stats import RequestStateStats

fields = [[field.name for field in dataclasses.fields(kind)] for kind in (EngineArgs, RequestStateStats)]
methods = [vllm.LLM.generate, vllm.LLM.enqueue, vllm.LLM.enqueue_chat, vllm.LLM.wait_for_completion]
calls = [list(inspect.signature(call).parameters) for call in (vllm.SamplingParams, *methods)]
print(json.dumps(fields + calls))
"""

    def names(path: str) -> list[set[str]]:
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120, check=True
        )
        return [set(group) for group in json.loads(done.stdout.splitlines()[-1])]

    stub_path = REPOSITORY / "tests" / "stub"
    real = names("")
    for stub_names, real_names in zip(names(str(stub_path)), real, strict=True):
        assert stub_names - {"mm_device_do_normalize"} <= real_names  # it is looked up: 0.28 has it first
    assert set(MEASURING_SETTINGS) <= real[0]
