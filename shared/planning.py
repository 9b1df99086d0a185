"""How a model is to be served by the hosts at hand, and why so. Pure.

One host if any has the room. Else several, each with some of the layers; or shards, each with some
of the experts, where the owner allows the loss of quality. Else a refusal that says what is
missing.

The fewest hosts come first, with as little beside the weights as can be served at all; what is left
on them then goes to more cells and wider steps.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import msgspec

from shared.model_shape import ModelShape, Scales, Size
from shared.partition import Host, Stage
from shared.partners import choose_partners, holds
from shared.sizes import format_size

__all__ = ("SPLITTABLE", "Kind", "LeftOut", "Plan", "Shards", "Wanted", "plan")

Kind = Literal["single", "pipeline", "shards", "refused"]

SPLITTABLE = frozenset({"gemma2", "gemma3", "llama", "phi3", "qwen2", "qwen3", "qwen3moe"})
"""Architectures whose staged logits a test has shown to be the whole model's."""

STEPS = (512, 256, 128, 64, 32)
"""Rows of the widest step, the best first: the logits of so many take room."""
LEAST_CELLS = 512


class Wanted(msgspec.Struct, frozen=True):
    """What the owner wants of it."""

    context: int = 4096
    """Tokens of one sequence."""
    slots: int = 8
    least_cells: int = LEAST_CELLS
    """Fewer are of no use."""
    cap: float = 0.080
    """Seconds of round trip beyond which a host is no partner."""
    shards: bool = False
    """Whether experts may be left out."""


class LeftOut(msgspec.Struct, frozen=True):
    """A host that has no part in the plan."""

    host: str
    memory: int
    reason: str


class Shards(msgspec.Struct, frozen=True):
    """How many experts of each layer every shard keeps."""

    experts: int
    of: int
    memory: int
    """Bytes a shard takes."""


class Plan(msgspec.Struct, frozen=True):
    """What is to run where. Stages are in their order round the ring; the head is the last."""

    kind: Kind
    model: str
    stages: tuple[Stage, ...] = ()
    """Of `single`, one stage of all layers; of `shards`, none."""
    cells: int = 0
    step: int = 0
    replicas: tuple[str, ...] = ()
    """Hosts each of which could hold all of it, or a shard; the first is the one meant."""
    shards: Shards | None = None
    round_trip: float = 0.0
    """Seconds a token spends between the hosts."""
    left_out: tuple[LeftOut, ...] = ()
    reasons: tuple[str, ...] = ()
    better: tuple[str, ...] = ()
    """What it would take to do better."""


_USUAL = Wanted()


def plan(shape: ModelShape, hosts: Sequence[Host], wanted: Wanted = _USUAL) -> Plan:
    """Plan a model.

    Raises:
        ValueError: the model has no layers, or two hosts have one name.
    """
    if not shape.layers:
        raise ValueError(f"the model {shape.name!r} has no layers")
    # All who plan from the same beats are to say the same, in whichever order they heard them.
    hosts = sorted(hosts, key=lambda host: host.name)
    near = [host for host in hosts if host.rtt <= wanted.cap]
    far = tuple(
        LeftOut(
            host.name,
            host.memory,
            f"{host.rtt * 1000:.0f} ms away, more than {wanted.cap * 1000:g} ms",
        )
        for host in hosts
        if host.rtt > wanted.cap
    )
    made = _single(shape, near, wanted) or _several(shape, near, wanted)
    return msgspec.structs.replace(made, left_out=(*made.left_out, *far))


def _sizes(shape: ModelShape, wanted: Wanted) -> tuple[int, int]:
    """The fewest cells that are of use, and the most."""
    context = min(wanted.context, shape.context or wanted.context)
    most = max(1, context * wanted.slots)
    return min(wanted.least_cells, most), most


def _largest(fits: Callable[[Size], bool], least: int, most: int) -> Size | None:
    """The size that makes best use of the room: a wide step, halved while that doubles cells."""
    best: Size | None = None
    for step in STEPS:
        if not fits(Size(least, step)):
            continue
        low, high = least, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(Size(middle, step)) else (low, middle - 1)
        if best is None or low >= 2 * best.cells:
            best = Size(low, step)
    return best


def _single(shape: ModelShape, hosts: Sequence[Host], wanted: Wanted) -> Plan | None:
    least, most = _sizes(shape, wanted)

    def room(host: Host) -> Size | None:
        return _largest(lambda size: Scales(shape, size).whole <= host.memory, least, most)

    sizes = {host.name: size for host in hosts if (size := room(host)) is not None}
    if not sizes:
        return None
    able = sorted(
        (host for host in hosts if host.name in sizes),
        key=lambda host: (-sizes[host.name].cells, round(host.rtt, 3), -host.memory, host.name),
    )
    chosen, size = able[0], sizes[able[0].name]
    scales, count = Scales(shape, size), len(shape.layers)
    stage = Stage(
        host=chosen.name,
        start=0,
        stop=count,
        memory=scales.whole,
        weights=shape.weights,
        head=True,
        share=1.0,
    )
    small = f"needs {format_size(Scales(shape, Size(least, STEPS[-1])).whole)}"
    left = [
        LeftOut(host.name, host.memory, small if host.name not in sizes else "could hold it too")
        for host in hosts
        if host is not chosen
    ]
    copies = f"; {len(able)} hosts could have a copy" if len(able) > 1 else ""
    return Plan(
        kind="single",
        model=shape.name,
        stages=(stage,),
        cells=size.cells,
        step=size.step,
        replicas=tuple(host.name for host in able),
        round_trip=chosen.rtt,
        left_out=tuple(left),
        reasons=(f"it fits on one host{copies}",),
        better=_more_cells(size.cells, most, scales, chosen.memory),
    )


def _more_cells(cells: int, most: int, scales: Scales, memory: int) -> tuple[str, ...]:
    if cells >= most:
        return ()
    whole = Scales(scales.shape, Size(most, scales.size.step)).whole
    return (
        f"{format_size(whole - memory)} more memory would hold all {most:,} cells that are wanted",
    )


def _several(shape: ModelShape, hosts: Sequence[Host], wanted: Wanted) -> Plan:
    least, most = _sizes(shape, wanted)
    if wanted.shards and shape.experts and (shards := _shards(shape, hosts, least)):
        return shards
    if shape.architecture not in SPLITTABLE:
        return _refused(shape, hosts, wanted, least)
    # A narrow step leaves most room: with it the fewest hosts are found.
    stages = choose_partners(Scales(shape, Size(least, STEPS[-1])), hosts)
    if stages is None:
        return _refused(shape, hosts, wanted, least)
    members = [host for host in hosts if any(host.name == one.host for one in stages)]

    size = _largest(lambda size: holds(Scales(shape, size), members), least, most)
    if size is not None:
        stages = choose_partners(Scales(shape, size), members) or stages
    else:
        size = Size(least, STEPS[-1])
    used = {stage.host for stage in stages}
    largest = max(hosts, key=lambda host: host.memory)
    whole = Scales(shape, Size(least, STEPS[-1])).whole
    return Plan(
        kind="pipeline",
        model=shape.name,
        stages=stages,
        cells=size.cells,
        step=size.step,
        round_trip=sum(host.rtt for host in members),
        left_out=tuple(
            LeftOut(host.name, host.memory, f"{len(stages)} hosts are enough")
            for host in hosts
            if host.name not in used
        ),
        reasons=(
            f"no host holds it alone: that takes {format_size(whole)}, "
            f"the largest, {largest.name}, has {format_size(largest.memory)}",
            f"{len(stages)} hosts are the fewest that hold it; layers are dealt so that the "
            "slowest stage is as fast as can be",
        ),
        better=(
            f"{format_size(whole - largest.memory)} more memory on {largest.name} would hold it "
            "on one host, without a hop for each token",
        ),
    )


def _shards(shape: ModelShape, hosts: Sequence[Host], least: int) -> Plan | None:
    size = Size(least, STEPS[-1])
    scales = Scales(shape, size)
    experts = sum(layer.experts for layer in shape.layers)

    def memory(kept: int) -> int:
        return scales.whole - experts + experts * kept // shape.experts

    def fitting(kept: int) -> list[Host]:
        return [host for host in hosts if memory(kept) <= host.memory]

    # Every expert must be on a shard: the fewer one keeps, the more shards there must be.
    for kept in range(shape.experts - 1, max(1, shape.experts_used) - 1, -1):
        able = sorted(fitting(kept), key=lambda host: (host.rtt, -host.memory, host.name))
        if kept * len(able) >= shape.experts:
            break
    else:
        return None
    return Plan(
        kind="shards",
        model=shape.name,
        cells=least,
        step=size.step,
        replicas=tuple(host.name for host in able),
        shards=Shards(kept, shape.experts, memory(kept)),
        left_out=tuple(
            LeftOut(host.name, host.memory, f"a shard takes {format_size(memory(kept))}")
            for host in hosts
            if host not in able
        ),
        reasons=(
            f"no host holds it alone: that takes {format_size(scales.whole)}; shards are allowed",
            f"{kept} of {shape.experts} experts a layer are the most of which {len(able)} hosts "
            "can each hold a shard, every expert on at least one",
        ),
    )


def _refused(shape: ModelShape, hosts: Sequence[Host], wanted: Wanted, least: int) -> Plan:
    size = Size(least, STEPS[-1])
    scales = Scales(shape, size)
    if not hosts:
        reasons: tuple[str, ...] = ("there is no host near enough",)
    else:
        largest = max(hosts, key=lambda host: host.memory)
        reasons = (
            f"no host holds it alone: that takes {format_size(scales.whole)}, "
            f"the largest, {largest.name}, has {format_size(largest.memory)}",
        )
        if shape.architecture not in SPLITTABLE:
            reasons += (
                f"it cannot be split by layers: its architecture is {shape.architecture!r}, "
                f"which has not been shown to work; {', '.join(sorted(SPLITTABLE))} can",
            )
        else:
            reasons += (_missing(scales, hosts),)
    better: tuple[str, ...] = ()
    if shape.experts and not wanted.shards:
        better = ("it has experts: with shards allowed, hosts could each hold some of them",)
    return Plan(
        kind="refused",
        model=shape.name,
        left_out=tuple(LeftOut(host.name, host.memory, "too small") for host in hosts),
        reasons=reasons,
        better=better,
    )


def _missing(scales: Scales, hosts: Sequence[Host]) -> str:
    """What keeps the layers from being dealt."""
    count = len(scales.shape.layers)
    period = scales.shape.period
    cuts = [*range(0, count, period), count]
    pieces = [scales.memory(a, b, head=False) for a, b in pairwise(cuts)]
    head = scales.memory(cuts[-2], count, head=True)
    most = max(host.memory for host in hosts)
    if head > most:
        return (
            f"embedding, output and the last layers are not split, and take {format_size(head)} "
            f"on one host; the largest has {format_size(most)}"
        )
    if max(pieces) > most:
        return (
            f"a layer is not split, and takes {format_size(max(pieces))} with its buffers; "
            f"the largest host has {format_size(most)}"
        )
    together = sum(host.memory for host in hosts)
    return (
        f"all {len(hosts)} hosts together have {format_size(together)}, of which each needs its "
        f"own buffers; the model takes {format_size(scales.whole)}"
    )
