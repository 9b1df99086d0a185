"""How far workers are: round trips through NATS, smoothed, and judged against a cap.

Pure: round trips are passed in. A worker is `near`, `far` or, until a ping has come back,
`unknown`.

The mean follows up as well as down: `mean += WEIGHT * (sample - mean)`. A sample counts at most as
the mean plus the cap, so that one outlier, however long, raises the mean by 24 ms and puts nobody
out who was below 56 ms. A worker that moves from 1 to 120 ms is far after 4 pings, one that comes
back from 120 to 1 ms is near after 2; with a ping a second that is the time to follow.
"""

from typing import Literal

import msgspec

__all__ = ("CAP", "Distances", "Reach")

CAP = 0.080
"""Seconds of round trip beyond which a worker is far: what a token may be late without it being
felt in a stream."""
BACK = 0.875
"""Share of the cap below which a far worker is near again: 70 ms of 80. Between them nothing
changes, or a worker at the cap would change sides with every ping."""
WEIGHT = 0.3
MISSES = 5
"""Pings in a row without an answer after which nothing is known of a worker any more."""

Reach = Literal["near", "far", "unknown"]


class _Seen(msgspec.Struct):
    mean: float
    far: bool
    missed: int = 0


class Distances:
    """The round trip of each worker, in seconds."""

    def __init__(self, cap: float = CAP) -> None:
        if cap <= 0:
            raise ValueError(f"the cap {cap} must be above 0 seconds")
        self.cap = cap
        self.version = 0
        """Changes whenever a worker's reach does."""
        self._seen: dict[str, _Seen] = {}

    def observe(self, worker: str, seconds: float) -> None:
        """A ping has come back after so long."""
        seen = self._seen.get(worker)
        if seen is None:
            self._seen[worker] = _Seen(seconds, seconds > self.cap)
            self.version += 1
            return
        seen.missed = 0
        self._add(seen, seconds)

    def miss(self, worker: str, seconds: float) -> None:
        """A ping has not come back within so long: its round trip is at least that."""
        seen = self._seen.get(worker)
        if seen is None:
            return
        seen.missed += 1
        if seen.missed >= MISSES:
            self.forget(worker)
        else:
            self._add(seen, max(seconds, seen.mean))

    def forget(self, worker: str) -> None:
        """Know nothing of a worker any more."""
        if self._seen.pop(worker, None) is not None:
            self.version += 1

    def rtt(self, worker: str) -> float | None:
        """The smoothed round trip; None: unknown."""
        seen = self._seen.get(worker)
        return None if seen is None else seen.mean

    def reach(self, worker: str) -> Reach:
        """On which side of the cap a worker is."""
        seen = self._seen.get(worker)
        if seen is None:
            return "unknown"
        return "far" if seen.far else "near"

    def _add(self, seen: _Seen, seconds: float) -> None:
        seen.mean += WEIGHT * (min(seconds, seen.mean + self.cap) - seen.mean)
        far = seen.mean > (self.cap * BACK if seen.far else self.cap)
        if far != seen.far:
            seen.far = far
            self.version += 1
