"""A process of the endpoint ends in the middle of streams: none is lost, or each says so.

These hurt, and are run only for a process that was named.
"""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

import msgspec

from mesh.verify.check import Check
from mesh.verify.endpoint import CHAT, Endpoint, Streamed, chat_body, data_of, error_of
from mesh.verify.finding import Failed, Fault, Finding, Passed, Skipped
from mesh.verify.objects import ChatChunk, read

__all__ = ("checks",)

_TOKENS = 64
_BEGUN = 4
"""Events that a stream has had when its process is ended."""
_MOST = 0.8
"""Part of the streams that must have begun."""
_MAY_DIFFER = 10
"""One stream in so many may say something else behind the failure: two tokens in a near tie may
fall the other way where they are computed in other company."""
_THINGS = ("a harbour", "a violin", "the moon", "bread", "a train", "winter", "a fox", "a clock")


class _Told(msgspec.Struct):
    """A stream that is whole."""

    text: str
    resumed: int
    pause: float
    """Seconds, the longest."""


def checks(streams: int, drain_pid: int | None, kill_pid: int | None) -> tuple[Check, ...]:
    """The checks, for so many streams; without a process they are skipped."""
    return (
        Check(
            "failover.drain",
            "no stream is lost by a SIGTERM (--drain-pid)",
            _check(streams, drain_pid, signal.SIGTERM, "--drain-pid"),
        ),
        Check(
            "failover.kill",
            "none by a kill -9, or each says so (--kill-pid)",
            _check(streams, kill_pid, signal.SIGKILL, "--kill-pid"),
        ),
    )


def _check(
    streams: int, pid: int | None, number: signal.Signals, flag: str
) -> Callable[[Endpoint], Awaitable[Finding]]:
    async def run(endpoint: Endpoint) -> Finding:
        if pid is None:
            return Skipped(f"ends a process; allowed by {flag}")
        bodies = [
            chat_body(
                endpoint.model,
                f"Write a long story about {_THINGS[n % len(_THINGS)]}, number {n}.",
                _TOKENS,
            )
            for n in range(streams)
        ]
        return await _disturb(endpoint, bodies, pid, number)

    return run


async def _disturb(
    endpoint: Endpoint, bodies: list[dict[str, Any]], pid: int, number: signal.Signals
) -> Finding:
    undisturbed = [_whole(one) for one in await _streams(endpoint, bodies)]
    control = [_whole(one) for one in await _streams(endpoint, bodies[::-1])][::-1]
    ended = False

    def end() -> None:
        nonlocal ended
        # The process may have ended by itself; then there is nothing to be seen.
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            ended = True

    seen = await _streams(endpoint, bodies, end)
    if not ended:
        return Failed(f"process {pid} was gone, or the streams were over, before the {number.name}")
    return _judge(undisturbed, control, seen, must_show=number is signal.SIGKILL)


def _judge(
    undisturbed: list[_Told], control: list[_Told], seen: list[Streamed], *, must_show: bool
) -> Finding:
    """`must_show`: streams of the process that was ended cannot have come to their end there."""
    whole: list[_Told] = []
    told_of = 0
    differ = 0
    for one, other, streamed in zip(undisturbed, control, seen, strict=True):
        if error_of(streamed):
            told_of += 1
            continue
        mine = _whole(streamed)
        whole.append(mine)
        # What differs without any failure shows nothing.
        differ += one.text == other.text != mine.text
    if differ > -(-len(seen) // _MAY_DIFFER):
        return Failed(f"{differ} of {len(seen)} streams say something else than undisturbed")
    moved = sum(mine.resumed > 0 for mine in whole)
    if must_show and not moved and not told_of:
        return Skipped("all streams are whole, but none tells that it was on this process")
    pause = max((mine.pause for mine in whole if mine.resumed), default=0.0)
    words = [f"{len(whole)} of {len(seen)} whole", f"{len(whole) - differ} with the same text"]
    words += [f"{moved} went on elsewhere, longest pause {pause:.1f} s"] if moved else []
    words += [f"{told_of} ended with an error event"] if told_of else []
    return Passed(", ".join(words))


def _whole(streamed: Streamed) -> _Told:
    """What a stream said.

    Raises:
        Fault: it is not whole.
    """
    chunks = [read(data, ChatChunk, "an event of the stream") for data in data_of(streamed)]
    gaps = zip(streamed.times, streamed.times[1:], strict=False)
    return _Told(
        "".join(chunk.text for chunk in chunks),
        max((chunk.timings.resumed for chunk in chunks if chunk.timings), default=0),
        max((later - earlier for earlier, later in gaps), default=0.0),
    )


async def _streams(
    endpoint: Endpoint,
    bodies: list[dict[str, Any]],
    during: Callable[[], None] | None = None,
) -> list[Streamed]:
    """All at once; `during` is called once, when most have begun and some go on.

    Raises:
        Fault: one of them hangs.
    """
    known: dict[int, Streamed] = {}
    waiting = during

    def heard(number: int, streamed: Streamed) -> None:
        nonlocal waiting
        known[number] = streamed
        begun = sum(len(one.data) >= _BEGUN or one.over for one in known.values())
        if waiting is None or begun < _MOST * len(bodies):
            return
        if any(not one.over for one in known.values()):
            call, waiting = waiting, None
            call()

    async def one(number: int, body: Mapping[str, Any]) -> Streamed:
        return await endpoint.stream(CHAT, body, lambda streamed: heard(number, streamed))

    ends = await asyncio.gather(
        *(one(number, body) for number, body in enumerate(bodies)), return_exceptions=True
    )
    faults = [end for end in ends if isinstance(end, BaseException)]
    if faults:
        raise Fault(f"{len(faults)} of {len(bodies)} streams: {faults[0]}") from faults[0]
    return [end for end in ends if isinstance(end, Streamed)]
