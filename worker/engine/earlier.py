"""What there is of an answer before it goes on: from its router, from its client, from the log.

A router that lost an attempt brings all tokens that came. A client that lost its connection says
only how many it has, and a check of them: the tokens are in the log, if this worker had the answer
and it was not long ago. Where they are not, they are generated once more.
"""

from typing import TypeVar

from shared.errors import InvalidRequest
from shared.protocol import Frame, Generate, Had, Resumed
from shared.token_check import extend_check
from worker.engine.quiet import Quiet
from worker.engine.reading_log import ReadingLog, Record
from worker.engine.sequence import Sequence

__all__ = ("Earlier",)

T = TypeVar("T")


class Earlier:
    """Of one request; used by the intake's thread.

    Raises:
        InvalidRequest: what was brought is not of as many choices as are wanted.
    """

    def __init__(self, request: Generate, log: ReadingLog) -> None:
        reading = request.reading
        self._had = _of_all(request, reading.had if reading else (), Had(), "reading")
        resumed = _of_all(request, request.resume, Resumed(), "resume")
        self.resumed = tuple(
            Resumed(done=had.count) if had.done else before
            for before, had in zip(resumed, self._had, strict=True)
        )
        """By choice, what the router brings, or nobody needs to bring."""
        self._continues = reading is not None and bool(reading.had)
        self._logprobs = request.logprobs is not None
        self._kept = log.find(request)
        self.record = (
            None
            if reading is None
            else Record((request.owner, reading.key), request.attempt, request.n)
        )
        """What is to be kept; begins with what there is."""
        self.begun = any(
            before.tokens or (before.done >= 0 and not had.done)
            for before, had in zip(self.resumed, self._had, strict=True)
        )
        """Whether a router, or what was kept, says that somebody is in the middle of reading."""
        if self.record is not None and self._kept is not None:
            for choice, had in enumerate(self._had):
                if had.done:
                    tokens, over = self._kept.tokens[choice], self._kept.over[choice]
                    self.record.take(choice, tokens, over)

    def quiet(self, choice: int) -> Quiet | None:
        """What not to tell; None: all is to be told as it comes."""
        return Quiet(self._had[choice]) if self._continues else None

    def bring(self, sequence: Sequence, frames: list[Frame]) -> None:
        """Take a choice to where it goes on; `frames` gets what of it can be told at once.

        Raises:
            InvalidRequest: the tokens cannot be an output of this request on this model.
            CannotContinue: the client has others.
        """
        choice = sequence.choice
        tokens = self.resumed[choice].tokens
        over = None
        if tokens:
            sequence.replay(tokens)
        elif (kept := self._kept) is not None and self._fits(kept, choice):
            # In this order: the loop may be adding to both, and tokens come before the end.
            over = kept.over[choice]
            tokens = tuple(kept.tokens[choice])
            if self._logprobs and len(tokens) > self._had[choice].count:
                # Those behind what the client has are to be told with log probabilities.
                tokens, over = tokens[: self._had[choice].count], None
            sequence.recall(tokens, over, frames)
            self.begun = True
        if self.record is not None:
            self.record.take(choice, tokens, sequence.over)

    def _fits(self, kept: Record, choice: int) -> bool:
        """Whether it begins with what the client has, as far as it goes."""
        had, tokens = self._had[choice], kept.tokens[choice]
        if len(tokens) < had.count:
            return kept.over[choice] is None
        return extend_check(0, tokens[: had.count]) == had.check


def _of_all(request: Generate, brought: tuple[T, ...], nothing: T, param: str) -> tuple[T, ...]:
    if not brought:
        return (nothing,) * request.n
    if len(brought) != request.n:
        raise InvalidRequest(
            f"{param}: it has {len(brought)} choices; the request has {request.n}", param=param
        )
    return brought
