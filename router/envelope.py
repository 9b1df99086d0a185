"""A request as bytes: in one message, or a head that announces a body in pieces."""

import asyncio
from collections.abc import Callable, Iterator

import msgspec

from shared.bus import Bus
from shared.errors import PayloadTooLarge
from shared.protocol import ChatInput, Chunk, Generate, Request, TextInput, encode

__all__ = ("CHUNK", "chunks", "envelope", "send_body")

CHUNK = 256 * 1024
"""Larger bodies follow their head in pieces of this size, so that small messages pass between."""


def envelope(request: Request, limit: int) -> tuple[bytes, bytes]:
    """What to publish, and the body that has to follow (empty: none).

    Raises:
        PayloadTooLarge: it exceeds the limit, in bytes.
    """
    body = encode(request)
    if len(body) <= CHUNK:
        return body, b""
    if len(body) > limit:
        raise PayloadTooLarge(
            f"The request takes {len(body)} bytes on the wire; "
            f"the limit (NATS's max_payload) is {limit} bytes."
        )
    return encode(_head(request, len(body))), body


def chunks(attempt: int, body: bytes) -> Iterator[bytes]:
    """The body in pieces, as messages."""
    for index, start in enumerate(range(0, len(body), CHUNK)):
        yield encode(Chunk(attempt, index, body[start : start + CHUNK]))


async def send_body(
    bus: Bus, subject: str, attempt: int, body: bytes, wanted: Callable[[], bool]
) -> None:
    """Send what a head announced, as long as it is wanted.

    Raises:
        BusUnavailable: it cannot be.
    """
    for piece in chunks(attempt, body):
        if not wanted():
            return
        await bus.publish(subject, piece)
        await asyncio.sleep(0)


def _head(request: Request, size: int) -> Request:
    if isinstance(request, Generate):
        empty = ChatInput(()) if isinstance(request.input, ChatInput) else TextInput("")
        return msgspec.structs.replace(request, input=empty, resume=(), body_size=size)
    return msgspec.structs.replace(request, inputs=(), body_size=size)
