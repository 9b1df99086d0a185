"""When to start a child again that has died. Pure policy, the clock stays outside."""

import msgspec

__all__ = ("Restarts",)


class Restarts(msgspec.Struct):
    """Delays that double while a child keeps dying young and start over once one has lived."""

    first: float = 0.5
    most: float = 30.0
    young: float = 20.0
    """Seconds; a child that lived longer is taken as having been well."""
    in_a_row: int = 0

    def after(self, lived: float) -> float:
        """Return the seconds to wait before the next start, after a life of `lived` seconds."""
        if lived >= self.young:
            self.in_a_row = 0
        delay = min(self.most, self.first * 2.0 ** min(self.in_a_row, 32))
        self.in_a_row += 1
        return delay
