"""A TCP proxy that is a wire to a server on this machine: it can be long, or cut.

Cut means that nothing passes, in either direction, with the connections open: as when a cable is
pulled, nobody is told.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from urllib.parse import urlsplit, urlunsplit

__all__ = ("WireProxy",)

PIECE = 65_536


class WireProxy:
    """Passes connections on to the server that `url` was last asked for."""

    def __init__(self, rtt: float = 0.0) -> None:
        self.rtt = rtt
        """Seconds that a round trip takes more; may be changed at any time."""
        self.port = 0
        self._server_port = 0
        self._whole = asyncio.Event()
        self._whole.set()
        self._tasks: set[asyncio.Task[None]] = set()

    def url(self, url: str) -> str:
        """The URL of the server, by way of this proxy."""
        parts = urlsplit(url)
        assert parts.port is not None
        self._server_port = parts.port
        login = parts.netloc.rpartition("@")[0]
        return urlunsplit(parts._replace(netloc=f"{login}@127.0.0.1:{self.port}"))

    def cut(self) -> None:
        """From now on nothing arrives, and nothing is lost yet."""
        self._whole.clear()

    def mend(self) -> None:
        """What was on its way arrives."""
        self._whole.set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["WireProxy"]:
        """Take connections until the context ends."""
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
            await self._whole.wait()
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
                await self._whole.wait()
                if not data:
                    return
                writer.write(data)
                await writer.drain()

        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(deliver())
                while data := await reader.read(PIECE):
                    line.put_nowait((loop.time() + self.rtt / 2, data))
                # What is on its way arrives before the end does.
                line.put_nowait((loop.time() + self.rtt / 2, b""))
        finally:
            writer.close()
