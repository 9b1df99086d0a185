"""The processes of a running system: kept alive while it runs, ended in order when it stops."""

import asyncio
import signal
from collections.abc import Callable

from mesh.child import Child
from mesh.errors import CommandError
from mesh.restart import Restarts

__all__ = ("Crew", "how_it_ended")


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

    A child that dies during the start is an error; later it is reported and started again.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._groups: dict[str, list[Child]] = {}
        self._stopping = asyncio.Event()
        self._settled = False

    def settle(self) -> None:
        """From now on, deaths are repaired."""
        self._settled = True

    @property
    def pids(self) -> dict[str, int]:
        """The ids of the children that run now, by name."""
        children = (child for group in self._groups.values() for child in group)
        return {child.name: child.pid for child in children if child.pid is not None}

    async def keep(self, group: str, child: Child) -> None:
        """Run a child until the crew stops.

        Raises:
            CommandError: it died, or could not be started, before the system was up.
        """
        self._groups.setdefault(group, []).append(child)
        restarts = Restarts()
        while not self._stopping.is_set():
            try:
                await child.start()
            except OSError as error:
                raise CommandError(f"cannot start {child.name}: {error}") from error
            if self._stopping.is_set():
                child.kill()
            code = await child.wait()
            if self._stopping.is_set():
                return
            ended = f"{child.name} ended ({how_it_ended(code)})"
            if words := child.last_words():
                ended = f"{ended}: {words}"
            if not self._settled:
                raise CommandError(ended)
            delay = restarts.after(child.lived)
            self._report(f"{ended}; starting it again in {delay:g} s")
            try:
                async with asyncio.timeout(delay):
                    await self._stopping.wait()
            except TimeoutError:
                continue

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
