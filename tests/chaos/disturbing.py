"""What goes wrong in a fleet, one thing after another, by a seed."""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from typing import Any, Protocol

import httpx
from clocks import Clocks
from fleet import ROUTERS, WORKERS, Fleet
from small_disk import SmallDisk

from loadtests.wire_proxy import WireProxy
from shared.broker import NatsServer

AWAY = 5.0
"""Seconds that a part stands still or is cut off, in the mean."""
LONGEST_TRIP = 0.5
MOST_STEPPED = 20.0
"""Seconds by which a clock is wrong at most."""

__all__ = ("Chaos", "Kills")


class Kills(Protocol):
    """Keeps what is known of routers that were killed."""

    def killed(self, router: str, at: float, back: float) -> None:
        """By a monotonic clock."""


class Chaos:
    """One failure after another, each mended before the next but for what takes its time."""

    def __init__(
        self,
        fleet: Fleet[NatsServer],
        ledger: Kills,
        wires: dict[str, WireProxy],
        clocks: Clocks,
        disk: SmallDisk | None,
        seed: int,
    ) -> None:
        """Make it.

        Args:
            fleet: all that may be disturbed.
            ledger: hears of routers that were killed.
            wires: by which workers reach NATS.
            clocks: of all parts.
            disk: of NATS; None: there is none that may be filled.
            seed: of what comes when.
        """
        self._fleet = fleet
        self._ledger = ledger
        self._wires = wires
        self._clocks = clocks
        self._disk = disk
        self._draw = random.Random(seed)
        self.happened: Counter[str] = Counter()

    async def run(self, seconds: float) -> None:
        """For so long; at the end all parts run."""
        ways = [
            self.kill_worker,
            self.kill_engine,
            self.stop_worker,
            self.drain_worker,
            self.cut_worker_off,
            self.kill_router,
            self.restart_nats,
            self.slow_link,
            self.step_clock,
        ]
        if self._disk is not None:
            ways.append(self.fill_disk)
        until = time.monotonic() + seconds
        # Each once, in an order of its own, before any comes again.
        waiting: list[Any] = []
        while time.monotonic() < until:
            waiting = waiting or self._draw.sample(ways, len(ways))
            way = waiting.pop()
            self.happened[way.__name__] += 1
            await way()
            await asyncio.sleep(self._draw.uniform(1, 6))
        await self._fleet.until(self._fleet.serves)

    async def kill_worker(self) -> None:
        name = self._worker()
        self._fleet.kill(name)
        await asyncio.sleep(self._draw.uniform(0, 3))
        self._start_worker(name)

    async def kill_engine(self) -> None:
        for engine in self._fleet.process(self._worker()).children():
            engine.kill()

    async def stop_worker(self) -> None:
        process = self._fleet.process(self._worker())
        family = [process, *process.children(recursive=True)]
        for one in family:
            one.suspend()
        await self._pause()
        for one in family:
            one.resume()

    async def drain_worker(self) -> None:
        name = self._worker()
        assert await self._fleet.end(name) == 0, self._fleet.story()
        self._start_worker(name)

    async def cut_worker_off(self) -> None:
        wire = self._wires[self._worker()]
        wire.cut()
        await self._pause()
        wire.mend()

    async def kill_router(self) -> None:
        name = self._draw.choice(ROUTERS)
        killed = time.monotonic()
        self._fleet.kill(name)
        self._fleet.start_router(name)
        await self._fleet.until(lambda: self._answers(name))
        self._ledger.killed(name, killed, time.monotonic())

    async def restart_nats(self) -> None:
        os.kill(self._fleet.nats.pid, self._draw.choice((signal.SIGKILL, signal.SIGTERM)))
        await self._fleet.nats.__aexit__(None, None, None)
        await asyncio.sleep(self._draw.uniform(0, 2))
        await self._fleet.nats.__aenter__()

    async def slow_link(self) -> None:
        wire = self._wires[self._worker()]
        wire.rtt = self._draw.uniform(0.05, LONGEST_TRIP)
        await self._pause()
        wire.rtt = 0.0

    async def step_clock(self) -> None:
        """Of one host, ahead or back, and later right again."""
        name = self._draw.choice([*ROUTERS, *WORKERS])
        self._clocks.step(name, self._draw.uniform(-MOST_STEPPED, MOST_STEPPED))
        await self._pause()
        self._clocks.step(name, 0.0)

    async def fill_disk(self) -> None:
        """Of NATS, which gives up what it could not write until it is started anew."""
        assert self._disk is not None
        self._disk.fill()
        await self._pause()
        self._disk.free()
        await self.restart_nats()

    def _worker(self) -> str:
        return self._draw.choice(WORKERS)

    def _start_worker(self, name: str) -> None:
        self._fleet.start_worker(name, self._wires[name].url(self._fleet.nats.url_for(name)))

    async def _pause(self) -> None:
        await asyncio.sleep(self._draw.uniform(0.4 * AWAY, 1.6 * AWAY))

    async def _answers(self, router: str) -> bool:
        async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
            try:
                await client.get(f"{self._fleet.url(router).removesuffix('/v1')}/livez")
            except httpx.HTTPError:
                return False
        return True
