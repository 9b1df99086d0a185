"""What is kept of requests with an `Idempotency-Key`, within a time and so many bytes.

Pure: the clock is passed in, and what is kept is of any kind. An answer that is being made is never
dropped for another; of those that are whole, the one that was not asked for longest goes first.
"""

from collections import OrderedDict, deque
from typing import Generic, TypeVar

import msgspec

from shared.errors import MeshError

__all__ = ("OVERHEAD", "KeptAnswers", "Key", "KeyReused")

OVERHEAD = 2048
"""Bytes that an answer is reckoned with beside its text."""
LARGEST_PART = 8
"""One answer may take this part of the whole room, so that one does not put all others out."""

T = TypeVar("T")
Key = tuple[str, str]
"""Whose it is, and the key."""


class KeyReused(MeshError):
    """The key stands for another request."""

    status = 422
    type = "invalid_request_error"
    code = "idempotency_key_reused"


class _Entry(msgspec.Struct, Generic[T]):
    digest: bytes
    answer: T
    size: int = OVERHEAD
    until: float = 0.0
    """0: it is being made."""


class KeptAnswers(Generic[T]):
    """Answers by key."""

    def __init__(self, *, limit: int, seconds: float) -> None:
        """Make room.

        Args:
            limit: bytes in all.
            seconds: for which an answer is kept once it is whole.
        """
        self._limit = limit
        self._seconds = seconds
        self._entries: OrderedDict[Key, _Entry[T]] = OrderedDict()
        self._whole: OrderedDict[Key, _Entry[T]] = OrderedDict()
        """Those of the entries that are whole; the one asked for last is the last."""
        self._ends: deque[tuple[float, Key]] = deque()
        self.size = 0
        """Bytes kept now."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def largest(self) -> int:
        """Bytes one answer may have."""
        return self._limit // LARGEST_PART

    def find(self, key: Key, digest: bytes, now: float) -> T | None:
        """The answer to the same request, whole or being made; None: there is none.

        Raises:
            KeyReused: the key stands for a request with another digest.
        """
        self._expire(now)
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.digest != digest:
            raise KeyReused(
                f"The Idempotency-Key {key[1]!r} was used for another request: the same key must "
                "come with the same path and body."
            )
        if key in self._whole:
            self._whole.move_to_end(key)
        return entry.answer

    def begin(self, key: Key, digest: bytes, answer: T) -> None:
        """An answer is going to be made; there must be none under this key."""
        if key in self._entries:
            raise ValueError(f"there is an answer under {key} already")
        self._entries[key] = _Entry(digest, answer)
        self.size += OVERHEAD
        self._make_room()

    def grow(self, key: Key, size: int) -> bool:
        """An answer that is being made has grown by so many bytes; False: there is no room."""
        entry = self._entries[key]
        entry.size += size
        self.size += size
        return self._make_room() and entry.size <= self.largest

    def finish(self, key: Key, now: float) -> None:
        """An answer is whole: keep it for its time."""
        entry = self._entries[key]
        entry.until = now + self._seconds
        self._whole[key] = entry
        self._ends.append((entry.until, key))
        self._make_room()

    def drop(self, key: Key) -> None:
        """An answer is not worth keeping; nothing to do if it is not kept."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._whole.pop(key, None)
            self.size -= entry.size

    def _make_room(self) -> bool:
        while self.size > self._limit and self._whole:
            self.drop(next(iter(self._whole)))
        return self.size <= self._limit

    def _expire(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            until, key = self._ends.popleft()
            entry = self._whole.get(key)
            # Another answer may have come under the key meanwhile.
            if entry is not None and entry.until == until:
                self.drop(key)
