"""Noticing frames that are lost, doubled, late or out of order, and keeping what has come.

Core NATS is at most once and promises order on one path only, so an answer counts as whole only if
its token indices are contiguous and its `Done` frames name the counts that were seen. What was
taken of an attempt that is lost is where the next one goes on.
"""

from array import array
from typing import Literal

import msgspec

from shared.protocol import (
    Accepted,
    Busy,
    Delta,
    Done,
    EmbedResult,
    End,
    Fail,
    Frame,
    Generate,
    Request,
    Resumed,
)

__all__ = ("Assembly", "Verdict")

Verdict = Literal["take", "drop", "gap"]
"""`take`: the next frame in order. `drop`: doubled, late, or of another attempt. `gap`: tokens are
missing before this frame, the answer cannot be completed from this attempt."""


class Assembly(msgspec.Struct):
    """What has been seen of one attempt; `check` judges each frame before it is used."""

    attempt: int
    choices: int = 1
    worker: str = ""
    tokens: "list[array[int]]" = []
    """By choice, those of earlier attempts included; four bytes each, for thousands of answers are
    kept at once."""
    done: set[int] = set()
    tails: set[int] = set()
    """Choices of which the text after their last token has come."""
    before: dict[int, int] = {}
    """Tokens of the choices that were done before the first attempt, in number."""
    ended: bool = False

    def __post_init__(self) -> None:
        if not self.tokens:
            self.tokens = [array("i") for _ in range(self.choices)]

    @classmethod
    def of(cls, request: Request) -> "Assembly":
        """Of a request that nobody has been asked yet.

        Choices that its client has to their end are done.
        """
        if not isinstance(request, Generate):
            return cls(request.attempt)
        had = request.reading.had if request.reading is not None else ()
        if not any(choice.done for choice in had):
            return cls(request.attempt, request.n)
        before = {index: choice.count for index, choice in enumerate(had) if choice.done}
        return cls(request.attempt, request.n, done=set(before), before=before)

    def again(self, attempt: int) -> "Assembly":
        """The same answer on another attempt; this one must not be used any more."""
        return Assembly(
            attempt,
            self.choices,
            tokens=self.tokens,
            done=self.done,
            tails=self.tails,
            before=self.before,
        )

    @property
    def count(self) -> int:
        """Tokens seen, of all choices and attempts."""
        return sum(map(len, self.tokens))

    @property
    def resume(self) -> tuple[Resumed, ...]:
        """What another attempt has to know; empty: nothing has come."""
        if not self.done and not any(self.tokens):
            return ()
        return tuple(
            Resumed(done=self.before.get(choice, len(tokens)))
            if choice in self.done
            else Resumed(tuple(tokens))
            for choice, tokens in enumerate(self.tokens)
        )

    def check(self, frame: Frame) -> Verdict:
        """Judge a frame and, if it is taken, advance."""
        if self.ended or frame.attempt != self.attempt:
            return "drop"
        if type(frame) is Delta:
            return self._delta(frame)
        if isinstance(frame, Done):
            return self._done(frame)
        if isinstance(frame, Accepted):
            if self.worker:
                return "drop"
            self.worker = frame.worker
            return "take"
        if isinstance(frame, End) and len(self.done) != self.choices:
            return "gap"
        if isinstance(frame, End | EmbedResult | Fail | Busy):
            self.ended = True
        return "take"

    def _delta(self, frame: Delta) -> Verdict:
        choice = frame.choice
        if not 0 <= choice < self.choices:
            return "gap"
        seen = self.tokens[choice]
        expected = len(seen)
        if frame.first < expected or choice in self.done:
            return "drop"
        if frame.first > expected:
            return "gap"
        if frame.tokens:
            seen.extend(frame.tokens)
        elif choice in self.tails:
            return "drop"
        else:
            self.tails.add(choice)
        return "take"

    def _done(self, frame: Done) -> Verdict:
        if frame.choice in self.done:
            return "drop"
        if not 0 <= frame.choice < self.choices or frame.count != len(self.tokens[frame.choice]):
            return "gap"
        self.done.add(frame.choice)
        return "take"
