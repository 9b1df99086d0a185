"""Random numbers that nobody may guess, without a system call for each."""

import os

__all__ = ("attempt_number",)

_POOL = 4096
_SIZE = 8
_MASK = (1 << 63) - 1


class _Pool:
    def __init__(self) -> None:
        self._bytes = b""
        self._at = 0

    def take(self) -> bytes:
        if self._at >= len(self._bytes):
            self._bytes = os.urandom(_POOL)
            self._at = 0
        self._at += _SIZE
        return self._bytes[self._at - _SIZE : self._at]


_pool = _Pool()


def attempt_number() -> int:
    """A fresh attempt: 63 bits that only this router and the chosen worker will know."""
    return int.from_bytes(_pool.take(), "little") & _MASK
