"""Setting up one stage of a ring: the head, which serves, and the others, which compute for it."""

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from worker.engine.intake import read_message
from worker.engine.llama import Model
from worker.engine.ring import RingContext
from worker.engine.ring_link import RingLink
from worker.engine.stage import Stage, input_scale
from worker.engine.stage_loop import StageLoop
from worker.engine.token_rows import TokenRows
from worker.link import EngineConfig, Ready, RingPlace, pack

__all__ = ("join_ring", "serve_stage")

GREETING_SECONDS = 120.0
"""How long stages may differ in being ready: others may have far more to load."""
_HEAD_BYTES = 64 * 1024
"""Room in a message for what is not rows: with 512 sequences it takes some 3 KB."""
_IDLE_SECONDS = 1.0

log = structlog.get_logger()


def _stage(model: Model, config: EngineConfig, place: RingPlace, threads: int) -> Stage:
    architecture = model.metadata("general.architecture") or ""
    return Stage(
        model,
        head=place.head,
        scale=input_scale(architecture, model.embedding_size),
        slots=config.slots,
        context=config.context,
        step_tokens=config.step_tokens,
        threads=threads,
    )


def _link(config: EngineConfig, place: RingPlace) -> RingLink:
    worker = place.workers[place.index]
    return RingLink(place.nats, identity=place.identity, worker=worker, group=place.group)


def join_ring(model: Model, config: EngineConfig, place: RingPlace, threads: int) -> RingContext:
    """Make the head's context, once all other stages have answered. Blocks.

    Args:
        model: the head's stage file.
        config: what the engine was told; its context must be named.
        place: the head's.
        threads: of the head's own layers.

    Raises:
        LoadError: there is no memory for the head's layers.
        RingBroken: NATS or a stage cannot be reached, or stages do not agree.
    """
    stage = _stage(model, config, place, threads)
    link = _link(config, place)
    link.__enter__()  # the process keeps it until its end
    width = 2 if place.half else 4
    room = (link.most_bytes - _HEAD_BYTES) // (width * stage.width)
    context = RingContext(
        stage,
        TokenRows(Path(config.path)),
        link.to(place.workers[0]),
        group=place.group,
        others=place.index,
        most_rows=max(1, min(config.step_tokens, room)),
        half=place.half,
        timeout=place.timeout,
    )
    stages = context.greet(GREETING_SECONDS)
    log.info("ring.complete", group=place.group, stages=[*stages, place.workers[-1]])
    return context


def serve_stage(
    link: socket.socket,
    config: EngineConfig,
    place: RingPlace,
    on_progress: Callable[[float], None],
) -> None:
    """Serve as a stage without the head until the agent says stop, or the ring is broken.

    Raises:
        LoadError: the file cannot be loaded, or there is no memory.
        RingBroken: NATS cannot be reached, or the ring is at its end.
    """
    began = time.monotonic()
    threads = config.threads or len(os.sched_getaffinity(0))
    model = Model(config.path, on_progress=on_progress, gpu_layers=config.gpu_layers)
    stage = _stage(model, config, place, threads)
    with _link(config, place) as ring:
        loop = StageLoop(
            stage,
            group=place.group,
            worker=place.workers[place.index],
            transport=ring.to(place.workers[place.index + 1]),
            head=ring.to(place.workers[-1]),
        )
        link.sendall(
            pack(
                Ready(
                    context=stage.context.context,
                    slots=config.slots,
                    threads=threads,
                    description=model.description(),
                    load_seconds=round(time.monotonic() - began, 3),
                    embeddings=False,
                )
            )
        )
        stopped = _watch(link)
        while not stopped.is_set():
            loop.step(_IDLE_SECONDS)


def _watch(link: socket.socket) -> threading.Event:
    """Set when the agent says stop, which is all it says to a stage, or is gone."""
    stopped = threading.Event()

    def wait() -> None:
        # Whatever the agent says: only `Stop` comes here.
        read_message(link)
        stopped.set()

    threading.Thread(target=wait, name="agent", daemon=True).start()
    return stopped
