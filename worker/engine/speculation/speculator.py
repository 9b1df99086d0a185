"""Drafts for the sequences of a step, and what is learnt from how they fared.

Per sequence an n-gram lookup and chances of its own; for all of them the chances by how long a
match was and by how sure the draft model was, the costs, and the accounts.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from worker.engine.slots import Placement
from worker.engine.speculation.account import Account, Outcome
from worker.engine.speculation.candidates import POSITIONS, Candidate, Counters, Drafting
from worker.engine.speculation.control import (
    MOST_ROWS,
    Chance,
    Plan,
    Prospect,
    Shares,
    best_plan,
    drafting_plan,
)
from worker.engine.speculation.costs import StepCost
from worker.engine.speculation.drafter import Drafter
from worker.engine.speculation.memory import Memory
from worker.engine.speculation.ngram import Lookup
from worker.engine.speculation.priors import (
    MATCHES,
    SHARES,
    SURENESS,
    match_class,
    sureness_class,
)

__all__ = ("Speculator",)

Kind = Literal["draft", "ngram"]

_RELAXED = 0.01
"""Share of the way back to what is usual that a sequence's chances move in a step without drafts:
text changes, and after some 100 tokens it is worth another try."""
_RELAXED_FOR_ALL = 0.00003
"""The same of what was learnt from all sequences: some thousand steps, as the longest pause."""
_HORIZON = 256
"""Tokens over which the time is spread, at most, that a lagging draft model takes to catch up."""
_REPAID = 1 / 32
"""Of what catching up took, the part that each step booked after it bears: booked at once, it would
make any draft model look like a loss."""
_LEAST_TOGETHER = 1.05
"""What speculation for several sequences must earn: the time of a step without is measured seldom
while it goes on, and this is how far it may be off."""
_LONGEST = 0.1
_LONGEST_BESIDE_PLAIN = 1.5
"""Seconds that a call with drafts may take, or how often as long as one without if that is more:
the tokens of a step come together, and a client that leaves is heard of when it ends."""
_PLAIN_EVERY = 128
"""Steps that speculate after which one does not, so that what it is compared with is measured."""
_RECONSIDERED = 32
"""Steps after which it is asked again whether so many sequences can gain at all."""


class _Step(NamedTuple):
    """What was drafted for a step."""

    kind: Kind
    sources: tuple[Kind | None, ...]
    """By candidate."""
    drafts: tuple[list[int], ...]
    real: tuple[int, ...]
    """Tokens of each draft that are no padding."""
    sure: tuple[list[float], ...]
    """How sure the draft was of each token."""
    seconds: Callable[[], float]


class Speculator:
    """Asked once a step; `propose`, then `verified` for each candidate, then `finished`."""

    def __init__(
        self,
        target: StepCost,
        *,
        drafter: Drafter | None,
        memory: Memory | None,
        most_rows: int,
    ) -> None:
        self.target = target
        self.drafter = drafter
        self.memory = memory
        self.counters = Counters()
        self._most_rows = most_rows
        self._rows = most_rows
        """That the call of this step may have."""
        self._matches = [Chance(prior, weight=8.0, memory=0.99) for _, prior in MATCHES]
        self._confidence = [Chance(prior, weight=8.0, memory=0.995) for prior in SURENESS]
        self._shares = Shares(SHARES, weight=32.0, memory=0.995)
        self._accounts: dict[tuple[Kind, int], Account] = {}
        self._streak = 0
        self._debt = 0.0
        """Seconds of catching up that are not booked yet."""
        self._step: _Step | None = None
        self._candidates: Sequence[Candidate] = ()
        self._outlooks: dict[int, tuple[bool, int]] = {}
        """By number of sequences: is it hopeless, and for how many steps is that not asked."""

    # sequences

    def begin(self, tokens: Sequence[int], owner: str) -> Drafting:
        """A sequence starts, with its prompt, or goes on, with what was written of it before."""
        # Half of what is usual and half of a hope: texts differ, and a few drafts tell.
        usual = zip(self._shares.shares, SHARES, strict=True)
        return Drafting(Lookup(tokens, self.memory, owner), [(a + b) / 2 for a, b in usual])

    def took(self, placement: Placement) -> None:
        """A slot has been given to a sequence."""
        if self.drafter is not None:
            self.drafter.took(placement.slot, placement.source, placement.reuse)

    def swapped(self, left: int, right: int) -> None:
        """Two slots have exchanged what they hold."""
        if self.drafter is not None:
            self.drafter.swapped(left, right)

    def remember(self, owner: str, tokens: Sequence[int], prompt_size: int) -> None:
        """A sequence has retired."""
        if self.memory is not None:
            self.memory.remember(owner, tokens, prompt_size)

    # a step

    def propose(
        self, candidates: Sequence[Candidate], clock: Callable[[], float]
    ) -> Sequence[list[int]]:
        """Draft tokens for each candidate; all empty: a step without speculation is faster.

        All that are not empty have one length, of which the end may be padding. `clock` tells
        seconds.
        """
        self._step = None
        count = len(candidates)
        if self._streak >= _PLAIN_EVERY:
            self._streak = 0
            return self._none(candidates)
        if self._is_hopeless(count):
            return self._none(candidates)
        began = clock()
        found = self._look_up(candidates)
        if self.drafter is None and not any(p.most for p in found):
            return self._none(candidates)
        self._rows = self._rows_for(count)
        plan, drafted = Plan(0, False, 0.0, 1.0), list[int]()
        kind: Kind = "ngram"
        if any(p.most for p in found) and self._account("ngram", count).is_open():
            plan = best_plan(found, self.target.seconds, most_rows=self._rows)
        if self.drafter is not None and self._account("draft", count).is_open():
            other, by_model = self._model_plan(self.drafter, candidates, found)
            if other.length and by_model and other.rate > plan.rate:
                plan, kind, drafted = other, "draft", by_model
        if not plan.length:
            return self._none(candidates)
        return self._make(candidates, plan, kind, found, drafted, clock, began)

    def verified(self, index: int, accepted: int, ended: bool, cached: int) -> int:
        """Candidate `index` had so many draft tokens accepted; `cached` tokens of its slot stand.

        `ended`: the sequence is over, and tells nothing of the token after. Returns how many
        tokens had been drafted for it.
        """
        step = self._step
        if step is None:
            return 0
        real = step.real[index]
        source = step.sources[index]
        if source == "draft" and self.drafter is not None:
            self.drafter.accepted(self._candidates[index].slot.index, cached)
        if not real:
            return 0
        hits = min(accepted, real)
        misses = 0 if hits == real or ended else 1
        drafting = self._candidates[index].drafting
        if source == "draft":
            for position in range(hits + misses):
                bucket = self._confidence[sureness_class(step.sure[index][position])]
                bucket.observe(int(position < hits), int(position >= hits))
        elif drafting.proposal is not None:
            drafting.matches.observe(hits, misses)
            match = drafting.proposal.match
            self._matches[match_class(match)].observe(hits, misses)
        self.counters.count(real, hits)
        return real

    def finished(self, tokens: int, target_seconds: float, rows: int) -> None:
        """The step is over: it brought so many tokens, with a target call of so many rows."""
        step = self._step
        if step is None:
            self.target.measured(rows, target_seconds)
            return
        count = len(step.drafts)
        drafted = sum(1 for draft in step.drafts if draft)
        if drafted in (0, count):
            self.target.measured(rows, target_seconds)
        self._streak += 1
        paid = self._debt * _REPAID if step.kind == "draft" else 0.0
        self._debt -= paid
        outcome = Outcome(tokens * self.target.seconds(count) / count, step.seconds() + paid)
        self._account(step.kind, count).book(outcome)
        self.counters.earned += outcome.earned
        self.counters.spent += outcome.spent
        self._step = None

    # parts of a step

    def _none(self, candidates: Sequence[Candidate]) -> Sequence[list[int]]:
        for candidate in candidates:
            candidate.drafting.steps += 1
            candidate.drafting.followed *= 0.9
            candidate.drafting.matches.relax(0.5, _RELAXED)
            candidate.drafting.shares.relax(SHARES, _RELAXED)
        for chance, prior in zip(self._confidence, SURENESS, strict=True):
            chance.relax(prior, _RELAXED_FOR_ALL)
        return [[] for _ in candidates]

    def _look_up(self, candidates: Sequence[Candidate]) -> list[Prospect]:
        prospects = []
        for candidate in candidates:
            drafting = candidate.drafting
            most = min(candidate.room, MOST_ROWS - 1)
            proposal = drafting.proposal = drafting.lookup.propose(most)
            if proposal is None:
                prospects.append(Prospect(0.0, 0))
                continue
            usual = self._matches[match_class(proposal.match)].mean
            chance = drafting.matches.blended(usual, 4.0)
            prospects.append(Prospect(chance, len(proposal.tokens)))
        return prospects

    def _model_plan(
        self, drafter: Drafter, candidates: Sequence[Candidate], found: Sequence[Prospect]
    ) -> tuple[Plan, list[int]]:
        """What the draft model promises, and for which candidates: for those where it knows more
        than the lookup.
        """
        count = len(candidates)
        chances = [chance.mean for chance in self._confidence]
        most = min(POSITIONS, self._rows // count - 1, *(c.room for c in candidates))
        drafted, total, overhead, begin = [], [0.0] * len(chances), 0.0, 1
        for i, (candidate, known) in enumerate(zip(candidates, found, strict=True)):
            shares = candidate.drafting.shares.shares
            right = sum(share * chance for share, chance in zip(shares, chances, strict=True))
            slot = candidate.slot
            found_better = known.most > 1 and known.chance >= right
            if found_better or not candidate.drafting.may_catch_up(drafter.lag(slot)):
                continue
            drafted.append(i)
            total = [sum(pair) for pair in zip(total, shares, strict=True)]
            overhead += drafter.catch_up_seconds(slot) / min(_HORIZON, 1 + candidate.room)
            begin = max(begin, drafter.begins_with(slot, count))
        if not drafted or most < 1:
            return Plan(0, True, 0.0, 1.0), []
        plan = drafting_plan(
            count,
            [share / len(drafted) for share in total],
            chances,
            self.target.seconds,
            drafter.cost.seconds,
            most=most,
            begin=begin,
            overhead=overhead,
        )
        return plan, drafted

    def _make(
        self,
        candidates: Sequence[Candidate],
        plan: Plan,
        kind: Kind,
        found: Sequence[Prospect],
        drafted: Sequence[int],
        clock: Callable[[], float],
        began: float,
    ) -> Sequence[list[int]]:
        drafts: list[list[int]] = [[] for _ in candidates]
        sources: list[Kind | None] = [None] * len(candidates)
        sure: list[list[float]] = [[] for _ in candidates]
        length = plan.length
        if drafted and self.drafter is not None:
            start = clock()
            ready = self.drafter.catch_up([candidates[i].slot for i in drafted])
            caught_up = clock() - start
            self._debt += caught_up
            began += caught_up
            if not ready:
                # It goes on in the next step; a draft model that lags is of no use yet.
                return self._none(candidates)
            made, confidences = self._draft(self.drafter, [candidates[i] for i in drafted], plan)
            for i, tokens, sureness in zip(drafted, made, confidences, strict=True):
                drafts[i], sure[i], sources[i] = tokens, sureness, "draft"
            length = len(made[0])
        for i, candidate in enumerate(candidates):
            proposal = candidate.drafting.proposal
            if sources[i] is None and found[i].most and proposal is not None:
                tokens_found = proposal.tokens[:length]
                drafts[i] = list(tokens_found[: candidate.allowed(tokens_found)])
                sources[i] = "ngram"
        real = tuple(map(len, drafts))
        length = max(real)
        if length:
            for i, candidate in enumerate(candidates):
                if drafts[i] or plan.padded:
                    drafts[i] += candidate.slot.tokens[-1:] * (length - len(drafts[i]))
        for candidate, source in zip(candidates, sources, strict=True):
            drafting = candidate.drafting
            drafting.steps += 1
            drafting.followed += ((source == "ngram") - drafting.followed) * 0.1
        self._candidates = candidates
        self._step = _Step(
            kind,
            tuple(sources),
            tuple(drafts),
            real,
            tuple(sure),
            lambda: clock() - began,
        )
        return drafts

    def _draft(
        self, drafter: Drafter, candidates: Sequence[Candidate], plan: Plan
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Draft as long as some length ahead is worth more than the best so far, which is kept.

        A length is worth its tokens less the tokens that its time would bring at the rate that is
        planned: where that is greatest, the rate is (Dinkelbach, On Nonlinear Fractional
        Programming, 1967). All lengths ahead are looked at, since costs rise in steps.
        """
        count = len(candidates)
        reach = [1.0] * count
        chances = [chance.mean for chance in self._confidence]
        means = [
            sum(
                share * chance
                for share, chance in zip(c.drafting.shares.shares, chances, strict=True)
            )
            for c in candidates
        ]
        draft_seconds = drafter.cost.seconds(count)
        most = min(POSITIONS, self._rows // count - 1, *(c.room for c in candidates))
        made = kept = 0
        tokens, best = 0.0, -plan.rate * self.target.seconds(count)

        def goes_on(sure: Sequence[float]) -> bool:
            nonlocal made, kept, tokens, best
            made += 1
            for i, confidence in enumerate(sure):
                eighth = sureness_class(confidence)
                reach[i] *= chances[eighth]
                candidates[i].drafting.shares.observe(eighth)
                self._shares.observe(eighth)
            tokens += sum(reach)
            worth = tokens - plan.rate * self.target.seconds(count * (1 + made))
            if worth > best:
                best, kept = worth, made
            hope, ahead = list(reach), tokens
            for length in range(made + 1, most + 1):
                hope = [h * mean for h, mean in zip(hope, means, strict=True)]
                ahead += sum(hope)
                seconds = self.target.seconds(count * (1 + length)) + draft_seconds * (
                    length - made
                )
                if ahead - plan.rate * seconds > best:
                    return True
            return False

        drafts, confidences = drafter.draft(
            [c.slot for c in candidates], [c.guesser() for c in candidates], most, goes_on
        )
        return [draft[:kept] for draft in drafts], [sure[:kept] for sure in confidences]

    def _rows_for(self, count: int) -> int:
        """That the call of a step with so many sequences may have."""
        longest = max(_LONGEST, _LONGEST_BESIDE_PLAIN * self.target.seconds(count))
        return self.target.rows_within(longest, count, self._most_rows)

    def _is_hopeless(self, count: int) -> bool:
        """With so many sequences even sure drafts would bring nothing."""
        hopeless, left = self._outlooks.get(count, (False, 0))
        if not left:
            sure = [Prospect(0.97, MOST_ROWS - 1)] * count
            most_rows = self._rows_for(count)
            hopeless = not best_plan(sure, self.target.seconds, most_rows=most_rows).length
            left = _RECONSIDERED
        self._outlooks[count] = hopeless, left - 1
        return hopeless

    def _account(self, kind: Kind, count: int) -> Account:
        key = (kind, count)
        account = self._accounts.get(key)
        if account is None:
            account = self._accounts[key] = Account(1.0 if count == 1 else _LEAST_TOGETHER)
        return account
