"""Sharing one worker's memory between its models, in the order in which they are ready to load.

Pure arithmetic. A model is granted what it wishes for, down to a fair share of what is left, but
never less than it needs at least; one whose least does not fit is refused and the others go on.
"""

import re

__all__ = ("MemoryBudget", "NotEnoughMemory", "format_size", "parse_size")

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>(?:[kmgt]i?)?)b?\s*", re.IGNORECASE)


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


def parse_size(text: str) -> int:
    """Read `2GiB`, `512M`, `1.5 gb` or plain bytes.

    Raises:
        ValueError: it is no size, or none above zero.
    """
    match = _SIZE.fullmatch(text)
    if match is not None:
        unit = match["unit"].lower()
        size = int(float(match["number"]) * (_UNITS.get(unit) or _BINARY[unit]))
        if size > 0:
            return size
    raise ValueError(f"{text!r} is no size; wanted for example 2GiB or 512M")


def format_size(size: int) -> str:
    """A size as people read it."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"
