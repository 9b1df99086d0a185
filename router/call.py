"""One request on its way to a worker: finding one that takes it, then passing on its frames.

A call is driven by what arrives, not by a task: most calls meet a worker with a free slot at the
first try and never need one. Only the way round (nobody subscribed, a busy worker, a large body)
runs as a task.

    asking --Accepted--> running --End, Fail, lost, late, left--> over
      |  ^
      |  | 503, Busy: where `router.search` says next
      +--+
      |  ^
      |  | nobody serves the model yet: held (`router.waiting`) until somebody does
      +--+
"""

import asyncio
import time

import msgspec

from router.desk import Desk, Sink
from router.envelope import chunks, envelope
from router.orphan import Orphan
from router.search import STALE_INTEREST, Search, Why
from router.secret import attempt_number
from shared import subjects
from shared.assembly import Assembly
from shared.bus import BusUnavailable
from shared.errors import (
    DeadlineExceeded,
    MeshError,
    Unavailable,
    WorkerFailed,
    error_from_code,
)
from shared.protocol import (
    VERSION,
    Accepted,
    Busy,
    Delta,
    EmbedResult,
    End,
    Fail,
    Frame,
    Generate,
    Request,
)

__all__ = ("Call",)

SUSPICION = 5.0
"""Seconds within which a stream must go on after the connection to NATS was interrupted."""

_HEADERS = {"Mesh-Version": VERSION}


class Call:
    """One request and its current attempt."""

    __slots__ = (
        "_asked_at",
        "_assembly",
        "_began",
        "_body",
        "_choices",
        "_desk",
        "_held",
        "_moving",
        "_part",
        "_request",
        "_search",
        "_seen",
        "_seen_at",
        "_sink",
        "_suspect",
        "_target",
        "accepted_at",
        "over",
        "position",
        "was_held",
    )

    def __init__(
        self, desk: Desk, request: Request, sink: Sink, part: int, cache_key: str = ""
    ) -> None:
        self._desk = desk
        self._request = request
        self._sink = sink
        self._part = part
        self._choices = request.n if isinstance(request, Generate) else 1
        self._assembly = Assembly(request.attempt, self._choices)
        self._search = Search(desk.fleet, request, cache_key)
        self._body = b""
        self._target = ""
        self._moving = False
        self._held = False
        self._began = False
        self._asked_at = 0.0
        self._seen = 0
        self._seen_at = 0.0
        self._suspect = False
        self.over = False
        self.was_held = False
        self.accepted_at = 0.0
        """When a worker took it (monotonic); 0: none has said so yet."""
        self.position = 0
        """Its place in the worker's queue when it was taken; 0: it ran at once."""

    @property
    def worker(self) -> str:
        """Who has it; empty: nobody yet."""
        return self._assembly.worker

    @property
    def progress(self) -> str:
        """How far its model is, while it is held for it; else empty."""
        return self._desk.waiting.progress(self._request.model) if self._held else ""

    @property
    def reason(self) -> Why:
        """Why it was asked where it was asked last."""
        return self._search.reason

    @property
    def candidates(self) -> int:
        """Workers among which was chosen last; 0: none was known."""
        return self._search.candidates

    # Asking

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
        if not self._desk.hold(model, self, busy, again=self.was_held):
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
        self._fail(error)

    def _stop_waiting(self) -> None:
        if self._held:
            self._held = False
            self._desk.waiting.leave(self._request.model, self)
            self._desk.demand.waits_no_more(self._request.model)

    async def _ask(self, subject: str) -> None:
        desk = self._desk
        request = self._request
        reply = desk.inbox.register(request.attempt, self)
        body, self._body = envelope(request, desk.bus.max_payload)
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
            await self._ask_next()
        except MeshError as error:
            self._fail(error)

    def _renew(self) -> None:
        """Take a new attempt number: the old one is known to a worker that is out of it."""
        self._desk.inbox.forget(self._request.attempt, self)
        self._stop_running()
        self._request = msgspec.structs.replace(self._request, attempt=attempt_number())
        self._assembly = Assembly(self._request.attempt, self._choices)

    async def _send_body(self) -> None:
        """Send what the head announced, to the worker that has accepted it."""
        body, self._body = self._body, b""
        subject = subjects.body(self._assembly.worker)
        try:
            for piece in chunks(self._request.attempt, body):
                if self.over:
                    return
                await self._desk.bus.publish(subject, piece)
                await asyncio.sleep(0)
        except BusUnavailable as error:
            self._fail(WorkerFailed(f"The request could not be brought to its worker: {error}."))

    # Running

    def receive(self, frame: Frame) -> None:
        """Take one frame of the current attempt."""
        verdict = self._assembly.check(frame)
        if verdict == "take":
            if type(frame) is Delta:
                if frame.choice < self._choices:
                    self._sink.frame(self._part, frame)
                    return
                verdict = "gap"
            else:
                self._control(frame)
        if verdict == "gap":
            self._abandon()
            self._fail(WorkerFailed("Part of the worker's answer was lost on the way."))

    def _control(self, frame: Frame) -> None:
        if isinstance(frame, Accepted):
            if self._search.passes_on(frame):
                self._ask_another()
                return
            self._accepted(frame)
            if self._body:
                self._desk.spawn(self._send_body())
        elif isinstance(frame, Busy):
            self._busy_worker(frame)
        elif isinstance(frame, Fail):
            self._fail(
                error_from_code(
                    frame.code, frame.message, param=frame.param, retry_after=frame.retry_after
                )
            )
        else:
            if isinstance(frame, End | EmbedResult):
                self._desk.demand.generated(self._request.model, frame.usage.completion)
                self._close()
            self._sink.frame(self._part, frame)

    def _accepted(self, frame: Accepted) -> None:
        self.accepted_at = time.monotonic()
        self.position = frame.position
        self._began = True
        self._desk.demand.began(self._request.model)
        # The group's choice is known only now.
        self._search.take(frame.worker)

    def _stop_running(self) -> None:
        if self._began:
            self._began = False
            self._desk.demand.ended(self._request.model)

    # Ending

    def leave(self) -> None:
        """Nobody waits for the answer any more: free the worker."""
        if not self.over:
            self._abandon()
            self._close()

    def tick(self, now: float, wall: float) -> None:
        """End what takes too long."""
        if self.over:
            return
        settings = self._desk.settings
        if wall > self._request.deadline:
            self._give_up(DeadlineExceeded("The request's time is up."))
        elif self._held:
            return
        elif not self._heard:
            if self._asked_at and now - self._asked_at > settings.accept_timeout:
                self._search.refuse(self._target)
                self._ask_another()
        else:
            self._watch(now)

    @property
    def _heard(self) -> bool:
        """Whether a worker has it; its `Accepted` may be lost, as any frame."""
        return bool(self._assembly.worker or self._assembly.counts)

    def _watch(self, now: float) -> None:
        """See whether tokens still come."""
        seen = sum(self._assembly.counts.values())
        if seen != self._seen:
            self._seen = seen
            self._seen_at = now
            self._suspect = False
        elif seen and now - self._seen_at > (
            SUSPICION if self._suspect else self._desk.settings.stall_timeout
        ):
            self._give_up(WorkerFailed("The worker fell silent before the answer was complete."))

    def _ask_another(self) -> None:
        """Leave a try behind that led to nothing, and ask somebody else."""
        self._abandon()
        self._renew()
        self._asked_at = 0.0
        self._move_on(pause=0.0)

    def interrupted(self, now: float) -> None:
        """The connection was away: what was asked may be lost, and so may any frame."""
        if self._held:
            return
        # Counted now: what came before the interruption is no sign of life after it.
        self._seen = sum(self._assembly.counts.values())
        if self._seen == 0:
            self._search.begin_anew()
            self._ask_another()
        else:
            self._suspect = True
            self._seen_at = now

    def lost(self, worker: str, why: str) -> None:
        """A worker is gone."""
        if self._assembly.worker == worker:
            if self._desk.bus.connected:
                self._fail(WorkerFailed(f"The worker {why} before the answer was complete."))
            else:
                self._fail(Unavailable("The mesh is not reachable now: NATS is away."))
        elif self._target == worker and not self._heard:
            self._search.refuse(worker)
            self._ask_another()

    def broken(self) -> None:
        """A frame could not be rendered."""
        self._give_up(MeshError("The answer could not be rendered."))

    def _give_up(self, error: MeshError) -> None:
        self._abandon()
        self._fail(error)

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

    def _fail(self, error: MeshError) -> None:
        if not self.over:
            self._close()
            self._sink.fail(error)

    def _close(self) -> None:
        self.over = True
        self._body = b""
        self._stop_waiting()
        self._search.release()
        self._stop_running()
        if self._desk.waiting:
            self._desk.waiting.look((self._request.model,))
        self._desk.inbox.forget(self._request.attempt, self)
