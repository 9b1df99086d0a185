"""Requests for models that nobody serves yet: held, in order, until a worker does.

One load serves all who wait for it; that some of them leave does not end it, since it is the sum of
the demand that workers go by. How many may wait is bounded, for each model and in all.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Protocol

from router.fleet import Fleet
from shared.errors import MeshError, Unavailable

__all__ = ("Held", "WaitingRoom")

HOPELESS = 5.0
"""Least seconds for which no worker can load a model any more until those who wait are told."""
FULL_RETRY = 10
"""Seconds after which to come again when too many wait."""


class Held(Protocol):
    """One request that waits."""

    def resume(self) -> None:
        """Somebody may take it now."""
        ...

    def refuse(self, error: MeshError) -> None:
        """Nobody will take it."""
        ...


class WaitingRoom:
    """Who waits for which model, first come first served."""

    def __init__(self, fleet: Fleet, *, per_model: int, in_all: int, patience: float = 0.0) -> None:
        self._fleet = fleet
        self._per_model = per_model
        self._in_all = in_all
        self._patience = patience
        self._queues: dict[str, OrderedDict[Held, None]] = {}
        self._count = 0
        self._hopeless: dict[str, float] = {}

    def __len__(self) -> int:
        return self._count

    def counts(self) -> dict[str, int]:
        """How many wait, by model."""
        return {model: len(queue) for model, queue in self._queues.items()}

    def enter(self, model: str, held: Held, *, again: bool = False) -> None:
        """Wait for a model; who waits `again`, having found no room after all, is the first.

        Raises:
            Unavailable: too many wait.
        """
        queue = self._queues.get(model) or OrderedDict()
        full = len(queue) >= self._per_model or self._count >= self._in_all
        if full and not again:
            raise Unavailable(
                f"The model '{model}' is being brought up, and {len(queue)} requests wait for it "
                f"already ({self._count} for all models); no more are held.",
                retry_after=FULL_RETRY,
            )
        queue[held] = None
        if again:
            queue.move_to_end(held, last=False)
        self._queues[model] = queue
        self._count += 1

    def leave(self, model: str, held: Held) -> None:
        """Wait no more."""
        queue = self._queues.get(model)
        if queue is None or held not in queue:
            return
        del queue[held]
        self._count -= 1
        if not queue:
            del self._queues[model]

    def look(self, models: Iterable[str]) -> None:
        """See who can go on: as many as there is room for, the longest waiting first."""
        for model in models:
            queue = self._queues.get(model)
            pool = self._fleet.pool(model)
            if queue is None or pool is None:
                continue
            for held in list(queue)[: max(0, pool.free)]:
                self.leave(model, held)
                held.resume()

    def sweep(self, now: float, why: Callable[[str], MeshError]) -> None:
        """See who waits in vain: no worker is left that could load the model."""
        for model in self._hopeless.keys() - self._queues.keys():
            del self._hopeless[model]
        for model, queue in list(self._queues.items()):
            if self._fleet.pool(model) is not None or self._fleet.hopeful(model):
                self._hopeless.pop(model, None)
            elif now - self._hopeless.setdefault(model, now) > max(HOPELESS, self._patience):
                for held in list(queue):
                    self.leave(model, held)
                    held.refuse(why(model))

    def progress(self, model: str) -> str:
        """How far the model is, in a few words."""
        states = self._fleet.loading(model)
        if not states:
            return "waiting for a worker"
        # "loading 40%": of several workers the one that says most.
        detail = max(" ".join(state.detail.split()) for state in states)
        return detail if detail.startswith("loading") else f"loading: {detail or 'begun'}"
