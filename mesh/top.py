"""`mesh top`: the state of a system as it changes, until it is interrupted."""

import asyncio
import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from mesh.fleet import Fleet
from mesh.tables import demand_table, status_view
from shared import subjects
from shared.bus import Bus, BusUnavailable
from shared.command_line import identity
from shared.demand_view import DemandView
from shared.kv import DEMAND, ROLES, Entry, Kv
from shared.leases import LeaseTable

__all__ = ("Picture", "watch")

_EVERY = 0.5
_SILENT = 3.0
"""Seconds of silence after which a worker or router is shown no more."""


class Picture:
    """All that is heard, and what it looks like."""

    def __init__(self) -> None:
        self.fleet = Fleet()
        self._leases = LeaseTable()
        self.demand = DemandView()

    def hear_lease(self, entry: Entry) -> None:
        """A write into the bucket of roles."""
        self._leases.hear(entry, time.monotonic())

    def view(self, note: str = "") -> RenderableType:
        """Everything as of now."""
        now = time.time()
        self.fleet.forget_silent(_SILENT)
        holders: dict[str, list[str]] = {}
        for key, lease in sorted(self._leases.live(time.monotonic())):
            holders.setdefault(key.model, []).append(lease.worker)
        return Group(
            Text(note, style="red") if note else Text(time.strftime("%H:%M:%S")),
            status_view(self.fleet.snapshot(), now=now),
            demand_table(self.demand.total(now), holders, now),
        )


async def watch(url: str, console: Console) -> None:
    """Show the system until cancelled, through outages of NATS too.

    Raises:
        BusUnavailable: NATS is not there at the beginning, or refuses us.
        Refused: the URL's user cannot be one of a mesh.
    """
    picture = Picture()
    async with Bus.connect(url, identity=identity("mesh", url), kind="mesh") as bus:
        kv = Kv(bus)
        await bus.subscribe(subjects.BEATS, lambda message: picture.fleet.hear(message.data))
        await bus.subscribe(
            subjects.ROUTERS, lambda message: picture.fleet.hear_router(message.data)
        )
        await kv.follow(ROLES, picture.hear_lease)
        await kv.follow(DEMAND, picture.demand.hear)
        for bucket, hear in ((DEMAND, picture.demand.hear), (ROLES, picture.hear_lease)):
            try:
                for entry in await kv.read(bucket):
                    hear(entry)
            except BusUnavailable:
                # Not made yet: then there is nothing in it.
                continue
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while not bus.closed.is_set():
                note = "" if bus.connected else "NATS is away"
                live.update(picture.view(note), refresh=True)
                await asyncio.sleep(_EVERY)
