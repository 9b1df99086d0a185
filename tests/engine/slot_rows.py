"""Rows of one slot through a context, without an engine around it."""

from collections.abc import Sequence

import numpy as np

from worker.engine.batch import Batch
from worker.engine.llama import Context

__all__ = ("decode_rows",)


def decode_rows(context: Context, slot: int, tokens: Sequence[int], start: int = 0) -> int:
    """Run tokens from position `start` on, with the last one's logits; what `decode` returns."""
    rows = len(tokens)
    batch = Batch(rows)
    batch.token[:rows] = tokens
    batch.position[:rows] = np.arange(start, start + rows)
    batch.slot[:rows] = slot
    batch.output[:rows] = 0
    batch.output[rows - 1] = 1
    return context.decode(batch, rows)
