"""Hearing a running system out: a short while of beats makes a picture of it."""

import asyncio

from mesh.fleet import Fleet, Snapshot
from shared import subjects
from shared.bus import Bus
from shared.command_line import identity

__all__ = ("listen",)

_HEAR = 1.2
"""Seconds; workers beat twice a second, routers once."""


async def listen(url: str, seconds: float = _HEAR) -> Snapshot:
    """Take in the beats for a while.

    Raises:
        BusUnavailable: NATS is not there or refuses us.
        Refused: the URL's user cannot be one of a mesh.
    """
    fleet = Fleet()
    async with Bus.connect(url, identity=identity("mesh", url), kind="mesh") as bus:
        await bus.subscribe(subjects.BEATS, lambda message: fleet.hear(message.data))
        await bus.subscribe(subjects.ROUTERS, lambda message: fleet.hear_router(message.data))
        await bus.barrier()
        await asyncio.sleep(seconds)
    return fleet.snapshot()
