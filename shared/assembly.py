"""Noticing frames that are lost, doubled, late or out of order.

Core NATS is at most once and promises order on one path only, so an answer counts as whole only if
its token indices are contiguous and its `Done` frames name the counts that were seen.
"""

from typing import Literal

import msgspec

from shared.protocol import Accepted, Busy, Delta, Done, EmbedResult, End, Fail, Frame

__all__ = ("Assembly", "Verdict")

Verdict = Literal["take", "drop", "gap"]
"""`take`: the next frame in order. `drop`: doubled, late, or of another attempt. `gap`: tokens are
missing before this frame, the answer cannot be completed from this attempt."""


class Assembly(msgspec.Struct):
    """What has been seen of one attempt; `check` judges each frame before it is used."""

    attempt: int
    choices: int = 1
    worker: str = ""
    counts: dict[int, int] = {}
    done: set[int] = set()
    ended: bool = False

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
        expected = self.counts.get(choice, 0)
        if frame.first < expected or choice in self.done:
            return "drop"
        if frame.first > expected:
            return "gap"
        self.counts[choice] = expected + len(frame.tokens)
        return "take"

    def _done(self, frame: Done) -> Verdict:
        if frame.choice in self.done:
            return "drop"
        if frame.count != self.counts.get(frame.choice, 0):
            return "gap"
        self.done.add(frame.choice)
        return "take"
