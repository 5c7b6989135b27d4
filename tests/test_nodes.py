"""Two nodes of one setting on the stub vLLM: the experiment script on each, as the launcher starts it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import REPOSITORY, SMALL_GRID, TINY, free_ports, stub_environment, with_ctrl_c

pytestmark = pytest.mark.slow

Node = subprocess.Popen[str]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Starts a node; all of them are ended after the test."""
    nodes: list[Node] = []
    port = str(free_ports(2))

    def start_node(rank: int, *flags: str, **variables: str) -> Node:
        command = [sys.executable, str(REPOSITORY / "batch_inference_experiment.py"), *SMALL_GRID, "-tp", "2"]
        command += ["--model", TINY, "--output-file", "x.json"]
        command += ["--nnodes", "2", "--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", port]
        folder = tmp_path / f"node_{rank}"
        folder.mkdir(exist_ok=True)
        node = subprocess.Popen(
            [*command, *flags], cwd=folder, env=stub_environment(**variables), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=with_ctrl_c,
        )  # fmt: skip
        nodes.append(node)
        return node

    yield start_node
    for node in nodes:
        node.kill()
        node.wait()


def ends_of(*nodes: Node) -> list[tuple[int, str]]:
    """Exit code and standard error of each node."""
    errors = [node.communicate(timeout=40)[1] for node in nodes]
    return [(node.returncode, error) for node, error in zip(nodes, errors, strict=True)]


def wait_for(path: Path, text: str, timeout_s: float = 20) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline_s, f"no {text!r} in {path}"
        time.sleep(0.05)


def test_node_0_writes_the_one_file_and_both_end_well(start: Callable[..., Node], tmp_path: Path) -> None:
    ends = ends_of(start(1), start(0))
    assert [code for code, _ in ends] == [0, 0], ends
    document = json.loads((tmp_path / "node_0" / "x.json").read_text())
    assert (document["status"], document["config"]["nnodes"], document["engine"]["executor"]) == ("complete", 2, "mp")
    # The devices may be on other machines: their workers have read them.
    memory = {"scope": "replica", "used_gib": [1.5, 1.5], "peak_gib": None, "peak_kv_use": 0.01}
    assert document["points"][0]["runs"][0]["memory"] == memory
    assert [path.name for path in (tmp_path / "node_1").iterdir()] == ["x.node_1.log"]
    assert "serves node 0 as node 1 of 2" in (tmp_path / "node_1" / "x.node_1.log").read_text()


def test_a_second_sweep_with_nothing_left_to_measure_ends_well_on_both(start: Callable[..., Node]) -> None:
    assert [code for code, _ in ends_of(start(1), start(0))] == [0, 0]
    ends = ends_of(start(1, "--resume"), start(0, "--resume"))
    assert [code for code, _ in ends] == [0, 0], ends
    assert "nothing is left to measure" in " ".join(ends[1][1].split())


def test_an_engine_that_does_not_start_fails_on_both(start: Callable[..., Node]) -> None:
    (code_1, error_1), (code_0, error_0) = ends_of(start(1), start(0, STUB_FAIL="load"))
    assert (code_0, code_1) == (1, 1)
    assert "ValueError: the planted reason" in error_0
    assert error_1 == "error: the setting failed; the output of node 0 says why\n"


def test_a_node_whose_workers_fail_says_why_and_node_0_ends(start: Callable[..., Node], tmp_path: Path) -> None:
    (code_1, error_1), (code_0, error_0) = ends_of(start(1, STUB_FAIL="serve"), start(0, STUB_FAIL="hang"))
    assert (code_0, code_1) == (1, 1)
    assert "RuntimeError: no workers on this node" in error_1
    document = json.loads((tmp_path / "node_0" / "x.json").read_text())
    assert document["points"][0]["reason"] == "node 1 is gone; its output says why"
    assert "node 1 is gone" in error_0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_node_0_that_ends_ends_the_others_and_their_workers(
    start: Callable[..., Node], tmp_path: Path, how: signal.Signals
) -> None:
    node_1, node_0 = start(1), start(0, STUB_FAIL="hang")
    wait_for(tmp_path / "node_0" / "x.log", "prompts")
    node_0.send_signal(how)
    ((code, error),) = ends_of(node_1)
    assert code == 1
    assert error == "error: node 0 is gone; its output says why\n"
    assert processes_of(tmp_path / "node_1") == []


def test_ctrl_c_on_another_node_leaves_no_process_there(start: Callable[..., Node], tmp_path: Path) -> None:
    node_1, node_0 = start(1), start(0, STUB_FAIL="hang")
    wait_for(tmp_path / "node_1" / "x.node_1.log", "serves node 0")
    node_1.send_signal(signal.SIGINT)
    (code_1, _), (code_0, error_0) = ends_of(node_1, node_0)
    assert (code_1, code_0) == (130, 1)
    assert "node 1 is gone" in error_0
    assert processes_of(tmp_path / "node_1") == []


def processes_of(folder: Path) -> list[str]:
    """Processes whose working folder is `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder:
                found.append(process.name)
        except OSError:
            continue
    return found
