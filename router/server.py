"""Running the router: the bus, the socket, uvicorn, and an orderly end.

Order of the end: no new connections, open answers finish within the grace, then the bus closes.
A second signal ends the waiting.
"""

import asyncio
import contextlib
import gc
import signal
import socket
from collections.abc import AsyncIterator, Generator
from typing import Any

import structlog
import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from router.app import create_app
from router.dispatch import Dispatcher
from router.exchange import ABORT, WRITE_CHUNK
from router.settings import Settings
from shared.bus import Bus
from shared.command_line import CommandFailed

__all__ = ("Serving", "StartFailed", "run", "serve", "serving")

log = structlog.get_logger(__name__)

BACKLOG = 4096
GC_THRESHOLDS = (20_000, 20, 50)
KEEP_ALIVE = 75
"""Seconds; longer than load balancers keep theirs, so that they never meet a connection closing."""


class StartFailed(CommandFailed):
    """The router cannot start; the message is one line for a person."""


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol, which also lets an answer cut its connection, and write past `send`.

    Leans on three names of uvicorn's own: `scope`, `transport` and `flow`.
    """

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        scope: Any = self.scope
        scope[ABORT] = self.transport.abort
        scope[WRITE_CHUNK] = self.write_chunk

    def connection_lost(self, exc: Exception | None) -> None:
        """End with the connection, leaving no rings for the collector.

        Those of a stream are old when it ends, and the collector hardly ever looks at old objects.
        """
        super().connection_lost(exc)
        scope: Any = self.scope
        if scope is not None:
            scope.pop(ABORT, None)
            scope.pop(WRITE_CHUNK, None)

    def write_chunk(self, body: bytes) -> bool:
        """Write a piece of a chunked response that has begun; it must not be empty.

        Returns False, having written nothing, if the client is slow or gone: `send` knows what to
        do then. Passing a token through `send` would take a fifth of the router's time for it.
        """
        if self.flow.write_paused or self.transport.is_closing():
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return True


class Server(uvicorn.Server):
    """uvicorn's server with our signals: they end the serving, not the process."""

    def __init__(
        self, config: uvicorn.Config, dispatcher: Dispatcher, sockets: list[socket.socket]
    ) -> None:
        super().__init__(config)
        self.sockets = sockets
        self._dispatcher = dispatcher

    def end(self) -> None:
        """Begin the orderly end; at the second call, end at once."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        self._dispatcher.draining = True

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Listen for the signals while serving."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self.end)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)


def run(settings: Settings) -> int:
    """Serve until told to stop; returns the exit code."""
    # What is loaded by now lives as long as the process, and a request's objects die by count:
    # without this, the collector walks them all again and again.
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(settings))


async def serve(settings: Settings) -> int:
    """Serve on a running loop until told to stop; returns the exit code.

    Raises:
        BusUnavailable: NATS cannot be reached.
        StartFailed: the address cannot be had.
    """
    async with serving(settings) as router:
        return await router.wait()


class Serving:
    """A router that serves."""

    def __init__(self, url: str, dispatcher: Dispatcher, server: Server) -> None:
        self.url = url
        self.dispatcher = dispatcher
        self._server = server
        self._task = asyncio.create_task(self._serve())

    def end(self) -> None:
        """Begin the orderly end; at the second call, end at once."""
        self._server.end()

    def idle(self) -> bool:
        """Whether no request is being answered."""
        return not self._server.server_state.tasks

    async def wait(self) -> int:
        """Wait for the end; returns the exit code."""
        closed = asyncio.create_task(self.dispatcher.bus.closed.wait())
        try:
            await asyncio.wait({closed, self._task}, return_when=asyncio.FIRST_COMPLETED)
            if closed.done():
                log.error("router.bus_closed")
                self.end()
            await self._task
        finally:
            closed.cancel()
        return 1 if self.dispatcher.bus.closed.is_set() else 0

    async def _serve(self) -> None:
        await self._server.serve(sockets=self._server.sockets)
        # Answers that outlived the grace were cancelled: let them tell their workers.
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Serving]:
    """Bring a router up, and down at the end; raises as `serve`."""
    dispatchers: list[Dispatcher] = []

    def on_state(connected: bool) -> None:
        for dispatcher in dispatchers:
            dispatcher.on_connection(connected)

    with _listen(settings.host, settings.port) as listener:
        async with Bus.connect(
            settings.nats, identity=settings.name, kind="router", on_state=on_state
        ) as bus:
            dispatcher = Dispatcher(bus, settings)
            dispatchers.append(dispatcher)
            async with dispatcher.running():
                url = _url(listener)
                log.info("router.serving", url=f"{url}/v1", name=settings.name)
                router = Serving(url, dispatcher, _server(dispatcher, settings, listener))
                try:
                    yield router
                finally:
                    router.end()
                    await router.wait()


def _server(dispatcher: Dispatcher, settings: Settings, listener: socket.socket) -> Server:
    app: Any = create_app(dispatcher, settings)
    return Server(
        uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=max(1, round(settings.grace)),
        ),
        dispatcher,
        [listener],
    )


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host,
            port,
            type=socket.SOCK_STREAM,
            proto=socket.IPPROTO_TCP,
            flags=socket.AI_PASSIVE,
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError, OverflowError) as error:
        raise StartFailed(f"cannot listen on {host}: {error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit it; without, Nagle's algorithm holds tokens back for 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise StartFailed(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener
