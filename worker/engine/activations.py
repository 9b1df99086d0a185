"""Activations as bytes on the way between stages, and how a step is cut into passes. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ("Span", "from_bytes", "passes", "to_bytes")

_HALF = np.finfo(np.float16)


def to_bytes(rows: NDArray[np.float32], *, half: bool) -> bytes:
    """Rows as they travel; with `half` at 16 bits, what is beyond their range as the largest."""
    if not half:
        return rows.astype("<f4", copy=False).tobytes()
    return np.clip(rows, _HALF.min, _HALF.max).astype("<f2").tobytes()


def from_bytes(data: memoryview, rows: int, width: int, *, half: bool) -> NDArray[np.float32]:
    """Undo `to_bytes`; (rows, width).

    Raises:
        ValueError: there are more bytes, or fewer.
    """
    size = rows * width * (2 if half else 4)
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes for {rows} rows of {width} numbers; wanted {size}")
    flat = np.frombuffer(data, dtype="<f2" if half else "<f4")
    return flat.reshape(rows, width).astype(np.float32)


class Span(NamedTuple):
    """Rows of a step that make a pass, from `start` to before `stop`: `each` of each sequence."""

    start: int
    stop: int
    each: int


def passes(slots: Sequence[int], *, most: int, wanted: int) -> list[Span]:
    """Cut the rows of a step into passes, in their order.

    A pass has as many rows of each of its sequences, whose slots are consecutive: such a one
    llama.cpp computes in one go, rows in their order.

    Args:
        slots: of each row; rows of a sequence stand together.
        most: rows in a pass at most.
        wanted: passes into which sequences with as many rows are cut, if there are so many
            sequences: so that several stages have something to do.
    """
    if most < 1 or wanted < 1:
        raise ValueError(f"most {most} and wanted {wanted} must be at least 1")
    spans: list[Span] = []
    for start, stop, each in _alike(slots):
        # One sequence with more rows than a pass has goes piece by piece.
        per_pass = min(most // each, max(1, -(-((stop - start) // each) // wanted)))
        if per_pass:
            size = per_pass * each
            spans += [Span(at, min(stop, at + size), each) for at in range(start, stop, size)]
            continue
        for begin in range(start, stop, each):
            for at in range(begin, begin + each, most):
                end = min(begin + each, at + most)
                spans.append(Span(at, end, end - at))
    return spans


def _alike(slots: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of sequences with consecutive slots and as many rows: start, stop, rows of each."""
    ends = [row for row in range(1, len(slots)) if slots[row] != slots[row - 1]] + [len(slots)]
    runs: list[tuple[int, int, int]] = []
    start = 0
    for end in ends if slots else ():
        each = end - start
        if runs and runs[-1][2] == each and slots[start] == slots[start - 1] + 1:
            runs[-1] = (runs[-1][0], end, each)
        else:
            runs.append((start, end, each))
        start = end
    return runs
