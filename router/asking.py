"""How a request finds a worker that takes it, the first time and after an attempt was lost.

Most requests meet a worker with a free slot at the first try and never need a task. Only the way
round (nobody subscribed, a busy worker, a large body) runs as one.
"""

import asyncio
import time
from abc import ABC, abstractmethod

import msgspec

from router.desk import Desk
from router.envelope import envelope, send_body
from router.orphan import Orphan
from router.search import STALE_INTEREST, Search, Why
from router.secret import attempt_number
from router.silence import Silence
from shared import subjects
from shared.assembly import Assembly
from shared.bus import BusUnavailable
from shared.errors import DeadlineExceeded, MeshError, Unavailable, WorkerFailed
from shared.protocol import VERSION, Busy, Frame, Request

__all__ = ("Asking",)

_HEADERS = {"Mesh-Version": VERSION}


class Asking(ABC):
    """One request, its current attempt, and whom to ask next; `router.call` does the rest."""

    __slots__ = (
        "_asked_at",
        "_assembly",
        "_base",
        "_began",
        "_body",
        "_desk",
        "_held",
        "_loss",
        "_moving",
        "_request",
        "_search",
        "_silence",
        "_target",
        "over",
        "was_held",
    )

    def __init__(self, desk: Desk, request: Request, cache_key: str) -> None:
        self._desk = desk
        self._request = request
        self._assembly = Assembly.of(request)
        self._search = Search(desk.fleet, desk.breakers, request, cache_key)
        self._silence = Silence()
        self._base = 0
        self._body = b""
        self._target = ""
        self._moving = False
        self._held = False
        self._began = False
        self._asked_at = 0.0
        self._loss: MeshError | None = None
        self.over = False
        self.was_held = False

    @abstractmethod
    def receive(self, frame: Frame) -> None:
        """Take one frame of the current attempt."""

    @abstractmethod
    def tick(self, now: float, wall: float) -> None:
        """Time has passed."""

    @abstractmethod
    def broken(self) -> None:
        """A frame could not be taken."""

    @abstractmethod
    def lost(self, worker: str, why: str) -> None:
        """A worker is gone."""

    @abstractmethod
    def unheard(self, worker: str) -> None:
        """A worker is not connected."""

    @abstractmethod
    def interrupted(self, now: float) -> None:
        """The connection to NATS was away."""

    @abstractmethod
    def cut_off(self) -> None:
        """NATS is away for longer than answers wait for it."""

    @abstractmethod
    def _fail(self, error: MeshError) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...

    @property
    def worker(self) -> str:
        """Who has it; empty: nobody yet."""
        return self._assembly.worker

    @property
    def progress(self) -> str:
        """How far its model is, while it is held for it; else empty."""
        return self._desk.waiting.progress(self._request.model) if self._held else ""

    @property
    def reason(self) -> Why | None:
        """Why it was asked where it was asked last; None: nowhere yet."""
        return self._search.reason

    @property
    def candidates(self) -> int:
        """Workers among which was chosen last; 0: none was known."""
        return self._search.candidates

    @property
    def barred(self) -> int:
        """Workers that were left out of the last choice because they fail again and again."""
        return self._search.barred

    @property
    def _heard(self) -> bool:
        """Whether a worker has it; its `Accepted` may be lost, as any frame."""
        return bool(self._assembly.worker) or self._fresh > 0

    @property
    def _fresh(self) -> int:
        """Tokens that the current attempt has brought."""
        return self._assembly.count - self._base

    async def begin(self) -> None:
        """Publish the first try, or be held.

        Raises:
            MeshError: it cannot be sent, or nobody takes it.
        """
        try:
            await self._ask_next()
        except MeshError:
            self._close()
            raise

    async def _ask_next(self) -> None:
        door = self._search.next(self._request.attempt)
        if door is not None:
            self._target = door.worker
            await self._ask(door.subject)
            return
        model, busy = self._request.model, self._search.busy
        again = self.was_held or self._loss is not None
        if not self._desk.hold(model, self, busy, again=again):
            raise self._desk.nobody(model, busy)
        self._held = self.was_held = True
        self._target = ""
        self._asked_at = 0.0
        # So that it goes on hearing the time pass.
        self._desk.inbox.register(self._request.attempt, self)
        self._desk.demand.waits(model)

    def resume(self) -> None:
        """Somebody may take it now; it is not held any more."""
        self._stop_waiting()
        self._search.begin_anew()
        self._move_on(pause=0.0)

    def refuse(self, error: MeshError) -> None:
        """It was held in vain."""
        self._stay_lost(error)

    def _stop_waiting(self) -> None:
        if self._held:
            self._held = False
            self._desk.waiting.leave(self._request.model, self)
            self._desk.demand.waits_no_more(self._request.model)

    async def _ask(self, subject: str) -> None:
        desk = self._desk
        request = self._request
        reply = desk.inbox.register(request.attempt, self)
        body, self._body = envelope(self._resuming(request), desk.bus.max_payload)
        headers = _HEADERS
        if request.traceparent:
            headers = _HEADERS | {"traceparent": request.traceparent}
        self._asked_at = time.monotonic()
        try:
            await desk.bus.publish(subject, body, reply=reply, headers=headers)
        except BusUnavailable as error:
            raise Unavailable(f"The mesh is not reachable now: {error}.", retry_after=2) from error

    def no_responders(self) -> None:
        """Nobody was subscribed where we asked."""
        if self.over or self._heard:
            return
        if self._target:
            self._search.refuse(self._target)
        # A door that was closed stays closed; the group may have a member unknown to our server.
        self._move_on(pause=0.0 if self._target else STALE_INTEREST)

    def _busy_worker(self, frame: Busy) -> None:
        self._search.refused(frame)
        self._renew()
        self._move_on(pause=0.0)

    def _move_on(self, *, pause: float) -> None:
        if not self._moving:
            self._moving = True
            self._desk.spawn(self._ask_on(pause=pause))

    async def _ask_on(self, *, pause: float) -> None:
        """Ask the next."""
        await asyncio.sleep(pause)
        self._moving = False
        if self.over:
            return
        try:
            if self._desk.bus.connected:
                await self._ask_next()
        except MeshError as error:
            if self._desk.bus.connected:
                self._stay_lost(error)
        if not (self.over or self._desk.bus.connected):
            # So that it hears when NATS is back, and is asked again then.
            self._desk.inbox.register(self._request.attempt, self)

    def _renew(self) -> None:
        """Take a new attempt number: the old one is known to a worker that is out of it."""
        self._desk.inbox.forget(self._request.attempt, self)
        self._begin_attempt(attempt_number())

    def _begin_attempt(self, attempt: int) -> None:
        self._stop_running()
        self._request = msgspec.structs.replace(self._request, attempt=attempt)
        self._assembly = self._assembly.again(attempt)
        self._base = self._assembly.count
        self._silence = Silence()
        self._body = b""

    def _resuming(self, request: Request) -> Request:
        """The request with what earlier attempts brought."""
        resume = self._assembly.resume
        return msgspec.structs.replace(request, resume=resume) if resume else request

    async def _send_body(self) -> None:
        body, self._body = self._body, b""
        attempt = self._request.attempt
        try:
            await send_body(
                self._desk.bus,
                subjects.body(self._assembly.worker),
                attempt,
                body,
                wanted=lambda: not self.over and self._request.attempt == attempt,
            )
        except BusUnavailable as error:
            self._fail(WorkerFailed(f"The request could not be brought to its worker: {error}."))

    def _ask_another(self, *, pause: float = 0.0) -> None:
        """Leave a try behind that led to nothing, and ask somebody else."""
        self._abandon()
        self._renew()
        self._asked_at = 0.0
        self._move_on(pause=pause)

    def _abandon(self) -> None:
        """See to it that no worker goes on with the current attempt."""
        if self._held:
            return
        attempt = self._request.attempt
        if self._assembly.worker:
            self._desk.cancel(self._assembly.worker, attempt)
        else:
            self._desk.inbox.forget(attempt, self)
            self._desk.inbox.register(attempt, Orphan(self._desk, attempt))

    def _stop_running(self) -> None:
        if self._began:
            self._began = False
            self._desk.demand.ended(self._request.model)

    def _stay_lost(self, error: MeshError) -> None:
        """Nobody takes it: what was lost before says more of the reason."""
        if self._loss is not None and not isinstance(error, DeadlineExceeded):
            error = type(self._loss)(f"{self._loss.message} It cannot go on: {error.message}")
        self._fail(error)
