"""Which tokens go into the next decode call. Pure policy.

Running sequences get one row each, first; what the token budget leaves goes to prefills, half of it
to the oldest, then to the shortest. The budget follows what steps of late took
(`worker.engine.step_time`) and how much waits: a short prompt delays the tokens of others, and the
handling of a cancellation, by 80 ms or by half of what decoding takes, a long one by 0.4 s at most;
and by 8 rows more where a prompt ends with them, which alone would cost a step of their own.

What of a prompt is to be computed in whole tiles (`tiles.py`) has steps of its own, which take
turns with all others.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from worker.engine.step_time import StepTime

__all__ = ("REPLAY_ROWS", "Left", "Pace", "Piece", "plan", "stretch")

STEP_SECONDS_BESIDE_DECODE = 0.08
"""What a step is to take in all while others decode: it bounds the gaps between their tokens, and
the time until a cancellation is seen."""
STEP_SECONDS_ALONE = 0.25
MOST_SLOWDOWN = 0.5
"""By how much a prefill may lengthen a step whose decoding alone takes most of that time, by up to
`LONGEST_STEP_SECONDS`: with many streams a stricter bound would leave a slot idle for many steps,
and shorten no gap by much. 200 streams take 1.2 s a step on the project's EPYC: when prompts had an
eighth of a second of it, first tokens came after 100 s."""
LEAST_PREFILL = 8
"""Rows of prefill a step may always have. On a CPU that is slow enough to need it, 8 rows together
take hardly longer a row than 16 (SmolLM2 Q4_0, one thread: 6.0 and 4.8 ms; Q4_1: 9.0 and 9.4)."""
OLDEST_SHARE = 0.5
"""Of the prefill rows of a step, what the oldest prefill is sure of."""
LONGEST_STEP_SECONDS = 0.4
"""What a step may take in all where much of prompts waits to be computed."""
WORK_SHARE = 0.5
"""A step beside decoding may take this share of what all that waits would take at once. Small
pieces are dear: on the project's Xeon 8 rows behind 900 tokens take 50 ms, 64 take 190, so that in
pieces of 8 prompts of 1,500 tokens beside four streams came faster than they were computed, and the
streams were slower too (docs/benchmarks.md). What a short prompt adds to a few steps is little."""
REPLAY_ROWS = 63
"""Rows of a resumed answer's own tokens that are computed together at most."""
SURPRISE = 0.5
"""Where prompts took longer or shorter than expected by more than this share, beside decoding that
takes most of the step, it may be the decoding: the next step but a few only decodes."""
SURPRISE_EVERY = 4
"""Steps with rows of prompts before that may happen again."""
_GAIN = 0.3
"""Of the last step in the moving average of how long decoding takes."""
_NO_BOUND = 1 << 30
"""More than any step has."""
FIRST_PREFILL = 128
"""Rows of the first prefill, from which the speed is learnt."""
DECODE_ONLY_EVERY = 16
"""After so many steps with rows of prompts comes one without, however many wait: else what decoding
takes by now would be taken for the prompts' time, and fewer and fewer of their rows would fit."""


class Piece(NamedTuple):
    """Rows of one prompt in a step, or that are left of it."""

    rows: int
    depth: int
    """Tokens of its sequence that are computed before."""


class Left(NamedTuple):
    """What is left of a sequence."""

    rows: int
    """Its `stretch`; 1: it decodes."""
    depth: int
    """Tokens of it that are computed."""
    next: int
    """Of the rows, the first ones, that are all to be computed in the same way."""
    wide: bool = False
    """Those are whole tiles."""


class _Beside(NamedTuple):
    """A step with rows of prompts."""

    decoding: int
    piece: Piece
    """All of its prompts, at their depth in the mean."""
    times: StepTime
    """What its prompts took belongs to these."""
    seconds: float


class Pace:
    """Prefill rows a step may hold, from measured times."""

    def __init__(
        self, step_tokens: int, decode_seconds: Callable[[float], float], tile: int = 0
    ) -> None:
        """Know nothing yet of how long prompts take.

        Args:
            step_tokens: rows a step may have at most.
            decode_seconds: what a step took at load by its rows, one a sequence. Only how the times
                of several numbers of rows compare counts.
            tile: rows of a sequence from which on they are rounded otherwise; 0: they never are.
        """
        self._decode_seconds = decode_seconds
        self._most = step_tokens
        self._tile = tile
        self._narrow = tile - 1 if tile else step_tokens
        """Rows of a sequence in a piece that is not of whole tiles."""
        self._small = StepTime()
        """Of steps without whole tiles."""
        self._wide = StepTime()
        """Of steps with them."""
        self._wide_turn = True
        """Whether the next step is one of tiles, where there are others to do."""
        self._oldest_turn = True
        """Whether the next step of tiles is the oldest prompt's, or the shortest one's."""
        self._slowdown: float | None = None
        """How many times as long a step that only decodes takes as at load, a moving average."""
        self._mixed = 0
        """Steps of both since the last that only decoded."""
        self._surprises: list[_Beside] = []
        """Of them those that tell of prompts only once it is known how long decoding takes now."""

    def measured(self, decoding: int, pieces: Sequence[Piece], seconds: float) -> None:
        """A step of so many decoding sequences and these pieces of prompts took so long."""
        rows = sum(piece.rows for piece in pieces)
        if not rows:
            self._decoded(decoding, seconds)
            return
        wide = self._tile and max(piece.rows for piece in pieces) >= self._tile
        times = self._wide if wide else self._small
        all_of_them = Piece(rows, round(sum(one.rows * one.depth for one in pieces) / rows))
        step = _Beside(decoding, all_of_them, times, seconds)
        if not decoding:
            self._learn(step, 0.0)
            return
        self._mixed += 1
        decode, expected = self._decode(decoding), times.of(*all_of_them)
        if 2 * decode < seconds or abs(seconds - decode - expected) <= SURPRISE * expected:
            self._learn(step, decode)
        else:
            self._surprises.append(step)

    def _decoded(self, decoding: int, seconds: float) -> None:
        """A step of so many decoding sequences and nothing else took so long."""
        now = seconds / self._decode_seconds(decoding)
        before = now if self._slowdown is None or self._surprises else self._slowdown
        self._slowdown = before + _GAIN * (now - before)
        for step in self._surprises:
            self._learn(step, self._decode(step.decoding))
        self._surprises.clear()
        self._mixed = 0

    def _learn(self, step: _Beside, decode: float) -> None:
        """Of the step so many seconds went to decoding."""
        left = step.seconds - decode
        if step.piece.rows >= LEAST_PREFILL // 2 and left > 0:
            step.times.add(*step.piece, left)

    def _decode_only(self) -> bool:
        """Whether how long decoding takes is to be looked at again."""
        if not (self._small or self._wide):
            return self._mixed > 0
        return self._mixed >= (SURPRISE_EVERY if self._surprises else DECODE_ONLY_EVERY)

    def plan(self, left: Sequence[Left], *, urgent: bool = False) -> list[Piece]:
        """The next step: for each sequence, in the same order, the rows it has, or 0.

        Either whole tiles of one prompt and nothing beside, which llama.cpp would compute as a row
        of each and then what is left; or all others.

        Args:
            left: of each sequence, by age.
            urgent: somebody reads an answer that goes on only when its prefill is done. For him the
                others' tokens come as far apart as prefill steps without decoding are: a few of
                them, since what is computed together is computed faster.
        """
        prefills = [one for one in left if one.rows > 1]
        decoding = len(left) - len(prefills)
        work = self._seconds(prefills)
        tiled = [i for i, one in enumerate(left) if one.wide]
        if tiled:
            self._wide_turn = not self._wide_turn
            if len(tiled) == len(left) or not self._wide_turn:
                return self._tiles_of(left, tiled, decoding, work, urgent=urgent)
        if decoding and self._decode_only():
            budget = decoding
        else:
            shown = [Piece(one.next, one.depth) for one in prefills if not one.wide]
            budget = self.budget(decoding, shown, work=work, urgent=urgent)
        rows = plan([0 if one.wide else one.next for one in left], budget, self._narrow)
        return [Piece(count, one.depth) for count, one in zip(rows, left, strict=True)]

    def _tiles_of(
        self,
        left: Sequence[Left],
        tiled: Sequence[int],
        decoding: int,
        work: float,
        *,
        urgent: bool,
    ) -> list[Piece]:
        """A step of whole tiles of one of these prompts: of the oldest and the shortest by turns,
        so that each gets on whatever comes.
        """
        chosen = tiled[0]
        if not self._oldest_turn:
            chosen = min(tiled, key=lambda i: left[i].rows)
        self._oldest_turn = not self._oldest_turn
        times = self._wide or self._small
        rows = FIRST_PREFILL
        if times:
            # Two tiles at once are a tenth faster than one, and a prompt alone keeps nobody.
            alone = len(left) == 1
            bound = LONGEST_STEP_SECONDS if alone else self._time(decoding, work, urgent=urgent)
            rows = times.rows(bound, left[chosen].depth)
        most = min(max(rows, self._tile), self._most, left[chosen].next)
        step = [Piece(0, one.depth) for one in left]
        step[chosen] = Piece(most - most % self._tile, left[chosen].depth)
        return step

    def _time(self, decoding: int, work: float, *, urgent: bool) -> float:
        """Seconds that pieces of prompts may take in a step."""
        if not decoding:
            return STEP_SECONDS_ALONE
        least = STEP_SECONDS_ALONE if urgent else STEP_SECONDS_BESIDE_DECODE
        decode = self._decode(decoding)
        return max(
            min(LONGEST_STEP_SECONDS, max(least, WORK_SHARE * work)) - decode,
            min(decode * MOST_SLOWDOWN, LONGEST_STEP_SECONDS),
        )

    def _decode(self, decoding: int) -> float:
        """Seconds of a step in which so many decode and nothing else."""
        slowdown = 1.0 if self._slowdown is None else self._slowdown
        return slowdown * self._decode_seconds(decoding)

    def budget(
        self,
        decoding: int,
        prefills: Sequence[Piece] = (),
        *,
        work: float = 0.0,
        urgent: bool = False,
    ) -> int:
        """Rows for the next step in all, decode included.

        Args:
            decoding: sequences that decode.
            prefills: what is left of the others that may have rows, by age.
            work: seconds that all prefills together would take.
            urgent: as in `plan`.
        """
        times = self._small or self._wide
        if not times:
            return min(self._most, decoding + FIRST_PREFILL)
        left = self._time(decoding, work, urgent=urgent)
        depth = sum(piece.depth for piece in prefills) / len(prefills) if prefills else 0.0
        rows = max(LEAST_PREFILL, times.rows(left, depth))
        # A short rest would cost the next step a pass of its own, and its slot a step.
        for whole in (sum(piece.rows for piece in prefills), *(p.rows for p in prefills[:1])):
            if rows < whole <= rows + LEAST_PREFILL:
                rows = whole
        return min(self._most, decoding + rows)

    def _seconds(self, prefills: Iterable[Left]) -> float:
        """What these would take at once."""
        times = self._small or self._wide
        return sum(times.of(one.rows, one.depth + one.rows / 2) for one in prefills)


def stretch(cached: int, prompt_size: int, total: int) -> int:
    """How many of a sequence's next tokens may be computed together.

    That is all that is left of its prompt, and then, where the answer is resumed, of the tokens
    that earlier attempts drew: at most `REPLAY_ROWS`, and never so that one is left over. llama.cpp
    rounds a row alone, a row among several, and, with flash attention, a row among 64 or more of
    its sequence in three ways. A prompt is computed as any prompt. An answer's tokens were computed
    one a step or as a short draft, mostly beside others: so they are replayed in the class of
    several. Tried with streams resumed at random tokens: 96 of 96 equal in pieces of at most 63
    rows, 34 of 48 in one large piece. A single token that was drawn is a row alone, as it was.

    Args:
        cached: tokens that are computed.
        prompt_size: tokens of the prompt.
        total: tokens to compute in all, the prompt's included; more than `cached`.
    """
    if cached < prompt_size:
        return prompt_size - cached
    left = total - cached
    if left <= REPLAY_ROWS:
        return left
    return REPLAY_ROWS - 1 if left == REPLAY_ROWS + 1 else REPLAY_ROWS


def plan(remaining: Sequence[int], budget: int, most: int = _NO_BOUND) -> list[int]:
    """Rows for each sequence, given the `stretch` each has yet to compute, in order of age.

    A sequence with one token left is decoding and always gets its row, one with none gets nothing.
    Of what the budget leaves, the oldest prefill gets `OLDEST_SHARE`, so that it gets on whatever
    comes; then comes the shortest, so that a short prompt does not wait for a long one, then the
    others by age: each number of rows that occurs costs llama.cpp a pass of its own. No sequence
    gets more than `most`, and the sum is at most `max(budget, number of decoding sequences)`.
    """
    rows = [min(count, 1) for count in remaining]
    prefills = [i for i, count in enumerate(remaining) if count > 1]
    left = max(0, budget - sum(1 for count in remaining if count == 1))
    for i in prefills:
        rows[i] = 0
    if not prefills:
        return rows
    oldest = prefills[0]
    rows[oldest] = min(remaining[oldest], math.ceil(left * OLDEST_SHARE), most)
    left -= rows[oldest]
    shortest = min(prefills, key=lambda i: remaining[i])
    for i in (shortest, *prefills):
        more = min(remaining[i] - rows[i], left, most - rows[i])
        rows[i] += more
        left -= more
    for i in prefills:
        if remaining[i] - rows[i] == 1 and rows[i] > 1:
            rows[i] -= 1  # a last row alone would be rounded in another way than several together
    return rows
