"""What this worker sees of the fleet: other workers, leases, demand, what the operator has set.

All of it is heard, nothing is asked for: the server tells what is written into the buckets, and
whoever writes there writes again within seconds. So a worker that has just come, or whose
connection was away, listens for a while before it believes that it sees everything.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import msgspec
import structlog

from shared.bus import Bus
from shared.demand import REFRESH
from shared.demand_view import DemandView
from shared.kv import DEMAND, WORKERS, Entry, Kv
from shared.leases import RENEW_SECONDS, LeaseTable
from shared.presence import Beat, LoadableModel, decode_beat
from shared.settings import SettingsView
from shared.sighting import costs_of, slots_of, view_of
from shared.snapshot import LeaseView, ModelSettings, Snapshot

__all__ = ("LEAST_PAUSE", "Outlook")

LEAST_PAUSE = 2.0
"""Seconds between two beats that other workers hear, unless something has changed."""

MOST_HEARD = 250.0
"""Beats a second that a worker wants to hear: in a large fleet they come less often."""

MISSED = 4
"""Beats in a row that a worker may miss before it is out of sight."""

_log = structlog.get_logger()


class Outlook:
    """What is known of the others; `snapshot` adds what the worker knows of itself."""

    def __init__(
        self,
        worker: str,
        leases: LeaseTable,
        *,
        on_demand: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.settings = SettingsView()
        self._worker = worker
        self._leases = leases
        self._on_demand = on_demand
        self._clock = clock
        self._wall = wall
        self._beats: dict[str, tuple[Beat, float]] = {}
        self._demand = DemandView()
        self._costs: dict[tuple[LoadableModel, ...], Mapping[str, int]] = {}
        self._listening_since = clock()

    async def open(self, bus: Bus) -> None:
        """Begin to listen; raises BusUnavailable."""
        kv = Kv(bus)
        await kv.follow(WORKERS, self.hear_worker)
        await kv.follow(DEMAND, self.hear_demand)
        await self.settings.open(bus)
        self._listening_since = self._clock()

    def reconnected(self) -> None:
        """NATS is back: listen anew before acting."""
        self.settings.reconnected()
        self._demand.begin_anew()
        self._listening_since = self._clock()

    @property
    def pause(self) -> float:
        """Seconds between two beats for other workers."""
        return max(LEAST_PAUSE, (len(self._beats) + 1) / MOST_HEARD)

    @property
    def complete(self) -> bool:
        """Whether everything that is told again and again has been heard."""
        needed = max(1.5 * self.pause, RENEW_SECONDS + 1.0, REFRESH)
        return self.settings.known and self._clock() - self._listening_since >= needed

    def hear_worker(self, entry: Entry) -> None:
        """Another worker's beat."""
        if entry.key == self._worker:
            return
        try:
            beat = None if entry.value is None else decode_beat(entry.value)
        except msgspec.DecodeError as error:
            _log.warning("beat.undecodable", worker=entry.key, reason=str(error))
            return
        if beat is None or beat.state == "gone" or beat.worker != entry.key:
            self._beats.pop(entry.key, None)
            return
        self._beats[entry.key] = (beat, self._clock())

    def hear_demand(self, entry: Entry) -> None:
        """A router's account of one model."""
        told = self._demand.hear(entry)
        if told is not None and told.waiting:
            self._on_demand()

    def snapshot(self, own: Beat) -> Snapshot:
        """Everything at this moment, `own` being what the worker would tell of itself now."""
        now, wall = self._clock(), self._wall()
        silent = MISSED * self.pause
        self._beats = {
            name: (beat, heard)
            for name, (beat, heard) in self._beats.items()
            if now - heard <= silent
        }
        beats = [own, *(beat for beat, _ in self._beats.values())]
        self._costs = {beat.able: self._costs.get(beat.able) or costs_of(beat) for beat in beats}
        return Snapshot(
            workers=tuple(view_of(beat, self._costs[beat.able]) for beat in beats),
            leases=tuple(
                LeaseView(
                    key.model,
                    key.number,
                    lease.worker,
                    "ready" if lease.state == "ready" else "loading",
                    lease.since,
                )
                for key, lease in self._leases.live(now)
            ),
            settings=_with_wishes(self.settings.settings, beats),
            demand=self._demand.total(wall),
            slots=slots_of(beats),
        )


def _with_wishes(
    settings: Mapping[str, ModelSettings], beats: Sequence[Beat]
) -> Mapping[str, ModelSettings]:
    """The operators' settings, and once each model that they named and no single worker holds."""
    named = sorted({part.name for beat in beats for part in beat.parts if part.pinned})
    if not named:
        return settings
    wished = dict(settings)
    for model in named:
        told = settings.get(model) or ModelSettings(model)
        wished[model] = msgspec.structs.replace(told, minimum=max(1, told.minimum))
    return wished
