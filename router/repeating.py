"""Answering a request with an `Idempotency-Key` once, to all who send it.

The answer is made by an `Exchange` that runs as a task of its own and writes into a recording. Who
sent the request reads from that, from its beginning, and so does whoever sends it again: while it
is made, and for a while after. If nobody reads any more, it goes on for `LINGER`, for the client
whose connection was cut and that is about to come again; then its worker is freed.

It is kept in this router alone.
"""

import asyncio
import time
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

from router.dispatch import Dispatcher
from router.exchange import ABORT, RAW_SEND, REQUEST_ID, STARTED, Exchange
from router.kept_answers import KeptAnswers, Key, KeyReused
from router.metrics import Metrics
from router.settings import Settings
from shared.errors import MeshError

__all__ = ("LINGER", "Repeating")

LINGER = 10.0
"""Seconds for which an answer is made although nobody reads it."""

_REPLAYED = (b"idempotent-replayed", b"true")
_ID = b"x-request-id"

Message = dict[str, Any]


class AnswerTooLarge(MeshError):
    """An answer that has to be kept whole takes too much room."""

    code = "answer_too_large"


class Recording:
    """One answer as it is written, and who reads it."""

    __slots__ = ("_linger", "_readers", "body", "head", "over", "whole")

    def __init__(self) -> None:
        self.head: Message | None = None
        self.body = bytearray()
        self.whole = False
        self.over = asyncio.Event()
        """It is whole, or nobody wants it any more."""
        self._readers: set[asyncio.Event] = set()
        self._linger: asyncio.TimerHandle | None = None

    def enter(self) -> asyncio.Event:
        """Begin to read; the event is set when there is more."""
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        reader = asyncio.Event()
        self._readers.add(reader)
        return reader

    def leave(self, reader: asyncio.Event, abandon: Callable[[], None], linger: float) -> None:
        """Read no more; if it was the last, `abandon` is called unless somebody comes in time."""
        self._readers.discard(reader)
        if not self._readers and not self.over.is_set():
            loop = asyncio.get_running_loop()
            self._linger = loop.call_later(linger, abandon)

    def add(self, message: Message) -> None:
        """Take what the exchange writes."""
        if message["type"] == "http.response.start":
            self.head = message
            return
        self.body += message["body"]
        if not message["more_body"]:
            self.whole = True
            self.over.set()
        self.tell()

    def tell(self) -> None:
        """There is something new for all who read."""
        for reader in self._readers:
            reader.set()


class Repeating:
    """All recordings of this router."""

    def __init__(self, dispatcher: Dispatcher, metrics: Metrics, settings: Settings) -> None:
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._timeout = settings.reader_timeout
        self._kept: KeptAnswers[Recording] = KeptAnswers(
            limit=settings.idempotency_memory, seconds=settings.idempotency_seconds
        )

    async def answer(
        self,
        scope: Any,
        receive: Any,
        send: Any,
        *,
        key: Key,
        body: bytes,
        begin: Callable[[], Exchange],
    ) -> None:
        """Answer one request.

        Args:
            scope: as the server gave it, as are `receive` and `send`.
            receive: tells of the client's leaving.
            send: takes what goes to the client.
            key: whose request it is, and its key.
            body: the request's.
            begin: makes the exchange that answers it.

        Raises:
            KeyReused: the key stands for another request.
            MeshError: as `begin`.
        """
        digest = blake2b(scope["path"].encode() + b"\0" + body, digest_size=32).digest()
        try:
            recording = self._kept.find(key, digest, time.monotonic())
        except KeyReused:
            self._metrics.repeats["reused"] += 1
            raise
        again = recording is not None
        if recording is None:
            exchange = begin()
            recording = Recording()
            self._kept.begin(key, digest, recording)
            origin = {REQUEST_ID: scope[REQUEST_ID], STARTED: scope.get(STARTED, time.monotonic())}
            self._dispatcher.spawn(self._make(exchange, origin, key, recording))
        else:
            self._metrics.repeats["repeated" if recording.whole else "joined"] += 1
        reader = recording.enter()
        try:
            await self._serve(scope, receive, send, recording, reader, again=again)
        finally:
            linger = 0.0 if self._dispatcher.draining else LINGER
            recording.leave(reader, lambda: self._abandon(key, recording), linger)

    async def _make(
        self, exchange: Exchange, origin: dict[str, Any], key: Key, recording: Recording
    ) -> None:
        async def wanted() -> Message:
            # Not for ever: what is made is over when the request's deadline passes.
            await recording.over.wait()
            return {"type": "http.disconnect"}

        async def record(message: Message) -> None:
            if recording.over.is_set():
                return
            last = message["type"] == "http.response.body" and not message["more_body"]
            room = self._kept.grow(key, len(message.get("body", b"")))
            if not room and not last and not exchange.failed:
                exchange.fail(
                    AnswerTooLarge(
                        "There is no room to keep the answer for its Idempotency-Key (one may "
                        f"have {self._kept.largest} bytes); ask without one."
                    )
                )
                return
            recording.add(message)
            if last and room and not exchange.failed:
                self._kept.finish(key, time.monotonic())
            elif last:
                self._kept.drop(key)

        try:
            await exchange(origin, wanted, record)
        finally:
            if not recording.over.is_set():
                self._abandon(key, recording)

    def _abandon(self, key: Key, recording: Recording) -> None:
        """It will not become whole."""
        if not recording.over.is_set():
            self._kept.drop(key)
            recording.over.set()
            recording.tell()

    async def _serve(
        self,
        scope: Any,
        receive: Any,
        send: Any,
        recording: Recording,
        reader: asyncio.Event,
        *,
        again: bool,
    ) -> None:
        """Send the recording to one client, until it is whole or the client leaves."""
        leaving = asyncio.create_task(_left(receive), name="reader leaves")
        sending = asyncio.create_task(
            self._send(scope, scope.get(RAW_SEND, send), recording, reader, again=again),
            name="reader",
        )
        try:
            await asyncio.wait({leaving, sending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            sending.cancel()
            await asyncio.wait({leaving, sending})
        if not sending.cancelled():
            sending.result()

    async def _send(
        self, scope: Any, send: Any, recording: Recording, reader: asyncio.Event, *, again: bool
    ) -> None:
        sent = 0
        begun = False
        while True:
            reader.clear()
            body, whole = bytes(recording.body[sent:]), recording.whole
            sent += len(body)
            if body:
                try:
                    async with asyncio.timeout(self._timeout):
                        if not begun and recording.head is not None:
                            begun = True
                            await send(_headed(recording.head, scope[REQUEST_ID], again=again))
                        await send(
                            {"type": "http.response.body", "body": body, "more_body": not whole}
                        )
                except TimeoutError:
                    _cut(scope)
                    return
            if whole:
                return
            if recording.over.is_set():
                # The router ends, or its exchange has crashed.
                if not begun:
                    raise MeshError("The router failed on this request.")
                _cut(scope)
                return
            # Not for ever, for the same reason as in `wanted`.
            await reader.wait()


async def _left(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _headed(head: Message, identity: str, *, again: bool) -> Message:
    headers = [(name, value) for name, value in head["headers"] if name != _ID]
    headers.append((_ID, identity.encode()))
    if again:
        headers.append(_REPLAYED)
    return {**head, "headers": headers}


def _cut(scope: Any) -> None:
    if (abort := scope.get(ABORT)) is not None:
        abort()
