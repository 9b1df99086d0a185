"""Frames of one step, gathered by router and sent to the agent as one message."""

import socket
from collections.abc import Callable

import msgspec

from shared.protocol import Frame
from worker.link import EngineStats, Mail, Step, pack

__all__ = ("Outbox",)


class Outbox:
    """Gathers frames until `flush`; used by the engine's loop alone."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._encode = msgspec.msgpack.Encoder().encode
        self._by_router: dict[str, tuple[str, list[Frame]]] = {}
        self._ended: list[int] = []

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

    def flush(self, stats: Callable[[], EngineStats]) -> None:
        """Send what has gathered, if anything has."""
        if not (self._by_router or self._ended):
            return
        mail = tuple(
            Mail(reply, self._encode(frames))
            for reply, frames in self._by_router.values()
            if frames
        )
        step = Step(mail, tuple(self._ended), stats())
        self._by_router.clear()
        self._ended.clear()
        self._link.sendall(pack(step))
