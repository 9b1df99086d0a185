"""Tokens to text that may be sent: whole characters only, and nothing of a stop string.

The text of a token sequence is its bytes decoded as UTF-8, invalid bytes as U+FFFD. It stops at the
smallest position at which any stop string is complete; of several that end there, the longest
counts. What was before that string's start is the output.
"""

import codecs
from collections.abc import Sequence

__all__ = ("TextAssembler",)

_DECODER = codecs.getincrementaldecoder("utf-8")


class TextAssembler:
    """Assembles the text of one choice; `pieces` are the bytes of each token of the vocabulary.

    What `push` returns is final: concatenated, and with `flush` at the end, it is the output.
    """

    __slots__ = (
        "_decoder",
        "_held",
        "_inner",
        "_longest",
        "_partial",
        "_pieces",
        "_stop",
        "stopped_by",
    )

    def __init__(self, pieces: Sequence[bytes], stop: tuple[str, ...] = ()) -> None:
        self._pieces = pieces
        self._stop = tuple(s for s in stop if s)
        self._longest = max(map(len, self._stop), default=0)
        self._inner = frozenset(c for s in self._stop for c in s[:-1])
        self._decoder = _DECODER("replace")
        self._partial = False
        self._held = ""
        self.stopped_by = ""
        """The stop string that ended the text, if one did."""

    def push(self, token: int) -> tuple[str, bool]:
        """Take a token; return the text that is certain now, and whether a stop string ended it."""
        if self.stopped_by:
            return "", True
        piece = self._pieces[token]
        if self._partial or not piece.isascii():
            text = self._decoder.decode(piece)
            self._partial = bool(self._decoder.getstate()[0])
        else:
            text = piece.decode("ascii")
        if not self._stop:
            return text, False
        return self._until_stop(text)

    def flush(self) -> str:
        """Return what is still held, as the text ends here; an incomplete character is U+FFFD."""
        if self.stopped_by:
            return ""
        text, stopped = self._until_stop(self._decoder.decode(b"", final=True))
        self._partial = False
        if stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _until_stop(self, text: str) -> tuple[str, bool]:
        if not text:
            return "", False
        text = self._held + text
        # The first occurrence of a string is also the first to be complete.
        found = [
            (start + len(stop), start, stop)
            for stop in self._stop
            if (start := text.find(stop)) >= 0
        ]
        if found:
            _, start, self.stopped_by = min(found)
            self._held = ""
            return text[:start], True
        cut = self._hold_from(text)
        self._held = text[cut:]
        return text[:cut], False

    def _hold_from(self, text: str) -> int:
        """Where the longest end of `text` that may become a stop string begins."""
        if text[-1] not in self._inner:
            return len(text)
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            tail = text[start:]
            if any(stop.startswith(tail) for stop in self._stop):
                return start
        return len(text)
