"""Steps of a real model, timed, for `calibration.py`; and whether anybody disturbed them."""

import os
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from worker.engine.batch import Batch
from worker.engine.decoder import Decoder

__all__ = ("ContextStepper", "run_queue_seconds", "spin_rounds")

_TASKS = Path("/proc/self/task")


class ContextStepper:
    """Uses slot 0 of a context in which nothing runs; `close` leaves the slot empty.

    Raises:
        RuntimeError: llama.cpp failed; from every method.
    """

    def __init__(self, context: Decoder, step_tokens: int, vocab_size: int) -> None:
        self._context = context
        self._batch = Batch(step_tokens)
        self._vocab_size = vocab_size
        self._end = 0
        """Tokens in the cache."""

    def set_threads(self, decode: int, prefill: int) -> None:
        """Compute with so many threads from now on."""
        self._context.set_threads(decode, prefill)

    def prefill(self, rows: int) -> float:
        """Put rows into the cache; seconds. At most as many as one step may have."""
        seconds = self._run(rows, output=0)
        self._end += rows
        return seconds

    def step(self, rows: int) -> float:
        """Compute rows with all their logits and drop them again; seconds."""
        seconds = self._run(rows, output=1)
        if not self._context.forget(0, self._end):
            # A recurrent state cannot be cut: what follows is measured behind these rows, and after
            # an empty start where there is no room. Its cost does not depend on the depth.
            self._end += rows
        return seconds

    def close(self) -> None:
        """Empty the slot."""
        self._context.forget(0)

    def _run(self, rows: int, *, output: int) -> float:
        if self._end + rows > self._context.context:
            self._context.forget(0)
            self._end = 0
        batch = self._batch
        # Tokens that differ, as in a text: experts of a mixture are read as they would be there.
        batch.token[:rows] = (self._end + np.arange(rows)) * 7919 % self._vocab_size
        batch.position[:rows] = self._end + np.arange(rows)
        batch.slot[:rows] = 0
        batch.output[:rows] = output
        began = time.perf_counter()
        code = self._context.decode(batch, rows)
        # What calibration finds is kept: it is to hold wherever the other stages are.
        took = time.perf_counter() - began
        seconds = max(took - self._context.latency, took / 10)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code} for {rows} rows of the calibration")
        return seconds


def run_queue_seconds() -> float:
    """Seconds that this process's threads were ready and waited for a core; 0: not known.

    The second number of Linux's `/proc/PID/task/TID/schedstat`, in nanoseconds.
    """
    waited = 0
    if not _TASKS.is_dir():
        return 0.0
    for task in _TASKS.iterdir():
        # A thread may end meanwhile, and a kernel may keep no such count.
        with suppress(OSError, IndexError):
            waited += int((task / "schedstat").read_text().split()[1])
    return waited / 1e9


def spin_rounds() -> int:
    """How many rounds GNU OpenMP's threads spin before they sleep; -1: not known.

    As the environment told the library when it was loaded.
    """
    rounds = os.environ.get("GOMP_SPINCOUNT", "")
    return int(rounds) if rounds.isdecimal() else -1
