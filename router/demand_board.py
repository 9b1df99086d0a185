"""The demand bucket: this router's entries written into it, all routers' read out of it.

Never on a request's path: what was counted is told some times a second, at once when somebody
begins to wait. While JetStream is away the router serves on, tries again, and tells what it missed.
"""

import asyncio
import time
from collections.abc import Callable

import structlog

from router.demand import Demand
from shared import subjects
from shared.bus import BusUnavailable
from shared.demand import Demand as FleetDemand
from shared.demand import encode_entry
from shared.demand_view import DemandView
from shared.errors import PayloadTooLarge
from shared.kv import DEMAND, MODELS, ROLES, WORKERS, Kv

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
        self._view = DemandView()
        self._stale = True
        self._opened = False

    @property
    def informed(self) -> bool:
        """Whether it has read what all routers have told."""
        return self._opened and not self._stale

    def reconnected(self) -> None:
        """What was written meanwhile has been missed: read all again."""
        self._stale = True
        self._urgent.set()

    def demand(self) -> dict[str, FleetDemand]:
        """All routers' demand as of now, by model."""
        return self._view.total(self._clock())

    async def run(self) -> None:
        """Read, tell and follow until cancelled."""
        follower = await self._kv.follow(DEMAND, self._view.hear)
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
            self._view.begin_anew()
            found = await self._kv.read(DEMAND)
        except BusUnavailable as error:
            log.warning("demand.unread", reason=str(error))
            self._stale = True
            return False
        for entry in found:
            self._view.hear(entry)
        if not self._opened:
            self._opened = True
            self._ledger.take_over(self._view.of(self._ledger.router), self._clock())
        return True

    async def _tell(self) -> None:
        for entry in self._ledger.due(self._clock()):
            try:
                key = subjects.demand_key(entry.model, entry.router)
                await self._kv.tell(DEMAND, key, encode_entry(entry))
            except (BusUnavailable, ValueError, PayloadTooLarge) as error:
                # What is in use is told again within seconds.
                log.debug("demand.untold", model=entry.model, reason=str(error))
