"""What a step costs by its number of rows, as calibrated at load and as it goes now. Pure.

The machine's speed drifts by half within minutes, and all widths drift together: so what a step
takes corrects one factor for all widths quickly, and the width it was measured at slowly. Two
models on one machine drift together, too. A ring of stages adds the way round, which does not
depend on the width.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable

__all__ = ("NOMINAL", "StepCost")

NOMINAL = ((1, 0.010), (2, 0.014), (8, 0.026), (32, 0.070))
"""Rows and seconds for a model that was not calibrated; only their ratios matter for long."""

_SPEED_GAIN = 0.1
_SPEED_GAIN_BESIDE = 0.025
"""The same of a model that drifts with another: what is left to learn is how it differs."""
_SHAPE_GAIN = 0.05
_OUTLIER = math.log(3.0)
"""A step that took three times what it should was disturbed: it tells nothing of the next."""


class StepCost:
    """Seconds of one decode call by rows.

    Args:
        points: (rows, seconds), both positive; the way round not counted.
        latency: seconds of the way round, now.
        beside: of another model on the same machine: it is measured in steps in which this one is
            not, and the machine's speed is known from it.
    """

    def __init__(
        self,
        points: Iterable[tuple[int, float]] = NOMINAL,
        *,
        latency: Callable[[], float] = lambda: 0.0,
        beside: "StepCost | None" = None,
    ) -> None:
        known = sorted(dict(points).items())
        if not known or any(rows < 1 or seconds <= 0 for rows, seconds in known):
            raise ValueError(f"points are {known}: at least one is needed, all of them positive")
        self._rows = [rows for rows, _ in known]
        self._shape = [math.log(seconds) for _, seconds in known]
        self._speed = 0.0
        """Logarithm of how much slower than calibrated it is now, or than `beside` says."""
        self._known: dict[int, float] = {}
        self._latency = latency
        self._beside = beside
        self._speed_gain = _SPEED_GAIN if beside is None else _SPEED_GAIN_BESIDE

    @property
    def _drift(self) -> float:
        return self._speed if self._beside is None else self._speed + self._beside._drift

    def seconds(self, rows: int) -> float:
        """Seconds of a call with so many rows, at the machine's present speed."""
        return self._latency() + self._compute(rows)

    def _compute(self, rows: int) -> float:
        shape = self._known.get(rows)
        if shape is None:
            shape = self._known[rows] = self._interpolate(rows)
        return shape * math.exp(self._drift)

    def rows_within(self, seconds: float, rows: int, most: int) -> int:
        """The most rows that a call of so many seconds can have: a multiple of `rows`, which is
        returned however long that takes, and at most `most` if that is more.
        """
        times, least = most // rows, 1
        while times > least:
            middle = (least + times + 1) // 2
            if self.seconds(rows * middle) <= seconds:
                least = middle
            else:
                times = middle - 1
        return rows * least

    def measured(self, rows: int, seconds: float) -> None:
        """A call with so many rows took so long.

        Raises:
            ValueError: no time at all, or less.
        """
        if seconds <= 0:
            raise ValueError(f"a call took {seconds} s")
        expected = self._compute(rows)
        error = math.log(max(seconds - self._latency(), expected / 10) / expected)
        if abs(error) > _OUTLIER:
            # once it is the machine's new speed, and not a disturbance, it comes again and again
            error = math.copysign(_OUTLIER, error) * 0.1
        self._speed += self._speed_gain * error
        nearest = min(range(len(self._rows)), key=lambda i: abs(self._rows[i] - rows))
        self._shape[nearest] += _SHAPE_GAIN * error
        self._known.clear()

    def _interpolate(self, rows: int) -> float:
        right = bisect_right(self._rows, rows)
        if right == 0 or len(self._rows) == 1:
            return math.exp(self._shape[0])
        # beyond the last point, along the last two
        right = min(right, len(self._rows) - 1)
        (low, high), (first, last) = (
            (values[right - 1], values[right]) for values in (self._rows, self._shape)
        )
        start, end = math.exp(first), math.exp(last)
        slope = max(0.0, (end - start) / (high - low))
        return start + slope * (rows - low)
