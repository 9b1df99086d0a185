"""One model on this worker, from its file to its end: its engine, its doors, what beats tell of it.

What is asked of it is the business of `worker.attempts`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Literal, Protocol

import structlog

from shared.presence import ModelState
from worker.admission import Admission
from worker.attempts import Attempts
from worker.catalog import ModelSource
from worker.doors import Doors, Wanted
from worker.engine_process import EngineGaveUp, EngineProcess
from worker.gguf_header import GgufError, Header
from worker.handing_back import hand_back
from worker.hub import DownloadStopped, HubError
from worker.link import EngineStats, Ready, RingPlace, Step
from worker.memory_budget import NotEnoughMemory
from worker.model_bytes import SourceError
from worker.model_state import filled_in, under_all_names
from worker.part import PartRefused, PartStopped
from worker.preparing import Prepared, ServingSettings
from worker.rate import Rate
from worker.surroundings import Surroundings

__all__ = ("Preparing", "Serving")

_IMPOSSIBLE = (GgufError, HubError, NotEnoughMemory, EngineGaveUp, SourceError, PartRefused)

State = Literal["loading", "ready", "draining", "failed"]

_log = structlog.get_logger()


class Preparing(Protocol):
    """Makes everything ready for an engine."""

    def __call__(self, *, tell: Callable[[str], None]) -> Awaitable[Prepared]:
        """Do it; `tell` hears what is being done, possibly from another thread."""


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
        on_over: Callable[["Serving", str], None] = lambda serving, reason: None,
    ) -> None:
        """Make it.

        Args:
            source: the model.
            settings: for what its own options leave open.
            around: what all models share.
            preparing: how its engine is made ready.
            pinned: the operator named it.
            memory: bytes set aside for it, until that is known better.
            on_over: told, and why, when its group is over while its engine is there.
        """
        options = source.options
        self.name = source.name
        self.failure = ""
        """Why the model cannot be served; empty while it can, or might."""
        self._source = source
        self._settings = settings
        self._around = around
        self._preparing = preparing
        self._admission = Admission(options.slots or settings.slots, settings.queue)
        self.attempts = Attempts(
            source.names, self._admission, around, on_room=lambda: self._doors.poke()
        )
        """What is asked of it."""
        self._doors = Doors(
            around.bus,
            source.names,
            self.attempts.take,
            wanted=self._wanted,
            on_open=around.on_change,
        )
        self._header: Header | None = None
        self._ready: Ready | None = None
        self._stats = EngineStats(0, 0, 0.0)
        self._detail = "waiting"
        self._pinned = pinned
        self._on_over = on_over
        self._memory = memory
        self._state: State = "loading"
        self._since = time.time()
        self._draining = asyncio.Event()
        self._rate = Rate()
        self._log = _log.bind(model=source.name)

    @property
    def busy(self) -> int:
        """Attempts that run or wait."""
        return len(self.attempts)

    @property
    def memory(self) -> int:
        """Bytes that it takes, or is to take."""
        return self._memory

    @property
    def state(self) -> State:
        """How far it has come."""
        ready = self.attempts.served and self._doors.open
        if self.failure:
            return "failed"
        if self._admission.draining:
            return "draining"
        return "ready" if ready else "loading"

    @property
    def was_ready(self) -> bool:
        """Whether its engine has ever been; of a head, in the group that it is in."""
        return self._ready is not None

    @property
    def engine_pid(self) -> int | None:
        """Process id of the engine, if one runs."""
        engine = self.attempts.engine
        return engine.pid if engine else None

    async def run(self) -> None:
        """Fetch, check and serve the model until cancelled or found impossible."""
        try:
            async with asyncio.TaskGroup() as group:
                doors = group.create_task(self._doors.run(), name=f"doors {self.name}")
                offering = hand_back(
                    self._draining, lambda: self.attempts.tickets, self._around.replies
                )
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
            engine = EngineProcess(config, self, command=self._settings.command)
            self.attempts.engine = engine
            self._tell("starting")
            await engine.run()
        except _IMPOSSIBLE as error:
            self.failure = " ".join(str(error).split())
            self._log.error("model.failed", reason=self.failure)
            around.on_change()
        except (DownloadStopped, PartStopped):
            self._log.info("model.download_stopped")

    def reconnected(self) -> None:
        """NATS is back."""
        self._doors.poke()

    def drain(self) -> None:
        """Take nothing new, and offer what is in to other workers."""
        self._admission.draining = True
        self._draining.set()
        self._doors.poke()

    def leave(self, reason: str) -> bool:
        """End all that runs, for the group is over; whether the engine is there for another."""
        self.attempts.abandon(f"worker {self._around.bus.identity}: {reason}")
        engine = self.attempts.engine
        if engine is None or not engine.loaded:
            return False
        engine.leave()
        self._doors.poke()
        return True

    def join(self, place: RingPlace) -> bool:
        """Be the head of another group; False: the engine is not there any more."""
        engine = self.attempts.engine
        self._ready = None
        self._tell("starting")
        return engine is not None and engine.join(place)

    def kill(self) -> None:
        """End the engine at once, whatever it does."""
        if self.attempts.engine is not None:
            self.attempts.engine.kill()

    def states(self) -> tuple[ModelState, ...]:
        """The model as beats tell of it, once under each of its names."""
        now = time.time()
        attempts = self.attempts
        if len(attempts):
            attempts.last_use = now
        if self.state != self._state:
            self._state, self._since = self.state, now
        rate = self._rate.of(self._stats.completion_tokens, time.monotonic())
        state = filled_in(
            ModelState(
                name=self.name,
                state=self._state,
                tokens_per_second=round(rate, 1),
                detail=self.failure or self._detail,
                restarts=attempts.engine.restarts if attempts.engine else 0,
                memory=self._memory,
                busy=len(attempts),
                since=self._since,
                last_use=attempts.last_use,
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
        self.attempts.note(step)

    def on_lost(self, reason: str) -> None:
        """See EngineEvents."""
        self._stats = EngineStats(0, 0, 0.0)
        self.attempts.abandon(f"worker {self._around.bus.identity}: {reason}")
        self._tell(f"restarting: {reason}")
        self._doors.poke()
        engine = self.attempts.engine
        if engine is not None and engine.loaded:
            self._on_over(self, reason)

    def _wanted(self) -> Wanted:
        serve = self.attempts.served
        # While draining the own door stays open: who knocks is told at once to go elsewhere.
        return Wanted(serve, serve and self._admission.free > 0 and not self._admission.draining)

    def _note(self, detail: str) -> None:
        # Maybe from a download's thread: a str is replaced in one piece, and a later beat tells it.
        self._detail = detail

    def _tell(self, detail: str) -> None:
        self._note(detail)
        self._around.on_change()
