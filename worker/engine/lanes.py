"""Decoding in lanes: while the rows of one are at other stages, tokens of another are drawn.

A step as a whole leaves the stages idle while the head samples, and the head while they compute.
So where all that run only decode, they are dealt to as many lanes as there are stages, each with a
step of its own: as soon as a lane's tokens are drawn it sets off again, and comes back behind the
others. It ends when anything else is to be done: who comes, leaves or is complete has an effect
on slots, and those change only when nothing is under way.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

__all__ = ("deal", "overlap")

Item = TypeVar("Item")
Going = TypeVar("Going")


def deal(items: Sequence[Item], lanes: int) -> list[Sequence[Item]]:
    """Cut into so many parts, or as many as there are items; sizes differ by 1 at most."""
    count = min(lanes, len(items))
    return [items[len(items) * n // count : len(items) * (n + 1) // count] for n in range(count)]


def overlap(
    lanes: Sequence[Sequence[Item]],
    begin: Callable[[Sequence[Item]], Going],
    finish: Callable[[Going], bool],
) -> int:
    """Let the lanes go round until there is something else to do.

    Args:
        lanes: what is in each.
        begin: sends a lane's step off; what it returns is given to `finish`.
        finish: waits for the oldest step under way and does what follows; False: all are to come to
            an end.

    Returns:
        Steps of lanes that were finished.
    """
    under_way = deque((lane, begin(lane)) for lane in lanes)
    go_on = True
    steps = 0
    while under_way:
        lane, going = under_way.popleft()
        go_on = finish(going) and go_on
        steps += 1
        if go_on:
            under_way.append((lane, begin(lane)))
    return steps
