"""What a step needs besides, so that a row's logits are the same in any company. Pure.

llama.cpp takes other kernels for one row than for several: of the weights where they have 8 to 32
bits (`llamafile_sgemm`, from two rows on), and of flash attention where a cache is long and there
is more than one thread (`ggml_compute_forward_flash_attn_ext`: the threads share its cells). So a
row that would be alone gets a second beside it, which nobody asks for: the same token once more,
one position on, forgotten as soon as it is computed. vLLM and SGLang call this batch invariance.
"""

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ("Beside", "beside", "passes")


class Beside(NamedTuple):
    """What is computed though nobody asked for it."""

    again: tuple[int, ...] = ()
    """Rows that are computed twice, the second time one position on."""
    outputs: tuple[int, ...] = ()
    """Rows of the step whose logits are computed: those alone would be, in the last layers."""


def passes(slots: Sequence[int]) -> list[list[int]]:
    """Which rows llama.cpp computes together, in the order of its passes.

    As `llama_batch_allocr::split_equal` with a cache that is not unified: consecutive slots, as
    many rows of each as the shortest has.

    Args:
        slots: of each row; rows of a slot stand together, and slots ascend.
    """
    left: dict[int, list[int]] = {}
    for row, slot in enumerate(slots):
        left.setdefault(slot, []).append(row)
    found = []
    while left:
        group: list[int] = []
        for slot in left:
            if not group or slot == group[-1] + 1:
                group.append(slot)
        size = min(len(left[slot]) for slot in group)
        found.append([row for slot in group for row in left[slot][:size]])
        for slot in group:
            left[slot] = left[slot][size:]
            if not left[slot]:
                del left[slot]
    return found


def beside(slots: Sequence[int], outputs: Sequence[int]) -> Beside:
    """What keeps all rows of a step, and all that have logits, from being alone in a pass.

    Args:
        slots: see `passes`.
        outputs: by row, whether its logits are asked for.
    """
    rows = len(slots)
    if rows > 1 and all(outputs) and list(slots) == list(range(slots[0], slots[0] + rows)):
        return Beside()  # what most steps are
    again: list[int] = []
    extra: list[int] = []
    for together in passes(slots):
        if len(together) == 1:
            again += together
            continue
        asked = [row for row in together if outputs[row]]
        if len(asked) == 1:
            extra.append(next(row for row in together if row not in asked))
    return Beside(tuple(again), tuple(extra))
