"""What came in from NATS and was dropped: counted, and told in the log now and then.

Whoever may publish to us could otherwise fill the log as fast as the network is.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import structlog

__all__ = ("TELL_SECONDS", "Rejects")

TELL_SECONDS = 10.0
"""Between two lines of the log about messages of one kind."""

_log = structlog.get_logger()


class Rejects:
    """Counts by kind, from the start of the process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.counts: Counter[str] = Counter()
        self._clock = clock
        self._told: dict[str, tuple[float, int]] = {}

    @property
    def total(self) -> int:
        """Of all kinds."""
        return self.counts.total()

    def add(self, kind: str, **words: Any) -> None:
        """Count one, and tell of it with these words unless one of its kind was told just now."""
        self.counts[kind] += 1
        now = self._clock()
        told, count = self._told.get(kind, (-TELL_SECONDS, 0))
        if now - told >= TELL_SECONDS:
            self._told[kind] = (now, self.counts[kind])
            _log.warning("message.dropped", kind=kind, count=self.counts[kind] - count, **words)
