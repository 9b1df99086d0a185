"""The engine process alone: no NATS, no HTTP, no agent, only the link the agent would use.

What it measures is the ceiling of everything built around the engine.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Literal, cast

import msgspec

from shared.protocol import (
    Busy,
    EmbedResult,
    End,
    Fail,
    Frame,
    Request,
    decode_frames,
    encode,
)
from worker.engine_process import ENGINE_COMMAND, tied
from worker.link import (
    LENGTH,
    BatchInvariance,
    CancelAttempts,
    EngineConfig,
    EngineStats,
    Failed,
    FromEngine,
    Join,
    Ready,
    RingOver,
    RingPlace,
    Step,
    Stop,
    Submit,
    decode_from_engine,
    pack,
)

__all__ = ("EngineDied", "EngineDriver", "default_gpu_layers", "new_attempt")

_REPLY = "_INBOX_driver.r.0"
_STOP_SECONDS = 10.0

ToDriver = Frame | None
"""A frame, or None when the engine process has ended."""


class EngineDied(Exception):
    """The engine could not load the model, or its process ended."""


class EngineDriver:
    """One engine process, driven the way the agent drives it, that dies with this one.

    `start` returns when the model has generated a real token. `submit` yields a request's frames up
    to and including its last one; `ask` hands them to a function, which costs the driver a third of
    that. `stop` ends the process.
    """

    def __init__(
        self,
        path: str,
        *,
        model: str = "bench",
        slots: int = 16,
        context: int = 0,
        threads: int = 1,
        prefill_threads: int = 0,
        step_tokens: int = 512,
        kv_tokens: int = 0,
        gpu_layers: int | None = None,
        embeddings: bool = False,
        draft: str = "",
        speculation: Literal["auto", "ngram", "off"] = "auto",
        batch_invariant: BatchInvariance = "auto",
        ngram_memory: int = 1 << 20,
        prefix_memory: int = 0,
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self._command = tuple(command)
        self.config = EngineConfig(
            path=path,
            model=model,
            worker="driver",
            slots=slots,
            context=context,
            threads=threads,
            prefill_threads=prefill_threads,
            step_tokens=step_tokens,
            kv_tokens=kv_tokens,
            gpu_layers=default_gpu_layers() if gpu_layers is None else gpu_layers,
            embeddings=embeddings,
            draft=draft,
            speculation=speculation,
            batch_invariant=batch_invariant,
            ngram_memory=ngram_memory,
            prefix_memory=prefix_memory,
        )
        self.stats: EngineStats | None = None
        """As told last."""
        self.ready: Ready | None = None
        self.after_reading: Callable[[], None] | None = None
        """Called when the frames of all the steps that had come have been handed out."""
        self.pid = 0
        self._process: asyncio.subprocess.Process | None = None
        self._link = _Link(self._take, self._after_reading, self._ended)
        self._receivers: dict[int, Callable[[ToDriver], None]] = {}
        self._load: asyncio.Future[Ready] | None = None
        self._group = ""
        self._reason = "the engine process ended"

    async def start(self, timeout: float = 120.0) -> Ready:
        """Start the process and wait until it serves.

        Raises:
            EngineDied: it cannot serve this model; the message says why.
            TimeoutError: it was not ready in time.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *tied((*self._command, "--fd", str(theirs.fileno()))),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
            )
        self.pid = self._process.pid
        ours.setblocking(False)
        loop = asyncio.get_running_loop()
        self._load = loop.create_future()
        await loop.create_connection(lambda: self._link, sock=ours)
        self._group = "" if self.config.ring is None else self.config.ring.group
        self._send(self.config)
        try:
            async with asyncio.timeout(timeout):
                self.ready = await self._load
        except BaseException:
            await self.stop()
            raise
        return self.ready

    async def join(self, place: RingPlace, timeout: float = 30.0) -> Ready:
        """Have an engine whose ring is over take part in another one.

        Raises:
            EngineDied: its process has ended, or that ring is over, too.
            TimeoutError: it was not ready in time.
        """
        self._load = asyncio.get_running_loop().create_future()
        self._group = place.group
        self._send(Join(place))
        async with asyncio.timeout(timeout):
            self.ready = await self._load
        return self.ready

    async def submit(self, request: Request) -> AsyncGenerator[Frame, None]:
        """Yield the frames of a request; leaving early cancels it on the engine.

        Raises:
            EngineDied: the process ended meanwhile, or its ring is over.
        """
        queue: asyncio.Queue[ToDriver] = asyncio.Queue()
        try:
            self.ask(request, queue.put_nowait)
            while request.attempt in self._receivers or not queue.empty():
                frame = await queue.get()
                if frame is None:
                    raise EngineDied(self._reason)
                yield frame
        finally:
            self.cancel(request.attempt)

    def ask(self, request: Request, receive: Callable[[ToDriver], None]) -> None:
        """Send a request; `receive` gets its frames, then None if the process ends before the last.

        Raises:
            EngineDied: the process has ended.
        """
        self._send(Submit(_REPLY, encode(request), time.time()))
        self._receivers[request.attempt] = receive

    def cancel(self, attempt: int) -> None:
        """Give up a request; one that is over stays so."""
        if self._receivers.pop(attempt, None) is not None:
            with contextlib.suppress(EngineDied):
                self._send(CancelAttempts((attempt,)))

    def rest(self, seconds: float) -> None:
        """Read nothing for so long: what the engine sends waits in the socket.

        Where compute threads use all cores, each message read takes time from them.
        """
        self._link.rest(seconds)

    async def stop(self) -> None:
        """End the process, by force if it does not go by itself."""
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(EngineDied):
                self._send(Stop())
            try:
                async with asyncio.timeout(_STOP_SECONDS):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
        async with asyncio.timeout(_STOP_SECONDS):
            await self._link.closed()
        self._process = None

    def _send(self, message: object) -> None:
        if not self._link.open:
            raise EngineDied(self._reason)
        self._link.write(pack(message))

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Step):
            self.stats = message.stats or self.stats
            for mail in message.mail:
                for frame in decode_frames(mail.frames):
                    self._hand_out(frame)
        elif isinstance(message, Failed):
            self._reason = message.message
        elif isinstance(message, Ready | RingOver) and message.group != self._group:
            pass  # of a ring that it has left
        elif isinstance(message, Ready):
            assert self._load is not None
            if not self._load.done():
                self._load.set_result(message)
        elif isinstance(message, RingOver):
            self._ended(message.reason)

    def _hand_out(self, frame: Frame) -> None:
        receive = self._receivers.get(frame.attempt)
        if receive is None:
            return
        if isinstance(frame, End | EmbedResult | Fail | Busy):
            del self._receivers[frame.attempt]
        receive(frame)

    def _after_reading(self) -> None:
        if self.after_reading is not None:
            self.after_reading()

    def _ended(self, reason: str) -> None:
        self._reason = reason or self._reason
        if self._load is not None and not self._load.done():
            self._load.set_exception(EngineDied(self._reason))
        receivers, self._receivers = self._receivers, {}
        for receive in receivers.values():
            receive(None)


class _Link(asyncio.Protocol):
    """The link's socket: messages are taken apart as bytes arrive, many at a time after a rest."""

    def __init__(
        self,
        take: Callable[[FromEngine], None],
        after_reading: Callable[[], None],
        ended: Callable[[str], None],
    ) -> None:
        self._take = take
        self._after_reading = after_reading
        self._ended = ended
        self._transport: asyncio.Transport | None = None
        self._closed = asyncio.Event()
        self._data = bytearray()

    @property
    def open(self) -> bool:
        """Whether anything can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._data += data
        start, view = 0, bytes(self._data)
        while len(view) - start >= LENGTH.size:
            begin = start + LENGTH.size
            end = begin + LENGTH.unpack_from(view, start)[0]
            if end > len(view):
                break
            try:
                self._take(decode_from_engine(view[begin:end]))
            except msgspec.DecodeError as error:
                self._ended(f"the engine sent what is no message: {error}")
                self.close()
                return
            start = end
        if start:
            del self._data[:start]
            self._after_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._closed.set()
        self._ended("")

    def write(self, data: bytes) -> None:
        """Send bytes."""
        assert self._transport is not None
        self._transport.write(data)

    def rest(self, seconds: float) -> None:
        """Read nothing for so long."""
        transport = self._transport
        if transport is not None and transport.is_reading():
            transport.pause_reading()
            asyncio.get_running_loop().call_later(seconds, self._go_on, transport)

    def _go_on(self, transport: asyncio.Transport) -> None:
        if not transport.is_closing():
            transport.resume_reading()

    def close(self) -> None:
        """Close the socket, if it is open."""
        if self._transport is not None:
            self._transport.close()

    async def closed(self) -> None:
        """Close the socket, and wait until it is."""
        if self._transport is not None:
            self._transport.close()
            await self._closed.wait()


def default_gpu_layers() -> int:
    """What `MESH_GPU_LAYERS` says, as to `mesh-worker`, so that tests can be run on a GPU; else 0,
    for figures are of the CPU unless another thing is said."""
    return int(os.environ.get("MESH_GPU_LAYERS", "0"))


def new_attempt() -> int:
    """Return a random attempt number."""
    return int.from_bytes(os.urandom(8)) >> 1
