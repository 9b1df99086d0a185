"""The worker on the bus: cancellations, bodies in chunks, and an orderly end.

What concerns one model lies in `worker.serving`, which models there are in `worker.roster`, and why
in `worker.roles`. This owns what all models share, and decides when the worker is over: it was told
to stop, NATS is gone for good, or none of the models that it was told to serve can be served.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial

import msgspec
import structlog

from shared import subjects
from shared.bus import Bus, BusMessage, BusUnavailable
from shared.command_line import CommandFailed
from shared.kv import Kv
from shared.leases import Leases
from shared.protocol import decode_cancel, decode_chunk
from shared.rejects import Rejects
from shared.replicas import DEFAULT_TIMING, Timing
from worker import hardware
from worker.admission import Ticket
from worker.beats import BEAT_SECONDS, Beats
from worker.body import Bodies, BodyError
from worker.catalog import ModelSource
from worker.hearers import Hearers
from worker.offload import RESERVE, built_with_cuda
from worker.outlook import Outlook
from worker.preparing import ServingSettings
from worker.replies import Replies
from worker.roles import Roles
from worker.roster import Roster
from worker.serving import Serving
from worker.surroundings import Surroundings

__all__ = ("Agent", "AgentFailed", "AgentSettings")

BODIES_BYTES = 64 * 1024 * 1024
"""Announced bytes of all bodies being joined at once."""

HOP_SECONDS = 5.0
HOPS = 6
"""Measurements of the way to NATS of which the shortest counts."""

_log = structlog.get_logger()


class AgentSettings(msgspec.Struct, frozen=True):
    """One worker's settings."""

    url: str
    identity: str
    serving: ServingSettings = ServingSettings()
    memory: int = 0
    """Bytes for all models together; 0: what the host has left at the start."""
    grace: float = 30.0
    """Seconds that running requests are given when the worker is told to stop."""
    timing: Timing = DEFAULT_TIMING
    """When roles are taken up and let go."""

    def __repr__(self) -> str:
        # Without the URL, which may hold a password.
        return f"AgentSettings(identity={self.identity!r})"


class AgentFailed(CommandFailed):
    """The worker cannot go on; the message is one line."""


class Agent:
    """One worker: `run` lasts until `stop` or until it cannot go on."""

    def __init__(
        self,
        settings: AgentSettings,
        pinned: Sequence[ModelSource],
        roles: Sequence[ModelSource] = (),
    ) -> None:
        """Make it.

        Args:
            settings: the worker's.
            pinned: models to serve at once and always.
            roles: models that may be served as the fleet needs them.
        """
        self._settings = settings
        self._pinned = tuple(pinned)
        self._offered = tuple(roles)
        self._roster: Roster | None = None
        self._beats: Beats | None = None
        self._roles: Roles | None = None
        self._over = asyncio.Event()
        self._cut = asyncio.Event()
        self._released = asyncio.Event()
        self._stopping = threading.Event()
        self._failure = ""
        self._replies: Replies | None = None
        self._rejects = Rejects()

    @property
    def engine_pids(self) -> dict[str, int | None]:
        """The process id of each model's engine."""
        return {serving.name: serving.engine_pid for serving in self._servings}

    @property
    def _servings(self) -> tuple[Serving, ...]:
        return tuple(self._roster or ())

    def _tickets(self) -> Iterator[Ticket]:
        return (ticket for serving in self._servings for ticket in serving.attempts.tickets)

    def stop(self) -> None:
        """Drain and end; when called again, end at once."""
        if self._over.is_set():
            self._cut.set()
        self._over.set()

    async def run(self) -> None:
        """Join the mesh, serve, and leave.

        Raises:
            BusUnavailable: NATS cannot be reached at the start.
            AgentFailed: NATS is gone for good, or no model can be served.
        """
        settings = self._settings
        async with Bus.connect(
            settings.url, identity=settings.identity, kind="worker", on_state=self._on_state
        ) as bus:
            await self._serve(bus)
        if self._failure:
            raise AgentFailed(self._failure)

    async def _serve(self, bus: Bus) -> None:
        # NVML may take a second on a host with many GPUs.
        free = partial(_free_memory, gpus=self._settings.serving.gpu_layers != 0)
        memory = self._settings.memory or await asyncio.to_thread(free)
        bodies = Bodies(most_bytes=BODIES_BYTES, largest=bus.max_payload)
        replies = self._replies = Replies(bus, self._cancel)
        around = Surroundings(
            bus=bus,
            replies=replies,
            bodies=bodies,
            rejects=self._rejects,
            stopping=self._stopping,
            on_change=self._on_change,
            on_release=self._released.set,
        )
        identity = bus.identity
        await bus.subscribe(subjects.cancel(identity), self._on_cancel)
        await bus.subscribe(
            subjects.body(identity), lambda message: self._on_chunk(message, bodies)
        )
        hearers = Hearers(bus, self._tickets, self._cancel)
        await hearers.open()
        echoes: asyncio.Queue[BusMessage] = asyncio.Queue(maxsize=1024)
        await bus.subscribe(subjects.ping(identity), lambda message: _keep(echoes, message))
        async with asyncio.TaskGroup() as group:
            roster = self._roster = Roster(
                self._pinned,
                self._offered,
                self._settings.serving,
                around,
                group,
                memory=memory,
                nats=self._settings.url,
                on_failed=self._on_failed,
            )
            beats, roles = await self._join(bus, roster, memory)
            tasks = [
                group.create_task(work, name=name)
                for name, work in (
                    ("replies", replies.run()),
                    ("beats", beats.run()),
                    ("bodies", self._expire(bodies)),
                    ("echoes", _echo(bus, echoes)),
                    ("hearers", hearers.run()),
                    ("stages", roster.stages.run()),
                    ("hop", _measure_hop(bus, beats)),
                    ("closed", self._watch(bus)),
                )
            ]
            await roster.survey()
            roster.start_pinned()
            taking = group.create_task(roles.run(), name="roles")
            await self._over.wait()
            taking.cancel()
            await asyncio.wait({taking})
            await self._leave(bus, replies, beats, roles)
            for task in (*tasks, *roster.tasks):
                task.cancel()

    async def _join(self, bus: Bus, roster: Roster, memory: int) -> tuple[Beats, Roles]:
        """Begin to hear of the fleet, with nothing done yet."""
        leases = Leases(
            Kv(bus),
            bus.identity,
            on_change=self._on_leases,
            on_lost=lambda key, holder: roles.lost(key, holder),
            clock=time.monotonic,
            wall=time.time,
        )
        roster.follow(leases.groups)
        outlook = Outlook(bus.identity, leases.table, on_demand=self._poke_roles)
        beats = Beats(bus, roster, self._rejects, memory=memory, pause=lambda: outlook.pause)
        roles = Roles(
            bus.identity,
            roster,
            outlook,
            leases,
            presence=beats.presence,
            changes=beats.changes,
            timing=self._settings.timing,
        )
        await leases.open()
        await outlook.open(bus)
        self._beats, self._roles = beats, roles
        return beats, roles

    def _on_change(self) -> None:
        if self._beats is not None:
            self._beats.hurry()
        self._poke_roles()

    def _on_leases(self) -> None:
        if self._roster is not None:
            self._roster.stages.poke()
        self._poke_roles()

    def _poke_roles(self) -> None:
        if self._roles is not None:
            self._roles.poke()

    def _on_failed(self, model: str, reason: str) -> None:
        roster = self._roster
        if roster is not None and not roster.is_pinned(model):
            if self._roles is not None:
                self._roles.failed(model, reason)
        elif all(serving.failure for serving in self._servings) and not (roster and roster.parts):
            reasons = "; ".join(f"{other.name}: {other.failure}" for other in self._servings)
            self._end(f"no model can be served: {reasons}")

    async def _watch(self, bus: Bus) -> None:
        await bus.closed.wait()
        self._cut.set()
        self._end("the connection to NATS was closed for good")

    def _end(self, failure: str) -> None:
        self._failure = self._failure or failure
        self._over.set()

    async def _leave(self, bus: Bus, replies: Replies, beats: Beats, roles: Roles) -> None:
        """Let what runs come to its end, fail the rest, and say goodbye."""
        beats.draining = True
        self._stopping.set()
        for serving in self._servings:
            serving.drain()
        beats.hurry()
        busy = sum(serving.busy for serving in self._servings)
        _log.info("worker.draining", running=busy, grace=self._settings.grace)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.grace):
                await self._idle_or_cut()
        left = sum(serving.busy for serving in self._servings)
        for serving in self._servings:
            serving.attempts.abandon(f"worker {bus.identity} was stopped")
        try:
            await replies.flush()
            await roles.release_all()
            await beats.say_gone()
            await bus.barrier()
        except BusUnavailable as error:
            _log.warning("worker.left_silently", reason=str(error))
        _log.info("worker.gone", abandoned=left)

    async def _idle_or_cut(self) -> None:
        cut = asyncio.create_task(self._cut.wait(), name="second stop")
        try:
            while not cut.done() and self._needed:
                self._released.clear()
                released = asyncio.create_task(self._released.wait(), name="released")
                try:
                    await asyncio.wait({cut, released}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    released.cancel()
        finally:
            cut.cancel()

    @property
    def _needed(self) -> bool:
        """Whether there are answers under way here, or in groups of which it carries a part."""
        carries = self._roster is not None and self._roster.stages.needed
        return carries or any(serving.busy for serving in self._servings)

    async def _expire(self, bodies: Bodies) -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            for body, why in bodies.expired(time.monotonic()):
                serving = self._by_name(body.model)
                if serving is None:
                    continue
                if why == "deadline":
                    serving.attempts.drop_body(
                        body, "deadline_exceeded", "the deadline passed before the whole body came"
                    )
                else:
                    serving.attempts.drop_body(
                        body, "worker_failed", f"chunk {body.next_index} of the request never came"
                    )

    def _on_state(self, connected: bool) -> None:
        if not connected:
            if self._replies is not None:
                self._replies.forget()
            if self._beats is not None:
                self._beats.losses += 1
            self._cancel(tuple(ticket.attempt for ticket in self._tickets()))
            return
        if self._roles is not None:
            self._roles.reconnected()
        for serving in self._servings:
            serving.reconnected()
        self._on_change()

    def _on_cancel(self, message: BusMessage) -> None:
        try:
            attempts = decode_cancel(message.data).attempts
        except msgspec.DecodeError as error:
            self._rejects.add("cancel", error=str(error))
            return
        self._cancel(attempts)

    def _cancel(self, attempts: tuple[int, ...]) -> None:
        for serving in self._servings:
            serving.attempts.cancel(attempts)

    def _on_chunk(self, message: BusMessage, bodies: Bodies) -> None:
        try:
            chunk = decode_chunk(message.data)
        except msgspec.DecodeError as error:
            self._rejects.add("chunk", error=str(error))
            return
        try:
            whole = bodies.add(chunk, time.monotonic())
        except BodyError as error:
            body = bodies.close(chunk.attempt)
            serving = self._by_name(body.model) if body is not None else None
            if body is not None and serving is not None:
                serving.attempts.drop_body(body, "worker_failed", str(error))
            return
        serving = self._by_name(whole.model) if whole is not None else None
        if whole is not None and serving is not None:
            serving.attempts.complete(whole)

    def _by_name(self, name: str) -> Serving | None:
        # None: a role that has ended since, with all that was in it.
        return None if self._roster is None else self._roster.get(name)


def _keep(echoes: asyncio.Queue[BusMessage], message: BusMessage) -> None:
    # Beyond the bound a ping is lost, as it may be anywhere on its way.
    if message.reply and not echoes.full():
        echoes.put_nowait(message)


async def _echo(bus: Bus, echoes: asyncio.Queue[BusMessage]) -> None:
    while True:
        message = await echoes.get()
        try:
            await bus.publish(message.reply, message.data)
        except (BusUnavailable, ValueError) as error:
            _log.debug("ping.unanswered", reason=str(error))


async def _measure_hop(bus: Bus, beats: Beats) -> None:
    """Keep the way to NATS and back: the shortest of late, for a busy moment only adds to it."""
    last: deque[float] = deque(maxlen=HOPS)
    while True:
        began = time.perf_counter()
        try:
            await bus.barrier()
            last.append(time.perf_counter() - began)
            beats.hop = round(min(last), 6)
        except BusUnavailable as error:
            _log.debug("hop.unmeasured", reason=str(error))
        await asyncio.sleep(HOP_SECONDS)


def _free_memory(*, gpus: bool) -> int:
    """What the host has left, main memory and, where they are used, GPUs."""
    free = hardware.memory().available
    if gpus and built_with_cuda():
        free += sum(max(0, gpu.free - RESERVE) for gpu in hardware.gpus())
    return free
