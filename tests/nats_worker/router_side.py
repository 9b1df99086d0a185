"""What routers do for workers: they make the buckets, tell demand, and announce settings."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shared import subjects
from shared.bus import Bus
from shared.demand import encode_entry
from shared.kv import DEMAND, MODELS, ROLES, WORKERS, Entry, Kv
from shared.ledger import DemandLedger
from shared.settings import SettingsAnnouncer

__all__ = ("RouterSide",)


class RouterSide:
    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.kv = Kv(bus)
        self.ledger = DemandLedger(bus.identity)
        self.leases: dict[str, Entry] = {}

    async def open(self) -> None:
        await self.kv.make(DEMAND, ROLES, WORKERS, MODELS)
        await self.kv.follow(ROLES, lambda entry: self.leases.__setitem__(entry.key, entry))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        await self.open()
        announcer = SettingsAnnouncer(self.bus)
        tasks = [asyncio.create_task(work) for work in (self._tell(), announcer.run())]
        yield
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in done), done
        # What one test asked for must not be what the next one's workers serve. Entries of other
        # routers, left by other files' tests, are not for this one to delete.
        for entry in await self.kv.read(DEMAND):
            if entry.key.endswith(f".{self.bus.identity}"):
                await self.kv.delete(DEMAND, entry.key)

    async def _tell(self) -> None:
        while True:
            for entry in self.ledger.due(time.time()):
                key = subjects.demand_key(entry.model, entry.router)
                await self.kv.tell(DEMAND, key, encode_entry(entry))
            await asyncio.sleep(0.05)
