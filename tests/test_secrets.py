"""What is a secret, what stands in its place, and that none reaches a file or the terminal, however it is written."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from batch_inference.analyze.flags import UsageError
from batch_inference.analyze.tables import load_setting
from batch_inference.core import secrets
from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.core.failures import WorkFailedError
from batch_inference.core.flags import parse_flags
from batch_inference.core.result_file import load_result
from batch_inference.core.results import Failure, StoredConfig
from batch_inference.core.secrets import is_secret_name, redact, redact_text, redact_value, remember
from batch_inference.launch.meeting import introduction
from batch_inference.launch.options import parse_options
from batch_inference.launch.presets import Preset
from batch_inference.launch.stored import time_left
from batch_inference.measure.logs import open_log
from batch_inference.measure.variables import HARMLESS, SET, variables_kept
from batch_inference.plan.devices import Devices
from batch_inference.plan.printed import setting_plan
from builders import make_point, make_result, save_all
from conftest import REPOSITORY, SMALL_GRID, TINY, commands_of, experiment_command, stub_environment

# {} is the secret. Every line is one spelling that vLLM's parser, or a user in a hurry, may come with.
SPELLINGS: tuple[tuple[str, ...], ...] = (
    ("--hf-token", "{}"),
    ("--hf-token={}",),
    ("--hf_token", "{}"),
    ("--hf_token={}",),
    ("--hf-token=-{}",),
    ("--hf-token=--{}",),
    ("--hf-token={}=={}",),
    ("--HF-TOKEN", "{}"),
    ("--passwd", "{}"),
    ("--passwd={}",),
    ("--password", "{}"),
    ("--pwd={}",),
    ("--db-pass", "{}"),
    ("--credentials", "{}"),
    ("--credentials", "first", "{}"),
    ("--creds={}",),
    ("--api-key-file={}",),
    ("--api-key", "{}"),
    ("--apikey={}",),
    ("--s3-secret-access-key", "{}"),
    ("--awsAccessKeyId={}",),
    ("--auth", "{}"),
    ("--use-auth-token={}",),
    ("--session-cookie", "{}"),
    ("--ssh-passphrase={}",),
    ("--hf-overrides", '{"token": "{}"}'),
    ("--hf-overrides", '{"a": [{"b": {"hf_token": "{}"}}]}'),
    ("--hf-overrides", '{"credentials": {"user": "u", "parts": ["x", "{}"]}}'),
    ("--hf-overrides", '{"key": "{}", "eos_token_id": 2}'),
    ("--hf-overrides", '{"inside": "{\\"password\\": \\"{}\\"}"}'),
    ("--hf-overrides", '["--api-key={}"]'),
    ("--hf-overrides", '{"https://u:{}@host/x": 1}'),
    ("--hf-overrides", '{"token": "{}"'),
    ("--hf-overrides", "{'token': '{}'}"),
    ('--model-loader-extra-config={"aws_secret_access_key": "{}"}',),
    ("--model-loader-extra-config", "aws_secret_access_key={},region=eu"),
    ("--hf-overrides.token", "{}"),
    ("--hf-overrides.token={}",),
    ("--hf-overrides.credentials.user", "{}"),
    ("--hf-overrides.tokens.api-key+", "{}"),
    ("--model-loader-extra-config.aws_secret_access_key={}",),
    ("--tokenizer", "https://user:{}@host/org/name"),
    ("--tokenizer", "https://{}@host/org/name"),
    ("--tokenizer", "https://user:{}/more@host/org/name"),
    ("--tokenizer=s3://user:{}@bucket/name@v1",),
    ("--tokenizer", "user:{}@proxy:3128"),
    ("--tokenizer", "https://host/name?token={}"),
    ("--tokenizer", "https://host/name?x=1&X-Amz-Signature={}&y=2"),
    ("--tokenizer", "https://host/name?sig={}#access_token={}"),
    ("--tokenizer", "Authorization: Bearer {}"),
    ("--middleware", "HF_TOKEN={}"),
)
# In what is kept of these, nothing is changed.
PLAIN: tuple[str, ...] = (
    "--max-tokens 4 --max-num-batched-tokens 2048 --max-num-scheduled-tokens 9 --spec-tokens 3",
    "--tokenizer org/name --tokenizer-mode auto --tokenizer-revision main --skip-tokenizer-init",
    "--tool-call-parser hermes --long-prefill-token-threshold 4 --dbo-decode-token-threshold=3",
    "--enable-prompt-tokens-details --ray-workers-use-nsight --kv-cache-dtype fp8 --quantization fp8 -q fp8 -tp 2 -O3",
    '--hf-overrides {"eos_token_id":[1,2],"pad_token":"<pad>","num_kv_heads":8,"token":null,"use_auth_token":true}',
    '--hf-overrides {"image_token_index": 32000, "head_dim": 128, "num_experts_per_tok": 2, "sort_key": "size"}',
    "--hf-overrides.num_key_value_heads 8 --hf-overrides.bos_token=<s> --compilation-config.pass_config.fuse true",
    "--model meta-llama/Llama-3.1-8B --revision v1@2 --download-dir /data/secrets_of_nature/x",
    "--model s3://bucket/name?version=3&size=7 --tokenizer https://host:8080/name@v1 --served-model-name a:b",
    "--limit-mm-per-prompt image=2,video=1 --lora-modules a=org/a --mm-processor-kwargs {\"max_pixels\":1}",
    "--hf-token --load-format dummy --hf-token=True --hf-token none",
    "--master-addr 10.0.0.1 --rope-theta 1e6 --seed 7 --name output_tok_per_s",
)  # fmt: skip
PLAIN_NAMES = (
    "max_tokens", "output_tok_per_s", "eos_token_id", "tokenizer", "tokens", "num_tokens", "bos_token", "passes",
    "TOKENIZERS_PARALLELISM", "num_key_value_heads", "keys", "monkey", "turkey", "cache_key", "key_dim", "compass",
    "forward_pass", "NoCredentialsError", "VLLM_MULTI_STREAM_GEMM_TOKEN_THRESHOLD", "ssl_keyfile", "assign", "author",
    "parser", "tool_call_parser", "num_experts_per_token", "per_tok", "design", "authors", "signal",
)  # fmt: skip
LINES = (
    "401 Client Error: Unauthorized for url: https://user:{}@host/api/models",
    "(EngineCore pid=7) ValueError: bad config {'model': 'm', 'hf_token': '{}', 'max_tokens': 4}",
    "ValueError: {'loader': {'extra': {'aws_secret_access_key': \"{}\"}}}",
    "--api-key: '{}' was given; a number is needed",
    "curl -H 'Authorization: Bearer {}' https://host",
    "download https://host/f?X-Amz-Credential={}&X-Amz-Signature={} failed",
    "export HF_TOKEN={}; vllm serve --api-key {} --port 1",
    "Password: {}",
    "--compare https:/user:{}@host/x: does not exist",
    'config = {\\"token\\": \\"{}\\"}',
)
SENTENCES = (
    "NoCredentialsError: Unable to locate credentials",
    "argument --hf-token: expected one argument",
    "--hf-token needs a value; set HF_TOKEN",
    "vllm serve --hf-token --revision main",
    "KeyError: 'model.layers.0.weight'; key: value",
    "  [1/6] 1 x 64: 150.7 tok/s ±5.7%, 0.212 s, TTFT 0.012 s, 2.31 GiB, suspect",
    "ValueError: tokens must be above 0: 5; eos_token='</s>', pad_token=0, num_key_value_heads: 8",
    "see https://host:8080/a@b and https://host/x?page=2&lang=en",
    "PYTHONPATH=/home/me/secrets:/home/me/api-key:/opt",
    "{'hf_token': None, 'token': '', 'use_auth_token': False}",
)


@pytest.fixture(autouse=True)
def _knows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_known", {})


def hush(number: int = 0) -> str:
    """One that is found wherever it stands: of no known form, and long enough."""
    return f"hUsh{number:03}zQ"


def filled(words: tuple[str, ...], secret: str) -> list[str]:
    return [word.replace("{}", secret) for word in words]


@pytest.mark.parametrize("words", SPELLINGS, ids=" ".join)
def test_a_secret_is_blotted_out_however_it_is_written_and_stays_so(words: tuple[str, ...]) -> None:
    kept = redact(["script.py", *filled(words, hush()), "--max-tokens", "4"])
    assert hush() not in str(kept)
    assert kept[-2:] == ["--max-tokens", "4"]
    assert redact(kept) == kept
    remember(filled(words, hush()))
    assert hush() not in redact_text(f"error: {' '.join(filled(words, hush()))}")


@pytest.mark.parametrize("line", PLAIN)
def test_what_is_no_secret_stays_as_it_was_written(line: str) -> None:
    assert redact(line.split()) == line.split()


def test_no_flag_of_this_program_or_of_vllm_is_taken_for_a_secret_but_the_token() -> None:
    ours = [name for name in vars(ExperimentConfig()) if is_secret_name(name)]
    assert (ours, [name for name in PLAIN_NAMES if is_secret_name(name)]) == ([], [])
    assert is_secret_name("--hf-token")


def test_what_explains_this_program_holds_nothing_that_is_taken_for_a_secret() -> None:
    for path in ("README_batch_inference.md", "tests/golden/v2_cpu_tp_2.json", "docs/h100/study/tp_1_results.json"):
        text = (REPOSITORY / path).read_text()
        changed = [line for line in text.splitlines() if redact_text(line) != line]
        assert all("<hf_token>" in redact_text(line) for line in changed), changed


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_a_log_is_read_as_a_person_would(line: str) -> None:
    told = redact_text(line.replace("{}", hush()))
    assert hush() not in told
    assert redact_text(told) == told


@pytest.mark.parametrize("line", SENTENCES)
def test_a_sentence_about_secrets_is_none(line: str) -> None:
    assert redact_text(line) == line


def test_what_stands_for_a_secret_says_which() -> None:
    assert redact(["https://u:p@h/m?token=z", "--hf-token", "x", "--a.apiKey=y"]) == [
        "https://<login>@h/m?token=<token>", "--hf-token", "<hf_token>", "--a.apiKey=<api_key>",
    ]  # fmt: skip
    assert redact(["--s3-secretKey", "-x"]) == ["--s3-secretKey", "<s3_secret_key>"]
    assert redact(["--hf-token=x", "--Other", "y"]) == ["--hf-token=<hf_token>", "--Other", "y"]
    assert redact_value('{"a": {"token": "x", "n": 1}}') == '{"a": {"token": "<token>", "n": 1}}'
    assert json.loads(redact_value('{"password": 12345678, "on": true, "token": null}')) == {
        "password": "<password>", "on": True, "token": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    "value", ["[" * 100_000, '{"a":' * 5000, '{"token": ', "\ud800{", '{"a": 1e999}', "{" + "9" * 5000]
)
def test_json_that_is_none_or_has_no_end_is_read_as_text(value: str) -> None:
    assert redact_value(value) == value


# --- what this process knows ------------------------------------------------------------------------------------------


def test_a_secret_that_is_known_is_hidden_where_no_name_stands_before_it() -> None:
    remember(["--hf-token", "first-secret", "--x", '{"password": "a\\"quoted-one"}', "https://me:p%40ssword@h/"], {
        "HF_TOKEN": "second-secret", "PROXY": "http://u:third-secret@h", "SHORT_TOKEN": "abc", "PATH": "/bin",
        "PWD": "/nowhere/at/all", "AWS_TOKEN_FILE": str(REPOSITORY), "ODD_TOKEN": "/no-such-path",
            "LANG": "C.UTF-8",
    })  # fmt: skip
    told = (
        'first-secret|second-secret|third-secret|a"quoted-one|a\\"quoted-one|p%40ssword|p@ssword|abc|/bin|/no-such-path'
    )
    shown = redact_text(f"{told}|/nowhere/at/all|{REPOSITORY}|C.UTF-8")
    assert shown == (
        "<hf_token>|<hf_token>|<login>|<password>|<password>|<login>|<login>|abc|/bin|<odd_token>"
        f"|/nowhere/at/all|{REPOSITORY}|C.UTF-8"
    )


def test_the_longer_of_two_secrets_is_hidden_first() -> None:
    remember(["--api-key", "abcdefgh", "--hf-token", "abcdefgh-and-more"])
    assert redact_text("abcdefgh-and-more abcdefgh") == "<hf_token> <api_key>"


def test_an_error_says_no_secret() -> None:
    remember(["--hf-token", hush()])
    for kind in (ConfigError, WorkFailedError, UsageError):
        assert str(kind(f"{hush()} is wrong")) == "<hf_token> is wrong"
        assert f"{kind('https://u:p@h')}" == "https://<login>@h"


# --- flags, the hash, the file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["-abc", "--hUsh1", "-9f", "--a1b2c3", "-hush", "-tpx", "-"])
def test_a_value_that_begins_with_a_dash_is_written_with_an_equals_sign(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_flags(["--hf-token", value])
    assert str(caught.value) == "--hf-token: its value begins with -; join flag and value with ="
    assert parse_flags([f"--hf-token={value}"])[0].engine_args == (f"--hf-token={value}",)


def test_a_placeholder_is_no_value() -> None:
    for words in (
        ["--hf-token", "<hf_token>"],
        ["--hf-overrides", '{"token": "<token>"}'],
        ["--model", "s3://<login>@b/x"],
    ):
        with pytest.raises(ConfigError, match="is a placeholder for a secret"):
            parse_flags(words)
    assert parse_flags(["--hf-overrides", '{"pad_token": "<pad>"}'])


def test_neither_the_hash_nor_what_nodes_compare_holds_a_secret() -> None:
    first, second = (
        ExperimentConfig(
            model=f"https://u:{secret}@h/m",
            engine_args=("--hf-token", secret, "--hf-overrides", f'{{"token": "{secret}", "n": 1}}'),
        )
        for secret in (hush(1), hush(2))
    )
    assert first.settings_hash() == second.settings_hash()
    assert first.arguments_hash() == second.arguments_hash()
    assert first.same_settings() == StoredConfig.of(second).same_settings()
    assert "hUsh" not in str([first.same_settings(), first.arguments(), StoredConfig.of(first)])
    other = replace(first, engine_args=("--hf-token", hush(1), "--hf-overrides", f'{{"token": "{hush(1)}", "n": 2}}'))
    assert other.settings_hash() != first.settings_hash()


def test_settings_of_an_earlier_version_are_found_again() -> None:
    stored = replace(StoredConfig.of(ExperimentConfig()), engine_args=("--hf-token", "***", "--load-format=dummy"))
    now = ExperimentConfig(engine_args=("--hf-token", "abc", "--load-format", "dummy"))
    assert stored.same_settings() == now.same_settings()


def test_variables_are_kept_where_they_are_known_to_be_harmless() -> None:
    kept = variables_kept({
        "CUDA_VISIBLE_DEVICES": "0,1", "VLLM_USE_DEEP_GEMM": "0", "SLURM_NNODES": "2", "SLURM_JOB_COMMENT": "x",
        "VLLM_API_KEY": "a", "VLLM_SOMETHING_NEW": "b", "NCCL_UNHEARD_OF": "c", "HOME": "/root", "HF_TOKEN": "d",
        "RAY_ADDRESS": "ray://u:p@h:1", "VLLM_CACHE_ROOT": "/cache",
    })  # fmt: skip
    assert kept == {
        "CUDA_VISIBLE_DEVICES": "0,1", "VLLM_USE_DEEP_GEMM": "0", "SLURM_NNODES": "2", "VLLM_API_KEY": SET,
        "VLLM_SOMETHING_NEW": SET, "NCCL_UNHEARD_OF": SET, "RAY_ADDRESS": "ray://<login>@h:1",
        "VLLM_CACHE_ROOT": "/cache",
    }  # fmt: skip
    assert not [name for name in HARMLESS if is_secret_name(name)]


def test_a_log_can_be_read_by_its_owner_alone(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    with open_log(log) as file:
        file.write(b"one\n")
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    log.chmod(0o644)
    with open_log(log) as file:
        file.write(b"two\n")
    assert (stat.S_IMODE(log.stat().st_mode), log.read_text()) == (0o600, "one\ntwo\n")
    with open_log(log, fresh=True):
        assert log.read_text() == ""


def test_what_is_no_file_keeps_its_rights(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o644)
    with pytest.raises(OSError, match="it is not a regular file"), open_log(pipe):
        pass
    assert stat.S_IMODE(pipe.stat().st_mode) == 0o644


# --- what is printed, sent and analysed -------------------------------------------------------------------------------


def test_the_plan_of_a_setting_shows_no_secret() -> None:
    config = ExperimentConfig(model="https://u:short@h/m", engine_args=("--hf-token", "short"))
    told = "\n".join(setting_plan(config, None, Devices("cpu", ("0",))))
    assert ("short" in told, "<hf_token>" in told, "https://<login>@h/m" in told) == (False, True, True)


def test_nodes_are_told_no_secret_of_a_preset() -> None:
    preset = Preset("mine", "", settings=[["TP=1", "--hf-token", "short"]], flags=["--hf-overrides.token", "short"])
    hello = introduction(preset, parse_options(["mine", "--", "--api-key", "short"]), Devices("cpu", ("0",)))
    assert "short" not in str(hello)


def test_files_of_earlier_versions_are_analysed_without_their_secrets(tmp_path: Path) -> None:
    old = {"model": f"https://u:{hush()}@h/m", "engine_args": ["--credentials", hush(), "--max-num-seqs", "4"]}
    failed = make_point(2, latencies_s=[], status="error", reason=f"no {{'token': '{hush()}'}}")
    lost = make_result("lost", [failed], status="failed", config=old, failure=Failure("unknown", f"https://{hush()}@h"))
    for path in save_all([make_result("tp_1", [make_point(), failed], config=old), lost], tmp_path):
        assert hush() in path.read_text()
        assert hush() not in str(load_setting(path))


def test_how_long_it_takes_is_known_for_a_model_with_a_password(tmp_path: Path) -> None:
    config = ExperimentConfig(model="https://u:p@h/m", output_dir=str(tmp_path), batch_sizes=(1,), seq_lens=(8,))
    stored = make_result("tp_2", [make_point()], config={"model": StoredConfig.of(config).model})
    save_all([stored], tmp_path)
    assert time_left([config], "gpu")


def test_a_rank_hides_what_it_prints_into_its_log(tmp_path: Path) -> None:
    log = tmp_path / "rank.log"
    program = (
        "import sys; from pathlib import Path; from batch_inference.measure.worker import _printing_to as to\n"
        f"with to(Path({str(log)!r})): print({{'hf_token': 'short'}}); print('HF_TOKEN=short', file=sys.stderr)\n"
        "print('token=shown')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert (log.read_text(), done.stdout) == ("{'hf_token': '<hf_token>'}\nHF_TOKEN=<hf_token>\n", "token=shown\n")


# --- the real programs ------------------------------------------------------------------------------------------------


def streams_and_files(folder: Path, *runs: subprocess.CompletedProcess[str]) -> Iterator[tuple[str, str]]:
    for run in runs:
        yield "stdout", run.stdout
        yield "stderr", run.stderr
    for path in folder.rglob("*"):
        yield path.name, path.name
        if path.is_file():
            yield path.name, path.read_bytes().decode(errors="replace")


def leaks(folder: Path, *runs: subprocess.CompletedProcess[str]) -> list[str]:
    """Where a secret is, and the words around it."""
    return [
        f"{name}: {text[max(0, place - 80) : place + 20]!r}"
        for name, text in streams_and_files(folder, *runs)
        if (place := text.find("hUsh")) >= 0
    ]


def every_spelling() -> tuple[list[str], str]:
    """All of them as words of one command line, each with a secret of its own; and the flags for the stub to know."""
    words: list[str] = []
    unknown: dict[str, None] = {}
    for number, spelling in enumerate(SPELLINGS):
        flag = spelling[0].partition("=")[0]
        # vLLM's own parser takes a flag of JSON only with JSON, and each flag is one of its own here.
        name = flag if "." in flag or "+" in flag else f"{flag}-{'abcdefghijklmnopqrstuvwxyz'[number % 26]}-{flag[2:]}"
        words += filled((name + spelling[0][len(flag) :], *spelling[1:]), hush(number))
        unknown[name.replace("_", "-")] = unknown[name] = None
    return words, " ".join(unknown)


def run(folder: Path, *flags: str, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    environment = stub_environment(XDG_CACHE_HOME=str(folder / "cache"), **variables)
    command = experiment_command(folder, *SMALL_GRID, *flags)
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=90)


VARIABLES = {
    "HF_TOKEN": hush(901),
    "VLLM_API_KEY": hush(902),
    "VLLM_S3_ENDPOINT": f"https://user:{hush(903)}@host",
    "VLLM_UNHEARD_OF": hush(904),
    "RAY_ADDRESS": f"ray://user:{hush(905)}@host:1",
    "HTTPS_PROXY": f"http://user:{hush(906)}@proxy:3128",
    # What an engine may say of all that.
    "STUB_SAYS": f"; HF_TOKEN is {hush(901)}, https://user:{hush(907)}@host/x?sig={hush(908)} via {hush(906)}",
}


@pytest.mark.slow
def test_no_spelling_reaches_a_file_or_the_terminal(tmp_path: Path) -> None:
    words, flags = every_spelling()
    assert len(SPELLINGS) >= 30
    # What vLLM has a flag for, and checks.
    own = [
        "--hf-token",
        hush(950),
        "--hf-overrides",
        f'{{"token": "{hush(951)}"}}',
        "--tokenizer",
        f"s3://u:{hush(952)}@b",
    ]
    expected = {"hf_token": own[1], "hf_overrides": json.loads(own[3]), "tokenizer": own[5]}
    variables = {**VARIABLES, "STUB_FLAGS": flags, "STUB_EXPECTS": json.dumps(expected)}
    done = run(tmp_path, "--verbose", *own, *words, variables=variables)
    assert done.returncode == 0, done.stderr
    result = load_result(tmp_path / "tp_1_results.json")
    # All of it was kept, and the engine got what the user gave.
    assert len(result.config.engine_args) == len([*own, *words])
    assert "non-default args" in (tmp_path / "tp_1_results.log").read_text()
    assert result.environment.variables["VLLM_API_KEY"] == SET
    again = run(tmp_path, *own, *words, variables=variables)
    assert "2 of 2 points are kept" in " ".join(again.stderr.split())
    analysis = [str(REPOSITORY / "analyze_results.py"), "--input", str(tmp_path), "--no-plots"]
    told = subprocess.run(
        [sys.executable, *analysis], capture_output=True, text=True, env=stub_environment(), timeout=90
    )
    assert (tmp_path / "analysis" / "results.csv").exists(), told.stderr
    assert not leaks(tmp_path, done, again, told)


@pytest.mark.slow
@pytest.mark.parametrize("fail", ["load", "run:2", "die:1"])
def test_what_an_engine_says_when_it_fails_is_kept_without_secrets(tmp_path: Path, fail: str) -> None:
    flags = ("--model", f"user:{hush(1)}@host/name", "--hf-token", hush(2))
    done = run(tmp_path, *flags, variables={**VARIABLES, "STUB_FAIL": fail})
    assert done.returncode == 1, done.stderr
    result = load_result(tmp_path / "tp_1_results.json")
    assert result.config.model == "<login>@host/name"
    assert not leaks(tmp_path, done)


@pytest.mark.slow
@pytest.mark.parametrize("fail", ["load", "die:1"])
def test_what_another_process_writes_stays_in_a_log_that_nobody_else_may_read(tmp_path: Path, fail: str) -> None:
    said = f"(EngineCore) ValueError: {hush(1)} is refused by https://user:{hush(2)}@host\n"
    variables = {"HF_TOKEN": hush(1), "STUB_FAIL": fail, "STUB_WRITES": said * 2}
    done = run(tmp_path, "--verbose", variables=variables)
    assert done.returncode == 1, done.stderr
    log = tmp_path / "tp_1_results.log"
    assert (said in log.read_text(), stat.S_IMODE(log.stat().st_mode)) == (True, 0o600)
    log.unlink()
    result = load_result(tmp_path / "tp_1_results.json")
    failed = result.failure or result.points[0]
    assert "(EngineCore) ValueError: <hf_token> is refused by https://<login>@host" in (failed.log_tail or [])
    assert "<hf_token> is refused by" in done.stderr
    assert result.failure is None or result.failure.reason.startswith("ValueError: <hf_token> is refused by")
    assert not leaks(tmp_path, done)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("--hf-token", "-hUsh-1"),
        ("--hf-token", "--hush-hush"),
        ("--hf-token", "-hush-hush"),
        ("--hf-token", "hUsh-hush-1", "--hf-overides", "x"),
        ("hUsh-hush-1",),
        ("--load-format", "dummy", "--passwd", "hUsh-hush-1"),
        ("--hf-overrides", '{"token": "hUsh-hush-1"'),
        ("--block-size", "https://u:hUsh-hush-1@host"),
        ("--batch-sizes", "https://u:hUsh-hush-1@host"),
    ],
)
def test_an_error_line_holds_no_secret(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = run(tmp_path, *words, variables={"HF_TOKEN": "hUsh-hush-1"})
    assert (done.returncode, done.stderr.count("error: ")) == (2, 1), done.stderr
    assert "hush-hush" not in done.stdout + done.stderr
    assert not leaks(tmp_path, done)


@pytest.mark.slow
def test_a_plan_to_be_pasted_has_placeholders_and_says_so(tmp_path: Path) -> None:
    launcher = [
        str(REPOSITORY / "run_batch_experiments.sh"),
        "custom",
        "TP=1",
        "--output-dir",
        str(tmp_path),
        "--batch-sizes",
        "1",
    ]
    launcher += ["--seq-lens", "8", "--model", TINY]
    secret = [
        "--",
        "--max-tokens",
        "4",
        "--num-runs",
        "2",
        "--hf-token",
        hush(1),
        "--tokenizer",
        f"https://u:{hush(2)}@h",
    ]
    environment = stub_environment(XDG_CACHE_HOME=str(tmp_path / "cache"), **VARIABLES)

    def launch(*options: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*launcher, *options, *secret, *flags],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            timeout=90,
        )

    plan = launch("--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert "# fill in what is not shown here: <hf_token>, <login>" in plan.stdout
    (command,) = commands_of(plan)
    assert command[-4:] == ["--hf-token", "<hf_token>", "--tokenizer", "https://<login>@h"]
    assert "--hf-token '<hf_token>' --tokenizer 'https://<login>@h'" in plan.stdout
    pasted = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=90)
    assert (pasted.returncode, pasted.stderr) == (
        2, "error: <hf_token> is a placeholder for a secret; put the value in its place\n",
    )  # fmt: skip
    wrong = launch(flags=("--batch-sizes", hush(1)))
    assert wrong.stderr.startswith("error: --batch-sizes: '<hf_token>' was given"), wrong.stderr
    done = launch()
    assert done.returncode == 0, done.stderr
    assert not leaks(tmp_path, plan, pasted, wrong, done, launch("--dry-run"), launch("--pack", "--overwrite"))


def test_what_torchrun_sets_for_its_own_is_not_told() -> None:
    assert variables_kept({"TORCHELASTIC_RUN_ID": "x", "TORCH_OF_TOMORROW": "y"}) == {"TORCH_OF_TOMORROW": SET}
