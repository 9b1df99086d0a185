"""The worker on the bus: presence, cancellations, bodies in chunks, and an orderly end.

What concerns one model lies in `worker.serving`; this owns what all models share, and decides when
the worker is over: it was told to stop, NATS is gone for good, or there is nothing left to serve.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

import msgspec
import structlog

from shared import __version__, subjects
from shared.bus import Bus, BusMessage, BusUnavailable
from shared.command_line import CommandFailed
from shared.presence import Beat, LoadableModel, encode_beat
from shared.protocol import decode_cancel, decode_chunk
from worker import hardware
from worker.body import Bodies, BodyError
from worker.catalog import ModelSource
from worker.loadable import survey
from worker.memory_budget import MemoryBudget
from worker.preparing import ServingSettings
from worker.replies import Replies
from worker.serving import Serving, Surroundings

__all__ = ("Agent", "AgentFailed", "AgentSettings")

BEAT_SECONDS = 0.5
BODIES_BYTES = 64 * 1024 * 1024
"""Announced bytes of all bodies being joined at once."""

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

    def __repr__(self) -> str:
        # Without the URL, which may hold a password.
        return f"AgentSettings(identity={self.identity!r})"


class AgentFailed(CommandFailed):
    """The worker cannot go on; the message is one line."""


class Agent:
    """One worker: `run` lasts until `stop` or until it cannot go on."""

    def __init__(self, settings: AgentSettings, sources: Sequence[ModelSource]) -> None:
        self._settings = settings
        self._sources = tuple(sources)
        self._servings: tuple[Serving, ...] = ()
        self._over = asyncio.Event()
        self._cut = asyncio.Event()
        self._released = asyncio.Event()
        self._changed = asyncio.Event()
        self._stopping = threading.Event()
        self._failure = ""
        self._draining = False
        self._sequence = 0
        self._started = time.time()
        self._memory = 0
        self._able: tuple[LoadableModel, ...] = ()

    @property
    def engine_pids(self) -> dict[str, int | None]:
        """The process id of each model's engine."""
        return {serving.name: serving.engine_pid for serving in self._servings}

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
        memory = self._settings.memory or await asyncio.to_thread(_free_memory)
        self._memory = memory
        bodies = Bodies(most_bytes=BODIES_BYTES, largest=bus.max_payload)
        replies = Replies(bus, self._cancel)
        around = Surroundings(
            bus=bus,
            replies=replies,
            bodies=bodies,
            budget=MemoryBudget(memory, len(self._sources)),
            stopping=self._stopping,
            on_change=self._changed.set,
            on_release=self._released.set,
        )
        self._servings = tuple(
            Serving(source, self._settings.serving, around, pinned=True) for source in self._sources
        )
        identity = bus.identity
        await bus.subscribe(subjects.cancel(identity), self._on_cancel)
        await bus.subscribe(
            subjects.body(identity), lambda message: self._on_chunk(message, bodies)
        )
        echoes: asyncio.Queue[BusMessage] = asyncio.Queue(maxsize=1024)
        await bus.subscribe(subjects.ping(identity), lambda message: _keep(echoes, message))
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(work, name=name)
                for name, work in (
                    ("replies", replies.run()),
                    ("beats", self._beat(bus)),
                    ("bodies", self._expire(bodies)),
                    ("echoes", _echo(bus, echoes)),
                    ("survey", self._survey()),
                    ("closed", self._watch(bus)),
                )
            ]
            tasks += [
                group.create_task(self._run_model(serving), name=serving.name)
                for serving in self._servings
            ]
            await self._over.wait()
            await self._leave(bus, replies)
            for task in tasks:
                task.cancel()

    async def _survey(self) -> None:
        # In a thread: a header takes some 50 ms, and a catalog may have hundreds.
        self._able = await asyncio.to_thread(
            survey, self._sources, self._settings.serving, self._memory
        )
        self._changed.set()

    async def _run_model(self, serving: Serving) -> None:
        await serving.run()
        if all(other.failure for other in self._servings):
            reasons = "; ".join(f"{other.name}: {other.failure}" for other in self._servings)
            self._end(f"no model can be served: {reasons}")

    async def _watch(self, bus: Bus) -> None:
        await bus.closed.wait()
        self._cut.set()
        self._end("the connection to NATS was closed for good")

    def _end(self, failure: str) -> None:
        self._failure = self._failure or failure
        self._over.set()

    async def _leave(self, bus: Bus, replies: Replies) -> None:
        """Let what runs come to its end, fail the rest, and say goodbye."""
        self._draining = True
        self._stopping.set()
        for serving in self._servings:
            serving.drain()
        self._changed.set()
        busy = sum(serving.busy for serving in self._servings)
        _log.info("worker.draining", running=busy, grace=self._settings.grace)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.grace):
                await self._idle_or_cut()
        left = sum(serving.busy for serving in self._servings)
        for serving in self._servings:
            serving.abandon(f"worker {bus.identity} was stopped")
        try:
            await replies.flush()
            await bus.publish(subjects.beat(bus.identity), encode_beat(self._presence(bus, "gone")))
            await bus.barrier()
        except BusUnavailable as error:
            _log.warning("worker.left_silently", reason=str(error))
        _log.info("worker.gone", abandoned=left)

    async def _idle_or_cut(self) -> None:
        cut = asyncio.create_task(self._cut.wait(), name="second stop")
        try:
            while not cut.done() and any(serving.busy for serving in self._servings):
                self._released.clear()
                released = asyncio.create_task(self._released.wait(), name="released")
                try:
                    await asyncio.wait({cut, released}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    released.cancel()
        finally:
            cut.cancel()

    async def _beat(self, bus: Bus) -> None:
        subject = subjects.beat(bus.identity)
        while True:
            self._changed.clear()
            with suppress(BusUnavailable):  # the bus says so itself, once an outage
                await bus.publish(subject, encode_beat(self._presence(bus)))
            with suppress(TimeoutError):
                async with asyncio.timeout(BEAT_SECONDS):
                    await self._changed.wait()

    def _presence(self, bus: Bus, state: str = "") -> Beat:
        self._sequence += 1
        memory = hardware.memory()
        models = tuple(m for serving in self._servings for m in serving.states())
        gone = state == "gone"
        found = {model.state for model in models}
        return Beat(
            worker=bus.identity,
            state=(
                "gone"
                if gone
                else "draining"
                if self._draining
                else "ready"
                if "ready" in found
                else "loading"
                if "loading" in found
                else "standby"
            ),
            sequence=self._sequence,
            models=() if gone else models,
            host=socket.gethostname(),
            version=__version__,
            started=self._started,
            memory_total=memory.total,
            memory_used=memory.used,
            able=() if gone else self._able,
            memory_budget=self._memory,
        )

    async def _expire(self, bodies: Bodies) -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            for body, why in bodies.expired(time.monotonic()):
                serving = self._by_name(body.model)
                if why == "deadline":
                    serving.drop_body(
                        body, "deadline_exceeded", "the deadline passed before the whole body came"
                    )
                else:
                    serving.drop_body(
                        body, "worker_failed", f"chunk {body.next_index} of the request never came"
                    )

    def _on_state(self, connected: bool) -> None:
        if connected:
            self._changed.set()
            for serving in self._servings:
                serving.reconnected()

    def _on_cancel(self, message: BusMessage) -> None:
        try:
            attempts = decode_cancel(message.data).attempts
        except msgspec.DecodeError as error:
            _log.warning("cancel.malformed", error=str(error))
            return
        self._cancel(attempts)

    def _cancel(self, attempts: tuple[int, ...]) -> None:
        for serving in self._servings:
            serving.cancel(attempts)

    def _on_chunk(self, message: BusMessage, bodies: Bodies) -> None:
        try:
            chunk = decode_chunk(message.data)
        except msgspec.DecodeError as error:
            _log.warning("chunk.malformed", error=str(error))
            return
        try:
            whole = bodies.add(chunk, time.monotonic())
        except BodyError as error:
            body = bodies.close(chunk.attempt)
            if body is not None:
                self._by_name(body.model).drop_body(body, "worker_failed", str(error))
            return
        if whole is not None:
            self._by_name(whole.model).complete(whole)

    def _by_name(self, name: str) -> Serving:
        return next(serving for serving in self._servings if serving.name == name)


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


def _free_memory() -> int:
    """What the host has left, main memory and GPUs."""
    return hardware.memory().available + sum(gpu.free for gpu in hardware.gpus())
