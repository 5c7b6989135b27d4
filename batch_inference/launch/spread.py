"""Which nodes a setting runs on: as few of those that have come as can hold it, or all of --nnodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from batch_inference.core.text import counted, listed
from batch_inference.launch.presets import Setting


@dataclass(frozen=True)
class NodeDevices:
    """How many devices each node has, node 0 first. `nnodes`: what the user asks per setting. `are_all`: False
    while it is unknown how many nodes will come."""

    counts: Sequence[int]
    nnodes: int | None
    are_all: bool = True

    @property
    def total(self) -> int:
        """N in a preset; the devices of one node if there may be any number of nodes."""
        return sum(self.counts) if self.are_all else self.counts[0]

    def spread(self, setting: Setting) -> Setting:
        """The setting with its number of nodes. vLLM's own executor spreads one replica over nodes; offline it has no
        replicas, except under torchrun."""
        nodes = self.nnodes or self._fewest(setting.num_devices)
        return replace(setting, nodes=nodes, torchrun=setting.torchrun or (nodes > 1 and setting.dp > 1))

    def ranks(self, setting: Setting) -> list[int]:
        """The nodes that it runs on: node 0, and the first of the others with enough devices."""
        share = setting.num_devices // setting.nodes
        return [node for node, count in enumerate(self.counts) if count >= share][: setting.nodes]

    def obstacle(self, setting: Setting) -> str | None:
        """Why the nodes cannot hold it, if they cannot."""
        share, rest = divmod(setting.num_devices, setting.nodes)
        ranks = self.ranks(setting)
        if rest or (len(ranks) == setting.nodes and ranks[0] == 0):
            return None  # the plan says that it cannot be divided evenly
        there = listed(self.counts)
        if self.nnodes:
            return f"it needs {counted(share, 'device')} on each of {self.nnodes} nodes, but they have {there}"
        needed = counted(setting.num_devices, "device")
        return f"it needs {needed}, in equal parts on some of the nodes, but they have {there}"

    def _fewest(self, num_devices: int) -> int:
        for nodes in range(1, len(self.counts) + 1):
            share, rest = divmod(num_devices, nodes)
            if not rest and self.counts[0] >= share and sum(count >= share for count in self.counts) >= nodes:
                return nodes
        return 1


def alike(devices: int, nnodes: int | None) -> NodeDevices:
    """For a plan, before any node has come: nodes like this one, as many as the largest setting can need."""
    return NodeDevices([devices] * (nnodes or _MOST_PLANNED), nnodes, are_all=nnodes is not None)


_MOST_PLANNED = 1024
