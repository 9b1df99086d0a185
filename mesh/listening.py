"""Hearing a running system out: a short while of beats makes a picture of it."""

import asyncio
import os
from urllib.parse import unquote, urlsplit

from mesh.errors import CommandError
from mesh.fleet import Fleet, Snapshot
from shared import subjects
from shared.bus import Bus

__all__ = ("identity_for", "listen")

_HEAR = 1.2
"""Seconds; workers beat twice a second, routers once."""


def identity_for(url: str) -> str:
    """Who to be at a NATS server: the user that the URL names, for only its inbox is granted.

    Raises:
        CommandError: that user is no identity of a mesh.
    """
    first = url.split(",")[0].strip()
    try:
        split = urlsplit(first if "://" in first else f"nats://{first}")
    except ValueError:
        # Bus.connect says what is wrong with it.
        return "mesh"
    if not split.username or split.password is None:
        return f"mesh-{os.urandom(4).hex()}"
    try:
        return subjects.valid_identity(unquote(split.username))
    except ValueError as error:
        raise CommandError(f"the user in the NATS URL: {error}") from None


async def listen(url: str, seconds: float = _HEAR) -> Snapshot:
    """Take in the beats for a while.

    Raises:
        BusUnavailable: NATS is not there or refuses us.
        CommandError: the URL's user cannot be one of a mesh.
    """
    fleet = Fleet()
    async with Bus.connect(url, identity=identity_for(url), kind="mesh") as bus:
        await bus.subscribe(subjects.BEATS, lambda message: fleet.hear(message.data))
        await bus.subscribe(subjects.ROUTERS, lambda message: fleet.hear_router(message.data))
        await bus.barrier()
        await asyncio.sleep(seconds)
    return fleet.snapshot()
