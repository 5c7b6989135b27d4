"""Which setting to load next, to find the best without loading all, and why the others cannot win.

Settings are taken in the order of the most they can reach. That is infinite before anything is measured, and then
limited by the bounds below: each has a reason, holds at every batch size, and is checked against recorded studies by
the tests. A setting is dropped once it cannot beat the best one measured by more than a tie.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from batch_inference.core.climb import SURE, TIE, Tried, best_of, ceiling

# How much faster a setting may be alone than beside others: a fifth was seen on cores, a few percent on GPUs.
BESIDE = 1.25
# Replicas that together do less than this share of what each does alone are held up by something that others may not
# share, such as too few cores to drive them.
UNHINDERED = 0.95
# How many sizes of a setting with replicas are tried if a limit decides.
_SIZES_AT_A_LIMIT = 3

# Why a setting cannot be better. Tested against recorded studies; docs/best.md gives the reasons in full.
SPLIT = "{times} times the devices of {base}, so at most {times} times its work, at any batch size"
SHARED = "the same devices as {base}, with the same work divided further"
REPLICA = "a batch takes as long as on one of its replicas, {base}"
STAGED = "a batch passes through all stages, and takes as long as a stage's part of it on {base}"
DIVIDED = "a batch runs on {times} times the devices of {base}, so it takes at least 1/{times} of its time"
BOTH = "a batch passes through all stages, and takes at least 1/{times} of a stage's part of it on {base}"


@dataclass(frozen=True, order=True)
class Layout:
    """The sizes of a setting."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    experts: bool = False  # whole experts on each device: replicas then wait for each other

    @property
    def num_devices(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def replica(self) -> Layout:
        """One of its replicas if they do not need each other; otherwise itself."""
        return self if self.experts else replace(self, dp=1)

    def __str__(self) -> str:
        sizes = {"TP": self.tp, "PP": self.pp, "DP": self.dp}
        words = [f"{key}={size}" for key, size in sizes.items() if size > 1] or ["TP=1"]
        return " ".join([*words, *(["experts"] if self.experts else [])])


@dataclass(frozen=True)
class Goal:
    """What is maximised: throughput (of all devices, or per device), or batches per second."""

    is_latency: bool = False
    is_per_device: bool = False

    def value(self, layout: Layout, throughput: float) -> float:
        return throughput / layout.num_devices if self.is_per_device and not self.is_latency else throughput


@dataclass(frozen=True)
class Found:
    """What one load has measured. The values of `tried` are tokens per second of all its devices, or batches per second
    if the goal is the shortest batch time."""

    layout: Layout
    tried: Sequence[Tried]
    is_exhausted: bool  # no larger batch could be better
    is_alone: bool = True  # nothing ran beside it

    @property
    def best(self) -> Tried | None:
        """None if no size keeps the limits, or none of those has a value."""
        best = best_of(self.tried)
        return best if best and best.value > 0 else None

    @property
    def most(self) -> float:
        """The most it can do at any batch size; infinite if unknown."""
        return self.highest if self.is_exhausted else max(self.highest, ceiling(self.tried) * self._alone)

    @property
    def highest(self) -> float:
        """The most it can do at the sizes that were tried."""
        return max(map(self.high_of, self.tried))

    @property
    def _alone(self) -> float:
        return 1 if self.is_alone else BESIDE

    def high_of(self, one: Tried) -> float:
        """The most this size can do with nothing running beside it."""
        return (one.value + SURE * one.half) * self._alone

    def at(self, batch_size: int) -> Tried | None:
        return next((one for one in self.tried if one.batch_size == batch_size), None)


@dataclass(frozen=True)
class Bound:
    """The most a setting can reach, in the unit of the goal, and why."""

    most: float
    why: str = ""
    base: Layout | None = None
    times: int = 1

    def __str__(self) -> str:
        return self.why.format(base=self.base, times=self.times)


@dataclass(frozen=True)
class Load:
    """An engine to start, and its batch sizes; None if they are to be searched."""

    layout: Layout
    sizes: tuple[int, ...] | None = None
    lengths: tuple[int | None, ...] = ()  # of prompts
    # What it must reach at each length to be worth more runs than its ranking needs, in the unit of its `Tried` values.
    to_beat: tuple[float, ...] = ()
    is_answer: bool = True  # otherwise it only tells about others, and needs no interval


@dataclass
class Race:
    """The race of the settings at one prompt length."""

    goal: Goal
    candidates: Sequence[Layout]  # those that may be the answer
    feasible: frozenset[Layout]  # candidates and their replicas that can be loaded
    found: dict[Layout, Found] = field(default_factory=dict)
    lost: dict[Layout, str] = field(default_factory=dict)  # those that could not be loaded, and why

    # --- what is known ---------------------------------------------------------------------------------------------

    def best(self) -> Found | None:
        """The best of the measured candidates."""
        known = [one for one in self._found_candidates() if one.best]
        return max(known, key=self.value_of, default=None)

    def value_of(self, found: Found) -> float:
        """In the unit of the goal; `found` must have a best."""
        return self.goal.value(found.layout, found.best.value) if found.best else -math.inf

    def half_of(self, found: Found) -> float:
        """Infinite if unknown."""
        return self.goal.value(found.layout, found.best.shown_half) if found.best else 0.0

    def ties(self) -> list[Found]:
        """Measured candidates whose interval overlaps that of the best."""
        best = self.best()
        if best is None or not math.isfinite(self.half_of(best)):
            return []
        low = self.value_of(best) - self.half_of(best)
        others = (one for one in self._found_candidates() if one.best and one is not best)
        return [one for one in others if low <= self.value_of(one) + self.half_of(one) < math.inf]

    def nearest(self) -> tuple[Layout, Tried] | None:
        """The one that misses the limits by the least."""
        known = [(layout, one) for layout, found in self.found.items() for one in found.tried]
        return min(known, key=lambda pair: pair[1].excess, default=None)

    def _found_candidates(self) -> Iterator[Found]:
        return (self.found[layout] for layout in self.candidates if layout in self.found)

    def bound(self, layout: Layout) -> Bound:
        """The lowest of all known bounds."""
        return min(self._bounds(layout), key=lambda one: one.most, default=Bound(math.inf))

    def _bounds(self, layout: Layout) -> Iterator[Bound]:
        for base in self.found.values():
            if layout != base.layout and not layout.experts and not base.layout.experts and base.best:
                yield from self._bounds_by(layout, base)

    def _bounds_by(self, layout: Layout, base: Found) -> Iterator[Bound]:
        if self.goal.is_latency:
            yield from _shortest_times(layout, base)
        elif times := _times(layout, base.layout):
            # No step of a layer takes less than its share of one device's time; communication only adds to it.
            yield Bound(self.goal.value(layout, times * self._most_of(base)), SPLIT, base.layout, times)
        elif self._is_unhindered(base) and _times(layout, base.layout.replica) == base.layout.dp:
            # Whatever slows all devices at once, such as power, slows this setting too.
            yield Bound(self.goal.value(layout, self._most_of(base)), SHARED, base.layout)

    def _most_of(self, base: Found) -> float:
        """The most at any batch size."""
        one = self.found.get(base.layout.replica)
        # Replicas are measured at the size where a single one is best.
        is_known = one is not None and one.is_exhausted and one.best and base.at(one.best.batch_size)
        most = base.highest if is_known else base.most
        # That the best itself may be better than measured is no hope for the others.
        return max(one.value for one in base.tried) if math.isfinite(most) and base is self.best() else most

    def _is_unhindered(self, base: Found) -> bool:
        one = self.found.get(base.layout.replica)
        alone = one.at(base.best.batch_size) if one and base.best and one is not base else None
        if alone is None or base.best is None:
            return False
        return base.best.value >= UNHINDERED * base.layout.dp * alone.value

    def estimate(self, layout: Layout) -> float | None:
        """What independent replicas should do, judging by one of them; None if none was measured."""
        one = self.found.get(layout.replica)
        if layout in self.found or one is None or one.best is None or layout.replica == layout:
            return None
        times = 1 if self.goal.is_latency else layout.dp
        return self.goal.value(layout, one.best.value * times)

    # --- what is next ----------------------------------------------------------------------------------------------

    def open(self) -> list[Layout]:
        """Candidates that may still win, the most promising first."""
        enough = -math.inf
        if (best := self.best()) is not None:
            # However unsure the best is: if its runs differ much, another may still be clearly better.
            enough = self.value_of(best) * (1 + TIE)
        left = [
            one
            for one in self.candidates
            if one in self.feasible and one not in self.found and not {one, one.replica} & set(self.lost)
            and self.bound(one).most > enough
        ]  # fmt: skip
        return sorted(left, key=self._hope)

    def _hope(self, layout: Layout) -> tuple[float, float, int, int, int]:
        most, estimate = self.bound(layout).most, self.estimate(layout)
        # Among equally good ones, first a known one, then small ones, which tell the most about others.
        rough = -round(math.log(most) / TIE) if 0 < most < math.inf else -most
        # Many replicas for throughput, few for the shortest batch time.
        dp = layout.dp if self.goal.is_latency else -layout.dp
        return (rough, 0 if estimate is not None else 1, layout.replica.num_devices, layout.pp, dp)

    def next_load(self) -> Load | None:
        """None once the best is found."""
        hopeful = self.open()
        if hopeful:
            return self._load_for(hopeful[0])
        # Only a setting that ran alone can be the answer, or as good.
        for one in filter(None, [self.best(), *self.ties()]):
            if one.best and not one.is_alone and one.layout not in self.lost:
                return Load(one.layout, (one.best.batch_size,))
        return None

    def to_beat(self, layout: Layout) -> float:
        """What a setting must do for it, or several copies of it, to match the best; 0 if nothing is known."""
        best = self.best()
        if best is None:
            return 0.0
        value = max(0.0, self.value_of(best) - self.half_of(best))  # 0 if the interval is unknown
        times = [self._times_of(one, layout) for one in self.candidates if layout in (one, one.replica)]
        return value / max(times, default=1.0)

    def _times_of(self, candidate: Layout, layout: Layout) -> float:
        """The candidate's value divided by the throughput of `layout`, of which it is made."""
        if self.goal.is_latency:
            return 1.0
        return self.goal.value(candidate, candidate.num_devices / layout.num_devices)

    def wants(self, layout: Layout) -> bool:
        """Whether loading it would tell anything."""
        if (load := self.next_load()) and load.layout == layout:
            return True
        if layout in self.found or layout in self.lost:
            return False
        return any(layout in (one, one.replica) for one in self.open())

    def loads_beside(self, first: Load, devices: int) -> list[Load]:
        """`first`, and others that are needed whatever it finds and that fit beside it on `devices` devices."""
        free, loads = devices - first.layout.num_devices, [first]
        for one in self.open():
            load = self._load_for(one)
            is_needed = math.isinf(self.bound(one).most) and not self._is_told_by(
                one, [other.layout for other in loads]
            )
            if is_needed and load.layout.num_devices <= free:
                loads.append(load)
                free -= load.layout.num_devices
        return loads

    def _is_told_by(self, layout: Layout, others: Iterable[Layout]) -> bool:
        """Whether one of the others may give it a bound."""
        return any(other == layout or _times(layout.replica, other) for other in others)

    def _load_for(self, layout: Layout) -> Load:
        """What to load to learn more about it: a single replica first."""
        if layout.replica not in self.found and layout.replica in self.feasible:
            return Load(layout.replica)
        return self.load_of(layout)

    def load_of(self, layout: Layout) -> Load:
        """The load of a setting whose replica is known, at the replica's best size. If a limit decided on that size, it
        may just be missed, so the next smaller ones are tried too."""
        one = self.found.get(layout.replica)
        if not one or not one.best:
            return Load(layout)
        most = one.best.batch_size
        kept = sorted(tried.batch_size for tried in one.tried if tried.keeps_limits and tried.batch_size <= most)
        is_limited = not all(tried.keeps_limits for tried in one.tried)
        return Load(layout, tuple(kept[-_SIZES_AT_A_LIMIT:]) if is_limited else (most,))


@dataclass
class Search:
    """The races at several prompt lengths, which share their loads."""

    races: dict[int | None, Race]  # by prompt length; None for a workload

    def next_loads(self, devices: int) -> list[Load]:
        """Loads to run side by side on `devices` devices; none once everything is found."""
        for race in self.races.values():
            if load := race.next_load():
                return [self._for_all(one) for one in race.loads_beside(load, devices)]
        return []

    def _for_all(self, load: Load) -> Load:
        wanted = {length: race for length, race in self.races.items() if race.wants(load.layout)}
        loads = [race.load_of(load.layout) for race in wanted.values()]
        sizes = None
        if all(one.sizes for one in loads):
            sizes = tuple(sorted({size for one in loads for size in one.sizes or ()}))
        to_beat = tuple(race.to_beat(load.layout) for race in wanted.values())
        is_answer = any(load.layout in race.candidates for race in wanted.values())
        return Load(load.layout, sizes, tuple(wanted), to_beat, is_answer)


def _times(layout: Layout, base: Layout) -> int:
    """How many times the devices of `base` it has, if `layout` is that setting divided further; otherwise 0."""
    sizes = zip((layout.tp, layout.pp, layout.dp), (base.tp, base.pp, base.dp), strict=True)
    if any(size % of_base for size, of_base in sizes):
        return 0
    return layout.num_devices // base.num_devices


def _shortest_times(layout: Layout, base: Found) -> Iterator[Bound]:
    """Bounds on batches per second, at the batch size of the best."""
    best, other = base.best, base.layout
    if best is None:
        return
    if layout.dp > 1 and layout.replica == other:
        yield Bound(base.high_of(best), REPLICA, other)
    if other.pp > 1 or other.dp > 1 or layout.tp % other.tp:
        return
    # For the part of a batch that fills one stage; for a single request, all of it.
    part = base.at(max(1, best.batch_size // layout.pp))
    if part and layout.replica != other:
        times = layout.tp // other.tp
        why = STAGED if times == 1 else DIVIDED if layout.pp == 1 else BOTH
        yield Bound(times * base.high_of(part), why, other, times)


def layouts(devices: int, *, exactly: bool = True, most_tp: int | None = None) -> list[Layout]:
    """All TP x PP x DP on `devices` devices, or single replicas on as many or fewer."""
    found = []
    for total in [devices] if exactly else range(1, devices + 1):
        for tp in _divisors(total):
            for pp in _divisors(total // tp):
                dp = total // tp // pp
                if exactly or dp == 1:
                    found.append(Layout(tp, pp, dp))
    return [one for one in found if most_tp is None or one.tp <= most_tp]


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]
