"""Wires from parts to NATS that can be cut, for tests that have no event loop of their own."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager

from loadtests.wire_proxy import WireProxy

__all__ = ("Wires",)


class Wires:
    """One for each name; they are run by a thread."""

    def __init__(self, names: Sequence[str]) -> None:
        self._proxies = {name: WireProxy() for name in names}
        self._loop: asyncio.AbstractEventLoop | None = None

    def url(self, name: str, url: str) -> str:
        """The URL by way of that wire."""
        return self._proxies[name].url(url)

    def cut(self, name: str) -> None:
        """From now on nothing passes, and nobody is told."""
        self._call(name, WireProxy.cut)

    def mend(self, name: str) -> None:
        """What was on its way arrives."""
        self._call(name, WireProxy.mend)

    def _call(self, name: str, what: Callable[[WireProxy], None]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(what, self._proxies[name])

    @contextmanager
    def running(self) -> Iterator[None]:
        """Take connections until the context ends."""
        ready, over = threading.Event(), asyncio.Event()

        async def run() -> None:
            async with AsyncExitStack() as exits:
                for proxy in self._proxies.values():
                    await exits.enter_async_context(proxy.running())
                self._loop = asyncio.get_running_loop()
                ready.set()
                await over.wait()

        thread = threading.Thread(target=asyncio.run, args=(run(),))
        thread.start()
        try:
            assert ready.wait(10)
            yield
        finally:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(over.set)
            thread.join(10)
