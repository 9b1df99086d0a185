"""How long a worker has said nothing new. Pure: the clock is passed in."""

__all__ = ("Silence",)


class Silence:
    """Of one attempt; what it counts begins with the first token."""

    __slots__ = ("_at", "_seen", "suspect")

    def __init__(self) -> None:
        self._seen = 0
        self._at = 0.0
        self.suspect = False
        """The connection was interrupted since the last token: there may be no further one."""

    def interrupted(self, now: float, seen: int) -> None:
        """Frames may be lost. What came before is no sign of life any more."""
        self._seen, self._at, self.suspect = seen, now, True

    def seconds(self, now: float, seen: int) -> float:
        """Seconds since a token came last, as far as these calls show; 0 before the first."""
        if seen != self._seen:
            self._seen, self._at, self.suspect = seen, now, False
        return now - self._at if seen else 0.0
