"""How many workers the placement policy wishes for, as this router sees the fleet: for metrics.

All routers see the same beats and the same demand, so that any of them may be asked. What models
cost is remembered when their last worker has left, for a fleet that is scaled to zero.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from statistics import median_low

from shared.demand import Demand
from shared.presence import Beat
from shared.sighting import costs_of, slots_of, view_of
from shared.snapshot import ModelSettings, Snapshot
from shared.wish import Wish, wish

__all__ = ("Wishes", "snapshot_of")

FRESH = 1.0
"""Seconds for which an answer is given again."""
REMEMBERED = 1024


def snapshot_of(
    beats: Iterable[Beat], demand: Mapping[str, Demand], settings: Mapping[str, ModelSettings]
) -> Snapshot:
    """The fleet at one moment; leases do not count where only replicas are counted."""
    known = sorted(beats, key=lambda beat: beat.worker)
    views = tuple(view_of(beat, costs_of(beat)) for beat in known)
    return Snapshot(views, (), settings, demand, slots_of(known))


class Wishes:
    """Asked by whoever collects metrics; computed at most once a second."""

    def __init__(
        self,
        beats: Callable[[], Iterable[Beat]],
        demand: Callable[[], Mapping[str, Demand]],
        settings: Callable[[], Mapping[str, ModelSettings]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._beats = beats
        self._demand = demand
        self._settings = settings
        self._clock = clock
        self._costs: OrderedDict[str, int] = OrderedDict()
        self._memory = 0
        self._at = 0.0
        self._wish = Wish({}, 0)

    def current(self) -> Wish:
        """Workers wanted, by model and in all."""
        now = self._clock()
        if not self._at <= now < self._at + FRESH:
            self._at = now
            self._wish = self._compute(now)
        return self._wish

    def _compute(self, now: float) -> Wish:
        snapshot = snapshot_of(self._beats(), self._demand(), self._settings())
        memories = [worker.memory for worker in snapshot.workers if worker.memory]
        if memories:
            self._memory = median_low(memories)
        for worker in snapshot.workers:
            for model, cost in worker.able.items():
                self._costs[model] = cost
        while len(self._costs) > REMEMBERED:
            self._costs.popitem(last=False)
        return wish(snapshot, now, usual_memory=self._memory, costs=self._costs)
