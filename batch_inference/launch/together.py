"""The settings of a preset over nodes that have met: node 0 says which is next, and every node does its part."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from subprocess import Popen, TimeoutExpired
from types import TracebackType

from msgspec import Struct
from msgspec.json import Decoder

from batch_inference.core.config import ConfigError
from batch_inference.core.failures import WorkFailedError
from batch_inference.core.signals import EXIT_CODES
from batch_inference.core.streams import say
from batch_inference.core.text import listed
from batch_inference.launch.jobs import Job
from batch_inference.launch.meeting import Member, Met, refuse_late
from batch_inference.launch.presets import Setting
from batch_inference.launch.processes import Processes
from batch_inference.launch.spread import NodeDevices
from batch_inference.measure.connection import Connection, Text, Word
from batch_inference.measure.nodes import NodesError, Number, gone, network_of

LOOK_S = 0.1
# A part that hears that the setting is over, or that another node is gone, usually ends by itself and says why.
GRACE_S = 15.0
# After exit code 1, which a part also has if its setting failed on node 0: node 0 then still waits for its devices.
FOLLOWED_GRACE_S = 90.0
SEES_WITHIN_S = 3.0
# From asking a process to end until it is killed.
PATIENCE_S = 20.0
# All of that, on a busy machine.
PART_TIMEOUT_S = 60.0


class Next(Struct, tag=True):
    """Node 0 to each other node: the next setting. `rank`: the node's number in it; None if it is not needed."""

    heading: Word
    setting: Setting
    port: Number
    rank: Number | None


class SettingOver(Struct, tag=True):
    """Node 0's part has ended."""


class Ended(Struct, tag=True):
    """The part of another node has ended."""

    code: Number


class Over(Struct, tag=True):
    """Node 0's last word: the preset has ended. `reason`: if it ended too early."""

    code: Number
    reason: Text | None


_TO_NODE_0 = Decoder(Ended)
_FROM_NODE_0 = Decoder(Next | SettingOver | Over)


class Leader:
    """Node 0, with the others."""

    def __init__(self, met: Met, devices: int, nnodes: int | None, processes: Processes) -> None:
        self.devices = NodeDevices([devices, *(other.hello.devices for other in met.others)], nnodes)
        self.problem: str | None = None  # why nothing more can be started
        self.code = 1  # of the preset
        self._met = met
        self._processes = processes
        self._began_s = time.monotonic()
        self._codes: dict[int, int] = {}  # exit codes of the current setting's parts that have ended, by node
        self._gone: set[int] = set()

    def __enter__(self) -> Leader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the others how it ended."""
        over = Over(self.code, None) if value is None else _too_early(value)
        for other in self._met.others:
            with contextlib.suppress(OSError):
                other.connection.send(over)
            other.connection.close()
        if self._met.door:
            self._met.door.close()

    def run(self, job: Job, heading: str) -> int:
        """Returns the exit code of node 0's part. Ends this process after a signal."""
        ranks = self.devices.ranks(job.setting)
        members = [self._met.others[node - 1] for node in ranks if node > 0]
        self._codes.clear()
        for other in self._still_there():
            rank = ranks.index(other.node) if other.node in ranks else None
            self._send(other, Next(heading, job.setting, job.port, rank))
        variables = network_of(other.connection for other in members) if members and job.setting.torchrun else {}
        process = self._processes.start(job.words, variables, ends_with_us=True)
        reason = self._watch(process, members)
        code = self._processes.ended(process)
        self._processes.end_if_stopped()
        self._wait_for(members)
        # If it was measured to the end anyway, it counts.
        if not reason or not code:
            return code
        say(f"error: {job.name}: {reason}")
        # Wrong use on another node is wrong use of the setting.
        return 2 if 2 in self._codes.values() else 1

    def _watch(self, process: Popen[bytes], members: Sequence[Member]) -> str | None:
        """Wait until node 0's part has ended; returns why it had to, if another node's part failed."""
        failed, give_up_s = None, 0.0
        while process.poll() is None:
            self._look(LOOK_S)
            failing = next(
                (other for other in members if self._codes.get(other.node) or other.node in self._gone), None
            )
            if failing and not failed:
                failed = self._failure_of(failing)
                followed = self._codes.get(failing.node) == 1 and failing.node not in self._gone
                give_up_s = time.monotonic() + (FOLLOWED_GRACE_S if followed else GRACE_S)
            if failed and time.monotonic() > give_up_s and not self._processes.are_stopped:
                self._processes.end(process, PATIENCE_S)
                return failed
        # If it ended by itself it has said why, and that is the reason unless another node is gone or was used wrongly.
        self._look(LOOK_S)
        first = (other for other in members if other.node in self._gone or self._codes.get(other.node) == 2)
        return next((self._failure_of(other) for other in first), None)

    def _failure_of(self, other: Member) -> str:
        if other.node in self._gone:
            return gone(other.name)
        return f"the part of {other.name} ended with exit code {self._codes[other.node]}; its output says why"

    def _wait_for(self, members: Sequence[Member]) -> None:
        """Wait until the parts of the other nodes have ended too."""
        for other in members:
            if other.node not in self._codes:
                self._send(other, SettingOver())
        deadline_s = time.monotonic() + PART_TIMEOUT_S
        while late := [other.name for other in members if other.node not in self._gone | self._codes.keys()]:
            if time.monotonic() > deadline_s:
                self.problem = f"{listed(late)} did not end a setting within {PART_TIMEOUT_S:.0f} s"
                return
            self._look(LOOK_S)

    def _look(self, timeout_s: float) -> None:
        """Listen to the other nodes, and to latecomers."""
        time.sleep(timeout_s)
        for other in self._still_there():
            try:
                while ended := other.connection.receive(_TO_NODE_0, 0):
                    self._codes[other.node] = ended.code
            except (OSError, ValueError):
                self._miss(other)
        refuse_late(self._met, self._began_s)

    def _send(self, other: Member, message: Struct) -> None:
        try:
            other.connection.send(message)
        except OSError:
            self._miss(other)

    def _still_there(self) -> list[Member]:
        return [other for other in self._met.others if other.node not in self._gone]

    def _miss(self, other: Member) -> None:
        """A node is gone; without it the preset cannot go on."""
        self._gone.add(other.node)
        self.problem = self.problem or gone(other.name)


def _too_early(value: BaseException) -> Over:
    """What the others hear if node 0 ends like this."""
    if isinstance(value, (ConfigError, WorkFailedError)):
        return Over(2 if isinstance(value, ConfigError) else 1, str(value).partition("\n")[0])
    if isinstance(value, SystemExit) and value.code == 2:
        return Over(2, "nothing can be measured with these arguments; its output says why")
    if isinstance(value, SystemExit) and value.code in EXIT_CODES.values():
        return Over(1, "it was interrupted")
    return Over(1, "it failed; its output says why")


class Follower:
    """Any other node: it does its part as node 0 says."""

    def __init__(self, met: Met, job_of: Callable[[Setting, int, int], Job], processes: Processes) -> None:
        assert met.node_0 is not None
        self._name = met.names[0]
        self._node_0: Connection = met.node_0
        self._job_of = job_of
        self._processes = processes

    def serve(self) -> int:
        """Returns the exit code of the preset. Raises NodesError if node 0 is gone, and ConfigError for wrong flags."""
        try:
            while not isinstance(message := self._hear(), Over):
                if isinstance(message, Next):
                    message = self._follow(message)
                    if isinstance(message, Over):
                        break
        finally:
            self._node_0.close()
        if message.reason:
            say(f"error: {self._name}: {message.reason}")
        say("the results are on node 0")
        return message.code

    def _hear(self, timeout_s: float | None = None) -> Next | SettingOver | Over | None:
        waits = {} if timeout_s is None else {"timeout_s": timeout_s}
        try:
            return self._node_0.receive(_FROM_NODE_0, **waits)
        except (OSError, ValueError):
            raise NodesError(gone(self._name)) from None

    def _follow(self, task: Next) -> Over | None:
        if task.rank is None:
            say(f"{task.heading}: this node is not needed and waits")
            return None
        say(f"{task.heading}: this is node {task.rank} of {task.setting.nodes}")
        job = self._job_of(task.setting, task.port, task.rank)
        variables = network_of([self._node_0]) if task.setting.torchrun else {}
        process = self._processes.start(job.words, variables, ends_with_us=True)
        over = self._until_the_end(process)
        code = self._processes.ended(process)
        self._processes.end_if_stopped()
        if over is None:
            with contextlib.suppress(OSError):
                self._node_0.send(Ended(code))
        return over

    def _until_the_end(self, process: Popen[bytes]) -> Over | None:
        """Wait for the end of this node's part: by itself, or some time after node 0 has ended its own."""
        over, deadline_s = None, None
        try:
            while process.poll() is None:
                message = self._hear(LOOK_S)
                if isinstance(message, (SettingOver, Over)):
                    over = message if isinstance(message, Over) else over
                    deadline_s = time.monotonic() + GRACE_S
                if deadline_s and time.monotonic() > deadline_s:
                    self._processes.end(process, PATIENCE_S)
                if over:
                    break
        finally:
            # Node 0 is gone, or has ended the preset: usually this part notices that itself.
            with contextlib.suppress(TimeoutExpired):
                process.wait(SEES_WITHIN_S)
            self._processes.end(process, PATIENCE_S)
        return over
