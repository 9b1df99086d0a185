"""What the engine needs of whatever computes a model: one context, or a ring of stages."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from worker.engine.batch import Batch

__all__ = ("Decoder",)


class Decoder(Protocol):
    """Slots with a cache; see `worker.engine.llama.Context` for what each method does."""

    slots: int
    context: int
    """Tokens of a slot."""
    lanes: int
    """Steps that may be under way at once; 1: only `decode`, and one at a time."""
    tile: int
    """Rows of one sequence that, computed together, are rounded otherwise than fewer; 0: no number
    of rows is."""
    together: int
    """Rows of one sequence that can be computed together at most."""
    latency: float
    """Seconds that a step takes whatever is in it: the way round to other hosts."""

    def set_threads(self, decode: int, prefill: int) -> None:
        """See `Context.set_threads`."""
        ...

    def decode(self, batch: Batch, rows: int) -> int:
        """See `Context.decode`."""
        ...

    def interrupt(self) -> None:
        """See `Context.interrupt`."""
        ...

    def clear_interrupt(self) -> None:
        """See `Context.clear_interrupt`."""
        ...

    def begin(self, batch: Batch, rows: int) -> None:
        """Set off a step of one row of each of some sequences; `finish` waits for the oldest one.

        Nothing else may be done to the cache while one is under way.
        """
        ...

    def finish(self) -> None:
        """Wait for the oldest step that has been set off; its logits are there then."""
        ...

    def logits(self, outputs: int) -> NDArray[np.float32]:
        """See `Context.logits`."""
        ...

    def forget(self, slot: int, start: int = 0) -> bool:
        """See `Context.forget`."""
        ...

    def copy(self, source: int, target: int) -> bool:
        """See `Context.copy`."""
        ...

    def swap(self, left: int, right: int) -> bool:
        """See `Context.swap`."""
        ...

    def save(self, slot: int) -> NDArray[np.uint8] | None:
        """See `Context.save`."""
        ...

    def restore(self, slot: int, state: NDArray[np.uint8]) -> bool:
        """See `Context.restore`."""
        ...

    def close(self) -> None:
        """See `Context.close`."""
        ...
