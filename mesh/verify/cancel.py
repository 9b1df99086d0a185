"""Clients that leave: the endpoint goes on, and what they had asked for is given up."""

import asyncio

import httpx

from mesh.verify.check import Check
from mesh.verify.conformance import COUNT
from mesh.verify.endpoint import CHAT, Endpoint, chat_body
from mesh.verify.finding import Failed, Fault, Finding, Passed
from mesh.verify.objects import ChatCompletion

__all__ = ("CHECKS",)

_LONG = 2000
"""Tokens: nobody waits for the end of it."""
_MANY = 8
_FREE_WITHIN = 5.0
"""Seconds."""
_LOOK_EVERY = 0.05


async def stream(endpoint: Endpoint) -> Finding:
    """A client leaves in the middle of a stream."""
    before = await endpoint.in_flight()
    await _leave_stream(endpoint)
    return await _after(endpoint, before)


async def whole(endpoint: Endpoint) -> Finding:
    """A client leaves while it waits for a whole answer."""
    before = await endpoint.in_flight()
    asked = asyncio.create_task(endpoint.post(CHAT, chat_body(endpoint.model, COUNT, _LONG)))
    try:
        done, _ = await asyncio.wait({asked}, timeout=0.5)
    finally:
        asked.cancel()
        await asyncio.wait({asked})
    if done:
        # It was too quick to be left; what it said is for other checks.
        asked.result()
    return await _after(endpoint, before)


async def many(endpoint: Endpoint) -> Finding:
    """Several clients leave at once."""
    before = await endpoint.in_flight()
    left = [asyncio.create_task(_leave_stream(endpoint)) for _ in range(_MANY)]
    try:
        await asyncio.wait(left)
    finally:
        for leaving in left:
            leaving.cancel()
    faults = [task.exception() for task in left if task.exception()]
    # Where there is no room for so many, some are refused: that is not what is looked at here.
    if len(faults) == len(left) and faults[0] is not None:
        raise faults[0]
    return await _after(endpoint, before)


async def _leave_stream(endpoint: Endpoint) -> None:
    try:
        async with endpoint.opened(CHAT, chat_body(endpoint.model, COUNT, _LONG)) as answer:
            if answer.status_code != httpx.codes.OK:
                raise Fault(f"the stream was answered with {answer.status_code}")
            async for _ in answer.aiter_bytes():
                return
    except httpx.HTTPError as error:
        raise Fault(f"the stream broke: {str(error) or type(error).__name__}") from None
    raise Fault("the stream ended before it had said anything")


async def _after(endpoint: Endpoint, before: float | None) -> Finding:
    """The next one is answered, and a mesh counts no more in flight than it did."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    freed = 0.0
    if before is not None:
        while (now := await endpoint.in_flight()) is not None and now > before:
            if loop.time() - began > _FREE_WITHIN:
                return Failed(
                    f"/metrics: {now:g} in flight {_FREE_WITHIN:g} s after the client left, "
                    f"{before:g} before"
                )
            await asyncio.sleep(_LOOK_EVERY)
        freed = loop.time() - began
    asked = chat_body(endpoint.model, COUNT, 4)
    (await endpoint.post(CHAT, asked)).ok(ChatCompletion)
    if before is None:
        return Passed("the next one is answered; not a mesh: what is in flight is not told")
    return Passed(f"given up within {freed:.2f} s")


CHECKS = (
    Check("cancel.stream", "a stream that its client leaves is given up", stream),
    Check("cancel.whole", "so is a whole answer", whole),
    Check("cancel.many", f"and {_MANY} streams at once", many),
)
