"""A client that speaks to workers over NATS itself: what a router could reach at best."""

import asyncio
import os
import time

import msgspec

from shared import subjects
from shared.bus import Bus, BusMessage
from shared.protocol import (
    ChatInput,
    Delta,
    End,
    Fail,
    Frame,
    Generate,
    Message,
    Sampling,
    decode_frames,
    encode,
)

__all__ = ("BusClient", "DirectReply", "chat_request")

_DEADLINE = 600.0


class DirectReply(msgspec.Struct):
    """Times are CLOCK_MONOTONIC seconds."""

    sent: float
    first: float = 0.0
    ended: float = 0.0
    tokens: int = 0

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first token."""
        return self.first - self.sent


def chat_request(
    model: str,
    messages: tuple[Message, ...],
    max_tokens: int,
    *,
    temperature: float = 0.0,
    ignore_eos: bool = False,
) -> Generate:
    """Build the request that the router builds from a chat of these messages."""
    attempt = int.from_bytes(os.urandom(8)) >> 1
    return Generate(
        id=f"bench-{attempt:x}",
        attempt=attempt,
        model=model,
        input=ChatInput(messages),
        sampling=Sampling(seed=1, temperature=temperature, ignore_eos=ignore_eos),
        deadline=time.time() + _DEADLINE,
        max_tokens=max_tokens,
    )


class BusClient:
    """One request at a time to a model's queue group."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._number = 0
        self._attempt = 0
        self._reply = DirectReply(0.0)
        self._over: asyncio.Future[DirectReply] | None = None

    async def open(self) -> None:
        """Subscribe to the inbox; once, before the first request."""
        await self._bus.subscribe(f"{self._bus.inbox}.r.*", self._on_message)
        await self._bus.barrier()

    async def send(self, request: Generate, timeout: float = 30.0) -> DirectReply:
        """Publish a request and await its end.

        Raises:
            RuntimeError: nobody took it, or the worker reported a failure.
            TimeoutError: it took longer than `timeout`.
        """
        self._number += 1
        self._attempt = request.attempt
        self._over = asyncio.get_running_loop().create_future()
        self._reply = DirectReply(time.monotonic())
        await self._bus.publish(
            subjects.infer(request.model),
            encode(request),
            reply=f"{self._bus.inbox}.r.{self._number}",
            headers={"Mesh-Version": "1"},
        )
        async with asyncio.timeout(timeout):
            return await self._over

    def _on_message(self, message: BusMessage) -> None:
        now = time.monotonic()
        if message.status:
            self._end(RuntimeError(f"NATS status {message.status} on {message.subject}"))
            return
        for frame in decode_frames(message.data):
            if frame.attempt == self._attempt:
                self._take(frame, now)

    def _take(self, frame: Frame, now: float) -> None:
        if isinstance(frame, Delta):
            self._reply.tokens += len(frame.tokens)
            if frame.text and not self._reply.first:
                self._reply.first = now
        elif isinstance(frame, End):
            self._reply.ended = now
            self._end(None)
        elif isinstance(frame, Fail):
            self._end(RuntimeError(f"{frame.code}: {frame.message}"))

    def _end(self, error: RuntimeError | None) -> None:
        if self._over is None or self._over.done():
            return
        if error is None:
            self._over.set_result(self._reply)
        else:
            self._over.set_exception(error)
