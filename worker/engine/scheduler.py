"""Which tokens go into the next decode call. Pure policy.

Running sequences get one row each, first; what the token budget leaves goes to prefills, oldest
first. The budget follows the measured speed of prefill, so that a long prompt delays the tokens of
others, and the handling of a cancellation, by a bounded time.
"""

from collections.abc import Sequence

__all__ = ("Pace", "plan")

STEP_SECONDS_BESIDE_DECODE = 0.06
STEP_SECONDS_ALONE = 0.25
LEAST_PREFILL = 32
"""Rows of prefill a step may always have: fewer would read the weights for next to nothing."""


class Pace:
    """Prefill rows a step may hold, from the measured rate."""

    def __init__(self, step_tokens: int) -> None:
        self._most = step_tokens
        self._rate = 0.0
        """Rows a second, a moving average; 0: not measured yet."""

    def measured(self, rows: int, seconds: float) -> None:
        """A step of mostly prefill took so long."""
        if rows >= LEAST_PREFILL // 2 and seconds > 0:
            rate = rows / seconds
            self._rate = rate if self._rate == 0 else 0.7 * self._rate + 0.3 * rate

    def budget(self, decoding: int) -> int:
        """Rows for the next step in all, decode included."""
        seconds = STEP_SECONDS_BESIDE_DECODE if decoding else STEP_SECONDS_ALONE
        rows = int(self._rate * seconds) if self._rate else 4 * LEAST_PREFILL
        return min(self._most, decoding + max(LEAST_PREFILL, rows))


def plan(remaining: Sequence[int], budget: int) -> list[int]:
    """Rows for each sequence, given the tokens each has yet to compute, in order of age.

    A sequence with one token left is decoding and always gets its row. The sum is at most
    `max(budget, number of decoding sequences)`.
    """
    left = budget - sum(1 for count in remaining if count == 1)
    rows: list[int] = []
    for count in remaining:
        if count <= 1:
            rows.append(count)
            continue
        share = max(0, min(count, left))
        if count - share == 1 and share > 1:
            share -= 1  # a last row alone would be rounded in another way than several together
        rows.append(share)
        left -= share
    return rows
