"""Virtual time: what is to happen, in the order in which it happens."""

import heapq
from collections.abc import Callable
from typing import Any

__all__ = ("START", "Clock")

START = 1_800_000_000.0
"""Unix time at which simulations begin; times of day matter to nothing."""


class Clock:
    """An event queue. Events of the same moment happen in the order in which they were planned."""

    def __init__(self) -> None:
        self.now = START
        self.events = 0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._planned = 0

    def after(self, seconds: float, action: Callable[..., None], *args: Any) -> None:
        """Plan something."""
        self._planned += 1
        heapq.heappush(self._queue, (self.now + seconds, self._planned, action, args))

    def every(self, seconds: float, action: Callable[[], None], phase: float = 0.0) -> None:
        """Plan something again and again, for the first time after `phase` seconds."""

        def again() -> None:
            action()
            self.after(seconds, again)

        self.after(phase, again)

    def run(self, until: float) -> None:
        """Let happen what happens up to then."""
        queue = self._queue
        while queue and queue[0][0] <= until:
            self.now, _, action, args = heapq.heappop(queue)
            self.events += 1
            action(*args)
        self.now = until
