"""Streams that a client can go on reading on another connection, through any router.

Asked for by `X-Mesh-Resumable: 1`. Every event then has an id that says where the client is
(`router.event_id`), and `Last-Event-ID` with the same request goes on behind it: a worker that has
kept the tokens goes on from them, another generates them once more (`shared.protocol.Reading`). No
router keeps anything. What follows from the key is not in the id: the chunks' own id, and the seed
of a request that brings none.
"""

from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import NamedTuple

import msgspec

from router.dialects.answer import DONE, Answer, Completed, Earlier, now
from router.event_id import (
    Place,
    Told,
    decode_place,
    encode_place,
    fingerprint,
    fingerprint_of,
    hash_worker,
)
from router.secret import attempt_number
from shared.errors import CannotContinue, InvalidRequest
from shared.protocol import Delta, Done, Generate, Had, Reading
from shared.token_check import extend_check

__all__ = ("LAST_EVENT_ID", "ReadableStream", "Reader", "same_model", "wants_ids")

LAST_EVENT_ID = "Last-Event-ID"
_END = b"\n\n"


class Derived(NamedTuple):
    """What follows from an answer's key."""

    number: int
    """96 bits, for the chunks' id."""
    seed: int
    """63 bits."""

    @classmethod
    def of(cls, key: int) -> "Derived":
        """The same in every router."""
        digest = blake2b(key.to_bytes(8, "big"), digest_size=20, person=b"mesh reading").digest()
        return cls(int.from_bytes(digest[:12], "big"), int.from_bytes(digest[12:], "big") >> 1)


class Reader:
    """One answer as its client reads it, from its beginning or from an event on."""

    def __init__(
        self,
        last_event_id: bytes | None,
        body: bytes,
        requests: list[Generate],
        *,
        offsets: bool = False,
    ) -> None:
        """Make it.

        Args:
            last_event_id: the header; None: the answer begins.
            body: of the HTTP request.
            requests: made of it, one a part.
            offsets: log probabilities tell where in the text they are.

        Raises:
            InvalidRequest: the header is no id, or that of an answer to another request.
        """
        first = requests[0]
        parts, each = len(requests), first.n
        mark = fingerprint(body, first.owner, first.model)
        self.each = each
        self.offsets = offsets
        self.continues = last_event_id is not None
        if last_event_id is None:
            choices = [Told() for _ in range(parts * each)]
            self.place = Place(attempt_number(), now(), mark, [hash_worker("")] * parts, choices)
        else:
            self.place = _read(last_event_id, parts, each, offsets=offsets)
            if self.place.fingerprint != mark:
                raise _of_another_request()
        self._requests = requests
        self._derived = Derived.of(self.place.key)

    @property
    def earlier(self) -> Earlier:
        """What a dialect has to know of the events that the client has."""
        told = self.place.choices
        return Earlier(
            number=self._derived.number,
            created=self.place.created,
            begun=frozenset(index for index, choice in enumerate(told) if choice.begun),
            offsets=tuple(choice.offset for choice in told),
        )

    def requests(self, workers: Iterable[str], *, seeded: bool) -> list[Generate]:
        """What to ask for.

        Args:
            workers: the names of all that there are.
            seeded: the client has named a seed.
        """
        names = {hash_worker(name): name for name in workers}
        return [
            self._request(part, request, names, seeded=seeded)
            for part, request in enumerate(self._requests)
        ]

    def _request(
        self, part: int, request: Generate, names: dict[bytes, str], *, seeded: bool
    ) -> Generate:
        place, each = self.place, self.each
        had = tuple(
            Had(told.count, told.check, told.whole, told.done)
            for told in place.choices[part * each : (part + 1) * each]
        )
        sampling = request.sampling
        if not seeded:
            sampling = msgspec.structs.replace(sampling, seed=self._derived.seed)
        reading = Reading(
            # Each part is an answer of its own.
            key=place.key ^ part,
            had=had if self.continues else (),
            worker=names.get(place.workers[part], "") if self.continues else "",
        )
        return msgspec.structs.replace(request, sampling=sampling, reading=reading)


def wants_ids(value: bytes) -> bool:
    """Whether the value of `X-Mesh-Resumable` asks for it."""
    return value.strip().lower() in (b"1", b"true", b"yes")


def same_model(last_event_id: bytes, body: bytes, owner: str, models: Iterable[str]) -> str:
    """Which of these models the answer came from, if the client leaves the choice to the router.

    Raises:
        InvalidRequest: none of them, or the header is no id.
    """
    try:
        mark = fingerprint_of(last_event_id)
    except ValueError as error:
        raise _no_id(error) from error
    for name in models:
        if fingerprint(body, owner, name) == mark:
            return name
    raise _of_another_request()


def _read(text: bytes, parts: int, each: int, *, offsets: bool) -> Place:
    try:
        return decode_place(text, parts=parts, each=each, offsets=offsets)
    except ValueError as error:
        raise _no_id(error) from error


def _no_id(error: ValueError) -> InvalidRequest:
    return InvalidRequest(
        f"'{LAST_EVENT_ID}' must be the id of an event of an answer to this request: {error}.",
        param=LAST_EVENT_ID,
    )


def _of_another_request() -> InvalidRequest:
    return InvalidRequest(
        f"'{LAST_EVENT_ID}' is of an answer to another request: body, API key and 'user' must be "
        "those of the request that began it.",
        param=LAST_EVENT_ID,
    )


class _Seen:
    """How far the frames of a choice have come; behind what was told while they catch up."""

    __slots__ = ("check", "count")

    def __init__(self) -> None:
        self.count = self.check = 0


class ReadableStream:
    """Gives the events of another stream their ids, and leaves out what the client has."""

    def __init__(self, inner: Answer, reader: Reader, *, include_usage: bool) -> None:
        """Make it.

        Args:
            inner: a stream that was told of `reader.earlier`.
            reader: where the client is; moves on with what is told.
            include_usage: the last event of `inner` holds the usage.
        """
        self._inner = inner
        self._place = reader.place
        self._each = reader.each
        self._offsets = reader.offsets
        self._include_usage = include_usage
        self._seen = [_Seen() for _ in reader.place.choices]
        self._held: Told | None = None
        """The choice whose finish reason `inner` holds back."""
        self.worker_of: Callable[[int], str] = lambda part: ""
        """Who has a part now."""

    def delta(self, part: int, frame: Delta) -> bytes:
        """Render new tokens; nothing if they hold no text yet, or the client has it.

        Raises:
            CannotContinue: the worker does not go on with what the client has.
        """
        choice = part * self._each + frame.choice
        told, seen = self._place.choices[choice], self._seen[choice]
        if frame.tokens:
            seen.count = frame.first + len(frame.tokens)
            seen.check = extend_check(seen.check, frame.tokens)
            if seen.count <= told.count:
                self._catch_up(frame, told, seen)
                return b""
        role = b""
        rendered = self._inner.delta(part, frame)
        if rendered and not told.begun:
            told.begun = True
            first, end, rest = rendered.partition(_END)
            if rest:
                # The role, in an event of its own, has no token yet.
                role, rendered = self._with_id(part, first + end), rest
        if frame.tokens:
            told.count, told.check = seen.count, seen.check
        else:
            told.whole = True
        if self._offsets:
            told.offset += sum(len(entry.text) for entry in frame.logprobs)
        return role + self._with_id(part, rendered) if rendered else b""

    @staticmethod
    def _catch_up(frame: Delta, told: Told, seen: _Seen) -> None:
        """See to it that these are the tokens that the client has."""
        if frame.text or frame.logprobs or frame.tools or frame.reasoning:
            raise CannotContinue("The worker is too old to go on with an answer.")
        if seen.count == told.count and seen.check != told.check:
            raise CannotContinue("The worker has gone on with another answer.")

    def done(self, part: int, frame: Done) -> bytes:
        """Render the end of a choice, which `inner` holds back by one."""
        told = self._place.choices[part * self._each + frame.choice]
        held, self._held = self._held, told
        body = b""
        for event in self._inner.done(part, frame).split(_END)[:-1]:
            if held is not None:
                held.done, held = True, None
            else:
                told.begun = True
            body += self._with_id(part, event + _END)
        return body

    def finish(self, ends: list[Completed]) -> bytes:
        """Render what is left, and `[DONE]`."""
        place = self._place
        if self._held is None and (place.usage or not self._include_usage):
            return DONE
        body = b""
        for event in self._inner.finish(ends).removesuffix(DONE).split(_END)[:-1]:
            if self._held is not None:
                self._held.done, self._held = True, None
            else:
                place.usage = True
            body += self._with_id(len(ends) - 1, event + _END)
        return body + DONE

    def _with_id(self, part: int, event: bytes) -> bytes:
        place = self._place
        place.workers[part] = hash_worker(self.worker_of(part))
        return b"id: %b\n%b" % (encode_place(place, offsets=self._offsets), event)
