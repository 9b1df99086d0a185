"""What is told of a child process that has ended: how it did, and what it had printed."""

import signal
from collections.abc import Sequence

__all__ = ("LAST_WORDS", "last_words")

LAST_WORDS = 40
"""Lines of the child's output kept for the message about its death."""

_TELLING = ("assert", "error", "failed", "out of memory")


def last_words(code: int | None, words: Sequence[str]) -> str:
    """One line on how a child ended: its exit, and the line of its output that tells most."""
    if code is None:
        how = "the engine closed its connection"
    elif code >= 0:
        how = f"the engine ended with exit code {code}"
    elif -code == signal.SIGKILL:
        how = "the engine was killed by SIGKILL (out of memory, or by hand)"
    else:
        known = -code in set(signal.Signals)
        how = f"the engine was killed by {signal.Signals(-code).name if known else -code}"
    telling = [line for line in words if any(mark in line.lower() for mark in _TELLING)]
    line = (telling or list(words) or [""])[-1]
    return f"{how}: {line[:300]}" if line else how
