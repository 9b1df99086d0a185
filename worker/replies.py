"""Frames on their way back to routers, in the order in which they were said.

Everything goes through one queue and one task, so that the callbacks which speak need not wait and
no token overtakes its `Accepted`. What cannot be delivered is dropped, and its attempts are named:
the router has failed them or will, and nobody must go on computing them.

NATS lets us publish only where a request on this very connection wants its answer. A message may
hold frames of several attempts of a router, some of them asked over a connection that was lost; so
it goes where the router's last request wants its answer: routers look at the attempts alone.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable

import msgspec
import structlog

from shared.bus import Bus, BusUnavailable
from shared.errors import PayloadTooLarge
from shared.protocol import Fail, Frame, Handback, decode_frames, encode

__all__ = ("Replies",)

MOST_ROUTERS = 1024
"""Whose last request is remembered; the one that asked longest ago is forgotten first."""

_log = structlog.get_logger()


class Replies:
    """The way out of one worker."""

    def __init__(self, bus: Bus, on_undelivered: Callable[[tuple[int, ...]], None]) -> None:
        self._bus = bus
        self._on_undelivered = on_undelivered
        self._queue: deque[tuple[str, bytes]] = deque()
        self._ways: OrderedDict[str, str] = OrderedDict()
        self._filled = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._dropped = 0

    def opened(self, reply: str) -> None:
        """A request has come that wants its answer there."""
        router = _router(reply)
        self._ways[router] = reply
        self._ways.move_to_end(router)
        if len(self._ways) > MOST_ROUTERS:
            self._ways.popitem(last=False)

    def forget(self) -> None:
        """The connection is lost, and the right to answer with it."""
        self._ways.clear()

    def post(self, reply: str, frames: bytes) -> None:
        """Send frames that are encoded already."""
        self._queue.append((reply, frames))
        self._empty.clear()
        self._filled.set()

    def say(self, reply: str, frame: Frame) -> None:
        """Send one frame."""
        self.post(reply, encode((frame,)))

    async def run(self) -> None:
        """Deliver until cancelled."""
        queue = self._queue
        while True:
            await self._filled.wait()
            while queue:
                reply, frames = queue.popleft()
                await self._deliver(reply, frames)
            self._filled.clear()
            self._empty.set()

    async def flush(self, timeout: float = 2.0) -> None:
        """Return once all that was said before has reached the server.

        Raises:
            BusUnavailable: it cannot be known.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._empty.wait()
        except TimeoutError:
            raise BusUnavailable("answers are stuck") from None
        await self._bus.barrier(timeout)

    async def _deliver(self, reply: str, frames: bytes) -> None:
        try:
            way = self._ways.get(_router(reply))
            if way is None:
                raise BusUnavailable("what was asked before the connection was lost")
            await self._bus.publish(way, frames)
        except BusUnavailable as error:
            if not self._dropped:
                _log.warning("replies.dropped", reason=str(error))
            self._dropped += 1
            self._undelivered(frames)
        except PayloadTooLarge as error:
            await self._divide(reply, frames, error)
        except ValueError as error:
            _log.error("reply.refused", reply=reply, error=str(error))
            self._undelivered(frames)
        else:
            if self._dropped:
                _log.info("replies.resumed", dropped=self._dropped)
                self._dropped = 0

    async def _divide(self, reply: str, data: bytes, error: PayloadTooLarge) -> None:
        """Send what is too large for one message in parts; a single frame cannot be divided."""
        frames = decode_frames(data)
        if len(frames) > 1:
            middle = len(frames) // 2
            await self._deliver(reply, encode(frames[:middle]))
            await self._deliver(reply, encode(frames[middle:]))
            return
        attempt = frames[0].attempt
        self._on_undelivered((attempt,))
        failure = Fail(attempt, "payload_too_large", f"the answer is too large: {error.message}")
        await self._deliver(reply, encode((failure,)))

    def _undelivered(self, data: bytes) -> None:
        try:
            frames = decode_frames(data)
        except msgspec.DecodeError as error:
            _log.error("frames.unreadable", error=str(error))
            return
        # Who was not told that he may take an attempt has lost nothing of it.
        self._on_undelivered(
            tuple({frame.attempt for frame in frames if not isinstance(frame, Handback)})
        )


def _router(reply: str) -> str:
    return reply.rpartition(".")[0] or reply
