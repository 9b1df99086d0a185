"""The sequences that have a slot: how they come by it, keep close together, and give it back."""

import time
from operator import attrgetter

from worker.engine.decoder import Decoder
from worker.engine.fair_queue import FairQueue
from worker.engine.outbox import Outbox
from worker.engine.prefixes import Prefixes
from worker.engine.sequence import Sequence
from worker.engine.slots import TOKENS_A_GAP_STEP, Placement, Slots, hole
from worker.engine.speculation.speculator import Speculator
from worker.engine.tally import Tally
from worker.engine.tiles import Tiles

__all__ = ("Running",)

_slot_of = attrgetter("place")


class Running:
    """Keeps slots, what is kept of prefixes, and the speculator in step with each other."""

    def __init__(
        self,
        context: Decoder,
        speculator: Speculator | None,
        outbox: Outbox,
        tally: Tally,
        *,
        prefix_memory: int,
        tiles: Tiles,
    ) -> None:
        self.sequences: list[Sequence] = []
        self._context = context
        self._speculator = speculator
        self._outbox = outbox
        self._tally = tally
        self._slots = Slots(context.slots, tiles)
        self._prefixes = Prefixes(context, self._slots, prefix_memory)
        self._gap_steps = 0

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def kv_used(self) -> float:
        """Share of the cache that is in use, 0 to 1."""
        held = sum(s.slot.cached for s in self.sequences if s.slot is not None)
        return held / (self._context.slots * self._context.context)

    def admit(self, waiting: FairQueue[Sequence]) -> None:
        """Give slots to those who wait, as far as there are any."""
        deferred: list[Sequence] = []
        slots = len(self._slots.all)
        # Who was looked at is next whoever comes: no more than may be running together.
        while waiting and len(self._slots.active) < slots and len(deferred) < slots:
            sequence = waiting.pop(time.monotonic())
            job = sequence.job
            if job.spans is None:
                job.spans = self._slots.tiles.of(job.prompt, job.end_tokens)
            placement = self._slots.place(sequence.tokens, job.spans)
            if placement is None:
                deferred.append(sequence)
            else:
                self._occupy(sequence, placement)
        waiting.push_first(deferred)

    def retire(self, sequence: Sequence) -> None:
        """Take its slot from a sequence; what was computed stays there until the room is needed."""
        self.sequences.remove(sequence)
        slot = sequence.slot
        if slot is not None:
            if self._speculator is not None:
                self._speculator.remember(
                    sequence.job.request.owner, slot.tokens, len(sequence.job.prompt)
                )
            self._slots.release(slot)
            sequence.slot = None

    def sort(self) -> None:
        """Bring them into the order of their slots."""
        self.sequences.sort(key=_slot_of)

    def close_gap(self) -> None:
        """Swap slots until the busy ones are consecutive, or as far as a step may pay for it.

        Raises:
            RuntimeError: llama.cpp could not.
        """
        while (gap := hole(self._slots.active)) is not None:
            source, target = gap
            tokens = self._slots.all[source].cached + self._slots.all[target].cached
            if tokens > (self._gap_steps + 1) * TOKENS_A_GAP_STEP:
                self._gap_steps += 1
                return
            if not self._context.swap(source, target):
                raise RuntimeError(f"llama.cpp could not swap slots {source} and {target}")
            if self._speculator is not None:
                self._speculator.swapped(source, target)
            moved = next(s for s in self.sequences if s.slot is self._slots.all[source])
            moved.slot = self._slots.swap(source, target)
        self._gap_steps = 0

    def _occupy(self, sequence: Sequence, placement: Placement) -> None:
        job = sequence.job
        wished = placement.reuse
        placement = self._prefixes.bring(placement, sequence.tokens, job.spans or ())
        if self._speculator is not None:
            # What came from the store, the draft model does not have.
            known = min(placement.reuse, wished)
            self._speculator.took(Placement(placement.slot, placement.source, known))
            sequence.drafting = self._speculator.begin(sequence.tokens, job.request.owner)
        sequence.slot = self._slots.take(placement, sequence.tokens, len(job.prompt))
        if job.start():
            self._outbox.started(job.attempt)
        reuse = min(placement.reuse, len(job.prompt))
        job.cached = max(job.cached, reuse) if sequence is job.sequences[0] else job.cached
        self._tally.cached_tokens += reuse
        self._tally.prompt_tokens += len(job.prompt)
        self.sequences.append(sequence)
