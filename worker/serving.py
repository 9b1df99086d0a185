"""One model on this worker: its file, its engine, its account of slots, and its doors.

Every attempt that was taken ends in exactly one of these ways: the engine reports it as over, its
body does not arrive, the engine dies, or the worker ends; each releases its slots and, unless the
engine has spoken already, answers it.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, Protocol

import msgspec
import structlog

from shared.bus import Bus, BusMessage
from shared.presence import ModelState
from shared.protocol import VERSION, Accepted, Busy, Fail, Request
from shared.rejects import Rejects
from worker.admission import Admission, Admitted, Dropped, Ticket
from worker.body import Bodies, Body, BodyError, Full
from worker.catalog import ModelSource
from worker.doors import Doors, Wanted
from worker.engine_process import EngineGaveUp, EngineProcess
from worker.gguf_header import GgufError, Header
from worker.handing_back import hand_back
from worker.hub import DownloadStopped, HubError
from worker.intake import VERSION_HEADER, Rejected, read_request, ticket_of
from worker.link import EngineStats, Ready, Step, Submit
from worker.memory_budget import NotEnoughMemory
from worker.model_bytes import SourceError
from worker.model_state import filled_in, under_all_names
from worker.part import PartRefused, PartStopped
from worker.preparing import Prepared, ServingSettings
from worker.rate import Rate
from worker.replies import Replies

__all__ = ("Preparing", "Serving", "Surroundings")

_IMPOSSIBLE = (GgufError, HubError, NotEnoughMemory, EngineGaveUp, SourceError, PartRefused)

State = Literal["loading", "ready", "draining", "failed"]

_log = structlog.get_logger()


class Preparing(Protocol):
    """Makes everything ready for an engine."""

    def __call__(self, *, tell: Callable[[str], None]) -> Awaitable[Prepared]:
        """Do it; `tell` hears what is being done, possibly from another thread."""


class Surroundings(msgspec.Struct, frozen=True):
    """What all models of a worker share."""

    bus: Bus
    replies: Replies
    bodies: Bodies
    rejects: Rejects
    stopping: threading.Event
    on_change: Callable[[], None]
    """A model has changed its state: beat."""
    on_release: Callable[[], None]
    """Something is over: look whether the worker is idle."""


class Serving:
    """Serves one model; `run` returns only when it cannot be served."""

    def __init__(
        self,
        source: ModelSource,
        settings: ServingSettings,
        around: Surroundings,
        preparing: Preparing,
        *,
        pinned: bool = False,
        memory: int = 0,
    ) -> None:
        """Make it.

        Args:
            source: the model.
            settings: for what its own options leave open.
            around: what all models share.
            preparing: how its engine is made ready.
            pinned: the operator named it.
            memory: bytes set aside for it, until that is known better.
        """
        options = source.options
        self.name = source.name
        self.last_use = 0.0
        """Unix time of the last moment at which an attempt was in; 0: none so far."""
        self.failure = ""
        """Why the model cannot be served; empty while it can, or might."""
        self._source = source
        self._settings = settings
        self._around = around
        self._preparing = preparing
        self._admission = Admission(options.slots or settings.slots, settings.queue)
        self._doors = Doors(
            around.bus, source.names, self.take, wanted=self._wanted, on_open=around.on_change
        )
        self._engine: EngineProcess | None = None
        self._header: Header | None = None
        self._ready: Ready | None = None
        self._stats = EngineStats(0, 0, 0.0)
        self._detail = "waiting"
        self._pinned = pinned
        self._memory = memory
        self._state: State = "loading"
        self._since = time.time()
        self._moved = asyncio.Event()
        self._draining = asyncio.Event()
        self._rate = Rate()
        self._log = _log.bind(model=source.name)

    @property
    def busy(self) -> int:
        """Attempts that run or wait."""
        return len(self._admission)

    @property
    def tickets(self) -> tuple[Ticket, ...]:
        """Of all attempts that run or wait."""
        return self._admission.tickets

    @property
    def state(self) -> State:
        """How far it has come."""
        ready = self._can_serve and self._doors.open
        if self.failure:
            return "failed"
        if self._admission.draining:
            return "draining"
        return "ready" if ready else "loading"

    @property
    def was_ready(self) -> bool:
        """Whether its engine has ever been."""
        return self._ready is not None

    @property
    def engine_pid(self) -> int | None:
        """Process id of the engine, if one runs."""
        return self._engine.pid if self._engine else None

    async def run(self) -> None:
        """Fetch, check and serve the model until cancelled or found impossible."""
        try:
            async with asyncio.TaskGroup() as group:
                doors = group.create_task(self._doors.run(), name=f"doors {self.name}")
                offering = hand_back(self._draining, lambda: self.tickets, self._around.replies)
                offers = group.create_task(offering, name=f"offers {self.name}")
                await self._serve()
                doors.cancel()
                offers.cancel()
        finally:
            await self._doors.close()

    async def _serve(self) -> None:
        around = self._around
        try:
            config, self._header, self._memory = await self._preparing(tell=self._note)
            self._engine = EngineProcess(config, self, command=self._settings.command)
            self._tell("starting")
            await self._engine.run()
        except _IMPOSSIBLE as error:
            self.failure = " ".join(str(error).split())
            self._log.error("model.failed", reason=self.failure)
            around.on_change()
        except (DownloadStopped, PartStopped):
            self._log.info("model.download_stopped")

    def reconnected(self) -> None:
        """NATS is back."""
        self._doors.poke()

    def take(self, message: BusMessage) -> None:
        """A request has come through one of the doors."""
        if message.status or not message.reply:
            self._around.rejects.add("unanswerable", subject=message.subject)
            return
        self._around.replies.opened(message.reply)
        now = time.time()
        worker = self._around.bus.identity
        request = read_request(
            message.data, message.headers, worker=worker, names=self._source.names, now=now
        )
        if isinstance(request, Rejected):
            tell = self._around.rejects.add if request.bad else self._log.warning
            tell("request.rejected", reason=request.reason)
            if request.answer is not None:
                self._around.replies.say(message.reply, request.answer)
            return
        if not self._can_serve:
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
        data = bytes(body.data)
        read = read_request(
            data,
            {VERSION_HEADER: VERSION},
            worker=self._around.bus.identity,
            names=self._source.names,
            now=time.time(),
        )
        if isinstance(read, Rejected):
            code = read.answer.code if isinstance(read.answer, Fail) else "invalid_value"
            self.drop_body(body, code, f"malformed request: {read.reason}")
        elif read.attempt != body.attempt or read.body_size:
            self.drop_body(body, "invalid_value", "malformed request: head and body differ")
        elif self._engine is not None and self._engine.ready:
            self._engine.submit(Submit(body.reply, data, time.time()))

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
        if running and self._engine is not None:
            self._engine.cancel(tuple(running))

    def drain(self) -> None:
        """Take nothing new, and offer what is in to other workers."""
        self._admission.draining = True
        self._draining.set()
        self._doors.poke()

    async def idle(self) -> None:
        """Return when nothing runs or waits."""
        while self.busy:
            self._moved.clear()
            await self._moved.wait()

    def abandon(self, reason: str) -> None:
        """Fail all that is still in; it may go on on another worker."""
        lost = self._admission.clear(time.monotonic())
        self._around.bodies.close_model(self.name)
        for ticket in lost:
            self._fail(ticket.reply, ticket.attempt, "worker_failed", reason, lost=True)
        if lost and self._engine is not None:
            self._engine.cancel(tuple(ticket.attempt for ticket in lost))
        self._moved.set()
        self._around.on_release()

    def kill(self) -> None:
        """End the engine at once, whatever it does."""
        if self._engine is not None:
            self._engine.kill()

    def states(self) -> tuple[ModelState, ...]:
        """The model as beats tell of it, once under each of its names."""
        now = time.time()
        if self.busy:
            self.last_use = now
        if self.state != self._state:
            self._state, self._since = self.state, now
        rate = self._rate.of(self._stats.completion_tokens, time.monotonic())
        state = filled_in(
            ModelState(
                name=self.name,
                state=self._state,
                tokens_per_second=round(rate, 1),
                detail=self.failure or self._detail,
                restarts=self._engine.restarts if self._engine else 0,
                memory=self._memory,
                busy=self.busy,
                since=self._since,
                last_use=self.last_use,
                pinned=self._pinned,
            ),
            admission=self._admission,
            stats=self._stats,
            engine=self._ready,
            header=self._header,
        )
        return under_all_names(state, self._source.names)

    def on_loading(self, progress: float) -> None:
        """See EngineEvents."""
        self._detail = f"loading {progress:.0%}"

    def on_ready(self, ready: Ready) -> None:
        """See EngineEvents."""
        self._ready = ready
        self._admission.resize(ready.slots)
        self._log.info(
            "model.ready",
            context=ready.context,
            slots=ready.slots,
            threads=ready.threads,
            seconds=round(ready.load_seconds, 2),
        )
        if ready.advice:
            self._log.warning("model.advice", advice=ready.advice)
        self._doors.poke()

    def on_step(self, step: Step) -> None:
        """See EngineEvents."""
        replies = self._around.replies
        for mail in step.mail:
            replies.post(mail.reply, mail.frames)
        self._stats = step.stats or self._stats
        if self._admission.started(step.started, time.monotonic()):
            self._doors.poke()
        for attempt in step.ended:
            self._release(attempt)

    def on_lost(self, reason: str) -> None:
        """See EngineEvents."""
        self._stats = EngineStats(0, 0, 0.0)
        self.abandon(f"worker {self._around.bus.identity}: {reason}")
        self._tell(f"restarting: {reason}")
        self._doors.poke()

    @property
    def _can_serve(self) -> bool:
        return self._engine is not None and self._engine.ready

    def _wanted(self) -> Wanted:
        serve = self._can_serve
        # While draining the own door stays open: who knocks is told at once to go elsewhere.
        return Wanted(serve, serve and self._admission.free > 0 and not self._admission.draining)

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
                model=self.name,
                reply=message.reply,
                size=request.body_size,
                now=clock,
                expires=clock + (request.deadline - now),
            )
        elif self._engine is not None:
            self._engine.submit(Submit(message.reply, message.data, now))
        if admission.free == 0:
            self._doors.poke()

    def _release(self, attempt: int) -> Ticket | None:
        was_full = self._admission.free == 0
        ticket = self._admission.release(attempt, time.monotonic())
        if ticket is not None:
            self.last_use = time.time()
            self._moved.set()
            self._around.on_release()
            if was_full:
                self._doors.poke()
        return ticket

    def _refuse(self, reply: str, request: Request, reason: str, retry_after: float) -> None:
        worker = self._around.bus.identity
        self._around.replies.say(reply, Busy(request.attempt, worker, retry_after, reason))

    def _fail(
        self, reply: str, attempt: int, code: str, message: str, *, lost: bool = False
    ) -> None:
        self._around.replies.say(reply, Fail(attempt, code, message, lost=lost))

    def _note(self, detail: str) -> None:
        # Maybe from a download's thread: a str is replaced in one piece, and a later beat tells it.
        self._detail = detail

    def _tell(self, detail: str) -> None:
        self._note(detail)
        self._around.on_change()
