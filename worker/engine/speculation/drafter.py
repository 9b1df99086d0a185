"""The draft model: a KV cache in step with the target's, and draft tokens for many slots at a time.

Slot n of the draft's cache follows slot n of the target's. Nothing is mirrored token by token:
`_valid` says how many of a slot's tokens the draft has computed, what is wrong is cut off, and what
is missing is computed before the slot drafts next. So acceptance, rejection, cancellation and reuse
of prefixes need no more than lowering a number.

A draft that is its target in another number format (`kinship.py`) takes over what the target has
computed instead, wherever copying that is faster than reading what is missing.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from worker.engine.batch import Batch
from worker.engine.llama import Context
from worker.engine.sampling import Logits
from worker.engine.slots import Slot
from worker.engine.speculation.costs import StepCost

__all__ = ("Drafter", "Guesser")

_CATCH_UP_ROWS = 128
"""Most tokens that one step computes for slots that lag behind, so that it stays a short one."""

_CATCH_UP_SECONDS = 0.05
"""After so long, a step takes no further slot over."""
_TAKEN_SECONDS = 20e-6
"""What taking over a token takes before it has been measured."""
_TAKEN_GAIN = 0.2
_REFRESHED = 1 / 32
"""Share of the time that goes, at most, into taking over tokens again that the draft has computed:
by the target's keys and values of them too it is right more often (SmolLM2's Q4_0 in 0.78 of the
tokens of prose instead of 0.73, and in 0.68 by its own alone)."""


class Guesser(Protocol):
    """Draws one sequence's draft tokens."""

    def guess(self, row: Logits) -> tuple[int, float]:
        """The next draft token from the draft's logits, and how sure the draft is of it, 0 to 1."""
        ...


class Drafter:
    """Draft tokens from `context`, of what its slots or the target's hold.

    Args:
        context: the draft's, with as many slots as the target's.
        cost: of its passes.
        step_tokens: most rows of a pass.
        vocabulary: tokens that both models know.
        kin: the target's context, if the draft can go by its keys and values.
    """

    def __init__(
        self,
        context: Context,
        cost: StepCost,
        *,
        step_tokens: int,
        vocabulary: int,
        kin: Context | None = None,
    ) -> None:
        self.cost = cost
        self._context = context
        self._kin = kin
        self._taken_seconds = _TAKEN_SECONDS
        """Of each token of a slot that is taken over."""
        self._batch = Batch(step_tokens)
        self._vocabulary = vocabulary
        self._valid = [0] * context.slots
        self._computed = [0] * context.slots
        """`_valid` and the drafts after it that are computed but not yet accepted."""
        self._taken_at = [0.0] * context.slots

    def set_threads(self, decode: int, prefill: int) -> None:
        """As `Context.set_threads`."""
        self._context.set_threads(decode, prefill)

    # following the target's slots

    def took(self, slot: int, source: int, reuse: int) -> None:
        """A slot begins a sequence whose first `reuse` tokens came from slot `source`."""
        if source != slot:
            # What can be taken over need not be copied before it is asked for.
            there = 0 if self._kin else min(self._valid[source], reuse)
            if there and not self._context.copy(source, slot):
                there = 0
            self._valid[slot] = there
            if there:
                self._computed[slot] = self._computed[source]
        self._cut(slot, min(self._valid[slot], reuse))

    def swapped(self, left: int, right: int) -> None:
        """Two slots have exchanged what they hold."""
        if self._kin:
            self._cut(left, 0)
            self._cut(right, 0)
            return
        if (self._computed[left] or self._computed[right]) and not self._context.swap(left, right):
            raise RuntimeError(f"llama.cpp could not swap the draft's slots {left} and {right}")
        for numbers in (self._valid, self._computed):
            numbers[left], numbers[right] = numbers[right], numbers[left]

    def accepted(self, slot: int, tokens: int) -> None:
        """Of what is drafted, the slot's first `tokens` tokens are right."""
        self._cut(slot, min(self._computed[slot], tokens))

    def _cut(self, slot: int, tokens: int) -> None:
        if self._computed[slot] > tokens or self._valid[slot] > tokens:
            self._context.forget(slot, tokens)
        self._valid[slot] = self._computed[slot] = tokens

    # drafting

    def lag(self, slot: Slot) -> int:
        """Tokens of the slot that are not computed, the last one left out: it begins a draft."""
        return len(slot.tokens) - 1 - self._valid[slot.index]

    def catch_up_seconds(self, slot: Slot) -> float:
        """What it takes to be ready to draft for the slot."""
        lag = self.lag(slot)
        if lag <= 1:
            return 0.0
        if self._takes_over(slot, lag):
            return self._take_seconds(slot)
        return (lag - 1) * self._read_seconds()

    def begins_with(self, slot: Slot, count: int) -> int:
        """Rows of the slot in the first pass of a draft, once it has caught up among `count`."""
        return 2 if self.lag(slot) == 1 and not self._wants(slot, count) else 1

    def catch_up(self, slots: Sequence[Slot]) -> bool:
        """Compute what the slots lack, up to a limit, or take it over; False: some lack more.

        A slot may go into `draft` with one token lacking: it begins with two.
        """
        left, began = _CATCH_UP_ROWS, time.perf_counter()
        for slot in slots:
            if self._wants(slot, len(slots)):
                late = time.perf_counter() - began > _CATCH_UP_SECONDS
                if late and self.lag(slot) > 1:
                    return False
                if late or self._take_over(slot):
                    continue
            lag = self.lag(slot)
            if lag <= 1:
                continue
            rows = min(lag, left)
            if rows == 0:
                return False
            valid = self._valid[slot.index]
            self._batch.fill(0, slot.index, slot.tokens[valid : valid + rows], valid)
            self._batch.output[:rows] = 0
            self._decode(rows)
            self._valid[slot.index] = self._computed[slot.index] = valid + rows
            left -= rows
        return all(self.lag(slot) <= 1 for slot in slots)

    def _read_seconds(self) -> float:
        """Of a token, in company."""
        return self.cost.seconds(64) / 64

    def _take_seconds(self, slot: Slot) -> float:
        return slot.cached * self._taken_seconds

    def _takes_over(self, slot: Slot, lag: int) -> bool:
        """Whether that is sooner than to read what is missing."""
        return (
            self._kin is not None
            and slot.cached >= len(slot.tokens) - 1
            and self._take_seconds(slot) < lag * self._read_seconds()
        )

    def _wants(self, slot: Slot, count: int) -> bool:
        """Whether the slot is to be taken over now, as one of `count` that draft."""
        if self._kin is None:
            return False
        if (lag := self.lag(slot)) > 1:
            return self._takes_over(slot, lag)
        age = time.perf_counter() - self._taken_at[slot.index]
        return count * self._take_seconds(slot) <= age * _REFRESHED

    def _take_over(self, slot: Slot) -> bool:
        """Have all that the target has computed for the slot; False: llama.cpp refused, once and
        for all.
        """
        began = time.perf_counter()
        self._valid[slot.index] = self._computed[slot.index] = 0
        if self._kin is None or not self._context.take(slot.index, self._kin):
            self._kin = None
            return False
        self._valid[slot.index] = self._computed[slot.index] = slot.cached
        self._cut(slot.index, len(slot.tokens) - 1)
        self._taken_at[slot.index] = now = time.perf_counter()
        seconds = (now - began) / max(1, slot.cached)
        self._taken_seconds += (seconds - self._taken_seconds) * _TAKEN_GAIN
        return True

    def draft(
        self,
        slots: Sequence[Slot],
        guessers: Sequence[Guesser],
        most: int,
        goes_on: Callable[[Sequence[float]], bool],
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Draft up to `most` tokens for each slot, and tell how sure the draft is of each.

        All slots get equally many.

        Args:
            slots: none of which lags by more than one token, ascending.
            guessers: one for each.
            most: at least 1.
            goes_on: asked after each token, with how sure the draft is of each slot's.
        """
        # Slots with two tokens to begin with and slots with one would be computed apart.
        begin = 1 + max(self.lag(slot) for slot in slots)
        row = 0
        for slot in slots:
            size = len(slot.tokens)
            start = max(0, size - begin)
            self._cut(slot.index, min(self._valid[slot.index], start))
            self._batch.fill(row, slot.index, slot.tokens[start:], start)
            row += size - start
            self._batch.output[row - 1] = 1
            self._valid[slot.index] = self._computed[slot.index] = size
        drafts: list[list[int]] = [[] for _ in slots]
        confidences: list[list[float]] = [[] for _ in slots]
        while True:
            self._decode(row)
            logits = self._context.logits(len(slots))[:, : self._vocabulary]
            for i, guesser in enumerate(guessers):
                token, confidence = guesser.guess(logits[i])
                drafts[i].append(token)
                confidences[i].append(confidence)
            if not goes_on([sure[-1] for sure in confidences]) or len(drafts[0]) >= most:
                return drafts, confidences
            row = len(slots)
            for i, slot in enumerate(slots):
                self._batch.fill(i, slot.index, drafts[i][-1:], self._computed[slot.index])
                self._computed[slot.index] += 1
            self._batch.output[:row] = 1

    def _decode(self, rows: int) -> None:
        began = time.perf_counter()
        code = self._context.decode(self._batch, rows)
        if code != 0:
            raise RuntimeError(f"llama_decode of the draft returned {code} for {rows} rows")
        self.cost.measured(rows, time.perf_counter() - began)
