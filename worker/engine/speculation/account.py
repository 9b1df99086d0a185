"""Whether speculation earned more time than it spent, and a pause where it did not. Pure.

Estimates can be wrong; this only counts. It is what keeps speculation from costing anything for
long: a loss closes it for a while, and for twice as long each time it is found again.
"""

from typing import NamedTuple

__all__ = ("Account", "Outcome")

_MEMORY = 0.97
"""Weight that a step keeps when the next comes: about 30 steps count."""
_LEAST_STEPS = 12.0
"""Steps before anything is judged."""
_FIRST_PAUSE = 48
_LONGEST_PAUSE = 3072


class Outcome(NamedTuple):
    """Of one step that speculated."""

    earned: float
    """Seconds that its tokens would have taken without."""
    spent: float
    """Seconds it took, drafting included."""


class Account:
    """Of one kind of speculation, closed where it gains less than `least`."""

    __slots__ = ("_earned", "_least", "_left", "_pause", "_spent", "_steps")

    def __init__(self, least: float = 1.0) -> None:
        self._least = least
        self._earned = self._spent = self._steps = 0.0
        self._pause = _FIRST_PAUSE
        self._left = 0

    @property
    def gain(self) -> float:
        """Earned over spent of late; 1 if there was nothing of late."""
        return self._earned / self._spent if self._spent else 1.0

    def is_open(self) -> bool:
        """Ask before each step that could speculate: False while it is paused."""
        if self._left:
            self._left -= 1
            return False
        return True

    def book(self, outcome: Outcome) -> None:
        """Count a step that speculated."""
        self._earned = self._earned * _MEMORY + outcome.earned
        self._spent = self._spent * _MEMORY + outcome.spent
        self._steps = self._steps * _MEMORY + 1.0
        if self._steps < _LEAST_STEPS:
            return
        if self.gain < self._least:
            self._left = self._pause
            self._pause = min(_LONGEST_PAUSE, self._pause * 2)
            self._earned = self._spent = self._steps = 0.0
        elif self.gain > self._least + 0.05:
            self._pause = _FIRST_PAUSE
