"""One request on its way to a worker: finding one that takes it, then passing on its frames.

A call is driven by what arrives, not by a task: most calls meet a worker with a free slot at the
first try and never need one. Only the way round (nobody subscribed, a busy worker, a large body)
runs as a task.

    asking --Accepted--> running --End, Fail, lost, late, left--> over
      |  ^
      |  | 503, Busy: the queue group again, then the workers' own doors by load
      +--+
"""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, Protocol

import msgspec

from router.fleet import Fleet
from router.inbox import Inbox
from router.secret import attempt_number
from router.settings import Settings
from shared import subjects
from shared.assembly import Assembly
from shared.bus import Bus, BusUnavailable
from shared.errors import (
    DeadlineExceeded,
    MeshError,
    PayloadTooLarge,
    Unavailable,
    WorkerFailed,
    error_from_code,
)
from shared.protocol import (
    VERSION,
    Accepted,
    Busy,
    ChatInput,
    Chunk,
    Delta,
    EmbedResult,
    End,
    Fail,
    Frame,
    Generate,
    Request,
    TextInput,
    encode,
)

__all__ = ("CHUNK", "Call", "Desk", "Sink")

CHUNK = 256 * 1024
"""Larger bodies follow their head in pieces of this size, so that small messages pass between."""
GROUP_TRIES = 3
STALE_INTEREST = 0.0015
"""Seconds for which a new subscription may be unknown to another NATS node."""
SUSPICION = 5.0
"""Seconds within which a stream must go on after the connection to NATS was interrupted."""
ORPHAN_LIFE = 60.0

_HEADERS = {"Mesh-Version": VERSION}


class Sink(Protocol):
    """Who gets what becomes of a call."""

    def frame(self, part: int, frame: Frame) -> None:
        """Take a frame that counts: Delta, Done, End or EmbedResult, in order, without gaps."""
        ...

    def fail(self, error: MeshError) -> None:
        """The call has ended without an answer."""
        ...


class Desk(Protocol):
    """What a call needs of its dispatcher."""

    bus: Bus
    inbox: Inbox
    fleet: Fleet
    settings: Settings

    def spawn(self, job: Coroutine[Any, Any, None]) -> None:
        """Run something beside."""
        ...

    def cancel(self, worker: str, attempt: int) -> None:
        """Tell a worker that an attempt is not wanted."""
        ...

    def nobody(self, model: str, busy: list[float]) -> MeshError:
        """Why no worker takes a request."""
        ...


class Orphan:
    """An attempt that was given up before any worker named itself: cancelled when one does."""

    __slots__ = ("_desk", "_until", "attempt")

    def __init__(self, desk: Desk, attempt: int) -> None:
        self._desk = desk
        self.attempt = attempt
        self._until = time.monotonic() + ORPHAN_LIFE

    def receive(self, frame: Frame) -> None:
        """Cancel at the worker that has taken it."""
        if isinstance(frame, Accepted):
            self._desk.cancel(frame.worker, self.attempt)
        self._desk.inbox.forget(self.attempt, self)

    def no_responders(self) -> None:
        """Nobody got it."""
        self._desk.inbox.forget(self.attempt, self)

    def tick(self, now: float, wall: float) -> None:
        """Give up after a while."""
        if now > self._until:
            self._desk.inbox.forget(self.attempt, self)

    def broken(self) -> None:
        """Nothing to break."""

    def lost(self, worker: str, why: str) -> None:
        """Nothing to lose."""

    def interrupted(self, now: float) -> None:
        """Nothing to lose."""


class Call:
    """One request and its current attempt."""

    __slots__ = (
        "_asked_at",
        "_assembly",
        "_body",
        "_busy",
        "_choices",
        "_desk",
        "_group_tries",
        "_moving",
        "_part",
        "_refused",
        "_request",
        "_seen",
        "_seen_at",
        "_sink",
        "_suspect",
        "_target",
        "over",
    )

    def __init__(self, desk: Desk, request: Request, sink: Sink, part: int) -> None:
        self._desk = desk
        self._request = request
        self._sink = sink
        self._part = part
        self._choices = request.n if isinstance(request, Generate) else 1
        self._assembly = Assembly(request.attempt, self._choices)
        self._body = b""
        self._target = ""
        self._group_tries = 0
        self._moving = False
        self._refused: set[str] = set()
        self._busy: list[float] = []
        self._asked_at = 0.0
        self._seen = 0
        self._seen_at = 0.0
        self._suspect = False
        self.over = False

    # Asking

    async def begin(self) -> None:
        """Publish the first try.

        Raises:
            MeshError: it cannot be sent.
        """
        try:
            await self._ask_group()
        except MeshError:
            self._close()
            raise

    async def _ask_group(self) -> None:
        self._group_tries += 1
        self._target = ""
        await self._ask(subjects.infer(self._request.model))

    async def _ask(self, subject: str) -> None:
        desk = self._desk
        request = self._request
        reply = desk.inbox.register(request.attempt, self)
        body = encode(request)
        if len(body) > CHUNK:
            if len(body) > desk.bus.max_payload:
                raise PayloadTooLarge(
                    f"The request takes {len(body)} bytes on the wire; "
                    f"the limit (NATS's max_payload) is {desk.bus.max_payload} bytes."
                )
            self._body = body
            body = encode(_head(request, len(body)))
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
            self._refused.add(self._target)
        self._move_on(pause=STALE_INTEREST)

    def _busy_worker(self, frame: Busy) -> None:
        self._refused.add(frame.worker)
        if frame.reason == "full":
            self._busy.append(frame.retry_after)
        self._renew()
        self._move_on(pause=0.0)

    def _move_on(self, *, pause: float) -> None:
        if not self._moving:
            self._moving = True
            self._desk.spawn(self._ask_on(pause=pause))

    async def _ask_on(self, *, pause: float) -> None:
        """Ask the next: the group a few times, then each worker's own door."""
        await asyncio.sleep(pause)
        self._moving = False
        if self.over:
            return
        try:
            if self._group_tries < GROUP_TRIES:
                await self._ask_group()
                return
            workers = self._desk.fleet.candidates(self._request.model)
            worker = next((name for name in workers if name not in self._refused), None)
            if worker is None:
                raise self._desk.nobody(self._request.model, self._busy)
            self._target = worker
            await self._ask(subjects.infer_direct(self._request.model, worker))
        except MeshError as error:
            self._fail(error)

    def _renew(self) -> None:
        """Take a new attempt number: the old one is known to a worker that is out of it."""
        self._desk.inbox.forget(self._request.attempt, self)
        self._request = msgspec.structs.replace(self._request, attempt=attempt_number())
        self._assembly = Assembly(self._request.attempt, self._choices)

    async def _send_body(self) -> None:
        """Send what the head announced, to the worker that has accepted it."""
        body, self._body = self._body, b""
        subject = subjects.body(self._assembly.worker)
        attempt = self._request.attempt
        try:
            for index, start in enumerate(range(0, len(body), CHUNK)):
                if self.over:
                    return
                chunk = Chunk(attempt, index, body[start : start + CHUNK])
                await self._desk.bus.publish(subject, encode(chunk))
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
                self._close()
            self._sink.frame(self._part, frame)

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
        elif not self._heard:
            if self._asked_at and now - self._asked_at > settings.accept_timeout:
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
        if self._target:
            self._refused.add(self._target)
        self._abandon()
        self._renew()
        self._asked_at = 0.0
        self._move_on(pause=0.0)

    def interrupted(self, now: float) -> None:
        """The connection was away: what was asked may be lost, and so may any frame."""
        if sum(self._assembly.counts.values()) == 0:
            self._group_tries = 0
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
            self._ask_another()

    def broken(self) -> None:
        """A frame could not be rendered."""
        self._give_up(MeshError("The answer could not be rendered."))

    def _give_up(self, error: MeshError) -> None:
        self._abandon()
        self._fail(error)

    def _abandon(self) -> None:
        """See to it that no worker goes on with the current attempt."""
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
        self._desk.inbox.forget(self._request.attempt, self)


def _head(request: Request, size: int) -> Request:
    if isinstance(request, Generate):
        empty = ChatInput(()) if isinstance(request.input, ChatInput) else TextInput("")
        return msgspec.structs.replace(request, input=empty, body_size=size)
    return msgspec.structs.replace(request, inputs=(), body_size=size)
