"""How many nodes a setting is spread over, and which."""

from __future__ import annotations

import pytest

from batch_inference.launch.presets import Setting
from batch_inference.launch.spread import NodeDevices, alike


@pytest.mark.parametrize(
    ("counts", "sizes", "nodes", "ranks"),
    [
        ([8, 8], (1, 1, 1), 1, [0]),
        ([8, 8], (8, 1, 1), 1, [0]),
        ([8, 8], (8, 2, 1), 2, [0, 1]),
        ([4, 4, 4], (8, 1, 1), 2, [0, 1]),
        ([2, 2, 2], (3, 1, 1), 3, [0, 1, 2]),  # 2 does not divide it
        ([4, 2, 4], (8, 1, 1), 2, [0, 2]),  # node 1 has too few
        ([2, 8, 2, 2], (4, 1, 2), 4, [0, 1, 2, 3]),  # node 0 writes the file, and takes part
    ],
)
def test_a_setting_takes_as_few_nodes_as_hold_it(
    counts: list[int], sizes: tuple[int, int, int], nodes: int, ranks: list[int]
) -> None:
    devices = NodeDevices(counts, None)
    setting = devices.spread(Setting(*sizes))
    assert setting.nodes == nodes
    assert devices.ranks(setting) == ranks
    assert devices.obstacle(setting) is None


def test_what_no_number_of_nodes_holds_is_said() -> None:
    devices = NodeDevices([4, 2], None)
    assert devices.obstacle(devices.spread(Setting(8, 1, 1))) == (
        "it needs 8 devices, in equal parts on some of the nodes, but they have 4, 2"
    )
    larger = NodeDevices([2, 8], None)
    assert larger.obstacle(larger.spread(Setting(8, 1, 1))) is not None


def test_nnodes_spreads_every_setting_evenly() -> None:
    devices = NodeDevices([4, 2], 2)
    assert devices.spread(Setting(2, 1, 1)).nodes == 2
    assert devices.obstacle(devices.spread(Setting(4, 1, 1))) is None
    assert devices.obstacle(devices.spread(Setting(8, 1, 1))) == (
        "it needs 4 devices on each of 2 nodes, but they have 4, 2"
    )


def test_replicas_over_nodes_need_torchrun_and_the_name_says_how_many_nodes() -> None:
    devices = NodeDevices([2, 2], None)
    names = [devices.spread(Setting(*sizes)).name for sizes in ((2, 1, 1), (4, 1, 1), (1, 1, 2), (1, 1, 4), (2, 1, 2))]
    assert names == ["tp_2", "tp_4_nodes_2", "dp_2", "torchrun_dp_4_nodes_2", "torchrun_tp_2_dp_2_nodes_2"]
    assert devices.spread(Setting(4, 1, 1, suffix="ep")).name == "tp_4_nodes_2_ep"


def test_a_plan_takes_all_nodes_for_this_one() -> None:
    assert alike(2, None).spread(Setting(8, 1, 1)).nodes == 4
    assert alike(8, 1).spread(Setting(1, 1, 16)) == Setting(1, 1, 16)


def test_n_is_of_all_nodes_where_it_is_known_who_comes() -> None:
    assert [NodeDevices([8, 4], None).total, NodeDevices([8, 4], 2).total] == [12, 12]
    assert [alike(8, 1).total, alike(8, 3).total, alike(8, None).total, alike(0, None).total] == [8, 24, 8, 0]


def test_every_node_that_takes_part_has_its_share() -> None:
    # Two nodes of four would do, and only one has four; four of two do.
    devices = NodeDevices([4, 2, 2, 2], None)
    setting = devices.spread(Setting(8, 1, 1))
    assert (setting.nodes, devices.ranks(setting)) == (4, [0, 1, 2, 3])
    none = NodeDevices([8, 2], None)
    assert none.spread(Setting(16, 1, 1)).nodes == 1
    assert none.obstacle(none.spread(Setting(16, 1, 1))) == (
        "it needs 16 devices, in equal parts on some of the nodes, but they have 8, 2"
    )


def test_a_setting_of_torchrun_stays_one_on_a_single_node() -> None:
    devices = NodeDevices([8, 8], None)
    assert devices.spread(Setting(2, 1, 1, torchrun=True)).torchrun
    assert not devices.spread(Setting(2, 1, 1)).torchrun
    assert not devices.spread(Setting(16, 1, 1)).torchrun  # one replica over nodes is vLLM's own
    assert devices.spread(Setting(8, 1, 2)).torchrun


def test_what_does_not_divide_by_the_nodes_is_left_for_the_plan_to_say() -> None:
    devices = NodeDevices([4, 4], 2)
    assert devices.obstacle(devices.spread(Setting(3, 1, 1))) is None
    assert alike(4, 3).counts == [4, 4, 4]


def test_what_cannot_be_shared_out_is_left_to_the_plan_and_node_0_takes_part_in_all() -> None:
    assert NodeDevices([2, 2], 2).obstacle(Setting(9, 1, 1, nodes=2)) is None
    # Two of the three could hold it, but not without node 0, which writes the file.
    said = "it needs 4 devices, in equal parts on some of the nodes, but they have 1, 2, 2"
    assert NodeDevices([1, 2, 2], None).obstacle(Setting(4, 1, 1, nodes=2)) == said
    assert NodeDevices([1, 2, 2], None).spread(Setting(4, 1, 1)).nodes == 1
    assert NodeDevices([1, 1, 1], None).spread(Setting(3, 1, 1)).nodes == 3
    assert alike(1, None).counts == [1] * 1024
    assert (alike(2, 3).counts, alike(2, 3).nnodes, alike(2, None).nnodes) == ([2, 2, 2], 3, None)
    assert NodeDevices([2, 2], 2).spread(Setting(1, 1, 2)).torchrun
    assert not NodeDevices([2, 2], None).spread(Setting(1, 1, 2)).torchrun
