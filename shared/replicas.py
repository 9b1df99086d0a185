"""How many replicas of a model are wanted, and why. Pure; where they go is `shared.packing`.

**The first replica** is wanted while requests wait, or while the model is held and was used within
`IDLE_AFTER`. Without use it goes, down to the minimum.

**More of them.** With `load` requests in flight on average, `load + sqrt(load)` slots are wanted:
square-root staffing (Halfin and Whitt, "Heavy-Traffic Limits for Queues with Many Exponential
Servers", 1981), by which about one request in five has to wait for a slot at all, however large the
model's traffic is: one replica of 8 slots is enough up to a load of 5.6. Of the load this is asked
as it has been for some minutes (`sustained`); but when all slots are taken on average over 10 s
(`load`), another replica is wanted at once.

**Fewer.** A replica goes when even `sustained + 6 * sqrt(sustained)` slots are there without it: a
load of 1.3 where 8 slots would be left, of 36 where 72 would. Requests in flight are Poisson with a
standard deviation of sqrt(load), so more and fewer lie 5 deviations apart, and means over time keep
only a part of them. With 4 instead of 6, and with `load` for `sustained` above, a steady load of
long answers moved a model up to 1.6 times an hour; so it is 0.2 times at worst
(`docs/simulation.md`). A replica too many costs nobody anything meanwhile: a model that has none
may have it evicted.

**Bursts.** A replica that loads counts. While the first one loads, nothing is added, however many
wait for it, but a second one once that takes longer than `HEDGE`. Later they grow at most fourfold,
counted from those ready for `SETTLE`, for until then the load does not show what a new one does. A
load that takes long holds up nobody but itself.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from shared.demand import Demand
from shared.snapshot import ModelSettings

__all__ = (
    "DEFAULT_TIMING",
    "DRAIN",
    "EVICT_AFTER",
    "GROWTH",
    "HEDGE",
    "IDLE_AFTER",
    "LEAST_STAY",
    "SETTLE",
    "Replica",
    "Timing",
    "Want",
    "enough",
    "idle_for",
    "spare",
    "want",
    "wished",
)

IDLE_AFTER = 60.0
"""Seconds after its last use at which a model is idle."""
EVICT_AFTER = 10.0
"""Seconds after its last use at which a model that others need the room of may go."""
LEAST_STAY = 30.0
"""Seconds a replica is ready before it may be evicted: what was loaded serves, and two models that
take turns are not loaded for every request."""
SETTLE = 10.0
"""Seconds a new replica gets to take its part of the load before more are added."""

DRAIN = 5.0
"""Seconds in which what drains is expected to be gone; room is made elsewhere after that."""

HEDGE = 60.0
"""Seconds that a first replica may load while requests wait, before a second worker tries too."""

GROWTH = 4
"""Factor by which replicas grow at once at most, counted from those that have settled."""


class Timing(NamedTuple):
    """The times of the rules, in seconds."""

    idle_after: float = IDLE_AFTER
    evict_after: float = EVICT_AFTER
    least_stay: float = LEAST_STAY
    settle: float = SETTLE
    drain: float = DRAIN
    hedge: float = HEDGE
    growth: int = GROWTH
    """A factor, not a time."""


DEFAULT_TIMING = Timing()


class Replica(NamedTuple):
    """One replica, from a lease, a holding, or both. Sorts in the order in which replicas stay.

    The order is by lease, which compare-and-set made unique: even two workers with different
    views agree on which of them goes.
    """

    loose: bool
    """Not pinned."""
    number: float
    """Of the lease; infinite where there is none."""
    worker: str
    ready: bool
    since: float
    busy: int
    memory: int
    seen: bool
    """Whether the worker itself tells of it."""


class Want(NamedTuple):
    """How many replicas of one model there should be."""

    model: str
    replicas: int
    present: int
    """Those that load or are ready."""
    floor: int
    """Those that stay without any use: minimum or pinned."""
    reason: str


def enough(load: float, sustained: float, slots: int) -> int:
    """Replicas that so much load needs."""
    steady = min(load, sustained)
    return math.ceil(max(load, steady + math.sqrt(steady)) / slots)


def spare(load: float, sustained: float, slots: int) -> int:
    """Replicas beyond which there are too many for so much load."""
    most = max(load, sustained)
    return math.ceil((most + 6 * math.sqrt(most)) / slots)


def want(
    settings: ModelSettings,
    demand: Demand,
    slots: int,
    replicas: Sequence[Replica],
    pins: int,
    now: float,
    timing: Timing = DEFAULT_TIMING,
) -> Want:
    """How many replicas of a model are wanted now.

    Args:
        settings: the operator's.
        demand: all routers'.
        slots: of one replica, 1 or more.
        replicas: those that load or are ready, on workers that take roles.
        pins: of how many workers it is known that the model is pinned to them.
        now: unix time.
        timing: the times of the rules.
    """
    present = len(replicas)
    floor = max(settings.minimum, pins)
    ceiling = max(floor, settings.maximum) if settings.maximum else None
    idle = idle_for(demand, replicas, now)
    if idle >= timing.idle_after and not demand.waiting:
        reason = f"idle for {idle:.0f} s" if present > floor else "idle"
        return Want(settings.model, floor, present, floor, reason)
    count, reason = _by_load(demand, slots, replicas, now, timing)
    if count < floor:
        return Want(settings.model, floor, present, floor, f"at least {floor}")
    if ceiling is not None and count > ceiling:
        return Want(settings.model, ceiling, present, floor, f"at most {ceiling}; {reason}")
    return Want(settings.model, count, present, floor, reason)


def wished(
    settings: ModelSettings,
    demand: Demand,
    slots: int,
    replicas: Sequence[Replica],
    pins: int,
    now: float,
    timing: Timing = DEFAULT_TIMING,
) -> int:
    """How many replicas of a model there would be if they came at once; arguments as of `want`."""
    now_wanted = want(settings, demand, slots, replicas, pins, now, timing).replicas
    if not (demand.waiting or demand.running):
        return now_wanted
    count = max(now_wanted, enough(demand.load, demand.sustained, slots))
    if settings.maximum:
        count = min(count, max(settings.maximum, settings.minimum, pins))
    return count


def idle_for(demand: Demand, replicas: Sequence[Replica], now: float) -> float:
    """Seconds since the last use; 0 while one is in or waits, or where a replica still loads.

    A replica that has just become ready counts as used then: what took long to load is not thrown
    away the moment it is there.
    """
    if demand.waiting or demand.running:
        return 0.0
    last = demand.last_use
    for replica in replicas:
        if replica.busy or not replica.ready:
            return 0.0
        if replica.since > last:
            last = replica.since
    return max(0.0, now - last)


def _by_load(
    demand: Demand, slots: int, replicas: Sequence[Replica], now: float, timing: Timing
) -> tuple[int, str]:
    present = len(replicas)
    if not present:
        if demand.waiting:
            return 1, f"{demand.waiting} waiting since {now - demand.waiting_since:.1f} s"
        return 0, "not held, nobody waits"
    if present == 1 and demand.waiting and not replicas[0].ready:
        took = now - replicas[0].since
        if took >= timing.hedge:
            return 2, f"the only one has been loading for {took:.0f} s"
    up = enough(demand.load, demand.sustained, slots)
    if up > present:
        settled = sum(r.ready and now - r.since >= timing.settle for r in replicas)
        count = min(up, timing.growth * settled)
        if count <= present:
            return present, f"load {demand.load:.1f}, until the newest replicas show their effect"
        return count, f"load {demand.load:.1f} on {present * slots} slots"
    most = max(1, spare(demand.load, demand.sustained, slots))
    if present > most:
        return most, f"load {demand.load:.1f}, sustained {demand.sustained:.1f}"
    return present, "in use"
