"""What an engine would emit if tokens cost nothing: streams, paced in steps as a batch is decoded.

Streams are dealt to steps of at most `width`, each with a phase of its own, like so many engines
with `width` slots. A step emits one token for each of its streams, and all that it has for one
router is one piece of mail. No sockets and no clock here: time is passed in.
"""

from collections.abc import Iterable

import msgspec

from shared.protocol import (
    Accepted,
    Busy,
    Delta,
    Done,
    Embed,
    EmbedResult,
    End,
    Fail,
    Frame,
    Generate,
    Timings,
    Usage,
    encode,
)

__all__ = ("Emitter", "Outgoing")

_TOKEN = 7
_VECTOR = bytes(4 * 16)
_DEFAULT_TOKENS = 128
_EARLY = 0.0005
"""A timer may fire this much before its time; the step is emitted all the same."""


class Outgoing(msgspec.Struct, frozen=True):
    """One message to be published."""

    reply: str
    data: bytes


class _Stream(msgspec.Struct):
    attempt: int
    reply: str
    tokens: int
    choices: int
    started: float
    index: int = 0
    cancelled: bool = False


class _Step(msgspec.Struct):
    due: float
    streams: list[_Stream]


class Emitter:
    """Takes requests, and says what to publish when."""

    def __init__(
        self,
        worker: str,
        *,
        interval: float,
        slots: int,
        width: int = 16,
        stamped: bool = True,
        queue: int = 0,
    ) -> None:
        self.worker = worker
        self.slots = slots
        self.queue_limit = queue
        self.tokens = 0
        self._interval = interval
        self._width = width
        self._stamped = stamped
        self._steps: list[_Step] = []
        self._running: dict[int, _Stream] = {}
        self._waiting: dict[int, _Stream] = {}
        self._first: list[_Stream] = []
        self._outbox: list[Outgoing] = []

    @property
    def free(self) -> int:
        return 0 if self._waiting else self.slots - len(self._running)

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def next_due(self) -> float | None:
        """When `collect` has something to say; None: not before the next request."""
        if self._outbox or self._first:
            return 0.0
        return min((step.due for step in self._steps), default=None)

    def take(self, request: Generate | Embed, reply: str, now: float) -> None:
        """Accept a request, or refuse it where all slots are taken."""
        attempt = request.attempt
        if request.body_size:
            self._post(reply, Fail(attempt, "payload_too_large", "a token worker takes no chunks"))
        elif isinstance(request, Embed):
            vectors = (_VECTOR,) * len(request.inputs)
            self._post(reply, Accepted(attempt, self.worker))
            self._post(reply, EmbedResult(attempt, vectors, Usage(8 * len(vectors), 0)))
        elif self.free <= 0 and len(self._waiting) >= self.queue_limit:
            self._post(reply, Busy(attempt, self.worker))
        else:
            tokens = request.max_tokens or _DEFAULT_TOKENS
            stream = _Stream(attempt, reply, tokens, request.n, now)
            place = 0
            if self.free > 0:
                self._begin(stream)
            else:
                self._waiting[attempt] = stream
                place = len(self._waiting)
            self._post(reply, Accepted(attempt, self.worker, place))

    def cancel(self, attempts: Iterable[int]) -> None:
        """Forget these attempts; no more is said of them."""
        for attempt in attempts:
            if self._waiting.pop(attempt, None) is not None:
                continue
            stream = self._running.pop(attempt, None)
            if stream is not None:
                stream.cancelled = True
        self._promote()

    def forget_all(self) -> None:
        """Forget every stream: whoever wanted them cannot be reached any more."""
        self._waiting = {}
        self.cancel(list(self._running))
        self._steps, self._first, self._outbox = [], [], []

    def collect(self, now: float) -> list[Outgoing]:
        """Return what is to be published now; each stream's first token comes at once."""
        outgoing, self._outbox = self._outbox, []
        for step in self._steps:
            if step.due <= now + _EARLY:
                step.streams = [stream for stream in step.streams if not stream.cancelled]
                outgoing += self._emit(step.streams, now)
                step.streams = [s for s in step.streams if s.attempt in self._running]
                step.due += self._interval
                if step.due < now:
                    step.due = now + self._interval
        self._steps = [step for step in self._steps if step.streams]
        while self._first:
            begun = [stream for stream in self._first if not stream.cancelled]
            self._first = []
            # What ends here lets those in that wait.
            outgoing += self._emit(begun, now)
            for stream in begun:
                if stream.attempt in self._running:
                    self._join(stream, now)
        return outgoing

    def _begin(self, stream: _Stream) -> None:
        self._running[stream.attempt] = stream
        self._first.append(stream)

    def _promote(self) -> None:
        while self._waiting and len(self._running) < self.slots:
            self._begin(self._waiting.pop(next(iter(self._waiting))))

    def _post(self, reply: str, frame: Frame) -> None:
        self._outbox.append(Outgoing(reply, encode((frame,))))

    def _join(self, stream: _Stream, now: float) -> None:
        for step in self._steps:
            if len(step.streams) < self._width:
                step.streams.append(stream)
                return
        self._steps.append(_Step(now + self._interval, [stream]))

    def _emit(self, streams: list[_Stream], now: float) -> list[Outgoing]:
        text = f"@{now:.6f} " if self._stamped else " token"
        mail: dict[str, tuple[str, list[Frame]]] = {}
        for stream in streams:
            router = stream.reply.rpartition(".")[0]
            _, frames = mail.setdefault(router, (stream.reply, []))
            # Without an interval the whole answer is there at once, as from a very fast engine.
            count = 1 if self._interval else stream.tokens
            for index in range(stream.index, stream.index + count):
                for choice in range(stream.choices):
                    frames.append(Delta(stream.attempt, choice, index, (_TOKEN,), text))
            stream.index += count
            self.tokens += count * stream.choices
            if stream.index >= stream.tokens:
                self._finish(stream, frames, now)
        return [Outgoing(reply, encode(frames)) for reply, frames in mail.values()]

    def _finish(self, stream: _Stream, frames: list[Frame], now: float) -> None:
        self._running.pop(stream.attempt, None)
        self._promote()
        frames += [
            Done(stream.attempt, choice, stream.tokens, "length")
            for choice in range(stream.choices)
        ]
        usage = Usage(prompt=8, completion=stream.tokens * stream.choices)
        timings = Timings(0.0, 0.0, (now - stream.started) * 1e3)
        frames.append(End(stream.attempt, usage, timings))
