"""Bringing requests to workers, and watching over them while they run.

Owns the attempts in flight, the view of the fleet, cancellations, and the clock that ends what
takes too long. `router.call` is the life of one attempt.
"""

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Literal, Protocol

import msgspec
import structlog

from router.breakers import Breakers
from router.call import Call
from router.demand import Demand
from router.demand_board import DemandBoard
from router.desk import Sink
from router.fleet import EXPIRY, Fleet
from router.inbox import Inbox
from router.metrics import Dropped
from router.pings import Pings
from router.retrying import RetryBudget
from router.settings import Settings
from router.waiting import Held, WaitingRoom
from router.wishes import Wishes
from shared import __version__, subjects
from shared.bus import Bus, BusMessage, BusUnavailable
from shared.distance import Distances
from shared.errors import MeshError, ModelNotFound, QueueFull, Unavailable
from shared.kv import Kv
from shared.presence import RouterBeat, decode_beat, encode_beat
from shared.protocol import Cancel, Request, encode
from shared.rejects import Rejects
from shared.routing import Routing
from shared.settings import SettingsAnnouncer

__all__ = ("Dispatcher", "Watched")

log = structlog.get_logger(__name__)

SWEEP_INTERVAL = 0.25
OWN_STALL = 1.0
"""Seconds without a sweep after which nobody else is blamed for silence yet."""
BEAT_INTERVAL = 1.0
END_WITHIN = 2.0
"""Seconds for all that runs beside to end."""
FAR_RETRY = 10
"""Seconds after which to ask again for a model whose workers are all too far away."""
HEARD_ALL = 0.7
"""Seconds of listening after which every live worker has been heard; they beat every 0.5 s."""


class Watched(Protocol):
    """Who wants to know that time passes."""

    def tick(self, now: float) -> None:
        """Time has passed (monotonic seconds)."""
        ...


class Dispatcher:
    """Places requests and keeps watch. Lives within `running`."""

    def __init__(self, bus: Bus, settings: Settings) -> None:
        self.bus = bus
        self.settings = settings
        self.distances = Distances(settings.max_rtt)
        self.fleet = Fleet(
            self.distances, Routing(load_bound=settings.load_bound, far=settings.far)
        )
        self.demand = Demand(settings.name, self.fleet)
        self.waiting = WaitingRoom(
            self.fleet,
            per_model=settings.held_per_model,
            in_all=settings.held_in_all,
            patience=settings.wait_for_workers,
        )
        self.board = DemandBoard(Kv(bus), self.demand)
        self.announcer = SettingsAnnouncer(bus)
        self.wishes = Wishes(self.fleet.beats, self.board.demand, lambda: self.announcer.settings)
        self.pings = Pings(bus, self.distances, self.fleet.workers, self._unheard)
        self.rejects = Rejects()
        self.inbox = Inbox(bus.inbox, self.rejects)
        self.breakers = Breakers(time.monotonic, random.random)
        self.retries = RetryBudget(settings.retry_share, time.monotonic())
        self.watched: set[Watched] = set()
        self.draining = False
        self.placed = 0
        self._tasks: asyncio.TaskGroup | None = None
        self._owned: set[asyncio.Task[None]] = set()
        self._cancels: dict[str, list[int]] = {}
        self._cancelled = asyncio.Event()
        self._started = time.time()
        self._listening_since = time.monotonic()
        self._away_since: float | None = None
        """When NATS went away; None: it is there."""
        self._back_since = float("-inf")
        """When it came back last."""
        self._met: set[str] = set()
        """Workers that were heard since. If one has lost NATS together with us, what it was asked
        is suspect anyway, and what it is asked now must not be taken for lost with it."""
        self._beats = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Listen for beats and frames, sweep, beat; ends all of it at the end."""
        beats = await self.bus.subscribe(subjects.BEATS, self._on_beat)
        self._listening_since = time.monotonic()
        async with self.inbox.listening(self.bus), asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            for job in (
                self._sweep,
                self._beat,
                self._cancel,
                self.pings.run,
                self.board.run,
                self.announcer.run,
            ):
                self.spawn(job())
            try:
                yield
            finally:
                owned = list(self._owned)
                for task in owned:
                    task.cancel()
                await asyncio.wait(owned, timeout=END_WITHIN)
                # Among those tasks may be some that have freed their workers by ending.
                await self._send_cancels()
                await self._publish(subjects.router(self.bus.identity), self._own_beat("gone"))
        await beats.leave()

    @property
    def informed(self) -> bool:
        """Whether it has listened long enough to know who is there.

        Before that, a model whose workers are all busy looks like one that nobody serves.
        """
        return time.monotonic() - self._listening_since > HEARD_ALL

    def dropped(self) -> Dropped:
        """What came in from NATS and was not used, here and at the workers."""
        workers = {beat.worker: beat.dropped for beat in self.fleet.beats() if beat.dropped}
        return Dropped(self.rejects.counts, self.inbox.strays, workers)

    def spawn(self, job: Coroutine[Any, Any, None]) -> None:
        """Run something beside; what it raises is logged, and ends nothing else."""
        if self._tasks is None:
            job.close()
            raise RuntimeError("the dispatcher is not running")
        task = self._tasks.create_task(_guard(job))
        self._owned.add(task)
        task.add_done_callback(self._owned.discard)

    def call(self, request: Request, sink: Sink, part: int, cache_key: str = "") -> Call:
        """Take a request on, for its `begin`; what becomes of it is told to the sink.

        `cache_key` is what the client calls its conversation; empty: nothing.
        """
        self.placed += 1
        self.demand.requested(request.model)
        self.retries.requested()
        return Call(self, request, sink, part, cache_key)

    def cancel(self, worker: str, attempt: int) -> None:
        """Tell a worker that nobody wants an attempt any more."""
        self._cancels.setdefault(worker, []).append(attempt)
        self._cancelled.set()

    def on_connection(self, connected: bool) -> None:
        """The connection to NATS has come or gone."""
        now = time.monotonic()
        if not connected:
            self._away_since = now
        else:
            self._away_since = None
            self._listening_since = self._back_since = now
            self._met.clear()
            self.fleet.reconnected(now)
            self.board.reconnected()
            self.announcer.reconnected()
            for receiver in self.inbox.receivers():
                receiver.interrupted(now)

    def nobody(self, model: str, busy: list[float]) -> MeshError:
        """Why no worker takes a request for this model."""
        if busy:
            return QueueFull(
                f"All workers of the model '{model}' are busy, and their queues are full or longer "
                "than the request's time.",
                retry_after=min(60, max(1, math.ceil(min(busy)))),
            )
        pool = self.fleet.pool(model)
        if pool is not None and not pool.candidates:
            return Unavailable(
                f"All workers of the model '{model}' are farther away than "
                f"{self.distances.cap * 1000:g} ms.",
                retry_after=FAR_RETRY,
            )
        if self.fleet.model(model) is not None:
            failure = self.fleet.failure(model)
            why = f": {failure}" if failure and pool is None else ""
            return Unavailable(f"No worker serves the model '{model}' now{why}.", retry_after=2)
        if self.fleet.empty():
            return Unavailable("No worker is connected.", retry_after=2)
        served = ", ".join(f"'{name}'" for name in self.fleet.served()) or "no model"
        return ModelNotFound(
            f"The model '{model}' does not exist here. Served now: {served}.", param="model"
        )

    def hold(self, model: str, call: Held, busy: list[float], *, again: bool) -> bool:
        """Keep a request until its model is served; False: there is no hope of it.

        A model that is served, but full, is no reason to wait, except for those who have waited
        for it already.

        Raises:
            Unavailable: too many wait.
        """
        pool = self.fleet.pool(model)
        if pool is not None and (not pool.candidates or (busy and not again)):
            return False
        patient = self.settings.wait_for_workers > 0 and self.fleet.knows(model)
        # Its workers may come back a moment after us when NATS was away.
        just_back = time.monotonic() - self._back_since < EXPIRY
        expected = pool is not None and (again or just_back)
        if not (patient or self.fleet.hopeful(model) or expected):
            return False
        self.waiting.enter(model, call, again=again)
        return True

    def _on_beat(self, message: BusMessage) -> None:
        try:
            beat = decode_beat(message.data)
        except msgspec.DecodeError as error:
            self.rejects.add("beat", subject=message.subject, error=str(error))
            return
        if message.subject != subjects.beat(beat.worker):
            self.rejects.add("misnamed_beat", subject=message.subject, worker=beat.worker)
            return
        life = self.fleet.life(beat.worker)
        if not self.fleet.observe(beat, time.monotonic()):
            self._lose(beat.worker, "has left")
            return
        if life is not None and life[0] != beat.started:
            self._lose(beat.worker, "was started anew")
        elif life is not None and life[1] < beat.losses and beat.worker in self._met:
            self._lose(beat.worker, "lost its connection")
        self._met.add(beat.worker)
        self.pings.met(beat.worker)
        if self.waiting:
            self.waiting.look(model.name for model in beat.models)

    def _lose(self, worker: str, why: str) -> None:
        for receiver in self.inbox.receivers():
            receiver.lost(worker, why)

    def _unheard(self, worker: str) -> None:
        # After an interruption of our own, workers may need a moment to come back, too.
        if self.bus.connected and time.monotonic() - self._listening_since > EXPIRY:
            for receiver in self.inbox.receivers():
                receiver.unheard(worker)

    async def _sweep(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(SWEEP_INTERVAL)
            now = time.monotonic()
            before, last = last, now
            away = 0.0 if self._away_since is None else now - self._away_since
            if now - before < OWN_STALL and not away:
                for worker in self.fleet.expire(now):
                    log.warning("worker.lost", worker=worker)
                    self._met.discard(worker)
                    self._lose(worker, "stopped answering")
            # else it was us who slept or were cut off, and the beats of that time are to come
            self.waiting.sweep(now, lambda model: self.nobody(model, []))
            wall = time.time()
            for receiver in self.inbox.receivers():
                receiver.tick(now, wall)
                if away > self.settings.nats_patience:
                    receiver.cut_off()
            for watched in list(self.watched):
                watched.tick(now)

    async def _beat(self) -> None:
        while True:
            state: Literal["draining", "ready"] = "draining" if self.draining else "ready"
            await self._publish(subjects.router(self.bus.identity), self._own_beat(state))
            await asyncio.sleep(BEAT_INTERVAL)

    def _own_beat(self, state: Literal["ready", "draining", "gone"]) -> bytes:
        self._beats += 1
        return encode_beat(
            RouterBeat(
                router=self.bus.identity,
                sequence=self._beats,
                state=state,
                in_flight=len(self.inbox),
                requests=self.placed,
                url=f"http://{self.settings.host}:{self.settings.port}",
                version=__version__,
                started=self._started,
            )
        )

    async def _cancel(self) -> None:
        while True:
            await self._cancelled.wait()
            self._cancelled.clear()
            await self._send_cancels()

    async def _send_cancels(self) -> None:
        cancels, self._cancels = self._cancels, {}
        for worker, attempts in cancels.items():
            await self._publish(subjects.cancel(worker), encode(Cancel(tuple(attempts))))

    async def _publish(self, subject: str, data: bytes) -> None:
        try:
            await self.bus.publish(subject, data)
        except BusUnavailable as error:
            # Beats repeat, and a worker drops what nobody waits for when its deadline passes.
            log.debug("publish.skipped", subject=subject, error=str(error))


async def _guard(job: Coroutine[Any, Any, None]) -> None:
    try:
        await job
    except Exception:
        log.exception("task.failed")
