"""A job: one generation request, with its account of tokens and time."""

import time
from typing import TYPE_CHECKING

from shared.protocol import End, Frame, Generate, Timings, Usage
from worker.engine.reading_log import Record
from worker.engine.tiles import Spans

if TYPE_CHECKING:
    from worker.engine.sequence import Sequence

__all__ = ("Job",)

UNSTATED = 256
"""Tokens of an answer that are reckoned with where the request names no limit: the context that is
left is nobody's wish."""


class Job:
    """One request."""

    def __init__(
        self,
        request: Generate,
        reply: str,
        received: float,
        prompt: list[int],
        end_tokens: frozenset[int],
    ) -> None:
        self.request = request
        self.attempt = request.attempt
        self.reply = reply
        self.received = received
        self.prompt = prompt
        self.end_tokens = end_tokens
        self.spans: Spans | None = None
        """What of the prompt is computed in whole tiles; None: nobody has asked yet."""
        self.sequences: list[Sequence] = []
        """One a choice, without those that were done on earlier attempts."""
        self.open = 0
        """Sequences not yet complete."""
        self.cached = 0
        self.completion = 0
        self.replayed = 0
        """Tokens of the answer that earlier attempts told, or that were kept of it."""
        self.begun = False
        """Somebody is in the middle of reading this, as a router or what was kept of it says."""
        self.record: Record | None = None
        """What is kept of it, if its client may lose its connection."""
        self.told: list[Frame] = []
        """Frames that need no computing: of what was kept of it."""
        self.drafted = 0
        self.accepted = 0
        self.started = 0.0
        """Monotonic time of the first row computed; 0: still waiting."""
        self.first_token = 0.0
        self.queued = 0.0

    def cost(self, sequence: "Sequence") -> int:
        """Tokens that one of its sequences wants; only the first is charged for the prompt."""
        wanted = sequence.limit
        if self.request.max_tokens is None:
            wanted = min(wanted, UNSTATED)
        return wanted + (len(self.prompt) if sequence is self.sequences[0] else 0)

    def start(self) -> bool:
        """One of its sequences got a slot; returns whether it is the first."""
        if self.started:
            return False
        self.started = time.monotonic()
        self.queued = max(0.0, time.time() - self.received)
        return True

    def end(self) -> End:
        """The last frame, with usage and timings."""
        now = time.monotonic()
        first = self.first_token or now
        started = self.started or first
        return End(
            self.attempt,
            Usage(
                prompt=len(self.prompt),
                completion=self.completion,
                cached=self.cached,
                drafted=self.drafted,
                accepted=self.accepted,
            ),
            Timings(
                queue_ms=round(self.queued * 1e3, 3),
                prefill_ms=round((first - started) * 1e3, 3),
                decode_ms=round((now - first) * 1e3, 3),
                replayed=self.replayed,
            ),
        )
