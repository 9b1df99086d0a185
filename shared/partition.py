"""Dealing a model's layers to hosts in a row: within their memory, and so that none is waited for.

Pure. A pipeline is as fast as its slowest stage, so the layers are dealt so that the longest time
of a stage is the least possible, by dynamic programming over the cuts (exact; the time grows with
hosts times the square of the cuts).
"""

from bisect import bisect_right
from collections.abc import Sequence

import msgspec

from shared.model_shape import Scales

__all__ = ("Host", "Stage", "deal", "reach")


class Host(msgspec.Struct, frozen=True):
    """A host that may carry a part of a model."""

    name: str
    memory: int
    """Bytes free for it."""
    rtt: float = 0.0
    """Seconds there and back through NATS."""
    speed: float = 1.0
    """Of decoding, against the other hosts."""


class Stage(msgspec.Struct, frozen=True):
    """The layers from `start` to before `stop`, on one host."""

    host: str
    start: int
    stop: int
    memory: int
    """Bytes it takes there."""
    weights: int
    """Of these, the model's own."""
    head: bool
    """It embeds tokens, computes logits and samples: always the last one."""
    share: float
    """Its time for a token, of the slowest stage's."""


def reach(scales: Scales, memory: int, start: int) -> int:
    """How far a stage without the head gets from `start`; `start` if not one piece fits."""
    cuts = _cuts(scales, start)
    fit = bisect_right(cuts, memory, key=lambda stop: scales.memory(start, stop, head=False))
    return cuts[fit - 1] if fit else start


def deal(scales: Scales, hosts: Sequence[Host]) -> tuple[Stage, ...] | None:
    """Give every host some layers, in this order; the last one gets the head.

    Returns:
        The stages, or None where the layers cannot be dealt so that all memories hold them.
    """
    count = len(scales.shape.layers)
    # Least longest time with which the first hosts get so far, and where the last of them begins.
    ways: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for number, host in enumerate(hosts):
        head = number == len(hosts) - 1
        best: dict[int, tuple[float, int]] = {}
        for start, (slowest, _) in ways[-1].items():
            for stop in (count,) if head else _cuts(scales, start):
                if scales.memory(start, stop, head=head) > host.memory:
                    break
                took = max(slowest, scales.work(start, stop, head=head) / host.speed)
                if start < stop and (stop not in best or (took, start) < best[stop]):
                    best[stop] = (took, start)
        ways.append(best)
    if count not in ways[-1]:
        return None
    slowest = ways[-1][count][0]
    stages: list[Stage] = []
    stop = count
    for number in range(len(hosts), 0, -1):
        start = ways[number][stop][1]
        host, head = hosts[number - 1], number == len(hosts)
        stages.append(
            Stage(
                host=host.name,
                start=start,
                stop=stop,
                memory=scales.memory(start, stop, head=head),
                weights=scales.weights(start, stop, head=head),
                head=head,
                share=scales.work(start, stop, head=head) / host.speed / slowest,
            )
        )
        stop = start
    return tuple(reversed(stages))


def _cuts(scales: Scales, start: int) -> range:
    """Where a stage from `start` may end, the model's end left out."""
    period = scales.shape.period
    return range(start + period, len(scales.shape.layers), period)
