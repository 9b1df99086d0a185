"""Dealing a mixture's experts to shards: each a smaller model that answers alone. Pure.

Experts are ranked in each layer by gate mass: the share of the router's probability that they had
over a text. The hottest, the core, are on every shard; the rest are dealt, the heaviest first to
the shard that has least; and each shard gets some of the hottest that it lacks, the overlap.
All shards keep as many experts in each layer, since a GGUF has one number of them.
"""

from collections.abc import Sequence

import msgspec

__all__ = ("Shard", "ShardError", "check", "deal")

Masses = Sequence[Sequence[float]]
"""By layer, then by expert; each at least 0."""


class ShardError(ValueError):
    """There are no such shards; the message is one line that says why, and what would do."""


class Shard(msgspec.Struct, frozen=True):
    """The experts that one shard keeps."""

    experts: tuple[tuple[int, ...], ...]
    """By layer, ascending."""
    coverage: float
    """Gate mass of those kept, of all, in the mean over the layers."""
    least: float
    """Of the layer where that is least."""


def deal(masses: Masses, shards: int, *, core: int, overlap: int) -> tuple[Shard, ...]:
    """Deal the experts of all layers.

    Args:
        masses: gate mass of each expert of each layer.
        shards: how many, at least 2.
        core: experts of a layer that every shard has.
        overlap: experts of a layer that each shard has beyond those dealt to it.

    Returns:
        The shards. Every expert of every layer is on at least one.

    Raises:
        ShardError: the numbers do not go together.
    """
    check(masses, shards, core, overlap)
    kept = [_deal_layer(layer, shards, core, overlap) for layer in masses]
    made: list[Shard] = []
    for number in range(shards):
        experts = tuple(layer[number] for layer in kept)
        covered = [_share(mass, mine) for mass, mine in zip(masses, experts, strict=True)]
        made.append(Shard(experts, sum(covered) / len(covered), min(covered)))
    return tuple(made)


def check(masses: Masses, shards: int, core: int, overlap: int) -> None:
    """See that there can be such shards.

    Raises:
        ShardError: there cannot.
    """
    counts = {len(layer) for layer in masses}
    if not masses or len(counts) != 1:
        raise ShardError("each layer must have as many experts, and there must be a layer")
    (experts,) = counts
    if shards < 2:
        raise ShardError(f"shards: {shards}; there must be at least 2")
    if not 0 <= core < experts:
        raise ShardError(f"core: {core}; a layer has {experts} experts, so 0 to {experts - 1}")
    if shards > experts - core:
        raise ShardError(
            f"shards: {shards}; {experts - core} experts are left to be dealt, so at most so many"
        )
    most = experts - core - -(-(experts - core) // shards)
    if not 0 <= overlap <= most:
        raise ShardError(f"overlap: {overlap}; from 0 to {most}, where a shard has all experts")
    if any(mass < 0 for layer in masses for mass in layer):
        raise ShardError("gate mass cannot be below 0")


def _deal_layer(
    mass: Sequence[float], shards: int, core: int, overlap: int
) -> list[tuple[int, ...]]:
    ranked = sorted(range(len(mass)), key=lambda expert: (-mass[expert], expert))
    rest = ranked[core:]
    each = -(-len(rest) // shards)
    dealt: list[list[int]] = [[] for _ in range(shards)]
    loads = [0.0] * shards
    for expert in rest:
        free = [number for number in range(shards) if len(dealt[number]) < each]
        to = min(free, key=lambda number: (loads[number], len(dealt[number]), number))
        dealt[to].append(expert)
        loads[to] += mass[expert]
    size = core + each + overlap
    return [_filled(ranked[:core] + own, rest, size) for own in dealt]


def _filled(own: list[int], rest: Sequence[int], size: int) -> tuple[int, ...]:
    """With the hottest of the rest that it lacks, up to the size."""
    lacks = [expert for expert in rest if expert not in own]
    return tuple(sorted([*own, *lacks[: size - len(own)]]))


def _share(mass: Sequence[float], kept: Sequence[int]) -> float:
    total = sum(mass)
    return sum(mass[expert] for expert in kept) / total if total else len(kept) / len(mass)
