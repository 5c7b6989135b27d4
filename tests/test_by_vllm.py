"""vLLM is asked once for all settings of a plan; what it says is kept, shown, and counts for more than formulas."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batch_inference.core import child
from batch_inference.core.child import ask_for_lines
from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.launch.jobs import Here, job_of
from batch_inference.launch.options import parse_options
from batch_inference.launch.overview import plan, plan_as_json, planned
from batch_inference.launch.presets import Preset, Setting
from batch_inference.plan import by_vllm, meta_device
from batch_inference.plan.by_vllm import LIMIT_VARIABLE, ask_vllm, question_of
from batch_inference.plan.devices import Devices, devices_elsewhere
from batch_inference.plan.model import ModelFacts, read_model_facts
from batch_inference.plan.needs import needs_of
from batch_inference.plan.obstacles import rules_against
from batch_inference.plan.printed import setting_plan
from batch_inference.plan.said import Said
from batch_inference.plan.stand_ins import Group, UnknownError, be_first_rank_of
from conftest import REPOSITORY, SMALL_GRID, STUB, TINY, assert_answers_at_once, experiment_command

EIGHT = devices_elsewhere(8)
CPU = Devices("cpu", ("0", "1"))
SHORT = ExperimentConfig(model=TINY, seq_lens=(64, 16), batch_sizes=(1, 4), max_tokens=16)
NUMBERS = {
    "weights_gib": 2.5, "kv_gib": [0.5, 0.25], "pool_gib": 8.0, "waves": [15, 31], "kv_cache_tokens": 1280,
    "longest": 2048,
}  # fmt: skip


class Asked(list[list[dict[str, Any]]]):
    """The questions of each time that vLLM was asked, the answers it gives, and why there are no more of them."""

    answers: list[Any] | None = None
    problem: str | None = None

    def ask(self, module: str, question: str, *, timeout_s: float) -> tuple[list[Any], str | None]:
        assert module == "plan.meta_device"
        assert timeout_s > 0
        self.append(json.loads(question)["questions"])
        return ([dict(NUMBERS)] * len(self[-1]) if self.answers is None else self.answers), self.problem


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Asked:
    """A vLLM 9.9 that is installed, and says NUMBERS of everything."""
    found = Asked()
    vllm = tmp_path / "site" / "vllm"
    for name in by_vllm._NEEDED:
        (vllm / name).parent.mkdir(parents=True, exist_ok=True)
        (vllm / name).touch()
    monkeypatch.setattr(child, "ask_for_lines", found.ask)
    monkeypatch.setattr(by_vllm, "vllm_folder", lambda: vllm)
    monkeypatch.setattr(by_vllm, "vllm_version", lambda: "9.9")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(LIMIT_VARIABLE)
    return found


def said_of(*configs: ExperimentConfig, devices: Devices = EIGHT, memory_gib: float | None = 80.0) -> list[Said | None]:
    return ask_vllm([(config, None, memory_gib) for config in configs], devices, lambda _: None)


def kept_files(folder: Path) -> list[Path]:
    return sorted((folder / "cache").rglob("*_plans/*.json"))


def facts(model: str = TINY) -> ModelFacts:
    read = read_model_facts(model)
    assert read is not None
    return read


# --- asking and keeping -----------------------------------------------------------------------------------------------


def test_all_settings_are_asked_for_at_once_and_the_second_plan_asks_nobody(asked: Asked) -> None:
    lines: list[str] = []
    configs = [replace(SHORT, tensor_parallel_size=size) for size in (1, 2, 4)]
    first = ask_vllm([(config, None, 80.0) for config in configs], EIGHT, lines.append)
    assert lines == ["note: asking vLLM 9.9 for the plan of 3 settings; importing it takes several seconds, once"]
    assert len(asked) == 1
    assert [question["words"][3] for question in asked[0]] == ["1", "2", "4"]
    assert first == [Said("9.9", **NUMBERS)] * 3  # type: ignore[arg-type]
    again = ask_vllm([(config, None, 80.0) for config in configs], EIGHT, lines.append)
    assert (again, len(asked), len(lines)) == (first, 1, 1)


@pytest.mark.parametrize(
    ("change", "knows_model", "memory_gib", "asks"),
    [
        ({}, True, 80.0, False),
        ({}, True, None, False),
        ({"engine_args": ("--kv-cache-memory-bytes", "1024")}, True, 80.0, False),
        ({}, False, 80.0, True),  # no formula
        ({}, True, 0.08, True),  # 0.04 GiB of weights, and less than that for the KV cache
        ({"tensor_parallel_size": 3}, True, 80.0, True),  # what speaks against it is vLLM's to say
        ({"engine_args": ("--quantization", "fp8")}, True, 80.0, True),
    ],
)
def test_before_an_engine_loads_vllm_is_asked_only_in_doubt(
    change: dict[str, Any], knows_model: bool, memory_gib: float | None, asks: bool, asked: Asked
) -> None:
    config = replace(SHORT, **change)
    settings = [(config, facts() if knows_model else None, memory_gib)]
    answers = ask_vllm(settings, EIGHT, lambda _: None, only_in_doubt=True)
    assert (len(asked), answers != [None]) == (asks, asks)
    (said,) = ask_vllm(settings, EIGHT, lambda _: None)  # a plan asks, and what it was told is used from then on
    assert len(asked) == 1
    assert ask_vllm(settings, EIGHT, lambda _: None, only_in_doubt=True) == [said]


def test_replicas_on_their_own_are_one_question(asked: Asked) -> None:
    said_of(*(replace(SHORT, data_parallel_size=size) for size in (1, 2, 8)))
    assert len(asked[0]) == 1


@pytest.mark.parametrize(
    "change",
    [{"dtype": "float16"}, {"engine_args": ("--block-size", "32")}, {"seq_lens": (32,)}, {"trust_remote_code": True},
     {"gpu_memory_utilization": 0.5}, {"max_model_len": 512}, {"pipeline_parallel_size": 2}],
)  # fmt: skip
def test_what_changes_the_answer_is_asked_again(asked: Asked, change: dict[str, Any]) -> None:
    said_of(SHORT)
    said_of(replace(SHORT, **change))
    assert len(asked) == 2


def test_whether_an_engine_has_a_process_of_its_own_changes_no_plan(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quick start plans without, and measures with it."""
    said_of(SHORT)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    said_of(SHORT)
    assert len(asked) == 1
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    said_of(SHORT)
    assert len(asked) == 2


def test_another_content_memory_machine_or_vllm_is_asked_again(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    config = replace(SHORT, model=str(folder))
    said_of(config)
    said_of(config, memory_gib=40.0)
    said_of(config, devices=CPU)
    (folder / "config.json").write_text('{"a": 1}')
    said_of(config)
    (folder / "modeling.py").touch()
    said_of(config)
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "3,1")
    said_of(config)
    (tmp_path / "site" / "vllm" / "engine" / "arg_utils.py").write_text("# changed")
    said_of(config)
    monkeypatch.setattr(by_vllm, "_machine", lambda: ["gpu", "Model: another"])
    said_of(config)
    assert len(asked) == 8
    # And these change nothing that it answers.
    (folder / "tokenizer.json").touch()
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    said_of(replace(config, num_runs=7, output_dir="x", name="other", temperature=0.0))
    assert len(asked) == 8


def test_a_secret_is_neither_kept_nor_part_of_what_is_looked_for(asked: Asked, tmp_path: Path) -> None:
    asked.answers = [{"unknown": "OSError: --hf-token=hf_abcdefghij was refused", "may_pass": False}]
    (said,) = said_of(replace(SHORT, engine_args=("--hf-token", "hf_abcdefghij")))
    said_of(replace(SHORT, engine_args=("--hf-token", "hf_klmnopqrst")))
    assert len(asked) == 1
    assert asked[0][0]["words"][-1] == "hf_abcdefghij"
    (path,) = kept_files(tmp_path)
    assert said is not None
    assert "hf_abcdefghij" not in path.read_text() + str(said.unknown)


def test_what_may_be_gone_the_next_time_is_asked_again(asked: Asked) -> None:
    asked.answers = [{"unknown": "No module named 'torchvision'", "may_pass": True}]
    assert [said_of(SHORT), said_of(SHORT)] == [[Said("9.9", unknown="No module named 'torchvision'")]] * 2
    assert len(asked) == 2


def test_of_a_vllm_that_runs_out_of_time_what_it_said_counts(asked: Asked) -> None:
    asked.answers, asked.problem = [NUMBERS], "no answer within 130 s"
    lines: list[str] = []
    settings = [(replace(SHORT, tensor_parallel_size=size), None, 80.0) for size in (1, 2)]
    first, second = ask_vllm(settings, EIGHT, lines.append)
    assert first is not None
    assert (first.unknown, first.weights_gib) == (None, 2.5)
    assert second == Said("9.9", unknown="no answer within 130 s")
    assert lines[1:] == [
        "note: vLLM 9.9 could not answer for the whole plan (no answer within 130 s); the rest is by formula"
    ]
    asked.answers, asked.problem = None, None
    assert ask_vllm(settings, EIGHT, lines.append)[1] == first
    assert [len(questions) for questions in asked] == [2, 1]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", "{}", '{"weights_gib": "much"}', '{"weights_gib": 1.0, "waves": ["a"]}', '{"refusal": 1}',
     '{"weights_gib": 1.0, "waves": 3}'],
)  # fmt: skip
def test_an_unusable_file_is_ignored_and_replaced(asked: Asked, tmp_path: Path, content: str) -> None:
    first = said_of(SHORT)
    (path,) = kept_files(tmp_path)
    path.write_text(content)
    assert said_of(SHORT) == first
    assert len(asked) == 2
    assert json.loads(path.read_text()) == NUMBERS


def test_the_order_in_which_a_disk_lists_files_asks_nobody_again(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text("{}")
    config = replace(SHORT, model=str(tmp_path))
    said_of(config)
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda folder, kind: sorted(glob(folder, kind), reverse=True))
    said_of(config)
    assert len(asked) == 1


def test_a_cache_that_cannot_be_written_is_no_error(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert said_of(SHORT) == said_of(SHORT)
    assert len(asked) == 2


def test_a_model_of_the_hub_is_asked_for_where_it_lies_on_this_machine(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    config = replace(SHORT, model="org/name")
    assert said_of(config) == [None]
    assert asked == []
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert said_of(config) == [Said("9.9", **NUMBERS)]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["x" * 300, "org/" + "x" * 300, "/" + "x" * 5000, "s3://bucket/model", "a\0b", "o/[x"])
def test_what_is_no_model_here_is_not_asked_for(asked: Asked, name: str) -> None:
    assert said_of(replace(SHORT, model=name)) == [None]
    assert asked == []


@pytest.mark.parametrize("limit", ["0", "00"])
def test_a_limit_of_nothing_asks_nobody(asked: Asked, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, limit)
    assert (said_of(SHORT), asked) == ([None], [])


@pytest.mark.parametrize("limit", ["-1", "soon", "1e3", "9999999"])
def test_a_limit_that_is_no_number_is_an_error(asked: Asked, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, limit)
    with pytest.raises(ConfigError, match=f"{LIMIT_VARIABLE}: '{limit}' is not a whole number of seconds"):
        said_of(SHORT)
    assert asked == []


def test_without_vllm_nobody_is_asked_and_of_a_strange_one_it_is_said(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "site" / "vllm" / "v1" / "core" / "kv_cache_utils.py").unlink()
    assert said_of(SHORT) == [Said("9.9", unknown="it has no v1/core/kv_cache_utils.py")]
    monkeypatch.setattr(by_vllm, "vllm_folder", lambda: None)
    assert (said_of(SHORT), asked) == ([None], [])


def test_the_question_is_that_of_a_replica_in_vllms_flags() -> None:
    config = replace(
        SHORT, tensor_parallel_size=2, data_parallel_size=4, distributed_executor_backend="ray", max_num_seqs=9,
        engine_args=("--kv-cache-dtype", "fp8"),
    )  # fmt: skip
    question = question_of(config, facts(), 80.0, EIGHT)
    assert question.words == [
        "--model", TINY, "--tensor-parallel-size", "2", "--pipeline-parallel-size", "1",
        "--distributed-executor-backend", "mp", "--max-model-len", "80", "--max-num-seqs", "9", "--dtype", "auto",
        "--skip-tokenizer-init", "--no-enable-prefix-caching", "--enforce-eager", "--kv-cache-dtype", "fp8",
    ]  # fmt: skip
    assert (question.for_gpus, question.share_gib, question.pool_gib, question.requests) == (True, 64.0, None, [80, 32])
    experts = replace(config, engine_args=("--enable-expert-parallel",))
    of_mixture = question_of(experts, replace(facts(), is_moe=True), 80.0, EIGHT)
    assert of_mixture.words[6:8] == ["--data-parallel-size", "4"]
    assert "--data-parallel-size" not in question_of(experts, facts(), 80.0, EIGHT).words


def test_on_the_cpu_the_cache_has_the_size_that_vllm_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    on_cpu, for_gpus = (question_of(SHORT, facts(), None, devices) for devices in (CPU, EIGHT))
    assert (on_cpu.for_gpus, on_cpu.share_gib, on_cpu.pool_gib) == (False, None, 4.0)
    assert (for_gpus.for_gpus, for_gpus.share_gib, for_gpus.pool_gib) == (True, None, None)


# --- the process of its own -------------------------------------------------------------------------------------------


def stub_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(STUB))


def test_a_vllm_that_is_another_than_we_know_makes_every_answer_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stub_child(monkeypatch)
    question = json.dumps({"own_folder": str(tmp_path), "questions": [{"words": [], "for_gpus": True}] * 2})
    lines, problem = ask_for_lines("plan.meta_device", question, timeout_s=50)
    assert problem is not None or len(lines) == 2
    assert all(line["unknown"] for line in lines)
    assert "Traceback" not in f"{lines}{problem}"


def test_a_child_that_takes_too_long_or_fails_gives_a_reason() -> None:
    assert ask_for_lines("plan.meta_device", "[]", timeout_s=0.001) == ([], "no answer within 0 s")
    lines, problem = ask_for_lines("no_such_module", "", timeout_s=50)
    assert lines == []
    assert "No module named" in (problem or "")


@pytest.mark.slow
def test_nobody_imports_the_stand_ins_but_the_process_that_ends_with_them() -> None:
    importing = {
        path.name
        for path in (REPOSITORY / "batch_inference").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.endswith((".stand_ins", ".meta_device"))
    }
    assert importing == {"meta_device.py"}


def test_a_failure_of_one_setting_is_no_failure_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def tell(question: dict[str, Any], told: dict[str, Any]) -> None:
        told["longest"] = 7
        if question["fails"]:
            raise question["fails"]
        told["weights_gib"] = 1.0

    monkeypatch.setattr(meta_device, "_tell", tell)
    monkeypatch.setattr(meta_device, "_is_for_others", lambda _: False)
    monkeypatch.setattr(meta_device, "no_streams", contextlib.nullcontext)
    answers = [
        meta_device.answer({"fails": error})
        for error in (KeyError("x"), UnknownError("why"), ValueError("8 is not divisible by 3"), None)
    ]
    assert [answer.get("unknown") for answer in answers] == ["KeyError: 'x'", "why", None, None]
    assert answers[2]["refusal"] == "8 is not divisible by 3"
    assert answers[3] == {"longest": 7, "weights_gib": 1.0}


PARALLEL = {"tensor_parallel_size": 2, "pipeline_parallel_size": 3, "data_parallel_size": 4}


def test_layers_see_the_first_rank_of_a_stage() -> None:
    names = ("_WORLD", "_TP", "_PP", "_DP", "_EP", "_DCP")
    state, parallel = SimpleNamespace(**dict.fromkeys(names)), SimpleNamespace(**PARALLEL)
    be_first_rank_of(2, parallel, state)
    told = {name: (group.world_size, group.rank_in_group) for name, group in vars(state).items()}
    assert told == {"_WORLD": (6, 4), "_TP": (2, 0), "_PP": (3, 2), "_DP": (4, 0), "_EP": (8, 0), "_DCP": (1, 0)}
    assert (state._PP.is_first_rank, state._PP.is_last_rank, state._PP.prev_rank) == (False, True, 1)
    assert parallel.rank == 4


def test_a_vllm_without_the_groups_that_we_know_is_not_asked() -> None:
    with pytest.raises(UnknownError, match="has no _PP, _EP"):
        be_first_rank_of(0, SimpleNamespace(**PARALLEL), SimpleNamespace(_WORLD=1, _TP=1, _DP=1))


def test_a_group_can_be_asked_for_its_size_by_torchs_words() -> None:
    group = Group(4, 1)
    assert (group.cpu_group.size(), group.device_group.rank(), group.ranks) == (4, 1, [0, 1, 2, 3])


# --- what is made of it -----------------------------------------------------------------------------------------------


def test_vllms_refusal_is_an_obstacle_and_what_it_takes_is_none() -> None:
    three = replace(SHORT, tensor_parallel_size=3)
    assert "does not divide" in (rules_against(three, facts(), EIGHT) or "")
    assert rules_against(three, facts(), EIGHT, Said("9.9", weights_gib=1.0)) is None
    refused = Said("9.9", refusal="10 is not divisible by 3")
    assert rules_against(three, facts(), EIGHT, refused) == "vLLM 9.9 refuses it: 10 is not divisible by 3"
    # Where it says nothing, formulas do.
    assert "does not divide" in (rules_against(three, facts(), EIGHT, Said("9.9", unknown="why")) or "")


def test_of_a_length_that_vllm_refuses_our_flags_are_named() -> None:
    said = Said("9.9", refusal="User-specified max_model_len (80) is greater than ...", longest=70)
    reason = rules_against(SHORT, None, EIGHT, said)
    assert reason == "--seq-lens 64 plus --max-tokens 16 is 80, more than the model's 70; shorten the requests"


def words_of_plan(said: Said | None, config: ExperimentConfig = SHORT) -> str:
    return " ".join(" ".join(setting_plan(config, facts(), EIGHT, 80.0, said)).split())


def test_the_plan_of_a_setting_says_whose_numbers_it_has() -> None:
    by_it = words_of_plan(Said("9.9", **NUMBERS))  # type: ignore[arg-type]
    assert (
        "about 2.5 GiB of weights per device; 2 GiB of KV cache per device for the largest point in one wave; 8 GiB "
        "are available for it; requests that fit in one wave: 15 of length 64, 31 of length 16 (by vLLM 9.9)" in by_it
    )
    assert "(by formula)" in words_of_plan(None)
    assert "(by formula); not by vLLM 9.9: no time" in words_of_plan(Said("9.9", unknown="no time"))
    refused = words_of_plan(Said("9.9", refusal="10 is not divisible by 3"))
    assert "memory none: it is refused" in refused
    assert "verdict cannot run: vLLM 9.9 refuses it: 10 is not divisible by 3" in refused


def test_weights_that_do_not_fit_leave_no_room() -> None:
    said = Said("9.9", weights_gib=70.0, pool_gib=-6.0, waves=[0, 0], kv_cache_tokens=0, kv_gib=[1.0, 0.5])
    text = words_of_plan(said)
    assert "memory about 70 GiB of weights per device (by vLLM 9.9)" in text
    assert "verdict cannot run: 70 GiB of weights do not fit into 64 GiB of a device" in text
    needs = needs_of(SHORT, None, EIGHT, 80.0, said)
    assert (needs.kv_cache_tokens, needs.requests_in_one_wave) == (0, {64: 0, 16: 0})


def test_what_vllm_does_not_say_is_unknown() -> None:
    needs = needs_of(SHORT, facts(), EIGHT, None, Said("9.9", weights_gib=1.0))
    assert (needs.weights_gib, needs.kv_cache_tokens, needs.requests_in_one_wave) == (1.0, None, None)
    assert "about 1 GiB of weights per device (by vLLM 9.9)" in words_of_plan(Said("9.9", weights_gib=1.0))


def plan_of_preset(*answers: Any, asked: Asked) -> tuple[str, list[dict[str, Any]]]:
    asked.answers = list(answers)
    words = ["study", "--model", TINY, "--seq-lens", "64,16", "--dry-run", "--devices", "8"]
    options = parse_options([*words, "--", "--max-tokens", "16", "--device-memory-gib", "80"])
    preset = Preset("study", "words", [])
    jobs = [job_of(Setting(size, 1, 1), 29501, 0, preset, options, Here("python3", "")) for size in (1, 2)]
    found = planned(jobs, EIGHT, lambda _: None)
    text = " ".join("\n".join(plan(found, [], "", EIGHT)).replace("#", " ").split())
    return text, json.loads(plan_as_json(found, EIGHT))


def test_the_plan_of_a_preset_says_whose_numbers_it_has(asked: Asked) -> None:
    text, (first, second) = plan_of_preset(NUMBERS, {**NUMBERS, "weights_gib": 1.25}, asked=asked)
    assert "memory: by vLLM 9.9 setting" in text
    assert "2.5 1280 15 / 31" in text
    assert {name: first[name] for name in ("weights_gib", "source", "max_model_len", "unknown")} == {
        "weights_gib": 2.5, "source": "vLLM 9.9", "max_model_len": 2048, "unknown": [],
    }  # fmt: skip
    assert second["weights_gib"] == 1.25
    assert second["requests_in_one_wave"] == {"64": 15, "16": 31}


def test_a_plan_that_is_vllms_in_part_names_the_settings(asked: Asked) -> None:
    text, (first, second) = plan_of_preset(NUMBERS, {"unknown": "not on CPU"}, asked=asked)
    assert "memory: by vLLM 9.9 (tp_1); by formula (tp_2)" in text
    assert "not by vLLM 9.9: not on CPU (tp_2)" in text
    assert (first["source"], second["source"]) == ("vLLM 9.9", "formula")
    assert second["unknown"] == ["not by vLLM 9.9: not on CPU"]


def test_a_setting_that_vllm_refuses_is_no_command(asked: Asked) -> None:
    text, (_, second) = plan_of_preset(NUMBERS, {"refusal": "10 is not divisible by 2"}, asked=asked)
    assert "tp_2 cannot run: vLLM 9.9 refuses it: 10 is not divisible by 2" in text
    assert "memory: by vLLM 9.9 setting" in text
    assert "--tensor-parallel-size 2" not in text
    assert (second["obstacle"], second["weights_gib"]) == ("vLLM 9.9 refuses it: 10 is not divisible by 2", None)


# --- whole programs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def refusing(tmp_path: Path) -> dict[str, str]:
    """The environment of a program, with a vLLM that refuses whatever it is asked."""
    vllm = tmp_path / "site" / "vllm"
    for name in ("__init__.py", "platforms.py", *by_vllm._NEEDED):
        (vllm / name).parent.mkdir(parents=True, exist_ok=True)
        (vllm / name).touch()
    (vllm / "platforms.py").write_text("print('noise')\nraise ValueError('10 is not divisible by 3. Buy another.')\n")
    (vllm / "model_executor" / "models").mkdir(parents=True)
    (vllm / "model_executor" / "models" / "registry.py").touch()
    environment = {**os.environ, "PYTHONPATH": str(vllm.parent), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    del environment[LIMIT_VARIABLE]
    return environment


@pytest.fixture
def in_doubt(tmp_path: Path) -> str:
    """A model for which there is no formula."""
    folder = tmp_path / "in_doubt"
    shutil.copytree(TINY, folder)
    config = json.loads(Path(TINY, "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["AnotherForCausalLM"]}))
    return str(folder)


REFUSED = re.compile(r"vLLM \S+ refuses it: 10 is not divisible by 3$")


def run(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)


@pytest.mark.slow
def test_the_script_asks_before_it_measures_and_its_second_answer_comes_at_once(
    refusing: dict[str, str], in_doubt: str, tmp_path: Path
) -> None:
    command = experiment_command(tmp_path, *SMALL_GRID, "--model", in_doubt)
    first, second = run(refusing, *command), run(refusing, *command)
    asking, error = first.stderr.splitlines()
    assert asking.startswith("note: asking vLLM ")
    assert second.stderr.splitlines() == [error]
    assert error.startswith("error: ")
    assert REFUSED.search(error)
    assert (first.returncode, second.returncode) == (2, 2)
    assert not (tmp_path / "tp_1_results.json").exists()


@pytest.mark.slow
def test_a_plan_with_kept_answers_answers_at_once(refusing: dict[str, str], tmp_path: Path) -> None:
    command = [*experiment_command(tmp_path, *SMALL_GRID), "--dry-run"]
    first = run(refusing, *command)
    assert first.returncode == 1
    assert REFUSED.search(" ".join(first.stdout.split()))
    (path,) = kept_files(tmp_path)
    path.write_text(json.dumps({"weights_gib": 0.25}))
    second = run(refusing, *command)
    assert (second.returncode, second.stderr) == (0, "")
    assert re.search(r"memory +about 0.25 GiB of weights per device \(by vLLM ", second.stdout)
    assert_answers_at_once(command, tmp_path, refusing)


@pytest.mark.slow
def test_the_launcher_asks_once_for_all_and_measures_nothing_that_is_refused(
    refusing: dict[str, str], in_doubt: str, tmp_path: Path
) -> None:
    words = ("tensor-parallel", "--model", in_doubt, "--seq-lens", "16", "--output-dir", str(tmp_path / "out"))
    done = run({**refusing, "PYTHON": sys.executable}, str(REPOSITORY / "run_batch_experiments.sh"), *words)
    assert done.returncode == 1
    assert done.stderr.count("asking vLLM") == 1
    assert "refuses it: 10 is not divisible by 3" in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
