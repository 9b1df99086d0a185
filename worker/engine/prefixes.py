"""Prefixes that are computed already, brought to where a sequence begins.

From the slot itself, from another one, or from host memory, whichever has the longest; and into
host memory goes what a slot held when it is given to another conversation.
"""

from worker.engine.decoder import Decoder
from worker.engine.prefix_store import PrefixStore
from worker.engine.slots import LEAST_COPY, Placement, Slots
from worker.engine.tiles import Spans, cut

__all__ = ("Prefixes",)


class Prefixes:
    """Over the slots of a context; `memory` bytes of the host's are used, 0: none."""

    def __init__(self, context: Decoder, slots: Slots, memory: int) -> None:
        self._context = context
        self._slots = slots
        self._store = PrefixStore(memory) if memory else None

    def bring(self, placement: Placement, prompt: list[int], spans: Spans = ()) -> Placement:
        """Fill a placement's slot with as much of the prompt as there is; returns what is there.

        To be called before the slot is taken.

        Args:
            placement: for the prompt.
            prompt: all that is to be computed.
            spans: what of it is to be computed in whole tiles.
        """
        context, slot = self._context, placement.slot
        reuse, mixed = placement.reuse, placement.spans
        kept = None
        if self._store is not None:
            # Found first: it may be the very one that makes way for what is spilled.
            kept = self._store.find(prompt, reuse + LEAST_COPY)
            self._spill(self._store, placement, prompt)
        if kept is not None:
            # As from another slot, two tokens at least are left to compute.
            there = min(kept.shared, len(prompt) - 2)
            reuse, mixed = self._slots.tiles.reuse(there, kept.entry.spans, spans)
            if not context.restore(slot, kept.entry.state):
                reuse = 0
        elif placement.source != slot and not context.copy(placement.source, slot):
            reuse = 0
        if not context.forget(slot, reuse):
            # recurrent models cannot be cut in the middle
            context.forget(slot)
            reuse = 0
        return Placement(slot, placement.source, reuse, mixed if reuse else spans)

    def _spill(self, store: PrefixStore, placement: Placement, prompt: list[int]) -> None:
        """Keep what the slot holds of a retired sequence, if it is about to be lost."""
        lost = self._slots.displaced(placement, prompt)
        if lost and not store.covers(lost):
            state = self._context.save(placement.slot)
            if state is not None:
                store.put(lost, state, cut(self._slots.all[placement.slot].spans, len(lost)))
