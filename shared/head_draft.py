"""Room for a draft model beside the head's part of a split model: whether it is well spent. Pure.

Drafts are worth most where a model is split, since those of a trip round the ring travel together.
But a head with less room has fewer layers, and all stages then wait for the others; so little else
may be given up for it.
"""

from collections.abc import Callable, Sequence

import msgspec

from shared.groups import DraftNeeds
from shared.partition import Host
from shared.planning import Plan

__all__ = ("with_draft",)

CELLS = 0.75
"""Of the cells without a draft model, as many must be left: the bound that a draft model has on one
host (`worker.memory_budget`)."""
SLOWDOWN = 1.1
"""The slowest stage may take so many times as long for a token."""


def with_draft(
    made: Plan,
    hosts: Sequence[Host],
    draft: DraftNeeds,
    plan: Callable[[tuple[Host, ...]], Plan],
) -> Plan:
    """A plan that leaves room for a draft model at the same head; `made`, where that is too dear.

    It has as many hosts, and steps at least half as wide.

    Args:
        made: the plan of these hosts without a draft model.
        hosts: with the memory that is free on each.
        draft: what the head's draft model takes.
        plan: makes a plan of hosts.
    """
    if not made.stages:
        return made
    head = made.stages[-1].host
    # Where steps become narrower, the draft model's are, too, and less is to be set aside.
    for step in (made.step, made.step // 2):
        memory = draft.memory(made.cells, step)
        beside = plan(
            tuple(
                msgspec.structs.replace(host, memory=host.memory - memory)
                if host.name == head
                else host
                for host in hosts
            )
        )
        if (
            len(beside.stages) == len(made.stages)
            and beside.stages[-1].host == head
            and made.step <= 2 * beside.step <= 2 * step
            and beside.cells >= CELLS * made.cells
            and _slowest(beside) <= SLOWDOWN * _slowest(made)
        ):
            return beside
    return made


def _slowest(made: Plan) -> float:
    """What the slowest stage takes for a token, of what all take together."""
    return 1 / sum(stage.share for stage in made.stages)
