"""Which worker a request goes to: the pool of one model's workers, and the choice among them.

Pure: loads come from beats and from what this router itself has placed, distances from
`shared.distance`, and nothing here reads a clock or draws a number. The rules, in their order:

1. Only the near count. While no near worker serves, those whose distance is unknown do; those
   beyond the cap only if `Routing.far` says so, the nearest of them first.
2. A request that is known to be longer than the context of some goes to the others.
3. A conversation goes where the ring puts it (`shared.hash_ring`), because its prompt is cached
   there, unless that worker is at its limit: then to the next on the ring that is not. The limit is
   `Routing.load_bound` times the mean load (by slots); never below three quarters of a worker's
   slots, for a worker with so much room is not loaded however idle others are; and never above
   its slots while another has a free one, for waiting costs more than computing a prompt anew.
   Where all are full it is `QUEUE_BOUND` times the mean, and one that has only begun, so that
   little of it is cached, goes to the least loaded.
4. Without a conversation, the one with the least load for its slots; among equals the nearest, by
   steps of `SAME_DISTANCE`; among those, by the number drawn for the request.
"""

from collections.abc import Collection
from typing import Literal

import msgspec

from shared.distance import Distances
from shared.hash_ring import Ring, load_limit

__all__ = ("Choice", "Pool", "Reason", "Routing")

SAME_DISTANCE = 0.010
"""Seconds of round trip within which two workers are equally near."""
_ENDLESS = 1 << 62
QUEUE_BOUND = 1.25
"""How far above the mean a worker may be where nobody has a free slot. A quarter of a full worker's
load is a quarter of an answer's time to wait: about what computing a long prompt anew costs."""
SCANNED = 32
"""Most workers that are compared for the least loaded; of more, so many are drawn."""

Reason = Literal["only", "affinity", "spill", "least_loaded", "nearest"]
"""`only`: there is no choice. `affinity`: the conversation's own worker. `spill`: that one is at
its limit, or refused. `least_loaded`: no conversation. `nearest`: all are beyond the cap."""


class Routing(msgspec.Struct, frozen=True, kw_only=True):
    """How a router chooses."""

    load_bound: float = 1.75
    """How far above the mean load a worker may be and still get its own conversations."""
    far: bool = False
    """Whether workers beyond the cap are used where no nearer one serves the model."""

    def __post_init__(self) -> None:
        if not self.load_bound > 1:
            raise ValueError(f"load_bound is {self.load_bound}; it must be above 1")


class Choice(msgspec.Struct, frozen=True):
    """Where a request goes, and why."""

    worker: str
    reason: Reason
    candidates: int
    """Workers that were eligible by distance."""


class _Member(msgspec.Struct):
    worker: str
    slots: int
    context: int
    others: int
    """What it runs and queues beside what this router has placed there."""
    own: int = 0

    @property
    def load(self) -> int:
        return self.others + self.own


class Pool:
    """The workers that serve one model now."""

    def __init__(self, distances: Distances, routing: Routing | None = None) -> None:
        self._distances = distances
        self._routing = routing or Routing()
        self._members: dict[str, _Member] = {}
        self._eligible: dict[str, _Member] = {}
        self._names: list[str] = []
        self._ring: Ring | None = None
        self._stale = True
        self._version = -1
        self._near = True
        self._least_context = 0
        self._contexts_differ = False
        # Sums over the eligible, kept up to date by `_count`.
        self._load = 0
        self._slots = 0
        self._free = 0

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, worker: str) -> bool:
        return worker in self._members

    @property
    def eligible(self) -> tuple[str, ...]:
        """The workers that may be chosen by their distance."""
        self._refresh()
        return tuple(self._eligible)

    @property
    def candidates(self) -> int:
        """How many those are."""
        self._refresh()
        return len(self._eligible)

    @property
    def contexts_differ(self) -> bool:
        """Whether it matters how long a request is."""
        self._refresh()
        return self._contexts_differ

    @property
    def free(self) -> int:
        """Slots of the eligible that are free, as far as known."""
        self._refresh()
        return self._free

    @property
    def all_eligible(self) -> bool:
        """Whether nobody has to be kept out, so that a request may go to whoever takes it."""
        self._refresh()
        return len(self._eligible) == len(self._members)

    def update(self, worker: str, *, slots: int, load: int, context: int = 0) -> None:
        """Take over what a worker's beat says.

        Args:
            worker: its name.
            slots: requests it runs together.
            load: requests it runs and queues now, those of this router included.
            context: tokens a request may have; 0: unknown.
        """
        slots = max(1, slots)
        member = self._members.get(worker)
        if member is None:
            self._members[worker] = _Member(worker, slots, context, load)
            self._stale = True
            return
        others = max(0, load - member.own)
        if (member.slots, member.context) != (slots, context):
            member.slots, member.context, member.others = slots, context, others
            self._stale = True
        elif others != member.others:
            self._count(member, others=others)

    def remove(self, worker: str) -> None:
        """It does not serve the model any more."""
        if self._members.pop(worker, None) is not None:
            self._stale = True

    def placed(self, worker: str, slots: int = 1) -> None:
        """This router has sent it a request that takes so many slots."""
        member = self._members.get(worker)
        if member is not None:
            self._count(member, own=member.own + slots)

    def ended(self, worker: str, slots: int = 1) -> None:
        """A request that was placed there is over."""
        member = self._members.get(worker)
        # A worker may have left and come back meanwhile: then its account began anew.
        if member is not None:
            self._count(member, own=max(0, member.own - slots))

    def has_room(self, worker: str) -> bool:
        """Whether it is thought to have a free slot."""
        member = self._members.get(worker)
        return member is not None and member.load < member.slots

    def full(self, worker: str) -> None:
        """It has refused a request: it has no free slot until its beat says otherwise."""
        member = self._members.get(worker)
        if member is not None and member.load < member.slots:
            self._count(member, others=member.slots - member.own)

    def choose(
        self,
        key: int | None = None,
        *,
        tokens: int = 0,
        refused: Collection[str] = (),
        draw: int = 0,
        begun: bool = False,
    ) -> Choice | None:
        """Choose a worker; None: nobody is left.

        Args:
            key: the conversation's place on the ring; None: it has none.
            tokens: length of the request as far as known; 0: unknown.
            refused: workers not to choose.
            draw: any number, different for each request, to decide among equals.
            begun: the conversation has only begun.
        """
        self._refresh()
        eligible = self._eligible
        count = len(eligible)
        if count == 1:
            worker = self._names[0]
            return None if worker in refused else Choice(worker, "only", 1)
        if not count:
            return None
        fitting = self._fitting(tokens)
        if key is None or not self._near or (begun and not self._free):
            return self._least_loaded(fitting, refused, draw)
        ring = self._ring
        if ring is None:
            ring = self._ring = Ring(eligible)
        placed = ring.place(
            key, lambda name: name not in refused and name in fitting and self._takes(name)
        )
        if placed is None:
            # Those below their limit have refused, or are too small.
            return self._least_loaded(fitting, refused, draw)
        return Choice(placed[0], "affinity" if placed[1] else "spill", count)

    def _takes(self, worker: str) -> bool:
        member = self._eligible[worker]
        load, slots = member.load, member.slots
        bound = self._routing.load_bound
        if not self._free:
            return load < load_limit(min(bound, QUEUE_BOUND), self._load, slots, self._slots)
        if load >= slots:
            return False
        return 4 * load < 3 * slots or load < load_limit(bound, self._load, slots, self._slots)

    def _least_loaded(
        self, fitting: Collection[str], refused: Collection[str], draw: int
    ) -> Choice | None:
        names = self._names
        count = len(names)
        at = draw % count
        best = ""
        best_rank: tuple[float, float] | None = None
        looked = 0
        # From a drawn place on, so that routers with the same view do not all take the same one.
        for step in range(count):
            name = names[(at + step) % count]
            if name in refused or name not in fitting:
                continue
            rank = self._rank(name)
            if best_rank is None or rank < best_rank:
                best, best_rank = name, rank
            looked += 1
            if looked == SCANNED and self._near:
                break
        if not best:
            return None
        return Choice(best, "least_loaded" if self._near else "nearest", count)

    def _rank(self, name: str) -> tuple[float, float]:
        member = self._eligible[name]
        rtt = self._distances.rtt(name) or 0.0
        if not self._near:
            return float(member.load >= member.slots), rtt
        return (member.load + 1) / member.slots, rtt // SAME_DISTANCE

    def _fitting(self, tokens: int) -> Collection[str]:
        """Those whose context is long enough; where there are none, those with the longest."""
        if tokens <= self._least_context:
            return self._eligible
        wanted = min(tokens, max(m.context or tokens for m in self._eligible.values()))
        return {name for name, m in self._eligible.items() if not m.context or m.context >= wanted}

    def _count(self, member: _Member, *, others: int | None = None, own: int | None = None) -> None:
        before = member.load
        member.others = member.others if others is None else others
        member.own = member.own if own is None else own
        if member.worker in self._eligible:
            after = member.load
            self._load += after - before
            self._free += max(0, member.slots - after) - max(0, member.slots - before)

    def _refresh(self) -> None:
        distances = self._distances
        if not self._stale and self._version == distances.version:
            return
        self._stale = False
        self._version = distances.version
        reaches = {name: distances.reach(name) for name in self._members}
        found = set(reaches.values())
        self._near = True
        if "near" in found:
            wanted = "near"
        elif "unknown" in found or not self._routing.far:
            wanted = "unknown"
        else:
            wanted = "far"
            self._near = False
        # Sorted: the order in which workers were heard of must not matter.
        names = sorted(name for name, reach in reaches.items() if reach == wanted)
        if names != self._names:
            self._ring = None
        self._names = names
        members = self._eligible = {name: self._members[name] for name in names}
        self._load = sum(m.load for m in members.values())
        self._slots = sum(m.slots for m in members.values())
        self._free = sum(max(0, m.slots - m.load) for m in members.values())
        contexts = {m.context for m in members.values() if m.context}
        self._least_context = min(contexts, default=_ENDLESS)
        self._contexts_differ = len(contexts) > 1
