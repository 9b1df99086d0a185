"""The attempts at one model that are in on this worker: taken, given to the engine, let go.

Every attempt that was taken ends in exactly one of these ways: the engine reports it as over, its
body does not arrive, the engine dies, or the worker ends; each releases its slots and, unless the
engine has spoken already, answers it.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

import structlog

from shared.bus import BusMessage
from shared.protocol import VERSION, Accepted, Busy, Fail, Request
from worker.admission import Admission, Admitted, Dropped, Ticket
from worker.body import Body, BodyError, Full
from worker.engine_process import EngineProcess
from worker.intake import VERSION_HEADER, Rejected, read_request, ticket_of
from worker.link import Step, Submit
from worker.surroundings import Surroundings

__all__ = ("Attempts",)

_log = structlog.get_logger()


class Attempts:
    """What is asked of one model, from the door to the engine and out again."""

    def __init__(
        self,
        names: tuple[str, ...],
        admission: Admission,
        around: Surroundings,
        *,
        on_room: Callable[[], None],
    ) -> None:
        """Make it.

        Args:
            names: what the model is called, its own name first.
            admission: the account of its slots and queue, which only this changes but for its size.
            around: what all models share.
            on_room: whether a slot is free may have changed.
        """
        self.engine: EngineProcess | None = None
        """Who computes; None: nothing is taken."""
        self.last_use = 0.0
        """Unix time of the last moment at which an attempt was in; 0: none so far."""
        self._names = names
        self._admission = admission
        self._around = around
        self._on_room = on_room
        self._moved = asyncio.Event()
        self._log = _log.bind(model=names[0])

    def __len__(self) -> int:
        return len(self._admission)

    @property
    def served(self) -> bool:
        """Whether the engine is ready for more."""
        return self.engine is not None and self.engine.ready

    @property
    def tickets(self) -> tuple[Ticket, ...]:
        """Of all that run or wait."""
        return self._admission.tickets

    def take(self, message: BusMessage) -> None:
        """A request has come through one of the doors."""
        if message.status or not message.reply:
            self._around.rejects.add("unanswerable", subject=message.subject)
            return
        self._around.replies.opened(message.reply)
        now = time.time()
        request = self._read(message.data, message.headers, now)
        if isinstance(request, Rejected):
            tell = self._around.rejects.add if request.bad else self._log.warning
            tell("request.rejected", reason=request.reason)
            if request.answer is not None:
                self._around.replies.say(message.reply, request.answer)
            return
        if not self.served:
            self._refuse(message.reply, request, "full", 1.0)
            return
        try:
            if request.body_size:
                self._around.bodies.check(request.body_size)
        except BodyError as error:
            self._fail(message.reply, request.attempt, "payload_too_large", str(error))
            return
        except Full:
            self._refuse(message.reply, request, "full", 1.0)
            return
        self._admit(message, request, now)

    def complete(self, body: Body) -> None:
        """The body of a request that was admitted before has come in whole."""
        data, now = bytes(body.data), time.time()
        read = self._read(data, {VERSION_HEADER: VERSION}, now)
        if isinstance(read, Rejected):
            code = read.answer.code if isinstance(read.answer, Fail) else "invalid_value"
            self.drop_body(body, code, f"malformed request: {read.reason}")
        elif read.attempt != body.attempt or read.body_size:
            self.drop_body(body, "invalid_value", "malformed request: head and body differ")
        elif self.engine is not None and self.engine.ready:
            self.engine.submit(Submit(body.reply, data, now))

    def drop_body(self, body: Body, code: str, message: str) -> None:
        """The body of an admitted request will not come, or is of no use."""
        if self._release(body.attempt) is not None:
            lost = code == "worker_failed"
            self._fail(body.reply, body.attempt, code, message, lost=lost)

    def cancel(self, attempts: Sequence[int]) -> None:
        """The clients of these attempts have left, or cannot be reached."""
        now = time.monotonic()
        running: list[int] = []
        for attempt in attempts:
            if self._admission.cancel(attempt, now) is None:
                continue
            if self._around.bodies.close(attempt) is not None:
                self._release(attempt)
            else:
                running.append(attempt)
        if running and self.engine is not None:
            self.engine.cancel(tuple(running))

    def note(self, step: Step) -> None:
        """The engine has begun some, and ended others."""
        if self._admission.started(step.started, time.monotonic()):
            self._on_room()
        for attempt in step.ended:
            self._release(attempt)

    def abandon(self, reason: str) -> None:
        """Fail all that is in; it may go on on another worker."""
        lost = self._admission.clear(time.monotonic())
        self._around.bodies.close_model(self._names[0])
        for ticket in lost:
            self._fail(ticket.reply, ticket.attempt, "worker_failed", reason, lost=True)
        if lost and self.engine is not None:
            self.engine.cancel(tuple(ticket.attempt for ticket in lost))
        self._moved.set()
        self._around.on_release()

    async def idle(self) -> None:
        """Return when nothing runs or waits."""
        while len(self):
            self._moved.clear()
            await self._moved.wait()

    def _read(
        self, data: bytes, headers: Mapping[str, str] | None, now: float
    ) -> Request | Rejected:
        worker = self._around.bus.identity
        return read_request(data, headers, worker=worker, names=self._names, now=now)

    def _admit(self, message: BusMessage, request: Request, now: float) -> None:
        admission, attempt = self._admission, request.attempt
        clock = time.monotonic()
        ticket = ticket_of(request, message.reply, clock - now)
        if request.body_size and attempt in self._around.bodies and attempt not in admission:
            self._around.rejects.add("attempt", request=request.id)  # it is another model's
            return
        verdict = admission.offer(ticket, clock)
        if isinstance(verdict, Dropped):
            self._log.info("request.dropped", request=request.id, reason=verdict.reason)
            return
        if not isinstance(verdict, Admitted):
            self._refuse(message.reply, request, verdict.reason, verdict.retry_after)
            return
        worker = self._around.bus.identity
        self._around.replies.say(message.reply, Accepted(attempt, worker, verdict.position))
        if request.body_size:
            self._around.bodies.begin(
                attempt,
                model=self._names[0],
                reply=message.reply,
                size=request.body_size,
                now=clock,
                expires=clock + (request.deadline - now),
            )
        elif self.engine is not None:
            self.engine.submit(Submit(message.reply, message.data, now))
        if admission.free == 0:
            self._on_room()

    def _release(self, attempt: int) -> Ticket | None:
        was_full = self._admission.free == 0
        ticket = self._admission.release(attempt, time.monotonic())
        if ticket is not None:
            self.last_use = time.time()
            self._moved.set()
            self._around.on_release()
            if was_full:
                self._on_room()
        return ticket

    def _refuse(self, reply: str, request: Request, reason: str, retry_after: float) -> None:
        worker = self._around.bus.identity
        self._around.replies.say(reply, Busy(request.attempt, worker, retry_after, reason))

    def _fail(
        self, reply: str, attempt: int, code: str, message: str, *, lost: bool = False
    ) -> None:
        self._around.replies.say(reply, Fail(attempt, code, message, lost=lost))
