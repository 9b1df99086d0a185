"""Tokens per second from a counter that starts anew with each engine. Pure: the clock comes in."""

__all__ = ("Rate",)


class Rate:
    """A mean of the last halves of seconds in which it was asked."""

    def __init__(self) -> None:
        self._count = 0
        self._at = 0.0
        self._value = 0.0

    def of(self, count: int, now: float) -> float:
        """What the counter's growth until `now` (monotonic seconds) comes to."""
        passed = now - self._at
        if count < self._count or not self._at:
            self._count, self._at, self._value = count, now, 0.0
        elif passed >= 0.4:
            self._value = (self._value + (count - self._count) / passed) / 2
            self._count, self._at = count, now
        return self._value
