"""Whether those who wait for our answers are still there.

A router that dies cancels nothing: what it had asked for would be computed to its end, for nobody.
So the worker says nothing, now and then, where each router listens, and asks to be answered: if
nobody listens there, the server itself answers that. Routers do not notice.

One that has only lost its connection has lost frames with it, and asks again when it is back.
"""

import asyncio
from collections.abc import Callable, Iterable

import msgspec
import structlog

from shared.bus import Bus, BusMessage, BusUnavailable
from shared.errors import PayloadTooLarge
from shared.protocol import encode
from worker.admission import Ticket

__all__ = ("KNOCK_SECONDS", "MISSES", "Hearers")

KNOCK_SECONDS = 0.5
MISSES = 2
"""In a row, until a router counts as gone: so its slots are free within about a second."""

_NOTHING = encode(())
_log = structlog.get_logger()


class _Miss(msgspec.Struct):
    """Knocks in a row that a router has not heard."""

    attempts: set[int]
    """Those that were in at the first one."""
    count: int = 0


class Hearers:
    """Knocks at the routers that have something running here; `run` lasts until cancelled."""

    def __init__(
        self,
        bus: Bus,
        tickets: Callable[[], Iterable[Ticket]],
        on_gone: Callable[[tuple[int, ...]], None],
    ) -> None:
        """Make it.

        Args:
            bus: where routers listen.
            tickets: of all attempts that run or wait.
            on_gone: told the attempts that nobody waits for any more.
        """
        self._bus = bus
        self._tickets = tickets
        self._on_gone = on_gone
        self._inbox = f"{bus.inbox}.k"
        self._unheard: set[str] = set()
        self._misses: dict[str, _Miss] = {}
        self._knocked: tuple[str, ...] = ()

    async def open(self) -> None:
        """Begin to hear what the server says; raises BusUnavailable."""
        await self._bus.subscribe(f"{self._inbox}.*", self._on_status)

    async def run(self) -> None:
        """Knock until cancelled."""
        while True:
            await asyncio.sleep(KNOCK_SECONDS)
            await self._look()

    async def _look(self) -> None:
        waiting: dict[str, list[Ticket]] = {}
        for ticket in self._tickets():
            waiting.setdefault(ticket.reply.rpartition(".")[0], []).append(ticket)
        for router in self._misses.keys() | self._unheard:
            if router not in self._unheard or router not in waiting:
                self._misses.pop(router, None)
            elif not self._missed(router, waiting[router]):
                del waiting[router]
        self._unheard.clear()
        self._knocked = tuple(waiting)
        for number, tickets in enumerate(waiting.values()):
            await self._knock(number, tickets[-1].reply)

    def _missed(self, router: str, tickets: list[Ticket]) -> bool:
        """It was not there; whether anything of it is left."""
        miss = self._misses.setdefault(router, _Miss({ticket.attempt for ticket in tickets}))
        miss.count += 1
        if miss.count < MISSES:
            return True
        del self._misses[router]
        # What has come since is from one that is back.
        gone = tuple(ticket.attempt for ticket in tickets if ticket.attempt in miss.attempts)
        _log.warning("router.gone", inbox=router, attempts=len(gone))
        self._on_gone(gone)
        return len(gone) < len(tickets)

    async def _knock(self, number: int, reply: str) -> None:
        try:
            await self._bus.publish(reply, _NOTHING, reply=f"{self._inbox}.{number}")
        except (BusUnavailable, PayloadTooLarge, ValueError) as error:
            # Without NATS nobody hears anybody; a subject that is none is told with the answer.
            _log.debug("knock.unsent", reason=str(error))

    def _on_status(self, message: BusMessage) -> None:
        number = message.subject.rpartition(".")[2]
        if message.status == "503" and number.isdecimal() and int(number) < len(self._knocked):
            self._unheard.add(self._knocked[int(number)])
