"""One HTTP answer: the frames of its calls in, bytes out, from the first to the last.

An ASGI application of its own, which Litestar merely starts. All is written from the callbacks
that frames arrive in; the request's task only waits for the client to leave. The HTTP status is
held back until a frame decides it, so that a request that fails before its first token gets a real
status.
"""

import time
from typing import Any

import structlog

from router.call import Call
from router.desk import Loss
from router.dialects.answer import PING, Answer, Completed
from router.dispatch import Dispatcher
from router.explain import as_comment, explanation
from router.metrics import Metrics
from router.problems import JSON, error_body, error_headers
from router.sse import Outlet, merge_frames, weight
from shared.errors import CannotContinue, MeshError
from shared.protocol import Delta, Done, EmbedResult, End, Frame, Request

__all__ = ("ABORT", "RAW_SEND", "REQUEST_ID", "STARTED", "WRITE_CHUNK", "Exchange")

RAW_SEND = "mesh.send"
"""Scope key of the server's own `send`, past Litestar's wrappers."""
REQUEST_ID = "mesh.request_id"
STARTED = "mesh.started"
"""Scope key of the time (monotonic) at which the request arrived."""
ABORT = "mesh.abort"
"""Scope key of a function that cuts the connection."""
WRITE_CHUNK = "mesh.write_chunk"
"""Scope key of a function that writes a piece of a stream, if the client keeps up."""

CLIENT_LEFT = 499

log = structlog.get_logger(__name__)

SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class SlowReader(MeshError):
    """The client reads so slowly that too much would have to be kept for it."""

    code = "client_too_slow"


class Exchange:
    """Places the requests of one HTTP request and answers it."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        metrics: Metrics,
        *,
        requests: list[Request],
        answer: Answer,
        stream: bool,
        route: str,
        cache_key: str = "",
        explain: bool = False,
    ) -> None:
        self._dispatcher = dispatcher
        self._requests = requests
        self._answer = answer
        self._stream = stream
        self._route = route
        self._cache_key = cache_key
        self._explain = explain
        self._progress = b""
        self._metrics = metrics.of(requests[0].model)
        self._calls: list[Call] = []
        self._ends: dict[int, Completed] = {}
        self._held: list[tuple[int, Frame]] = []
        self._held_size = 0
        self._failure: MeshError | None = None
        self._outlet: Outlet | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._status = 0
        self._finished = False
        self._arrived = time.monotonic()
        self._last_token = 0.0
        self._last_write = time.monotonic()
        self._abort: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer, as an ASGI application."""
        self._arrived = scope.get(STARTED, self._arrived)
        self._abort = scope.get(ABORT)
        self._headers = [(b"x-request-id", scope[REQUEST_ID].encode())]
        self._outlet = Outlet(
            scope.get(RAW_SEND, send),
            self._dispatcher.spawn,
            self._writable,
            scope.get(WRITE_CHUNK) if self._stream else None,
        )
        self._metrics.in_flight += 1
        self._dispatcher.watched.add(self)
        try:
            await self._place()
            # A server says "disconnect" when the client has left and when the response is complete.
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            self._metrics.in_flight -= 1
            self._dispatcher.watched.discard(self)
            self._close()

    async def _place(self) -> None:
        try:
            for part, request in enumerate(self._requests):
                call = self._dispatcher.call(request, self, part, self._cache_key)
                # Before it begins: one that cannot be placed has something to explain, too.
                self._calls.append(call)
                await call.begin()
                if self._failure is not None:
                    return
        except MeshError as error:
            self.fail(error)

    def worker_of(self, part: int) -> str:
        """Who has a part now; empty: nobody."""
        return self._calls[part].worker if part < len(self._calls) else ""

    @property
    def failed(self) -> bool:
        """Whether it has ended, or is about to end, with an error."""
        return self._failure is not None

    # What becomes of the calls

    def frame(self, part: int, frame: Frame) -> None:
        """Take a frame of one part."""
        now = time.monotonic()
        if type(frame) is Delta:
            if frame.choice == 0 and part == 0:
                self._observe(now)
        elif isinstance(frame, End | EmbedResult):
            self._ends[part] = frame
        outlet = self._outlet
        if outlet is None or self._failure is not None:
            return
        try:
            if outlet.parked:
                self._hold(part, frame)
            elif body := self._render(part, frame):
                self._write(outlet, body, now)
        except CannotContinue as error:
            self.fail(error)

    def fail(self, error: MeshError) -> None:
        """End with an error: a status if none was sent yet, else an event in the stream."""
        if self._failure is not None or self._finished:
            return
        self._failure = error
        for call in self._calls:
            call.leave()
        if error.status >= 500:
            log.warning("request.failed", code=error.code, message=error.message)
        if self._outlet is not None and not self._outlet.parked:
            self._write_failure(self._outlet, error)

    def resumed(self, reason: Loss) -> None:
        """Count it; the client sees no more than a pause."""
        self._metrics.resumes[reason] += 1

    def tick(self, now: float) -> None:
        """Show signs of life on a quiet stream; cut a client that has stopped reading."""
        idle = now - self._last_write
        settings = self._dispatcher.settings
        if self._outlet is None or self._finished:
            return
        if self._outlet.parked:
            if idle > settings.reader_timeout and self._abort is not None:
                self._abort()
        elif self._stream:
            progress = self._comment()
            if progress != self._progress and progress:
                self._progress = progress
                self._write(self._outlet, progress, now)
            elif idle > settings.ping_interval:
                self._write(self._outlet, PING, now)

    def _comment(self) -> bytes:
        """What there is to tell while a model is brought up; never content."""
        progress = next((call.progress for call in self._calls if call.progress), "")
        return b": mesh %b\n\n" % progress.encode() if progress else b""

    def _observe(self, now: float) -> None:
        if self._last_token:
            self._metrics.gaps.observe(now - self._last_token)
        else:
            self._metrics.first_token.observe(now - self._arrived)
        self._last_token = now

    # Writing

    def _render(self, part: int, frame: Frame) -> bytes:
        if type(frame) is Delta:
            return self._answer.delta(part, frame)
        if isinstance(frame, Done):
            return self._answer.done(part, frame)
        if len(self._ends) < len(self._requests) or self._finished:
            return b""
        self._finished = True
        return self._answer.finish([self._ends[part] for part in range(len(self._requests))])

    def _write(self, outlet: Outlet, body: bytes, now: float) -> None:
        if not self._status:
            self._status = 200
            headers = self._headers + self._explained(now)
            if self._stream:
                outlet.start(200, SSE_HEADERS + headers)
            else:
                length = (b"content-length", b"%d" % len(body))
                outlet.start(200, [JSON, length, *headers])
        elif self._explain and (told := self._explained(now)):
            body = as_comment(told) + body
        self._last_write = now
        outlet.write(body, more=not self._finished)

    def _explained(self, now: float) -> list[tuple[bytes, bytes]]:
        """The explanation, once, if one is wanted; a stream that is held tells it later."""
        if not self._explain or not self._calls or self._calls[0].progress:
            return []
        self._explain = False
        return explanation(
            self._calls[0],
            self._dispatcher.distances,
            arrived=self._arrived,
            now=now,
            end=self._ends.get(0),
        )

    def _write_failure(self, outlet: Outlet, error: MeshError) -> None:
        self._finished = True
        body = error_body(error)
        if self._status:
            outlet.write(b"data: %b\n\n" % body, more=False)
            return
        self._status = error.status
        length = (b"content-length", b"%d" % len(body))
        headers = self._headers + self._explained(time.monotonic())
        outlet.start(error.status, [*error_headers(error), length, *headers])
        outlet.write(body, more=False)

    def _hold(self, part: int, frame: Frame) -> None:
        self._held.append((part, frame))
        self._held_size += weight(frame)
        if self._held_size > self._dispatcher.settings.held_limit:
            self.fail(SlowReader("The answer was read too slowly."))

    def _writable(self) -> None:
        """The client reads again: send what has gathered, merged."""
        outlet = self._outlet
        if outlet is None or (self._finished and not self._held):
            return
        held, self._held = merge_frames(self._held), []
        self._held_size = 0
        try:
            body = b"".join(self._render(part, frame) for part, frame in held)
        except CannotContinue as error:
            self.fail(error)
            return
        self._last_write = now = time.monotonic()
        if body:
            self._write(outlet, body, now)
        if self._failure is not None and not self._finished:
            self._write_failure(outlet, self._failure)

    def _close(self) -> None:
        for call in self._calls:
            call.leave()
        # Calls and outlet lead back here: rings that only the collector would find.
        self._calls.clear()
        self._outlet = None
        self._held.clear()
        status = self._status if self._finished else CLIENT_LEFT
        metrics = self._metrics
        metrics.ended(self._route, status, time.monotonic() - self._arrived)
        for end in self._ends.values():
            metrics.prompt_tokens += end.usage.prompt
            metrics.cached_tokens += end.usage.cached
            metrics.completion_tokens += end.usage.completion
            metrics.drafted_tokens += end.usage.drafted
            metrics.accepted_tokens += end.usage.accepted
            if isinstance(end, End):
                metrics.queue_time.observe(end.timings.queue_ms / 1000)
