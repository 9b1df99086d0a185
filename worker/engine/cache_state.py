"""How keys and values of a sequence are kept, and from one way to the other.

llama.cpp writes the state of a sequence for one of its own kind (`llama_kv_cache::state_write`):
what it is of, a word or two on each cell, then the layers' keys, cell by cell, then their values,
cell by cell for flash attention and number by number for attention without. It checks all of that
when it reads a state, so that one which is not understood here is not mistaken for another.
"""

import ctypes
from enum import Enum
from typing import Final

import llama_cpp.llama_cpp as ll
import numpy as np
from numpy.typing import NDArray

__all__ = ("CacheFormat", "UnknownState", "for_flash_attention")

Bytes = NDArray[np.uint8]

_HEAD: Final = 8
"""Bytes before the streams: a magic number and the sequence's."""
_CELL: Final = 12
"""Bytes that tell of a cell: its position, how many sequences have it, and which."""

_to_half = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(
    ("ggml_fp32_to_fp16_row", ll._lib)
)
"""numpy's own conversion takes twice as long."""


class CacheFormat(Enum):
    """How keys and values are kept, and read."""

    FLASH = "16 bits, in flash attention"
    EXACT = "32 bits, without"
    """As exact as 32-bit weights: with 16 bits, or in flash attention, logits differ by 0.01
    between a row alone and several rows, without by 0.0002."""


class UnknownState(Exception):
    """Not as llama.cpp has written it so far."""


def for_flash_attention(state: Bytes) -> Bytes:
    """A sequence's state of an `EXACT` cache as one of a `FLASH` cache.

    Raises:
        UnknownState: it is none of such a cache, or has more on each cell than is known here.
    """
    reader = _Reader(state)
    parts = [reader.take(_HEAD)]
    while reader.left:
        streams = reader.word()
        parts.append(_words(streams))
        for _ in range(streams):
            cells = reader.word()
            parts.append(_words(cells))
            if cells:
                parts += _stream(reader, cells)
    return np.concatenate(parts)


def _stream(reader: "_Reader", cells: int) -> list[Bytes]:
    parts = [reader.take(cells * _CELL)]
    transposed, layers = reader.word(), reader.word()
    if transposed != 1:
        raise UnknownState("values are not kept number by number")
    parts.append(_words(0, layers))
    for _ in range(layers):
        reader.expect(ll.GGML_TYPE_F32)
        size = reader.word() // 4
        reader.expect(0)  # the upper half of the row's size
        parts += [_words(ll.GGML_TYPE_F16, 2 * size, 0), _half(reader.floats(cells, size))]
    for _ in range(layers):
        reader.expect(ll.GGML_TYPE_F32)
        reader.expect(4)  # bytes of a number
        size = reader.word()
        values = np.ascontiguousarray(reader.floats(size, cells).T)
        parts += [_words(ll.GGML_TYPE_F16, 2 * size, 0), _half(values)]
    return parts


def _half(numbers: NDArray[np.float32]) -> Bytes:
    out = np.empty(numbers.size, np.float16)
    _to_half(numbers.ctypes.data, out.ctypes.data, numbers.size)
    return out.view(np.uint8)


def _words(*numbers: int) -> Bytes:
    return np.array(numbers, np.uint32).view(np.uint8)


class _Reader:
    """A position in a state; every read is checked against its end."""

    def __init__(self, state: Bytes) -> None:
        self._state = state
        self._at = 0

    @property
    def left(self) -> int:
        return self._state.size - self._at

    def take(self, size: int) -> Bytes:
        if size > self.left:
            raise UnknownState(f"it ends {size - self.left} bytes too soon")
        self._at += size
        return self._state[self._at - size : self._at]

    def word(self) -> int:
        return int.from_bytes(self.take(4).tobytes(), "little")

    def expect(self, number: int) -> None:
        if (found := self.word()) != number:
            raise UnknownState(f"it has {found} where {number} is expected")

    def floats(self, rows: int, columns: int) -> NDArray[np.float32]:
        """Of any alignment, so copied."""
        taken = self.take(4 * rows * columns)
        return np.frombuffer(taken.tobytes(), np.float32).reshape(rows, columns)
