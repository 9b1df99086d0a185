"""Streams that run beside what is measured, and keep slots busy."""

import asyncio
from collections.abc import Callable

from loadtests.http_client import Connection, Target
from loadtests.http_reply import Recorder, Reply

__all__ = ("Crowd", "settling_seconds")


def settling_seconds(streams: int) -> float:
    """That a first token may take beside so many streams, of which all may have begun just now:
    a minute, and three seconds for each.
    """
    return 60.0 + 3.0 * streams


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
            TimeoutError: they took more than `settling_seconds`.
        """
        async with asyncio.timeout(settling_seconds(len(self._connections))):
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
