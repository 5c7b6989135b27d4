"""Sweeps over two hosts on a real vLLM engine, through torchrun and through mp: two network namespaces, one cable."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import REPOSITORY, TINY

pytestmark = pytest.mark.vllm

NODES = (("bi-test-a", "bi-veth-a", "10.77.31.1"), ("bi-test-b", "bi-veth-b", "10.77.31.2"))
SMALL = ("--load-format", "dummy", "--kv-cache-memory-bytes", "67108864", "--max-tokens", "9", "--num-runs", "2")
QUEUE = ("--load-format", "dummy", "--kv-cache-memory-bytes", "67108864", "--sample", "40")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


def remove_nodes() -> None:
    for name, _, _ in NODES:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)


@pytest.fixture
def nodes() -> Iterator[None]:
    if shutil.which("ip") is None or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs iproute2 and two cores")
    remove_nodes()
    try:
        for name, _, _ in NODES:
            ip("netns", "add", name)
        ip("link", "add", NODES[0][1], "type", "veth", "peer", "name", NODES[1][1])
        for name, cable, address in NODES:
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        remove_nodes()
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    yield
    remove_nodes()


def start_node(node: int, folder: Path, *words: str) -> subprocess.Popen[str]:
    """The launcher on one node, which has a core, a network and a folder of its own. Who is which node, it finds."""
    core = sorted(os.sched_getaffinity(0))[node]
    meeting = ["--master-addr", NODES[0][2], "--master-port", "29710", "--settle-s", "5"]
    command = ["./run_batch_experiments.sh", "--model", TINY, *meeting, "--output-dir", str(folder)]
    return subprocess.Popen(
        ["ip", "netns", "exec", NODES[node][0], "taskset", "-c", str(core), *command, *words],
        cwd=REPOSITORY,
        # The network that joins the nodes is for the program to find.
        env={name: value for name, value in os.environ.items() if not name.endswith("SOCKET_IFNAME")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


TORCHRUN = ("torchrun-tensor-parallel", "torchrun_tp_2_nodes_2", "rank_1.log")
MP = ("custom TP=2", "tp_2_nodes_2", "node_1.log")
Route = tuple[str, str, str]


def together(folders: list[Path], route: Route, *words: str) -> tuple[dict[str, Any], list[str]]:
    """The result of a setting that both nodes measure, and what each of them said."""
    preset, name, log = route
    processes = [start_node(node, folders[node], *preset.split(), *words) for node in range(2)]
    outputs = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    # One result file, on node 0, which is the one that owns the address; the other node has its own log.
    assert [path.name for path in folders[0].glob("*.json")] == [f"{name}_results.json"]
    assert list(folders[1].glob("*.json")) == []
    assert (folders[1] / f"{name}_results.{log}").exists()
    document = json.loads((folders[0] / f"{name}_results.json").read_text())
    assert document["status"] == "complete"
    assert len(document["engine"]["workers"]) == 2
    return document, [errors for _, errors in outputs]


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize(("route", "nnodes"), [(TORCHRUN, ()), (MP, ("--nnodes", "2"))])
def test_two_nodes_measure_one_setting_together(tmp_path: Path, route: Route, nnodes: tuple[str, ...]) -> None:
    words = (*nnodes, "--batch-sizes", "1,3", "--seq-lens", "16", "--", *SMALL)
    document, said = together([tmp_path / "a", tmp_path / "b"], route, *words)
    for point in document["points"]:
        for run in point["runs"]:
            assert run["prompt_tokens"] == point["batch_size"] * 16
            assert run["output_tokens"] == point["batch_size"] * 9
    assert ["3 x 16: " in one for one in said] == [True, False]


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize(("route", "nnodes"), [(TORCHRUN, ("--nnodes", "2")), (MP, ())])
def test_two_nodes_work_off_one_queue(tmp_path: Path, route: Route, nnodes: tuple[str, ...]) -> None:
    """Node 0 reads the workload, and sends what is run."""
    job = tmp_path / "job.jsonl"
    lengths = [(5 + 3 * number % 20, 4 + 7 * number % 13) for number in range(40)]
    job.write_text("".join(f'{{"prompt_tokens": {a}, "output_tokens": {b}}}\n' for a, b in lengths))
    words = (*nnodes, "--batch-sizes", "2,4", "--prompts-file", str(job), "--", *QUEUE)
    document, _ = together([tmp_path / "a", tmp_path / "b"], route, *words)
    assert [point["batch_size"] for point in document["points"]] == [2, 4]
    for point in document["points"]:
        (run,) = point["runs"]
        assert (run["prompt_tokens"], run["output_tokens"]) == tuple(map(sum, zip(*lengths, strict=True)))


@pytest.mark.usefixtures("nodes")
def test_nodes_that_were_told_different_things_end_with_a_line_that_says_so(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    processes = [start_node(node, folders[node], "custom", "TP=2", "--batch-sizes", str(node + 1)) for node in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    said = "has different arguments: --batch-sizes 2; node 0"
    assert all(said in errors for _, errors in outputs), outputs
    assert list(tmp_path.rglob("*.json")) == []


@pytest.mark.usefixtures("nodes")
def test_a_node_that_stays_alone_says_so(tmp_path: Path) -> None:
    process = start_node(0, tmp_path, "custom", "TP=2", "--wait-for-nodes-s", "5")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: --master-addr 10.77.31.1: no other node came to port 29710 within 5 s" in errors


@pytest.mark.usefixtures("nodes")
def test_a_node_whose_address_is_wrong_says_so(tmp_path: Path) -> None:
    process = start_node(1, tmp_path, "custom", "TP=2", "--wait-for-nodes-s", "5")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: --master-addr 10.77.31.1: nothing answers on port 29710" in errors
    assert "if it leads here, give --node-rank 0 here" in errors
