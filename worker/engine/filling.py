"""A batch for the next decode call: which rows, and which of them have logits."""

from collections.abc import Sequence as Several
from typing import NamedTuple

from worker.engine.batch import Batch
from worker.engine.sequence import Sequence
from worker.engine.slots import Slot

__all__ = ("Sampled", "fill", "fill_decoding")


class Sampled(NamedTuple):
    """A sequence with logits in this step."""

    sequence: Sequence
    draft: list[int]
    end: int
    """Tokens of its slot that are computed, the draft not counted."""


def fill_decoding(batch: Batch, running: Several[Sequence]) -> tuple[int, list[Sampled]]:
    """A row for each sequence; what most steps are, and so done with few operations.

    Args:
        batch: filled from its first row on.
        running: by ascending slots.

    Returns:
        Rows, and all sequences.
    """
    slots: list[Slot] = [s.slot for s in running if s.slot is not None]
    ends = [len(slot.tokens) for slot in slots]
    rows = batch.fill_decoding(
        [slot.index for slot in slots],
        [slot.tokens[-1] for slot in slots],
        [slot.cached for slot in slots],
    )
    for slot, end in zip(slots, ends, strict=True):
        slot.cached = end
    return rows, [Sampled(sequence, [], end) for sequence, end in zip(running, ends, strict=True)]


def fill(
    batch: Batch,
    running: Several[Sequence],
    rows_of: Several[int],
    drafts: Several[list[int]],
) -> tuple[int, list[Sampled]]:
    """So many rows of each sequence, with its draft behind the last.

    Args:
        batch: filled from its first row on.
        running: in any order.
        rows_of: by sequence.
        drafts: by sequence; empty: there are none.

    Returns:
        Rows in all, and the sequences that have logits.
    """
    # ascending slots, so that llama.cpp finds them consecutive
    order = sorted((i for i, rows in enumerate(rows_of) if rows), key=lambda i: running[i].place)
    row = 0
    sampled: list[Sampled] = []
    for i in order:
        sequence = running[i]
        slot = sequence.slot
        assert slot is not None  # noqa: S101  a running sequence has one
        start, end = slot.cached, slot.cached + rows_of[i]
        draft = drafts[i] if drafts else []
        row = batch.fill(row, slot.index, slot.tokens[start:end] + draft, start)
        if end == len(slot.tokens):
            batch.output[row - 1 - len(draft) : row] = 1
            sampled.append(Sampled(sequence, draft, end))
        slot.cached = end
    return row, sampled
