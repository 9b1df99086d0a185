"""Writing to a client straight from the callback that frames arrive in.

A task woken per token would cost more than the token. Instead the ASGI `send` coroutine is run in
place; with uvicorn it ends without suspending as long as the client reads. When it does suspend,
because the client is slow, a task of its own brings it to its end, and what comes meanwhile waits
here, merged, without holding up anybody else. Where the server offers it, pieces of a stream are
written without even the coroutine.
"""

import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from router.dialects.answer import merge_tools
from shared.protocol import Delta, Frame, TokenLogprob, ToolDelta

__all__ = ("Outlet", "merge_frames", "weight")

Message = dict[str, Any]
Send = Callable[[Message], Coroutine[Any, Any, None]]
Spawn = Callable[[Coroutine[Any, Any, None]], object]
WriteChunk = Callable[[bytes], bool]


class Outlet:
    """One response, written without waiting."""

    __slots__ = ("_on_writable", "_queue", "_send", "_spawn", "_write_chunk", "parked")

    def __init__(
        self,
        send: Send,
        spawn: Spawn,
        on_writable: Callable[[], None],
        write_chunk: WriteChunk | None = None,
    ) -> None:
        self._send = send
        self._spawn = spawn
        self._on_writable = on_writable
        self._write_chunk = write_chunk
        self._queue: deque[Message] = deque()
        self.parked = False
        """Whether the client is slower than we are; then writes wait."""

    def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send status and headers."""
        self._push({"type": "http.response.start", "status": status, "headers": headers})

    def write(self, body: bytes, *, more: bool) -> None:
        """Send a piece of the body, which is not empty; `more` false ends the response."""
        if more and not self.parked and self._write_chunk is not None and self._write_chunk(body):
            return
        self._push({"type": "http.response.body", "body": body, "more_body": more})

    def _push(self, message: Message) -> None:
        if self.parked:
            self._queue.append(message)
            return
        sending = self._send(message)
        try:
            waited = sending.send(None)
        except StopIteration:
            return
        self.parked = True
        self._spawn(self._drain(sending, waited))

    async def _drain(self, sending: Coroutine[Any, Any, None], waited: object) -> None:
        await _resume(sending, waited)
        while self._queue:
            await self._send(self._queue.popleft())
        self.parked = False
        self._on_writable()


@types.coroutine
def _resume(sending: Coroutine[Any, Any, None], waited: object) -> Generator[object, None, None]:
    """Go on with a coroutine that was started outside a task, as if this task had started it."""
    try:
        yield waited
        while True:
            try:
                waited = sending.send(None)
            except StopIteration:
                return
            yield waited
    finally:
        sending.close()


def weight(frame: Frame) -> int:
    """Roughly the bytes a frame keeps in memory while it waits."""
    if type(frame) is not Delta:
        return 64
    size = 64 + len(frame.text) + len(frame.reasoning)
    size += sum(64 + len(piece.arguments) for piece in frame.tools)
    return size + sum(128 * (1 + len(entry.top)) for entry in frame.logprobs)


def merge_frames(frames: list[tuple[int, Frame]]) -> list[tuple[int, Frame]]:
    """Join the deltas of each choice, keeping every choice's own order."""
    merged: list[tuple[int, Frame]] = []
    waiting: dict[tuple[int, int], list[Delta]] = {}
    for part, frame in frames:
        # What only the end made certain stays a frame of its own: a client is told where it is.
        if type(frame) is Delta and frame.tokens:
            waiting.setdefault((part, frame.choice), []).append(frame)
            continue
        merged += [(key[0], _join(deltas)) for key, deltas in waiting.items()]
        waiting.clear()
        merged.append((part, frame))
    return merged + [(key[0], _join(deltas)) for key, deltas in waiting.items()]


def _join(deltas: list[Delta]) -> Delta:
    first = deltas[0]
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    tools: list[ToolDelta] = []
    for delta in deltas:
        tokens += delta.tokens
        logprobs += delta.logprobs
        tools += delta.tools
    return Delta(
        attempt=first.attempt,
        choice=first.choice,
        first=first.first,
        tokens=tuple(tokens),
        text="".join(delta.text for delta in deltas),
        logprobs=tuple(logprobs),
        tools=merge_tools(tuple(tools)),
        reasoning="".join(delta.reasoning for delta in deltas),
    )
