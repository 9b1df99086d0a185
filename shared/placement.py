"""What should run where: the placement function, which every worker asks about itself. Pure.

`decide` looks at a snapshot and says how many replicas of each model are wanted (`shared.replicas`)
and what each worker should do about it (`shared.packing`). It is the same for all who see the same,
whatever the order; a worker acts only on what is said of itself, and claims what it promotes by
compare-and-set on the lease. Hence views that differ do no harm: of two workers that each believe
that they are meant, one gets the lease.

Who comes first when memory is short:

1. models pinned to a worker, then minimums, then the first replica of a model that is asked for,
   then more replicas of a model under load; within these by priority, then by load or time of
   waiting;
2. an idle model goes for any of equal or higher priority; second replicas of a model in use go for
   another's first one, or for a higher priority; nothing goes below its minimum, and of a model in
   use one replica stays whoever asks.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Literal, NamedTuple

from shared.demand import Demand
from shared.packing import EXTRA, FIRST, MINIMUM, PINNED, Claim, Floor, Room, Victim
from shared.replicas import DEFAULT_TIMING, Replica, Timing, Want, idle_for, want
from shared.snapshot import DEFAULT_SLOTS, LeaseView, ModelSettings, Snapshot

__all__ = ("Action", "Decision", "Kind", "decide", "replicas_of")

_NO_DEMAND = Demand()
_NO_LEASE = float("inf")
_NEVER = float("inf")
"""Bytes that a model takes on a worker that cannot load it."""

Kind = Literal["promote", "adopt", "demote"]


class Action(NamedTuple):
    """What one worker should do."""

    kind: Kind
    """`promote`: claim the lease, then load. `adopt`: claim a lease for what it holds without one.
    `demote`: drain, then give the memory and the lease back."""
    worker: str
    model: str
    replica: int
    """Number of the lease to claim or to give back; -1: it has none."""
    reason: str


class Decision(NamedTuple):
    """What is wanted of every model, and what is to be done."""

    wants: Mapping[str, Want]
    actions: tuple[Action, ...]

    def of(self, worker: str) -> tuple[Action, ...]:
        """What one worker should do."""
        return tuple(action for action in self.actions if action.worker == worker)


def decide(snapshot: Snapshot, now: float, timing: Timing = DEFAULT_TIMING) -> Decision:
    """Say what should run where.

    Args:
        snapshot: what is known.
        now: unix time.
        timing: the times of the rules.
    """
    return _Round(snapshot, now, timing).decide()


def replicas_of(snapshot: Snapshot) -> dict[str, list[Replica]]:
    """The replicas of each model that load or are ready on workers that take roles, as they stay.

    A lease of a worker out of sight counts; one of a worker in sight that does not tell of the
    model yet counts as loading.
    """
    leases: dict[tuple[str, str], LeaseView] = {}
    for lease in snapshot.leases:
        other = leases.setdefault((lease.worker, lease.model), lease)
        if lease.replica < other.replica:
            leases[lease.worker, lease.model] = lease
    found: dict[str, list[Replica]] = {}
    pinned = {model: known.pinned for model, known in snapshot.settings.items() if known.pinned}
    closed: set[str] = set()
    seen: set[str] = set()
    for worker in snapshot.workers:
        name = worker.name
        (seen if worker.open else closed).add(name)
        for held in worker.holds:
            own = leases.pop((name, held.model), None)
            if held.state == "draining" or not worker.open:
                continue
            replica = Replica(
                not held.pinned and name not in pinned.get(held.model, ()),
                _NO_LEASE if own is None else own.replica,
                name,
                held.state == "ready",
                held.since,
                held.busy,
                held.memory or worker.able.get(held.model, 0),
                True,
            )
            found.setdefault(held.model, []).append(replica)
    for (name, model), lease in leases.items():
        if name not in closed:
            loose = name not in pinned.get(model, ())
            ready = lease.state == "ready" and name not in seen
            replica = Replica(loose, lease.replica, name, ready, lease.since, 0, 0, False)
            found.setdefault(model, []).append(replica)
    for replicas in found.values():
        replicas.sort()
    return found


class _Round:
    """One decision: what is known, and what has been decided so far."""

    def __init__(self, snapshot: Snapshot, now: float, timing: Timing) -> None:
        self._snapshot = snapshot
        self._now = now
        self._timing = timing
        self._open = {worker.name: worker for worker in snapshot.workers if worker.open}
        self._replicas = replicas_of(snapshot)
        self._taken: dict[str, set[int]] = {}
        for lease in snapshot.leases:
            self._taken.setdefault(lease.model, set()).add(lease.replica)
        self._pins = {model: self._missing_pins(model) for model in snapshot.settings}
        asked = (model for model, demand in snapshot.demand.items() if demand.waiting)
        models = sorted({*self._replicas, *asked, *snapshot.settings})
        self._wants = {model: self._want(model) for model in models}
        self._leaving: set[tuple[str, str]] = set()
        self._actions: list[Action] = []

    def decide(self) -> Decision:
        for model, wanted in self._wants.items():
            self._adopt(model, wanted)
            self._demote(model, wanted)
        pinned = sorted(self._pinned())
        if pinned or any(wanted.replicas > wanted.present for wanted in self._wants.values()):
            self._place_all(pinned)
        return Decision(self._wants, tuple(filter(self._stands, self._actions)))

    def _stands(self, action: Action) -> bool:
        """Not so where a lease is to be claimed for what was found, later, to make room."""
        return action.kind != "adopt" or (action.worker, action.model) not in self._leaving

    def _settings(self, model: str) -> ModelSettings:
        return self._snapshot.settings.get(model) or ModelSettings(model)

    def _demand(self, model: str) -> Demand:
        return self._snapshot.demand.get(model, _NO_DEMAND)

    def _slots(self, model: str) -> int:
        return max(1, self._snapshot.slots.get(model, DEFAULT_SLOTS))

    def _missing_pins(self, model: str) -> list[str]:
        """Workers in sight that should hold the model, could, and do not."""
        holders = {replica.worker for replica in self._replicas.get(model, ())}
        pinned = {*self._snapshot.settings[model].pinned} - holders
        return sorted(name for name in pinned if self._could_hold(name, model))

    def _could_hold(self, name: str, model: str) -> bool:
        worker = self._open.get(name)
        return worker is not None and worker.able.get(model, _NEVER) <= worker.memory

    def _want(self, model: str) -> Want:
        replicas = self._replicas.get(model, [])
        pins = sum(not replica.loose for replica in replicas) + len(self._pins.get(model, ()))
        return want(
            self._settings(model),
            self._demand(model),
            self._slots(model),
            replicas,
            pins,
            self._now,
            self._timing,
        )

    def _number(self, model: str) -> int:
        """The lowest number of a lease that nobody holds."""
        taken = self._taken.setdefault(model, set())
        number = next(number for number in count() if number not in taken)
        taken.add(number)
        return number

    def _adopt(self, model: str, wanted: Want) -> None:
        for replica in self._replicas.get(model, [])[: wanted.replicas]:
            if replica.number == _NO_LEASE:
                number = self._number(model)
                self._act("adopt", replica.worker, model, number, "holds it without a lease")

    def _demote(self, model: str, wanted: Want) -> None:
        """Let those go that are too many, once all that stay are ready."""
        replicas = self._replicas.get(model, [])
        if not all(replica.ready for replica in replicas[: wanted.replicas]):
            return
        for replica in replicas[wanted.replicas :]:
            if replica.loose and replica.ready and replica.seen:
                self._release(model, replica.worker, replica.number, wanted.reason)

    def _release(self, model: str, worker: str, number: float, reason: str) -> None:
        self._leaving.add((worker, model))
        self._act("demote", worker, model, -1 if number == _NO_LEASE else int(number), reason)

    def _act(self, kind: Kind, worker: str, model: str, replica: int, reason: str) -> None:
        self._actions.append(Action(kind, worker, model, replica, reason))

    def _pinned(self) -> Iterator[Claim]:
        for model, names in self._pins.items():
            precedence = -self._settings(model).priority
            for name in names:
                yield Claim(PINNED, precedence, 0.0, model, 0, name)

    def _claims(self, pinned: Mapping[str, int]) -> Iterator[Claim]:
        """What is wanted beside what is there and what has been placed as pinned."""
        for model, wanted in self._wants.items():
            precedence = -self._settings(model).priority
            for index in range(wanted.present + pinned.get(model, 0), wanted.replicas):
                if index < wanted.floor:
                    yield Claim(MINIMUM, precedence, 0.0, model, index)
                elif index == 0:
                    waited = self._now - self._demand(model).waiting_since
                    yield Claim(FIRST, precedence, -waited, model, index)
                else:
                    relief = self._demand(model).load / (index * self._slots(model))
                    yield Claim(EXTRA, precedence, -relief, model, index)

    def _place_all(self, pinned: list[Claim]) -> None:
        floor = Floor(self._rooms())
        victims = sorted(self._victims())
        beside: dict[str, list[Victim]] = {}
        for victim in victims:
            beside.setdefault(victim.worker, []).append(victim)
        placed = Counter(
            claim.model for claim in pinned if self._place(claim, floor, victims, beside)
        )
        for claim in sorted(self._claims(placed)):
            self._place(claim, floor, victims, beside)

    def _rooms(self) -> Iterator[Room]:
        rooms = {
            name: Room(worker, self._now, self._timing.drain) for name, worker in self._open.items()
        }
        for model, replicas in self._replicas.items():
            for replica in replicas:
                room = rooms.get(replica.worker)
                if room is None:
                    continue
                if not replica.seen:
                    room.reserve(model)
                elif (replica.worker, model) in self._leaving:
                    room.leaves(replica.memory)
        yield from rooms.values()

    def _victims(self) -> Iterator[Victim]:
        for model, replicas in self._replicas.items():
            last_use = self._demand(model).last_use
            priority = self._settings(model).priority
            for rank, replica in enumerate(replicas):
                if (
                    replica.loose
                    and replica.ready
                    and replica.seen
                    and self._now - replica.since >= self._timing.least_stay
                    and (replica.worker, model) not in self._leaving
                ):
                    yield Victim(priority, last_use, model, replica.worker, rank, replica.memory)

    def _place(
        self,
        claim: Claim,
        floor: Floor,
        victims: list[Victim],
        beside: Mapping[str, list[Victim]],
    ) -> bool:
        """Find a worker for a claim, if need be by eviction; whether there is one."""
        model = claim.model
        least = floor.least(model)
        if least is None:
            return False
        if claim.target:
            victims = beside.get(claim.target, [])
        room = floor.with_room(model, least, claim.target)
        if room is not None:
            floor.reserve(room, model)
            reason = self._wants[model].reason
            self._act("promote", room.name, model, self._number(model), reason)
            return True
        room = floor.with_room_soon(model, claim.target)
        if room is None:
            found = floor.by_eviction(
                model, victims, beside, lambda victim: self._may_go(victim, claim)
            )
            if found is None:
                return False
            room, gone = found
            for victim in gone:
                self._evict(victim, model)
                floor.leaves(room, victim)
        floor.reserve(room, model)
        return True

    def _evict(self, victim: Victim, model: str) -> None:
        number = self._replicas[victim.model][victim.rank].number
        self._release(victim.model, victim.worker, number, f"makes room for {model}")

    def _may_go(self, victim: Victim, claim: Claim) -> bool:
        """Whether a replica may be evicted for a claim."""
        model = victim.model
        if model == claim.model or (victim.worker, model) in self._leaving:
            return False
        keep = self._kept(model, claim)
        kept = self._replicas[model][:keep]
        return victim.rank >= keep and all(replica.ready for replica in kept)

    def _kept(self, model: str, claim: Claim) -> int:
        """Replicas of a model that no claim of this kind takes."""
        wanted = self._wants[model]
        higher = -claim.precedence - self._settings(model).priority
        if higher < 0 or (higher == 0 and claim.level == EXTRA):
            return wanted.replicas
        idle = idle_for(self._demand(model), self._replicas[model], self._now)
        return wanted.floor if idle >= self._timing.evict_after else max(wanted.floor, 1)
