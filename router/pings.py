"""Measuring how far workers are: pings through NATS, the path that tokens take.

Each worker gets a ping a second (more than `MOST_A_SECOND` workers take turns), and one at once
when it is first heard of. All answers come to one callback, on reply subjects of which each worker
has one; a number that nobody can guess says whose it is, so that no worker can answer for another.

A worker whose process has died has no connection any more, and NATS says at once that nobody hears
its ping: sooner than its beats are missed.

What this router itself is late does not count as distance: while the event loop stalls, long round
trips and missing answers are not believed. Short ones are, since a stall only adds.
"""

import asyncio
import time
from collections.abc import Callable
from itertools import count
from typing import NamedTuple

import structlog

from router.secret import attempt_number
from shared import subjects
from shared.bus import Bus, BusMessage, BusUnavailable
from shared.distance import Distances

__all__ = ("Pings",)

INTERVAL = 1.0
TICK = 0.25
MOST_A_SECOND = 200
PULSE = 0.02
STALL = 0.02
"""Seconds by which a timer may be late before the loop counts as stalled."""
SHORT = 0.25
"""Share of the cap below which a round trip is believed in a stall, too."""

log = structlog.get_logger(__name__)


class _Ping(NamedTuple):
    worker: str
    sent: float


class Pings:
    """Pings to all workers; `run` keeps `distances` up to date."""

    def __init__(
        self,
        bus: Bus,
        distances: Distances,
        workers: Callable[[], list[str]],
        on_unheard: Callable[[str], None],
    ) -> None:
        """Make them.

        Args:
            bus: where they go.
            distances: learns of the answers.
            workers: all there are.
            on_unheard: told a worker that has answered before, and is not connected now.
        """
        self._bus = bus
        self._distances = distances
        self._workers = workers
        self._on_unheard = on_unheard
        self._reply = f"{bus.inbox}.p."
        self._places: dict[str, int] = {}
        """The end of each worker's reply subject."""
        self._at: dict[int, str] = {}
        self._due: dict[str, float] = {}
        self._out: dict[int, _Ping] = {}
        self._number: dict[str, int] = {}
        self._wake = asyncio.Event()
        self._pulse_due = 0.0
        self._stalled_at = 0.0

    def met(self, worker: str) -> None:
        """A worker is heard of for the first time."""
        if worker not in self._due:
            self._wake.set()

    async def run(self) -> None:
        """Ping until cancelled."""
        subscription = await self._bus.subscribe(f"{self._reply}*", self._on_pong)
        try:
            while True:
                await self._round(time.monotonic())
                self._wake.clear()
                await self._wait()
        finally:
            await subscription.leave()

    async def _round(self, now: float) -> None:
        workers = self._workers()
        for gone in self._due.keys() - set(workers):
            del self._due[gone]
            self._at.pop(self._places.pop(gone, -1), None)
            self._out.pop(self._number.pop(gone, 0), None)
        pause = max(INTERVAL, len(workers) / MOST_A_SECOND)
        most = max(1, int(MOST_A_SECOND * TICK))
        due = sorted(
            (worker for worker in workers if self._due.get(worker, 0.0) <= now),
            key=lambda worker: self._due.get(worker, 0.0),
        )
        for worker in due[:most]:
            self._due[worker] = now + pause
            self._missing(worker, now)
            await self._ping(worker)

    def _missing(self, worker: str, now: float) -> None:
        ping = self._out.pop(self._number.pop(worker, 0), None)
        if ping is not None and not self._stalled(ping.sent, now):
            self._distances.miss(worker, now - ping.sent)

    async def _ping(self, worker: str) -> None:
        number = attempt_number()
        self._number[worker] = number
        self._out[number] = _Ping(worker, time.monotonic())
        try:
            data = number.to_bytes(8, "little")
            reply = f"{self._reply}{self._place(worker)}"
            await self._bus.publish(subjects.ping(worker), data, reply=reply)
        except BusUnavailable as error:
            # Nothing was sent: that is not the worker's fault.
            self._out.pop(self._number.pop(worker), None)
            log.debug("ping.skipped", worker=worker, reason=str(error))

    def _place(self, worker: str) -> int:
        place = self._places.get(worker)
        if place is None:
            place = next(number for number in count() if number not in self._at)
            self._places[worker], self._at[place] = place, worker
        return place

    def _on_pong(self, message: BusMessage) -> None:
        now = time.monotonic()
        if message.status:
            self._on_status(message)
            return
        ping = self._out.pop(int.from_bytes(message.data, "little"), None)
        if ping is None:
            return
        self._number.pop(ping.worker, None)
        seconds = now - ping.sent
        if seconds > SHORT * self._distances.cap and self._stalled(ping.sent, now):
            return
        self._distances.observe(ping.worker, seconds)

    def _on_status(self, message: BusMessage) -> None:
        place = message.subject.removeprefix(self._reply)
        worker = self._at.get(int(place)) if place.isdecimal() else None
        # One that has never answered may have no ear for pings.
        if worker is None or message.status != "503" or self._distances.rtt(worker) is None:
            return
        self._on_unheard(worker)

    def _stalled(self, since: float, now: float) -> bool:
        return self._stalled_at >= since or now - self._pulse_due > STALL

    async def _wait(self) -> None:
        """Sleep for a tick, in small steps while answers are awaited, to notice own stalls."""
        until = time.monotonic() + TICK
        while not self._wake.is_set():
            now = time.monotonic()
            if now >= until:
                return
            step = min(until - now, PULSE if self._out else TICK)
            self._pulse_due = now + step
            try:
                async with asyncio.timeout(step):
                    await self._wake.wait()
            except TimeoutError:
                woke = time.monotonic()
                if woke - self._pulse_due > STALL:
                    self._stalled_at = woke
