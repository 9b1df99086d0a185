"""What a stage without the head does: takes passes, computes its layers, sends them on."""

from contextlib import suppress

import structlog
from msgspec import DecodeError
from msgspec.structs import replace

from shared.pipeline import Broken, Hello, Pass, decode_message, encode_message
from worker.engine.activations import from_bytes, to_bytes
from worker.engine.ring import RingBroken, RingTransport
from worker.engine.stage import Stage
from worker.engine.stage_caches import apply

__all__ = ("StageLoop",)

log = structlog.get_logger()


class StageLoop:
    """One stage of one ring.

    Args:
        stage: its layers.
        group: the ring; messages of others are passed over.
        worker: who this is.
        transport: `receive` from the stage before, `send` to the one behind.
        head: `send` to the head, to tell it that this stage cannot go on.
    """

    def __init__(
        self,
        stage: Stage,
        *,
        group: str,
        worker: str,
        transport: RingTransport,
        head: RingTransport,
    ) -> None:
        self._stage = stage
        self._group = group
        self._worker = worker
        self._transport = transport
        self._head = head
        self._expected = 0

    def step(self, timeout: float) -> bool:
        """Wait for a message and do what it says; returns whether one came.

        Raises:
            RingBroken: the stage cannot go on; the head has been told.
        """
        try:
            data = self._transport.receive(timeout)
        except RingBroken as error:
            # Where only another stage is gone, the head can still be told.
            with suppress(RingBroken):
                self._tell(str(error))
            raise
        if data is None:
            return False
        try:
            message, rows = decode_message(data)
            if message.group != self._group:
                return True
            if isinstance(message, Hello):
                self._greet(message)
            elif isinstance(message, Pass):
                self._compute(message, rows)
            else:
                self._head.send(data)
        except (DecodeError, ValueError, RuntimeError) as error:
            if isinstance(error, RingBroken):
                raise
            reason = str(error)
            self._tell(reason)
            raise RingBroken(reason) from error
        return True

    def _tell(self, reason: str) -> None:
        self._head.send(encode_message(Broken(self._group, self._worker, reason)))

    def _greet(self, hello: Hello) -> None:
        context, stage = self._stage.context, self._stage
        mine = (context.slots, context.context, stage.width)
        asked = (hello.slots, hello.context, hello.width)
        if mine != asked:
            raise ValueError(f"slots, context and width are {mine} here, {asked} at the head")
        stages = (*hello.stages, self._worker)
        self._transport.send(encode_message(replace(hello, stages=stages)))

    def _compute(self, pass_: Pass, data: memoryview) -> None:
        if pass_.number != self._expected:
            raise ValueError(f"pass {pass_.number} came where {self._expected} was expected")
        self._expected += 1
        apply(pass_.operations, self._stage.context)
        count = len(pass_.starts)
        rows = from_bytes(data, pass_.rows, self._stage.width, half=pass_.half)
        slots = [pass_.first + n for n in range(count) for _ in range(pass_.each)]
        positions = [start + row for start in pass_.starts for row in range(pass_.each)]
        out = self._stage.run(rows, slots, positions)
        # What was done to the caches goes on with it: every stage does it.
        self._transport.send(encode_message(pass_, to_bytes(out, half=pass_.half)), heard=True)
