"""What speculation is told and keeps of a sequence, and what it counts of all."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from worker.engine.slots import Slot
from worker.engine.speculation.control import Chance, Shares
from worker.engine.speculation.drafter import Guesser
from worker.engine.speculation.ngram import Lookup, Proposal

__all__ = ("POSITIONS", "Candidate", "Counters", "Drafting")

POSITIONS = 16
"""Positions in a draft that are counted apart; the last takes all beyond."""

_SMALL_LAG = 64
"""Tokens that a draft model catches up with at once."""

_TRIED = 8
"""Steps after which it is seen whether a sequence copies."""


class Drafting:
    """What speculation knows of one sequence."""

    __slots__ = ("followed", "lookup", "matches", "proposal", "shares", "steps")

    def __init__(self, lookup: Lookup, shares: Sequence[float]) -> None:
        self.lookup = lookup
        self.shares = Shares(shares)
        self.matches = Chance(0.5, weight=0.5, memory=0.96)
        self.proposal: Proposal | None = None
        self.steps = 0
        """Steps since it began."""
        self.followed = 0.0
        """Share of its last steps that the lookup drafted for, about ten of them."""

    def may_catch_up(self, lag: int) -> bool:
        """Whether the draft model's lag is small, or it is known by now that the lookup will not do
        the work. Of a text that is mostly copied, the model would read all of the prompt for a few
        words, or, where it need not read, draft at a price what lookup finds a few tokens later.
        """
        return lag <= _SMALL_LAG or (self.steps >= _TRIED and self.followed < 0.5)


class Candidate(NamedTuple):
    """A sequence that decodes one token in this step."""

    drafting: Drafting
    slot: Slot
    room: int
    """Draft tokens that may follow: what its limit and its context leave."""
    guesser: Callable[[], Guesser]
    """For the draft model, if the sequence is drafted for."""
    allowed: Callable[[Sequence[int]], int]
    """How many tokens of a proposal its constraint lets follow."""


class Counters:
    """What was drafted and accepted since the start, by position in the draft."""

    def __init__(self) -> None:
        self.drafted = [0] * POSITIONS
        self.accepted = [0] * POSITIONS
        self.earned = 0.0
        self.spent = 0.0

    def count(self, drafted: int, accepted: int) -> None:
        """Count one sequence's draft."""
        last = POSITIONS - 1
        for position in range(drafted):
            self.drafted[min(position, last)] += 1
        for position in range(accepted):
            self.accepted[min(position, last)] += 1

    @property
    def gain(self) -> float:
        """Seconds that what came while speculating would have taken without, over those it took."""
        return round(self.earned / self.spent, 3) if self.spent else 1.0

    @staticmethod
    def trimmed(counts: Sequence[int]) -> tuple[int, ...]:
        """Without the positions that no draft reached."""
        reached = max((i + 1 for i, count in enumerate(counts) if count), default=0)
        return tuple(counts[:reached])
