"""What draws a sequence's draft tokens, so that they agree with samples as often as they can."""

from typing import TYPE_CHECKING

from shared.errors import MeshError
from worker.engine.constraint import Matcher
from worker.engine.draws import uniform
from worker.engine.sampling import Logits, Sampler, choose, confidence

if TYPE_CHECKING:
    from worker.engine.sequence import Sequence

__all__ = ("DraftGuesser",)


class DraftGuesser:
    """Draws a sequence's draft tokens as the sequence itself will draw: with the same parameters
    and random numbers, so that drafts agree with samples as often as they can.
    """

    __slots__ = ("_index", "_matcher", "_over", "_sampler", "_sequence")

    def __init__(self, sequence: "Sequence", sampler: Sampler, matcher: Matcher | None) -> None:
        self._sequence = sequence
        self._sampler = sampler
        self._matcher = matcher
        self._index = sequence.count
        self._over = False

    def guess(self, row: Logits) -> tuple[int, float]:
        """The next draft token, and how sure the draft is of it, 0 to 1.

        Where the constraint lets nothing follow, the token means nothing, and its sureness is 0.
        """
        if self._over:
            return 0, 0.0
        if not self._sampler.plain:
            self._sampler.adjust(row)
        try:
            if self._matcher is not None:
                self._matcher.apply(row)
        except MeshError:
            # The sequence's own matcher will say so when it comes to this token.
            self._over = True
            return 0, 0.0
        sequence = self._sequence
        params = sequence.job.request.sampling
        token = choose(row, params, uniform(params.seed, sequence.choice, self._index))
        self._index += 1
        if row[token] == -float("inf"):
            self._over = True
            return token, 0.0
        sure = confidence(row, token, params.temperature or 1.0)
        if self._matcher is not None:
            self._over = not self._matcher.accept(token) or self._matcher.stopped
        return token, sure
