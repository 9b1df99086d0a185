"""Forming groups: models that are wanted and that no worker can hold alone; who carries them. Pure.

Every worker that has the model's file at hand plans for itself (`shared.planning`), with what all
tell of their free memory and of their distance; the one that the plan makes the head claims the
lease for all. Views that differ do no harm: of two heads one gets the lease, and what a part is
promised but cannot have, it says.

Nothing is evicted for a group: idle models go by themselves, and it is formed when there is room.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from shared.groups import Group, Part, SplitModel
from shared.head_draft import with_draft
from shared.model_shape import GRAIN, ModelShape
from shared.partition import Host
from shared.planning import Plan, Wanted, plan
from shared.replicas import Want
from shared.snapshot import Snapshot, WorkerView

__all__ = ("JOIN_SECONDS", "Proposal", "ending", "joined", "missing", "propose")

LEAST_CONTEXT = 512
"""Tokens of a sequence below which there are rather fewer sequences."""

JOIN_SECONDS = 10.0
"""How long after its claim a group waits until each of its workers tells of its part."""

_HOP_DIGITS = 3
"""Of a way's seconds: less is noise."""
_NOBODY: Mapping[str, float] = MappingProxyType({})


class Proposal(NamedTuple):
    """A group that this worker would be the head of."""

    model: str
    replica: int
    group: Group
    reason: str


def propose(
    snapshot: Snapshot,
    wants: Mapping[str, Want],
    shapes: Mapping[str, ModelShape],
    *,
    worker: str,
    identity: str,
    last: Mapping[str, Group] = MappingProxyType({}),
) -> Proposal | None:
    """Say what this worker should claim now; None: nothing.

    One at a time: a second one would count on memory that the first has taken.

    Args:
        snapshot: what is known.
        wants: how many replicas of each model are wanted.
        shapes: of the models whose files this worker has.
        worker: who it is.
        identity: for the group, if there is one.
        last: by model, the groups that were there a moment ago: whoever is left of one has its part
            loaded, and keeps it.
    """
    leased = {lease.model for lease in snapshot.leases}
    for model in sorted(shapes):
        want = wants.get(model)
        if want is None or not want.replicas or want.present or model in leased:
            continue
        if _alone(snapshot, model):
            continue
        ours = _of(snapshot.workers, worker, model)
        if ours is None or ours.missing:
            continue
        made = _plan(snapshot.workers, ours, shapes[model], taken=True)
        if not made.stages:
            continue
        group = _group(made, ours, identity)
        before = last.get(model)
        if before is not None and len(before.parts) == len(group.parts):
            group = _again(before, snapshot.workers, ours, identity) or group
        if group.head.worker == worker:
            reason = f"at least {want.floor}" if want.floor else want.reason
            return Proposal(model, 0, group, reason)
    return None


def _again(
    last: Group, workers: Iterable[WorkerView], model: SplitModel, identity: str
) -> Group | None:
    """The same parts with those that are left, and others in the place of those that are not."""
    free = {
        worker.name: (worker.memory - _taken(worker), round(worker.hop, _HOP_DIGITS))
        for worker in _able(workers, model)
    }
    stay = {
        part.worker
        for part in last.parts
        if part.worker in free and free[part.worker][0] >= part.memory
    }
    spare = sorted(free.keys() - stay, key=lambda name: (free[name][1], -free[name][0], name))
    parts: list[Part] = []
    for part in last.parts:
        if part.worker in stay:
            parts.append(part)
            continue
        other = next((name for name in spare if free[name][0] >= part.memory), None)
        if other is None:
            return None
        spare.remove(other)
        parts.append(msgspec.structs.replace(part, worker=other))
    if not stay or last.digest != model.digest:
        return None
    return msgspec.structs.replace(last, id=identity, parts=tuple(parts))


def missing(snapshot: Snapshot, model: SplitModel, shape: ModelShape) -> str:
    """Why the workers in sight could not carry a model even if they held nothing else."""
    made = _plan(snapshot.workers, model, shape, taken=False)
    return "" if made.stages else "; ".join(made.reasons)


def joined(group: Group, snapshot: Snapshot) -> Mapping[str, float]:
    """Those beside the head who tell of their part, and when their processes began."""
    return {
        worker.name: worker.started
        for worker in snapshot.workers
        if any(stage.group == group.id for stage in worker.stages)
    }


def ending(
    group: Group, snapshot: Snapshot, age: float, known: Mapping[str, float] = _NOBODY
) -> tuple[str, bool]:
    """Why a group is at its end, and whether its answers can still come to theirs.

    Args:
        group: one whose head is asked.
        snapshot: what the head knows.
        age: seconds since its claim.
        known: what `joined` has said before.

    Returns:
        The reason, empty where it goes on; and whether all its parts still work.
    """
    workers = {worker.name: worker for worker in snapshot.workers}
    leaving = ""
    for part in group.parts[:-1]:
        seen = workers.get(part.worker)
        if seen is None:
            return f"{part.worker} is gone", False
        stage = next((stage for stage in seen.stages if stage.group == group.id), None)
        if known.get(part.worker, seen.started) != seen.started:
            # It has found the lease and taken its part up, but the ring had it in its last life.
            return f"{part.worker} was started anew", False
        if stage is not None and stage.state == "failed":
            return f"{part.worker}: {stage.detail}", False
        if stage is None and (age > JOIN_SECONDS or part.worker in known):
            return f"{part.worker} has no part in it", False
        if not seen.open:
            leaving = f"{part.worker} leaves"
    return leaving, bool(leaving)


def _alone(snapshot: Snapshot, model: str) -> bool:
    """Whether some worker could hold the model whole, as placement would have it."""
    return any(
        worker.open and worker.able.get(model, worker.memory + 1) <= worker.memory
        for worker in snapshot.workers
    )


def _of(workers: Iterable[WorkerView], name: str, model: str) -> SplitModel | None:
    """What a worker says of a model that it could carry a part of."""
    for worker in workers:
        if worker.name == name:
            return next((split for split in worker.parts if split.name == model), None)
    return None


def _plan(
    workers: Iterable[WorkerView], model: SplitModel, shape: ModelShape, *, taken: bool
) -> Plan:
    """Plan a model on those that mean the same one; `taken`: with the memory that is free now.

    Room is left for a draft model at the head, if that costs no host, few cells and little time.
    """
    able = tuple(_able(workers, model))
    hosts = tuple(
        Host(
            worker.name,
            worker.memory - (_taken(worker) if taken else 0),
            rtt=round(worker.hop, _HOP_DIGITS),
        )
        for worker in able
    )
    wanted = Wanted(context=model.context, slots=model.slots)
    made = _planned(shape, hosts, wanted)
    head = _of(able, made.stages[-1].host, model.name) if made.stages else None
    if head is None or head.draft is None:
        return made
    return with_draft(made, shape, hosts, head.draft)


def _able(workers: Iterable[WorkerView], model: SplitModel) -> Iterator[WorkerView]:
    """Those that could carry a part of this very model."""
    for worker in workers:
        told = ((split.name, split.digest) for split in worker.parts)
        if worker.open and (model.name, model.digest) in told:
            yield worker


# Asked every second about what seldom changes; with hundreds of hosts a plan takes half a second.
_planned = lru_cache(maxsize=256)(plan)


def _taken(worker: WorkerView) -> int:
    """Bytes that are in use, or promised."""
    models = sum(held.memory or worker.able.get(held.model, 0) for held in worker.holds)
    return models + sum(stage.taken for stage in worker.stages)


def _group(made: Plan, model: SplitModel, identity: str) -> Group:
    """What a plan means for engines: sequences of whole grains, as many as the cells hold."""
    slots = max(1, min(model.slots, made.cells // LEAST_CONTEXT))
    context = min(model.context, made.cells // slots)
    if context > GRAIN:
        context -= context % GRAIN
    return Group(
        id=identity,
        digest=model.digest,
        parts=tuple(Part(s.host, s.start, s.stop, s.memory) for s in made.stages),
        slots=slots,
        context=context,
        step=made.step,
        half=model.half,
    )
