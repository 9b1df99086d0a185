"""The head of a ring: its layers stay loaded, and are part of one ring after another."""

import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import structlog

from worker.engine.intake import Inbox, Intake
from worker.engine.llama import Model
from worker.engine.loop import Loop
from worker.engine.ring import RingBroken, RingContext
from worker.engine.ring_link import RingLink
from worker.engine.ring_setup import connect, make_stage
from worker.engine.token_rows import TokenRows
from worker.link import EngineConfig, RingOver, RingPlace, pack

__all__ = ("RingHead",)

GREETING_SECONDS = 120.0
"""How long stages may differ in being ready: others may have far more to load."""
_HEAD_BYTES = 64 * 1024
"""Room in a message for what is not rows: with 512 sequences it takes some 3 KB."""

log = structlog.get_logger()


class RingHead:
    """Makes the layers' context, which `join` connects with the other stages.

    Args:
        model: the head's stage file.
        config: what the engine was told; its context must be named.
        threads: of the head's own layers.

    Raises:
        LoadError: there is no memory for the head's layers.
    """

    def __init__(self, model: Model, config: EngineConfig, threads: int) -> None:
        self._config = config
        self._stage = make_stage(model, config, head=True, threads=threads)
        self.context = RingContext(self._stage, TokenRows(Path(config.path)))
        self._ring = ExitStack()
        self._way: RingLink | None = None

    def join(self, place: RingPlace) -> None:
        """Leave the ring that it is in, and be part of this one. Blocks until all stages answer.

        Raises:
            RingBroken: NATS or a stage cannot be reached, or stages do not agree.
        """
        self._enter(place, lambda: False)

    def serve(self, agent: socket.socket, intake: Intake, begin: Callable[[Inbox], Loop]) -> None:
        """Serve in the ring that was joined, and in those that follow, until the engine ends.

        Args:
            agent: is told when a ring is over.
            intake: says where to go on.
            begin: makes a loop for a ring that has been joined, and tells the agent.

        Raises:
            RuntimeError: llama.cpp failed; what else breaks a ring ends that ring alone.
        """
        intake.on_leave = self._break_off
        inbox: Inbox | None = intake.inbox
        joined = True
        while inbox is not None and inbox.place is not None:
            loop: Loop | None = None
            try:
                if not joined:
                    self._enter(inbox.place, lambda: intake.leaving)
                joined = False
                loop = begin(inbox)
                loop.run()
            except RingBroken as error:
                if not intake.leaving:
                    log.warning("ring.over", group=inbox.place.group, reason=str(error))
                    agent.sendall(pack(RingOver(inbox.place.group, str(error))))
            finally:
                if loop is not None:
                    loop.close()
            inbox = intake.following()

    def _enter(self, place: RingPlace, leaving: Callable[[], bool]) -> None:
        self._ring.close()
        self._way = way = self._ring.enter_context(connect(self._config, place))
        # Whoever has been told to leave before there was a way has broken off none.
        if leaving():
            raise RingBroken("another ring is to be joined")
        width = 2 if place.half else 4
        room = (way.most_bytes - _HEAD_BYTES) // (width * self._stage.width)
        self.context.enter(
            way.to(place.workers[0]),
            group=place.group,
            others=place.index,
            most_rows=max(1, min(self._config.step_tokens, room)),
            half=place.half,
            timeout=place.timeout,
        )
        stages = self.context.greet(GREETING_SECONDS)
        log.info("ring.complete", group=place.group, stages=[*stages, place.workers[-1]])

    def _break_off(self) -> None:
        if self._way is not None:
            self._way.break_off("the agent has it leave the ring")
