"""The head's end of a ring: looks to the engine like a context of the whole model.

`decode` looks tokens up, sends their rows round the other stages in several passes, so that all
stages have something to do, and computes its own layers as they come back. Whatever is done to the
cache is done here at once and told to the others with the next pass: between two calls of `decode`
nothing is under way.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.pipeline import (
    Broken,
    Copy,
    Forget,
    Hello,
    Operation,
    Pass,
    StageMessage,
    Swap,
    decode_message,
    encode_message,
)
from worker.engine.activations import Span, from_bytes, passes, to_bytes
from worker.engine.batch import Batch
from worker.engine.stage import Rows, Stage

__all__ = ("RingBroken", "RingContext", "RingTransport")

LATENCY_EVERY = 5.0
"""Seconds after which the way round is measured anew, before a step; that step waits as long."""

HELLO_EVERY = 0.2
"""Seconds after which a hello that has not come back is sent again: a stage may not listen yet."""


class RingBroken(RuntimeError):
    """A stage is lost, hangs, or has failed: the group is at its end."""


class RingTransport(Protocol):
    """The way to the first stage, and from the last one back."""

    def send(self, data: bytes, *, heard: bool = False) -> None:
        """Send to the first stage; `heard`: if it is gone, the ring is at its end.

        Raises:
            RingBroken: there is no connection.
        """
        ...

    def receive(self, timeout: float) -> bytes | None:
        """What the last stage has sent; None: nothing came for so many seconds.

        Raises:
            RingBroken: the connection is lost, or a stage is.
        """
        ...


class _Sent(NamedTuple):
    """A pass that is under way, and what the head's layers are to be run with."""

    number: int
    slots: list[int]
    positions: list[int]
    outputs: list[int]


class RingContext:
    """Slots whose cache lies in several processes.

    It is of use from `enter` and `greet` on.

    Args:
        stage: the head's own layers.
        embed: looks tokens up.
    """

    def __init__(self, stage: Stage, embed: Callable[[NDArray[np.int32]], Rows]) -> None:
        self.slots = stage.context.slots
        self.context = stage.context.context
        self.tile = stage.context.tile
        self._stage = stage
        self._embed = embed

    def enter(
        self,
        transport: RingTransport,
        *,
        group: str,
        others: int,
        most_rows: int,
        half: bool,
        timeout: float,
    ) -> None:
        """Be part of a ring, and of none that was before: with empty caches.

        Args:
            transport: to the other stages and back.
            group: names this life of the ring.
            others: stages beside the head, at least 1.
            most_rows: rows in a pass at most.
            half: send 16 bits a number, not 32.
            timeout: seconds after which a stage that does not answer is lost.
        """
        for slot in range(self.slots):
            self._stage.context.forget(slot)
        self._transport = transport
        self._group = group
        tile = self.tile
        # A sequence with more rows than a pass has is cut: between tiles then.
        self.together = most_rows - most_rows % tile if tile <= most_rows and tile else most_rows
        self.lanes = others + 1
        self.latency = 0.0
        self._measured = 0.0
        self._begun: deque[list[_Sent]] = deque()
        self._most_rows = self.together
        self._half = half
        self._timeout = timeout
        self._number = 0
        self._hellos = 0
        self._operations: list[Operation] = []
        self._logits: list[Rows] = []

    def greet(self, within: float) -> tuple[str, ...]:
        """Wait until all stages are there and agree on slots, context and width.

        Returns:
            The workers of the other stages, in their order.

        Raises:
            RingBroken: they are not there in time, or do not agree.
        """
        deadline = time.monotonic() + within
        hello = Hello(self._group, self.slots, self.context, self._stage.width)
        while time.monotonic() < deadline:
            self._transport.send(encode_message(hello))
            until = min(deadline, time.monotonic() + HELLO_EVERY)
            while (left := until - time.monotonic()) > 0:
                message, _ = self._next(left)
                if isinstance(message, Hello) and len(message.stages) == self.lanes - 1:
                    self._measure()
                    return message.stages
        raise RingBroken(f"not all {self.lanes} stages were there after {within:g} s")

    def _measure(self) -> None:
        """Send a hello round, and see how long it takes; nothing else is under way."""
        self._hellos += 1
        hello = Hello(self._group, self.slots, self.context, self._stage.width, number=self._hellos)
        began = time.monotonic()
        self._transport.send(encode_message(hello), heard=True)
        while (left := began + self._timeout - time.monotonic()) > 0:
            message, _ = self._next(left)
            # Those of the greeting may still come, which were sent again and again.
            if isinstance(message, Hello) and message.number == self._hellos:
                self._measured = time.monotonic()
                self.latency = self._measured - began
                return
        raise RingBroken(f"no stage has answered for {self._timeout:g} s")

    def interrupt(self) -> None:
        """See `Context.interrupt`: what is under way on other hosts is not broken off."""

    def clear_interrupt(self) -> None:
        """See `Context.clear_interrupt`: there is none."""

    def decode(self, batch: Batch, rows: int) -> int:
        """Run the first `rows` rows; always 0.

        Raises:
            RingBroken: a stage is lost.
        """
        self._set_off(batch, rows, wanted=self.lanes)
        self.finish()
        return 0

    def begin(self, batch: Batch, rows: int) -> None:
        """See `Decoder.begin`; raises RingBroken."""
        self._set_off(batch, rows, wanted=1)

    def finish(self) -> None:
        """See `Decoder.finish`; raises RingBroken."""
        self._logits.clear()
        for sent in self._begun.popleft():
            self._receive(sent)

    def _set_off(self, batch: Batch, rows: int, *, wanted: int) -> None:
        if not self._begun and time.monotonic() - self._measured > LATENCY_EVERY:
            self._measure()
        slots = batch.slot[:rows].tolist()
        spans = passes(slots, most=self._most_rows, wanted=wanted)
        self._begun.append([self._send(batch, span) for span in spans])

    def logits(self, outputs: int) -> Rows:
        """Logits of the rows that asked for output, (outputs, vocabulary)."""
        every = self._logits
        joined = every[0] if len(every) == 1 else np.concatenate(every)
        return joined[:outputs]

    def set_threads(self, decode: int, prefill: int) -> None:
        """Threads of the head's own layers."""
        self._stage.context.set_threads(decode, prefill)

    def forget(self, slot: int, start: int = 0) -> bool:
        """See `Context.forget`."""
        return self._do(Forget(slot, start), self._stage.context.forget(slot, start))

    def copy(self, source: int, target: int) -> bool:
        """See `Context.copy`."""
        return self._do(Copy(source, target), self._stage.context.copy(source, target))

    def swap(self, left: int, right: int) -> bool:
        """See `Context.swap`."""
        return self._do(Swap(left, right), self._stage.context.swap(left, right))

    def save(self, slot: int) -> None:
        """A sequence's cache lies on several hosts: it is not kept beside them."""
        return

    def restore(self, slot: int, state: NDArray[np.uint8]) -> bool:
        """See `save`."""
        return False

    def close(self) -> None:
        """Free the head's layers; the other stages are their processes'."""
        self._stage.close()

    def _do(self, operation: Operation, done: bool) -> bool:
        if done:
            self._operations.append(operation)
        return done

    def _send(self, batch: Batch, span: Span) -> "_Sent":
        part = slice(span.start, span.stop)
        number, self._number = self._number, self._number + 1
        head = Pass(
            group=self._group,
            number=number,
            first=int(batch.slot[span.start]),
            starts=tuple(batch.position[part][:: span.each].tolist()),
            each=span.each,
            half=self._half,
            operations=tuple(self._operations),
        )
        self._operations.clear()
        rows = self._embed(batch.token[part])
        self._transport.send(encode_message(head, to_bytes(rows, half=self._half)), heard=True)
        return _Sent(
            number,
            batch.slot[part].tolist(),
            batch.position[part].tolist(),
            np.flatnonzero(batch.output[part]).tolist(),
        )

    def _receive(self, sent: "_Sent") -> None:
        deadline = time.monotonic() + self._timeout
        while True:
            left = deadline - time.monotonic()
            message, data = self._next(left) if left > 0 else (None, memoryview(b""))
            if message is None and left <= 0:
                raise RingBroken(f"no stage has answered for {self._timeout:g} s")
            if isinstance(message, Pass):
                break
        if message.number != sent.number:
            raise RingBroken(f"pass {message.number} came back where {sent.number} was expected")
        rows = from_bytes(data, message.rows, self._stage.width, half=message.half)
        logits = self._stage.run(rows, sent.slots, sent.positions, sent.outputs)
        if sent.outputs:
            self._logits.append(logits)

    def _next(self, timeout: float) -> tuple[StageMessage | None, memoryview]:
        """The next message of this group; None: none came in time."""
        data = self._transport.receive(timeout)
        if data is None:
            return None, memoryview(b"")
        try:
            message, rows = decode_message(data)
        except msgspec.DecodeError as error:
            raise RingBroken(f"what came from the last stage cannot be read: {error}") from error
        if message.group != self._group:
            return None, memoryview(b"")  # of an earlier life
        if isinstance(message, Broken):
            raise RingBroken(f"the stage on {message.worker}: {message.reason}")
        return message, rows
