"""Where a replica goes: which worker has room for it, or could make some. Pure.

**Room.** The fewest models first, for models on one worker share its cores; of those the smallest
that fits (by powers of two), so that large workers stay free for large models; of those the next
one on a ring of hashes, seen from the model. The last is what makes all that see the same workers
choose the same one, and a worker that only some see changes nothing unless it is the one chosen. It
is found by a bisection, where hashing every pair of worker and model (rendezvous) would cost
seconds for 10,000 workers and 500 models.

**Evictions.** Only on a worker that has then room enough; lowest priority first, then longest
unused.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from hashlib import blake2b
from itertools import chain
from typing import NamedTuple

from shared.snapshot import WorkerView

__all__ = ("EXTRA", "FIRST", "MINIMUM", "PINNED", "Claim", "Floor", "Room", "Victim")


class Claim(NamedTuple):
    """One more replica of a model. Sorts by urgency."""

    level: int
    """`PINNED` before `MINIMUM` before `FIRST` before `EXTRA`."""
    precedence: int
    """The model's priority, negated."""
    relief: float
    """How much it is wanted, negated: load per slot, or seconds of waiting."""
    model: str
    ordinal: int
    target: str = ""
    """The only worker it may go to."""


PINNED, MINIMUM, FIRST, EXTRA = range(4)


class Room:
    """One worker's memory during a decision."""

    __slots__ = ("able", "free", "held", "models", "name", "place", "soon")

    def __init__(self, worker: WorkerView, now: float, drain: float) -> None:
        self.name = worker.name
        self.able = worker.able
        self.place = place(worker.name)
        self.models = {holding.model for holding in worker.holds}
        self.free = worker.memory - sum(stage.taken for stage in worker.stages)
        """Bytes free now."""
        self.soon = 0
        """Bytes more that are free once what drains is gone."""
        self.held = 0
        """Models that stay."""
        for holding in worker.holds:
            memory = holding.memory or self.able.get(holding.model, 0)
            self.free -= memory
            if holding.state != "draining":
                self.held += 1
            elif now - holding.since < drain:
                self.soon += memory

    def takes(self, model: str, spare: int = 0) -> bool:
        """Whether the model may go here, with so many bytes more than are free now."""
        cost = self.able.get(model)
        return cost is not None and cost <= self.free + spare and model not in self.models

    def leaves(self, memory: int) -> None:
        """Count a model of so many bytes as gone soon."""
        self.soon += memory
        self.held -= 1

    def reserve(self, model: str) -> None:
        """Count the model as held here from now on."""
        self.free -= self.able.get(model, 0)
        self.models.add(model)
        self.held += 1


class Victim(NamedTuple):
    """A replica that could be evicted. Sorts in the order in which they go."""

    priority: int
    last_use: float
    model: str
    worker: str
    rank: int
    """How many replicas of its model stay before it does."""
    memory: int


@lru_cache(maxsize=65_536)
def place(name: str) -> int:
    """Where a worker or a model stands on the ring."""
    digest = blake2b(name.encode(), digest_size=8, person=b"mesh placement").digest()
    return int.from_bytes(digest, "little")


class Floor:
    """The rooms of all workers, kept in the order in which they are preferred."""

    def __init__(self, rooms: Iterable[Room]) -> None:
        self._rooms = {room.name: room for room in rooms}
        self._able = list({id(room.able): room.able for room in self._rooms.values()}.values())
        self._draining = [room for room in self._rooms.values() if room.soon]
        self._shelves: dict[tuple[int, int], list[tuple[int, str]]] = {}
        for room in self._rooms.values():
            self._shelves.setdefault(_shelf(room), []).append((room.place, room.name))
        for shelf in self._shelves.values():
            shelf.sort()

    def reserve(self, room: Room, model: str) -> None:
        """Count the model as held there from now on."""
        self._take(room)
        room.reserve(model)
        self._put(room)

    def leaves(self, room: Room, victim: Victim) -> None:
        """Count what is evicted there as gone soon."""
        self._take(room)
        if not room.soon:
            self._draining.append(room)
        room.leaves(victim.memory)
        self._put(room)

    def least(self, model: str) -> int | None:
        """Bytes that the model takes at least; None: no worker can load it."""
        return min((able[model] for able in self._able if model in able), default=None)

    def with_room(self, model: str, least: int, target: str = "") -> Room | None:
        """The worker to load the model now; `target` alone if it is given."""
        if target:
            room = self._rooms[target]
            return room if room.takes(model) else None
        start = place(model)
        for key in sorted(self._shelves):
            if 1 << key[1] <= least:
                continue
            for name in _around(self._shelves[key], start):
                room = self._rooms[name]
                if room.takes(model):
                    return room
        return None

    def with_room_soon(self, model: str, target: str = "") -> Room | None:
        """The worker that has room once what drains there is gone; `target` alone if given."""
        start = place(model)
        found = [
            (room.held, (room.place - start) % (1 << 64), room.name)
            for room in self._draining
            if room.takes(model, room.soon) and target in ("", room.name)
        ]
        return self._rooms[min(found)[2]] if found else None

    def by_eviction(
        self,
        model: str,
        victims: Iterable[Victim],
        beside: Mapping[str, Iterable[Victim]],
        may_go: Callable[[Victim], bool],
    ) -> tuple[Room, list[Victim]] | None:
        """The worker that makes room for the model, and what must go there.

        Args:
            model: the one to be loaded.
            victims: in the order in which they go.
            beside: all victims by worker, in the same order.
            may_go: whether one may be evicted for this model.
        """
        tried: set[str] = set()
        for first in victims:
            room = self._rooms.get(first.worker)
            if room is None or first.worker in tried or not may_go(first):
                continue
            tried.add(first.worker)
            needed = room.able.get(model)
            if needed is None or model in room.models:
                continue
            needed -= room.free + room.soon
            gone: list[Victim] = []
            for victim in beside[first.worker]:
                if needed > 0 and may_go(victim):
                    gone.append(victim)
                    needed -= victim.memory
            if needed <= 0:
                return room, gone
        return None

    def _take(self, room: Room) -> None:
        shelf = self._shelves[_shelf(room)]
        del shelf[bisect_left(shelf, (room.place, room.name))]

    def _put(self, room: Room) -> None:
        insort(self._shelves.setdefault(_shelf(room), []), (room.place, room.name))


def _shelf(room: Room) -> tuple[int, int]:
    return room.held, max(0, room.free).bit_length()


def _around(shelf: list[tuple[int, str]], start: int) -> Iterator[str]:
    middle = bisect_left(shelf, (start, ""))
    for at in chain(range(middle, len(shelf)), range(middle)):
        yield shelf[at][1]
