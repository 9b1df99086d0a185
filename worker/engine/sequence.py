"""A job (one request) and its sequences (one a choice): state of what is being generated.

Turns sampled tokens into frames: text assembly, stop strings, reasoning, tool calls, logprobs.
Knows nothing of batches or the KV cache.
"""

import time
from typing import Literal

from shared.protocol import (
    Delta,
    Done,
    End,
    Frame,
    Generate,
    Timings,
    TokenLogprob,
    ToolDelta,
    Usage,
)
from worker.engine.constraint import Matcher
from worker.engine.draws import uniform
from worker.engine.sampling import Logits, Sampler, choose, log_probabilities, most_likely
from worker.engine.slots import Slot
from worker.engine.text import TextAssembler
from worker.engine.tools import ReasoningParser, ToolParser

__all__ = ("Job", "NoTokenLeft", "Sequence")

Reason = Literal["stop", "length", "tool_calls"]


class NoTokenLeft(Exception):
    """The constraint and the biases together forbid every token."""


class Sequence:
    """One choice of a job."""

    __slots__ = (
        "_assembler",
        "_matcher",
        "_pieces",
        "_reasoning",
        "_sampler",
        "_tools",
        "choice",
        "count",
        "job",
        "limit",
        "slot",
    )

    def __init__(
        self,
        job: "Job",
        choice: int,
        *,
        limit: int,
        pieces: list[bytes],
        matcher: Matcher | None,
        tools: ToolParser | None,
        reasoning: ReasoningParser | None,
    ) -> None:
        self.job = job
        self.choice = choice
        self.count = 0
        self.limit = limit
        self.slot: Slot | None = None
        self._pieces = pieces
        self._assembler = TextAssembler(pieces, job.request.stop)
        self._matcher = matcher
        self._tools = tools
        self._reasoning = reasoning
        self._sampler = Sampler(job.request.sampling, job.prompt, job.end_tokens)

    def sample(self, row: Logits) -> int:
        """Draw the next token from a row of logits, which may be written to.

        Raises:
            NoTokenLeft: no token may follow.
        """
        sampler = self._sampler
        if not sampler.plain:
            sampler.adjust(row)
        if self._matcher is not None:
            self._matcher.apply(row)
        params = self.job.request.sampling
        if sampler.greedy:
            token = int(row.argmax())
        else:
            token = choose(row, params, uniform(params.seed, self.choice, self.count))
        if row[token] == -float("inf"):
            raise NoTokenLeft
        return token

    def advance(self, row: Logits, frames: list[Frame]) -> tuple[int, bool]:
        """Sample, emit frames, and return (token, whether the choice is complete)."""
        job = self.job
        wanted = job.request.logprobs
        raw = log_probabilities(row) if wanted is not None else None
        token = self.sample(row)
        if token in job.end_tokens:
            self._finish("stop", frames)
            return token, True
        self._sampler.accept(token)
        first = self.count
        self.count += 1
        job.completion += 1
        text, stopped = self._assembler.push(token)
        content, reasoning, deltas = self._parse(text)
        logprobs: tuple[TokenLogprob, ...] = ()
        if raw is not None and wanted is not None:
            top = tuple(self._logprob(t, float(raw[t])) for t in most_likely(raw, wanted))
            logprobs = (self._logprob(token, float(raw[token]), top),)
        frames.append(
            Delta(job.attempt, self.choice, first, (token,), content, logprobs, deltas, reasoning)
        )
        if stopped:
            self._finish("stop", frames, stopped_by=self._assembler.stopped_by)
            return token, True
        if self._matcher is not None:
            self._matcher.accept(token)
            if self._matcher.stopped:
                self._finish("stop", frames)
                return token, True
        if self._tools is not None and self._tools.finished:
            self._finish("stop", frames)
            return token, True
        if self.count >= self.limit:
            self._finish("length", frames)
            return token, True
        return token, False

    def _parse(self, text: str) -> tuple[str, str, tuple[ToolDelta, ...]]:
        reasoning = ""
        deltas: tuple[ToolDelta, ...] = ()
        if text and self._reasoning is not None:
            text, reasoning = self._reasoning.push(text)
        if text and self._tools is not None:
            text, deltas = self._tools.push(text)
        return text, reasoning, deltas

    def _finish(self, reason: Reason, frames: list[Frame], stopped_by: str = "") -> None:
        tail = "" if stopped_by else self._assembler.flush()
        text, reasoning, deltas = self._parse(tail)
        if self._reasoning is not None:
            more, more_reasoning = self._reasoning.flush()
            reasoning += more_reasoning
            if more and self._tools is not None:
                more, more_deltas = self._tools.push(more)
                deltas += more_deltas
            text += more
        if self._tools is not None:
            more, more_deltas = self._tools.flush()
            text += more
            deltas += more_deltas
            if self._tools.called and reason == "stop":
                reason = "tool_calls"
        job = self.job
        if text or reasoning or deltas:
            frames.append(
                Delta(job.attempt, self.choice, self.count, (), text, (), deltas, reasoning)
            )
        frames.append(Done(job.attempt, self.choice, self.count, reason, stopped_by))

    def _logprob(
        self, token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()
    ) -> TokenLogprob:
        data = self._pieces[token]
        return TokenLogprob(token, logprob, data.decode(errors="replace"), data, top)


class Job:
    """One generation request with its sequences and its account of tokens and time."""

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
        self.sequences: list[Sequence] = []
        self.open = 0
        """Sequences not yet complete."""
        self.cached = 0
        self.completion = 0
        self.started = 0.0
        """Monotonic time of the first row computed; 0: still waiting."""
        self.first_token = 0.0
        self.queued = 0.0

    def start(self) -> None:
        """The first of its sequences got a slot."""
        if not self.started:
            self.started = time.monotonic()
            self.queued = max(0.0, time.time() - self.received)

    def end(self) -> End:
        """The last frame, with usage and timings."""
        now = time.monotonic()
        first = self.first_token or now
        return End(
            self.attempt,
            Usage(prompt=len(self.prompt), completion=self.completion, cached=self.cached),
            Timings(
                queue_ms=round(self.queued * 1e3, 3),
                prefill_ms=round((first - self.started) * 1e3, 3),
                decode_ms=round((now - first) * 1e3, 3),
            ),
        )
