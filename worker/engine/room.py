"""How much context a sequence gets: what is wished, cut to what the memory leaves. Pure."""

from shared.model_shape import GRAIN
from worker.gguf_header import Header, estimate_memory

__all__ = ("NoRoom", "fit_context")


class NoRoom(Exception):
    """Not even the smallest context fits; the message tells both numbers."""


def fit_context(
    header: Header, *, slots: int, wanted: int, step_tokens: int, memory: int, cells: int
) -> int:
    """Tokens a sequence may use: `wanted`, or less if `memory` bytes or `cells` in all ask for it.

    `memory` and `cells` of 0 set no bound.

    Raises:
        NoRoom: the memory holds less than one grain a slot.
    """
    context = max(1, min(wanted, cells // slots) if cells else wanted)
    if not memory:
        return context

    def needed(tokens: int) -> int:
        return estimate_memory(header, cells=slots * tokens, step_tokens=step_tokens)

    least = min(GRAIN, context)
    if needed(least) > memory:
        raise NoRoom(
            f"{slots} slots of {least} tokens need {needed(least) >> 20} MiB, the limit is "
            f"{memory >> 20} MiB; use fewer slots or raise --memory"
        )
    if needed(context) <= memory:
        return context
    low, high = 1, -(-context // GRAIN)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle * GRAIN) <= memory else (low, middle - 1)
    return min(context, low * GRAIN)
