"""How much may be tried anew, so that an outage is not multiplied. Pure: the clock is passed in.

What an answer costs that has begun is paid already, so that going on with it is not counted here;
`Settings.resumes` bounds that. Nor is asking the next after a worker that is full: that costs a
message.
"""

__all__ = ("FLOOR", "LONGEST_PAUSE", "SAVED", "RetryBudget", "pause")

FLOOR = 10.0
"""Retries a second that are always allowed: with few requests a share of them is nothing."""
SAVED = 300.0
"""Retries that are saved up at most: one worker that is lost may have that many with it (slots and
queue of a few models), and their load is not added to, for nobody carries it any more."""
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 1.0


class RetryBudget:
    """A token bucket, into which each request puts `share`, and time `FLOOR` a second."""

    def __init__(self, share: float, now: float) -> None:
        """Begin with `SAVED` retries.

        Args:
            share: retries a request brings, for example 0.2.
            now: monotonic seconds.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"the share is {share}; it must be from 0 to 1")
        self._share = share
        self._left = SAVED
        self._at = now
        self.made = 0
        """Retries allowed so far."""
        self.refused = 0

    def requested(self) -> None:
        """A request has come."""
        self._left = min(SAVED, self._left + self._share)

    def take(self, now: float) -> bool:
        """Whether one more retry may be made."""
        if now > self._at:
            self._left = min(SAVED, self._left + (now - self._at) * FLOOR)
            self._at = now
        if self._left < 1:
            self.refused += 1
            return False
        self._left -= 1
        self.made += 1
        return True


def pause(losses: int, draw: float) -> float:
    """Seconds to wait before the next try, so that those who lost together do not come together.

    Args:
        losses: tries that were lost, from 1; each doubles the longest pause, to `LONGEST_PAUSE`.
        draw: a random number from 0 to 1, its share of that.
    """
    return draw * min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(losses - 1, 16))
