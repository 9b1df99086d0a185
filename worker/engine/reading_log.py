"""The tokens of answers whose clients may lose their connection, kept until some time after.

Only token ids, four bytes each: the client brings its request again, and all else follows from
both. The loop writes and the intake reads, two threads of one interpreter.
"""

import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Literal

from shared.protocol import Generate

__all__ = ("KEPT_BYTES", "KEPT_SECONDS", "ReadingLog", "Record")

KEPT_SECONDS = 120.0
"""After the end of an answer, or of its attempt, if the client or its router was lost."""
KEPT_BYTES = 8 << 20
"""Of all answers that have ended; the oldest go first."""

_OVERHEAD = 500
_EACH = 105
"""Bytes that a record takes, and each of its choices, beside the tokens: 610 were measured with one
choice and 1,350 with eight (tracemalloc, CPython 3.11)."""

Reason = Literal["stop", "length", "tool_calls"]
Key = tuple[str, int]


class Record:
    """One answer: the tokens of each choice, and why it ended."""

    __slots__ = ("attempt", "ended", "key", "over", "tokens")

    def __init__(self, key: Key, attempt: int, choices: int) -> None:
        self.key = key
        self.attempt = attempt
        self.tokens = [array("i") for _ in range(choices)]
        self.over: list[Reason | None] = [None] * choices
        self.ended = 0.0
        """Monotonic seconds; 0: it goes on."""

    @property
    def size(self) -> int:
        """Bytes, roughly."""
        return _OVERHEAD + sum(_EACH + 4 * len(tokens) for tokens in self.tokens)

    def take(self, choice: int, tokens: Iterable[int], over: Reason | None = None) -> None:
        """A choice has so many more tokens, and may be complete with them."""
        self.tokens[choice].extend(tokens)
        self.over[choice] = over


class ReadingLog:
    """Answers by owner and key."""

    def __init__(
        self,
        *,
        seconds: float = KEPT_SECONDS,
        most_bytes: int = KEPT_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = seconds
        self._most_bytes = most_bytes
        self._clock = clock
        self._running: dict[Key, Record] = {}
        self._ended: OrderedDict[Key, Record] = OrderedDict()
        self._bytes = 0

    @property
    def size(self) -> int:
        """Bytes of the answers that have ended, roughly."""
        return self._bytes

    def find(self, request: Generate) -> Record | None:
        """What is kept of the answer that this request goes on with."""
        if request.reading is None:
            return None
        key = request.owner, request.reading.key
        record = self._running.get(key)
        if record is None:
            record = self._ended.get(key)
        if record is None or len(record.tokens) != request.n:
            return None
        late = record.ended and self._clock() - record.ended > self._seconds
        return None if late else record

    def begin(self, record: Record) -> int | None:
        """Keep what becomes of an attempt; returns the one that had the answer and still runs."""
        before = self._running.get(record.key)
        # Never out of both, for the thread that looks.
        self._running[record.key] = record
        if (ended := self._ended.pop(record.key, None)) is not None:
            self._bytes -= ended.size
        return None if before is None else before.attempt

    def end(self, record: Record | None) -> None:
        """An attempt is over, however it ended; None: nothing is kept of it."""
        if record is None or self._running.get(record.key) is not record:
            return  # another attempt has taken the answer over
        record.ended = self._clock()
        self._ended[record.key] = record
        del self._running[record.key]
        self._bytes += record.size
        self._forget()

    def _forget(self) -> None:
        old = self._clock() - self._seconds
        while self._ended:
            key, record = next(iter(self._ended.items()))
            if record.ended > old and self._bytes <= self._most_bytes:
                return
            del self._ended[key]
            self._bytes -= record.size
