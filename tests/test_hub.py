"""A model of the hub is fetched once for a node, after a look at the disk; the hub is a fake one."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_launcher import Launcher

from batch_inference.core import child
from batch_inference.core.config import ExperimentConfig
from batch_inference.core.failures import ADVICE, WorkFailedError
from batch_inference.measure import hub as hub_module
from batch_inference.measure.hub import fetch_models
from batch_inference.plan.devices import GIB
from conftest import STUB

Fetch = Callable[..., list[str]]
LOOK, FETCH = "look org/name None None", "fetch org/name config.json model-1.safetensors"


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    folder = tmp_path / "hub"
    folder.mkdir()
    return folder


@pytest.fixture
def fetch(hub: Path, monkeypatch: pytest.MonkeyPatch) -> Fetch:
    """What is said while the models of these settings are fetched; settings differ by their flags for vLLM."""
    for name, value in {"PYTHONPATH": str(STUB), "STUB_HUB": str(hub), "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("HF_TOKEN", "TRANSFORMERS_OFFLINE", "VLLM_USE_MODELSCOPE"):
        monkeypatch.setenv(name, "")  # remembered, and so taken back
    monkeypatch.delenv("HF_TOKEN")

    def run(*flags: tuple[str, ...], model: str = "org/name") -> list[str]:
        said: list[str] = []
        fetch_models([ExperimentConfig(model=model, engine_args=words) for words in flags or ((),)], said.append)
        return said

    return run


def asked(hub: Path) -> list[str]:
    return (hub / "asked").read_text().splitlines() if (hub / "asked").exists() else []


def test_the_files_that_vllm_takes_are_fetched_once(fetch: Fetch, hub: Path) -> None:
    (hub / "SIZE").write_text(str(2**29))
    (line,) = fetch((), ("--block-size", "16"))
    assert line == f"org/name: downloading 1.0 GiB into {hub}/cache, once for all replicas and settings of this node"
    assert asked(hub) == [LOOK, FETCH]
    assert fetch() == []
    assert asked(hub) == [LOOK, FETCH, LOOK]


def test_format_revision_folder_and_token_are_those_of_vllm(fetch: Fetch, hub: Path) -> None:
    folder = str(hub / "my_models")
    words = ("--load_format=npcache", "--revision", "my_branch", "--download_dir", folder, "--hf-token", "hush_1")
    (line,) = fetch(words)
    assert f"into {folder}, once" in line
    assert asked(hub) == ["look org/name my_branch hush_1", "fetch org/name config.json pytorch_model.bin"]


@pytest.mark.parametrize(
    ("words", "model", "variable"),
    [
        (("--load-format", "dummy"), "org/name", ""),
        (("--load-format=runai_streamer",), "org/name", ""),
        ((), "models/tiny-llama", ""),
        ((), "s3://bucket/model", ""),
        ((), "org/name:Q4_K_M", ""),
        ((), "org/name", "HF_HUB_OFFLINE"),
        ((), "org/name", "TRANSFORMERS_OFFLINE"),
        ((), "org/name", "VLLM_USE_MODELSCOPE"),
    ],
)
def test_what_is_not_on_the_hub_is_not_asked_for(
    fetch: Fetch, hub: Path, words: tuple[str, ...], model: str, variable: str
) -> None:
    if variable:
        os.environ[variable] = "1"  # monkeypatch of `fetch` takes it back
    assert fetch(words, model=model) == asked(hub) == []


def test_a_disk_that_is_too_small_is_named_before_anything_is_fetched(fetch: Fetch, hub: Path) -> None:
    (hub / "SIZE").write_text(str(2**59))
    with pytest.raises(WorkFailedError) as error:
        fetch()
    assert "--model org/name: 1073741824.0 GiB must be downloaded into" in str(error.value)
    assert f"{hub}/cache, where " in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert asked(hub) == [LOOK]


@pytest.mark.parametrize("fail", ["GatedRepoError", "RepositoryNotFoundError"])
def test_a_model_that_cannot_be_had_is_one_line_and_one_that_is_here_is_left_to_vllm(
    fetch: Fetch, hub: Path, fail: str
) -> None:
    (hub / "FAIL").write_text(fail)
    with pytest.raises(WorkFailedError, match=f"--model org/name: {fail}: 401 Client Error.; model_gated: ask for"):
        fetch()
    (hub / "cache" / "models--org--name" / "blobs").mkdir(parents=True)
    (line,) = fetch()
    assert line.startswith("note: the hub could not be asked for org/name")


def test_a_hub_that_is_not_reached_is_left_to_vllm(fetch: Fetch, hub: Path) -> None:
    (hub / "FAIL").write_text("ConnectError")
    (line,) = fetch()
    assert line.startswith("note: the hub could not be asked for org/name (")
    assert "ConnectError: Name or service not known" in line


@pytest.fixture
def launcher(tmp_path: Path, hub: Path) -> Launcher:
    launcher = Launcher(tmp_path)
    launcher.environment |= {"STUB_HUB": str(hub), "HF_HUB_OFFLINE": "0"}
    return launcher


def test_the_launcher_fetches_before_the_first_of_several_settings(launcher: Launcher, hub: Path) -> None:
    words = ("--model", "org/name")
    assert launcher("custom", "TP=2", *words).returncode == 0
    assert asked(hub) == []
    done = launcher("tensor-parallel", *words)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in asked(hub)] == ["look", "fetch"]
    assert "org/name: downloading 0.0 GiB into" in done.stderr.splitlines()[0]
    assert launcher("tensor-parallel", *words, "--dry-run").returncode == 0
    assert len(asked(hub)) == 2


def test_a_model_that_cannot_be_had_starts_no_setting(launcher: Launcher, hub: Path) -> None:
    (hub / "FAIL").write_text("GatedRepoError")
    done = launcher("custom", "DP=2", "--model", "org/name")
    assert (done.returncode, launcher.calls()) == (1, [])
    assert done.stderr.startswith("error: --model org/name: GatedRepoError")


@pytest.mark.slow
def test_the_script_fetches_before_its_replicas(
    experiment: Callable[..., subprocess.CompletedProcess[str]], hub: Path, tmp_path: Path
) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two replicas need two devices")
    words = ("--model", "org/name", "-dp")
    variables = {"STUB_HUB": str(hub), "HF_HUB_OFFLINE": "0"}
    assert experiment(*words, "1", **variables).returncode == 0
    assert asked(hub) == []
    (hub / "FAIL").write_text("GatedRepoError")
    words = ("--output-file", str(tmp_path / "dp_2_results.json"), *words)
    done = experiment(*words, "2", **variables)
    assert done.returncode == 1
    assert "error: --model org/name: GatedRepoError" in done.stderr
    (hub / "FAIL").unlink()
    done = experiment(*words, "2", **variables)
    assert done.returncode == 0, done.stderr
    assert asked(hub)[1:] == [LOOK, FETCH]


# --- word by word, without a process -------------------------------------------------------------------------------


REQUEST = hub_module._Request("org/name", "auto", "my_branch", "/my/models")


def file(name: str, size: int | None = 10, sha256: str | None = None) -> SimpleNamespace:
    lfs = SimpleNamespace(sha256=sha256) if sha256 else None
    return SimpleNamespace(rfilename=name, size=size, blob_id=f"blob-{name}", lfs=lfs)


@pytest.mark.parametrize(
    ("load_format", "names", "needed"),
    [
        ("auto", "a.safetensors consolidated.1.safetensors b.bin x.json", "consolidated.1.safetensors x.json"),
        ("hf", "a.safetensors consolidated.1.safetensors b.bin", "a.safetensors consolidated.1.safetensors"),
        ("auto", "b.bin c.pt readme.md x.json", "b.bin x.json"),
        ("auto", "c.pt", "c.pt"),
        ("hf", "b.bin c.pt", "b.bin"),
        ("safetensors", "b.bin x.json", "x.json"),
        ("fastsafetensors", "a.safetensors b.bin", "a.safetensors"),
        ("mistral", "a.safetensors consolidated.safetensors", "consolidated.safetensors"),
        ("npcache", "a.safetensors b.bin c.pt", "b.bin"),
        ("pt", "a.safetensors b.bin c.pt", "c.pt"),
        ("auto", "below/a.safetensors b.bin below/x.json", "b.bin"),
    ],
)
def test_the_files_of_each_format_are_those_that_vllm_prefers(
    load_format: str, names: str, needed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def model_info(model: str, **options: Any) -> SimpleNamespace:
        asked.append((model, options))
        return SimpleNamespace(siblings=[file(name) for name in names.split()])

    api = SimpleNamespace(HfApi=lambda: SimpleNamespace(model_info=model_info))
    monkeypatch.setitem(sys.modules, "huggingface_hub", api)
    found = hub_module._files(dataclasses.replace(REQUEST, load_format=load_format))
    assert [one.rfilename for one in found] == needed.split()
    assert asked == [("org/name", {"revision": "my_branch", "files_metadata": True, "timeout": 20.0})]


@pytest.mark.parametrize("given", [True, False])
def test_what_is_missing_is_what_the_cache_does_not_hold(
    given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = SimpleNamespace(HF_HUB_CACHE=str(tmp_path / "usual"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(constants=constants))
    files = [file("a", 1), file("b", 2), file("c", 4, "sha-c"), file("d", 8, "sha-d"), file("e", None)]
    monkeypatch.setattr(hub_module, "_files", lambda _: files)
    folder = tmp_path / ("mine" if given else "usual")
    blobs = folder / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    for name in ("blob-a", "sha-c", "blob-d"):
        (blobs / name).touch()
    found = hub_module._look(dataclasses.replace(REQUEST, folder=str(folder) if given else None))
    assert found == hub_module._Answer(2 + 8, str(folder), ("a", "b", "c", "d", "e"))


def test_the_hub_is_asked_for_the_files_alone_and_whether_some_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    errors: list[Exception | None] = [None, None, OSError("no"), ValueError("no")]

    def download(model: str, **options: Any) -> None:
        asked.append((model, options))
        if error := errors.pop(0):
            raise error

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=download))
    request = dataclasses.replace(REQUEST, files=("a", "b"))
    assert hub_module._download(request) == hub_module._Answer()
    assert [hub_module._is_here(request) for _ in range(3)] == [True, False, False]
    where = {"revision": "my_branch", "cache_dir": "/my/models"}
    assert asked == [
        ("org/name", {**where, "allow_patterns": ["a", "b"]}),
        *[("org/name", {**where, "local_files_only": True})] * 3,
    ]


def test_a_request_is_answered_by_a_look_or_a_fetch_or_by_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, fetched = hub_module._Answer(1, "x"), hub_module._Answer(2, "y")
    monkeypatch.setattr(hub_module, "_look", lambda request: {"/my/models": looked}[request.folder])
    monkeypatch.setattr(hub_module, "_download", lambda request: {"/my/models": fetched}[request.folder])
    monkeypatch.setattr(hub_module, "_is_here", lambda request: request.revision == "my_branch")
    words = json.dumps(dataclasses.asdict(REQUEST))
    assert hub_module.main("look", words) == looked
    assert hub_module.main("fetch", words) == fetched
    for said, reason in (("\n401 \x1b[2JClient\nmore", "401  [2JClient"), ("", "")):

        def fail(_: Any, said: str = said) -> None:
            raise OSError(said)

        monkeypatch.setattr(hub_module, "_look", fail)
        problem = f"OSError: {reason}"
        assert hub_module.main("look", words) == hub_module._Answer(problem=problem, is_here=True)


def test_a_fetch_is_looked_at_first_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked, with which token and how long; and what is said of each end."""
    asked: list[Any] = []
    answers: list[Any] = []

    def ask(module: str, what: str, words: str, **options: Any) -> Any:
        asked.append((module, what, json.loads(words), options))
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(child, "ask", ask)
    monkeypatch.setattr(hub_module, "is_on_hub", lambda _: True)
    free = {"of": 3 * GIB}
    monkeypatch.setattr(
        hub_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free["of"] if path == tmp_path else 0)
    )
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_USE_MODELSCOPE"):
        monkeypatch.delenv(name, raising=False)
    flags = ("--hf-token", "hush", "--revision", "r", "--download-dir", "/d", "--load-format", "pt")
    configs = [ExperimentConfig(model="org/name", engine_args=flags)] * 2
    said: list[str] = []
    folder = f"{tmp_path}/new/deep"
    answers[:] = [{"missing_bytes": 3 * GIB, "folder": folder, "files": ["a", "b"]}, {}]
    fetch_models(configs, said.append)
    request = {"model": "org/name", "load_format": "pt", "revision": "r", "folder": "/d", "files": []}
    options = {"environment": {"HF_TOKEN": "hush"}}
    assert asked == [
        ("measure.hub", "look", request, {**options, "timeout_s": 60.0}),
        ("measure.hub", "fetch", {**request, "files": ["a", "b"]}, {**options, "timeout_s": 604_800.0}),
    ]
    assert said == [f"org/name: downloading 3.0 GiB into {folder}, once for all replicas and settings of this node"]

    def refused() -> str:
        with pytest.raises(WorkFailedError) as caught:
            fetch_models([ExperimentConfig(model="org/name")], said.append)
        return str(caught.value)

    free["of"] -= 1
    answers[:] = [{"missing_bytes": 3 * GIB, "folder": folder}]
    assert refused() == (
        f"--model org/name: 3.0 GiB must be downloaded into {folder}, where 3.0 GiB are free; free disk space, or "
        "choose another folder (HF_HOME, or vLLM's --download-dir)"
    )
    answers[:] = [{"missing_bytes": 1, "folder": folder}, {"problem": "GatedRepoError: no"}]
    assert refused() == f"--model org/name: GatedRepoError: no; {ADVICE['model_gated']}"
    answers[:] = [{"problem": "GatedRepoError: no"}]
    assert refused() == f"--model org/name: GatedRepoError: no; model_gated: {ADVICE['model_gated']}"
    assert asked[-1][-1]["environment"] == {}
    said.clear()
    for answer in (child.ChildError("no answer within 60 s"), {"problem": "GatedRepoError: no", "is_here": True}):
        answers[:] = [answer]
        fetch_models([ExperimentConfig(model="org/name")], said.append)
    assert said == [
        f"note: the hub could not be asked for org/name ({problem}); vLLM will try itself"
        for problem in ("no answer within 60 s", "GatedRepoError: no")
    ]
    answers[:] = [{"missing_bytes": 0, "folder": folder}]
    fetch_models([ExperimentConfig(model="org/name")], said.append)
    assert len(said) == 2


@pytest.mark.parametrize("word", ["1", "on", "Yes", "true", "0", "no", ""])
def test_a_machine_is_cut_off_where_a_variable_says_yes(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_USE_MODELSCOPE"):
        for other in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_USE_MODELSCOPE"):
            monkeypatch.setenv(other, word if other == name else "")
        asks = hub_module._request(ExperimentConfig(model="org/name")) is not None
        assert asks == (word in ("0", "no", ""))
