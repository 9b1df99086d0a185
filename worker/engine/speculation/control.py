"""How many tokens to draft: as many as bring most tokens a second by what was measured. Pure.

A step verifies drafts of one length for all its sequences: llama.cpp computes sequences with
different numbers of rows in passes of their own (`llama_batch_allocr::split_equal`), each of which
reads all weights. Where only some sequences have anything to draft, a second pass for them alone
is compared with padding the others.

With p(i, j) the chance that the first j draft tokens of sequence i are all accepted, a step of S
sequences with drafts of length k brings S + sum of p(i, 1..k) tokens, as in Leviathan, Kalman and
Matias, Fast Inference from Transformers via Speculative Decoding (2023), equation 1.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

__all__ = (
    "LENGTHS",
    "MOST_ROWS",
    "Chance",
    "Plan",
    "Prospect",
    "Shares",
    "best_plan",
    "drafting_plan",
)

LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 40, 48)

MOST_ROWS = 60
"""Rows of one sequence in a step: from 64 on, flash attention rounds in another way (design, 8)."""

MOST_SECONDS = 0.15
"""What verifying may take, or `MOST_SLOWER` times a step without drafts if that is more: all its
tokens come at its end, and who leaves meanwhile is not heard before."""
MOST_SLOWER = 3.0

LEAST_GAIN = 1.03
"""Expected gain below which it is not tried: estimates are not better than that."""
LEAST_GAIN_TOGETHER = 1.1
"""The same for a draft model beside several sequences, of which the least sure sets the pace."""


class Chance:
    """The share of tries that succeed, forgetting old ones; starts as `prior`."""

    __slots__ = ("_hits", "_memory", "_tries")

    def __init__(self, prior: float, weight: float = 8.0, memory: float = 0.98) -> None:
        self._hits = prior * weight
        self._tries = weight
        self._memory = memory

    @property
    def mean(self) -> float:
        """Between 0 and 1."""
        return self._hits / self._tries

    def observe(self, hits: int, misses: int) -> None:
        """So many tries succeeded, so many failed."""
        tries = hits + misses
        keep = self._memory**tries
        self._hits = self._hits * keep + hits
        self._tries = self._tries * keep + tries

    def blended(self, prior: float, weight: float) -> float:
        """The mean, with `weight` more tries at `prior`."""
        return (self._hits + prior * weight) / (self._tries + weight)

    def relax(self, prior: float, share: float) -> None:
        """Move a share of the way towards `prior`: what is not tried may have changed."""
        self._hits += (prior * self._tries - self._hits) * share


class Shares:
    """How often each of some outcomes comes, forgetting old ones."""

    __slots__ = ("_counts", "_memory")

    def __init__(self, prior: Sequence[float], weight: float = 8.0, memory: float = 0.97) -> None:
        total = sum(prior)
        self._counts = [share / total * weight for share in prior]
        self._memory = memory

    @property
    def shares(self) -> list[float]:
        """They add up to 1."""
        total = sum(self._counts)
        return [count / total for count in self._counts]

    def observe(self, outcome: int) -> None:
        """Outcome number `outcome` came."""
        self._counts = [count * self._memory for count in self._counts]
        self._counts[outcome] += 1.0

    def relax(self, prior: Sequence[float], share: float) -> None:
        """Move a share of the way towards `prior`, which adds up to 1."""
        total = sum(self._counts)
        self._counts = [
            count + (wanted * total - count) * share
            for count, wanted in zip(self._counts, prior, strict=True)
        ]


class Prospect(NamedTuple):
    """What tokens that were looked up for a sequence promise."""

    chance: float
    """That a draft token is accepted if those before it were."""
    most: int
    """Draft tokens there are; 0: none."""


class Plan(NamedTuple):
    """Draft tokens for each sequence that has a prospect, or for all, padded; 0: none."""

    length: int
    padded: bool
    rate: float
    """Expected tokens/s."""
    gain: float
    """Over the rate without drafts."""


def best_plan(
    prospects: Sequence[Prospect],
    target: Callable[[int], float],
    *,
    most_rows: int,
) -> Plan:
    """Compare all lengths of drafts that cost nothing to make, and none.

    Args:
        prospects: one for each sequence of the step.
        target: seconds of a target pass by rows.
        most_rows: rows that a step can have in all.
    """
    count = len(prospects)
    alone = target(count)
    plain = count / alone
    best = Plan(0, False, plain, 1.0)
    hopeful = [p for p in prospects if p.most and p.chance > 0]
    if not hopeful:
        return best
    longest = max(p.most for p in hopeful)
    reach = [1.0] * len(hopeful)
    tokens, done = float(count), 0
    for length in LENGTHS:
        if length > longest or 1 + length > MOST_ROWS:
            break
        while done < length:
            for i, prospect in enumerate(hopeful):
                if done < prospect.most:
                    reach[i] *= prospect.chance
                    tokens += reach[i]
            done += 1
        shapes = [(count * (1 + length), target(count * (1 + length)), True)]
        if len(hopeful) < count:
            rows = count + len(hopeful) * length
            shapes.append((rows, alone + target(len(hopeful) * length), False))
        for rows, seconds, padded in shapes:
            rate = tokens / seconds
            bound = max(MOST_SECONDS, MOST_SLOWER * alone)
            if rows <= most_rows and seconds <= bound and rate > best.rate:
                best = Plan(length, padded, rate, rate / plain)
    return best if best.gain >= LEAST_GAIN else Plan(0, False, plain, 1.0)


def drafting_plan(
    count: int,
    shares: Sequence[float],
    chances: Sequence[float],
    target: Callable[[int], float],
    draft: Callable[[int], float],
    *,
    most: int,
    begin: int = 1,
    overhead: float = 0.0,
) -> Plan:
    """What a draft model promises that stops where it is no longer sure, whatever it comes to.

    Drafting goes on while tokens come out of the classes of sureness that are worth it: with
    probability p, and then right with chance a. So the token at depth j is drafted with p^(j-1),
    and stands with (p a)^j; all cuts between classes and all greatest lengths are compared.

    Args:
        count: sequences of the step, which are taken to behave alike.
        shares: how often draft tokens are of each class.
        chances: that a token of each class is right, if those before it are.
        target: seconds of a target pass by rows.
        draft: seconds of a pass of the draft model by rows.
        most: draft tokens there can be, at least 1.
        begin: rows of each sequence in the first pass of the draft model.
        overhead: seconds that catching up costs for each token that every sequence will have.
    """
    alone = target(count)
    plain = count / alone
    best = Plan(0, True, plain, 1.0)
    passing = right = 0.0
    verifying = [target(count * (1 + length)) for length in range(most + 1)]
    first, drafting = draft(count * begin), draft(count)
    for chance, share in sorted(zip(chances, shares, strict=True), reverse=True):
        passing = min(1.0, passing + share)
        right += share * chance
        tokens, seconds, drafted, stands = 1.0, first - drafting, 1.0, 1.0
        for length in range(1, most + 1):
            # this token is drafted, and either it is not worth its row, or drafting may go on
            seconds += drafted * (drafting + (1.0 - passing) * verifying[length - 1])
            drafted *= passing
            stands *= right
            tokens += stands
            rate = count * tokens / (seconds + drafted * verifying[length] + overhead * tokens)
            if rate > best.rate:
                best = Plan(length, True, rate, rate / plain)
    least = LEAST_GAIN if count == 1 else LEAST_GAIN_TOGETHER
    return best if best.gain >= least else Plan(0, True, plain, 1.0)
