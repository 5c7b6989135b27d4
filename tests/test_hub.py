"""A model of the hub is fetched once for a node, after a look at the disk; the hub is a fake one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from test_launcher import Launcher

from batch_inference.core.config import ExperimentConfig
from batch_inference.core.failures import WorkFailedError
from batch_inference.measure.hub import fetch_models
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
    assert line == f"org/name: 1.0 GiB are fetched into {hub}/cache, once for all replicas and settings of this node"
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
    assert "--model org/name: 1073741824.0 GiB are to be fetched into" in str(error.value)
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
    assert "org/name: 0.0 GiB are fetched into" in done.stderr.splitlines()[0]
    assert launcher("tensor-parallel", *words, "--dry-run").returncode == 0
    assert len(asked(hub)) == 2


def test_a_model_that_cannot_be_had_starts_no_setting(launcher: Launcher, hub: Path) -> None:
    (hub / "FAIL").write_text("GatedRepoError")
    done = launcher("custom", "DP=2", "--model", "org/name")
    assert (done.returncode, launcher.calls()) == (1, [])
    assert done.stderr.startswith("error: --model org/name: GatedRepoError")


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
