"""Joining the chunks of a request too large for one message.

Pure: no clock, no socket. The memory that senders can make this worker hold is bounded in bytes and
in time; chunks come in order on one path, so one out of order means that one was lost.
"""

from typing import Literal

import msgspec

from shared.protocol import Chunk

__all__ = ("Bodies", "Body", "BodyError", "Full")

CHUNK_SECONDS = 10.0
"""The longest wait for the next chunk."""


class BodyError(Exception):
    """The body cannot be joined; the message says why in one line."""


class Full(Exception):
    """The bodies being joined already hold as many bytes as they may."""


class Body(msgspec.Struct):
    """A request being joined; `model` names who will take it."""

    attempt: int
    model: str
    reply: str
    size: int
    deadline: float
    """Clock time by which the next chunk must be there."""
    expires: float
    """Clock time at which the request's own deadline passes."""
    data: bytearray = msgspec.field(default_factory=bytearray)
    next_index: int = 0


class Bodies:
    """All requests being joined on this worker."""

    def __init__(self, *, most_bytes: int, largest: int) -> None:
        self.most_bytes = most_bytes
        self.largest = largest
        self._open: dict[int, Body] = {}
        self._announced = 0

    def __contains__(self, attempt: int) -> bool:
        return attempt in self._open

    def __len__(self) -> int:
        return len(self._open)

    @property
    def announced(self) -> int:
        """Bytes that the open bodies will hold when they are whole."""
        return self._announced

    def check(self, size: int) -> None:
        """Tell whether a body of this size may begin.

        Raises:
            BodyError: no body may be that large.
            Full: others hold the room it needs.
        """
        if size > self.largest:
            raise BodyError(f"body of {size} bytes; the limit is {self.largest}")
        if self._announced + size > self.most_bytes:
            raise Full

    def begin(
        self, attempt: int, *, model: str, reply: str, size: int, now: float, expires: float
    ) -> None:
        """Open a body that `check` has allowed."""
        if size < 1 or attempt in self._open:
            raise ValueError(f"body of {size} bytes for attempt {attempt}")
        self._announced += size
        self._open[attempt] = Body(
            attempt=attempt,
            model=model,
            reply=reply,
            size=size,
            deadline=min(now + CHUNK_SECONDS, expires),
            expires=expires,
        )

    def add(self, chunk: Chunk, now: float) -> Body | None:
        """Add a chunk; returns the body, closed, once it is whole.

        Chunks of no open body, and doubled ones, are ignored.

        Raises:
            BodyError: a chunk is missing, or there are more bytes than announced; close the body.
        """
        body = self._open.get(chunk.attempt)
        if body is None or chunk.index < body.next_index:
            return None
        if chunk.index > body.next_index:
            raise BodyError(f"chunk {body.next_index} of the request was lost")
        if len(body.data) + len(chunk.data) > body.size:
            raise BodyError(f"the request's chunks exceed the {body.size} bytes announced")
        body.data += chunk.data
        body.next_index += 1
        body.deadline = min(now + CHUNK_SECONDS, body.expires)
        return self.close(chunk.attempt) if len(body.data) == body.size else None

    def close(self, attempt: int) -> Body | None:
        """Give up a body, or take it when it is whole."""
        body = self._open.pop(attempt, None)
        if body is not None:
            self._announced -= body.size
        return body

    def close_model(self, model: str) -> None:
        """Give up all bodies for one model."""
        for attempt in [a for a, body in self._open.items() if body.model == model]:
            self.close(attempt)

    def expired(self, now: float) -> list[tuple[Body, Literal["deadline", "silence"]]]:
        """Close the bodies whose time is up, and tell which of the two times it was."""
        over = [body for body in self._open.values() if body.deadline <= now]
        for body in over:
            self.close(body.attempt)
        return [(b, "deadline" if b.expires <= now else "silence") for b in over]
