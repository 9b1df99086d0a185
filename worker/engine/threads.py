"""The threads of each step: two governors' choices, carried out.

llama.cpp computes a row alone with one number of threads and several rows with another, so each has
a governor of its own. While a prompt is computed nothing is tried out.
"""

from worker.engine.calibration import Calibration
from worker.engine.decoder import Decoder
from worker.engine.governor import Governor
from worker.engine.speculation.speculator import Speculator

__all__ = ("Threads",)


class Threads:
    """Sets the threads of a context, and of the draft model's, which keeps its pace."""

    def __init__(
        self, context: Decoder, calibration: Calibration, speculator: Speculator | None
    ) -> None:
        self._context = context
        self._narrow = Governor(calibration.threads, calibration.seconds)
        self._wide = Governor(calibration.prefill_threads, calibration.seconds)
        self._drafter = speculator.drafter if speculator is not None else None
        self._set = (calibration.threads, calibration.prefill_threads)

    def choose(self, *, prefill: bool) -> None:
        """Before a step: `prefill` says whether a prompt is computed in it."""
        narrow, wide = self._narrow, self._wide
        wanted = (narrow.settled, wide.settled) if prefill else (narrow.threads, wide.threads)
        if wanted == self._set:
            return
        self._set = wanted
        self._context.set_threads(*wanted)
        if self._drafter is not None:
            self._drafter.set_threads(*wanted)

    def measured(self, rows: int, seconds: float) -> None:
        """A step without prefill had so many rows and took so long."""
        (self._narrow if rows == 1 else self._wide).measured(rows, seconds)
