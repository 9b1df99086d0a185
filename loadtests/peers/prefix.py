"""Part "prefix": a long system message that many requests share, computed how often?

sequential: questions about one document, one after another. cold: the same about a new document,
all at once. alternating: two conversations about two documents take turns, each longer with every
turn. busy: all slots but one run; one of the running has the document; a question about it and a
request about something else take turns on the slot that is left.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Literal

import msgspec

from loadtests.crowd import Crowd
from loadtests.figures import markdown, median_and_range
from loadtests.http_reply import Reply
from loadtests.peers.asking import (
    PartFailed,
    ask,
    ask_all,
    cached_tokens,
    chat,
    milliseconds,
    settle,
)
from loadtests.peers.systems import System
from loadtests.peers.texts import Message, Texts, assistant

__all__ = ("ORDERS", "Order", "PrefixRow", "measure_prefix", "prefix_row", "prefix_table")

now = time.monotonic

Order = Literal["sequential", "cold", "alternating", "busy"]
ORDERS: tuple[Order, ...] = ("sequential", "cold", "alternating", "busy")

PREFIX_TOKENS = 1500
QUESTIONS = 8
TURNS = 5
ANSWER_TOKENS = 16
STREAM_TOKENS = 900
"""Of the running streams of `busy`: long enough, and no longer than the slot has room for."""


class PrefixRow(msgspec.Struct, frozen=True, tag_field="part", tag="prefix"):
    """One system, one order of asking, in one repetition; times in milliseconds."""

    rep: int
    system: str
    order: Order
    first: float
    """TTFT of the request that had to compute the prefix; of `cold`: the soonest."""
    p50: float
    """TTFT of the later ones; of `cold`: of all."""
    p99: float
    prompt_tokens: int
    """Of the requests that p50 is of, together."""
    cached_tokens: int

    @property
    def share(self) -> float:
        """TTFT of the later ones over the first's."""
        return self.p50 / self.first


def prefix_row(
    rep: int, system: str, order: Order, first: Sequence[float], later: Sequence[Reply]
) -> PrefixRow:
    """Sum up; `first` is the seconds to the first token of those that had to compute a prefix,
    `later` are those that could have reused it. Without a first, the soonest of `later` is it.
    """
    times = [reply.ttft for reply in later]
    return PrefixRow(
        rep=rep,
        system=system,
        order=order,
        first=milliseconds(first, 0.5) if first else milliseconds(times, 0.0),
        p50=milliseconds(times, 0.5),
        p99=milliseconds(times, 0.99),
        prompt_tokens=sum(int(reply.usage.get("prompt_tokens", 0)) for reply in later),
        cached_tokens=sum(map(cached_tokens, later)),
    )


def _questions(system: System, texts: Texts) -> list[bytes]:
    document = texts.document(PREFIX_TOKENS)
    return [
        chat(system, [document, texts.question(number)], ANSWER_TOKENS)
        for number in range(QUESTIONS)
    ]


async def _sequential(system: System, rep: int, texts: Texts, slots: int) -> PrefixRow:
    document = texts.document(PREFIX_TOKENS)
    requests = [
        chat(system, [document, texts.question(i)], ANSWER_TOKENS) for i in range(QUESTIONS)
    ]
    replies = await ask_all(system, requests, at_once=1)
    return prefix_row(rep, system.name, "sequential", [replies[0].ttft], replies[1:])


async def _cold(system: System, rep: int, texts: Texts, slots: int) -> PrefixRow:
    document = texts.document(PREFIX_TOKENS)
    requests = [
        chat(system, [document, texts.question(i)], ANSWER_TOKENS) for i in range(QUESTIONS)
    ]
    return prefix_row(
        rep, system.name, "cold", [], await ask_all(system, requests, at_once=QUESTIONS)
    )


async def _alternating(system: System, rep: int, texts: Texts, slots: int) -> PrefixRow:
    talks: list[list[Message]] = [[texts.document(PREFIX_TOKENS)] for _ in range(2)]
    first: list[float] = []
    later: list[Reply] = []
    for turn in range(TURNS):
        for talk in talks:
            talk.append(texts.question(turn))
            reply = await ask(system, chat(system, talk, ANSWER_TOKENS))
            if turn:
                later.append(reply)
            else:
                first.append(reply.ttft)
            # a text of our own, so that the systems go on with the same
            talk.append(assistant(texts.filler(26)))
    return prefix_row(rep, system.name, "alternating", first, later)


async def _busy(system: System, rep: int, texts: Texts, slots: int) -> PrefixRow:
    document = texts.document(PREFIX_TOKENS)
    holding = chat(system, [document, texts.question(0)], STREAM_TOKENS)
    crowd = Crowd(system.target, lambda: chat(system, texts.short(), STREAM_TOKENS))
    holder = Crowd(system.target, lambda: holding)
    later: list[Reply] = []
    crowd.grow(slots - 2)
    try:
        await settle(system, crowd)
        started = now()
        holder.grow(1)
        await settle(system, holder)
        first = now() - started
        for number in range(1, 1 + QUESTIONS):
            await ask(system, chat(system, texts.short(), ANSWER_TOKENS))
            question = chat(system, [document, texts.question(number)], ANSWER_TOKENS)
            later.append(await ask(system, question))
    finally:
        crowd.grow(0)
        holder.grow(0)
    if errors := crowd.errors + holder.errors:
        raise PartFailed(f"{system.name}: a running stream failed: {errors[0]}")
    return prefix_row(rep, system.name, "busy", [first], later)


_WAYS: dict[Order, Callable[[System, int, Texts, int], Awaitable[PrefixRow]]] = {
    "sequential": _sequential,
    "cold": _cold,
    "alternating": _alternating,
    "busy": _busy,
}


async def measure_prefix(
    systems: Sequence[System], *, reps: int, slots: int, orders: Sequence[Order] = ORDERS
) -> AsyncIterator[PrefixRow]:
    """Ask each system in each order, about the same documents, new ones each time.

    Raises:
        PartFailed: a request failed.
    """
    for system in systems:
        await ask(system, chat(system, Texts(seed=3).short(), ANSWER_TOKENS))
    for rep in range(reps):
        for place, order in enumerate(orders):
            for turn in range(len(systems)):
                system = systems[(turn + rep) % len(systems)]
                texts = Texts(seed=1000 * (rep + 1) + place)
                yield await _WAYS[order](system, rep, texts, slots)


def prefix_table(rows: Sequence[PrefixRow]) -> str:
    """Medians of all repetitions with their range."""
    heads = (
        "order",
        "system",
        "first TTFT, ms",
        "later TTFT p50 (cold: all)",
        "p99",
        "later / first",
        "prompt tokens reused, %",
    )
    table = []
    for order in ORDERS:
        for system in dict.fromkeys(row.system for row in rows if row.order == order):
            mine = [row for row in rows if (row.order, row.system) == (order, system)]
            times = [
                median_and_range([getattr(row, name) for row in mine])
                for name in ("first", "p50", "p99")
            ]
            share = median_and_range([row.share for row in mine])
            reused = [100 * row.cached_tokens / max(1, row.prompt_tokens) for row in mine]
            table.append((order, system, *times, share, median_and_range(reused)))
    return markdown(heads, table)
