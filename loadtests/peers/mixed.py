"""Part "mixed": what long prompts do to the streams that run and to short requests that arrive.

Some streams run all the time. Long prompts and short requests arrive beside them by a timetable
that is the same for every system and does not wait for answers, since a system that puts the long
ones off would else be given fewer of them. How fast they follow each other is set by the machine:
a long prompt every three times what one takes alone.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from typing import Literal

import msgspec

from loadtests.crowd import Crowd
from loadtests.figures import markdown, median_and_range
from loadtests.http_reply import Reply
from loadtests.peers.asking import PartFailed, ask, chat, milliseconds, pauses, settle
from loadtests.peers.systems import System
from loadtests.peers.texts import Texts

__all__ = ("Arrival", "MixedRow", "measure_mixed", "mixed_table", "timetable")

STREAMS = 4
LONG_TOKENS = 1500
STREAM_TOKENS = 512
ANSWER_TOKENS = 16
SHORT_FOR_EACH_LONG = 6
_SPACING = 3.0
"""Times a long prompt's own time from one to the next."""

Kind = Literal["short", "long"]
now = time.monotonic


class Arrival(msgspec.Struct, frozen=True):
    """A request that comes `at` seconds after the start."""

    at: float
    kind: Kind


class MixedRow(msgspec.Struct, frozen=True, tag_field="part", tag="mixed"):
    """One system in one repetition; times in milliseconds."""

    rep: int
    system: str
    long_alone: float
    """TTFT of a long prompt with nothing beside it, by which the timetable was made."""
    short_ttft_p50: float
    short_ttft_p99: float
    long_ttft_p50: float
    itl_p50: float
    itl_p99: float
    itl_most: float
    streams_per_second: float
    """Tokens a second of the streams together, while requests arrived."""


def timetable(spacing: float, longs: int, seed: int) -> list[Arrival]:
    """Arrivals in order: a long one about every `spacing` seconds, short ones between them."""
    draw = random.Random(seed)
    arrivals = [
        Arrival(spacing * (number + draw.uniform(0.1, 0.4)), "long") for number in range(longs)
    ]
    step = spacing / SHORT_FOR_EACH_LONG
    arrivals += [
        Arrival(step * (number + draw.random()), "short")
        for number in range(longs * SHORT_FOR_EACH_LONG)
    ]
    return sorted(arrivals, key=lambda arrival: arrival.at)


async def _one(
    system: System, rep: int, alone: float, arrivals: Sequence[Arrival], texts: Texts
) -> MixedRow:
    crowd = Crowd(system.target, lambda: chat(system, texts.short(), STREAM_TOKENS))
    requests = {
        "short": lambda: chat(system, texts.short(), ANSWER_TOKENS),
        "long": lambda: chat(system, [texts.document(LONG_TOKENS), texts.question(0)], 16),
    }
    prepared = [(arrival, requests[arrival.kind]()) for arrival in arrivals]
    replies: list[tuple[Kind, Reply]] = []

    async def arrive(arrival: Arrival, request: bytes, started: float) -> None:
        await asyncio.sleep(started + arrival.at - now())
        replies.append((arrival.kind, await ask(system, request)))

    crowd.grow(STREAMS)
    try:
        await settle(system, crowd)
        del crowd.recorder.gaps[:]
        crowd.recorder.tokens = 0
        started = now()
        async with asyncio.TaskGroup() as group:
            for arrival, request in prepared:
                group.create_task(arrive(arrival, request, started))
        seconds, tokens = now() - started, crowd.recorder.tokens
        gaps = pauses(crowd.recorder.gaps)
    except* PartFailed as failed:
        raise failed.exceptions[0] from None
    finally:
        crowd.grow(0)
    if crowd.errors:
        raise PartFailed(f"{system.name}: a stream beside the arrivals failed: {crowd.errors[0]}")
    ttft = {kind: [reply.ttft for k, reply in replies if k == kind] for kind in ("short", "long")}
    return MixedRow(
        rep=rep,
        system=system.name,
        long_alone=alone * 1e3,
        short_ttft_p50=milliseconds(ttft["short"], 0.5),
        short_ttft_p99=milliseconds(ttft["short"], 0.99),
        long_ttft_p50=milliseconds(ttft["long"], 0.5),
        itl_p50=milliseconds(gaps, 0.5),
        itl_p99=milliseconds(gaps, 0.99),
        itl_most=milliseconds(gaps, 1.0),
        streams_per_second=tokens / seconds,
    )


async def measure_mixed(
    systems: Sequence[System], *, reps: int, longs: int
) -> AsyncIterator[MixedRow]:
    """Run the same timetable on each system in turn.

    Raises:
        PartFailed: a request failed.
    """
    alone: list[float] = []
    for system in systems:
        texts = Texts(seed=2)
        for _ in range(2):
            request = chat(system, [texts.document(LONG_TOKENS), texts.question(0)], 2)
            reply = await ask(system, request)
        alone.append(reply.ttft)
    spacing = _SPACING * min(alone)
    for rep in range(reps):
        arrivals = timetable(spacing, longs, seed=rep)
        for turn in range(len(systems)):
            number = (turn + rep) % len(systems)
            texts = Texts(seed=100 + rep)
            yield await _one(systems[number], rep, alone[number], arrivals, texts)


def mixed_table(rows: Sequence[MixedRow]) -> str:
    """Medians of all repetitions with their range."""
    columns = {
        "short TTFT p50, ms": "short_ttft_p50",
        "short TTFT p99": "short_ttft_p99",
        "long TTFT p50": "long_ttft_p50",
        "long TTFT alone": "long_alone",
        "streams' ITL p50": "itl_p50",
        "ITL p99": "itl_p99",
        "ITL longest": "itl_most",
        "streams, tok/s": "streams_per_second",
    }
    table = []
    for system in dict.fromkeys(row.system for row in rows):
        mine = [row for row in rows if row.system == system]
        cells = [
            median_and_range([getattr(row, name) for row in mine]) for name in columns.values()
        ]
        table.append((system, *cells))
    return markdown(("system", *columns), table)
