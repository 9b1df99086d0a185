"""The calibration of a loaded model: from the cache, or measured. And a process that does only it.

    python -m worker.engine.calibrate MODEL.gguf [--threads N] [--fresh]

is started by `mesh worker calibrate`. It tells on stdout, a line each, `progress FRACTION` and at
the end `done` with a `Report` as JSON. What is wrong is one line on stderr, with exit code 1.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import structlog

from worker.cache_folder import cache_folder
from worker.engine.calibration import DEPTH, WIDTHS, Asked, Calibration, calibrate, nominal
from worker.engine.calibration_cache import cache_key, load, store, switched_off
from worker.engine.decoder import Decoder
from worker.engine.gpu import offload
from worker.engine.invariant_context import InvariantContext, make_context
from worker.engine.llama import LoadError, Model, silence
from worker.engine.stepper import ContextStepper, run_queue_seconds, spin_rounds
from worker.link import EngineConfig

__all__ = ("Report", "asked_of", "calibrated", "main")

DISTURBED = 0.1
"""Waiting for a core, all threads together, as a part of the time measured, from which on a
calibration is kept for minutes only. Measured on two cores: undisturbed at most 0.01; one thread
beside one busy process 0.05, with true figures, beside two 0.36; two threads beside one 0.8."""

_LOADING = 0.6
"""What loading the model is of all the progress."""

log = structlog.get_logger()


class Report(msgspec.Struct, frozen=True):
    """A calibration and where it is from."""

    calibration: Calibration
    source: str
    """`measured`, `cached`, `disturbed` (measured, but others kept the cores busy), or `nominal`
    (`MESH_CALIBRATE` is off)."""


def asked_of(config: EngineConfig) -> Asked:
    """What the operator said about threads, and the cores that this process may use."""
    return Asked(
        cores=len(os.sched_getaffinity(0)),
        threads=config.threads,
        prefill_threads=config.prefill_threads,
    )


def calibrated(
    model: Model,
    context: Decoder,
    config: EngineConfig,
    *,
    fresh: bool = False,
    disturbed_within: float = 0.0,
    tell: Callable[[float], None] = lambda fraction: None,
) -> Report:
    """The calibration of a model that is loaded and at rest; its slot 0 is emptied.

    The thread that calls this must be the one that decodes later: OpenMP's threads belong to it.

    Args:
        model: the model.
        context: a context of it in which a token has been generated, so that all pages are there.
        config: what it was loaded with, the number of layers on GPUs included.
        fresh: measure, whatever the cache holds.
        disturbed_within: seconds; one that was disturbed will do, if it is no older.
        tell: called with the part that is done, 0 to 1, if it takes a while.

    Raises:
        OSError: the model's file is gone.
        RuntimeError: llama.cpp failed.
    """
    asked, poll = asked_of(config), spin_rounds()
    if switched_off():
        return Report(nominal(asked, poll), "nominal")
    key = cache_key(
        Path(config.path),
        asked,
        gpu_layers=config.gpu_layers or 0,
        step_tokens=config.step_tokens,
        poll=poll,
        batch_invariant=isinstance(context, InvariantContext),
    )
    folder = cache_folder() / "calibration"
    kept = None if fresh else load(key, folder, disturbed_within=disturbed_within)
    if kept is not None:
        return Report(kept, "cached")
    began, waited = time.monotonic(), run_queue_seconds()
    stepper = ContextStepper(context, config.step_tokens, model.vocab_size)
    calibration = calibrate(
        stepper,
        asked,
        poll=poll,
        most_rows=min(config.step_tokens, context.context),
        tell=tell,
    )
    stepper.close()
    seconds = time.monotonic() - began
    disturbed = (run_queue_seconds() - waited) / seconds
    log.info(
        "calibration.measured",
        seconds=round(seconds, 2),
        threads=calibration.threads,
        prefill_threads=calibration.prefill_threads,
        disturbed=round(disturbed, 3),
    )
    store(key, calibration, folder, disturbed=disturbed > DISTURBED)
    return Report(calibration, "disturbed" if disturbed > DISTURBED else "measured")


def main(arguments: Sequence[str] | None = None) -> int:
    """Calibrate as the command line says and return the exit code."""
    parser = argparse.ArgumentParser(prog="worker.engine.calibrate")
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--fresh", action="store_true")
    asked = parser.parse_args(arguments)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(file=sys.stderr))
    silence()
    # As `mesh-worker` loads it when nothing else is said.
    config = EngineConfig(
        path=str(asked.model),
        model=asked.model.name,
        worker="calibrate",
        threads=asked.threads,
        gpu_layers=None,
    )
    try:
        report = _load_and_calibrate(config, fresh=asked.fresh)
    except (LoadError, OSError, RuntimeError) as error:
        sys.stderr.write(f"{asked.model}: {' '.join(str(error).split())}\n")
        return 1
    _say(f"done {msgspec.json.encode(report).decode()}")
    return 0


def _load_and_calibrate(config: EngineConfig, *, fresh: bool) -> Report:
    def loading(fraction: float) -> None:
        _say(f"progress {_LOADING * fraction:.3f}")

    def measuring(fraction: float) -> None:
        _say(f"progress {_LOADING + (1 - _LOADING) * fraction:.3f}")

    gpu = offload(config, config.path)
    config = msgspec.structs.replace(config, gpu_layers=gpu.layers)
    model = Model(config.path, gpu_layers=gpu.layers, on_progress=loading)
    limit = asked_of(config).limit
    context = make_context(
        model,
        config,
        slots=1,
        context=2 * (DEPTH + max(WIDTHS)),
        threads=limit,
        prefill_threads=limit,
    )
    stepper = ContextStepper(context, config.step_tokens, model.vocab_size)
    stepper.prefill(2)  # reads all weights once, as the engine's first token does
    stepper.close()
    return calibrated(model, context, config, fresh=fresh, tell=measuring)


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - it is how the parent hears of it


if __name__ == "__main__":
    sys.exit(main())
