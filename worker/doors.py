"""The subjects on which one model takes requests, opened and closed as its slots fill and free.

The queue group is open only while there is a free slot, so that NATS's "no responders" means that
no worker has room; the worker's own door is open as long as the model can be served at all.
"""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import structlog

from shared import subjects
from shared.bus import Bus, BusMessage, BusUnavailable, Subscription

__all__ = ("Doors", "Wanted")

RETRY_SECONDS = 0.5
"""Pause before a door that could not be opened or confirmed is tried again."""

_log = structlog.get_logger()


class Wanted(NamedTuple):
    """Which doors should be open."""

    direct: bool
    group: bool


class _Door:
    def __init__(self, subject: str, queue: str) -> None:
        self.subject = subject
        self.queue = queue
        self.subscription: Subscription | None = None


class Doors:
    """The doors of one model under all its names; `run` keeps them as `wanted` says."""

    def __init__(
        self,
        bus: Bus,
        names: tuple[str, ...],
        take: Callable[[BusMessage], None],
        *,
        wanted: Callable[[], Wanted],
        on_open: Callable[[], None],
    ) -> None:
        self.open = False
        """Whether the server is known to have the direct doors."""
        self._bus = bus
        self._take = take
        self._wanted = wanted
        self._on_open = on_open
        self._direct = [_Door(subjects.infer_direct(name, bus.identity), "") for name in names]
        self._group = [_Door(subjects.infer(name), subjects.FREE) for name in names]
        self._poked = asyncio.Event()
        self._poked.set()

    def poke(self) -> None:
        """Look again at what is wanted."""
        self._poked.set()

    async def run(self) -> None:
        """Open and close until cancelled."""
        while True:
            await self._poked.wait()
            self._poked.clear()
            try:
                await self._settle()
            except BusUnavailable as error:
                _log.debug("doors.unsettled", reason=str(error))
                await asyncio.sleep(RETRY_SECONDS)
                self._poked.set()

    async def close(self) -> None:
        """Close all doors; `run` must have ended."""
        self.open = False
        for door in (*self._group, *self._direct):
            await self._put(door, False)

    async def _settle(self) -> None:
        wanted = self._wanted()
        if not wanted.direct:
            self.open = False
        for door in self._direct:
            await self._put(door, wanted.direct)
        if wanted.direct and not self.open:
            # Nobody is told that the model is ready before requests for it would arrive.
            await self._bus.barrier()
            if self._wanted().direct:
                self.open = True
                self._on_open()
        for door in self._group:
            # Asked anew: slots may have filled while an earlier step waited for the server.
            await self._put(door, self._wanted().group)

    async def _put(self, door: _Door, wanted: bool) -> None:
        if wanted and door.subscription is None:
            door.subscription = await self._bus.subscribe(
                door.subject, self._take, queue=door.queue
            )
        elif not wanted and door.subscription is not None:
            subscription, door.subscription = door.subscription, None
            await subscription.leave()
