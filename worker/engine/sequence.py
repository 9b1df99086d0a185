"""A sequence: the state of one choice of a job that is being generated.

Turns sampled tokens into frames: text assembly, stop strings, reasoning, tool calls, logprobs.
Takes in silence the tokens that earlier attempts told, and tells without text those that the client
has. Knows nothing of batches or the KV cache.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from typing import Literal, NamedTuple

from shared.errors import InvalidRequest
from shared.protocol import Delta, Done, Frame, TokenLogprob, ToolDelta
from worker.engine.constraint import Matcher
from worker.engine.draft_guesser import DraftGuesser
from worker.engine.draws import uniform
from worker.engine.job import Job
from worker.engine.quiet import Quiet
from worker.engine.sampling import (
    Logits,
    Sampler,
    choose,
    log_probabilities,
    most_likely,
)
from worker.engine.scheduler import Left, stretch
from worker.engine.slots import Slot
from worker.engine.speculation.candidates import Drafting
from worker.engine.telling import Telling
from worker.engine.text import TextAssembler
from worker.engine.tiles import ahead
from worker.engine.tools import ReasoningParser, ToolParser

__all__ = ("Advance", "NoTokenLeft", "Sequence")

Reason = Literal["stop", "length", "tool_calls"]


class Taken(NamedTuple):
    """What a token makes certain."""

    content: str
    reasoning: str
    deltas: tuple[ToolDelta, ...]
    over: Reason | None
    """Why the choice is complete with it, if it is."""


class NoTokenLeft(Exception):
    """The constraint and the biases together forbid every token."""


class Advance(NamedTuple):
    """What one step brought a sequence."""

    tokens: list[int]
    """Emitted, in order; an end token is not among them."""
    complete: bool
    rows: int
    """Rows sampled from: the last token and the draft tokens before the last one sampled."""


class Sequence:
    """One choice of a job."""

    __slots__ = (
        "_assembler",
        "_matcher",
        "_pieces",
        "_plain",
        "_quiet",
        "_reasoning",
        "_sampler",
        "_tools",
        "choice",
        "count",
        "drafting",
        "job",
        "limit",
        "over",
        "slot",
        "tokens",
    )

    def __init__(
        self,
        job: Job,
        choice: int,
        *,
        limit: int,
        pieces: list[bytes],
        matcher: Matcher | None,
        tools: ToolParser | None,
        reasoning: ReasoningParser | None,
        quiet: Quiet | None = None,
    ) -> None:
        self.job = job
        self.choice = choice
        self.count = 0
        self.limit = limit
        self.tokens = job.prompt
        """What is to be computed before anything is sampled: the prompt, and behind it what was
        replayed."""
        self.over: Reason | None = None
        """Why nothing is left to sample."""
        self.slot: Slot | None = None
        self.drafting: Drafting | None = None
        """None: nothing is drafted for it."""
        self._pieces = pieces
        self._assembler = TextAssembler(pieces, job.request.stop)
        self._matcher = matcher
        self._tools = tools
        self._reasoning = reasoning
        self._quiet = quiet
        self._sampler = Sampler(job.request.sampling, job.prompt, job.end_tokens)
        self._plain = (
            self._sampler.unchanging
            and matcher is None
            and tools is None
            and reasoning is None
            and quiet is None
            and job.request.logprobs is None
        )
        """A token is sampled and its text is told, and that is all."""

    @property
    def remaining(self) -> int:
        """Tokens that are yet to be computed; 0 without a slot."""
        slot = self.slot
        return 0 if slot is None else len(slot.tokens) - slot.cached

    @property
    def place(self) -> int:
        """The number of its slot; -1 without one."""
        return -1 if self.slot is None else self.slot.index

    @property
    def computed(self) -> int:
        """Tokens that are in the cache."""
        return 0 if self.slot is None else self.slot.cached

    @property
    def left(self) -> Left:
        """What is left to compute of its prompt, or else of what is replayed."""
        slot = self.slot
        if slot is None:
            return Left(0, 0, 0)
        rows = stretch(slot.cached, slot.prompt_size, len(slot.tokens))
        if slot.cached >= slot.prompt_size:
            return Left(rows, slot.cached, rows)
        next_rows, wide = ahead(slot.spans, slot.cached, slot.prompt_size)
        return Left(rows, slot.cached, next_rows, wide)

    @property
    def awaited(self) -> bool:
        """It goes on after an attempt that was lost: its client reads, and nothing comes yet."""
        return self.job.replayed > 0 and self.remaining > 1

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

    def advance(self, rows: Logits, draft: Tokens[int], frames: list[Frame]) -> Advance:
        """Sample and emit tokens as long as the draft foretold them, and the one after.

        Args:
            rows: logits after the last token and after each of the draft, (1 + draft, vocabulary);
                may be written to.
            draft: what was computed on trial; each token stands if it is the one that is sampled.
            frames: gets what is to be told.

        Raises:
            NoTokenLeft: no token may follow.
        """
        if self._plain and not draft:
            return self._advance_plainly(rows[0], frames)
        emitted: list[int] = []
        telling = Telling(self.job.attempt, self.choice, self.count, frames)
        for used, row in enumerate(rows, start=1):
            token, complete = self._emit(row, emitted, telling)
            if complete or used > len(draft) or token != draft[used - 1]:
                telling.tell()
                if complete:
                    self._finish(complete, frames)
                return Advance(emitted, bool(complete), used)
        raise ValueError("there is a row more than the draft has tokens")

    def _advance_plainly(self, row: Logits, frames: list[Frame]) -> Advance:
        """As `advance` does, for most sequences in most steps: every Python operation between two
        steps is paid for with the caches that the step has left cold.
        """
        token = self.sample(row)
        job = self.job
        if token in job.end_tokens:
            self._finish("stop", frames)
            return Advance([], True, 1)
        text, stopped = self._assembler.push(token)
        frames.append(Delta(job.attempt, self.choice, self.count, (token,), text))
        self.count += 1
        job.completion += 1
        if stopped or self.count >= self.limit:
            self._finish("stop" if stopped else "length", frames)
            return Advance([token], True, 1)
        return Advance([token], False, 1)

    def _emit(self, row: Logits, emitted: list[int], telling: Telling) -> tuple[int, Reason | None]:
        """One token; with the reason if the choice is complete."""
        job = self.job
        wanted = job.request.logprobs
        raw = log_probabilities(row) if wanted is not None else None
        token = self.sample(row)
        if token in job.end_tokens:
            return token, "stop"
        emitted.append(token)
        taken = self._take(token)
        if self._had(token, telling):
            return token, taken.over
        logprobs: tuple[TokenLogprob, ...] = ()
        if raw is not None and wanted is not None:
            top = tuple(self._logprob(t, float(raw[t])) for t in most_likely(raw, wanted))
            logprobs = (self._logprob(token, float(raw[token]), top),)
        telling.add(token, taken.content, logprobs, taken.deltas, taken.reasoning)
        return token, taken.over

    def _take(self, token: int) -> Taken:
        """Let everything that follows the output know of its next token."""
        self._sampler.accept(token)
        self.count += 1
        self.job.completion += 1
        text, stopped = self._assembler.push(token)
        content, reasoning, deltas = self._parse(text)
        over: Reason | None = "length" if self.count >= self.limit else None
        if not stopped and self._matcher is not None:
            self._matcher.accept(token)
            stopped = self._matcher.stopped
        if stopped or (self._tools is not None and self._tools.finished):
            over = "stop"
        return Taken(content, reasoning, deltas, over)

    # going on after an attempt, or a client's connection, that was lost

    def _had(self, token: int, telling: Telling) -> bool:
        """Whether the client has the token just taken; then it is told, without its text.

        Raises:
            CannotContinue: the client has another one.
        """
        if self._quiet is None or not self._quiet.covers(token, self.count):
            return False
        telling.add(token, "", (), (), "")
        if self._quiet.ends(self.count):
            telling.tell()
        return True

    def replay(self, tokens: Tokens[int]) -> None:
        """Take the tokens that earlier attempts told as if they had been sampled, telling nothing.

        Raises:
            InvalidRequest: they cannot be an output of this request on this model.
            CannotContinue: the client has others.
        """
        for token, _ in self._retake(tokens):
            if self._quiet is not None:
                self._quiet.covers(token, self.count)
        self._ended_quietly()

    def recall(self, tokens: Tokens[int], over: Reason | None, frames: list[Frame]) -> None:
        """Take the tokens that were kept of the answer, and tell them as if they had been sampled.

        Without log probabilities, which are not kept.

        Args:
            tokens: from the first one on.
            over: why the choice was complete with them, if it was.
            frames: gets what is to be told.

        Raises: as `replay`.
        """
        telling = Telling(self.job.attempt, self.choice, 0, frames)
        for token, taken in self._retake(tokens):
            if not self._had(token, telling):
                telling.add(token, taken.content, (), taken.deltas, taken.reasoning)
        telling.tell()
        self.over = self.over or over
        self._ended_quietly()

    def _ended_quietly(self) -> None:
        if self.over is not None and self._quiet is not None:
            self._quiet.end(self.count)

    def _retake(self, tokens: Tokens[int]) -> Iterator[tuple[int, Taken]]:
        fit = self.allowed(tokens)
        for index, token in enumerate(tokens):
            if index >= fit or self.over == "stop" or not 0 <= token < len(self._pieces):
                raise InvalidRequest(
                    f"token {index} of choice {self.choice} cannot have been sampled",
                    param="resume",
                )
            taken = self._take(token)
            self.over = taken.over
            yield token, taken
        self.tokens = [*self.job.prompt, *tokens]

    def finish(self, frames: list[Frame]) -> None:
        """Tell the end of a choice that is `over` with what was replayed."""
        if self.over is not None:
            self._finish(self.over, frames)

    # speculation

    def guesser(self) -> DraftGuesser:
        """What draws the draft tokens that are to follow."""
        matcher = self._matcher.fork() if self._matcher is not None else None
        return DraftGuesser(self, self._sampler, matcher)

    def allowed(self, tokens: Tokens[int]) -> int:
        """How many of these tokens the constraint lets follow."""
        return len(tokens) if self._matcher is None else self._matcher.allowed(tokens)

    def _parse(self, text: str) -> tuple[str, str, tuple[ToolDelta, ...]]:
        reasoning = ""
        deltas: tuple[ToolDelta, ...] = ()
        if text and self._reasoning is not None:
            text, reasoning = self._reasoning.push(text)
        if text and self._tools is not None:
            text, deltas = self._tools.push(text)
        return text, reasoning, deltas

    def _finish(self, reason: Reason, frames: list[Frame]) -> None:
        self.over = reason
        self._ended_quietly()
        stopped_by = self._assembler.stopped_by
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
        told = self._quiet is not None and self._quiet.whole
        if (text or reasoning or deltas) and not told:
            frames.append(
                Delta(job.attempt, self.choice, self.count, (), text, (), deltas, reasoning)
            )
        frames.append(Done(job.attempt, self.choice, self.count, reason, stopped_by))

    def _logprob(
        self, token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()
    ) -> TokenLogprob:
        data = self._pieces[token]
        return TokenLogprob(token, logprob, data.decode(errors="replace"), data, top)
