"""Frames of one step, gathered by router and sent to the agent as one message."""

import socket
import time
from collections.abc import Callable

import msgspec

from shared.protocol import Frame
from worker.link import EngineStats, Mail, Step, pack

__all__ = ("Outbox",)

_STATS_SECONDS = 0.1
"""Between two tellings of the load while nothing ends: a beat is sent every half second, and what
takes 15 us where caches are cold is not to be done after each step."""


class Outbox:
    """Gathers frames until `flush`; used by the engine's loop alone."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._encode = msgspec.msgpack.Encoder().encode
        self._by_router: dict[str, tuple[str, list[Frame]]] = {}
        self._ended: list[int] = []
        self._started: list[int] = []
        self._told = 0.0

    def frames(self, reply: str) -> list[Frame]:
        """The list to which frames for this reply subject are to be appended."""
        router = reply.rpartition(".")[0]
        box = self._by_router.get(router)
        if box is None:
            box = self._by_router[router] = (reply, [])
        return box[1]

    def ended(self, attempt: int) -> None:
        """The attempt is over; its slots are free."""
        self._ended.append(attempt)

    def started(self, attempt: int) -> None:
        """The attempt has a slot."""
        self._started.append(attempt)

    def flush(self, stats: Callable[[], EngineStats]) -> None:
        """Send what has gathered, if anything has."""
        if not (self._by_router or self._ended or self._started):
            return
        encode = self._encode
        mail = [Mail(reply, encode(frames)) for reply, frames in self._by_router.values() if frames]
        now = time.monotonic()
        told: EngineStats | None = None
        if self._ended or now - self._told > _STATS_SECONDS:
            told, self._told = stats(), now
        step = Step(tuple(mail), tuple(self._ended), told, tuple(self._started))
        self._by_router.clear()
        self._ended.clear()
        self._started.clear()
        self._link.sendall(pack(step))
