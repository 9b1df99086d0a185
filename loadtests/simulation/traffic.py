"""Who asks for what: conversations with models whose popularity follows Zipf's law and shifts.

The same seed gives the same conversations whatever serves them, so that policies can be compared:
when a conversation begins, its model, its turns and their lengths depend on nothing else. Turns
after the first one come when the answer has been read.
"""

import random
from bisect import bisect
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import msgspec

__all__ = ("Conversation", "Shift", "Turn", "Workload", "conversations", "shifts")


class Workload(msgspec.Struct, frozen=True):
    """What clients do."""

    models: int
    requests_per_second: float
    """On average, in all."""
    zipf: float = 1.0
    """The model of rank r is asked for in proportion to r ** -zipf."""
    shift_every: float = 300.0
    """Seconds; 0: popularity never shifts."""
    shifted: int = 2
    """Models of the first ranks that change places with ones of the last half, at each shift."""
    among: int = 10
    """The ranks from which these are drawn."""
    turns: float = 4.0
    """Of a conversation, on average."""
    think: float = 15.0
    """Seconds from an answer to the next turn."""
    first_prompt: float = 600.0
    """Tokens, on average."""
    next_prompt: float = 80.0
    answer: float = 150.0


class Turn(NamedTuple):
    """One request."""

    fresh: int
    """Tokens of the prompt that no turn before had."""
    answer: int
    think: float
    """Seconds until the next one is asked."""


class Conversation(NamedTuple):
    """Turns with one model; `number` is a key of its own."""

    begins: float
    """Seconds from the start."""
    number: int
    model: str
    turns: tuple[Turn, ...]


class Shift(NamedTuple):
    """At `at` seconds the model becomes popular that hardly anybody asked for."""

    at: float
    model: str
    rank: int
    """The popularity that it gets."""


def name(number: int) -> str:
    """The name of a model."""
    return f"model-{number:03}"


def shifts(workload: Workload, seed: int, until: float) -> list[Shift]:
    """All shifts before `until`, in order."""
    return [shift for shift, _ in _shifting(workload, seed, until) if shift is not None]


def conversations(workload: Workload, seed: int, until: float) -> Iterator[Conversation]:
    """All conversations that begin before `until` seconds, in order."""
    rng = random.Random(f"traffic {seed}")
    rate = workload.requests_per_second / workload.turns
    shares = list(accumulate((rank + 1) ** -workload.zipf for rank in range(workload.models)))
    changes = _shifting(workload, seed, until)
    _, order = next(changes)
    following = next(changes, None)
    at, number = 0.0, 0
    while (at := at + rng.expovariate(rate)) < until:
        while following is not None and following[0] is not None and following[0].at <= at:
            order = following[1]
            following = next(changes, None)
        number += 1
        rank = bisect(shares, rng.random() * shares[-1])
        turns = [_turn(rng, workload, workload.first_prompt)]
        while rng.random() > 1 / workload.turns:
            turns.append(_turn(rng, workload, workload.next_prompt))
        yield Conversation(at, number, name(order[min(rank, len(order) - 1)]), tuple(turns))


def _turn(rng: random.Random, workload: Workload, prompt: float) -> Turn:
    return Turn(
        1 + int(rng.expovariate(1 / prompt)),
        1 + int(rng.expovariate(1 / workload.answer)),
        rng.expovariate(1 / workload.think),
    )


def _shifting(
    workload: Workload, seed: int, until: float
) -> Iterator[tuple[Shift | None, list[int]]]:
    """The order of popularity at first, then each shift with the order after it."""
    rng = random.Random(f"shifts {seed}")
    order = list(range(workload.models))
    rng.shuffle(order)
    yield None, list(order)
    number = 0
    while workload.shift_every and (number := number + 1) * workload.shift_every < until:
        hot = rng.sample(range(min(workload.among, len(order))), workload.shifted)
        cold = rng.sample(range(len(order) // 2, len(order)), workload.shifted)
        for up, down in zip(hot, cold, strict=True):
            order[up], order[down] = order[down], order[up]
            yield Shift(number * workload.shift_every, name(order[up]), up), list(order)
