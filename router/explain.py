"""Why a request went where it went, in headers, for those who ask by `X-Mesh-Explain: 1`."""

from router.call import Call
from router.dialects.answer import Completed
from shared.distance import Distances
from shared.protocol import End

__all__ = ("as_comment", "explanation", "wants_explanation")

Headers = list[tuple[bytes, bytes]]


def wants_explanation(value: bytes) -> bool:
    """Whether the header's value asks for it."""
    return value.strip().lower() in (b"1", b"true", b"yes")


def explanation(
    call: Call, distances: Distances, *, arrived: float, now: float, end: Completed | None
) -> Headers:
    """What is known of a call by now.

    Args:
        call: the first of the request's calls.
        distances: the router's measurements.
        arrived: when the request came (monotonic seconds).
        now: monotonic seconds.
        end: its last frame, if it has come, which knows the wait in the worker's queue.
    """
    headers: Headers = []
    if call.worker:
        headers.append((b"x-mesh-worker", call.worker.encode()))
    if call.reason is not None:
        headers.append((b"x-mesh-reason", call.reason.encode()))
    headers.append((b"x-mesh-candidates", b"%d" % call.candidates))
    if call.barred:
        headers.append((b"x-mesh-open-breakers", b"%d" % call.barred))
    rtt = distances.rtt(call.worker)
    if rtt is not None:
        headers.append((b"x-mesh-rtt-ms", b"%.2f" % (rtt * 1e3)))
    waited = ((call.accepted_at or now) - arrived) * 1e3
    if isinstance(end, End):
        waited += end.timings.queue_ms
    headers.append((b"x-mesh-queue-ms", b"%.1f" % waited))
    if call.position:
        headers.append((b"x-mesh-queue-position", b"%d" % call.position))
    return headers


def as_comment(headers: Headers) -> bytes:
    """The same inside a stream that has begun before it was known."""
    told = b" ".join(b"%b=%b" % (name.removeprefix(b"x-mesh-"), value) for name, value in headers)
    return b": mesh %b\n\n" % told
