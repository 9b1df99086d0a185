"""Choosing the hosts that carry a model together: the fewest, then the nearest. Pure.

A message between two hosts goes through NATS, so that each host adds its own round trip to the way
round the ring, in whatever order they stand: the nearest are those with the least sum.

What a set of hosts can hold is found one host after the other: whoever holds the layers up to some
number best leaves the fewest for those who follow. That is exact for any order of the hosts, and
takes time that doubles with each; so of many hosts `MOST` are looked at, the nearest and the
largest, and where these are not enough the largest of all until they are.
"""

from collections.abc import Sequence
from itertools import chain

from shared.model_shape import Scales
from shared.partition import Host, Stage, deal, reach

__all__ = ("MOST", "choose_partners", "holds")

MOST = 10
"""Hosts among which all sets are tried."""
MOST_STAGES = 32
"""A ring of more is no use: each adds a hop to every token."""


def choose_partners(
    scales: Scales, hosts: Sequence[Host], *, most: int = MOST_STAGES
) -> tuple[Stage, ...] | None:
    """Choose hosts and deal the layers.

    Args:
        scales: the model, and how much of it at once.
        hosts: all that may be taken; no two with one name.
        most: stages at most.

    Returns:
        The stages, the head last; None where no set of hosts holds the model.
    """
    if len({host.name for host in hosts}) < len(hosts):
        raise ValueError("two hosts have the same name")
    candidates = _candidates(hosts)
    for chosen in _sets(scales, candidates, most):
        if (stages := _best_order(scales, chosen)) is not None:
            return stages
    if len(candidates) == len(hosts):
        return None
    largest = sorted(hosts, key=lambda host: (-host.memory, host.rtt, host.name))
    for count in range(1, min(most, len(largest)) + 1):
        if (stages := _best_order(scales, largest[:count])) is not None:
            return stages
    return None


def holds(scales: Scales, hosts: Sequence[Host]) -> bool:
    """Whether these hosts together hold the model; of more than `MOST`, in their order."""
    if len(hosts) > MOST:
        return deal(scales, hosts) is not None
    held, _ = _coverage(scales, hosts)
    return _suffices(scales, hosts, held, (1 << len(hosts)) - 1)


def _candidates(hosts: Sequence[Host]) -> list[Host]:
    if len(hosts) <= MOST:
        return sorted(hosts, key=lambda host: host.name)
    nearest = sorted(hosts, key=lambda host: (host.rtt, -host.memory, host.name))
    largest = sorted(hosts, key=lambda host: (-host.memory, host.rtt, host.name))
    both = dict.fromkeys(chain.from_iterable(zip(nearest, largest, strict=True)))
    return sorted(list(both)[:MOST], key=lambda host: host.name)


def _coverage(scales: Scales, hosts: Sequence[Host]) -> tuple[list[int], list[int]]:
    """How many layers each set of hosts holds from the first on, and who is its last one.

    Both lists are by the set's bits: host number n is in it where bit n is set.
    """
    held, last = [0] * (1 << len(hosts)), [-1] * (1 << len(hosts))
    for members in range(1, len(held)):
        for bit, host in enumerate(hosts):
            if members >> bit & 1:
                got = reach(scales, host.memory, held[members & ~(1 << bit)])
                if last[members] < 0 or got > held[members]:
                    held[members], last[members] = got, bit
    return held, last


def _suffices(scales: Scales, hosts: Sequence[Host], held: list[int], members: int) -> bool:
    """Whether one of the set can be the head of what the others leave."""
    count = len(scales.shape.layers)
    return any(
        scales.memory(held[members & ~(1 << bit)], count, head=True) <= host.memory
        for bit, host in enumerate(hosts)
        if members >> bit & 1
    )


def _sets(scales: Scales, hosts: Sequence[Host], most: int) -> list[list[Host]]:
    """The sets that can hold the model, those of fewest hosts only, the best first."""
    held, _ = _coverage(scales, hosts)
    able = [members for members in range(1, len(held)) if _suffices(scales, hosts, held, members)]
    fewest = min((members.bit_count() for members in able), default=most + 1)
    if fewest > most:
        return []
    sets = [
        [host for bit, host in enumerate(hosts) if members >> bit & 1]
        for members in able
        if members.bit_count() == fewest
    ]
    # Round trips are told apart by the millisecond: less is chance.
    return sorted(
        sets,
        key=lambda chosen: (
            round(sum(host.rtt for host in chosen), 3),
            -sum(host.memory for host in chosen),
            [host.name for host in chosen],
        ),
    )


def _best_order(scales: Scales, hosts: Sequence[Host]) -> tuple[Stage, ...] | None:
    """Deal the layers to these, with the head where the slowest stage is fastest."""
    best: tuple[float, tuple[Stage, ...]] | None = None
    # Of very many only the largest: each costs a dealing.
    for head in hosts if len(hosts) <= MOST else hosts[:1]:
        others = _in_best_order(scales, [host for host in hosts if host is not head])
        stages = deal(scales, [*others, head])
        if stages is None:
            continue
        slowest = next(one for one in stages if one.share == 1.0)
        host = next(host for host in hosts if host.name == slowest.host)
        took = scales.work(slowest.start, slowest.stop, head=slowest.head) / host.speed
        if best is None or took < best[0]:
            best = (took, stages)
    return best[1] if best else None


def _in_best_order(scales: Scales, hosts: Sequence[Host]) -> list[Host]:
    """The order in which they hold most; of more than `MOST`, the largest first."""
    if len(hosts) > MOST:
        return list(hosts)
    _, last = _coverage(scales, hosts)
    members, order = (1 << len(hosts)) - 1, list[Host]()
    while members:
        order.append(hosts[last[members]])
        members &= ~(1 << last[members])
    return order[::-1]
