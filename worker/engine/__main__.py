"""`python -m worker.engine --fd N`: one engine process, driven over socket N (worker/link.py).

It ignores SIGINT, since Ctrl-C goes to the whole terminal group and the agent decides when to stop.
"""

import argparse
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from worker.engine.batch import Batch
from worker.engine.calibrate import asked_of, calibrated
from worker.engine.calibration import Asked
from worker.engine.calibration_cache import DISTURBED_SECONDS
from worker.engine.cpu import advise
from worker.engine.decoder import Decoder
from worker.engine.embedding import Embedder
from worker.engine.gpu import offload
from worker.engine.intake import Inbox, Intake, read_message
from worker.engine.invariant_context import make_context, variance
from worker.engine.llama import Context, LoadError, Model, silence
from worker.engine.loop import Loop
from worker.engine.outbox import Outbox
from worker.engine.ring_head import RingHead
from worker.engine.ring_setup import serve_stage
from worker.engine.room import NoRoom, fit_context
from worker.engine.speculation.candidates import Counters
from worker.engine.speculation.setup import make_speculator
from worker.gguf_header import GgufError, read_header
from worker.link import MOST_CONTEXT, EngineConfig, Failed, Loading, Ready, decode_config, pack

_WEIGHTS = 0.9
"""What reading the weights is of the load; the rest is calibration, if it is not cached."""


def main() -> None:
    """Load, prove that a token comes out, serve."""
    parser = argparse.ArgumentParser(prog="worker.engine")
    parser.add_argument("--fd", type=int, required=True)
    link = socket.socket(fileno=parser.parse_args().fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(file=sys.stderr))
    first = read_message(link)
    if first is None:
        return
    config = decode_config(first)
    silence()
    try:
        if config.ring is not None and not config.ring.head:
            serve_stage(link, config, config.ring, _progress(link))
            os._exit(0)
        serve = _load(link, config)
    except (LoadError, NoRoom, GgufError, OSError, RuntimeError) as error:
        link.sendall(pack(Failed(f"{config.path}: {error}")))
        sys.exit(1)
    gc.freeze()  # the vocabulary tables live for ever: never walk them again
    serve()
    # an orderly teardown is worth nothing here: exit returns all memory at once
    os._exit(0)


def _load(link: socket.socket, config: EngineConfig) -> Callable[[], None]:
    """Load; what is returned tells that it is ready, and serves until told to stop."""
    began = time.monotonic()
    progress = _progress(link)

    def weights(fraction: float) -> None:
        progress(_WEIGHTS * fraction)

    def calibrating(fraction: float) -> None:
        progress(_WEIGHTS + (1 - _WEIGHTS) * fraction)

    gpu = offload(config, config.path)
    undecided, config = config, msgspec.structs.replace(config, gpu_layers=gpu.layers)
    model = Model(config.path, gpu_layers=gpu.layers, on_progress=weights)
    asked = asked_of(config)
    context: Decoder
    head: RingHead | None = None
    if config.ring is not None:
        head = RingHead(model, config, asked.limit)
        head.join(config.ring)
        context = head.context
    else:
        context = _whole(model, config, asked)
    _prove(model, context, config.step_tokens)
    calibration = calibrated(
        model, context, config, disturbed_within=DISTURBED_SECONDS, tell=calibrating
    ).calibration
    context.set_threads(calibration.threads, calibration.prefill_threads)
    speculator, refusal = make_speculator(undecided, model, context, calibration)
    embedder = Embedder(model, config, context.context, calibration.prefill_threads)
    intake = Intake(link, model, config, context.context)
    # A stage's file is cut from the model's: advice on its format would name what nobody knows.
    advice = advise(config.path, gpu_layers=gpu.layers) if config.ring is None else ""
    told = (refusal, gpu.advice, variance(model, config), advice)
    ready = Ready(
        context=context.context,
        slots=context.slots,
        threads=calibration.threads,
        description=model.description(),
        load_seconds=round(time.monotonic() - began, 3),
        embeddings=config.embeddings,
        advice="; ".join(filter(None, told)),
    )

    def begin(inbox: Inbox) -> Loop:
        if speculator is not None:
            speculator.counters = Counters()  # like all that the loop counts
        loop = Loop(
            context,
            embedder,
            inbox,
            Outbox(link),
            calibration,
            speculator,
            step_tokens=config.step_tokens,
            prefix_memory=config.prefix_memory,
        )
        group = "" if inbox.place is None else inbox.place.group
        link.sendall(pack(msgspec.structs.replace(ready, group=group)))
        return loop

    def serve() -> None:
        intake.start()
        if head is None:
            begin(intake.inbox).run()
        else:
            head.serve(link, intake, begin)

    return serve


def _progress(link: socket.socket) -> Callable[[float], None]:
    """Tells the agent how far the load is, in steps worth telling."""
    told = 0.0

    def progress(fraction: float) -> None:
        nonlocal told
        if fraction - told >= 0.02 or fraction == 1.0:
            told = fraction
            link.sendall(pack(Loading(fraction)))

    return progress


def _whole(model: Model, config: EngineConfig, asked: Asked) -> Context:
    fitting = fit_context(
        read_header(Path(config.path)),
        slots=config.slots,
        wanted=config.context or min(model.trained_context, MOST_CONTEXT),
        step_tokens=config.step_tokens,
        memory=config.memory_limit,
        cells=config.kv_tokens,
    )
    return make_context(
        model,
        config,
        slots=config.slots,
        context=fitting,
        threads=asked.limit,
        prefill_threads=asked.prefill_threads or asked.limit,
    )


def _prove(model: Model, context: Decoder, capacity: int) -> None:
    """Generate a real token, which also warms all pages up."""
    batch = Batch(capacity)
    batch.token[0] = max(model.bos, 0)
    batch.position[0] = 0
    batch.slot[0] = 0
    batch.output[0] = 1
    code = context.decode(batch, 1)
    if code != 0:
        raise RuntimeError(f"llama_decode returned {code} for the first token")
    if not -float("inf") < float(context.logits(1)[0].max()) < float("inf"):
        raise RuntimeError("the first token's logits are not finite")
    context.forget(0)


if __name__ == "__main__":
    main()
