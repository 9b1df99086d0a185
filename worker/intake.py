"""Reading a request as it comes off the wire: what may go to an engine, and what is answered here.

Pure: bytes, headers and the time in; a request, or the reason against it, out.
"""

from collections.abc import Collection, Mapping
from math import inf

import msgspec

from shared.decoding import decoded
from shared.protocol import VERSION, Busy, Fail, Frame, Generate, Request, decode_request
from worker.admission import Ticket

__all__ = ("VERSION_HEADER", "Rejected", "read_request", "ticket_of")

VERSION_HEADER = "Mesh-Version"


class Rejected(msgspec.Struct, frozen=True):
    """Why a message is not taken, and what its sender hears; None if not even that can be said."""

    reason: str
    answer: Frame | None
    bad: bool = False
    """No worker could have taken it: its sender is not what it should be."""


class _Attempt(msgspec.Struct):
    """All that must be readable of a broken request for its sender to be told."""

    attempt: int


_attempt = msgspec.msgpack.Decoder(_Attempt)


def read_request(
    data: bytes,
    headers: Mapping[str, str] | None,
    *,
    worker: str,
    names: Collection[str],
    now: float,
) -> Request | Rejected:
    """Read a request for a model of one of `names` and check what every request must fulfil."""
    version = (headers or {}).get(VERSION_HEADER, "")
    if version.split(".")[0] != VERSION.split(".")[0]:
        return _version_rejected(data, version)
    try:
        request = decode_request(data)
    except msgspec.DecodeError as error:
        return _unreadable(data, str(error))
    if request.model not in names:
        return Rejected(
            f"for model {request.model!r}",
            Busy(request.attempt, worker, reason="unknown_model"),
        )
    if request.deadline <= now:
        return Rejected(
            "its deadline had passed",
            Fail(
                request.attempt,
                "deadline_exceeded",
                f"the request reached its worker {now - request.deadline:.1f} s after its deadline",
            ),
        )
    return request


def ticket_of(request: Request, reply: str, offset: float) -> Ticket:
    """What admission has to know of a request.

    Args:
        request: a valid one.
        reply: where its frames go.
        offset: monotonic seconds less the clock's.
    """
    if not isinstance(request, Generate):
        deadline = request.deadline + offset
        return Ticket(request.attempt, reply, 1, request.owner, request.priority, 0, deadline)
    done = sum(before.done >= 0 for before in request.resume)
    return Ticket(
        request.attempt,
        reply,
        max(1, request.n - done),  # a slot for each choice that is not done
        request.owner,
        request.priority,
        request.max_tokens or 0,
        # Somebody is reading what is resumed: it goes first, and is never too late to try.
        inf if request.resume else request.deadline + offset,
    )


def _version_rejected(data: bytes, version: str) -> Rejected:
    reason = f"protocol version {version or 'missing'}; this worker speaks {VERSION}"
    try:
        attempt = decoded(_attempt, data).attempt
    except msgspec.DecodeError:
        return Rejected(reason, None, bad=True)
    return Rejected(reason, Fail(attempt, "unavailable", reason, retry_after=1), bad=True)


def _unreadable(data: bytes, why: str) -> Rejected:
    try:
        attempt = decoded(_attempt, data).attempt
    except msgspec.DecodeError:
        return Rejected(why, None, bad=True)
    return Rejected(why, Fail(attempt, "invalid_value", f"malformed request: {why}"), bad=True)
