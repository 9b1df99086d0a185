"""Room for a draft model beside the head's part of a split model: whether it is well spent. Pure.

Drafts are worth most where a model is split, since those of a trip round the ring travel together.
But a head with less room has fewer layers, and all stages then wait for the others; so little else
may be given up for it.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import msgspec

from shared.groups import DraftNeeds
from shared.model_shape import ModelShape, Scales, Size
from shared.partition import Host, Stage, deal
from shared.planning import Plan

__all__ = ("CELLS", "with_draft")

CELLS = 0.75
"""Of the cells without a draft model, as many must be left: the bound that a draft model has on one
host (`worker.memory_budget`)."""
SLOWDOWN = 1.1
"""The slowest stage may take so many times as long for a token."""


# Asked as often as the plan itself, which is kept, too.
@lru_cache(maxsize=256)
def with_draft(made: Plan, shape: ModelShape, hosts: tuple[Host, ...], draft: DraftNeeds) -> Plan:
    """The plan with room for a draft model at its head; as it is, where that is too dear.

    Hosts and their order stay, and steps are at least half as wide.

    Args:
        made: a plan of these hosts, with a head.
        shape: of the model.
        hosts: with the memory that is free on each.
        draft: what the head's draft model takes.
    """
    known = {host.name: host for host in hosts}
    *others, head = (known[stage.host] for stage in made.stages)

    def dealt(cells: int, step: int) -> tuple[Stage, ...] | None:
        left = head.memory - draft.memory(cells, step)
        smaller = msgspec.structs.replace(head, memory=left)
        stages = deal(Scales(shape, Size(cells, step)), (*others, smaller))
        fast = stages is not None and _slowest(stages) <= SLOWDOWN * _slowest(made.stages)
        return stages if fast else None

    least = math.ceil(CELLS * made.cells)
    for step in (made.step, made.step // 2):
        if dealt(least, step) is None:
            continue
        low, high = least, made.cells
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if dealt(middle, step) else (low, middle - 1)
        stages = dealt(low, step)
        assert stages is not None  # noqa: S101  it was
        return msgspec.structs.replace(made, stages=stages, cells=low, step=step)
    return made


def _slowest(stages: Sequence[Stage]) -> float:
    """What the slowest stage takes for a token, of what all take together."""
    return 1 / sum(stage.share for stage in stages)
