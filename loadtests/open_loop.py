"""Requests that come when they come: a Poisson process, whatever the answers do.

A closed loop slows down with the system that it measures, and so never overloads it.
"""

import asyncio
import random
import time
from collections.abc import Callable

from loadtests.http_client import Connection, Target
from loadtests.http_reply import Recorder, Reply

__all__ = ("open_loop",)

now = time.monotonic


class _Arrivals:
    def __init__(self, target: Target, most: int) -> None:
        self.replies: list[Reply] = []
        self.under_way = 0
        self.recorder = Recorder()
        self._target = target
        self._most = most
        self._idle: list[Connection] = []
        self._all: list[Connection] = []

    def send(self, request: bytes) -> None:
        if self._idle:
            connection = self._idle.pop()
        elif len(self._all) < self._most:
            connection = Connection(self._target, self.recorder, self._ended)
            self._all.append(connection)
        else:
            raise RuntimeError(f"{self._most} requests are under way: that is all we can hold")
        self.under_way += 1
        connection.send(request)

    def close(self) -> None:
        for connection in self._all:
            connection.abort()

    def _ended(self, connection: Connection, reply: Reply) -> None:
        self.under_way -= 1
        self.replies.append(reply)
        # Not at once: the connection is still at its reply.
        asyncio.get_running_loop().call_soon(self._idle.append, connection)


async def open_loop(
    target: Target,
    request: Callable[[], bytes],
    *,
    rate: float,
    seconds: float,
    patience: float,
    seed: int = 1,
    most: int = 4000,
) -> list[Reply]:
    """Send `rate` requests a second on average for so many seconds, and wait for their ends.

    Args:
        target: where they go.
        request: makes one.
        rate: of the Poisson process, a second.
        seconds: for which they come.
        patience: seconds after the last one, in which all must have ended.
        seed: of the arrivals.
        most: connections at once.

    Raises:
        RuntimeError: more than `most` were under way, or some did not end in time.
    """
    draw = random.Random(seed)
    arrivals = _Arrivals(target, most)
    try:
        started = now()
        due = started + draw.expovariate(rate)
        while due < started + seconds:
            await asyncio.sleep(max(0.0, due - now()))
            arrivals.send(request())
            due += draw.expovariate(rate)
        last = now()
        while arrivals.under_way:
            if now() - last > patience:
                raise RuntimeError(
                    f"{arrivals.under_way} requests have not ended {patience:.0f} s after the last"
                )
            await asyncio.sleep(0.02)
    finally:
        arrivals.close()
    return sorted(arrivals.replies, key=lambda reply: reply.sent)
