"""A preset on three nodes of one host, on the stub vLLM: three launchers with the identical line."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_nodes import processes_of, wait_for

from conftest import REPOSITORY, TINY, free_ports, stub_environment, with_ctrl_c

pytestmark = pytest.mark.slow

Node = subprocess.Popen[str]
Start = Callable[..., Node]
GRID = ("--batch-sizes", "1", "--seq-lens", "8", "--", "--max-tokens", "4", "--num-runs", "2")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a launcher on a node, which has two devices and a folder of its own; all are ended after the test."""
    nodes: list[Node] = []
    port = str(free_ports(40))

    def start_node(name: str, *words: str, **variables: str) -> Node:
        meeting = ("--master-addr", "127.0.0.1", "--master-port", port, "--settle-s", "3", "--wait-for-nodes-s", "30")
        (tmp_path / name).mkdir()
        node = subprocess.Popen(
            [str(REPOSITORY / "run_batch_experiments.sh"), *meeting, *words, "--model", TINY, *GRID],
            cwd=tmp_path / name,
            env=stub_environment(PYTHON=sys.executable, VLLM_CPU_OMP_THREADS_BIND="0|0", **variables),
            text=True, stdout=subprocess.PIPE, stderr=(tmp_path / name / "said").open("w"), preexec_fn=with_ctrl_c,
        )  # fmt: skip
        # The first to listen is node 0, and the next to come node 1.
        arrivals = f"\n{socket.gethostname()} has come, with 2 devices" * len(nodes)
        wait_for(tmp_path / "a" / "said", f"start the same command on each{arrivals}")
        nodes.append(node)
        return node

    yield start_node
    for node in nodes:
        node.kill()
        node.wait()


def codes_of(*nodes: Node) -> list[int]:
    return [node.wait(timeout=90) for node in nodes]


def said_by(folder: Path) -> str:
    return (folder / "said").read_text()


def results_of(folder: Path) -> dict[str, str]:
    """Name and status of each result file."""
    files = sorted((folder / "experiment_results").glob("*.json"))
    return {file.name.removesuffix("_results.json"): json.loads(file.read_text())["status"] for file in files}


def nothing_runs_in(*folders: Path) -> bool:
    deadline_s = time.monotonic() + 15
    while any(processes_of(folder) for folder in folders):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.1)
    return True


def test_the_identical_line_measures_the_study_on_as_few_nodes_as_hold_each_setting(
    start: Start, tmp_path: Path
) -> None:
    nodes = [start(name, "scaling-study") for name in "abc"]
    assert codes_of(*nodes) == [0, 0, 0], [said_by(tmp_path / name) for name in "abc"]
    one_node = ["tp_1", "tp_2", "pp_2", "dp_2"]
    two_nodes = [
        "tp_4_nodes_2", "pp_4_nodes_2", "tp_2_pp_2_nodes_2", "torchrun_dp_4_nodes_2", "torchrun_tp_2_dp_2_nodes_2",
    ]  # fmt: skip
    assert results_of(tmp_path / "a") == dict.fromkeys(sorted(one_node + two_nodes), "complete")
    for name, log in (("b", "tp_4_nodes_2_results.node_1.log"), ("b", "torchrun_dp_4_nodes_2_results.rank_2.log")):
        assert (tmp_path / name / "experiment_results" / log).exists()
    assert results_of(tmp_path / "b") == results_of(tmp_path / "c") == {}
    assert not (tmp_path / "c" / "experiment_results").exists()
    assert "[3/15] tp_4_nodes_2: this node is not needed and waits" in said_by(tmp_path / "c")
    assert "tp_8 skipped: it needs 8 devices, in equal parts on some of the nodes, but they have 2, 2, 2" in said_by(
        tmp_path / "a"
    )
    assert nothing_runs_in(*(tmp_path / one for one in "abc"))


def test_with_nnodes_every_setting_is_on_all_three(start: Start, tmp_path: Path) -> None:
    nodes = [start(name, "custom", "DP=3", "--nnodes", "3") for name in "abc"]
    assert codes_of(*nodes) == [0, 0, 0], [said_by(tmp_path / name) for name in "abc"]
    assert results_of(tmp_path / "a") == {"torchrun_dp_3_nodes_3": "complete"}
    assert len({path.name for path in tmp_path.glob("[bc]/experiment_results/*.rank_[12].log")}) == 2


@pytest.mark.parametrize(("size", "name"), [("TP=4", "tp_4_nodes_2"), ("DP=4", "torchrun_dp_4_nodes_2")])
def test_ctrl_c_of_node_0_ends_all(start: Start, tmp_path: Path, size: str, name: str) -> None:
    nodes = [start(one, "custom", size, STUB_FAIL="hang") for one in "abc"]
    wait_for(tmp_path / "a" / "experiment_results" / f"{name}_results.log", "prompts")
    nodes[0].send_signal(signal.SIGINT)
    assert codes_of(*nodes) == [130, 1, 1]
    for other in "bc":
        assert said_by(tmp_path / other).splitlines()[-1] == "the results are on node 0"
        assert "): it was interrupted" in said_by(tmp_path / other)
    assert nothing_runs_in(*(tmp_path / one for one in "abc"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize(("size", "name"), [("TP=4", "tp_4_nodes_2"), ("DP=4", "torchrun_dp_4_nodes_2")])
def test_node_1_that_dies_in_a_setting_ends_it_and_the_preset(
    start: Start, tmp_path: Path, how: signal.Signals, size: str, name: str
) -> None:
    nodes = [start(one, "custom", size, STUB_FAIL="hang") for one in "abc"]
    wait_for(tmp_path / "a" / "experiment_results" / f"{name}_results.log", "prompts")
    kill(nodes[1], how)
    assert codes_of(nodes[0], nodes[2]) == [1, 1]
    said = said_by(tmp_path / "a")
    assert f"error: {name}: node 1 (" in said
    assert "is gone; its output says why; the preset ends; not started: none" in said
    if how == signal.SIGINT and size == "TP=4":  # its part ended before the launcher did
        (point,) = json.loads((tmp_path / "a" / "experiment_results" / f"{name}_results.json").read_text())["points"]
        assert point["reason"] == "node 1 is gone; its output says why"
    assert nothing_runs_in(*(tmp_path / one for one in "abc"))


def kill(node: Node, how: signal.Signals) -> None:
    node.send_signal(how)
    node.wait(timeout=60)
    assert node.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)


def test_node_0_that_is_killed_ends_the_others(start: Start, tmp_path: Path) -> None:
    nodes = [start(name, "custom", "TP=4", STUB_FAIL="hang") for name in "abc"]
    wait_for(tmp_path / "a" / "experiment_results" / "tp_4_nodes_2_results.log", "prompts")
    nodes[0].kill()
    assert codes_of(*nodes[1:]) == [1, 1]
    for other in "bc":
        assert "error: node 0 (" in said_by(tmp_path / other)
        assert "is gone; its output says why" in said_by(tmp_path / other)
    assert nothing_runs_in(*(tmp_path / one for one in "abc"))


def test_an_engine_that_does_not_start_is_the_reason_and_not_the_part_that_followed(
    start: Start, tmp_path: Path
) -> None:
    nodes = [start("a", "custom", "TP=4", STUB_FAIL="load"), start("b", "custom", "TP=4")]
    assert codes_of(*nodes) == [1, 1]
    said = said_by(tmp_path / "a")
    assert "ValueError: the planted reason" in said
    assert "the part of node 1" not in said
    assert "error: the setting failed; the output of node 0 says why" in said_by(tmp_path / "b")
