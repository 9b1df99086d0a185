"""A real worker that also tells, over a Unix datagram socket, when it counts a slot as free.

Beats tell of free slots twice a second only. The instant wanted here is the one at which the
agent's own account of slots lets go of a request, after the engine has; from then on the worker
takes the next one. Started as `mesh-worker` with the path of the socket before the other arguments.
"""

import socket
import sys
import time
from collections.abc import Sequence
from typing import Literal

import msgspec

from shared.bus import BusMessage
from shared.protocol import Request
from worker import cli
from worker.admission import Ticket
from worker.attempts import Attempts

__all__ = ("Observation", "decode_observation", "main")


class Observation(msgspec.Struct, frozen=True, array_like=True):
    """What happened to the request with this X-Request-Id; `at` is CLOCK_MONOTONIC seconds."""

    request: str
    what: Literal["admitted", "cancel heard", "slot free"]
    at: float


_decoder = msgspec.msgpack.Decoder(Observation)
_encoder = msgspec.msgpack.Encoder()


def decode_observation(data: bytes) -> Observation:
    """Decode one datagram."""
    return _decoder.decode(data)


def observe(path: str) -> None:
    """Make every `Attempts` of this process tell."""
    told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    told.connect(path)
    ids: dict[int, str] = {}

    def tell(attempt: int, what: Literal["admitted", "cancel heard", "slot free"]) -> None:
        if attempt in ids:
            told.send(_encoder.encode(Observation(ids[attempt], what, time.monotonic())))

    admit, cancel, release = Attempts._admit, Attempts.cancel, Attempts._release

    def on_admit(self: Attempts, message: BusMessage, request: Request, now: float) -> None:
        ids[request.attempt] = request.id
        tell(request.attempt, "admitted")
        admit(self, message, request, now)

    def on_cancel(self: Attempts, attempts: Sequence[int]) -> None:
        for attempt in attempts:
            tell(attempt, "cancel heard")
        cancel(self, attempts)

    def on_release(self: Attempts, attempt: int) -> Ticket | None:
        ticket = release(self, attempt)
        if ticket is not None:
            tell(attempt, "slot free")
            del ids[attempt]
        return ticket

    Attempts._admit = on_admit  # type: ignore[method-assign]
    Attempts.cancel = on_cancel  # type: ignore[method-assign]
    Attempts._release = on_release  # type: ignore[method-assign]


def main() -> int:
    """Run the worker."""
    observe(sys.argv[1])
    return cli.main(sys.argv[2:])
