"""Which tokens go into the next decode call. Pure policy.

Running sequences get one row each, first; what the token budget leaves goes to prefills, oldest
first. The budget follows the measured speed of prefill, so that a long prompt delays the tokens of
others, and the handling of a cancellation, by a bounded time.
"""

from collections.abc import Sequence

__all__ = ("Pace", "plan")

STEP_SECONDS_BESIDE_DECODE = 0.08
"""What a step is to take in all while others decode: it bounds the gaps between their tokens, and
the time until a cancellation is seen."""
STEP_SECONDS_ALONE = 0.25
LEAST_PREFILL = 16
"""Rows of prefill a step may always have: fewer would read the weights for next to nothing."""
FIRST_PREFILL = 128
"""Rows of the first prefill, from which the speed is learnt."""


class Pace:
    """Prefill rows a step may hold, from measured times."""

    def __init__(self, step_tokens: int) -> None:
        self._most = step_tokens
        self._rate = 0.0
        """Prefill rows a second, a moving average; 0: not measured yet."""
        self._decode = 0.0
        """Seconds of a step that only decodes, a moving average."""

    def measured(self, decoding: int, prefill: int, seconds: float) -> None:
        """A step of so many rows of each kind took so long."""
        if not prefill:
            self._decode = _average(self._decode, seconds)
            return
        if decoding:
            seconds -= self._decode
        if prefill >= LEAST_PREFILL // 2 and seconds > 0:
            self._rate = _average(self._rate, prefill / seconds)

    def budget(self, decoding: int) -> int:
        """Rows for the next step in all, decode included."""
        if not self._rate:
            return min(self._most, decoding + FIRST_PREFILL)
        left = STEP_SECONDS_BESIDE_DECODE - self._decode if decoding else STEP_SECONDS_ALONE
        return min(self._most, decoding + max(LEAST_PREFILL, int(self._rate * left)))


def _average(average: float, value: float) -> float:
    return 0.7 * average + 0.3 * value if average else value


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
