"""Moving an attempt to another worker while its own still has it.

A worker that lets a model go offers its attempts. Another is asked to go on behind the tokens that
have come; what the first one says meanwhile is put aside. Once the other has accepted with a free
slot, the first is cancelled and what was put aside is dropped: the other says it too. If it does
not accept, or not at once, what was put aside counts, and nothing has happened. So no answer is
lost where all workers go at the same time, and none has tokens of two workers.
"""

import time
from typing import Protocol

from router.desk import Desk
from router.envelope import envelope
from router.orphan import Orphan
from router.search import Door, Search
from shared.bus import BusUnavailable
from shared.errors import MeshError
from shared.protocol import VERSION, Accepted, End, Frame, Request

__all__ = ("Handover",)

ACCEPTED_WITHIN = 1.0
"""Seconds that the other worker has; so long a stream may pause for nothing."""


class Mover(Protocol):
    """Whose attempt it is."""

    def receive(self, frame: Frame) -> None:
        """Take a frame of the attempt."""
        ...

    def moved(self, accepted: Accepted, search: Search, body: bytes) -> None:
        """The other worker has it; `body` is to be sent to it, if there is one."""
        ...

    def stays(self) -> None:
        """The first worker keeps it: its frames go to the mover again."""
        ...

    def lost(self, worker: str, why: str) -> None:
        """A worker is gone."""
        ...

    def interrupted(self, now: float) -> None:
        """The connection to NATS was away."""
        ...

    def cut_off(self) -> None:
        """NATS is away for too long."""
        ...


class Handover:
    """One try; it receives the frames of both attempts until it is over."""

    __slots__ = (
        "_aside",
        "_asked",
        "_body",
        "_desk",
        "_lost",
        "_mover",
        "_old",
        "_over",
        "_request",
        "_search",
        "_target",
        "_until",
    )

    def __init__(
        self, desk: Desk, mover: Mover, old: int, request: Request, search: Search
    ) -> None:
        """Make it.

        Args:
            desk: the dispatcher.
            mover: whose attempt it is.
            old: the attempt at the first worker.
            request: what the other is to be asked, under a new attempt.
            search: has chosen the other.
        """
        self._desk = desk
        self._mover = mover
        self._old = old
        self._request = request
        self._search = search
        self._target = ""
        self._body = b""
        self._asked = False
        self._over = False
        self._aside: list[Frame] = []
        self._lost: tuple[str, str] | None = None
        self._until = time.monotonic() + ACCEPTED_WITHIN
        desk.inbox.register(old, self)

    async def begin(self, door: Door) -> None:
        """Ask the other worker."""
        if self._over:
            return
        self._target = door.worker
        desk, request = self._desk, self._request
        reply = desk.inbox.register(request.attempt, self)
        headers = {"Mesh-Version": VERSION}
        if request.traceparent:
            headers["traceparent"] = request.traceparent
        try:
            body, self._body = envelope(request, desk.bus.max_payload)
            self._asked = True
            await desk.bus.publish(door.subject, body, reply=reply, headers=headers)
        except (BusUnavailable, MeshError):
            # The first worker still has it, and what keeps it from being moved may pass.
            self._stay()

    def receive(self, frame: Frame) -> None:
        """Take a frame of either attempt."""
        if self._over:
            return
        if frame.attempt == self._old:
            self._aside.append(frame)
            if isinstance(frame, End):
                self._stay()
        elif isinstance(frame, Accepted) and frame.worker != self._target:
            self._desk.rejects.add("misnamed", worker=self._target, named=frame.worker)
        elif isinstance(frame, Accepted) and not frame.position:
            self._over = True
            self._desk.inbox.forget(self._old, self)
            self._mover.moved(frame, self._search, self._body)
        else:
            if isinstance(frame, Accepted):
                self._desk.cancel(frame.worker, frame.attempt)
            self._asked = False
            self._stay()

    def no_responders(self) -> None:
        """The other worker has closed its door."""
        self._asked = False
        self._stay()

    def broken(self) -> None:
        """A frame could not be handled."""
        self._stay()

    def tick(self, now: float, wall: float) -> None:
        """Time has passed."""
        if now > self._until:
            self._stay()

    def lost(self, worker: str, why: str) -> None:
        """A worker is gone."""
        if worker == self._target:
            self._asked = False
            self._stay()
        else:
            self._lost = (worker, why)

    def unheard(self, worker: str) -> None:
        """A worker is not connected."""
        if worker == self._target:
            self._stay()

    def interrupted(self, now: float) -> None:
        """The connection was away."""
        self._stay()
        self._mover.interrupted(now)

    def cut_off(self) -> None:
        """NATS is away for too long."""
        self._stay()
        self._mover.cut_off()

    def stop(self) -> None:
        """Nobody wants the answer any more; its owner sees to the first attempt."""
        if not self._over:
            self._over = True
            self._leave_other()
            self._desk.inbox.forget(self._old, self)

    def _stay(self) -> None:
        if self._over:
            return
        self._over = True
        self._leave_other()
        self._mover.stays()
        aside, self._aside = self._aside, []
        for frame in aside:
            self._mover.receive(frame)
        if self._lost is not None:
            self._mover.lost(*self._lost)

    def _leave_other(self) -> None:
        inbox, attempt = self._desk.inbox, self._request.attempt
        self._search.release()
        inbox.forget(attempt, self)
        if self._asked:
            # It may have been taken, or be under way.
            inbox.register(attempt, Orphan(self._desk, attempt))
