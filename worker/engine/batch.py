"""The rows of one decode call, as llama.cpp takes them, written by numpy."""

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp.llama_cpp as ll
import numpy as np
from numpy.typing import NDArray

__all__ = ("Batch",)


class Batch:
    """The arrays of one `llama_batch`, as numpy views; one sequence a row.

    With a `width` it is of activations, in `rows`; else of tokens, with as much room again behind
    them for `repeat`.
    """

    def __init__(self, capacity: int, width: int = 0) -> None:
        self.capacity = capacity
        self._room = room = capacity if width else 2 * capacity
        self.native = ll.llama_batch_init(room, width, 1)
        if width:
            flat = _view(self.native.embd, room * width, ctypes.c_float)
            self.rows: NDArray[np.float32] = flat.reshape(room, width)
        else:
            self.token = _view(self.native.token, room, ctypes.c_int32)
        self.position = _view(self.native.pos, room, ctypes.c_int32)
        self.output = _view(self.native.logits, room, ctypes.c_int8)
        _view(self.native.n_seq_id, room, ctypes.c_int32)[:] = 1
        self.slot = np.zeros(room, dtype=np.int32)
        for row in range(room):
            # every row's list of sequence ids is one cell of `slot`, so a step writes one array
            self.native.seq_id[row] = ctypes.cast(
                self.slot.ctypes.data + 4 * row, ctypes.POINTER(ctypes.c_int32)
            )

    def close(self) -> None:
        """Free the arrays."""
        for row in range(self._room):
            self.native.seq_id[row] = None  # a cell of `slot`, which is numpy's
        ll.llama_batch_free(self.native)

    def fill(self, row: int, slot: int, tokens: Sequence[int], position: int) -> int:
        """Put consecutive tokens of a slot into rows from `row` on, without output.

        Returns the row after them.
        """
        if len(tokens) == 1:
            # the common case, a dozen microseconds cheaper where each of them counts
            self.token[row] = tokens[0]
            self.position[row] = position
            self.slot[row] = slot
            self.output[row] = 0
            return row + 1
        end = row + len(tokens)
        self.token[row:end] = tokens
        self.position[row:end] = np.arange(position, position + len(tokens))
        self.slot[row:end] = slot
        self.output[row:end] = 0
        return end

    def fill_decoding(
        self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int]
    ) -> int:
        """Put one row with output for each slot; returns the number of rows."""
        rows = len(slots)
        self.slot[:rows] = slots
        self.token[:rows] = tokens
        self.position[:rows] = positions
        self.output[:rows] = 1
        return rows

    def repeat(self, row: int, behind: int) -> None:
        """Put a row's token into row `behind` once more, one position on in its slot."""
        self.token[behind] = self.token[row]
        self.position[behind] = self.position[row] + 1
        self.slot[behind] = self.slot[row]
        self.output[behind] = self.output[row]


def _view(pointer: Any, size: int, kind: Any) -> NDArray[Any]:
    return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(kind)), (size,))
