"""More requests at once than there is room for: each is answered, or told when to come again."""

import asyncio
from collections import Counter

from mesh.verify.check import Check
from mesh.verify.conformance import COUNT
from mesh.verify.endpoint import CHAT, Endpoint, Reply, chat_body
from mesh.verify.finding import Fault, Finding, Passed
from mesh.verify.objects import ChatCompletion

__all__ = ("checks", "retry_after")

_TOKENS = 8
_LONGEST_RETRY = 60.0
"""Seconds that OpenAI's clients wait at most."""


def checks(burst: int) -> tuple[Check, ...]:
    """The checks, for a burst of so many requests."""

    async def whole(endpoint: Endpoint) -> Finding:
        return await _burst(endpoint, burst)

    return (
        Check(
            "overload.burst",
            f"of {burst} at once, each is answered or a 429/503 with Retry-After",
            whole,
        ),
        Check("overload.after", "who comes again when told to is answered", _after),
    )


async def _burst(endpoint: Endpoint, count: int) -> Finding:
    bodies = [chat_body(endpoint.model, f"{n}: {COUNT}", _TOKENS) for n in range(count)]
    replies = await asyncio.gather(
        *(endpoint.post(CHAT, body) for body in bodies), return_exceptions=True
    )
    ends: Counter[str] = Counter()
    faults: list[str] = []
    for reply in replies:
        try:
            ends[_end(reply)] += 1
        except Fault as fault:
            faults.append(str(fault))
    if faults:
        ((worst, times),) = Counter(faults).most_common(1)
        raise Fault(f"{len(faults)} of {count} ended badly; {times} of them: {worst}")
    return Passed(", ".join(f"{number} {end}" for end, number in sorted(ends.items())))


def _end(reply: Reply | BaseException) -> str:
    """How a request of a burst ended.

    Raises:
        Fault: as it must not.
    """
    if isinstance(reply, BaseException):
        raise reply
    if reply.status == 200:
        reply.ok(ChatCompletion)
        return "answered"
    reply.refusal(429, 503)
    retry_after(reply)
    return f"told to wait ({reply.status})"


async def _after(endpoint: Endpoint) -> Finding:
    """As a client does, which waits as long as it is told."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + endpoint.timeout
    tries = 1
    while True:
        reply = await endpoint.post(CHAT, chat_body(endpoint.model, COUNT, _TOKENS))
        if reply.status not in (429, 503):
            reply.ok(ChatCompletion)
            return Passed("at once" if tries == 1 else f"at try {tries}")
        seconds = retry_after(reply)
        if loop.time() + seconds > deadline:
            raise Fault(f"still {reply.status} at try {tries}; Retry-After is {seconds:g} s")
        tries += 1
        await asyncio.sleep(seconds)


def retry_after(reply: Reply) -> float:
    """Seconds to wait before the request is sent again.

    Raises:
        Fault: there is no `Retry-After`, or not one that clients honour.
    """
    said = reply.headers.get("retry-after")
    if said is None:
        raise Fault(f"{reply.what} answered {reply.status} without Retry-After")
    try:
        seconds = float(said)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _LONGEST_RETRY:
        raise Fault(
            f"{reply.what} answered {reply.status} with Retry-After {said!r}; wanted 0 to "
            f"{_LONGEST_RETRY:g} seconds"
        )
    return seconds
