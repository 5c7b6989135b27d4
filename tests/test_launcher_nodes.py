"""Launchers on several nodes of one host, which meet, with a fake Python that writes down how it was called."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_launcher import Launcher, config_of

from batch_inference.core.config import MEETING_SECRET
from conftest import free_ports, with_ctrl_c

Start = Callable[..., "Node"]
SECRET = "tell nobody"

pytestmark = pytest.mark.slow


class Node:
    """A launcher that runs, in a folder of its own."""

    def __init__(self, folder: Path, words: tuple[str, ...], variables: dict[str, str]) -> None:
        folder.mkdir()
        self.launcher = Launcher(folder)
        python = Path(self.launcher.environment["PYTHON"])
        knows = f'[[ ${{{MEETING_SECRET}-}} != "{SECRET}" ]] || echo >>knows\n'
        python.write_text(python.read_text() + 'echo "${GLOO_SOCKET_IFNAME-none}" >>networks\n' + knows)
        environment = {**self.launcher.environment, **variables}
        environment.pop("GLOO_SOCKET_IFNAME", None)
        self.process = subprocess.Popen(
            [str(self.launcher.file), *words], cwd=folder, env=environment,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=with_ctrl_c,
        )  # fmt: skip

    def end(self) -> tuple[int, str]:
        """Exit code and standard error."""
        errors = self.process.communicate(timeout=60)[1]
        return self.process.returncode, errors

    @property
    def networks(self) -> list[str]:
        return (self.launcher.folder / "networks").read_text().split()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    nodes: list[Node] = []
    port = str(free_ports(40))

    def start_node(name: str, *words: str, **variables: str) -> Node:
        meeting = ("--master-addr", "127.0.0.1", "--master-port", port, "--wait-for-nodes-s", "20")
        nodes.append(Node(tmp_path / name, (*words, *meeting), variables))
        if len(nodes) == 1:  # the first to listen is node 0
            assert nodes[0].process.stderr is not None
            assert "is waiting for the others" in nodes[0].process.stderr.readline()
        return nodes[-1]

    yield start_node
    for node in nodes:
        node.process.kill()
        node.process.wait()


def test_the_same_line_on_each_measures_everything_that_the_nodes_hold(start: Start) -> None:
    study = ("scaling-study", "--settle-s", "0.3")
    first, second = start("a", *study, DEVICES="4"), start("b", *study, DEVICES="4")
    ends = [first.end(), second.end()]
    assert [code for code, _ in ends] == [0, 0], ends
    alone = ["tp_1", "tp_2", "tp_4", "pp_2", "pp_4", "tp_2_pp_2", "dp_2", "dp_4", "tp_2_dp_2"]
    assert {name for name in first.launcher.names() if "nodes" not in name} == set(alone)
    by_mp = ["tp_8_nodes_2", "tp_4_pp_2_nodes_2", "tp_2_pp_4_nodes_2"]
    by_torchrun = ["torchrun_tp_4_dp_2_nodes_2", "torchrun_tp_2_dp_4_nodes_2"]
    assert set(second.launcher.names()) == {*by_mp, *by_torchrun}
    assert "[1/15] tp_1: this node is not needed and waits" in ends[1][1]
    assert "[4/15] tp_8_nodes_2: this is node 1 of 2" in ends[1][1]
    # Every node has its number, and they agree on the ports, none of which is that of the meeting.
    ports = set()
    for name in by_mp:
        configs = [config_of(next(call for call in node.launcher.calls() if name in call)) for node in (first, second)]
        assert [config.node_rank for config in configs] == [0, 1]
        assert configs[0].master_port == configs[1].master_port
        ports.add(configs[0].master_port)
    assert len(ports) == 3


def test_with_nnodes_every_setting_is_on_all_nodes_and_torchrun_knows_the_network(start: Start) -> None:
    study = ("torchrun-tensor-parallel", "--nnodes", "2")
    nodes = [start("a", *study, DEVICES="2"), start("b", *study, DEVICES="2")]
    ends = [node.end() for node in nodes]
    assert [code for code, _ in ends] == [0, 0], ends
    for rank, node in enumerate(nodes):
        assert node.launcher.names() == ["torchrun_tp_2_nodes_2", "torchrun_tp_4_nodes_2"]
        for call in node.launcher.calls():
            assert call[call.index("--node-rank") + 1] == str(rank)
        assert node.networks == ["lo", "lo"]
    assert "torchrun_tp_8_nodes_2 skipped: it needs 4 devices on each of 2 nodes, but they have 2, 2" in ends[0][1]


def test_other_arguments_end_all_at_once_and_are_named(start: Start) -> None:
    first = start("a", "tensor-parallel", "--nnodes", "2", "--model", "x")
    second = start("b", "tensor-parallel", "--nnodes", "2", "--model", "y", "--batch-sizes", "2")
    for code, errors in (first.end(), second.end()):
        assert code == 1
        assert "error: node 1 (" in errors
        assert "has different arguments: --model y, --batch-sizes 2; node 0 (" in errors
        assert errors.count("error: ") == 1
    assert first.launcher.calls() == second.launcher.calls() == []


def test_nodes_that_know_a_secret_meet_without_one_that_does_not(start: Start, tmp_path: Path) -> None:
    line = ("custom", "TP=4", "--nnodes", "2")
    first = start("a", *line, DEVICES="2", **{MEETING_SECRET: SECRET})
    for name, given in (("other", {MEETING_SECRET: "a guess"}), ("none", {})):
        code, errors = start(name, *line, DEVICES="2", **given).end()
        assert code == 1
        assert (
            f"error: --master-addr 127.0.0.1: node 0 has another secret (--meeting-secret, {MEETING_SECRET}), or"
            in errors
        )
    second = start("b", *line, "--meeting-secret", SECRET, DEVICES="2")
    ends = [first.end(), second.end()]
    assert [code for code, _ in ends] == [0, 0], ends
    assert ends[0][1].count("note: 127.0.0.1 called and was refused") == 1
    # The nodes of the setting meet by it too; it is in no command, and nothing says it.
    for node, (_, errors) in zip((first, second), ends, strict=True):
        assert node.launcher.names() == ["tp_4_nodes_2"]
        assert (node.launcher.folder / "knows").exists()
        assert SECRET not in errors
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "python"]
    assert not [path for path in written if SECRET in path.read_text()]


def test_a_part_that_fails_fails_its_setting_and_the_next_is_begun(start: Start) -> None:
    study = ("torchrun-tensor-parallel", "--nnodes", "2")
    first = start("a", *study, WAIT_FOR="torchrun_tp_4_nodes_2")
    second = start("b", *study, FAIL="torchrun_tp_4_nodes_2", FAIL_WITH="2")
    (code, errors), (other, _) = first.end(), second.end()
    assert (code, other) == (1, 1)
    assert "error: torchrun_tp_4_nodes_2: the part of node 1 (" in errors
    assert "ended with exit code 2; its output says why" in errors
    assert "failed: torchrun_tp_4_nodes_2\n" in errors
    assert second.launcher.names()[-1] == "torchrun_tp_8_nodes_2"


def test_what_is_wrong_for_the_first_setting_ends_the_preset_on_every_node(start: Start) -> None:
    study = ("torchrun-tensor-parallel", "--nnodes", "2")
    first, second = start("a", *study, FAIL="torchrun_tp_2_nodes_2", FAIL_WITH="2"), start("b", *study)
    assert first.end()[0] == 2
    code, errors = second.end()
    assert code == 2
    assert "nothing can be measured with these arguments; its output says why" in errors
    assert first.launcher.names() == second.launcher.names() == ["torchrun_tp_2_nodes_2"]


def test_after_a_node_is_gone_nothing_more_is_begun(start: Start) -> None:
    study = ("torchrun-tensor-parallel", "--nnodes", "2")
    first = start("a", *study, WAIT_FOR="torchrun_tp_4_nodes_2")
    second = start("b", *study, WAIT_FOR="torchrun_tp_4_nodes_2")
    deadline_s = time.monotonic() + 20
    while "torchrun_tp_4_nodes_2" not in second.launcher.names() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    second.process.kill()
    code, errors = first.end()
    assert code == 1
    assert "error: torchrun_tp_4_nodes_2: node 1 (" in errors
    assert "; the preset ends; not started: torchrun_tp_8_nodes_2\n" in errors
    assert "done: torchrun_tp_2_nodes_2   skipped: none   failed: torchrun_tp_4_nodes_2\n" in errors
