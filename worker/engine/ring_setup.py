"""Setting up a stage of a ring, and serving as one without the head."""

import os
import queue
import socket
import threading
import time
from collections.abc import Callable

import msgspec
import structlog

from worker.engine.gpu import offload
from worker.engine.intake import read_message
from worker.engine.llama import Model
from worker.engine.ring import RingBroken
from worker.engine.ring_link import RingLink
from worker.engine.stage import Stage, input_scale
from worker.engine.stage_loop import StageLoop
from worker.link import (
    EngineConfig,
    Join,
    Ready,
    RingOver,
    RingPlace,
    Stop,
    decode_to_engine,
    pack,
)

__all__ = ("connect", "make_stage", "serve_stage")

_IDLE_SECONDS = 1.0

log = structlog.get_logger()


def make_stage(model: Model, config: EngineConfig, *, head: bool, threads: int) -> Stage:
    """The layers of a stage's file, with caches of as many slots as the engine was told.

    Raises:
        LoadError: there is no memory for them.
    """
    architecture = model.metadata("general.architecture") or ""
    return Stage(
        model,
        head=head,
        scale=input_scale(architecture, model.embedding_size),
        slots=config.slots,
        context=config.context,
        step_tokens=config.step_tokens,
        threads=threads,
    )


def connect(config: EngineConfig, place: RingPlace) -> RingLink:
    """The stage's connection to NATS, not opened yet."""
    worker = place.workers[place.index]
    return RingLink(place.nats, identity=place.identity, worker=worker, group=place.group)


def serve_stage(
    link: socket.socket,
    config: EngineConfig,
    place: RingPlace,
    on_progress: Callable[[float], None],
) -> None:
    """Serve as a stage without the head until the agent says stop.

    When its ring is over the stage stays loaded, says so, and waits for another ring.

    Raises:
        LoadError: the file cannot be loaded, or there is no memory.
    """
    began = time.monotonic()
    threads = config.threads or len(os.sched_getaffinity(0))
    gpu = offload(config, config.path)
    model = Model(config.path, on_progress=on_progress, gpu_layers=gpu.layers)
    stage = make_stage(model, config, head=False, threads=threads)
    ready = Ready(
        context=stage.context.context,
        slots=config.slots,
        threads=threads,
        description=model.description(),
        load_seconds=round(time.monotonic() - began, 3),
        embeddings=False,
        advice=gpu.advice,
    )
    orders = _Orders(link)
    orders.start()
    where: RingPlace | None = place
    while where is not None:
        try:
            with connect(config, where) as ring:
                orders.wake = ring.wake
                link.sendall(pack(msgspec.structs.replace(ready, group=where.group)))
                _serve_ring(stage, where, ring, orders)
        except RingBroken as error:
            log.warning("ring.over", group=where.group, reason=str(error))
            link.sendall(pack(RingOver(where.group, str(error))))
        where = orders.next()
        for slot in range(config.slots):
            stage.context.forget(slot)


def _serve_ring(stage: Stage, place: RingPlace, ring: RingLink, orders: "_Orders") -> None:
    loop = StageLoop(
        stage,
        group=place.group,
        worker=place.workers[place.index],
        transport=ring.to(place.workers[place.index + 1]),
        head=ring.to(place.workers[-1]),
    )
    while not orders.waiting:
        loop.step(_IDLE_SECONDS)


class _Orders:
    """What the agent wants of a stage; read in a thread of its own."""

    def __init__(self, link: socket.socket) -> None:
        self.wake: Callable[[], None] = lambda: None
        """Called when there is an order."""
        self._link = link
        self._came: queue.SimpleQueue[RingPlace | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, name="agent", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    @property
    def waiting(self) -> bool:
        """Whether there is an order."""
        return not self._came.empty()

    def next(self) -> RingPlace | None:
        """Wait for an order: where to take part next; None: stop."""
        return self._came.get()

    def _read(self) -> None:
        while True:
            data = read_message(self._link)
            message = None if data is None else decode_to_engine(data)
            if message is None or isinstance(message, Stop):
                self._came.put(None)
                self.wake()
                return
            if isinstance(message, Join):
                self._came.put(message.place)
                self.wake()
