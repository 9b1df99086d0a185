"""The demand bucket: this router's entries written into it, all routers' read out of it.

Never on a request's path: what was counted is told some times a second, at once when somebody
begins to wait. While JetStream is away the router serves on, tries again, and tells what it missed.
"""

import asyncio
import time
from collections.abc import Callable

import msgspec
import structlog

from router.demand import Demand
from shared import subjects
from shared.bus import BusUnavailable
from shared.demand import Demand as FleetDemand
from shared.demand import DemandEntry, decode_entry, encode_entry, total
from shared.errors import PayloadTooLarge
from shared.kv import DEMAND, MODELS, ROLES, WORKERS, Entry, Kv
from shared.ledger import FORGET

__all__ = ("DemandBoard",)

TELL_INTERVAL = 0.25
RETRY = 5.0
"""Seconds until JetStream is tried again."""

log = structlog.get_logger(__name__)


class DemandBoard:
    """What all routers know of the demand; `run` keeps it."""

    def __init__(self, kv: Kv, demand: Demand, *, clock: Callable[[], float] = time.time) -> None:
        self._kv = kv
        self._own = demand
        self._ledger = demand.ledger
        self._urgent = demand.urgent
        self._clock = clock
        self._entries: dict[str, DemandEntry] = {}
        self._revisions: dict[str, int] = {}
        self._stale = True
        self._opened = False

    def reconnected(self) -> None:
        """What was written meanwhile has been missed: read all again."""
        self._stale = True
        self._urgent.set()

    def demand(self) -> dict[str, FleetDemand]:
        """All routers' demand as of now, by model."""
        now = self._clock()
        for key, entry in list(self._entries.items()):
            if now - entry.last_use > FORGET and not entry.waiting and not entry.running:
                del self._entries[key]
                self._revisions.pop(key, None)
        return total(self._entries.values(), now)

    async def run(self) -> None:
        """Read, tell and follow until cancelled."""
        follower = await self._kv.follow(DEMAND, self._take)
        try:
            while True:
                self._own.enter()
                if self._stale and not await self._refresh():
                    await asyncio.sleep(RETRY)
                    continue
                await self._tell()
                self._urgent.clear()
                try:
                    async with asyncio.timeout(TELL_INTERVAL):
                        await self._urgent.wait()
                except TimeoutError:
                    continue
        finally:
            await follower.leave()

    async def _refresh(self) -> bool:
        """Read all that is in the bucket, the first time also what a forerunner of ours left."""
        self._stale = False
        try:
            if not self._opened:
                await self._kv.make(DEMAND, ROLES, WORKERS, MODELS)
            # A bucket that was lost and made anew counts from the beginning.
            self._revisions.clear()
            found = await self._kv.read(DEMAND)
        except BusUnavailable as error:
            log.warning("demand.unread", reason=str(error))
            self._stale = True
            return False
        for entry in found:
            self._take(entry)
        if not self._opened:
            self._opened = True
            mine = (
                entry for entry in self._entries.values() if entry.router == self._ledger.router
            )
            self._ledger.take_over(mine, self._clock())
        return True

    async def _tell(self) -> None:
        for entry in self._ledger.due(self._clock()):
            try:
                key = subjects.demand_key(entry.model, entry.router)
                await self._kv.tell(DEMAND, key, encode_entry(entry))
            except (BusUnavailable, ValueError, PayloadTooLarge) as error:
                # What is in use is told again within seconds.
                log.debug("demand.untold", model=entry.model, reason=str(error))

    def _take(self, written: Entry) -> None:
        if written.revision < self._revisions.get(written.key, 0):
            return
        self._revisions[written.key] = written.revision
        if written.value is None:
            self._entries.pop(written.key, None)
            del self._revisions[written.key]
            return
        try:
            entry = decode_entry(written.value)
            owner = subjects.read_demand_key(written.key)
        except (msgspec.DecodeError, ValueError) as error:
            log.warning("demand.undecodable", key=written.key, error=str(error))
            return
        if owner != (entry.model, entry.router):
            log.warning("demand.misnamed", key=written.key, model=entry.model, router=entry.router)
            return
        self._entries[written.key] = entry
