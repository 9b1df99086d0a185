"""Attempts that were given up before any worker named itself: cancelled when one does."""

import time
from typing import Protocol

from router.inbox import Inbox
from shared.protocol import Accepted, Frame

__all__ = ("Orphan",)

ORPHAN_LIFE = 60.0


class Desk(Protocol):
    """What an orphan needs of the dispatcher."""

    inbox: Inbox

    def cancel(self, worker: str, attempt: int) -> None:
        """Tell a worker that an attempt is not wanted."""
        ...


class Orphan:
    """One such attempt."""

    __slots__ = ("_desk", "_until", "attempt")

    def __init__(self, desk: Desk, attempt: int) -> None:
        self._desk = desk
        self.attempt = attempt
        self._until = time.monotonic() + ORPHAN_LIFE

    def receive(self, frame: Frame) -> None:
        """Cancel at the worker that has taken it."""
        if isinstance(frame, Accepted):
            self._desk.cancel(frame.worker, self.attempt)
        self._desk.inbox.forget(self.attempt, self)

    def no_responders(self) -> None:
        """Nobody got it."""
        self._desk.inbox.forget(self.attempt, self)

    def tick(self, now: float, wall: float) -> None:
        """Give up after a while."""
        if now > self._until:
            self._desk.inbox.forget(self.attempt, self)

    def broken(self) -> None:
        """Nothing to break."""

    def lost(self, worker: str, why: str) -> None:
        """Nothing to lose."""

    def unheard(self, worker: str) -> None:
        """Nothing to lose."""

    def interrupted(self, now: float) -> None:
        """Nothing to lose."""

    def cut_off(self) -> None:
        """Nothing to lose."""
