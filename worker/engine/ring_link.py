"""A stage's connection to NATS: a thread of its own, so that messages move while a stage computes.

It logs in as a user beside the worker's own (`shared.broker_config.ring_user`), who may take the
messages of this worker's stages, send to those of others, and nothing else.
"""

import asyncio
import queue
import threading
from concurrent.futures import Future
from types import TracebackType
from typing import Self

import structlog

from shared import subjects
from shared.bus import Bus, BusMessage, BusUnavailable
from worker.engine.ring import RingBroken

__all__ = ("RingLink",)

_CONNECT_SECONDS = 10.0
_END_SECONDS = 5.0

log = structlog.get_logger()


class RingLink:
    """Sends to stages and takes what is sent to this one; a context manager.

    Args:
        nats: URL of the server, with the ring user's name and password.
        identity: that user.
        worker: whose stage this is.
        group: the ring.
    """

    def __init__(self, nats: str, *, identity: str, worker: str, group: str) -> None:
        self._nats = nats
        self._identity = identity
        self._subject = subjects.ring(worker, group)
        self._group = group
        self._came: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._bus: Bus | None = None
        self._end: asyncio.Event | None = None
        self._ready: Future[None] = Future()
        self._lost = ""
        self._gone = ""
        self._thread = threading.Thread(target=self._run, name="ring", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._ready.result(_CONNECT_SECONDS)
        except TimeoutError:
            raise RingBroken(f"NATS did not answer within {_CONNECT_SECONDS:g} s") from None
        except BusUnavailable as error:
            raise RingBroken(f"NATS cannot be reached: {error}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._loop is not None and self._end is not None:
            self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(_END_SECONDS)

    @property
    def most_bytes(self) -> int:
        """Of a message."""
        return self._bus.max_payload if self._bus is not None else 0

    def to(self, worker: str) -> "RingSender":
        """The way to another worker's stage."""
        return RingSender(self, subjects.ring(worker, self._group))

    def publish(self, subject: str, data: bytes, *, heard: bool) -> None:
        """Send a message.

        Args:
            subject: of a stage.
            data: the message.
            heard: if nobody listens there, the ring is at its end, which `receive` tells.

        Raises:
            RingBroken: the connection is lost; what was under way is lost with it.
        """
        if self._lost or self._loop is None or self._bus is None:
            raise RingBroken(self._lost or "not connected")
        # NATS answers on a reply subject, and only if nobody listens on the subject.
        reply = f"{self._bus.inbox}.unheard.{subject.split('.')[-2]}" if heard else ""
        self._loop.call_soon_threadsafe(self._start, subject, data, reply)

    def receive(self, timeout: float) -> bytes | None:
        """What was sent to this stage; None: nothing came for so many seconds.

        Raises:
            RingBroken: the connection is lost, or a stage's process is gone.
        """
        try:
            data = self._came.get(timeout=timeout)
        except queue.Empty:
            return None
        if data is None:
            raise RingBroken(self._lost or self._gone)
        return data or None

    def break_off(self, why: str) -> None:
        """Have the ring be at its end for this stage; from any thread."""
        self._lose(why)

    def wake(self) -> None:
        """Have `receive` return with nothing; from any thread."""
        self._came.put(b"")

    def _start(self, subject: str, data: bytes, reply: str) -> None:
        bus, loop = self._bus, self._loop
        assert bus is not None  # noqa: S101  this runs in its loop
        assert loop is not None  # noqa: S101
        # Messages leave in the order in which they were given: each is written before it waits.
        task = loop.create_task(bus.publish(subject, data, reply=reply))
        task.add_done_callback(self._sent)

    def _sent(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._lose(f"a message could not be sent: {error}")

    def _lose(self, why: str) -> None:
        """What a lost connection had under way is nowhere: the ring is at its end."""
        if not self._lost:
            self._lost = why
            self._came.put(None)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:  # the thread's last words, told where they are heard
            self._lose(str(error))
            if not self._ready.done():
                self._ready.set_exception(error)

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()

        def state(connected: bool) -> None:
            if not connected:
                self._lose("the connection to NATS is lost")

        async with Bus.connect(
            self._nats, identity=self._identity, kind="worker", on_state=state
        ) as bus:
            self._bus = bus
            await bus.subscribe(self._subject, self._take)
            await bus.subscribe(f"{bus.inbox}.unheard.*", self._unheard)
            await bus.barrier()
            self._ready.set_result(None)
            await self._end.wait()

    def _take(self, message: BusMessage) -> None:
        self._came.put(message.data)

    def _unheard(self, message: BusMessage) -> None:
        if message.status:
            self._gone = f"the stage on {message.subject.rpartition('.')[2]} is gone"
            self._came.put(None)


class RingSender:
    """The way to one stage."""

    __slots__ = ("_link", "_subject")

    def __init__(self, link: RingLink, subject: str) -> None:
        self._link = link
        self._subject = subject

    def send(self, data: bytes, *, heard: bool = False) -> None:
        """See `RingLink.publish`."""
        self._link.publish(self._subject, data, heard=heard)

    def receive(self, timeout: float) -> bytes | None:
        """See `RingLink.receive`."""
        return self._link.receive(timeout)
