"""One engine process: started, listened to, and started again when it dies.

The child holds one end of a socketpair and speaks `worker.link`. Its death, however it comes, is
told at once; the next start waits with exponential back-off. What the child prints goes to the log,
and its last words become the reason that is told.
"""

import asyncio
import os
import random
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol, cast

import msgspec
import structlog

from worker.last_words import LAST_WORDS, last_words
from worker.link import (
    LENGTH,
    CancelAttempts,
    EngineConfig,
    Failed,
    FromEngine,
    Join,
    Loading,
    Ready,
    RingPlace,
    Step,
    Stop,
    Submit,
    decode_from_engine,
    pack,
)

__all__ = (
    "ENGINE_COMMAND",
    "Backoff",
    "EngineEvents",
    "EngineGaveUp",
    "EngineProcess",
    "tied",
)

ENGINE_COMMAND = (sys.executable, "-m", "worker.engine")

STOP_SECONDS = 5.0
"""How long a child may take to end after `Stop` before it is killed."""

MAX_MESSAGE = 256 * 1024 * 1024
"""A longer message means that the two ends have lost step."""

START_ATTEMPTS = 3
"""Deaths in a row after which an engine that was never ready is given up."""

DEATH_NOTICE_SECONDS = 0.25
"""How long a broken link waits for the exit status before its requests are failed without it."""

# Runs in the child before the engine. Not a preexec_fn: that may deadlock where there are threads.
_TIED = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the agent is gone")
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"cannot start {sys.argv[2]}: {error.strerror}")
"""

_log = structlog.get_logger()


class EngineEvents(Protocol):
    """What the owner of an engine is told, from the event loop; none of these may block."""

    def on_loading(self, progress: float) -> None:
        """The model is being loaded."""

    def on_ready(self, ready: Ready) -> None:
        """Requests may be submitted."""

    def on_step(self, step: Step) -> None:
        """The engine did a step."""

    def on_lost(self, reason: str) -> None:
        """The process is gone and with it all it held; it will be started again.

        Or its ring is over: the process is there (`loaded`), and may `join` another.
        """


class EngineGaveUp(Exception):
    """The model cannot be served; the message says why in one line."""


class Backoff:
    """Waits between starts: 0.5 s doubling to 30 s, from the beginning after 60 s of health."""

    FIRST = 0.5
    LONGEST = 30.0
    HEALTHY = 60.0

    def __init__(self, jitter: Callable[[], float] = random.random) -> None:
        self._jitter = jitter
        self._deaths = 0

    def next(self, healthy_for: float) -> float:
        """Seconds to wait after a death that followed `healthy_for` seconds of readiness."""
        if healthy_for >= self.HEALTHY:
            self._deaths = 0
        # The exponent is capped too: a float overflows after a thousand deaths.
        wait = min(self.LONGEST, self.FIRST * 2.0 ** min(self._deaths, 16))
        self._deaths += 1
        return wait * (0.75 + 0.25 * self._jitter())


class EngineProcess:
    """Supervises the engine of one model; `run` lasts until it is cancelled or gives up."""

    def __init__(
        self,
        config: EngineConfig,
        events: EngineEvents,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        backoff: Backoff | None = None,
    ) -> None:
        self.config = config
        self.restarts = 0
        self.pid: int | None = None
        self._events = events
        self._command = tuple(command)
        self._backoff = backoff or Backoff()
        self._link: _Link | None = None
        self._ready_at: float | None = None
        self._was_ready = False
        self._group = "" if config.ring is None else config.ring.group
        self._log = _log.bind(model=config.model)

    @property
    def ready(self) -> bool:
        """Whether a request may be submitted now."""
        return self._link is not None and self._ready_at is not None

    @property
    def loaded(self) -> bool:
        """Whether the process is there with all that it has loaded."""
        return self._link is not None and self._was_ready

    def submit(self, submit: Submit) -> None:
        """Hand over a request; only while `ready`."""
        self._send(submit)

    def cancel(self, attempts: tuple[int, ...]) -> None:
        """Free the slots of these attempts; nothing to do if the engine is gone."""
        if self.ready:
            self._send(CancelAttempts(attempts))

    def kill(self) -> None:
        """End the process at once: it may wait for what will never come."""
        self.leave()
        if self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def leave(self) -> None:
        """Hear no more of what it computes, until it is ready again: all has been answered."""
        self._ready_at = None

    def join(self, place: RingPlace) -> bool:
        """Have it take part in another ring; False: its process is not there."""
        if not self.loaded:
            return False
        self.leave()
        self._group = place.group
        self._send(Join(place))
        return True

    async def run(self) -> None:
        """Keep an engine running; that of a ring has one life, for with its end the ring's comes.

        Raises:
            EngineGaveUp: the engine said that it cannot serve the model, or died at each start, or
                was part of a ring.
        """
        deaths = 0
        while True:
            reason, refused = await self._live()
            healthy = 0.0 if self._ready_at is None else time.monotonic() - self._ready_at
            self._ready_at = None
            deaths += 1
            if not self._was_ready and (refused or deaths >= START_ATTEMPTS):
                raise EngineGaveUp(reason)
            if self.config.ring is not None:
                raise EngineGaveUp(reason)
            self.restarts += 1
            wait = self._backoff.next(healthy)
            self._log.error("engine.died", reason=reason, restart_in=round(wait, 2))
            await asyncio.sleep(wait)

    def _send(self, message: Submit | CancelAttempts | Join) -> None:
        if self._link is None:
            raise RuntimeError("the engine is not running")
        self._link.send(message)

    async def _live(self) -> tuple[str, bool]:
        """One life of the child: returns why it ended, and whether it refused the model itself."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                *tied(self._command),
                "--fd",
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                # A session of its own: Ctrl-C in a terminal is for the agent alone, which drains.
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            return f"cannot start {self._command[0]}: {error.strerror or error}", False
        finally:
            theirs.close()
        self.pid = process.pid
        words: deque[str] = deque(maxlen=LAST_WORDS)
        link = _Link(self._heard)
        listener = asyncio.create_task(self._listen(process, words), name="engine output")
        try:
            await loop.create_unix_connection(lambda: link, sock=ours)
            self._link = link
            link.send(self.config)
            await link.closed.wait()
            self._gone()
            # The socket closes with the process, so its exit status is there in a moment; a child
            # that lingers must not keep its requests waiting.
            await asyncio.wait({listener}, timeout=DEATH_NOTICE_SECONDS)
            with suppress(TimeoutError):
                async with asyncio.timeout(DEATH_NOTICE_SECONDS):
                    await process.wait()
            reason = link.refusal or link.fault or last_words(process.returncode, words)
            self._events.on_lost(reason)
            return reason, bool(link.refusal)
        finally:
            self._gone()
            await self._end(process, link, listener)
            self.pid = None

    def _gone(self) -> None:
        self._link = None

    async def _end(
        self, process: asyncio.subprocess.Process, link: "_Link", listener: asyncio.Task[None]
    ) -> None:
        """Leave no child behind, also when cancelled halfway."""
        try:
            if process.returncode is None:
                link.send(Stop())
                await _reap(process)
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
            link.close()
            if not listener.done():
                await asyncio.wait({listener}, timeout=1.0)
                listener.cancel()

    def _heard(self, message: FromEngine) -> None:
        if isinstance(message, Step):
            if self.ready:
                self._events.on_step(message)
        elif isinstance(message, Loading):
            self._events.on_loading(message.progress)
        elif isinstance(message, Failed):
            self._log.debug("engine.refused", reason=message.message)
        elif message.group != self._group:
            self._log.debug("engine.late", group=message.group)  # of a ring that it has left
        elif isinstance(message, Ready):
            self._ready_at = time.monotonic()
            self._was_ready = True
            self._events.on_ready(message)
        else:
            self.leave()
            self._events.on_lost(message.reason)

    async def _listen(self, process: asyncio.subprocess.Process, words: deque[str]) -> None:
        """Log what the child prints, line by line, however long a line is."""
        output = cast(asyncio.StreamReader, process.stdout)  # we asked for a pipe
        rest = b""
        while data := await output.read(65536):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._say(line, words)
            if len(rest) > 65536:
                self._say(rest, words)
                rest = b""
        if rest:
            self._say(rest, words)

    def _say(self, line: bytes, words: deque[str]) -> None:
        text = line.decode("utf-8", "replace").strip()
        if text:
            words.append(text)
            self._log.debug("engine.output", line=text)


class _Link(asyncio.Protocol):
    """Our end of the socket: cuts the stream into messages and hands each on as it comes."""

    def __init__(self, heard: Callable[[FromEngine], None]) -> None:
        self.closed = asyncio.Event()
        self.refusal = ""
        self.fault = ""
        self._heard = heard
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    def send(self, message: EngineConfig | Submit | CancelAttempts | Join | Stop) -> None:
        # A dead peer shows as connection_lost, which tells of everything that was sent in vain.
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(pack(message))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        at, end = 0, len(buffer)
        try:
            while end - at >= LENGTH.size:
                (size,) = LENGTH.unpack_from(buffer, at)
                if size > MAX_MESSAGE:
                    raise ValueError(f"message of {size} bytes")
                if end - at - LENGTH.size < size:
                    break
                start = at + LENGTH.size
                at = start + size
                self._hear(decode_from_engine(bytes(buffer[start:at])))
        except (msgspec.DecodeError, ValueError) as error:
            self.fault = f"the engine sent what cannot be read: {error}"
            self.close()
        del buffer[:at]

    def _hear(self, message: FromEngine) -> None:
        if isinstance(message, Failed):
            self.refusal = message.message
        try:
            self._heard(message)
        except Exception:
            # An error of ours with one message must not take down the stream of all requests.
            _log.exception("engine.message_failed")

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()


def tied(command: Sequence[str]) -> tuple[str, ...]:
    """The command line of a child that the kernel kills when this process dies."""
    if sys.platform != "linux":
        return tuple(command)
    return (sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *command)


async def _reap(process: asyncio.subprocess.Process) -> None:
    """Wait for the child to end, and make it end if it takes too long."""
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
