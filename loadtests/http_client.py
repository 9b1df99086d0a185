"""An HTTP/1.1 client for load: one connection, one request at a time, no task per request."""

import asyncio
import time
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

import msgspec

from loadtests.http_reply import Recorder, Reply, ReplyReader, request_bytes

__all__ = ("Client", "Connection", "Target", "with_header")

now = time.monotonic


def with_header(request: bytes, name: str, value: str) -> bytes:
    """The encoded request with one header more."""
    head, rest = request.split(b"\r\n", 1)
    return b"%b\r\n%b: %b\r\n%b" % (head, name.encode(), value.encode(), rest)


class Target(msgspec.Struct, frozen=True):
    """Where load goes."""

    url: str
    key: str = ""

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or "127.0.0.1"

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 80

    def post(self, path: str, body: dict[str, object]) -> bytes:
        """Encode one request; `path` begins with `/v1`."""
        return request_bytes(urlsplit(self.url).netloc, path, body, key=self.key)


class Connection(asyncio.Protocol):
    """One connection, one request at a time; `on_reply(self, reply)` is called at its end."""

    def __init__(
        self,
        target: Target,
        recorder: Recorder,
        on_reply: "Callable[[Connection, Reply], None]",
    ) -> None:
        self.reader: ReplyReader | None = None
        self.reconnects = 0
        self._target = target
        self._recorder = recorder
        self._on_reply = on_reply
        self._transport: asyncio.Transport | None = None
        self._served = 0
        self._request = b""
        self._opening: asyncio.Task[None] | None = None

    def send(self, request: bytes) -> None:
        """Send a request, over a new connection where the old one is gone."""
        self.reader = ReplyReader(self._recorder, now())
        self._request = request
        self._write()

    def abort(self) -> None:
        """Drop the connection and whatever is under way on it, without calling back."""
        self.reader = None
        if self._opening is not None:
            self._opening.cancel()
        if self._transport is not None:
            self._transport.abort()

    def _write(self) -> None:
        if self._transport is None or self._transport.is_closing():
            self._opening = asyncio.get_running_loop().create_task(self._open())
        else:
            self._transport.write(self._request)

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(10):
                await loop.create_connection(lambda: self, self._target.host, self._target.port)
        except (OSError, TimeoutError) as error:
            if self.reader is not None:
                self.reader.fail(f"connect: {error!r}", now())
                self._end()
            return
        if self.reader is not None and self._transport is not None:
            self._transport.write(self._request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the interface without the ancestry.
        self._transport, self._served = cast(asyncio.Transport, transport), 0

    def data_received(self, data: bytes) -> None:
        reader = self.reader
        if reader is not None and reader.feed(data, now()):
            self._served += 1
            if not reader.keep_alive and self._transport is not None:
                self._transport.close()
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        reader = self.reader
        if reader is None:
            return
        if reader.untouched and self._served:
            # A server may close a kept connection just as the next request leaves it.
            self.reconnects += 1
            self._write()
            return
        reader.lost(now())
        self._end()

    def _end(self) -> None:
        assert self.reader is not None
        reply, self.reader = self.reader.reply, None
        self._on_reply(self, reply)


class Client:
    """One connection to be used request by request."""

    def __init__(self, target: Target) -> None:
        self.recorder = Recorder()
        self._connection = Connection(target, self.recorder, self._done)
        self._waiter: asyncio.Future[Reply] | None = None

    async def send(self, request: bytes, timeout: float = 60.0) -> Reply:
        """Send and await the whole reply; `reply.error` tells of failure.

        Raises:
            TimeoutError: it took longer than `timeout`.
        """
        reply = self.begin(request)
        async with asyncio.timeout(timeout):
            return await reply

    def begin(self, request: bytes) -> asyncio.Future[Reply]:
        """Send without waiting; the future holds the reply."""
        self._waiter = asyncio.get_running_loop().create_future()
        self._connection.send(request)
        return self._waiter

    @property
    def tokens(self) -> int:
        """Tokens seen of the reply under way; 0 when none is."""
        reader = self._connection.reader
        return reader.reply.tokens if reader else 0

    def abort(self) -> None:
        """Leave as a client does whose process died."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.cancel()
        self._connection.abort()

    def _done(self, connection: Connection, reply: Reply) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(reply)
