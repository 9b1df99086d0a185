"""A TCP proxy that holds every byte back for a while: a long way to a server that is near."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from urllib.parse import urlsplit, urlunsplit

PIECE = 65_536


class DelayingProxy:
    """Passes connections on to a server on this machine; a round trip takes `rtt` seconds more."""

    def __init__(self, port: int, rtt: float) -> None:
        self.rtt = rtt
        """May be changed at any time; what is on its way arrives as it would have."""
        self.port = 0
        self._server_port = port
        self._tasks: set[asyncio.Task[None]] = set()

    def url(self, url: str) -> str:
        """The URL of the server, by way of this proxy."""
        parts = urlsplit(url)
        login = parts.netloc.rpartition("@")[0]
        return urlunsplit(parts._replace(netloc=f"{login}@127.0.0.1:{self.port}"))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["DelayingProxy"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        server: asyncio.StreamWriter | None = None
        try:
            answers, server = await asyncio.open_connection("127.0.0.1", self._server_port)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._carry(reader, server))
                both.create_task(self._carry(answers, writer))
        except* (OSError, asyncio.CancelledError):
            pass
        finally:
            for side in (writer, server):
                if side is not None:
                    side.close()
            self._tasks.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read and write beside each other: the way is long, not narrow."""
        loop = asyncio.get_running_loop()
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                due, data = await line.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                writer.write(data)
                await writer.drain()

        delivering = asyncio.create_task(deliver())
        try:
            while data := await reader.read(PIECE):
                line.put_nowait((loop.time() + self.rtt / 2, data))
        finally:
            delivering.cancel()
            await asyncio.gather(delivering, return_exceptions=True)
            writer.close()
