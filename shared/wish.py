"""How many workers the policy wishes for, so that a cloud pool can grow and shrink. Pure.

By model it is the number of replicas that demand asks for, whether there is room or not, with the
same hysteresis as placement and without its steps, for a pool takes longer to grow than a model to
load. In all it is the workers of the usual size onto which these fit by memory: the largest first,
each where it leaves the least room (best fit decreasing, at most 22 % above the best packing there
is: Johnson, 1974), but never two of one model on one worker.
"""

from collections.abc import Mapping
from statistics import median_low
from typing import NamedTuple

from shared.demand import Demand
from shared.placement import replicas_of
from shared.replicas import DEFAULT_TIMING, Timing, wished
from shared.snapshot import DEFAULT_SLOTS, ModelSettings, Snapshot

__all__ = ("Wish", "pack", "wish")

_NO_DEMAND = Demand()


class Wish(NamedTuple):
    """Workers wanted."""

    by_model: Mapping[str, int]
    """Replicas of each model; 0 for those that are held and not wanted."""
    workers: int
    """In all."""


def wish(
    snapshot: Snapshot,
    now: float,
    *,
    usual_memory: int,
    costs: Mapping[str, int],
    timing: Timing = DEFAULT_TIMING,
) -> Wish:
    """How many workers are wanted now.

    A name that is asked for counts only if a worker can load it, or could at a time that is
    remembered in `costs`: a name somebody made up must not bring a machine up.

    Args:
        snapshot: what is known.
        now: unix time.
        usual_memory: bytes of a worker, where none is in sight to tell; else their median counts.
        costs: bytes of models as last told, for those that no worker in sight can load.
        timing: the times of the rules.
    """
    able = {id(worker.able): worker.able for worker in snapshot.workers}.values()
    known = dict(costs)
    for one in able:
        for model, cost in one.items():
            known[model] = min(cost, known.get(model, cost))
    replicas = replicas_of(snapshot)
    by_model: dict[str, int] = {}
    for model in sorted({*replicas, *snapshot.settings, *(snapshot.demand.keys() & known)}):
        held = replicas.get(model, [])
        settings = snapshot.settings.get(model) or ModelSettings(model)
        pins = sum(not replica.loose for replica in held)
        by_model[model] = wished(
            settings,
            snapshot.demand.get(model, _NO_DEMAND),
            max(1, snapshot.slots.get(model, DEFAULT_SLOTS)),
            held,
            max(pins, len(settings.pinned)),
            now,
            timing,
        )
    memories = [worker.memory for worker in snapshot.workers if worker.memory > 0]
    memory = median_low(memories) if memories else usual_memory
    return Wish(by_model, pack(by_model, known, memory))


def pack(replicas: Mapping[str, int], costs: Mapping[str, int], memory: int) -> int:
    """Workers of so much memory that hold so many replicas of each model.

    A model of unknown cost, or one that fits on no such worker, takes a whole one for itself.

    Args:
        replicas: by model.
        costs: bytes of one replica, by model.
        memory: bytes of a worker.
    """
    rooms: dict[int, int] = {}
    workers = 0
    for cost, model in sorted(((costs.get(m, memory), m) for m in replicas), reverse=True):
        left = replicas[model]
        filled: dict[int, int] = {}
        for free in sorted(free for free in rooms if free >= cost):
            if not left:
                break
            taken = min(left, rooms[free])
            left -= taken
            rooms[free] -= taken
            filled[free - cost] = filled.get(free - cost, 0) + taken
        workers += left
        rest = max(0, memory - cost)
        filled[rest] = filled.get(rest, 0) + left
        for free, count in filled.items():
            rooms[free] = rooms.get(free, 0) + count
        rooms = {free: count for free, count in rooms.items() if count}
    return workers
