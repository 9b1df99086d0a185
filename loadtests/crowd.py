"""Streams that run beside what is measured, and keep slots busy."""

import asyncio
from collections.abc import Callable

from loadtests.http_client import Connection, Target
from loadtests.http_reply import Recorder, Reply

__all__ = ("Crowd",)


class Crowd:
    """Streams that keep slots busy: each begins anew when it has ended."""

    def __init__(self, target: Target, request: Callable[[], bytes]) -> None:
        self.recorder = Recorder()
        self.errors: list[str] = []
        self._target = target
        self._request = request
        self._connections: list[Connection] = []

    def grow(self, size: int) -> None:
        """Have so many streams."""
        while len(self._connections) < size:
            connection = Connection(self._target, self.recorder, self._again)
            self._connections.append(connection)
            connection.send(self._request())
        while len(self._connections) > size:
            self._connections.pop().abort()

    async def settled(self) -> None:
        """Wait until every stream has its first token.

        Raises:
            RuntimeError: one failed.
            TimeoutError: they took more than a minute, and three seconds each.
        """
        async with asyncio.timeout(60 + 3 * len(self._connections)):
            for connection in self._connections:
                while connection.reader is None or not connection.reader.reply.first:
                    if self.errors:
                        raise RuntimeError(f"a stream failed: {self.errors[0]}")
                    await asyncio.sleep(0.01)

    def _again(self, connection: Connection, reply: Reply) -> None:
        if reply.error:
            self.errors.append(reply.error)
        elif connection in self._connections:
            asyncio.get_running_loop().call_soon(connection.send, self._request())
