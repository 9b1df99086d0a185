"""One small application that streams events, under each of the ASGI servers that can be compared.

It writes in three ways. `task`: a task for each stream takes events from a queue and awaits `send`,
as frameworks do. `place`: straight from a timer's callback, by the router's own `Outlet`, which
drives `send`. `router`: as the router does, by the `Outlet` past `send`, which its own protocol
class for uvicorn allows. It notes when it learns that a client has left.
"""

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal
from urllib.parse import parse_qs

import msgspec
import uvicorn
import uvloop

from router.exchange import WRITE_CHUNK
from router.server import Protocol
from router.sse import Outlet

__all__ = ("SERVERS", "Wish", "app", "main")

SERVERS = ("uvicorn", "uvicorn-h11", "granian", "hypercorn")
PHASES = 16
"""Groups in which paced streams get their events, one group after the other."""
SSE = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
]
EVENT = (
    b'data: {"id":"chatcmpl-0123456789abcdef01234567","object":"chat.completion.chunk",'
    b'"created":1790000000,"model":"bench","choices":[{"index":0,"delta":{"content":"@%.6f "},'
    b'"finish_reason":null}]}\n\n'
)
DONE = b"data: [DONE]\n\n"

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


class Wish(msgspec.Struct):
    """What a request asks for."""

    id: str = ""
    way: Literal["router", "place", "task"] = "place"
    stream: bool = True
    interval: float = 0.0
    """Seconds between events; 0: as fast as the client reads."""
    count: int = 0
    """Events, at once; 0: without end."""


class Stream:
    """An open response that gets events."""

    def __init__(self, way: str, scope: Any, send: Send) -> None:
        # A plain coroutine function is driven as it is; any other awaitable through one.
        direct = asyncio.iscoroutinefunction(send)

        async def through(message: dict[str, Any]) -> None:
            await send(message)

        chosen: Any = send if direct else through
        self._send = chosen
        self._queue: asyncio.Queue[bytes] | None = asyncio.Queue() if way == "task" else None
        past = scope[WRITE_CHUNK] if way == "router" else None
        self.outlet = Outlet(self._send, _spawn, lambda: None, past)

    def start(self) -> None:
        """Send the head."""
        if self._queue is None:
            self.outlet.start(200, SSE)

    def write(self) -> None:
        """Send one event, unless the client is behind."""
        if self._queue is not None:
            self._queue.put_nowait(EVENT % time.monotonic())
        elif not self.outlet.parked:
            self.outlet.write(EVENT % time.monotonic(), more=True)

    async def pump(self, paced: bool) -> None:
        """Be the task of this stream."""
        assert self._queue is not None
        await self._send({"type": "http.response.start", "status": 200, "headers": SSE})
        while True:
            event = await self._queue.get() if paced else EVENT % time.monotonic()
            await self._send({"type": "http.response.body", "body": event, "more_body": True})
            if not paced:
                await asyncio.sleep(0)


class Ticker:
    """Gives events to streams: paced ones in groups, the others at every turn of the loop."""

    def __init__(self) -> None:
        self._groups: list[list[Stream]] = [[] for _ in range(PHASES)]
        self._fast: list[Stream] = []
        self._next = 0
        self._at = 0.0
        self._ticking = False
        self._running = False
        self._joined = 0

    def join(self, stream: Stream, interval: float) -> Callable[[], None]:
        """Give it events until the function that is returned is called."""
        if not interval:
            group = self._fast
        else:
            group = self._groups[self._joined % PHASES]
            self._joined += 1
        group.append(stream)
        if interval and not self._ticking:
            self._ticking, self._at = True, asyncio.get_running_loop().time()
            self._tick(interval)
        elif not interval and not self._running:
            self._running = True
            self._run()
        return lambda: group.remove(stream)

    def _tick(self, interval: float) -> None:
        if not any(self._groups):
            self._ticking = False
            return
        for stream in list(self._groups[self._next]):
            stream.write()
        self._next = (self._next + 1) % PHASES
        self._at += interval / PHASES
        asyncio.get_running_loop().call_at(self._at, self._tick, interval)

    def _run(self) -> None:
        if not self._fast:
            self._running = False
            return
        for stream in list(self._fast):
            stream.write()
        asyncio.get_running_loop().call_soon(self._run)


_ticker = Ticker()
_left: dict[str, float] = {}
_tasks: set[asyncio.Task[Any]] = set()


def _spawn(job: Any) -> None:
    task = asyncio.get_running_loop().create_task(job)
    _tasks.add(task)
    task.add_done_callback(_over)


def _over(task: asyncio.Task[Any]) -> None:
    _tasks.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        # A server may refuse writes to a client that has left; that is no figure of this bench.
        print(f"a write ended with {error!r}", file=sys.stderr)


async def app(scope: Any, receive: Receive, send: Send) -> None:
    """The application."""
    if scope["type"] != "http":
        return
    if scope["method"] == "GET":
        wanted = parse_qs(scope["query_string"].decode())
        if scope["path"] == "/sockets":
            await _plain(send, msgspec.json.encode(_no_delay(int(wanted["port"][0]))))
        else:
            await _plain(send, msgspec.json.encode(_left))
        return
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    wish = msgspec.json.decode(body, type=Wish)
    if wish.count:
        await _short(send, wish.count)
    elif wish.stream:
        await _stream(wish, scope, receive, send)
    else:
        await _gone(receive)
        _left[wish.id] = time.monotonic()


async def _stream(wish: Wish, scope: Any, receive: Receive, send: Send) -> None:
    stream = Stream(wish.way, scope, send)
    pump: asyncio.Task[None] | None = None
    stream.start()
    if wish.way == "task":
        pump = asyncio.create_task(stream.pump(bool(wish.interval)))
        leave = _ticker.join(stream, wish.interval) if wish.interval else lambda: None
    else:
        leave = _ticker.join(stream, wish.interval)
    try:
        await _gone(receive)
        _left[wish.id] = time.monotonic()
    finally:
        leave()
        if pump is not None:
            pump.cancel()
            await asyncio.wait({pump})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _short(send: Send, count: int) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": SSE})
    for _ in range(count):
        event = EVENT % time.monotonic()
        await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": DONE, "more_body": False})


async def _plain(send: Send, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _no_delay(port: int) -> list[bool]:
    """Whether TCP_NODELAY is set, of every accepted connection of this process on `port`."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            copy = os.dup(int(name))
        except OSError:
            continue
        try:
            connection = socket.socket(fileno=copy)
        except OSError:
            os.close(copy)
            continue
        with connection, contextlib.suppress(OSError):
            if connection.getpeername() and connection.getsockname()[1] == port:
                value = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                found.append(bool(value))
    return found


def _uvicorn(port: int, http: type[Protocol] | Literal["h11"]) -> None:
    target: Any = app
    config = uvicorn.Config(
        target,
        host="127.0.0.1",
        port=port,
        loop="uvloop",
        http=http,
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        backlog=4096,
        timeout_graceful_shutdown=1,
    )
    uvicorn.Server(config).run()


def _granian(port: int) -> None:
    from granian import Granian
    from granian.constants import HTTPModes, Interfaces, Loops

    Granian(
        "loadtests.sse_server:app",
        port=port,
        interface=Interfaces.ASGINL,
        loop=Loops.uvloop,
        http=HTTPModes.http1,
        websockets=False,
        workers=1,
        backlog=4096,
        log_access=False,
        workers_kill_timeout=1,
    ).serve()


def _hypercorn(port: int) -> None:
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    config = Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.backlog = 4096
    config.graceful_timeout = 1
    config.include_server_header = False
    target: Any = app
    uvloop.run(serve(target, config))


def main() -> int:
    """Serve: the server's name, then the port."""
    name, port = sys.argv[1], int(sys.argv[2])
    if name == "granian":
        _granian(port)
    elif name == "hypercorn":
        _hypercorn(port)
    elif name == "uvicorn-h11":
        _uvicorn(port, "h11")
    elif name == "uvicorn":
        _uvicorn(port, Protocol)
    else:
        raise SystemExit(f"no server '{name}'; there are {', '.join(SERVERS)}")
    return 0
