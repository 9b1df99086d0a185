"""The processes of a running system: kept alive while it runs, ended in order when it stops."""

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from mesh.child import Child
from mesh.errors import CommandError
from mesh.restart import Restarts
from shared.broker import BrokerFailed, NatsServer

__all__ = ("Crew", "how_it_ended")

T = TypeVar("T")


def how_it_ended(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


class Crew:
    """Groups of children.

    A child that dies during the start fails the whole; later it is reported and started again.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._groups: dict[str, list[Child]] = {}
        self._stopping = asyncio.Event()
        self._released = asyncio.Event()
        self._settled = False
        self._failed = asyncio.Event()
        self._failure = ""

    def settle(self) -> None:
        """From now on, deaths are repaired."""
        self._settled = True

    @property
    def pids(self) -> dict[str, int]:
        """The ids of the children that run now, by name."""
        children = (child for group in self._groups.values() for child in group)
        return {child.name: child.pid for child in children if child.pid is not None}

    async def unless_failed(self, work: Coroutine[Any, Any, T]) -> T:
        """Do some work of the start, and give up when a child dies meanwhile.

        Raises:
            CommandError: a child died, or could not be started, before the system was up.
        """
        task = asyncio.create_task(work)
        failed = asyncio.create_task(self._failed.wait())
        try:
            await asyncio.wait({task, failed}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise CommandError(self._failure)
            return task.result()
        finally:
            task.cancel()
            failed.cancel()
            await asyncio.gather(task, failed, return_exceptions=True)

    async def keep(self, group: str, child: Child) -> None:
        """Run a child until the crew stops, or until it dies during the start."""
        self._groups.setdefault(group, []).append(child)
        restarts = Restarts()
        while not self._stopping.is_set():
            try:
                await child.start()
            except OSError as error:
                self._fail(f"cannot start {child.name}: {error}")
                return
            if self._stopping.is_set():
                child.kill()
            code = await child.wait()
            if self._stopping.is_set():
                return
            ended = f"{child.name} ended ({how_it_ended(code)})"
            if words := child.last_words():
                ended = f"{ended}: {words}"
            if not self._settled:
                self._fail(ended)
                return
            await self._pause(ended, restarts.after(child.lived))

    async def keep_broker(self, server: NatsServer, up: asyncio.Event) -> None:
        """Run the broker until `release_broker`; after a death it comes back on the same port."""
        restarts = Restarts()
        while not self._released.is_set():
            began = time.monotonic()
            try:
                async with server:
                    up.set()
                    ended = await self._broker_end(server)
            except BrokerFailed as error:
                ended = str(error)
            if self._released.is_set():
                return
            if not self._settled:
                self._fail(ended)
                return
            await self._pause(ended, restarts.after(time.monotonic() - began))

    def release_broker(self) -> None:
        """Let the broker end; only when all that need it have ended."""
        self._stopping.set()
        self._released.set()

    async def stop(self, group: str, grace: float) -> None:
        """End a group's children, all at once, and the keeping of every group."""
        self._stopping.set()
        children = self._groups.get(group, [])
        await asyncio.gather(*(child.stop(grace) for child in children))

    def kill(self) -> None:
        """End every child at once."""
        self._stopping.set()
        for children in self._groups.values():
            for child in children:
                child.kill()

    def _fail(self, reason: str) -> None:
        if not self._failed.is_set():
            self._failure = reason
            self._failed.set()

    async def _broker_end(self, server: NatsServer) -> str:
        async with asyncio.TaskGroup() as group:
            died = group.create_task(server.wait())
            released = group.create_task(self._released.wait())
            await asyncio.wait({died, released}, return_when=asyncio.FIRST_COMPLETED)
            released.cancel()
            if not died.done():
                died.cancel()
                return ""
        return died.result()

    async def _pause(self, ended: str, delay: float) -> None:
        self._report(f"{ended}; starting it again in {delay:g} s")
        try:
            async with asyncio.timeout(delay):
                await self._stopping.wait()
        except TimeoutError:
            return
