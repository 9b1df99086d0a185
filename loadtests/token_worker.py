"""A worker without an engine: it joins over NATS as any worker does, and only emits tokens.

It beats, answers pings, takes from the model's queue group while a slot is free and at its own
door, answers `Busy` when full, and obeys cancellations. Several may run beside each other.
"""

import asyncio
import contextlib
import os
import signal
import socket
import time
from typing import Annotated

import cyclopts
import uvloop

from loadtests.token_emitter import Emitter
from shared import subjects
from shared.bus import Bus, BusMessage, BusUnavailable, Subscription
from shared.presence import Beat, ModelState, encode_beat
from shared.protocol import decode_cancel, decode_request

__all__ = ("TokenWorker",)

_BEAT_SECONDS = 0.5
_CONTEXT = 1 << 20


class TokenWorker:
    """One token worker on one bus."""

    def __init__(self, bus: Bus, model: str, emitter: Emitter) -> None:
        self._bus = bus
        self._model = model
        self._emitter = emitter
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._queue_door: Subscription | None = None
        self._pings: list[BusMessage] = []
        self._sequence = 0
        self._started = time.time()

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then say goodbye."""
        worker = self._bus.identity
        await self._bus.subscribe(subjects.infer_direct(self._model, worker), self._on_request)
        await self._bus.subscribe(subjects.cancel(worker), self._on_cancel)
        await self._bus.subscribe(subjects.ping(worker), self._on_ping)
        self._room.set()
        async with asyncio.TaskGroup() as tasks:
            own = [tasks.create_task(job()) for job in (self._pace, self._keep_door, self._beat)]
            await stop.wait()
            for task in own:
                task.cancel()
        with contextlib.suppress(BusUnavailable):
            await self._say("gone")

    def _on_request(self, message: BusMessage) -> None:
        self._emitter.take(decode_request(message.data), message.reply, time.monotonic())
        self._wake.set()
        if self._emitter.free <= 0:
            self._room.set()

    def _on_cancel(self, message: BusMessage) -> None:
        self._emitter.cancel(decode_cancel(message.data).attempts)
        self._room.set()

    def _on_ping(self, message: BusMessage) -> None:
        self._pings.append(message)
        self._wake.set()

    async def _pace(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = self._emitter.next_due
            timer = None
            if due is not None:
                timer = loop.call_later(max(0.0, due - time.monotonic()), self._wake.set)
            await self._wake.wait()
            self._wake.clear()
            if timer is not None:
                timer.cancel()
            try:
                await self._publish_due()
            except BusUnavailable:
                self._emitter.forget_all()
            if self._queue_door is None:
                self._room.set()

    async def _publish_due(self) -> None:
        pings, self._pings = self._pings, []
        for ping in pings:
            await self._bus.publish(ping.reply, ping.data)
        for outgoing in self._emitter.collect(time.monotonic()):
            await self._bus.publish(outgoing.reply, outgoing.data)

    async def _keep_door(self) -> None:
        while True:
            await self._room.wait()
            self._room.clear()
            if self._emitter.free > 0 and self._queue_door is None:
                self._queue_door = await self._bus.subscribe(
                    subjects.infer(self._model), self._on_request, queue=subjects.FREE
                )
            elif self._emitter.free <= 0 and self._queue_door is not None:
                door, self._queue_door = self._queue_door, None
                await door.leave()
            else:
                continue
            with contextlib.suppress(BusUnavailable):
                await self._say("ready")

    async def _beat(self) -> None:
        while True:
            with contextlib.suppress(BusUnavailable):
                await self._say("ready")
            await asyncio.sleep(_BEAT_SECONDS)

    async def _say(self, state: str) -> None:
        self._sequence += 1
        model = ModelState(
            name=self._model,
            state="ready" if state == "ready" else "draining",
            slots=self._emitter.slots,
            free=self._emitter.free,
            queued=self._emitter.queued,
            queue_limit=self._emitter.queue_limit,
            context=_CONTEXT,
            created=int(self._started),
        )
        beat = Beat(
            worker=self._bus.identity,
            state="ready" if state == "ready" else "gone",
            sequence=self._sequence,
            models=(model,),
            host=socket.gethostname(),
            version="token-worker",
            started=self._started,
        )
        await self._bus.publish(subjects.beat(self._bus.identity), encode_beat(beat))


async def serve(nats: str, model: str, identity: str, emitter: Emitter) -> None:
    """Connect, serve, and end on SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with Bus.connect(nats, identity=identity, kind="worker") as bus:
        await TokenWorker(bus, model, emitter).run(stop)


app = cyclopts.App(help=__doc__)


@app.default
def main(
    *,
    nats: Annotated[str, cyclopts.Parameter(env_var="MESH_NATS")],
    model: str = "tokens",
    interval_ms: float = 20.0,
    slots: int = 10000,
    queue: int = 0,
    step_streams: int = 16,
    stamp: bool = True,
    identity: str = "",
) -> None:
    """Serve MODEL with tokens out of nowhere.

    Args:
        nats: URL of the NATS server, with user and password where it wants them
        model: the name to serve
        interval_ms: milliseconds between two tokens of a stream; 0: the whole answer at once
        slots: streams taken together
        queue: requests that wait for a slot, beyond which it says that it is busy
        step_streams: most streams that one engine-like step advances
        stamp: tokens are their CLOCK_MONOTONIC time, so that a client can tell their age
        identity: name of the worker; default one of its own
    """
    name = identity or f"tokens-{os.getpid()}"
    emitter = Emitter(
        name,
        interval=interval_ms / 1e3,
        slots=slots,
        width=step_streams,
        stamped=stamp,
        queue=queue,
    )
    try:
        uvloop.run(serve(nats, model, name, emitter))
    except BusUnavailable as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    app()
