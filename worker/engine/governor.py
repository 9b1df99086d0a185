"""How many threads compute the next step, as others leave cores free. Pure policy.

llama.cpp's threads wait for each other hundreds of times a step, so that a step of two threads of
which one shares its core with a busy process takes three times as long, and longer than a step of
one thread (`docs/benchmarks.md`). Now and then a step is tried with the next fewer or next more
threads. What a try loses is paid from an allowance of a few thousandths of the time, which bounds
what looking costs; a try that gains is repeated, and then that is the number of threads.
"""

from collections import deque
from collections.abc import Callable

__all__ = ("Governor", "rungs")

ALLOWANCE = 0.006
"""Of the time of steps, what tries may lose."""
REMEMBERED = 16
"""Steps by which the present speed is judged."""
FREAKS = 2
"""Of them, how many of the longest do not count: any machine now and then stops for a moment."""
APART = 32
"""Least steps between two tries."""
NEEDED = 3
"""Tries in a row by which another number of threads proves itself."""
BETTER = 0.93
"""The part of the present time that they must stay below, in the mean."""


def rungs(threads: int) -> tuple[int, ...]:
    """The numbers of threads that are tried, most first: all, then powers of two.

    Raises:
        ValueError: fewer than one.
    """
    if threads < 1:
        raise ValueError(f"threads is {threads}, at least 1 is needed")
    powers = (1 << bit for bit in reversed(range(threads.bit_length())))
    return (threads, *(power for power in powers if power < threads))


class Governor:
    """Chooses between 1 and `threads` for one kind of step.

    Steps with a single row and steps with several gain differently from threads: give each kind a
    governor of its own.

    Args:
        threads: the most.
        expected: seconds of a step with so many rows (`Calibration.seconds`), by which steps of
            unequal width are compared; only proportions matter.
    """

    def __init__(self, threads: int, expected: Callable[[float], float] = lambda rows: 1.0) -> None:
        self._rungs = rungs(threads)
        self._expected = expected
        self._at = 0
        self._trial: int | None = None
        """Rung of a try that is under way."""
        self._tries: list[float] = []
        self._recent: deque[float] = deque(maxlen=REMEMBERED)
        """Seconds of settled steps over what was expected."""
        self._since = 0
        """Settled steps since the last try."""
        self._credit = 0.0
        """Seconds that tries may lose."""
        self._price: dict[int, float] = {}
        """Seconds that the last try on a rung lost."""
        self._last = 0
        """Rung of the last try."""

    @property
    def threads(self) -> int:
        """For the next step of this kind; its time is to be told by `measured`."""
        return self._rungs[self._at if self._trial is None else self._trial]

    @property
    def settled(self) -> int:
        """For steps whose time will not be told: never that of a try."""
        return self._rungs[self._at]

    def measured(self, rows: int, seconds: float) -> None:
        """A step of so many rows with `threads` took so long."""
        expected = self._expected(rows)
        if seconds <= 0 or expected <= 0 or len(self._rungs) == 1:
            return
        if self._trial is None:
            self._recent.append(seconds / expected)
            self._since += 1
            self._credit += ALLOWANCE * seconds
            self._trial = self._due(expected)
        else:
            self._judge(self._trial, seconds, expected)

    def _level(self) -> float:
        """Present time of a step over what was expected."""
        counted = sorted(self._recent)[: max(1, len(self._recent) - FREAKS)]
        return sum(counted) / len(counted)

    def _due(self, expected: float) -> int | None:
        """The rung that is to be tried now."""
        if self._since < APART:
            return None
        # A rung that was never tried is thought to take twice as long.
        usual = self._level() * expected
        neighbours = [rung for rung in (self._at - 1, self._at + 1) if 0 <= rung < len(self._rungs)]
        turn = [rung for rung in neighbours if rung != self._last] or neighbours
        price = self._price.get(turn[0], usual)
        if self._credit < price:
            return None
        self._credit = price
        return turn[0]

    def _judge(self, rung: int, seconds: float, expected: float) -> None:
        level = self._level()
        loss = seconds - level * expected
        self._tries.append(seconds / expected)
        self._last = rung
        mean = sum(self._tries) / len(self._tries)
        if mean < BETTER * level:
            if len(self._tries) < NEEDED:
                return
            self._at = rung
            self._recent.clear()
            self._recent.extend(self._tries)
            # The rung that was left is known to be slower only as things are now.
            self._price.clear()
        else:
            self._credit -= max(0.0, loss)
            self._price[rung] = max(0.0, loss)
        self._trial = None
        self._tries = []
        self._since = 0
