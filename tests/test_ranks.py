"""The ranks of a torchrun job, with a store of the test's own in place of torchrun's."""

from __future__ import annotations

import dataclasses
import json
import sys
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from batch_inference.core.config import ConfigError, ExperimentConfig
from batch_inference.measure import ranks as ranks_module
from batch_inference.measure.messages import Close, Joined, Prepare, Ready, encode
from batch_inference.measure.ranks import Ranks
from batch_inference.plan.place import Place, check_place, find_place


class FakeStore:
    """Everything is there at once, or never."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def add(self, key: str, amount: int) -> int:
        self.values[key] = self.values.get(key, 0) + amount
        return int(self.values[key])

    def delete_key(self, key: str) -> None:
        del self.values[key]


class FakeRanks(Ranks):
    def __init__(self, rank: int, world_size: int, store: FakeStore) -> None:
        self._place = Place(rank, world_size, rank, world_size)
        self._store: Any = store
        self._number = 0

    def _get(self, key: str, timeout_s: float | None = None) -> bytes:
        assert timeout_s is None or timeout_s > 0
        value = self._store.values.get(f"batch_inference/{key}")
        if value is None:
            raise TimeoutError(key)
        return str(value).encode()


def joined(*abouts: dict[str, str | None] | None) -> FakeRanks:
    """Rank 0, after the others have said what they are about to do; None for one that has not."""
    store = FakeStore()
    for rank, about in enumerate(abouts):
        if about is not None:
            store.set(f"batch_inference/about/{rank}", json.dumps({"host": f"node-{rank}", **about}))
    return FakeRanks(0, len(abouts), store)


SAME: dict[str, str | None] = {"vLLM": "0.32.0", "arguments": "abc"}


def test_ranks_that_say_the_same_join() -> None:
    ranks = joined(SAME, SAME, SAME)
    ranks.join(SAME)
    assert json.loads(ranks._store.values["batch_inference/problem"]) is None


@pytest.mark.parametrize(
    ("abouts", "said"),
    [
        ((SAME, SAME, None), "rank 2 of 3 did not join within 60 s"),
        ((SAME, {**SAME, "vLLM": "0.26.0"}, SAME), "rank 1 on node-1 has vLLM 0.26.0, but rank 0 has 0.32.0"),
        ((SAME, SAME, {**SAME, "arguments": "xyz"}), "rank 2 on node-2 has arguments xyz, but rank 0 has abc"),
    ],
)
def test_a_rank_that_is_missing_or_unlike_is_named(abouts: Any, said: str) -> None:
    ranks = joined(*abouts)
    with pytest.raises(ConfigError, match=f"^{said}$"):
        ranks.join(SAME)
    # The others read it there.
    other = FakeRanks(1, len(abouts), ranks._store)
    with pytest.raises(ConfigError, match=f"^{said}$"):
        other.join(SAME)


def test_a_command_reaches_every_rank_and_every_answer_rank_0() -> None:
    store = FakeStore()
    first, second, third = (FakeRanks(rank, 3, store) for rank in range(3))
    prepare = Prepare(2, 8, 4, [0, "run", 0])
    for _ in range(2):
        first.tell(prepare)
        assert second.hear() == third.hear() == prepare
        assert second.answer(Ready()) == third.answer(Joined()) == []
        assert first.answer(Ready()) == [Ready(), Ready(), Joined()]
        # Thousands of them would fill torchrun's memory.
        assert store.values == {}


def test_ranks_start_when_all_are_ready() -> None:
    store = FakeStore()
    leader, other = FakeRanks(0, 3, store), FakeRanks(1, 3, store)
    with pytest.raises(TimeoutError, match="go/0"):
        other.start_together()
    looks: list[int] = []

    def add(key: str, amount: int) -> int:
        looks.append(amount)
        # The third comes while the leader looks.
        return FakeStore.add(store, key, 1 if len(looks) == 4 else amount)

    store.add = add  # type: ignore[method-assign]
    leader.start_together()
    assert looks == [1, 0, 0, 0]
    other.start_together()


def test_the_place_of_a_rank_is_torchruns_word() -> None:
    names = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    place = find_place(names)
    assert place == Place(5, 8, 1, 4)
    assert not place.leads
    assert Place(0, 8, 0, 4).leads
    assert not Place(4, 8, 0, 4).leads  # the first of its own node alone
    for missing in names:
        assert find_place({name: value for name, value in names.items() if name != missing}) is None


@pytest.mark.parametrize(
    ("backend", "place", "said"),
    [
        ("external_launcher", Place(0, 4, 0, 4), None),
        ("external_launcher", Place(0, 8, 0, 4), "torchrun started 8 processes, but TP x PP x DP is 4"),
        ("external_launcher", None, "start it with torchrun --nproc-per-node 4"),
        ("mp", Place(0, 4, 0, 4), "torchrun started this"),
        ("mp", None, None),
    ],
)
def test_torchrun_and_its_backend_belong_together(backend: str, place: Place | None, said: str | None) -> None:
    config = ExperimentConfig(tensor_parallel_size=2, data_parallel_size=2, distributed_executor_backend=backend)
    if said is None:
        check_place(config, place)
        return
    with pytest.raises(ConfigError, match=said):
        check_place(config, place)
    # A plan for torchrun needs none.
    if place is None:
        check_place(dataclasses.replace(config, dry_run=True), None)


# --- over the store of torchrun, as far as it is asked ---------------------------------------------------------------


class TorchStore:
    """torch's TCPStore, on which a key is there after so many waits."""

    refuses = False

    def __init__(self, address: str, port: int, **options: Any) -> None:
        if TorchStore.refuses:
            raise RuntimeError("The client socket has failed to connect")
        self.made, self.calls = (address, port, options), []
        self.waits_in_vain = 0

    def set(self, key: str, value: str) -> None:
        self.calls.append(("set", key, value))

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        self.calls.append(("wait", keys, timeout.total_seconds()))
        if self.waits_in_vain:
            self.waits_in_vain -= 1
            raise DistStoreError

    def get(self, key: str) -> bytes:
        self.calls.append(("get", key))
        return b"value"


class DistStoreError(Exception):
    pass


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock that ranks look at."""
    names = SimpleNamespace(TCPStore=TorchStore, DistStoreError=DistStoreError)
    monkeypatch.setitem(sys.modules, "torch.distributed", names)
    monkeypatch.setattr(TorchStore, "refuses", False)
    monkeypatch.setenv("MASTER_ADDR", "head")
    monkeypatch.setenv("MASTER_PORT", "29500")
    clock = SimpleNamespace(now_s=100.0)

    def monotonic() -> float:
        clock.now_s += 7.0
        return float(clock.now_s)

    monkeypatch.setattr(ranks_module, "time", SimpleNamespace(monotonic=monotonic))
    return clock


@pytest.mark.usefixtures("torchrun")
def test_the_store_is_that_of_torchrun_and_its_address_is_named_where_it_is_not_there() -> None:
    store: Any = Ranks(Place(1, 2, 1, 2))._store
    assert store.made == ("head", 29500, {"is_master": False, "timeout": timedelta(seconds=60)})
    TorchStore.refuses = True
    with pytest.raises(ConfigError) as caught:
        Ranks(Place(1, 2, 1, 2))
    assert str(caught.value) == "--master-addr head: port 29500 cannot be reached within 60 s"


@pytest.mark.usefixtures("torchrun")
def test_a_word_is_waited_for_as_often_as_it_takes() -> None:
    ranks = Ranks(Place(1, 2, 1, 2))
    store: Any = ranks._store
    store.waits_in_vain = 3
    assert ranks._get("x") == b"value"
    assert store.calls == [("wait", ["batch_inference/x"], 10.0)] * 4 + [("get", "batch_inference/x")]
    store.calls.clear()
    for value in (b"bytes", "text"):
        ranks._set("y", value)
    assert store.calls == [("set", "batch_inference/y", "bytes"), ("set", "batch_inference/y", "text")]


@pytest.mark.usefixtures("torchrun")
def test_a_word_that_does_not_come_in_time_is_given_up() -> None:
    """The clock goes on by 7 s with every look: the last wait is for what is left."""
    ranks = Ranks(Place(1, 2, 1, 2))
    store: Any = ranks._store
    store.waits_in_vain = 99
    with pytest.raises(TimeoutError, match=r"^x$"):
        ranks._get("x", timeout_s=26.0)
    assert [seconds for _, _, seconds in store.calls] == [10.0, 5.0]


def test_the_verdict_of_rank_0_is_waited_for_longer_than_rank_0_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float | None]] = []
    monkeypatch.setattr(ranks_module, "time", SimpleNamespace(monotonic=lambda: 100.0))
    monkeypatch.setattr(ranks_module.socket, "gethostname", lambda: "node-7")

    def get(_self: FakeRanks, key: str, timeout_s: float | None = None) -> bytes:
        asked.append((key, timeout_s))
        return b"null" if key == "problem" else json.dumps({"host": "a", **SAME}).encode()

    monkeypatch.setattr(FakeRanks, "_get", get)
    for rank in (0, 1):
        FakeRanks(rank, 2, FakeStore()).join(SAME)
    assert asked == [("about/0", 60.0), ("about/1", 60.0), ("problem", 120.0), ("problem", 120.0)]
    other = FakeRanks(1, 2, FakeStore())
    other.join(SAME)
    assert {key: json.loads(value) for key, value in other._store.values.items()} == {
        "batch_inference/about/1": {"host": "node-7", **SAME}
    }
    commands = FakeRanks(1, 2, FakeStore())
    monkeypatch.setattr(commands, "_get", lambda *words: asked.append(words) or encode(Close()))
    assert commands.hear(60.0) == commands.hear() == Close()
    assert asked[-2:] == [("command/1", 60.0), ("command/2", None)]
