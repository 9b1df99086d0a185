"""What pieces of prompts add to the time of a step, learnt from the steps of late."""

import math
from collections import deque

import numpy as np
from numpy.typing import NDArray

__all__ = ("StepTime",)

WINDOW = 64
"""Steps that are looked back on."""
_UNITS = np.array([0.25, 1 / 32, 1 / 32_000])
"""Of a pass, a row, and a token of depth for each row, so that all three weigh alike. What could be
either is a row's rather than a pass's."""
_RIDGE = 1e-3
"""Keeps what the steps do not tell apart from growing without bound in opposite directions."""
_CHEAPER = 0.25
"""A row costs at least this share of what a row of any of the steps cost on the whole."""


class StepTime:
    """Seconds as a sum: of the pass, of each row, and of each row for each token before it.

    Fitted by least squares over the last `WINDOW` steps. A pass reads all weights whatever it
    holds, so that few rows are dear ones; attention makes a row behind 1,500 tokens several times
    as dear as behind none.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float, float, float]] = deque(maxlen=WINDOW)
        self._fitted: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, rows: int, depth: float, seconds: float) -> None:
        """So many rows, at that depth in the mean, took so long."""
        self._steps.append((1.0, rows, rows * depth, seconds))
        self._fitted = None

    def of(self, rows: int, depth: float) -> float:
        """Seconds that so many rows will take; 0 if nothing was measured."""
        whole, each = self._line(depth)
        return whole + rows * each

    def rows(self, seconds: float, depth: float) -> int:
        """Rows that fit into so many seconds; at least 0, at most a million.

        Never more than four times as many as the cheapest of the steps had for that time: where
        all had about as many rows, they do not tell a row from the pass.
        """
        whole, each = self._line(depth)
        left = seconds - whole
        least = _CHEAPER * min((step[3] / step[1] for step in self._steps), default=math.inf)
        return 0 if left <= 0 else round(min(1e6, left / max(each, least)))

    def _line(self, depth: float) -> tuple[float, float]:
        """Of the pass, and of a row at that depth."""
        if self._fitted is None:
            self._fitted = self._fit()
        whole, row, token = self._fitted.tolist()
        return whole, row + token * depth

    def _fit(self) -> NDArray[np.float64]:
        if not self._steps:
            return np.zeros(3)
        steps = np.array(self._steps)
        told, seconds = steps[:, :3] * _UNITS, steps[:, 3]
        square = told.T @ told + _RIDGE * np.eye(3)
        found: NDArray[np.float64] = np.linalg.solve(square, told.T @ seconds)
        fitted: NDArray[np.float64] = np.maximum(found, 0.0) * _UNITS
        return fitted
