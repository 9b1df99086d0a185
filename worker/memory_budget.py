"""Sharing one worker's memory between its models, in the order in which they are ready to load.

Pure arithmetic. A model is granted what it wishes for, down to a fair share of what is left, but
never less than it needs at least; one whose least does not fit is refused and the others go on.
"""

from shared.sizes import format_size

__all__ = ("MemoryBudget", "NotEnoughMemory")


class NotEnoughMemory(Exception):
    """A model does not fit; the message names both sizes."""


class MemoryBudget:
    """`total` bytes for `models` models that have yet to claim; 0 means that nothing is limited."""

    def __init__(self, total: int, models: int) -> None:
        self.total = total
        self.left = total
        self.outstanding = models

    def claim(self, *, least: int, wish: int) -> int:
        """Grant one model its bytes; 0 if nothing is limited.

        Raises:
            NotEnoughMemory: not even `least` is left.
        """
        if self.outstanding < 1:
            raise ValueError("more claims than models")
        share = self.left // self.outstanding
        self.outstanding -= 1
        if not self.total:
            return 0
        if least > self.left:
            raise NotEnoughMemory(
                f"needs at least {format_size(least)}, "
                f"{format_size(self.left)} of {format_size(self.total)} are left"
            )
        granted = max(least, min(wish, share))
        self.left -= granted
        return granted

    def waive(self) -> None:
        """One model will not claim: its share is for the others."""
        self.outstanding -= 1
